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
//! 2.2.2): every node counts its direct children that exist. `tree` holds the names and `contributions` their records, both
//! as octets: a name with its records takes some fifty.

mod contributions;
mod pages;
mod tree;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hickory_proto::rr::RecordType;
use tokio::sync::Notify;

use crate::answer::{Answer, Local, MAX_ALIASES, Question, Soa, SoaPlace};
use crate::diff::{Change, changed_groups};
use crate::name::{LabelStarts, Name, first_label, parent};
use crate::zone::{Data, DnsPlan, Group, GroupKey, Groups, PodAddresses, Srv, Zones};

pub(crate) use contributions::DataRef;
use contributions::GroupNumbers;
pub(crate) use tree::NameRef;
use tree::{Id, ROOT, Tree};

/// The source of a name of ours that comes from no object: one between others, or one that is not there.
pub(crate) const NO_OBJECT: &str = "names of the cluster";

/// Holds what is answered. Cheap to share; the tables are behind one lock.
#[derive(Default)]
pub struct Store {
    table: RwLock<Table>,
    /// A whole plan has been written.
    ready: AtomicBool,
    became_ready: Notify,
}

#[derive(Default)]
struct Table {
    zones: Option<Zones>,
    /// The apex of the cluster domain.
    domain: Option<Id>,
    /// Of `zones`.
    apexes: BTreeMap<Id, Soa>,
    tree: Tree,
    groups: GroupNumbers,
    /// Names that exist.
    count: usize,
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

/// Table and lock stay usable after a panic elsewhere: every write leaves a whole entry behind.
impl Store {
    /// Knows its zones but nothing in them yet: answers [`Answer::NotReady`] there.
    pub fn new(zones: Option<Zones>) -> Self {
        let store = Self::default();
        *store.write_lock() = Table::of(zones);
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
        let place = table.place(name.wire());
        place.zone?;
        let contributions = place.node.map(|id| contributions::contributions(table.tree.content(id)));
        let keys = contributions.into_iter().flatten().filter_map(|(number, _)| table.groups.key(number));
        let keys: Vec<String> = keys.map(|key| key.to_string()).collect();
        Some(if keys.is_empty() { NO_OBJECT.to_owned() } else { keys.join(", ") })
    }

    /// Names that exist, empty non-terminals included.
    pub fn len(&self) -> usize {
        self.read_lock().count
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

    /// Brings the table from `old` (what the caller wrote last) to `plan`. Returns the changed groups. New and changed names
    /// come first, so that a name that moves between groups is never missing.
    pub fn write(&self, old: &Groups, plan: &DnsPlan) -> Vec<Written> {
        if self.read_lock().zones != plan.zones {
            return self.write_anew(plan);
        }
        let changes = changed_groups(old, &plan.groups);
        let written = |change: &Change<'_>| Written {
            key: change.key.clone(),
            written: self.write_names(change),
            removed: 0,
        };
        let mut all: Vec<Written> = changes.iter().map(written).collect();
        for (change, written) in changes.iter().zip(&mut all) {
            written.removed = self.remove_names(change);
        }
        self.become_ready();
        all.retain(|written| (written.written, written.removed) != (0, 0));
        all
    }

    /// With other zones. The names of before are answered until all of now are there.
    fn write_anew(&self, plan: &DnsPlan) -> Vec<Written> {
        let anew = Self::new(plan.zones.clone());
        let written = anew.write(&Groups::new(), plan);
        let mut table = anew.table.into_inner().unwrap_or_else(PoisonError::into_inner);
        let before = {
            let mut own = self.write_lock();
            table.pods = std::mem::take(&mut own.pods);
            std::mem::replace(&mut *own, table)
        };
        // A hundred thousand names take their time to go.
        drop(before);
        self.become_ready();
        written
    }

    fn become_ready(&self) {
        self.ready.store(true, Ordering::Release);
        self.became_ready.notify_waiters();
    }

    fn write_names(&self, change: &Change<'_>) -> usize {
        let known: BTreeMap<Name, Vec<Data>> = names(change.before).collect();
        let changed = names(change.after).filter(|(name, records)| known.get(name) != Some(records));
        let mut changed: Vec<(Name, Vec<Data>)> = changed.collect();
        // Names that others name come before these, so that they get their place with their records.
        changed.sort_by_key(|(_, records)| records.iter().any(|data| data.name().is_some()));
        changed
            .into_iter()
            .map(|(name, records)| self.write_lock().set(name.wire(), change.key, &records))
            .count()
    }

