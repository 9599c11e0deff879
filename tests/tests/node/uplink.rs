//! What the node's own network is, is followed while the agent runs.

use serde_json::Value;
use weft_tests::node::{Node, UPLINK, inside, ip, until};

fn mtu(link: &str, netns: Option<&str>) -> u64 {
    let place = netns.map(|name| format!("-n {name} ")).unwrap_or_default();
    let text = ip(&format!("{place}-j link show dev {link}"));
    serde_json::from_str::<Value>(&text).unwrap()[0]["mtu"].as_u64().unwrap()
}

#[test]
fn a_new_mtu_of_the_uplink_reaches_the_overlay_and_new_pods() {
    inside(|| {
        let node = Node::running();
        node.add_pod("pod1");
        assert_eq!((mtu("weft0", None), mtu("eth0", Some("pod1"))), (1420, 1420));
        ip(&format!("link set {UPLINK} mtu 1400"));
        until("the overlay's MTU", || mtu("weft0", None) == 1320);
        node.add_pod("pod2");
        assert_eq!(mtu("eth0", Some("pod2")), 1320);
        ip(&format!("link set {UPLINK} mtu 1500"));
        until("the overlay's old MTU", || mtu("weft0", None) == 1420);
    });
}
