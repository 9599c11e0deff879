//! The DNS specification of Kubernetes (github.com/kubernetes/dns/blob/master/docs/specification.md), asked by real resolvers: glibc's
//! (`getent`), musl's (`resolve`), BIND's `dig`.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, in_url};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("glibc finds a Service by short, namespaced and full name, both families", glibc),
    case("musl finds a Service by short, namespaced and full name, both families", musl),
    case("a headless Service names every pod", headless),
    case("SRV records name ports and targets that resolve", srv),
    case("PTR records lead back to the Service and to the pod", ptr),
    case("a name that is not there is NXDOMAIN, a type that is not there NODATA", negative),
    case("an ExternalName Service is a CNAME", external_name),
    case("DNS answers over TCP", tcp),
    case("a host-network pod with ClusterFirstWithHostNet and the node itself are answered", host_network),
    case("the resolver reaches a pod on every node within its own node", every_node),
    case("Nodes are found by their names, both families", nodes),
    case("coredns-custom is followed on every node; a bad one keeps the good one and is named", custom),
    case("autopath answers the first question of a pod's search path", autopath),
];

/// A change is known on every node in this time.
const PATIENCE: Duration = Duration::from_secs(10);
const SUFFIX: &str = "suite.svc.cluster.local";

fn lines(said: &str) -> BTreeSet<String> {
    said.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// Every spelling of the name, each family, against the Service's addresses.
fn found_by(cluster: &Cluster, look_up: impl Fn(&str, &str) -> String) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let ips = cluster.cluster_ips("echo")?;
    for name in
        ["echo", "echo.suite", "echo.suite.svc", &format!("echo.{SUFFIX}"), &format!("echo.{SUFFIX}.")]
    {
        for (family, ip) in ["4", "6"].into_iter().zip(&ips) {
            let line = look_up(name, family);
            let said = cluster.in_pod(&client.name, &line).with_context(|| line.clone())?;
            ensure!(lines(&said) == BTreeSet::from([ip.clone()]), "{line}: {said}");
        }
    }
    Ok(())
}

fn glibc(cluster: &Cluster) -> anyhow::Result<()> {
    found_by(cluster, |name, family| format!("getent ahostsv{family} {name}"))
}

fn musl(cluster: &Cluster) -> anyhow::Result<()> {
    found_by(cluster, |name, family| format!("resolve {name} {family}"))
}

fn headless(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node3")?;
    for (index, kind) in ["A", "AAAA"].into_iter().enumerate() {
        let expected: BTreeSet<_> =
            cluster.pods("echo")?.into_iter().map(|pod| pod.addresses[index].clone()).collect();
        cluster.within(PATIENCE, "every pod named", || {
            let said = cluster.in_pod(&client.name, &format!("dig +short echo-headless.{SUFFIX} {kind}"))?;
            ensure!(lines(&said) == expected, "{kind}: {said}");
            Ok(())
        })?;
    }
    Ok(())
}

fn srv(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let said = cluster.in_pod(&client.name, &format!("dig +short _http._tcp.echo.{SUFFIX} SRV"))?;
    let fields: Vec<_> = said.split_whitespace().collect();
    ensure!(fields.get(2..) == Some(&["80", &format!("echo.{SUFFIX}.")]), "{said}");
    let said = cluster.in_pod(&client.name, &format!("dig +short _http._tcp.echo-headless.{SUFFIX} SRV"))?;
    let targets: BTreeSet<_> = said.lines().filter_map(|line| line.split(' ').nth(3)).collect();
    ensure!(
        said.lines().count() >= 3 && said.lines().all(|line| line.split(' ').nth(2) == Some("8080")),
        "{said}"
    );
    let pods: BTreeSet<_> = cluster.pods("echo")?.into_iter().map(|pod| pod.addresses[0].clone()).collect();
    let mut found = BTreeSet::new();
    for target in targets {
        found.extend(lines(&cluster.in_pod(&client.name, &format!("dig +short {target} A"))?));
    }
    ensure!(found == pods, "targets resolve to {found:?}, pods have {pods:?}");
    Ok(())
}

fn ptr(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node2")?;
    for ip in cluster.cluster_ips("echo")? {
        let said = cluster.in_pod(&client.name, &format!("dig +short -x {ip}"))?;
        ensure!(said.trim() == format!("echo.{SUFFIX}."), "{ip}: {said}");
    }
    let pod = cluster.pod_on("echo", "node1")?;
    for address in &pod.addresses {
        let said = cluster.in_pod(&client.name, &format!("dig +short -x {address}"))?;
        ensure!(said.contains(&format!("echo-headless.{SUFFIX}.")), "{address}: {said}");
    }
    Ok(())
}

fn negative(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    let said = cluster.in_pod(&client.name, &format!("dig +noall +comments +authority absent.{SUFFIX} A"))?;
    ensure!(said.contains("NXDOMAIN") && said.contains("SOA"), "{said}");
    let said = cluster.in_pod(&client.name, &format!("dig +noall +comments +authority echo.{SUFFIX} MX"))?;
    ensure!(said.contains("NOERROR") && said.contains("SOA"), "{said}");
    Ok(())
}

fn external_name(cluster: &Cluster) -> anyhow::Result<()> {
    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: suite}
