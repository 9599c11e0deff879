//! What another process or a bad object takes away is named, and everything else works.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use weft_tests::node::picture::{Picture, ruleset_with_handles};
use weft_tests::node::{DNS, NODE, Node, addresses, dig, holds_within, inside, ip, run, until};

use crate::objects::{self, NODES, SERVICES, SLICES};

const NAME: &str = "kubernetes.default.svc.cluster.local";

fn health() -> String {
    ask("127.0.0.1:9470", "/healthz")
}

/// The whole answer; nothing when nobody listens.
pub(crate) fn ask(address: &str, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(address) else { return String::new() };
    let mut answer = String::new();
    let asked = stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes());
    let read = stream.set_read_timeout(Some(std::time::Duration::from_secs(2)));
    let _ = asked.and(read).and_then(|()| stream.read_to_string(&mut answer));
    answer
}

fn started(prepare: impl FnOnce(&mut Node)) -> Node {
    let mut node = Node::new();
    node.start_server();
    node.make_node_object();
    prepare(&mut node);
    node.start_agent();
    node.start_tunnel();
    node
}

#[test]
fn a_taken_metrics_port_is_named_and_the_rest_works() {
    inside(|| {
        let taken = TcpListener::bind("127.0.0.1:9470").unwrap();
        let node = started(|_| {});
        node.await_ready();
        let said = node.status()["parts"]["observe"].to_string();
        assert!(said.contains("127.0.0.1:9470") && said.contains("--observe-address"), "{said}");
        let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
        assert!(text.contains("127.0.0.1:9470 for metrics and health cannot be used"), "{text}");
        node.add_pod("pod1");
        drop(taken);
        until("the metrics", || health().ends_with("ok\n"));
    });
}

#[test]
fn load_balancers_hear_that_a_node_is_well_until_it_is_about_to_go() {
    inside(|| {
        let answers = |path: &str| ["127.0.0.1:10256", "[::1]:10256"].map(|address| ask(address, path));
        let says = |path: &str, status: &str| {
            answers(path).iter().all(|answer| answer.starts_with(&format!("HTTP/1.1 {status}")))
        };
        let taken = TcpListener::bind("0.0.0.0:10256").unwrap();
        let node = started(|_| {});
        node.await_ready();
        let said = node.status()["parts"]["proxy health"].to_string();
        assert!(said.contains("[::]:10256") && said.contains("--proxy-health-address"), "{said}");
        drop(taken);
        until("a well node", || says("/healthz", "200"));
        let taint =
            json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}});
        node.api().merge(NODES, NODE, &taint);
        until("a node about to go", || says("/healthz", "503"));
        for answer in answers("/healthz") {
            assert!(answer.contains("\"nodeEligible\":false"), "{answer}");
        }
        assert!(says("/livez", "200"), "{:?}", answers("/livez"));
    });
}

#[test]
fn a_taken_dns_port_is_named_and_the_rest_answers() {
    inside(|| {
        let taken = UdpSocket::bind("0.0.0.0:53").unwrap();
        let node = started(|_| {});
        node.await_conflist();
        until("the failure", || {
            node.failures("dns").contains("10.96.0.10:53/udp is taken by another process")
        });
        until("DNS over IPv6", || dig(DNS[1], NAME, "AAAA").len() == 1);
        let over_tcp = run(Command::new("dig").args(["+tcp", "+short", &format!("@{}", DNS[0]), NAME, "A"]));
        assert_eq!(over_tcp.trim(), "10.96.0.1");
        node.add_pod("pod1");
        drop(taken);
        until("DNS over IPv4", || dig(DNS[0], NAME, "A") == ["10.96.0.1"]);
        until("no failure", || node.failures("dns").is_empty());
    });
}

fn send(node: &Node, signal: Signal) {
    let pid = Pid::from_raw(node.agent().pid().try_into().unwrap());
    kill(pid, signal).unwrap();
}

/// `firewall-cmd --reload`, `nft flush ruleset`, `ip route flush`, a network manager that cleans up.
#[test]
fn what_another_program_takes_away_is_put_back_at_once() {
    inside(|| {
        let node = Node::running();
        node.add_pod("pod1");
        until("a settled node", || node.status()["ready"] == true);
        std::thread::sleep(Duration::from_secs(1));
        let whole = Picture::take(&[]);
        for damage in [
            "nft flush ruleset",
            "nft delete table inet weft-host",
            "nft flush chain inet weft-proxy prerouting",
            "ip route flush proto 87",
            "ip -6 route flush proto 87",
            "ip address flush dev weft0",
            "ip link set weft0 down",
        ] {
            // The agent stands still meanwhile, else it is sooner than the look.
            send(&node, Signal::SIGSTOP);
            run(Command::new("sh").args(["-c", damage]));
            assert_ne!(Picture::take(&[]), whole, "{damage} does no damage");
            send(&node, Signal::SIGCONT);
            let damaged_at = Instant::now();
            // Long before the drift check, which comes once a minute.
            let healed = holds_within(Duration::from_secs(10), || Picture::take(&[]) == whole);
            assert!(healed, "{damage} is not healed: {:#?}", whole.differences(&Picture::take(&[])));
            println!("healed {:?} after {damage}", damaged_at.elapsed());
        }
    });
}

