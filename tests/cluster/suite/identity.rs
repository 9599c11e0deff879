//! Who the agent is, asked of the API server with the very token that the DaemonSet handed over (decision 15 of the design):
//! bound to its node, it reads what the network is made of and writes the annotations of its own Node, nothing else.

use std::time::Duration;

use anyhow::ensure;

use crate::cluster::{Cluster, NODES, said};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case("the agent's token writes the annotations of its own Node", own_node),
    case("the agent's token may not write another Node", another_node),
    case("the agent's token may not write labels, taints or foreign annotations of its Node", nothing_else),
    case("of the status of its Node the agent's token writes one condition and nothing else", condition),
    case("a token of the ServiceAccount that is bound to no node writes no Node", unbound),
    case("the role names the verbs used and no more", verbs),
    case("a DaemonSet pod made anew hands over a new token, and the agent takes it", handed_over),
];

const TOKEN: &str = "/var/lib/weft/api/token";
const ANNOTATION: &str = "weft.network/suite";

/// What the API server answers to a merge patch with a node's token: the object, or the refusal as an error. Not by kubectl,
/// which reads the object first.
fn patch(cluster: &Cluster, token: &str, node: &str, patch: &str) -> anyhow::Result<String> {
    patch_at(cluster, token, node, "application/merge-patch+json", patch)
}

/// The same of `node` or `node/status`, with a kind of patch.
fn patch_at(cluster: &Cluster, token: &str, node: &str, kind: &str, patch: &str) -> anyhow::Result<String> {
    let mut command = cluster.script("exec");
    command.args(["lan", "curl", "-sS", "-m", "10", "-X", "PATCH", "--cacert"]);
    command.arg(cluster.run_folder.join("pki/ca.crt"));
    command.args(["-H", &format!("Authorization: Bearer {}", token.trim())]);
    command.args(["-H", &format!("Content-Type: {kind}"), "-d", patch]);
    let answer = said(command.arg(format!("https://172.30.98.1:6443/api/v1/nodes/{node}")))?;
    let object: serde_json::Value = serde_json::from_str(&answer)?;
    ensure!(object["kind"] == "Node", "{}", object["message"]);
    Ok(answer)
}

