//! The cipher of the tunnel's data messages, ChaCha20-Poly1305 (RFC 8439), of many packets at once. Here and not in `tunnel` because
//! of `unsafe`.
//!
//! ```text
//!  packets of one session --by sixteen--> lanes (AVX-512, where the processor has it and it pays) or ring (one by one)
//! ```

#[cfg(target_arch = "x86_64")]
mod lanes;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use smallvec::SmallVec;

/// Poly1305 tag behind the text.
pub const TAG_LEN: usize = 16;
/// As many packets as lanes.
const BATCH: usize = 16;

/// A packet under way through the cipher.
pub struct Packet<'a> {
    pub counter: u64,
    /// Its text and behind that [`TAG_LEN`] bytes, the tag or room for it.
    pub bytes: &'a mut [u8],
}

pub struct Key {
    ring: LessSafeKey,
    #[cfg(target_arch = "x86_64")]
    lanes: Option<lanes::Key>,
}

impl Key {
    pub fn new(key: &[u8; 32]) -> Self {
        let ring = UnboundKey::new(&CHACHA20_POLY1305, key).expect("32 bytes are a ChaCha20 key");
        Self {
            ring: LessSafeKey::new(ring),
            #[cfg(target_arch = "x86_64")]
            lanes: lanes::Key::new(key),
        }
    }

    /// Seals each in place. No two may have the same counter, ever.
    pub fn seal<'a>(&self, packets: impl Iterator<Item = Packet<'a>>) {
        in_batches(packets, |batch| {
            #[cfg(target_arch = "x86_64")]
            if let Some(lanes) = self.lanes.as_ref().filter(|_| lanes::pays(batch)) {
                return lanes.seal(batch);
            }
            for Packet { counter, bytes } in batch {
                let (text, tag_room) = split(bytes);
                // ring fails only beyond 256 GiB of plaintext.
                let tag = self
                    .ring
                    .seal_in_place_separate_tag(nonce(*counter), Aad::empty(), text)
                    .expect("a datagram is shorter than the cipher's limit");
                tag_room.copy_from_slice(tag.as_ref());
            }
        });
    }

    /// Opens each in place and says, in their order, which are authentic; those that are not hold nothing of meaning then.
    pub fn open<'a>(&self, packets: impl Iterator<Item = Packet<'a>>, mut verdict: impl FnMut(bool)) {
        in_batches(packets, |batch| {
            #[cfg(target_arch = "x86_64")]
            if let Some(lanes) = self.lanes.as_ref().filter(|_| lanes::pays(batch)) {
                return lanes.open(batch).into_iter().take(batch.len()).for_each(&mut verdict);
            }
            for Packet { counter, bytes } in batch {
                verdict(self.ring.open_in_place(nonce(*counter), Aad::empty(), bytes).is_ok());
            }
        });
    }
}

fn in_batches<'a>(packets: impl Iterator<Item = Packet<'a>>, mut each: impl FnMut(&mut [Packet<'a>])) {
    let mut batch = SmallVec::<[Packet<'a>; BATCH]>::new();
    for packet in packets {
        batch.push(packet);
        if batch.len() == BATCH {
            each(&mut batch);
            batch.clear();
        }
    }
    if !batch.is_empty() {
        each(&mut batch);
    }
}

/// Text and tag.
fn split(bytes: &mut [u8]) -> (&mut [u8], &mut [u8; TAG_LEN]) {
    bytes.split_last_chunk_mut().expect("a packet has room for its tag")
}

/// Four zero bytes and the counter, little endian (whitepaper, section 5.4.6).
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests;
