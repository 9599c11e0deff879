//! The elements of one group: a few, side by side and in order, since a big cluster has tens of thousands of groups.

use super::{Datum, Element, ElementData};

/// Data by key, in the order of the keys, which all have equally many fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    /// One key after the other.
    keys: Vec<Datum>,
    data: Vec<ElementData>,
}

impl Elements {
    pub const fn new() -> Self {
        Self { keys: Vec::new(), data: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Element<'_>> {
        self.keys.chunks_exact(self.fields().max(1)).zip(&self.data)
    }

    pub fn keys(&self) -> impl Iterator<Item = &[Datum]> {
        self.iter().map(|(key, _)| key)
    }

    pub fn get(&self, key: &[Datum]) -> Option<&ElementData> {
        Some(&self.data[self.place(key).ok()?])
    }

    pub fn contains_key(&self, key: &[Datum]) -> bool {
        self.place(key).is_ok()
    }

    /// Returns what the key had before.
    pub fn insert(&mut self, key: Vec<Datum>, data: ElementData) -> Option<ElementData> {
        assert!(self.is_empty() || key.len() == self.fields(), "keys of one set are of one type");
        match self.place(&key) {
            Ok(place) => Some(std::mem::replace(&mut self.data[place], data)),
            Err(place) => {
                let at = place * key.len();
                self.keys.splice(at..at, key);
                self.data.insert(place, data);
                None
            }
        }
    }

    /// Returns what the key had.
    pub fn remove(&mut self, key: &[Datum]) -> Option<ElementData> {
        let place = self.place(key).ok()?;
        let at = place * key.len();
        self.keys.drain(at..at + key.len());
        Some(self.data.remove(place))
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&[Datum], &ElementData) -> bool) {
        let fields = self.fields();
        let kept: Vec<bool> = self.iter().map(|(key, data)| keep(key, data)).collect();
        let mut of_keys = kept.iter().flat_map(|kept| std::iter::repeat_n(*kept, fields));
        self.keys.retain(|_| of_keys.next() == Some(true));
        let mut of_data = kept.iter();
        self.data.retain(|_| of_data.next() == Some(&true));
    }

    /// Gives back the room for further elements.
    #[must_use]
    pub fn shrunk(mut self) -> Self {
        self.keys.shrink_to_fit();
        self.data.shrink_to_fit();
        self
    }

    /// Of a key.
    fn fields(&self) -> usize {
        self.keys.len().checked_div(self.data.len()).unwrap_or(0)
    }

    fn key(&self, place: usize) -> &[Datum] {
        let fields = self.fields();
        &self.keys[place * fields..(place + 1) * fields]
    }

    fn place(&self, key: &[Datum]) -> Result<usize, usize> {
        let place = partition_point(self.len(), |place| self.key(place) < key);
        if place < self.len() && self.key(place) == key { Ok(place) } else { Err(place) }
    }
}

/// Of the numbers below `count` the first for which `is_before` does not hold; it does for all before that one.
fn partition_point(count: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut from, mut to) = (0, count);
    while from < to {
        let middle = from.midpoint(to);
        if is_before(middle) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    from
}

/// Of one key the last counts.
impl FromIterator<(Vec<Datum>, ElementData)> for Elements {
    fn from_iter<T: IntoIterator<Item = (Vec<Datum>, ElementData)>>(elements: T) -> Self {
        let mut all: Vec<(Vec<Datum>, ElementData)> = elements.into_iter().collect();
        all.reverse();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.dedup_by(|(later, _), (first, _)| later == first);
        let mut elements = Self::new();
        elements.extend(all);
        elements.shrunk()
    }
}

impl<const N: usize> From<[(Vec<Datum>, ElementData); N]> for Elements {
    fn from(elements: [(Vec<Datum>, ElementData); N]) -> Self {
        elements.into_iter().collect()
    }
}

impl IntoIterator for Elements {
    type Item = (Vec<Datum>, ElementData);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        let fields = self.fields();
        let mut keys = self.keys.into_iter();
        let elements = self.data.into_iter().map(|data| (keys.by_ref().take(fields).collect(), data));
        elements.collect::<Vec<_>>().into_iter()
    }
}

impl Extend<(Vec<Datum>, ElementData)> for Elements {
    fn extend<T: IntoIterator<Item = (Vec<Datum>, ElementData)>>(&mut self, elements: T) {
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
