//! The node's key pair is replaced while traffic flows.
//!
//! ```text
//!  command or age -> wireguard.key.next -> own Node names both keys -> peers accept both, the tunnel greets them with the new one
//!    -> every live peer has answered to it -> renamed to wireguard.key -> own Node names only the new one
//! ```
//!
//! Sessions outlive the change of keys, so no packet waits for it. What was begun is in the file, so a restart goes on with it. Kernel
//! WireGuard knows one key at a time: there the change follows the announcement, and each peer drops what comes between the two sides' changes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use tokio::sync::watch;
use weft_model::node_facts::WireguardBackend;
use weft_model::wireguard::PeerStatus;
use weft_model::{Snapshot, WgPublicKey};

use super::apply::peers;
use super::tunnel::{KEY_FILE, Keys, NEXT_KEY_FILE, TunnelError, public_key};
use crate::kube::Identity;
use crate::reconcile::{LoopHandle, chain};
use crate::store::key::{self, KeyError};

const LOOK: Duration = Duration::from_secs(1);
/// Peers that do not answer in this time have no traffic that could suffer.
const SETTLE: Duration = Duration::from_secs(15);
/// A peer that still knows only the old key (kernel WireGuard, an older version) takes the new one from the Node.
const LIMIT: Duration = Duration::from_secs(180);
/// A session older than this carries nothing (WireGuard whitepaper, section 6.1).
const SESSION_SECONDS: u64 = 180;

#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    #[error(transparent)]
    Read(#[from] TunnelError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("put {NEXT_KEY_FILE} in the place of {path}")]
    Replace { path: PathBuf, source: io::Error },
}

/// Owner of the key files of a node.
pub struct Rotation {
    state_dir: PathBuf,
    run_dir: PathBuf,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    identity: watch::Sender<Identity>,
    /// When the own Node was first seen to name the next key, and which peers are waited for.
    announced: Mutex<Option<(Instant, String)>>,
}

impl Rotation {
    /// A rotation that was cut short is taken up. Errors: the key files cannot be read.
    pub fn open(
        state_dir: PathBuf,
        run_dir: PathBuf,
        wireguard_port: u16,
        snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    ) -> Result<Arc<Self>, RotationError> {
        key::load_or_create_key(&state_dir.join(KEY_FILE))?;
        let identity = watch::Sender::new(identity(&state_dir, wireguard_port)?);
        Ok(Arc::new(Self { state_dir, run_dir, snapshots, identity, announced: Mutex::default() }))
    }

    /// What the own Node is to say.
    pub fn identity(&self) -> watch::Receiver<Identity> {
        self.identity.subscribe()
    }

    /// Makes the next key. False: one was being introduced already.
    pub fn begin(&self) -> Result<bool, RotationError> {
        if self.identity.borrow().next_public_key.is_some() {
            return Ok(false);
        }
        key::load_or_create_key(&self.state_dir.join(NEXT_KEY_FILE))?;
        self.look_again()?;
        Ok(true)
    }

    /// `max_age`: the key is replaced when it is older. `publish` is told when the Node is to say something else. Never ends.
    pub async fn run(self: Arc<Self>, max_age: Option<Duration>, publish: LoopHandle) -> Result<(), String> {
        let mut told = String::new();
        loop {
            tokio::time::sleep(LOOK).await;
            match self.step(max_age).await {
                Ok(()) => told.clear(),
                Err(error) => {
                    let why = chain(&error);
                    if why != told {
                        tracing::error!(error = why, "key rotation");
                    }
                    told = why;
                }
            }
            let due = self.snapshot().is_some_and(|snapshot| {
                snapshot.own_node().is_some_and(|node| self.identity.borrow().differs(node))
            });
            if due {
                publish.nudge();
            }
        }
    }

    async fn step(&self, max_age: Option<Duration>) -> Result<(), RotationError> {
        let Some(next) = self.identity.borrow().next_public_key else {
            let aged =
                max_age.is_some_and(|max| age(&self.state_dir.join(KEY_FILE)).is_some_and(|age| age >= max));
            return if aged { self.begin().map(|_| ()) } else { Ok(()) };
        };
        let Some(snapshot) = self.snapshot().filter(|snapshot| is_announced(snapshot, &next)) else {
            *self.announced() = None;
            return Ok(());
        };
        let since = self.announced().get_or_insert_with(|| (Instant::now(), String::new())).0;
        let backend = snapshot.facts.wireguard_backend;
        let run_dir = self.run_dir.clone();
        let asked = tokio::task::spawn_blocking(move || peers(&run_dir, backend)).await;
        // Without the tunnel nobody can be asked, and nothing would be replaced safely.
        let Ok(Ok(peers)) = asked else { return Ok(()) };
        let verdict = judge(&next, &peers, since.elapsed(), backend);
        if let Verdict::Wait(keys) = verdict {
            if let Some((_, waits)) = self.announced().as_mut() {
                *waits = keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            }
            return Ok(());
        }
        key::replace(&self.state_dir.join(NEXT_KEY_FILE), &self.state_dir.join(KEY_FILE))
            .map_err(|source| RotationError::Replace { path: self.state_dir.join(KEY_FILE), source })?;
        *self.announced() = None;
        self.look_again()?;
        tracing::info!(key = %next, "key rotated");
        Ok(())
    }

    fn look_again(&self) -> Result<(), RotationError> {
        let port = self.identity.borrow().wireguard_port;
        self.identity.send_replace(identity(&self.state_dir, port)?);
        Ok(())
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }

