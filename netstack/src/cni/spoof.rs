//! Anti-spoofing (decision 4): a pod's packet must bear an address that is leased to the pod's link.
//!
//! Table `weft-cni`, one chain at raw priority, before connection tracking and every NAT. In: live leases. Out: the
//! whole table, and single elements at ADD and DEL.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::constants::{POD_LINK_PREFIX, PRIORITY_RAW, TABLE_CNI};
use weft_model::ruleset::{
    Base, Chain, ChainKind, Datum, ElementData, Elements, Field, Hook, KeyType, Rule, Set, SetData,
    Statement, Table, Verdict,
};

use crate::kernel::nft::{NftError, NftTable};
use crate::reconcile::Trust;
use crate::store::LeaseRecords;

const SOURCES_V4: &str = "pod-sources-v4";
const SOURCES_V6: &str = "pod-sources-v6";
/// ICMPv6 neighbour solicitation (RFC 4861 section 4.3): its source may be unspecified (duplicate-address detection).
const NEIGHBOUR_SOLICITATION: u8 = 135;

#[derive(Debug, thiserror::Error)]
#[error("{operation}")]
pub struct SpoofError {
    operation: &'static str,
    source: NftError,
}

/// Owner of table `weft-cni`.
pub trait SourceGuard: Send {
    /// Makes the kernel's table equal to `table`; one line per change.
    fn ensure(&mut self, table: &Table) -> Result<Vec<String>, SpoofError>;
    /// From now on packets from `link` may bear these source addresses.
    fn allow(&mut self, link: &str, addresses: &[IpAddr]) -> Result<(), SpoofError>;
    /// Takes that back; what was never allowed is no error.
    fn forbid(&mut self, link: &str, addresses: &[IpAddr]) -> Result<(), SpoofError>;
}

impl SourceGuard for NftTable {
    fn ensure(&mut self, table: &Table) -> Result<Vec<String>, SpoofError> {
        self.apply(table, Trust::Nothing)
            .map_err(|source| SpoofError { operation: "apply anti-spoofing rules", source })
    }

    fn allow(&mut self, link: &str, addresses: &[IpAddr]) -> Result<(), SpoofError> {
        for (set, keys) in by_set(link, addresses) {
            let elements: Vec<_> = keys.into_iter().map(|key| (key, ElementData::None)).collect();
            self.insert(set, &elements)
                .map_err(|source| SpoofError { operation: "allow the source of a pod", source })?;
        }
        Ok(())
    }

    fn forbid(&mut self, link: &str, addresses: &[IpAddr]) -> Result<(), SpoofError> {
        for (set, keys) in by_set(link, addresses) {
            self.remove(set, &keys)
                .map_err(|source| SpoofError { operation: "forbid the source of a pod", source })?;
        }
        Ok(())
    }
}

fn key(link: &str, address: IpAddr) -> Vec<Datum> {
    vec![Datum::Name(link.to_owned()), Datum::Ip(address)]
}

fn set_of(address: IpAddr) -> &'static str {
    if address.is_ipv6() { SOURCES_V6 } else { SOURCES_V4 }
}

fn by_set(link: &str, addresses: &[IpAddr]) -> BTreeMap<&'static str, Vec<Vec<Datum>>> {
    let mut sets = BTreeMap::<_, Vec<_>>::new();
    for address in addresses {
        sets.entry(set_of(*address)).or_default().push(key(link, *address));
    }
    sets
}

/// The whole desired state: every live lease's address on its link.
pub fn plan(leases: &LeaseRecords) -> Table {
    let mut sets = BTreeMap::from([
        (SOURCES_V4.to_owned(), Set::new(vec![KeyType::LinkName, KeyType::Ipv4Address], SetData::None)),
        (SOURCES_V6.to_owned(), Set::new(vec![KeyType::LinkName, KeyType::Ipv6Address], SetData::None)),
    ]);
    for (address, lease) in leases.iter().filter(|(_, lease)| lease.released.is_none()) {
        let set = sets.get_mut(set_of(*address)).expect("both sets were made above");
        let group = set.groups.entry(lease.link.clone()).or_insert_with(|| Arc::new(Elements::new()));
        Arc::make_mut(group).insert(key(&lease.link, *address), ElementData::None);
    }
    let base = Base { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: PRIORITY_RAW };
    let chains = BTreeMap::from([
        ("prerouting".to_owned(), Chain { base: Some(base), rules: vec![from_pods()] }),
        ("pod-source".to_owned(), Chain { base: None, rules: pod_source_rules() }),
    ]);
    Table { name: TABLE_CNI.to_owned(), chains, sets }
}

fn from_pods() -> Rule {
    Rule::new(vec![
        matches(Field::InputLink, Datum::NamePrefix(POD_LINK_PREFIX.to_owned())),
        Statement::Verdict(Verdict::Jump("pod-source".to_owned())),
    ])
    .comment("what pods send")
}

/// Link-local IPv6 never leaves the link; everything else must be leased.
fn pod_source_rules() -> Vec<Rule> {
    let leased = |source: Field, set: &str| Statement::Lookup {
        key: vec![Field::InputLink, source],
        negated: false,
        set: set.to_owned(),
    };
    let accept = Statement::Verdict(Verdict::Return);
    let link_local = IpNet::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10);
    vec![
        Rule::new(vec![leased(Field::Ip4Source, SOURCES_V4), accept.clone()]),
        Rule::new(vec![leased(Field::Ip6Source, SOURCES_V6), accept.clone()]),
        Rule::new(vec![matches(Field::Ip6Source, Datum::Net(link_local)), accept.clone()])
            .comment("link-local: neighbour discovery, never forwarded"),
        Rule::new(vec![
            matches(Field::Ip6Source, Datum::Ip(Ipv6Addr::UNSPECIFIED.into())),
            matches(Field::Icmp6Type, Datum::Icmp6Type(NEIGHBOUR_SOLICITATION)),
            accept,
        ])
        .comment("duplicate-address detection"),
        Rule::new(vec![Statement::Counter, Statement::Verdict(Verdict::Drop)])
            .comment("not an address leased to this pod"),
    ]
}

fn matches(field: Field, value: Datum) -> Statement {
    Statement::Match { field, negated: false, value }
}