spec: {type: ExternalName, externalName: echo.suite.svc.cluster.local}
";
    cluster.apply(SERVICE)?;
    let client = cluster.pod_on("tools", "node1")?;
    cluster.within(Duration::from_secs(5), "the CNAME", || {
        let said = cluster.in_pod(&client.name, &format!("dig +short elsewhere.{SUFFIX} CNAME"))?;
        ensure!(said.trim() == format!("echo.{SUFFIX}."), "{said}");
        let said = cluster.in_pod(&client.name, "curl -sS -m 5 http://elsewhere/hostname")?;
        ensure!(said.starts_with("echo-"), "{said}");
        Ok(())
    })?;
    cluster.delete(SERVICE).map(drop)
}

fn tcp(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node2")?;
    let ips = cluster.cluster_ips("echo")?;
    for (kind, ip) in ["A", "AAAA"].into_iter().zip(&ips) {
        for server in ["10.96.0.10", "fd00:10:96::a"] {
            let line = format!("dig +tcp +short @{server} echo.{SUFFIX} {kind}");
            let said = cluster.in_pod(&client.name, &line)?;
            ensure!(said.trim() == ip, "{line}: {said}");
        }
    }
    Ok(())
}

fn host_network(cluster: &Cluster) -> anyhow::Result<()> {
    let host = cluster.pod_on("host", "node2")?;
    let ips = cluster.cluster_ips("echo")?;
    let said = cluster.in_pod(&host.name, "getent ahostsv4 echo")?;
    ensure!(lines(&said) == BTreeSet::from([ips[0].clone()]), "{said}");
    let said = cluster.on("node3", &format!("dig +short @10.96.0.10 echo.{SUFFIX} A"))?;
    ensure!(said.trim() == ips[0], "{said}");
    Ok(())
}

fn every_node(cluster: &Cluster) -> anyhow::Result<()> {
    for client in cluster.pods("tools")? {
        let said = cluster.in_pod(&client.name, "curl -sS -m 5 http://echo/hostname")?;
        ensure!(said.starts_with("echo-"), "{said}");
        for server in ["10.96.0.10", "fd00:10:96::a"] {
            let line = format!("dig +short @{server} kubernetes.default.svc.cluster.local A");
            let said = cluster.in_pod(&client.name, &line)?;
            ensure!(said.trim() == "10.96.0.1", "{} by {}: {said}", client.node, in_url(server));
        }
    }
    Ok(())
}

fn nodes(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.pod_on("tools", "node1")?;
    for node in ["node1", "node2", "node3"] {
        for (kind, address) in ["A", "AAAA"].into_iter().zip(Cluster::node_addresses(node)) {
            let said = cluster.in_pod(&client.name, &format!("dig +short {node}. {kind}"))?;
            ensure!(said.trim() == address, "{node} {kind}: {said}");
        }
    }
    Ok(())
}

/// The ConfigMap with one `.override`.
fn config_map(text: &str) -> String {
    let indented: String = text.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: coredns-custom, namespace: kube-system}}\ndata:\n  suite.override: |\n{indented}"
    )
}

fn custom(cluster: &Cluster) -> anyhow::Result<()> {
    let good = config_map(
        "hosts {\n  192.0.2.7 printer.suite\n  fallthrough\n}\nrewrite name other.suite echo.suite.svc.cluster.local",
    );
    let bad = config_map("hosts {\n  192.0.2.999 printer.suite\n}");
    cluster.apply_elsewhere(&good)?;
    let echo = cluster.cluster_ips("echo")?;
    let clients = cluster.pods("tools")?;
    let answers = |name: &str, expected: &str| {
        clients.iter().try_for_each(|client| {
            let said = cluster.in_pod(&client.name, &format!("dig +short {name}. A"))?;
            ensure!(said.trim() == expected, "{name} on {}: {said}", client.node);
            Ok(())
        })
    };
    cluster.within(PATIENCE, "the ConfigMap on every node", || {
        answers("printer.suite", "192.0.2.7")?;
        answers("other.suite", &echo[0])
    })?;
    cluster.apply_elsewhere(&bad)?;
    cluster.within(PATIENCE, "the Problem", || {
        let status = cluster.status("node2")?.to_string();
        ensure!(status.contains("data[suite.override] line 2"), "{status}");
        Ok(())
    })?;
    answers("printer.suite", "192.0.2.7")?;
    cluster.delete_elsewhere(&good)?;
    cluster.within(PATIENCE, "the end of it", || {
        let said = cluster.in_pod(&clients[0].name, "dig printer.suite. A")?;
        ensure!(!said.contains("192.0.2.7"), "{said}");
        Ok(())
    })
}

fn autopath(cluster: &Cluster) -> anyhow::Result<()> {
    let map = config_map("autopath @kubernetes\nhosts {\n  192.0.2.8 www.outside.suite\n  fallthrough\n}");
    cluster.apply_elsewhere(&map)?;
    let client = cluster.pod_on("tools", "node1")?;
    cluster.within(PATIENCE, "an alias to the last name of the path", || {
        let said = cluster.in_pod(&client.name, &format!("dig +short www.outside.suite.{SUFFIX}. A"))?;
        ensure!(said.lines().eq(["www.outside.suite.", "192.0.2.8"]), "{said}");
        Ok(())
    })?;
    let said = cluster.in_pod(&client.name, "getent ahostsv4 www.outside.suite")?;
    ensure!(lines(&said) == BTreeSet::from(["192.0.2.8".to_owned()]), "{said}");
    cluster.delete_elsewhere(&map).map(drop)
}
