//! The pods of one node: a network namespace each, attached by the real CNI plugin, and a first process in it. Works
//! on levels: what shall run (from the API server) against what does; what fails is tried again. Each pod has a record
//! on disk, so that after a reboot with the API server away the pods come back, in the order in which they first came.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::cni::{self, Attachment};
use super::kubelet::{self, Shared, Word};
use super::process::{read_json, write_json};
use super::reaper::{ExitCode, Reaper};
use super::topology::Topology;
use super::{link, machine, namespace, paths, pod};

/// Pause before a pod that could not be started or stopped is tried again.
const RETRY: Duration = Duration::from_millis(300);
/// Every pod is looked at this often without a reason.
const IDLE: Duration = Duration::from_secs(30);
/// So long a pod's server may take until it listens.
const READY_LIMIT: Duration = Duration::from_secs(5);

/// The record of a pod: `/var/lib/weft-lab/machines/NODE/pods/UID.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PodRecord {
    pub(super) pod: Pod,
    /// Position in the order of starts.
    pub(super) order: u64,
    /// Addresses of this boot, IPv4 first; empty while it is not attached.
    pub(super) addresses: Vec<String>,
    /// The pod's first process, in the node's pid namespace, while it runs.
    pub(super) pid: Option<i32>,
    /// The plugin's result, for DEL.
    result: Option<Value>,
    pub(super) phase: String,
    /// Why the last try to start or stop it failed.
    #[serde(default)]
    pub(super) complaint: Option<String>,
}

/// The pod (uid) whose first process ended, and how.
pub(super) type End = (String, ExitCode);

struct Worker {
    topology: Topology,
    node: String,
    reaper: Reaper,
    shared: Shared,
    words: UnboundedSender<Word>,
    records: BTreeMap<String, PodRecord>,
    ends: (Sender<End>, Receiver<End>),
}

/// Starts the worker's thread; it begins with the remembered pods.
pub(super) fn start(
    topology: &Topology,
    node: &str,
    reaper: &Reaper,
    shared: Shared,
    words: UnboundedSender<Word>,
) -> anyhow::Result<()> {
    let records = remembered(node)?;
    let mut worker = Worker {
        topology: topology.clone(),
        node: node.to_owned(),
        reaper: reaper.clone(),
        shared,
        words,
        records,
        ends: channel(),
    };
    std::thread::Builder::new()
        .name("pods".to_owned())
        .spawn(move || worker.work())
        .context("start the pod worker")?;
    Ok(())
}

/// Records of the pods from before the reboot, without what the reboot ended.
fn remembered(node: &str) -> anyhow::Result<BTreeMap<String, PodRecord>> {
    let mut records = BTreeMap::new();
    for record in records_of(node)? {
        let fresh = PodRecord {
            addresses: Vec::new(),
            pid: None,
            result: None,
            phase: "Pending".to_owned(),
            ..record
        };
        records.insert(fresh.pod.uid().unwrap_or_default(), fresh);
    }
    Ok(records)
}

/// All records of a node; a damaged one is set aside and named.
pub(super) fn records_of(node: &str) -> anyhow::Result<Vec<PodRecord>> {
    let directory = paths::node_pods(node);
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let mut records: Vec<PodRecord> = Vec::new();
    for entry in fs::read_dir(&directory)?.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read_json(&path) {
            Ok(record) => records.push(record),
            // Replaced or removed while the directory was read.
            Err(_) if !path.exists() => {}
            Err(error) => {
                eprintln!("{error:#}; set aside");
                fs::rename(&path, path.with_extension("damaged")).ok();
            }
        }
    }
    records.sort_by_key(|record| record.order);
    Ok(records)
}

impl Worker {
    fn work(&mut self) {
        loop {
            let pending =
                self.records.values().any(|record| record.pid.is_none() && record.phase == "Pending");
            let failed = self.records.values().any(|record| record.complaint.is_some());
            let limit = if pending || failed { RETRY } else { IDLE };
            let (pods, listed) = self.shared.next(limit);
            self.notice_ends();
            if listed {
                self.follow(pods);
            }
            let mut waiting: Vec<(u64, String)> = self
                .records
                .iter()
                .filter(|(_, record)| record.pid.is_none() && record.phase == "Pending")
                .map(|(uid, record)| (record.order, uid.clone()))
                .collect();
            waiting.sort();
            for (_, uid) in waiting {
                let outcome = self.run_pod(&uid);
                self.note(&uid, "start", outcome);
            }
        }
    }

