//! The Kubernetes network model: "pods can communicate with all other pods on any other node without NAT", "agents on a node can
//! communicate with all pods on that node" (kubernetes.io/docs/concepts/services-networking), probes, host-network pods.

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES, PATIENCE, ask_by_udp, in_url, strings};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("a pod has an address of each family from its node's podCIDRs", addresses_are_of_the_node),
    case("pods reach pods on every node with their own address, TCP and UDP", pods_reach_pods),
    case("a pod reaches itself by its own address", a_pod_reaches_itself),
    case("a node reaches pods on every node", nodes_reach_pods),
    case("a pod reaches every node, and pods on the nodes' network", pods_reach_nodes),
    case("host-network pods have their node's addresses and reach pods", host_network_pods),
    case("a full-size packet crosses nodes without fragmentation trouble", full_size),
    case("nothing of a pod range is seen in clear between nodes", nothing_in_clear),
    case("HTTP, TCP, exec and gRPC probes decide readiness; liveness restarts", probes),
    case(
        "a hostPort leads to its pod from outside, nodes and pods, TCP and UDP; hostIP narrows it",
        host_ports,
    ),
    case("bandwidth annotations limit a pod's rate, also while it runs", bandwidth),
    case("a deleted pod's address answers no more, and a new pod gets another", addresses_come_and_go),
];

fn addresses_are_of_the_node(cluster: &Cluster) -> anyhow::Result<()> {
    for pod in cluster.pods("echo")? {
        let node = cluster.object(&["node", &pod.node])?;
        let cidrs = strings(&node["spec"]["podCIDRs"]);
        ensure!(pod.addresses.len() == 2, "{} has {:?}", pod.name, pod.addresses);
        for address in &pod.addresses {
            let parsed: std::net::IpAddr = address.parse()?;
            let within =
                |cidr: &String| cidr.parse::<ipnet::IpNet>().is_ok_and(|cidr| cidr.contains(&parsed));
            ensure!(cidrs.iter().any(within), "{address} of {} is in none of {cidrs:?}", pod.name);
        }
    }
    Ok(())
}

fn pods_reach_pods(cluster: &Cluster) -> anyhow::Result<()> {
    for client in cluster.pods("tools")? {
        for server in cluster.pods("echo")? {
            for (own, address) in client.addresses.iter().zip(&server.addresses) {
                let url = format!("http://{}:8080/clientip", in_url(address));
                let seen = cluster.in_pod(&client.name, &format!("curl -sS -m 5 '{url}'"))?;
                let seen = seen.trim().rsplit_once(':').context("an address with a port")?.0;
                ensure!(seen == in_url(own), "{} saw {seen} instead of {own}", server.name);
                let seen = cluster.in_pod(&client.name, &ask_by_udp(address, 8081, "clientip"))?;
                ensure!(seen.contains(own.as_str()), "UDP: {} saw {seen:?} instead of {own}", server.name);
            }
        }
    }
    Ok(())
}

fn a_pod_reaches_itself(cluster: &Cluster) -> anyhow::Result<()> {
    for pod in cluster.pods("echo")? {
        for address in &pod.addresses {
            let said = cluster
                .in_pod(&pod.name, &format!("curl -sS -m 5 'http://{}:8080/hostname'", in_url(address)))?;
            ensure!(said.trim() == pod.name, "{said}");
        }
    }
    Ok(())
}

fn nodes_reach_pods(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES {
        for pod in cluster.pods("echo")? {
            for address in &pod.addresses {
                let said = cluster
                    .on(node, &format!("curl -sS -m 5 'http://{}:8080/hostname'", in_url(address)))
                    .with_context(|| format!("{node} to {} on {}", pod.name, pod.node))?;
                ensure!(said.trim() == pod.name, "{said}");
            }
        }
    }
    Ok(())
}

fn pods_reach_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    for pod in cluster.pods("tools")? {
        for node in NODES {
            for address in Cluster::node_addresses(node) {
                let line = format!("curl -sS -m 5 'http://{}:18080/hostname'", in_url(&address));
                let said =
                    cluster.in_pod(&pod.name, &line).with_context(|| format!("{} to {node}", pod.node))?;
                ensure!(said.trim() == node, "{said}");
            }
        }
    }
    Ok(())
}

fn host_network_pods(cluster: &Cluster) -> anyhow::Result<()> {
    for host in cluster.pods("host")? {
        ensure!(host.addresses == Cluster::node_addresses(&host.node), "{:?}", host.addresses);
        for pod in cluster.pods("echo")? {
            for address in &pod.addresses {
                let line = format!("curl -sS -m 5 'http://{}:8080/hostname'", in_url(address));
                let said = cluster.in_pod(&host.name, &line)?;
                ensure!(said.trim() == pod.name, "{said}");
            }
        }
    }
    Ok(())
}