    fn remove_names(&self, change: &Change<'_>) -> usize {
        if change.before.is_none() {
            return 0;
        }
        let staying: BTreeSet<Name> = names(change.after).map(|(name, _)| name).collect();
        let gone = names(change.before).filter(|(name, _)| !staying.contains(name));
        let count = gone.map(|(name, _)| self.write_lock().unset(name.wire(), change.key)).count();
        if change.after.is_none() {
            self.write_lock().groups.forget(change.key);
        }
        count
    }

    /// The table as it is now: writers wait until it is dropped.
    pub(crate) fn read(&self) -> Reading<'_> {
        let table = self.read_lock();
        let outside_all = Place { node: None, zone: None };
        Reading { ready: self.is_ready(), table, last_parent: RefCell::new((Vec::new(), outside_all)) }
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
                    let target = target.to_name();
                    local.records.push((name, Data::Cname(target.clone())));
                    name = target;
                }
                Found::Records(records) => {
                    let targets = reading.targets(&records).into_iter();
                    local
                        .additionals
                        .extend(targets.map(|(target, data)| (target.to_name(), data.to_data())));
                    local.records.extend(records.rotated(turn).map(|data| (name.clone(), data.to_data())));
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

/// A group some of whose names changed.
#[derive(Debug)]
pub struct Written {
    key: Arc<GroupKey>,
    written: usize,
    removed: usize,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.written, self.removed) {
            (written, 0) => write!(f, "{}: {written} names", self.key),
            (0, removed) => write!(f, "{}: {removed} names gone", self.key),
            (written, removed) => write!(f, "{}: {written} names, {removed} gone", self.key),
        }
    }
}

/// The table, locked for reading.
pub(crate) struct Reading<'a> {
    table: RwLockReadGuard<'a, Table>,
    ready: bool,
    /// The parent of the name that was looked for last, and where it stands: the next is often another name of its Namespace.
    last_parent: RefCell<(Vec<u8>, Place)>,
}

impl Reading<'_> {
    /// What there is for one lower-case wire name and type; aliases are not followed.
    pub(crate) fn find(&self, wire: &[u8], record_type: RecordType) -> Found<'_> {
        self.table.find(self.place(wire), wire, record_type, self.ready)
    }

    fn place(&self, wire: &[u8]) -> Place {
        let Some((label, parent)) = first_label(wire).zip(parent(wire)) else {
            return self.table.place(wire);
        };
        let (last, place) = &mut *self.last_parent.borrow_mut();
        if last != parent {
            *place = self.table.place(parent);
            last.clear();
            last.extend_from_slice(parent);
        }
        self.table.below(*place, label)
    }

    /// The addresses of SRV targets that are ours, for the additional section (RFC 2782).
    pub(crate) fn targets<'a>(&'a self, records: &Records<'a>) -> Vec<(NameRef<'a>, DataRef<'a>)> {
        self.table.targets(records)
    }
}

/// The names of a group, if there is one.
fn names(group: Option<&Arc<Group>>) -> impl Iterator<Item = (Name, Vec<Data>)> {
    group.into_iter().flat_map(|group| group.names())
}

