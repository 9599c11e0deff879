//! From the API server's answer to a changed EndpointSlice until its rule is in the kernel, among 1,000 Services.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;

use super::rig::{Rig, until};
use super::row::{Better, Row, median};

pub(crate) const SERVICES: usize = 1000;
const ENDPOINTS: usize = 5;
const CHANGES: usize = 50;

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rig = Rig::start(weft)?;
    rig.runtime.block_on(make_services(&rig.client))?;
    rig.start_agent()?;
    rig.await_ready()?;
    let socket = rig.folder.path().join("run/agent.sock");
    std::thread::sleep(Duration::from_secs(2));
    let slices: Api<EndpointSlice> = Api::namespaced(rig.client.clone(), "default");
    let mut seen = Vec::new();
    let mut passes = Vec::new();
    for change in 0..CHANGES {
        let before = proxy_report(&socket)?.0;
        let service = change * SERVICES / CHANGES;
        let name = format!("s{service}");
        let patch = Patch::Merge(json!({"endpoints": endpoints(service + 1)}));
        rig.runtime.block_on(slices.patch(&name, &PatchParams::default(), &patch))?;
        let answered_at = Instant::now();
        let mut micros = 0.0;
        until("the rule", || match proxy_report(&socket) {
            Ok((generation, took)) => {
                micros = took;
                generation > before
            }
            Err(_) => false,
        })
        .with_context(|| {
            format!("change {change} of {name} after generation {before}; now {:?}", proxy_report(&socket))
        })?;
        seen.push(answered_at.elapsed().as_secs_f64() * 1000.0);
        passes.push(micros / 1000.0);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(vec![
        Row::alone("endpoint change, API answer to rule, p50", "ms", median(seen), Better::Lower, 10.0),
        Row::alone("endpoint change, plan and apply, p50", "ms", median(passes), Better::Lower, 10.0),
    ])
}

fn endpoints(seed: usize) -> serde_json::Value {
    (0..ENDPOINTS)
        .map(|n| json!({"addresses": [format!("10.244.{}.{}", seed % 250, n + 2)], "conditions": {"ready": true}}))
        .collect()
}

pub(crate) async fn make_services(client: &kube::Client) -> anyhow::Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    for n in 0..SERVICES {
        let name = format!("s{n}");
        let service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
        services.create(&PostParams::default(), &serde_json::from_value(service)?).await?;
        let slice = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": endpoints(n),
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        });
        slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    }
    Ok(())
}

/// Generation that the proxy has applied, and how long its last pass took in microseconds.
fn proxy_report(socket: &Path) -> anyhow::Result<(u64, f64)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(b"GET /status HTTP/1.0\r\nHost: weft\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").context("no HTTP answer")?.1;
    let status: serde_json::Value = serde_json::from_str(body)?;
    let loops = status["loops"].as_array().context("no loops")?;
    let proxy = loops.iter().find(|report| report["name"] == "proxy").context("no proxy loop")?;
    let generation = proxy["generation"].as_u64().context("no generation")?;
    Ok((generation, proxy["last_pass_micros"].as_f64().context("no duration")?))
}
