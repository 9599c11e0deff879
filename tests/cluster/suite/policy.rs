//! NetworkPolicies as the documentation has them (kubernetes.io/docs/concepts/services-networking/network-policies), between
//! pods of every node, nodes and a client outside, both families.
//!
//! Each case makes its pods (`guarded` serves, `walled` asks, one a node each) and its policies, and takes them away again.

use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, NODES, PATIENCE, Pod, ask_by_udp, at_once, in_url, said};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("deny-all isolates pods on every node, and not from their own node", deny_all),
    case("allow-dns lets names resolve, and without it they do not", allow_dns),
    case("three tiers reach each other in order only, on every pair of nodes", three_tiers),
    case("an ipBlock means the client outside, through a NodePort too", client_outside),
    case("a named port means the port that the pod calls so", named_port),
    case("both sides must allow, through a ClusterIP as well", both_sides),
    case("a connection that a new policy denies is cut, and no other", established),
    case("a pod of a denied namespace is isolated from its first packet on", first_packet),
    case("so is one whose node hears of everything two seconds late", first_packet_late),
    case(
        "what is allowed to a new pod is allowed on every node before the API tells its addresses",
        allowed_at_once,
    ),
    case("what a policy says and nobody understands is named in the status, and the rest holds", invalid),
];

const PODS: &str = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: guarded, namespace: suite}
spec:
  selector: {matchLabels: {app: guarded}}
  template:
    metadata: {labels: {app: guarded}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers:
      - name: guarded
        image: weft.network/test:1
        args: [netexec, --http-port=8080, --udp-port=8081]
        ports: [{name: web, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: walled, namespace: suite}
spec:
  selector: {matchLabels: {app: walled}}
  template:
    metadata: {labels: {app: walled}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers: [{name: walled, image: weft.network/test:1, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Service
metadata: {name: guarded, namespace: suite}
spec:
  type: NodePort
  externalTrafficPolicy: Local
  ipFamilyPolicy: RequireDualStack
  selector: {app: guarded}
  ports: [{port: 80, targetPort: 8080, nodePort: 30090}]
";

/// Pods and policies, gone when it goes.
struct Guarded<'a> {
    cluster: &'a Cluster,
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.kubectl(&["delete", "networkpolicy", "--all", "--wait=true"]);
        let _ = self.cluster.delete(PODS);
    }
}

impl<'a> Guarded<'a> {
    fn start(cluster: &'a Cluster) -> anyhow::Result<Self> {
        let guarded = Self { cluster };
        cluster.apply(PODS)?;
        for name in ["daemonset/guarded", "daemonset/walled"] {
            cluster.kubectl(&["rollout", "status", name, "--timeout=120s"])?;
        }
        Ok(guarded)
    }

    /// Replaces every policy by these.
    fn policies(&self, policies: &[Value]) -> anyhow::Result<()> {
        self.cluster.kubectl(&["delete", "networkpolicy", "--all", "--wait=true"])?;
        for policy in policies {
            self.cluster.apply(&policy.to_string())?;
        }
        Ok(())
    }

    /// Every pod of `from` gets through to every pod of `to`, or none does, each family.
    fn all(&self, from: &str, to: &str, port: u16, expected: bool) -> anyhow::Result<()> {
        let (clients, servers) = (self.cluster.pods(from)?, self.cluster.pods(to)?);
        let pairs: Vec<(&Pod, &Pod)> =
            clients.iter().flat_map(|client| servers.iter().map(move |server| (client, server))).collect();
        at_once(&pairs, |(client, server)| {
            server.addresses.iter().try_for_each(|address| {
                let url = format!("{}:{port}", in_url(address));
                self.pod_reaches(client, &url, expected)
                    .with_context(|| format!("{from} on {} to {to} on {}", client.node, server.node))
            })
        })
    }

    fn pod_reaches(&self, client: &Pod, url: &str, expected: bool) -> anyhow::Result<()> {
        self.becomes(url, expected, || self.cluster.in_pod(&client.name, &curl(url)))
    }

    /// What is allowed may take a moment; what is denied is denied as soon as a policy is there, but for the watch.
    fn becomes(
        &self,
        what: &str,
        expected: bool,
        ask: impl Fn() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let wanted = if expected { "answers" } else { "is denied" };
        self.cluster.within(PATIENCE / 9, &format!("{what} {wanted}"), || {
            let said = ask();
            ensure!(said.is_ok() == expected, "{said:?}");
            Ok(())
        })
    }
}

fn curl(url: &str) -> String {
    format!("curl -gsS -m 2 'http://{url}/hostname'")
}

fn policy(name: &str, app: &str, mut spec: Value) -> Value {
    spec["podSelector"] = json!({"matchLabels": {"app": app}});
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "suite"},
        "spec": spec,
    })
}

