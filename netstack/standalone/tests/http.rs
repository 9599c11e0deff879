//! What the server answers, request by request: codes, reasons, conflicts, selectors, deletion, watches.

#![allow(clippy::unwrap_used)] // tests

mod common;

use common::{World, client, send};
use futures::{AsyncBufReadExt as _, StreamExt as _};
use kube::Client;
use serde_json::{Value, json};
use weft_standalone::{Identity, Server};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "1"}})
}

/// Reads a watch until it has this many events or ends.
async fn watch(client: &Client, path: &str, count: usize) -> Vec<(String, Value)> {
    let request = axum::http::Request::get(path).body(Vec::new()).unwrap();
    let lines = client.request_stream(request).await.unwrap().lines();
    let events = lines.take(count).map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let events = events.map(|it| (it["type"].as_str().unwrap().to_owned(), it["object"].clone()));
    tokio::time::timeout(std::time::Duration::from_secs(10), events.collect()).await.expect("events in time")
}

fn summary(events: &[(String, Value)]) -> Vec<(&str, &str)> {
    events
        .iter()
        .map(|(kind, object)| (kind.as_str(), object["metadata"]["name"].as_str().unwrap_or_default()))
        .collect()
}

#[tokio::test]
async fn requests_without_a_known_token_are_unauthorized_but_health_is_public() {
    let world = World::new().await;
    let stranger = client(&world.server, "wrong").await;
    let (code, status) = send(&stranger, "GET", MAPS, "", "").await;
    assert_eq!((code, status["reason"].as_str()), (401, Some("Unauthorized")));
    assert_eq!(send(&stranger, "GET", "/readyz", "", "").await, (200, json!("ok")));
}

#[tokio::test]
async fn an_agents_token_changes_only_annotations_of_its_own_node() {
    let world = World::with(|it| it.tokens = vec![("agent-a".to_owned(), Identity::agent("a"))]).await;
    for name in ["a", "b"] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        assert_eq!(world.post("/api/v1/nodes", &node).await.0, 201);
    }
    let agent = client(&world.server, "agent-a").await;
    let annotate = json!({"metadata": {"annotations": {"weft.network/public-key": "k"}}}).to_string();
    let merge = "application/merge-patch+json";
    assert_eq!(send(&agent, "PATCH", "/api/v1/nodes/a", merge, &annotate).await.0, 200);
    assert_eq!(send(&agent, "PATCH", "/api/v1/nodes/b", merge, &annotate).await.0, 403);
    let label = json!({"metadata": {"labels": {"x": "y"}}}).to_string();
    assert_eq!(send(&agent, "PATCH", "/api/v1/nodes/a", merge, &label).await.0, 403);
    assert_eq!(send(&agent, "GET", "/api/v1/secrets", "", "").await.0, 403);
    assert_eq!(send(&agent, "GET", "/api/v1/services", "", "").await.0, 200);
}

#[tokio::test]
async fn creating_fills_in_metadata_and_refuses_duplicates_and_missing_namespaces() {
    let world = World::new().await;
    let (code, created) = world.post(MAPS, &map("a")).await;
    assert_eq!(code, 201);
    let metadata = &created["metadata"];
    assert_eq!(metadata["uid"].as_str().map(str::len), Some(36));
    assert!(metadata["creationTimestamp"].is_string() && metadata["resourceVersion"].is_string());
    let (code, status) = world.post(MAPS, &map("a")).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("AlreadyExists")));
    let (code, status) = world.post("/api/v1/namespaces/none/configmaps", &map("a")).await;
    assert_eq!((code, status["details"]["kind"].as_str()), (404, Some("namespaces")));
    let (code, status) = world.post(MAPS, &map("Bad_Name")).await;
    assert_eq!((code, status["details"]["causes"][0]["field"].as_str()), (422, Some("metadata.name")));
    let generated = json!({"metadata": {"generateName": "x-"}});
    let (code, created) = world.post(MAPS, &generated).await;
    assert_eq!((code, created["metadata"]["name"].as_str().map(str::len)), (201, Some(7)));
}

#[tokio::test]
async fn a_dry_run_answers_and_stores_nothing() {
    let world = World::new().await;
    let (code, created) = world.post(&format!("{MAPS}?dryRun=All"), &map("a")).await;
    assert_eq!((code, created["metadata"]["name"].as_str()), (201, Some("a")));
    assert_eq!(world.get(&format!("{MAPS}/a")).await.0, 404);
}

