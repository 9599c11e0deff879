//! Services as the documentation has them (kubernetes.io/docs/concepts/services-networking/service): each type that Weft
//! serves, from pods, nodes and outside, both families, TCP and UDP.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES, PATIENCE, ask_by_udp, in_url};
use crate::load::Load;
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("a ClusterIP spreads over all endpoints, from pods on every node", cluster_ip_from_pods),
    case("a ClusterIP answers nodes and host-network pods", cluster_ip_from_nodes),
    case("a ClusterIP answers UDP on the same port number as TCP", cluster_ip_udp),
    case("the client's own address reaches the server through a ClusterIP", client_address_kept),
    case("a pod reaches itself through its Service", hairpin),
    case("a Service with host-network endpoints answers", host_endpoints),
    case("a NodePort answers on every node from outside, TCP and UDP", node_port_from_outside),
    case("a NodePort answers pods, and not on loopback", node_port_inside),
    case("a pod reaches the API server as kubernetes.default with its token", api_server_from_pod),
    case("a Service without endpoints refuses at once", no_endpoints),
    case("a Service without selector sends to the slice that people write", selectorless),
    case("an unready pod gets no traffic, unless publishNotReadyAddresses", readiness),
    case("a deleted Service ends, and made again it works", deleted_and_made_again),
    case("a ServiceCIDR that comes and goes is served like the first range", service_cidr),
    case("several ports by name, each to its own target", named_ports),
    case("a rolling update under load loses no request", rolling_update),
    case("a Deployment scaled to none and back under the same Service", scale_to_none_and_back),
];

/// Names of the pods that answered `count` requests for `url`, asked by `ask`.
pub(crate) fn answering(
    url: &str,
    count: u32,
    ask: impl Fn(&str) -> anyhow::Result<String>,
) -> anyhow::Result<BTreeSet<String>> {
    let said =
        ask(&format!("curl -sS -m 5 -H 'Connection: close' -w '\\n' 'http://{url}/hostname?[1-{count}]'"))?;
    let names: Vec<_> = said.split_whitespace().map(str::to_owned).collect();
    ensure!(names.len() == count as usize, "{} answers to {count} requests: {said}", names.len());
    Ok(names.into_iter().collect())
}

/// What curl says of a reset or an ICMP error, as opposed to silence.
fn is_refusal(said: &str) -> bool {
    said.contains("Couldn't connect to server")
}

pub(crate) fn echo_names(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    Ok(cluster.pods("echo")?.into_iter().map(|pod| pod.name).collect())
}

fn cluster_ip_from_pods(cluster: &Cluster) -> anyhow::Result<()> {
    let expected = echo_names(cluster)?;
    for client in cluster.pods("tools")? {
        for ip in cluster.cluster_ips("echo")? {
            let names = answering(&in_url(&ip), 60, |line| cluster.in_pod(&client.name, line))?;
            ensure!(names == expected, "{ip} from {}: {names:?}", client.node);
        }
    }
    Ok(())
}

fn cluster_ip_from_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    let expected = echo_names(cluster)?;
    for ip in cluster.cluster_ips("echo")? {
        for node in NODES {
            let names = answering(&in_url(&ip), 60, |line| cluster.on(node, line))
                .with_context(|| format!("{ip} from {node}"))?;
            ensure!(names == expected, "{ip} from {node}: {names:?}");
        }
        let host = cluster.pod_on("host", "node1")?;
        let names = answering(&in_url(&ip), 60, |line| cluster.in_pod(&host.name, line))?;
        ensure!(names == expected, "{ip} from a host-network pod: {names:?}");
    }
    Ok(())
}

fn cluster_ip_udp(cluster: &Cluster) -> anyhow::Result<()> {
    let expected = echo_names(cluster)?;
    let client = cluster.pod_on("tools", "node2")?;
    for ip in cluster.cluster_ips("echo")? {
        let mut names = BTreeSet::new();
        for _ in 0..20 {
            names.insert(cluster.in_pod(&client.name, &ask_by_udp(&ip, 80, "hostname"))?.trim().to_owned());
        }
        ensure!(names.is_subset(&expected) && names.len() > 1, "{ip}: {names:?}");
    }
    Ok(())
}

fn client_address_kept(cluster: &Cluster) -> anyhow::Result<()> {
    for client in cluster.pods("tools")? {
        for (own, ip) in client.addresses.iter().zip(cluster.cluster_ips("echo")?) {
            let line = format!("curl -sS -m 5 -w '\\n' 'http://{}/clientip?[1-10]'", in_url(&ip));
            let said = cluster.in_pod(&client.name, &line)?;
            ensure!(said.lines().all(|seen| seen.starts_with(&in_url(own))), "not all from {own}: {said}");
        }
    }
    Ok(())
}

