//! LoadBalancer Services on bare metal: "On cloud providers which support external load balancers, setting the type field to
//! LoadBalancer provisions a load balancer" (kubernetes.io/docs/concepts/services-networking/service), here by Weft, asked by a
//! host of the LAN that is no node.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES, PATIENCE, in_url};
use crate::load::Totals;
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("without a pool a Service has the nodes' addresses, and each answers", by_nodes),
    case("with a pool it has an address of each family, at which one node answers the LAN", by_pool),
    case("the power of the answering node is cut: another one answers, with the client's address", power_cut),
    case(
        "the answering node is drained under load: its address and its pods move, no request fails",
        drained,
    ),
];

const POOL: &str = "
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lan, namespace: suite}
spec:
  addresses: ['172.30.98.240-172.30.98.243', 'fd00:30:98::240-fd00:30:98::243']
";

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: fronted, namespace: suite}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  ipFamilyPolicy: RequireDualStack
  selector: {app: echo}
  ports: [{name: http, port: 8099, targetPort: web}]
";

/// `status.loadBalancer.ingress`, sorted, once there are `count`.
fn addresses(cluster: &Cluster, count: usize, belongs: fn(&str) -> bool) -> anyhow::Result<Vec<String>> {
    addresses_of(cluster, "fronted", count, belongs)
}

fn addresses_of(
    cluster: &Cluster,
    name: &str,
    count: usize,
    belongs: fn(&str) -> bool,
) -> anyhow::Result<Vec<String>> {
    cluster.within(PATIENCE / 3, "addresses in the status", || {
        let service = cluster.object(&["service", name])?;
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
        let mut found: Vec<String> =
            ingress.iter().filter_map(|one| one["ip"].as_str().map(str::to_owned)).collect();
        found.sort();
        ensure!(found.len() == count && found.iter().all(|address| belongs(address)), "{found:?}");
        Ok(found)
    })
}

/// The client's own address as the server saw it, from outside.
fn ask(cluster: &Cluster, address: &str) -> anyhow::Result<String> {
    let said = cluster.on("client", &format!("curl -sS -m 1 'http://{}:8099/clientip'", in_url(address)))?;
    Ok(said.trim().rsplit_once(':').context("an address with a port")?.0.trim_matches(['[', ']']).to_owned())
}

/// The node whose card answers for an address, as the client's neighbour table has it.
fn answering(cluster: &Cluster, address: &str) -> anyhow::Result<&'static str> {
    let neighbour = cluster.on("client", &format!("ip neigh show {address}"))?;
    for node in NODES {
        let card = cluster.on(node, "cat /sys/class/net/eth0/address").unwrap_or_default();
        if !card.trim().is_empty() && neighbour.contains(card.trim()) {
            return Ok(node);
        }
    }
    anyhow::bail!("nobody of the cluster answers: {neighbour}")
}

fn is_of_pool(address: &str) -> bool {
    address.starts_with("172.30.98.24") || address.starts_with("fd00:30:98::24")
}

fn by_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(SERVICE)?;
    let checked = addresses(cluster, 2 * NODES.len(), |_| true).and_then(|found| {
        for address in &found {
            let seen = cluster.within(Duration::from_secs(10), "an answer", || ask(cluster, address))?;
            ensure!(seen.ends_with("250"), "{address} saw {seen} instead of the client");
        }
        let nodes: Vec<String> = NODES.iter().flat_map(|node| Cluster::node_addresses(node)).collect();
        ensure!(found.iter().all(|address| nodes.contains(address)), "{found:?} of {nodes:?}");
        Ok(())
    });
    cluster.delete(SERVICE)?;
    checked
}

