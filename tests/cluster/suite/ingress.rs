//! Ingress v1 as its documentation promises it (kubernetes.io/docs/concepts/services-networking/ingress), asked of every node by a
//! host of the LAN that is no node, in both families.

use std::time::Duration;

use anyhow::ensure;

use crate::cluster::{Cluster, NODES, PATIENCE, in_url};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("hosts and paths lead to their Services on every node, and the client's address is kept", routing),
    case("TLS has the certificate of the Secret, and a new one without a restart", certificate),
    case("a Secret that is missing is named at its Ingress, which still routes", missing_secret),
    case("a rolling update of the backend loses no request", rolling_update),
    case("the process has no rights, and the keys that it was given are nobody else's to read", unprivileged),
];

fn ingress(name: &str, host: &str, service: &str, more: &str) -> String {
    format!(
        "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{name: {name}, namespace: suite}}
spec:
  ingressClassName: weft
  {more}
  rules:
  - host: {host}
    http:
      paths:
      - {{path: /, pathType: Prefix, backend: {{service: {{name: {service}, port: {{number: 80}}}}}}}}
      - {{path: /hostname, pathType: Exact, backend: {{service: {{name: nowhere, port: {{number: 80}}}}}}}}
"
    )
}

/// Applied for as long as the check lasts.
fn with(cluster: &Cluster, manifest: &str, check: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    cluster.apply(manifest)?;
    let checked = check();
    cluster.delete(manifest)?;
    checked
}

/// Status code and body, asked of one node as the client does.
fn ask(cluster: &Cluster, address: &str, host: &str, path: &str) -> anyhow::Result<(String, String)> {
    let line =
        format!("curl -sS -m 5 -w '\\n%{{http_code}}' -H 'Host: {host}' 'http://{}{path}'", in_url(address));
    let said = cluster.on("client", &line)?;
    let (body, status) = said.trim().rsplit_once('\n').unwrap_or(("", said.trim()));
    Ok((status.to_owned(), body.to_owned()))
}

