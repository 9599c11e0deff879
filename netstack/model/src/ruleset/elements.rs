//! The elements of one group: a few, side by side and in order, since a big cluster has tens of thousands of groups. Keys are kept
//! in the few bytes that they need, in the order of the bytes, which is that of the data.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Datum, Element, ElementData};
use crate::exact;
use crate::objects::Protocol;

/// Data by key, in the order of the keys, which all have fields of the same types.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    /// One key after the other.
    keys: Vec<u8>,
    data: Vec<ElementData>,
}

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
        Self { keys: Vec::new(), data: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Element<'_>> {
        self.keys.chunks_exact(self.key_bytes().max(1)).map(Key).zip(&self.data)
    }

    pub fn keys(&self) -> impl Iterator<Item = Key<'_>> {
        self.iter().map(|(key, _)| key)
    }

    pub fn get(&self, key: &(impl AsKey + ?Sized)) -> Option<&ElementData> {
        Some(&self.data[self.place(&key.bytes()).ok()?])
    }

    pub fn contains_key(&self, key: &(impl AsKey + ?Sized)) -> bool {
        self.get(key).is_some()
    }

    /// Returns what the key had before.
    pub fn insert(&mut self, key: &(impl AsKey + ?Sized), data: ElementData) -> Option<ElementData> {
        let key = key.bytes();
        self.check(&key);
        match self.place(&key) {
            Ok(place) => Some(std::mem::replace(&mut self.data[place], data)),
            Err(place) => {
                let at = place * key.len();
                self.keys.splice(at..at, key.iter().copied());
                self.data.insert(place, data);
                None
            }
        }
    }

    /// Returns what the key had.
    pub fn remove(&mut self, key: &(impl AsKey + ?Sized)) -> Option<ElementData> {
        let key = key.bytes();
        let place = self.place(&key).ok()?;
        let at = place * key.len();
        self.keys.drain(at..at + key.len());
        Some(self.data.remove(place))
    }

    pub fn retain(&mut self, mut keep: impl FnMut(Key<'_>, &ElementData) -> bool) {
        let mut left = Self::new();
        for (key, data) in self.iter().filter(|(key, data)| keep(*key, data)) {
            left.push(key, data.clone());
        }
        *self = left;
    }

    /// Behind all others.
    fn push(&mut self, key: Key<'_>, data: ElementData) {
        self.check(key.0);
        self.keys.extend_from_slice(key.0);
        self.data.push(data);
    }

    fn check(&self, key: &[u8]) {
        assert!(self.is_empty() || key.len() == self.key_bytes(), "keys of one set are of one type");
    }

    /// Gives back the room for further elements.
    #[must_use]
    pub fn shrunk(self) -> Self {
        Self { keys: exact(self.keys), data: exact(self.data) }
    }

    fn key_bytes(&self) -> usize {
        self.keys.len().checked_div(self.data.len()).unwrap_or(0)
    }

    fn place(&self, key: &[u8]) -> Result<usize, usize> {
        let of = |place: usize| &self.keys[place * self.key_bytes()..(place + 1) * self.key_bytes()];
        let place = partition_point(self.len(), |place| of(place) < key);
        if place < self.len() && of(place) == key { Ok(place) } else { Err(place) }
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
            elements.push(Key(&key), data);
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
        let keys: Vec<_> = self.keys().map(Key::to_vec).collect();
        keys.into_iter().zip(self.data).collect::<Vec<_>>().into_iter()
    }
}

impl Extend<(Vec<Datum>, ElementData)> for Elements {
    fn extend<T: IntoIterator<Item = (Vec<Datum>, ElementData)>>(&mut self, elements: T) {
        elements.into_iter().for_each(|(key, data)| drop(self.insert(&key, data)));
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
        elements.insert(&key(0), data(4));
        elements.insert(&key(1), data(5));
        elements.remove(&key(2));
        elements.remove(&key(7));
        assert_eq!(listed(&elements), [(key(0), data(4)), (key(1), data(5))]);
        assert_eq!((elements.get(&key(1)), elements.get(&key(2))), (Some(&data(5)), None));
        elements.retain(|_, it| *it == data(4));
        assert_eq!(listed(&elements), [(key(0), data(4))]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn keys_are_read_back_and_are_in_the_order_of_their_data(
            a in any_key(), b in any_key(),
        ) {
            let bytes = [&a, &b].map(|key| key.bytes().into_owned());
            proptest::prop_assert_eq!(Key(&bytes[0]).to_vec(), &a[..]);
            proptest::prop_assert_eq!(bytes[0].cmp(&bytes[1]), a.cmp(&b));
        }
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
