//! The decision about one connection that this node tracks, from the very values the rules are made of. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::{PodKey, PolicyKey};

use super::directory::{Directory, Subject};
use super::meaning::{Direction, Other, Side};
use crate::kernel::conntrack::Flow;

/// Both directions of one pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sides {
    pub ingress: Option<Arc<Side>>,
    pub egress: Option<Arc<Side>>,
}

/// All that a decision depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judge {
    pub(super) directory: Directory,
    /// Isolated pods of this node, by address.
    pub(super) subjects: BTreeMap<IpAddr, Sides>,
}

/// A decision with what it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// By these rules (`shop/web ingress[0]`); by none where no policy has a say.
    Allowed { by: Vec<String> },
    /// By the policies that isolate this address in this direction, none of which allows it.
    Denied { direction: Direction, subject: IpAddr, policies: Vec<PolicyKey> },
}

impl Judge {
    /// Whether the rules let a first packet through this node: from `source`, before any masquerade, to `destination`, after
    /// DNAT. `protocol` is the IANA number, `port` the destination's.
    pub fn allows(&self, source: IpAddr, destination: IpAddr, protocol: u8, port: u16) -> bool {
        self.permits(source, destination, protocol, port, |_| false)
    }

    /// Whether an established connection has to end: it would be denied now, by a policy that does not let it be.
    pub(super) fn cuts(&self, flow: &Flow) -> bool {
        let (source, to) = (flow.original.source.ip(), flow.reply.source);
        !self.permits(source, to.ip(), flow.protocol, to.port(), |side| side.keep_established)
    }

    /// Whether each side that has a say allows it, or is one that `spares` it.
    fn permits(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        port: u16,
        spares: impl Fn(&Side) -> bool,
    ) -> bool {
        let allows = |side: &Side, address| {
            let bearers = self.directory.bearers(address);
            let other = Other { address, bearers: &bearers, protocol, port };
            spares(side) || side.allows(&other, &self.directory)
        };
        let (egress, ingress) = self.sides(source, destination);
        egress.is_none_or(|side| allows(side, destination)) && ingress.is_none_or(|side| allows(side, source))
    }

    /// What decides about a first packet, for a person. In the order of the rules: the source's egress, then the destination's
    /// ingress; the first that denies decides.
    pub fn ruling(&self, source: IpAddr, destination: IpAddr, protocol: u8, port: u16) -> Ruling {
        let (egress, ingress) = self.sides(source, destination);
        let asked = [
            (Direction::Egress, egress, source, destination),
            (Direction::Ingress, ingress, destination, source),
        ];
        let mut allowed_by = Vec::new();
        for (direction, side, subject, address) in asked {
            let Some(side) = side else { continue };
            let bearers = self.directory.bearers(address);
            match side.allowing(&Other { address, bearers: &bearers, protocol, port }, &self.directory) {
                Some(allow) => {
                    allowed_by.push(format!("{} {}[{}]", allow.policy, direction.name(), allow.index));
                }
                None => {
                    return Ruling::Denied { direction, subject, policies: side.policies.clone() };
                }
            }
        }
        Ruling::Allowed { by: allowed_by }
    }

    /// The pod that bears an address, as policies see it; `None` for nobody's and for one that several claim.
    pub fn bearer(&self, address: IpAddr) -> Option<&PodKey> {
        match self.directory.bearers(address)[..] {
            [pod] => Some(&pod.key),
            _ => match self.directory.subject(address) {
                Subject::Unknown(_) => self.directory.attached_name(address),
                _ => None,
            },
        }
    }

    /// Who has a say: the source's egress, the destination's ingress. A pod always reaches itself, and the node its pods.
    fn sides(&self, source: IpAddr, destination: IpAddr) -> (Option<&Side>, Option<&Side>) {
        if source == destination {
            return (None, None);
        }
        let egress = self.subjects.get(&source).and_then(|sides| sides.egress.as_deref());
        let ingress = self.subjects.get(&destination).and_then(|sides| sides.ingress.as_deref());
        let place = &self.directory.place;
        let is_own = place.own_addresses.contains(&source) && !place.own_ingresses.contains(&source);
        (egress, ingress.filter(|_| !is_own))
    }
}
