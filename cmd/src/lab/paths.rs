//! Where the lab keeps things. `/run/weft-lab` is gone after a reboot of the machine, `/var/lib/weft-lab` survives a
//! reboot of a node; `weft lab down` removes both.

use std::path::{Path, PathBuf};

pub(super) const RUN: &str = "/run/weft-lab";
pub(super) const STATE: &str = "/var/lib/weft-lab";
/// A copy of the running executable: a rebuild during a lab must not change what a restart of a process runs.
pub(super) const BINARY: &str = "/var/lib/weft-lab/bin/weft";
/// Directories of the host that a node covers with its own; `up` creates the missing ones, `down` removes those.
pub(super) const MOUNT_POINTS: [&str; 3] = ["/var/lib/weft", "/etc/cni/net.d", "/opt/cni/bin"];

pub(super) fn run(name: &str) -> PathBuf {
    Path::new(RUN).join(name)
}

pub(super) fn state(name: &str) -> PathBuf {
    Path::new(STATE).join(name)
}

/// Names the directories that `up` had to create as mount points, one a line, outermost first.
pub(super) fn created_directories() -> PathBuf {
    state("created-directories")
}

/// pid and start time of a machine's first process, or of the API server.
pub(super) fn process_record(name: &str) -> PathBuf {
    run(&format!("{name}.process.json"))
}

/// Kubeconfig of the person at the shell: the address on loopback, the administrator's token.
pub(super) fn admin_kubeconfig() -> PathBuf {
    run("kubeconfig")
}

pub(super) fn api_directory() -> PathBuf {
    state("api")
}

/// Durable directory of one machine.
pub(super) fn machine(name: &str) -> PathBuf {
    state("machines").join(name)
}

pub(super) fn log(machine_name: &str, process: &str) -> PathBuf {
    machine(machine_name).join("log").join(format!("{process}.log"))
}

/// The node's `/var/lib/weft`.
pub(super) fn node_state(node: &str) -> PathBuf {
    machine(node).join("state")
}

/// The node's `/etc/cni/net.d`.
pub(super) fn node_cni(node: &str) -> PathBuf {
    machine(node).join("cni")
}

/// The node's `/opt/cni/bin`.
pub(super) fn node_plugins(node: &str) -> PathBuf {
    machine(node).join("plugins")
}

pub(super) fn node_kubeconfig(node: &str) -> PathBuf {
    machine(node).join("kubeconfig")
}

/// The agent's, with the rights of `weft manifests`.
pub(super) fn agent_kubeconfig(node: &str) -> PathBuf {
    machine(node).join("agent-kubeconfig")
}

/// One JSON record a pod, written by the node's supervisor.
pub(super) fn node_pods(node: &str) -> PathBuf {
    machine(node).join("pods")
}

/// pids (of the node's pid namespace) and restarts of agent and tunnel, written by the supervisor.
pub(super) fn node_services(node: &str) -> PathBuf {
    machine(node).join("services.json")
}
