//! Which addresses this node answers for. In: the plan, and the nodes that live as this node sees them. Out: addresses. Pure, so two
//! nodes that see the same agree without a word.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_model::NodeName;

use super::Plan;

/// `alive` holds the other nodes that answer. Without a quorum this node answers for nothing: the other part of the cluster does.
pub fn elect(plan: &Plan, alive: &BTreeSet<NodeName>) -> BTreeSet<IpAddr> {
    if !has_quorum(plan, alive) {
        return BTreeSet::new();
    }
    let lives = |node: &&NodeName| **node == plan.node || alive.contains(*node);
    let mine = plan.addresses.iter().filter(|(_, announced)| {
        announced.candidates.iter().find(lives).is_some_and(|first| *first == plan.node)
    });
    mine.map(|(ip, _)| *ip).collect()
}

/// More than half of the nodes see each other. Of two equal halves the one with the first name wins; of two nodes either may,
/// because then the other is far more often dead than cut off, and an address that is answered for is never claimed.
pub(super) fn has_quorum(plan: &Plan, alive: &BTreeSet<NodeName>) -> bool {
    let total = plan.peers.len() + 1;
    let seen = 1 + plan.peers.keys().filter(|peer| alive.contains(*peer)).count();
    let first = plan.peers.keys().chain([&plan.node]).min();
    let sees_first = first.is_some_and(|first| *first == plan.node || alive.contains(first));
    seen * 2 > total || (seen * 2 == total && (total == 2 || sees_first))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::announce::{Announced, Means};

    fn names(letters: &str) -> Vec<NodeName> {
        letters.chars().map(|letter| NodeName(letter.to_string())).collect()
    }

    fn seen_by(node: &str, all: &str, candidates: &str) -> Plan {
        let announced = Announced {
            services: vec![],
            means: Means::Layer2,
            candidates: names(candidates),
            links: BTreeMap::new(),
        };
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        let peers = names(all).into_iter().filter(|name| name.0 != node).map(|name| (name, ip)).collect();
        Plan { node: node.into(), addresses: BTreeMap::from([(ip, announced)]), peers }
    }

    fn answers(node: &str, all: &str, candidates: &str, alive: &str) -> bool {
        !elect(&seen_by(node, all, candidates), &names(alive).into_iter().collect()).is_empty()
    }

    #[test]
    fn the_first_that_lives_answers() {
        assert!(answers("b", "abc", "bac", "ac"));
        assert!(!answers("a", "abc", "bac", "bc"));
        assert!(answers("a", "abc", "bac", "c"), "b is dead");
        assert!(!answers("c", "abc", "ba", "ab"), "c may not");
    }

    #[test]
    fn a_part_without_most_nodes_answers_for_nothing() {
        assert!(!answers("c", "abc", "cab", ""));
        assert!(answers("a", "abcd", "dabc", "b"), "half, with the first name");
        assert!(!answers("d", "abcd", "dabc", "c"), "half, without it");
        assert!(answers("a", "ab", "ba", ""), "one of two");
        assert!(answers("a", "a", "a", ""), "alone");
    }

    proptest! {
        /// In any division of more than two nodes into parts that see only each other, at most one node answers.
        #[test]
        fn a_divided_cluster_has_at_most_one_answer(parts in prop::collection::vec(0..3u8, 3..8)) {
            let all: String = ('a'..).take(parts.len()).collect();
            let mut answering = 0;
            for (node, part) in all.chars().zip(&parts) {
                let alive: String = all.chars().zip(&parts)
                    .filter(|(other, of)| *of == part && *other != node).map(|(other, _)| other).collect();
                answering += u32::from(answers(&node.to_string(), &all, &all, &alive));
            }
            prop_assert!(answering <= 1);
        }
    }
}