fn status_of(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<String>> {
    let object = cluster.object(&["ingress", name])?;
    let list = object["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
    Ok(list.iter().filter_map(|one| one["ip"].as_str().map(str::to_owned)).collect())
}

fn routing(cluster: &Cluster) -> anyhow::Result<()> {
    with(cluster, &ingress("routed", "routed.example.com", "echo", ""), || {
        let addresses = cluster.within(PATIENCE / 3, "addresses in the status", || {
            let found = status_of(cluster, "routed")?;
            ensure!(found.len() == 2 * NODES.len(), "{found:?}");
            Ok(found)
        })?;
        for address in &addresses {
            cluster.within(PATIENCE / 3, "an answer", || {
                let (status, seen) = ask(cluster, address, "routed.example.com", "/header?key=X-Real-Ip")?;
                ensure!(status == "200" && seen.ends_with("250"), "{address}: {status} {seen}");
                Ok(())
            })?;
            // Exact goes before Prefix, and leads to a Service that does not exist.
            let (exact, _) = ask(cluster, address, "routed.example.com", "/hostname")?;
            let (unknown, _) = ask(cluster, address, "unknown.example.com", "/")?;
            ensure!((exact.as_str(), unknown.as_str()) == ("503", "404"), "{address}: {exact} {unknown}");
        }
        Ok(())
    })
}

/// A Secret with a new key and certificate for `host`, whose subject says `of`.
fn secret(cluster: &Cluster, host: &str, of: &str) -> anyhow::Result<()> {
    let folder = cluster.run_folder.display().to_string();
    cluster.on(
        "client",
        &format!(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /O={of} \
             -addext subjectAltName=DNS:{host} -keyout {folder}/ingress.key -out {folder}/ingress.crt 2>/dev/null"
        ),
    )?;
    let manifest = cluster.kubectl(&[
        "create",
        "secret",
        "tls",
        "secured",
        &format!("--cert={folder}/ingress.crt"),
        &format!("--key={folder}/ingress.key"),
        "--dry-run=client",
        "-o",
        "yaml",
    ])?;
    cluster.apply(&manifest).map(drop)
}

fn certificate(cluster: &Cluster) -> anyhow::Result<()> {
    let host = "secured.example.com";
    let served = |of: &str| {
        for address in NODES.iter().flat_map(|node| Cluster::node_addresses(node)) {
            cluster.within(PATIENCE / 3, "the certificate", || {
                let line = format!(
                    "curl -sSvk -m 5 --connect-to '{host}:443:{}:443' https://{host}/healthz -o /dev/null 2>&1",
                    in_url(&address)
                );
                let said = cluster.on("client", &line)?;
                ensure!(said.contains(&format!("subject: O={of}")), "{address}: {said}");
                ensure!(said.contains("ALPN, server accepted to use h2") || said.contains("HTTP/2 200"), "{said}");
                Ok(())
            })?;
        }
        Ok(())
    };
    let tls = format!("tls: [{{hosts: [{host}], secretName: secured}}]");
    secret(cluster, host, "first")?;
    let checked = with(cluster, &ingress("secured", host, "echo", &tls), || {
        served("first")?;
        secret(cluster, host, "second")?;
        served("second")
    });
    cluster.kubectl(&["delete", "secret", "secured"])?;
    checked
}

fn missing_secret(cluster: &Cluster) -> anyhow::Result<()> {
    let tls = "tls: [{hosts: [other.example.com], secretName: not-there}]";
    with(cluster, &ingress("unsecured", "unsecured.example.com", "echo", tls), || {
        cluster.within(PATIENCE / 3, "the Event", || {
            let events = cluster.kubectl(&["describe", "ingress", "unsecured"])?;
            let sentence = "spec.tls[0].secretName: there is no Secret suite/not-there";
            ensure!(events.contains(sentence), "{events}");
            Ok(())
        })?;
        let [address, _] = Cluster::node_addresses(NODES[0]);
        let (status, _) = ask(cluster, &address, "unsecured.example.com", "/healthz")?;
        ensure!(status == "200", "{status}");
        Ok(())
    })
}

fn rolling_update(cluster: &Cluster) -> anyhow::Result<()> {
    with(cluster, &ingress("rolled", "rolled.example.com", "web", ""), || {
        let [address, _] = Cluster::node_addresses(NODES[0]);
        cluster.within(PATIENCE / 3, "an answer", || {
            let (status, _) = ask(cluster, &address, "rolled.example.com", "/healthz")?;
            ensure!(status == "200", "{status}");
            Ok(())
        })?;
        let log = cluster.run_folder.join("ingress-load").display().to_string();
        let asked = format!(
            "rm -f {log}.stop; (until [ -e {log}.stop ]; do curl -s -m 5 -o /dev/null -w '%{{http_code}}\\n' \
             -H 'Host: rolled.example.com' http://{address}/healthz; sleep 0.01; done) > {log} 2>&1 &"
        );
        cluster.on("client", &asked)?;
        let rolled = cluster
            .kubectl(&["rollout", "restart", "deployment/web"])
            .and_then(|_| cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]));
        std::thread::sleep(Duration::from_secs(2));
        let codes = cluster.on("client", &format!("touch {log}.stop; sleep 1; sort {log} | uniq -c"))?;
        rolled?;
        let lines: Vec<&str> = codes.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        ensure!(lines.len() == 1 && lines[0].ends_with(" 200"), "{codes}");
        Ok(())
    })
}

fn unprivileged(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES {
        let of_process = "grep -E '^(Uid|CapEff|CapPrm|NoNewPrivs)' /proc/$(cat /run/node/units/weft-ingress.service.pid)/status";
        let said = cluster.on(node, of_process)?;
        let words: Vec<&str> = said.split_whitespace().collect();
        ensure!(words.contains(&"61057") && !words.contains(&"0"), "{said}");
        ensure!(said.matches("0000000000000000").count() == 2, "{said}");
        let modes = cluster.on(node, "stat -c '%a %u' /run/weft/ingress /run/weft/ingress/routes.json")?;
        ensure!(modes.trim() == "750 0\n640 0", "{modes}");
    }
    Ok(())
}
