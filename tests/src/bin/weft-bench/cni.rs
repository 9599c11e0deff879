//! CNI ADD as a runtime sees it: from starting the plugin to its exit.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};

use super::rig::{Rig, ip};
use super::row::{Better, Row, median};

const PODS: usize = 60;

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rig = Rig::start(weft)?;
    rig.start_agent()?;
    rig.await_ready()?;
    let plugin = plugin_config(&rig)?;
    let mut adds = Vec::new();
    let mut dels = Vec::new();
    for n in 0..PODS {
        ip(&format!("netns add bench{n}"))?;
        adds.push(timed(&rig, "ADD", n, &plugin)?);
    }
    for n in 0..PODS {
        dels.push(timed(&rig, "DEL", n, &plugin)?);
        ip(&format!("netns del bench{n}"))?;
    }
    Ok(vec![
        Row::alone("ADD p50", "ms", median(adds), Better::Lower, 15.0),
        // Unregistering a link waits for the kernel's grace periods, tens of milliseconds.
        Row::alone("DEL p50", "ms", median(dels), Better::Lower, 60.0),
    ])
}

/// What libcni hands to the plugin: its entry of the list, with the list's name and version.
fn plugin_config(rig: &Rig) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(rig.folder.path().join("cni/05-weft.conflist"))?;
    let list: serde_json::Value = serde_json::from_str(&text)?;
    let mut plugin = list["plugins"][0].clone();
    plugin["name"] = list["name"].clone();
    plugin["cniVersion"] = list["cniVersion"].clone();
    Ok(plugin.to_string())
}

/// Milliseconds of one operation.
fn timed(rig: &Rig, operation: &str, n: usize, plugin: &str) -> anyhow::Result<f64> {
    let started_at = Instant::now();
    let mut child = Command::new(rig.folder.path().join("bin/weft"))
        .env("CNI_COMMAND", operation)
        .env("CNI_CONTAINERID", format!("bench-{n}"))
        .env("CNI_NETNS", format!("/run/netns/bench{n}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", rig.folder.path().join("bin"))
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME=bench-{n};K8S_POD_UID={n}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no stdin")?.write_all(plugin.as_bytes())?;
    let output = child.wait_with_output()?;
    let elapsed = started_at.elapsed().as_secs_f64() * 1000.0;
    ensure!(output.status.success(), "{operation} {n}: {}", String::from_utf8_lossy(&output.stdout));
    Ok(elapsed)
}
