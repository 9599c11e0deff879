//! The kubelet's side towards the API server: keeps this node's Node object, watches the pods bound to it, writes
//! their status. What the pods need on the node itself is done by `sandbox`; the two meet in `Desired` (what shall
//! run) and in the channel of `Word`s (what is to be written).

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::reaper::{ExitCode, Reaper};
use super::topology::{Role, Topology};
use super::{api, paths, sandbox};

/// Pause before the API server is asked again.
const RETRY: Duration = Duration::from_millis(300);

/// The pods that shall run here, by uid. Before the first list of this boot it is empty and `listed` is false: then
/// the remembered pods go on.
#[derive(Default)]
pub(super) struct Desired {
    pub(super) pods: BTreeMap<String, Pod>,
    pub(super) listed: bool,
    changed: bool,
}

/// Level-triggered: the worker looks at the whole of it after each change and now and then.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<(Mutex<Desired>, Condvar)>);

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Desired)) {
        let mut desired = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut desired);
        desired.changed = true;
        self.0.1.notify_all();
    }

    pub(super) fn wake(&self) {
        self.change(|_| {});
    }

    /// A copy of what shall run, after a change or after `limit`.
    pub(super) fn next(&self, limit: Duration) -> (BTreeMap<String, Pod>, bool) {
        let guard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut desired, _) = self
            .0
            .1
            .wait_timeout_while(guard, limit, |desired| !desired.changed)
            .unwrap_or_else(PoisonError::into_inner);
        desired.changed = false;
        (desired.pods.clone(), desired.listed)
    }
}

/// What the worker wants written to the API server; retried until it is or until the pod is gone.
#[derive(Clone, Debug)]
pub(super) enum Word {
    Status {
        namespace: String,
        name: String,
        uid: String,
        status: Value,
    },
    /// The pod has ended here: its object may go.
    Gone {
        namespace: String,
        name: String,
        uid: String,
    },
}

impl Word {
    fn uid(&self) -> &str {
        match self {
            Self::Status { uid, .. } | Self::Gone { uid, .. } => uid,
        }
    }
}

/// Starts the worker and the conversation with the API server, each on a thread.
pub(super) fn start(topology: &Topology, node: &str, reaper: &Reaper) -> anyhow::Result<()> {
    let shared = Shared::default();
    let (words, to_write) = unbounded_channel();
    sandbox::start(topology, node, reaper, shared.clone(), words)?;
    let (topology, node) = (topology.clone(), node.to_owned());
    std::thread::Builder::new()
        .name("kubelet".to_owned())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return eprintln!("kubelet: {error}"),
            };
            runtime.block_on(converse(&topology, &node, &shared, to_write));
        })
        .context("start the kubelet's thread")?;
    Ok(())
}

async fn converse(topology: &Topology, node: &str, shared: &Shared, to_write: UnboundedReceiver<Word>) {
    let client = loop {
        match api::client(&paths::node_kubeconfig(node)).await {
            Ok(client) => break client,
            Err(error) => eprintln!("kubelet: {error:#}"),
        }
        tokio::time::sleep(RETRY).await;
    };
    tokio::join!(
        keep_node(client.clone(), topology, node),
        watch_pods(client.clone(), node, shared),
        write(client, to_write)
    );
}

/// Creates the Node object and keeps its addresses and its Ready condition, which is true as long as a CNI
/// configuration is there, as with a real kubelet.
async fn keep_node(client: Client, topology: &Topology, node: &str) {
    let api: Api<Node> = Api::all(client);
    let mut written = None;
    loop {
        let ready = super::cni::configuration().is_some();
        if written != Some(ready) {
            match write_node(&api, topology, node, ready).await {
                Ok(()) => written = Some(ready),
                Err(error) => eprintln!("node object: {error:#}"),
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn write_node(api: &Api<Node>, topology: &Topology, name: &str, ready: bool) -> anyhow::Result<()> {
    let node: Node = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": std::env::consts::ARCH,
        }},
        "spec": {},
    }))?;
    match api.create(&PostParams::default(), &node).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error).context("create"),
    }
    let status = node_status(topology, name, ready)?;
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(name, &PatchParams::default(), &patch).await.context("write the status")?;
    Ok(())
}

