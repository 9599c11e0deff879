//! The rights of an agent: what it has suffices, what it lacks is named.

use serde_json::Value;
use weft_tests::node::{NODE, Node, inside, until, write};

use crate::objects::{self, NODES};

fn annotations(node: &Node) -> Value {
    node.api().read(NODES, NODE)["metadata"]["annotations"].clone()
}

#[test]
fn a_token_bound_to_the_node_is_enough() {
    inside(|| {
        let node = Node::running();
        until("the annotations", || annotations(&node)["weft.network/public-key"].is_string());
        assert_eq!(annotations(&node)["weft.network/wireguard-port"], "51820");
        objects::make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
        node.await_ready();
        assert_eq!(node.problems(), [""; 0]);
        let log = node.agent_log().to_lowercase();
        assert!(!log.contains("forbidden") && !log.contains("cannot"), "{log}");
    });
}

#[test]
fn a_token_of_another_node_is_named_and_stops_nothing_but_the_announcement() {
    inside(|| {
        let mut node = Node::new();
        let user = "system:serviceaccount:weft-system:weft-agent";
        write(&node.path("tokens"), format!("stray,{user},weft.network:node:n2\n"));
        write(&node.path("token"), "stray");
        node.start_server();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        node.await_conflist();
        until("the refusal", || node.failures("publish").contains("annotations of Node n1"));
        let said = node.failures("publish");
        assert!(said.contains("cannot patch resource \"nodes\""), "{said}");
        assert!(said.ends_with("grant it with 'weft manifests | kubectl apply -f -'"), "{said}");
        node.add_pod("pod1");
        assert!(annotations(&node)["weft.network/public-key"].is_null());
    });
}
