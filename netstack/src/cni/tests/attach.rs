//! What an attached pod can do, and how long attaching takes.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::rig::{Rig, addresses, link_of, pod_links};
use crate::kernel::netns::Netns;
use crate::kernel::testing::{NamedNetns, needs_root};

/// One TCP exchange from `client` to `address` in `server`; the peer's address as the server saw it.
fn tcp_exchange(server: &NamedNetns, client: &NamedNetns, address: IpAddr) -> IpAddr {
    let server = Netns::open(server.path()).unwrap();
    let listener = server.run(|| TcpListener::bind(SocketAddr::new(address, 8080)).unwrap()).unwrap();
    let accepted = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        peer.ip()
    });
    let client = Netns::open(client.path()).unwrap();
    let timeout = Duration::from_secs(3);
    let mut stream =
        client.run(|| TcpStream::connect_timeout(&SocketAddr::new(address, 8080), timeout).unwrap()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    accepted.join().unwrap()
}

#[test]
fn two_pods_of_a_node_reach_each_other_over_both_families() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let (of_a, of_b) = (agent.add("a", &a).await, agent.add("b", &b).await);
        let expected: Vec<IpAddr> = vec!["10.244.1.3".parse().unwrap(), "fd00:244:1::3".parse().unwrap()];
        assert_eq!(of_a, expected);
        for (from, to) in of_a.iter().zip(&of_b) {
            assert_eq!(tcp_exchange(&b, &a, *to), *from);
            a.must(&["ping", "-c1", "-W2", &to.to_string()]);
            rig.node.must(&["ping", "-c1", "-W2", &to.to_string()]);
        }
        for node in ["192.0.2.1", "2001:db8::1", "fe80::1%eth0"] {
            a.must(&["ping", "-c1", "-W2", node]);
        }
        agent.call("CHECK", "a", &a.path(), Value::Null).await.unwrap();
    });
}

#[test]
fn a_pod_has_whole_addresses_link_local_gateways_and_permanent_neighbours() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    let result = rig.node.block_on(async {
        let agent = rig.start().await;
        agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap()
    });
    let link = link_of("a");
    assert_eq!(result["interfaces"][0]["name"], json!(link));
    assert_eq!(result["interfaces"][1]["sandbox"], json!(pod.path()));
    assert_eq!(result["interfaces"][1]["mtu"], 1420);
    let shown = pod.must(&["ip", "addr", "show", "eth0"]);
    assert!(shown.contains("10.244.1.3/32") && shown.contains("fd00:244:1::3/128"), "{shown}");
    assert!(shown.contains("mtu 1420") && !shown.contains("tentative"), "{shown}");
    assert!(shown.contains(result["interfaces"][1]["mac"].as_str().unwrap()), "{shown}");
    let routes = [pod.must(&["ip", "route"]), pod.must(&["ip", "-6", "route"])].concat();
    assert!(routes.contains("default via 169.254.1.1 dev eth0"), "{routes}");
    assert!(routes.contains("default via fe80::1 dev eth0"), "{routes}");
    let neighbours = pod.must(&["ip", "neigh"]);
    assert_eq!(neighbours.matches("02:57:45:46:54:01 PERMANENT").count(), 2, "{neighbours}");
    let neighbours = rig.node.must(&["ip", "neigh", "show", "dev", &link]);
    assert_eq!(neighbours.matches("PERMANENT").count(), 2, "{neighbours}");
    let to_pod = rig.node.must(&["ip", "route", "get", "10.244.1.3"]);
    assert!(to_pod.contains(&format!("dev {link} src 192.0.2.1")), "{to_pod}");
    let to_pod = rig.node.must(&["ip", "-6", "route", "get", "fd00:244:1::3"]);
    assert!(to_pod.contains(&format!("dev {link}")) && to_pod.contains("src 2001:db8::1"), "{to_pod}");
    for (name, value) in [("ipv6/conf/{}/accept_ra", "0"), ("ipv4/conf/{}/rp_filter", "1")] {
        let path = format!("/proc/sys/net/{}", name.replace("{}", &link));
        assert_eq!(rig.node.must(&["cat", &path]).trim(), value, "{path}");
    }
}

#[test]
fn a_pod_of_a_single_family_has_that_family_only() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    for (cidr, expected, family) in
        [("10.244.1.0/24", "10.244.1.3", "-6"), ("fd00:244:1::/64", "fd00:244:1::3", "-4")]
    {
        let pod = NamedNetns::new("pod");
        rig.node.block_on(async {
            let agent = rig.start_with(super::rig::snapshot(&[cidr])).await;
            assert_eq!(agent.add("a", &pod).await, [expected.parse::<IpAddr>().unwrap()]);
            rig.node.must(&["ping", "-c1", "-W2", expected]);
            assert!(!pod.must(&["ip", family, "route"]).contains("default"));
            agent.del("a", &pod.path()).await;
            agent.kill().await;
        });
    }
}

#[test]
fn fifty_parallel_adds_give_distinct_addresses() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pods: Vec<_> = (0..50).map(|_| NamedNetns::new("pod")).collect();
    rig.node.block_on(async {
        let agent = rig.start().await;
        let adds = pods.iter().enumerate().map(|(number, pod)| {
            let agent = &agent;
            async move {
                let began = Instant::now();
                let result = agent.call("ADD", &format!("c{number}"), &pod.path(), Value::Null).await;
                (addresses(&result.unwrap()), began.elapsed())
            }
        });
        let done = futures::future::join_all(adds).await;
        let distinct: BTreeSet<IpAddr> = done.iter().flat_map(|(addresses, _)| addresses.clone()).collect();
        assert_eq!(distinct.len(), 100);
        assert_eq!(agent.live().len(), 100);
        for (number, (addresses, _)) in done.iter().enumerate().step_by(7) {
            let shown = pods[number].must(&["ip", "addr", "show", "eth0"]);
            assert!(addresses.iter().all(|address| shown.contains(&address.to_string())), "{shown}");
        }
        let dels = (0..50).map(|number| {
            let agent = &agent;
            async move { agent.del(&format!("c{number}"), "").await }
        });
        futures::future::join_all(dels).await;
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (0, 0));
        print_sequential_adds(&agent, &pods).await;
    });
}

/// One after the other, as a figure for people; nothing is asserted about time.
async fn print_sequential_adds(agent: &super::rig::Agent, pods: &[NamedNetns]) {
    let mut times = Vec::new();
    for (number, pod) in pods.iter().enumerate().take(20) {
        let began = Instant::now();
        agent.add(&format!("s{number}"), pod).await;
        times.push(began.elapsed());
    }
    times.sort();
    println!("ADD p50 {:?}, worst {:?} (debug build, plugin process not counted)", times[10], times[19]);
}
