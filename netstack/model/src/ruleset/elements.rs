//! The elements of one group: a few, in order, since a big cluster has tens of thousands of groups. They are kept in the few bytes that
//! they need, in the order of the bytes of their keys, which is that of the data.
//!
//! ```text
//!  element = key, data       keys of one group are of one length; nearly always so are the data
//! ```

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use smallvec::SmallVec;

use super::{Datum, Element, ElementData, Verdict};
use crate::exact;
use crate::objects::Protocol;

/// Data by key, in the order of the keys, which all have fields of the same types.
#[derive(Clone, Debug, Default)]
pub struct Elements {
    /// One element after the other.
    bytes: Vec<u8>,
    count: u32,
    key_bytes: u16,
    /// Of each; 0 when they are not of one length.
    element_bytes: u16,
}

/// Whatever was there before.
impl PartialEq for Elements {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.bytes == other.bytes
    }
}

impl Eq for Elements {}

/// The key of an element that stands among others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key<'a>(&'a [u8]);

/// Something to look elements up by.
pub trait AsKey {
    fn bytes(&self) -> Cow<'_, [u8]>;
}

impl AsKey for [Datum] {
    fn bytes(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(24);
        self.iter().for_each(|datum| pack(datum, &mut bytes));
        bytes.into()
    }
}

impl AsKey for Vec<Datum> {
    fn bytes(&self) -> Cow<'_, [u8]> {
        self.as_slice().bytes()
    }
}

impl AsKey for Key<'_> {
    fn bytes(&self) -> Cow<'_, [u8]> {
        self.0.into()
    }
}

impl<'a> Key<'a> {
    pub fn data(self) -> impl Iterator<Item = Datum> + 'a {
        let mut rest = self.0;
        std::iter::from_fn(move || unpack(&mut rest))
    }

    pub fn to_vec(self) -> Vec<Datum> {
        self.data().collect()
    }
}

/// Room for a key that is put together again and again.
#[derive(Debug, Default)]
pub struct KeyBuffer(Vec<u8>);

impl KeyBuffer {
    pub fn set(&mut self, fields: impl Iterator<Item = Datum>) -> Key<'_> {
        self.0.clear();
        fields.for_each(|datum| pack(&datum, &mut self.0));
        Key(&self.0)
    }
}

impl fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.data()).finish()
    }
}

impl Elements {
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), count: 0, key_bytes: 0, element_bytes: 0 }
    }

    pub fn len(&self) -> usize {
        self.count as usize
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = Element<'_>> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let (key, after) = rest.split_at_checked(self.key_bytes.into()).filter(|_| !rest.is_empty())?;
            rest = after;
            Some((Key(key), unpack_data(&mut rest)?))
        })
    }

    pub fn keys(&self) -> impl Iterator<Item = Key<'_>> {
        self.iter().map(|(key, _)| key)
    }

    pub fn get(&self, key: &(impl AsKey + ?Sized)) -> Option<ElementData> {
        let at = self.place(&key.bytes()).ok()?;
        unpack_data(&mut &self.bytes[at + usize::from(self.key_bytes)..])
    }

    pub fn contains_key(&self, key: &(impl AsKey + ?Sized)) -> bool {
        self.place(&key.bytes()).is_ok()
    }

    /// Returns what the key had before.
    pub fn insert(&mut self, key: &(impl AsKey + ?Sized), data: &ElementData) -> Option<ElementData> {
        let key = key.bytes();
        let (at, before) = match self.place(&key) {
            Ok(at) => (at, self.take_at(at)),
            Err(at) => (at, None),
        };
        self.insert_at(at, &key, data);
        before
    }

    /// Returns what the key had.
    pub fn remove(&mut self, key: &(impl AsKey + ?Sized)) -> Option<ElementData> {
        let at = self.place(&key.bytes()).ok()?;
        self.take_at(at)
    }

    pub fn retain(&mut self, mut keep: impl FnMut(Key<'_>, &ElementData) -> bool) {
        let mut left = Self::new();
        for (key, data) in self.iter().filter(|(key, data)| keep(*key, data)) {
            left.insert_at(left.bytes.len(), key.0, &data);
        }
        *self = left;
    }

    fn insert_at(&mut self, at: usize, key: &[u8], data: &ElementData) {
        let key_bytes = u16::try_from(key.len()).unwrap_or(u16::MAX);
        assert!(self.is_empty() || key_bytes == self.key_bytes, "keys of one set are of one type");
        let mut element = SmallVec::<[u8; 64]>::from_slice(key);
        pack_data(data, &mut element);
        let element_bytes = u16::try_from(element.len()).unwrap_or(0);
        let differs = !self.is_empty() && element_bytes != self.element_bytes;
        self.element_bytes = if differs { 0 } else { element_bytes };
        self.key_bytes = key_bytes;
        self.count += 1;
        if at == self.bytes.len() {
            self.bytes.extend_from_slice(&element);
        } else {
            self.bytes.splice(at..at, element);
        }
    }

    fn take_at(&mut self, at: usize) -> Option<ElementData> {
        let mut rest = &self.bytes[at + usize::from(self.key_bytes)..];
        let data = unpack_data(&mut rest);
        let end = self.bytes.len() - rest.len();
        self.bytes.drain(at..end);
        self.count -= 1;
        data
    }

    /// Gives back the room for further elements.
    #[must_use]
    pub fn shrunk(self) -> Self {
        Self { bytes: exact(self.bytes), ..self }
    }

    /// Where in the bytes the element of this key is, or is to be.
    fn place(&self, key: &[u8]) -> Result<usize, usize> {
        let (key_bytes, step) = (usize::from(self.key_bytes), usize::from(self.element_bytes));
        let key_at = |at: usize| &self.bytes[at..at + key_bytes];
        let at = if step > 0 {
            partition_point(self.len(), |place| key_at(place * step) < key) * step
        } else {
            // One after the other: where their lengths differ there are few.
            let mut rest = &self.bytes[..];
            while !rest.is_empty() && &rest[..key_bytes] < key {
                rest = &rest[key_bytes..];
                unpack_data(&mut rest);
            }
            self.bytes.len() - rest.len()
        };
        if at < self.bytes.len() && key_at(at) == key { Ok(at) } else { Err(at) }
    }
}

