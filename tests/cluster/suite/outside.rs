//! Services for clients outside and clients that stay: load balancers' addresses, given by hand through the status, with their
//! policy, source ranges and health check; session affinity; traffic distribution. Both families.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES, PATIENCE, in_url};
use crate::services::{answering, echo_names};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("a load balancer's address answers pods, nodes and outside", balanced),
    case("externalTrafficPolicy Local keeps the client's address and drops where no pod is", local_policy),
    case("a health check port tells how many pods a node has, and 10256 that it is well", health_checks),
    case("loadBalancerSourceRanges let in whom they list, pods included", source_ranges),
    case("an external address outside the allowed ranges is refused with a line that says why", external_ips),
    case("a client with session affinity stays through churn and is forgotten after its time", affinity),
    case("trafficDistribution PreferSameNode and PreferSameZone keep traffic near", distribution),
];

const ADDRESSES: [&str; 2] = ["198.51.100.10", "2001:db8:b::10"];
/// Of the host outside.
const CLIENT: [&str; 2] = ["172.30.98.250", "fd00:30:98::250"];

/// A LoadBalancer Service `balanced` with these lines in its spec, of a class that nobody serves but the test itself.
fn service(more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: balanced, namespace: suite}}
spec:
  type: LoadBalancer
  loadBalancerClass: example.com/by-hand
  ipFamilyPolicy: RequireDualStack
  selector: {{app: echo}}
  ports: [{{name: http, port: 80, targetPort: web}}]
{more}"
    )
}

/// The same with ClusterIPs only.
fn within(more: &str) -> String {
    service(more).replace("  type: LoadBalancer\n  loadBalancerClass: example.com/by-hand\n", "")
}

/// Applies the Service and gives it its addresses, as a controller of load balancers does; the outside reaches them by
/// `node`.
fn balance(cluster: &Cluster, manifest: &str, node: &str) -> anyhow::Result<()> {
    cluster.apply(manifest)?;
    let [v4, v6] = ADDRESSES;
    let status = format!(
        "{{\"status\":{{\"loadBalancer\":{{\"ingress\":[{{\"ip\":\"{v4}\"}},{{\"ip\":\"{v6}\"}}]}}}}}}"
    );
    cluster.kubectl(&[
        "patch",
        "service",
        "balanced",
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ])?;
    let [by_v4, by_v6] = Cluster::node_addresses(node);
    cluster.on(
        "client",
        &format!("ip route replace {v4}/32 via {by_v4}; ip route replace {v6}/128 via {by_v6}"),
    )?;
    Ok(())
}

fn remove(cluster: &Cluster, manifest: &str) -> anyhow::Result<()> {
    let [v4, v6] = ADDRESSES;
    cluster.on("client", &format!("ip route del {v4}/32; ip route del {v6}/128"))?;
    cluster.delete(manifest).map(drop)
}

fn balanced(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = service("");
    balance(cluster, &manifest, "node1")?;
    let expected = echo_names(cluster)?;
    let client = cluster.pod_on("tools", "node2")?;
    for address in ADDRESSES {
        let url = in_url(address);
        let reached = |names: BTreeSet<String>, from: &str| {
            ensure!(names == expected, "{address} from {from}: {names:?}");
            Ok(())
        };
        cluster.within(Duration::from_secs(5), "every pod behind the address", || {
            reached(answering(&url, 60, |line| cluster.in_pod(&client.name, line))?, "a pod")
        })?;
        reached(answering(&url, 60, |line| cluster.on("node3", line))?, "a node")?;
        reached(answering(&url, 60, |line| cluster.on("client", line))?, "outside")?;
    }
    remove(cluster, &manifest)
}

/// A pod on node1 alone, so that the other nodes have none.
const ONE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: suite, labels: {app: one}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  containers:
  - {name: one, image: weft.network/test:1, args: [netexec, --http-port=8080, --udp-port=-1]}
---";

