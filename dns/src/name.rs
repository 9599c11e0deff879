//! Domain names as the name store keeps them: lower-case wire format, shared, in canonical order.
//!
//! A name here can be compared, hashed and cut into its parents without looking at a single label twice, and equals
//! what stands in a query after lower-casing it. The case of a question is kept elsewhere (`serve`).

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::rr::Name as WireName;

/// Longest name in octets, with the length octets and the root (RFC 1035 section 2.3.4).
const MAX_NAME_OCTETS: usize = 255;
/// Longest label in octets (RFC 1035 section 2.3.4).
const MAX_LABEL_OCTETS: usize = 63;

/// Ends of reverse names (RFC 1035 section 3.5, RFC 3596 section 2.5).
const IN_ADDR_ARPA: &[u8] = b"\x07in-addr\x04arpa\0";
const IP6_ARPA: &[u8] = b"\x03ip6\x04arpa\0";
const HEX_DIGITS: &[u8; 16] = b"0123456789abcdef";

/// A fully qualified name in lower-case wire format: length octet and label, repeated, then the root's zero.
/// Ordered canonically (RFC 4034 section 6.1): by the last label first.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(Arc<[u8]>);

/// Why a text is no domain name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidName {
    /// Empty or too long.
    #[error("{0:?} is not a DNS label of 1 to 63 octets")]
    Label(String),
    /// All labels together.
    #[error("the name is longer than 255 octets")]
    TooLong,
    /// Where a name is needed.
    #[error("{0:?} is an address, not a name")]
    Address(String),
}

impl Name {
    /// From labels, first label first; ASCII letters are lower-cased.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, InvalidName> {
        let mut wire = Vec::with_capacity(64);
        for label in labels {
            put_label(&mut wire, label)?;
        }
        wire.push(0);
        if wire.len() > MAX_NAME_OCTETS { Err(InvalidName::TooLong) } else { Ok(Self(wire.into())) }
    }

    /// From text without escapes, as Kubernetes writes names; the final dot may be left out.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Self::from_labels([]);
        }
        Self::from_labels(text.split('.').map(str::as_bytes))
    }

    /// The root itself.
    pub fn root() -> Self {
        Self(Arc::from([0]))
    }

    /// From lower-case wire format; `None` when the octets are none.
    pub(crate) fn from_wire(wire: &[u8]) -> Option<Self> {
        let mut at = 0;
        while let length @ 1.. = usize::from(*wire.get(at)?) {
            if length > MAX_LABEL_OCTETS {
                return None;
            }
            at += 1 + length;
        }
        let is_whole = at + 1 == wire.len() && wire.len() <= MAX_NAME_OCTETS;
        (is_whole && !wire.iter().any(u8::is_ascii_uppercase)).then(|| Self(wire.into()))
    }

    /// The name without its first label; `None` for the root.
    pub(crate) fn parent(&self) -> Option<Self> {
        parent(&self.0).map(|wire| Self(wire.into()))
    }

    /// `label` in front of this name; the label may hold anything but has at most 63 octets.
    pub fn child(&self, label: &str) -> Result<Self, InvalidName> {
        let mut wire = Vec::with_capacity(1 + label.len() + self.0.len());
        put_label(&mut wire, label.as_bytes())?;
        wire.extend_from_slice(&self.0);
        if wire.len() > MAX_NAME_OCTETS { Err(InvalidName::TooLong) } else { Ok(Self(wire.into())) }
    }

    /// Name of an address under `in-addr.arpa` (RFC 1035 section 3.5) or `ip6.arpa` (RFC 3596 section 2.5).
    pub fn reverse(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::reverse_v4(v4),
            IpAddr::V6(v6) => Self::reverse_v6(v6),
        }
    }

    fn reverse_v4(address: Ipv4Addr) -> Self {
        let mut wire = Vec::with_capacity(30);
        for octet in address.octets().iter().rev() {
            let digits = [octet / 100, octet / 10 % 10, octet % 10].map(|digit| b'0' + digit);
            let length = 1 + u8::from(*octet > 9) + u8::from(*octet > 99);
            wire.push(length);
            wire.extend_from_slice(&digits[3 - usize::from(length)..]);
        }
        wire.extend_from_slice(IN_ADDR_ARPA);
        Self(wire.into())
    }

    fn reverse_v6(address: Ipv6Addr) -> Self {
        let mut wire = Vec::with_capacity(74);
        for octet in address.octets().iter().rev() {
            for digit in [octet & 0xf, octet >> 4] {
                wire.extend_from_slice(&[1, HEX_DIGITS[usize::from(digit)]]);
            }
        }
        wire.extend_from_slice(IP6_ARPA);
        Self(wire.into())
    }

    /// The address whose [`Name::reverse`] this is.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        let text = |label| std::str::from_utf8(label).ok();
        let address = if self.0.ends_with(IN_ADDR_ARPA) {
            let mut octets = self.labels().map_while(|label| text(label)?.parse::<u8>().ok());
            let (d, c, b, a) = (octets.next()?, octets.next()?, octets.next()?, octets.next()?);
            IpAddr::from([a, b, c, d])
        } else if self.0.ends_with(IP6_ARPA) {
            let mut digits = self.labels().map_while(|label| u128::from_str_radix(text(label)?, 16).ok());
            let number = (0..32).try_fold(0, |number, at| Some(number | (digits.next()? << (4 * at))))?;
            IpAddr::from(Ipv6Addr::from(number))
        } else {
            return None;
        };
        (Self::reverse(address) == *self).then_some(address)
    }

    /// Labels, first label first, without the root.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        suffixes(&self.0).map_while(first_label)
    }

    /// This name is `ancestor` or below it.
    pub fn is_in(&self, ancestor: &Self) -> bool {
        suffixes(&self.0).any(|suffix| suffix == ancestor.0.as_ref())
    }

    /// The name in wire format, the key of the store's table.
    pub fn wire(&self) -> &Arc<[u8]> {
        &self.0
    }

    /// The same name as hickory's, for encoding.
    pub fn to_hickory(&self) -> WireName {
        WireName::from_labels(self.labels()).expect("a Name keeps the limits of RFC 1035")
    }

    /// Lower-cased; `None` only for what is no name in the DNS (hickory's decoder gives none of those).
    pub fn from_hickory(name: &WireName) -> Option<Self> {
        Self::from_labels(name.iter()).ok()
    }
}