fn hairpin(cluster: &Cluster) -> anyhow::Result<()> {
    for ip in cluster.cluster_ips("steady")? {
        let said = cluster.in_pod("steady", &format!("curl -sS -m 5 'http://{}/hostname'", in_url(&ip)))?;
        ensure!(said.trim() == "steady", "{said}");
    }
    Ok(())
}

fn host_endpoints(cluster: &Cluster) -> anyhow::Result<()> {
    let expected: BTreeSet<String> = NODES.iter().map(|node| (*node).to_owned()).collect();
    let client = cluster.pod_on("tools", "node1")?;
    for ip in cluster.cluster_ips("host")? {
        let from_pod = answering(&in_url(&ip), 60, |line| cluster.in_pod(&client.name, line))?;
        ensure!(from_pod == expected, "{ip} from a pod: {from_pod:?}");
        let from_node = answering(&in_url(&ip), 60, |line| cluster.on("node2", line))?;
        ensure!(from_node == expected, "{ip} from a node: {from_node:?}");
    }
    Ok(())
}

fn node_port_from_outside(cluster: &Cluster) -> anyhow::Result<()> {
    let expected = echo_names(cluster)?;
    for node in NODES {
        for address in Cluster::node_addresses(node) {
            let url = format!("{}:30080", in_url(&address));
            let names = answering(&url, 60, |line| cluster.on("client", line))?;
            ensure!(names == expected, "{url}: {names:?}");
            let name = cluster.on("client", &ask_by_udp(&address, 30081, "hostname"))?;
            ensure!(expected.contains(name.trim()), "UDP {address}: {name:?}");
        }
    }
    Ok(())
}

fn node_port_inside(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node3")?;
    for address in NODES.iter().flat_map(|node| Cluster::node_addresses(node)) {
        answering(&format!("{}:30080", in_url(&address)), 3, |line| cluster.in_pod(&client.name, line))?;
    }
    for loopback in ["127.0.0.1", "[::1]"] {
        cluster.on("node1", &format!("! curl -sS -m 2 http://{loopback}:30080/hostname 2>/dev/null"))?;
    }
    Ok(())
}

fn api_server_from_pod(cluster: &Cluster) -> anyhow::Result<()> {
    let folder = "/var/run/secrets/kubernetes.io/serviceaccount";
    for client in cluster.pods("tools")? {
        let line = format!(
            "curl -sS -m 5 --cacert {folder}/ca.crt -H \"Authorization: Bearer $(cat {folder}/token)\" \
             https://kubernetes.default.svc/version"
        );
        let said = cluster.in_pod(&client.name, &line)?;
        ensure!(said.contains("gitVersion"), "{said}");
    }
    Ok(())
}

fn no_endpoints(cluster: &Cluster) -> anyhow::Result<()> {
    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: suite}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: nobody}
  ports: [{port: 80, nodePort: 30090}]
";
    cluster.apply(SERVICE)?;
    let client = cluster.pod_on("tools", "node1")?;
    let mut targets: Vec<_> =
        cluster.cluster_ips("nobody")?.iter().map(|ip| format!("{}:80", in_url(ip))).collect();
    targets
        .extend(Cluster::node_addresses("node2").iter().map(|address| format!("{}:30090", in_url(address))));
    for target in targets {
        cluster.within(Duration::from_secs(5), "a refusal", || {
            let said =
                cluster.in_pod(&client.name, &format!("curl -sS -m 3 http://{target}/ 2>&1 || true"))?;
            ensure!(is_refusal(&said), "{target} from a pod: {said}");
            let said = cluster.on("node2", &format!("curl -sS -m 3 http://{target}/ 2>&1 || true"))?;
            ensure!(is_refusal(&said), "{target} from a node: {said}");
            Ok(())
        })?;
    }
    cluster.delete(SERVICE).map(drop)
}

fn selectorless(cluster: &Cluster) -> anyhow::Result<()> {
    let target = cluster.pod_on("echo", "node2")?;
    let slice = |family: &str, address: &str| {
        format!(
            "
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: by-hand-{}, namespace: suite, labels: {{kubernetes.io/service-name: by-hand}}}}
addressType: {family}
ports: [{{name: '', port: 8080, protocol: TCP}}]
endpoints: [{{addresses: ['{address}']}}]
",
            family.to_lowercase()
        )
    };
    let manifest = format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: by-hand, namespace: suite}}
