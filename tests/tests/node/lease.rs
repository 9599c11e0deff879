//! One agent at a time writes statuses: the Lease says which, and a silent holder is replaced.

use std::time::Duration;

use serde_json::json;
use weft_tests::node::{Node, holds_within, inside, until};

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
const NAME: &str = "weft-status-writer";

fn holder(node: &Node) -> String {
    node.api().read(LEASES, NAME)["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_agent_waits_for_a_holder_that_renews_and_takes_over_from_a_silent_one() {
    inside(|| {
        let mut node = Node::new();
        node.start_server();
        node.make_node_object();
        // Times that a clock of this node would call long over.
        let long_ago = "2001-01-01T00:00:00.000000Z";
        let spec = json!({"holderIdentity": "other", "leaseDurationSeconds": 12, "renewTime": long_ago});
        node.api().create(LEASES, &json!({"metadata": {"name": NAME}, "spec": spec}));
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        for transitions in 1..8 {
            std::thread::sleep(Duration::from_secs(2));
            let renewed = json!({"spec": {"leaseTransitions": transitions}});
            node.api().merge(LEASES, NAME, &renewed);
            assert_eq!(holder(&node), "other");
        }
        assert!(holds_within(Duration::from_secs(20), || holder(&node) == "n1"), "{}", node.agent_log());
        let lease = node.api().read(LEASES, NAME);
        assert_eq!(lease["spec"]["leaseTransitions"], 8);
        // The agent knows it from the answer to its own writing.
        until("its own word", || {
            node.status()["parts"]["writer"].as_str().is_some_and(|text| text.contains("(this node)"))
        });
    });
}