/// Appends a label with its length, ASCII letters lower-cased.
fn put_label(wire: &mut Vec<u8>, label: &[u8]) -> Result<(), InvalidName> {
    let length = u8::try_from(label.len()).unwrap_or(u8::MAX);
    if label.is_empty() || usize::from(length) > MAX_LABEL_OCTETS {
        return Err(InvalidName::Label(String::from_utf8_lossy(label).into_owned()));
    }
    wire.push(length);
    wire.extend(label.iter().map(u8::to_ascii_lowercase));
    Ok(())
}

/// The wire name itself, then its parent, and so on to the root.
pub(crate) fn suffixes(wire: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(Some(wire), |name| parent(name))
}

/// The wire name without its first label; `None` for the root.
pub(crate) fn parent(wire: &[u8]) -> Option<&[u8]> {
    let label = first_label(wire)?;
    wire.get(1 + label.len()..)
}

/// First label of a wire name; `None` for the root.
pub(crate) fn first_label(wire: &[u8]) -> Option<&[u8]> {
    let (&length, rest) = wire.split_first()?;
    if length == 0 { None } else { rest.get(..usize::from(length)) }
}

/// Octets at the end that are the same in both.
pub(crate) fn shared_end(one: &[u8], other: &[u8]) -> usize {
    const AT_ONCE: usize = 8;
    let chunks = one.rchunks_exact(AT_ONCE).zip(other.rchunks_exact(AT_ONCE));
    let whole = AT_ONCE * chunks.take_while(|(a, b)| a == b).count();
    let (one, other) = (&one[..one.len() - whole], &other[..other.len() - whole]);
    whole + one.iter().rev().zip(other.iter().rev()).take_while(|(a, b)| a == b).count()
}

impl Ord for Name {
    /// Finds the longest end that both have in common, label by label from the front, and compares the labels before it.
    fn cmp(&self, other: &Self) -> Ordering {
        let (ours, theirs) = (&*self.0, &*other.0);
        let shared = shared_end(ours, theirs);
        let (mut at, mut other_at) = (0, 0);
        let (mut label, mut other_label) = (None, None);
        loop {
            let (left, other_left) = (ours.len() - at, theirs.len() - other_at);
            if left == other_left && left <= shared {
                return label.cmp(&other_label);
            }
            if left >= other_left {
                label = first_label(&ours[at..]);
                at += 1 + label.map_or(0, <[u8]>::len);
            } else {
                other_label = first_label(&theirs[other_at..]);
                other_at += 1 + other_label.map_or(0, <[u8]>::len);
            }
        }
    }
}

/// Where the labels of a wire name begin: 255 octets hold at most 127 labels. On the stack, because names are
/// compared far more often than anything else here.
pub(crate) struct LabelStarts {
    starts: [u8; 127],
    count: usize,
}

impl LabelStarts {
    pub(crate) fn of(wire: &[u8]) -> Self {
        let mut found = Self { starts: [0; 127], count: 0 };
        let mut at: u8 = 0;
        while let Some(&length @ 1..) = wire.get(usize::from(at)) {
            found.starts[found.count] = at;
            found.count += 1;
            at += 1 + length;
        }
        found
    }

    /// The wire name that was looked at is `ancestor` or below it.
    pub(crate) fn end_with(&self, wire: &[u8], ancestor: &Name) -> bool {
        let at = wire.len().checked_sub(ancestor.0.len());
        let is_start = |at: &usize| self.starts[..self.count].iter().any(|start| usize::from(*start) == *at);
        at.filter(is_start).is_some_and(|at| wire[at..] == *ancestor.0)
    }

