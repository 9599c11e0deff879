//! What the nodes say of addresses on the LAN (annotation `weft.network/answers-for`). In: Nodes. Out: who still answers for an
//! address, and which machine that is no node of ours has one. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_model::{NodeName, Snapshot};

#[derive(Debug, Default)]
pub(crate) struct Told<'a> {
    held: BTreeMap<IpAddr, &'a NodeName>,
    contested: BTreeMap<IpAddr, &'a str>,
}

impl<'a> Told<'a> {
    /// A node that is not Ready may have said it long ago: it counts for nothing, and who claims an address of it asks the LAN.
    pub(crate) fn of(snapshot: &'a Snapshot) -> Self {
        let mut told = Self::default();
        for node in snapshot.nodes.values().filter(|node| !node.unready) {
            told.held.extend(node.answers_for.held.iter().map(|ip| (*ip, &node.name)));
            let contested = node.answers_for.contested.iter();
            told.contested.extend(contested.map(|(ip, mac)| (*ip, mac.as_str())));
        }
        told
    }

    /// The node that answers for it.
    pub(crate) fn holder(&self, ip: IpAddr) -> Option<&'a NodeName> {
        self.held.get(&ip).copied()
    }

    /// The link-layer address of the machine that has it, while no node does.
    pub(crate) fn stranger(&self, ip: IpAddr) -> Option<&'a str> {
        self.contested.get(&ip).copied().filter(|_| self.holder(ip).is_none())
    }
}
