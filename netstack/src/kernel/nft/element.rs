//! Set elements as the kernel keeps them: keys and data in bytes, verdicts apart. A key of several fields is padded to
//! four bytes a field, as registers are; a key of one field is not. Ports and addresses are big-endian, `numgen`
//! numbers native.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weft_model::objects::Protocol;
use weft_model::ruleset::{
    Datum, Element, ElementData, Elements, Groups, Key, KeyBuffer, KeyType, Set, SetData, Verdict,
};

use super::uapi::{
    NF_ACCEPT, NF_DROP, NFPROTO_IPV4, NFPROTO_IPV6, NFT_DATA_VERDICT, NFT_GOTO, NFT_JUMP, NFT_RETURN,
    NFT_SET_ELEM_INTERVAL_END, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_LIST_ELEM, NFTA_SET_ELEM_DATA,
    NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_KEY, NFTA_VERDICT_CHAIN, NFTA_VERDICT_CODE,
};
use super::wire::{Attribute, Attributes, Writer};

/// A key or value: at most what sixteen registers hold (NFT_DATA_VALUE_MAXLEN).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    bytes: [u8; Self::MAX],
    length: usize,
}

impl Packed {
    const MAX: usize = 64;
    /// IFNAMSIZ.
    const LINK_NAME_BYTES: usize = 16;

    const EMPTY: Self = Self { bytes: [0; Self::MAX], length: 0 };

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// What does not fit is cut; the kernel refuses the key then.
    fn push(&mut self, bytes: &[u8]) {
        let end = (self.length + bytes.len()).min(Self::MAX);
        self.bytes[self.length..end].copy_from_slice(&bytes[..end - self.length]);
        self.length = end;
    }

    fn pad(&mut self, multiple: usize) {
        self.length = self.length.next_multiple_of(multiple).min(Self::MAX);
    }

    fn push_datum(&mut self, datum: &Datum) {
        match datum {
            Datum::Ip(address) => self.push_address(*address),
            Datum::Net(net) => self.push_address(net.network()),
            Datum::Protocol(protocol) => self.push(&[protocol.number()]),
            Datum::ProtocolNumber(number) | Datum::Icmp4Type(number) | Datum::Icmp6Type(number) => {
                self.push(&[*number])
            }
            Datum::Ipv6(ipv6) => self.push(&[if *ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }]),
            Datum::Port(port) | Datum::PortRange(port, _) => self.push(&port.to_be_bytes()),
            Datum::Name(name) => {
                let name = name.as_bytes();
                self.push(&name[..name.len().min(Self::LINK_NAME_BYTES - 1)]);
                let short = Self::LINK_NAME_BYTES.saturating_sub(name.len()).max(1);
                self.push(&[0; Self::LINK_NAME_BYTES][..short]);
            }
            Datum::NamePrefix(prefix) => self.push(prefix.as_bytes()),
            Datum::Index(index) => self.push(&index.to_ne_bytes()),
        }
    }

    fn push_address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    /// One value, unpadded.
    pub(crate) fn datum(datum: &Datum) -> Self {
        let mut packed = Self::EMPTY;
        packed.push_datum(datum);
        packed
    }

    pub(crate) fn address(address: IpAddr) -> Self {
        Self::datum(&Datum::Ip(address))
    }

    /// An element's key.
    pub(crate) fn key(key: Key<'_>) -> Self {
        let mut packed = Self::EMPTY;
        let mut fields = key.data().enumerate().peekable();
        while let Some((number, datum)) = fields.next() {
            packed.push_datum(&datum);
            if number > 0 || fields.peek().is_some() {
                packed.pad(4);
            }
        }
        packed
    }

    fn address_and_port(address: IpAddr, port: u16) -> Self {
        let mut packed = Self::address(address);
        packed.push(&port.to_be_bytes());
        packed.pad(4);
        packed
    }
}

