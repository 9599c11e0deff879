//! Datagrams of the WireGuard protocol: sizes, offsets and a parser that only looks.
//!
//! Source: WireGuard whitepaper, sections 5.4.2 to 5.4.7. All integers are little endian.

pub(super) use crate::kernel::aead::TAG_LEN;

pub(super) const INITIATION_LEN: usize = 148;
pub(super) const RESPONSE_LEN: usize = 92;
pub(super) const COOKIE_REPLY_LEN: usize = 64;
/// Type, receiver index and counter before the sealed packet.
pub(super) const DATA_HEADER_LEN: usize = 16;
/// mac1 and mac2 at the end of both handshake messages.
pub(super) const MACS_LEN: usize = 32;

pub(super) const TYPE_INITIATION: u32 = 1;
pub(super) const TYPE_RESPONSE: u32 = 2;
pub(super) const TYPE_COOKIE_REPLY: u32 = 3;
pub(super) const TYPE_DATA: u32 = 4;

/// A datagram whose type and length fit; nothing in it is authenticated yet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    Initiation(&'a [u8; INITIATION_LEN]),
    Response(&'a [u8; RESPONSE_LEN]),
    CookieReply(&'a [u8; COOKIE_REPLY_LEN]),
    /// The sealed packet is what follows [`DATA_HEADER_LEN`] bytes.
    Data {
        receiver: u32,
        counter: u64,
    },
}

/// `None` for everything that is not WireGuard.
pub(super) fn parse(datagram: &[u8]) -> Option<Message<'_>> {
    match (u32_at(datagram, 0)?, datagram.len()) {
        (TYPE_INITIATION, INITIATION_LEN) => datagram.try_into().ok().map(Message::Initiation),
        (TYPE_RESPONSE, RESPONSE_LEN) => datagram.try_into().ok().map(Message::Response),
        (TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN) => datagram.try_into().ok().map(Message::CookieReply),
        (TYPE_DATA, len) if len >= DATA_HEADER_LEN + TAG_LEN => {
            let counter = datagram.get(8..16)?.try_into().ok().map(u64::from_le_bytes)?;
            Some(Message::Data { receiver: u32_at(datagram, 4)?, counter })
        }
        _ => None,
    }
}

/// The little-endian integer at `offset`, if the slice reaches that far.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// Writes the header of a data message into the first [`DATA_HEADER_LEN`] bytes of `out`.
pub(super) fn write_data_header(out: &mut [u8], receiver: u32, counter: u64) {
    out[0..4].copy_from_slice(&TYPE_DATA.to_le_bytes());
    out[4..8].copy_from_slice(&receiver.to_le_bytes());
    out[8..16].copy_from_slice(&counter.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_data_header_reads_back() {
        let mut datagram = [0; 32];
        write_data_header(&mut datagram, 7, 1 << 40);
        assert_eq!(parse(&datagram), Some(Message::Data { receiver: 7, counter: 1 << 40 }));
        assert_eq!(parse(&datagram[..31]), None);
    }

    proptest! {
        #[test]
        fn no_datagram_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
