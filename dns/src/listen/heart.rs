//! Signs of life of a thread that answers: as long as they come, the kernel leaves the questions here; else another node's
//! resolver gets them (table `weft-host`, rules of `cluster_dns`).
//!
//! A pulse is an empty datagram from the address to itself, which a rule takes off the way. The thread sends it between two batches, so
//! one that hangs sends none; nor does one without names, or whose runtime does nothing: what takes longer and TCP live there.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

/// A third of the time for which the rule believes one, so that the thread may be late.
const BEAT: Duration = Duration::from_millis(190);
/// Until a thread without names is asked again whether they came.
const NAMELESS: Duration = Duration::from_millis(100);

/// When a thread gave its last sign of life; shared with who tells.
#[derive(Clone)]
pub(super) struct Pulse {
    since: Instant,
    /// After `since`; zero before the first.
    last_millis: Arc<AtomicU64>,
}

impl Pulse {
    fn new() -> Self {
        Self { since: Instant::now(), last_millis: Arc::default() }
    }

    fn note(&self) {
        let millis = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_millis.store(millis.max(1), Ordering::Relaxed);
    }

    /// How long ago the last one was, if there was one.
    pub(super) fn age(&self) -> Option<Duration> {
        let last = self.last_millis.load(Ordering::Relaxed);
        (last > 0).then(|| self.since.elapsed().saturating_sub(Duration::from_millis(last)))
    }
}

pub(super) struct Heart {
    address: SocketAddr,
    beaten: Option<Instant>,
    /// The runtime has done something since it was asked to.
    runtime_lives: Arc<AtomicBool>,
    pulse: Pulse,
}

impl Heart {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, beaten: None, runtime_lives: Arc::new(AtomicBool::new(true)), pulse: Pulse::new() }
    }

    pub(super) fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Gives a sign of life if it is time for one. Returns how long until the next is due.
    pub(super) fn beat(
        &mut self,
        socket: &UdpSocket,
        has_names: impl FnOnce() -> bool,
        runtime: &Handle,
        now: Instant,
    ) -> Duration {
        let left = self.beaten.map_or(Duration::ZERO, |then| BEAT.saturating_sub(now.duration_since(then)));
        if !left.is_zero() {
            return left;
        }
        if !has_names() {
            return NAMELESS;
        }
        self.beaten = Some(now);
        if !self.runtime_lives.swap(false, Ordering::Relaxed) {
            return BEAT;
        }
        let lives = self.runtime_lives.clone();
        runtime.spawn(async move { lives.store(true, Ordering::Relaxed) });
        // Refused by the rule that takes it off the way.
        let _ = socket.send_to(&[], self.address);
        self.pulse.note();
        BEAT
    }

    /// Where there is no such rule, as in tests, it comes back.
    pub(super) fn is_own(&self, from: Option<SocketAddr>, bytes: &[u8]) -> bool {
        bytes.is_empty() && from == Some(self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(ip: &str) -> (UdpSocket, Heart) {
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let heart = Heart::new(socket.local_addr().unwrap());
        (socket, heart)
    }

    /// A sign of life since the last look.
    fn gave_a_sign(socket: &UdpSocket, heart: &Heart) -> bool {
        match socket.recv_from(&mut [0; 8]) {
            Ok((length, from)) => heart.is_own(Some(from), &[0; 8][..length]),
            Err(_) => false,
        }
    }

    #[test]
    fn signs_of_life_come_in_time_and_not_without_names() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let (socket, mut heart) = bound(ip);
            let begun = Instant::now();
            heart.beat(&socket, || false, runtime.handle(), begun);
            assert!(!gave_a_sign(&socket, &heart) && heart.pulse().age().is_none());
            heart.beat(&socket, || true, runtime.handle(), begun);
            assert!(gave_a_sign(&socket, &heart) && heart.pulse().age().is_some());
            heart.beat(&socket, || true, runtime.handle(), begun + BEAT / 2);
            assert!(!gave_a_sign(&socket, &heart));
            heart.beat(&socket, || true, runtime.handle(), begun + BEAT);
            assert!(gave_a_sign(&socket, &heart));
        }
    }

    #[test]
    fn a_runtime_that_does_nothing_ends_them_until_it_goes_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (socket, mut heart) = bound("127.0.0.1");
        let begun = Instant::now();
        let signs: Vec<bool> = (0..3)
            .map(|beat| {
                heart.beat(&socket, || true, runtime.handle(), begun + beat * BEAT);
                gave_a_sign(&socket, &heart)
            })
            .collect();
        assert_eq!(signs, [true, false, false]);
        runtime.block_on(tokio::task::yield_now());
        heart.beat(&socket, || true, runtime.handle(), begun + 3 * BEAT);
        assert!(gave_a_sign(&socket, &heart));
    }
}
