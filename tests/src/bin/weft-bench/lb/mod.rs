//! Addresses of LoadBalancer Services: how long a failure is noticed by a client of the LAN, and what the role costs.
//!
//! ```text
//!  measure -> moves     in the lab: a client outside the cluster behind a switch that learns; links cut, nodes cordoned
//!          -> services  one node with 1,000 Services: allocation, idle CPU, memory, ARP
//! ```

mod lab;
mod moves;
mod probe;
mod services;

use std::path::Path;

use anyhow::bail;

use super::row::Row;

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rows = super::outside("lb/moves", weft)?;
    rows.extend(super::outside("lb/services", weft)?);
    Ok(rows)
}

pub(crate) fn inside(part: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    match part {
        "moves" => moves::measure(weft),
        "services" => services::measure(weft),
        other => bail!("the benchmark of load balancers has no part {other}"),
    }
}

/// What runs on the client of the lab.
pub(crate) fn probe(words: &[&str]) -> anyhow::Result<()> {
    probe::run(words)
}
