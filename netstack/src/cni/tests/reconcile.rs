//! An agent that comes back: after a clean stop, after dying between two steps, after losing its leases.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::Generation;
use weft_model::objects::Bandwidth;

use super::rig::{Rig, fill_with_garbage, link_of, pod_links, snapshot, uplink};
use crate::cni::apply::PodLinksApplier;
use crate::cni::cleanup;
use crate::cni::plan::PodLinksPlanner;
use crate::kernel::netns::Rtnetlink;
use crate::kernel::testing::{NamedNetns, needs_root};
use crate::reconcile::{Loop, Pace};
use crate::store::Lease;

fn lease(id: &str) -> Lease {
    Lease {
        container_id: id.to_owned(),
        ifname: "eth0".to_owned(),
        netns: "/run/netns/x".to_owned(),
        pod: None,
        pod_uid: String::new(),
        link: link_of(id),
        host_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
        released: None,
    }
}

#[test]
fn a_restart_changes_nothing() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &pod).await;
        let before = agent.live();
        agent.kill().await;
        let agent = rig.start().await;
        assert_eq!(agent.live(), before);
        assert_eq!(agent.cni.reconcile().await, crate::cni::Reconciled::default());
        rig.node.must(&["ping", "-c1", "-W2", "10.244.1.3"]);
    });
}

#[test]
fn a_link_that_had_ended_when_the_agent_was_killed_is_deleted_and_no_pod_again() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &a).await;
        let of_b = agent.add("b", &b).await;
        agent.kill().await;
        let group = weft_model::constants::ENDED_LINK_GROUP.to_string();
        rig.node.must(&["ip", "link", "set", &link_of("a"), "group", &group]);
        // Its routes would bring it back: they are all that is left of who had it.
        fill_with_garbage(&rig.leases());
        let agent = rig.start().await;
        assert_eq!(agent.live().keys().copied().collect::<Vec<IpAddr>>(), of_b);
        assert_eq!(pod_links(&rig.node), 1);
        rig.node.must(&["ping", "-c1", "-W2", &of_b[1].to_string()]);
    });
}

#[test]
fn leases_that_are_lost_are_rebuilt_from_the_kernel() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let of_a = agent.add("a", &a).await;
        agent.kill().await;
        fill_with_garbage(&rig.leases());
        let agent = rig.start().await;
        assert_eq!(agent.live().keys().copied().collect::<Vec<IpAddr>>(), of_a);
        let of_b = agent.add("b", &b).await;
        assert!(of_a.iter().all(|address| !of_b.contains(address)), "{of_a:?} {of_b:?}");
        rig.node.must(&["ping", "-c1", "-W2", &of_a[1].to_string()]);
        agent.del("a", &a.path()).await;
        assert_eq!((agent.live().len(), pod_links(&rig.node)), (2, 1));
    });
}

#[test]
fn a_lease_whose_link_is_gone_is_released() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    rig.node.block_on(async {
        let agent = rig.start().await;
        let address: IpAddr = "10.244.1.7".parse().unwrap();
        agent.leases.write(&BTreeMap::from([(address, Some(lease("a")))])).unwrap();
        assert_eq!(agent.cni.reconcile().await.released, [address]);
        assert_eq!((agent.live().len(), agent.leases.records().len()), (0, 1));
    });
}

#[test]
fn an_add_that_died_half_way_is_completed_or_removed() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    let peer = ["type", "veth", "peer", "name", "eth0", "netns", &pod.name];
    let veth = |link: &str| {
        rig.node.must(&[&["ip", "link", "add", link][..], &peer].concat());
    };
    rig.node.block_on(async {
        let agent = rig.start().await;
        veth("weftp0000000000");
        assert_eq!(agent.cni.reconcile().await.removed_links, ["weftp0000000000"]);
        veth(&link_of("a"));
        let address: IpAddr = "10.244.1.7".parse().unwrap();
        agent.leases.write(&BTreeMap::from([(address, Some(lease("a")))])).unwrap();
        assert_eq!(agent.cni.reconcile().await.failed, Vec::<String>::new());
        let route = rig.node.must(&["ip", "route", "get", "10.244.1.7"]);
        assert!(route.contains(&link_of("a")), "{route}");
        agent.del("a", &pod.path()).await;
        agent.add("a", &pod).await;
        assert_eq!(pod_links(&rig.node), 1);
    });
}

#[test]
fn cleanup_leaves_no_object_of_ours() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    let picture = || {
        [&["ip", "-br", "addr"][..], &["ip", "route"], &["ip", "-6", "route"], &["nft", "list", "ruleset"]]
            .map(|command| rig.node.must(command))
    };
    let before = picture();
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &pod).await;
        agent.kill().await;
        let connection = Rtnetlink::connect().unwrap();
        let applied = cleanup::remove_all(&connection.handle).await;
        assert_eq!((applied.failed, applied.changed.len()), (vec![], 2));
        let again = cleanup::remove_all(&connection.handle).await;
        assert_eq!((again.failed, again.changed), (vec![], vec![]));
    });
    assert_eq!(picture(), before);
}

#[test]
fn the_loop_follows_the_nodes_address_and_mends_what_others_break() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let pod = NamedNetns::new("pod");
    rig.node.must(&["ip", "addr", "add", "192.0.2.77/24", "dev", "up0"]);
    rig.node.block_on(async {
        let agent = rig.start().await;
        agent.add("a", &pod).await;
        let (run, handle) = Loop::new(
            "cni",
            PodLinksPlanner,
            PodLinksApplier::new(agent.cni.clone()),
            Pace::default(),
            agent.snapshots.subscribe(),
        );
        let running = tokio::spawn(run.run());
        let mut moved = snapshot(&["10.244.1.0/24", "fd00:244:1::/64"]);
        let mut node = (**moved.own_node().unwrap()).clone();
        node.internal_ips[0] = "192.0.2.77".parse().unwrap();
        moved.generation = Generation(2);
        Arc::make_mut(&mut moved.facts).uplinks = vec![uplink(&["192.0.2.77", "2001:db8::1"])];
        moved.nodes = Arc::new([(node.name.clone(), Arc::new(node))].into());
        agent.snapshots.send_replace(Some(Arc::new(moved)));
        let mut reports = handle.reports();
        reports.wait_for(|report| report.generation == Generation(2)).await.unwrap();
        let route = rig.node.must(&["ip", "route", "get", "10.244.1.3"]);
        assert!(route.contains("src 192.0.2.77"), "{route}");
        rig.node.must(&["ip", "route", "flush", "proto", "87"]);
        rig.node.must(&["nft", "delete", "table", "inet", "weft-cni"]);
        let passes = handle.report().passes;
        handle.nudge();
        let report = reports.wait_for(|report| report.passes > passes).await.unwrap().clone();
        assert_eq!(report.failures, Vec::<String>::new());
        assert_eq!(report.details[0], ("10.244.1.0/24".to_owned(), "1 used, 0 resting".to_owned()));
        rig.node.must(&["ping", "-c1", "-W2", "10.244.1.3"]);
        pod.must(&["ping", "-c1", "-W2", "2001:db8::1"]);
        running.abort();
    });
}
