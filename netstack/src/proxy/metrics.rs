//! What dashboards made for kube-proxy ask for, under its names and with its buckets (kubernetes 1.37, pkg/proxy/metrics).
//!
//! ```text
//!  Snapshots, Reports of the loop --follow--> changes, programming latency --+
//!  the loop's Tally ---------------------------------------------------------+--> Collector --> /metrics
//!  applier: flows, kernel time, Services without local endpoints ------------+
//!  health: answers by code --------------------------------------------------+
//! ```
//!
//! kube-proxy counts its two families apart; here one pass programs both, so that a pass stands under both families.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::sync::watch;
use weft_model::snapshot::changes;
use weft_model::{Generation, Report, Snapshot};

use super::plan::{ProxyPlan, WithoutLocal};
use crate::reconcile::Tally;

/// What the proxy counts of itself.
#[derive(Debug)]
pub struct ProxyMetrics {
    /// Seconds of processor time that the kernel took for each transaction.
    commits: Histogram,
    /// Seconds that each look at the tracked UDP flows took.
    reconciled: Histogram,
    /// IPv4, IPv6; so wherever there are two.
    deleted_flows: [AtomicU64; 2],
    without_local: Mutex<WithoutLocal>,
    changes: Mutex<Changes>,
    /// Seconds from the change of a pod or Service to its rules, by family.
    programming: [Histogram; 2],
    healthz: Answers,
    livez: Answers,
}

/// HTTP answers by whether they were good.
#[derive(Debug, Default)]
pub(super) struct Answers {
    good: AtomicU64,
    bad: AtomicU64,
}

/// Changes of objects that came, and those among them that are not in the kernel yet.
#[derive(Clone, Copy, Debug, Default)]
struct Changes {
    services: u64,
    services_pending: u64,
    endpoints: u64,
    endpoints_pending: u64,
}

impl Default for ProxyMetrics {
    fn default() -> Self {
        let programming = || Histogram::new(programming_buckets());
        Self {
            // 4 us to 2 s.
            commits: Histogram::new(exponential_buckets(0.000_004, 2.0, 20)),
            reconciled: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            deleted_flows: Default::default(),
            without_local: Mutex::default(),
            changes: Mutex::default(),
            programming: [programming(), programming()],
            healthz: Answers::default(),
            livez: Answers::default(),
        }
    }
}

/// 0.25 s to 5 min, as the service level indicator of network programming latency has them.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let steps = |first: u32, step: usize, count: usize| (first..).step_by(step).take(count).map(f64::from);
    [0.25, 0.5].into_iter().chain(steps(1, 1, 59)).chain(steps(60, 5, 12)).chain(steps(120, 30, 7))
}

impl Answers {
    pub(super) fn count(&self, good: bool) {
        let counter = if good { &self.good } else { &self.bad };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl ProxyMetrics {
    pub(super) fn healthz(&self) -> &Answers {
        &self.healthz
    }

    pub(super) fn livez(&self) -> &Answers {
        &self.livez
    }

    pub(super) fn committed(&self, kernel_took: Duration) {
        self.commits.observe(kernel_took.as_secs_f64());
    }

    pub(super) fn reconciled(&self, took: Duration, deleted: [u64; 2]) {
        self.reconciled.observe(took.as_secs_f64());
        for (counter, deleted) in self.deleted_flows.iter().zip(deleted) {
            counter.fetch_add(deleted, Ordering::Relaxed);
        }
    }

    pub(super) fn programmed(&self, plan: &ProxyPlan) {
        let sum = plan.without_local.values().fold(WithoutLocal::default(), |sum, one| sum.plus(*one));
        *self.without_local.lock().unwrap_or_else(PoisonError::into_inner) = sum;
    }

    /// Counts what Snapshots change and how long that took to be programmed, until the loop ends.
    pub async fn follow(
        self: Arc<Self>,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut reports: watch::Receiver<Report>,
    ) -> Result<(), String> {
        let mut follower = Follower::new(&self, Timestamp::now().as_millisecond());
        loop {
            let ended = tokio::select! {
                biased;
                changed = snapshots.changed() => changed.is_err(),
                changed = reports.changed() => changed.is_err(),
            };
            if ended {
                return Ok(());
            }
            let snapshot = snapshots.borrow_and_update().clone();
            if let Some(snapshot) = snapshot {
                follower.saw(snapshot);
            }
            let applied = reports.borrow_and_update().generation;
            follower.applied(applied, Timestamp::now().as_millisecond());
        }
    }
}

/// What came and is not programmed yet.
struct Follower<'a> {
    metrics: &'a ProxyMetrics,
    started_millis: i64,
    seen: Option<Arc<Snapshot>>,
    /// By generation that holds it: family and time of a change that is not programmed yet.
    waiting: Vec<(Generation, usize, i64)>,
}

impl<'a> Follower<'a> {
    fn new(metrics: &'a ProxyMetrics, started_millis: i64) -> Self {
        Self { metrics, started_millis, seen: None, waiting: Vec::new() }
    }