    fn announced(&self) -> std::sync::MutexGuard<'_, Option<(Instant, String)>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For people, a line each.
    pub fn text(&self) -> String {
        let Identity { public_key, next_public_key, .. } = *self.identity.borrow();
        let days = age(&self.state_dir.join(KEY_FILE)).map_or(0, |age| age.as_secs() / 86_400);
        let mut text = format!("key       {public_key}  ({days} days old)\n");
        if let Some(next) = next_public_key {
            text.push_str(&format!("next key  {next}\n{}\n", self.progress().unwrap_or_default()));
        }
        text
    }

    /// What a running rotation waits for; `None` without one.
    pub fn progress(&self) -> Option<String> {
        self.identity.borrow().next_public_key?;
        Some(match &*self.announced() {
            None => "a new key waits until the API server shows it on the own Node".to_owned(),
            Some((since, waits)) if waits.is_empty() => {
                format!("the new key is offered to the peers for {} s", since.elapsed().as_secs())
            }
            Some((since, waits)) => format!(
                "the new key is offered for {} s; no answer to it from {waits}; it takes over after {} s at the latest",
                since.elapsed().as_secs(),
                LIMIT.as_secs()
            ),
        })
    }
}

fn identity(state_dir: &Path, wireguard_port: u16) -> Result<Identity, RotationError> {
    let Keys { current, next } = Keys::read(state_dir)?;
    let public_key = public_key(current);
    Ok(Identity { public_key, next_public_key: next.map(super::tunnel::public_key), wireguard_port })
}

fn is_announced(snapshot: &Snapshot, next: &WgPublicKey) -> bool {
    !snapshot.from_store
        && snapshot.own_node().is_some_and(|node| node.next_public_key.as_ref() == Some(next))
}

/// A clock that was set back makes no key old.
fn age(path: &Path) -> Option<Duration> {
    let made = std::fs::metadata(path).and_then(|meta| meta.modified()).ok()?;
    SystemTime::now().duration_since(made).ok()
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Replace,
    /// For the answers of these peers.
    Wait(Vec<WgPublicKey>),
}

/// All peers have answered to `next`; or those with a session have, and the others had time to; or time is up.
fn judge(
    next: &WgPublicKey,
    peers: &[PeerStatus],
    announced_for: Duration,
    backend: WireguardBackend,
) -> Verdict {
    let userspace = backend == WireguardBackend::Userspace;
    // With kernel WireGuard no peer's answer is known.
    let silent: Vec<&PeerStatus> =
        peers.iter().filter(|peer| userspace && peer.own_key.as_ref() != Some(next)).collect();
    let live =
        |peer: &PeerStatus| peer.last_handshake_seconds.is_some_and(|seconds| seconds < SESSION_SECONDS);
    let settled = announced_for >= SETTLE && !silent.iter().any(|peer| live(peer));
    let done = settled || userspace && silent.is_empty();
    if done || announced_for >= LIMIT {
        return Verdict::Replace;
    }
    Verdict::Wait(silent.iter().map(|peer| peer.public_key).collect())
}

/// `POST /key/rotate` and `GET /key` for the agent's Unix socket.
pub fn router(rotation: Arc<Rotation>) -> Router {
    Router::new().route("/key", get(show)).route("/key/rotate", post(rotate)).with_state(rotation)
}

async fn show(State(rotation): State<Arc<Rotation>>) -> String {
    rotation.text()
}

async fn rotate(State(rotation): State<Arc<Rotation>>) -> (StatusCode, String) {
    match rotation.begin() {
        Ok(true) => (StatusCode::OK, rotation.text()),
        Ok(false) => {
            let progress = rotation.progress().unwrap_or_default();
            (StatusCode::CONFLICT, format!("a rotation runs already: {progress}\n"))
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: WgPublicKey = WgPublicKey([9; 32]);

    fn peer(number: u8, own_key: Option<WgPublicKey>, last_handshake_seconds: Option<u64>) -> PeerStatus {
        PeerStatus {
            public_key: WgPublicKey([number; 32]),
            own_key,
            endpoint: None,
            last_handshake_seconds,
            received_bytes: 0,
            sent_bytes: 0,
        }
    }

    fn after(seconds: u64, peers: &[PeerStatus]) -> Verdict {
        judge(&NEXT, peers, Duration::from_secs(seconds), WireguardBackend::Userspace)
    }

    #[test]
    fn the_key_is_replaced_as_soon_as_every_peer_has_answered_to_it() {
        assert_eq!(after(0, &[]), Verdict::Replace);
        assert_eq!(after(0, &[peer(1, Some(NEXT), Some(1)), peer(2, Some(NEXT), Some(5))]), Verdict::Replace);
    }

    #[test]
    fn a_peer_with_a_session_under_the_old_key_is_waited_for() {
        let peers = [peer(1, Some(NEXT), Some(1)), peer(2, Some(WgPublicKey([3; 32])), Some(100))];
        assert_eq!(after(179, &peers), Verdict::Wait(vec![WgPublicKey([2; 32])]));
        assert_eq!(after(180, &peers), Verdict::Replace);
    }

    #[test]
    fn a_peer_that_is_away_has_a_quarter_of_a_minute() {
        let peers = [peer(1, Some(NEXT), Some(1)), peer(2, None, None), peer(3, None, Some(500))];
        assert!(matches!(after(14, &peers), Verdict::Wait(keys) if keys.len() == 2));
        assert_eq!(after(15, &peers), Verdict::Replace);
    }

    #[test]
    fn with_kernel_wireguard_the_change_follows_the_announcement() {
        let peers = [peer(1, None, Some(1))];
        let at = |seconds| judge(&NEXT, &peers, Duration::from_secs(seconds), WireguardBackend::Kernel);
        assert_eq!((at(14), at(15)), (Verdict::Wait(vec![]), Verdict::Replace));
    }
}
