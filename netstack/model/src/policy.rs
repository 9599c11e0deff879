//! NetworkPolicies (networking.k8s.io/v1) lowered, and label selectors with their meaning.
//!
//! Whatever of a policy could not be understood is gone from here in the direction that denies: an empty list allows
//! nobody, and only `None` means everybody.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::PolicyKey;
use crate::objects::{Labels, Protocol};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    pub key: PolicyKey,
    /// `spec.podSelector`: the pods of its namespace that it isolates.
    pub subject: Selector,
    /// `None` when its policyTypes leave ingress alone.
    pub ingress: Option<Vec<PolicyRule>>,
    /// `None` when its policyTypes leave egress alone.
    pub egress: Option<Vec<PolicyRule>>,
    /// Annotation `weft.network/established: keep`: connections that it would deny may end by themselves.
    pub keep_established: bool,
}

/// Allows what matches one of the peers and one of the ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRule {
    /// `None`: everybody, whatever the address.
    pub peers: Option<Vec<Peer>>,
    /// `None`: everything, whatever the protocol.
    pub ports: Option<Vec<PolicyPort>>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peer {
    Pods {
        /// `None`: the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
    /// Addresses of the range that are in none of the exceptions.
    Block { cidr: IpNet, except: Vec<IpNet> },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyPort {
    pub protocol: Protocol,
    pub ports: Ports,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Ports {
    /// Every port of the protocol.
    All,
    /// From the first to the last, both included.
    Range(u16, u16),
    /// What the pod that is connected to calls so.
    Named(String),
}

/// A LabelSelector (meta/v1): all requirements hold. Without any it selects everything. Sorted, so that equal selectors are
/// equal values.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector {
    pub requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Requirement {
    pub key: String,
    pub condition: Condition,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Condition {
    In(BTreeSet<String>),
    /// Holds for objects without the label too.
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort();
        requirements.dedup();
        Self { requirements }
    }

    /// Selects no object.
    pub fn nothing() -> Self {
        Self::new(vec![Requirement { key: String::new(), condition: Condition::In(BTreeSet::new()) }])
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            match &requirement.condition {
                Condition::In(values) => value.is_some_and(|value| values.contains(value)),
                Condition::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Condition::Exists => value.is_some(),
                Condition::DoesNotExist => value.is_none(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn one(key: &str, condition: Condition) -> Selector {
        Selector::new(vec![Requirement { key: key.to_owned(), condition }])
    }

    #[test]
    fn a_selector_without_requirements_selects_everything() {
        assert!(Selector::default().matches(&labels(&[])));
        assert!(Selector::default().matches(&labels(&[("a", "b")])));
    }

    #[test]
    fn each_operator_means_what_the_api_says() {
        let values = || BTreeSet::from(["v1".to_owned(), "v2".to_owned()]);
        let (with, other, without) = (labels(&[("v", "v1")]), labels(&[("v", "v9")]), labels(&[("x", "v1")]));
        for (condition, expected) in [
            (Condition::In(values()), [true, false, false]),
            (Condition::NotIn(values()), [false, true, true]),
            (Condition::Exists, [true, true, false]),
            (Condition::DoesNotExist, [false, false, true]),
        ] {
            let selector = one("v", condition);
            assert_eq!(
                [&with, &other, &without].map(|labels| selector.matches(labels)),
                expected,
                "{selector:?}"
            );
        }
    }

    #[test]
    fn all_requirements_must_hold() {
        let both = Selector::new(
            [("a", Condition::Exists), ("b", Condition::DoesNotExist)]
                .map(|(key, condition)| Requirement { key: key.to_owned(), condition })
                .into(),
        );
        assert!(both.matches(&labels(&[("a", "")])));
        assert!(!both.matches(&labels(&[("a", ""), ("b", "")])));
        assert!(!both.matches(&labels(&[])));
    }
}
