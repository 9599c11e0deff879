//! One thread of each proxy on one core. They run side by side, and rounds of each take turns.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::super::dns::{Awake, to_client_core};
use super::super::rig::ip;
use super::super::row::{Better, Row, median, percentile};
use super::backend::{BIG_BYTES, Backend};
use super::load::{h2load, idle, latencies};
use super::peers::{Ground, Kind, PEERS, Proxy, TRAEFIK};
use super::table::{BACKEND, PROXY, SIX, Shape, host};

const ROUNDS: usize = 5;
const SECONDS: &str = "2";
const IDLE_CONNECTIONS: usize = 5_000;
const FEW: Shape = Shape { hosts: 1, paths: 1 };
const MANY: [(&str, Shape); 3] = [
    ("1,000 routes", Shape { hosts: 20, paths: 50 }),
    ("10,000 routes", Shape { hosts: 200, paths: 50 }),
    ("10,000 routes of one host", Shape { hosts: 1, paths: 10_000 }),
];
/// Of the open loop.
const PACED_CONNECTIONS: usize = 64;
const PACED: Duration = Duration::from_secs(1);
/// Many and short: what the client and the backend do to each other on their core differs from second to second.
const PACED_ROUNDS: usize = 15;

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    ip("link set lo up")?;
    // A host may pace what it sends (BBR). There is no wire here, and in a virtual machine a timer for each piece of a large body costs
    // more than the piece. A namespace may choose no other than this.
    std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno").context("choose reno")?;
    for address in PROXY.iter().chain(&BACKEND) {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        ip(&format!("addr add {address} dev lo{nodad}"))?;
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let folder = tempfile::tempdir()?;
    // The users of the proxies have to come through.
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))?;
    let ground = Ground { weft: weft.to_owned(), traefik: TRAEFIK.path()?, folder: folder.path().to_owned() };
    ground.make_certificate()?;
    let _backend = Backend::start(folder.path())?;
    let mut rows = few(&ground)?;
    for (name, shape) in MANY {
        rows.extend(many(&ground, name, shape)?);
    }
    Ok(rows)
}

fn all(ground: &Ground, shape: Shape) -> anyhow::Result<Vec<Proxy>> {
    [Kind::Weft].into_iter().chain(PEERS).map(|kind| Proxy::start(ground, kind, shape)).collect()
}

/// A load and what is to be reached beside each peer.
struct Load {
    name: &'static str,
    /// 0 is IPv4.
    family: usize,
    tls: bool,
    options: &'static [&'static str],
    url: fn() -> String,
    count: Count,
    /// Of the ratio to nginx, HAProxy and Traefik.
    targets: [Option<f64>; 3],
}

/// What of a load is the figure.
#[derive(Clone, Copy)]
enum Count {
    PerSecond,
    /// Where the clients on the other core have enough of it before the proxy does.
    PerSecondOfCpu,
    /// For the same reason: clients and backend need more for a large body than a proxy that splices it.
    GigabytesPerSecondOfCpu,
}

const KEEP_ALIVE: &[&str] = &["--h1", "-c", "128", "-D", SECONDS];

const LOADS: [Load; 6] = [
    Load {
        name: "HTTP/1.1 kept alive, IPv4",
        family: 0,
        tls: false,
        options: KEEP_ALIVE,
        url: || format!("http://{}/p0", host(0)),
        count: Count::PerSecond,
        targets: [Some(0.7), Some(0.95), Some(4.0)],
    },
    Load {
        name: "HTTP/1.1 kept alive, IPv6",
        family: 1,
        tls: false,
        options: KEEP_ALIVE,
        url: || format!("http://{SIX}/p0"),
        count: Count::PerSecond,
        targets: [Some(0.7), Some(0.95), Some(4.0)],
    },
    Load {
        name: "HTTP/1.1 kept alive over TLS",
        family: 0,
        tls: true,
        options: KEEP_ALIVE,
        url: || format!("https://{}/p0", host(0)),
        count: Count::PerSecond,
        targets: [Some(1.0), None, Some(4.0)],
    },
    Load {
        name: "TLS handshake and one request",
        family: 0,
        tls: true,
        options: &["--h1", "-c", "32", "-n", "2000", "-H", "connection: close"],
        url: || format!("https://{}/p0", host(0)),
        count: Count::PerSecondOfCpu,
        targets: [Some(1.6), Some(1.6), None],
    },
    Load {
        name: "HTTP/2 over TLS, 4 connections of 100 streams",
        family: 0,
        tls: true,
        options: &["-c", "4", "-m", "100", "-D", SECONDS],
        url: || format!("https://{}/p0", host(0)),
        count: Count::PerSecond,
        targets: [Some(0.9), None, Some(4.5)],
    },
    Load {
        name: "1 MiB bodies",
        family: 0,
        tls: false,
        options: &["--h1", "-c", "8", "-D", SECONDS],
        url: || format!("http://{}/p0/big", host(0)),
        count: Count::GigabytesPerSecondOfCpu,
        targets: [Some(2.5), None, None],
    },
];

