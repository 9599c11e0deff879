//! Who has what only one Service can have. In: claims, as Services raise and drop them. Out: the rival that goes before, and whom
//! a change concerns. Pure.

use std::collections::BTreeSet;

use smallvec::SmallVec;
use weft_model::{ObjectRef, Problem, Reason, ServiceKey, SharedMap};

use super::service::Claim;

/// Who wants something, in the order in which they get it: a ClusterIP before addresses outside the cluster, the older Service
/// before the younger.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    external: bool,
    created: i64,
    key: ServiceKey,
}

/// How a Service wants something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// A ClusterIP with all its ports, or a port of the cluster.
    Inside,
    /// A port of an address outside the cluster: a ClusterIP goes before it.
    Outside,
    /// An address outside the cluster, which Services share, each with its own ports.
    SharedOutside,
}

impl Manner {
    fn is_external(self) -> bool {
        self != Self::Inside
    }
}

#[derive(Default)]
pub(super) struct Claims {
    /// Of each thing in the order in which they get it; nearly always one.
    claimants: SharedMap<Claim, SmallVec<[Claimant; 1]>>,
    /// How many things more than one Service claims: mostly none, so that nothing needs to be looked up.
    contested: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rival<'a> {
    pub winner: &'a ServiceKey,
    /// It has the address as a ClusterIP, and so every port of it.
    pub of_address: bool,
}

impl Claims {
    /// Tells whom else it concerns.
    pub(super) fn raise(
        &mut self,
        claim: &Claim,
        manner: Manner,
        (created, key): (i64, &ServiceKey),
        others: &mut BTreeSet<ServiceKey>,
    ) {
        let claimant = Claimant { external: manner.is_external(), created, key: key.clone() };
        let claimants = self.claimants.get_or_default(claim.clone());
        if let Err(place) = claimants.binary_search(&claimant) {
            claimants.insert(place, claimant);
            self.contested += usize::from(claimants.len() == 2);
        }
        others.extend(concerned(claimants, manner, key));
    }

    /// Tells whom else it concerns.
    pub(super) fn drop(
        &mut self,
        claim: &Claim,
        manner: Manner,
        (created, key): (i64, &ServiceKey),
        others: &mut BTreeSet<ServiceKey>,
    ) {
        let Some(claimants) = self.claimants.get_mut(claim) else { return };
        let claimant = Claimant { external: manner.is_external(), created, key: key.clone() };
        let before = claimants.len();
        claimants.retain(|other| *other != claimant);
        self.contested -= usize::from(before == 2 && claimants.len() == 1);
        others.extend(concerned(claimants, manner, key));
        if claimants.is_empty() {
            self.claimants.remove(claim);
        }
    }

    /// The Service that has what `key` claims.
    pub(super) fn rival(&self, key: &ServiceKey, claim: &Claim, manner: Manner) -> Option<Rival<'_>> {
        let first = |claim: &Claim| self.claimants.get(claim).and_then(|claimants| claimants.first());
        let other = |claimant: &&Claimant| claimant.key != *key;
        if let (Claim::Vip(ip, ..), true) = (claim, manner.is_external()) {
            let owner = first(&Claim::Address(*ip)).filter(|claimant| !claimant.external).filter(other);
            if let Some(owner) = owner {
                return Some(Rival { winner: &owner.key, of_address: true });
            }
        }
        if self.contested == 0 {
            return None;
        }
        // Services share an address outside the cluster, each with its own ports.
        let shares = |claimant: &&Claimant| manner == Manner::SharedOutside && claimant.external;
        let winner = first(claim).filter(|claimant| !shares(claimant)).filter(other)?;
        Some(Rival { winner: &winner.key, of_address: false })
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.claimants.is_empty() && self.contested == 0
    }
}

/// Nobody minds another Service at an address outside the cluster; else all other claimants do.
fn concerned(claimants: &[Claimant], manner: Manner, own: &ServiceKey) -> impl Iterator<Item = ServiceKey> {
    let others = claimants.iter().filter(move |it| manner != Manner::SharedOutside && it.key != *own);
    others.map(|claimant| claimant.key.clone())
}

pub(super) fn conflict(key: &ServiceKey, claim: &Claim, winner: &ServiceKey) -> Problem {
    let what = match claim {
        Claim::Address(ip) => format!("address {ip}"),
        Claim::Vip(ip, protocol, port) => format!("{} port {port} of {ip}", protocol.name()),
        Claim::NodePort { ipv6, protocol, port } => {
            format!("IPv{} {} nodePort {port}", if *ipv6 { 6 } else { 4 }, protocol.name())
        }
        Claim::HealthCheck(port) => format!("healthCheckNodePort {port}"),
    };
    Problem::new(
        ObjectRef::new("Service", &key.namespace, &key.name),
        Reason::Conflict,
        format!("{what} belongs to Service {winner}; give one of the two another"),
    )
}
