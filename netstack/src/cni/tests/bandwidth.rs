//! Rate limits with real packets, both directions and families, from ADD on and while the pod runs.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_model::objects::{Bandwidth, Pod};
use weft_model::{PodKey, Snapshot};

use super::rig::{Agent, Rig, link_of, snapshot};
use crate::cni::Reconciled;
use crate::kernel::netns::Netns;
use crate::kernel::testing::{NamedNetns, needs_root};

const BITS: u64 = 8_000_000;
const BYTES: usize = 1_500_000;
/// [`BYTES`] less the burst at [`BITS`] take 1.4 seconds.
const AT_LEAST: Duration = Duration::from_millis(1300);

/// How long the bytes take from `sender` to `receiver`, who listens at `address`.
fn transfer(receiver: &NamedNetns, sender: &NamedNetns, address: IpAddr) -> Duration {
    let inside = Netns::open(receiver.path()).unwrap();
    let listener = inside.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap()).unwrap();
    let to = SocketAddr::new(address, listener.local_addr().unwrap().port());
    let receiving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received.len()
    });
    let inside = Netns::open(sender.path()).unwrap();
    let mut stream = inside.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3)).unwrap()).unwrap();
    let start = Instant::now();
    stream.write_all(&vec![7; BYTES]).unwrap();
    drop(stream);
    assert_eq!(receiving.join().unwrap(), BYTES);
    start.elapsed()
}

/// To and from the pod, by family: slower than the limit allows, or at least twice as fast.
fn is_limited(node: &NamedNetns, pod: &NamedNetns, addresses: &[IpAddr]) -> [Vec<bool>; 2] {
    let limited = |took: Duration| {
        assert!(took >= AT_LEAST || took < AT_LEAST / 2, "{took:?} is neither");
        took >= AT_LEAST
    };
    let node_address =
        |pod: &IpAddr| -> IpAddr { if pod.is_ipv6() { "2001:db8::1" } else { "192.0.2.1" }.parse().unwrap() };
    let to_pod = addresses.iter().map(|address| limited(transfer(pod, node, *address))).collect();
    let from_pod =
        addresses.iter().map(|address| limited(transfer(node, pod, node_address(address)))).collect();
    [to_pod, from_pod]
}

const BOTH: [bool; 2] = [true, true];
const NEITHER: [bool; 2] = [false, false];

fn bandwidth(ingress: Option<u64>, egress: Option<u64>) -> Bandwidth {
    Bandwidth { ingress_bits: ingress, egress_bits: egress }
}

async fn add_limited(agent: &Agent, id: &str, pod: &NamedNetns, limits: Value) -> Vec<IpAddr> {
    let config = json!({"runtimeConfig": {"bandwidth": limits}});
    super::rig::addresses(&agent.call("ADD", id, &pod.path(), config).await.unwrap())
}

/// With the pod that every ADD of the rig speaks of.
fn with_pod(limits: Bandwidth) -> Snapshot {
    let pod = Pod {
        key: PodKey::new("default", "web"),
        uid: "42".to_owned(),
        labels: Default::default(),
        node: Some("n1".into()),
        host_network: false,
        ips: vec![],
        hostname: None,
        subdomain: None,
        terminated: false,
        named_ports: vec![],
        bandwidth: limits,
    };
    let pods = [(pod.key.clone(), Arc::new(pod))].into();
    Snapshot { pods: Arc::new(pods), ..snapshot(&["10.244.1.0/24", "fd00:244:1::/64"]) }
}

fn ifbs(node: &NamedNetns) -> usize {
    node.must(&["ip", "-o", "link"]).matches(": weftb").count()
}

#[test]
fn a_pod_receives_and_sends_no_faster_than_asked_and_nothing_is_left_of_it() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (pod, other) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let limits = json!({"IngressRate": BITS, "IngressBurst": u32::MAX, "EgressRate": BITS});
        let addresses = add_limited(&agent, "a", &pod, limits).await;
        let free = agent.add("b", &other).await;
        assert_eq!(is_limited(&rig.node, &pod, &addresses), [BOTH, BOTH].map(Vec::from));
        assert_eq!(is_limited(&rig.node, &other, &free), [NEITHER, NEITHER].map(Vec::from));
        agent.call("CHECK", "a", &pod.path(), Value::Null).await.unwrap();
        assert_eq!(agent.cni.reconcile().await, Reconciled::default(), "what ADD made is whole");
        agent.del("a", &pod.path()).await;
        assert_eq!(ifbs(&rig.node), 0);
    });
}

