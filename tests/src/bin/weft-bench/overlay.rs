//! The userspace tunnel beside wireguard-go and boringtun: two namespaces, one veth pair (MTU 1500), tunnel MTU 1420; and with many
//! peers.
//!
//! All run at their documented best setting: offloads on, which those that have them turn on by themselves. Rounds are interleaved.

mod many;
mod tunnels;

use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::rig::{cpu_seconds, ip, private_names, resident_mib, until};
use super::row::{Better, Row, median};
use tunnels::{End, Kind, Programs};

pub(crate) use tunnels::{BORINGTUN, WIREGUARD_GO};

const ROUNDS: usize = 3;
const SECONDS: &str = "3";

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let programs = Programs::new(weft)?;
    underlay()?;
    let ends = [End::new(0), End::new(1)];
    let mut rounds = Kind::ALL.map(|kind| (kind, Vec::new()));
    for _ in 0..ROUNDS {
        for (kind, rounds) in &mut rounds {
            rounds.push(round(&programs, *kind, &ends)?);
        }
    }
    let [ours, peers @ ..] = &rounds;
    let of = |rounds: &[Round], pick: fn(&Round) -> f64| median(rounds.iter().map(pick).collect());
    let mut rows = Vec::new();
    for (name, unit, pick, better, targets) in FIGURES {
        for ((kind, theirs), target) in peers.iter().zip(targets) {
            let peer = (kind.name(), of(theirs, pick));
            rows.push(match target {
                Target::Ratio(target) => Row::beside(name, unit, of(&ours.1, pick), peer, better, target),
                Target::Own(target) => {
                    Row::bounded(name, unit, of(&ours.1, pick), peer, better, Some(target))
                }
                Target::None => Row::bounded(name, unit, of(&ours.1, pick), peer, better, None),
            });
        }
    }
    rows.extend(many::measure(&programs)?);
    Ok(rows)
}

struct Round {
    gigabits: f64,
    gigabits_of_four: f64,
    cpu_seconds_per_gib: f64,
    resident_mib: f64,
    /// With every packet of the underlay on its own.
    gigabits_unsegmented: f64,
    small_kpps: f64,
    /// Of a tunnel that does nothing else.
    round_trip_millis: f64,
}

#[derive(Clone, Copy)]
enum Target {
    /// Of the ratio to the peer.
    Ratio(f64),
    /// Of Weft's own figure.
    Own(f64),
    None,
}

/// Targets beside wireguard-go and beside boringtun.
type Figure = (&'static str, &'static str, fn(&Round) -> f64, Better, [Target; 2]);

const FIGURES: [Figure; 7] = [
    ("TCP, one stream", "Gbit/s", |r| r.gigabits, Better::Higher, [Target::Ratio(1.8), Target::None]),
    (
        "TCP, four streams",
        "Gbit/s",
        |r| r.gigabits_of_four,
        Better::Higher,
        [Target::Ratio(1.8), Target::None],
    ),
    (
        "CPU of both tunnels per GiB",
        "s",
        |r| r.cpu_seconds_per_gib,
        Better::Lower,
        [Target::Ratio(0.5), Target::None],
    ),
    ("resident memory per end", "MiB", |r| r.resident_mib, Better::Lower, [Target::Own(20.0), Target::None]),
    (
        "TCP, underlay without segmentation",
        "Gbit/s",
        |r| r.gigabits_unsegmented,
        Better::Higher,
        [Target::Ratio(1.8), Target::None],
    ),
    (
        "UDP of 64 bytes, delivered",
        "kpps",
        |r| r.small_kpps,
        Better::Higher,
        [Target::Ratio(3.0), Target::None],
    ),
    ("round trip, idle", "ms", |r| r.round_trip_millis, Better::Lower, [Target::Ratio(1.0), Target::None]),
];

fn underlay() -> anyhow::Result<()> {
    private_names()?;
    ip("netns add end0")?;
    ip("netns add end1")?;
    ip("-n end0 link add lan type veth peer name lan netns end1")?;
    for n in 0..2 {
        ip(&format!("-n end{n} addr add 192.0.2.{}/24 dev lan", n + 1))?;
        ip(&format!("-n end{n} link set lan up"))?;
        ip(&format!("-n end{n} link set lo up"))?;
    }
    Ok(())
}

