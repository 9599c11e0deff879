//! Which addresses this node answers for. In: the plan, and the nodes that live as this node sees them. Out: addresses. Pure, so two
//! nodes that see the same agree without a word.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_model::NodeName;

use super::Plan;

/// The other nodes as this one sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alive {
    /// Their kernels answer.
    pub kernels: BTreeSet<NodeName>,
    /// Those of them whose agents are heard of.
    pub agents: BTreeSet<NodeName>,
    /// Those that left the last echoes unanswered and may be dead in a moment.
    pub doubtful: BTreeSet<NodeName>,
}

/// Each address that this node answers for. Without a quorum there is none: the other part of the cluster answers.
pub fn elect(plan: &Plan, alive: &Alive) -> BTreeSet<IpAddr> {
    if !has_quorum(plan, &alive.kernels) {
        return BTreeSet::new();
    }
    let mine = plan.addresses.keys().filter(|ip| elected(plan, alive, **ip) == Some(&plan.node));
    mine.copied().collect()
}

/// Each address that this node does not answer for and would, were the doubtful nodes dead: it asks the LAN for them already, so that
/// a death costs no more time than it takes to be sure of it.
pub(super) fn next_in_line(plan: &Plan, alive: &Alive) -> BTreeSet<IpAddr> {
    if alive.doubtful.is_empty() {
        return BTreeSet::new();
    }
    let without = Alive { agents: &alive.agents - &alive.doubtful, ..alive.clone() };
    &elect(plan, &without) - &elect(plan, alive)
}

/// Who is to answer for an address, as this node sees the others; whether there is a quorum is not asked.
pub(super) fn elected<'a>(plan: &'a Plan, alive: &Alive, ip: IpAddr) -> Option<&'a NodeName> {
    let lives = |node: &&NodeName| **node == plan.node || alive.agents.contains(*node);
    plan.addresses.get(&ip)?.candidates.iter().find(lives)
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
    use crate::announce::{Announced, Means, Peer};

    fn names(letters: &str) -> Vec<NodeName> {
        letters.chars().map(|letter| NodeName(letter.to_string().into())).collect()
    }

    fn seen_by(node: &str, all: &str, candidates: &str) -> Plan {
        let announced = Announced {
            services: vec![],
            means: Means::Layer2,
            candidates: names(candidates),
            links: BTreeMap::new(),
        };
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        let peer = || Peer { overlay: ip, lan: vec![] };
        let peers =
            names(all).into_iter().filter(|name| *name.0 != *node).map(|name| (name, peer())).collect();
        Plan { node: node.into(), addresses: BTreeMap::from([(ip, announced)]), peers }
    }

    fn answers(node: &str, all: &str, candidates: &str, alive: &str) -> bool {
        answers_beside(node, all, candidates, alive, alive)
    }

    fn answers_beside(node: &str, all: &str, candidates: &str, kernels: &str, agents: &str) -> bool {
        let of = |letters| names(letters).into_iter().collect();
        let alive = Alive { kernels: of(kernels), agents: of(agents), doubtful: of("") };
        !elect(&seen_by(node, all, candidates), &alive).is_empty()
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

    #[test]
    fn an_agent_that_is_silent_serves_nothing_and_still_counts_for_the_quorum() {
        assert!(answers_beside("a", "abc", "bac", "bc", "c"), "b's kernel lives, its agent does not");
        assert!(answers_beside("a", "abc", "bac", "bc", ""), "most kernels live");
        assert!(!answers_beside("c", "abc", "bac", "ab", "a"));
    }

    #[test]
    fn who_is_next_asks_while_the_first_is_in_doubt_and_does_not_answer_yet() {
        fn of(letters: &str) -> BTreeSet<NodeName> {
            names(letters).into_iter().collect()
        }
        let seen = |node, doubtful| {
            let others = "abc".replace(node, "");
            let alive = Alive { kernels: of(&others), agents: of(&others), doubtful: of(doubtful) };
            let plan = seen_by(node, "abc", "bac");
            (!elect(&plan, &alive).is_empty(), !next_in_line(&plan, &alive).is_empty())
        };
        assert_eq!(seen("a", ""), (false, false));
        assert_eq!(seen("a", "b"), (false, true));
        assert_eq!(seen("a", "c"), (false, false), "c is behind a");
        assert_eq!(seen("c", "b"), (false, false), "a is before c");
        assert_eq!(seen("c", "ab"), (false, true), "the quorum is counted when they are dead");
        assert_eq!(seen("b", "ac"), (true, false));
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