/// agnhost's /echo gives back what it is asked for: a body of many segments each way, and a datagram as large as fits.
fn full_size(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let server = cluster.pod_on("echo", "node2")?;
    for address in &server.addresses {
        let line = format!(
            "head -c 30000 /dev/zero | tr '\\0' x > /tmp/body; \
             curl -sS -m 10 --data-urlencode msg@/tmp/body 'http://{}:8080/echo' | wc -c; \
             mtu=$(cat /sys/class/net/eth0/mtu); head=$((28 + 20 * {})); ping -c 1 -W 3 -s $((mtu - head)) {address} | grep -c ' bytes from'",
            in_url(address),
            i32::from(address.contains(':')),
        );
        let said = cluster.in_pod(&client.name, &line)?;
        let words: Vec<_> = said.split_whitespace().collect();
        ensure!(words == ["30000", "1"], "{address}: {said}");
    }
    Ok(())
}

fn nothing_in_clear(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let server = cluster.pod_on("echo", "node3")?;
    let asking: Vec<_> = server
        .addresses
        .iter()
        .map(|address| format!("curl -sS -m 5 'http://{}:8080/hostname?[1-20]' > /dev/null", in_url(address)))
        .collect();
    // The switch sees every frame between nodes.
    let file = cluster.run_folder.join("capture.pcap");
    let file = file.display();
    let capture = format!("timeout 6 tcpdump -Z root -nni lan0 -w {file} 2>/dev/null || true");
    std::thread::scope(|scope| {
        let captured = scope.spawn(|| cluster.on("lan", &capture));
        std::thread::sleep(std::time::Duration::from_secs(3));
        let asked = cluster.in_pod(&client.name, &asking.join(" && "));
        let _ = captured.join();
        asked
    })?;
    let count =
        |filter: &str| cluster.on("lan", &format!("tcpdump -nnr {file} '{filter}' 2>/dev/null | wc -l"));
    let clear = count("net 10.244.0.0/16 or net fd00:10:244::/56")?;
    let tunnel: u32 = count("udp port 51820")?.trim().parse()?;
    ensure!(clear.trim() == "0", "{} frames of the pod ranges in clear", clear.trim());
    ensure!(tunnel > 80, "only {tunnel} frames of WireGuard for 40 requests");
    Ok(())
}

fn probes(cluster: &Cluster) -> anyhow::Result<()> {
    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: suite}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: http
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=8090]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
  - name: tcp
    image: weft.network/test:1
    args: [netexec, --http-port=8081, --udp-port=-1]
    readinessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1}
  - name: exec
    image: weft.network/test:1
    command: [sleep, infinity]
    readinessProbe: {exec: {command: [cat, /etc/passwd]}, periodSeconds: 1}
  - name: grpc
    image: weft.network/test:1
    args: [grpc-health-checking, --port=5000, --http-port=8083]
    readinessProbe: {grpc: {port: 5000}, periodSeconds: 1}
  - name: unhealthy
    image: weft.network/test:1
    command: [sleep, infinity]
    livenessProbe: {httpGet: {path: /, port: 8085}, periodSeconds: 1, failureThreshold: 2}
";
    cluster.apply(POD)?;
    let checked = cluster.within(PATIENCE, "four Ready containers and a restarted one", || {
        let pod = cluster.object(&["pod", "probed"])?;
        let statuses = pod["status"]["containerStatuses"].as_array().context("statuses")?;
        let ready = |name: &str| statuses.iter().any(|s| s["name"] == name && s["ready"] == true);
        for name in ["http", "tcp", "exec", "grpc"] {
            ensure!(ready(name), "{name} is not Ready: {statuses:?}");
        }
        let restarts =
            |name: &str| statuses.iter().find(|s| s["name"] == name).map(|s| s["restartCount"].clone());
        ensure!(restarts("unhealthy").is_some_and(|n| n.as_i64() > Some(0)), "never restarted");
        Ok(())
    });
    cluster.delete(POD)?;
    checked
}

/// "hostPort: Number of port to expose on the host", "hostIP: What host IP to bind the external port to" (Pod API).
fn host_ports(cluster: &Cluster) -> anyhow::Result<()> {
    const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: exposed, namespace: suite}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers:
  - name: agnhost
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=8081]
    ports:
    - {containerPort: 8080, hostPort: 8900}
    - {containerPort: 8081, hostPort: 8900, protocol: UDP}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: narrow, namespace: suite}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers:
  - name: agnhost
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=8081]
    ports:
    - {containerPort: 8080, hostPort: 8901, hostIP: 127.0.0.1}
    - {containerPort: 8080, hostPort: 8901, hostIP: 'fd00:30:98::12'}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
";
    cluster.apply(PODS)?;
    let checked = host_ports_lead(cluster);
    cluster.delete(PODS)?;
    checked?;
    for address in Cluster::node_addresses("node2") {
        let line = format!("! curl -sS -m 2 'http://{}:8900/hostname' 2>/dev/null", in_url(&address));
        cluster.on("client", &line).context("the hostPort of a deleted pod answers")?;
    }
    Ok(())
}

