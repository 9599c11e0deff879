//! An agent that comes back: after a clean stop, after dying between two steps, after losing its Store.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::rig::{Rig, fill_with_garbage, link_of, pod_links};
use crate::kernel::testing::{NamedNetns, needs_root};
use crate::store::Lease;

fn lease(id: &str) -> Lease {
    Lease {
        container_id: id.to_owned(),
        ifname: "eth0".to_owned(),
        netns: "/run/netns/x".to_owned(),
        pod: None,
        pod_uid: String::new(),
        link: link_of(id),
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
        rig.node.must(&["ping", "-c1", "-W2", "10.244.1.2"]);
    });
}

#[test]
fn leases_lost_with_the_store_are_rebuilt_from_the_kernel() {
    if !needs_root() {
        return;
    }
    let rig = Rig::new();
    let (a, b) = (NamedNetns::new("pod"), NamedNetns::new("pod"));
    rig.node.block_on(async {
        let agent = rig.start().await;
        let of_a = agent.add("a", &a).await;
        agent.kill().await;
        fill_with_garbage(&rig.store_path());
        let agent = rig.start().await;
        assert!(agent.set_aside.as_ref().is_some_and(|path| path.exists()));
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
        agent.store.write_leases(&BTreeMap::from([(address, Some(lease("a")))])).unwrap();
        assert_eq!(agent.cni.reconcile().await.released, [address]);
        assert_eq!((agent.live().len(), agent.store.leases().unwrap().len()), (0, 1));
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
        agent.store.write_leases(&BTreeMap::from([(address, Some(lease("a")))])).unwrap();
        assert_eq!(agent.cni.reconcile().await.failed, Vec::<String>::new());
        let route = rig.node.must(&["ip", "route", "get", "10.244.1.7"]);
        assert!(route.contains(&link_of("a")), "{route}");
        agent.del("a", &pod.path()).await;
        agent.add("a", &pod).await;
        assert_eq!(pod_links(&rig.node), 1);
    });
}