spec: {{ipFamilyPolicy: RequireDualStack, ports: [{{port: 80, targetPort: 8080}}]}}
{}{}",
        slice("IPv4", &target.addresses[0]),
        slice("IPv6", &target.addresses[1])
    );
    cluster.apply(&manifest)?;
    let client = cluster.pod_on("tools", "node3")?;
    for ip in cluster.cluster_ips("by-hand")? {
        cluster.within(Duration::from_secs(5), "the endpoint by hand", || {
            let names = answering(&in_url(&ip), 3, |line| cluster.in_pod(&client.name, line))?;
            ensure!(names == BTreeSet::from([target.name.clone()]), "{names:?}");
            Ok(())
        })?;
    }
    cluster.delete(&manifest).map(drop)
}

fn readiness(cluster: &Cluster) -> anyhow::Result<()> {
    const MANIFEST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: unready, namespace: suite, labels: {app: unready}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: unready
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=-1]
    readinessProbe: {exec: {command: [cat, /tmp/ready]}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: unready, namespace: suite}
spec: {ipFamilyPolicy: RequireDualStack, selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: published, namespace: suite}
spec:
  ipFamilyPolicy: RequireDualStack
  publishNotReadyAddresses: true
  selector: {app: unready}
  ports: [{port: 80, targetPort: 8080}]
";
    cluster.apply(MANIFEST)?;
    let client = cluster.pod_on("tools", "node2")?;
    let answers = |service: &str| -> anyhow::Result<()> {
        for ip in cluster.cluster_ips(service)? {
            answering(&in_url(&ip), 2, |line| cluster.in_pod(&client.name, line))?;
        }
        Ok(())
    };
    cluster.within(PATIENCE, "the unready pod as published", || answers("published"))?;
    ensure!(answers("unready").is_err(), "an unready pod got traffic");
    cluster.in_pod("unready", "touch /tmp/ready")?;
    cluster.within(Duration::from_secs(10), "the pod once it is Ready", || answers("unready"))?;
    cluster.in_pod("unready", "rm /tmp/ready")?;
    cluster.within(Duration::from_secs(15), "no traffic once it is unready again", || {
        ensure!(answers("unready").is_err(), "an unready pod got traffic");
        Ok(())
    })?;
    cluster.delete(MANIFEST).map(drop)
}

fn deleted_and_made_again(cluster: &Cluster) -> anyhow::Result<()> {
    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: fleeting, namespace: suite}
spec:
  clusterIP: 10.96.77.77
  clusterIPs: [10.96.77.77, 'fd00:10:96::7777']
  ipFamilyPolicy: RequireDualStack
  selector: {app: echo}
  ports: [{port: 80, targetPort: web}]
";
    let client = cluster.pod_on("tools", "node1")?;
    let answers = || -> anyhow::Result<()> {
        for ip in ["10.96.77.77", "[fd00:10:96::7777]"] {
            answering(ip, 3, |line| cluster.in_pod(&client.name, &line.replace("-m 5", "-m 1")))?;
        }
        Ok(())
    };
    for _ in 0..3 {
        cluster.apply(SERVICE)?;
        cluster.within(Duration::from_secs(5), "the Service answers", answers)?;
        cluster.delete(SERVICE)?;
        cluster.within(Duration::from_secs(5), "the Service has ended", || {
            ensure!(answers().is_err(), "a deleted Service answers");
            Ok(())
        })?;
    }
    Ok(())
}

/// kubernetes.io/docs/tasks/network/extend-service-ip-ranges: the API server allocates from it at once.
fn service_cidr(cluster: &Cluster) -> anyhow::Result<()> {
    const RANGE: &str = "
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: more}
spec: {cidrs: [10.200.0.0/24, 'fd00:200::/112']}
";
    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: of-more, namespace: suite}
spec:
  clusterIP: 10.200.0.7
  clusterIPs: [10.200.0.7, 'fd00:200::7']
  ipFamilyPolicy: RequireDualStack
  selector: {app: echo}
  ports: [{port: 80, targetPort: web}]
