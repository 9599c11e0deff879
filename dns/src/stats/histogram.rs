//! Values counted in buckets: plain atomics, one addition for the bucket and one for the sum.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// The buckets of a kind of value, which are CoreDNS's, so that its dashboards fit.
pub(crate) trait Scale {
    /// What is counted up to and with each bound, in whole units, ascending; fewer than [`MOST_BUCKETS`].
    const BOUNDS: &'static [u64];
    /// Units in one of what the metric is told in.
    const UNITS: f64;
}

/// Bounds and what is above them.
const MOST_BUCKETS: usize = 21;

/// Microseconds, told in seconds.
#[derive(Debug, Default)]
pub(crate) struct Latency;

impl Scale for Latency {
    const BOUNDS: &'static [u64] = &doubled::<16>(250);
    const UNITS: f64 = 1e6;
}

/// Octets.
#[derive(Debug, Default)]
pub(crate) struct Size;

impl Scale for Size {
    const BOUNDS: &'static [u64] =
        &[0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16_000, 32_000, 48_000, 64_000];
    const UNITS: f64 = 1.0;
}

/// Milliseconds from a change in the API to its being served, told in seconds.
#[derive(Debug, Default)]
pub(crate) struct Programming;

impl Scale for Programming {
    const BOUNDS: &'static [u64] = &doubled::<20>(1);
    const UNITS: f64 = 1e3;
}

const fn doubled<const N: usize>(first: u64) -> [u64; N] {
    let mut bounds = [first; N];
    let mut at = 1;
    while at < N {
        bounds[at] = bounds[at - 1] * 2;
        at += 1;
    }
    bounds
}

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct Histogram<S> {
    counts: [AtomicU64; MOST_BUCKETS],
    sum: AtomicU64,
    scale: PhantomData<S>,
}

impl<S: Scale> Histogram<S> {
    /// `times` values of one size.
    pub(crate) fn count(&self, value: u64, times: u64) {
        let bucket = S::BOUNDS.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(times, Ordering::Relaxed);
        self.sum.fetch_add(value.saturating_mul(times), Ordering::Relaxed);
    }

    /// Sum, and how many values are in each bucket by its upper bound, the last being above all.
    pub(crate) fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let bounds = S::BOUNDS.iter().map(|bound| *bound as f64 / S::UNITS).chain([f64::MAX]);
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        (self.sum.load(Ordering::Relaxed) as f64 / S::UNITS, bounds.zip(counts).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_in_the_first_bucket_that_is_not_below_it() {
        let histogram = Histogram::<Latency>::default();
        histogram.count(250, 3);
        histogram.count(251, 1);
        histogram.count(u64::from(u32::MAX), 1);
        let (sum, buckets) = histogram.read();
        assert_eq!(buckets.len(), 17);
        assert_eq!((buckets[0], buckets[1], buckets[16]), ((0.00025, 3), (0.0005, 1), (f64::MAX, 1)));
        assert_eq!(buckets[15].0, 8.192);
        assert!((sum - 4_294.968_296).abs() < 1e-6, "{sum}");
    }

    #[test]
    fn every_scale_fits_and_ascends() {
        for bounds in [Latency::BOUNDS, Size::BOUNDS, Programming::BOUNDS] {
            assert!(bounds.len() < MOST_BUCKETS && bounds.is_sorted());
        }
    }
}
