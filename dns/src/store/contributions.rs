//! What is known of one name, as the octets of its node: records by the group that they come from.
//!
//! ```text
//!  number of the group, octets of its records, record...      for each group, in the order of the groups' keys
//! ```
//!
//! Almost always one. Names in records are nodes of the tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tree::{Id, NameRef, Tree};
use crate::octets::{Octets, put_counted, put_data, put_number};
use crate::zone::{Data, GroupKey};

/// A record's data as the table holds them.
pub(crate) type DataRef<'a> = Data<NameRef<'a>>;

/// Small numbers for the keys of groups.
#[derive(Default)]
pub(super) struct GroupNumbers {
    keys: Vec<Option<Arc<GroupKey>>>,
    free: Vec<usize>,
    numbers: BTreeMap<Arc<GroupKey>, usize>,
}

impl GroupNumbers {
    pub(super) fn key(&self, number: usize) -> Option<&Arc<GroupKey>> {
        self.keys.get(number)?.as_ref()
    }

    pub(super) fn number(&self, key: &GroupKey) -> Option<usize> {
        self.numbers.get(key).copied()
    }

    pub(super) fn number_or_new(&mut self, key: &Arc<GroupKey>) -> usize {
        if let Some(number) = self.number(key) {
            return number;
        }
        let number = self.free.pop().unwrap_or(self.keys.len());
        if number == self.keys.len() {
            self.keys.push(None);
        }
        self.keys[number] = Some(key.clone());
        self.numbers.insert(key.clone(), number);
        number
    }

    /// Of a group that has no names any more.
    pub(super) fn forget(&mut self, key: &GroupKey) {
        if let Some(number) = self.numbers.remove(key) {
            self.keys[number] = None;
            self.free.push(number);
        }
    }
}

/// Numbers of groups with the octets of their records.
pub(super) fn contributions(content: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut left = Octets(content);
    std::iter::from_fn(move || Some((left.number()?, left.counted()?)))
}

/// The content with the records of one group in place of what it had; without them, when there are none to be put there.
pub(super) fn replaced(
    content: &[u8],
    numbers: &GroupNumbers,
    number: usize,
    records: Option<&[u8]>,
) -> Vec<u8> {
    let mut octets = Vec::with_capacity(content.len() + records.map_or(0, |records| records.len() + 4));
    let key = numbers.key(number);
    let others = || contributions(content).filter(|(other, _)| *other != number);
    let put = |octets: &mut Vec<u8>, number, records: &[u8]| {
        put_number(octets, number);
        put_counted(octets, records);
    };
    others()
        .filter(|(other, _)| numbers.key(*other) < key)
        .for_each(|(n, records)| put(&mut octets, n, records));
    if let Some(records) = records {
        put(&mut octets, number, records);
    }
    others()
        .filter(|(other, _)| numbers.key(*other) > key)
        .for_each(|(n, records)| put(&mut octets, n, records));
    octets
}

/// `id_of` gives the node of a name.
pub(super) fn put_records(records: &[Data], mut id_of: impl FnMut(&[u8]) -> Id) -> Vec<u8> {
    let mut octets = Vec::new();
    for data in records {
        put_data(&mut octets, data, |octets, name| id_of(name.wire()).put(octets));
    }
    octets
}

/// The nodes that one group's records name, one for each time.
pub(super) fn named(records: &[u8]) -> Vec<Id> {
    let mut left = Octets(records);
    let mut ids = Vec::new();
    while left.data(|left| Id::take(left).inspect(|id| ids.push(*id))).is_some() {}
    ids
}

/// All records of a node, group by group.
pub(super) fn records(tree: &Tree, id: Id) -> impl Iterator<Item = DataRef<'_>> {
    contributions(tree.content(id)).flat_map(move |(_, records)| {
        let mut left = Octets(records);
        let name = move |left: &mut Octets<'_>| Some(NameRef { tree, id: Id::take(left)? });
        std::iter::from_fn(move || left.data(name))
    })
}
