//! Machines of the lab: the switch, the client host and the nodes. A machine is a process that is the first of its
//! own pid namespace, with its own network, mounts, host name and IPC; when it dies, all that ran there dies with it.

use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, unshare};

use super::process::{Recorded, read_json, write_json};
use super::reaper::Reaper;
use super::topology::{CLUSTER_DOMAIN, Role, Topology};
use super::{kubelet, link, namespace, paths, supervisor};

/// Starts machine `name`, cables it and lets it go on. The record is written before the machine does anything, so a
/// crash of the caller leaves nothing unknown behind: a machine that is not told to go on ends itself.
pub(super) fn start(topology: &Topology, name: &str) -> anyhow::Result<Recorded> {
    let role = topology.role(name)?;
    let log = open_log(&paths::log(name, "machine"))?;
    let mut command = Command::new(paths::BINARY);
    command.args(["lab", "machine", name]).stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
    let mut child = namespace::on_thread(|| {
        unshare(namespace::OWN_VIEW | CloneFlags::CLONE_NEWNET)
            .context("make namespaces (is this root, and are namespaces allowed here?)")?;
        command.spawn().with_context(|| format!("start machine {name}"))
    })?;
    let recorded = Recorded::observe(i32::try_from(child.id())?)?;
    write_json(&paths::process_record(name), &recorded)?;
    cable(topology, name, role, recorded.pid)?;
    let mut go = child.stdin.take().context("standard input of the machine")?;
    go.write_all(b"go\n").with_context(|| {
        format!("machine {name} ended while starting; see {}", paths::log(name, "machine").display())
    })?;
    Ok(recorded)
}

fn cable(topology: &Topology, name: &str, role: Role, pid: i32) -> anyhow::Result<()> {
    let network = format!("/proc/{pid}/ns/net");
    let addresses = topology.lan_addresses(role);
    if role == Role::Lan {
        return namespace::inside_network(Path::new(&network), || link::make_switch(&addresses));
    }
    let lan = running("lan")?;
    let machine = File::open(&network).with_context(|| format!("open {network}"))?;
    let switch = format!("/proc/{}/ns/net", lan.pid);
    let far = namespace::inside_network(Path::new(&switch), || link::plug_in(name, &machine))?;
    let gateways = topology.gateways();
    namespace::inside_network(Path::new(&network), || link::configure(name, &far, &addresses, &gateways))
}

/// The first process of a machine that is up.
pub(super) fn running(name: &str) -> anyhow::Result<Recorded> {
    let recorded = Recorded::read(&paths::process_record(name)).filter(|recorded| recorded.is_alive());
    recorded.with_context(|| format!("{name} is not up (`weft lab up` starts what is missing)"))
}

/// The topology of the lab that is up.
pub(super) fn topology() -> anyhow::Result<Topology> {
    read_json(&paths::run("lab.json")).context("no lab is up; `weft lab up` starts one")
}

pub(super) fn open_log(path: &Path) -> anyhow::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    }
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

/// The body of `weft lab machine NAME`: the first process of the machine. Returns only on failure.
pub(super) fn run(name: &str) -> anyhow::Result<()> {
    ensure!(std::process::id() == 1, "`weft lab machine` is started by `weft lab up` only");
    // Detached from the terminal of whoever started the lab.
    nix::unistd::setsid().context("start a session")?;
    let topology = topology()?;
    let role = topology.role(name)?;
    let mut word = String::new();
    std::io::stdin().lock().read_line(&mut word).context("wait for the cable")?;
    ensure!(word == "go\n", "the lab went away before machine {name} was ready");
    nix::unistd::dup2_stdin(File::open("/dev/null").context("open /dev/null")?)
        .context("detach standard input")?;
    build_view(&topology, name, role)?;
    let reaper = Reaper::default();
    if matches!(role, Role::Node(_)) {
        supervisor::start(&topology, name, &reaper)?;
        kubelet::start(&topology, name, &reaper)?;
    }
    reaper.reap()
}

/// Mounts and names that a machine has of its own. `/run` is empty at every boot, `/var/lib/weft` survives.
fn build_view(topology: &Topology, name: &str, role: Role) -> anyhow::Result<()> {
    namespace::make_mounts_private()?;
    namespace::mount_new("proc", "/proc")?;
    namespace::mount_new("sysfs", "/sys")?;
    namespace::mount_new("tmpfs", "/run")?;
    for directory in ["/run/netns", "/run/lock", "/run/lab"] {
        fs::create_dir_all(directory).with_context(|| format!("create {directory}"))?;
    }
    nix::unistd::sethostname(name).context("set the host name")?;
    let nameservers: String =
        topology.gateways().iter().map(|gateway| format!("nameserver {gateway}\n")).collect();
    // The LAN has no resolver: names outside the cluster fail at once instead of leaving the machine.
    namespace::cover_file(Path::new("/etc/resolv.conf"), &nameservers, Path::new("/run/lab/resolv.conf"))?;
    namespace::cover_file(Path::new("/etc/hostname"), &format!("{name}\n"), Path::new("/run/lab/hostname"))?;
    namespace::cover_file(Path::new("/etc/hosts"), &hosts(topology), Path::new("/run/lab/hosts"))?;
    if matches!(role, Role::Node(_)) {
        namespace::bind(&paths::node_state(name), Path::new("/var/lib/weft"))?;
        namespace::bind(&paths::node_cni(name), Path::new("/etc/cni/net.d"))?;
        namespace::bind(&paths::node_plugins(name), Path::new("/opt/cni/bin"))?;
    }
    Ok(())
}

/// Every machine knows the others by name.
fn hosts(topology: &Topology) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for name in topology.machine_names() {
        if let Ok(role) = topology.role(&name) {
            for (address, _) in topology.lan_addresses(role) {
                text.push_str(&format!("{address} {name} {name}.lab.{CLUSTER_DOMAIN}\n"));
            }
        }
    }
    text
}
