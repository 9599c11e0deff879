//! The cluster tier while one part is measured: started, driven through the scripts of `tests/cluster`, and ended whatever
//! happens, a signal included.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kube::config::Kubeconfig;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::rig::{CIDRS, CLUSTER_DNS};
use crate::row::Row;

pub(super) const NODES: [&str; 3] = ["node1", "node2", "node3"];
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cluster");
/// The name of the cluster, whatever the environment calls another one.
const NAME: &str = "weft-cluster";
const RUN: &str = "/run/weft-cluster";
const LAN: &str = "/run/netns/weft-cluster";

/// A cluster that is up, or on its way.
struct Tier;

impl Drop for Tier {
    fn drop(&mut self) {
        if let Err(error) = said(&mut script("down")) {
            eprintln!("the cluster was not ended; 'make cluster-down' tries again: {error:#}");
        }
    }
}

/// Starts a cluster without a network and has a child on its LAN measure one part.
pub(super) fn rows_of(part: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    ensure!(!Path::new(RUN).exists(), "a cluster is up already; 'make cluster-down' ends it");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _tier = Tier;
    runtime.block_on(async {
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut hung_up = signal(SignalKind::hangup())?;
        let mut terminated = signal(SignalKind::terminate())?;
        tokio::select! {
            rows = started_and_measured(part, weft) => rows,
            _ = interrupted.recv() => bail!("interrupted"),
            _ = hung_up.recv() => bail!("hung up"),
            _ = terminated.recv() => bail!("terminated"),
        }
    })
}

async fn started_and_measured(part: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut up = tokio::process::Command::from(script("up"));
    up.arg(weft).env("WEFT_CLUSTER_WITHOUT_WEFT", "1").stdout(std::io::stderr()).kill_on_drop(true);
    ensure!(up.status().await?.success(), "the cluster did not start");
    let mut child = tokio::process::Command::new("nsenter");
    child.arg(format!("--net={LAN}")).arg("--").arg(std::env::current_exe()?);
    child.arg("--inside").arg(format!("cluster/{part}")).arg(weft);
    child.stderr(Stdio::inherit()).kill_on_drop(true);
    let output = child.output().await?;
    ensure!(output.status.success(), "part {part} of the benchmark failed");
    serde_json::from_slice(&output.stdout).context("read the rows of the part")
}

fn script(name: &str) -> Command {
    let mut command = Command::new(Path::new(SCRIPTS).join(name));
    command.stdin(Stdio::null()).env("WEFT_CLUSTER", NAME);
    command
}

/// What a command prints; it must succeed.
fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn kubectl(arguments: &[&str]) -> anyhow::Result<String> {
    said(script("kubectl").args(arguments))
}

/// Runs a shell line on a node.
pub(super) fn on(node: &str, line: &str) -> anyhow::Result<String> {
    said(script("exec").args([node, "bash", "-c", line]))
}

/// The administrator's client; its connections are those of a process on the LAN.
pub(super) async fn client() -> anyhow::Result<kube::Client> {
    let kubeconfig = Kubeconfig::read_from(Path::new(RUN).join("admin.kubeconfig"))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// What kube-apiserver wrote of the agents' requests (`tests/cluster/audit-policy.yaml`), one JSON object a line.
pub(super) fn audit_log() -> anyhow::Result<String> {
    std::fs::read_to_string(Path::new(RUN).join("audit.log")).context("read the API server's audit log")
}

/// Applies what `weft manifests` prints with these flags, as a user does; the DaemonSet goes to every node, or to one.
pub(super) fn install(weft: &Path, flags: &[&str], only_on: Option<&str>) -> anyhow::Result<()> {
    let mut manifests = Command::new(weft);
    manifests.arg("manifests").args(CIDRS).args(["--cluster-dns", CLUSTER_DNS]).args(flags);
    let selector = "/spec/template/spec/nodeSelector/kubernetes.io~1hostname";
    let patch = only_on.map(|node| {
        let add = json!([{"op": "add", "path": selector, "value": node}]);
        json!({"target": {"kind": "DaemonSet"}, "patch": add.to_string()})
    });
    let kustomization = json!({"resources": ["weft.yaml"], "patches": patch.as_slice()});
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("weft.yaml"), said(&mut manifests)?)?;
    std::fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string())?;
    kubectl(&["apply", "-k", &folder.path().to_string_lossy()])?;
    kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", "--timeout=120s"])?;
    Ok(())
}

pub(super) fn await_ready(nodes: &[&str]) -> anyhow::Result<()> {
    kubectl(&[&["wait", "--for=condition=Ready", "--timeout=90s", "node"], nodes].concat())?;
    await_that("the default ServiceAccount", || {
        kubectl(&["-n", "default", "get", "serviceaccount", "default"]).map(drop)
    })
}

/// Tries twice a second, for a minute at most; the error is that of the last try.
pub(super) fn await_that<T>(what: &str, mut attempt: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waited 60 s for {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}
