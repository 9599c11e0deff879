//! Services, beside kube-proxy in nftables and in iptables mode and beside direct pod addresses.
//!
//! ```text
//!  API server <- Services, growing          node: agent, then kube-proxy in its place, never both
//!  asker (pod) -- VIP or pod address --> answerers (pods), whose names tell where the rules lead
//! ```
//!
//! Whoever programs the rules, it is packets that tell when they are in the kernel. `WEFT_BENCH_SERVICES` gives other sizes: `10,200`
//! is a quick look.

mod load;
mod peer;
pub(crate) mod pods;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::rig::{Rig, private_names, resident_mib, until_within};
use super::row::{Better, Row, median, table};
use load::{PROBE_IP, make, make_probe, move_probe};
pub(crate) use peer::KUBE_PROXY;
use peer::{KubeProxy, Mode};
use pods::{Answerer, Asker, PORT, now_micros};

pub(crate) const SERVICES: usize = 1000;
const SIZES: [usize; 4] = [10, 1000, 10_000, 30_000];
/// Where programming is measured.
const LARGE: usize = 10_000;
/// Where it is measured beside kube-proxy in iptables mode too: with 10,000 Services its first iptables-restore does not end in ten
/// minutes.
const OF_IPTABLES: usize = 1000;
const CHANGES: usize = 20;
/// Of kube-proxy in iptables mode, which takes seconds for one.
const SLOW_CHANGES: usize = 5;
/// kube-proxy lets a second pass between two syncs, so that changes come rarely enough for each to find it idle.
const BETWEEN_CHANGES: Duration = Duration::from_millis(1200);
/// Before a process is asked for its memory: what the last change left for a moment is gone, and a Snapshot is not being written.
const REST: Duration = Duration::from_secs(5);
/// Short, since what the machine does besides lasts longer.
const RATE_ROUNDS: usize = 71;
const RATE_MILLIS: u32 = 40;
const ROUNDS: usize = 7;
const FIRST_PACKETS: usize = 400;
const PATIENCE: Duration = Duration::from_secs(600);
const AGENT: &str = "127.0.0.1:9470";
const COMMITS: &str = "weft_proxy_commit_cpu_seconds";

pub(crate) async fn make_services(client: &kube::Client) -> anyhow::Result<()> {
    make(client, 0..SERVICES).await
}

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    private_names()?;
    let kube_proxy = KUBE_PROXY.path()?.join("kube-proxy");
    let mut rig = Rig::start(weft)?;
    rig.start_agent()?;
    rig.await_ready()?;
    let answerers = [Answerer::start(&rig, "a")?, Answerer::start(&rig, "b")?];
    let asker = Asker::start(&rig)?;
    rig.runtime.block_on(make_probe(&rig.client, &answerers[0]))?;
    let mut bench = Bench { rig, kube_proxy, asker, answerers, at: 0, made: 0 };
    let mut rows = Vec::new();
    let mut paths = Vec::new();
    let sizes = sizes()?;
    let large = if sizes.contains(&LARGE) { LARGE } else { sizes[sizes.len() - 1] };
    for size in sizes {
        eprintln!("{size} Services ...");
        bench.grow_to(size)?;
        let weft = bench.path()?;
        let (change, work) = bench.changes(bench.agent_pid()?, CHANGES, Some(COMMITS))?;
        if size == large || size == OF_IPTABLES {
            rows.extend(bench.programming(size, &change, &work)?);
        } else {
            rows.push(Row::alone(
                &format!("CPU of one endpoint change, {size} Services"),
                "us",
                median(work.cpu_micros),
                Better::Lower,
                None,
            ));
        }
        bench.stop_weft()?;
        let theirs = bench.start_kube_proxy(Mode::Nftables)?.0;
        let peer = bench.path()?;
        theirs.end()?;
        bench.start_weft()?;
        paths.push((size, weft, peer));
        // It takes half an hour as a whole.
        eprint!("{}{}", table("so far", &rows), table("so far", &path_rows(&paths)));
    }
    rows.extend(path_rows(&paths));
    Ok(rows)
}

