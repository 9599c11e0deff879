//! A real Kubernetes cluster (`tests/cluster`): how long a pod takes, what an agent asks of the API server, what Weft weighs.
//!
//! ```text
//!  measure -> for each part: the tier up -> a child on the cluster's LAN -> rows; the tier down (tier.rs)
//!    pods     Weft on node1, bridge + host-local on node2: from created to Ready, in turn
//!    agents   Weft on every node: an idle while, then many pods and Services
//! ```

mod agents;
mod pods;
mod tier;

use std::path::Path;

use anyhow::bail;
use serde_json::json;

use super::row::Row;

const PARTS: [&str; 2] = ["pods", "agents"];

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for part in PARTS {
        rows.extend(tier::rows_of(part, weft)?);
    }
    Ok(rows)
}

/// One part, by a process on the LAN of a cluster that is up and has no network yet.
pub(crate) fn inside(part: &str, weft: &Path) -> anyhow::Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match part {
        "pods" => runtime.block_on(pods::measure(weft)),
        "agents" => runtime.block_on(agents::measure(weft)),
        other => bail!("the benchmark of the cluster has no part {other}"),
    }
}

/// A pod on a node that does nothing: no probe, no volume, hence Ready as soon as its container runs.
fn sleeper(node: &str, name: &str) -> serde_json::Value {
    json!({
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeName": node, "automountServiceAccountToken": false, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "sleep", "image": "weft.network/test:1", "command": ["sleep", "infinity"]}]
        }
    })
}
