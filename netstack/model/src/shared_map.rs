//! A sorted map whose copies share what they have in common. In a big cluster every change makes a new map of ten thousand objects
//! out of the one before, which others still look at: the two differ in a page or two, and all else is there once.
//!
//! ```text
//!  one map   [page 0] [page 1] [page 2] ...     a page: up to 63 keys with their values, in order, without room for more
//!  its copy  [page 0] [new   ] [page 2] ...     whoever compares the two passes over the pages that are the same
//! ```
//!
//! As with any [`Arc`], a page that nobody else holds is changed in place.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::ops::{Index, RangeFrom};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::exact;

/// Entries of a page: of 24 or 40 bytes, as most are, they fill a block of the allocator.
const MOST: usize = 63;
/// Two neighbours that have no more than these together become one page.
const FEW: usize = MOST / 2;

type Page<K, V> = Arc<Vec<(K, V)>>;

/// Values by key, in the order of the keys; a copy costs a pointer for each page.
pub struct SharedMap<K, V> {
    /// In order; none is empty.
    pages: Vec<Page<K, V>>,
    len: usize,
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> Self {
        Self { pages: self.pages.clone(), len: self.len }
    }

    /// Of two that share most pages only the others are looked at.
    fn clone_from(&mut self, source: &Self) {
        self.len = source.len;
        self.pages.truncate(source.pages.len());
        for (page, other) in self.pages.iter_mut().zip(&source.pages) {
            if !Arc::ptr_eq(page, other) {
                page.clone_from(other);
            }
        }
        self.pages.extend_from_slice(&source.pages[self.pages.len()..]);
    }
}

impl<K, V> SharedMap<K, V> {
    pub const fn new() -> Self {
        Self { pages: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn clear(&mut self) {
        *self = Self::new();
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> + Clone {
        self.pages.iter().flat_map(|page| page.iter()).map(|(key, value)| (key, value))
    }

    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }

    pub fn first_key_value(&self) -> Option<(&K, &V)> {
        self.iter().next()
    }
}

/// Where a key is, or would be.
struct Place {
    page: usize,
    /// In the page.
    entry: Result<usize, usize>,
}

impl<K: Ord, V> SharedMap<K, V> {
    /// In an empty map page 0, which is not there.
    fn place<Q: Ord + ?Sized>(&self, key: &Q) -> Place
    where
        K: Borrow<Q>,
    {
        let order = |entry: &(K, V)| Borrow::<Q>::borrow(&entry.0).cmp(key);
        let page = self.pages.partition_point(|page| order(&page[0]).is_le()).saturating_sub(1);
        let entries = self.pages.get(page).map_or(&[][..], |page| page);
        Place { page, entry: entries.binary_search_by(order) }
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.get_key_value(key).map(|(_, value)| value)
    }

    pub fn get_key_value<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        let Place { page, entry } = self.place(key);
        let (key, value) = &self.pages.get(page)?[entry.ok()?];
        Some((key, value))
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// From the first key that is not before this one.
    pub fn range<Q: Ord>(&self, from: RangeFrom<Q>) -> impl Iterator<Item = (&K, &V)>
    where
        K: Borrow<Q>,
    {
        let Place { page, entry } = self.place(&from.start);
        let skipped = entry.unwrap_or_else(|place| place);
        let pages = self.pages.get(page..).unwrap_or_default();
        pages.iter().flat_map(|page| page.iter()).skip(skipped).map(|(key, value)| (key, value))
    }

    /// Keys that are in one of the two maps only, and those whose values are not the same by `same`, in order, with the values here
    /// and there. Pages that both share are passed over.
    pub fn differences<'a>(
        &'a self,
        other: &'a Self,
        same: impl Fn(&V, &V) -> bool,
    ) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)> {
        let (mut olds, mut news) = (Cursor::of(self), Cursor::of(other));
        std::iter::from_fn(move || {
            loop {
                olds.pass_over_what_is_shared(&mut news);
                let order = match (olds.peek(), news.peek()) {
                    (None, None) => return None,
                    (Some(_), None) => Ordering::Less,
                    (None, Some(_)) => Ordering::Greater,
                    (Some((old, _)), Some((new, _))) => old.cmp(new),
                };
                let old = if order.is_le() { olds.next() } else { None };
                let new = if order.is_ge() { news.next() } else { None };
                match (old, new) {
                    (Some((_, old)), Some((_, new))) if same(old, new) => {}
                    (Some((key, old)), new) => return Some((key, Some(old), new.map(|(_, new)| new))),
                    (None, Some((key, new))) => return Some((key, None, Some(new))),
                    (None, None) => return None,
                }
            }
        })
    }
}