/// Of the numbers below `count` the first for which `is_before` does not hold; it does for all before that one.
fn partition_point(count: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (0, count);
    while from < to {
        let middle = from.midpoint(to);
        if is_before(middle) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    from
}

/// A byte that says what it is, then what it holds.
fn pack_data(data: &ElementData, bytes: &mut SmallVec<[u8; 64]>) {
    let mut put = |kind: u8, held: &[u8]| {
        bytes.push(kind);
        bytes.extend_from_slice(held);
    };
    match data {
        ElementData::None => put(0, &[]),
        ElementData::AddressAndPort(IpAddr::V4(ip), port) => {
            put(1, &ip.octets());
            bytes.extend_from_slice(&port.to_be_bytes());
        }
        ElementData::AddressAndPort(IpAddr::V6(ip), port) => {
            put(2, &ip.octets());
            bytes.extend_from_slice(&port.to_be_bytes());
        }
        ElementData::Verdict(Verdict::Accept) => put(3, &[]),
        ElementData::Verdict(Verdict::Drop) => put(4, &[]),
        ElementData::Verdict(Verdict::Return) => put(5, &[]),
        ElementData::Verdict(Verdict::Jump(chain)) => put_text(6, chain, bytes),
        ElementData::Verdict(Verdict::Goto(chain)) => put_text(7, chain, bytes),
    }
}

/// Names of chains are short (NFT_CHAIN_MAXNAMELEN is 128, NFT_NAME_MAXLEN 256).
fn put_text(kind: u8, text: &str, bytes: &mut SmallVec<[u8; 64]>) {
    let text = &text[..text.floor_char_boundary(u16::MAX.into())];
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    bytes.push(kind);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// Takes data as [`pack_data`] wrote them; `None` at the end.
fn unpack_data(rest: &mut &[u8]) -> Option<ElementData> {
    fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (taken, after) = rest.split_at_checked(count)?;
        *rest = after;
        Some(taken)
    }
    fn port(rest: &mut &[u8]) -> Option<u16> {
        Some(u16::from_be_bytes(*take(rest, 2)?.first_chunk()?))
    }
    let text = |rest: &mut &[u8]| {
        let length = port(rest)?;
        Some(String::from_utf8_lossy(take(rest, length.into())?).into())
    };
    Some(match take(rest, 1)?[0] {
        0 => ElementData::None,
        1 => {
            let ip = *take(rest, 4)?.first_chunk::<4>()?;
            ElementData::AddressAndPort(ip.into(), port(rest)?)
        }
        2 => {
            let ip = *take(rest, 16)?.first_chunk::<16>()?;
            ElementData::AddressAndPort(ip.into(), port(rest)?)
        }
        3 => ElementData::Verdict(Verdict::Accept),
        4 => ElementData::Verdict(Verdict::Drop),
        5 => ElementData::Verdict(Verdict::Return),
        6 => ElementData::Verdict(Verdict::Jump(text(rest)?)),
        7 => ElementData::Verdict(Verdict::Goto(text(rest)?)),
        _ => return None,
    })
}

/// IFNAMSIZ; a link's name is shorter.
const NAME_BYTES: usize = 16;

/// A byte that says what it is, then what it holds, so that the order is that of [`Datum`] and the length that of its type.
fn pack(datum: &Datum, bytes: &mut Vec<u8>) {
    let mut put = |kind: u8, held: &[u8]| {
        bytes.push(kind);
        bytes.extend_from_slice(held);
    };
    match datum {
        Datum::Ip(IpAddr::V4(ip)) => put(0, &ip.octets()),
        Datum::Ip(IpAddr::V6(ip)) => put(1, &ip.octets()),
        Datum::Net(IpNet::V4(net)) => put(2, &[&net.addr().octets()[..], &[net.prefix_len()]].concat()),
        Datum::Net(IpNet::V6(net)) => put(3, &[&net.addr().octets()[..], &[net.prefix_len()]].concat()),
        Datum::Protocol(protocol) => put(4, &[protocol.number()]),
        Datum::ProtocolNumber(number) => put(5, &[*number]),
        Datum::Ipv6(ipv6) => put(6, &[u8::from(*ipv6)]),
        Datum::Port(port) => put(7, &port.to_be_bytes()),
        Datum::PortRange(first, last) => put(8, &[first.to_be_bytes(), last.to_be_bytes()].concat()),
        Datum::Name(name) => put(9, &name_bytes(name)),
        Datum::NamePrefix(prefix) => put(10, &name_bytes(prefix)),
        Datum::Icmp4Type(kind) => put(11, &[*kind]),
        Datum::Icmp6Type(kind) => put(12, &[*kind]),
        Datum::Index(index) => put(13, &index.to_be_bytes()),
    }
}

fn name_bytes(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    let length = name.floor_char_boundary(NAME_BYTES);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// Takes the next field; `None` at the end.
fn unpack(rest: &mut &[u8]) -> Option<Datum> {
    let (kind, held) = rest.split_first()?;
    let (datum, length) = match kind {
        0 => (Datum::Ip(held.first_chunk::<4>().copied()?.into()), 4),
        1 => (Datum::Ip(held.first_chunk::<16>().copied()?.into()), 16),
        2 => (
            Datum::Net(Ipv4Net::new(held.first_chunk::<4>().copied()?.into(), *held.get(4)?).ok()?.into()),
            5,
        ),
        3 => (
            Datum::Net(Ipv6Net::new(held.first_chunk::<16>().copied()?.into(), *held.get(16)?).ok()?.into()),
            17,
        ),
        4 => {
            let mut protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter();
            (Datum::Protocol(protocols.find(|protocol| Some(&protocol.number()) == held.first())?), 1)
        }
        5 => (Datum::ProtocolNumber(*held.first()?), 1),
        6 => (Datum::Ipv6(*held.first()? == 1), 1),
        7 => (Datum::Port(u16::from_be_bytes(*held.first_chunk()?)), 2),
        8 => {
            let port = |at: usize| Some(u16::from_be_bytes(*held.get(at..)?.first_chunk()?));
            (Datum::PortRange(port(0)?, port(2)?), 4)
        }
        9 | 10 => {
            let name = held.get(..NAME_BYTES)?.split(|byte| *byte == 0).next()?;
            let name = String::from_utf8_lossy(name).into();
            (if *kind == 9 { Datum::Name(name) } else { Datum::NamePrefix(name) }, NAME_BYTES)
        }
        11 => (Datum::Icmp4Type(*held.first()?), 1),
        12 => (Datum::Icmp6Type(*held.first()?), 1),
        13 => (Datum::Index(u32::from_be_bytes(*held.first_chunk()?)), 4),
        _ => return None,
    };
    *rest = &held[length..];
    Some(datum)
}

/// Of one key the last counts.
impl FromIterator<(Vec<Datum>, ElementData)> for Elements {
    fn from_iter<T: IntoIterator<Item = (Vec<Datum>, ElementData)>>(elements: T) -> Self {
        let packed = elements.into_iter().map(|(key, data)| (key.bytes().into_owned(), data));
        let mut all: Vec<(Vec<u8>, ElementData)> = packed.collect();
        all.reverse();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.dedup_by(|(later, _), (first, _)| later == first);
        let mut elements = Self::new();
        for (key, data) in all {
            elements.insert_at(elements.bytes.len(), &key, &data);
        }
        elements.shrunk()
    }
}

impl<const N: usize> From<[(Vec<Datum>, ElementData); N]> for Elements {
    fn from(elements: [(Vec<Datum>, ElementData); N]) -> Self {
        elements.into_iter().collect()
    }
}

impl IntoIterator for Elements {
    type Item = (Vec<Datum>, ElementData);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter().map(|(key, data)| (key.to_vec(), data)).collect::<Vec<_>>().into_iter()
    }
}

impl Extend<(Vec<Datum>, ElementData)> for Elements {
    fn extend<T: IntoIterator<Item = (Vec<Datum>, ElementData)>>(&mut self, elements: T) {
        elements.into_iter().for_each(|(key, data)| drop(self.insert(&key, &data)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_one_key_the_last_counts_and_the_order_is_that_of_the_keys() {
        let key = |number| vec![Datum::Index(number)];
        let data = |port| ElementData::AddressAndPort([192, 0, 2, 1].into(), port);
        let mut elements: Elements = [(key(2), data(1)), (key(1), data(2)), (key(2), data(3))].into();
        let listed = |elements: &Elements| -> Vec<(Vec<Datum>, ElementData)> {
            elements.iter().map(|(key, data)| (key.to_vec(), data.clone())).collect()
        };
        assert_eq!(listed(&elements), [(key(1), data(2)), (key(2), data(3))]);
        elements.insert(&key(0), &data(4));
        elements.insert(&key(1), &data(5));
        elements.remove(&key(2));
        elements.remove(&key(7));
        assert_eq!(listed(&elements), [(key(0), data(4)), (key(1), data(5))]);
        assert_eq!((elements.get(&key(1)), elements.get(&key(2))), (Some(data(5)), None));
        elements.retain(|_, it| *it == data(4));
        assert_eq!(listed(&elements), [(key(0), data(4))]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn they_are_a_sorted_map_whatever_the_lengths_of_the_data(
            steps in proptest::collection::vec((0..20u32, any_data()), 0..60),
        ) {
            let mut model = std::collections::BTreeMap::new();
            let mut elements = Elements::new();
            for (number, data) in steps {
                let key = vec![Datum::Index(number)];
                let (known, before) = match &data {
                    Some(data) => (elements.insert(&key, data), model.insert(key, data.clone())),
                    None => (elements.remove(&key), model.remove(&key)),
                };
                proptest::prop_assert_eq!(known, before);
            }
            let listed: Vec<_> = elements.iter().map(|(key, data)| (key.to_vec(), data)).collect();
            proptest::prop_assert_eq!(listed, model.clone().into_iter().collect::<Vec<_>>());
            proptest::prop_assert_eq!(elements.len(), model.len());
            for number in 0..20 {
                let key = vec![Datum::Index(number)];
                proptest::prop_assert_eq!(elements.get(&key), model.get(&key).cloned());
                proptest::prop_assert_eq!(elements.contains_key(&key), model.contains_key(&key));
            }
            proptest::prop_assert_eq!(elements, model.into_iter().collect::<Elements>());
        }

        #[test]
        fn keys_are_read_back_and_are_in_the_order_of_their_data(
            a in any_key(), b in any_key(),
        ) {
            let bytes = [&a, &b].map(|key| key.bytes().into_owned());
            proptest::prop_assert_eq!(Key(&bytes[0]).to_vec(), &a[..]);
            proptest::prop_assert_eq!(bytes[0].cmp(&bytes[1]), a.cmp(&b));
        }
    }

    /// `None` where an element goes.
    fn any_data() -> impl proptest::strategy::Strategy<Value = Option<ElementData>> {
        use proptest::prelude::*;
        let verdict = prop_oneof![
            Just(Verdict::Accept),
            Just(Verdict::Drop),
            Just(Verdict::Return),
            "[a-z0-9-]{1,30}".prop_map(|chain| Verdict::Jump(chain.into())),
            "[a-z0-9-]{1,30}".prop_map(|chain| Verdict::Goto(chain.into())),
        ];
        prop_oneof![
            Just(None),
            Just(Some(ElementData::None)),
            verdict.prop_map(|verdict| Some(ElementData::Verdict(verdict))),
            (any::<IpAddr>(), any::<u16>())
                .prop_map(|(ip, port)| Some(ElementData::AddressAndPort(ip, port))),
        ]
    }

    /// Of one set: the first field is an address, a range, a name or a port, of any family.
    fn any_key() -> impl proptest::strategy::Strategy<Value = Vec<Datum>> {
        use proptest::prelude::*;
        let net =
            (any::<IpAddr>(), 0..=32u8).prop_map(|(ip, length)| Datum::Net(IpNet::new(ip, length).unwrap()));
        let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)];
        let field = prop_oneof![
            any::<IpAddr>().prop_map(Datum::Ip),
            net,
            protocol.prop_map(Datum::Protocol),
            any::<u8>().prop_map(Datum::ProtocolNumber),
            any::<u16>().prop_map(Datum::Port),
            "[a-z0-9.]{1,15}".prop_map(|name| Datum::Name(name.into())),
            any::<u32>().prop_map(Datum::Index),
        ];
        proptest::collection::vec(field, 1..4)
    }
}
