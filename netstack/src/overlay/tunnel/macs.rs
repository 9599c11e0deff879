//! mac1, mac2 and the cookie that proves an address under load.
//!
//! Source: WireGuard whitepaper, sections 5.3 and 5.4.7.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use weft_model::WgPublicKey;

use super::message::{COOKIE_REPLY_LEN, MACS_LEN, TYPE_COOKIE_REPLY, u32_at};

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";
/// A cookie is good for this long.
pub(super) const COOKIE_LIFETIME: Duration = Duration::from_secs(120);
/// More initiations than this in a second mean that we are under load: each costs three Curve25519 multiplications.
const LOAD_PER_SECOND: u32 = 64;
/// With a valid cookie one address may still start this many handshakes a second.
const PER_ADDRESS_PER_SECOND: u32 = 20;

pub(super) type Cookie = [u8; 16];

/// The key of mac1, or of cookies, for messages to the owner of `public_key`.
pub(super) fn mac1_key(public_key: &[u8; 32]) -> [u8; 32] {
    hash(LABEL_MAC1, public_key)
}

pub(super) fn cookie_key(public_key: &[u8; 32]) -> [u8; 32] {
    hash(LABEL_COOKIE, public_key)
}

fn hash(label: &[u8], key: &[u8; 32]) -> [u8; 32] {
    let mut state = Blake2s256::new();
    Update::update(&mut state, label);
    Update::update(&mut state, key);
    state.finalize_fixed().into()
}

/// Keyed BLAKE2s with 16 bytes of output.
fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    // BLAKE2s takes keys of up to 32 bytes; all keys here have 16 or 32.
    let mut state = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("at most 32 bytes of key");
    for part in parts {
        Update::update(&mut state, part);
    }
    state.finalize_fixed().into()
}

/// Fills the last 32 bytes of a handshake message; returns mac1, which a cookie reply is bound to.
pub(super) fn stamp(message: &mut [u8], mac1_key: &[u8; 32], cookie: Option<&Cookie>) -> [u8; 16] {
    let (body, macs) = message.split_at_mut(message.len() - MACS_LEN);
    let (mac1_field, mac2_field) = macs.split_at_mut(16);
    let mac1 = mac(mac1_key, &[body]);
    mac1_field.copy_from_slice(&mac1);
    match cookie {
        Some(cookie) => mac2_field.copy_from_slice(&mac(cookie, &[body, &mac1])),
        None => mac2_field.fill(0),
    }
    mac1
}

fn valid_mac(key: &[u8], parts: &[&[u8]], given: &[u8]) -> bool {
    // `Mac::verify_slice` compares in constant time.
    let mut state = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("at most 32 bytes of key");
    for part in parts {
        Update::update(&mut state, part);
    }
    Mac::verify_slice(state, given).is_ok()
}

/// Opens a cookie reply to the message with `mac1` that we sent to the owner of `cookie_key`.
pub(super) fn open_cookie(
    reply: &[u8; COOKIE_REPLY_LEN],
    cookie_key: &[u8; 32],
    mac1: &[u8; 16],
) -> Option<Cookie> {
    let cipher = <XChaCha20Poly1305 as chacha20poly1305::KeyInit>::new(cookie_key.into());
    let mut cookie: Cookie = reply[32..48].try_into().ok()?;
    let tag = reply[48..64].into();
    cipher.decrypt_in_place_detached(XNonce::from_slice(&reply[8..32]), mac1, &mut cookie, tag).ok()?;
    Some(cookie)
}

/// What to do with a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is for the owner of this key.
    Process(WgPublicKey),
    /// We are under load and the sender has not proved its address: answer with this instead.
    Reply([u8; COOKIE_REPLY_LEN]),
    Drop,
}

