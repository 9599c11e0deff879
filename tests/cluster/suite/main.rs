//! The conformance-like suite of the cluster tier: what the Kubernetes documentation promises of a network, asked of a real
//! cluster that has Weft as its only network. `tests/cluster/up` starts it.
//!
//! ```text
//! cargo test -p weft-tests --test cluster -- [WORD...]     cases whose name contains a word; all by default
//! cases (areas below) --kubectl, nsenter--> cluster --> one line a case, then the counts
//! load pods ask Services all the while; a case that disturbs the cluster looks whether one request failed
//! ```

#![allow(clippy::unwrap_used, reason = "a test's set-up fails the test")]

mod cluster;
mod disruption;
mod dns;
mod identity;
mod ingress;
mod install;
mod leaks;
mod load;
mod loadbalancer;
mod outside;
mod pods;
mod policy;
mod refusals;
mod services;

use std::process::ExitCode;
use std::time::Instant;

use cluster::Cluster;

/// A sentence that holds, and how it is found out.
struct Case {
    says: &'static str,
    check: fn(&Cluster) -> anyhow::Result<()>,
}

const fn case(says: &'static str, check: fn(&Cluster) -> anyhow::Result<()>) -> Case {
    Case { says, check }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let areas: [(&str, &[Case]); 12] = [
        ("pods", pods::CASES),
        ("services", services::CASES),
        ("outside", outside::CASES),
        ("loadbalancer", loadbalancer::CASES),
        ("ingress", ingress::CASES),
        ("dns", dns::CASES),
        ("policy", policy::CASES),
        ("identity", identity::CASES),
        ("disruption", disruption::CASES),
        ("leaks", leaks::CASES),
        ("refusals", refusals::CASES),
        ("install", install::CASES),
    ];
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster,
        Err(error) => {
            eprintln!("the suite cannot start: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let (mut passed, mut failed) = (0, 0);
    for (area, case) in areas.iter().flat_map(|(area, cases)| cases.iter().map(move |case| (area, case))) {
        let name = format!("{area}: {}", case.says);
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        let started_at = Instant::now();
        let outcome = (case.check)(&cluster);
        let seconds = started_at.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok      {name} ({seconds:.1} s)");
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {name} ({seconds:.1} s)\n        {error:#}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
