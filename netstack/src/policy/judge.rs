//! The decision about one connection that this node tracks, from the very values the rules are made of. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::directory::Directory;
use super::meaning::{Other, Side};
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

    /// Who has a say: the source's egress, the destination's ingress. A pod always reaches itself, and the node its pods.
    fn sides(&self, source: IpAddr, destination: IpAddr) -> (Option<&Side>, Option<&Side>) {
        if source == destination {
            return (None, None);
        }
        let egress = self.subjects.get(&source).and_then(|sides| sides.egress.as_deref());
        let ingress = self.subjects.get(&destination).and_then(|sides| sides.ingress.as_deref());
        (egress, ingress.filter(|_| !self.directory.place.own_addresses.contains(&source)))
    }
}
