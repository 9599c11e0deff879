//! Names as a tree of labels: every name stands once, in a few octets, whoever mentions it.
//!
//! ```text
//!  node = parent, children that exist, links, place of its octets     (16 octets)
//!  octets of a node = label, content
//!  index: parent and label -> node
//! ```
//!
//! A node is there as long as something links to it (a node below, a record that names it) or it has content; whether
//! its name exists in the DNS is for `store` to say. Octets that nobody needs any more are left where they are until they
//! are a quarter of all, then the others are written anew. Nodes and octets stand in `pages`, so that growing copies
//! nothing and leaves no holes behind.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use hashbrown::HashTable;

use super::pages::{Nodes, Pages};
use crate::name::{LabelStarts, Name};
use crate::octets::{Octets, put_counted};

/// Unneeded octets that are not worth the writing.
const SLACK_BYTES: usize = 64 * 1024;

/// A node. Valid as long as the node is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id(u32);

impl Id {
    pub(super) fn put(self, octets: &mut Vec<u8>) {
        octets.extend_from_slice(&self.0.to_be_bytes());
    }

    pub(super) fn take(octets: &mut Octets<'_>) -> Option<Self> {
        octets.array().map(|number| Self(u32::from_be_bytes(number)))
    }
}

/// The root of all names.
pub(crate) const ROOT: Id = Id(0);

pub(super) struct Tree {
    nodes: Nodes<Node>,
    /// Places in `nodes` that are free.
    free: Vec<Id>,
    index: HashTable<Id>,
    /// Keyed: pods choose the names that are looked up.
    hasher: RandomState,
    octets: Pages,
    unneeded: usize,
}

#[derive(Clone, Copy)]
struct Node {
    /// Of the root: itself.
    parent: Id,
    at: u32,
    /// Nodes directly below whose names exist.
    children: u32,
    /// Nodes directly below, and records that name this one.
    links: u32,
}

impl Default for Tree {
    fn default() -> Self {
        let mut tree = Self {
            nodes: Nodes::default(),
            free: Vec::new(),
            index: HashTable::new(),
            hasher: RandomState::new(),
            octets: Pages::default(),
            unneeded: 0,
        };
        let root = tree.add(ROOT, &[]);
        debug_assert_eq!(root, ROOT);
        tree
    }
}

impl Tree {
    fn node(&self, id: Id) -> &Node {
        self.nodes.at(id.0)
    }

    fn node_mut(&mut self, id: Id) -> &mut Node {
        self.nodes.at_mut(id.0)
    }

    /// Label, then content.
    fn parts(&self, id: Id) -> (&[u8], &[u8]) {
        let mut left = Octets(self.octets.from(self.node(id).at));
        let label = left.counted().unwrap_or_default();
        (label, left.counted().unwrap_or_default())
    }

    pub(super) fn label(&self, id: Id) -> &[u8] {
        Octets(self.octets.from(self.node(id).at)).counted().unwrap_or_default()
    }

    pub(super) fn content(&self, id: Id) -> &[u8] {
        self.parts(id).1
    }

    /// `None` for the root.
    pub(super) fn parent(&self, id: Id) -> Option<Id> {
        (id != ROOT).then(|| self.node(id).parent)
    }

    pub(super) fn children(&self, id: Id) -> u32 {
        self.node(id).children
    }

    pub(super) fn children_mut(&mut self, id: Id) -> &mut u32 {
        &mut self.node_mut(id).children
    }

    fn hash(&self, parent: Id, label: &[u8]) -> u64 {
        self.hasher.hash_one((parent.0, label))
    }

    /// The node directly below with this label.
    pub(super) fn child(&self, parent: Id, label: &[u8]) -> Option<Id> {
        let is_it = |id: &Id| self.node(*id).parent == parent && self.label(*id) == label;
        self.index.find(self.hash(parent, label), is_it).copied()
    }

    /// The node of a lower-case wire name.
    pub(super) fn find(&self, wire: &[u8]) -> Option<Id> {
        LabelStarts::of(wire).backwards(wire).try_fold(ROOT, |id, label| self.child(id, label))
    }

    /// The node of a lower-case wire name, made with all above it when it is not there. It goes again with the next
    /// [`Tree::unlink`] unless it is linked or given content.
    pub(super) fn intern(&mut self, wire: &[u8]) -> Id {
        let below = |id, label: &[u8]| self.child(id, label).unwrap_or_else(|| self.add(id, label));
        LabelStarts::of(wire).backwards(wire).fold(ROOT, below)
    }

    fn add(&mut self, parent: Id, label: &[u8]) -> Id {
        let at = self.append(label, &[]);
        let node = Node { parent, at, children: 0, links: 0 };
        let id = match self.free.pop() {
            Some(id) => {
                *self.node_mut(id) = node;
                id
            }
            None => Id(self.nodes.push(node)),
        };
        if id != ROOT {
            self.link(parent);
            let hash = self.hash(parent, label);
            let Self { index, nodes, octets, hasher, .. } = self;
            index.insert_unique(hash, id, |id| {
                let node = nodes.at(id.0);
                let label = Octets(octets.from(node.at)).counted();
                hasher.hash_one((node.parent.0, label.unwrap_or_default()))
            });
        }
        id
    }

    /// Something names this node from now on.
    pub(super) fn link(&mut self, id: Id) {
        self.node_mut(id).links += 1;
    }

