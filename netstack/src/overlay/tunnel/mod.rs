//! `weft tunnel`: WireGuard in user space, in a process of its own, for kernels without it.
//!
//! ```text
//!  weft0 (TUN, superpackets) <-> egress / ingress threads <-> UDP sockets (trains)
//!                                     |
//!  tunnel.json, tunnel.sock --> Device: Table of peers, each a sans-IO state machine (peer.rs)
//! ```
//!
//! It needs the agent only for changes: it reads `tunnel.json` at start and whenever it is told to. When it dies, the
//! device, its addresses and its routes stay. Where the service manager keeps descriptors, packets wait in them until it is
//! back, and after an orderly end the sessions go on (handover.rs); else the peers are greeted at once.
//! No async here: threads run packets to completion. Source of the protocol: the WireGuard whitepaper.

mod allowed_ips;
mod checksum;
mod coalesce;
mod device;
mod egress;
mod handover;
mod ingress;
mod kept;
mod macs;
mod message;
mod noise;
mod peer;
mod replay;
mod segment;
mod session;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use weft_model::WgPublicKey;
use weft_model::wireguard::WireguardPlan;

use self::device::Device;
use self::noise::Identity;
use crate::control::{self, Response};
use crate::kernel::descriptor_store::Kept;

pub const STATE_FILE: &str = "tunnel.json";
pub const SOCKET_FILE: &str = "tunnel.sock";
pub const KEY_FILE: &str = "wireguard.key";
/// Holds the key to come while it is being introduced to the peers.
pub const NEXT_KEY_FILE: &str = "wireguard.key.next";

#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Holds `tunnel.json` and `tunnel.sock`.
    pub run_dir: PathBuf,
    /// Holds `wireguard.key` and, during a rotation, `wireguard.key.next`.
    pub state_dir: PathBuf,
    /// Name of the TUN device, usually `weft0`.
    pub link: String,
}

/// Content of `tunnel.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelState {
    pub wireguard: WireguardPlan,
    /// MTU of the TUN device; padding never exceeds it.
    pub mtu_bytes: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("cannot read the private key {path}: the agent writes it; start the agent first")]
    ReadKey { path: PathBuf, source: io::Error },
    #[error("{path} holds no private key: expected 32 bytes, or their base64 as `wg genkey` prints it")]
    InvalidKey { path: PathBuf },
    #[error("cannot open the TUN device {link}: needs root (CAP_NET_ADMIN), /dev/net/tun and no other owner")]
    Tun { link: String, source: io::Error },
    #[error("cannot read {path}")]
    ReadState { path: PathBuf, source: io::Error },
    #[error("{path} is not what the agent writes")]
    InvalidState { path: PathBuf, source: serde_json::Error },
    #[error("cannot use UDP port {port}: is another WireGuard running?")]
    Port { port: u16, source: io::Error },
    #[error("cannot listen on {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("{thread} ended")]
    Ended { thread: &'static str, source: io::Error },
}

/// Threads end within microseconds of being asked; one that waits in vain for the wake-up, after a second.
const END_LIMIT: Duration = Duration::from_secs(3);