fn sizes() -> anyhow::Result<Vec<usize>> {
    let Ok(text) = std::env::var("WEFT_BENCH_SERVICES") else { return Ok(SIZES.to_vec()) };
    let sizes = text.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
    sizes.context("WEFT_BENCH_SERVICES holds numbers with commas between")
}

struct Bench {
    rig: Rig,
    kube_proxy: PathBuf,
    asker: Asker,
    answerers: [Answerer; 2],
    /// Which of them the probe Service leads to.
    at: usize,
    made: usize,
}

/// What packets meet on the way, medians of interleaved rounds.
struct Passage {
    rate: f64,
    /// Of direct pod addresses, round by round.
    share: f64,
    first_micros: f64,
    direct_micros: f64,
    /// Round by round.
    first_over_direct: f64,
}

/// What a change costs whoever programs it.
#[derive(Default)]
struct Work {
    cpu_micros: Vec<f64>,
    /// Seconds in the kernel, where that is told.
    kernel_micros: Vec<f64>,
}

/// From the start of a process to its rules.
struct Load {
    /// Until the Service answered.
    seconds: f64,
    /// Of those, the synchronisation itself.
    sync_seconds: f64,
}

impl Bench {
    fn vip() -> SocketAddr {
        SocketAddr::new(PROBE_IP.parse().unwrap_or([0, 0, 0, 0].into()), 80)
    }

    fn agent_pid(&self) -> anyhow::Result<u32> {
        self.rig.pid("agent")
    }

    fn grow_to(&mut self, size: usize) -> anyhow::Result<()> {
        self.rig.runtime.block_on(make(&self.rig.client, self.made..size))?;
        self.made = size;
        self.await_settled()
    }

    /// Until the agent has programmed what the API server knows.
    fn await_settled(&self) -> anyhow::Result<()> {
        let want = self.made as f64;
        until_within(PATIENCE, "the agent to have every Service", || {
            let page = metrics(AGENT).unwrap_or_default();
            let read = |name| reading(&page, name).unwrap_or(0.0);
            read("kubeproxy_sync_proxy_rules_service_changes_total") >= want
                && read("kubeproxy_sync_proxy_rules_endpoint_changes_total") >= want
                && read("kubeproxy_sync_proxy_rules_service_changes_pending") == 0.0
                && read("kubeproxy_sync_proxy_rules_endpoint_changes_pending") == 0.0
        })?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    }

    /// Through the VIP and directly, in turns.
    fn path(&mut self) -> anyhow::Result<Passage> {
        let direct = SocketAddr::new(self.answerers[self.at].ip, PORT);
        let (mut rates, mut shares) = (vec![], vec![]);
        let (mut firsts, mut directs, mut overs) = (vec![], vec![], vec![]);
        for _ in 0..RATE_ROUNDS {
            let straight = self.asker.rate(direct, RATE_MILLIS)?;
            let translated = self.asker.rate(Self::vip(), RATE_MILLIS)?;
            rates.push(translated);
            shares.push(translated / straight);
        }
        for _ in 0..ROUNDS {
            let [straight, translated] = self.asker.first_packets([direct, Self::vip()], FIRST_PACKETS)?;
            directs.push(straight);
            firsts.push(translated);
            overs.push(translated / straight);
        }
        Ok(Passage {
            rate: median(rates),
            share: median(shares),
            first_micros: median(firsts),
            direct_micros: median(directs),
            first_over_direct: median(overs),
        })
    }

    /// Milliseconds from the API server's answer to the first packet that follows the change, and what process `pid` did for it.
    fn changes(&mut self, pid: u32, count: usize, kernel: Option<&str>) -> anyhow::Result<(Vec<f64>, Work)> {
        let (mut took, mut work) = (Vec::new(), Work::default());
        let in_kernel = || kernel.map(|name| seconds_in(AGENT, name)).transpose();
        for _ in 0..count {
            let (cpu_before, kernel_before) = (cpu_micros(pid)?, in_kernel()?);
            self.at = 1 - self.at;
            let (pod, vip) = (&self.answerers[self.at], Self::vip());
            self.asker.begin_await(vip, pod.name)?;
            self.rig.runtime.block_on(move_probe(&self.rig.client, pod))?;
            let answered_at = now_micros();
            took.push(((self.asker.end()? - answered_at) / 1000.0).max(0.0));
            std::thread::sleep(BETWEEN_CHANGES);
            work.cpu_micros.push(cpu_micros(pid)? - cpu_before);
            if let (Some((before, _)), Some((after, _))) = (kernel_before, in_kernel()?) {
                work.kernel_micros.push((after - before) * 1e6);
            }
        }
        Ok((took, work))
    }

