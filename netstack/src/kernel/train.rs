//! Which datagrams leave as one train: those to one destination that are as long as the first, and one shorter at the end.
//!
//! In: datagrams in any order. Out: the same, sorted, and how they are cut into trains. Pure; what sends them is `datagram`.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::ops::Range;

use super::udp::{MAX_SEGMENTS, MAX_TRAIN_BYTES};

/// Fewest datagrams that are worth a train. What a resolver asks for one name, A and AAAA, stays single: what reads packets rather
/// than datagrams at the other end (gVisor's network stack in a pod, a capture) may take a train for one datagram.
const FEWEST: usize = 3;

/// A datagram that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub to: SocketAddr,
    pub len: usize,
    /// Where its bytes are.
    pub at: usize,
}

/// Sorts the datagrams by destination and falling length, and covers them with ranges of which each is a train or a single one.
/// Those of one destination and one length keep their order.
///
/// What `may_join` denies by destination and length begins no train.
pub(super) fn couple(
    waiting: &mut [Waiting],
    mut may_join: impl FnMut(SocketAddr, usize) -> bool,
) -> Vec<Range<usize>> {
    waiting.sort_by_key(|one| (one.to, Reverse(one.len)));
    let mut trains = Vec::with_capacity(waiting.len());
    let mut start = 0;
    while let Some(rest) = waiting.get(start..).filter(|rest| !rest.is_empty()) {
        let count = leading(rest);
        let count = if count >= FEWEST && may_join(rest[0].to, rest[0].len) { count } else { 1 };
        trains.push(start..start + count);
        start += count;
    }
    trains
}

/// How many of the sorted datagrams make the longest train from the first on.
fn leading(waiting: &[Waiting]) -> usize {
    let Some(first) = waiting.first() else { return 0 };
    let mut bytes = first.len;
    let mut count = 1;
    for one in waiting.iter().take(MAX_SEGMENTS).skip(1) {
        bytes += one.len;
        if one.to != first.to || bytes > MAX_TRAIN_BYTES {
            break;
        }
        count += 1;
        if one.len < first.len {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn to(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    /// The lengths of each train of datagrams to ports.
    fn trains(
        datagrams: &[(u16, usize)],
        may_join: impl FnMut(SocketAddr, usize) -> bool,
    ) -> Vec<Vec<usize>> {
        let waiting = datagrams.iter().enumerate();
        let mut waiting: Vec<_> =
            waiting.map(|(at, (port, len))| Waiting { to: to(*port), len: *len, at }).collect();
        let trains = couple(&mut waiting, may_join);
        trains.into_iter().map(|train| waiting[train].iter().map(|one| one.len).collect()).collect()
    }

    #[test]
    fn equals_of_one_destination_join_and_a_shorter_one_ends_the_train() {
        let told = [(2, 5), (1, 7), (2, 5), (1, 9), (1, 9), (1, 8), (1, 7), (2, 6)];
        let joined: [&[usize]; 6] = [&[9, 9, 8], &[7], &[7], &[6], &[5], &[5]];
        assert_eq!(trains(&told, |_, _| true), joined);
    }

    #[test]
    fn a_train_has_at_most_as_many_segments_and_bytes_as_the_kernel_takes() {
        let lengths = |count, len| {
            let trains = trains(&vec![(1, len); count], |_, _| true);
            trains.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(131, 10), [64, 64, 3]);
        assert_eq!(lengths(4, 21_600), [3, 1]);
        assert_eq!(lengths(2, 65_000), [1, 1]);
        assert_eq!(lengths(0, 1), [0; 0]);
    }

    #[test]
    fn what_may_not_join_stays_single_and_keeps_none_of_the_others() {
        let told = [(1, 9), (1, 9), (1, 8), (1, 8), (1, 8), (2, 9), (2, 9), (2, 9)];
        let joined: [&[usize]; 4] = [&[9], &[9], &[8, 8, 8], &[9, 9, 9]];
        assert_eq!(trains(&told, |destination, len| destination != to(1) || len < 9), joined);
    }

    proptest! {
        #[test]
        fn trains_hold_every_datagram_once_and_are_what_the_kernel_takes(
            datagrams in vec((0u16..4, prop_oneof![1usize..4, 1usize..70_000]), 0..200),
            narrow in 0usize..70_000,
        ) {
            let waiting = datagrams.iter().enumerate();
            let mut waiting: Vec<_> =
                waiting.map(|(at, (port, len))| Waiting { to: to(*port), len: *len, at }).collect();
            let trains = couple(&mut waiting, |_, len| len < narrow);
            let mut seen: Vec<usize> = waiting.iter().map(|one| one.at).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..datagrams.len()).collect::<Vec<_>>());
            prop_assert!(waiting.iter().all(|one| (to(datagrams[one.at].0), datagrams[one.at].1) == (one.to, one.len)));
            let mut end = 0;
            for train in trains {
                prop_assert_eq!(train.start, end);
                end = train.end;
                let train = &waiting[train];
                let (last, others) = train.split_last().unwrap();
                if let Some(first) = others.first() {
                    prop_assert!(train.len() >= FEWEST);
                    prop_assert!(first.len < narrow && train.iter().all(|one| one.to == first.to));
                    prop_assert!(others.iter().all(|one| one.len == first.len) && last.len <= first.len);
                    prop_assert!(train.windows(2).all(|two| two[0].len != two[1].len || two[0].at < two[1].at));
                    prop_assert!(train.len() <= MAX_SEGMENTS);
                    prop_assert!(train.iter().map(|one| one.len).sum::<usize>() <= MAX_TRAIN_BYTES);
                }
            }
            prop_assert_eq!(end, waiting.len());
        }
    }
}