fn deny(app: &str) -> Value {
    policy(&format!("deny-{app}"), app, json!({"policyTypes": ["Ingress", "Egress"]}))
}

fn peer(app: &str) -> Value {
    json!([{"podSelector": {"matchLabels": {"app": app}}}])
}

fn deny_all(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    guarded.all("tools", "guarded", 8080, true)?;
    guarded.policies(&[deny("guarded"), deny("walled")])?;
    guarded.all("tools", "guarded", 8080, false)?;
    guarded.all("walled", "echo", 8080, false)?;
    for server in cluster.pods("guarded")? {
        at_once(&NODES, |node| {
            server.addresses.iter().try_for_each(|address| {
                let url = format!("{}:8080", in_url(address));
                guarded
                    .becomes(&url, *node == server.node, || cluster.on(node, &curl(&url)))
                    .with_context(|| format!("{node} to the pod on {}", server.node))
            })
        })?;
        for address in &server.addresses {
            guarded.pod_reaches(&server, &format!("{}:8080", in_url(address)), true).context("itself")?;
        }
    }
    // Probes come from the node: nothing became unready.
    cluster.kubectl(&["rollout", "status", "daemonset/guarded", "--timeout=10s"]).map(drop)
}

fn allow_dns(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let ports = json!([{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]);
    let resolver = json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    });
    let egress = json!([{"to": [resolver], "ports": ports}]);
    let allowed = policy("allow-dns", "walled", json!({"policyTypes": ["Egress"], "egress": egress}));
    for (policies, expected) in [(vec![deny("walled")], false), (vec![deny("walled"), allowed], true)] {
        guarded.policies(&policies)?;
        for client in cluster.pods("walled")? {
            let look_up =
                || cluster.in_pod(&client.name, "timeout 3 getent hosts echo.suite.svc.cluster.local");
            guarded.becomes("a look-up", expected, look_up)?;
        }
    }
    Ok(())
}

/// tools -> guarded -> echo, with walled as the stranger.
fn three_tiers(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let port = json!([{"port": 8080}]);
    guarded.policies(&[
        deny("guarded"),
        policy(
            "middle",
            "guarded",
            json!({
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": peer("tools"), "ports": port}],
                "egress": [{"to": peer("echo"), "ports": port}],
            }),
        ),
    ])?;
    guarded.all("tools", "guarded", 8080, true)?;
    guarded.all("guarded", "echo", 8080, true)?;
    guarded.all("walled", "guarded", 8080, false)?;
    for client in cluster.pods("guarded")? {
        for node in NODES {
            for address in Cluster::node_addresses(node) {
                guarded.pod_reaches(&client, &format!("{}:18080", in_url(&address)), false)?;
            }
        }
    }
    Ok(())
}

fn client_outside(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let addresses: Vec<String> = cluster
        .on("client", "ip -o addr show scope global | awk '{print $4}' | cut -d/ -f1")?
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let block = |address: &String| {
        let cidr = format!("{address}/{}", if address.contains(':') { 128 } else { 32 });
        json!({"ipBlock": {"cidr": cidr}})
    };
    let of_client: Vec<Value> = addresses.iter().map(block).collect();
    for (from, expected) in [(json!(of_client), true), (json!([block(&"198.51.100.1".to_owned())]), false)] {
        guarded.policies(&[policy("outside", "guarded", json!({"ingress": [{"from": from}]}))])?;
        for node in NODES {
            for address in Cluster::node_addresses(node) {
                let url = format!("{}:30090", in_url(&address));
                guarded.becomes(&url, expected, || cluster.on("client", &curl(&url)))?;
            }
        }
        guarded.all("tools", "guarded", 8080, false)?;
    }
    Ok(())
}