fn local_service() -> String {
    let local = service("  externalTrafficPolicy: Local\n").replace("{app: echo}", "{app: one}");
    format!("{ONE}{}", local.replace("targetPort: web", "targetPort: 8080"))
}

fn local_policy(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = local_service();
    balance(cluster, &manifest, "node1")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/one", "--timeout=60s"])?;
    for (address, own) in ADDRESSES.iter().zip(CLIENT) {
        let line = format!("curl -sS -m 2 'http://{}/clientip'", in_url(address));
        cluster.within(Duration::from_secs(5), "the client's own address", || {
            let seen = cluster.on("client", &line)?;
            ensure!(seen.starts_with(&in_url(own)), "{address}: {seen}, not {own}");
            Ok(())
        })?;
    }
    balance(cluster, &manifest, "node2")?;
    for address in ADDRESSES {
        let line = format!("curl -sS -m 2 'http://{}/hostname' 2>&1 || true", in_url(address));
        let dropped = cluster.on("client", &line)?;
        ensure!(dropped.contains("timed out"), "{address} by a node without a pod: {dropped}");
        for node in NODES {
            ensure!(cluster.on(node, &line)?.trim() == "one", "{address} from {node}");
            let pod = cluster.pod_on("tools", node)?;
            ensure!(cluster.in_pod(&pod.name, &line)?.trim() == "one", "{address} from a pod on {node}");
        }
    }
    remove(cluster, &manifest)
}

fn health_checks(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = local_service();
    balance(cluster, &manifest, "node1")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/one", "--timeout=60s"])?;
    let port = cluster.object(&["service", "balanced"])?["spec"]["healthCheckNodePort"].clone();
    for (node, expected, count) in [("node1", "200", 1), ("node2", "503", 0)] {
        for address in Cluster::node_addresses(node) {
            let line = format!("curl -sS -m 2 -w ' %{{http_code}}' http://{}:{port}/", in_url(&address));
            cluster.within(Duration::from_secs(5), "the count of local endpoints", || {
                let said = cluster.on("client", &line)?;
                ensure!(said.ends_with(expected), "{address}: {said}");
                ensure!(said.contains(&format!("\"localEndpoints\":{count}")), "{address}: {said}");
                Ok(())
            })?;
        }
        for address in Cluster::node_addresses(node) {
            let line =
                format!("curl -sS -m 2 -w ' %{{http_code}}' http://{}:10256/healthz", in_url(&address));
            let said = cluster.on("client", &line)?;
            ensure!(said.ends_with("200") && said.contains("\"nodeEligible\":true"), "{node}: {said}");
        }
    }
    remove(cluster, &manifest)
}

fn source_ranges(cluster: &Cluster) -> anyhow::Result<()> {
    let [v4, v6] = CLIENT;
    let manifest = service(&format!("  loadBalancerSourceRanges: ['{v4}/32', '{v6}/128']\n"));
    balance(cluster, &manifest, "node3")?;
    let client = cluster.pod_on("tools", "node1")?;
    for address in ADDRESSES {
        let url = in_url(address);
        cluster.within(Duration::from_secs(5), "the listed client comes in", || {
            answering(&url, 3, |line| cluster.on("client", line)).map(drop)
        })?;
        let line = format!("curl -sS -m 2 http://{url}/hostname 2>&1 || true");
        for said in [cluster.in_pod(&client.name, &line)?, cluster.on("node2", &line)?] {
            ensure!(said.contains("timed out"), "{address}: {said}");
        }
    }
    remove(cluster, &manifest)
}

fn external_ips(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = within("  externalIPs: [203.0.113.77]\n");
    cluster.apply(&manifest)?;
    cluster.within(Duration::from_secs(5), "a line in the status", || {
        let status = cluster.on("node1", "weft status")?;
        let line = "Service suite/balanced: InvalidField: spec.externalIPs 203.0.113.77 is in no --external-ip-range";
        ensure!(status.contains(line), "{status}");
        Ok(())
    })?;
    for ip in cluster.cluster_ips("balanced")? {
        answering(&in_url(&ip), 3, |line| cluster.on("node1", line)).context("its ClusterIP is unharmed")?;
    }
    cluster.delete(&manifest).map(drop)
}