/// Bytes of one field of this type in a key.
pub(crate) fn key_type_bytes(kind: KeyType) -> usize {
    match kind {
        KeyType::Ipv4Address | KeyType::Index => 4,
        KeyType::Ipv6Address | KeyType::LinkName => 16,
        KeyType::L4Protocol => 1,
        KeyType::Port => 2,
    }
}

pub(crate) fn key_bytes(key: &[KeyType]) -> usize {
    match key {
        [one] => key_type_bytes(*one),
        many => many.iter().map(|kind| key_type_bytes(*kind).next_multiple_of(4)).sum(),
    }
}

/// nft's numbers of data types (enum datatypes in nftables' datatype.h): the kernel only stores them, `nft list`
/// prints by them.
const TYPES: [(KeyType, u32); 6] = [
    (KeyType::Ipv4Address, 7),
    (KeyType::Ipv6Address, 8),
    (KeyType::L4Protocol, 12),
    (KeyType::Port, 13),
    (KeyType::Index, 19),
    (KeyType::LinkName, 41),
];
/// Six bits a field, the first field highest.
const TYPE_BITS: u32 = 6;

pub(crate) fn type_number(key: &[KeyType]) -> u32 {
    key.iter().fold(0, |number, kind| {
        let field = TYPES.iter().find(|(known, _)| known == kind).map_or(0, |(_, field)| *field);
        (number << TYPE_BITS) | field
    })
}

/// `None` for a type that no plan has.
pub(crate) fn key_types(mut number: u32) -> Option<Vec<KeyType>> {
    let mut key = Vec::new();
    while number != 0 {
        let field = number & ((1 << TYPE_BITS) - 1);
        key.insert(0, TYPES.iter().find(|(_, known)| *known == field)?.0);
        number >>= TYPE_BITS;
    }
    Some(key)
}

const ADDRESS_AND_PORT_V4: [KeyType; 2] = [KeyType::Ipv4Address, KeyType::Port];
const ADDRESS_AND_PORT_V6: [KeyType; 2] = [KeyType::Ipv6Address, KeyType::Port];

/// Type number and length in bytes of a map's data; `None` for a set.
pub(crate) fn data_type(data: SetData) -> Option<(u32, usize)> {
    match data {
        SetData::None => None,
        SetData::Verdict => Some((NFT_DATA_VERDICT, 0)),
        SetData::Ipv4AddressAndPort => {
            Some((type_number(&ADDRESS_AND_PORT_V4), key_bytes(&ADDRESS_AND_PORT_V4)))
        }
        SetData::Ipv6AddressAndPort => {
            Some((type_number(&ADDRESS_AND_PORT_V6), key_bytes(&ADDRESS_AND_PORT_V6)))
        }
    }
}

pub(crate) fn data_of_type(number: u32) -> Option<SetData> {
    [SetData::Verdict, SetData::Ipv4AddressAndPort, SetData::Ipv6AddressAndPort]
        .into_iter()
        .find(|data| data_type(*data).is_some_and(|(known, _)| known == number))
}

/// NFTA_LIST_ELEM attributes of one element; `data` only where it is added.
pub(crate) fn write_element(writer: &mut Writer, interval: bool, key: Key<'_>, data: Option<&ElementData>) {
    writer.nest(NFTA_LIST_ELEM, |writer| {
        value(writer, NFTA_SET_ELEM_KEY, Packed::key(key).as_slice());
        match data {
            None | Some(ElementData::None) => {}
            Some(ElementData::Verdict(verdict)) => {
                writer.nest(NFTA_SET_ELEM_DATA, |writer| write_verdict(writer, verdict));
            }
            Some(ElementData::AddressAndPort(address, port)) => {
                value(writer, NFTA_SET_ELEM_DATA, Packed::address_and_port(*address, *port).as_slice());
            }
        }
    });
    if interval && let Some(end) = key.data().next().as_ref().and_then(end_of) {
        writer.nest(NFTA_LIST_ELEM, |writer| {
            value(writer, NFTA_SET_ELEM_KEY, Packed::address(end).as_slice());
            writer.be32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
        });
    }
}

