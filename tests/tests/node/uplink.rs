//! What the node's own network is, is followed while the agent runs.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use weft_tests::node::{DNS, Node, UPLINK, UPLINK_ADDRESSES, addresses, holds_within, inside, ip, until};

/// As docs/operations.md says.
const SOON: Duration = Duration::from_secs(5);
const PREFIXES: [u8; 2] = [24, 64];

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

fn reaches(pod: &str, address: &str) -> bool {
    let ping = ["netns", "exec", pod, "ping", "-c1", "-W1", address];
    Command::new("ip").args(ping).output().unwrap().status.success()
}

fn names(pod: &str, server: &str) -> bool {
    let dig = [
        "netns",
        "exec",
        pod,
        "dig",
        "+short",
        "+time=1",
        "+tries=1",
        &format!("@{server}"),
        "kubernetes.default.svc.cluster.local",
    ];
    let said = Command::new("ip").args(dig).output().unwrap();
    said.status.success() && !said.stdout.is_empty()
}

/// What NetworkManager does when a connection is activated anew, and what is left where a cable was pulled for longer.
#[test]
fn addresses_of_the_node_that_come_and_go_take_no_pod_with_them() {
    inside(|| {
        let node = Node::running();
        node.add_pod("pod1");
        let of_other = addresses(&node.add_pod("pod2"));
        let routes = || ["-4", "-6"].map(|family| ip(&format!("{family} route show proto 0x57")));
        let before = routes();
        assert!(before.iter().zip(UPLINK_ADDRESSES).all(|(text, own)| text.contains(&format!("src {own}"))));
        let reach = |targets: &[&str]| targets.iter().all(|target| reaches("pod1", target));
        let pods: Vec<&str> = of_other.iter().map(String::as_str).collect();
        let everything = [&pods[..], &UPLINK_ADDRESSES].concat();
        assert!(reach(&everything));
        let add = |n: usize| {
            let nodad = if n == 1 { " nodad" } else { "" };
            ip(&format!("addr add {}/{} dev {UPLINK}{nodad}", UPLINK_ADDRESSES[n], PREFIXES[n]));
        };
        for away in [Duration::ZERO, Duration::from_millis(300), Duration::from_secs(3)] {
            for n in [0, 1] {
                ip(&format!("addr del {}/{} dev {UPLINK}", UPLINK_ADDRESSES[n], PREFIXES[n]));
                if away > Duration::from_secs(1) {
                    assert!(holds_within(SOON, || reach(&pods)), "without {}", UPLINK_ADDRESSES[n]);
                }
                std::thread::sleep(away);
                add(n);
                let back = holds_within(SOON, || routes() == before && reach(&everything));
                assert!(back, "{} was away for {away:?}: {:#?}", UPLINK_ADDRESSES[n], routes());
            }
        }
        // Without any network a node's own pods have each other, and names.
        ip(&format!("addr flush dev {UPLINK} scope global"));
        assert!(holds_within(SOON, || reach(&pods)), "without addresses: {:#?}", routes());
        for server in DNS {
            assert!(holds_within(SOON, || names("pod1", server)), "{server} without addresses");
        }
        [0, 1].into_iter().for_each(add);
        assert!(holds_within(SOON, || routes() == before && reach(&everything)), "{:#?}", routes());
    });
}