#[test]
fn a_bad_object_is_a_problem_of_its_own_only() {
    inside(|| {
        let node = Node::running();
        let mut mixed = objects::slice("bad", "IPv4", "127.0.0.1");
        mixed["endpoints"] = json!([{"addresses": ["127.0.0.1"]}, {"addresses": ["10.244.9.8"]}]);
        let port = json!([{"port": 80}]);
        node.api().create(SERVICES, &json!({"metadata": {"name": "bad"}, "spec": {"ports": port}}));
        node.api().create(SLICES, &mixed);
        let spec = json!({"ports": port, "externalIPs": ["127.0.0.1", "2001:db8::5"]});
        node.api().create(SERVICES, &json!({"metadata": {"name": "outside"}, "spec": spec}));
        let annotations =
            json!({"weft.network/public-key": "no key", "weft.network/wireguard-port": "99999"});
        node.api().create(NODES, &json!({"metadata": {"name": "odd", "annotations": annotations}}));
        let vips = objects::make_service(node.api(), "good", &["10.244.9.9", "fd00:10:244:9::9"]);
        until("the good Service's rules", || {
            let rules = ruleset_with_handles().join("\n");
            ["10.244.9.9", "fd00:10:244:9::9", "10.244.9.8"].iter().all(|endpoint| rules.contains(endpoint))
        });
        for (address, (vip, kind)) in DNS.iter().zip(vips.iter().zip(["A", "AAAA"])) {
            until("the good Service's name", || {
                dig(address, "good.default.svc.cluster.local", kind) == [vip.as_str()]
            });
        }
        let expected = [
            "endpoints[0].addresses[0] 127.0.0.1",
            "spec.externalIPs[0] 127.0.0.1",
            "weft.network/public-key",
            "weft.network/wireguard-port",
        ];
        for part in expected {
            let problems = node.problems();
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:#?}");
        }
        assert!(!node.problems().iter().any(|problem| problem.contains("good")), "{:#?}", node.problems());
        node.await_ready();
        node.add_pod("pod1");
    });
}

#[test]
fn the_agent_puts_a_damaged_annotation_of_its_own_node_right() {
    inside(|| {
        let node = Node::running();
        let key =
            || node.api().read(NODES, NODE)["metadata"]["annotations"]["weft.network/public-key"].clone();
        until("the public key", || key().is_string());
        let right = key();
        let damage = json!({"metadata": {"annotations": {"weft.network/public-key": "no key"}}});
        node.api().merge(NODES, NODE, &damage);
        until("the right key", || key() == right);
    });
}

#[test]
fn a_taken_wireguard_port_is_named_and_keeps_pods_away_until_it_is_free() {
    inside(|| {
        let taken = UdpSocket::bind("0.0.0.0:51820").unwrap();
        let mut node = Node::new();
        node.start_server();
        node.make_node_object();
        node.start_agent();
        until("the agent's word", || node.try_status().is_some());
        until("the failure", || node.failures("overlay").contains("is `weft tunnel` running?"));
        until("the overlay's configuration", || node.path("run/tunnel.json").exists());
        let (code, said) = weft_tests::node::refusal(&mut node.tunnel_command());
        assert!(code == 1 && said.contains("UDP port 51820"), "{said}");
        let rules = ruleset_with_handles().join("\n");
        assert!(
            rules.contains("strict: no pod source on the underlay"),
            "strictness needs no tunnel:\n{rules}"
        );
        assert_eq!(dig(DNS[0], NAME, "A"), ["10.96.0.1"]);
        assert!(!node.path("cni/05-weft.conflist").exists(), "pods could not reach other nodes");
        drop(taken);
        node.start_tunnel();
        node.await_ready();
    });
}

#[test]
fn what_others_break_in_the_kernel_is_mended_within_the_drift_check() {
    inside(|| {
        let node = Node::running();
        let added = node.add_pod("pod1");
        objects::make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
        objects::make_peer(node.api(), "n2");
        until("the peer's routes", || ip("-6 route show table all").contains("fd00:10:244:1::/64"));
        until("the Service's rules", || {
            ruleset_with_handles().iter().any(|line| line.contains("fd00:10:244:9::9"))
        });
        node.await_ready();
        let before = Picture::take(&[]);
        run(Command::new("nft").args(["flush", "ruleset"]));
        ip("route del 10.244.1.0/24");
        ip("-6 route del fd00:10:244:1::/64");
        for (family, address) in ["-4", "-6"].iter().zip(addresses(&added)) {
            ip(&format!("{family} route del {address}"));
        }
        ip("rule del priority 5700");
        ip("link set weft0 mtu 1300");
        ip("addr del 10.244.0.1/32 dev weft0");
        weft_tests::node::write(std::path::Path::new("/proc/sys/net/ipv4/ip_forward"), "0");
        // A drift check happens once a minute.
        let mended = holds_within(Duration::from_secs(75), || {
            std::thread::sleep(Duration::from_millis(500));
            before.differences(&Picture::take(&[])).is_empty()
        });
        assert!(mended, "{:#?}", before.differences(&Picture::take(&[])));
    });
}

#[test]
fn a_cni_configuration_that_was_removed_comes_back_and_one_that_wins_is_named() {
    inside(|| {
        let node = Node::running();
        let conflist = node.path("cni/05-weft.conflist");
        let text = std::fs::read(&conflist).unwrap();
        std::fs::remove_file(&conflist).unwrap();
        until("the configuration", || std::fs::read(&conflist).is_ok_and(|again| again == text));
        std::fs::write(node.path("cni/00-other.conflist"), "{}").unwrap();
        until("word of the other one", || node.agent_log().contains("00-other.conflist comes before"));
    });
}
