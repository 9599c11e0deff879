//! From creating a pod until a watch shows it Ready, with Weft on one node and bridge + host-local, the reference plugins, on
//! another of the same cluster. Rounds take turns: pods one after another, then a burst of pods at once.
//!
//! A pod has no probe and no volume, so Ready means that its container runs. The kubelet looks once a second what runs, which
//! spreads every figure over a second on both sides; the pauses between pods cover that second evenly. What the kubelet
//! itself measured of `RunPodSandbox`, the call that contains CNI ADD, has no such grain and stands beside.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::StreamExt as _;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::tier;
use crate::row::{Better, Row, percentile};

const OURS: &str = "node1";
const THEIRS: &str = "node2";
/// Of each kind and side.
const ROUNDS: usize = 10;
const PODS_A_ROUND: usize = 10;
/// A period of the kubelet's look at the runtime (pod lifecycle event generator, KEP-3386).
const RELIST: Duration = Duration::from_secs(1);
/// Multiples of it, modulo 1, lie evenly however many are taken.
const GOLDEN_RATIO: f64 = 0.618_033_988_75;
/// After a round's pods are gone, until the machine is quiet again.
const SETTLE: Duration = Duration::from_secs(2);
/// A busy machine starts a burst in this time.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) async fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let client = tier::client().await?;
    let theirs = Api::<Node>::all(client.clone()).get(THEIRS).await?;
    attach_with_bridge(&theirs)?;
    tier::install(weft, &[], Some(OURS))?;
    tier::await_ready(&[OURS, THEIRS])?;
    let (ours, theirs) = rounds(&mut Starter::start(client)).await?;
    let beside = |name: &str, unit, of: &dyn Fn(&Side) -> f64| {
        Row::beside(name, unit, of(&ours), ("bridge", of(&theirs)), Better::Lower, 1.0)
    };
    Ok(vec![
        beside("pod to Ready, one by one, p50", "ms", &|side| side.one_by_one.percentile(50.0)),
        beside("pod to Ready, one by one, p99", "ms", &|side| side.one_by_one.percentile(99.0)),
        beside("pod to Ready, ten at once, p50", "ms", &|side| side.at_once.percentile(50.0)),
        beside("pod to Ready, ten at once, p99", "ms", &|side| side.at_once.percentile(99.0)),
        beside("RunPodSandbox, one by one, mean", "ms", &|side| side.one_by_one.sandboxes.mean_ms()),
        beside("RunPodSandbox, ten at once, mean", "ms", &|side| side.at_once.sandboxes.mean_ms()),
    ])
}

/// A node and what its pods took.
struct Side {
    node: &'static str,
    one_by_one: Taken,
    at_once: Taken,
}

#[derive(Default)]
struct Taken {
    /// From before the request that creates a pod until the watch shows it Ready, in ms.
    to_ready_ms: Vec<f64>,
    sandboxes: Sandboxes,
}

/// The kubelet's histogram of `RunPodSandbox`: what its calls took together, and how many there were.
#[derive(Clone, Copy, Default)]
struct Sandboxes {
    seconds: f64,
    count: f64,
}

impl Side {
    fn new(node: &'static str) -> Self {
        Self { node, one_by_one: Taken::default(), at_once: Taken::default() }
    }
}

impl Taken {
    fn percentile(&self, percent: f64) -> f64 {
        percentile(self.to_ready_ms.clone(), percent)
    }
}

impl Sandboxes {
    fn mean_ms(self) -> f64 {
        self.seconds / self.count * 1000.0
    }

    /// Adds what happened since `before`.
    fn add_since(&mut self, before: Self, node: &str) -> anyhow::Result<()> {
        let now = Self::of(node)?;
        ensure!(now.count > before.count, "the kubelet of {node} counted no RunPodSandbox");
        self.seconds += now.seconds - before.seconds;
        self.count += now.count - before.count;
        Ok(())
    }

    /// A node's histogram as it stands; it is missing before the first call.
    fn of(node: &str) -> anyhow::Result<Self> {
        let metrics = tier::kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/metrics")])?;
        let value = |part: &str| {
            let name = format!("kubelet_runtime_operations_duration_seconds_{part}");
            let start = format!("{name}{{operation_type=\"run_podsandbox\"}} ");
            let value = metrics.lines().find_map(|line| line.strip_prefix(&start));
            value.map_or(Ok(0.0), str::parse).context(name)
        };
        Ok(Self { seconds: value("sum")?, count: value("count")? })
    }
}

async fn rounds(starter: &mut Starter) -> anyhow::Result<(Side, Side)> {
    for node in [OURS, THEIRS] {
        starter.at_once(&mut Side::new(node)).await.context("a burst to warm up")?;
    }
    let (mut ours, mut theirs) = (Side::new(OURS), Side::new(THEIRS));
    for round in 0..ROUNDS {
        let mut turns = if round % 2 == 0 { [&mut ours, &mut theirs] } else { [&mut theirs, &mut ours] };
        for side in &mut turns {
            starter.one_by_one(side).await?;
        }
        for side in &mut turns {
            starter.at_once(side).await?;
        }
    }
    Ok((ours, theirs))
}

/// Makes pods and learns from one watch when they are Ready.
struct Starter {
    pods: Api<Pod>,
    /// Every event of a pod that is Ready: its name and when the event came.
    ready: mpsc::UnboundedReceiver<(String, Instant)>,
    made: usize,
}