    /// Takes in the pods that shall run and stops the others.
    fn follow(&mut self, pods: BTreeMap<String, Pod>) {
        let is_wanted =
            |uid: &String| pods.get(uid).is_some_and(|pod| pod.metadata.deletion_timestamp.is_none());
        let unwanted: Vec<String> = self.records.keys().filter(|uid| !is_wanted(uid)).cloned().collect();
        for uid in unwanted {
            let outcome = self.stop_pod(&uid);
            self.note(&uid, "stop", outcome);
        }
        let mut fresh: Vec<Pod> =
            pods.into_values().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
        fresh.sort_by_key(|pod| (pod.metadata.creation_timestamp.clone(), pod.namespace(), pod.name_any()));
        for pod in fresh {
            let uid = pod.uid().unwrap_or_default();
            let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            if self.records.contains_key(&uid) || matches!(ended, Some("Succeeded" | "Failed")) {
                continue;
            }
            let order = self.records.values().map(|record| record.order + 1).max().unwrap_or(0);
            let record = PodRecord {
                pod,
                order,
                addresses: Vec::new(),
                pid: None,
                result: None,
                phase: "Pending".to_owned(),
                complaint: None,
            };
            self.records.insert(uid, record);
        }
    }

    /// Tells a new complaint to the log, the API and `weft lab status`; a retry that fails alike says nothing.
    fn note(&mut self, uid: &str, verb: &str, outcome: anyhow::Result<()>) {
        let complaint = outcome.err().map(|error| format!("{verb}: {error:#}"));
        let Some(record) = self.records.get_mut(uid).filter(|record| record.complaint != complaint) else {
            return;
        };
        if let Some(text) = &complaint {
            eprintln!("pod {uid}: {text}");
        }
        record.complaint = complaint;
        if let Err(error) = self.save(uid).and_then(|()| self.say_status(uid)) {
            eprintln!("pod {uid}: {error:#}");
        }
    }

    fn save(&self, uid: &str) -> anyhow::Result<()> {
        let record = self.records.get(uid).context("no such pod")?;
        write_json(&record_path(&self.node, uid), record)
    }

    /// From nothing to a running first process; each step may have been done by an earlier try.
    fn run_pod(&mut self, uid: &str) -> anyhow::Result<()> {
        let record = self.records.get(uid).context("no such pod")?.clone();
        let on_host = host_network(&record.pod);
        let netns = if on_host { PathBuf::from("/proc/self/ns/net") } else { netns_path(uid) };
        if !on_host {
            ensure_network(&netns)?;
        }
        if record.addresses.is_empty() {
            let (addresses, result) = if on_host {
                (kubelet::host_addresses(&self.topology, &self.node), None)
            } else {
                let result = cni::add(&self.reaper, &attachment(&record.pod, &netns))?;
                (cni::addresses(&result), Some(result))
            };
            let entry = self.records.get_mut(uid).context("no such pod")?;
            (entry.addresses, entry.result) = (addresses, result);
            self.save(uid)?;
        }
        let pid = self.start_process(uid, &netns)?;
        let entry = self.records.get_mut(uid).context("no such pod")?;
        (entry.pid, entry.phase) = (Some(pid), "Running".to_owned());
        self.save(uid)?;
        self.say_status(uid)
    }

    fn start_process(&self, uid: &str, netns: &Path) -> anyhow::Result<i32> {
        let record = self.records.get(uid).context("no such pod")?;
        let directory = PathBuf::from("/run/lab/pods").join(uid);
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let ready = directory.join("ready");
        fs::remove_file(&ready).ok();
        pod::Order::new(&record.pod, &record.addresses, &self.topology).save(&directory)?;
        let log = machine::open_log(&paths::log(&self.node, &format!("pod-{}", record.pod.name_any())))?;
        let mut command = Command::new(paths::BINARY);
        command.args(["lab", "pod"]).arg(&directory);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let reaper = &self.reaper;
        let running = namespace::inside_network(netns, || {
            unshare(namespace::OWN_VIEW).context("make the pod's namespaces")?;
            reaper.spawn(&mut command).context("start the pod's first process")
        })?;
        kubelet::tell_end(&self.shared, uid.to_owned(), running.ended, self.ends.0.clone());
        let deadline = Instant::now() + READY_LIMIT;
        let process = PathBuf::from(format!("/proc/{}", running.pid));
        while !ready.exists() && process.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(running.pid)
    }

    /// Processes that ended by themselves: a Job's pod is done, any other is started again.
    fn notice_ends(&mut self) {
        while let Ok((uid, code)) = self.ends.1.try_recv() {
            let Some(record) = self.records.get_mut(&uid) else { continue };
            record.pid = None;
            let policy = record.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
            record.phase = match (policy, code) {
                (Some("Never" | "OnFailure"), 0) => "Succeeded".to_owned(),
                (Some("Never"), _) => "Failed".to_owned(),
                _ => "Pending".to_owned(),
            };
            let outcome = self.save(&uid).and_then(|()| self.say_status(&uid));
            self.note(&uid, "note the end of", outcome);
        }
    }

