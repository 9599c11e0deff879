//! Rates and connections of each client (`limit-rps`, `limit-rpm`, `limit-connections`), as nginx counts them: a bucket that
//! leaks at the rate and holds a burst, and nothing waits. One table an Ingress; it outlives a change of routes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::annotations::Limits;

/// Clients that are remembered; beyond it the quiet ones are forgotten, then all.
const MAX_CLIENTS: usize = 65_536;

#[derive(Default)]
pub(super) struct Clients(Mutex<HashMap<IpAddr, Client>>);

#[derive(Default)]
struct Client {
    connections: u32,
    second: Bucket,
    minute: Bucket,
}

#[derive(Default)]
struct Bucket {
    excess: f64,
    at: Option<Instant>,
}

impl Bucket {
    /// nginx's limit_req with `nodelay`: what exceeds the rate may reach the burst.
    fn admits(&mut self, per_second: f64, burst: f64, now: Instant) -> bool {
        let elapsed = self.at.map(|at| now.saturating_duration_since(at).as_secs_f64());
        let excess = elapsed.map_or(0.0, |elapsed| (self.excess - per_second * elapsed + 1.0).max(0.0));
        if excess > burst {
            return false;
        }
        (self.excess, self.at) = (excess, Some(now));
        true
    }
}

/// Counts one request among its client's connections while it lives.
pub(super) struct Counted {
    clients: Arc<Clients>,
    client: IpAddr,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut clients = self.clients.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get_mut(&self.client) {
            client.connections = client.connections.saturating_sub(1);
        }
    }
}

/// Whether the client may ask now: `Err` is 503.
///
/// # Errors
/// The name of the annotation whose limit is reached.
pub(super) fn admit(
    clients: &Arc<Clients>,
    limits: &Limits,
    client: IpAddr,
) -> Result<Option<Counted>, &'static str> {
    let limited = limits.connections.is_some()
        || limits.requests_per_minute.is_some()
        || limits.requests_per_second.is_some();
    if !limited || limits.exempt.iter().any(|range| range.contains(&client)) {
        return Ok(None);
    }
    admit_at(clients, limits, client, Instant::now()).map(Some)
}

fn admit_at(
    clients: &Arc<Clients>,
    limits: &Limits,
    client: IpAddr,
    now: Instant,
) -> Result<Counted, &'static str> {
    let mut table = clients.0.lock().unwrap_or_else(PoisonError::into_inner);
    if table.len() >= MAX_CLIENTS && !table.contains_key(&client) {
        table.retain(|_, known| known.connections > 0);
    }
    let known = table.entry(client).or_default();
    if limits.connections.is_some_and(|most| known.connections >= most) {
        return Err("limit-connections");
    }
    let burst = |rate: u32| f64::from(rate) * f64::from(limits.burst_multiplier);
    if let Some(rate) = limits.requests_per_minute
        && !known.minute.admits(f64::from(rate) / 60.0, burst(rate), now)
    {
        return Err("limit-rpm");
    }
    if let Some(rate) = limits.requests_per_second
        && !known.second.admits(f64::from(rate), burst(rate), now)
    {
        return Err("limit-rps");
    }
    known.connections += 1;
    drop(table);
    Ok(Counted { clients: clients.clone(), client })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limits() -> Limits {
        Limits {
            requests_per_second: None,
            requests_per_minute: None,
            connections: None,
            burst_multiplier: 5,
            exempt: vec!["10.0.0.0/8".parse().unwrap()],
        }
    }

    #[test]
    fn a_burst_of_five_times_the_rate_passes_and_then_the_rate() {
        let (clients, now) = (Arc::new(Clients::default()), Instant::now());
        let limits = Limits { requests_per_second: Some(10), ..limits() };
        let ask = |client: &str, at| admit_at(&clients, &limits, client.parse().unwrap(), at).is_ok();
        let passed = (0..100).filter(|_| ask("192.0.2.1", now)).count();
        assert_eq!(passed, 51, "one and a burst of 10 x 5");
        let later = (0..100).filter(|_| ask("192.0.2.1", now + Duration::from_secs(1))).count();
        assert_eq!(later, 10);
        assert!(ask("2001:db8::1", now), "each client has its own");
        let exempt = || admit(&clients, &limits, "10.1.1.1".parse().unwrap());
        assert!((0..100).all(|_| exempt().is_ok_and(|counted| counted.is_none())), "exempt");
    }

    #[test]
    fn connections_count_while_they_last() {
        let clients = Arc::new(Clients::default());
        let limits = Limits { connections: Some(2), ..limits() };
        let ask = || admit(&clients, &limits, "192.0.2.1".parse().unwrap());
        let (first, second) = (ask().unwrap(), ask().unwrap());
        assert_eq!(ask().err(), Some("limit-connections"));
        drop(first);
        assert!(ask().is_ok());
        drop(second);
    }
}
