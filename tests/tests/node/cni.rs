//! The plugin by hand, as the CNI specification 1.1.0 has runtimes call it (section 2), in every version it speaks.

use std::process::Command;

use serde_json::{Value, json};
use weft_tests::node::{Cni, NODE, Node, addresses, inside, ip, netns, run};

use crate::objects::NODES;

const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

/// An error object of the specification with this code.
fn refused(cni: &Cni, code: u64) {
    assert!(cni.failed && cni.printed["code"] == code, "code {code} was expected: {:#}", cni.printed);
    assert!(cni.printed["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{:#}", cni.printed);
    assert!(cni.printed["cniVersion"].is_string(), "{:#}", cni.printed);
}

#[test]
fn version_needs_no_agent_and_names_what_is_spoken() {
    inside(|| {
        let mut command = Node::new().weft("cni");
        let said: Value = serde_json::from_str(&run(command.env("CNI_COMMAND", "VERSION"))).unwrap();
        assert_eq!(said["supportedVersions"], json!(VERSIONS));
        assert!(said["cniVersion"].is_string());
    });
}

#[test]
fn add_check_and_del_hold_in_every_version() {
    inside(|| {
        let node = Node::running();
        for version in VERSIONS {
            let pod = format!("pod-{}", version.replace('.', "-"));
            ip(&format!("netns add {pod}"));
            let added = node.cni("ADD", version, &pod, &netns(&pod), None).succeeded();
            assert_eq!(added["cniVersion"], version);
            assert_eq!(addresses(&added).len(), 2, "{added:#}");
            let inner = ip(&format!("-n {pod} -o addr show dev eth0 scope global"));
            assert!(addresses(&added).iter().all(|address| inner.contains(address.as_str())), "{inner}");
            node.cni("CHECK", version, &pod, &netns(&pod), Some(&added)).succeeded();
            refused(&node.cni("ADD", version, &pod, &netns(&pod), None), 4);
            node.cni("CHECK", version, &pod, &netns(&pod), Some(&added)).succeeded();
            node.cni("DEL", version, &pod, &netns(&pod), Some(&added)).succeeded();
            assert!(!ip(&format!("-n {pod} -o link")).contains("eth0"));
            node.cni("DEL", version, &pod, &netns(&pod), Some(&added)).succeeded();
            refused(&node.cni("CHECK", version, &pod, &netns(&pod), Some(&added)), 3);
        }
        assert!(!ip("-o link").contains("weftp"));
    });
}

#[test]
fn the_node_says_whose_an_address_is() {
    inside(|| {
        let node = Node::running();
        let [v4, v6] = <[String; 2]>::try_from(addresses(&node.add_pod("pod1"))).unwrap();
        let ipam = |args: &[&str]| run(node.weft("ipam").args(args).arg("--run-dir").arg(node.path("run")));
        let shown = ipam(&["show"]);
        assert!(shown.starts_with("10.244.0.0/24: 1 used, 0 resting, 251 free\n"), "{shown}");
        let line = shown.lines().find(|line| line.contains(&v6)).unwrap();
        assert!(line.contains("default/pod1") && line.contains("used"), "{line}");
        assert!(ipam(&["explain", &v4]).starts_with(&format!("{v4} belongs to pod default/pod1\n")));
        node.cni("DEL", "1.0.0", "pod1", "", None).succeeded();
        let said = ipam(&["explain", &v4]);
        assert!(said.starts_with(&format!("{v4} rests for ")) && said.contains("default/pod1"), "{said}");
        let json: Value = serde_json::from_str(&ipam(&["show", "-o", "json"])).unwrap();
        assert_eq!((&json["ranges"][0]["used"], &json["ranges"][0]["resting"]), (&json!(0), &json!(1)));
    });
}

#[test]
fn check_notices_what_is_missing() {
    inside(|| {
        let node = Node::running();
        let added = node.add_pod("pod1");
        let check = || node.cni("CHECK", "1.0.0", "pod1", &netns("pod1"), Some(&added));
        check().succeeded();
        let [v4, v6] = [&addresses(&added)[0], &addresses(&added)[1]];
        for (remove, restore) in [
            (
                format!("-n pod1 addr del {v6}/128 dev eth0"),
                format!("-n pod1 addr add {v6}/128 dev eth0 nodad"),
            ),
            (format!("route del {v4}/32"), String::new()),
        ] {
            ip(&remove);
            let checked = check();
            assert!(checked.failed, "{remove}: {:#}", checked.printed);
            if !restore.is_empty() {
                ip(&restore);
            }
        }
    });
}

#[test]
fn del_without_a_namespace_gives_everything_back() {
    inside(|| {
        let node = Node::running();
        let added = node.add_pod("pod1");
        ip("netns del pod1");
        node.cni("DEL", "1.0.0", "pod1", "", None).succeeded();
        assert!(!ip("-o link").contains("weftp"));
        let routes = [ip("route show table all"), ip("-6 route show table all")].concat();
        assert!(addresses(&added).iter().all(|address| !routes.contains(address.as_str())), "{routes}");
    });
}

#[test]
fn gc_releases_what_the_runtime_does_not_name() {
    inside(|| {
        let node = Node::running();
        let kept = node.add_pod("kept");
        let gone = node.add_pod("gone");
        // The network configuration of GC carries the attachments that are valid.
        let socket = node.path("run/agent.sock");
        let valid = json!([{"containerID": "kept", "ifname": "eth0"}]);
        let config = json!({
            "cniVersion": "1.1.0", "name": "weft", "type": "weft", "socket": socket,
            "cni.dev/valid-attachments": valid,
        });
        let file = node.path("gc.json");
        weft_tests::node::write(&file, config.to_string());
        let mut command = Command::new(node.path("bin/weft"));
        command.env("CNI_COMMAND", "GC").env("CNI_PATH", node.path("bin"));
        run(command.stdin(std::fs::File::open(file).unwrap()));
        node.cni("CHECK", "1.1.0", "kept", &netns("kept"), Some(&kept)).succeeded();
        refused(&node.cni("CHECK", "1.1.0", "gone", &netns("gone"), Some(&gone)), 3);
    });
}

#[test]
fn status_says_when_add_can_work() {
    inside(|| {
        let mut node = Node::running();
        assert_eq!(node.cni("STATUS", "1.1.0", "", "", None).succeeded(), Value::Null);
        node.api().delete(NODES, NODE);
        let status = |node: &Node| node.cni("STATUS", "1.1.0", "", "", None);
        weft_tests::node::until("word of the missing Node", || status(&node).failed);
        refused(&status(&node), 50);
        refused(&node.cni("ADD", "1.1.0", "early", "/run/netns/early", None), 11);
        node.end_agent(nix::sys::signal::Signal::SIGTERM);
        assert!(status(&node).failed);
    });
}

#[test]
fn a_call_that_is_not_as_specified_is_named() {
    inside(|| {
        let node = Node::running();
        refused(&node.cni("ADD", "0.2.0", "pod1", &netns("pod1"), None), 1);
        refused(&node.cni("ADD", "1.0.0", "pod1", "", None), 4);
        refused(&node.cni("REMOVE", "1.0.0", "pod1", &netns("pod1"), None), 4);
        let missing = node.cni("ADD", "1.0.0", "pod1", "/run/netns/missing", None);
        assert!(
            missing.failed && missing.printed.to_string().contains("/run/netns/missing"),
            "{}",
            missing.printed
        );
        assert!(!ip("-o link").contains("weftp"), "a failed ADD leaves no link");
    });
}