    /// Labels, last label first.
    pub(crate) fn backwards<'a>(&'a self, wire: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let starts = self.starts[..self.count].iter().rev();
        starts.filter_map(|&at| first_label(&wire[usize::from(at)..]))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.len() == 1 {
            return f.write_str(".");
        }
        for label in self.labels() {
            for &octet in label {
                match octet {
                    b'.' | b'\\' | b'"' | b';' => write!(f, "\\{}", char::from(octet))?,
                    0x21..=0x7e => write!(f, "{}", char::from(octet))?,
                    _ => write!(f, "\\{octet:03}")?,
                }
            }
            f.write_str(".")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn names_are_lower_case_and_end_at_the_root() {
        assert_eq!(name("Web.Default.SVC.cluster.local"), name("web.default.svc.cluster.local."));
        assert_eq!(name("a.b").to_string(), "a.b.");
        assert_eq!(name("").to_string(), ".");
        assert_eq!(name("a.b").wire().as_ref(), b"\x01a\x01b\x00");
    }

    #[test]
    fn names_beyond_the_limits_are_refused() {
        assert_eq!(Name::parse("a..b"), Err(InvalidName::Label(String::new())));
        assert!(Name::parse(&"a".repeat(64)).is_err());
        assert_eq!(Name::parse(&"abcdefg.".repeat(32)), Err(InvalidName::TooLong));
        assert!(Name::parse(&"abcdefg.".repeat(31)).is_ok());
    }

    #[test]
    fn order_is_by_the_last_label_first() {
        let mut names = vec![name("z.a"), name("b"), name("a.b"), name("a"), name("a.a")];
        names.sort();
        assert_eq!(names, [name("a"), name("a.a"), name("z.a"), name("b"), name("a.b")]);
    }

    #[test]
    fn order_and_equality_are_those_of_the_labels_whatever_octets_they_hold() {
        let labels: [&[u8]; 6] = [b"a", b"b", b"ab", b"\x01a", b"a\x01b", b"\0"];
        let mut names = vec![Name::root()];
        for depth in 0..3 {
            let longer = names.iter().filter(|name| name.labels().count() == depth);
            let longer = longer.flat_map(|name| {
                let with = |label| Name::from_labels(std::iter::once(label).chain(name.labels())).unwrap();
                labels.map(with)
            });
            names.extend(longer.collect::<Vec<_>>());
        }
        let from_the_root = |name: &Name| {
            let labels: Vec<Vec<u8>> = name.labels().map(<[u8]>::to_vec).collect();
            labels.into_iter().rev().collect::<Vec<_>>()
        };
        for (one, other) in names.iter().flat_map(|one| names.iter().map(move |other| (one, other))) {
            assert_eq!(one.cmp(other), from_the_root(one).cmp(&from_the_root(other)), "{one} {other}");
        }
    }

    #[test]
    fn what_is_no_lower_case_wire_name_is_none() {
        assert_eq!(Name::from_wire(name("a.b").wire()), Some(name("a.b")));
        let long = [&[63; 64][..], &[63; 64], &[63; 64], &[63; 64], &[0]].concat();
        for wire in [&b""[..], b"\x01", b"\x01a", b"\x01a\0\0", b"\x01A\0", b"\x40a\0", &long] {
            assert_eq!(Name::from_wire(wire), None, "{wire:?}");
        }
        assert!(name("a").child("B").is_ok_and(|child| child == name("b.a")));
        assert_eq!(name(&"abcdefg.".repeat(31)).child("abcdefg"), Err(InvalidName::TooLong));
        assert_eq!(name("a").child(""), Err(InvalidName::Label(String::new())));
    }

    #[test]
    fn addresses_have_reverse_names_in_both_families() {
        assert_eq!(Name::reverse("10.43.0.10".parse().unwrap()).to_string(), "10.0.43.10.in-addr.arpa.");
        assert_eq!(Name::reverse("9.99.100.255".parse().unwrap()).to_string(), "255.100.99.9.in-addr.arpa.");
        assert_eq!(
            Name::reverse("fd00:43::a".parse().unwrap()).to_string(),
            "a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.4.0.0.0.0.d.f.ip6.arpa."
        );
    }

    #[test]
    fn a_reverse_name_has_an_address_and_no_other_name_has() {
        for address in ["10.43.0.10", "0.0.0.0", "fd00:43::a", "::"].map(|text| text.parse().unwrap()) {
            assert_eq!(Name::reverse(address).address(), Some(address));
        }
        for text in
            ["1.2.3.in-addr.arpa", "01.2.3.4.in-addr.arpa", "256.2.3.4.in-addr.arpa", "f.ip6.arpa", "a.b"]
        {
            assert_eq!(name(text).address(), None, "{text}");
        }
        assert_eq!(name(&("+.".repeat(32) + "ip6.arpa")).address(), None);
    }

    #[test]
    fn hickory_names_go_there_and_back() {
        let there = name("a-b.c.cluster.local").to_hickory();
        assert_eq!(there.to_string(), "a-b.c.cluster.local.");
        assert_eq!(Name::from_hickory(&there), Some(name("a-b.c.cluster.local")));
        assert_eq!(Name::from_hickory(&WireName::root()), Some(name(".")));
    }
}
