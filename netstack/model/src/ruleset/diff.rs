//! The difference of two tables as operations in the order in which one transaction carries them out.
//!
//! Deletions come before additions, references go before what they refer to, so that no operation meets an object
//! that is still in use (EBUSY), still there (EEXIST) or not there yet (ENOENT). Element groups that are the same
//! `Arc` are skipped; elements of sets with a timeout are run-time state and never part of a difference.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;

use super::{Base, ElementData, Elements, Groups, Key, Rule, Set, SetData, Statement, Table, print};

/// Key and data of one element.
pub type Element<'a> = (Key<'a>, ElementData);

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    AddTable,
    /// Deletes every rule of the chain.
    FlushChain {
        name: &'a str,
    },
    /// Deletes every element of a verdict map that is deleted next: its elements hold chains.
    FlushSet {
        name: &'a str,
    },
    DeleteElements {
        name: &'a str,
        set: &'a Set,
        elements: Vec<Element<'a>>,
    },
    DeleteSet {
        name: &'a str,
    },
    /// The chain has no rules any more and nothing jumps to it.
    DeleteChain {
        name: &'a str,
    },
    AddChain {
        name: &'a str,
        base: Option<Base>,
    },
    AddSet {
        name: &'a str,
        set: &'a Set,
    },
    AddElements {
        name: &'a str,
        set: &'a Set,
        elements: Vec<Element<'a>>,
    },
    /// Appends.
    AddRule {
        chain: &'a str,
        rule: &'a Rule,
    },
}

static ABSENT: Table = Table { name: String::new(), chains: BTreeMap::new(), sets: BTreeMap::new() };

/// Operations that turn `from` into `to`; `None` is a table that does not exist. Empty when there is nothing to do.
pub fn diff<'a>(from: Option<&'a Table>, to: &'a Table) -> Vec<Op<'a>> {
    let mut ops = Vec::new();
    if from.is_none() {
        ops.push(Op::AddTable);
    }
    let from = from.unwrap_or(&ABSENT);
    let rebuilt = Rebuilt::of(from, to);
    let mut added_elements = Vec::new();

    flush_chains(from, to, &rebuilt, &mut ops);
    for (name, old) in &from.sets {
        match to.sets.get(name) {
            Some(new) if !rebuilt.sets.contains(name.as_str()) => {
                changed_elements(old, new).push_onto((name, old, new), &mut ops, &mut added_elements);
            }
            _ if old.data == SetData::Verdict => ops.push(Op::FlushSet { name }),
            _ => {}
        }
    }
    ops.extend(
        from.sets.keys().filter(|name| rebuilt.drops_set(to, name)).map(|name| Op::DeleteSet { name }),
    );
    ops.extend(
        from.chains.keys().filter(|name| rebuilt.drops_chain(to, name)).map(|name| Op::DeleteChain { name }),
    );
    for (name, chain) in &to.chains {
        if !from.chains.contains_key(name) || rebuilt.chains.contains(name.as_str()) {
            ops.push(Op::AddChain { name, base: chain.base });
        }
    }
    for (name, set) in &to.sets {
        if !from.sets.contains_key(name) || rebuilt.sets.contains(name.as_str()) {
            ops.push(Op::AddSet { name, set });
            let elements = once_each(set);
            if set.timeout_millis.is_none() && !elements.is_empty() {
                added_elements.push(Op::AddElements { name, set, elements });
            }
        }
    }
    ops.extend(added_elements);
    for (name, chain) in &to.chains {
        let kept = from.chains.get(name).is_some_and(|old| !rebuilt.rewrites(name, &old.rules, &chain.rules));
        if !kept {
            ops.extend(chain.rules.iter().map(|rule| Op::AddRule { chain: name, rule }));
        }
    }
    ops
}

/// Objects of both tables that cannot be changed in place: they are deleted and added again, with all that refers to
/// them.
struct Rebuilt<'a> {
    chains: BTreeSet<&'a str>,
    sets: BTreeSet<&'a str>,
}

impl<'a> Rebuilt<'a> {
    fn of(from: &'a Table, to: &'a Table) -> Self {
        let chains = from
            .chains
            .iter()
            .filter(|(name, old)| to.chains.get(name.as_str()).is_some_and(|new| new.base != old.base));
        let sets = from
            .sets
            .iter()
            .filter(|(name, old)| to.sets.get(name.as_str()).is_some_and(|new| !old.same_declaration(new)));
        Self {
            chains: chains.map(|(name, _)| name.as_str()).collect(),
            sets: sets.map(|(name, _)| name.as_str()).collect(),
        }
    }

    fn drops_set(&self, to: &Table, name: &str) -> bool {
        !to.sets.contains_key(name) || self.sets.contains(name)
    }

    fn drops_chain(&self, to: &Table, name: &str) -> bool {
        !to.chains.contains_key(name) || self.chains.contains(name)
    }

    /// The rules of this chain, present in both tables, have to be deleted and added again. Nothing can jump to a
    /// chain with a hook, so that no rule or element that stays refers to a chain that is rebuilt.
    fn rewrites(&self, name: &str, old: &[Rule], new: &[Rule]) -> bool {
        let mut statements = old.iter().flat_map(|rule| &rule.statements);
        self.chains.contains(name)
            || old != new
            || (!self.sets.is_empty()
                && statements
                    .any(|statement| statement.set_name().is_some_and(|set| self.sets.contains(set))))
    }
}

fn flush_chains<'a>(from: &'a Table, to: &Table, rebuilt: &Rebuilt<'_>, ops: &mut Vec<Op<'a>>) {
    for (name, old) in &from.chains {
        let rewritten = to.chains.get(name).is_none_or(|new| rebuilt.rewrites(name, &old.rules, &new.rules));
        if rewritten && !old.rules.is_empty() {
            ops.push(Op::FlushChain { name });
        }
    }
}