    fn saw(&mut self, snapshot: Arc<Snapshot>) {
        if self.seen.as_ref().is_some_and(|seen| seen.generation == snapshot.generation) {
            return;
        }
        let before = self.seen.as_deref();
        let (no_services, no_slices) = (Arc::default(), Arc::default());
        let services = before.map_or(&no_services, |before| &before.services);
        let slices = before.map_or(&no_slices, |before| &before.endpoint_slices);
        let changed_services = changes(services, &snapshot.services).count();
        let mut changed_slices = 0;
        for (_, _, slice) in changes(slices, &snapshot.endpoint_slices) {
            changed_slices += 1;
            // What changed before this process began is not its delay.
            let triggered = slice.and_then(|slice| Some((slice.ipv6, slice.triggered_millis?)));
            if let Some((ipv6, millis)) = triggered.filter(|(_, millis)| *millis > self.started_millis) {
                self.waiting.push((snapshot.generation, usize::from(ipv6), millis));
            }
        }
        let mut counts = self.metrics.changes.lock().unwrap_or_else(PoisonError::into_inner);
        counts.services += changed_services as u64;
        counts.services_pending += changed_services as u64;
        counts.endpoints += changed_slices;
        counts.endpoints_pending += changed_slices;
        self.seen = Some(snapshot);
    }

    fn applied(&mut self, generation: Generation, now_millis: i64) {
        for (_, family, millis) in self.waiting.extract_if(.., |(of, ..)| *of <= generation) {
            let took = Duration::from_millis(u64::try_from(now_millis - millis).unwrap_or(0));
            self.metrics.programming[family].observe(took.as_secs_f64());
        }
        if self.seen.as_ref().is_some_and(|seen| seen.generation <= generation) {
            let mut counts = self.metrics.changes.lock().unwrap_or_else(PoisonError::into_inner);
            counts.services_pending = 0;
            counts.endpoints_pending = 0;
        }
    }
}

/// All of it for `/metrics`.
#[derive(Clone, Debug)]
pub struct KubeProxyNames {
    pub metrics: Arc<ProxyMetrics>,
    /// Of the loop `proxy`.
    pub tally: Arc<Tally>,
}

impl Collector for KubeProxyNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self { metrics, tally } = self;
        let mut page = Page { encoder: &mut encoder };
        page.passes(tally)?;
        page.changes(*metrics.changes.lock().unwrap_or_else(PoisonError::into_inner))?;
        page.without_local(*metrics.without_local.lock().unwrap_or_else(PoisonError::into_inner))?;
        page.by_family(
            "kubeproxy_network_programming_duration_seconds",
            "In Cluster Network Programming Latency in seconds",
            metrics.programming.each_ref().map(|histogram| histogram as &dyn EncodeMetric),
        )?;
        page.of_both(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "ReconcileConntrackFlowsLatency latency in seconds",
            &metrics.reconciled,
        )?;
        let [ipv4, ipv6] = metrics.deleted_flows.each_ref().map(counter);
        page.by_family(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "Cumulative conntrack flows deleted by conntrack reconciler",
            [&ipv4, &ipv6],
        )?;
        page.answers("kubeproxy_proxy_healthz", "Cumulative proxy healthz HTTP status", &metrics.healthz)?;
        page.answers("kubeproxy_proxy_livez", "Cumulative proxy livez HTTP status", &metrics.livez)?;
        page.single(
            "weft_proxy_commit_cpu_seconds",
            "Processor time that the kernel took for a transaction of the proxy's rules",
            &metrics.commits,
        )
    }
}

