//! The names of one object with their records, as octets: a cluster has a hundred thousand of them, and they are read only
//! when their object changes.
//!
//! ```text
//!  number of names, name...      owners of records in canonical order, then other names in records, each once
//!  records, record...            for each owner, to the end; a name in a record is its place above
//!  name = octets shared with the end of the name before, number of octets that differ, these octets; or an address
//! ```
//!
//! Neighbours in canonical order end alike, so a pod's name costs little more than its first label.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;

use super::Data;
use crate::name::{Name, shared_end};
use crate::octets::{Octets, put_counted, put_data, put_number};

/// In place of the octets shared: the reverse name of an IPv4 address follows, more than a name can share.
const REVERSE_V4: usize = 256;
/// The same of an IPv6 address.
const REVERSE_V6: usize = 257;

/// More than most groups take.
const TYPICAL_BYTES: usize = 512;

/// All names of one object with their records, sorted and without duplicates. A name without records exists: its
/// answer is NODATA.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Group {
    names: Box<[u8]>,
    /// When what the names of a headless Service follow changed last, in milliseconds since the epoch; for a metric only.
    pub triggered_millis: Option<i64>,
}

impl Group {
    /// Names with and without records.
    pub fn new(names: &BTreeMap<Name, BTreeSet<Data>>) -> Self {
        let with_records = |(name, records): (&Name, &BTreeSet<Data>)| {
            let data = std::iter::once(None).chain(records.iter().cloned().map(Some));
            data.map(|data| (name.clone(), data)).collect::<Vec<_>>()
        };
        Self::of_sorted(&names.iter().flat_map(with_records).collect::<Vec<_>>())
    }

    /// Names in canonical order with their records in order; `None` is no record.
    fn of_sorted(records: &[(Name, Option<Data>)]) -> Self {
        if records.is_empty() {
            return Self::default();
        }
        let owners = || records.chunk_by(|(one, _), (other, _)| one == other);
        let mut all: Vec<&Name> = owners().map(|records| &records[0].0).collect();
        // Only looked up in, never iterated.
        let mut places: HashMap<&Name, usize> = all.iter().copied().zip(0..).collect();
        for target in records.iter().filter_map(|(_, data)| data.as_ref()?.name()) {
            places.entry(target).or_insert_with(|| {
                all.push(target);
                all.len() - 1
            });
        }
        let mut octets = Vec::with_capacity(TYPICAL_BYTES);
        put_number(&mut octets, all.len());
        let mut before: &[u8] = &[];
        for name in &all {
            put_name(&mut octets, before, name);
            before = name.wire();
        }
        for records in owners() {
            let data = || records.iter().filter_map(|(_, data)| data.as_ref());
            put_number(&mut octets, data().count());
            for data in data() {
                put_data(&mut octets, data, |octets, name| put_number(octets, places[name]));
            }
        }
        // Copied, not shrunk: what a shrunk buffer leaves behind is too small for the next one.
        Self { names: octets.as_slice().into(), triggered_millis: None }
    }

    /// Not even a name without records.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// In canonical order of the names; the records of each sorted.
    pub fn names(&self) -> impl Iterator<Item = (Name, Vec<Data>)> {
        let mut left = Octets(&self.names);
        let count = left.number().unwrap_or_default();
        let mut all: Vec<Name> = Vec::with_capacity(count);
        for _ in 0..count {
            let before = all.last().map_or(&[][..], |name| name.wire());
            all.extend(take_name(&mut left, before));
        }
        let mut owner = 0;
        std::iter::from_fn(move || {
            let records = left.number()?;
            let name = all.get(owner)?.clone();
            owner += 1;
            let target = |left: &mut Octets<'_>| all.get(left.number()?).cloned();
            Some((name, (0..records).map_while(|_| left.data(target)).collect()))
        })
    }
}