/// Medians of a proxy.
struct Measured {
    kind: Kind,
    figure: f64,
    cpu_micros: f64,
}

/// Rounds of each proxy in turn.
fn rounds(
    proxies: &[Proxy],
    (family, tls, count): (usize, bool, Count),
    options: &[&str],
    urls: &[String],
) -> anyhow::Result<Vec<Measured>> {
    let mut figures = vec![(Vec::new(), Vec::new()); proxies.len()];
    for round in 0..=ROUNDS {
        for (proxy, (figures, micros)) in proxies.iter().zip(&mut figures) {
            let before = proxy.cpu_seconds();
            let said = h2load(proxy.address(family, tls), options, urls)?;
            ensure!(said.failed == 0.0 && said.done > 0.0, "{}: {} failed", proxy.kind.name(), said.failed);
            let cpu = (proxy.cpu_seconds() - before) / said.done;
            // The first one warms it up.
            if round > 0 {
                micros.push(cpu * 1e6);
                figures.push(match count {
                    Count::PerSecond => said.per_second,
                    Count::PerSecondOfCpu => 1.0 / cpu,
                    Count::GigabytesPerSecondOfCpu => BIG_BYTES as f64 / cpu / 1e9,
                });
            }
        }
    }
    let measured = proxies.iter().zip(figures).map(|(proxy, (figures, micros))| Measured {
        kind: proxy.kind,
        figure: median(figures),
        cpu_micros: median(micros),
    });
    Ok(measured.collect())
}

/// Weft's figure beside that of each peer.
fn beside(
    name: &str,
    (unit, better): (&str, Better),
    figures: &[(Kind, f64)],
    targets: [Option<f64>; 3],
) -> Vec<Row> {
    let of = |kind: Kind| figures.iter().find(|(known, _)| *known == kind).map(|(_, figure)| *figure);
    let weft = of(Kind::Weft).unwrap_or(f64::NAN);
    let peers = PEERS.into_iter().zip(targets).filter_map(|(kind, target)| Some((kind, of(kind)?, target)));
    peers
        .map(|(kind, peer, target)| match target {
            Some(target) => Row::beside(name, unit, weft, (kind.name(), peer), better, target),
            None => Row::bounded(name, unit, weft, (kind.name(), peer), better, None),
        })
        .collect()
}

/// One route for each family.
fn few(ground: &Ground) -> anyhow::Result<Vec<Row>> {
    let proxies = all(ground, FEW)?;
    let mut rows = memory(&proxies)?;
    let mut most_of_nginx = f64::NAN;
    for load in &LOADS {
        let measured = rounds(&proxies, (load.family, load.tls, load.count), load.options, &[(load.url)()])?;
        let unit = match load.count {
            Count::PerSecond => "1/s",
            Count::PerSecondOfCpu => "1/CPU s",
            Count::GigabytesPerSecondOfCpu => "GB/CPU s",
        };
        let figures: Vec<_> = measured.iter().map(|one| (one.kind, one.figure)).collect();
        rows.extend(beside(load.name, (unit, Better::Higher), &figures, load.targets));
        let micros: Vec<_> = measured.iter().map(|one| (one.kind, one.cpu_micros)).collect();
        rows.extend(beside(&format!("{}: CPU each", load.name), ("us", Better::Lower), &micros, [None; 3]));
        if most_of_nginx.is_nan() {
            most_of_nginx =
                figures.iter().find(|(kind, _)| *kind == Kind::Nginx).map_or(f64::NAN, |(_, most)| *most);
        }
    }
    rows.extend(paced(&proxies, most_of_nginx / 2.0)?);
    Ok(rows)
}

