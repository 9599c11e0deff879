//! The peers of the tunnel and what its threads share.
//!
//! ```text
//!  tunnel.json --apply--> Table (peers by slot, by key, allowed IPs), replaced as a whole
//!  egress thread: TUN -> Table -> Peer::reserve -> seal -> UDP       (egress.rs)
//!  ingress threads: UDP -> slot of the index -> open -> Peer -> TUN  (ingress.rs)
//!  timer thread: Peer::tick
//! ```

mod handover;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use weft_model::WgPublicKey;
use weft_model::wireguard::{PeerStatus, WireguardPeer};

pub(super) use self::handover::DeviceState;
use super::allowed_ips::AllowedIps;
use super::kept::udp_name;
use super::macs::Admissions;
use super::noise::Identity;
use super::peer::{MAX_SLOT, Now, Outbox, Peer};
use super::session::REJECT_AFTER_TIME;
use super::{KeyPairs, TunnelState};
use crate::kernel::descriptor_store::Kept;
use crate::kernel::stop::Stop;
use crate::kernel::tun::Tun;
use crate::kernel::udp::UdpSocket;

/// An idle ingress thread looks this often whether the port changed.
pub(super) const RECEIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Timers of a peer are at least this exact; all of them are seconds long.
const MAX_TIMER_SLEEP: Duration = Duration::from_millis(500);
const MIN_TIMER_SLEEP: Duration = Duration::from_millis(10);

/// A key pair that was replaced is answered for this long: all that was made with it has ended by then (whitepaper,
/// section 6.3).
const RETIRED_FOR: Duration = REJECT_AFTER_TIME.saturating_mul(3);

pub(super) struct PeerEntry {
    pub(super) slot: u32,
    state: Mutex<Peer>,
}

impl PeerEntry {
    fn new(identities: &Identities, key: WgPublicKey, slot: u32) -> Self {
        Self { slot, state: Mutex::new(Peer::new(identities.current.clone(), key, slot)) }
    }

    /// A panic elsewhere leaves the state whole enough: every step of the state machine is a plain assignment.
    pub(super) fn lock(&self) -> MutexGuard<'_, Peer> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One generation of the configuration.
pub(super) struct Table {
    slots: Vec<Option<Arc<PeerEntry>>>,
    by_key: BTreeMap<WgPublicKey, (Arc<PeerEntry>, WireguardPeer)>,
    /// By the key that the peer is about to change to.
    by_next_key: BTreeMap<WgPublicKey, Arc<PeerEntry>>,
    /// To the slot.
    pub(super) allowed: AllowedIps<u32>,
    pub(super) mtu_bytes: usize,
    own_addresses: Vec<IpAddr>,
}

impl Table {
    fn new(
        by_key: BTreeMap<WgPublicKey, (Arc<PeerEntry>, WireguardPeer)>,
        mtu_bytes: usize,
        own_addresses: Vec<IpAddr>,
    ) -> Self {
        let greatest = by_key.values().map(|(entry, _)| entry.slot).max();
        let mut slots = vec![None; greatest.map_or(0, |slot| slot as usize + 1)];
        for (entry, _) in by_key.values() {
            slots[entry.slot as usize] = Some(entry.clone());
        }
        let prefixes = by_key
            .values()
            .flat_map(|(entry, peer)| peer.allowed_ips.iter().map(|prefix| (*prefix, entry.slot)));
        let allowed = AllowedIps::new(prefixes);
        let by_next_key =
            by_key.values().filter_map(|(entry, peer)| Some((peer.next_key?, entry.clone()))).collect();
        Self { slots, by_key, by_next_key, allowed, mtu_bytes, own_addresses }
    }

    pub(super) fn peer(&self, slot: u32) -> Option<&Arc<PeerEntry>> {
        self.slots.get(usize::try_from(slot).ok()?)?.as_ref()
    }

    pub(super) fn peer_by_key(&self, key: &WgPublicKey) -> Option<&Arc<PeerEntry>> {
        self.by_key.get(key).map(|(entry, _)| entry).or_else(|| self.by_next_key.get(key))
    }

    /// Also a peer that was known to change to `key`.
    fn known(&self, key: &WgPublicKey) -> Option<&(Arc<PeerEntry>, WireguardPeer)> {
        let changed = || self.by_key.values().find(|(_, peer)| peer.next_key.as_ref() == Some(key));
        self.by_key.get(key).or_else(changed)
    }

