//! The planner: a Snapshot in, the table `weft-policy` and the [`Judge`] out. Pure; memoised (decision 16).
//!
//! A pod of this node is planned anew when it, its address or a policy of its namespace is another value than last time;
//! an address is looked at in every set of peers when its bearer is. What several chains need is counted and goes with the
//! last of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::objects::Pod;
use weft_model::policy::NetworkPolicy;
use weft_model::ruleset::{Datum, ElementData, Elements, Groups, Key, Table, Verdict};
use weft_model::snapshot::{Objects, changes};
use weft_model::{ObjectRef, Planned, PolicyKey, Problem, Reason, Snapshot};

use super::directory::{Directory, Place, Subject, part_of};
use super::judge::{Judge, Sides};
use super::layout::{self, SetKey, SubjectSet};
use super::meaning::{Direction, Policies, Side};
use crate::reconcile::{Planner, Users};

/// The whole desired state of the policy engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyPlan {
    pub table: Arc<Table>,
    /// Decides about what is established already.
    pub judge: Arc<Judge>,
    /// From the last good Snapshot of the Store: policies that came after it are missing.
    pub provisional: bool,
}

impl PolicyPlan {
    fn empty(place: Place) -> Self {
        let table = Arc::new(layout::skeleton(&place.own_ingresses, &place.cluster_dns));
        let judge = Judge { directory: Directory::empty(place), subjects: BTreeMap::new() };
        Self { table, judge: Arc::new(judge), provisional: false }
    }
}

/// Plans isolated pods and remembers what it planned.
pub struct PolicyPlanner {
    plan: PolicyPlan,
    policies: Objects<PolicyKey, NetworkPolicy>,
    /// Pods that use each chain, and chains that use each set.
    chains: Users<String>,
    sets: BTreeMap<SetKey, InUse>,
}

struct InUse {
    chains: usize,
    /// Names of its sets of addresses, IPv4 and IPv6, where it has such.
    names: [Option<String>; 2],
}

impl Default for PolicyPlanner {
    fn default() -> Self {
        Self::empty(Place::default())
    }
}

impl Planner for PolicyPlanner {
    type Plan = PolicyPlan;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<PolicyPlan> {
        let place = Place::of(snapshot);
        if self.plan.judge.directory.place != place {
            *self = Self::empty(place);
        }
        let dirty = Arc::make_mut(&mut self.plan.judge).directory.update(snapshot);
        let policies = std::mem::replace(&mut self.policies, snapshot.policies.clone());
        let repoliced: BTreeSet<&str> =
            changes(&policies, &snapshot.policies).map(|(key, ..)| &*key.namespace).collect();
        self.refresh_sets(&dirty);
        for address in self.affected(&dirty, &repoliced) {
            self.place(address);
        }
        self.plan.provisional = snapshot.from_store;
        Planned::new(self.plan.clone(), problems(snapshot))
    }
}

impl PolicyPlanner {
    fn empty(place: Place) -> Self {
        Self {
            plan: PolicyPlan::empty(place),
            policies: Objects::default(),
            chains: Users::default(),
            sets: BTreeMap::new(),
        }
    }

    /// Addresses of pods of this node whose Sides may not be what they were.
    fn affected(&self, dirty: &BTreeSet<IpAddr>, repoliced: &BTreeSet<&str>) -> BTreeSet<IpAddr> {
        let Judge { directory, subjects } = self.plan.judge.as_ref();
        let of_namespace = |address: &IpAddr| match directory.subject(*address) {
            Subject::Known(pod) => repoliced.contains(&*pod.key.namespace),
            Subject::Unknown(Some(namespace)) => repoliced.contains(namespace),
            Subject::Unknown(None) => !repoliced.is_empty(),
            Subject::Nobody => false,
        };
        let attached = directory.attached().filter(|ip| dirty.contains(ip) || of_namespace(ip));
        attached.chain(subjects.keys().copied().filter(|ip| dirty.contains(ip))).collect()
    }

    /// Puts what policies say about one pod's address in place of what they said before.
    fn place(&mut self, address: IpAddr) {
        let judge = &self.plan.judge;
        let old = judge.subjects.get(&address).cloned().unwrap_or_default();
        let subject = judge.directory.subject(address);
        let policies = Policies(&self.policies);
        let side = |direction, known: &Option<Arc<Side>>| {
            let side = Side::of(direction, &subject, &policies).map(Arc::new);
            if side == *known { known.clone() } else { side }
        };
        let new = Sides {
            ingress: side(Direction::Ingress, &old.ingress),
            egress: side(Direction::Egress, &old.egress),
        };
        if old == new {
            return;
        }
        // What is new is counted before what is gone, so that nothing shared is removed and made again.
        for direction in Direction::BOTH {
            let chain = new.side(direction).map(|side| self.use_chain(direction, side, address.is_ipv6()));
            let jump = chain.map(|chain| ElementData::Verdict(Verdict::Jump(chain.into())));
            self.set_subject(SubjectSet::Side(direction), address, jump);
        }
        for direction in Direction::BOTH {
            if let Some(side) = old.side(direction) {
                self.leave_chain(direction, side, address.is_ipv6());
            }
        }
        let isolated = (new != Sides::default()).then_some(ElementData::None);
        self.set_subject(SubjectSet::Itself, address, isolated.clone());
        self.set_subject(SubjectSet::Isolated, address, isolated.clone());
        let subjects = &mut Arc::make_mut(&mut self.plan.judge).subjects;
        match isolated {
            Some(_) => drop(subjects.insert(address, new)),
            None => drop(subjects.remove(&address)),
        }
    }

