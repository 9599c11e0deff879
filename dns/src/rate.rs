//! How often one client may ask: a token bucket each, in bounded memory, so that a pod that runs wild does not take the
//! answering thread from the others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Clients remembered at one time, many more than a node has pods. Beyond, those that rest are forgotten, and everybody when
/// nobody rests.
const MAX_CLIENTS: usize = 4096;
/// A bucket holds what may be asked in this time, and a client that asked nothing for as long has a full one.
const BURST: Duration = Duration::from_secs(1);

/// Shared by all sockets: a client that changes the transport keeps its bucket.
pub(crate) struct Rate {
    per_second: Option<u32>,
    buckets: Mutex<Buckets>,
}

#[derive(Default)]
struct Buckets(HashMap<IpAddr, Bucket>);

struct Bucket {
    /// Questions that may be asked at `filled_at`.
    left: f64,
    filled_at: Instant,
}

impl Rate {
    /// `None` or zero: as often as anybody likes.
    pub(crate) fn new(per_second: Option<u32>) -> Self {
        Self { per_second: per_second.filter(|rate| *rate > 0), buckets: Mutex::default() }
    }

    /// Takes one question out of the client's bucket; false when it is empty. `now` never goes back. The lock is held for this one
    /// client only, so that the sockets do not wait for each other's batches.
    pub(crate) fn admits(&self, client: IpAddr, now: Instant) -> bool {
        let Some(per_second) = self.per_second.map(f64::from) else { return true };
        let client = client.to_canonical();
        let most = per_second * BURST.as_secs_f64();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.make_room(client, now);
        let bucket = buckets.0.entry(client).or_insert_with(|| Bucket { left: most, filled_at: now });
        let waited = now.saturating_duration_since(bucket.filled_at);
        bucket.left = (bucket.left + waited.as_secs_f64() * per_second).min(most);
        bucket.filled_at = now;
        let admitted = bucket.left >= 1.0;
        if admitted {
            bucket.left -= 1.0;
        }
        admitted
    }
}

impl Buckets {
    fn make_room(&mut self, client: IpAddr, now: Instant) {
        if self.0.len() < MAX_CLIENTS || self.0.contains_key(&client) {
            return;
        }
        self.0.retain(|_, bucket| now.saturating_duration_since(bucket.filled_at) < BURST);
        if self.0.len() >= MAX_CLIENTS {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(rate: &Rate, client: &str, times: usize, now: Instant) -> usize {
        let client = client.parse().unwrap();
        (0..times).filter(|_| rate.admits(client, now)).count()
    }

    #[test]
    fn a_client_has_a_seconds_worth_at_once_and_its_rate_from_then_on() {
        let (rate, now) = (Rate::new(Some(100)), Instant::now());
        assert_eq!(admitted(&rate, "10.42.0.7", 250, now), 100);
        assert_eq!(admitted(&rate, "10.42.0.8", 50, now), 50, "another client has its own bucket");
        assert_eq!(admitted(&rate, "10.42.0.7", 50, now + Duration::from_millis(100)), 10);
        assert_eq!(admitted(&rate, "::ffff:10.42.0.7", 50, now + Duration::from_millis(100)), 0);
        assert_eq!(admitted(&rate, "10.42.0.7", 250, now + Duration::from_secs(60)), 100);
    }

    #[test]
    fn without_a_rate_nobody_is_counted() {
        for rate in [Rate::new(None), Rate::new(Some(0))] {
            assert_eq!(admitted(&rate, "10.42.0.7", 100_000, Instant::now()), 100_000);
            assert!(rate.buckets.lock().unwrap().0.is_empty());
        }
    }

    #[test]
    fn so_many_clients_are_remembered_and_no_more() {
        let (rate, now) = (Rate::new(Some(1)), Instant::now());
        for client in 0..10_000_u32 {
            assert!(rate.admits(IpAddr::from(client.to_be_bytes()), now));
            assert!(rate.buckets.lock().unwrap().0.len() <= MAX_CLIENTS);
        }
        assert!(rate.admits("fd00::1".parse().unwrap(), now + BURST));
    }
}
