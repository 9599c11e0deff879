//! The device as one process leaves it to the next: key pairs, peers and how they are configured.

use serde::{Deserialize, Serialize};

use super::super::handover::{Clock, Offset, Unusable, in_base64};
use super::super::peer::PeerState;
use super::*;

#[derive(Serialize, Deserialize)]
pub(in super::super) struct DeviceState {
    current: PrivateKey,
    next: Option<PrivateKey>,
    retired: Option<(PrivateKey, Offset)>,
    mtu_bytes: usize,
    own_addresses: Vec<IpAddr>,
    peers: Vec<(WgPublicKey, WireguardPeer, PeerState)>,
}

#[derive(Serialize, Deserialize)]
struct PrivateKey(#[serde(with = "in_base64")] [u8; 32]);

impl PrivateKey {
    fn of(identity: &Arc<Identity>) -> Self {
        Self(identity.private())
    }

    fn identity(self) -> Arc<Identity> {
        Arc::new(Identity::new(self.0))
    }
}

impl Device {
    /// The last word on every session. That the device is consumed is the proof that no thread seals any more: each had its own
    /// reference to it until it ended.
    pub(in super::super) fn leave(self) -> (DeviceState, Kept) {
        let clock = Clock::leaving(Instant::now());
        let (identities, table) = (self.identities(), self.table());
        let retired = identities.retired.as_ref();
        let state = DeviceState {
            current: PrivateKey::of(&identities.current),
            next: identities.next.as_ref().map(PrivateKey::of),
            retired: retired.map(|(identity, at)| (PrivateKey::of(identity), clock.offset(*at))),
            mtu_bytes: table.mtu_bytes,
            own_addresses: table.own_addresses.clone(),
            peers: table
                .by_key
                .iter()
                .map(|(key, (entry, configured))| (*key, configured.clone(), entry.lock().state(&clock)))
                .collect(),
        };
        (state, self.kept)
    }

    /// Becomes what the device of the process before was when it was left, `ago`; what has changed since is for [`Device::apply`].
    /// To be called before any thread runs, with a state that nobody else has.
    ///
    /// Errors: what no process leaves; the device is as before then.
    pub(in super::super) fn resume(&self, state: DeviceState, ago: Duration) -> Result<(), Unusable> {
        let now = Now::read();
        let clock = Clock::arriving(now.monotonic, ago)?;
        let retired = state.retired.map(|(key, at)| Ok::<_, Unusable>((key.identity(), clock.instant(at)?)));
        let identities = Identities {
            current: state.current.identity(),
            next: state.next.map(PrivateKey::identity),
            retired: retired.transpose()?,
        };
        let ours = |key: &WgPublicKey| identities.all().find(|identity| identity.public == *key).cloned();
        let (mut by_key, mut slots, mut greet) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        for (key, configured, state) in state.peers {
            if state.slot > MAX_SLOT || !slots.insert(state.slot) {
                return Err(Unusable::Slot);
            }
            let entry = Arc::new(PeerEntry::new(&identities, key, state.slot));
            // Nobody is called: there is no session yet.
            configure(&mut entry.lock(), &key, None, &configured, now, &mut Outbox::new());
            greet.extend(state.is_being_greeted.then(|| entry.clone()));
            entry.lock().resume(state, ours, &clock)?;
            by_key.insert(key, (entry, configured));
        }
        let mut admissions = self.admissions.lock().unwrap_or_else(PoisonError::into_inner);
        admissions.set_keys(identities.all().map(|identity| identity.public));
        drop(admissions);
        self.table.store(Arc::new(Table::new(by_key, state.mtu_bytes, state.own_addresses)));
        self.identities.store(Arc::new(identities));
        for entry in greet {
            self.with_peer(&entry, |peer, out| peer.start_handshake(now, out));
        }
        Ok(())
    }
}
