//! The lab: a cluster of several nodes on one machine, running the very processes of production.
//!
//! ```text
//!  weft lab up --> machines (pid, network, mount, UTS and IPC namespaces of their own), held by `weft lab machine NAME`
//!    lan      the switch: a bridge; the API server listens on its address
//!    client   a host on the LAN outside the cluster
//!    nodeN    supervisor -> weft tunnel, weft agent, weft ingress
//!             kubelet    -> watches its pods -> sandbox -> CNI plugin -> `weft lab pod` (built-in server or a command)
//!  weft lab api --> becomes `weft server` with sockets in the LAN and on loopback
//! ```
//!
//! State: `/run/weft-lab` and `/var/lib/weft-lab` (`paths`). Nothing of the lab exists in the network namespace of the
//! machine that runs it, except the API server's socket on loopback.

mod api;
mod apply;
mod capture;
mod cni;
mod expand;
mod kubelet;
mod lifecycle;
mod link;
mod load;
mod machine;
mod namespace;
mod netexec;
mod paths;
mod pod;
mod process;
mod reaper;
mod sandbox;
mod shell;
mod status;
mod supervisor;
mod topology;
mod tour;

use std::path::PathBuf;

use anyhow::ensure;
use clap::Subcommand;

pub(crate) use topology::Family;

/// A cluster of several nodes on this machine, made of network namespaces; `weft lab down` leaves nothing behind.
#[derive(clap::Args, Debug)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Subcommand, Debug)]
enum LabCommand {
    /// Start the lab, or what of it is missing
    Up {
        /// Number of nodes [default: 3]
        #[arg(long)]
        nodes: Option<u16>,
        /// Address families of the cluster [default: dual]
        #[arg(long)]
        family: Option<Family>,
    },
    /// End the lab and verify that nothing is left
    Down,
    /// Show machines, services and pods
    Status,
    /// Show with real packets what Weft does, step by step; exits with 1 when a step fails
    Tour,
    /// Create or replace what manifests say; workloads become lab pods
    Apply {
        /// A YAML file, or - for standard input
        #[arg(short, long = "filename", required = true)]
        filename: Vec<String>,
    },
    /// Delete what manifests say
    Delete {
        /// A YAML file, or - for standard input
        #[arg(short, long = "filename", required = true)]
        filename: Vec<String>,
    },
    /// A shell, or a command, in a pod
    Sh {
        /// NAME or NAMESPACE/NAME
        pod: String,
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// A shell, or a command, on a node, on the client host or on the switch
    Exec {
        /// A node's name, client, or lan
        machine: String,
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Print the path of a kubeconfig for kubectl on this machine
    Kubeconfig,
    /// Power a node off and on again
    Reboot { node: String },
    /// Kill a node's agent with SIGKILL; its service manager starts it again
    KillAgent { node: String },
    /// Stop the API server
    StopApi,
    /// Start the API server again
    StartApi,
    /// Print the logs of a node, or of the API server for lan
    Logs {
        machine: String,
        /// One process only: agent, tunnel, ingress, machine, server, pod-NAME
        #[arg(long)]
        process: Option<String>,
    },
    /// The server of lab pods, on its own
    Netexec {
        /// TCP and UDP ports
        #[arg(default_value = "8080")]
        ports: Vec<u16>,
    },
    /// Ask HTTP URLs all the time and count the failures, for pods
    Load(load::LoadArgs),
    #[command(hide = true)]
    Machine { name: String },
    #[command(hide = true)]
    Pod { directory: PathBuf },
    #[command(hide = true)]
    Api,
}

/// Runs a `weft lab` command. Commands that run a command of the user end with its exit code.
pub(crate) fn run(args: LabArgs) -> anyhow::Result<()> {
    if !matches!(args.command, LabCommand::Netexec { .. } | LabCommand::Load(_)) {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces and needs root: use sudo"
        );
    }
    match args.command {
        LabCommand::Up { nodes, family } => lifecycle::up(nodes, family),
        LabCommand::Down => lifecycle::down(),
        LabCommand::Status => status::print(),
        LabCommand::Tour => tour::run(),
        LabCommand::Apply { filename } => apply::apply_files(&filename),
        LabCommand::Delete { filename } => apply::delete_files(&filename),
        LabCommand::Sh { pod, command } => end_with(shell::in_pod(&pod, &command)?),
        LabCommand::Exec { machine, command } => end_with(shell::on_machine(&machine, &command)?),
        LabCommand::Kubeconfig => shell::print_kubeconfig(),
        LabCommand::Reboot { node } => lifecycle::reboot(&node),
        LabCommand::KillAgent { node } => shell::kill_agent(&node).map(drop),
        LabCommand::StopApi => shell::stop_api(),
        LabCommand::StartApi => shell::start_api(),
        LabCommand::Logs { machine, process } => shell::print_logs(&machine, process.as_deref()),
        LabCommand::Netexec { ports } => netexec::run(&ports),
        LabCommand::Load(args) => load::run(&args),
        LabCommand::Machine { name } => machine::run(&name),
        LabCommand::Pod { directory } => end_with(pod::run(&directory)?),
        LabCommand::Api => api::run(),
    }
}

/// The exit code of a command of the user is ours.
fn end_with(code: i32) -> anyhow::Result<()> {
    match code {
        0 => Ok(()),
        #[allow(clippy::exit)] // nothing is left to drop, and `Result` knows no exit code
        code => std::process::exit(code),
    }
}