";
    let client = cluster.pod_on("tools", "node1")?;
    let rules = || cluster.on("node1", "nft list chain inet weft-proxy unanswered");
    let range_is_known = |known: bool| {
        cluster.within(Duration::from_secs(10), "the range is known, or no more", || {
            let rules = rules()?;
            for range in ["10.200.0.0/24", "fd00:200::/112"] {
                ensure!(rules.contains(&format!("daddr {range} drop")) == known, "{range}: {rules}");
            }
            Ok(())
        })
    };
    range_is_known(false)?;
    cluster.apply(RANGE)?;
    range_is_known(true)?;
    cluster.within(Duration::from_secs(10), "the API server allocates", || cluster.apply(SERVICE))?;
    for (ip, unused) in [("10.200.0.7", "10.200.0.9"), ("fd00:200::7", "fd00:200::9")] {
        cluster.within(Duration::from_secs(5), "the Service answers", || {
            answering(&in_url(ip), 3, |line| cluster.in_pod(&client.name, line))
        })?;
        let ask = |address: &str, port: u16| {
            let url = format!("http://{}:{port}/", in_url(address));
            cluster.in_pod(&client.name, &format!("curl -sS -m 2 {url} 2>&1 || true"))
        };
        let said = ask(ip, 81)?;
        ensure!(is_refusal(&said), "a port that {ip} does not have: {said}");
        let said = ask(unused, 80)?;
        ensure!(said.contains("timed out"), "{unused}, which no Service has: {said}");
        let name = cluster.in_pod(&client.name, &format!("dig +short -x {ip}"))?;
        ensure!(name.trim() == "of-more.suite.svc.cluster.local.", "the name of {ip}: {name}");
    }
    let problems = cluster.status("node1")?["problems"].to_string();
    ensure!(!problems.contains("of-more") && !problems.contains("ServiceCIDR"), "{problems}");
    cluster.delete(SERVICE)?;
    cluster.delete(RANGE)?;
    range_is_known(false)
}

fn named_ports(cluster: &Cluster) -> anyhow::Result<()> {
    const MANIFEST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: two-ports, namespace: suite, labels: {app: two-ports}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: first
    image: weft.network/test:1
    args: [netexec, --http-port=8080, --udp-port=-1]
    env: [{name: HOSTNAME, value: first}]
    ports: [{name: first, containerPort: 8080}]
  - name: second
    image: weft.network/test:1
    args: [netexec, --http-port=9090, --udp-port=-1]
    ports: [{name: second, containerPort: 9090}]
---
apiVersion: v1
kind: Service
metadata: {name: two-ports, namespace: suite}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: two-ports}
  ports:
  - {name: one, port: 80, targetPort: first}
  - {name: two, port: 81, targetPort: second}
";
    cluster.apply(MANIFEST)?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/two-ports", "--timeout=60s"])?;
    let client = cluster.pod_on("tools", "node1")?;
    for ip in cluster.cluster_ips("two-ports")? {
        for port in [80, 81] {
            cluster.within(Duration::from_secs(5), "both ports", || {
                let url = format!("{}:{port}", in_url(&ip));
                answering(&url, 2, |line| cluster.in_pod(&client.name, line)).map(drop)
            })?;
        }
        let line = format!("curl -sS -m 2 http://{}:82/ 2>&1 || true", in_url(&ip));
        let said = cluster.in_pod(&client.name, &line)?;
        ensure!(is_refusal(&said), "a port that the Service has not: {said}");
    }
    cluster.delete(MANIFEST).map(drop)
}

/// New connections by name: the pods of the old version leave the Service before they stop listening.
fn rolling_update(cluster: &Cluster) -> anyhow::Result<()> {
    let load = Load::on_new_connections(cluster, "node1", "web")?;
    let other = Load::on_new_connections(cluster, "node3", "web")?;
    for _ in 0..2 {
        cluster.kubectl(&["rollout", "restart", "deployment/web"])?;
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=180s"])?;
    }
    load.unharmed("after two rolling updates")?;
    other.unharmed("after two rolling updates")
}

fn scale_to_none_and_back(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node2")?;
    let ips = cluster.cluster_ips("web")?;
    let scale = |count: &str| cluster.kubectl(&["scale", "deployment/web", "--replicas", count]);
    scale("0")?;
    cluster.within(PATIENCE, "a refusal", || {
        let said = cluster.in_pod(&client.name, &format!("curl -sS -m 2 http://{}/ 2>&1 || true", ips[0]))?;
        ensure!(is_refusal(&said), "{said}");
        Ok(())
    })?;
    scale("4")?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    for ip in ips {
        cluster.within(Duration::from_secs(5), "four pods", || {
            let names = answering(&in_url(&ip), 80, |line| cluster.in_pod(&client.name, line))?;
            ensure!(names.len() == 4, "{names:?}");
            Ok(())
        })?;
    }
    Ok(())
}