fn node_status(topology: &Topology, name: &str, ready: bool) -> anyhow::Result<Value> {
    let mut addresses: Vec<Value> = topology
        .lan_addresses(topology.role(name)?)
        .into_iter()
        .map(|(address, _)| json!({ "type": "InternalIP", "address": address.to_string() }))
        .collect();
    addresses.push(json!({ "type": "Hostname", "address": name }));
    let now = jiff::Timestamp::now().to_string();
    let (state, reason, message) = match ready {
        true => ("True", "KubeletReady", "the lab's kubelet is posting ready status"),
        false => ("False", "NetworkPluginNotReady", "no CNI configuration yet"),
    };
    Ok(json!({
        "addresses": addresses,
        "capacity": { "pods": "110" },
        "allocatable": { "pods": "110" },
        "conditions": [{
            "type": "Ready", "status": state, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }],
        "nodeInfo": {
            "kubeletVersion": concat!("weft-lab-", env!("CARGO_PKG_VERSION")),
            "operatingSystem": "linux", "architecture": std::env::consts::ARCH,
            "osImage": "weft lab", "kernelVersion": kernel_version(),
            "containerRuntimeVersion": "weft-lab://namespaces",
            "bootID": "", "machineID": "", "systemUUID": "", "kubeProxyVersion": "",
        },
    }))
}

fn kernel_version() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Keeps `Desired` equal to the pods bound to this node.
async fn watch_pods(client: Client, node: &str, shared: &Shared) {
    let api: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = Box::pin(watcher(api, config));
    let mut listing = BTreeMap::new();
    loop {
        match events.try_next().await {
            Ok(Some(Event::Init)) => listing.clear(),
            Ok(Some(Event::InitApply(pod))) => keep(&mut listing, pod, node),
            Ok(Some(Event::InitDone)) => {
                let pods = std::mem::take(&mut listing);
                shared.change(|desired| (desired.pods, desired.listed) = (pods, true));
            }
            Ok(Some(Event::Apply(pod))) => shared.change(|desired| keep(&mut desired.pods, pod, node)),
            Ok(Some(Event::Delete(pod))) => shared.change(|desired| {
                desired.pods.remove(&pod.uid().unwrap_or_default());
            }),
            Ok(None) => return,
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

fn keep(pods: &mut BTreeMap<String, Pod>, mut pod: Pod, node: &str) {
    let here = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
    if let (Some(uid), true) = (pod.uid(), here) {
        pod.metadata.managed_fields = None;
        pods.insert(uid, pod);
    }
}

/// Writes what the worker says, the latest word on each pod, until it is written.
async fn write(client: Client, mut words: UnboundedReceiver<Word>) {
    let mut pending: BTreeMap<String, Word> = BTreeMap::new();
    loop {
        let word = match pending.is_empty() {
            true => words.recv().await,
            false => tokio::time::timeout(RETRY, words.recv()).await.unwrap_or(None),
        };
        if let Some(word) = word {
            pending.insert(word.uid().to_owned(), word);
        }
        while let Ok(word) = words.try_recv() {
            pending.insert(word.uid().to_owned(), word);
        }
        let mut left = BTreeMap::new();
        for (uid, word) in std::mem::take(&mut pending) {
            if let Err(error) = write_word(&client, &word).await {
                eprintln!("pod status: {error}");
                left.insert(uid, word);
            }
        }
        pending = left;
    }
}

/// Errors that a retry cannot mend (the pod is gone, or another one has its name) count as written.
async fn write_word(client: &Client, word: &Word) -> Result<(), kube::Error> {
    let result = match word {
        Word::Status { namespace, name, uid, status } => {
            let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
            let patch = json!({ "metadata": { "uid": uid }, "status": status });
            api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
        }
        Word::Gone { namespace, name, uid } => {
            let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
            let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: None };
            let now = DeleteParams::default().grace_period(0).preconditions(preconditions);
            api.delete(name, &now).await.map(drop)
        }
    };
    match result {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => Ok(()),
        other => other,
    }
}

/// The addresses of a pod on the host's network: the node's own.
pub(super) fn host_addresses(topology: &Topology, node: &str) -> Vec<String> {
    let role = topology.role(node).unwrap_or(Role::Lan);
    topology.lan_addresses(role).into_iter().map(|(address, _)| address.to_string()).collect()
}

/// Wakes the worker when a pod's process ends.
pub(super) fn tell_end(
    shared: &Shared,
    uid: String,
    ended: std::sync::mpsc::Receiver<ExitCode>,
    to: Sender<sandbox::End>,
) {
    let shared = shared.clone();
    std::thread::spawn(move || {
        if let Ok(code) = ended.recv() {
            let _ = to.send((uid, code));
            shared.wake();
        }
    });
}