fn counter(count: &AtomicU64) -> ConstCounter<u64> {
    ConstCounter::new(count.load(Ordering::Relaxed))
}

fn gauge(count: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Writes metrics one after the other, counters without their `_total`.
struct Page<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
}

type Labels<'a> = &'a [(&'static str, &'static str)];

impl Page<'_, '_> {
    fn family(&mut self, name: &str, help: &str, metrics: &[(Labels<'_>, &dyn EncodeMetric)]) -> fmt::Result {
        let Some((_, first)) = metrics.first() else { return Ok(()) };
        let mut family = self.encoder.encode_descriptor(name, help, None, first.metric_type())?;
        for (labels, metric) in metrics {
            metric.encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn single(&mut self, name: &str, help: &str, metric: &dyn EncodeMetric) -> fmt::Result {
        metric.encode(self.encoder.encode_descriptor(name, help, None, metric.metric_type())?)
    }

    fn by_family(&mut self, name: &str, help: &str, [ipv4, ipv6]: [&dyn EncodeMetric; 2]) -> fmt::Result {
        self.family(name, help, &[(&[("ip_family", "IPv4")], ipv4), (&[("ip_family", "IPv6")], ipv6)])
    }

    /// What cannot be told apart by family.
    fn of_both(&mut self, name: &str, help: &str, metric: &dyn EncodeMetric) -> fmt::Result {
        self.by_family(name, help, [metric, metric])
    }

    fn passes(&mut self, tally: &Tally) -> fmt::Result {
        self.of_both(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds",
            &tally.passes,
        )?;
        self.of_both(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for full resyncs",
            &tally.full,
        )?;
        self.of_both(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for partial resyncs",
            &tally.partial,
        )?;
        self.of_both(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "The last time proxy rules were successfully synced",
            &tally.clean_at,
        )?;
        self.of_both(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "The last time a sync of proxy rules was queued",
            &tally.asked_at,
        )?;
        self.of_both(
            "kubeproxy_sync_proxy_rules_nftables_sync_failures",
            "Cumulative proxy nftables sync failures",
            &tally.failed,
        )
    }

    fn changes(&mut self, changes: Changes) -> fmt::Result {
        self.single(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "Cumulative proxy rules Endpoint changes",
            &ConstCounter::new(changes.endpoints),
        )?;
        self.single(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
            "Pending proxy rules Endpoint changes",
            &gauge(changes.endpoints_pending),
        )?;
        self.single(
            "kubeproxy_sync_proxy_rules_service_changes",
            "Cumulative proxy rules Service changes",
            &ConstCounter::new(changes.services),
        )?;
        self.single(
            "kubeproxy_sync_proxy_rules_service_changes_pending",
            "Pending proxy rules Service changes",
            &gauge(changes.services_pending),
        )
    }

    /// A gauge whose name ends like a counter's: so it is called.
    fn without_local(&mut self, without: WithoutLocal) -> fmt::Result {
        let [internal4, internal6] = without.internal.map(gauge);
        let [external4, external6] = without.external.map(gauge);
        self.family(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            &[
                (&[("ip_family", "IPv4"), ("traffic_policy", "internal")], &internal4),
                (&[("ip_family", "IPv6"), ("traffic_policy", "internal")], &internal6),
                (&[("ip_family", "IPv4"), ("traffic_policy", "external")], &external4),
                (&[("ip_family", "IPv6"), ("traffic_policy", "external")], &external6),
            ],
        )
    }

    fn answers(&mut self, name: &str, help: &str, answers: &Answers) -> fmt::Result {
        let [good, bad] = [&answers.good, &answers.bad].map(counter);
        self.family(name, help, &[(&[("code", "200")], &good), (&[("code", "503")], &bad)])
    }
}

#[cfg(test)]
mod tests;