    /// Load, change, restart and memory at one size, beside kube-proxy.
    fn programming(&mut self, size: usize, change: &[f64], work: &Work) -> anyhow::Result<Vec<Row>> {
        std::thread::sleep(REST);
        let memory = self.rig.resident_mib("agent")?;
        let (restart_seconds, transactions) = self.restart()?;
        let after_restart = self.rig.resident_mib("agent")?;
        let mut loads = Vec::new();
        for _ in 0..3 {
            self.stop_weft()?;
            loads.push(self.start_weft()?);
        }
        let load = median(loads.iter().map(|load| load.seconds).collect());
        let sync = median(loads.iter().map(|load| load.sync_seconds).collect());
        let name = |what: &str| format!("{what}, {size} x 5");
        let alone =
            |what: &str, unit, figure, target| Row::alone(&name(what), unit, figure, Better::Lower, target);
        let cpu = median(work.cpu_micros.clone());
        let mut rows = vec![
            alone(
                "kernel time of one endpoint change p50",
                "us",
                median(work.kernel_micros.clone()),
                Some(50.0),
            ),
            alone("restart with everything in place: ready", "s", restart_seconds, Some(0.5)),
            alone("restart with everything in place: transactions", "", transactions, Some(0.0)),
            alone("memory of the agent after a restart", "MiB", after_restart, Some(60.0)),
        ];
        let modes: &[_] = match size {
            ..=OF_IPTABLES => &[(Mode::Nftables, CHANGES), (Mode::Iptables, SLOW_CHANGES)],
            _ => &[(Mode::Nftables, CHANGES)],
        };
        for (mode, count) in modes.iter().copied() {
            eprintln!("{} ...", mode.name());
            self.stop_weft()?;
            let (theirs, their_load) = self.start_kube_proxy(mode)?;
            let (their_change, their_work) = self.changes(theirs.pid(), count, None)?;
            std::thread::sleep(REST);
            let their_memory = resident_mib(theirs.pid())?;
            theirs.end()?;
            self.start_weft()?;
            let beside = |what: &str, unit: &str, ours, theirs, target| {
                Row::bounded(&name(what), unit, ours, (mode.name(), theirs), Better::Lower, target)
            };
            rows.extend([
                beside(
                    "full load into an empty kernel: sync",
                    "s",
                    sync,
                    their_load.sync_seconds,
                    Some(0.25),
                ),
                beside("start to the first answer, empty kernel", "s", load, their_load.seconds, None),
                beside(
                    "endpoint change, API to first packet p50",
                    "ms",
                    median(change.to_vec()),
                    median(their_change),
                    Some(10.0),
                ),
                beside("CPU of one endpoint change", "us", cpu, median(their_work.cpu_micros), None),
                beside("memory", "MiB", memory, their_memory, Some(60.0)),
            ]);
            eprint!("{}", table("so far", &rows));
        }
        Ok(rows)
    }

    /// Seconds until the agent is ready again, and how many transactions of the proxy it sent for it.
    fn restart(&mut self) -> anyhow::Result<(f64, f64)> {
        let mut seconds = Vec::new();
        let mut transactions = 0.0;
        for _ in 0..3 {
            self.rig.stop_agent()?;
            let started_at = self.rig.start_agent_alone(&[])?;
            until_within(PATIENCE, "the agent to be ready", || {
                get(AGENT, "/readyz").is_ok_and(|answer| {
                    answer.starts_with("HTTP/1.1 200") || answer.starts_with("HTTP/1.0 200")
                })
            })?;
            seconds.push(started_at.elapsed().as_secs_f64());
            std::thread::sleep(Duration::from_secs(2));
            transactions += seconds_in(AGENT, COMMITS)?.1;
        }
        Ok((median(seconds), transactions))
    }

