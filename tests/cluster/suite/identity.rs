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
    case("a token of the ServiceAccount that is bound to no node writes no Node", unbound),
    case("the role names the verbs used and no more", verbs),
    case("a DaemonSet pod made anew hands over a new token, and the agent takes it", handed_over),
];

const TOKEN: &str = "/var/lib/weft/api/token";
const ANNOTATION: &str = "weft.network/suite";

/// What the API server answers to a merge patch with a node's token: the object, or the refusal as an error. Not by kubectl,
/// which reads the object first.
fn patch(cluster: &Cluster, token: &str, node: &str, patch: &str) -> anyhow::Result<String> {
    let mut command = cluster.script("exec");
    command.args(["lan", "curl", "-sS", "-m", "10", "-X", "PATCH", "--cacert"]);
    command.arg(cluster.run_folder.join("pki/ca.crt"));
    command.args(["-H", &format!("Authorization: Bearer {}", token.trim())]);
    command.args(["-H", "Content-Type: application/merge-patch+json", "-d", patch]);
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
        ("patch", "nodes/status"),
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
