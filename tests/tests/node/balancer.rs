//! LoadBalancer Services on a node with a neighbour on its LAN: addresses, who answers for them, and for how long.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weft_tests::node::{Node, UPLINK_ADDRESSES, holds_within, inside, ip, run, until};

use crate::objects::SERVICES;

const POOLS: &str = "/apis/metallb.io/v1beta1/namespaces/default/ipaddresspools";
const EVENTS: &str = "/api/v1/namespaces/default/events";
pub(crate) const FIRST: [&str; 2] = ["172.31.0.100", "fd00:31::100"];

/// A machine on the other end of the uplink.
fn neighbour() {
    ip("netns add lan");
    ip("link set up1 netns lan");
    run(Command::new("ip").args(["-n", "lan", "addr", "add", "172.31.0.50/24", "dev", "up1"]));
    run(Command::new("ip").args(["-n", "lan", "addr", "add", "fd00:31::50/64", "dev", "up1", "nodad"]));
    run(Command::new("ip").args(["-n", "lan", "link", "set", "up1", "up"]));
}

fn from_lan(command: &[&str]) -> bool {
    let output = Command::new("ip").args(["netns", "exec", "lan"]).args(command).output();
    output.is_ok_and(|output| output.status.success())
}

/// By a fresh question of who has it.
fn answers(address: &str) -> bool {
    from_lan(&["ip", "neigh", "flush", "dev", "up1"]);
    from_lan(&["ping", "-c1", "-W1", address])
}

pub(crate) fn make_pool(node: &Node) {
    let addresses = json!(["172.31.0.100-172.31.0.110", "fd00:31::100-fd00:31::110"]);
    node.api().create(POOLS, &json!({"metadata": {"name": "lan"}, "spec": {"addresses": addresses}}));
}

pub(crate) fn make_service(node: &Node, name: &str, annotations: &Value, class: Option<&str>) {
    let mut spec = json!({"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack",
        "selector": {"app": "x"}, "ports": [{"port": 80}]});
    if let Some(class) = class {
        spec["loadBalancerClass"] = class.into();
    }
    let metadata = json!({"name": name, "annotations": annotations});
    node.api().create(SERVICES, &json!({"metadata": metadata, "spec": spec}));
}

fn addresses(node: &Node, name: &str) -> Vec<String> {
    let service = node.api().read(SERVICES, name);
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
    ingress.iter().filter_map(|one| one["ip"].as_str().map(str::to_owned)).collect()
}

fn events_of(node: &Node, name: &str, reason: &str) -> Vec<Value> {
    let mut events = node.api().list(EVENTS);
    events.retain(|event| event["involvedObject"]["name"] == name && event["reason"] == reason);
    events
}

#[test]
fn without_pools_a_service_has_the_nodes_addresses() {
    inside(|| {
        let node = Node::running();
        make_service(&node, "web", &json!({}), None);
        until("the addresses", || addresses(&node, "web") == UPLINK_ADDRESSES);
        until("the Event", || !events_of(&node, "web", "IPAllocated").is_empty());
        make_service(&node, "other", &json!({}), Some("example.com/other"));
        make_service(&node, "same-port", &json!({}), None);
        until("the sentence", || {
            node.problems()
                .iter()
                .any(|it| it.contains("same-port") && it.contains("default/web has the same port"))
        });
        assert_eq!(addresses(&node, "other"), [""; 0]);
        assert_eq!(addresses(&node, "same-port"), [""; 0]);
    });
}

#[test]
fn an_address_of_a_pool_answers_the_lan_while_it_is_a_services_and_also_without_an_agent() {
    inside(|| {
        let mut node = Node::running();
        neighbour();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        until("the addresses", || addresses(&node, "web") == FIRST);
        for address in FIRST {
            until("an answer", || answers(address));
            assert!(
                !answers(if address.contains(':') { "fd00:31::101" } else { "172.31.0.101" }),
                "not ours"
            );
        }
        let pool = node.api().read(POOLS, "lan");
        until("the pool's status", || node.api().read(POOLS, "lan")["status"]["assignedIPv4"] == 1);
        assert_eq!(pool["spec"]["autoAssign"], true);
        until("the Event", || !events_of(&node, "web", "nodeAssigned").is_empty());
        let trace = run(node.weft("lb").args(["trace", FIRST[0], "--run-dir"]).arg(node.path("run")));
        assert!(trace.contains("Node n1 (this node) answers") && trace.contains("from MAC"), "{trace}");

        node.end_agent(Signal::SIGKILL);
        for address in FIRST {
            assert!(answers(address), "{address}: the kernel answers");
        }
        node.start_agent();
        node.await_ready();
        let lease_runs_on = Duration::from_secs(3);
        std::thread::sleep(lease_runs_on);
        assert_eq!(addresses(&node, "web"), FIRST, "a restart moves nothing");
        assert!(FIRST.into_iter().all(answers));

        node.api().delete(SERVICES, "web");
        for address in FIRST {
            until("silence", || !answers(address));
        }
    });
}

#[test]
fn a_claim_is_told_so_that_caches_learn_it() {
    inside(|| {
        let node = Node::running();
        neighbour();
        make_pool(&node);
        let stale = "02:00:00:00:00:99";
        for address in FIRST {
            run(Command::new("ip")
                .args(["-n", "lan", "neigh", "add", address, "dev", "up1"])
                .args(["lladdr", stale, "nud", "stale"]));
        }
        make_service(&node, "web", &json!({}), None);
        let cached = || run(Command::new("ip").args(["-n", "lan", "neigh", "show", "dev", "up1"]));
        until("both families to be learned", || {
            let cached = cached();
            FIRST.iter().all(|address| {
                let line = cached.lines().find(|line| line.starts_with(&format!("{address} ")));
                line.is_some_and(|line| !line.contains(stale))
            })
        });
    });
}

#[test]
fn an_address_that_another_machine_has_is_not_claimed_and_the_machine_is_named() {
    inside(|| {
        let node = Node::running();
        neighbour();
        for address in ["172.31.0.105/24", "fd00:31::105/64"] {
            run(Command::new("ip").args(["-n", "lan", "addr", "add", address, "dev", "up1"]));
        }
        make_pool(&node);
        let taken = json!({"metallb.io/loadBalancerIPs": "172.31.0.105,fd00:31::105"});
        make_service(&node, "web", &taken, None);
        until("the Event", || events_of(&node, "web", "Conflict").len() >= 2);
        let message = events_of(&node, "web", "Conflict")[0]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("is answered for by the machine with MAC"), "{message}");
        assert!(!ip("route show table local").contains("172.31.0.105"));
        for address in ["172.31.0.105/24", "fd00:31::105/64"] {
            run(Command::new("ip").args(["-n", "lan", "addr", "del", address, "dev", "up1"]));
        }
        let learned = || ip("route show table local").contains("172.31.0.105");
        assert!(holds_within(Duration::from_secs(15), learned), "claimed when it is free");
    });
}
