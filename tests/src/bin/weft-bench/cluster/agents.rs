//! What the agents of an idle cluster ask of the API server, and what Weft's processes weigh on a node full of pods.
//!
//! Requests are those in kube-apiserver's audit log, which knows the node of each agent's token. Bytes are those of IP packets
//! on the node's card, counted by nftables: the agents call the API server by its IPv6 address and nobody else on the node
//! does, so that the count is theirs alone. The kubelets report as often as they do by default; the tier's own kubelets
//! report every four seconds, and each report is an event to every agent.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, ListParams, PostParams};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::tier::{self, NODES};
use crate::row::{Better, Row};

/// Without a name, because names need the host's libraries; the certificate holds this address too.
const API_SERVER: &str = "https://[fd00:30:98::1]:6443";
/// After the installation, until nothing of it is in the figures.
const SETTLE: Duration = Duration::from_mins(1);
/// Two of the kubelets' reports and five of the agent's watches long.
const QUIET: Duration = Duration::from_mins(10);
const HOUR: Duration = Duration::from_hours(1);
const FULL_NODE: &str = "node1";
/// On one node, which may hold 250; each with a Service of two families.
const PODS: usize = 200;
const AT_ONCE: usize = 20;

pub(super) async fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    for node in NODES {
        report_as_by_default(node)?;
    }
    tier::install(weft, &["--api-server", API_SERVER], None)?;
    tier::await_ready(&NODES)?;
    let mut rows = idle_hour().await?.rows();
    rows.extend(resident("idle")?);
    fill(tier::client().await?).await?;
    sleep(SETTLE).await;
    rows.extend(resident(&format!("{PODS} pods and Services"))?);
    Ok(rows)
}

/// A kubelet with the intervals that it has without a configuration.
fn report_as_by_default(node: &str) -> anyhow::Result<()> {
    let line = "sed -i 's/^nodeStatusUpdateFrequency:.*/nodeStatusUpdateFrequency: 10s\\nnodeStatusReportFrequency: 5m/' \
                /etc/kubernetes/kubelet.yaml && grep -q nodeStatusReportFrequency /etc/kubernetes/kubelet.yaml \
                && systemctl restart kubelet";
    tier::on(node, line).map(drop)
}

/// Of one agent, or the mean of several.
#[derive(Debug)]
struct Traffic {
    requests: f64,
    bytes_sent: f64,
    bytes_received: f64,
}

impl Traffic {
    fn rows(&self) -> Vec<Row> {
        let row = |name: &str, unit, value| Row::alone(name, unit, value, Better::Lower, None);
        vec![
            row("API requests of an idle agent in an hour", "", self.requests),
            row("... bytes sent", "KiB", self.bytes_sent / 1024.0),
            row("... bytes received", "KiB", self.bytes_received / 1024.0),
        ]
    }
}

/// What an agent asks in an hour, the mean of all nodes, projected from a shorter while.
async fn idle_hour() -> anyhow::Result<Traffic> {
    for node in NODES {
        tier::on(node, COUNTERS)?;
    }
    sleep(SETTLE).await;
    let before = NODES.into_iter().map(traffic).collect::<anyhow::Result<Vec<_>>>()?;
    sleep(QUIET).await;
    let after = NODES.into_iter().map(traffic).collect::<anyhow::Result<Vec<_>>>()?;
    let hours_of_agents = NODES.len() as f64 * QUIET.as_secs_f64() / HOUR.as_secs_f64();
    let an_hour = |of: fn(&Traffic) -> f64| {
        (after.iter().map(of).sum::<f64>() - before.iter().map(of).sum::<f64>()) / hours_of_agents
    };
    let idle = Traffic {
        requests: an_hour(|traffic| traffic.requests),
        bytes_sent: an_hour(|traffic| traffic.bytes_sent),
        bytes_received: an_hour(|traffic| traffic.bytes_received),
    };
    let nothing = idle.requests == 0.0 || idle.bytes_sent == 0.0 || idle.bytes_received == 0.0;
    ensure!(!nothing, "the agents asked nothing, or it was not counted: {idle:?}");
    Ok(idle)
}

