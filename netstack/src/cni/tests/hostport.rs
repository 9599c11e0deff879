//! hostPort with real packets: clients outside, on the node, in another pod and in the pod itself.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::constants::TABLE_CNI;

use super::rig::{Agent, Rig, fill_with_garbage};
use crate::cni::Reconciled;
use crate::kernel::conntrack::udp_flows;
use crate::kernel::netns::Netns;
use crate::kernel::testing::{NamedNetns, needs_root};

const NODE_V4: &str = "192.0.2.1";
const NODE_V6: &str = "2001:db8::1";

/// Answers TCP and UDP at port 8080 with the address that it was called from.
fn serve(pod: &NamedNetns) {
    let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 8080);
    let inside = Netns::open(pod.path()).unwrap();
    let (tcp, udp) = inside.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())).unwrap();
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let caller = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = stream.write_all(caller.to_string().as_bytes());
        }
    });
    std::thread::spawn(move || {
        while let Ok((_, caller)) = udp.recv_from(&mut [0; 16]) {
            let _ = udp.send_to(caller.ip().to_canonical().to_string().as_bytes(), caller);
        }
    });
}

/// The address that the server saw, or `None` when nothing answered at `to`.
fn call(from: &NamedNetns, protocol: &str, to: &str, port: u16) -> Option<IpAddr> {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    let inside = Netns::open(from.path()).unwrap();
    let answer = match protocol {
        "tcp" => inside.run(|| call_tcp(to)).unwrap(),
        _ => inside.run(|| call_udp(&udp_client(to), to)).unwrap(),
    };
    answer.map(|answer| answer.parse().unwrap())
}

