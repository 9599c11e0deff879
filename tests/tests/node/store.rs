//! Disks that are full, read-only or damaged cost as little as they can.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use weft_tests::node::picture::{Picture, ruleset_with_handles};
use weft_tests::node::{DNS, Node, addresses, dig, inside, ip, netns, run, until, write};

use crate::objects;

const NAME: &str = "kubernetes.default.svc.cluster.local";

fn mount(args: &[&str], target: &Path) {
    run(Command::new("mount").args(args).arg(target));
}

/// ADD fails with the reason, the data plane goes on: DNS answers and a new Service is programmed.
fn only_add_suffers(node: &Node, reason: &str, service: &str, endpoint: &str) {
    ip("netns add refused");
    let refused = node.cni("ADD", "1.0.0", "refused", &netns("refused"), None);
    let said = refused.printed.to_string();
    assert!(refused.failed && said.contains(reason), "{said}");
    assert!(refused.printed["code"].as_u64().is_some_and(|code| code != 0), "{said}");
    assert!(!ip("-n refused -o link").contains("eth0"), "a failed ADD leaves no interface");
    let status = node.cni("STATUS", "1.1.0", "", "", None);
    assert!(status.failed && status.printed.to_string().contains(reason), "{}", status.printed);
    for (address, kind) in DNS.iter().zip(["A", "AAAA"]) {
        assert_eq!(dig(address, NAME, kind).len(), 1);
    }
    objects::make_service(node.api(), service, &[endpoint, "fd00:10:244:9::9"]);
    until("the Service's rules", || ruleset_with_handles().iter().any(|line| line.contains(endpoint)));
    assert_eq!(node.status()["ready"], true);
}

#[test]
fn a_full_run_folder_fails_add_with_the_reason_and_nothing_else() {
    inside(|| {
        let mut node = Node::new();
        std::fs::create_dir(node.path("run")).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=24m", "none"], &node.path("run"));
        node.start_server();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        node.add_pod("before");
        let filler = node.path("run/filler");
        let mut dd = Command::new("dd");
        let _full =
            dd.args(["if=/dev/zero", "bs=64k"]).arg(format!("of={}", filler.display())).output().unwrap();
        only_add_suffers(&node, "no space left", "full", "10.244.9.1");
        objects::make_peer(node.api(), "n2");
        until("the failure", || node.failures("overlay").contains("No space left"));
        std::fs::remove_file(filler).unwrap();
        until("the peer", || {
            node.status()["parts"]["peers"].as_array().is_some_and(|peers| peers.len() == 1)
        });
        node.await_ready();
        node.cni("ADD", "1.0.0", "refused", &netns("refused"), None).succeeded();
    });
}

#[test]
fn a_read_only_run_folder_fails_add_with_the_reason_and_nothing_else() {
    inside(|| {
        let node = Node::running();
        node.add_pod("before");
        let run_dir = node.path("run");
        run(Command::new("mount").arg("--bind").args([&run_dir, &run_dir]));
        mount(&["-o", "remount,ro,bind"], &run_dir);
        only_add_suffers(&node, "read-only", "frozen", "10.244.9.2");
        run(Command::new("umount").arg(&run_dir));
        node.cni("ADD", "1.0.0", "refused", &netns("refused"), None).succeeded();
    });
}

/// Overwrites every file of a store.
fn damage(store: &Path) {
    let mut hit = 0;
    for entry in std::fs::read_dir(store).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        write(&entry.path(), vec![0xa5; 4096]);
        hit += 1;
    }
    assert!(hit >= 2, "{} is no store", store.display());
}

#[test]
fn a_damaged_durable_store_is_set_aside_and_the_agent_starts() {
    inside(|| {
        let mut node = Node::running();
        let before = Picture::take(&[]);
        node.end_agent(Signal::SIGTERM);
        damage(&node.path("state/store"));
        node.start_agent();
        node.await_ready();
        assert!(node.path("state/store.damaged-1").exists());
        assert!(node.agent_log().contains("store was damaged"), "{}", node.agent_log());
        assert_eq!(before.differences(&Picture::take(&[])), [""; 0]);
    });
}

#[test]
fn damaged_leases_are_rebuilt_from_the_kernel() {
    inside(|| {
        let mut node = Node::running();
        let first = addresses(&node.add_pod("pod1"));
        let before = ruleset_with_handles();
        node.end_agent(Signal::SIGKILL);
        damage(&node.path("run/leases"));
        node.start_agent();
        node.await_ready();
        assert!(node.agent_log().contains("a lease cannot be read"), "{}", node.agent_log());
        assert_eq!(before, ruleset_with_handles(), "the pod's protection against spoofing is adopted");
        node.cni("CHECK", "1.0.0", "pod1", &netns("pod1"), None).succeeded();
        let second = addresses(&node.add_pod("pod2"));
        assert!(first.len() == 2 && first.iter().all(|address| !second.contains(address)), "{second:?}");
        node.cni("DEL", "1.0.0", "pod1", &netns("pod1"), None).succeeded();
        let routes = [ip("route show table all"), ip("-6 route show table all")].concat();
        assert!(first.iter().all(|address| !routes.contains(&format!("{address} dev weftp"))), "{routes}");
    });
}

#[test]
fn a_damaged_private_key_is_named() {
    inside(|| {
        let mut node = Node::running();
        node.end_agent(Signal::SIGTERM);
        write(&node.path("state/wireguard.key"), "no key\n");
        let (code, said) = weft_tests::node::refusal(&mut node.agent_command());
        assert_eq!(code, 1);
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains("wireguard.key"), "{said}");
    });
}
