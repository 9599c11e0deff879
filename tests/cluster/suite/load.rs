//! Pods that ask a Service all the while (`weft lab load`), and what came of it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::cluster::{Cluster, PATIENCE, in_url};

/// The last line that a load pod printed: totals since its start.
#[derive(Debug, Deserialize)]
pub(crate) struct Totals {
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    pub(crate) longest_ms: u64,
    pub(crate) first_error: Option<String>,
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { requests, failed, longest_ms, first_error } = self;
        write!(f, "{requests} requests, {failed} failed, the longest took {longest_ms} ms")?;
        first_error.as_ref().map_or(Ok(()), |error| write!(f, ", the first failure was: {error}"))
    }
}

/// A running load pod; it ends with this value.
pub(crate) struct Load<'a> {
    cluster: &'a Cluster,
    name: String,
}

impl<'a> Load<'a> {
    /// Connections that stay, to both ClusterIPs of Service `service`.
    pub(crate) fn on_established_connections(
        cluster: &'a Cluster,
        node: &str,
        service: &str,
    ) -> anyhow::Result<Self> {
        Self::start(cluster, node, "keep", &["--connections", "4"], &urls(cluster, service)?)
    }

    /// A new connection for every request, to both ClusterIPs.
    pub(crate) fn on_new_connections_by_address(
        cluster: &'a Cluster,
        node: &str,
        service: &str,
    ) -> anyhow::Result<Self> {
        Self::start(cluster, node, "new", &["--connections", "2"], &urls(cluster, service)?)
    }

    /// A name look-up and a new connection for every request.
    pub(crate) fn on_new_connections(
        cluster: &'a Cluster,
        node: &str,
        service: &str,
    ) -> anyhow::Result<Self> {
        Self::start(cluster, node, "new", &[], &[format!("http://{service}.suite/hostname")])
    }

    fn start(
        cluster: &'a Cluster,
        node: &str,
        mode: &str,
        flags: &[&str],
        urls: &[String],
    ) -> anyhow::Result<Self> {
        // A name of its own: the log of a pod that bore the same one is answered until its container is gone.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = format!("load-{mode}-{node}-{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let words: Vec<_> =
            [mode].iter().chain(flags).map(|word| (*word).to_owned()).chain(urls.iter().cloned()).collect();
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "load"}},
            "spec": {
                "nodeName": node, "terminationGracePeriodSeconds": 0, "tolerations": [{"operator": "Exists"}],
                "containers": [{
                    "name": "load", "image": "weft.network/test:1", "command": ["weft", "lab", "load"], "args": words
                }]
            }
        });
        cluster.apply(&pod.to_string())?;
        let load = Self { cluster, name };
        cluster.within(PATIENCE, "the load runs", || {
            let totals = load.totals()?;
            ensure!(totals.requests > 10, "only {} requests", totals.requests);
            Ok(())
        })?;
        let totals = load.totals()?;
        ensure!(totals.failed == 0, "before anything was disturbed: {totals}");
        Ok(load)
    }

    pub(crate) fn totals(&self) -> anyhow::Result<Totals> {
        let said = self.cluster.kubectl(&["logs", "--tail=1", &self.name])?;
        serde_json::from_str(said.trim()).with_context(|| format!("{} printed {said:?}", self.name))
    }

    /// Not one request failed since the start, and requests still come through. Prints the totals.
    pub(crate) fn unharmed(&self, when: &str) -> anyhow::Result<()> {
        let before = self.cluster.within(PATIENCE, "the load's log", || self.totals())?;
        self.cluster.within(Duration::from_secs(20), "requests go on", || {
            ensure!(self.totals()?.requests > before.requests + 10, "no requests since: {before}");
            Ok(())
        })?;
        let totals = self.totals()?;
        ensure!(totals.failed == 0, "{when}: {}: {totals}", self.name);
        println!("        {} {when}: {totals}", self.name);
        Ok(())
    }
}

/// Both ClusterIPs of a Service.
fn urls(cluster: &Cluster, service: &str) -> anyhow::Result<Vec<String>> {
    let ips = cluster.cluster_ips(service)?;
    ensure!(ips.len() == 2, "{service} has not both families: {ips:?}");
    Ok(ips.iter().map(|ip| format!("http://{}/hostname", in_url(ip))).collect())
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.kubectl(&["delete", "pod", &self.name, "--grace-period=0", "--force"]);
    }
}
