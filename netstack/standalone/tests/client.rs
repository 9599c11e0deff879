//! The real `kube` client against the server: its watcher in both strategies, its Api verbs, and a server killed with -9.

#![allow(clippy::unwrap_used)] // tests

mod common;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use common::World;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event};
use serde_json::json;

fn typed<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn ready_pod(name: &str, node: &str, addresses: [&str; 2]) -> (Pod, Pod) {
    let spec = json!({"nodeName": node, "containers": [{"name": "web", "image": "web",
        "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}]});
    let metadata = json!({"name": name, "labels": {"app": "web"}});
    let status = json!({"phase": "Running", "podIP": addresses[0], "podIPs": addresses.map(|ip| json!({"ip": ip})),
        "conditions": [{"type": "Ready", "status": "True"}]});
    (
        typed(json!({"metadata": metadata, "spec": spec})),
        typed(json!({"metadata": metadata, "spec": spec, "status": status})),
    )
}

async fn follow(config: watcher::Config) {
    let world = World::new().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let map = |name: &str| typed::<ConfigMap>(json!({"metadata": {"name": name}}));
    maps.create(&PostParams::default(), &map("a")).await.unwrap();
    let mut events = Box::pin(watcher::watcher(maps.clone(), config));
    let mut seen = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(std::time::Duration::from_secs(10), events.next()).await
    {
        match event.unwrap() {
            Event::Init => seen.push("init".to_owned()),
            Event::InitApply(it) => seen.push(format!("initial {}", it.metadata.name.unwrap())),
            Event::InitDone => {
                seen.push("done".to_owned());
                maps.create(&PostParams::default(), &map("b")).await.unwrap();
                maps.delete("a", &kube::api::DeleteParams::default()).await.unwrap();
            }
            Event::Apply(it) => seen.push(format!("apply {}", it.metadata.name.unwrap())),
            Event::Delete(it) => {
                seen.push(format!("delete {}", it.metadata.name.unwrap()));
                break;
            }
        }
    }
    assert_eq!(seen, ["init", "initial a", "done", "apply b", "delete a"]);
}

#[tokio::test]
async fn the_watcher_follows_by_list_and_watch() {
    follow(watcher::Config::default()).await;
}

#[tokio::test]
async fn the_watcher_follows_by_streaming_lists() {
    follow(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn nodes_get_ranges_and_services_get_endpoints_of_ready_pods() {
    let world = World::new().await;
    let nodes: Api<Node> = Api::all(world.client.clone());
    for name in ["node-a", "node-b"] {
        nodes.create(&PostParams::default(), &typed(json!({"metadata": {"name": name}}))).await.unwrap();
    }
    let node = common::eventually("a node range", || async {
        nodes.get("node-b").await.unwrap().spec.and_then(|it| it.pod_cidrs)
    })
    .await;
    assert_eq!(node, ["10.244.1.0/24", "fd00:10:244:1::/64"]);

    let pods: Api<Pod> = Api::namespaced(world.client.clone(), "default");
    let services: Api<Service> = Api::namespaced(world.client.clone(), "default");
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"port": 80, "targetPort": "http"}]}});
    let service = services.create(&PostParams::default(), &typed(service)).await.unwrap();
    assert_eq!(service.spec.unwrap().cluster_ips.unwrap().len(), 2);
    let (pod, status) = ready_pod("web-1", "node-a", ["10.244.0.2", "fd00:10:244::2"]);
    pods.create(&PostParams::default(), &pod).await.unwrap();
    pods.replace_status("web-1", &PostParams::default(), &status).await.unwrap();

    let slices: Api<EndpointSlice> = Api::namespaced(world.client.clone(), "default");
    let of_web = ListParams::default().labels("kubernetes.io/service-name=web");
    let addresses = async || {
        let mut found = BTreeMap::new();
        for slice in slices.list(&of_web).await.unwrap() {
            let endpoints = slice.endpoints.into_iter();
            let ready = endpoints.filter(|it| it.conditions.as_ref().and_then(|it| it.ready) == Some(true));
            found.insert(slice.address_type, ready.flat_map(|it| it.addresses).collect::<Vec<_>>());
        }
        found
    };
    let both = BTreeMap::from([
        ("IPv4".to_owned(), vec!["10.244.0.2".to_owned()]),
        ("IPv6".to_owned(), vec!["fd00:10:244::2".to_owned()]),
    ]);
    common::eventually("both slices", || async { (addresses().await == both).then_some(()) }).await;
    let port = slices.list(&of_web).await.unwrap().items[0].ports.clone().unwrap()[0].port;
    assert_eq!(port, Some(8080), "the target port's name is looked up in the pod");

    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    pods.patch_status("web-1", &PatchParams::default(), &Patch::Merge(unready)).await.unwrap();
    common::eventually("not ready", || async { addresses().await.values().all(Vec::is_empty).then_some(()) })
        .await;

    nodes.delete("node-a", &kube::api::DeleteParams::default()).await.unwrap();
    common::eventually("the node's pod is gone", || async {
        pods.get_opt("web-1").await.unwrap().is_none().then_some(())
    })
    .await;
    services.delete("web", &kube::api::DeleteParams::default()).await.unwrap();
    common::eventually("slices gone", || async {
        slices.list(&of_web).await.unwrap().items.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn endpoints_made_by_hand_are_mirrored_and_the_kubernetes_service_leads_here() {
    let world = World::new().await;
    let services: Api<Service> = Api::namespaced(world.client.clone(), "default");
    let endpoints: Api<Endpoints> = Api::namespaced(world.client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(world.client.clone(), "default");
    let ours = slices.get("kubernetes").await.unwrap();
    assert_eq!(ours.endpoints[0].addresses, ["192.0.2.1"]);
    assert_eq!(
        services.get("kubernetes").await.unwrap().spec.unwrap().cluster_ip.as_deref(),
        Some("10.96.0.1")
    );

    let service = json!({"metadata": {"name": "outside"}, "spec": {"ports": [{"port": 80}]}});
    services.create(&PostParams::default(), &typed(service)).await.unwrap();
    let by_hand = json!({"metadata": {"name": "outside"}, "subsets": [{"addresses": [{"ip": "192.0.2.9"}, {"ip": "2001:db8::9"}],
        "ports": [{"port": 8080}]}]});
    endpoints.create(&PostParams::default(), &typed(by_hand)).await.unwrap();
    let of_outside = ListParams::default().labels("kubernetes.io/service-name=outside");
    let mirrored = common::eventually("mirrored slices", || async {
        let items = slices.list(&of_outside).await.unwrap().items;
        (items.len() == 2).then_some(items)
    })
    .await;
    let mut addresses: Vec<String> =
        mirrored.into_iter().flat_map(|it| it.endpoints).flat_map(|it| it.addresses).collect();
    addresses.sort();
    assert_eq!(addresses, ["192.0.2.9", "2001:db8::9"]);
}

/// Not a test of its own: the process that `everything_answered_survives_kill_9` starts and kills.
#[tokio::test]
#[ignore = "run by everything_answered_survives_kill_9"]
async fn server_process() {
    let directory = std::env::var("WEFT_TEST_DATA").unwrap();
    let server = weft_standalone::Server::start(common::config(directory.as_ref())).unwrap();
    let path = std::path::Path::new(&directory).join("kubeconfig");
    server.write_kubeconfig(&path, server.addresses()[0], server.admin_token()).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_answered_survives_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    let mut answered = Vec::new();
    for round in 0..3 {
        let _ = std::fs::remove_file(&kubeconfig);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server_process", "--ignored"])
            .env("WEFT_TEST_DATA", directory.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let client = common::eventually("the server", || async {
            let config = kube::config::Kubeconfig::read_from(&kubeconfig).ok()?;
            let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.ok()?;
            kube::Client::try_from(config).ok()
        })
        .await;
        let maps: Api<ConfigMap> = Api::namespaced(client, "default");
        let found: BTreeMap<_, _> = maps
            .list(&ListParams::default())
            .await
            .unwrap()
            .into_iter()
            .map(|it| (it.metadata.name.unwrap(), it.metadata.resource_version.unwrap()))
            .collect();
        for (name, revision) in &answered {
            assert_eq!(found.get(name), Some(revision), "{name} was answered before the kill");
        }
        let writer = tokio::spawn(async move {
            let mut done = Vec::new();
            for index in 0.. {
                let object = typed(json!({"metadata": {"name": format!("m{round}-{index}")}}));
                let Ok(created) = maps.create(&PostParams::default(), &object).await else { return done };
                done.push((created.metadata.name.unwrap(), created.metadata.resource_version.unwrap()));
            }
            done
        });
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let done = writer.await.unwrap();
        assert!(!done.is_empty(), "some writes were answered");
        let last = |it: &[(String, String)]| it.last().map(|(_, revision)| revision.parse::<u64>().unwrap());
        assert!(last(&done) > last(&answered), "revisions only grow");
        answered.extend(done);
    }
}
