//! Bad input on a real cluster: the node that gets it says in one line what is wrong and what to do, stays NotReady rather than
//! half working, harms no other node, and heals by itself.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, PATIENCE, strings};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("no kubeconfig: the agent ends with one line", no_kubeconfig),
    case("a wrong CA is named with its file", wrong_ca),
    case("a token that is not accepted is named with its file", wrong_token),
    case("an API server that is not there is named with its address", no_api_server),
    case("missing rights are named with the command that grants them", no_rights),
    case("a Node without podCIDR is named, and works once it has one", no_pod_cidr),
    case(
        "another CNI's configuration that comes first is named, and ours returns after it",
        foreign_configuration,
    ),
    case("of two Nodes with one podCIDR the newer stays away, and no other is harmed", one_pod_cidr_twice),
];

/// The node that is mistreated.
const NODE: &str = "node3";
const CONFLIST: &str = "/etc/cni/net.d/05-weft.conflist";
const SOON: Duration = Duration::from_secs(30);

/// One reason of `weft status` holds all the words; the CNI configuration is not there, and the node is NotReady.
fn refuses(cluster: &Cluster, words: &[&str]) -> anyhow::Result<()> {
    cluster.within(SOON, "the reason in weft status", || {
        let status = cluster.status(NODE)?;
        let reasons = strings(&status["reasons"]);
        let named =
            |reason: &String| words.iter().all(|word| reason.contains(word)) && reason.lines().count() == 1;
        ensure!(
            status["ready"] == false && reasons.iter().any(named),
            "no reason with {words:?}: {status:#}"
        );
        cluster.on(NODE, &format!("! test -e {CONFLIST}")).context("the CNI configuration is there")?;
        Ok(())
    })?;
    cluster.within(SOON, "the node is NotReady", || {
        let said = cluster.kubectl(&["get", "node", NODE, "--no-headers"])?;
        ensure!(said.contains("NotReady"), "{said}");
        Ok(())
    })?;
    let log = cluster.on(NODE, "tail -n 200 /var/log/weft-agent.service.log")?;
    let in_log = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(in_log, "the log does not say it: {log}");
    let other = cluster.status("node1")?;
    ensure!(other["ready"] == true, "node1 is harmed: {other:#}");
    Ok(())
}

fn healed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.within(PATIENCE, "the node is Ready again", || {
        let status = cluster.status(NODE)?;
        ensure!(status["ready"] == true, "{status:#}");
        cluster.kubectl(&["wait", "--for=condition=Ready", &format!("node/{NODE}"), "--timeout=1s"])
    })?;
    cluster.within(PATIENCE, "its pods answer", || {
        let pod = cluster.pod_on("echo", NODE)?;
        let client = cluster.pod_on("tools", "node1")?;
        let address = pod.addresses.first().context("an address")?;
        cluster.in_pod(&client.name, &format!("curl -sS -m 2 http://{address}:8080/hostname"))
    })?;
    Ok(())
}

/// The agent as on its first start on this machine: with no last good Snapshot and no CNI configuration.
fn first_start(cluster: &Cluster, change: &str) -> anyhow::Result<()> {
    cluster.on(
        NODE,
        &format!(
            "systemctl stop weft-agent; rm -rf /var/lib/weft/store {CONFLIST}; cp /etc/weft/agent.env /tmp/agent.env
             > /var/log/weft-agent.service.log
             {change}
             systemctl start weft-agent"
        ),
    )
    .map(drop)
}

/// A first start with a changed flag; then the flag is mended and the agent started anew.
fn with_changed_flag(cluster: &Cluster, change: &str, words: &[&str]) -> anyhow::Result<()> {
    first_start(cluster, change)?;
    let outcome = refuses(cluster, words);
    cluster.on(NODE, "cp /tmp/agent.env /etc/weft/agent.env; systemctl restart weft-agent")?;
    outcome?;
    healed(cluster)
}

fn no_kubeconfig(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.on(NODE, "systemctl stop weft-agent")?;
    let said = cluster.on(NODE, "weft agent --kubeconfig /nowhere/config 2>&1 >/dev/null; echo code $?");
    cluster.on(NODE, "systemctl start weft-agent")?;
    let said = said?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines.len() == 2 && lines[1] != "code 0" && lines[0].contains("/nowhere/config"), "{said}");
    healed(cluster)
}

fn wrong_ca(cluster: &Cluster) -> anyhow::Result<()> {
    let change =
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=other \
                  -keyout /dev/null -out /tmp/other.crt 2>/dev/null
                  sed -i 's#--ca-file [^ \"]*#--ca-file /tmp/other.crt#' /etc/weft/agent.env";
    with_changed_flag(
        cluster,
        change,
        &["certificate", "/tmp/other.crt", "172.30.98.1", "put the CA that signed"],
    )
}

