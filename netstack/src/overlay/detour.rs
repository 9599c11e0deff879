//! For kernel WireGuard, which calls a peer at one endpoint only: the next of its endpoints while nothing comes back from there.
//! (The userspace tunnel does that by itself.)

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_model::constants::TUNNEL_LINK;
use weft_model::wireguard::{PeerStatus, PeerView};
use weft_model::{Snapshot, WgPublicKey};

use super::endpoints::explain;
use crate::host_socket::Snapshots;
use crate::kernel::wireguard::{self, WireguardError};
use crate::reconcile::chain;

const LOOK: Duration = Duration::from_secs(2);
/// A call without an answer; the kernel calls every five seconds (whitepaper, section 6.1).
const PATIENCE: Duration = Duration::from_secs(6);
/// Packets in a session without an answer: as long as WireGuard itself waits until it calls anew (section 6.2).
const PATIENCE_IN_SESSION: Duration = Duration::from_secs(15);
/// A session that is not renewed ends after this.
const SESSION_SECONDS: u64 = 180;

/// Never ends while there are Snapshots.
pub(super) async fn follow(snapshots: Snapshots) -> Result<(), String> {
    let mut watched: BTreeMap<WgPublicKey, Watched> = BTreeMap::new();
    let mut told = String::new();
    loop {
        tokio::time::sleep(LOOK).await;
        snapshots.has_changed().map_err(|_| "the Snapshots ended".to_owned())?;
        let Some(snapshot) = snapshots.borrow().clone() else { continue };
        let mut known = std::mem::take(&mut watched);
        let look = move || {
            let outcome = look(&snapshot, &mut known);
            (known, outcome)
        };
        let Ok((known, outcome)) = tokio::task::spawn_blocking(look).await else { continue };
        watched = known;
        let why = outcome.err().map(|error| chain(&error)).unwrap_or_default();
        if !why.is_empty() && why != told {
            tracing::warn!(error = why, "look for a way to the peers");
        }
        told = why;
    }
}

fn look(snapshot: &Snapshot, watched: &mut BTreeMap<WgPublicKey, Watched>) -> Result<(), WireguardError> {
    let now = Instant::now();
    let peers = explain(Some(snapshot), wireguard::peers(TUNNEL_LINK)?);
    watched.retain(|key, _| peers.iter().any(|peer| peer.status.public_key == *key));
    for PeerView { status, candidates, node, .. } in peers {
        let candidates: Vec<SocketAddr> = candidates.iter().map(|candidate| candidate.endpoint).collect();
        let watched = watched.entry(status.public_key).or_default();
        if let Some(endpoint) = watched.look(&status, &candidates, now) {
            tracing::info!(node, %endpoint, "nothing comes back from the peer: it is called elsewhere");
            wireguard::set_endpoint(TUNNEL_LINK, &status.public_key, endpoint)?;
        }
    }
    Ok(())
}

/// What was seen of one peer.
#[derive(Debug, Default)]
struct Watched {
    received_bytes: u64,
    sent_bytes: u64,
    /// The first of its endpoints at the last look.
    best: Option<SocketAddr>,
    /// Since when something is sent and nothing received.
    unanswered_since: Option<Instant>,
}