/// First address after a prefix; none after the last one. An interval is kept as its first address and, flagged, the
/// first address after it.
fn end_of(datum: &Datum) -> Option<IpAddr> {
    let last = match datum {
        Datum::Net(net) => net.broadcast(),
        Datum::Ip(address) => *address,
        _ => return None,
    };
    match last {
        IpAddr::V4(last) => u32::from(last).checked_add(1).map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(last) => u128::from(last).checked_add(1).map(|next| IpAddr::V6(next.into())),
    }
}

/// A nest with one NFTA_DATA_VALUE.
pub(crate) fn value(writer: &mut Writer, kind: u16, bytes: &[u8]) {
    let open = writer.open_nest(kind);
    writer.attribute(NFTA_DATA_VALUE, bytes);
    writer.close_nest(open);
}

/// Number and chain.
fn verdict_parts(verdict: &Verdict) -> (i32, Option<&str>) {
    match verdict {
        Verdict::Accept => (NF_ACCEPT, None),
        Verdict::Drop => (NF_DROP, None),
        Verdict::Return => (NFT_RETURN, None),
        Verdict::Jump(chain) => (NFT_JUMP, Some(chain)),
        Verdict::Goto(chain) => (NFT_GOTO, Some(chain)),
    }
}

pub(crate) fn write_verdict(writer: &mut Writer, verdict: &Verdict) {
    let (code, chain) = verdict_parts(verdict);
    writer.nest(NFTA_DATA_VERDICT, |writer| {
        writer.be32(NFTA_VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            writer.string(NFTA_VERDICT_CHAIN, chain);
        }
    });
}

/// `None` where no verdict stands.
fn is_verdict(attributes: Attributes<'_>, planned: &Verdict) -> Option<bool> {
    let there = attributes.find(NFTA_DATA_VERDICT)?.nested();
    let chain = there.find(NFTA_VERDICT_CHAIN).map(|chain| chain.value);
    let (code, name) = verdict_parts(planned);
    let same_chain = match (chain, name) {
        (Some([there @ .., 0]), Some(name)) => there == name.as_bytes(),
        (None, None) => true,
        _ => false,
    };
    Some(there.find(NFTA_VERDICT_CODE)?.be32()?.cast_signed() == code && same_chain)
}

fn read_verdict(attributes: Attributes<'_>) -> Option<Verdict> {
    let verdict = attributes.find(NFTA_DATA_VERDICT)?.nested();
    let chain = || verdict.find(NFTA_VERDICT_CHAIN).map(|chain| chain.string());
    Some(match verdict.find(NFTA_VERDICT_CODE)?.be32()?.cast_signed() {
        NF_ACCEPT => Verdict::Accept,
        NF_DROP => Verdict::Drop,
        NFT_RETURN => Verdict::Return,
        NFT_JUMP => Verdict::Jump(chain()?.into()),
        NFT_GOTO => Verdict::Goto(chain()?.into()),
        _ => return None,
    })
}

/// One element of a dump, not yet understood.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RawElement {
    pub(crate) key: Vec<u8>,
    /// Sorts the end of one interval before the beginning of the next.
    pub(crate) begins: bool,
    pub(crate) data: RawData,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RawData {
    None,
    Value(Vec<u8>),
    Verdict(Verdict),
    Unknown,
}

impl RawElement {
    pub(crate) fn read(element: &Attribute<'_>) -> Option<Self> {
        let attributes = element.nested();
        let key = attributes.find(NFTA_SET_ELEM_KEY)?.nested().find(NFTA_DATA_VALUE)?.value.to_vec();
        let flags = attributes.find(NFTA_SET_ELEM_FLAGS).and_then(|flags| flags.be32()).unwrap_or(0);
        let data = attributes.find(NFTA_SET_ELEM_DATA).map(|data| data.nested());
        let data = match data {
            None => RawData::None,
            Some(data) => match (data.find(NFTA_DATA_VALUE), read_verdict(data)) {
                (Some(value), _) => RawData::Value(value.value.to_vec()),
                (None, Some(verdict)) => RawData::Verdict(verdict),
                (None, None) => RawData::Unknown,
            },
        };
        Some(Self { key, begins: flags & NFT_SET_ELEM_INTERVAL_END == 0, data })
    }