impl Starter {
    fn start(client: kube::Client) -> Self {
        let pods: Api<Pod> = Api::namespaced(client, "default");
        let (tx, ready) = mpsc::unbounded_channel();
        tokio::spawn(tell_ready(pods.clone(), tx));
        Self { pods, ready, made: 0 }
    }

    async fn one_by_one(&mut self, side: &mut Side) -> anyhow::Result<()> {
        let before = Sandboxes::of(side.node)?;
        for _ in 0..PODS_A_ROUND {
            let pause = (side.one_by_one.to_ready_ms.len() as f64 * GOLDEN_RATIO).fract();
            sleep(RELIST.mul_f64(pause)).await;
            let name = self.name(side.node);
            let created_at = create(&self.pods, side.node, &name).await?;
            side.one_by_one.to_ready_ms.extend(self.await_ready(BTreeMap::from([created_at])).await?);
        }
        side.one_by_one.sandboxes.add_since(before, side.node)?;
        self.clear().await
    }

    async fn at_once(&mut self, side: &mut Side) -> anyhow::Result<()> {
        let before = Sandboxes::of(side.node)?;
        let names: Vec<_> = (0..PODS_A_ROUND).map(|_| self.name(side.node)).collect();
        let created_at = try_join_all(names.iter().map(|name| create(&self.pods, side.node, name))).await?;
        side.at_once.to_ready_ms.extend(self.await_ready(created_at.into_iter().collect()).await?);
        side.at_once.sandboxes.add_since(before, side.node)?;
        self.clear().await
    }

    fn name(&mut self, node: &str) -> String {
        self.made += 1;
        format!("{node}-{}", self.made)
    }

    /// Takes pods with the instants of their creation; returns what each took, in ms.
    async fn await_ready(&mut self, mut created_at: BTreeMap<String, Instant>) -> anyhow::Result<Vec<f64>> {
        let mut taken = Vec::with_capacity(created_at.len());
        while !created_at.is_empty() {
            let Ok(told) = timeout(PATIENCE, self.ready.recv()).await else {
                bail!("not Ready in {} s: {:?}", PATIENCE.as_secs(), created_at.keys());
            };
            let (name, ready_at) = told.context("the watch of the pods ended")?;
            if let Some(created_at) = created_at.remove(&name) {
                taken.push((ready_at - created_at).as_secs_f64() * 1000.0);
            }
        }
        Ok(taken)
    }

    /// Deletes the pods and waits until they are gone.
    async fn clear(&self) -> anyhow::Result<()> {
        let everything = ListParams::default();
        self.pods.delete_collection(&DeleteParams::default().grace_period(1), &everything).await?;
        let deadline = Instant::now() + PATIENCE;
        while !self.pods.list_metadata(&everything).await?.items.is_empty() {
            ensure!(Instant::now() < deadline, "pods are not gone in {} s", PATIENCE.as_secs());
            sleep(Duration::from_millis(200)).await;
        }
        sleep(SETTLE).await;
        Ok(())
    }
}

/// Watches the pods of the namespace; ends when the watch breaks or nobody listens.
async fn tell_ready(pods: Api<Pod>, tx: mpsc::UnboundedSender<(String, Instant)>) {
    let mut seen = std::pin::pin!(watcher(pods, watcher::Config::default()).applied_objects());
    while let Some(Ok(pod)) = seen.next().await {
        let arrived_at = Instant::now();
        if is_ready(&pod) && tx.send((pod.name_any(), arrived_at)).is_err() {
            return;
        }
    }
}

/// Ready, with an address of each family.
fn is_ready(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let is_true = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    is_true && status.pod_ips.as_ref().is_some_and(|ips| ips.len() == 2)
}

/// Creates a pod on a node; returns its name and the instant before it was asked for.
async fn create(pods: &Api<Pod>, node: &str, name: &str) -> anyhow::Result<(String, Instant)> {
    let pod = serde_json::from_value(super::sleeper(node, name))?;
    let created_at = Instant::now();
    pods.create(&PostParams::default(), &pod).await?;
    Ok((name.to_owned(), created_at))
}

/// Gives a node the plugins of Debian's containernetworking-plugins, as a cluster with kubenet-like networking has them: a
/// bridge with the podCIDRs' addresses, masquerading, and portmap.
fn attach_with_bridge(node: &Node) -> anyhow::Result<()> {
    let cidrs = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_ref());
    let cidrs = cidrs.with_context(|| format!("{} has no podCIDRs yet", node.name_any()))?;
    let ranges: Vec<_> = cidrs.iter().map(|cidr| json!([{"subnet": cidr}])).collect();
    let conflist = json!({
        "cniVersion": "1.0.0",
        "name": "bridge",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "ranges": ranges,
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
                }
            },
            {"type": "portmap", "capabilities": {"portMappings": true}}
        ]
    });
    let line = format!(
        "mkdir -p /opt/cni/bin && cp /usr/lib/cni/{{bridge,host-local,portmap,loopback}} /opt/cni/bin/ \
         && echo '{conflist}' > /etc/cni/net.d/10-bridge.conflist"
    );
    tier::on(&node.name_any(), &line).map(drop)
}
