//! `weft cleanup` takes everything away and only that.

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::node::picture::Picture;
use weft_tests::node::{Node, inside, refusal, run, until, write};

use crate::{balancer, objects};

/// What a host may have before Weft comes.
fn foreign_state(node: &Node) {
    run(std::process::Command::new("nft").args(["add", "table", "inet", "others"]));
    let firewall = "add chain inet others forward { type filter hook forward priority 0; policy drop; }";
    run(std::process::Command::new("nft").arg(firewall));
    run(std::process::Command::new("iptables-nft").args(["-P", "INPUT", "DROP"]));
    run(std::process::Command::new("iptables-nft").args(["-A", "INPUT", "-i", "up0", "-j", "ACCEPT"]));
    run(std::process::Command::new("iptables-nft").args(["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"]));
    for folder in ["cni", "bin"] {
        std::fs::create_dir_all(node.path(folder)).unwrap();
    }
    write(&node.path("cni/99-other.conflist"), "{}");
    write(&node.path("bin/bridge"), "#!/bin/sh\n");
    weft_tests::node::ip("route add 192.0.2.0/24 via 172.31.0.254");
    weft_tests::node::ip("-6 route add 2001:db8::/64 via fd00:31::fe");
    write(std::path::Path::new("/proc/sys/net/ipv4/ip_forward"), "0");
}

fn picture(node: &Node) -> Picture {
    let folders = ["cni", "bin", "run", "state"].map(|name| node.path(name));
    Picture::take(&folders.each_ref().map(|folder| folder.as_path()))
}

#[test]
fn cleanup_refuses_while_an_agent_runs() {
    inside(|| {
        let node = Node::running();
        let before = picture(&node);
        let (code, said) = refusal(&mut node.cleanup_command());
        assert_eq!((code, said.lines().count()), (1, 1), "{said}");
        assert!(said.contains(&format!("pid {}", node.agent().pid())), "{said}");
        assert_eq!(before.differences(&picture(&node)), [""; 0]);
        assert_eq!(node.status()["ready"], true);
    });
}

#[test]
fn after_cleanup_the_host_is_what_it_was_before_the_first_agent() {
    inside(|| {
        let mut node = Node::new();
        foreign_state(&node);
        node.start_server();
        node.make_node_object();
        let before = picture(&node);
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        node.add_pod("pod1");
        objects::make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
        objects::make_peer(node.api(), "n2");
        until("the peer", || {
            node.status()["parts"]["peers"].as_array().is_some_and(|peers| peers.len() == 1)
        });
        balancer::make_pool(&node);
        balancer::make_service(&node, "fronted", &json!({}), None);
        let held = || run(node.weft("lb").arg("status").arg("--run-dir").arg(node.path("run")));
        until("the addresses of the pool", || {
            let said = held();
            balancer::FIRST
                .iter()
                .all(|address| said.contains(&format!("{address}: Node n1 (this node) answers")))
        });
        node.await_ready();
        // What was there before the first agent is not forgotten by the second.
        node.end_agent(Signal::SIGKILL);
        node.start_agent();
        node.await_ready();
        let meanwhile = before.differences(&picture(&node));
        for kind in ["nft", "sysctls", "routes -4", "routes -6", "rules -4", "rules -6", "links", "addresses"]
        {
            assert!(
                meanwhile.iter().any(|line| line.starts_with(kind)),
                "{kind}: Weft changed nothing here?"
            );
        }
        let opened = meanwhile.iter().any(|line| line.contains("weft: pods"));
        assert!(opened, "nothing of ours in the firewalls of others");
        node.end_agent(Signal::SIGTERM);
        node.stop_tunnel();
        let said = run(&mut node.cleanup_command());
        assert!(said.ends_with("nothing of Weft is left on this node\n"), "{said}");
        assert_eq!(before.differences(&picture(&node)), [""; 0], "{said}");
    });
}

#[test]
fn cleanup_twice_and_cleanup_of_a_host_without_weft_find_nothing() {
    inside(|| {
        let node = Node::new();
        foreign_state(&node);
        let before = picture(&node);
        for _ in 0..2 {
            assert_eq!(run(&mut node.cleanup_command()), "nothing of Weft is left on this node\n");
            assert_eq!(before.differences(&picture(&node)), [""; 0]);
        }
    });
}

#[test]
fn cleanup_after_kill_9_keeps_the_state_when_asked() {
    inside(|| {
        let mut node = Node::running();
        let key = std::fs::read(node.path("state/wireguard.key")).unwrap();
        node.end_agent(Signal::SIGKILL);
        node.stop_tunnel();
        run(node.cleanup_command().arg("--keep-state"));
        assert_eq!(std::fs::read(node.path("state/wireguard.key")).unwrap(), key);
        assert!(node.path("state/store").exists() && !node.path("run").exists());
    });
}

#[test]
fn cleanup_beside_a_running_tunnel_ends_it_and_leaves_nothing() {
    inside(|| {
        let mut node = Node::new();
        node.start_server();
        node.make_node_object();
        let before = picture(&node);
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        node.end_agent(Signal::SIGTERM);
        run(&mut node.cleanup_command());
        until("the tunnel's end", || node.tunnel_has_ended());
        assert_eq!(before.differences(&picture(&node)), [""; 0]);
    });
}

#[test]
fn what_a_kube_proxy_left_is_named_in_status_and_goes_on_request() {
    inside(|| {
        let mut node = Node::new();
        run(std::process::Command::new("nft").args(["add", "table", "inet", "others"]));
        let before = picture(&node);
        run(std::process::Command::new("nft").args(["add", "table", "ip6", "kube-proxy"]));
        node.start_server();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        let status = node.status().to_string();
        assert!(status.contains("nft table ip6 kube-proxy"), "{status}");
        assert!(status.contains("run `weft cleanup --kube-proxy` on this node"), "{status}");

        let there = || run(std::process::Command::new("nft").args(["list", "tables"])).contains("kube-proxy");
        let said = run(node.cleanup_command().args(["--kube-proxy", "--dry-run"]));
        assert_eq!(said, "would remove nft table ip6 kube-proxy\n");
        assert!(there());
        let said = run(node.cleanup_command().arg("--kube-proxy"));
        assert_eq!(
            said,
            "removing nft table ip6 kube-proxy\nno rule of kube-proxy is left in nf_tables and x_tables\n"
        );
        assert!(!there());
        assert_eq!(node.status()["ready"], true, "the agent runs on");

        node.end_agent(Signal::SIGTERM);
        node.stop_tunnel();
        run(&mut node.cleanup_command());
        assert_eq!(before.differences(&picture(&node)), [""; 0]);
    });
}

#[test]
fn cleanup_goes_on_when_nobody_reads_what_it_says() {
    inside(|| {
        let mut node = Node::running();
        node.end_agent(Signal::SIGTERM);
        node.stop_tunnel();
        let mut command = node.cleanup_command();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert!(command.stdout(writer).status().unwrap().success());
        assert_eq!(run(&mut node.cleanup_command()), "nothing of Weft is left on this node\n");
        assert!(!node.path("run").exists());
    });
}
