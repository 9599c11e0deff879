//! `make bench`: measures the release binary, side by side with a peer where there is one.
//!
//! ```text
//!  weft-bench WEFT [NAME]  -> for each area: a child in namespaces of its own -> rows
//!                          -> target/bench/NAME.json and a table
//! ```
//!
//! Each figure is a median where its name says nothing else; the rounds of Weft and its peer are interleaved. Nothing here is
//! a test: no figure fails. `cluster` alone starts on the machine itself, since a real cluster makes namespaces of its own.

mod agent;
mod cluster;
mod cni;
mod dns;
mod ingress;
mod lb;
mod overlay;
mod policy;
mod proxy;
mod rig;
mod row;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};
use nix::sys::wait::WaitStatus;
use row::Row;

/// What can be measured.
const AREAS: [&str; 9] = ["agent", "cni", "proxy", "policy", "dns", "overlay", "lb", "ingress", "cluster"];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--inside", ..] if std::process::id() == 1 => init(&args),
        ["--inside", area, weft] => inside(area, weft.into()),
        ["--probe", words @ ..] => lb::probe(words),
        ["--pod", words @ ..] => proxy::pods::run(words),
        [weft] => AREAS.iter().try_for_each(|area| measure(area, weft)),
        [weft, area] if AREAS.contains(area) => measure(area, weft),
        _ => bail!("usage: weft-bench WEFT-BINARY [{}]", AREAS.join("|")),
    }
}

/// Measures one area, keeps its rows and prints them.
fn measure(area: &str, weft: &str) -> anyhow::Result<()> {
    let weft =
        std::fs::canonicalize(weft).with_context(|| format!("no binary at {weft}; 'make build' makes it"))?;
    // Within its namespaces a benchmark has no network, where sources come from.
    let peers: &[rig::Peer] = match area {
        "cni" => &[cni::PLUGINS],
        "dns" => &[dns::COREDNS],
        "ingress" => &[ingress::TRAEFIK],
        "overlay" => &[overlay::WIREGUARD_GO, overlay::BORINGTUN],
        "proxy" => &[proxy::KUBE_PROXY],
        _ => &[],
    };
    peers.iter().try_for_each(|peer| peer.path().map(drop))?;
    let rows = match area {
        "cluster" => cluster::measure(&weft)?,
        "lb" => lb::measure(&weft)?,
        "ingress" => ingress::measure(&weft)?,
        _ => outside(area, &weft)?,
    };
    let folder = PathBuf::from("target/bench");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(format!("{area}.json")), serde_json::to_string_pretty(&rows)?)?;
    print!("{}", row::table(area, &rows));
    Ok(())
}

/// Runs one area in fresh network and mount namespaces.
fn outside(area: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    let own = std::env::current_exe()?;
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(own)
        .args(["--inside", area])
        .arg(weft)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    anyhow::ensure!(output.status.success(), "the benchmark {area} failed");
    serde_json::from_slice(&output.stdout).context("read the benchmark's rows")
}

/// The first process of a namespace inherits every orphan in it, and must wait for those that end: a lab's machine is not gone as
/// long as one of its processes is a zombie. So the benchmark runs in the second.
fn init(args: &[String]) -> anyhow::Result<()> {
    let benchmark = Command::new(std::env::current_exe()?).args(args).spawn()?;
    let benchmark = nix::unistd::Pid::from_raw(i32::try_from(benchmark.id())?);
    loop {
        match nix::sys::wait::wait()? {
            WaitStatus::Exited(pid, 0) if pid == benchmark => return Ok(()),
            WaitStatus::Exited(pid, code) if pid == benchmark => bail!("it ended with {code}"),
            WaitStatus::Signaled(pid, signal, _) if pid == benchmark => bail!("it ended by {signal}"),
            _ => {}
        }
    }
}

fn inside(area: &str, weft: PathBuf) -> anyhow::Result<()> {
    let rows = match area {
        "agent" => agent::measure(&weft)?,
        "cni" => cni::measure(&weft)?,
        "proxy" => proxy::measure(&weft)?,
        "policy" => policy::measure(&weft)?,
        "dns" => dns::measure(&weft)?,
        "overlay" => overlay::measure(&weft)?,
        other => match other.split_once('/') {
            Some(("cluster", part)) => cluster::inside(part, &weft)?,
            Some(("lb", part)) => lb::inside(part, &weft)?,
            Some(("ingress", part)) => ingress::inside(part, &weft)?,
            _ => bail!("no area {other}"),
        },
    };
    println!("{}", serde_json::to_string(&rows)?);
    Ok(())
}