    /// The kernel without Weft's Services; all else stays as it is.
    fn stop_weft(&mut self) -> anyhow::Result<()> {
        self.rig.stop_agent()?;
        let deleted = Command::new("nft").args(["delete", "table", "inet", "weft-proxy"]).status()?;
        ensure!(deleted.success(), "delete the table weft-proxy");
        Ok(())
    }

    fn start_weft(&mut self) -> anyhow::Result<Load> {
        let (vip, pod) = (Self::vip(), self.answerers[self.at].name);
        self.asker.begin_await(vip, pod)?;
        let began = now_micros();
        self.rig.start_agent_alone(&[])?;
        let seconds = (self.asker.end()? - began) / 1e6;
        let sync_seconds = first_sync(AGENT, "kubeproxy_sync_full_proxy_rules_duration_seconds")?;
        self.await_settled()?;
        Ok(Load { seconds, sync_seconds })
    }

    fn start_kube_proxy(&mut self, mode: Mode) -> anyhow::Result<(KubeProxy, Load)> {
        let (vip, pod) = (Self::vip(), self.answerers[self.at].name);
        self.asker.begin_await(vip, pod)?;
        let began = now_micros();
        let theirs = KubeProxy::start(&self.kube_proxy, &self.rig, mode)?;
        let seconds = (self.asker.end()? - began) / 1e6;
        let sync_seconds = first_sync(peer::METRICS, "kubeproxy_sync_proxy_rules_duration_seconds")?;
        // The other family, and what is synchronised once more after the start.
        std::thread::sleep(Duration::from_secs(3));
        Ok((theirs, Load { seconds, sync_seconds }))
    }
}

fn path_rows(paths: &[(usize, Passage, Passage)]) -> Vec<Row> {
    let nft = Mode::Nftables.name();
    let mut rows = Vec::new();
    for (size, weft, peer) in paths {
        let name = |what: &str| format!("{what}, {size} Services");
        let bounded = |what: &str, unit: &str, weft, peer, better, target| {
            Row::bounded(&name(what), unit, weft, (nft, peer), better, target)
        };
        rows.extend([
            bounded("connections through a VIP", "1/s", weft.rate, peer.rate, Better::Higher, None),
            bounded(
                "of the rate of direct pod addresses",
                "",
                weft.share,
                peer.share,
                Better::Higher,
                Some(0.85),
            ),
            bounded("first packet p50", "us", weft.first_micros, peer.first_micros, Better::Lower, None),
            bounded(
                "first packet to a direct pod address p50",
                "us",
                weft.direct_micros,
                peer.direct_micros,
                Better::Lower,
                None,
            ),
        ]);
    }
    if let (Some((few, first, _)), Some((many, last, _))) = (paths.first(), paths.last()) {
        let name = format!("first packet over direct, {many} against {few} Services");
        let ratio = last.first_over_direct / first.first_over_direct;
        rows.push(Row::alone(&name, "", ratio, Better::Lower, 1.1));
    }
    rows
}

fn get(address: &str, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: bench\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn metrics(address: &str) -> anyhow::Result<String> {
    get(address, "/metrics")
}

/// The first reading under a name; of several families that is IPv4's.
fn reading(page: &str, name: &str) -> Option<f64> {
    let line =
        page.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Sum and count of a histogram.
fn seconds_in(address: &str, name: &str) -> anyhow::Result<(f64, f64)> {
    let page = metrics(address)?;
    let read =
        |part: &str| reading(&page, &format!("{name}_{part}")).with_context(|| format!("no {name}_{part}"));
    Ok((read("sum")?, read("count")?))
}

/// Seconds of the synchronisations so far, once there is one.
fn first_sync(address: &str, name: &str) -> anyhow::Result<f64> {
    let mut seconds = 0.0;
    until_within(PATIENCE, "the first synchronisation", || match seconds_in(address, name) {
        Ok((sum, count)) if count >= 1.0 => {
            seconds = sum / count;
            true
        }
        _ => false,
    })?;
    Ok(seconds)
}

/// CPU time of all threads that a process has now, in microseconds (schedstat, first field, in nanoseconds).
fn cpu_micros(pid: u32) -> anyhow::Result<f64> {
    let mut sum = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text.split(' ').next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(sum / 1000.0)
}
