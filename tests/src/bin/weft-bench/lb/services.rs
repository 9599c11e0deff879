//! 1,000 LoadBalancer Services of one node: until each has its addresses, and what the role costs when nothing happens.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, ListParams, PostParams, WatchEvent, WatchParams};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use weft_netstack::kernel::lan::Arp;

use crate::rig::{Rig, cpu_seconds, ip, private_names};
use crate::row::{Better, Row, percentile};

const SERVICES: usize = 1000;
const IDLE: Duration = Duration::from_secs(20);
const QUESTIONS: usize = 1000;

pub(super) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    private_names()?;
    let mut rig = Rig::start(weft)?;
    ip("netns add client")?;
    ip("link set up1 netns client")?;
    ip("-n client addr add 172.31.200.1/16 dev up1")?;
    ip("-n client link set up1 up")?;
    ip("addr add 172.31.0.2/16 dev up0")?;
    rig.runtime.block_on(make_services(&rig.client))?;
    rig.start_agent_with(&[])?;
    rig.await_ready()?;
    std::thread::sleep(Duration::from_secs(10));
    let allocated = rig.runtime.block_on(allocate(&rig.client))?;
    std::thread::sleep(Duration::from_secs(5));
    let answers = arp_millis()?;
    let after_allocation = rig.resident_mib("agent")?;
    // The same cluster with the role and without it, both from a fresh start, for what it costs.
    rig.end_agent()?;
    rig.start_agent_with(&[])?;
    let with = idle(&rig)?;
    rig.end_agent()?;
    rig.start_agent_with(&["--load-balancer", "off"])?;
    let without = idle(&rig)?;
    let role_cpu = (with.cpu_percent - without.cpu_percent).max(0.0);
    let role_mib = with.resident_mib - without.resident_mib;
    Ok(vec![
        Row::alone("1,000 Services, pool made until all have addresses", "s", allocated, Better::Lower, 2.0),
        Row::alone("idle CPU of the agent, 1,000 Services", "% core", with.cpu_percent, Better::Lower, None),
        Row::alone("idle CPU of the role", "% core", role_cpu, Better::Lower, 1.0),
        Row::alone("memory of the agent, just allocated", "MiB", after_allocation, Better::Lower, None),
        Row::alone("memory of the agent, 1,000 Services", "MiB", with.resident_mib, Better::Lower, None),
        Row::alone("memory of the role", "MiB", role_mib, Better::Lower, 10.0),
        Row::alone("ARP answer, p99", "ms", percentile(answers, 99.0), Better::Lower, 1.0),
    ])
}

struct Cost {
    cpu_percent: f64,
    resident_mib: f64,
}

fn idle(rig: &Rig) -> anyhow::Result<Cost> {
    rig.await_ready()?;
    std::thread::sleep(Duration::from_secs(10));
    let pid = rig.pid("agent")?;
    let before = cpu_seconds(pid);
    std::thread::sleep(IDLE);
    let cpu_percent = (cpu_seconds(pid) - before) / IDLE.as_secs_f64() * 100.0;
    Ok(Cost { cpu_percent, resident_mib: rig.resident_mib("agent")? })
}

/// Each asks for an address of a pool that is not there yet.
async fn make_services(client: &kube::Client) -> anyhow::Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    for n in 0..SERVICES {
        let service = json!({
            "metadata": {"name": format!("s{n}"), "annotations": {"metallb.io/address-pool": "lan"}},
            "spec": {"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}],
                "allocateLoadBalancerNodePorts": false},
        });
        services.create(&PostParams::default(), &serde_json::from_value(service)?).await?;
    }
    Ok(())
}

/// Seconds from the pool until every Service has an address of both families.
async fn allocate(client: &kube::Client) -> anyhow::Result<f64> {
    let addresses = ["172.31.100.0/22", "fd00:31::1000-fd00:31::1fff"];
    let pool = json!({"apiVersion": "metallb.io/v1beta1", "kind": "IPAddressPool",
        "metadata": {"name": "lan", "namespace": "default"}, "spec": {"addresses": addresses}});
    let url = "/apis/metallb.io/v1beta1/namespaces/default/ipaddresspools";
    let request =
        kube::core::Request::new(url).create(&PostParams::default(), pool.to_string().into_bytes())?;
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let version = services.list_metadata(&ListParams::default().limit(1)).await?.metadata.resource_version;
    let watch = kube::core::Request::new("/api/v1/namespaces/default/services")
        .watch(&WatchParams::default().timeout(120), &version.context("a resourceVersion")?)?;
    let mut changes = std::pin::pin!(client.request_events::<Seen>(watch).await?);
    let began = Instant::now();
    client.request::<Value>(request).await.context("make the pool")?;
    let mut done = BTreeSet::new();
    while done.len() < SERVICES {
        let event = tokio::time::timeout(Duration::from_secs(60), changes.next()).await;
        let event = event.with_context(|| format!("{} of {SERVICES} Services have addresses", done.len()))?;
        if let WatchEvent::Added(service) | WatchEvent::Modified(service) =
            event.context("no more changes")??
            && service.status.load_balancer.ingress.len() == 2
        {
            done.insert(service.metadata.name);
        }
    }
    Ok(began.elapsed().as_secs_f64())
}

/// As little of a Service as tells that it has its addresses: who measures shares the cores with who is measured.
#[derive(Clone, Deserialize)]
struct Seen {
    metadata: SeenName,
    #[serde(default)]
    status: SeenStatus,
}

#[derive(Clone, Deserialize)]
struct SeenName {
    name: String,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SeenStatus {
    load_balancer: SeenAddresses,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct SeenAddresses {
    ingress: Vec<IgnoredAny>,
}

/// Of questions for addresses of the pool, each until its answer, asked by a neighbour.
fn arp_millis() -> anyhow::Result<Vec<f64>> {
    let netns = std::fs::File::open("/run/netns/client")?;
    let asking = std::thread::spawn(move || {
        nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
        ask_all()
    });
    asking.join().map_err(|_| anyhow::anyhow!("the neighbour's thread ended"))?
}

fn ask_all() -> anyhow::Result<Vec<f64>> {
    let shown = Command::new("ip").args(["-j", "link", "show", "up1"]).output()?;
    let link: Value = serde_json::from_slice(&shown.stdout)?;
    let mac: Vec<u8> = link[0]["address"]
        .as_str()
        .context("a link-layer address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let index = u32::try_from(link[0]["ifindex"].as_u64().context("an index")?)?;
    let arp = Arp::open(index, mac.as_slice().try_into()?)?;
    let mut malformed = 0;
    let mut millis = Vec::new();
    for n in 0..QUESTIONS {
        // The first 900 addresses of the pool are certainly given.
        let ip = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(172, 31, 100, 1)) + u32::try_from(n % 900)?);
        let asked_at = Instant::now();
        arp.ask(ip)?;
        loop {
            let said = arp.next(&mut malformed)?;
            if said.is_some_and(|said| IpAddr::from(said.ip) == IpAddr::from(ip)) {
                break;
            }
            ensure!(asked_at.elapsed() < Duration::from_secs(2), "nobody answers for {ip}");
        }
        millis.push(asked_at.elapsed().as_secs_f64() * 1000.0);
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(millis)
}
