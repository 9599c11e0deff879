//! Prometheus text, read at scrape time from the reports and from what the rooms count: there is no second book-keeping that could
//! differ.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use weft_model::{Health, Report};

use super::Admin;
use crate::reconcile::LoopHandle;

/// How names begin that dashboards know from the program whose work is done here.
const KNOWN_ELSEWHERE: &str = "coredns_";

/// What closes an exposition (OpenMetrics 1.0).
const END: &str = "# EOF\n";

/// A family of counters of another room: one label from a closed set, one value each.
pub struct Counters {
    /// Without prefix and `_total`: `dns_queries`. A name that users know from another program stands whole.
    pub name: &'static str,
    pub help: &'static str,
    pub label: &'static str,
    pub read: Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>,
}

/// Metrics of another room that are more than such counters, under their whole names.
pub type Collect = Box<dyn Fn() -> Box<dyn Collector> + Send + Sync>;

/// OpenMetrics text of everything the node counts.
pub(super) fn encode(admin: &Admin) -> Result<String, fmt::Error> {
    let mut all = Registry::default();
    let family = |counters: &Counters| {
        let (name, help, label) = (counters.name, counters.help, counters.label);
        Box::new(CounterFamily { name, help, label, values: (counters.read)() })
    };
    let is_known = |counters: &&Counters| counters.name.starts_with(KNOWN_ELSEWHERE);
    for counters in admin.counters.iter().filter(is_known) {
        all.register_collector(family(counters));
    }
    for collect in &admin.collectors {
        all.register_collector(collect());
    }
    let registry = all.sub_registry_with_prefix("weft");
    registry.register_collector(Box::new(Loops(admin.loops.iter().map(LoopHandle::report).collect())));
    for counters in admin.counters.iter().filter(|counters| !is_known(counters)) {
        registry.register_collector(family(counters));
    }
    let resident: Gauge = Gauge::default();
    resident.set(i64::try_from(resident_bytes()).unwrap_or(i64::MAX));
    registry.register("resident_memory_bytes", "Resident memory of the agent", resident);
    let mut buffer = String::new();
    text::encode(&mut buffer, &all)?;
    if let Some(families) = buffer.strip_suffix(END).map(str::len) {
        buffer.truncate(families);
        admin.texts.iter().for_each(|read| buffer.push_str(&read()));
        buffer.push_str(END);
    }
    Ok(buffer)
}

/// Resident memory of this process in bytes; 0 when /proc cannot be read.
pub(super) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * 4096
}

#[derive(Debug)]
struct Loops(Vec<Report>);

impl Loops {
    fn each<M: EncodeMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        metric: impl Fn(&Report) -> M,
    ) -> fmt::Result {
        let Some(first) = self.0.first() else { return Ok(()) };
        let kind = metric(first).metric_type();
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for report in &self.0 {
            let labels = [("loop", report.name.as_str())];
            metric(report).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl Collector for Loops {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.each(&mut encoder, "loop_generation", "Generation of the last Snapshot applied", |report| {
            ConstGauge::new(i64::try_from(report.generation.0).unwrap_or(i64::MAX))
        })?;
        self.each(&mut encoder, "loop_passes", "Passes since start", |report| {
            ConstCounter::new(report.passes)
        })?;
        self.each(&mut encoder, "loop_healthy", "1 when the last pass had no failure", |report| {
            ConstGauge::new(i64::from(report.health() == Health::Ok))
        })?;
        self.each(&mut encoder, "loop_problems", "Objects the loop could not honour", |report| {
            ConstGauge::new(i64::try_from(report.problems.len()).unwrap_or(i64::MAX))
        })?;
        self.each(&mut encoder, "loop_last_pass_microseconds", "Duration of the last pass", |report| {
            ConstGauge::new(i64::try_from(report.last_pass_micros).unwrap_or(i64::MAX))
        })
    }
}

#[derive(Debug)]
struct CounterFamily {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: Vec<(&'static str, u64)>,
}

impl Collector for CounterFamily {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let kind = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for (value, count) in &self.values {
            ConstCounter::new(*count).encode(family.encode_family(&[(self.label, *value)])?)?;
        }
        Ok(())
    }
}
