//! Ingresses at the API of a real agent with its proxy beside it: how long until they are served, and whether a running load notices.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use kube::api::{Api, PostParams};
use serde_json::json;

use super::super::rig::{Rig, until, until_within};
use super::super::row::{Better, Row, median};
use super::backend::Backend;
use super::load::{Said, ask, h2load};
use super::peers::pss_kb;
use super::table::{host, ingress, slice};

const FLAGS: [&str; 2] = ["--ingress", "on"];
/// Where the ingress of the node listens.
const LISTENS: &str = "10.244.0.2:8080";
/// Addresses of the node, where the backend answers.
const ENDPOINTS: [(&str, &str); 2] = [("IPv4", "172.31.0.1"), ("IPv6", "fd00:31::1")];
/// Of an Ingress, which has one host.
const PATHS: usize = 10;
const CHANGES: usize = 30;
const BETWEEN_CHANGES: Duration = Duration::from_millis(200);
/// Requests at a time at the API.
const AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rig = Rig::start(weft)?;
    let run = rig.folder.path().join("run");
    // The user of the ingress has to come through.
    std::fs::set_permissions(rig.folder.path(), PermissionsExt::from_mode(0o755))?;
    let _backend = Backend::start(rig.folder.path())?;
    rig.runtime.block_on(make_service(&rig.client))?;
    rig.start_agent_with(&FLAGS)?;
    rig.await_ready()?;
    let mut proxy = Serve::start(weft, &run)?;
    std::thread::sleep(Duration::from_secs(2));
    let before = (rig.resident_mib("agent")?, proxy.memory_mib()?);
    let (mut made, mut rows) = (0, Vec::new());
    for (name, routes) in [("1,000 routes", 1_000), ("10,000 routes", 10_000)] {
        let hosts = routes / PATHS;
        rig.runtime.block_on(make_ingresses(&rig.client, made..hosts))?;
        made = hosts;
        until_within(PATIENCE, "the last route", || served(&host(hosts - 1)))?;
        let (changes, said) = changes(&rig, routes)?;
        let after = (rig.resident_mib("agent")?, proxy.memory_mib()?);
        drop(proxy);
        let (again, took) = from_nothing(&mut rig, weft, &run, &host(hosts - 1))?;
        proxy = again;
        let few = routes == 1_000;
        let mut figure = |what: &str, unit, figure: f64, target: Option<f64>| {
            rows.push(Row::alone(&format!("{name}: {what}"), unit, figure, Better::Lower, target));
        };
        figure("a host more, from the API's answer until served", "ms", median(changes.clone()), Some(30.0));
        figure("the longest of these", "ms", changes.into_iter().fold(0.0, f64::max), None);
        figure("requests that failed meanwhile, of some 10,000", "", said.failed, Some(0.0));
        figure("agent and proxy started with none, until served", "s", took, few.then_some(1.0));
        figure("memory of the agent for them", "MiB", after.0 - before.0, None);
        figure("memory of the proxy for them", "MiB", after.1 - before.1, None);
    }
    Ok(rows)
}

/// The proxy of the node.
struct Serve(Child);

impl Serve {
    fn start(weft: &Path, run: &PathBuf) -> anyhow::Result<Self> {
        let mut command = Command::new(weft);
        command.args(["ingress", "serve", "--run-dir"]).arg(run).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    fn memory_mib(&self) -> anyhow::Result<f64> {
        Ok(pss_kb(self.0.id())? / 1024.0)
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address() -> SocketAddr {
    LISTENS.parse().expect("the constant is a socket address")
}

fn served(host: &str) -> bool {
    TcpStream::connect(address()).is_ok_and(|stream| ask(&stream, host, &last_path()).is_ok())
}

fn last_path() -> String {
    format!("/p{}", PATHS - 1)
}

async fn make_service(client: &kube::Client) -> anyhow::Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let spec = json!({"ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]});
    let service = json!({"metadata": {"name": "web"}, "spec": spec});
    services.create(&PostParams::default(), &serde_json::from_value(service)?).await?;
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    for (family, address) in ENDPOINTS {
        let mut slice = slice("web", family, address);
        slice["metadata"]["name"] = format!("web-{}", family.to_lowercase()).into();
        slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    }
    Ok(())
}

async fn make_ingresses(client: &kube::Client, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    let making = numbers.map(|number| make_ingress(client, host(number)));
    futures::stream::iter(making).buffer_unordered(AT_ONCE).try_collect().await
}

async fn make_ingress(client: &kube::Client, host: String) -> anyhow::Result<()> {
    let api: Api<Ingress> = Api::namespaced(client.clone(), "default");
    let paths: Vec<String> = (0..PATHS).map(|n| format!("/p{n}")).collect();
    let object = serde_json::from_value(ingress(&host, &paths, "web"))?;
    api.create(&PostParams::default(), &object).await.context("make an Ingress")?;
    Ok(())
}

/// Milliseconds of each, and what a load of 1,000 requests a second says that runs meanwhile.
fn changes(rig: &Rig, routes: usize) -> anyhow::Result<(Vec<f64>, Said)> {
    let load = std::thread::spawn(|| {
        let options = ["--h1", "-c", "20", "--rps", "50", "-D", "10"];
        h2load(address(), &options, &[format!("http://{}/p0", host(0))])
    });
    std::thread::sleep(Duration::from_secs(1));
    let mut took = Vec::new();
    for n in 0..CHANGES {
        let host = format!("more{n}-{routes}.bench");
        rig.runtime.block_on(make_ingress(&rig.client, host.clone()))?;
        let answered_at = Instant::now();
        until("a route more", || served(&host))?;
        took.push(answered_at.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(BETWEEN_CHANGES);
    }
    let said = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
    ensure!(said.done > 5_000.0, "the load got {} answers only", said.done);
    Ok((took, said))
}

/// Seconds from the start of both until the last route is served; nothing was written before.
fn from_nothing(rig: &mut Rig, weft: &Path, run: &PathBuf, host: &str) -> anyhow::Result<(Serve, f64)> {
    let mut took = Vec::new();
    let mut proxy = None;
    for _ in 0..3 {
        drop(proxy.take());
        rig.stop_agent()?;
        std::fs::remove_file(run.join("ingress/routes.json"))?;
        proxy = Some(Serve::start(weft, run)?);
        let started_at = rig.start_agent_alone(&FLAGS)?;
        until_within(PATIENCE, "the last route", || served(host))?;
        took.push(started_at.elapsed().as_secs_f64());
    }
    Ok((proxy.context("a proxy")?, median(took)))
}
