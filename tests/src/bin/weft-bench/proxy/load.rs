//! The Services of a big cluster, five endpoints each, at the API.

use std::ops::Range;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::pods::{Answerer, PORT};

const ENDPOINTS: usize = 5;
/// Requests at a time.
const AT_ONCE: usize = 16;
/// The one Service whose endpoints exist.
const PROBE: &str = "probe";
/// Its ClusterIP.
pub(super) const PROBE_IP: &str = "10.96.255.1";

/// Services `s0`, `s1` and so on, without pods behind them.
pub(super) async fn make(client: &kube::Client, services: Range<usize>) -> anyhow::Result<()> {
    let making = services.map(|n| {
        let client = client.clone();
        async move {
            let name = format!("s{n}");
            let service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
            create::<Service>(&client, service).await?;
            create::<EndpointSlice>(&client, slice(&name, endpoints(n), &["TCP"])).await
        }
    });
    futures::stream::iter(making).buffer_unordered(AT_ONCE).try_collect().await
}

/// TCP and UDP, to `pod` alone.
pub(super) async fn make_probe(client: &kube::Client, pod: &Answerer) -> anyhow::Result<()> {
    let ports = json!([{"name": "tcp", "port": 80, "protocol": "TCP"}, {"name": "udp", "port": 80, "protocol": "UDP"}]);
    let spec = json!({"clusterIP": PROBE_IP, "ports": ports});
    create::<Service>(client, json!({"metadata": {"name": PROBE}, "spec": spec})).await?;
    create::<EndpointSlice>(client, slice(PROBE, only(pod), &["TCP", "UDP"])).await
}

/// Sends the probe's clients to `pod` from now on.
pub(super) async fn move_probe(client: &kube::Client, pod: &Answerer) -> anyhow::Result<()> {
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let patch = Patch::Merge(json!({"endpoints": only(pod)}));
    slices.patch(PROBE, &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn create<K>(client: &kube::Client, object: Value) -> anyhow::Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), "default");
    api.create(&PostParams::default(), &serde_json::from_value(object)?).await.context("create an object")?;
    Ok(())
}

fn slice(service: &str, endpoints: Value, protocols: &[&str]) -> Value {
    let alone = protocols.len() == 1;
    let name = |protocol: &str| if alone { String::new() } else { protocol.to_lowercase() };
    let port = |protocol: &&str| json!({"name": name(protocol), "port": PORT, "protocol": protocol});
    json!({
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": protocols.iter().map(port).collect::<Vec<_>>(),
    })
}

fn endpoints(seed: usize) -> Value {
    let (third, first) = (seed % 250, seed / 250 * ENDPOINTS % 250);
    (0..ENDPOINTS)
        .map(|n| json!({"addresses": [format!("10.244.{third}.{}", first + n + 1)], "conditions": {"ready": true}}))
        .collect()
}

fn only(pod: &Answerer) -> Value {
    json!([{"addresses": [pod.ip], "conditions": {"ready": true}}])
}