fn call_tcp(to: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(400)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn udp_client(to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    UdpSocket::bind(SocketAddr::new(any, 0)).unwrap()
}

fn call_udp(client: &UdpSocket, to: SocketAddr) -> Option<String> {
    client.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    client.send_to(b"who am I", to).ok()?;
    let mut answer = [0; 64];
    let (length, from) = client.recv_from(&mut answer).ok()?;
    assert_eq!(from, to, "the answer comes from where the question went");
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn mapping(protocol: &str, host_ip: &str, host_port: u32) -> Value {
    json!({"hostPort": host_port, "containerPort": 8080, "protocol": protocol, "hostIP": host_ip})
}

fn mappings(of: &[Value]) -> Value {
    json!({"runtimeConfig": {"portMappings": of}})
}

/// A client on the uplink's LAN; it knows no route to pods.
fn outside(rig: &Rig) -> NamedNetns {
    let client = NamedNetns::new("client");
    rig.node.must(&["ip", "link", "set", "up0p", "netns", &client.name]);
    client.must(&["ip", "addr", "add", "192.0.2.9/24", "dev", "up0p"]);
    client.must(&["ip", "addr", "add", "2001:db8::9/64", "dev", "up0p", "nodad"]);
    client.must(&["ip", "link", "set", "up0p", "up"]);
    client
}

async fn add(agent: &Agent, id: &str, pod: &NamedNetns, ports: &[Value]) -> Vec<IpAddr> {
    super::rig::addresses(&agent.call("ADD", id, &pod.path(), mappings(ports)).await.unwrap())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The nft table without its counters.
fn table(rig: &Rig) -> String {
    rig.node.must(&["nft", "-s", "list", "table", "inet", TABLE_CNI])
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere_with_the_clients_address() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (pod, other) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    let client = outside(&rig);
    rig.node.block_on(async {
        let agent = rig.start().await;
        let ports = ["tcp", "udp"].map(|protocol| mapping(protocol, "", 80));
        let of_pod = add(&agent, "a", &pod, &ports).await;
        let of_other = agent.add("b", &other).await;
        serve(&pod);
        for protocol in ["tcp", "udp"] {
            for (family, node) in [NODE_V4, NODE_V6].into_iter().enumerate() {
                let from = |netns| call(netns, protocol, node, 80);
                let lan = [ip("192.0.2.9"), ip("2001:db8::9")][family];
                assert_eq!(from(&client), Some(lan), "{protocol} from outside, the client's address kept");
                assert_eq!(from(&rig.node), Some(ip(node)), "{protocol} from the node");
                assert_eq!(from(&other), Some(of_other[family]), "{protocol} from another pod");
                assert!(
                    from(&pod).is_some_and(|seen| seen != of_pod[family]),
                    "{protocol} from the pod itself"
                );
                assert_eq!(call(&client, protocol, node, 81), None, "{protocol}: another port");
            }
            let seen = call(&rig.node, protocol, "127.0.0.1", 80);
            assert!(seen.is_some_and(|seen| !seen.is_loopback()), "{protocol} at 127.0.0.1: {seen:?}");
        }
    });
}

#[test]
fn a_host_ip_is_the_only_address_that_leads_to_the_pod() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let client = outside(&rig);
    rig.node.must(&["ip", "addr", "add", "192.0.2.77/24", "dev", "up0"]);
    let outside_addresses = [NODE_V4, "192.0.2.77", NODE_V6];
    let (all_v4, all_v6) = (vec![NODE_V4, "192.0.2.77", "127.0.0.1"], vec![NODE_V6]);
    let cases = [
        (NODE_V4, vec![NODE_V4]),
        (NODE_V6, vec![NODE_V6]),
        ("0.0.0.0", all_v4),
        ("::", all_v6),
        ("127.0.0.1", vec!["127.0.0.1"]),
        ("::1", vec![]),
        ("203.0.113.5", vec![]),
    ];
    for protocol in ["tcp", "udp"] {
        for (host_ip, leading) in &cases {
            let pod = NamedNetns::new("pod");
            rig.node.block_on(async {
                let agent = rig.start().await;
                add(&agent, "a", &pod, &[mapping(protocol, host_ip, 80)]).await;
                serve(&pod);
                for address in outside_addresses {
                    let reached = call(&client, protocol, address, 80).is_some();
                    assert_eq!(
                        reached,
                        leading.contains(&address),
                        "{protocol} {host_ip}: {address} from outside"
                    );
                }
                for address in outside_addresses.into_iter().chain(["127.0.0.1", "::1"]) {
                    let reached = call(&rig.node, protocol, address, 80).is_some();
                    assert_eq!(
                        reached,
                        leading.contains(&address),
                        "{protocol} {host_ip}: {address} on the node"
                    );
                }
                agent.del("a", "").await;
                agent.kill().await;
            });
        }
    }
}

#[test]
fn one_port_number_leads_to_different_pods_by_address_and_protocol() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let client = outside(&rig);
    rig.node.must(&["ip", "addr", "add", "192.0.2.77/24", "dev", "up0"]);
    let pods: Vec<_> = (0..3).map(|_| NamedNetns::new("pod")).collect();
    rig.node.block_on(async {
        let agent = rig.start().await;
        add(&agent, "any", &pods[0], &[mapping("tcp", "", 80)]).await;
        add(&agent, "one", &pods[1], &[mapping("tcp", "192.0.2.77", 80)]).await;
        add(&agent, "udp", &pods[2], &[mapping("udp", "", 80)]).await;
        serve(&pods[1]);
        assert_eq!(call(&client, "tcp", "192.0.2.77", 80), Some(ip("192.0.2.9")));
        assert_eq!(call(&client, "tcp", NODE_V4, 80), None, "a pod that does not listen");
        assert_eq!(call(&client, "udp", "192.0.2.77", 80), None, "another pod's");
        serve(&pods[0]);
        serve(&pods[2]);
        assert_eq!(call(&client, "tcp", NODE_V4, 80), Some(ip("192.0.2.9")));
        assert_eq!(call(&client, "udp", "192.0.2.77", 80), Some(ip("192.0.2.9")));
        agent.del("one", "").await;
        assert_eq!(call(&client, "tcp", "192.0.2.77", 80), Some(ip("192.0.2.9")), "the other one takes over");
    });
}

#[test]
fn a_taken_or_impossible_port_is_refused_with_its_reason_and_leaves_nothing() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (pod, other) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        add(&agent, "a", &pod, &[mapping("tcp", "", 80)]).await;
        let before = (table(&rig), agent.live());
        let cases = [
            (mapping("tcp", "0.0.0.0", 80), 104, "hostPort 80/tcp on 0.0.0.0 is held by pod default/web"),
            (mapping("udp", "", 51820), 7, "hostPort 51820/udp is WireGuard's on every node"),
            (mapping("tcp", "", 70000), 7, "portMappings: hostPort 70000 is no port"),
            (mapping("icmp", "", 8), 7, "protocol \"icmp\" is none of tcp, udp, sctp"),
            (mapping("tcp", "eth0", 81), 7, "hostIP \"eth0\" is no IP address"),
            (json!({"hostPort": 81, "containerPort": 0}), 7, "containerPort 0 is no port"),
            (json!({"hostPort": "81"}), 7, "portMappings: invalid type"),
        ];
        for (mapping, code, message) in cases {
            let refused = agent.call("ADD", "b", &other.path(), mappings(&[mapping])).await.unwrap_err();
            assert_eq!(refused["code"], code, "{refused}");
            assert!(refused["msg"].as_str().unwrap().contains(message), "{refused}");
        }
        let twice = [mapping("tcp", "", 82), json!({"hostPort": 82, "containerPort": 9, "protocol": "TCP"})];
        let refused = agent.call("ADD", "b", &other.path(), mappings(&twice)).await.unwrap_err();
        assert!(refused["msg"].as_str().unwrap().contains("82/tcp is asked for twice"), "{refused}");
        assert_eq!((table(&rig), agent.live()), before);
        add(&agent, "b", &other, &[mapping("udp", "", 80), json!({"containerPort": 9})]).await;
        agent.del("a", "").await;
        agent.del("b", "").await;
        add(&agent, "b", &other, &[mapping("tcp", "", 80)]).await;
    });
}