fn host_ports_lead(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/exposed", "pod/narrow", "--timeout=60s"])?;
    let ask = |address: &str, port| format!("curl -sS -m 3 'http://{}:{port}/hostname'", in_url(address));
    let [v4, v6] = Cluster::node_addresses("node2");
    for address in [&v4, &v6] {
        let web = ask(address, 8900);
        let datagram = ask_by_udp(address, 8900, "hostname");
        let mut answers = Vec::new();
        for line in [&web, &datagram] {
            answers.push(cluster.on("client", line)?);
            for node in NODES {
                answers.push(cluster.on(node, line).with_context(|| format!("{node}: {line}"))?);
                let pod = cluster.pod_on("tools", node)?.name;
                answers.push(cluster.in_pod(&pod, line).with_context(|| format!("pod on {node}: {line}"))?);
            }
        }
        answers.push(cluster.in_pod("exposed", &web).context("the pod itself")?);
        ensure!(answers.iter().all(|answer| answer.trim() == "exposed"), "{address}: {answers:?}");
        let seen =
            cluster.on("client", &format!("curl -sS -m 3 'http://{}:8900/clientip'", in_url(address)))?;
        ensure!(!seen.contains(address.as_str()), "the client's address is not kept: {seen}");
    }
    for (address, from, leads) in [
        ("127.0.0.1", "node2", true),
        (v6.as_str(), "client", true),
        (v6.as_str(), "node1", true),
        (v4.as_str(), "client", false),
        (v4.as_str(), "node2", false),
    ] {
        let answered = cluster.on(from, &ask(address, 8901)).is_ok_and(|answer| answer.trim() == "narrow");
        ensure!(answered == leads, "hostIP: {address} from {from}: answered {answered}");
    }
    let loopback = cluster.on("node2", &ask("127.0.0.1", 8900))?;
    ensure!(loopback.trim() == "exposed", "127.0.0.1: {loopback}");
    Ok(())
}

fn addresses_come_and_go(cluster: &Cluster) -> anyhow::Result<()> {
    let gone = cluster.pod_on("echo", "node3")?;
    cluster.kubectl(&["delete", "pod", &gone.name, "--wait=true"])?;
    cluster.kubectl(&["rollout", "status", "daemonset/echo", "--timeout=60s"])?;
    let new = cluster.pod_on("echo", "node3")?;
    let client = cluster.pod_on("tools", "node1")?;
    for (old, address) in gone.addresses.iter().zip(&new.addresses) {
        ensure!(old != address, "{address} was given again at once");
        let line = format!("! curl -sS -m 2 'http://{}:8080/hostname' 2>/dev/null", in_url(old));
        cluster.in_pod(&client.name, &line).with_context(|| format!("{old} still answers"))?;
        let line = format!("curl -sS -m 5 'http://{}:8080/hostname'", in_url(address));
        let said = cluster.in_pod(&client.name, &line)?;
        ensure!(said.trim() == new.name, "{said}");
    }
    Ok(())
}

/// "Support traffic shaping ... kubernetes.io/ingress-bandwidth and kubernetes.io/egress-bandwidth"
/// (kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/network-plugins).
fn bandwidth(cluster: &Cluster) -> anyhow::Result<()> {
    const POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: slow
  namespace: suite
  annotations: {kubernetes.io/ingress-bandwidth: 8M}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers:
  - name: agnhost
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=8081]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
";
    cluster.apply(POD)?;
    let checked = rates_follow_annotations(cluster);
    cluster.delete(POD)?;
    checked
}

fn rates_follow_annotations(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/slow", "--timeout=60s"])?;
    let pod = cluster.object(&["pod", "slow"])?;
    let addresses: Vec<String> = pod["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["ip"].as_str().map(str::to_owned))
        .collect();
    ensure!(addresses.len() == 2, "{addresses:?}");
    limits_are(cluster, &addresses, [true, false])?;
    cluster.kubectl(&["annotate", "pod", "slow", "kubernetes.io/ingress-bandwidth-"])?;
    cluster.kubectl(&["annotate", "pod", "slow", "kubernetes.io/egress-bandwidth=8M"])?;
    cluster.within(PATIENCE / 3, "the other direction is limited", || {
        limits_are(cluster, &addresses, [false, true])
    })
}

/// Two megabytes to the pod, and from it; at a megabyte a second they take longer than 1.5 s.
fn limits_are(cluster: &Cluster, addresses: &[String], expected: [bool; 2]) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let server = cluster.pod_on("echo", "node1")?;
    for (address, other) in addresses.iter().zip(&server.addresses) {
        let took = [upload(cluster, &client.name, address)?, upload(cluster, "slow", other)?];
        let found = took.map(|seconds| seconds > 1.5);
        ensure!(found == expected, "{address}: to the pod and from it took {took:?} s");
    }
    Ok(())
}

/// Seconds.
fn upload(cluster: &Cluster, from: &str, to: &str) -> anyhow::Result<f64> {
    let line = format!(
        "head -c 2000000 /dev/zero | tr '\\0' x > /tmp/body; curl -sS -m 20 -o /dev/null -w '%{{time_total}}' \
         --data-urlencode body@/tmp/body -d msg=done 'http://{}:8080/echo'",
        in_url(to),
    );
    Ok(cluster.in_pod(from, &line)?.trim().parse()?)
}