/// What the kernel lists for one of them must not be refused to the others.
#[test]
fn many_at_once_are_limited_and_checked_beside_gc() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pods: Vec<_> = (0..20).map(|number| (format!("c{number}"), NamedNetns::new("pod"))).collect();
    rig.node.block_on(async {
        let agent = &rig.start().await;
        let valid: Vec<Value> =
            pods.iter().map(|(id, _)| json!({"containerID": id, "ifname": "eth0"})).collect();
        let valid = &json!({"cni.dev/valid-attachments": valid});
        let lives = pods.iter().map(|(id, pod)| async move {
            add_limited(agent, id, pod, json!({"IngressRate": BITS, "EgressRate": BITS})).await;
            agent.call("CHECK", id, &pod.path(), Value::Null).await.unwrap();
            agent.call("GC", id, "", valid.clone()).await.unwrap();
            agent.del(id, &pod.path()).await;
        });
        futures::future::join_all(lives).await;
        assert_eq!((agent.live().len(), ifbs(&rig.node)), (0, 0));
    });
}

#[test]
fn annotations_count_while_the_pod_runs_and_over_a_restart() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start_with(with_pod(Bandwidth::default())).await;
        let addresses = agent.add("a", &pod).await;
        let now = |agent: &Agent, limits: Bandwidth| {
            agent.snapshots.send_replace(Some(Arc::new(with_pod(limits))));
        };
        for (limits, expected) in
            [(bandwidth(Some(BITS), None), [BOTH, NEITHER]), (bandwidth(None, Some(BITS)), [NEITHER, BOTH])]
        {
            now(&agent, limits);
            assert_eq!(agent.cni.reconcile().await.limited, [link_of("a")]);
            assert_eq!(is_limited(&rig.node, &pod, &addresses), expected.map(Vec::from), "{limits:?}");
        }
        agent.kill().await;
        let agent = rig.start_with(with_pod(bandwidth(Some(10 * BITS), Some(10 * BITS)))).await;
        let tc = rig.node.must(&["tc", "qdisc", "show"]);
        assert_eq!(tc.matches("rate 80Mbit").count(), 2, "{tc}");
        now(&agent, Bandwidth::default());
        assert_eq!(agent.cni.reconcile().await.limited, [link_of("a")]);
        assert_eq!(is_limited(&rig.node, &pod, &addresses), [NEITHER, NEITHER].map(Vec::from));
        assert_eq!(ifbs(&rig.node), 0);
    });
}

#[test]
fn what_others_break_is_found_by_check_and_mended_by_reconcile() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        let addresses =
            add_limited(&agent, "a", &pod, json!({"ingressRate": BITS, "egressRate": BITS})).await;
        let link = link_of("a");
        let ifb = link.replace("weftp", "weftb");
        for broken in [
            &["tc", "qdisc", "del", "dev", &link, "root"][..],
            &["tc", "qdisc", "del", "dev", &link, "ingress"],
            &[
                "tc", "qdisc", "replace", "dev", &ifb, "root", "tbf", "rate", "1gbit", "burst", "64k",
                "latency", "25ms",
            ],
            &["ip", "link", "set", &ifb, "down"],
            &["ip", "link", "del", &ifb],
        ] {
            rig.node.must(broken);
            let said = agent.call("CHECK", "a", &pod.path(), Value::Null).await.unwrap_err();
            assert!(said["msg"].as_str().unwrap().contains("rate limits"), "{broken:?}: {said}");
            assert_eq!(agent.cni.reconcile().await.limited, std::slice::from_ref(&link), "{broken:?}");
            agent.call("CHECK", "a", &pod.path(), Value::Null).await.unwrap();
        }
        assert_eq!(is_limited(&rig.node, &pod, &addresses), [BOTH, BOTH].map(Vec::from));
        rig.node.must(&["ip", "link", "add", "weftbdeadbeef01", "type", "ifb"]);
        agent.cni.reconcile().await;
        assert_eq!(ifbs(&rig.node), 1, "a stray one is removed");
    });
}

#[test]
fn the_fastest_and_the_slowest_rate_are_set_exactly() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (slow, fast) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        for (id, pod, bits, shown) in
            [("a", &slow, 1_000_u64, "rate 1Kbit"), ("b", &fast, 100_000_000_000, "rate 100Gbit")]
        {
            add_limited(&agent, id, pod, json!({"ingressRate": bits, "egressRate": bits})).await;
            let tc = rig.node.must(&["tc", "qdisc", "show"]);
            assert_eq!(tc.matches(shown).count(), 2, "{tc}");
            assert_eq!(agent.cni.reconcile().await, Reconciled::default());
        }
    });
}
