//! What grows to megabytes, in pages of 64 KiB that stay where they are: a buffer that doubles would leave as much behind in holes
//! of the heap as it holds.

/// Of a page; places of octets have 16 bits for it.
const PAGE_BYTES: usize = 1 << 16;
/// Nodes of a page.
const PAGE_NODES: usize = 1 << 12;

/// Runs of octets, each whole on one page; one that is longer than a page has a page of its own length.
#[derive(Default)]
pub(super) struct Pages {
    pages: Vec<Vec<u8>>,
    len: usize,
    /// Pages that were given back.
    given_back: usize,
}

impl Pages {
    /// Octets of all runs.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// From a place on to the end of its page.
    pub(super) fn from(&self, place: u32) -> &[u8] {
        let (page, at) = (place as usize / PAGE_BYTES, place as usize % PAGE_BYTES);
        self.pages.get(page).and_then(|page| page.get(at..)).unwrap_or_default()
    }

    /// Returns the place of the run.
    pub(super) fn push(&mut self, run: &[u8]) -> u32 {
        let fits = |page: &Vec<u8>| page.len() + run.len() <= PAGE_BYTES && page.len() < PAGE_BYTES;
        if !self.pages.last().is_some_and(fits) {
            self.pages.push(Vec::with_capacity(run.len().max(PAGE_BYTES)));
        }
        let page = self.pages.len() - 1;
        let at = self.pages[page].len();
        self.pages[page].extend_from_slice(run);
        self.len += run.len();
        u32::try_from(page * PAGE_BYTES + at).expect(FEW)
    }

    /// Gives up a run when it was the last to be pushed.
    pub(super) fn take_back(&mut self, place: u32, len: usize) -> bool {
        let (page, at) = (place as usize / PAGE_BYTES, place as usize % PAGE_BYTES);
        let is_last_page = page + 1 == self.pages.len();
        let Some(last) = self.pages.last_mut().filter(|last| is_last_page && at + len == last.len()) else {
            return false;
        };
        last.truncate(at);
        self.len -= len;
        true
    }

    /// Nobody reads the pages before this place's any more.
    pub(super) fn give_back_before(&mut self, place: u32) {
        while self.given_back < place as usize / PAGE_BYTES {
            self.pages[self.given_back] = Vec::new();
            self.given_back += 1;
        }
    }
}

/// Nodes by number.
pub(super) struct Nodes<T>(Vec<Vec<T>>);

impl<T> Default for Nodes<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Nodes<T> {
    pub(super) fn len(&self) -> u32 {
        let last = self.0.last().map_or(0, Vec::len);
        u32::try_from(self.0.len().saturating_sub(1) * PAGE_NODES + last).expect(FEW)
    }

    /// Of a number that `push` gave.
    pub(super) fn at(&self, number: u32) -> &T {
        &self.0[number as usize / PAGE_NODES][number as usize % PAGE_NODES]
    }

    /// Of a number that `push` gave.
    pub(super) fn at_mut(&mut self, number: u32) -> &mut T {
        &mut self.0[number as usize / PAGE_NODES][number as usize % PAGE_NODES]
    }

    pub(super) fn push(&mut self, node: T) -> u32 {
        let number = self.len();
        if (number as usize).is_multiple_of(PAGE_NODES) {
            self.0.push(Vec::with_capacity(PAGE_NODES));
        }
        self.0[number as usize / PAGE_NODES].push(node);
        number
    }
}

/// etcd holds 8 GiB at most, in a far less dense form.
const FEW: &str = "the names of a cluster take less than 4 GiB";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_every_length_are_found_again_and_the_last_can_be_taken_back() {
        let mut pages = Pages::default();
        let run = |length: usize| vec![(length % 251) as u8; length];
        let lengths = [1, 0, 40_000, 30_000, 65_536, 7, 200_000, 3, 65_529];
        let places = lengths.map(|length| pages.push(&run(length)));
        for (place, length) in places.into_iter().zip(lengths) {
            assert_eq!(pages.from(place)[..length], run(length));
        }
        let whole = pages.len();
        assert!(!pages.take_back(places[3], 30_000));
        assert!(pages.take_back(places[8], 65_529));
        assert_eq!((pages.push(b"new"), pages.len()), (places[8], whole - 65_529 + 3));
    }

    #[test]
    fn nodes_have_the_numbers_of_their_order() {
        let mut nodes = Nodes::default();
        assert!((0..10_000).all(|number| nodes.push(number) == number));
        assert_eq!((nodes.len(), *nodes.at(0), *nodes.at(4096), *nodes.at(9_999)), (10_000, 0, 4096, 9_999));
        *nodes.at_mut(4096) += 1;
        assert_eq!(*nodes.at(4096), 4097);
    }
}
