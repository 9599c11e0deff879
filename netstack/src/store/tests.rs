//! Snapshots survive a restart; damage does not survive one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use weft_model::node_facts::{NodeFacts, WireguardBackend};
use weft_model::objects::{Node, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy};
use weft_model::{ClusterConfig, Generation, ServiceKey, Snapshot, WgPublicKey};

use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn node() -> Node {
    Node {
        name: "n1".into(),
        uid: "1".to_owned(),
        created: 1,
        labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        internal_ips: vec![address("192.0.2.1"), address("2001:db8::1")],
        leaving: false,
        cordoned: false,
        links: None,
        public_key: Some(WgPublicKey([7; 32])),
        next_public_key: None,
        answers_for: Default::default(),
        unready: false,
        reach: Default::default(),
        wireguard_port: Some(51820),
    }
}

fn service() -> Service {
    Service {
        key: ServiceKey::new("default", "web"),
        uid: "2".to_owned(),
        created: 2,
        labels: BTreeMap::new(),
        kind: ServiceKind::ClusterIps(vec![address("10.96.0.7")]),
        ports: vec![ServicePort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        publish_not_ready_addresses: false,
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Local,
        session_affinity_seconds: Some(10800),
        load_balancer_ips: vec![],
        external_ips: vec![],
        load_balancer_source_ranges: None,
        health_check_node_port: None,
        balancer: None,
    }
}

fn snapshot() -> Snapshot {
    Snapshot {
        generation: Generation(7),
        config: Arc::new(ClusterConfig {
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            ..ClusterConfig::default()
        }),
        facts: Arc::new(NodeFacts {
            name: "n1".into(),
            uplinks: vec![],
            wireguard_backend: WireguardBackend::Userspace,
            foreign_routes: vec![],
            loopback: Default::default(),
            observed: Default::default(),
        }),
        nodes: Arc::new([("n1".into(), Arc::new(node()))].into()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::new([(service().key.clone(), Arc::new(service()))].into()),
        endpoint_slices: Arc::default(),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

/// Overwrites every file below with the same number of other bytes.
fn fill_with_garbage(path: &Path) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fill_with_garbage(&path);
        } else {
            let length = std::fs::metadata(&path).unwrap().len().max(100);
            let garbage: Vec<u8> = (0..length).map(|n| (n * 131 + 7) as u8).collect();
            std::fs::write(&path, garbage).unwrap();
        }
    }
}

#[test]
fn a_store_that_is_closed_leaves_nothing_for_later() {
    let folder = tempfile::tempdir().unwrap();
    let is_gone_at_once = |_| {
        let store = Store::open(folder.path().join("store")).unwrap().store;
        let gone = Arc::new(AtomicBool::new(false));
        let replaced = gone.clone();
        crossbeam_epoch::pin().defer(move || replaced.store(true, Ordering::SeqCst));
        store.close();
        gone.load(Ordering::SeqCst)
    };
    // Other tests of this process may be looking at stores of theirs.
    assert!((0..50).any(is_gone_at_once));
}

#[test]
fn a_store_full_of_garbage_is_set_aside_and_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    for round in 1..=2 {
        let saved = LastGood::read(&path).unwrap().last_good.save(&snapshot());
        assert!(saved.is_ok(), "{saved:?}");
        fill_with_garbage(&path);
        let opened = Store::open(&path).unwrap();
        assert_eq!(opened.set_aside, Some(folder.path().join(format!("store.damaged-{round}"))));
        assert!(opened.set_aside.unwrap().join("conf").exists());
        assert_eq!(opened.store.load_snapshot().unwrap().snapshot, None);
    }
}

#[test]
fn a_file_in_place_of_the_store_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    std::fs::write(&path, "not a folder").unwrap();
    let opened = Store::open(&path).unwrap();
    assert_eq!(opened.set_aside, Some(folder.path().join("store.damaged-1")));
}

#[test]
fn a_store_that_kills_its_opener_twice_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    drop(Store::open(&path).unwrap());
    let marker = folder.path().join("store.opening");
    std::fs::write(&marker, "1").unwrap();
    assert_eq!(Store::open(&path).unwrap().set_aside, None);
    assert!(!marker.exists());
    std::fs::write(&marker, "2").unwrap();
    assert_eq!(Store::open(&path).unwrap().set_aside, Some(folder.path().join("store.damaged-1")));
}

#[test]
fn a_store_in_use_is_an_error_and_not_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let first = Store::open(&path).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Open { .. })));
    drop(first);
    assert_eq!(Store::open(&path).unwrap().set_aside, None);
}

/// As a program of its own: what it finds, and then its writes.
fn in_a_process(path: &Path, writes: &[&Snapshot]) -> SnapshotRead {
    let Found { last_good, read, .. } = LastGood::read(path).unwrap();
    writes.iter().for_each(|snapshot| last_good.save(snapshot).unwrap());
    read
}

