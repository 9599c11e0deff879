//! The service manager of a node: starts `weft tunnel`, `weft agent` and `weft ingress`, starts them again when they die, keeps their
//! output in files and their pids in `services.json`. The ingress's sockets outlive it, as under systemd.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use weft_netstack::kernel::service_manager::ServiceManager;

use super::process::write_json;
use super::reaper::Reaper;
use super::topology::{CLUSTER_DOMAIN, Topology};
use super::{machine, paths};

/// Pause before a restart, the smallest that systemd units commonly use with `RestartSec`.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// The same of weft-ingress.service.
const INGRESS_RESTART_DELAY: Duration = Duration::from_millis(200);
/// Between two looks at what a service has said.
const HEAR: Duration = Duration::from_millis(100);
const INGRESS_NOTIFY: &str = "/run/lab/ingress.notify";

/// One service as the supervisor sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServiceState {
    /// In the node's pid namespace; none while it does not run.
    pub(super) pid: Option<i32>,
    pub(super) restarts: u32,
    /// How it ended last, as a shell says it.
    pub(super) last_exit: Option<i32>,
}

pub(super) type Services = BTreeMap<String, ServiceState>;

#[derive(Clone)]
struct Board {
    node: String,
    services: Arc<Mutex<Services>>,
}

impl Board {
    fn update(&self, service: &str, change: impl FnOnce(&mut ServiceState)) {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        change(services.entry(service.to_owned()).or_default());
        if let Err(error) = write_json(&paths::node_services(&self.node), &*services) {
            eprintln!("services: {error:#}");
        }
    }
}

/// Starts the services of `node`, each watched by a thread of its own.
pub(super) fn start(topology: &Topology, node: &str, reaper: &Reaper) -> anyhow::Result<()> {
    let board = Board { node: node.to_owned(), services: Arc::default() };
    let services = [
        ("tunnel", tunnel_arguments()),
        ("agent", agent_arguments(topology, node)),
        ("ingress", words(&["ingress", "serve", "--run-dir", "/run/weft"])),
    ];
    for (service, arguments) in services {
        let (board, reaper) = (board.clone(), reaper.clone());
        std::thread::Builder::new()
            .name(service.to_owned())
            .stack_size(256 * 1024)
            .spawn(move || keep_running(service, &arguments, &board, &reaper))
            .with_context(|| format!("start the thread of {service}"))?;
    }
    Ok(())
}

/// Runs the service for ever; exit code 0 of the tunnel means that it is not needed here (a kernel with WireGuard).
fn keep_running(service: &str, arguments: &[String], board: &Board, reaper: &Reaper) {
    let mut manager = None;
    let delay = if service == "ingress" { INGRESS_RESTART_DELAY } else { RESTART_DELAY };
    if service == "ingress" {
        match ServiceManager::bind(Path::new(INGRESS_NOTIFY)) {
            Ok(bound) => manager = Some(bound),
            Err(error) => eprintln!("{INGRESS_NOTIFY}: {error}; its sockets end with it"),
        }
    }
    loop {
        match run_once(service, arguments, board, reaper, manager.as_mut()) {
            Ok(0) if service == "tunnel" => return,
            Ok(code) => eprintln!("{service} ended with {code}; starting it again"),
            Err(error) => eprintln!("{service}: {error:#}"),
        }
        std::thread::sleep(delay);
        board.update(service, |state| state.restarts += 1);
    }
}

fn run_once(
    service: &str,
    arguments: &[String],
    board: &Board,
    reaper: &Reaper,
    mut manager: Option<&mut ServiceManager>,
) -> anyhow::Result<i32> {
    /// Held while a service is started: no other inherits what is meant for it.
    static STARTING: Mutex<()> = Mutex::new(());
    let log = machine::open_log(&paths::log(&board.node, service))?;
    let output = log.try_clone()?;
    let start = |command: &mut Command| {
        reaper.spawn(command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(log))
    };
    let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let running = match &mut manager {
        Some(manager) => {
            manager.start(|shell| start(shell.arg(paths::BINARY))).context("give sockets back")?
        }
        None => start(&mut Command::new(paths::BINARY)),
    };
    let running = running.with_context(|| format!("start {service}"))?;
    drop(starting);
    board.update(service, |state| state.pid = Some(running.pid));
    let code = match manager {
        None => running.ended.recv().context("wait for the end")?,
        Some(manager) => loop {
            if let Err(error) = manager.hear() {
                eprintln!("{service}: {INGRESS_NOTIFY}: {error}");
            }
            match running.ended.recv_timeout(HEAR) {
                Err(RecvTimeoutError::Timeout) => {}
                ended => break ended.context("wait for the end")?,
            }
        },
    };
    board.update(service, |state| (state.pid, state.last_exit) = (None, Some(code)));
    Ok(code)
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|&word| word.to_owned()).collect()
}

fn tunnel_arguments() -> Vec<String> {
    words(&["tunnel", "--unless-kernel", "--run-dir", "/run/weft", "--state-dir", "/var/lib/weft"])
}

fn agent_arguments(topology: &Topology, node: &str) -> Vec<String> {
    let kubeconfig = paths::agent_kubeconfig(node);
    words(&[
        "agent",
        "--node-name",
        node,
        "--kubeconfig",
        &kubeconfig.to_string_lossy(),
        "--cluster-cidr",
        &topology.cluster_cidrs().join(","),
        "--service-cidr",
        &topology.service_cidrs().join(","),
        "--cluster-dns",
        &topology.cluster_dns().join(","),
        "--cluster-domain",
        CLUSTER_DOMAIN,
        "--cni-conf-dir",
        "/etc/cni/net.d",
        "--cni-bin-dir",
        "/opt/cni/bin",
        "--run-dir",
        "/run/weft",
        "--state-dir",
        "/var/lib/weft",
        "--resolv-conf",
        "/etc/resolv.conf",
        "--ingress",
        "on",
        "--adopt-ingress-nginx",
        "true",
        "--log-format",
        "human",
    ])
}