fn named_port(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    for (name, expected) in [("web", true), ("nothing", false)] {
        let ports = json!([{"port": name}]);
        guarded.policies(&[policy(
            "named",
            "guarded",
            json!({"ingress": [{"from": peer("tools"), "ports": ports}]}),
        )])?;
        guarded.all("tools", "guarded", 8080, expected)?;
    }
    // The datagrams of the same pods have no such name.
    let (client, server) = (cluster.pod_on("tools", "node1")?, cluster.pod_on("guarded", "node2")?);
    let said =
        cluster.in_pod(&client.name, &ask_by_udp(&server.addresses[0], 8081, "hostname")).unwrap_or_default();
    ensure!(said.is_empty(), "UDP got through: {said}");
    Ok(())
}

fn both_sides(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let out =
        policy("out", "walled", json!({"policyTypes": ["Egress"], "egress": [{"to": peer("guarded")}]}));
    let into = policy("into", "guarded", json!({"ingress": [{"from": peer("walled")}]}));
    for (policies, expected) in [
        (vec![deny("walled"), deny("guarded"), out.clone()], false),
        (vec![deny("walled"), deny("guarded"), into.clone()], false),
        (vec![deny("walled"), deny("guarded"), out, into], true),
    ] {
        guarded.policies(&policies)?;
        guarded.all("walled", "guarded", 8080, expected)?;
        for client in cluster.pods("walled")? {
            for ip in cluster.cluster_ips("guarded")? {
                guarded.pod_reaches(&client, &in_url(&ip), expected)?;
            }
        }
    }
    Ok(())
}

/// Two slow answers to two clients; the policy allows one of them.
fn established(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let server = cluster.pod_on("guarded", "node2")?;
    let slow = format!("curl -gsS -m 14 'http://{}:8080/shell?cmd=sleep+8%3Bhostname'", server.addresses[0]);
    let clients = [cluster.pod_on("tools", "node1")?, cluster.pod_on("walled", "node3")?];
    let said = std::thread::scope(|scope| -> anyhow::Result<Vec<String>> {
        let asking: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(|| cluster.in_pod(&client.name, &slow).unwrap_or_default()))
            .collect();
        std::thread::sleep(Duration::from_secs(3));
        guarded.policies(&[policy("cut", "guarded", json!({"ingress": [{"from": peer("tools")}]}))])?;
        Ok(asking.into_iter().map(|asking| asking.join().unwrap_or_default()).collect())
    })?;
    ensure!(said[0].contains(&server.name), "the allowed connection was cut: {said:?}");
    ensure!(!said[1].contains(&server.name), "the denied connection goes on: {said:?}");
    Ok(())
}

/// A pod on `node` whose first and only act is a shell line. It needs nothing more of the API server than to be told.
fn newborn(name: &str, node: &str, line: &str) -> String {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "suite", "labels": {"app": "newborn"}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "a", "image": "weft.network/test:1",
                "command": ["bash", "-c", format!("{line}; echo done; sleep 1000")],
            }],
        },
    });
    pod.to_string()
}

/// What the pod printed once it printed `done`.
fn last_words(cluster: &Cluster, name: &str) -> anyhow::Result<String> {
    cluster.within(PATIENCE, "the pod has asked", || {
        let said = cluster.kubectl(&["logs", name])?;
        ensure!(said.contains("done"), "{said}");
        Ok(said)
    })
}

/// The pod's first act is to ask, and it must never have been answered.
fn first_packet(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    guarded.policies(&[deny("newborn")])?;
    let server = cluster.pod_on("echo", "node2")?;
    let ask = |address: &String| {
        format!("curl -gsS -m 1 http://{}:8080/hostname && echo LEAKED {address}", in_url(address))
    };
    let ask = server.addresses.iter().map(ask).collect::<Vec<_>>().join("; ");
    for turn in 0..5 {
        let name = format!("newborn-{turn}");
        let pod = newborn(&name, NODES[turn % NODES.len()], &ask);
        cluster.apply(&pod)?;
        let said = last_words(cluster, &name);
        cluster.delete(&pod)?;
        let said = said?;
        ensure!(!said.contains("LEAKED"), "pod {turn}: {said}");
    }
    Ok(())
}

