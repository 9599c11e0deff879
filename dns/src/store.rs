//! The name store: a table from wire names to records, read-locked for one answer or a batch of them, written in place
//! for one name at a time.
//!
//! ```text
//!  DnsPlan --write--> names whose records changed, each under its own short write lock
//!  Question --answer--> Answer, from what is there now      (owned: `serve`)
//!  wire name --read, find--> Found, borrowed from the table  (`fast`)
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
use crate::zone::{Data, DnsPlan, GroupKey, Groups, PodAddresses, Zones};

/// The source of a name of ours that comes from no object: one between others, or one that is not there.
pub(crate) const NO_OBJECT: &str = "names of the cluster";

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
    pods: PodNames,
}

/// Which names of pods exist.
#[derive(Clone, Debug, Default)]
pub(crate) enum PodNames {
    /// None.
    Disabled,
    /// Of any address.
    #[default]
    Insecure,
    /// Of these addresses in these namespaces.
    Verified(Arc<PodAddresses>),
}

impl PodNames {
    fn has(&self, address: IpAddr, namespace: &[u8]) -> bool {
        match self {
            Self::Disabled => false,
            Self::Insecure => true,
            Self::Verified(pods) => pods
                .get(&address)
                .is_some_and(|namespaces| namespaces.iter().any(|known| known.as_bytes() == namespace)),
        }
    }
}

/// What is known of one name.
#[derive(Default)]
pub(crate) struct Entry {
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

    /// The cluster domain, when it is one.
    pub(crate) fn domain(&self) -> Option<Name> {
        self.read_lock().zones.as_ref().map(|zones| zones.domain.clone())
    }

    /// The objects that a name of the cluster comes from; `None` for a name in no zone of ours.
    pub(crate) fn sources(&self, name: &Name) -> Option<String> {
        let table = self.read_lock();
        table.zone_of(name.wire())?;
        let Some(entry) = table.names.get(name.wire()) else {
            return Some(NO_OBJECT.to_owned());
        };
        let keys: Vec<String> = entry.contributions.iter().map(|(key, _)| key.to_string()).collect();
        Some(if keys.is_empty() { NO_OBJECT.to_owned() } else { keys.join(", ") })
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

    /// Which names of pods exist from now on.
    pub(crate) fn set_pod_names(&self, pods: PodNames) {
        self.write_lock().pods = pods;
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

    /// The table as it is now: writers wait until it is dropped.
    pub(crate) fn read(&self) -> Reading<'_> {
        let table = self.read_lock();
        Reading { ready: self.is_ready(), table }
    }

    /// Answers from the table. `turn` rotates the records of a set: the caller counts it up.
    pub fn answer(&self, question: &Question, turn: usize) -> Answer {
        let reading = self.read();
        let mut local = Local::default();
        let mut name = question.name.clone();
        for _ in 0..=MAX_ALIASES {
            match reading.find(name.wire(), question.record_type) {
                Found::Elsewhere if local.records.is_empty() => return Answer::Elsewhere,
                Found::Elsewhere => {
                    local.onward = Some(name);
                    return Answer::Local(local);
                }
                Found::NotReady => return Answer::NotReady,
                Found::Alias(target) => {
                    local.records.push((name, Data::Cname(target.clone())));
                    name = target.clone();
                }
                Found::Records(records) => {
                    let targets = reading.targets(&records).into_iter();
                    local.additionals.extend(targets.map(|(target, data)| (target.clone(), data.clone())));
                    local.records.extend(records.rotated(turn).map(|data| (name.clone(), data.clone())));
                    return Answer::Local(local);
                }
                Found::Soa(place, soa) => {
                    local.soa = Some((place, soa.clone()));
                    return Answer::Local(local);
                }
                Found::NoName(soa) => {
                    local.name_error = true;
                    local.soa = Some((SoaPlace::Authority, soa.clone()));
                    return Answer::Local(local);
                }
            }
        }
        Answer::AliasLoop
    }
}

/// The table, locked for reading.
pub(crate) struct Reading<'a> {
    table: RwLockReadGuard<'a, Table>,
    ready: bool,
}

impl Reading<'_> {
    /// What there is for one lower-case wire name and type; aliases are not followed.
    pub(crate) fn find(&self, wire: &[u8], record_type: RecordType) -> Found<'_> {
        self.table.find(wire, record_type, self.ready)
    }

    /// The addresses of SRV targets that are ours, for the additional section (RFC 2782).
    pub(crate) fn targets<'a>(&'a self, records: &'a Records<'_>) -> Vec<(&'a Name, &'a Data)> {
        self.table.targets(records)
    }
}

