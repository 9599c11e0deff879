//! Network policies with the real processes: rules outlive the agent, are adopted, explained and switched off.

use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::node::picture::ruleset_with_handles;
use weft_tests::node::{NODE, Node, UPLINK_ADDRESSES, addresses, inside, refusal, run, until};

const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies";

fn rules() -> String {
    let output = Command::new("nft").args(["list", "table", "inet", "weft-policy"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A node with an isolated pod; its addresses.
fn isolated() -> (Node, Vec<String>) {
    let node = Node::running();
    let spec = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    node.api().create(POLICIES, &json!({"metadata": {"name": "deny-all"}, "spec": spec}));
    until("the policy is planned", || node.status()["problems"].is_array() && policies_known(&node));
    let pod = addresses(&node.add_pod("pod1"));
    (node, pod)
}

/// The policy loop has seen as late a Snapshot as there is.
fn policies_known(node: &Node) -> bool {
    let status = node.status();
    let loops = status["loops"].as_array().unwrap();
    loops.iter().all(|report| report["generation"] == status["generation"])
        && status["generation"].as_u64() > Some(2)
}

fn explain(node: &Node, question: &[&str]) -> Command {
    let mut command = node.weft("policy");
    command.arg("explain").args(question).arg("--run-dir").arg(node.path("run"));
    command
}

#[test]
fn rules_are_there_when_add_returns_and_the_next_agent_adopts_them() {
    inside(|| {
        let (mut node, pod) = isolated();
        for (address, family) in pod.iter().zip([4, 6]) {
            assert!(rules().contains(&format!("{address} : jump in{family}-")), "{}", rules());
        }
        node.await_ready();
        let before = ruleset_with_handles();
        node.end_agent(Signal::SIGKILL);
        assert_eq!(ruleset_with_handles(), before);
        node.start_agent();
        node.await_ready();
        assert_eq!(ruleset_with_handles(), before);
    });
}

#[test]
fn switching_the_engine_off_removes_every_rule_and_says_so() {
    inside(|| {
        let (mut node, _) = isolated();
        assert!(rules().contains("isolated by default/deny-all"));
        node.end_agent(Signal::SIGTERM);
        let mut command = node.agent_command();
        node.start_agent_with(command.args(["--network-policy", "off"]));
        node.await_ready();
        assert_eq!(rules(), "");
        node.add_pod("pod2");
        let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
        assert!(
            text.contains("policy: off (--network-policy off): every NetworkPolicy is ignored"),
            "{text}"
        );
        node.end_agent(Signal::SIGTERM);
        node.start_agent();
        node.await_ready();
        until("the rules are back", || rules().contains("isolated by default/deny-all"));
    });
}

fn condition(node: &Node) -> serde_json::Value {
    let object = node.api().read("/api/v1/nodes", NODE);
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ours = |condition: &serde_json::Value| condition["type"] == "weft.network/NetworkPolicyReady";
    conditions.into_iter().find(ours).unwrap_or_default()
}

/// A program that owns a table of our name, so that the kernel refuses ours; its end takes the table away.
fn occupy_the_table() -> std::process::Child {
    let mut command = Command::new("nft");
    let mut owner = command.arg("-i").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let stdin = owner.stdin.as_mut().unwrap();
    std::io::Write::write_all(stdin, b"add table inet weft-policy { flags owner; }\n").unwrap();
    until("the table is another's", || rules().contains("flags owner"));
    owner
}

#[test]
fn a_kernel_that_does_not_take_the_rules_is_told_by_the_node_cni_and_the_status() {
    inside(|| {
        let mut owner = occupy_the_table();
        let mut node = Node::new();
        node.start_server();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        until("the condition", || condition(&node)["status"] == "False");
        let message = condition(&node)["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.starts_with("network policies are not in place: table weft-policy: "), "{message}");
        let why = node.status()["reasons"].to_string();
        assert!(why.contains("network policies are not in place: table weft-policy: "), "{why}");
        let status = node.cni("STATUS", "1.1.0", "", "", None);
        assert!(
            status.failed && status.printed["msg"].to_string().contains("table weft-policy"),
            "{status:?}"
        );
        weft_tests::node::ip("netns add refused");
        let add = node.cni("ADD", "1.0.0", "refused", &weft_tests::node::netns("refused"), None);
        assert!(add.failed && add.printed["msg"].to_string().contains("table weft-policy"), "{add:?}");
        owner.kill().unwrap();
        owner.wait().unwrap();
        node.await_ready();
        until("the condition is true again", || condition(&node)["status"] == "True");
        node.add_pod("pod1");
        node.end_agent(Signal::SIGTERM);
        let mut command = node.agent_command();
        node.start_agent_with(command.args(["--network-policy", "off"]));
        until("an engine that is off has no condition", || condition(&node).is_null());
    });
}

/// Both verdicts while they happen, by name, as text and as JSON, through filters.
#[test]
fn flows_are_followed_as_they_happen() {
    inside(|| {
        let (node, _) = isolated();
        let free = json!({"podSelector": {"matchLabels": {"free": "yes"}}, "policyTypes": ["Egress"], "egress": [{}]});
        node.api().create(POLICIES, &json!({"metadata": {"name": "free"}, "spec": free}));
        let labels = json!({"free": "yes"});
        let metadata = json!({"name": "pod2", "namespace": "default", "labels": labels, "uid": "u-pod2"});
        let containers = json!([{"name": "a", "image": "a"}]);
        let spec = json!({"nodeName": NODE, "containers": containers});
        let pod = node
            .api()
            .create("/api/v1/namespaces/default/pods", &json!({"metadata": metadata, "spec": spec}));
        let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
        weft_tests::node::ip("netns add pod2");
        let _ = node.cni_of("ADD", "pod2", &uid).succeeded();
        let follow = |more: &[&str]| {
            let mut command = node.weft("flows");
            command.args(["--follow", "--port", "9"]).args(more).arg("--run-dir").arg(node.path("run"));
            let output = tempfile::NamedTempFile::new().unwrap();
            let child = command.stdout(output.reopen().unwrap()).spawn().unwrap();
            (child, output)
        };
        let mut all = follow(&["-o", "json"]);
        let mut denied = follow(&["--verdict", "denied"]);
        let said = |output: &tempfile::NamedTempFile| std::fs::read_to_string(output.path()).unwrap();
        until("both pods' flows of both families are followed", || {
            for pod in ["pod1", "pod2"] {
                for to in UPLINK_ADDRESSES {
                    let script = format!("exec 3<>/dev/udp/{to}/9; echo x >&3");
                    let _ = Command::new("ip").args(["netns", "exec", pod, "bash", "-c", &script]).output();
                }
            }
            let text = said(&all.1);
            let has = |verdict: &str, to: &str| {
                text.lines().any(|line| {
                    let record: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
                    record["verdict"] == verdict && record["destination"]["address"] == to
                })
            };
            ["allowed", "denied"].iter().all(|verdict| UPLINK_ADDRESSES.iter().all(|to| has(verdict, to)))
        });
        for line in said(&all.1).lines() {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            let (pod, by) = (&record["source"]["pod"], record["decided_by"].as_str().unwrap());
            match record["verdict"].as_str() {
                Some("allowed") => {
                    assert!(*pod == "default/pod2" && by == "default/free egress[0]", "{line}")
                }
                _ => assert!(*pod == "default/pod1" && by.contains("isolated by default/deny-all"), "{line}"),
            }
        }
        until("the filtered ones too", || said(&denied.1).lines().count() >= 2);
        assert!(
            said(&denied.1).lines().all(|line| line.contains(" DENIED  default/pod1 ")),
            "{}",
            said(&denied.1)
        );
        for (child, _) in [&mut all, &mut denied] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    });
}

#[test]
fn a_decision_is_explained_and_a_wrong_question_is_named() {
    inside(|| {
        let (mut node, pod) = isolated();
        let said = run(&mut explain(&node, &["203.0.113.9", &pod[0], "80/udp"]));
        assert!(
            said.contains("ingress of a pod that the API has not shown yet: isolated by default/deny-all"),
            "{said}"
        );
        assert!(said.ends_with("no rule allows it\n  denied\n"), "{said}");
        let (code, error) = refusal(&mut explain(&node, &["default/nobody", &pod[0], "80"]));
        assert_eq!(code, 1);
        assert!(
            error.contains("there is no Pod default/nobody; give NAMESPACE/POD or an address"),
            "{error}"
        );
        node.end_agent(Signal::SIGTERM);
        let (_, error) = refusal(&mut explain(&node, &["default/a", "default/b", "80"]));
        assert!(error.contains("is 'weft agent' running on this node?"), "{error}");
    });
}

#[test]
fn flows_are_shown_filtered_and_refused_where_there_are_none() {
    inside(|| {
        let (mut node, _) = isolated();
        let flows = |node: &Node, more: &[&str]| {
            let mut command = node.weft("flows");
            command.args(more).arg("--run-dir").arg(node.path("run"));
            run(&mut command)
        };
        let from_pod = |target: &str| {
            let script = format!("exec 3<>/dev/udp/{target}/9; echo x >&3");
            let mut command = Command::new("ip");
            run(command.args(["netns", "exec", "pod1", "bash", "-c", &script]));
        };
        until("both families' denials are recorded", || {
            UPLINK_ADDRESSES.iter().for_each(|node| from_pod(node));
            flows(&node, &["--verdict", "denied"]).lines().count() >= 2
        });
        let said = flows(&node, &["--pod", "pod1", "--port", "9"]);
        assert!(
            said.contains(" DENIED  default/pod1 ")
                && said
                    .contains(" -> 172.31.0.1, udp 9: egress of default/pod1: isolated by default/deny-all"),
            "{said}"
        );
        assert_eq!(flows(&node, &["--port", "9", "-n", "other"]), "");
        let json = flows(&node, &["-o", "json", "--port", "9", "--last", "1"]);
        let record: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&record["verdict"], &record["direction"]), (&json!("denied"), &json!("egress")));
        node.end_agent(Signal::SIGTERM);
        let mut command = node.agent_command();
        node.start_agent_with(command.args(["--network-policy", "off"]));
        node.await_ready();
        let mut command = node.weft("flows");
        let (code, error) = refusal(command.arg("--run-dir").arg(node.path("run")));
        assert_eq!(code, 1);
        assert!(error.contains("no flows are recorded: the agent runs with --network-policy off"), "{error}");
    });
}
