//! `weft lab up`, `down` and `reboot`: what starts and ends the lab, each step safe to repeat and to interrupt.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams};
use nix::fcntl::{Flock, FlockArg};

use super::process::{Recorded, read_json, write_json};
use super::topology::{Family, MAX_NODES, Topology};
use super::{api, apply, machine, paths};

/// From the start of the last process to Ready of the last node.
const READY_LIMIT: Duration = Duration::from_secs(40);

/// Held while a command changes what is up.
fn lock() -> anyhow::Result<Flock<fs::File>> {
    fs::create_dir_all(paths::RUN).with_context(|| format!("create {}", paths::RUN))?;
    fs::set_permissions(paths::RUN, fs::Permissions::from_mode(0o700))?;
    let path = paths::run("lock");
    let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow::anyhow!("another `weft lab` command is changing the lab; try again when it is done")
    })
}

/// Starts what is missing. Prints a line a step.
pub(super) fn up(nodes: Option<u16>, family: Option<Family>) -> anyhow::Result<()> {
    let _lock = lock()?;
    let begin = Instant::now();
    let topology = choose_topology(nodes, family)?;
    create_directories(&topology)?;
    let mut started = 0;
    for name in ["lan", "client"] {
        started += usize::from(ensure_machine(&topology, name)?);
    }
    if api::is_up() {
        api::wait_until_it_answers(&topology)?;
        say!("  API server   already up");
    } else {
        let step = Instant::now();
        api::start(&topology)?;
        started += 1;
        say!("  API server   up on 127.0.0.1:{} ({})", topology.loopback_port, seconds(step));
    }
    apply::ensure(ingress_objects()?)?;
    for name in topology.node_names() {
        started += usize::from(ensure_machine(&topology, &name)?);
    }
    wait_until_ready(&topology)?;
    let what = if started == 0 { "was up already" } else { "is up" };
    say!("The lab {what}: {} nodes, {} ({}).", topology.nodes, family_text(topology.family), seconds(begin));
    Ok(())
}

/// What `weft manifests` prints for the ingress, without rights: the lab's API server knows those of agents.
fn ingress_objects() -> anyhow::Result<Vec<serde_json::Value>> {
    let mut objects = crate::manifests::documents(weft_manifests::RBAC)?;
    objects.extend(crate::manifests::documents(weft_manifests::INGRESS)?);
    objects
        .retain(|object| ["Namespace", "IngressClass", "Service"].iter().any(|kind| object["kind"] == *kind));
    Ok(objects)
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f64())
}

fn family_text(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
        Family::Dual => "IPv4 and IPv6",
    }
}

/// The topology on record, or a new one; a lab cannot change its shape while it is up.
fn choose_topology(nodes: Option<u16>, family: Option<Family>) -> anyhow::Result<Topology> {
    if let Ok(topology) = read_json::<Topology>(&paths::run("lab.json")) {
        let same = nodes.is_none_or(|nodes| nodes == topology.nodes)
            && family.is_none_or(|family| family == topology.family);
        ensure!(
            same,
            "a lab with {} nodes and {} is up; `weft lab down` ends it first",
            topology.nodes,
            family_text(topology.family)
        );
        return Ok(topology);
    }
    let nodes = nodes.unwrap_or(3);
    ensure!((1..=MAX_NODES).contains(&nodes), "--nodes takes 1 to {MAX_NODES}");
    // What an earlier lab left when this machine went down: another cluster's state must not leak into a new one.
    if Path::new(paths::STATE).exists() {
        remove_state()?;
    }
    let listener = TcpListener::bind("127.0.0.1:6443").or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    let loopback_port = listener.local_addr()?.port();
    let topology = Topology { family: family.unwrap_or(Family::Dual), nodes, loopback_port };
    write_json(&paths::run("lab.json"), &topology)?;
    Ok(topology)
}

/// Directories of the machines, the copy of the executable, the mount points that nodes cover.
fn create_directories(topology: &Topology) -> anyhow::Result<()> {
    for node in topology.node_names() {
        let plugins = paths::node_plugins(&node);
        for directory in [paths::node_state(&node), paths::node_cni(&node), plugins, paths::node_pods(&node)]
        {
            fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        }
    }
    fs::set_permissions(paths::STATE, fs::Permissions::from_mode(0o700))?;
    if !Path::new(paths::BINARY).exists() {
        let own = std::env::current_exe().context("find the running executable")?;
        let directory = Path::new(paths::BINARY).parent().context("the binary has a directory")?;
        fs::create_dir_all(directory)?;
        let temporary = directory.join("weft.new");
        fs::copy(&own, &temporary).with_context(|| format!("copy {}", own.display()))?;
        fs::rename(&temporary, paths::BINARY)?;
    }
    for point in paths::MOUNT_POINTS {
        create_mount_point(Path::new(point))?;
    }
    Ok(())
}

/// Creates a directory and its missing parents, each noted first so that `down` finds it after a crash too.
fn create_mount_point(point: &Path) -> anyhow::Result<()> {
    let mut missing: Vec<&Path> = point.ancestors().take_while(|directory| !directory.exists()).collect();
    missing.reverse();
    for directory in missing {
        let mut noted = fs::read_to_string(paths::created_directories()).unwrap_or_default();
        noted.push_str(&format!("{}\n", directory.display()));
        fs::write(paths::created_directories(), noted)?;
        fs::create_dir(directory).with_context(|| format!("create {}", directory.display()))?;
    }
    Ok(())
}

