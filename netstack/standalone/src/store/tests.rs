//! The store across writes, restarts and crashes.

use serde_json::json;

use super::*;

fn put(store: &Store, name: &str, data: &str) -> u64 {
    let key = Key::new("configmaps", "default", name);
    let object = json!({"metadata": {"name": name, "namespace": "default"}, "data": {"key": data}});
    store.commit(|_| Ok(vec![Change::Put(key, object)])).unwrap()[0].revision
}

#[tokio::test]
async fn a_flushed_write_is_there_after_an_unclean_end_and_old_watches_are_expired() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), 8).unwrap();
    let revision = put(&store, "a", "1");
    store.durable(revision).await.unwrap();
    drop(store);

    let store = Store::open(directory.path(), 8).unwrap();
    store.read(|view| {
        assert!(view.get(&Key::new("configmaps", "default", "a")).is_some());
        assert!(view.revision() > revision);
        assert_eq!(view.events_after(revision).err().map(|it| it.code), Some(410));
    });
}

#[tokio::test]
async fn after_a_clean_end_watches_resume_where_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), 8).unwrap();
    let first = put(&store, "a", "1");
    put(&store, "b", "1");
    store.commit(|_| Ok(vec![Change::Delete(Key::new("configmaps", "default", "a"))])).unwrap();
    store.close().unwrap();
    drop(store);

    let store = Store::open(directory.path(), 8).unwrap();
    store.read(|view| {
        let events: Vec<_> =
            view.events_after(first).unwrap().map(|it| (it.kind, it.object.key.name.clone())).collect();
        assert_eq!(events, [(EventKind::Modified, "b".to_owned()), (EventKind::Deleted, "a".to_owned())]);
        assert_eq!(view.revision(), first + 2);
    });
}

#[tokio::test]
async fn a_store_that_is_being_closed_is_waited_for_and_one_in_use_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), 8).unwrap();
    assert!(matches!(Store::open(directory.path(), 8), Err(StoreError::Open { .. })));
    let closing = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(store);
    });
    Store::open(directory.path(), 8).unwrap();
    closing.join().unwrap();
}

#[tokio::test]
async fn the_history_is_bounded_and_says_when_it_is_too_old() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), 4).unwrap();
    let first = put(&store, "a", "0");
    for round in 0..4 {
        put(&store, "a", &round.to_string());
    }
    store.read(|view| {
        assert_eq!(view.events_after(first).unwrap().count(), 4);
        assert_eq!(view.events_after(first - 1).err().map(|it| it.reason), Some("Expired"));
        assert!(view.events_after(view.revision() + 1).is_err(), "a revision of another life");
    });
}

#[tokio::test]
async fn claims_move_with_their_objects() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), 4).unwrap();
    let key = Key::new("services", "default", "a");
    let service = |ip: &str| {
        json!({"metadata": {"name": "a", "namespace": "default"},
            "spec": {"clusterIPs": [ip], "ports": [{"port": 1, "protocol": "UDP", "nodePort": 30000}]}})
    };
    store.commit(|_| Ok(vec![Change::Put(key.clone(), service("10.0.0.1"))])).unwrap();
    store.commit(|_| Ok(vec![Change::Put(key.clone(), service("10.0.0.2"))])).unwrap();
    store.read(|view| {
        assert_eq!(view.holder("ip/10.0.0.1"), None);
        assert_eq!(view.holder("ip/10.0.0.2"), Some(&key));
        assert_eq!(view.holder("port/UDP/30000"), Some(&key));
    });
    store.commit(|_| Ok(vec![Change::Delete(key.clone())])).unwrap();
    store.read(|view| assert_eq!(view.holder("ip/10.0.0.2"), None));
}