fn marked(snapshot: Snapshot) -> Option<Snapshot> {
    Some(Snapshot { from_store: true, ..snapshot })
}

#[test]
fn the_last_good_snapshot_comes_back_marked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    assert_eq!(in_a_process(&path, &[&snapshot()]), SnapshotRead::default());
    assert_eq!(in_a_process(&path, &[]).snapshot, marked(snapshot()));
}

fn with_services(names: &[&str]) -> Snapshot {
    let named = |name: &&str| {
        let key = ServiceKey::new("default", *name);
        (key.clone(), Arc::new(Service { key, ..service() }))
    };
    Snapshot { services: Arc::new(names.iter().map(named).collect()), ..snapshot() }
}

#[test]
fn a_snapshot_holds_what_the_last_write_had_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut before = None;
    for (round, names) in [&["a", "b"][..], &["b", "c"], &["b", "c"], &[], &["d"]].into_iter().enumerate() {
        let read = in_a_process(&path, &[&with_services(&["z", "b"]), &with_services(names)]);
        assert_eq!(read.snapshot, before, "round {round}");
        before = marked(with_services(names));
    }
    assert_eq!(in_a_process(&path, &[]).snapshot, before);
}

#[test]
fn a_change_writes_its_objects_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let names: Vec<String> = (0..2_000).map(|i| format!("s{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let writer = LastGood::read(&path).unwrap().last_good;
    writer.save(&with_services(&names)).unwrap();
    // Whoever wrote it again would put it back.
    let raw = Store::open(&path).unwrap().store;
    raw.snapshot.remove(br#"services/"default/s7""#).unwrap().expect("each object has a record");
    drop(raw);
    writer.save(&with_services(&names[1..])).unwrap();
    let read = in_a_process(&path, &[]).snapshot.unwrap();
    assert_eq!(read.services.len(), 1_998);
    assert!(!read.services.contains_key(&ServiceKey::new("default", "s0")));
}

#[test]
fn a_store_that_was_damaged_between_two_writes_is_set_aside_and_written_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let writer = LastGood::read(&path).unwrap().last_good;
    writer.save(&with_services(&["a", "b"])).unwrap();
    drop(Store::open(&path).unwrap());
    fill_with_garbage(&path);
    writer.save(&with_services(&["b", "c"])).unwrap();
    assert!(folder.path().join("store.damaged-1").exists());
    assert_eq!(in_a_process(&path, &[]).snapshot, marked(with_services(&["b", "c"])));
}

fn put(path: &Path, name: &str, bytes: &[u8]) {
    let raw = Store::open(path).unwrap().store;
    raw.snapshot.insert(name, bytes).unwrap();
    raw.db.flush().unwrap();
}

#[test]
fn a_snapshot_in_one_piece_of_the_version_before_is_read_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let one_piece = serde_json::json!({"version": 1, "snapshot": with_services(&["a"])});
    put(&path, "last-good", &serde_json::to_vec(&one_piece).unwrap());
    assert_eq!(in_a_process(&path, &[&with_services(&["b"])]).snapshot, marked(with_services(&["a"])));
    assert_eq!(in_a_process(&path, &[]).snapshot, marked(with_services(&["b"])));
}

#[test]
fn a_snapshot_that_cannot_be_read_is_none_says_why_and_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    for (name, bytes, reason) in [
        ("last-good", &br#"{"version":99,"snapshot":{}}"#[..], "version 99"),
        ("last-good", b"{", "cannot be read"),
        ("last-good", br#"{"version":1,"snapshot":{}}"#, "missing field"),
        (r#"services/"default/a""#, b"{", "cannot be read"),
    ] {
        in_a_process(&path, &[&with_services(&["a"])]);
        put(&path, name, bytes);
        let read = in_a_process(&path, &[&with_services(&["b"])]);
        assert_eq!(read.snapshot, None);
        assert!(read.unreadable.clone().unwrap().contains(reason), "{read:?}");
        assert_eq!(in_a_process(&path, &[]).snapshot, marked(with_services(&["b"])), "{reason}");
    }
}

#[test]
fn a_read_only_disk_is_an_error_and_not_damage() {
    if !crate::kernel::testing::needs_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    crate::kernel::testing::run(&["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", path]);
    let opened = Store::open(folder.path().join("store"));
    crate::kernel::testing::run(&["umount", "-l", path]);
    let error = crate::reconcile::chain(&opened.unwrap_err());
    assert!(error.starts_with("open the store") && error.contains("Read-only"), "{error}");
}

#[test]
fn a_store_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    std::fs::create_dir(&path).unwrap();
    let _store = Store::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
}
