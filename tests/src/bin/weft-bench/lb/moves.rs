//! Addresses that move: a node's cable is cut without a goodbye, and a node is cordoned, while a client of the LAN asks.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::lab::Lab;
use super::probe::{Probe, now_micros};
use crate::row::{Better, Row, median, percentile};

const TRIALS: usize = 50;
/// A client that notices at once that nobody answers: what it sees is late by this at most.
const IMPATIENT: Duration = Duration::from_millis(25);
const REQUESTS: usize = 10_000;
/// Moves there and back while the requests of a drain run.
const DRAINS: usize = 3;
/// MetalLB, concepts/layer2: "within a few seconds"; more than about ten seconds are to be reported as a bug.
const METALLB_SECONDS: f64 = 10.0;

pub(super) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let lab = Lab::up(weft)?;
    lab.serve("Local")?;
    let (pair, node) = lab.pair_of_one_node()?;
    let mut rows = failover(weft, &lab, pair, node)?;
    lab.serve("Cluster")?;
    for address in pair {
        lab.await_answer(address, node)?;
    }
    rows.push(drain(weft, &lab, pair, node)?);
    Ok(rows)
}

fn failover(weft: &Path, lab: &Lab, pair: [IpAddr; 2], node: &str) -> anyhow::Result<Vec<Row>> {
    let mut samples: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for trial in 0..TRIALS {
        let probe = Probe::start(weft, &pair, IMPATIENT, 1)?;
        await_both(&probe, &pair).with_context(|| format!("trial {trial}"))?;
        let cut_micros = now_micros();
        lab.cable(node, "down")?;
        let gone_micros = now_micros();
        for seconds in gaps(&probe, &pair, gone_micros)?.iter().zip(&mut samples).map(|(gap, into)| {
            into.push(*gap);
            gap
        }) {
            ensure!(seconds.is_finite(), "no answer");
        }
        eprintln!(
            "trial {trial}: cut within {} ms; {:.3} s, {:.3} s",
            (gone_micros - cut_micros) / 1000,
            samples[0][trial],
            samples[1][trial]
        );
        drop(probe);
        lab.cable(node, "up")?;
        for address in pair {
            lab.await_answer(address, node)?;
        }
    }
    let of = |samples: &Vec<f64>, family: &str| {
        let documented = ("MetalLB's documentation", METALLB_SECONDS);
        [
            Row::alone(
                &format!("failover, {family}, p50"),
                "s",
                median(samples.clone()),
                Better::Lower,
                None,
            ),
            Row::documented(
                &format!("failover, {family}, p99 of {TRIALS}"),
                "s",
                percentile(samples.clone(), 99.0),
                documented,
                1.0,
            ),
        ]
    };
    Ok(samples.iter().zip(["IPv4", "IPv6"]).flat_map(|(samples, family)| of(samples, family)).collect())
}

fn await_both(probe: &Probe, pair: &[IpAddr; 2]) -> anyhow::Result<()> {
    for address in pair {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let asked = probe.asked.recv_timeout(Duration::from_secs(5)).context("the probe is silent")?;
            if asked.address == *address && asked.outcome.is_ok() {
                break;
            }
            ensure!(Instant::now() < deadline, "{address} does not answer: {:?}", asked.outcome);
        }
    }
    Ok(())
}

/// Seconds from the cut to the end of the first request that began after it and was answered.
fn gaps(probe: &Probe, pair: &[IpAddr; 2], gone_micros: u64) -> anyhow::Result<[f64; 2]> {
    let mut gaps = [f64::NAN; 2];
    let deadline = Instant::now() + Duration::from_secs(60);
    while gaps.iter().any(|gap| gap.is_nan()) {
        let asked = probe.asked.recv_timeout(Duration::from_secs(5)).context("the probe is silent")?;
        ensure!(Instant::now() < deadline, "no answer for a minute: {:?}", asked.outcome);
        let at = usize::from(asked.address == pair[1]);
        if asked.outcome.is_ok() && asked.began_micros >= gone_micros && gaps[at].is_nan() {
            gaps[at] = (asked.ended_micros - gone_micros) as f64 / 1e6;
        }
    }
    Ok(gaps)
}

/// Requests of clients while the node that answers is cordoned and let in again: none may fail.
fn drain(weft: &Path, lab: &Lab, pair: [IpAddr; 2], node: &str) -> anyhow::Result<Row> {
    let probe = Probe::start(weft, &pair, Duration::from_secs(5), 2)?;
    await_both(&probe, &pair)?;
    let mut failed = 0.0;
    let (mut done, mut moved) = (0, 0);
    while done < REQUESTS || moved < 2 * DRAINS {
        let asked = probe.asked.recv_timeout(Duration::from_secs(10)).context("the probe is silent")?;
        done += 1;
        if let Err(why) = asked.outcome {
            eprintln!("drain: {} failed: {why}", asked.address);
            failed += 1.0;
        }
        if moved < 2 * DRAINS && done > (moved + 1) * REQUESTS / (2 * DRAINS + 1) {
            lab.cordon(node, moved % 2 == 0)?;
            moved += 1;
        }
    }
    Ok(Row::alone(&format!("drain, failed of {done} requests"), "", failed, Better::Lower, 0.0))
}