const COUNTERS: &str = "nft -f - <<'NFT'
table inet bench {
  counter sent { }
  counter received { }
  chain output { type filter hook output priority raw; ip6 daddr fd00:30:98::1 tcp dport 6443 counter name sent; }
  chain input { type filter hook input priority raw; ip6 saddr fd00:30:98::1 tcp sport 6443 counter name received; }
}
NFT";

/// Of a node's agent since its counters were made and the API server was started.
fn traffic(node: &str) -> anyhow::Result<Traffic> {
    let counters: Value = serde_json::from_str(&tier::on(node, "nft -j list counters table inet bench")?)?;
    let objects = counters["nftables"].as_array().context("nft's JSON")?;
    let bytes = |name: &str| {
        let counter = objects.iter().find(|object| object["counter"]["name"] == name);
        counter
            .and_then(|object| object["counter"]["bytes"].as_f64())
            .with_context(|| format!("no counter {name}"))
    };
    Ok(Traffic {
        requests: requests(node)? as f64,
        bytes_sent: bytes("sent")?,
        bytes_received: bytes("received")?,
    })
}

/// Requests by the token of a node's agent, a line of the audit log each.
fn requests(node: &str) -> anyhow::Result<usize> {
    let log = tier::audit_log()?;
    let lines = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let of_node = |line: &&Value| line["user"]["extra"]["authentication.kubernetes.io/node-name"][0] == node;
    Ok(lines.iter().filter(of_node).count())
}

/// Pods on one node, each behind a Service of its own; waits until they run and the node's proxy knows the Services.
async fn fill(client: kube::Client) -> anyhow::Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(client, "default");
    let names: Vec<_> = (0..PODS).map(|n| format!("full-{n}")).collect();
    let default = PostParams::default();
    for names in names.chunks(AT_ONCE) {
        let objects = names.iter().map(|name| service(name)).collect::<Result<Vec<_>, _>>()?;
        try_join_all(objects.iter().map(|service| services.create(&default, service))).await?;
        let objects = names
            .iter()
            .map(|name| serde_json::from_value(super::sleeper(FULL_NODE, name)))
            .collect::<Result<Vec<Pod>, _>>()?;
        try_join_all(objects.iter().map(|pod| pods.create(&default, pod))).await?;
    }
    tier::kubectl(&["wait", "--for=condition=Ready", "pods", "--all", "--timeout=600s"])?;
    let made = services.list(&ListParams::default()).await?;
    let addresses: Vec<_> = made.into_iter().filter_map(|service| service.spec?.cluster_ip).collect();
    tier::await_that("the proxy", || {
        let rules = tier::on(FULL_NODE, "nft list table inet weft-proxy")?;
        let missing = addresses.iter().find(|address| !rules.contains(address.as_str()));
        ensure!(missing.is_none(), "{FULL_NODE} has no rule for {missing:?}");
        Ok(())
    })
}

fn service(name: &str) -> serde_json::Result<Service> {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]}
    }))
}

/// One row for each process of Weft on a node.
fn resident(when: &str) -> anyhow::Result<Vec<Row>> {
    let said = tier::on(FULL_NODE, WEFT_PROCESSES)?;
    let row = |line: &str| {
        let (role, kib) = line.split_once(' ').with_context(|| format!("no role and memory in {line:?}"))?;
        let mib = kib.parse::<f64>()? / 1024.0;
        Ok(Row::alone(&format!("resident memory, {when}, {role}"), "MiB", mib, Better::Lower, None))
    };
    let rows = said.lines().map(row).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(rows.len() == 3, "not an agent, a tunnel and an installer on {FULL_NODE}: {said}");
    Ok(rows)
}

/// Prints subcommand and VmRSS (proc_pid_status(5)) in KiB of each process `weft`.
const WEFT_PROCESSES: &str = r"
for folder in $(grep -lx weft /proc/[0-9]*/comm); do
  folder=${folder%comm}
  echo $(tr '\0' ' ' < ${folder}cmdline | cut -d ' ' -f 2) $(sed -n 's/^VmRSS:\s*\([0-9]*\) kB/\1/p' ${folder}status)
done | sort";
