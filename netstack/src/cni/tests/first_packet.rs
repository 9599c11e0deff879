//! First packets: a neighbour floods every address of the node while pods are attached; those under policies get none of it,
//! however late the policy loop hears of them. `WEFT_FIRST_PACKET_PODS=10000` attaches more than the usual few.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use weft_model::policy::{NetworkPolicy, Selector};
use weft_model::{PolicyKey, Snapshot};

use super::rig::{Rig, snapshot};
use crate::kernel::netns::Netns;
use crate::kernel::testing::{NamedNetns, needs_root};

const PORT: u16 = 9999;
/// Pods of one node at most: released addresses rest, and the range of a node has 252.
const PODS_A_NODE: usize = 200;

fn deny_all() -> Snapshot {
    let key = PolicyKey::new("default", "deny-all");
    let policy = NetworkPolicy {
        key: key.clone(),
        subject: Selector::default(),
        ingress: Some(vec![]),
        egress: None,
        keep_established: false,
    };
    let policies = [(key, Arc::new(policy))].into();
    Snapshot { policies: Arc::new(policies), ..snapshot(&["10.244.1.0/24", "fd00:244:1::/64"]) }
}

/// Of both families, bound before the pod has an interface: whatever ever arrives is counted.
fn listener(pod: &NamedNetns) -> UdpSocket {
    let netns = Netns::open(pod.path()).unwrap();
    let socket = netns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn received(socket: &UdpSocket) -> usize {
    std::iter::from_fn(|| socket.recv(&mut [0; 8]).ok()).count()
}

/// Sends to each address that a pod of this node may get, until told to stop.
fn flood(from: &NamedNetns, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (path, stop) = (from.path(), stop.clone());
    std::thread::spawn(move || {
        let sockets = Netns::open(path)
            .unwrap()
            .run(|| ["0.0.0.0:0", "[::]:0"].map(|any| UdpSocket::bind(any).unwrap()))
            .unwrap();
        while !stop.load(Ordering::Relaxed) {
            for last in 2..=254u8 {
                let v4 = IpAddr::from(Ipv4Addr::new(10, 244, 1, last));
                let v6 = IpAddr::from(Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, last.into()));
                for (socket, address) in sockets.iter().zip([v4, v6]) {
                    let _ = socket.send_to(b"x", (address, PORT));
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    })
}

/// So many pods one by one, on as many nodes as have addresses for them.
fn leaked_to_many(pods: usize) -> usize {
    let nodes = (0..pods).step_by(PODS_A_NODE).map(|first| PODS_A_NODE.min(pods - first));
    let mut attached = 0;
    nodes
        .map(|count| {
            let (datagrams, _) = leaked(deny_all(), Duration::ZERO, count);
            attached += count;
            println!("{attached} pods, {datagrams} datagrams leaked to the last {count}");
            datagrams
        })
        .sum()
}

/// Attaches pods one by one under a flood; how many datagrams got into them, and how long the first ADD took.
fn leaked(world: Snapshot, delay: Duration, pods: usize) -> (usize, Duration) {
    let rig = Rig::new();
    let neighbour = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start_under_policies(world, delay).await;
        agent.add("neighbour", &neighbour).await;
        let stop = Arc::new(AtomicBool::new(false));
        let flooding = flood(&neighbour, &stop);
        let (mut leaked, mut first) = (0, Duration::ZERO);
        for i in 0..pods {
            let (id, pod) = (format!("p{i}"), NamedNetns::new("pod"));
            let socket = listener(&pod);
            let started_at = Instant::now();
            agent.add(&id, &pod).await;
            first = if first.is_zero() { started_at.elapsed() } else { first };
            tokio::time::sleep(Duration::from_millis(30)).await;
            leaked += received(&socket);
            agent.del(&id, &pod.path()).await;
        }
        stop.store(true, Ordering::Relaxed);
        flooding.join().unwrap();
        (leaked, first)
    })
}

#[test]
fn a_flood_gets_nothing_into_pods_under_policies_from_the_first_instant() {
    if !needs_root() {
        return;
    }
    let pods = std::env::var("WEFT_FIRST_PACKET_PODS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    assert_eq!(leaked_to_many(pods), 0, "of {pods} pods");
    let without = Snapshot { policies: Arc::default(), ..deny_all() };
    let (datagrams, _) = leaked(without, Duration::ZERO, 2);
    assert!(datagrams > 0, "the flood must arrive where no policy is");
}

#[test]
fn add_waits_for_a_late_policy_loop() {
    if !needs_root() {
        return;
    }
    let (datagrams, first) = leaked(deny_all(), Duration::from_secs(2), 2);
    assert_eq!(datagrams, 0);
    assert!(first >= Duration::from_secs(2), "ADD took {first:?}");
}
