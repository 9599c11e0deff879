//! However the agent ends, the data plane stays; the next agent adopts it as it is.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::node::picture::{Picture, ruleset_with_handles};
use weft_tests::node::{
    DNS, NODE, Node, addresses, dig, dns_answers, holds_within, inside, ip, netns, run, until,
};

const NAME: &str = "kubernetes.default.svc.cluster.local";

/// A node with a pod, a Service of both families with endpoints, and another node as WireGuard peer.
fn busy_node() -> Node {
    let node = Node::running();
    node.add_pod("pod1");
    crate::objects::make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
    crate::objects::make_peer(node.api(), "n2");
    until("the peer's routes", || ip("-6 route show table all").contains("fd00:10:244:1::/64"));
    until("the Service's rules", || ruleset_with_handles().iter().any(|line| line.contains("10.244.9.9")));
    node.await_ready();
    node
}

/// The kernel's objects with their identities: a rule keeps its handle and a link its index only when left alone.
fn kernel() -> (Vec<String>, Picture) {
    (ruleset_with_handles(), Picture::take(&[]))
}

fn assert_untouched(before: &(Vec<String>, Picture), after: &(Vec<String>, Picture)) {
    assert_eq!(before.1.differences(&after.1), [""; 0]);
    assert_eq!(before.0, after.0);
}

#[test]
fn sigterm_leaves_the_data_plane_in_place() {
    inside(|| {
        let mut node = busy_node();
        let before = kernel();
        node.end_agent(Signal::SIGTERM);
        assert_untouched(&before, &kernel());
        assert!(node.try_status().is_none(), "nobody may answer now");
    });
}

#[test]
fn kill_9_leaves_the_data_plane_in_place() {
    inside(|| {
        let mut node = busy_node();
        let before = kernel();
        node.end_agent(Signal::SIGKILL);
        assert_untouched(&before, &kernel());
    });
}

#[test]
fn a_restart_adopts_what_stands_and_changes_nothing_in_the_kernel() {
    inside(|| {
        let mut node = busy_node();
        let before = kernel();
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            node.end_agent(signal);
            node.start_agent();
            node.await_ready();
            assert_untouched(&before, &kernel());
            assert_eq!(node.status()["parts"]["peers"].as_array().map(Vec::len), Some(1));
        }
    });
}

#[test]
fn dns_answers_again_within_a_second_of_a_restart() {
    inside(|| {
        let mut node = busy_node();
        for address in DNS {
            let kind = if address.contains(':') { "AAAA" } else { "A" };
            // The other address begins a moment later, and the agent's lives were short.
            until("the name", || dig(address, NAME, kind).len() == 1);
            let mut waits = Vec::new();
            for _ in 0..3 {
                node.end_agent(Signal::SIGKILL);
                assert!(!dns_answers(address), "{address}: the listeners end with the agent");
                let started_at = Instant::now();
                node.start_agent();
                let answers = holds_within(Duration::from_secs(10), || dns_answers(address));
                waits.push(started_at.elapsed());
                assert!(answers, "{address}: no answer after a restart");
                assert_eq!(dig(address, NAME, kind).len(), 1, "{address}");
            }
            let best = waits.iter().min().copied().unwrap_or_default();
            assert!(best < Duration::from_secs(1), "{address}: answers came after {waits:?}");
        }
    });
}

/// A resolver that hears "port unreachable" gives up; one that hears nothing asks again.
#[test]
fn a_look_up_during_a_restart_is_answered_when_it_is_asked_again() {
    inside(|| {
        let mut node = busy_node();
        for address in DNS {
            let kind = if address.contains(':') { "AAAA" } else { "A" };
            node.end_agent(Signal::SIGKILL);
            let server = format!("@{address}");
            let mut dig = std::process::Command::new("dig");
            let dig = dig.args(["+short", "+time=2", "+tries=3", &server, NAME, kind]);
            let asking = dig.stdout(std::process::Stdio::piped()).spawn().expect("run dig");
            std::thread::sleep(Duration::from_millis(500));
            node.start_agent();
            let output = asking.wait_with_output().expect("wait for dig");
            assert!(output.status.success(), "{address}: {}", String::from_utf8_lossy(&output.stdout));
            assert_ne!(output.stdout.trim_ascii(), b"", "{address}: no such name");
        }
    });
}

