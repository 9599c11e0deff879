//! What several planned objects share goes with the last of them: who uses it is counted.

use std::collections::BTreeMap;

/// Users by what they use.
#[derive(Clone, Debug)]
pub(crate) struct Users<K>(BTreeMap<K, usize>);

impl<K> Default for Users<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord> Users<K> {
    /// One more; true when it is the first.
    pub(crate) fn begin(&mut self, key: K) -> bool {
        let count = self.0.entry(key).or_default();
        *count += 1;
        *count == 1
    }

    /// One less; true when it was the last.
    pub(crate) fn end(&mut self, key: &K) -> bool {
        let Some(count) = self.0.get_mut(key) else { return false };
        *count -= 1;
        let gone = *count == 0;
        if gone {
            self.0.remove(key);
        }
        gone
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