    fn data(&self, kind: SetData) -> Option<ElementData> {
        match (&self.data, kind) {
            (RawData::None, SetData::None) => Some(ElementData::None),
            (RawData::Verdict(verdict), SetData::Verdict) => Some(ElementData::Verdict(verdict.clone())),
            (RawData::Value(bytes), SetData::Ipv4AddressAndPort) => {
                let address = Ipv4Addr::from(*bytes.first_chunk::<4>()?);
                Some(ElementData::AddressAndPort(address.into(), port(bytes.get(4..)?)?))
            }
            (RawData::Value(bytes), SetData::Ipv6AddressAndPort) => {
                let address = Ipv6Addr::from(*bytes.first_chunk::<16>()?);
                Some(ElementData::AddressAndPort(address.into(), port(bytes.get(16..)?)?))
            }
            _ => None,
        }
    }
}

fn port(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

/// What a plan wants of a set, for telling it apart from all else while the set is read.
pub(crate) struct Wanted<'a> {
    set: &'a Set,
    /// Each with the number of its group.
    elements: Vec<(usize, Element<'a>)>,
    /// Where among them a key stands.
    places: HashMap<Key<'a>, usize>,
    /// Groups of which one key stands in another one too.
    disputed: BTreeSet<usize>,
}

/// What was read of a set.
#[derive(Default)]
pub(crate) struct Found {
    /// Places of wanted elements.
    wanted: Vec<usize>,
    others: Vec<RawElement>,
    key: KeyBuffer,
}

impl<'a> Wanted<'a> {
    /// Intervals are understood only as a whole.
    pub(crate) fn of(set: &'a Set) -> Self {
        let groups = set.groups.values().enumerate().filter(|_| !set.interval);
        let elements: Vec<_> =
            groups.flat_map(|(number, group)| group.iter().map(move |element| (number, element))).collect();
        let mut places = HashMap::with_capacity(elements.len());
        let mut disputed = BTreeSet::new();
        for (place, (number, (key, _))) in elements.iter().enumerate() {
            if let Some(other) = places.insert(*key, place) {
                disputed.extend([elements[other].0, *number]);
            }
        }
        Self { set, elements, places, disputed }
    }

    /// Where an element stands that is in the kernel as it is to be.
    fn place(&self, element: &Attribute<'_>, key: &mut KeyBuffer) -> Option<usize> {
        let element = element.nested();
        let bytes = element.find(NFTA_SET_ELEM_KEY)?.nested().find(NFTA_DATA_VALUE)?.value;
        let place = *self.places.get(&key.set(fields(&self.set.key, bytes)))?;
        let (_, (_, planned)) = &self.elements[place];
        let data = element.find(NFTA_SET_ELEM_DATA).map(|data| data.nested());
        let same = match (planned, data) {
            (ElementData::None, data) => data.is_none(),
            (ElementData::Verdict(planned), Some(data)) => is_verdict(data, planned)?,
            (ElementData::AddressAndPort(address, port), Some(data)) => {
                data.find(NFTA_DATA_VALUE)?.value == Packed::address_and_port(*address, *port).as_slice()
            }
            (_, None) => false,
        };
        same.then_some(place)
    }
}

impl Found {
    pub(crate) fn take(&mut self, element: &Attribute<'_>, wanted: &Wanted<'_>) {
        match wanted.place(element, &mut self.key) {
            Some(place) => self.wanted.push(place),
            None => self.others.extend(RawElement::read(element)),
        }
    }

    /// A group that is there whole is the very same, and nobody need look at it again; all else stands in one without a name. `None`
    /// when some of it is nothing a plan could have made.
    pub(crate) fn groups(self, wanted: &Wanted<'_>) -> Option<Groups> {
        let groups = &wanted.set.groups;
        let (mut counts, mut is_there) = (vec![0; groups.len()], vec![false; wanted.elements.len()]);
        for place in self.wanted {
            // A table that grows while it is read may tell of an element twice.
            if !std::mem::replace(&mut is_there[place], true) {
                counts[wanted.elements[place].0] += 1;
            }
        }
        let whole: Vec<bool> = groups
            .values()
            .enumerate()
            .map(|(number, group)| counts[number] == group.len() && !wanted.disputed.contains(&number))
            .collect();
        let mut others = read_elements(wanted.set, self.others)?;
        for ((number, (key, data)), _) in wanted.elements.iter().zip(is_there).filter(|(_, there)| *there) {
            if !whole[*number] {
                others.insert(key, data);
            }
        }
        if others.is_empty() && !whole.contains(&false) {
            return Some(groups.clone());
        }
        let kept = groups.iter().zip(&whole).filter(|(_, whole)| **whole);
        let mut found: Groups = kept.map(|((name, group), _)| (name.clone(), group.clone())).collect();
        if !others.is_empty() {
            found.insert("".into(), Arc::new(others));
        }
        Some(found)
    }
}

/// The elements of a dump; `None` when one of them is nothing a plan could have made.
pub(crate) fn read_elements(declaration: &Set, mut raw: Vec<RawElement>) -> Option<Elements> {
    if declaration.interval {
        raw.sort();
        return read_intervals(declaration, &raw);
    }
    raw.iter()
        .map(|element| Some((read_key(&declaration.key, &element.key)?, element.data(declaration.data)?)))
        .collect()
}

fn read_intervals(declaration: &Set, raw: &[RawElement]) -> Option<Elements> {
    let mut elements = Elements::new();
    let mut raw = raw.iter().peekable();
    while let Some(first) = raw.next() {
        if !first.begins {
            continue; // nft marks the gap before the first interval so
        }
        let end = raw.peek().filter(|next| !next.begins).map(|end| end.key.as_slice());
        let net = prefix(&first.key, end)?;
        elements.insert(&[Datum::Net(net)][..], &first.data(declaration.data)?);
    }
    Some(elements)
}

/// The prefix that begins at `first` and ends before `end`, or with the last address of the family.
fn prefix(first: &[u8], end: Option<&[u8]>) -> Option<IpNet> {
    match first.len() {
        4 => {
            let number = |bytes: &[u8]| Some(u32::from_be_bytes(*bytes.first_chunk()?));
            let (first, end) = (number(first)?, end.map_or(Some(0), number)?);
            let bits = 32 - length_bits(u128::from(end.wrapping_sub(first)), 32)?;
            let net = Ipv4Net::new(first.into(), bits).ok()?;
            (net.network() == Ipv4Addr::from(first)).then_some(net.into())
        }
        16 => {
            let number = |bytes: &[u8]| Some(u128::from_be_bytes(*bytes.first_chunk()?));
            let (first, end) = (number(first)?, end.map_or(Some(0), number)?);
            let bits = 128 - length_bits(end.wrapping_sub(first), 128)?;
            let net = Ipv6Net::new(first.into(), bits).ok()?;
            (net.network() == Ipv6Addr::from(first)).then_some(net.into())
        }
        _ => None,
    }
}

/// Logarithm of a length that is a power of two; 0 stands for the whole family.
fn length_bits(length: u128, whole: u8) -> Option<u8> {
    match length {
        0 => Some(whole),
        length if length.is_power_of_two() => u8::try_from(length.trailing_zeros()).ok(),
        _ => None,
    }
}

/// Key bytes as data of these types.
pub(crate) fn read_key(types: &[KeyType], bytes: &[u8]) -> Option<Vec<Datum>> {
    let key: Vec<Datum> = fields(types, bytes).collect();
    (bytes.len() == key_bytes(types) && key.len() == types.len()).then_some(key)
}

/// As far as the bytes reach.
fn fields(types: &[KeyType], mut bytes: &[u8]) -> impl Iterator<Item = Datum> {
    types.iter().map_while(move |kind| {
        let datum = match kind {
            KeyType::Ipv4Address => Datum::Ip(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
            KeyType::Ipv6Address => Datum::Ip(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
            KeyType::L4Protocol => protocol(*bytes.first()?),
            KeyType::Port => Datum::Port(port(bytes)?),
            KeyType::Index => Datum::Index(u32::from_ne_bytes(*bytes.first_chunk()?)),
            KeyType::LinkName => Datum::Name(Attribute { kind: 0, value: bytes.get(..16)? }.string().into()),
        };
        let step =
            if types.len() > 1 { key_type_bytes(*kind).next_multiple_of(4) } else { key_type_bytes(*kind) };
        bytes = bytes.get(step..)?;
        Some(datum)
    })
}

fn protocol(number: u8) -> Datum {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|protocol| protocol.number() == number)
        .map_or(Datum::ProtocolNumber(number), Datum::Protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of_ports() -> Set {
        Set::new(vec![KeyType::Port], SetData::Ipv4AddressAndPort)
    }

    fn planned(ports: &[(u16, u8)]) -> Elements {
        let element = |&(port, last): &(u16, u8)| {
            (vec![Datum::Port(port)], ElementData::AddressAndPort([192, 0, 2, last].into(), 80))
        };
        ports.iter().map(element).collect()
    }

    /// What is found where the kernel has these elements.
    fn found(set: &Set, ports: &[(u16, u8)]) -> Option<Groups> {
        let mut writer = Writer::default();
        for port in ports {
            for (key, data) in planned(&[*port]).iter() {
                write_element(&mut writer, false, key, Some(&data));
            }
        }
        let (wanted, mut found) = (Wanted::of(set), Found::default());
        Attributes::of(writer.bytes()).for_each(|element| found.take(&element, &wanted));
        found.groups(&wanted)
    }

    #[test]
    fn groups_that_are_there_whole_are_the_very_same_and_all_else_stands_in_one() {
        let groups = [
            ("whole", planned(&[(1, 1), (2, 2)])),
            ("changed", planned(&[(3, 3), (4, 4)])),
            ("gone", planned(&[(5, 5)])),
        ];
        let wanted: Groups = groups.into_iter().map(|(name, group)| (name.into(), Arc::new(group))).collect();
        let set = Set { groups: wanted, ..map_of_ports() };
        let found = found(&set, &[(1, 1), (2, 2), (3, 3), (4, 9), (6, 6), (1, 1)]).unwrap();
        let names: Vec<&str> = found.keys().map(AsRef::as_ref).collect();
        assert_eq!(names, ["", "whole"]);
        assert!(Arc::ptr_eq(&found["whole"], &set.groups["whole"]));
        assert_eq!(*found[""], planned(&[(3, 3), (4, 9), (6, 6)]));
    }

    #[test]
    fn groups_that_share_a_key_are_compared_element_by_element() {
        let groups =
            [("a", planned(&[(1, 1), (2, 2)])), ("b", planned(&[(2, 2), (3, 3)])), ("c", planned(&[(4, 4)]))];
        let groups = groups.into_iter().map(|(name, group)| (name.into(), Arc::new(group))).collect();
        let set = Set { groups, ..map_of_ports() };
        let found = found(&set, &[(1, 1), (2, 2), (3, 3), (4, 4)]).unwrap();
        assert_eq!(found.keys().map(AsRef::as_ref).collect::<Vec<&str>>(), ["", "c"]);
        assert_eq!(*found[""], planned(&[(1, 1), (2, 2), (3, 3)]));
    }

    #[test]
    fn nobodys_elements_stand_in_one_group_unless_no_plan_could_have_made_them() {
        assert_eq!(*found(&map_of_ports(), &[(1, 1)]).unwrap()[""], planned(&[(1, 1)]));
        assert_eq!(found(&Set::new(vec![KeyType::Port], SetData::Verdict), &[(7, 7)]), None);
    }

    #[test]
    fn a_key_of_several_fields_is_padded_and_read_back() {
        let types =
            [KeyType::LinkName, KeyType::Ipv6Address, KeyType::L4Protocol, KeyType::Port, KeyType::Index];
        let key = vec![
            Datum::Name("weftp0123456789".into()),
            Datum::Ip("fd00::1".parse().unwrap()),
            Datum::Protocol(Protocol::Udp),
            Datum::Port(53),
            Datum::Index(7),
        ];
        let mut buffer = KeyBuffer::default();
        let packed = Packed::key(buffer.set(key.iter().cloned()));
        assert_eq!(packed.as_slice().len(), key_bytes(&types));
        assert_eq!(read_key(&types, packed.as_slice()), Some(key));
        assert_eq!(key_types(type_number(&types)), Some(types.to_vec()));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_element_makes_the_readers_panic(
            kind in proptest::prelude::any::<u32>(),
            keys in proptest::collection::vec((proptest::collection::vec(0..=255u8, 0..40), proptest::bool::ANY), 0..4),
            interval in proptest::bool::ANY,
        ) {
            let mut declaration = Set::new(key_types(kind).unwrap_or_default(), SetData::Ipv6AddressAndPort);
            declaration.interval = interval;
            let raw = keys.into_iter().map(|(key, begins)| RawElement { data: RawData::Value(key.clone()), key, begins });
            let _ = read_elements(&declaration, raw.collect());
        }

        #[test]
        fn every_prefix_is_read_back(address in proptest::prelude::any::<std::net::IpAddr>(), length in 0..=128u8) {
            let net = IpNet::new(address, length.min(if address.is_ipv6() { 128 } else { 32 })).unwrap().trunc();
            let mut writer = Writer::default();
            let mut key = KeyBuffer::default();
            write_element(&mut writer, true, key.set([Datum::Net(net)].into_iter()), None);
            let raw = Attributes::of(writer.bytes()).map(|element| RawElement::read(&element).unwrap()).collect();
            let mut declaration = Set::new(vec![KeyType::Ipv6Address], SetData::None);
            declaration.interval = true;
            let elements = read_elements(&declaration, raw).unwrap();
            proptest::prop_assert_eq!(elements.keys().map(Key::to_vec).collect::<Vec<_>>(), [[Datum::Net(net)]]);
        }
    }

    #[test]
    fn a_key_of_one_field_is_not_padded() {
        let packed = |datum: Datum| Packed::key(KeyBuffer::default().set([datum].into_iter()));
        assert_eq!(packed(Datum::Port(80)).as_slice(), [0, 80]);
        assert_eq!(packed(Datum::ProtocolNumber(58)).as_slice(), [58]);
    }

    #[test]
    fn ranges_that_are_prefixes_are_read_as_such_and_others_are_not() {
        assert_eq!(prefix(&[10, 0, 0, 0], Some(&[10, 0, 1, 0])), "10.0.0.0/24".parse().ok());
        assert_eq!(prefix(&[0, 0, 0, 0], None), "0.0.0.0/0".parse().ok());
        assert_eq!(prefix(&[255, 255, 255, 255], None), "255.255.255.255/32".parse().ok());
        assert_eq!(prefix(&[10, 0, 0, 1], Some(&[10, 0, 0, 3])), None, "not aligned");
        assert_eq!(prefix(&[10, 0, 0, 0], Some(&[10, 0, 0, 3])), None, "no power of two");
        assert_eq!(prefix(&[0xff; 16], None), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128".parse().ok());
    }
}
