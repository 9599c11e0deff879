//! Requests out of order, things that are not there, and a disk that refuses.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_model::Generation;

use super::rig::{Agent, Rig, link_of, pod_links, snapshot};
use crate::kernel::testing::{NamedNetns, needs_root, run};

#[test]
fn add_twice_is_refused_and_changes_nothing() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (pod, other) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &pod).await;
        let leases = agent.leases.records();
        let error = agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 4, "the interface exists: {error}");
        let error = agent.call("ADD", "a", &other.path(), Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 4, "the lease exists: {error}");
        assert_eq!(agent.leases.records(), leases);
        rig.node.must(&["ping", "-c1", "-W2", "10.244.1.3"]);
    });
}

#[test]
fn add_refuses_an_interface_name_that_is_taken() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    pod.must(&["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
    rig.node.block_on(async {
        let agent = rig.start().await;
        let error = agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains("eth0 exists already"), "{error}");
        assert_eq!((agent.leases.records().len(), pod_links(&rig.node)), (0, 0));
    });
}

#[test]
fn a_failed_add_leaves_nothing_behind() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.must(&["ip", "addr", "del", "192.0.2.1/24", "dev", "up0"]);
    rig.node.block_on(async {
        let agent = rig.start().await;
        let error = agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains("10.244.1.3/32 src 192.0.2.1"), "{error}");
        assert_eq!((agent.leases.records().len(), pod_links(&rig.node)), (0, 0));
        assert!(!pod.must(&["ip", "link"]).contains("eth0"));
        rig.node.must(&["ip", "addr", "add", "192.0.2.1/24", "dev", "up0"]);
        agent.add("a", &pod).await;
    });
}

#[test]
fn del_succeeds_in_every_order_and_frees_the_address() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.del("never-added", "").await;
        agent.add("a", &pod).await;
        agent.del("a", &pod.path()).await;
        assert!(!pod.must(&["ip", "link"]).contains("eth0"));
        assert_eq!((agent.live().len(), agent.leases.records().len()), (0, 2), "released ones rest");
        agent.del("a", &pod.path()).await;
        let again = agent.add("a", &pod).await;
        assert_eq!(again[0].to_string(), "10.244.1.4");
        drop(pod);
        agent.del("a", "/run/netns/gone").await;
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (0, 0));
    });
}

#[test]
fn an_ended_pod_passes_nothing_while_its_link_is_there_and_who_comes_in_its_place_waits() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        let pings = || ["192.0.2.1", "2001:db8::1"].map(|to| pod.exec(&["ping", "-c1", "-W1", to]).0);
        agent.add("a", &pod).await;
        // Another container in the same namespace, then the same one.
        for (ended, next) in [("a", "b"), ("b", "b")] {
            assert_eq!(pings(), [true, true]);
            let sweeping = agent.cni.sweeping.lock().await;
            agent.call("DEL", ended, &pod.path(), Value::Null).await.unwrap();
            assert_eq!((agent.live().len(), pod_links(&rig.node), pings()), (0, 1, [false, false]));
            let mut adding = std::pin::pin!(agent.add(next, &pod));
            assert!(tokio::time::timeout(Duration::from_millis(200), &mut adding).await.is_err());
            drop(sweeping);
            assert_eq!((adding.await.len(), pod_links(&rig.node)), (2, 1));
        }
        assert_eq!(pings(), [true, true]);
    });
}

#[test]
fn a_missing_namespace_is_error_3() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    rig.node.block_on(async {
        let agent = rig.start().await;
        let error = agent.call("ADD", "a", "/run/netns/weft-none", Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 3, "{error}");
        assert_eq!(agent.leases.records().len(), 0);
    });
}

#[test]
fn check_says_what_is_gone() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        let result = agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap();
        let previous = json!({"prevResult": result});
        agent.call("CHECK", "a", &pod.path(), previous.clone()).await.unwrap();
        for (damage, word) in [
            (&["ip", "-6", "route", "del", "default"][..], "default route"),
            (&["ip", "addr", "del", "fd00:244:1::3/128", "dev", "eth0"], "is not on eth0"),
            (&["ip", "link", "set", "eth0", "down"], "eth0 is down"),
        ] {
            pod.must(damage);
            let error = agent.call("CHECK", "a", &pod.path(), previous.clone()).await.unwrap_err();
            assert_eq!(error["code"], 101);
            assert!(error["msg"].as_str().unwrap().contains(word), "{error}");
        }
        rig.node.must(&["ip", "route", "del", "10.244.1.3/32"]);
        let error = agent.call("CHECK", "a", &pod.path(), previous).await.unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains("route to 10.244.1.3"), "{error}");
        let error = agent.call("CHECK", "b", &pod.path(), Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 3);
    });
}

#[test]
fn gc_removes_what_the_runtime_does_not_know() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &a).await;
        agent.add("b", &b).await;
        let valid = json!({"cni.dev/valid-attachments": [{"containerID": "b", "ifname": "eth0"}]});
        agent.call("GC", "", "", valid).await.unwrap();
        assert!(agent.live().values().all(|lease| lease.container_id == "b"));
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (2, 1));
        rig.node.must(&["ip", "link", "show", &link_of("b")]);
    });
}