impl Watched {
    /// Where to call the peer from now on, when it is to be called elsewhere.
    fn look(&mut self, status: &PeerStatus, candidates: &[SocketAddr], now: Instant) -> Option<SocketAddr> {
        let best = candidates.first().copied();
        let before = std::mem::replace(&mut self.best, best);
        if before.is_some() && before != best && best != status.endpoint {
            *self = Self { best, ..Self::default() };
            return best;
        }
        if status.received_bytes != self.received_bytes {
            self.unanswered_since = None;
        } else if status.sent_bytes != self.sent_bytes {
            self.unanswered_since.get_or_insert(now);
        }
        (self.received_bytes, self.sent_bytes) = (status.received_bytes, status.sent_bytes);
        let in_session = status.last_handshake_seconds.is_some_and(|seconds| seconds < SESSION_SECONDS);
        let patience = if in_session { PATIENCE_IN_SESSION } else { PATIENCE };
        self.unanswered_since.take_if(|since| now.duration_since(*since) >= patience)?;
        let at = status.endpoint.and_then(|endpoint| candidates.iter().position(|known| *known == endpoint));
        let next = candidates.get(at.map_or(0, |at| (at + 1) % candidates.len()))?;
        Some(*next).filter(|next| Some(*next) != status.endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every two seconds for as long as a peer behaves so; where it was called, at which second.
    fn watch(
        candidates: &[&str],
        endpoint: &str,
        seconds: u64,
        behave: impl Fn(u64, &str) -> (u64, u64, Option<u64>),
    ) -> Vec<(u64, String)> {
        let candidates: Vec<SocketAddr> = candidates.iter().map(|text| text.parse().unwrap()).collect();
        let (start, mut watched, mut calls) = (Instant::now(), Watched::default(), Vec::new());
        let mut endpoint: SocketAddr = endpoint.parse().unwrap();
        for second in (0..seconds).step_by(2) {
            let (sent_bytes, received_bytes, last_handshake_seconds) = behave(second, &endpoint.to_string());
            let status = PeerStatus {
                public_key: WgPublicKey([1; 32]),
                own_key: None,
                endpoint: Some(endpoint),
                last_handshake_seconds,
                received_bytes,
                sent_bytes,
            };
            if let Some(next) = watched.look(&status, &candidates, start + Duration::from_secs(second)) {
                calls.push((second, next.to_string()));
                endpoint = next;
            }
        }
        calls
    }

    const BOTH: [&str; 2] = ["10.0.0.2:1", "198.51.100.2:1"];

    #[test]
    fn a_peer_that_never_answers_is_called_everywhere_in_turn() {
        let calls = watch(&BOTH, BOTH[0], 24, |second, _| (148 * (second / 5 + 1), 0, None));
        let expected = [(6, BOTH[1]), (16, BOTH[0])];
        assert_eq!(calls[..2], expected.map(|(second, endpoint)| (second, endpoint.to_owned())));
    }

    #[test]
    fn once_it_answers_it_stays() {
        let calls = watch(&BOTH, BOTH[0], 100, |second, endpoint| {
            let here = endpoint == BOTH[1];
            (148 * (second / 5 + 1), if here { second * 100 } else { 0 }, here.then_some(0))
        });
        assert_eq!(calls, [(6, BOTH[1].to_owned())]);
    }

    #[test]
    fn a_session_has_fifteen_seconds_and_silence_on_both_sides_is_none() {
        let calls =
            watch(&BOTH, BOTH[0], 40, |second, _| (if second < 20 { 5 } else { second }, 7, Some(second)));
        assert_eq!(calls, [(36, BOTH[1].to_owned())]);
        assert_eq!(watch(&BOTH, BOTH[0], 100, |_, _| (5, 7, None)), []);
    }

    #[test]
    fn another_best_endpoint_is_called_at_once_and_a_new_agent_leaves_the_peer_where_it_is() {
        let [first, second] = BOTH.map(|text| text.parse().unwrap());
        let mut watched = Watched::default();
        let status = PeerStatus {
            public_key: WgPublicKey([1; 32]),
            own_key: None,
            endpoint: Some(first),
            last_handshake_seconds: Some(5),
            received_bytes: 9,
            sent_bytes: 9,
        };
        let now = Instant::now();
        assert_eq!(watched.look(&status, &[second, first], now), None);
        assert_eq!(watched.look(&status, &[first, second], now), None, "it is there");
        assert_eq!(watched.look(&status, &[second, first], now), Some(second));
        let there = PeerStatus { endpoint: Some(second), ..status };
        assert_eq!(watched.look(&there, &[second, first], now), None);
    }

    #[test]
    fn a_peer_that_roamed_and_fell_silent_is_called_at_its_best_endpoint() {
        let calls = watch(&BOTH, "203.0.113.9:40000", 12, |second, _| (second, 0, None));
        assert_eq!(calls[0].1, BOTH[0]);
        assert_eq!(watch(&BOTH[..1], BOTH[0], 60, |second, _| (second, 0, None)), []);
        assert_eq!(watch(&[], BOTH[0], 60, |second, _| (second, 0, None)), []);
    }
}
