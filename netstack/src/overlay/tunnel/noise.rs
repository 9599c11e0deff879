//! The handshake: Noise_IKpsk2 with a zero preshared key, as messages without their macs.
//!
//! Source: WireGuard whitepaper, sections 5.4.2 and 5.4.3. The cryptography is snow's; the transport keys go to ring.

use snow::params::NoiseParams;
use snow::{Builder, HandshakeState};
use weft_model::WgPublicKey;
use x25519_dalek::{PublicKey, StaticSecret};

use super::message::{INITIATION_LEN, MACS_LEN, RESPONSE_LEN, TYPE_INITIATION, TYPE_RESPONSE, u32_at};

const CONSTRUCTION: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Weft distributes no preshared keys: the protocol then uses zeroes.
const PRESHARED_KEY: [u8; 32] = [0; 32];
const PRESHARED_KEY_LOCATION: u8 = 2;

pub(super) const TIMESTAMP_LEN: usize = 12;
/// TAI64N: orders initiations of one peer.
pub(super) type Timestamp = [u8; TIMESTAMP_LEN];

/// A handshake message that does not hold, or that comes in the wrong state.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoiseError {
    #[error("handshake")]
    Snow(#[from] snow::Error),
    #[error("handshake message of an unexpected length")]
    Length,
}

/// This node's key pair.
pub(super) struct Identity {
    private: [u8; 32],
    pub(super) public: WgPublicKey,
}

impl Identity {
    pub(super) fn new(private: [u8; 32]) -> Self {
        let public = PublicKey::from(&StaticSecret::from(private));
        Self { private, public: WgPublicKey(public.to_bytes()) }
    }

    /// For the process after this one; goes nowhere else.
    pub(super) fn private(&self) -> [u8; 32] {
        self.private
    }

    fn builder(&self) -> Result<Builder<'_>, NoiseError> {
        let params: NoiseParams = CONSTRUCTION.parse()?;
        Ok(Builder::new(params)
            .prologue(IDENTIFIER)?
            .local_private_key(&self.private)?
            .psk(PRESHARED_KEY_LOCATION, &PRESHARED_KEY)?)
    }
}

/// Keys of one session, from this side's view.
#[derive(Clone)]
pub(super) struct TransportKeys {
    pub(super) send: [u8; 32],
    pub(super) receive: [u8; 32],
}

/// Seconds and nanoseconds since the epoch as TAI64N (ten leap seconds as everywhere in WireGuard).
pub(super) fn timestamp(since_epoch: std::time::Duration) -> Timestamp {
    let mut out = [0; TIMESTAMP_LEN];
    out[..8].copy_from_slice(&(0x4000_0000_0000_000a + since_epoch.as_secs()).to_be_bytes());
    out[8..].copy_from_slice(&since_epoch.subsec_nanos().to_be_bytes());
    out
}

/// The first message, sent to the owner of `remote`.
pub(super) fn initiate(
    identity: &Identity,
    remote: &WgPublicKey,
    timestamp: &Timestamp,
    sender: u32,
) -> Result<(HandshakeState, [u8; INITIATION_LEN]), NoiseError> {
    let mut state = identity.builder()?.remote_public_key(&remote.0)?.build_initiator()?;
    let mut message = [0; INITIATION_LEN];
    message[0..4].copy_from_slice(&TYPE_INITIATION.to_le_bytes());
    message[4..8].copy_from_slice(&sender.to_le_bytes());
    let written = state.write_message(timestamp, &mut message[8..INITIATION_LEN - MACS_LEN])?;
    if written != INITIATION_LEN - MACS_LEN - 8 {
        return Err(NoiseError::Length);
    }
    Ok((state, message))
}

/// An initiation whose sender has proved to own `remote`.
pub(super) struct Initiation {
    state: HandshakeState,
    pub(super) remote: WgPublicKey,
    pub(super) sender: u32,
    pub(super) timestamp: Timestamp,
}

pub(super) fn read_initiation(
    identity: &Identity,
    message: &[u8; INITIATION_LEN],
) -> Result<Initiation, NoiseError> {
    let mut state = identity.builder()?.build_responder()?;
    let mut timestamp = [0; TIMESTAMP_LEN];
    let read = state.read_message(&message[8..INITIATION_LEN - MACS_LEN], &mut timestamp)?;
    let remote = state.get_remote_static().and_then(|key| key.try_into().ok()).map(WgPublicKey);
    match (remote, u32_at(message, 4), read) {
        (Some(remote), Some(sender), TIMESTAMP_LEN) => Ok(Initiation { state, remote, sender, timestamp }),
        _ => Err(NoiseError::Length),
    }
}

/// The second message, and the keys it settles.
pub(super) fn respond(
    initiation: Initiation,
    sender: u32,
) -> Result<([u8; RESPONSE_LEN], TransportKeys), NoiseError> {
    let Initiation { mut state, sender: receiver, .. } = initiation;
    let mut message = [0; RESPONSE_LEN];
    message[0..4].copy_from_slice(&TYPE_RESPONSE.to_le_bytes());
    message[4..8].copy_from_slice(&sender.to_le_bytes());
    message[8..12].copy_from_slice(&receiver.to_le_bytes());
    let written = state.write_message(&[], &mut message[12..RESPONSE_LEN - MACS_LEN])?;
    if written != RESPONSE_LEN - MACS_LEN - 12 {
        return Err(NoiseError::Length);
    }
    let (of_initiator, of_responder) = state.dangerously_get_raw_split();
    Ok((message, TransportKeys { send: of_responder, receive: of_initiator }))
}

/// Completes the initiator's side; a message that does not hold leaves `state` as it was.
pub(super) fn read_response(
    state: &mut HandshakeState,
    message: &[u8; RESPONSE_LEN],
) -> Result<TransportKeys, NoiseError> {
    state.read_message(&message[12..RESPONSE_LEN - MACS_LEN], &mut [])?;
    let (of_initiator, of_responder) = state.dangerously_get_raw_split();
    Ok(TransportKeys { send: of_initiator, receive: of_responder })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_on_keys_and_a_forged_response_spoils_nothing() {
        let (alice, bob) = (Identity::new([1; 32]), Identity::new([2; 32]));
        let time = timestamp(std::time::Duration::new(5, 6));
        let (mut state, message) = initiate(&alice, &bob.public, &time, 11).unwrap();
        let initiation = read_initiation(&bob, &message).unwrap();
        assert_eq!((initiation.remote, initiation.sender, initiation.timestamp), (alice.public, 11, time));
        let (response, bobs) = respond(initiation, 22).unwrap();
        let mut forged = response;
        forged[50] ^= 1;
        assert!(read_response(&mut state, &forged).is_err());
        let alices = read_response(&mut state, &response).unwrap();
        assert_eq!((alices.send, alices.receive), (bobs.receive, bobs.send));
    }

    #[test]
    fn an_initiation_to_someone_else_is_refused() {
        let (alice, bob, carol) = (Identity::new([1; 32]), Identity::new([2; 32]), Identity::new([3; 32]));
        let (_, message) = initiate(&alice, &bob.public, &[0; 12], 1).unwrap();
        assert!(read_initiation(&carol, &message).is_err());
    }
}