fn affinity(cluster: &Cluster) -> anyhow::Result<()> {
    let sticky = |seconds: u32| {
        service(&format!(
            "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}\n"
        ))
    };
    balance(cluster, &sticky(600), "node2")?;
    let client = cluster.pod_on("tools", "node1")?;
    let one = |names: BTreeSet<String>| {
        ensure!(names.len() == 1, "{names:?}");
        names.into_iter().next().context("a name")
    };
    let targets: Vec<String> =
        cluster.cluster_ips("balanced")?.iter().map(String::as_str).chain(ADDRESSES).map(in_url).collect();
    for url in &targets {
        let ask = || one(answering(url, 20, |line| cluster.in_pod(&client.name, line))?);
        let first = cluster.within(Duration::from_secs(5), "one pod for one client", ask)?;
        cluster.on("node1", "systemctl restart weft-agent")?;
        ensure!(ask()? == first, "{url}: moved by a restart of the agent");
        let line = cluster
            .on("node1", "nft list ruleset > /dev/null && nft -j list ruleset > /dev/null && echo listed")?;
        ensure!(line.trim() == "listed", "nft cannot list the rules: {line}");
    }
    cluster.apply(&sticky(2))?;
    for url in &targets {
        let ask = || one(answering(url, 3, |line| cluster.in_pod(&client.name, line))?);
        let first = cluster.within(Duration::from_secs(5), "an answer", ask)?;
        cluster.within(Duration::from_secs(90), "another pod after the time", || {
            std::thread::sleep(Duration::from_millis(2300));
            ensure!(ask()? != first, "{url} stays with {first}");
            Ok(())
        })?;
    }
    remove(cluster, &sticky(2))
}

fn distribution(cluster: &Cluster) -> anyhow::Result<()> {
    let near = |kind: &str| within(&format!("  trafficDistribution: {kind}\n"));
    cluster.apply(&near("PreferSameNode"))?;
    for node in NODES {
        let (client, server) = (cluster.pod_on("tools", node)?, cluster.pod_on("echo", node)?);
        for ip in cluster.cluster_ips("balanced")? {
            cluster.within(PATIENCE, "the pod on the same node", || {
                let names = answering(&in_url(&ip), 20, |line| cluster.in_pod(&client.name, line))?;
                ensure!(names == BTreeSet::from([server.name.clone()]), "{ip} from {node}: {names:?}");
                Ok(())
            })?;
        }
    }
    let label = |node: &str, zone: &str| {
        cluster.kubectl(&[
            "label",
            "--overwrite",
            "node",
            node,
            &format!("topology.kubernetes.io/zone{zone}"),
        ])
    };
    for (node, zone) in NODES.into_iter().zip(["=east", "=east", "=west"]) {
        label(node, zone)?;
    }
    cluster.apply(&near("PreferSameZone"))?;
    // The slices carry the zones once the pods are looked at again.
    cluster.kubectl(&["rollout", "restart", "daemonset/echo"])?;
    cluster.kubectl(&["rollout", "status", "daemonset/echo", "--timeout=120s"])?;
    for (node, near) in [("node1", &["node1", "node2"][..]), ("node3", &["node3"])] {
        let client = cluster.pod_on("tools", node)?;
        for ip in cluster.cluster_ips("balanced")? {
            cluster.within(PATIENCE, "the pods of the same zone", || {
                let pods = cluster.pods("echo")?.into_iter().filter(|pod| near.contains(&pod.node.as_str()));
                let expected: BTreeSet<String> = pods.map(|pod| pod.name).collect();
                let names = answering(&in_url(&ip), 40, |line| cluster.in_pod(&client.name, line))?;
                ensure!(names == expected, "{ip} from {node}: {names:?}, not {expected:?}");
                Ok(())
            })?;
        }
    }
    for node in NODES {
        label(node, "-")?;
    }
    cluster.delete(&near("PreferSameZone")).map(drop)
}