fn annotation(name: &str) -> String {
    format!(r#"{{"metadata":{{"annotations":{{"{name}":"x"}}}}}}"#)
}

fn refused(outcome: anyhow::Result<String>, what: &str) -> anyhow::Result<()> {
    let text = match outcome {
        Ok(answer) => anyhow::bail!("{what} was not refused: {answer}"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(
        text.contains("ValidatingAdmissionPolicy") && text.contains("weft"),
        "{what} was refused otherwise: {text}"
    );
    Ok(())
}

fn own_node(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES {
        let token = cluster.on(node, &format!("cat {TOKEN}"))?;
        patch(cluster, &token, node, &annotation(ANNOTATION))?;
        cluster.kubectl(&["annotate", "node", node, &format!("{ANNOTATION}-")])?;
    }
    Ok(())
}

fn another_node(cluster: &Cluster) -> anyhow::Result<()> {
    let token = cluster.on("node1", &format!("cat {TOKEN}"))?;
    refused(patch(cluster, &token, "node2", &annotation(ANNOTATION)), "another Node's annotation")
}

fn nothing_else(cluster: &Cluster) -> anyhow::Result<()> {
    let token = cluster.on("node1", &format!("cat {TOKEN}"))?;
    let patches = [
        ("a label", r#"{"metadata":{"labels":{"weft.network/suite":"x"}}}"#.to_owned()),
        ("a taint", r#"{"spec":{"taints":[{"key":"a","effect":"NoExecute"}]}}"#.to_owned()),
        ("unschedulable", r#"{"spec":{"unschedulable":true}}"#.to_owned()),
        ("a foreign annotation", annotation("example.org/mine")),
        (
            "the kubelet's annotation gone",
            r#"{"metadata":{"annotations":{"volumes.kubernetes.io/controller-managed-attach-detach":null}}}"#
                .to_owned(),
        ),
        ("a finalizer", r#"{"metadata":{"finalizers":["example.org/mine"]}}"#.to_owned()),
    ];
    for (what, body) in patches {
        refused(patch(cluster, &token, "node1", &body), what)?;
    }
    Ok(())
}

/// What the agent itself says is there, and whatever else it might write of the status is refused.
fn condition(cluster: &Cluster) -> anyhow::Result<()> {
    let ours = r#"{.status.conditions[?(@.type=="weft.network/NetworkPolicyReady")].status}"#;
    for node in NODES {
        cluster.within(Duration::from_secs(30), "the condition", || {
            let said = cluster.kubectl(&["get", "node", node, "-o", &format!("jsonpath={ours}")])?;
            ensure!(said.trim() == "True", "{node}: {said:?}");
            Ok(())
        })?;
    }
    let token = cluster.on("node1", &format!("cat {TOKEN}"))?;
    let strategic = |node: &str, body: &str| {
        patch_at(cluster, &token, node, "application/strategic-merge-patch+json", body)
    };
    let of_type =
        |name: &str| format!(r#"{{"status":{{"conditions":[{{"type":"{name}","status":"False"}}]}}}}"#);
    for (what, body) in [
        ("the kubelet's condition", of_type("Ready")),
        ("a condition of nobody", of_type("example.org/Mine")),
        (
            "an address",
            r#"{"status":{"addresses":[{"type":"ExternalIP","address":"192.0.2.66"}]}}"#.to_owned(),
        ),
        ("the capacity", r#"{"status":{"capacity":{"pods":"9999"}}}"#.to_owned()),
        (
            "the kubelet's condition gone",
            r#"{"status":{"conditions":[{"type":"Ready","$patch":"delete"}]}}"#.to_owned(),
        ),
    ] {
        refused(strategic("node1/status", &body), what)?;
    }
    let own = of_type("weft.network/NetworkPolicyReady");
    refused(strategic("node2/status", &own), "another Node's condition")?;
    strategic("node1/status", &own)?;
    cluster.within(Duration::from_secs(90), "the agent says again what is true", || {
        let said = cluster.kubectl(&["get", "node", "node1", "-o", &format!("jsonpath={ours}")])?;
        ensure!(said.trim() == "True", "{said:?}");
        Ok(())
    })
}

fn unbound(cluster: &Cluster) -> anyhow::Result<()> {
    let token = cluster.kubectl(&["-n", "weft-system", "create", "token", "weft-agent"])?;
    refused(patch(cluster, token.trim(), "node1", &annotation(ANNOTATION)), "a token bound to no node")
}

fn verbs(cluster: &Cluster) -> anyhow::Result<()> {
    let may = |verb: &str, resource: &str| {
        let who = "--as=system:serviceaccount:weft-system:weft-agent";
        let (resource, part) = resource.split_once('/').unwrap_or((resource, ""));
        let part = format!("--subresource={part}");
        cluster.kubectl(&["auth", "can-i", verb, resource, &part, who, "--all-namespaces"]).is_ok()
    };
    for resource in [
        "nodes",
        "namespaces",
        "pods",
        "services",
        "endpointslices.discovery.k8s.io",
        "networkpolicies.networking.k8s.io",
    ] {
        ensure!(may("list", resource) && may("watch", resource), "{resource} cannot be watched");
        ensure!(!may("delete", resource) && !may("create", resource), "{resource} can be made or deleted");
    }
    for (verb, resource) in [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("list", "configmaps"),
        ("patch", "pods"),
        ("update", "nodes"),
        ("update", "nodes/status"),
        ("create", "pods/exec"),
        ("impersonate", "users"),
    ] {
        ensure!(!may(verb, resource), "may {verb} {resource}");
    }
    // This cluster serves Ingresses (`--ingress on`).
    ensure!(may("get", "secrets"), "a certificate that an Ingress names cannot be read");
    Ok(())
}

fn handed_over(cluster: &Cluster) -> anyhow::Result<()> {
    let before = cluster.on("node2", &format!("cat {TOKEN}"))?;
    let pod = ["-n", "weft-system", "get", "pods", "-o", "name", "--field-selector", "spec.nodeName=node2"];
    let name = cluster.kubectl(&pod)?;
    cluster.kubectl(&["-n", "weft-system", "delete", name.trim()])?;
    cluster.within(Duration::from_secs(60), "a new token", || {
        ensure!(cluster.on("node2", &format!("cat {TOKEN}"))? != before, "the token is the old one");
        Ok(())
    })?;
    cluster.within(Duration::from_secs(90), "the agent is connected with it", || {
        let status = cluster.status("node2")?;
        let api = status["api_server"].as_str().unwrap_or_default();
        ensure!(api.starts_with("connected"), "{api}");
        Ok(())
    })?;
    cluster.kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", "--timeout=60s"]).map(drop)
}