    /// One fewer names it.
    pub(super) fn unlink(&mut self, id: Id) {
        self.node_mut(id).links -= 1;
        self.release(id);
    }

    /// Takes away what nothing links to and what has no content, upwards.
    pub(super) fn release(&mut self, mut id: Id) {
        while let Some(parent) = self.parent(id) {
            if self.node(id).links > 0 || !self.content(id).is_empty() {
                return;
            }
            let hash = self.hash(parent, self.label(id));
            if let Ok(entry) = self.index.find_entry(hash, |other| *other == id) {
                entry.remove();
            }
            self.unneeded += self.size(id);
            self.free.push(id);
            self.node_mut(parent).links -= 1;
            id = parent;
        }
    }

    pub(super) fn set_content(&mut self, id: Id, content: &[u8]) {
        let label = self.label(id).to_vec();
        let (at, size) = (self.node(id).at, self.size(id));
        if !self.octets.take_back(at, size) {
            self.unneeded += size;
        }
        self.node_mut(id).at = self.append(&label, content);
        if self.unneeded > self.octets.len() / 4 + SLACK_BYTES {
            self.write_anew();
        }
    }

    fn append(&mut self, label: &[u8], content: &[u8]) -> u32 {
        let mut octets = Vec::with_capacity(label.len() + content.len() + 4);
        put_counted(&mut octets, label);
        put_counted(&mut octets, content);
        self.octets.push(&octets)
    }

    /// Octets that a node takes.
    fn size(&self, id: Id) -> usize {
        whole(self.octets.from(self.node(id).at)).len()
    }

    /// Page after page, each given back once nothing on it is needed.
    fn write_anew(&mut self) {
        let free: BTreeSet<Id> = self.free.iter().copied().collect();
        let mut ids: Vec<Id> = (0..self.nodes.len()).map(Id).filter(|id| !free.contains(id)).collect();
        ids.sort_unstable_by_key(|id| self.node(*id).at);
        let mut before = std::mem::take(&mut self.octets);
        for id in ids {
            let at = self.node(id).at;
            before.give_back_before(at);
            self.node_mut(id).at = self.octets.push(whole(before.from(at)));
        }
        self.unneeded = 0;
    }
}

/// The octets of one node at the beginning of these.
fn whole(octets: &[u8]) -> &[u8] {
    let mut left = Octets(octets);
    let _ = (left.counted(), left.counted());
    &octets[..octets.len() - left.0.len()]
}

/// A name in the table.
#[derive(Clone, Copy)]
pub(crate) struct NameRef<'a> {
    pub(super) tree: &'a Tree,
    pub(super) id: Id,
}

impl NameRef<'_> {
    /// Appends the name in wire format.
    pub(crate) fn put(self, octets: &mut Vec<u8>) {
        let mut id = self.id;
        while let Some(parent) = self.tree.parent(id) {
            let label = self.tree.label(id);
            // A label has at most 63 octets.
            octets.push(label.len() as u8);
            octets.extend_from_slice(label);
            id = parent;
        }
        octets.push(0);
    }

    pub(crate) fn to_name(self) -> Name {
        let mut wire = Vec::with_capacity(64);
        self.put(&mut wire);
        Name::from_wire(&wire).unwrap_or_else(Name::root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn text(tree: &Tree, id: Id) -> String {
        NameRef { tree, id }.to_name().to_string()
    }

    #[test]
    fn a_name_is_one_node_below_its_parent_and_comes_back() {
        let mut tree = Tree::default();
        let id = tree.intern(wire("a.b.c").wire());
        assert_eq!(tree.intern(wire("a.b.c").wire()), id);
        assert_eq!(text(&tree, id), "a.b.c.");
        assert_eq!(tree.find(wire("b.c").wire()), tree.parent(id));
        assert_eq!(tree.find(wire("x.b.c").wire()), None);
        assert_eq!(tree.find(wire(".").wire()), Some(ROOT));
    }

    #[test]
    fn what_nothing_needs_goes_and_its_place_is_used_again() {
        let mut tree = Tree::default();
        let kept = tree.intern(wire("b.c").wire());
        tree.set_content(kept, b"content");
        let named = tree.intern(wire("x.a.b.c").wire());
        tree.link(named);
        let places = tree.nodes.len();
        tree.unlink(named);
        assert_eq!(tree.find(wire("a.b.c").wire()), None);
        assert_eq!((tree.find(wire("b.c").wire()), tree.content(kept)), (Some(kept), &b"content"[..]));
        tree.intern(wire("y.z.b.c").wire());
        assert_eq!(tree.nodes.len(), places);
        tree.set_content(kept, b"");
        tree.release(kept);
        assert_eq!(tree.find(wire("b.c").wire()), Some(kept), "it has names below");
    }

    #[test]
    fn octets_of_many_changes_do_not_add_up() {
        let mut tree = Tree::default();
        let ids: Vec<Id> = (0..1000).map(|n| tree.intern(wire(&format!("name-{n}.c")).wire())).collect();
        for round in 0..500_u32 {
            for id in &ids {
                tree.set_content(*id, &round.to_be_bytes());
            }
        }
        assert!(tree.octets.len() < 4 * SLACK_BYTES, "{}", tree.octets.len());
        assert_eq!(
            (text(&tree, ids[7]), tree.content(ids[7])),
            ("name-7.c.".to_owned(), &499_u32.to_be_bytes()[..])
        );
    }
}