/// systemd's own tool plays the manager that kept the socket: it starts the agent when somebody asks, with the socket that the
/// question waits in (sd_listen_fds(3)). One try, so no retry can be what is answered.
#[test]
fn a_look_up_waits_in_a_socket_that_the_service_manager_kept() {
    let manager = "systemd-socket-activate";
    if std::process::Command::new(manager).arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no {manager}");
        return;
    }
    inside(|| {
        let mut node = busy_node();
        crate::objects::make_unready(node.api(), "n2");
        let stands_in = |line: &String| line.contains("dnat") && line.contains("sign of life");
        until("nobody stands in", || !ruleset_with_handles().iter().any(stands_in));
        node.end_agent(Signal::SIGKILL);
        let agent = node.agent_command();
        let mut command = std::process::Command::new(manager);
        command.args(["--datagram", "--listen", &format!("{}:53", DNS[0])]);
        command.arg(agent.get_program()).args(agent.get_args());
        node.start_agent_with(&mut command);
        std::thread::sleep(Duration::from_millis(500));
        let mut dig = std::process::Command::new("dig");
        let said = run(dig.args(["+short", "+time=5", "+tries=1", &format!("@{}", DNS[0]), NAME, "A"]));
        assert_ne!(said.trim(), "", "no such name");
        node.await_ready();
        assert_eq!(dig_all(), [1, 1], "the socket goes on, and the other address has one of its own");
    });
}

/// How many answers each DNS address gives.
fn dig_all() -> [usize; 2] {
    [dig(DNS[0], NAME, "A").len(), dig(DNS[1], NAME, "AAAA").len()]
}

#[test]
fn a_pod_reaches_the_node_while_no_agent_runs() {
    inside(|| {
        let mut node = busy_node();
        node.end_agent(Signal::SIGKILL);
        for address in weft_tests::node::UPLINK_ADDRESSES {
            let mut ping = std::process::Command::new("ip");
            run(ping.args(["netns", "exec", "pod1", "ping", "-c1", "-W2", address]));
        }
        let late = node.cni("ADD", "1.0.0", "late", &netns("pod1"), None);
        assert!(late.failed);
        assert_eq!(late.printed["code"], 11, "{}", late.printed);
    });
}

#[test]
fn a_tunnel_that_was_killed_carries_its_peers_again() {
    inside(|| {
        let mut node = busy_node();
        let before = Picture::take(&[]);
        node.stop_tunnel();
        let meanwhile = Picture::take(&[]);
        for kind in ["nft", "sysctls", "rules -4", "rules -6", "addresses"] {
            assert_eq!(before.of(kind), meanwhile.of(kind));
        }
        for kind in ["routes -4", "routes -6"] {
            // Without a carrier, but still there: nothing falls back to a wider route.
            let routes: Vec<String> =
                meanwhile.of(kind).iter().map(|route| route.replace(" linkdown", "")).collect();
            assert_eq!(before.of(kind), routes);
        }
        node.start_tunnel();
        until("the tunnel's peer", || {
            node.status()["parts"]["peers"].as_array().is_some_and(|p| p.len() == 1)
        });
        let back = Picture::take(&[]);
        for kind in ["nft", "sysctls", "routes -4", "routes -6", "addresses"] {
            assert_eq!(before.of(kind), back.of(kind));
        }
        // A TUN says UNKNOWN until it lost its carrier once.
        let links: Vec<String> =
            before.of("links").iter().map(|link| link.replace("state UNKNOWN", "state UP")).collect();
        assert!(
            back.of("links").iter().all(|link| before.of("links").contains(link) || links.contains(link))
        );
    });
}

#[test]
fn after_a_restart_a_new_pod_gets_an_address_that_no_other_has() {
    inside(|| {
        let mut node = Node::running();
        let first = addresses(&node.add_pod("pod1"));
        node.end_agent(Signal::SIGKILL);
        node.start_agent();
        node.await_ready();
        let second = addresses(&node.add_pod("pod2"));
        assert_eq!((first.len(), second.len()), (2, 2));
        assert!(first.iter().all(|address| !second.contains(address)), "{first:?} {second:?}");
        let annotations = json!(node.api().read("/api/v1/nodes", NODE)["metadata"]["annotations"]);
        assert_eq!(annotations["weft.network/wireguard-port"], "51820");
    });
}