    fn peers(&self) -> impl Iterator<Item = &Arc<PeerEntry>> {
        self.by_key.values().map(|(entry, _)| entry)
    }
}

/// The UDP sockets of one port; a family that the host lacks is absent.
pub(super) struct Sockets {
    port: u16,
    pub(super) v4: Option<UdpSocket>,
    pub(super) v6: Option<UdpSocket>,
}

impl Sockets {
    /// Those of the process before, if they have one port.
    fn adopt(kept: &mut Kept) -> Option<Self> {
        let mut port = None;
        let mut adopt = |ipv6| {
            kept.adopt(udp_name(ipv6), |descriptor| {
                let (socket, own) = UdpSocket::adopt(descriptor, ipv6, RECEIVE_TIMEOUT)?;
                let is_same = *port.get_or_insert(own) == own;
                if is_same { Ok(socket) } else { Err(io::ErrorKind::AddrNotAvailable.into()) }
            })
        };
        let (v4, v6) = (adopt(false), adopt(true));
        let port = port?;
        // A family that the host did not have then, or whose socket is unfit.
        let complete = |adopted: Option<UdpSocket>, ipv6| -> io::Result<_> {
            let opened = if adopted.is_none() { Self::open(ipv6, port)? } else { None };
            opened.iter().for_each(|socket| kept.keep(udp_name(ipv6), socket));
            Ok(adopted.or(opened))
        };
        match (complete(v4, false), complete(v6, true)) {
            (Ok(v4), Ok(v6)) => Some(Self { port, v4, v6 }),
            // Half a tunnel is none: `bind` says what is wrong, now or when what was kept is closed.
            _ => {
                [false, true].iter().for_each(|ipv6| kept.forget(udp_name(*ipv6)));
                None
            }
        }
    }

    fn bind(port: u16, kept: &Kept) -> io::Result<Self> {
        let sockets = Self { port, v4: Self::open(false, port)?, v6: Self::open(true, port)? };
        for (ipv6, socket) in [(false, &sockets.v4), (true, &sockets.v6)] {
            kept.forget(udp_name(ipv6));
            socket.iter().for_each(|socket| kept.keep(udp_name(ipv6), socket));
        }
        Ok(sockets)
    }

