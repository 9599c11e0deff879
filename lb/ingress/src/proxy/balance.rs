//! Which endpoint answers: sticky by cookie, by hash, else the less loaded of two; those that fail are left out for a while.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::htpasswd::hex;
use crate::plan::table::Target;

/// Failures in a row after which an endpoint is left out.
const FAILURES: u32 = 3;
/// For how long it is left out (nginx's `fail_timeout`).
const EJECTED: Duration = Duration::from_secs(10);

/// What is known of an endpoint, whichever routes lead to it.
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
    /// Requests that it has not answered whole.
    pub(super) load: AtomicUsize,
    failures: AtomicU32,
    /// Milliseconds since `since`; before it the endpoint is left out.
    ejected_until: AtomicU64,
    since: Instant,
}

impl Endpoint {
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            load: AtomicUsize::new(0),
            failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            since: Instant::now(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_ejected(&self) -> bool {
        let until = self.ejected_until.load(Ordering::Relaxed);
        until > 0 && until > self.now()
    }

    pub(super) fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn has_failed(&self) -> bool {
        self.is_ejected() || self.failures.load(Ordering::Relaxed) > 0
    }

    pub(super) fn failed(&self) {
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES {
            let until = self.now() + u64::try_from(EJECTED.as_millis()).unwrap_or(u64::MAX);
            self.ejected_until.store(until, Ordering::Relaxed);
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    /// What the affinity cookie holds for it: nothing that tells the address.
    pub(super) fn token(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.address.to_string().as_bytes());
        hex(&digest.as_ref()[..16])
    }
}

/// Counts a request at its endpoint while it lives.
pub(super) struct Loaded(pub(super) Arc<Endpoint>);

impl Loaded {
    pub(super) fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.load.fetch_add(1, Ordering::Relaxed);
        Self(endpoint)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Every endpoint by its address: a change of routes keeps what is known of it.
#[derive(Default)]
pub(super) struct Directory(Mutex<HashMap<SocketAddr, Arc<Endpoint>>>);

impl Directory {
    pub(super) fn of(&self, targets: &[Target]) -> Vec<Arc<Endpoint>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoint = |target: &Target| {
            known.entry(target.address).or_insert_with(|| Arc::new(Endpoint::new(target.address))).clone()
        };
        targets.iter().map(endpoint).collect()
    }

    pub(super) fn one(&self, address: SocketAddr) -> Arc<Endpoint> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(address).or_insert_with(|| Arc::new(Endpoint::new(address))).clone()
    }

    /// Forgets those that nobody holds.
    pub(super) fn tidy(&self) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, endpoint| Arc::strong_count(endpoint) > 1);
    }
}

/// How the endpoint is chosen.
pub(super) enum Choice<'a> {
    /// The value of the affinity cookie.
    Sticky(&'a str),
    /// What `upstream-hash-by` makes of the request.
    Hash(&'a str),
    LeastOfTwo,
}

/// One of the endpoints that was not tried before; `None` when each was.
pub(super) fn choose(
    endpoints: &[Arc<Endpoint>],
    choice: &Choice<'_>,
    tried: &[SocketAddr],
) -> Option<Arc<Endpoint>> {
    // As nearly always: nobody is left out.
    if let (Choice::LeastOfTwo, []) = (choice, tried) {
        let (first, second) = two(endpoints)?;
        if !first.is_ejected() && !second.is_ejected() {
            return Some(less_loaded(first, second).clone());
        }
    }
    let untried = || endpoints.iter().filter(|one| !tried.contains(&one.address));
    if let Choice::Sticky(token) = choice
        && let Some(held) = untried().find(|one| one.token() == *token)
    {
        return Some(held.clone());
    }
    let mut able: Vec<&Arc<Endpoint>> = untried().filter(|one| !one.is_ejected()).collect();
    if able.is_empty() {
        able = untried().collect();
    }
    if let Choice::Hash(key) = choice {
        return able.into_iter().max_by_key(|one| weight(key, one.address)).cloned();
    }
    let (first, second) = two(&able)?;
    Some(less_loaded(first, second).clone())
}

/// Two at random; of one, that one twice.
fn two<T>(of: &[T]) -> Option<(&T, &T)> {
    if let [one] = of {
        return Some((one, one));
    }
    let others = of.len().checked_sub(1).filter(|others| *others > 0)?;
    let first = rand::random_range(0..of.len());
    let second = (first + 1 + rand::random_range(0..others)) % of.len();
    Some((of.get(first)?, of.get(second)?))
}

fn less_loaded<'a>(first: &'a Arc<Endpoint>, second: &'a Arc<Endpoint>) -> &'a Arc<Endpoint> {
    let load = |one: &Endpoint| one.load.load(Ordering::Relaxed);
    if load(second) < load(first) { second } else { first }
}

/// Rendezvous hashing: an endpoint that comes or goes moves only its own share.
fn weight(key: &str, address: SocketAddr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, address).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: u8) -> Vec<Arc<Endpoint>> {
        (1..=count).map(|last| Arc::new(Endpoint::new(SocketAddr::from(([10, 0, 0, last], 80))))).collect()
    }

    #[test]
    fn of_two_the_less_loaded_is_taken() {
        let two = endpoints(2);
        let _busy = Loaded::new(two[0].clone());
        for _ in 0..20 {
            assert_eq!(choose(&two, &Choice::LeastOfTwo, &[]).unwrap().address, two[1].address);
        }
    }

    #[test]
    fn one_that_fails_three_times_is_left_out_unless_nobody_else_is_there() {
        let two = endpoints(2);
        (0..3).for_each(|_| two[0].failed());
        for _ in 0..20 {
            assert_eq!(choose(&two, &Choice::LeastOfTwo, &[]).unwrap().address, two[1].address);
        }
        let again = choose(&two, &Choice::LeastOfTwo, &[two[1].address]);
        assert_eq!(again.unwrap().address, two[0].address);
        assert!(choose(&two, &Choice::LeastOfTwo, &[two[0].address, two[1].address]).is_none());
    }

    #[test]
    fn a_cookie_holds_its_endpoint_and_a_hash_moves_little() {
        let ten = endpoints(10);
        let token = ten[4].token();
        assert_eq!(choose(&ten, &Choice::Sticky(&token), &[]).unwrap().address, ten[4].address);
        let nine: Vec<_> = ten.iter().filter(|one| one.address != ten[4].address).cloned().collect();
        for key in 0..200 {
            let key = key.to_string();
            let before = choose(&ten, &Choice::Hash(&key), &[]).unwrap().address;
            let after = choose(&nine, &Choice::Hash(&key), &[]).unwrap().address;
            assert!(before == after || before == ten[4].address);
        }
    }
}