/// What is left to read of a map.
struct Cursor<'a, K, V> {
    pages: &'a [Page<K, V>],
    /// How much of the first page was read.
    read: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn of(map: &'a SharedMap<K, V>) -> Self {
        Self { pages: &map.pages, read: 0 }
    }

    fn peek(&self) -> Option<&'a (K, V)> {
        self.pages.first()?.get(self.read)
    }

    fn next(&mut self) -> Option<&'a (K, V)> {
        let next = self.peek();
        self.read += 1;
        if self.pages.first().is_some_and(|page| self.read >= page.len()) {
            self.next_page();
        }
        next
    }

    fn next_page(&mut self) {
        self.pages = &self.pages[1..];
        self.read = 0;
    }

    fn pass_over_what_is_shared(&mut self, other: &mut Self) {
        while let ([one, ..], [same, ..], 0, 0) = (self.pages, other.pages, self.read, other.read)
            && Arc::ptr_eq(one, same)
        {
            self.next_page();
            other.next_page();
        }
    }
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// To be changed: where others hold the page it is copied.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let Place { page, entry } = self.place(key);
        let entry = entry.ok()?;
        Some(&mut Arc::make_mut(&mut self.pages[page])[entry].1)
    }

    /// What stands there, or the default, which then stands there.
    pub fn get_or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        let mut place = self.place(&key);
        if let Err(at) = place.entry {
            place = self.insert_at(place.page, at, (key, V::default()));
        }
        let entry = place.entry.unwrap_or_else(|at| at);
        &mut Arc::make_mut(&mut self.pages[place.page])[entry].1
    }

    /// Returns what the key had. A key that is there stays, and the new one is dropped.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self.place(&key) {
            Place { page, entry: Ok(entry) } => {
                let entries = Arc::make_mut(&mut self.pages[page]);
                Some(std::mem::replace(&mut entries[entry].1, value))
            }
            Place { page, entry: Err(entry) } => {
                self.insert_at(page, entry, (key, value));
                None
            }
        }
    }

    /// Returns where it is then.
    fn insert_at(&mut self, page: usize, entry: usize, new: (K, V)) -> Place {
        self.len += 1;
        let last = page + 1 >= self.pages.len();
        let Some(entries) =
            self.pages.get_mut(page).filter(|page| page.len() < MOST || !last || entry < MOST)
        else {
            // What comes in order leaves full pages behind.
            self.pages.push(Arc::new(exact(vec![new])));
            return Place { page: self.pages.len() - 1, entry: Ok(0) };
        };
        let entries = Arc::make_mut(entries);
        if entries.len() < MOST {
            entries.reserve_exact(1);
            entries.insert(entry, new);
            return Place { page, entry: Ok(entry) };
        }
        let half = MOST.div_ceil(2);
        let mut second = entries.split_off(half);
        *entries = exact(std::mem::take(entries));
        let (at, entry, into) = match entry.checked_sub(half) {
            Some(entry) => (page + 1, entry, &mut second),
            None => (page, entry, entries),
        };
        into.reserve_exact(1);
        into.insert(entry, new);
        self.pages.insert(page + 1, Arc::new(second));
        Place { page: at, entry: Ok(entry) }
    }

    /// Returns what the key had.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let Place { page, entry } = self.place(key);
        let entry = entry.ok()?;
        let entries = Arc::make_mut(&mut self.pages[page]);
        let (_, value) = entries.remove(entry);
        self.len -= 1;
        if entries.is_empty() {
            self.pages.remove(page);
        } else {
            self.join_with_next(page);
            self.join_with_next(page.wrapping_sub(1));
        }
        Some(value)
    }

    /// Where the two are small.
    fn join_with_next(&mut self, page: usize) {
        if let Some([one, next]) = self.pages.get(page..page.saturating_add(2))
            && one.len() + next.len() <= FEW
        {
            let both = exact([one.as_slice(), next].concat());
            self.pages.splice(page..page + 2, [Arc::new(both)]);
        }
    }

    /// Keeps the entries of which it says so.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) {
        *self = self
            .iter()
            .filter(|(key, value)| keep(key, value))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
    }

    /// Each to be changed: pages that others hold are copied.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.pages.iter_mut().flat_map(|page| Arc::make_mut(page).iter_mut()).map(|(_, value)| value)
    }
}

/// Of one key the last counts.
impl<K: Ord, V> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(entries: T) -> Self {
        let mut entries: Vec<(K, V)> = entries.into_iter().collect();
        if !entries.is_sorted_by(|(one, _), (other, _)| one < other) {
            entries.reverse();
            entries.sort_by(|(one, _), (other, _)| one.cmp(other));
            entries.dedup_by(|(later, _), (first, _)| later == first);
        }
        let len = entries.len();
        let mut pages = Vec::with_capacity(len.div_ceil(MOST));
        let mut entries = entries.into_iter();
        while entries.len() > 0 {
            pages.push(Arc::new(entries.by_ref().take(MOST).collect()));
        }
        Self { pages, len }
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for SharedMap<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for SharedMap<K, V> {
    fn extend<T: IntoIterator<Item = (K, V)>>(&mut self, entries: T) {
        entries.into_iter().for_each(|(key, value)| drop(self.insert(key, value)));
    }
}

impl<K, Q, V> Index<&Q> for SharedMap<K, V>
where
    K: Ord + Borrow<Q>,
    Q: Ord + ?Sized,
{
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("the key is in the map")
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && {
            let (mut one, mut another) = (Cursor::of(self), Cursor::of(other));
            loop {
                one.pass_over_what_is_shared(&mut another);
                match (one.next(), another.next()) {
                    (None, None) => return true,
                    (one, another) if one != another => return false,
                    _ => {}
                }
            }
        }
    }
}

impl<K: Eq, V: Eq> Eq for SharedMap<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Serialize, V: Serialize> Serialize for SharedMap<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>> Deserialize<'de> for SharedMap<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let entries = std::collections::BTreeMap::<K, V>::deserialize(deserializer)?;
        Ok(entries.into_iter().collect())
    }
}

#[cfg(test)]
mod tests;