/// Starts the machine unless it runs; says what it did.
fn ensure_machine(topology: &Topology, name: &str) -> anyhow::Result<bool> {
    let addresses: Vec<String> =
        topology.lan_addresses(topology.role(name)?).iter().map(|(address, _)| address.to_string()).collect();
    let up = machine::running(name).is_ok();
    if !up {
        machine::start(topology, name).with_context(|| format!("start {name}"))?;
    }
    say!("  {name:<12} {} {}", if up { "already up" } else { "up" }, addresses.join(" "));
    Ok(!up)
}

/// Waits until every node is Ready, with a look at what the laggards say when it takes too long.
fn wait_until_ready(topology: &Topology) -> anyhow::Result<()> {
    let begin = Instant::now();
    loop {
        let asked = api::ask(async |client| {
            let nodes = Api::<Node>::all(client).list(&ListParams::default()).await.context("list nodes")?;
            Ok(nodes.into_iter().filter(is_ready).filter_map(|node| node.metadata.name).collect::<Vec<_>>())
        });
        let ready = match asked {
            // On a slow machine one answer may come too late.
            Err(_) if begin.elapsed() <= READY_LIMIT => Vec::new(),
            asked => asked?,
        };
        let late: Vec<String> =
            topology.node_names().into_iter().filter(|name| !ready.contains(name)).collect();
        if late.is_empty() {
            say!("  nodes        Ready ({})", seconds(begin));
            return Ok(());
        }
        if begin.elapsed() > READY_LIMIT {
            let log = paths::log(&late[0], "agent");
            bail!("not Ready: {}; the end of {}:\n{}", late.join(", "), log.display(), api::tail(&log, 8));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(super) fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"))
}

/// Power off and on: every process of the node dies at once, `/run` is empty afterwards, `/var/lib` kept.
pub(super) fn reboot(node: &str) -> anyhow::Result<()> {
    let _lock = lock()?;
    let topology = machine::topology()?;
    topology.expect_node(node)?;
    machine::running(node)?.kill_and_wait()?;
    for entry in fs::read_dir(paths::node_pods(node))?.flatten() {
        forget_boot(&entry.path())?;
    }
    fs::remove_file(paths::node_services(node)).ok();
    machine::start(&topology, node).map(drop)
}

/// Takes pid and addresses out of a pod's record, so that nobody reads those of the boot before.
fn forget_boot(path: &Path) -> anyhow::Result<()> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let mut record: serde_json::Value = read_json(path)?;
        (record["pid"], record["addresses"]) = (serde_json::Value::Null, serde_json::json!([]));
        record["phase"] = "Pending".into();
        write_json(path, &record)?;
    }
    Ok(())
}

/// Ends everything and looks afterwards whether anything is left. Also after a crash in the middle of anything.
pub(super) fn down() -> anyhow::Result<()> {
    if !Path::new(paths::RUN).exists() && !Path::new(paths::STATE).exists() {
        say!("No lab is up.");
        return Ok(());
    }
    let lock = lock()?;
    let mut ended = 0;
    for entry in fs::read_dir(paths::RUN)?.flatten() {
        let path = entry.path();
        if !path.to_string_lossy().ends_with(".process.json") {
            continue;
        }
        if let Some(recorded) = Recorded::read(&path).filter(|recorded| recorded.is_alive()) {
            recorded.kill_and_wait()?;
            ended += 1;
        }
    }
    // Machines that a crash left before their record end by themselves; give them a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !left_processes().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let created = remove_state()?;
    fs::remove_dir_all(paths::RUN).with_context(|| format!("remove {}", paths::RUN))?;
    drop(lock);
    verify_nothing_left(&created)?;
    say!("The lab is down: {ended} machines ended; no process, link, mount or file of it is left.");
    Ok(())
}

/// Removes the durable files and the mount points that the lab created; the list of those.
fn remove_state() -> anyhow::Result<Vec<PathBuf>> {
    let noted = fs::read_to_string(paths::created_directories()).unwrap_or_default();
    let created: Vec<PathBuf> = noted.lines().map(PathBuf::from).collect();
    for directory in created.iter().rev() {
        // One that has been filled by someone else since is theirs now.
        fs::remove_dir(directory).ok();
    }
    if Path::new(paths::STATE).exists() {
        fs::remove_dir_all(paths::STATE).with_context(|| format!("remove {}", paths::STATE))?;
    }
    Ok(created)
}

/// Processes that run the lab's copy of the executable.
fn left_processes() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let runs_our_copy = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|target| target.starts_with(paths::STATE))
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(runs_our_copy)
        .collect()
}

fn verify_nothing_left(created: &[PathBuf]) -> anyhow::Result<()> {
    let mut left: Vec<String> = left_processes().iter().map(|pid| format!("process {pid}")).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    left.extend(mounts.lines().filter(|line| line.contains("weft-lab")).map(|line| format!("mount {line}")));
    let is_empty = |path: &PathBuf| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    left.extend(
        created.iter().filter(|path| is_empty(path)).map(|path| format!("directory {}", path.display())),
    );
    for path in [paths::RUN, paths::STATE] {
        if Path::new(path).exists() {
            left.push(format!("directory {path}"));
        }
    }
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(())
}
