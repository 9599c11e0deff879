//! Sliding window over received counters: each counter is accepted once, and none that is too old.
//!
//! Source: RFC 6479 and the WireGuard whitepaper, section 5.4.6. The window of 8192 outlasts trains of 64 datagrams
//! that several threads open at once.

pub(super) const BLOCKS: usize = 129;
const BLOCK_BITS: u64 = 64;
/// How far behind the greatest counter a packet may come. One block less than the bitmap holds, because the newest
/// block is only partly used.
pub(super) const WINDOW: u64 = (BLOCKS as u64 - 1) * BLOCK_BITS;

#[derive(Clone)]
pub(super) struct ReplayWindow {
    /// One more than the greatest accepted counter.
    pub(super) next: u64,
    pub(super) bits: [u64; BLOCKS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, bits: [0; BLOCKS] }
    }
}

impl ReplayWindow {
    /// Marks `counter` as seen; false when it was seen before or is older than the window.
    pub(super) fn accept(&mut self, counter: u64) -> bool {
        if counter == u64::MAX || counter.saturating_add(WINDOW) < self.next {
            return false;
        }
        let block = counter / BLOCK_BITS;
        if counter >= self.next {
            self.clear_between(self.next.saturating_sub(1) / BLOCK_BITS, block);
            self.next = counter + 1;
        }
        let bit = 1 << (counter % BLOCK_BITS);
        let word = &mut self.bits[slot(block)];
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Clears the blocks after `from` up to and including `to`.
    fn clear_between(&mut self, from: u64, to: u64) {
        for block in (from + 1..=to).take(BLOCKS) {
            self.bits[slot(block)] = 0;
        }
    }
}

fn slot(block: u64) -> usize {
    // The remainder of a small constant fits every usize.
    usize::try_from(block % BLOCKS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_counter_is_accepted_once() {
        let mut window = ReplayWindow::default();
        assert!(window.accept(0) && window.accept(2) && window.accept(1));
        assert!(!window.accept(0) && !window.accept(1) && !window.accept(2));
    }

    #[test]
    fn a_counter_behind_the_window_is_refused() {
        let mut window = ReplayWindow::default();
        assert!(window.accept(WINDOW + 10));
        assert!(!window.accept(10));
        assert!(window.accept(11));
        assert!(!window.accept(u64::MAX));
    }

    proptest! {
        #[test]
        fn the_window_agrees_with_a_set(steps in proptest::collection::vec((0u64..40_000, 0u64..20_000), 1..400)) {
            let (mut window, mut seen, mut greatest) = (ReplayWindow::default(), BTreeSet::new(), 0);
            for (base, extra) in steps {
                let counter = base + extra;
                let expected = counter + WINDOW > greatest && !seen.contains(&counter);
                prop_assert_eq!(window.accept(counter), expected, "counter {} after {}", counter, greatest);
                if expected { seen.insert(counter); greatest = greatest.max(counter); }
            }
        }
    }
}
