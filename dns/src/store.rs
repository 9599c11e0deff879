//! The name store: a table from wire names to records, read-locked for one answer, written in place for one name at
//! a time.
//!
//! ```text
//!  DnsPlan --write--> names whose records changed, each under its own short write lock
//!  Question --answer--> Answer, from what is there now
//! ```
//!
//! A name exists when a group says so or when a name below it exists (an empty non-terminal, RFC 4592 section
//! 2.2.2): every entry counts its direct children and goes when it has neither.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hickory_proto::rr::RecordType;
use tokio::sync::Notify;

use crate::answer::{Answer, Local, MAX_ALIASES, Question, Soa, SoaPlace};
use crate::diff::{Change, changed_groups};
use crate::name::{Name, first_label, parent, suffixes};
use crate::zone::{Data, DnsPlan, GroupKey, Groups, Zones};

/// Holds what is answered. Cheap to share; the tables are behind one lock.
#[derive(Default)]
pub struct Store {
    table: RwLock<Table>,
    /// A whole plan has been written since the zones were last changed.
    ready: AtomicBool,
    became_ready: Notify,
}

#[derive(Default)]
struct Table {
    zones: Option<Zones>,
    /// Apexes of `zones` by wire name.
    apexes: HashMap<Arc<[u8]>, Soa>,
    names: HashMap<Arc<[u8]>, Entry>,
}

#[derive(Default)]
struct Entry {
    /// Records by the group they come from, ordered by group; almost always one.
    contributions: Vec<(Arc<GroupKey>, Arc<[Data]>)>,
    /// Entries directly below.
    children: u32,
}