/// What the table has for one name and type.
pub(crate) enum Found<'a> {
    Elsewhere,
    NotReady,
    Alias(&'a Name),
    /// Never empty.
    Records(Records<'a>),
    /// The SOA itself, or that the name exists without such records.
    Soa(SoaPlace, &'a Soa),
    NoName(&'a Soa),
}

/// The records of one name and type.
pub(crate) enum Records<'a> {
    Listed(&'a Entry, RecordType),
    /// Worked out from the name of a pod.
    Pod(Data),
}

impl Records<'_> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Data> {
        let (listed, pod) = match self {
            Self::Listed(entry, record_type) => (Some(entry.of_type(*record_type)), None),
            Self::Pod(data) => (None, Some(data)),
        };
        listed.into_iter().flatten().chain(pod)
    }

    /// Beginning at another one with every turn, so that clients that take the first spread.
    pub(crate) fn rotated(&self, turn: usize) -> impl Iterator<Item = &Data> {
        let first = turn % self.iter().count().max(1);
        self.iter().skip(first).chain(self.iter().take(first))
    }
}

impl Table {
    fn set_zones(&mut self, zones: Option<Zones>) {
        *self = Self { pods: std::mem::take(&mut self.pods), ..Self::default() };
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
        let domain = self.zones.as_ref()?.domain.wire();
        if suffixes(wire).any(|suffix| suffix == domain.as_ref()) {
            return self.apexes.get(domain);
        }
        suffixes(wire).find_map(|suffix| self.apexes.get(suffix))
    }

    fn set(&mut self, wire: &Arc<[u8]>, key: &Arc<GroupKey>, records: &Arc<[Data]>) {
        if !self.names.contains_key(wire) {
            self.adopt_by_parent(wire);
        }
        let entry = self.names.entry(wire.clone()).or_default();
        match entry.contributions.binary_search_by(|(other, _)| other.cmp(key)) {
            Ok(at) => entry.contributions[at].1 = records.clone(),
            Err(at) => {
                // Almost always the only one: no room for others is kept.
                entry.contributions.reserve_exact(1);
                entry.contributions.insert(at, (key.clone(), records.clone()));
            }
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

    fn find(&self, wire: &[u8], record_type: RecordType, ready: bool) -> Found<'_> {
        let zone = self.zone_of(wire);
        if !ready && zone.is_some() {
            return Found::NotReady;
        }
        let entry = self.names.get(wire);
        let of_type = |entry: &&Entry| entry.of_type(record_type).next().is_some();
        let listed = entry.filter(of_type).map(|entry| Records::Listed(entry, record_type));
        let Some(soa) = zone else { return listed.map_or(Found::Elsewhere, Found::Records) };
        let records = match entry {
            Some(entry) => match entry.alias() {
                Some(target) if !matches!(record_type, RecordType::CNAME | RecordType::ANY) => {
                    return Found::Alias(target);
                }
                _ => listed,
            },
            None => match self.pod_address(wire).map(Data::from) {
                Some(data) => asks_for(record_type, &data).then_some(Records::Pod(data)),
                None => return Found::NoName(soa),
            },
        };
        if let Some(records) = records {
            return Found::Records(records);
        }
        let of_apex = record_type == RecordType::SOA && soa.apex.wire().as_ref() == wire;
        Found::Soa(if of_apex { SoaPlace::Answer } else { SoaPlace::Authority }, soa)
    }

    /// `1-2-3-4.<ns>.pod.<zone>` of an existing Namespace, as far as `pods` has it.
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
        let address = dashed_address(std::str::from_utf8(first_label(wire)?).ok()?)?;
        self.pods.has(address, first_label(namespace)?).then_some(address)
    }

    fn targets<'a>(&'a self, records: &'a Records<'_>) -> Vec<(&'a Name, &'a Data)> {
        let targets: BTreeSet<&Name> = records
            .iter()
            .filter_map(|data| if let Data::Srv(srv) = data { Some(&srv.target) } else { None })
            .collect();
        let known = targets.into_iter().filter_map(|target| Some((target, self.names.get(target.wire())?)));
        let addresses = known.flat_map(|(target, entry)| {
            let of_both = entry.of_type(RecordType::A).chain(entry.of_type(RecordType::AAAA));
            of_both.map(move |data| (target, data))
        });
        addresses.collect()
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

    fn of_type(&self, record_type: RecordType) -> impl Iterator<Item = &Data> {
        self.records().filter(move |data| asks_for(record_type, data))
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
