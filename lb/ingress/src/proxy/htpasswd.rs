//! Passwords as `htpasswd` writes them: `$apr1$` (its default) and `$1$` (MD5, 1,000 rounds), `{SHA}`, `{PLAIN}`. Pure.
//!
//! A hash of another kind (bcrypt, crypt) lets nobody in.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Whether the password is the one that was hashed.
pub(super) fn verify(password: &[u8], hash: &str) -> bool {
    let expected = if let Some(encoded) = hash.strip_prefix("{SHA}") {
        let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, password);
        return same(STANDARD.encode(digest.as_ref()).as_bytes(), encoded.as_bytes());
    } else if let Some(plain) = hash.strip_prefix("{PLAIN}") {
        return same(password, plain.as_bytes());
    } else {
        ["$apr1$", "$1$"].iter().find_map(|magic| {
            let (salt, digest) = hash.strip_prefix(magic)?.split_once('$')?;
            Some((md5_crypt(password, salt.as_bytes(), magic.as_bytes()), digest))
        })
    };
    expected.is_some_and(|(made, digest)| same(made.as_bytes(), digest.as_bytes()))
}

/// In a time that does not tell where they differ.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

/// Poul-Henning Kamp's MD5 scheme, with Apache's name for it or without.
fn md5_crypt(password: &[u8], salt: &[u8], magic: &[u8]) -> String {
    let salt = salt.get(..8).unwrap_or(salt);
    let inner = md5(&[password, salt, password].concat());
    let mut first = [password, magic, salt].concat();
    first.extend(inner.iter().cycle().take(password.len()));
    let mut length = password.len();
    while length > 0 {
        first.push(if length & 1 == 1 { 0 } else { password.first().copied().unwrap_or_default() });
        length >>= 1;
    }
    let mut digest = md5(&first);
    for round in 0..1000 {
        let mut text = Vec::with_capacity(80);
        text.extend_from_slice(if round & 1 == 1 { password } else { &digest });
        if round % 3 != 0 {
            text.extend_from_slice(salt);
        }
        if round % 7 != 0 {
            text.extend_from_slice(password);
        }
        text.extend_from_slice(if round & 1 == 1 { &digest } else { password });
        digest = md5(&text);
    }
    encoded(&digest)
}

fn encoded(d: &[u8; 16]) -> String {
    const LETTERS: &[u8; 64] = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut text = String::with_capacity(22);
    let mut put = |mut value: u32, count: u8| {
        for _ in 0..count {
            text.push(char::from(LETTERS[(value & 63) as usize]));
            value >>= 6;
        }
    };
    let three = |a: u8, b: u8, c: u8| u32::from(a) << 16 | u32::from(b) << 8 | u32::from(c);
    put(three(d[0], d[6], d[12]), 4);
    put(three(d[1], d[7], d[13]), 4);
    put(three(d[2], d[8], d[14]), 4);
    put(three(d[3], d[9], d[15]), 4);
    put(three(d[4], d[10], d[5]), 4);
    put(u32::from(d[11]), 2);
    text
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// RFC 1321.
pub(super) fn md5(message: &[u8]) -> [u8; 16] {
    const SHIFTS: [[u32; 4]; 4] = [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];
    let mut padded = message.to_vec();
    padded.push(0x80);
    while padded.len() % 64 != 56 {
        padded.push(0);
    }
    padded.extend_from_slice(&((message.len() as u64) * 8).to_le_bytes());
    let mut state: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    for block in padded.chunks_exact(64) {
        let mut words = [0_u32; 16];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        }
        let [mut a, mut b, mut c, mut d] = state;
        for step in 0..64_usize {
            let (mixed, word) = match step / 16 {
                0 => ((b & c) | (!b & d), step),
                1 => ((d & b) | (!d & c), (5 * step + 1) % 16),
                2 => (b ^ c ^ d, (3 * step + 5) % 16),
                _ => (c ^ (b | !d), (7 * step) % 16),
            };
            let sum = a.wrapping_add(mixed).wrapping_add(sine(step)).wrapping_add(words[word]);
            (a, d, c) = (d, c, b);
            b = b.wrapping_add(sum.rotate_left(SHIFTS[step / 16][step % 4]));
        }
        for (old, new) in state.iter_mut().zip([a, b, c, d]) {
            *old = old.wrapping_add(new);
        }
    }
    let mut digest = [0; 16];
    for (bytes, word) in digest.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    digest
}

/// The table of RFC 1321: the integer part of 2^32 times the sine of the step.
fn sine(step: usize) -> u32 {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "the value is below 2^32"
    )]
    let value = (((step + 1) as f64).sin().abs() * 4_294_967_296.0) as u32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn md5_is_that_of_rfc_1321() {
        assert_eq!(hex(&md5(b"")), "d41d8cd98f00b204e9800998ecf8427e");
        assert_eq!(hex(&md5(b"message digest")), "f96b697d7cb7938d525a2f31aaf161d0");
        let long = b"12345678901234567890123456789012345678901234567890123456789012345678901234567890";
        assert_eq!(hex(&md5(long)), "57edf4a22be3c955ac49da2e2107b67a");
    }

    #[test]
    fn passwords_are_checked_as_openssl_hashed_them() {
        // openssl passwd -apr1 -salt abcdefgh secret; openssl passwd -1 -salt abcdefgh secret
        let (apr1, md5) = (APR1, MD5);
        assert!(verify(b"secret", apr1) && verify(b"secret", md5));
        assert!(!verify(b"Secret", apr1) && !verify(b"", md5));
        assert!(verify(b"password", "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="));
        assert!(!verify(b"passwort", "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="));
        assert!(!verify(b"x", "$2y$05$abcdefghijklmnopqrstuu"));
    }

    const APR1: &str = "$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/";
    const MD5: &str = "$1$abcdefgh$cHJi5PXp/ki/ktXzqlk6I1";
}