/// Table and lock stay usable after a panic elsewhere: every write leaves a whole entry behind.
impl Store {
    /// Knows its zones but nothing in them yet: answers [`Answer::NotReady`] there.
    pub fn new(zones: Option<Zones>) -> Self {
        let store = Self::default();
        store.write_lock().set_zones(zones);
        store
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names that exist, empty non-terminals included.
    pub fn len(&self) -> usize {
        self.read_lock().names.len()
    }

    /// Not even a zone.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A whole plan has been written: names that are not there do not exist.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Returns once [`Store::is_ready`].
    pub async fn until_ready(&self) {
        let notified = self.became_ready.notified();
        if !self.is_ready() {
            notified.await;
        }
    }

    /// Brings the table from `old` (what the caller wrote last) to `plan`. Returns one line for each changed group.
    /// New and changed names come first, so that a name that moves between groups is never missing.
    pub fn write(&self, old: &Groups, plan: &DnsPlan) -> Vec<String> {
        let rezoned = self.read_lock().zones != plan.zones;
        let none = Groups::new();
        let old = if rezoned { &none } else { old };
        if rezoned {
            self.ready.store(false, Ordering::Release);
            self.write_lock().set_zones(plan.zones.clone());
        }
        let changes = changed_groups(old, &plan.groups);
        let written: Vec<usize> = changes.iter().map(|change| self.write_names(change)).collect();
        let removed: Vec<usize> = changes.iter().map(|change| self.remove_names(change)).collect();
        self.ready.store(true, Ordering::Release);
        self.became_ready.notify_waiters();
        let line = |((change, written), removed): ((&Change<'_>, usize), usize)| match (written, removed) {
            (0, 0) => None,
            (written, 0) => Some(format!("{}: {written} names", change.key)),
            (0, removed) => Some(format!("{}: {removed} names gone", change.key)),
            (written, removed) => Some(format!("{}: {written} names, {removed} gone", change.key)),
        };
        changes.iter().zip(written).zip(removed).filter_map(line).collect()
    }

    fn write_names(&self, change: &Change<'_>) -> usize {
        let known = |name| change.before.and_then(|before| before.names.get(name));
        let mut count = 0;
        for (name, records) in change.after.into_iter().flat_map(|after| &after.names) {
            if known(name) != Some(records) {
                self.write_lock().set(name.wire(), change.key, records);
                count += 1;
            }
        }
        count
    }

    fn remove_names(&self, change: &Change<'_>) -> usize {
        let stays = |name| change.after.is_some_and(|after| after.names.contains_key(name));
        let mut count = 0;
        for name in change.before.into_iter().flat_map(|before| before.names.keys()) {
            if !stays(name) {
                self.write_lock().unset(name.wire(), change.key);
                count += 1;
            }
        }
        count
    }

    /// Answers from the table. `turn` rotates the records of a set: the caller counts it up.
    pub fn answer(&self, question: &Question, turn: usize) -> Answer {
        let table = self.read_lock();
        let ready = self.is_ready();
        let mut local = Local::default();
        let mut name = question.name.clone();
        for _ in 0..=MAX_ALIASES {
            match table.find(&name, question.record_type, ready) {
                Found::Elsewhere if local.records.is_empty() => return Answer::Elsewhere,
                Found::Elsewhere => {
                    local.onward = Some(name);
                    return Answer::Local(local);
                }
                Found::NotReady => return Answer::NotReady,
                Found::Alias(target) => {
                    local.records.push((name, Data::Cname(target.clone())));
                    name = target;
                }
                Found::Records(records) => {
                    table.add_targets(&records, &mut local.additionals);
                    local.records.extend(rotated(records, turn).map(|data| (name.clone(), data)));
                    return Answer::Local(local);
                }
                Found::Soa(place, soa) => {
                    local.soa = Some((place, soa));
                    return Answer::Local(local);
                }
                Found::NoName(soa) => {
                    local.name_error = true;
                    local.soa = Some((SoaPlace::Authority, soa));
                    return Answer::Local(local);
                }
            }
        }
        Answer::AliasLoop
    }
}

/// What the table has for one name and type.
enum Found {
    Elsewhere,
    NotReady,
    Alias(Name),
    /// Never empty.
    Records(Vec<Data>),
    /// The SOA itself, or that the name exists without such records.
    Soa(SoaPlace, Soa),
    NoName(Soa),
}

impl Table {
    fn set_zones(&mut self, zones: Option<Zones>) {
        *self = Self::default();
        let Some(zones) = zones else { return };
        let named = |labels: &[&str]| labels.iter().rev().try_fold(zones.domain.clone(), |n, l| n.child(l));
        if let (Ok(server), Ok(mailbox)) = (named(&["ns", "dns"]), named(&["hostmaster"])) {
            for apex in zones.apexes() {
                let soa = Soa { apex: apex.clone(), server: server.clone(), mailbox: mailbox.clone() };
                self.apexes.insert(apex.wire().clone(), soa);
                self.names.entry(apex.wire().clone()).or_default();
            }
        }
        self.zones = Some(zones);
    }

    /// The zone of ours that the name is in.
    fn zone_of(&self, wire: &[u8]) -> Option<&Soa> {
        suffixes(wire).find_map(|suffix| self.apexes.get(suffix))
    }

    fn set(&mut self, wire: &Arc<[u8]>, key: &Arc<GroupKey>, records: &Arc<[Data]>) {
        if !self.names.contains_key(wire) {
            self.adopt_by_parent(wire);
        }
        let entry = self.names.entry(wire.clone()).or_default();
        match entry.contributions.binary_search_by(|(other, _)| other.cmp(key)) {
            Ok(at) => entry.contributions[at].1 = records.clone(),
            Err(at) => entry.contributions.insert(at, (key.clone(), records.clone())),
        }
    }

    /// Counts a new name in the entry of its parent, which is made when it is not there, up to the zone's apex.
    /// Names outside our zones (reverse names of endpoints beyond the cluster's ranges) have no parents.
    fn adopt_by_parent(&mut self, wire: &[u8]) {
        if self.zone_of(wire).is_none() {
            return;
        }
        let mut child = wire;
        while let Some(name) = parent(child).filter(|_| !self.apexes.contains_key(child)) {
            if let Some(entry) = self.names.get_mut(name) {
                entry.children += 1;
                return;
            }
            self.names.insert(Arc::from(name), Entry { children: 1, ..Entry::default() });
            child = name;
        }
    }

    fn unset(&mut self, wire: &[u8], key: &GroupKey) {
        let Some(entry) = self.names.get_mut(wire) else { return };
        entry.contributions.retain(|(other, _)| other.as_ref() != key);
        let mut name = Some(wire);
        while let Some(wire) = name {
            let unused = self.names.get(wire).is_some_and(Entry::is_unused);
            if !unused || self.apexes.contains_key(wire) {
                return;
            }
            self.names.remove(wire);
            name = parent(wire).filter(|_| self.zone_of(wire).is_some());
            if let Some(entry) = name.and_then(|name| self.names.get_mut(name)) {
                entry.children = entry.children.saturating_sub(1);
            }
        }
    }

    fn find(&self, name: &Name, record_type: RecordType, ready: bool) -> Found {
        let wire: &[u8] = name.wire();
        let zone = self.zone_of(wire);
        if !ready && zone.is_some() {
            return Found::NotReady;
        }
        let entry = self.names.get(wire);
        let Some(soa) = zone else {
            let records = entry.map(|entry| entry.of_type(record_type)).unwrap_or_default();
            return if records.is_empty() { Found::Elsewhere } else { Found::Records(records) };
        };
        let records = match entry {
            Some(entry) => match entry.alias() {
                Some(target) if !matches!(record_type, RecordType::CNAME | RecordType::ANY) => {
                    return Found::Alias(target.clone());
                }
                _ => entry.of_type(record_type),
            },
            None => match self.pod_address(wire) {
                Some(address) => {
                    let data = Data::from(address);
                    let asked = asks_for(record_type, &data);
                    if asked { vec![data] } else { Vec::new() }
                }
                None => return Found::NoName(soa.clone()),
            },
        };
        match (records.is_empty(), record_type) {
            (false, _) => Found::Records(records),
            (true, RecordType::SOA) if soa.apex == *name => Found::Soa(SoaPlace::Answer, soa.clone()),
            (true, _) => Found::Soa(SoaPlace::Authority, soa.clone()),
        }
    }

    /// `1-2-3-4.<ns>.pod.<zone>` of an existing Namespace, any address, as CoreDNS's `pods insecure`.
    fn pod_address(&self, wire: &[u8]) -> Option<IpAddr> {
        let namespace = parent(wire)?;
        let pod = parent(namespace)?;
        let domain = &self.zones.as_ref()?.domain;
        if first_label(pod)? != b"pod" || parent(pod)? != domain.wire().as_ref() {
            return None;
        }
        let known = &self.names.get(namespace)?.contributions;
        if !known.iter().any(|(key, _)| matches!(key.as_ref(), GroupKey::Namespace(_))) {
            return None;
        }
        dashed_address(std::str::from_utf8(first_label(wire)?).ok()?)
    }

    /// The addresses of SRV targets that are ours, for the additional section (RFC 2782).
    fn add_targets(&self, records: &[Data], additionals: &mut Vec<(Name, Data)>) {
        let targets: BTreeSet<&Name> = records
            .iter()
            .filter_map(|data| if let Data::Srv(srv) = data { Some(&srv.target) } else { None })
            .collect();
        for target in targets {
            let Some(entry) = self.names.get(target.wire()) else { continue };
            let addresses = entry.of_type(RecordType::A).into_iter().chain(entry.of_type(RecordType::AAAA));
            additionals.extend(addresses.map(|data| (target.clone(), data)));
        }
    }
}

impl Entry {
    fn is_unused(&self) -> bool {
        self.contributions.is_empty() && self.children == 0
    }

    fn records(&self) -> impl Iterator<Item = &Data> {
        self.contributions.iter().flat_map(|(_, records)| records.iter())
    }

    fn alias(&self) -> Option<&Name> {
        self.records().find_map(|data| if let Data::Cname(target) = data { Some(target) } else { None })
    }

    fn of_type(&self, record_type: RecordType) -> Vec<Data> {
        self.records().filter(|data| asks_for(record_type, data)).cloned().collect()
    }
}

fn asks_for(record_type: RecordType, data: &Data) -> bool {
    record_type == RecordType::ANY || record_type == data.record_type()
}

/// `10-42-0-7` is IPv4, anything else with dashes for colons IPv6.
fn dashed_address(label: &str) -> Option<IpAddr> {
    if label.split('-').count() == 4 && !label.contains("--") {
        return label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

/// The records of one set, beginning at another one with every turn, so that clients that take the first spread.
fn rotated(mut records: Vec<Data>, turn: usize) -> impl Iterator<Item = Data> {
    let count = records.len().max(1);
    records.rotate_left(turn % count);
    records.into_iter()
}