#[tokio::test]
async fn a_stale_resource_version_is_a_conflict() {
    let world = World::new().await;
    let (_, first) = world.post(MAPS, &map("a")).await;
    let mut changed = first.clone();
    changed["data"]["k"] = json!("2");
    let (code, second) = world.put(&format!("{MAPS}/a"), &changed).await;
    assert_eq!(code, 200);
    assert_ne!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    changed["data"]["k"] = json!("3");
    let (code, status) = world.put(&format!("{MAPS}/a"), &changed).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("Conflict")));
    let (_, same) = world.put(&format!("{MAPS}/a"), &second).await;
    assert_eq!(same, second, "an update that changes nothing makes no revision");
}

#[tokio::test]
async fn patches_are_json_merge_or_strategic_and_apply_is_unsupported() {
    let world = World::new().await;
    world.post(MAPS, &map("a")).await;
    let path = format!("{MAPS}/a");
    let patch = r#"[{"op": "test", "path": "/data/k", "value": "1"}, {"op": "add", "path": "/data/l", "value": "2"}]"#;
    let (code, object) = world.http("PATCH", &path, "application/json-patch+json", patch).await;
    assert_eq!((code, &object["data"]), (200, &json!({"k": "1", "l": "2"})));
    let (code, object) =
        world.http("PATCH", &path, "application/merge-patch+json", r#"{"data": {"k": null}}"#).await;
    assert_eq!((code, &object["data"]), (200, &json!({"l": "2"})));
    let wrong = r#"[{"op": "test", "path": "/data/l", "value": "9"}]"#;
    assert_eq!(world.http("PATCH", &path, "application/json-patch+json", wrong).await.0, 422);
    assert_eq!(world.http("PATCH", &path, "application/apply-patch+yaml", "{}").await.0, 415);
    assert_eq!(world.http("PATCH", MAPS, "application/merge-patch+json", "{}").await.0, 405);
    assert_eq!(world.get("/apis/apps/v1/deployments").await.0, 404);
}

#[tokio::test]
async fn lists_select_by_labels_and_fields() {
    let world = World::new().await;
    for (name, node, app) in [("a", "n1", "web"), ("b", "n2", "web"), ("c", "n1", "db")] {
        let pod = json!({"metadata": {"name": name, "labels": {"app": app}},
            "spec": {"nodeName": node, "containers": [{"name": "x", "image": "i"}]}});
        assert_eq!(world.post("/api/v1/namespaces/default/pods", &pod).await.0, 201);
    }
    let names = async |query: &str| {
        let (code, list) = world.get(&format!("/api/v1/pods?{query}")).await;
        assert_eq!((code, list["kind"].as_str()), (200, Some("PodList")));
        let items = list["items"].as_array().unwrap().iter();
        items.map(|it| it["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("labelSelector=app%20in%20(web)").await, ["a", "b"]);
    assert_eq!(names("fieldSelector=spec.nodeName%3Dn1").await, ["a", "c"]);
    assert_eq!(names("labelSelector=app!%3Dweb&fieldSelector=metadata.name%3Dc").await, ["c"]);
    assert_eq!(world.get("/api/v1/pods?fieldSelector=spec.x%3Dy").await.0, 400);
}

#[tokio::test]
async fn a_list_comes_in_parts_whose_revision_is_that_of_the_first() {
    let world = World::with(|it| it.history_capacity = 8).await;
    for name in ["a", "b", "c", "d", "e"] {
        world.post(MAPS, &map(name)).await;
    }
    let part = async |query: &str| {
        let (code, list) = world.get(&format!("{MAPS}?limit=2{query}")).await;
        let text = |path: &str| list["metadata"][path].as_str().unwrap_or_default().to_owned();
        let items = list["items"].as_array().into_iter().flatten();
        let names: Vec<_> = items.map(|it| it["metadata"]["name"].as_str().unwrap().to_owned()).collect();
        (code, names, text("resourceVersion"), text("continue"))
    };
    let (_, names, revision, first) = part("").await;
    assert_eq!(names, ["a", "b"]);
    // One that was listed goes, one that was not goes, and one comes where the list is to go on.
    for name in ["b", "c"] {
        assert_eq!(world.http("DELETE", &format!("{MAPS}/{name}"), "", "").await.0, 200);
    }
    world.post(MAPS, &map("bb")).await;
    let (_, names, of_second, second) = part(&format!("&continue={first}")).await;
    assert_eq!((names, of_second), (vec!["bb".to_owned(), "d".to_owned()], revision.clone()));
    let (_, names, of_third, end) = part(&format!("&continue={second}")).await;
    assert_eq!((names, of_third, end.as_str()), (vec!["e".to_owned()], revision.clone(), ""));
    // What changed between is in the watch from there.
    let events = watch(&world.client, &format!("{MAPS}?watch=true&resourceVersion={revision}"), 3).await;
    assert_eq!(summary(&events), [("DELETED", "b"), ("DELETED", "c"), ("ADDED", "bb")]);
    let (_, names, _, whole) = part("&fieldSelector=metadata.name%3Dd").await;
    assert_eq!((names, whole.as_str()), (vec!["d".to_owned()], ""));
    assert_eq!(part("&continue=x").await.0, 400);
    assert_eq!(part(&format!("&continue={first}&resourceVersion={revision}")).await.0, 400);
    for round in 0..9 {
        world.post(MAPS, &map(&format!("f{round}"))).await;
    }
    assert_eq!(part(&format!("&continue={first}")).await.0, 410, "the history begins later");
}

#[tokio::test]
async fn finalizers_hold_a_deleted_object_until_they_are_gone() {
    let world = World::new().await;
    let mut object = map("a");
    object["metadata"]["finalizers"] = json!(["example.org/hold"]);
    world.post(MAPS, &object).await;
    let path = format!("{MAPS}/a");
    let stale = json!({"preconditions": {"uid": "other"}}).to_string();
    assert_eq!(world.http("DELETE", &path, "application/json", &stale).await.0, 409);
    let (code, held) = world.http("DELETE", &path, "application/json", "").await;
    assert_eq!((code, held["kind"].as_str()), (200, Some("ConfigMap")));
    assert!(world.get(&path).await.1["metadata"]["deletionTimestamp"].is_string());
    let release = r#"{"metadata": {"finalizers": null}}"#;
    assert_eq!(world.http("PATCH", &path, "application/merge-patch+json", release).await.0, 200);
    assert_eq!(world.get(&path).await.0, 404);
}

#[tokio::test]
async fn a_deleted_namespace_takes_its_content_with_it() {
    let world = World::new().await;
    world.post("/api/v1/namespaces", &json!({"metadata": {"name": "shop"}})).await;
    let (_, namespace) = world.get("/api/v1/namespaces/shop").await;
    assert_eq!(namespace["metadata"]["labels"]["kubernetes.io/metadata.name"], "shop");
    let mut held = map("held");
    held["metadata"]["finalizers"] = json!(["example.org/hold"]);
    world.post("/api/v1/namespaces/shop/configmaps", &map("a")).await;
    world.post("/api/v1/namespaces/shop/configmaps", &held).await;
    assert_eq!(world.http("DELETE", "/api/v1/namespaces/shop", "", "").await.0, 200);
    common::eventually("content gone", || async {
        let (_, list) = world.get("/api/v1/namespaces/shop/configmaps").await;
        (list["items"].as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    let (code, status) = world.post("/api/v1/namespaces/shop/configmaps", &map("late")).await;
    assert_eq!(
        (code, status["details"]["causes"][0]["reason"].as_str()),
        (403, Some("NamespaceTerminating"))
    );
    let release = r#"{"metadata": {"finalizers": null}}"#;
    world
        .http("PATCH", "/api/v1/namespaces/shop/configmaps/held", "application/merge-patch+json", release)
        .await;
    common::eventually("namespace gone", || async {
        (world.get("/api/v1/namespaces/shop").await.0 == 404).then_some(())
    })
    .await;
    assert_eq!(world.http("DELETE", "/api/v1/namespaces/default", "", "").await.0, 403);
}

#[tokio::test]
async fn a_watch_starts_with_what_there_is_and_ends_its_first_part_with_a_bookmark() {
    let world = World::new().await;
    world.post(MAPS, &map("a")).await;
    let events = watch(&world.client, &format!("{MAPS}?watch=true"), 1).await;
    assert_eq!(summary(&events), [("ADDED", "a")]);
    let query =
        "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let events = watch(&world.client, &format!("{MAPS}?{query}"), 2).await;
    assert_eq!(summary(&events), [("ADDED", "a"), ("BOOKMARK", "")]);
    assert_eq!(events[1].1["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let wrong = world.get(&format!("{MAPS}?watch=true&sendInitialEvents=true")).await;
    assert_eq!(wrong.0, 422);
    let ended = watch(&world.client, &format!("{MAPS}?watch=true&timeoutSeconds=1"), 9).await;
    assert_eq!(summary(&ended), [("ADDED", "a")], "the server ends it after the time asked for");
}

#[tokio::test]
async fn a_watch_with_a_selector_sees_objects_come_and_go() {
    let world = World::new().await;
    let (_, first) = world.post(MAPS, &map("a")).await;
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap();
    let merge = "application/merge-patch+json";
    let path = format!("{MAPS}/a");
    for labels in [json!({"app": "web"}), json!({"x": "y"}), json!({"app": null})] {
        world.http("PATCH", &path, merge, &json!({"metadata": {"labels": labels}}).to_string()).await;
    }
    world.http("DELETE", &path, "", "").await;
    let selected = format!("{MAPS}?watch=true&resourceVersion={revision}&timeoutSeconds=1");
    let events = watch(&world.client, &format!("{selected}&labelSelector=app%3Dweb"), 9).await;
    assert_eq!(summary(&events), [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]);
    let events = watch(&world.client, &selected, 9).await;
    assert_eq!(summary(&events), [("MODIFIED", "a"), ("MODIFIED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]);
}

#[tokio::test]
async fn a_watch_from_before_the_history_gets_410() {
    let world = World::with(|it| it.history_capacity = 3).await;
    let (_, first) = world.post(MAPS, &map("a")).await;
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    for round in 0..5 {
        world.post(MAPS, &map(&format!("b{round}"))).await;
    }
    let events = watch(&world.client, &format!("{MAPS}?watch=true&resourceVersion={revision}"), 9).await;
    assert_eq!((events.len(), events[0].0.as_str()), (1, "ERROR"));
    assert_eq!((events[0].1["code"].as_u64(), events[0].1["reason"].as_str()), (Some(410), Some("Expired")));
    let future = watch(&world.client, &format!("{MAPS}?watch=true&resourceVersion=99999999"), 9).await;
    assert_eq!(future[0].1["code"], 410, "a revision of another life of the store");
}

#[tokio::test]
async fn after_a_clean_restart_a_watch_resumes_where_it_was() {
    let world = World::new().await;
    let (_, first) = world.post(MAPS, &map("a")).await;
    world.post(MAPS, &map("b")).await;
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let token = world.server.admin_token().to_owned();
    let (ca, directory) = (world.server.ca_pem().to_owned(), world.directory);
    world.server.shutdown().await.unwrap();

    let server = Server::start(common::config(directory.path())).unwrap();
    assert_eq!((server.admin_token(), server.ca_pem()), (token.as_str(), ca.as_str()));
    let again = client(&server, &token).await;
    let path = format!("{MAPS}?watch=true&resourceVersion={revision}&timeoutSeconds=1");
    let events = watch(&again, &path, 9).await;
    assert!(events.iter().any(|(kind, it)| kind != "ERROR" && it["metadata"]["name"] == "b"), "{events:?}");
}

#[tokio::test]
async fn tables_partial_metadata_and_both_kinds_of_event_are_served() {
    let world = World::new().await;
    let request = |accept: &str| {
        let request = axum::http::Request::get("/api/v1/namespaces").header("accept", accept);
        request.body(Vec::new()).unwrap()
    };
    let table: Value = world
        .client
        .request(request("application/json;as=Table;v=v1;g=meta.k8s.io,application/json"))
        .await
        .unwrap();
    assert_eq!(table["columnDefinitions"][0]["name"], "Name");
    assert_eq!(table["rows"][0]["cells"].as_array().unwrap()[..2], [json!("default"), json!("Active")]);
    let partial: Value = world
        .client
        .request(request("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"))
        .await
        .unwrap();
    assert_eq!(partial["kind"], "PartialObjectMetadataList");
    assert!(partial["items"][0].get("spec").is_none());

    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}, "reason": "Started",
        "type": "Normal", "action": "Start", "note": "hello", "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "weft", "reportingInstance": "a", "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}});
    let (code, _) = world.post("/apis/events.k8s.io/v1/namespaces/default/events", &event).await;
    assert_eq!(code, 201);
    let (_, list) = world.get("/api/v1/events?fieldSelector=involvedObject.name%3Dp").await;
    assert_eq!(
        (&list["items"][0]["message"], &list["items"][0]["involvedObject"]["kind"]),
        (&json!("hello"), &json!("Pod"))
    );
    let (_, wire) = world.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await;
    assert_eq!(
        (wire["note"].as_str(), wire["apiVersion"].as_str()),
        (Some("hello"), Some("events.k8s.io/v1"))
    );
}

#[tokio::test]
async fn controllers_come_to_rest() {
    let world = World::new().await;
    let service =
        json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    world.post("/api/v1/namespaces/default/services", &service).await;
    world.post("/api/v1/nodes", &json!({"metadata": {"name": "a"}})).await;
    let revision = async || world.get("/api/v1/nodes").await.1["metadata"]["resourceVersion"].clone();
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    let before = revision().await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(revision().await, before, "nothing changes by itself");
}
