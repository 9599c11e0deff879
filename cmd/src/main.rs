//! The binary `weft`: flags to configuration, wiring, subcommands. No decisions.

/// A line on standard output, as `println!`; a reader that has seen enough (`| head`) ends nothing half done.
macro_rules! say {
    ($($text:tt)*) => { crate::line(format_args!($($text)*)) };
}

mod agent;
mod cleanup;
mod dns;
mod files;
mod flows;
mod ingress;
mod install;
mod ipam;
mod kept;
mod key;
mod lab;
mod lb;
mod lint;
mod log;
mod manifests;
mod policy;
mod server;
mod status;
mod tunnel;
mod uninstall;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[derive(Parser)]
#[command(
    name = "weft",
    version,
    about = "The whole network of a Kubernetes node in one binary",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install Weft as services of this host, or upgrade it
    Install(Box<install::InstallArgs>),
    /// Take Weft off this host: services, files and all that it programmed
    Uninstall(uninstall::UninstallArgs),
    /// Print what to `kubectl apply`: rights, the DaemonSet that installs every node, the DNS Service
    Manifests(Box<manifests::ManifestsArgs>),
    /// Run the node's agent (one a node)
    Agent(Box<agent::AgentArgs>),
    /// Run the userspace WireGuard tunnel, for kernels without WireGuard
    Tunnel(tunnel::TunnelArgs),
    /// Run the embedded API server
    Server(server::ServerArgs),
    /// Act as CNI plugin: the container runtime runs this
    Cni,
    /// Run a cluster of several nodes on this machine
    Lab(lab::LabArgs),
    /// Show what this node's agent does
    Status(status::StatusArgs),
    /// Show which pod of this node has which address
    Ipam(ipam::IpamArgs),
    /// Show or replace this node's WireGuard key
    Key(key::KeyArgs),
    /// Explain what network policies decide
    Policy(policy::PolicyArgs),
    /// Show which addresses Services have, and who answers for them
    Lb(lb::LbArgs),
    /// Show what this node's pods were allowed and denied of late
    Flows(flows::FlowsArgs),
    /// Ask this node's agent about names
    Dns(dns::DnsArgs),
    /// Show where requests to Ingresses go; `serve` answers them
    Ingress(ingress::IngressArgs),
    /// Say what would become of Ingresses here, annotation by annotation
    Lint(lint::LintArgs),
    /// Remove every rule, link, route and file of Weft from this node
    Cleanup(cleanup::CleanupArgs),
}

/// A container runtime runs the plugin without arguments, under whatever name it was installed.
fn run_by_container_runtime() -> bool {
    std::env::args_os().len() == 1 && std::env::var_os("CNI_COMMAND").is_some()
}

fn main() -> ExitCode {
    if run_by_container_runtime() {
        return weft_plugin::run();
    }
    let outcome = match parse().command {
        Command::Cni => return weft_plugin::run(),
        Command::Agent(args) => agent::run(*args),
        Command::Tunnel(args) => tunnel::run(args),
        Command::Server(args) => on_runtime(server::run(args)),
        Command::Lab(args) => lab::run(args),
        Command::Status(args) => status::run(&args),
        Command::Ipam(args) => ipam::run(&args),
        Command::Key(args) => key::run(&args),
        Command::Policy(args) => policy::run(&args),
        Command::Lb(args) => lb::run(&args),
        Command::Flows(args) => flows::run(&args),
        Command::Dns(args) => dns::run(&args),
        Command::Ingress(args) => ingress::run(&args),
        Command::Lint(args) => lint::run(&args),
        Command::Cleanup(args) => on_runtime(cleanup::run(args)),
        Command::Manifests(args) => manifests::run(*args),
        Command::Install(args) => install::run(*args),
        Command::Uninstall(args) => on_runtime(uninstall::run(args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft: {error:#}");
            if error.is::<Invalid>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Writes to standard output; a reader that has seen enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// For `say!`.
pub(crate) fn line(text: std::fmt::Arguments<'_>) {
    if let Err(error) = print(&format!("{text}\n")) {
        eprintln!("weft: write to standard output: {error}");
    }
}

/// A configuration that cannot be used: nothing was started, exit code 2.
#[derive(Debug)]
pub(crate) struct Invalid(pub(crate) String);

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// Flags, or the end of the process: one line that says what is wrong and what to do, exit code 2. Help and version go
/// the usual way.
fn parse() -> Cli {
    use clap::error::ErrorKind;
    Cli::try_parse().unwrap_or_else(|error| match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => error.exit(),
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or("invalid command line").trim_start_matches("error: ");
            let missing: String = text.lines().skip(1).take_while(|l| l.starts_with("  ")).collect();
            let command = std::env::args().skip(1).take_while(|arg| !arg.starts_with('-')).next();
            let help = command.map_or_else(|| "weft --help".to_owned(), |name| format!("weft {name} --help"));
            eprintln!("weft: {line}{missing}; see '{help}'");
            usage_exit()
        }
    })
}

#[expect(clippy::exit, reason = "a wrong command line ends the process before anything was started")]
fn usage_exit() -> ! {
    std::process::exit(2)
}

fn on_runtime(task: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(task)
}