/// Agents that are held for two of every three seconds read their watches late and have work waiting.
fn first_packet_late(cluster: &Cluster) -> anyhow::Result<()> {
    let enough = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let holding = scope.spawn(|| -> anyhow::Result<()> {
            while !enough.load(std::sync::atomic::Ordering::Relaxed) {
                at_once(&NODES, |node| {
                    let agent = "$(cat /run/node/units/weft-agent.service.pid)";
                    let line = format!("kill -STOP {agent}; sleep 2; kill -CONT {agent}; sleep 1");
                    cluster.on(node, &line).map(drop)
                })?;
            }
            Ok(())
        });
        let checked = first_packet(cluster);
        enough.store(true, std::sync::atomic::Ordering::Relaxed);
        let held = holding.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        checked.and(held)
    })
}

/// The API server is held from the moment at which nodes have heard of the pod until it has asked, so the addresses of the pod are not in it
/// yet: the kubelet tells them when the containers run. Whoever is let in late is told by a second packet, after a second.
fn allowed_at_once(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    guarded.policies(&[policy("newborns", "guarded", json!({"ingress": [{"from": peer("newborn")}]}))])?;
    let mut urls: Vec<String> = Vec::new();
    for server in cluster.pods("guarded")? {
        urls.extend(
            server.addresses.iter().map(|address| format!("http://{}:8080/hostname", in_url(address))),
        );
    }
    let ask = urls.iter().map(|url| format!("curl -gsS -m 0.8 -o /dev/null {url} || echo LATE {url}"));
    let ask = format!("{}; date +%s", ask.collect::<Vec<_>>().join("; "));
    for node in NODES {
        let name = format!("newborn-of-{node}");
        let pod = newborn(&name, node, &ask);
        cluster.apply(&pod)?;
        std::thread::sleep(Duration::from_millis(100));
        let let_go = held(cluster, Duration::from_secs(8))?;
        let said = last_words(cluster, &name);
        cluster.delete(&pod)?;
        let said = said?;
        let asked: u64 = said.lines().rev().nth(1).and_then(|line| line.parse().ok()).context("a time")?;
        ensure!(asked < let_go, "the pod on {node} came too late to be of use: {said}");
        ensure!(!said.contains("LATE"), "the pod on {node}: {said}");
    }
    Ok(())
}

/// Holds the API server for a time; when it was let go, in seconds since the epoch.
fn held(cluster: &Cluster, time: Duration) -> anyhow::Result<u64> {
    let pid = std::fs::read_to_string(cluster.run_folder.join("kube-apiserver.pid"))?;
    let signal = |signal| said(Command::new("kill").args([signal, pid.trim()]));
    signal("-STOP")?;
    std::thread::sleep(time);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    signal("-CONT")?;
    Ok(now)
}

fn invalid(cluster: &Cluster) -> anyhow::Result<()> {
    let guarded = Guarded::start(cluster)?;
    let mut wrong = policy("wrong", "guarded", json!({"ingress": [{"from": peer("tools")}]}));
    wrong["metadata"]["annotations"] = json!({"weft.network/established": "perhaps"});
    guarded.policies(&[wrong])?;
    cluster.within(PATIENCE / 9, "the status names the policy", || {
        let problems = cluster.status("node1")?["problems"].to_string();
        ensure!(problems.contains("NetworkPolicy suite/wrong: InvalidField"), "{problems}");
        Ok(())
    })?;
    cluster.within(PATIENCE / 3, "an Event on the policy says it too", || {
        let said = cluster.kubectl(&["events", "--for", "networkpolicy/wrong"])?;
        ensure!(said.contains("InvalidField") && said.contains("weft.network/established"), "{said}");
        Ok(())
    })?;
    guarded.all("tools", "guarded", 8080, true)?;
    guarded.all("walled", "guarded", 8080, false)
}