/// The difference of the elements of one set.
#[derive(Default)]
struct ElementChange<'a> {
    removed: BTreeMap<Key<'a>, ElementData>,
    added: BTreeMap<Key<'a>, ElementData>,
}

impl<'a> ElementChange<'a> {
    /// Deletions go to the operations at once, additions when the chains they lead to are there.
    fn push_onto(
        self,
        (name, old, new): (&'a str, &'a Set, &'a Set),
        now: &mut Vec<Op<'a>>,
        later: &mut Vec<Op<'a>>,
    ) {
        if !self.removed.is_empty() {
            let elements = self.removed.into_iter().collect();
            now.push(Op::DeleteElements { name, set: old, elements });
        }
        if !self.added.is_empty() {
            let elements = self.added.into_iter().collect();
            later.push(Op::AddElements { name, set: new, elements });
        }
    }
}

/// What is only in `old` and what is only in `new`; an element that moved between groups is in neither.
fn changed_elements<'a>(old: &'a Set, new: &'a Set) -> ElementChange<'a> {
    static NONE: Elements = Elements::new();
    let mut change = ElementChange::default();
    if new.timeout_millis.is_some() {
        return change;
    }
    for (_, before, after) in old.groups.differences(&new.groups, Arc::ptr_eq) {
        let before = before.map_or(&NONE, |group| group.as_ref());
        let after = after.map_or(&NONE, |group| group.as_ref());
        change.removed.extend(missing(before, after));
        change.added.extend(missing(after, before));
    }
    let added = &mut change.added;
    change.removed.retain(|key, data| {
        let moved = added.get(key) == Some(&*data);
        if moved {
            added.remove(key);
        }
        !moved
    });
    change
}

/// Were one key in two groups, the kernel would refuse the whole transaction; so the last one wins.
fn once_each(set: &Set) -> Vec<Element<'_>> {
    let elements: Vec<Element<'_>> = set.elements().collect();
    let mut seen = HashSet::with_capacity(elements.len());
    if elements.iter().all(|(key, _)| seen.insert(*key)) {
        return elements;
    }
    elements.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect()
}

/// Elements of `these` that `those` has not, or has with other data.
fn missing<'a>(these: &'a Elements, those: &'a Elements) -> impl Iterator<Item = Element<'a>> {
    let mut those = those.iter().peekable();
    these.iter().filter(move |one| {
        while those.next_if(|other| other.0 < one.0).is_some() {}
        those.peek() != Some(one)
    })
}

impl Table {
    /// Becomes `other`, with the room that sets have which stay: what a shadow of the kernel does after a commit. It shares the groups.
    pub fn catch_up(&mut self, other: &Self) {
        self.name.clone_from(&other.name);
        if self.chains != other.chains {
            self.chains.clone_from(&other.chains);
        }
        self.sets.retain(|name, set| other.sets.get(name).is_some_and(|new| set.same_declaration(new)));
        for (name, new) in &other.sets {
            match self.sets.get_mut(name) {
                Some(set) => set.groups.clone_from(&new.groups),
                None => drop(self.sets.insert(name.clone(), new.clone())),
            }
        }
    }
}

impl Set {
    /// The set without its elements.
    #[must_use]
    pub fn declaration(&self) -> Self {
        Self { groups: Groups::new(), key: self.key.clone(), ..*self }
    }

    /// Equal in all but the elements; `other` is what is planned. Room need only be enough.
    pub fn same_declaration(&self, other: &Self) -> bool {
        self.key == other.key
            && self.data == other.data
            && self.interval == other.interval
            && self.timeout_millis == other.timeout_millis
            && self.dynamic_size == other.dynamic_size
            && self.has_room_of(other)
    }

    /// What `other` holds fits in, without wasting much: half of its room is free. A set that grows as it has to stays as it is.
    fn has_room_of(&self, other: &Self) -> bool {
        match (self.room, other.room) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(room), Some(other)) => (other / 2..=other.saturating_mul(8)).contains(&room),
        }
    }
}

impl Statement {
    /// Name of the set or map the statement looks something up in.
    pub fn set_name(&self) -> Option<&str> {
        match self {
            Self::Lookup { set, .. } => Some(set),
            Self::VerdictMap { map, .. } | Self::DnatMap { map, .. } | Self::Update { map, .. } => Some(map),
            _ => None,
        }
    }
}

/// `add chain lb-5`; elements are named when there is one, else counted.
impl fmt::Display for Op<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddTable => f.write_str("add table"),
            Self::FlushChain { name } => write!(f, "flush chain {name}"),
            Self::FlushSet { name } => write!(f, "flush set {name}"),
            Self::DeleteSet { name } => write!(f, "delete set {name}"),
            Self::DeleteChain { name } => write!(f, "delete chain {name}"),
            Self::AddChain { name, .. } => write!(f, "add chain {name}"),
            Self::AddSet { name, .. } => write!(f, "add set {name}"),
            Self::AddRule { chain, rule } => write!(f, "add rule {chain} {rule}"),
            Self::DeleteElements { name, elements, .. } => elements_line(f, "delete", name, elements),
            Self::AddElements { name, elements, .. } => elements_line(f, "add", name, elements),
        }
    }
}

fn elements_line(
    f: &mut fmt::Formatter<'_>,
    verb: &str,
    name: &str,
    elements: &[Element<'_>],
) -> fmt::Result {
    match elements {
        [(key, data)] => write!(f, "{verb} element {name} {{ {} }}", print::ElementText(*key, data)),
        many => write!(f, "{verb} {} elements of {name}", many.len()),
    }
}
