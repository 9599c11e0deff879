//! The names of a large cluster: 10,000 dual-stack Services with a named port in 100 Namespaces, and 1,000 headless ones of 50 pods.

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, PostParams};
use serde_json::json;

const NAMESPACES: usize = 100;
const SERVICES: usize = 10_000;
const SETS: usize = 1000;
const PODS: usize = 50;
const AT_ONCE: usize = 16;

/// Names of those that are made last.
pub(super) const LAST_SERVICE: [&str; 5] = ["svc-99", "ns-99", "svc", "cluster", "local"];
pub(super) const LAST_SET: [&str; 5] = ["set-9", "ns-99", "svc", "cluster", "local"];

pub(super) async fn make(client: &kube::Client) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for n in 0..NAMESPACES {
        let namespace = serde_json::from_value(json!({"metadata": {"name": format!("ns-{n}")}}))?;
        namespaces.create(&PostParams::default(), &namespace).await?;
    }
    let services = (0..SERVICES).map(|n| make_service(client, n));
    futures::stream::iter(services).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let sets = (0..SETS).map(|n| make_set(client, n));
    futures::stream::iter(sets).buffer_unordered(AT_ONCE).try_collect().await
}

async fn make_service(client: &kube::Client, n: usize) -> anyhow::Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), &format!("ns-{}", n % NAMESPACES));
    let ports = json!([{"name": "http", "port": 80}]);
    let spec = json!({"ipFamilyPolicy": "RequireDualStack", "ports": ports});
    let name = format!("svc-{}", n / NAMESPACES);
    let service = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
    services.create(&PostParams::default(), &service).await.context("create a Service")?;
    Ok(())
}

async fn make_set(client: &kube::Client, n: usize) -> anyhow::Result<()> {
    let namespace = format!("ns-{}", n % NAMESPACES);
    let name = format!("set-{}", n / NAMESPACES);
    let ports = json!([{"name": "http", "port": 8080, "protocol": "TCP"}]);
    let spec = json!({"clusterIP": "None", "ports": ports});
    let service = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
    let services: Api<Service> = Api::namespaced(client.clone(), &namespace);
    services.create(&PostParams::default(), &service).await.context("create a headless Service")?;
    let address = |pod: usize| format!("10.244.{}.{}", n / 4, n % 4 * PODS + pod + 1);
    let endpoints: Vec<_> =
        (0..PODS).map(|pod| json!({"addresses": [address(pod)], "conditions": {"ready": true}})).collect();
    let slice = serde_json::from_value(json!({
        "metadata": {"name": format!("{name}-4"), "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": ports,
    }))?;
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace);
    slices.create(&PostParams::default(), &slice).await.context("create an EndpointSlice")?;
    Ok(())
}