fn with_pool(cluster: &Cluster, check: impl FnOnce(&[String]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    cluster.apply(POOL)?;
    cluster.apply(SERVICE)?;
    let checked = addresses(cluster, 2, is_of_pool).and_then(|found| {
        for address in &found {
            cluster.within(Duration::from_secs(20), "an answer", || ask(cluster, address))?;
        }
        check(&found)
    });
    cluster.delete(SERVICE)?;
    cluster.delete(POOL)?;
    checked
}

fn by_pool(cluster: &Cluster) -> anyhow::Result<()> {
    with_pool(cluster, |found| {
        for address in found {
            answering(cluster, address)?;
            let seen = ask(cluster, address)?;
            ensure!(seen.ends_with("250"), "{address} saw {seen} instead of the client");
            let pod = cluster.pod_on("tools", "node2")?;
            let line = format!("curl -sS -m 3 'http://{}:8099/hostname'", in_url(address));
            cluster.in_pod(&pod.name, &line).context("a pod asks")?;
            cluster.on("node1", &line).context("a node asks")?;
            cluster.on("client", &format!("ping -c 1 -W 2 {address}")).context("ping")?;
        }
        let said = cluster.kubectl(&["events", "--for", "service/fronted"])?;
        ensure!(said.contains("IPAllocated"), "{said}");
        let said = cluster.on("node1", "weft lb status")?;
        ensure!(found.iter().all(|address| said.contains(address.as_str())), "{said}");
        Ok(())
    })
}

fn power_cut(cluster: &Cluster) -> anyhow::Result<()> {
    with_pool(cluster, |found| {
        let victim = answering(cluster, &found[0])?;
        let cut_at = Instant::now();
        cluster.power("off", victim)?;
        let moved = found.iter().try_for_each(|address| {
            let seen =
                cluster.within(Duration::from_secs(20), "another node answers", || ask(cluster, address))?;
            println!(
                "        {address} answers {:.1} s after the power cut of {victim}",
                cut_at.elapsed().as_secs_f32()
            );
            ensure!(seen.ends_with("250"), "{address} saw {seen} instead of the client");
            ensure!(answering(cluster, address)? != victim, "{address}");
            Ok(())
        });
        cluster.power("on", victim)?;
        cluster.node_is_back(victim)?;
        moved
    })
}

/// Pods that are evicted end as pods should: they serve on until every node has heard of it.
const EVICTED: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: evicted, namespace: suite}
spec:
  replicas: 3
  selector: {matchLabels: {app: evicted}}
  template:
    metadata: {labels: {app: evicted}}
    spec:
      terminationGracePeriodSeconds: 20
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: evicted}}}
      containers:
      - name: evicted
        image: weft.network/test:1
        args: [netexec, --http-port=8080]
        ports: [{name: web, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1}
        lifecycle: {preStop: {exec: {command: [sleep, '5']}}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: evicted, namespace: suite}
spec: {maxUnavailable: 1, selector: {matchLabels: {app: evicted}}}
";

fn evicted_service(name: &str, policy: &str, port: u16) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: suite}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: {policy}
  ipFamilyPolicy: RequireDualStack
  selector: {{app: evicted}}
  ports: [{{port: {port}, targetPort: web}}]
"
    )
}

/// `weft lab load` on the host outside the cluster; it ends with this value.
struct LanLoad(Child);

impl Drop for LanLoad {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl LanLoad {
    fn start(cluster: &Cluster, urls: &[String]) -> anyhow::Result<Self> {
        let name = cluster.run_folder.file_name().context("a cluster's name")?.to_string_lossy();
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{name}-client"))
            .arg("--")
            .arg(cluster.run_folder.join("weft"))
            .args(["lab", "load", "new", "--connections", "2"])
            .args(urls)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self(child))
    }

    /// Ends it; what it printed last.
    fn end(mut self) -> anyhow::Result<Totals> {
        self.0.kill()?;
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.0.stdout.take().context("a pipe")?, &mut said)?;
        let last = said.lines().rfind(|line| line.ends_with('}')).context("the load printed nothing")?;
        serde_json::from_str(last).with_context(|| last.to_owned())
    }
}

fn drained(cluster: &Cluster) -> anyhow::Result<()> {
    let services = [("evicted-local", "Local", 8097), ("evicted-cluster", "Cluster", 8098)];
    let manifests: String =
        services.iter().map(|(name, policy, port)| evicted_service(name, policy, *port)).collect();
    let all = format!("{EVICTED}{manifests}---{POOL}");
    cluster.apply(&all)?;
    let checked = drain_under_load(cluster, &services);
    for node in NODES {
        cluster.kubectl(&["uncordon", node])?;
    }
    cluster.delete(&all)?;
    checked
}

fn drain_under_load(cluster: &Cluster, services: &[(&str, &str, u16)]) -> anyhow::Result<()> {
    cluster.kubectl(&["rollout", "status", "deployment/evicted", "--timeout=120s"])?;
    let mut urls = Vec::new();
    for (name, _, port) in services {
        let found = addresses_of(cluster, name, 2, is_of_pool)?;
        urls.extend(found.iter().map(|address| format!("http://{}:{port}/hostname", in_url(address))));
    }
    for url in &urls {
        cluster.within(Duration::from_secs(20), "an answer", || {
            cluster.on("client", &format!("curl -sS -m 1 '{url}'"))
        })?;
    }
    let local = addresses_of(cluster, services[0].0, 2, is_of_pool)?;
    let victim = answering(cluster, &local[0])?;
    let load = LanLoad::start(cluster, &urls)?;
    std::thread::sleep(Duration::from_secs(3));
    let of_deployment = ["--pod-selector=app=evicted", "--ignore-daemonsets", "--timeout=120s"];
    let said = cluster.kubectl(&[&["drain", victim], of_deployment.as_slice()].concat())?;
    ensure!(said.contains("evicted"), "no pod was evicted: {said}");
    ensure!(answering(cluster, &local[0])? != victim, "{} is still at {victim}", local[0]);
    cluster.kubectl(&["uncordon", victim])?;
    std::thread::sleep(Duration::from_secs(8));
    let totals = load.end()?;
    println!("        {victim} drained and let in again: {totals}");
    ensure!(totals.requests > 500 && totals.failed == 0, "{totals}");
    Ok(())
}