/// What the table has for one name and type.
pub(crate) enum Found<'a> {
    Elsewhere,
    NotReady,
    Alias(NameRef<'a>),
    /// Never empty.
    Records(Records<'a>),
    /// The SOA itself, or that the name exists without such records.
    Soa(SoaPlace, &'a Soa),
    NoName(&'a Soa),
}

/// The records of one name and type.
pub(crate) enum Records<'a> {
    /// So many of the name's records.
    Listed(NameRef<'a>, RecordType, usize),
    /// Worked out from the name of a pod.
    Pod(IpAddr),
}

impl<'a> Records<'a> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = DataRef<'a>> + use<'a> {
        let (listed, pod) = match *self {
            Self::Listed(name, record_type, _) => (Some(of_type(name, record_type)), None),
            Self::Pod(address) => (None, Some(Data::from(address))),
        };
        listed.into_iter().flatten().chain(pod)
    }

    /// Beginning at another one with every turn, so that clients that take the first spread.
    pub(crate) fn rotated(&self, turn: usize) -> impl Iterator<Item = DataRef<'a>> + use<'a> {
        let first = match self {
            Self::Listed(_, _, count) => turn % count.max(&1),
            Self::Pod(_) => 0,
        };
        self.iter().skip(first).chain(self.iter().take(first))
    }
}

fn of_type(name: NameRef<'_>, record_type: RecordType) -> impl Iterator<Item = DataRef<'_>> {
    contributions::records(name.tree, name.id).filter(move |data| asks_for(record_type, data))
}

/// Where a wire name stands.
#[derive(Clone, Copy)]
struct Place {
    /// Of the name itself, when it is known.
    node: Option<Id>,
    /// Apex of the zone of ours that it is in.
    zone: Option<Id>,
}

impl Table {
    /// With nothing but its zones.
    fn of(zones: Option<Zones>) -> Self {
        let mut table = Self::default();
        let Some(zones) = zones else { return table };
        let named = |labels: &[&str]| labels.iter().rev().try_fold(zones.domain.clone(), |n, l| n.child(l));
        if let (Ok(server), Ok(mailbox)) = (named(&["ns", "dns"]), named(&["hostmaster"])) {
            for apex in zones.apexes() {
                let soa = Soa { apex: apex.clone(), server: server.clone(), mailbox: mailbox.clone() };
                let id = table.tree.intern(apex.wire());
                table.tree.link(id);
                table.apexes.insert(id, soa);
                table.count += 1;
            }
        }
        table.domain = table.tree.find(zones.domain.wire());
        table.zones = Some(zones);
        table
    }

    /// Down from the cluster's domain, or else from the root past the apexes of the other zones.
    fn place(&self, wire: &[u8]) -> Place {
        let starts = LabelStarts::of(wire);
        let mut labels = starts.backwards(wire);
        let domain = self.domain.zip(self.zones.as_ref()).map(|(id, zones)| (id, &zones.domain));
        let top = match domain.filter(|(_, domain)| starts.end_with(wire, domain)) {
            Some((id, domain)) => {
                labels.by_ref().take(domain.labels().count()).for_each(drop);
                Place { node: Some(id), zone: Some(id) }
            }
            None => Place { node: Some(ROOT), zone: None },
        };
        labels.fold(top, |place, label| self.below(place, label))
    }

    /// Where the name with one label more stands.
    fn below(&self, place: Place, label: &[u8]) -> Place {
        let node = place.node.and_then(|id| self.tree.child(id, label));
        let apex = || node.filter(|id| self.apexes.contains_key(id));
        Place { node, zone: place.zone.or_else(apex) }
    }

    fn exists(&self, id: Id) -> bool {
        self.tree.children(id) > 0 || !self.tree.content(id).is_empty() || self.apexes.contains_key(&id)
    }

    fn set(&mut self, wire: &[u8], key: &Arc<GroupKey>, records: &[Data]) {
        let number = self.groups.number_or_new(key);
        let tree = &mut self.tree;
        let records = contributions::put_records(records, |name| {
            let id = tree.intern(name);
            tree.link(id);
            id
        });
        let id = self.tree.intern(wire);
        let existed = self.exists(id);
        self.put(id, number, Some(&records));
        if !existed {
            self.appeared(id);
        }
    }

    fn unset(&mut self, wire: &[u8], key: &GroupKey) {
        let (Some(id), Some(number)) = (self.tree.find(wire), self.groups.number(key)) else { return };
        let existed = self.exists(id);
        // Or what goes with the records could take the node along.
        self.tree.link(id);
        self.put(id, number, None);
        if existed && !self.exists(id) {
            self.vanished(id);
        }
        self.tree.unlink(id);
    }

    /// Replaces the records of a group, and lets go of the names in the old ones. The node has content or links.
    fn put(&mut self, id: Id, number: usize, records: Option<&[u8]>) {
        let content = self.tree.content(id);
        let old = contributions::contributions(content).find(|(other, _)| *other == number);
        let named = old.map(|(_, records)| contributions::named(records)).unwrap_or_default();
        let content = contributions::replaced(content, &self.groups, number, records);
        self.tree.set_content(id, &content);
        for target in named {
            self.tree.unlink(target);
        }
    }

    /// Counts a name that was not there with its parent, which is there then too, and so on up to the zone's apex. Names outside our
    /// zones (reverse names of endpoints beyond the cluster's ranges) have no parents.
    fn appeared(&mut self, id: Id) {
        self.count += 1;
        let mut child = id;
        while let Some(parent) = self.counting(child) {
            let existed = self.exists(parent);
            *self.tree.children_mut(parent) += 1;
            if existed {
                return;
            }
            self.count += 1;
            child = parent;
        }
    }

    /// The way back.
    fn vanished(&mut self, id: Id) {
        self.count -= 1;
        let mut child = id;
        while let Some(parent) = self.counting(child) {
            *self.tree.children_mut(parent) -= 1;
            if self.exists(parent) {
                return;
            }
            self.count -= 1;
            child = parent;
        }
    }

    /// The parent that counts this name.
    fn counting(&self, id: Id) -> Option<Id> {
        let above = std::iter::successors(Some(id), |id| self.tree.parent(*id));
        let in_zone = !self.apexes.contains_key(&id) && above.skip(1).any(|id| self.apexes.contains_key(&id));
        self.tree.parent(id).filter(|_| in_zone)
    }

    fn find(&self, place: Place, wire: &[u8], record_type: RecordType, ready: bool) -> Found<'_> {
        let soa = place.zone.and_then(|zone| self.apexes.get(&zone));
        if !ready && soa.is_some() {
            return Found::NotReady;
        }
        let name = place.node.filter(|id| self.exists(*id)).map(|id| NameRef { tree: &self.tree, id });
        let (mut count, mut alias) = (0, None);
        for data in name.into_iter().flat_map(|name| contributions::records(name.tree, name.id)) {
            count += usize::from(asks_for(record_type, &data));
            if let Data::Cname(target) = data {
                alias.get_or_insert(target);
            }
        }
        let listed = name.filter(|_| count > 0).map(|name| Records::Listed(name, record_type, count));
        let Some(soa) = soa else { return listed.map_or(Found::Elsewhere, Found::Records) };
        let records = match name {
            Some(_) => match alias {
                Some(target) if !matches!(record_type, RecordType::CNAME | RecordType::ANY) => {
                    return Found::Alias(target);
                }
                _ => listed,
            },
            None => match self.pod_address(wire) {
                Some(address) => {
                    asks_for(record_type, &Data::<Name>::from(address)).then_some(Records::Pod(address))
                }
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
        let mut known = contributions::contributions(self.tree.content(self.place(namespace).node?));
        let is_namespace =
            |number| matches!(self.groups.key(number).map(Arc::as_ref), Some(GroupKey::Namespace(_)));
        if !known.any(|(number, _)| is_namespace(number)) {
            return None;
        }
        let address = dashed_address(std::str::from_utf8(first_label(wire)?).ok()?)?;
        self.pods.has(address, first_label(namespace)?).then_some(address)
    }

    fn targets<'a>(&'a self, records: &Records<'a>) -> Vec<(NameRef<'a>, DataRef<'a>)> {
        let Records::Listed(_, RecordType::SRV | RecordType::ANY, _) = records else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let targets = records.iter().filter_map(|data| match data {
            Data::Srv(srv) if seen.insert(srv.target.id) => Some(srv.target),
            _ => None,
        });
        let addresses = |target| of_type(target, RecordType::A).chain(of_type(target, RecordType::AAAA));
        targets.flat_map(|target| addresses(target).map(move |data| (target, data))).collect()
    }
}

impl DataRef<'_> {
    /// With names of their own.
    pub(crate) fn to_data(&self) -> Data {
        match self {
            Self::A(address) => Data::A(*address),
            Self::Aaaa(address) => Data::Aaaa(*address),
            Self::Cname(name) => Data::Cname(name.to_name()),
            Self::Ns(name) => Data::Ns(name.to_name()),
            Self::Ptr(name) => Data::Ptr(name.to_name()),
            Self::Srv(srv) => Data::Srv(Srv {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                target: srv.target.to_name(),
            }),
            Self::Txt(text) => Data::Txt(text.clone()),
        }
    }
}

fn asks_for<N>(record_type: RecordType, data: &Data<N>) -> bool {
    record_type == RecordType::ANY || record_type == data.record_type()
}

/// `10-42-0-7` is IPv4, anything else with dashes for colons IPv6.
fn dashed_address(label: &str) -> Option<IpAddr> {
    if label.split('-').count() == 4 && !label.contains("--") {
        return label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}
