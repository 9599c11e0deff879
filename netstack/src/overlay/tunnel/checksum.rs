//! The Internet checksum (RFC 1071).

/// Sum of 16-bit words in the byte order of the host, not yet folded. Sums of pieces that start at even offsets add up.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

/// The sum folded to 16 bits, as two bytes in network order, not complemented.
pub(super) fn fold(mut sum: u64) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // At most 16 bits are left.
    u16::try_from(sum).unwrap_or(0).to_ne_bytes()
}

/// The checksum to store for this sum.
pub(super) fn finish(sum: u64) -> [u8; 2] {
    let [high, low] = fold(sum);
    [!high, !low]
}

/// Sum of the pseudo header of TCP or UDP: `addresses` are source and destination as they stand in the IP header,
/// `len` is the length of the transport header and payload.
pub(super) fn pseudo_header(addresses: &[u8], protocol: u8, len: usize) -> u64 {
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    sum(addresses) + sum(&len) + sum(&[0, 0, 0, protocol])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), [0xdd, 0xf2]);
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2])), fold(sum(&[0x00, 0x01, 0xf2, 0x00])));
    }
}