/// Runs the tunnel until SIGTERM or SIGINT (`Ok`) or until a part of it fails. Blocks; the device stays. Goes on with what is in
/// `kept`, and leaves there what the next process needs.
pub fn run(config: TunnelConfig, mut kept: Kept) -> Result<(), TunnelError> {
    let Keys { current, .. } = Keys::read(&config.state_dir)?;
    let tun =
        kept.tun(&config.link).map_err(|source| TunnelError::Tun { link: config.link.clone(), source })?;
    let left = kept.sessions();
    let device = Device::new(Identity::new(current), tun, kept).map_err(TunnelError::Thread)?;
    if let Some((state, ago)) = left {
        match device.resume(state, ago) {
            Ok(()) => tracing::info!(?ago, "the sessions of the process before go on"),
            Err(error) => kept::refused(&error),
        }
    }
    let device = Arc::new(device);
    let state_path = config.run_dir.join(STATE_FILE);
    match apply(&device, &state_path, &config.state_dir) {
        // Without an agent so far: wait for its word.
        Err(TunnelError::ReadState { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        outcome => outcome?,
    }
    let socket_path = config.run_dir.join(SOCKET_FILE);
    let listener = control::bind(&socket_path)
        .map_err(|source| TunnelError::Socket { path: socket_path.clone(), source })?;
    let (end_tx, end_rx) = mpsc::channel();
    let (of_control, state_dir) = (Arc::downgrade(&device), config.state_dir);
    start("control", &end_tx, move || {
        control::serve(&listener, |method, path| answer(&of_control, &state_path, &state_dir, method, path))
    })?;
    start_data_path(&device, &end_tx)?;
    start("signals", &end_tx, wait_for_signal)?;
    tracing::info!(link = config.link, key = %device.identities().current.public, "tunnel runs");
    // Every sender lives in a thread that reports before it ends, and one is here: an answer always comes.
    let outcome = match end_rx.recv() {
        Ok(("signals", error)) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(_) => Ok(()),
        Ok((thread, source)) => Err(TunnelError::Ended { thread, source }),
    };
    // What is left there only makes the next start remove it.
    let _ = std::fs::remove_file(&socket_path);
    if outcome.is_ok() && device.is_kept() {
        leave(device);
    }
    outcome
}

/// Ends the data path and leaves its sessions to the next process.
fn leave(device: Arc<Device>) {
    device.end();
    match sole(device) {
        Some(device) => {
            let (state, kept) = device.leave();
            kept.leave_sessions(state);
        }
        None => tracing::warn!("a thread does not end: the sessions are not left to the next process"),
    }
}

/// The device, as soon as nobody else has it.
fn sole(mut device: Arc<Device>) -> Option<Device> {
    let started_at = Instant::now();
    loop {
        match Arc::try_unwrap(device) {
            Ok(device) => return Some(device),
            Err(_) if started_at.elapsed() > END_LIMIT => return None,
            Err(shared) => device = shared,
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Ends, always with an error, when the process is asked to end. A runtime of its own, because tokio's handlers work
/// whatever threads the process has.
fn wait_for_signal() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Err(io::ErrorKind::Interrupted.into())
    })
}

type End = (&'static str, io::Error);

fn start_data_path(device: &Arc<Device>, end: &Sender<End>) -> Result<(), TunnelError> {
    let shared = device.clone();
    start("egress", end, move || egress::run(&shared))?;
    for (name, ipv6) in [("ingress-v4", false), ("ingress-v6", true)] {
        let shared = device.clone();
        start(name, end, move || ingress::run(&shared, ipv6))?;
    }
    let shared = device.clone();
    start("timers", end, move || shared.run_timers())
}

/// A thread whose end is reported.
fn start(
    name: &'static str,
    end: &Sender<End>,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), TunnelError> {
    let end = end.clone();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let reason = match outcome {
            Ok(Ok(())) => io::Error::other("unexpected end"),
            Ok(Err(error)) => error,
            Err(_) => io::Error::other("panic"),
        };
        // Nobody listens any more when the process is ending.
        let _ = end.send((name, reason));
    });
    thread.map(|_| ()).map_err(TunnelError::Thread)
}

fn answer(device: &Weak<Device>, state_path: &Path, state_dir: &Path, method: &str, path: &str) -> Response {
    let Some(device) = device.upgrade() else {
        return Response { status: 500, body: "the tunnel is ending".to_owned() };
    };
    match (method, path) {
        ("POST", "/apply") => match apply(&device, state_path, state_dir) {
            Ok(()) => Response { status: 204, body: String::new() },
            Err(error) => Response { status: 500, body: crate::reconcile::chain(&error) },
        },
        ("GET", "/peers") => match serde_json::to_string(&device.status()) {
            Ok(body) => Response { status: 200, body },
            Err(error) => Response { status: 500, body: error.to_string() },
        },
        _ => Response { status: 404, body: "POST /apply, GET /peers".to_owned() },
    }
}

fn apply(device: &Device, state_path: &Path, state_dir: &Path) -> Result<(), TunnelError> {
    let path = || state_path.to_owned();
    let text = std::fs::read(state_path).map_err(|source| TunnelError::ReadState { path: path(), source })?;
    let state: TunnelState =
        serde_json::from_slice(&text).map_err(|source| TunnelError::InvalidState { path: path(), source })?;
    let port = state.wireguard.listen_port;
    let keys = Keys::read(state_dir)?.pairs(&state.wireguard.own_keys);
    device.apply(&state, keys).map_err(|source| TunnelError::Port { port, source })?;
    tracing::info!(peers = state.wireguard.peers.len(), port, "configuration applied");
    Ok(())
}

/// This node's private keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    pub current: [u8; 32],
    pub next: Option<[u8; 32]>,
}

impl Keys {
    /// Errors: a file that is there is no key, or the current one is not there.
    pub fn read(state_dir: &Path) -> Result<Self, TunnelError> {
        let current = read_key(&state_dir.join(KEY_FILE))?;
        let next = match read_key(&state_dir.join(NEXT_KEY_FILE)) {
            Ok(key) => Some(key),
            Err(TunnelError::ReadKey { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { current, next })
    }

    /// The next one counts once the node's own Node has named it: before that no peer can know it.
    fn pairs(self, named: &[WgPublicKey]) -> KeyPairs {
        let next = self.next.map(Identity::new).filter(|next| named.contains(&next.public));
        KeyPairs { current: Identity::new(self.current), next }
    }
}

struct KeyPairs {
    current: Identity,
    next: Option<Identity>,
}

/// The public key of a private key.
pub fn public_key(private: [u8; 32]) -> WgPublicKey {
    Identity::new(private).public
}

/// Reads a private key: 32 raw bytes, or base64 with or without a line end.
pub fn read_key(path: &Path) -> Result<[u8; 32], TunnelError> {
    let bytes =
        std::fs::read(path).map_err(|source| TunnelError::ReadKey { path: path.to_owned(), source })?;
    let decoded = match <[u8; 32]>::try_from(bytes.as_slice()) {
        Ok(raw) => Some(raw),
        Err(_) => base64::engine::general_purpose::STANDARD
            .decode(bytes.trim_ascii())
            .ok()
            .and_then(|key| key.try_into().ok()),
    };
    decoded.ok_or_else(|| TunnelError::InvalidKey { path: path.to_owned() })
}

#[cfg(test)]
mod tests;
