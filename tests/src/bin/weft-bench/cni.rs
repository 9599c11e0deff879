//! CNI ADD and DEL as a runtime sees them, from starting the first plugin to the exit of the last, beside the chain that
//! flannel's plugin delegates to: bridge with host-local, portmap, bandwidth.
//!
//! Rounds are interleaved. A runtime starts the plugins of a chain one after the other, each with the result of the one before.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_model::constants::POD_LINK_PREFIX;

use super::rig::{Peer, Rig, ip, private_names, until};
use super::row::{Better, Row, median, percentile};

const ROUNDS: usize = 40;
const PARALLEL: usize = 250;
const PEER: &str = "chain";
pub(crate) const PLUGINS: Peer = Peer { script: "build-cni-plugins.sh", args: &[] };

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    private_names()?;
    let mut rig = Rig::start(weft)?;
    rig.start_agent()?;
    rig.await_ready()?;
    let ours = Chain::of_weft(&rig)?;
    let theirs = Chain::of_reference(&rig)?;
    let mut rows = Vec::new();
    for (what, host_port) in [("", false), (" with a hostPort", true)] {
        let (mut adds, mut dels) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for n in 0..ROUNDS {
            for (i, chain) in [&ours, &theirs].into_iter().enumerate() {
                let pod = Pod::new(&format!("{i}-{host_port}-{n}"), host_port.then_some(20_000 + n))?;
                adds[i].push(chain.add(&pod)?);
                dels[i].push(chain.del(&pod)?);
                pod.end()?;
                // Weft's links go after DEL has answered: that is not to fall into the other's time.
                until("the end of the pod's links", no_pod_link)?;
            }
        }
        let beside = |name: &str, figures: &[Vec<f64>; 2], percent: f64, target: f64| {
            let [weft, peer] = [0, 1].map(|i| percentile(figures[i].clone(), percent));
            Row::beside(&format!("{name}{what} p{percent}"), "ms", weft, (PEER, peer), Better::Lower, target)
        };
        rows.push(beside("ADD", &adds, 50.0, 0.1));
        rows.push(beside("ADD", &adds, 99.0, 0.1));
        rows.push(beside("DEL", &dels, 50.0, 0.1));
    }
    let [weft, peer] = [in_parallel(&ours, "w")?, in_parallel(&theirs, "p")?];
    rows.push(Row::beside(
        &format!("{PARALLEL} pods added at once, p50 of one"),
        "ms",
        median(weft),
        (PEER, median(peer)),
        Better::Lower,
        0.1,
    ));
    Ok(rows)
}

fn no_pod_link() -> bool {
    let links = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    !links.contains(POD_LINK_PREFIX)
}

/// Milliseconds of each ADD.
fn in_parallel(chain: &Chain, name: &str) -> anyhow::Result<Vec<f64>> {
    let pods = (0..PARALLEL).map(|n| Pod::new(&format!("{name}{n}"), None)).collect::<Result<Vec<_>, _>>()?;
    let took = std::thread::scope(|scope| {
        let running: Vec<_> = pods.iter().map(|pod| scope.spawn(|| chain.add(pod))).collect();
        running
            .into_iter()
            .map(|one| one.join().unwrap_or_else(|_| anyhow::bail!("an ADD panicked")))
            .collect()
    });
    for pod in &pods {
        chain.del(pod)?;
        pod.end()?;
    }
    took
}

pub(crate) struct Pod {
    name: String,
    host_port: Option<usize>,
}

impl Pod {
    pub(crate) fn new(name: &str, host_port: Option<usize>) -> anyhow::Result<Self> {
        let name = format!("bench{name}");
        ip(&format!("netns add {name}"))?;
        Ok(Self { name, host_port })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn end(&self) -> anyhow::Result<()> {
        ip(&format!("netns del {}", self.name))
    }
}

/// Plugins in their order, as libcni runs them.
pub(crate) struct Chain {
    folder: PathBuf,
    plugins: Vec<Value>,
}

impl Chain {
    pub(crate) fn of_weft(rig: &Rig) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(rig.folder.path().join("cni/05-weft.conflist"))?;
        let list: Value = serde_json::from_str(&text)?;
        let plugins = vec![list["plugins"][0].clone()];
        Ok(Self { folder: rig.folder.path().join("bin"), plugins })
    }

    /// Dual stack, as flannel writes it; duplicate-address detection off, as every CNI of this kind has it.
    fn of_reference(rig: &Rig) -> anyhow::Result<Self> {
        let ranges = json!([[{"subnet": "10.99.0.0/16"}], [{"subnet": "fd00:10:99::/64"}]]);
        let data = rig.folder.path().join("host-local");
        let plugins = vec![
            json!({
                "type": "bridge", "bridge": "bench0", "isGateway": true, "hairpinMode": true, "ipMasq": false,
                "ipam": {"type": "host-local", "ranges": ranges, "dataDir": data, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
            }),
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
            json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
        ];
        Ok(Self { folder: PLUGINS.path()?, plugins })
    }

    pub(crate) fn add(&self, pod: &Pod) -> anyhow::Result<f64> {
        let started_at = Instant::now();
        let mut result = Value::Null;
        for plugin in &self.plugins {
            result = self.run("ADD", plugin, pod, &result)?;
        }
        Ok(started_at.elapsed().as_secs_f64() * 1000.0)
    }

    /// In reverse order, as the specification demands.
    fn del(&self, pod: &Pod) -> anyhow::Result<f64> {
        let started_at = Instant::now();
        for plugin in self.plugins.iter().rev() {
            self.run("DEL", plugin, pod, &Value::Null)?;
        }
        Ok(started_at.elapsed().as_secs_f64() * 1000.0)
    }

    fn run(&self, verb: &str, plugin: &Value, pod: &Pod, previous: &Value) -> anyhow::Result<Value> {
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let mut config = plugin.clone();
        config["name"] = json!("bench");
        config["cniVersion"] = json!("1.0.0");
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        if let Some(port) = pod.host_port.filter(|_| plugin["capabilities"]["portMappings"] == true) {
            let mapping = json!([{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]);
            config["runtimeConfig"] = json!({"portMappings": mapping});
        }
        let mut child = Command::new(self.folder.join(kind))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &pod.name)
            .env("CNI_NETNS", format!("/run/netns/{}", pod.name))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.folder)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={0};K8S_POD_UID={0}",
                    pod.name
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no stdin")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{kind} {verb} {}: {said}", pod.name);
        Ok(serde_json::from_str(&said).unwrap_or(Value::Null))
    }
}