    /// One address in one of the maps of isolated pods.
    fn set_subject(&mut self, set: SubjectSet, address: IpAddr, data: Option<ElementData>) {
        let table = Arc::make_mut(&mut self.plan.table);
        let Some(set_of) = table.sets.get_mut(&set.name(address.is_ipv6())) else { return };
        let group: Arc<str> = address.to_string().into();
        let Some(data) = data else {
            set_of.groups.remove(&group);
            return;
        };
        let key = vec![Datum::Ip(address); set_of.key.len()];
        let elements = Elements::from([(key, data)]);
        if set_of.groups.get(&group).map(Arc::as_ref) != Some(&elements) {
            set_of.groups.insert(group, Arc::new(elements));
        }
    }

    fn use_chain(&mut self, direction: Direction, side: &Side, ipv6: bool) -> String {
        let name = layout::chain_name(direction, side, ipv6);
        if self.chains.begin(name.clone()) {
            for key in SetKey::of_side(side) {
                self.use_set(key);
            }
            let table = Arc::make_mut(&mut self.plan.table);
            table.chains.insert(name.clone(), layout::chain(direction, side, ipv6));
        }
        name
    }

    fn leave_chain(&mut self, direction: Direction, side: &Side, ipv6: bool) {
        let name = layout::chain_name(direction, side, ipv6);
        if !self.chains.end(&name) {
            return;
        }
        let table = Arc::make_mut(&mut self.plan.table);
        table.chains.remove(&name);
        for key in SetKey::of_side(side) {
            let Some(in_use) = self.sets.get_mut(&key) else { continue };
            in_use.chains -= 1;
            if in_use.chains == 0 {
                self.sets.remove(&key);
                for (name, _) in key.sets(&self.plan.judge.directory) {
                    table.sets.remove(&name);
                }
            }
        }
    }

    /// Makes the sets of a key with all their elements, unless they are there.
    fn use_set(&mut self, key: SetKey) {
        if let Some(in_use) = self.sets.get_mut(&key) {
            in_use.chains += 1;
            return;
        }
        let names = [false, true].map(|ipv6| key.of_addresses(ipv6));
        let directory = &self.plan.judge.directory;
        let table = Arc::make_mut(&mut self.plan.table);
        table.sets.extend(key.sets(directory));
        let mut groups = BTreeMap::<(bool, Arc<str>), Elements>::new();
        for address in key.candidates(directory) {
            let elements = key.elements(address, &directory.bearers(address), directory);
            if !elements.is_empty() {
                groups.entry((address.is_ipv6(), group(address))).or_default().extend(elements);
            }
        }
        for ((ipv6, group), elements) in groups {
            if let Some(set) = names[usize::from(ipv6)].as_ref().and_then(|name| table.sets.get_mut(name)) {
                set.groups.insert(group, Arc::new(elements));
            }
        }
        self.sets.insert(key, InUse { chains: 1, names });
    }

    /// Looks at these addresses in every set of peers.
    fn refresh_sets(&mut self, dirty: &BTreeSet<IpAddr>) {
        if dirty.is_empty() {
            return;
        }
        let directory = &self.plan.judge.directory;
        let table = Arc::make_mut(&mut self.plan.table);
        let bearers: Vec<(IpAddr, Vec<&Arc<Pod>>)> =
            dirty.iter().map(|address| (*address, directory.bearers(*address))).collect();
        for (key, in_use) in &self.sets {
            for (address, bearers) in &bearers {
                let Some(name) = &in_use.names[usize::from(address.is_ipv6())] else { continue };
                let Some(set) = table.sets.get_mut(name) else { continue };
                replace_elements(&mut set.groups, *address, key.elements(*address, bearers, directory));
            }
        }
    }
}

impl Sides {
    fn side(&self, direction: Direction) -> Option<&Side> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// Addresses that stand in one group: few enough for a change to copy them, as many as a node's range mostly holds.
fn group(address: IpAddr) -> Arc<str> {
    part_of(address).to_string().into()
}

/// What stands in a set for one address becomes `elements`; a group in which nothing changes stays the same `Arc`.
fn replace_elements(groups: &mut Groups, address: IpAddr, elements: Elements) {
    let name = group(address);
    let of_address = |key: Key<'_>| key.data().next() == Some(Datum::Ip(address));
    let known = groups.get(&name).into_iter().flat_map(|group| group.iter());
    if known.filter(|(key, _)| of_address(*key)).eq(elements.iter()) {
        return;
    }
    let group = Arc::make_mut(groups.get_or_default(name.clone()));
    group.retain(|key, _| !of_address(key));
    group.extend(elements);
    if group.is_empty() {
        groups.remove(&name);
    }
}

/// What lowering cannot see: it looks at one object at a time.
fn problems(snapshot: &Snapshot) -> Vec<Problem> {
    let orphaned = |key: &&PolicyKey| !snapshot.namespaces.contains_key(&*key.namespace);
    let problem = |key: &PolicyKey| {
        let message = format!(
            "metadata.namespace {} does not exist (any more); the policy selects only pods that are left in it, delete it",
            key.namespace
        );
        let object = ObjectRef::new("NetworkPolicy", &key.namespace, &key.name);
        Problem::new(object, Reason::Missing, message)
    };
    snapshot.policies.keys().filter(orphaned).map(problem).collect()
}
