//! The elements of one group: a few, side by side and in order, since a big cluster has tens of thousands of groups.

use super::{Datum, Element, ElementData};

/// Data by key, in the order of the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements(Vec<Stored>);

type Stored = (Box<[Datum]>, ElementData);

impl Elements {
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Element<'_>> {
        self.0.iter().map(|(key, data)| (&**key, data))
    }

    pub fn keys(&self) -> impl Iterator<Item = &[Datum]> {
        self.iter().map(|(key, _)| key)
    }

    pub fn get(&self, key: &[Datum]) -> Option<&ElementData> {
        Some(&self.0[self.place(key).ok()?].1)
    }

    pub fn contains_key(&self, key: &[Datum]) -> bool {
        self.place(key).is_ok()
    }

    /// Returns what the key had before.
    pub fn insert(&mut self, key: impl Into<Box<[Datum]>>, data: ElementData) -> Option<ElementData> {
        let key = key.into();
        match self.place(&key) {
            Ok(place) => Some(std::mem::replace(&mut self.0[place].1, data)),
            Err(place) => {
                self.0.insert(place, (key, data));
                None
            }
        }
    }

    /// Returns what the key had.
    pub fn remove(&mut self, key: &[Datum]) -> Option<ElementData> {
        self.place(key).ok().map(|place| self.0.remove(place).1)
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&[Datum], &ElementData) -> bool) {
        self.0.retain(|(key, data)| keep(key, data));
    }

    /// Gives back the room for further elements.
    #[must_use]
    pub fn shrunk(mut self) -> Self {
        self.0.shrink_to_fit();
        self
    }

    fn place(&self, key: &[Datum]) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, _)| (**known).cmp(key))
    }
}

/// Of one key the last counts.
impl<K: Into<Box<[Datum]>>> FromIterator<(K, ElementData)> for Elements {
    fn from_iter<T: IntoIterator<Item = (K, ElementData)>>(elements: T) -> Self {
        let mut all: Vec<Stored> = elements.into_iter().map(|(key, data)| (key.into(), data)).collect();
        all.reverse();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.dedup_by(|(later, _), (first, _)| later == first);
        Self(all).shrunk()
    }
}

impl<K: Into<Box<[Datum]>>, const N: usize> From<[(K, ElementData); N]> for Elements {
    fn from(elements: [(K, ElementData); N]) -> Self {
        elements.into_iter().collect()
    }
}

impl IntoIterator for Elements {
    type Item = (Vec<Datum>, ElementData);
    type IntoIter = std::iter::Map<std::vec::IntoIter<Stored>, fn(Stored) -> Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter().map(|(key, data)| (key.into_vec(), data))
    }
}

impl<K: Into<Box<[Datum]>>> Extend<(K, ElementData)> for Elements {
    fn extend<T: IntoIterator<Item = (K, ElementData)>>(&mut self, elements: T) {
        elements.into_iter().for_each(|(key, data)| drop(self.insert(key, data)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_one_key_the_last_counts_and_the_order_is_that_of_the_keys() {
        let key = |number| vec![Datum::Index(number)];
        let data = |port| ElementData::AddressAndPort([192, 0, 2, 1].into(), port);
        let mut elements: Elements = [(key(2), data(1)), (key(1), data(2)), (key(2), data(3))].into();
        let listed = |elements: &Elements| -> Vec<(Vec<Datum>, ElementData)> {
            elements.iter().map(|(key, data)| (key.to_vec(), data.clone())).collect()
        };
        assert_eq!(listed(&elements), [(key(1), data(2)), (key(2), data(3))]);
        elements.insert(key(0), data(4));
        elements.insert(key(1), data(5));
        elements.remove(&key(2));
        elements.remove(&key(7));
        assert_eq!(listed(&elements), [(key(0), data(4)), (key(1), data(5))]);
        assert_eq!((elements.get(&key(1)), elements.get(&key(2))), (Some(&data(5)), None));
        elements.retain(|_, it| *it == data(4));
        assert_eq!(listed(&elements), [(key(0), data(4))]);
    }
}