/// Nobody has asked much, nor lately, as with a proxy that is idle: no row is about what a start leaves for a moment.
const REST: Duration = Duration::from_secs(5);

/// Before anybody has asked much, and for connections on which nothing is asked.
fn memory(proxies: &[Proxy]) -> anyhow::Result<Vec<Row>> {
    std::thread::sleep(REST);
    let (mut idle_mb, mut each_kb) = (Vec::new(), Vec::new());
    for proxy in proxies {
        let before = proxy.memory_kb()?;
        let kept = idle(proxy.address(0, false), &host(0), IDLE_CONNECTIONS)?;
        each_kb.push((proxy.kind, (proxy.memory_kb()? - before) / IDLE_CONNECTIONS as f64));
        idle_mb.push((proxy.kind, before / 1024.0));
        drop(kept);
    }
    let with = |name: &str, unit, figures: &[(Kind, f64)], target: f64| {
        let weft = figures.iter().find(|(kind, _)| *kind == Kind::Weft).map_or(f64::NAN, |(_, own)| *own);
        let own = Row::alone(name, unit, weft, Better::Lower, target);
        let peers = beside(name, (unit, Better::Lower), figures, [None; 3]);
        [own].into_iter().chain(peers).collect::<Vec<_>>()
    };
    let mut rows = with("memory, idle", "MiB", &idle_mb, 6.0);
    rows.extend(with("memory of an idle connection", "KiB", &each_kb, 20.0));
    Ok(rows)
}

/// Open loop, at half of what nginx can; what cannot do as much has no figure.
fn paced(proxies: &[Proxy], per_second: f64) -> anyhow::Result<Vec<Row>> {
    to_client_core();
    let _awake = Awake::keep();
    let paced = [Kind::Weft, Kind::Nginx, Kind::Haproxy];
    let mut figures = vec![Vec::new(); proxies.len()];
    for _ in 0..PACED_ROUNDS {
        for (proxy, figures) in
            proxies.iter().zip(&mut figures).filter(|(proxy, _)| paced.contains(&proxy.kind))
        {
            let load = (per_second, PACED, PACED_CONNECTIONS);
            figures.push(latencies(proxy.address(0, false), &host(0), load)?);
        }
    }
    let mut rows = Vec::new();
    for (percent, targets) in [(50.0, [None; 3]), (99.0, [None, Some(1.0), None])] {
        let of = |rounds: &Vec<Vec<f64>>| {
            median(rounds.iter().map(|one| percentile(one.clone(), percent)).collect())
        };
        let figures: Vec<_> = proxies
            .iter()
            .zip(&figures)
            .filter(|(_, rounds)| !rounds.is_empty())
            .map(|(proxy, rounds)| (proxy.kind, of(rounds)))
            .collect();
        let name = format!("HTTP/1.1 at half of nginx's most, p{percent}");
        rows.extend(beside(&name, ("ms", Better::Lower), &figures, targets));
    }
    Ok(rows)
}

/// Fifty paths of the last host in turn.
fn many(ground: &Ground, name: &str, shape: Shape) -> anyhow::Result<Vec<Row>> {
    let proxies = all(ground, shape)?;
    let last = shape.last().0;
    let urls: Vec<String> = (0..50).map(|n| format!("http://{last}/p{}/x", shape.paths - 1 - n)).collect();
    let measured = rounds(&proxies, (0, false, Count::PerSecond), KEEP_ALIVE, &urls)?;
    let figures: Vec<_> = measured.iter().map(|one| (one.kind, one.figure)).collect();
    let mut rows =
        beside(&format!("{name}: HTTP/1.1 kept alive"), ("1/s", Better::Higher), &figures, [None; 3]);
    let ready: Vec<_> = proxies.iter().map(|one| (one.kind, one.ready_after.as_secs_f64() * 1e3)).collect();
    rows.extend(beside(
        &format!("{name}: from a start until served"),
        ("ms", Better::Lower),
        &ready,
        [None; 3],
    ));
    let memory = proxies.iter().map(|one| Ok((one.kind, one.memory_kb()? / 1024.0)));
    let memory = memory.collect::<anyhow::Result<Vec<_>>>()?;
    rows.extend(beside(&format!("{name}: memory"), ("MiB", Better::Lower), &memory, [None; 3]));
    Ok(rows)
}