#[test]
fn status_and_add_say_why_a_pod_cannot_be_attached_yet() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.call("STATUS", "", "", Value::Null).await.unwrap();
        let unready = |generation| weft_model::Snapshot { generation, ..snapshot(&["10.244.1.0/24"]) };
        for (snapshot, word) in [
            (None, "no API server yet"),
            (Some(snapshot(&[])), "no spec.podCIDRs"),
            (Some(unready(Generation(0))), "not programmed"),
        ] {
            agent.snapshots.send_replace(snapshot.map(Arc::new));
            let status = agent.call("STATUS", "", "", Value::Null).await.unwrap_err();
            let add = agent.call("ADD", "a", &pod.path(), Value::Null).await.unwrap_err();
            assert_eq!((&status["code"], &add["code"]), (&50.into(), &11.into()));
            assert!(status["msg"].as_str().unwrap().contains(word), "{status}");
            assert!(add["msg"].as_str().unwrap().contains(word), "{add}");
        }
    });
}

#[test]
fn an_exhausted_range_is_named() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start_with(snapshot(&["fd00:244:1::/64", "10.244.1.0/30"])).await;
        assert_eq!(agent.add("a", &a).await[1].to_string(), "10.244.1.2");
        let error = agent.call("ADD", "b", &b.path(), Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 102);
        assert!(error["msg"].as_str().unwrap().contains("10.244.1.0/30"), "{error}");
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (2, 1));
    });
}

/// What a plugin writes to the agent's socket before it is killed.
fn begin(agent: &Agent, verb: &str, body: &Value) -> UnixStream {
    let (body, mut stream) = (body.to_string(), UnixStream::connect(&agent.socket).unwrap());
    let length = body.len();
    let head = format!("POST /cni/{verb} HTTP/1.1\r\nHost: weft\r\nContent-Type: application/json\r\n");
    stream.write_all(format!("{head}Content-Length: {length}\r\n\r\n{body}").as_bytes()).unwrap();
    stream
}

/// The runtime has gone on by then: it has given up the pod, or attached another.
#[test]
fn what_a_killed_plugin_asked_for_does_not_begin_any_more() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pods = ["running", "ended", "given-up"].map(|id| (id, NamedNetns::new("pod")));
    rig.node.block_on(async {
        let agent = rig.start().await;
        for (id, pod) in &pods[..2] {
            agent.add(id, pod).await;
        }
        let busy = agent.cni.locks.everything().await;
        let config = json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": []});
        for verb in ["add", "del", "gc"] {
            let (id, pod) = if verb == "add" { &pods[2] } else { &pods[0] };
            let body = json!({"container_id": id, "ifname": "eth0", "netns": pod.path(), "config": config});
            drop(begin(&agent, verb, &body));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(busy);
        agent.del("ended", "").await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let links: BTreeSet<String> = agent.live().into_values().map(|lease| lease.link).collect();
        assert_eq!((links, pod_links(&rig.node)), ([link_of("running")].into(), 1));
    });
}

#[test]
fn an_add_whose_plugin_is_killed_ends_whole() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        let config = json!({"cniVersion": "1.0.0"});
        let body = json!({"container_id": "a", "ifname": "eth0", "netns": pod.path(), "config": config});
        let stream = begin(&agent, "add", &body);
        while agent.live().is_empty() {
            tokio::task::yield_now().await;
        }
        drop(stream);
        agent.del("b", "").await;
        let deadline = Instant::now() + Duration::from_secs(5);
        while agent.call("CHECK", "a", &pod.path(), Value::Null).await.is_err() {
            assert!(Instant::now() < deadline);
        }
        pod.must(&["ping", "-c1", "-W2", "192.0.2.1"]);
        agent.del("a", &pod.path()).await;
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (0, 0));
    });
}

#[test]
fn add_makes_a_flushed_rule_set_anew() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &a).await;
        rig.node.must(&["nft", "flush", "ruleset"]);
        agent.add("b", &b).await;
        for pod in [&a, &b] {
            pod.must(&["ping", "-c1", "-W2", "192.0.2.1"]);
        }
        let table = rig.node.must(&["nft", "list", "table", "inet", "weft-cni"]);
        assert_eq!(table.matches("\" . ").count(), 4, "{table}");
    });
}

/// A file system of its own for the leases, unmounted on drop.
struct Disk<'a>(&'a str);

impl<'a> Disk<'a> {
    fn mount(path: &'a str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        run(&["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", path]);
        Self(path)
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        run(&["umount", "-l", self.0]);
    }
}

#[test]
fn a_full_disk_fails_add_with_the_reason_and_changes_nothing() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    let path = rig.leases().parent().unwrap().to_str().unwrap().to_owned();
    let disk = Disk::mount(&path);
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &a).await;
        let filler = format!("{path}/filler");
        std::fs::write(&filler, vec![1; 12 << 20]).unwrap_err();
        let error = agent.call("ADD", "b", &b.path(), Value::Null).await.unwrap_err();
        assert_eq!(error["code"], 103, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("no space left"), "{error}");
        assert_eq!(agent.call("STATUS", "", "", Value::Null).await.unwrap_err()["code"], 50);
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (2, 1));
        rig.node.must(&["ping", "-c1", "-W2", "10.244.1.3"]);
        agent.del("a", &a.path()).await;
        assert_eq!(pod_links(&rig.node), 0, "a pod can be deleted all the same");
        std::fs::remove_file(filler).unwrap();
        assert_eq!(agent.cni.reconcile().await.released.len(), 2);
        agent.add("b", &b).await;
        agent.kill().await;
    });
    drop(disk);
}
