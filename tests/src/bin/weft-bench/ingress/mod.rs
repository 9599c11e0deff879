//! `weft ingress` beside Debian's nginx and HAProxy and beside Traefik: requests of many kinds, memory, and many routes.
//!
//! ```text
//!  measure -> proxies  one thread of each proxy on one core, load and backend on the other; files say the routes
//!          -> agent    Ingresses at the API of a real agent: how long until they are served, and who is lost meanwhile
//! ```
//!
//! Both in a namespace of their own, over its loopback link; requests and answers cost no wire.

mod agent;
mod backend;
mod load;
mod peers;
mod proxies;
mod table;

use std::path::Path;

use anyhow::bail;

use super::row::Row;
pub(crate) use peers::TRAEFIK;

/// Of the proxy that is measured, and of whatever loads it and answers it.
const PROXY_CORE: &str = "0";
const OTHER_CORE: &str = "1";

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rows = super::outside("ingress/proxies", weft)?;
    rows.extend(super::outside("ingress/agent", weft)?);
    Ok(rows)
}

pub(crate) fn inside(part: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    match part {
        "proxies" => proxies::measure(weft),
        "agent" => agent::measure(weft),
        other => bail!("the benchmark of the ingress has no part {other}"),
    }
}
