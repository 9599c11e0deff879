//! Start and memory of the agent.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::rig::{Rig, until};
use super::row::{Better, Row};

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rig = Rig::start(weft)?;
    let started_at = rig.start_agent()?;
    until("the first rule", first_rule)?;
    let first = started_at.elapsed().as_secs_f64();
    rig.await_ready()?;
    std::thread::sleep(Duration::from_secs(5));
    let binary_mib = std::fs::metadata(weft)?.len() as f64 / 1024.0 / 1024.0;
    Ok(vec![
        Row::alone("cold start to the first programmed rule", "s", first, Better::Lower, 1.0),
        Row::alone("resident memory, idle, agent", "MiB", rig.resident_mib("agent")?, Better::Lower, 25.0),
        Row::alone("resident memory, idle, tunnel", "MiB", rig.resident_mib("tunnel")?, Better::Lower, 10.0),
        Row::alone("release binary", "MiB", binary_mib, Better::Lower, 25.0),
    ])
}

fn first_rule() -> bool {
    Command::new("nft")
        .args(["list", "table", "inet", "weft-host"])
        .output()
        .is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}