fn round(programs: &Programs, kind: Kind, ends: &[End; 2]) -> anyhow::Result<Round> {
    let mut tunnels =
        [programs.start(kind, &ends[0], &[&ends[1]])?, programs.start(kind, &ends[1], &[&ends[0]])?];
    let measured = traffic(ends, &tunnels);
    for (tunnel, end) in tunnels.iter_mut().zip(ends) {
        tunnels::end(tunnel, end)?;
    }
    measured
}

fn traffic(ends: &[End; 2], tunnels: &[Child; 2]) -> anyhow::Result<Round> {
    for end in ends {
        end.bring_up()?;
    }
    until("the tunnel", || {
        let ping = ends[0].command("ping").args(["-c1", "-W1", &ends[1].inner()]).output();
        ping.is_ok_and(|output| output.status.success())
    })?;
    let cpu = || -> f64 { tunnels.iter().map(|tunnel| cpu_seconds(tunnel.id())).sum() };
    let round_trip_millis = idle_round_trip(ends)?;
    let before = cpu();
    let tcp = iperf(ends, &[])?;
    let used = cpu() - before;
    let resident_mib = resident_mib(tunnels[0].id())?;
    let four = iperf(ends, &["-P", "4"])?;
    let udp = iperf(ends, &["-u", "-b", "0", "-l", "64"])?;
    segments(1)?;
    let alone = iperf(ends, &[]);
    segments(65_535)?;
    let number = |report: &Value, path: &str| {
        report.pointer(path).and_then(Value::as_f64).with_context(|| format!("iperf3 has no {path}"))
    };
    let gigabits =
        |report: &Value| Ok::<_, anyhow::Error>(number(report, "/end/sum_received/bits_per_second")? / 1e9);
    let delivered = number(&udp, "/end/sum/packets")? - number(&udp, "/end/sum/lost_packets")?;
    Ok(Round {
        gigabits: gigabits(&tcp)?,
        gigabits_of_four: gigabits(&four)?,
        cpu_seconds_per_gib: used / (number(&tcp, "/end/sum_received/bytes")? / 1024f64.powi(3)),
        resident_mib,
        gigabits_unsegmented: gigabits(&alone?)?,
        small_kpps: delivered / number(&udp, "/end/sum/seconds")? / 1e3,
        round_trip_millis,
    })
}

/// The median of some, in milliseconds.
fn idle_round_trip(ends: &[End; 2]) -> anyhow::Result<f64> {
    let ping = ends[0].command("ping").args(["-c", "40", "-i", "0.02", &ends[1].inner()]).output()?;
    let text = String::from_utf8(ping.stdout)?;
    let millis = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse().ok();
    let all: Vec<f64> = text.lines().filter_map(millis).collect();
    ensure!(!all.is_empty(), "no ping came back");
    Ok(median(all))
}

/// How many segments the underlay's links take at once; what is more is cut before.
fn segments(most: u32) -> anyhow::Result<()> {
    (0..2).try_for_each(|n| ip(&format!("-n end{n} link set lan gso_max_segs {most}")))
}

/// What the client reports.
fn iperf(ends: &[End; 2], flags: &[&str]) -> anyhow::Result<Value> {
    let mut server = ends[1].command("iperf3").args(["-s", "-1"]).stdout(Stdio::null()).spawn()?;
    let listens = || {
        let sockets = ends[1].command("ss").args(["-Hltn", "sport = :5201"]).output();
        sockets.is_ok_and(|output| !output.stdout.is_empty())
    };
    until("iperf3", listens)?;
    let mut client = ends[0].command("iperf3");
    let output = client.args(["-c", &ends[1].inner(), "-t", SECONDS, "-J"]).args(flags).output()?;
    server.wait()?;
    serde_json::from_slice(&output.stdout).context("iperf3's report")
}