fn wrong_token(cluster: &Cluster) -> anyhow::Result<()> {
    // A token that was good: signed by this cluster, bound to a ServiceAccount that is deleted.
    cluster.kubectl(&["create", "serviceaccount", "short"])?;
    let token = cluster.kubectl(&["create", "token", "short"])?;
    cluster.kubectl(&["delete", "serviceaccount", "short"])?;
    let change = format!(
        "echo {} > /tmp/token; sed -i 's#--token-file [^ \"]*#--token-file /tmp/token#' /etc/weft/agent.env",
        token.trim()
    );
    first_start(cluster, &change)?;
    refuses(cluster, &["does not accept the token", "/tmp/token", "taken at once"])?;
    // A good token in the same file is taken without a restart.
    cluster.on(NODE, "cat /var/lib/weft/api/token > /tmp/token")?;
    healed(cluster)?;
    cluster.on(NODE, "cp /tmp/agent.env /etc/weft/agent.env; systemctl restart weft-agent")?;
    healed(cluster)
}

fn no_api_server(cluster: &Cluster) -> anyhow::Result<()> {
    let change = "sed -i 's#--api-server [^ \"]*#--api-server https://172.30.98.1:7443#' /etc/weft/agent.env";
    with_changed_flag(cluster, change, &["https://172.30.98.1:7443", "cannot be reached"])
}

fn no_rights(cluster: &Cluster) -> anyhow::Result<()> {
    let binding = cluster.kubectl(&["get", "clusterrolebinding", "weft-agent", "-o", "json"])?;
    cluster.kubectl(&["delete", "clusterrolebinding", "weft-agent"])?;
    let outcome =
        first_start(cluster, "true").and_then(|()| refuses(cluster, &["forbidden", "weft manifests"]));
    cluster.apply(&binding)?;
    outcome?;
    healed(cluster)
}

/// Makes the Node object anew, without podCIDR, as with a controller-manager that allocates none.
fn registered_without_pod_cidr(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.control_plane("stop", "kube-controller-manager")?;
    cluster.kubectl(&["delete", "node", NODE])?;
    cluster.on(NODE, "systemctl restart kubelet")?;
    cluster.within(SOON, "the node registers", || cluster.kubectl(&["get", "node", NODE])).map(drop)
}

fn no_pod_cidr(cluster: &Cluster) -> anyhow::Result<()> {
    let outcome = registered_without_pod_cidr(cluster)
        .and_then(|()| first_start(cluster, "true"))
        .and_then(|()| refuses(cluster, &["has no podCIDR", "--allocate-node-cidrs"]));
    cluster.control_plane("start", "kube-controller-manager")?;
    outcome?;
    cluster.within(SOON, "a podCIDR", || {
        ensure!(!strings(&cluster.object(&["node", NODE])?["spec"]["podCIDRs"]).is_empty(), "none yet");
        Ok(())
    })?;
    // It may be another one than before: then the pods of the node are named in its status, and are to be made anew.
    let of_node = format!("spec.nodeName={NODE}");
    cluster.kubectl(&["delete", "pods", "--field-selector", &of_node, "--grace-period=1"])?;
    healed(cluster)
}

fn foreign_configuration(cluster: &Cluster) -> anyhow::Result<()> {
    let foreign = "/etc/cni/net.d/00-foreign.conflist";
    cluster.on(NODE, &format!("echo '{{\"cniVersion\":\"1.0.0\",\"name\":\"f\",\"plugins\":[{{\"type\":\"none\"}}]}}' > {foreign}"))?;
    let outcome = cluster.within(SOON, "the reason in weft status", || {
        let status = cluster.status(NODE)?;
        let reasons = strings(&status["reasons"]);
        ensure!(reasons.iter().any(|reason| reason.contains("00-foreign.conflist")), "{status:#}");
        cluster.on(NODE, &format!("! test -e {CONFLIST}"))
    });
    cluster.on(NODE, &format!("rm {foreign}"))?;
    outcome?;
    healed(cluster)
}

fn one_pod_cidr_twice(cluster: &Cluster) -> anyhow::Result<()> {
    let cidrs = strings(&cluster.object(&["node", NODE])?["spec"]["podCIDRs"]);
    let squatter = serde_json::json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "squatter"},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}
    });
    cluster.control_plane("stop", "kube-controller-manager")?;
    let outcome = cluster.kubectl(&["delete", "node", NODE]).and_then(|_| {
        cluster.apply(&squatter.to_string())?;
        // Times of creation have whole seconds.
        std::thread::sleep(Duration::from_secs(2));
        cluster.on(NODE, "systemctl restart kubelet")?;
        cluster.within(SOON, "the node registers", || cluster.kubectl(&["get", "node", NODE]))?;
        let spec = serde_json::json!({"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}});
        cluster.kubectl(&["patch", "node", NODE, "-p", &spec.to_string()])?;
        refuses(cluster, &["squatter", NODE])
    });
    let _ = cluster.kubectl(&["delete", "node", "squatter", "--ignore-not-found"]);
    cluster.control_plane("start", "kube-controller-manager")?;
    outcome?;
    healed(cluster)
}
