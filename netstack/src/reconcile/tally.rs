//! What the passes of one loop were, for metrics: durations by kind, failures, when the loop was asked and when it last succeeded.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::Trust;

/// Seconds since the epoch; 0 for never.
pub type Moment = Gauge<f64, AtomicU64>;

/// Shared by a loop and whoever shows it.
#[derive(Debug)]
pub struct Tally {
    /// Seconds of each pass.
    pub passes: Histogram,
    /// Of those, the ones that read the outside anew, and ...
    pub full: Histogram,
    /// ... those that only sent the difference to what was applied last.
    pub partial: Histogram,
    pub failed: Counter,
    pub asked_at: Moment,
    pub clean_at: Moment,
}

impl Default for Tally {
    /// From 1 ms to 16 s, as kube-proxy has it (kubernetes, pkg/proxy/metrics).
    fn default() -> Self {
        let durations = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        Self {
            passes: durations(),
            full: durations(),
            partial: durations(),
            failed: Counter::default(),
            asked_at: Moment::default(),
            clean_at: Moment::default(),
        }
    }
}

impl Tally {
    pub(super) fn asked(&self) {
        self.asked_at.set(now_seconds());
    }

    pub(super) fn passed(&self, took: Duration, trust: Trust, clean: bool) {
        let of_kind = match trust {
            Trust::Nothing => &self.full,
            Trust::Shadow => &self.partial,
        };
        for durations in [&self.passes, of_kind] {
            durations.observe(took.as_secs_f64());
        }
        if clean {
            self.clean_at.set(now_seconds());
        } else {
            self.failed.inc();
        }
    }
}

fn now_seconds() -> f64 {
    Timestamp::now().as_duration().as_secs_f64()
}
