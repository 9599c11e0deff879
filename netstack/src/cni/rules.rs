//! Table `weft-cni`: what every attached pod has in nft. In: live leases. Out: the whole table, and single elements at
//! ADD and DEL. What its chains mean is said in `spoof` and `hostport`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::constants::TABLE_CNI;
use weft_model::ruleset::{Datum, ElementData, Elements, Set, Table};

use super::{hostport, spoof};
use crate::kernel::nft::{NftError, NftTable};
use crate::reconcile::Trust;
use crate::store::{HostPort, Lease, LeaseRecords};

/// Elements by set, in the order in which they are added.
type BySet = BTreeMap<&'static str, Elements>;

/// The whole desired state: every live lease's elements. Of two leases with one key the lower address has it, which
/// only a damaged Store can bring about.
fn plan(leases: &LeaseRecords) -> Table {
    let mut table = Table { name: TABLE_CNI.to_owned(), ..Table::default() };
    spoof::declare(&mut table);
    hostport::declare(&mut table);
    for (address, lease) in leases.iter().filter(|(_, lease)| lease.released.is_none()) {
        for (name, elements) in of_lease(*address, lease) {
            let set = table.sets.get_mut(name).expect("elements are of declared sets");
            add_group(set, &lease.link, elements);
        }
    }
    table
}

fn add_group(set: &mut Set, link: &str, elements: Elements) {
    let free: Elements = elements
        .into_iter()
        .filter(|(key, _)| !set.groups.values().any(|group| group.contains_key(key)))
        .collect();
    if !free.is_empty() {
        Arc::make_mut(set.groups.get_or_default(link.into())).extend(free);
    }
}

fn of_lease(address: IpAddr, lease: &Lease) -> BySet {
    let mut elements = BySet::new();
    for (set, key, data) in spoof::elements(address, lease).chain(hostport::elements(address, lease)) {
        elements.entry(set).or_default().insert(&key, &data);
    }
    elements
}

fn of_leases(leases: &LeaseRecords) -> BySet {
    let mut elements = BySet::new();
    for (set, more) in leases.iter().flat_map(|(address, lease)| of_lease(*address, lease)) {
        elements.entry(set).or_default().extend(more);
    }
    elements
}

/// Owner of the table in the kernel. Calls are synchronous.
pub(super) struct PodRules(NftTable);

impl PodRules {
    pub(super) fn new() -> Self {
        Self(NftTable::new(TABLE_CNI))
    }

    /// Makes the kernel's table equal to the plan; one line per change.
    pub(super) fn ensure(&mut self, leases: &LeaseRecords) -> Result<Vec<String>, NftError> {
        self.0.apply(&plan(leases), Trust::Nothing)
    }

    /// From now on the pod of these leases may send, and its host ports lead to it.
    pub(super) fn admit(&mut self, leases: &LeaseRecords) -> Result<(), NftError> {
        of_leases(leases).into_iter().try_for_each(|(set, elements)| {
            let elements: Vec<(Vec<Datum>, ElementData)> = elements.into_iter().collect();
            self.0.insert(set, &elements)
        })
    }

    /// Takes [`Self::admit`] back; what was never there is no error.
    pub(super) fn withdraw(&mut self, leases: &LeaseRecords) -> Result<(), NftError> {
        of_leases(leases).into_iter().try_for_each(|(set, elements)| {
            let keys: Vec<Vec<Datum>> = elements.into_iter().map(|(key, _)| key).collect();
            self.0.remove(set, &keys)
        })
    }

    /// Names of sets in which something of these leases is missing or wrong.
    pub(super) fn lacking(&mut self, leases: &LeaseRecords) -> Result<Vec<&'static str>, NftError> {
        let mut lacking = Vec::new();
        for (set, wanted) in of_leases(leases) {
            let present: Elements = match self.0.elements(set) {
                Err(NftError::NoSet { .. }) => Elements::new(),
                other => other?.into_iter().collect(),
            };
            if wanted.iter().any(|(key, data)| present.get(&key) != Some(data)) {
                lacking.push(set);
            }
        }
        Ok(lacking)
    }

    /// Host ports as the kernel has them, by pod address: what is left when the Store is lost.
    pub(super) fn host_ports(&mut self) -> Result<BTreeMap<IpAddr, Vec<HostPort>>, NftError> {
        let mut found = BTreeMap::<_, Vec<_>>::new();
        for set in hostport::MAPS {
            let present = match self.0.elements(set) {
                Err(NftError::NoSet { .. }) => Vec::new(),
                other => other?,
            };
            for (pod, port) in present.iter().filter_map(|(key, data)| hostport::read(key, data)) {
                found.entry(pod).or_default().push(port);
            }
        }
        Ok(found)
    }
}
