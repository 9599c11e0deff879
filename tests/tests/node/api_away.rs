//! Losing the API server changes nothing in the data plane, not even over a restart or a reboot.

use nix::sys::signal::Signal;
use weft_tests::node::picture::{Picture, ruleset_with_handles};
use weft_tests::node::{DNS, Node, dig, inside, ip, run, until};

use crate::objects;

/// A node with a Service and a peer, and no API server any more.
fn left_alone() -> (Node, Vec<String>) {
    let mut node = Node::running();
    let vips = objects::make_service(node.api(), "web", &["10.244.9.9", "fd00:10:244:9::9"]);
    objects::make_peer(node.api(), "n2");
    until("the peer's routes", || ip("-6 route show table all").contains("fd00:10:244:1::/64"));
    until("the Service's rules", || {
        ruleset_with_handles().iter().any(|line| line.contains("fd00:10:244:9::9"))
    });
    until("the Service's name", || names(&vips));
    node.await_ready();
    node.stop_server();
    until("word of the loss", || api_server(&node).starts_with("away"));
    (node, vips)
}

fn api_server(node: &Node) -> String {
    node.status()["api_server"].as_str().unwrap_or_default().to_owned()
}

/// Both DNS addresses answer with both ClusterIPs.
fn names(vips: &[String]) -> bool {
    let name = "web.default.svc.cluster.local";
    DNS.iter().all(|server| dig(server, name, "A") == vips[..1] && dig(server, name, "AAAA") == vips[1..])
}

#[test]
fn without_the_api_server_everything_goes_on() {
    inside(|| {
        let (mut node, vips) = left_alone();
        assert!(names(&vips));
        assert_eq!(node.status()["ready"], true);
        node.add_pod("pod1");
        let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
        assert!(text.contains("API server  away for"), "{text}");
        let log = node.agent_log();
        assert!(!log.contains("ERROR"), "a server that is away is said once, as a warning:\n{log}");
        node.start_server();
        until("the connection", || api_server(&node).starts_with("connected"));
        objects::make_service(node.api(), "later", &["10.244.9.7", "fd00:10:244:9::7"]);
        until("a new Service's rules", || {
            ruleset_with_handles().iter().any(|line| line.contains("10.244.9.7"))
        });
    });
}

#[test]
fn an_agent_restarted_without_the_api_server_changes_nothing() {
    inside(|| {
        let (mut node, vips) = left_alone();
        node.add_pod("pod1");
        let before = (ruleset_with_handles(), Picture::take(&[]));
        node.end_agent(Signal::SIGTERM);
        node.start_agent();
        node.await_ready();
        until("DNS", || names(&vips));
        assert_eq!(before.1.differences(&Picture::take(&[])), [""; 0]);
        assert_eq!(before.0, ruleset_with_handles());
        let status = node.status();
        assert_eq!(status["from_store"], true, "{status:#}");
        let text = run(node.weft("status").arg("--run-dir").arg(node.path("run")));
        assert!(text.contains("last good one from disk"), "{text}");
        node.add_pod("pod2");
    });
}

#[test]
fn a_node_that_reboots_without_the_api_server_is_what_it_was() {
    inside(|| {
        let (mut node, vips) = left_alone();
        let before = Picture::take(&[]);
        // What a reboot leaves: the state folder.
        node.end_agent(Signal::SIGTERM);
        node.stop_tunnel();
        run(node.cleanup_command().arg("--keep-state"));
        assert!(!ip("-o link").contains("weft0") && ruleset_with_handles().is_empty());
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        until("DNS", || names(&vips));
        let after = Picture::take(&[]);
        for kind in ["nft", "sysctls", "routes -4", "routes -6", "rules -4", "rules -6"] {
            assert_eq!(before.of(kind), after.of(kind), "{kind}");
        }
        assert_eq!(node.status()["from_store"], true);
        node.add_pod("pod1");
        node.start_server();
        until("objects from the API server", || node.status()["from_store"] == false);
        node.await_ready();
        assert!(names(&vips));
    });
}

#[test]
fn what_was_saved_survives_kill_9() {
    inside(|| {
        let (mut node, vips) = left_alone();
        // The Store is written a second after a change.
        std::thread::sleep(std::time::Duration::from_millis(2500));
        node.end_agent(Signal::SIGKILL);
        node.start_agent();
        node.await_ready();
        until("DNS", || names(&vips));
        assert_eq!(node.status()["from_store"], true);
    });
}
