//! Why a node is not ready: one line with the remedy, no CNI configuration meanwhile, and readiness by itself once the cause is
//! mended; the agent is never restarted.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;

use serde_json::{Value, json};
use weft_tests::node::{NODE, Node, holds_within, inside, ip, netns, run, until, write};

use crate::objects::NODES;

const SERVER: &str = "API server https://172.31.0.1:6443";
const CLAIMS: [&str; 2] = ["10.244.7.0/24", "fd00:10:244:7::/64"];

fn conflist(node: &Node) -> PathBuf {
    node.path("cni/05-weft.conflist")
}

fn reasons(node: &Node) -> Vec<String> {
    let status = node.try_status().unwrap_or_default();
    let listed = status["reasons"].as_array().cloned().unwrap_or_default();
    listed.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn readyz() -> String {
    let Ok(mut stream) = TcpStream::connect("127.0.0.1:9470") else { return String::new() };
    let mut answer = String::new();
    let asked = stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n");
    let read = stream.set_read_timeout(Some(std::time::Duration::from_secs(2)));
    let _ = asked.and(read).and_then(|()| stream.read_to_string(&mut answer));
    answer
}

/// The one reason, wherever it is asked for, said to the log once; no pod may come.
fn is_not_ready(node: &Node, reason: &str) {
    if !holds_within(std::time::Duration::from_secs(30), || reasons(node) == [reason]) {
        panic!("expected {reason}\nfound {:#?}", node.try_status().unwrap_or_default());
    }
    until("no CNI configuration", || !conflist(node).exists());
    assert_eq!(node.status()["ready"], false);
    let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
    assert!(text.contains(&format!("ready       no\n  because: {reason}\n")), "{text}");
    let answer = readyz();
    assert!(answer.contains(" 503 ") && answer.ends_with(&format!("{reason}\n")), "{answer}");
    // Several retries of everything fit into this.
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(node.agent_log().matches(reason).count(), 1, "said once:\n{}", node.agent_log());
    assert!(!conflist(node).exists(), "no pod may come");
}

/// ADD and STATUS give the same reason to the container runtime.
fn refuses_pods(node: &Node, reason: &str) {
    until("the plugin", || node.path("bin/weft").exists());
    ip("netns add refused");
    let add = node.cni("ADD", "1.0.0", "refused", &netns("refused"), None);
    assert!(add.failed && add.printed["msg"] == reason, "{}", add.printed);
    assert_eq!(add.printed["code"], 11);
    let status = node.cni("STATUS", "1.1.0", "", "", None);
    assert!(status.failed && status.printed["msg"] == reason, "{}", status.printed);
    ip("netns del refused");
}

fn becomes_ready(node: &Node) {
    node.await_ready();
    assert_eq!(reasons(node), [""; 0]);
    assert!(readyz().ends_with("ok\n"));
    node.add_pod("pod1");
}

fn started(prepare: impl FnOnce(&mut Node)) -> Node {
    let mut node = Node::new();
    node.start_server();
    prepare(&mut node);
    node.start_agent();
    node.start_tunnel();
    node
}

fn make_node(node: &Node, name: &str, pod_cidrs: &[&str], address: &str) {
    let spec = json!({"podCIDRs": pod_cidrs});
    node.api().create(NODES, &json!({"metadata": {"name": name}, "spec": spec}));
    let addresses = json!([{"type": "InternalIP", "address": address}]);
    node.api().merge_status(NODES, name, &json!({"status": {"addresses": addresses}}));
}

#[test]
fn a_route_within_the_pod_range_keeps_a_new_node_from_beginning_and_is_only_named_later() {
    inside(|| {
        let node = started(|node| {
            node.make_node_object();
            ip("link add docker0 type veth peer name docker1");
            ip("link set docker0 up");
            ip("link set docker1 up");
            ip("route add 10.244.7.0/24 dev docker0");
        });
        let reason = "route 10.244.7.0/24 dev docker0 of this host lies within --cluster-cidr 10.244.0.0/16 and takes packets \
                      away from it; remove it (ip route del 10.244.7.0/24 dev docker0) with the network that it belongs to, or \
                      give the cluster another range";
        is_not_ready(&node, reason);
        ip("link del docker0");
        becomes_ready(&node);
        ip("link add docker0 type veth peer name docker1");
        ip("link set docker0 up");
        ip("link set docker1 up");
        ip("-6 route add fd00:10:244:7::/64 dev docker0");
        ip("address add 192.0.2.7/24 dev docker0");
        until("the problem", || {
            node.problems().iter().any(|problem| problem.contains("fd00:10:244:7::/64 dev docker0"))
        });
        assert_eq!((node.status()["ready"].clone(), reasons(&node)), (true.into(), vec![]));
        assert!(conflist(&node).exists());
    });
}

#[test]
fn a_token_that_is_not_accepted_is_named_and_a_new_one_is_taken_within_seconds() {
    inside(|| {
        let right = std::cell::OnceCell::new();
        let node = started(|node| {
            node.make_node_object();
            let _ = right.set(std::fs::read(node.path("token")).unwrap());
            write(&node.path("token"), "wrong");
        });
        let reason = format!(
            "{SERVER}: it does not accept the token of --token-file {} (Unauthorized); it expired or is of another cluster: the \
             DaemonSet rotates that file, without it put a new token there; it is taken at once",
            node.path("token").display()
        );
        is_not_ready(&node, &reason);
        refuses_pods(&node, &reason);
        write(&node.path("token"), right.get().unwrap());
        let within = std::time::Duration::from_secs(5);
        assert!(holds_within(within, || conflist(&node).exists()), "{:#?}", node.status());
        becomes_ready(&node);
    });
}

#[test]
fn a_token_that_expires_later_keeps_the_node_ready_over_a_restart() {
    inside(|| {
        let mut node = Node::running();
        node.stop_server();
        let identity = format!("system:serviceaccount:weft-system:weft-agent,weft.network:node:{NODE}");
        write(&node.path("tokens"), format!("renewed,{identity}\n"));
        node.start_server();
        let api_server = |node: &Node| node.status()["api_server"].as_str().unwrap_or_default().to_owned();
        until("the refusal", || api_server(&node).contains("it does not accept the token of --token-file"));
        assert_eq!((node.status()["ready"].clone(), reasons(&node)), (true.into(), vec![]));
        node.add_pod("pod1");
        node.end_agent(nix::sys::signal::Signal::SIGTERM);
        assert!(conflist(&node).exists());
        node.start_agent();
        until("the refusal", || {
            node.try_status().is_some() && api_server(&node).contains("it does not accept the token")
        });
        node.await_ready();
        node.add_pod("pod2");
        write(&node.path("token"), "renewed\n");
        until("the connection", || api_server(&node).starts_with("connected"));
        assert_eq!(node.status()["from_store"], false);
    });
}

#[test]
fn a_server_that_the_ca_does_not_vouch_for_is_named_and_the_right_ca_is_taken() {
    inside(|| {
        let mut node = Node::new();
        node.start_server();
        let right = std::fs::read(node.path("server/ca.crt")).unwrap();
        node.stop_server();
        // Another server of the same kind makes another CA of the same name.
        std::fs::rename(node.path("server"), node.path("server.first")).unwrap();
        node.start_server();
        node.make_node_object();
        let theirs = std::fs::read(node.path("server/ca.crt")).unwrap();
        write(&node.path("server/ca.crt"), &right);
        node.start_agent();
        node.start_tunnel();
        let ca_file = node.path("server/ca.crt");
        let begins =
            format!("{SERVER}: its certificate is not accepted with --ca-file {} (", ca_file.display());
        until("the refusal", || reasons(&node).first().is_some_and(|reason| reason.starts_with(&begins)));
        let reason = reasons(&node).concat();
        assert!(reason.ends_with("); put the CA that signed the server's certificate there"), "{reason}");
        is_not_ready(&node, &reason);
        write(&ca_file, theirs);
        becomes_ready(&node);
    });
}

#[test]
fn a_server_that_cannot_be_reached_at_the_first_boot_is_named() {
    inside(|| {
        let mut node = Node::new();
        node.start_server();
        node.make_node_object();
        node.stop_server();
        node.start_agent();
        node.start_tunnel();
        let reason = format!(
            "{SERVER} cannot be reached (Connection refused (os error 111)); check that it runs, its address and the network \
             between"
        );
        is_not_ready(&node, &reason);
        refuses_pods(&node, &reason);
        node.start_server();
        becomes_ready(&node);
        let version = node.status()["api_server"].as_str().unwrap_or_default().to_owned();
        assert!(version.contains("(https://172.31.0.1:6443, v1.34."), "{version}");
    });
}

#[test]
fn a_node_that_is_not_in_the_cluster_is_named_with_the_flag() {
    inside(|| {
        let node = started(|_| {});
        let reason = "there is no Node n1 in the cluster; register this machine's kubelet, or give --node-name the name of its \
                      Node";
        is_not_ready(&node, reason);
        refuses_pods(&node, reason);
        node.make_node_object();
        becomes_ready(&node);
        until("word of the end", || node.agent_log().contains("no longer keeps the node from being ready"));
    });
}

#[test]
fn a_node_without_a_pod_range_is_named_with_what_gives_it_one() {
    inside(|| {
        let mut node = Node::new();
        node.start_server_with_ranges_for_one_node();
        make_node(&node, "n0", &["10.244.0.0/24", "fd00:10:244::/64"], "172.31.0.9");
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        let reason = "Node n1 has no podCIDR; start kube-controller-manager with --allocate-node-cidrs=true \
                      --cluster-cidr=10.244.0.0/16,fd00:10:244::/56, or set spec.podCIDRs of the Node";
        is_not_ready(&node, reason);
        refuses_pods(&node, reason);
        node.api().merge(NODES, NODE, &json!({"spec": {"podCIDRs": CLAIMS}}));
        becomes_ready(&node);
    });
}

#[test]
fn a_pod_range_of_one_family_is_enough_and_one_outside_the_clusters_is_named() {
    inside(|| {
        let node = started(|node| make_node(node, NODE, &["192.168.7.0/24"], "172.31.0.1"));
        let reason = "Node n1: podCIDR 192.168.7.0/24 is outside --cluster-cidr 10.244.0.0/16,fd00:10:244::/56; give every \
                      agent the --cluster-cidr of kube-controller-manager";
        is_not_ready(&node, reason);
        refuses_pods(&node, reason);
        node.api().delete(NODES, NODE);
        make_node(&node, NODE, &CLAIMS[..1], "172.31.0.1");
        becomes_ready(&node);
    });
}

#[test]
fn a_configuration_that_comes_before_ours_is_named_and_takes_ours_away() {
    inside(|| {
        let node = Node::running();
        let other = node.path("cni/00-other.conflist");
        write(&node.path("cni/10-later.conflist"), "{}");
        until("word of the later one", || {
            node.status()["parts"]["cni"] == "10-later.conflist is there too, harmless after 05-weft.conflist"
        });
        assert_eq!(node.status()["ready"], true);
        write(&other, "{}");
        let reason = format!(
            "CNI configuration {} comes before 05-weft.conflist and runtimes would take it; remove it so that pods get Weft's \
             network",
            other.display()
        );
        is_not_ready(&node, &reason);
        std::fs::remove_file(other).unwrap();
        becomes_ready(&node);
        let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
        assert!(text.contains("cni: 10-later.conflist is there too, harmless"), "{text}");
    });
}

#[test]
fn of_two_nodes_with_one_pod_range_the_younger_is_not_ready_until_the_older_is_gone() {
    inside(|| {
        let node = started(|node| {
            make_node(node, "n0", &CLAIMS, "172.31.0.9");
            make_node(node, NODE, &CLAIMS, "172.31.0.1");
        });
        let reason = "Node n1: podCIDR 10.244.7.0/24 belongs to the older Node n0; this Node is left out of the overlay until \
                      one of the two is deleted or claims another";
        // The loop that plans says so to the log too, in the words of a problem.
        until("the reason", || reasons(&node) == [reason]);
        assert!(!conflist(&node).exists());
        refuses_pods(&node, reason);
        assert!(readyz().ends_with(&format!("{reason}\n")));
        node.api().delete(NODES, "n0");
        becomes_ready(&node);
    });
}

#[test]
fn of_two_nodes_with_one_address_the_younger_is_not_ready_and_the_older_goes_on() {
    inside(|| {
        let node = started(|node| {
            make_node(node, "n0", &["10.244.8.0/24"], "172.31.0.1");
            make_node(node, NODE, &CLAIMS, "172.31.0.1");
            // Claims what n1 has: younger by its name.
            make_node(node, "n2", &CLAIMS[..1], "172.31.0.2");
        });
        let reason = "Node n1: InternalIP 172.31.0.1 belongs to the older Node n0; this Node is left out of the overlay until \
                      one of the two is deleted or claims another";
        until("the reason", || reasons(&node) == [reason]);
        assert!(!conflist(&node).exists());
        node.api().delete(NODES, "n0");
        becomes_ready(&node);
        let other = "podCIDR 10.244.7.0/24 belongs to the older Node n1";
        assert!(node.problems().iter().any(|problem| problem.contains(other)), "{:#?}", node.problems());
    });
}

#[test]
fn a_service_range_that_is_not_the_clusters_is_a_problem_and_pods_still_come() {
    inside(|| {
        let mut node = Node::new();
        node.start_server_with_service_range("10.97.0.0/16");
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        becomes_ready(&node);
        let expected = "spec.clusterIPs 10.97.0.1 is outside the service ranges 10.96.0.0/16,fd00:10:96::/112; give every \
                        agent the --service-cluster-ip-range of kube-apiserver as --service-cidr";
        until("the problem", || node.problems().iter().any(|problem| problem.contains(expected)));
    });
}