/// The shorter of the two forms.
fn put_name(octets: &mut Vec<u8>, before: &[u8], name: &Name) {
    let wire = name.wire();
    let shared = shared_end(wire, before);
    let new = &wire[..wire.len() - shared];
    let address = if new.len() > 4 { name.address() } else { None };
    match address {
        Some(IpAddr::V4(address)) => {
            put_number(octets, REVERSE_V4);
            octets.extend_from_slice(&address.octets());
        }
        Some(IpAddr::V6(address)) if new.len() > 16 => {
            put_number(octets, REVERSE_V6);
            octets.extend_from_slice(&address.octets());
        }
        _ => {
            put_number(octets, shared);
            put_counted(octets, new);
        }
    }
}

fn take_name(octets: &mut Octets<'_>, before: &[u8]) -> Option<Name> {
    match octets.number()? {
        REVERSE_V4 => Some(Name::reverse(octets.array::<4>()?.into())),
        REVERSE_V6 => Some(Name::reverse(octets.array::<16>()?.into())),
        shared => {
            let new = octets.counted()?;
            let shared = before.get(before.len().checked_sub(shared)?..)?;
            Name::from_wire(&[new, shared].concat())
        }
    }
}

impl FromIterator<(Name, Data)> for Group {
    fn from_iter<I: IntoIterator<Item = (Name, Data)>>(records: I) -> Self {
        let mut records: Vec<_> = records.into_iter().map(|(name, data)| (name, Some(data))).collect();
        records.sort_unstable();
        records.dedup();
        Self::of_sorted(&records)
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zone::Srv;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn every_kind_of_record_comes_back_and_so_does_a_name_without() {
        let target = name("web.default.svc.cluster.local");
        let srv = Srv { priority: 1, weight: 2, port: 80, target: target.clone() };
        let records = [
            ("web.default.svc.cluster.local", Data::from(std::net::IpAddr::from([10, 43, 0, 80]))),
            ("web.default.svc.cluster.local", Data::Aaaa("fd00:43::80".parse().unwrap())),
            ("_http._tcp.web.default.svc.cluster.local", Data::Srv(srv)),
            ("80.0.43.10.in-addr.arpa", Data::Ptr(target.clone())),
            ("80.00.43.10.in-addr.arpa", Data::Ptr(target.clone())),
            ("f.ip6.arpa", Data::Ptr(target.clone())),
            ("out.default.svc.cluster.local", Data::Cname(name("www.example.com"))),
            ("cluster.local", Data::Ns(name("ns.dns.cluster.local"))),
            ("dns-version.cluster.local", Data::Txt("1.1.0".to_owned())),
        ];
        let mut names: BTreeMap<Name, BTreeSet<Data>> = BTreeMap::new();
        for (owner, data) in records {
            names.entry(name(owner)).or_default().insert(data);
        }
        names.insert(name("default.svc.cluster.local"), BTreeSet::new());
        names.insert(name("."), BTreeSet::new());
        names.insert(Name::reverse("fd00:43::80".parse().unwrap()), [Data::Ptr(target)].into());
        let told: BTreeMap<Name, BTreeSet<Data>> =
            Group::new(&names).names().map(|(name, records)| (name, records.into_iter().collect())).collect();
        assert_eq!(told, names);
        assert_eq!(Group::default().names().count(), 0);
    }

    #[test]
    fn a_pod_of_a_headless_service_takes_few_octets() {
        let pods = |count: u8| -> usize {
            let base = name("set.default.svc.cluster.local");
            let each = (1..=count).flat_map(|pod| {
                let address = std::net::IpAddr::from([10, 42, 0, pod]);
                let own = base.child(&format!("10-42-0-{pod}")).unwrap();
                [
                    (base.clone(), Data::from(address)),
                    (own.clone(), Data::from(address)),
                    (Name::reverse(address), Data::Ptr(own)),
                ]
            });
            each.collect::<Group>().names.len()
        };
        assert!((pods(99) - pods(19)) / 80 < 50, "{} octets", (pods(99) - pods(19)) / 80);
    }
}