/// A public key of ours, with what is derived from it.
struct OwnKey {
    public: WgPublicKey,
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl OwnKey {
    fn new(public: WgPublicKey) -> Self {
        Self { public, mac1: mac1_key(&public.0), cookie: cookie_key(&public.0) }
    }
}

/// Guards the expensive part of handshakes; one per device.
pub(super) struct Admissions {
    keys: Vec<OwnKey>,
    secret: [u8; 32],
    secret_until: Option<Instant>,
    second: Instant,
    in_second: u32,
    busy_until: Option<Instant>,
    by_address: HashMap<IpAddr, u32>,
}

impl Admissions {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            keys: Vec::new(),
            secret: [0; 32],
            secret_until: None,
            second: now,
            in_second: 0,
            busy_until: None,
            by_address: HashMap::new(),
        }
    }

    /// Messages to the owners of these keys are for us.
    pub(super) fn set_keys(&mut self, keys: impl Iterator<Item = WgPublicKey>) {
        self.keys = keys.map(OwnKey::new).collect();
    }

    /// Judges an initiation or a response (their last 32 bytes are the macs).
    pub(super) fn judge(&mut self, message: &[u8], from: SocketAddr, now: Instant) -> Admission {
        let (body, macs) = message.split_at(message.len() - MACS_LEN);
        let (mac1, mac2) = macs.split_at(16);
        let meant = |key: &&OwnKey| valid_mac(&key.mac1, &[body], mac1);
        let Some(&OwnKey { public, cookie: cookie_key, .. }) = self.keys.iter().find(meant) else {
            return Admission::Drop;
        };
        if !self.under_load(now) {
            return Admission::Process(public);
        }
        let cookie = self.cookie(from, now);
        if !valid_mac(&cookie, &[body, mac1], mac2) {
            return reply(&cookie_key, message, mac1, &cookie).map_or(Admission::Drop, Admission::Reply);
        }
        let count = self.by_address.entry(from.ip()).or_default();
        *count += 1;
        if *count > PER_ADDRESS_PER_SECOND { Admission::Drop } else { Admission::Process(public) }
    }

    fn under_load(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.in_second = 0;
            self.by_address.clear();
        }
        self.in_second = self.in_second.saturating_add(1);
        if self.in_second > LOAD_PER_SECOND {
            self.busy_until = Some(now + Duration::from_secs(1));
        }
        self.busy_until.is_some_and(|until| now < until)
    }

    /// The cookie of an address: changes every two minutes, needs no memory per address.
    fn cookie(&mut self, from: SocketAddr, now: Instant) -> Cookie {
        if self.secret_until.is_none_or(|until| now >= until) {
            self.secret = rand::random();
            self.secret_until = Some(now + COOKIE_LIFETIME);
        }
        let port = from.port().to_be_bytes();
        match from.ip() {
            IpAddr::V4(address) => mac(&self.secret, &[&address.octets(), &port]),
            IpAddr::V6(address) => mac(&self.secret, &[&address.octets(), &port]),
        }
    }
}

fn reply(
    cookie_key: &[u8; 32],
    message: &[u8],
    mac1: &[u8],
    cookie: &Cookie,
) -> Option<[u8; COOKIE_REPLY_LEN]> {
    let mut reply = [0; COOKIE_REPLY_LEN];
    reply[0..4].copy_from_slice(&TYPE_COOKIE_REPLY.to_le_bytes());
    reply[4..8].copy_from_slice(&u32_at(message, 4)?.to_le_bytes());
    let nonce: [u8; 24] = rand::random();
    reply[8..32].copy_from_slice(&nonce);
    reply[32..48].copy_from_slice(cookie);
    let cipher = <XChaCha20Poly1305 as chacha20poly1305::KeyInit>::new(cookie_key.into());
    let tag = cipher.encrypt_in_place_detached(&nonce.into(), mac1, &mut reply[32..48]).ok()?;
    reply[48..64].copy_from_slice(&tag);
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: [u8; 32] = [7; 32];

    fn stamped(cookie: Option<&Cookie>) -> ([u8; 148], [u8; 16]) {
        let mut message = [3; 148];
        let mac1 = stamp(&mut message, &mac1_key(&OWNER), cookie);
        (message, mac1)
    }

    fn admissions(now: Instant) -> Admissions {
        let mut admissions = Admissions::new(now);
        admissions.set_keys([WgPublicKey([8; 32]), WgPublicKey(OWNER)].into_iter());
        admissions
    }

    #[test]
    fn a_wrong_mac1_is_dropped_before_any_expensive_work() {
        let now = Instant::now();
        let (mut message, _) = stamped(None);
        message[20] ^= 1;
        let from = "192.0.2.1:5".parse().unwrap();
        assert_eq!(admissions(now).judge(&message, from, now), Admission::Drop);
    }

    #[test]
    fn under_load_an_address_proves_itself_with_the_cookie() {
        let now = Instant::now();
        let mut admissions = admissions(now);
        let from: SocketAddr = "[2001:db8::1]:51820".parse().unwrap();
        let (message, mac1) = stamped(None);
        for _ in 0..LOAD_PER_SECOND {
            assert_eq!(admissions.judge(&message, from, now), Admission::Process(WgPublicKey(OWNER)));
        }
        let Admission::Reply(reply) = admissions.judge(&message, from, now) else { panic!("no cookie") };
        let cookie = open_cookie(&reply, &cookie_key(&OWNER), &mac1).unwrap();
        let (with_mac2, _) = stamped(Some(&cookie));
        assert_eq!(admissions.judge(&with_mac2, from, now), Admission::Process(WgPublicKey(OWNER)));
        let elsewhere = "[2001:db8::1]:51821".parse().unwrap();
        assert!(matches!(admissions.judge(&with_mac2, elsewhere, now), Admission::Reply(_)));
        let later = now + Duration::from_secs(3);
        assert_eq!(
            admissions.judge(&message, from, later),
            Admission::Process(WgPublicKey(OWNER)),
            "the load is over"
        );
    }

    #[test]
    fn a_cookie_reply_to_another_message_is_refused() {
        let now = Instant::now();
        let mut admissions = admissions(now);
        let from = "192.0.2.1:5".parse().unwrap();
        let (message, mac1) = stamped(None);
        for _ in 0..LOAD_PER_SECOND {
            admissions.judge(&message, from, now);
        }
        let Admission::Reply(reply) = admissions.judge(&message, from, now) else { panic!("no cookie") };
        let mut other = mac1;
        other[0] ^= 1;
        assert_eq!(open_cookie(&reply, &cookie_key(&OWNER), &other), None);
    }
}