    /// Ends the processes, gives the network back, forgets the record, lets the object go.
    fn stop_pod(&mut self, uid: &str) -> anyhow::Result<()> {
        let Some(record) = self.records.get(uid).cloned() else { return Ok(()) };
        if let Some(pid) = record.pid {
            // It is our child and not yet collected, or its end is still in our channel: the pid is not a stranger's
            // for as long as the record names it.
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(errno) => return Err(errno).context("end the pod's processes"),
            }
            if let Some(entry) = self.records.get_mut(uid) {
                entry.pid = None;
                entry.phase = "Stopping".to_owned();
            }
        }
        if !host_network(&record.pod) {
            let netns = netns_path(uid);
            if record.result.is_some() {
                cni::del(&self.reaper, &attachment(&record.pod, &netns), record.result.as_ref())?;
            }
            remove_network(&netns)?;
        }
        fs::remove_dir_all(PathBuf::from("/run/lab/pods").join(uid)).ok();
        fs::remove_file(record_path(&self.node, uid)).ok();
        self.records.remove(uid);
        let (namespace, name) = (record.pod.namespace().unwrap_or_default(), record.pod.name_any());
        self.words.send(Word::Gone { namespace, name, uid: uid.to_owned() }).context("the kubelet has ended")
    }

    fn say_status(&self, uid: &str) -> anyhow::Result<()> {
        let record = self.records.get(uid).context("no such pod")?;
        let host = kubelet::host_addresses(&self.topology, &self.node);
        let status = pod_status(record, &host);
        let (namespace, name) = (record.pod.namespace().unwrap_or_default(), record.pod.name_any());
        self.words
            .send(Word::Status { namespace, name, uid: uid.to_owned(), status })
            .context("the kubelet has ended")
    }
}

fn record_path(node: &str, uid: &str) -> PathBuf {
    paths::node_pods(node).join(format!("{uid}.json"))
}

/// The status a kubelet writes for the record (core/v1 PodStatus).
fn pod_status(record: &PodRecord, host: &[String]) -> Value {
    let now = jiff::Timestamp::now().to_string();
    let running = record.phase == "Running";
    let ready = if running { "True" } else { "False" };
    let conditions: Vec<Value> = ["Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .iter()
        .map(|kind| {
            let state = if matches!(*kind, "Initialized" | "PodScheduled") { "True" } else { ready };
            json!({ "type": kind, "status": state, "lastTransitionTime": now })
        })
        .collect();
    let containers = record.pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let states: Vec<Value> = containers
        .iter()
        .map(|container| {
            let state = match record.phase.as_str() {
                "Running" => json!({ "running": { "startedAt": now } }),
                "Succeeded" => json!({ "terminated": { "exitCode": 0, "reason": "Completed" } }),
                "Failed" => json!({ "terminated": { "exitCode": 1, "reason": "Error" } }),
                _ => json!({ "waiting": { "reason": "ContainerCreating", "message": record.complaint } }),
            };
            let image = container.image.clone().unwrap_or_default();
            json!({ "name": container.name, "image": image, "imageID": "", "ready": running,
                    "started": running, "restartCount": 0, "state": state })
        })
        .collect();
    let list =
        |addresses: &[String]| -> Vec<Value> { addresses.iter().map(|ip| json!({ "ip": ip })).collect() };
    json!({
        "phase": record.phase, "conditions": conditions, "containerStatuses": states, "startTime": now,
        "podIP": record.addresses.first(), "podIPs": list(&record.addresses),
        "hostIP": host.first(), "hostIPs": list(host),
    })
}

fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

fn netns_path(uid: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(format!("lab-{uid}"))
}

fn attachment(pod: &Pod, netns: &Path) -> Attachment {
    let uid = pod.uid().unwrap_or_default();
    Attachment {
        container_id: format!("lab-{uid}"),
        netns: netns.to_owned(),
        namespace: pod.namespace().unwrap_or_default(),
        pod: pod.name_any(),
        uid,
        port_mappings: port_mappings(pod),
    }
}

fn port_mappings(pod: &Pod) -> Vec<Value> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let mapped = ports.filter_map(|port| {
        Some(json!({
            "hostPort": port.host_port?,
            "containerPort": port.container_port,
            "protocol": port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
            "hostIP": port.host_ip.as_deref().unwrap_or_default(),
        }))
    });
    mapped.collect()
}

/// A network namespace with its loopback up, held by a bind mount as container runtimes do.
fn ensure_network(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        return Ok(());
    }
    fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    namespace::on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        link::set_loopback_up()?;
        namespace::bind(Path::new("/proc/thread-self/ns/net"), path)
    })
    .inspect_err(|_| {
        fs::remove_file(path).ok();
    })
}

fn remove_network(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        umount2(path, MntFlags::MNT_DETACH).ok();
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}