    fn open(ipv6: bool, port: u16) -> io::Result<Option<UdpSocket>> {
        match UdpSocket::bind(ipv6, port, RECEIVE_TIMEOUT) {
            Ok(socket) => Ok(Some(socket)),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The key pairs that this node goes by.
pub(super) struct Identities {
    pub(super) current: Arc<Identity>,
    /// Replaces the current one soon; peers that accept it are greeted with it already.
    next: Option<Arc<Identity>>,
    /// What the current one replaced, and when: peers that have not heard of it still call the old one.
    retired: Option<(Arc<Identity>, Instant)>,
}

impl Identities {
    fn all(&self) -> impl Iterator<Item = &Arc<Identity>> {
        [Some(&self.current), self.next.as_ref(), self.retired.as_ref().map(|(identity, _)| identity)]
            .into_iter()
            .flatten()
    }

    /// The owner of one of our public keys; nobody calls a retired one for long.
    pub(super) fn owner(&self, key: &WgPublicKey, now: Instant) -> Option<&Arc<Identity>> {
        let gone = |identity: &Identity| {
            self.retired.as_ref().is_some_and(|(retired, at)| {
                retired.public == identity.public && now.saturating_duration_since(*at) >= RETIRED_FOR
            })
        };
        self.all().find(|identity| identity.public == *key).filter(|identity| !gone(identity))
    }
}

pub(super) struct Device {
    identities: ArcSwap<Identities>,
    pub(super) tun: Tun,
    pub(super) admissions: Mutex<Admissions>,
    table: ArcSwap<Table>,
    sockets: ArcSwapOption<Sockets>,
    /// Serialises [`Device::apply`].
    applying: Mutex<()>,
    send_failed: AtomicBool,
    /// Every thread of the data path ends when it is asked.
    pub(super) stop: Stop,
    kept: Kept,
}

impl Device {
    /// Goes on with the sockets in `kept`, and leaves there what it opens.
    ///
    /// Errors: no descriptors left.
    pub(super) fn new(identity: Identity, tun: Tun, mut kept: Kept) -> io::Result<Self> {
        let sockets = Sockets::adopt(&mut kept).map(Arc::new);
        kept.forget_rest();
        let mut admissions = Admissions::new(Now::read().monotonic);
        admissions.set_keys([identity.public].into_iter());
        let identities = Identities { current: Arc::new(identity), next: None, retired: None };
        Ok(Self {
            identities: ArcSwap::from_pointee(identities),
            tun,
            admissions: Mutex::new(admissions),
            table: ArcSwap::from_pointee(Table::new(BTreeMap::new(), 1420, Vec::new())),
            sockets: ArcSwapOption::new(sockets),
            applying: Mutex::new(()),
            send_failed: AtomicBool::new(false),
            stop: Stop::new()?,
            kept,
        })
    }

    /// Whether descriptors outlive this process, so that there is something to leave to the next.
    pub(super) fn is_kept(&self) -> bool {
        self.kept.store.is_some()
    }

    /// Asks every thread of the data path to end: none takes a packet any more, and what was taken is sent before.
    pub(super) fn end(&self) {
        self.stop.ask();
        let Some(sockets) = self.sockets() else { return };
        // Who waits for a datagram hears nothing else. One that cannot be sent costs the wait for RECEIVE_TIMEOUT.
        let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
        for (socket, address) in [&sockets.v4, &sockets.v6].into_iter().zip(loopback) {
            let wake = |socket: &UdpSocket| socket.send_train((address, sockets.port).into(), &[0], 1);
            let _ = socket.as_ref().map(wake);
        }
    }

    pub(super) fn identities(&self) -> Arc<Identities> {
        self.identities.load_full()
    }

    pub(super) fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    pub(super) fn sockets(&self) -> Option<Arc<Sockets>> {
        self.sockets.load_full()
    }

    /// Makes the device equal to `state`. Peers that stay keep their sessions, and their endpoint unless the
    /// configured one changed. New peers with an endpoint are greeted at once.
    ///
    /// Errors: the port is taken; peers are not changed then.
    pub(super) fn apply(&self, state: &TunnelState, keys: KeyPairs) -> io::Result<()> {
        let _guard = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let port = state.wireguard.listen_port;
        if self.sockets().is_none_or(|sockets| sockets.port != port) {
            self.sockets.store(Some(Arc::new(Sockets::bind(port, &self.kept)?)));
        }
        let old = self.table();
        let now = Now::read();
        let identities = self.renew_identities(keys, now.monotonic);
        let mut free = free_slots(&old, state);
        // Peers know where this node was.
        let own_addresses = &state.wireguard.own_addresses;
        let moved = !old.own_addresses.is_empty() && old.own_addresses != *own_addresses;
        let mut greet = Vec::new();
        let mut by_key = BTreeMap::new();
        for (key, wanted) in
            state.wireguard.peers.iter().filter(|(key, _)| identities.all().all(|own| own.public != **key))
        {
            let known = old.known(key);
            let entry = match known {
                Some((entry, _)) => entry.clone(),
                None => match free.next() {
                    Some(slot) => Arc::new(PeerEntry::new(&identities, *key, slot)),
                    None => break,
                },
            };
            self.with_peer(&entry, |peer, out| {
                configure(peer, key, known.map(|(_, peer)| peer), wanted, now, out);
                peer.set_identities(&identities.current, identities.next.as_ref(), now.monotonic);
            });
            if known.is_none() || moved {
                greet.push(entry.clone());
            }
            by_key.insert(*key, (entry, wanted.clone()));
        }
        let mtu_bytes = usize::try_from(state.mtu_bytes).unwrap_or(1420);
        self.table.store(Arc::new(Table::new(by_key, mtu_bytes, own_addresses.clone())));
        for entry in greet {
            self.with_peer(&entry, |peer, out| peer.renew(now, out));
        }
        Ok(())
    }

    /// The pairs that stay keep their place; one that is no longer current is retired.
    fn renew_identities(&self, KeyPairs { current, next }: KeyPairs, now: Instant) -> Arc<Identities> {
        let old = self.identities();
        let kept = |new: Identity| {
            let known = old.all().find(|identity| identity.public == new.public);
            known.cloned().unwrap_or_else(|| Arc::new(new))
        };
        let (current, next) = (kept(current), next.map(kept));
        let changed = current.public != old.current.public;
        let retired = if changed { Some((old.current.clone(), now)) } else { old.retired.clone() };
        let renewed = Arc::new(Identities { current, next, retired });
        let mut admissions = self.admissions.lock().unwrap_or_else(PoisonError::into_inner);
        admissions.set_keys(renewed.all().map(|identity| identity.public));
        drop(admissions);
        self.identities.store(renewed.clone());
        renewed
    }

    /// Runs one step of the state machine and sends what it wants sent.
    pub(super) fn with_peer<R>(
        &self,
        entry: &PeerEntry,
        step: impl FnOnce(&mut Peer, &mut Outbox) -> R,
    ) -> R {
        let mut out = Outbox::new();
        let mut peer = entry.lock();
        let result = step(&mut peer, &mut out);
        drop(peer);
        for (to, datagram) in &out {
            self.send(*to, datagram, datagram.len());
        }
        result
    }

    /// Sends a train. A failure is a lost packet: logged once until the next success.
    pub(super) fn send(&self, to: SocketAddr, bytes: &[u8], segment: usize) {
        let Some(sockets) = self.sockets() else { return };
        let socket = if to.is_ipv4() { &sockets.v4 } else { &sockets.v6 };
        let outcome = match socket {
            Some(socket) => socket.send_train(to, bytes, segment),
            None => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        };
        match outcome {
            Ok(()) => self.send_failed.store(false, Ordering::Relaxed),
            Err(error) => {
                if !self.send_failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%to, %error, "cannot send");
                }
            }
        }
    }

    /// Counters of every peer, by key.
    pub(super) fn status(&self) -> Vec<PeerStatus> {
        let now = Now::read().monotonic;
        let table = self.table();
        table
            .by_key
            .iter()
            .map(|(key, (entry, _))| {
                let peer = entry.lock();
                PeerStatus {
                    public_key: *key,
                    own_key: peer.confirmed(),
                    endpoint: peer.endpoint(),
                    last_handshake_seconds: peer.seconds_since_handshake(now),
                    received_bytes: peer.received_bytes,
                    sent_bytes: peer.sent_bytes,
                }
            })
            .collect()
    }

    /// Ticks every peer when it is due, until the device ends.
    pub(super) fn run_timers(&self) -> io::Result<()> {
        while !self.stop.is_asked() {
            let now = Now::read();
            let mut sleep = MAX_TIMER_SLEEP;
            for entry in self.table().peers() {
                self.with_peer(entry, |peer, out| {
                    if peer.next_wake().is_some_and(|at| at <= now.monotonic) {
                        peer.tick(now, out);
                    }
                    if let Some(at) = peer.next_wake() {
                        sleep = sleep.min(at.saturating_duration_since(now.monotonic));
                    }
                });
            }
            self.stop.sleep(sleep.max(MIN_TIMER_SLEEP));
        }
        Ok(())
    }
}

/// Slots that no peer uses before or after the change, so that no index changes its meaning.
fn free_slots(old: &Table, state: &TunnelState) -> impl Iterator<Item = u32> + use<> {
    let taken: BTreeSet<u32> = old.peers().map(|entry| entry.slot).collect();
    let needed = u32::try_from(state.wireguard.peers.len() + taken.len()).unwrap_or(MAX_SLOT);
    (0..=needed.min(MAX_SLOT)).filter(move |slot| !taken.contains(slot))
}

fn configure(
    peer: &mut Peer,
    key: &WgPublicKey,
    old: Option<&WireguardPeer>,
    wanted: &WireguardPeer,
    now: Now,
    out: &mut Outbox,
) {
    // A peer that has called with its next key is called by it.
    if Some(peer.key) != wanted.next_key {
        peer.set_key(*key);
    }
    let candidates = wanted.endpoint.iter().chain(&wanted.other_endpoints);
    peer.set_candidates(candidates.copied().collect(), now, out);
    if old.is_none_or(|old| old.keepalive_seconds != wanted.keepalive_seconds) {
        let interval = wanted.keepalive_seconds.filter(|seconds| *seconds > 0);
        peer.set_keepalive(interval.map(|seconds| Duration::from_secs(seconds.into())), now.monotonic);
    }
}