#[test]
fn udp_clients_find_a_pod_that_comes_and_are_not_led_to_one_that_has_gone() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let client = outside(&rig);
    rig.node.block_on(async {
        let agent = rig.start().await;
        for node in [NODE_V4, NODE_V6] {
            let (first, second) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
            let to = SocketAddr::new(ip(node), 53);
            let socket = Netns::open(client.path()).unwrap().run(|| udp_client(to)).unwrap();
            assert_eq!(call_udp(&socket, to), None, "nobody yet");
            add(&agent, "a", &first, &[mapping("udp", "", 53)]).await;
            serve(&first);
            assert!(call_udp(&socket, to).is_some(), "{node}: the flow from before keeps the pod away");
            agent.del("a", "").await;
            assert_eq!(call_udp(&socket, to), None);
            let to_hosts =
                |flow: &&crate::kernel::conntrack::Flow| flow.reply.source != flow.original.destination;
            assert_eq!(udp_flows().unwrap().iter().filter(to_hosts).count(), 0);
            add(&agent, "b", &second, &[mapping("udp", "", 53)]).await;
            serve(&second);
            assert!(
                call_udp(&socket, to).is_some(),
                "{node}: the flow of the first pod keeps the second away"
            );
            agent.del("b", "").await;
        }
    });
}

#[test]
fn host_ports_survive_the_agent_the_loss_of_its_store_and_a_flushed_rule_set() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let client = outside(&rig);
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        let ports = [mapping("tcp", "", 80), mapping("sctp", NODE_V6, 90), mapping("udp", "127.0.0.1", 53)];
        add(&agent, "a", &pod, &ports).await;
        serve(&pod);
        agent.call("CHECK", "a", &pod.path(), Value::Null).await.unwrap();
        let before = table(&rig);
        agent.kill().await;
        assert!(call(&client, "tcp", NODE_V6, 80).is_some(), "while the agent is dead");
        let agent = rig.start().await;
        assert_eq!(agent.cni.reconcile().await, Reconciled::default());
        assert_eq!(table(&rig), before);
        agent.kill().await;

        fill_with_garbage(&rig.leases());
        let agent = rig.start().await;
        assert_eq!(table(&rig), before);

        rig.node.must(&["nft", "flush", "ruleset"]);
        let refused = agent.call("CHECK", "a", &pod.path(), Value::Null).await.unwrap_err();
        assert!(refused["msg"].as_str().unwrap().contains("lacks what ADD put there"), "{refused}");
        agent.cni.reconcile().await;
        assert_eq!(table(&rig), before);
        assert!(call(&client, "tcp", NODE_V4, 80).is_some());

        let none = json!({"cni.dev/valid-attachments": []});
        agent.call("GC", "", "", none).await.unwrap();
        assert_eq!(call(&client, "tcp", NODE_V4, 80), None);
        assert!(!table(&rig).contains("elements"), "{}", table(&rig));
    });
}

#[test]
fn pods_do_not_reach_the_nodes_loopback_through_a_host_port() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (pod, attacker) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        add(&agent, "a", &pod, &[mapping("udp", "", 80)]).await;
        add(&agent, "b", &attacker, &[mapping("udp", "", 81)]).await;
        let secret =
            Netns::open(rig.node.path()).unwrap().run(|| UdpSocket::bind("127.0.0.1:7000").unwrap()).unwrap();
        secret.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        attacker.must(&["ip", "addr", "flush", "dev", "lo"]);
        attacker.must(&["ip", "route", "flush", "table", "local", "dev", "lo"]);
        attacker.must(&["sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1"]);
        let to: SocketAddr = "127.0.0.1:7000".parse().unwrap();
        let send = || {
            Netns::open(attacker.path()).unwrap().run(|| {
                udp_client(to).send_to(b"let me in", to).unwrap();
            })
        };
        send().unwrap();
        assert!(secret.recv_from(&mut [0; 16]).is_err(), "a pod spoke to the node's loopback");
        rig.node.must(&["nft", "delete", "table", "inet", TABLE_CNI]);
        send().unwrap();
        assert!(secret.recv_from(&mut [0; 16]).is_ok(), "the rule, and nothing else, keeps it away");
    });
}
