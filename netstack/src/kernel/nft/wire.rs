//! The netlink byte format: messages of attributes (type, length, value, padded to four bytes), written into and read
//! from one byte vector. Integers of netfilter are big-endian on the wire, netlink's own header is native.

use std::ops::Range;

/// struct nlmsghdr (netlink(7)): length u32, type u16, flags u16, sequence u32, port u32.
pub(crate) const HEADER_BYTES: usize = 16;
/// struct nfgenmsg: family u8, version u8, resource u16 big-endian.
const NETFILTER_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The value is made of attributes (NLA_F_NESTED).
const NESTED: u16 = 0x8000;
/// NLA_F_NESTED and NLA_F_NET_BYTEORDER are no part of the type.
const TYPE_MASK: u16 = 0x3fff;

/// Writes messages one after the other; an open message or nest is closed with what its opening returned.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    buffer: Vec<u8>,
}

/// Offset of an open message or nest.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Open(usize);

impl Writer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Opens a message with its netfilter header.
    pub(crate) fn open_message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        family: u8,
        resource: u16,
    ) -> Open {
        let open = Open(self.buffer.len());
        self.buffer.extend_from_slice(&[0; 4]);
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&flags.to_ne_bytes());
        self.buffer.extend_from_slice(&sequence.to_ne_bytes());
        self.buffer.extend_from_slice(&[0; 4]);
        self.buffer.extend_from_slice(&[family, 0]);
        self.buffer.extend_from_slice(&resource.to_be_bytes());
        open
    }

    pub(crate) fn close_message(&mut self, open: Open) {
        let length = u32::try_from(self.buffer.len() - open.0).unwrap_or(u32::MAX);
        self.buffer[open.0..open.0 + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Adds `flags` to the header of a message already written.
    pub(crate) fn add_flags(&mut self, message: Open, flags: u16) {
        let at = message.0 + 6;
        let old = u16::from_ne_bytes([self.buffer[at], self.buffer[at + 1]]);
        self.buffer[at..at + 2].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    pub(crate) fn open_nest(&mut self, kind: u16) -> Open {
        let open = Open(self.buffer.len());
        self.buffer.extend_from_slice(&[0; 2]);
        self.buffer.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        open
    }

    /// A nest holds at most 65,535 bytes: who writes lists splits them before that.
    pub(crate) fn close_nest(&mut self, open: Open) {
        let length = u16::try_from(self.buffer.len() - open.0).unwrap_or(u16::MAX);
        self.buffer[open.0..open.0 + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let open = self.open_nest(kind);
        write(self);
        self.close_nest(open);
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.attribute_parts(kind, &[value]);
    }

    /// One attribute whose value is the parts one after the other.
    pub(crate) fn attribute_parts(&mut self, kind: u16, parts: &[&[u8]]) {
        let value_bytes: usize = parts.iter().map(|part| part.len()).sum();
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value_bytes).unwrap_or(u16::MAX);
        self.buffer.extend_from_slice(&length.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        for part in parts {
            self.buffer.extend_from_slice(part);
        }
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        self.attribute(kind, &[value]);
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// With the final NUL.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        self.attribute_parts(kind, &[value.as_bytes(), &[0]]);
    }
}

/// One message as received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// After the netlink header.
    pub(crate) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Attributes after the netfilter header.
    pub(crate) fn attributes(&self) -> Attributes<'a> {
        Attributes { rest: self.payload.get(NETFILTER_HEADER_BYTES..).unwrap_or(&[]) }
    }

    pub(crate) fn family(&self) -> u8 {
        self.payload.first().copied().unwrap_or(0)
    }
}

/// Messages of a datagram; ends at the first one that does not fit.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<HEADER_BYTES>()?;
        let length = usize::try_from(ne32(&header[0..4])?).ok()?;
        let payload = rest.get(HEADER_BYTES..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: ne32(&header[8..12])?,
            payload,
        })
    })
}

pub(crate) fn ne32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

/// Attributes of a message or nest; ends at the first one that does not fit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes<'a> {
    rest: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    pub(crate) value: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The first attribute of this type.
    pub(crate) fn find(mut self, kind: u16) -> Option<Attribute<'a>> {
        Iterator::find(&mut self, |attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let header = self.rest.first_chunk::<ATTRIBUTE_HEADER_BYTES>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = self.rest.get(ATTRIBUTE_HEADER_BYTES..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Attribute { kind, value })
    }
}

impl<'a> Attribute<'a> {
    pub(crate) fn nested(&self) -> Attributes<'a> {
        Attributes::of(self.value)
    }

    pub(crate) fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    pub(crate) fn be16(&self) -> Option<u16> {
        Some(u16::from_be_bytes(*self.value.first_chunk()?))
    }

    pub(crate) fn be32(&self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.value.first_chunk()?))
    }

    pub(crate) fn be64(&self) -> Option<u64> {
        Some(u64::from_be_bytes(*self.value.first_chunk()?))
    }

    /// Up to the first NUL.
    pub(crate) fn string(&self) -> String {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        String::from_utf8_lossy(&self.value[..end]).into_owned()
    }
}

/// Where the attribute that begins `offset` bytes into `message` ends, for error offsets of the kernel.
pub(crate) fn attribute_at(message: &[u8], offset: usize) -> Option<Range<usize>> {
    let header = message.get(offset..)?.first_chunk::<ATTRIBUTE_HEADER_BYTES>()?;
    let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
    (length >= ATTRIBUTE_HEADER_BYTES && offset + length <= message.len())
        .then(|| offset + ATTRIBUTE_HEADER_BYTES..offset + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = Writer::default();
        let message = writer.open_message(0x0a01, 5, 7, 1, 0);
        writer.string(1, "abc");
        writer.nest(2, |w| w.be32(3, 0xdead_beef));
        writer.close_message(message);
        let read: Vec<_> = messages(writer.bytes()).collect();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].kind, read[0].flags, read[0].sequence, read[0].family()), (0x0a01, 5, 7, 1));
        let attributes = read[0].attributes();
        assert_eq!(attributes.find(1).unwrap().string(), "abc");
        assert_eq!(attributes.find(2).unwrap().nested().find(3).unwrap().be32(), Some(0xdead_beef));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(0..40u8, 0..200), offset in 0..300usize) {
            for message in messages(&bytes) {
                for attribute in message.attributes() {
                    let _ = (attribute.be32(), attribute.be64(), attribute.string(), attribute.nested().count());
                }
            }
            let _ = attribute_at(&bytes, offset).map(|range| &bytes[range]);
        }
    }

    #[test]
    fn truncated_bytes_end_the_walk() {
        let mut writer = Writer::default();
        let message = writer.open_message(1, 0, 1, 0, 0);
        writer.string(1, "abcdefgh");
        writer.close_message(message);
        for end in 0..writer.len() {
            assert_eq!(messages(&writer.bytes()[..end]).count(), 0, "cut at {end}");
        }
        assert_eq!(Attributes::of(&[3, 0, 1, 0]).count(), 0, "a length below the header's");
    }
}
