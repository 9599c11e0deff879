//! Random clusters: the store must say exactly what a naive evaluator, written from the specification without any
//! plan, table or reference count, says; after any sequence of changes too.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;

use common::*;
use hickory_proto::rr::RecordType;
use proptest::prelude::*;
use weft_dns::{Answer, DnsPlanner, Groups, Name, Question, Store};
use weft_model::Snapshot;
use weft_model::objects::{Endpoint, EndpointSlice, Protocol, Service, ServiceKind};
use weft_netstack::reconcile::Planner as _;

const ZONE: &str = "cluster.local.";
const TYPES: [RecordType; 5] =
    [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::PTR, RecordType::CNAME];

/// Every record of the cluster as text, one by one from the sentences of the specification: name, type, data.
fn specified(cluster: &Snapshot) -> BTreeSet<(String, &'static str, String)> {
    let mut records = BTreeSet::new();
    for service in cluster.services.values() {
        let name = format!("{}.{}.svc.{ZONE}", service.key.name, service.key.namespace);
        match &service.kind {
            ServiceKind::ClusterIps(addresses) => {
                for address in addresses {
                    records.insert(address_record(&name, *address));
                    records.insert((reverse(*address), "PTR", name.clone()));
                    for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
                        let owner = format!("_{}._{}.{name}", port.name, port.protocol.name());
                        records.insert((owner, "SRV", format!("{} {name}", port.port)));
                    }
                }
            }
            ServiceKind::Headless => headless(cluster, service, &name, &mut records),
            ServiceKind::ExternalName(target) => {
                records.insert((name, "CNAME", format!("{target}.")));
            }
        }
    }
    records
}

fn headless(
    cluster: &Snapshot,
    service: &Service,
    name: &str,
    records: &mut BTreeSet<(String, &'static str, String)>,
) {
    for slice in cluster.endpoint_slices.values().filter(|slice| slice.service == service.key) {
        for endpoint in &slice.endpoints {
            if !(endpoint.ready || service.publish_not_ready_addresses) {
                continue;
            }
            let dashed = endpoint.address.to_string().replace(['.', ':'], "-");
            let own = format!("{}.{name}", endpoint.hostname.as_deref().unwrap_or(&dashed));
            records.insert(address_record(name, endpoint.address));
            records.insert(address_record(&own, endpoint.address));
            records.insert((reverse(endpoint.address), "PTR", own.clone()));
            for port in slice.ports.iter().filter(|port| !port.name.is_empty()) {
                let owner = format!("_{}._{}.{name}", port.name, port.protocol.name());
                records.insert((owner, "SRV", format!("{} {own}", port.port)));
            }
        }
    }
}

fn address_record(name: &str, address: IpAddr) -> (String, &'static str, String) {
    (name.to_owned(), if address.is_ipv4() { "A" } else { "AAAA" }, address.to_string())
}

fn reverse(address: IpAddr) -> String {
    let digits: Vec<String> = match address {
        IpAddr::V4(v4) => v4.octets().iter().rev().map(u8::to_string).collect(),
        IpAddr::V6(v6) => {
            let hex: String = v6.octets().iter().map(|octet| format!("{octet:02x}")).collect();
            hex.chars().rev().map(String::from).collect()
        }
    };
    format!("{}.{}.arpa.", digits.join("."), if address.is_ipv4() { "in-addr" } else { "ip6" })
}

/// What a question deserves: the data, or whether the name exists, by looking at everything every time.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Data(BTreeSet<String>),
    NoData,
    NoName,
}

fn expected(
    cluster: &Snapshot,
    records: &BTreeSet<(String, &'static str, String)>,
    name: &str,
    record_type: RecordType,
) -> Expected {
    let wanted = record_type.to_string();
    let data: BTreeSet<String> = records
        .iter()
        .filter(|(owner, kind, _)| owner == name && (*kind == wanted || *kind == "CNAME"))
        .map(|(_, kind, data)| format!("{kind} {data}"))
        .collect();
    if !data.is_empty() {
        return Expected::Data(data);
    }
    let apexes = ["cluster.local.", "42.10.in-addr.arpa.", "43.10.in-addr.arpa."];
    let own = ["dns-version.cluster.local.", "ns.dns.cluster.local."].map(str::to_owned);
    let namespaces =
        cluster.namespaces.keys().flat_map(|ns| ["svc", "pod"].map(|kind| format!("{ns}.{kind}.{ZONE}")));
    let below = format!(".{name}");
    let exists = records
        .iter()
        .map(|(owner, ..)| owner.clone())
        .chain(own)
        .chain(namespaces)
        .any(|owner| owner == name || owner.ends_with(&below));
    if exists || apexes.contains(&name) { Expected::NoData } else { Expected::NoName }
}

fn answered(store: &Store, name: &str, record_type: RecordType) -> Expected {
    let question = Question { name: Name::parse(name).unwrap(), record_type };
    let Answer::Local(local) = store.answer(&question, 0) else { panic!("{name} is ours") };
    let own = local.records.iter().filter(|(owner, _)| *owner == question.name);
    let data: BTreeSet<String> = own.map(|(_, data)| without_weights(&data.to_string())).collect();
    match (data.is_empty(), local.name_error) {
        (false, _) => Expected::Data(data),
        (true, false) => Expected::NoData,
        (true, true) => Expected::NoName,
    }
}

/// `SRV priority weight port target` without what the specification leaves open.
fn without_weights(data: &str) -> String {
    match data.split(' ').collect::<Vec<_>>()[..] {
        ["SRV", _, _, port, target] => format!("SRV {port} {target}"),
        _ => data.to_owned(),
    }
}

/// Every name of the cluster, every ancestor of one in a zone of ours, and a child of each that nobody has.
fn names_to_ask(cluster: &Snapshot, records: &BTreeSet<(String, &'static str, String)>) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    let namespaces = ["default", "other", "gone"]
        .iter()
        .flat_map(|ns| ["svc", "pod"].into_iter().map(move |kind| format!("{ns}.{kind}.{ZONE}")));
    let all_services =
        cluster.services.keys().map(|key| format!("{}.{}.svc.{ZONE}", key.name, key.namespace));
    for name in records.iter().map(|(owner, ..)| owner.clone()).chain(namespaces).chain(all_services) {
        let mut rest = name.as_str();
        while rest.ends_with(ZONE)
            || rest.ends_with("43.10.in-addr.arpa.")
            || rest.ends_with("42.10.in-addr.arpa.")
        {
            names.insert(rest.to_owned());
            names.insert(format!("nobody.{rest}"));
            let Some((_, parent)) = rest.split_once('.') else { break };
            rest = parent;
        }
    }
    names
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

fn endpoints() -> impl Strategy<Value = Endpoint> {
    let address = prop_oneof![
        (0u8..6).prop_map(|n| format!("10.42.0.{n}")),
        (1u8..6).prop_map(|n| format!("fd00:42::{n}"))
    ];
    (address, prop::option::of("h[0-2]"), any::<bool>())
        .prop_map(|(address, hostname, ready)| endpoint(&address, hostname.as_deref(), ready))
}

fn names() -> impl Strategy<Value = (String, String)> {
    (prop_oneof![Just("default".to_owned()), Just("other".to_owned())], "[a-d]")
}

fn services() -> impl Strategy<Value = Service> {
    let kind = prop_oneof![
        (0u8..40).prop_map(|n| cluster_ips(&[&format!("10.43.0.{n}")])),
        (0u8..40).prop_map(|n| cluster_ips(&[&format!("10.43.0.{n}"), &format!("fd00:43::{n:x}")])),
        Just(cluster_ips(&[])),
        Just(ServiceKind::Headless),
        Just(ServiceKind::Headless),
        Just(ServiceKind::ExternalName("www.example.com".to_owned())),
    ];
    let ports = prop::collection::vec(("(p[0-2])?", protocols(), 1u16..4), 0..3);
    (names(), kind, ports, any::<bool>()).prop_map(|((namespace, name), kind, ports, publish)| {
        let mut service = service(&namespace, &name, kind);
        service.ports =
            ports.into_iter().map(|(name, protocol, number)| port(&name, protocol, number)).collect();
        service.publish_not_ready_addresses = publish;
        service
    })
}

fn slices() -> impl Strategy<Value = EndpointSlice> {
    let ports = prop::collection::vec(("(p[0-2])?", protocols(), 1u16..4), 0..3);
    (names(), "s[0-3]", ports, prop::collection::vec(endpoints(), 0..4)).prop_map(
        |((namespace, name), suffix, ports, endpoints)| {
            let ports: Vec<_> = ports.iter().map(|(n, p, number)| (n.as_str(), *p, *number)).collect();
            slice(&namespace, &name, &format!("{name}-{suffix}"), &ports, endpoints)
        },
    )
}

fn clusters() -> impl Strategy<Value = Snapshot> {
    let namespaces = prop::sample::subsequence(vec!["default", "other", "third"], 0..=3);
    (namespaces, prop::collection::vec(services(), 0..8), prop::collection::vec(slices(), 0..8))
        .prop_map(|(namespaces, services, slices)| snapshot(&namespaces, services, slices))
}

fn other_slices() -> impl Strategy<Value = Vec<Vec<EndpointSlice>>> {
    prop::collection::vec(prop::collection::vec(slices(), 0..8), 0..3)
}

/// The cluster, then the very same Services with other EndpointSlices, one set after the other.
fn with_other_slices((cluster, others): (Snapshot, Vec<Vec<EndpointSlice>>)) -> Vec<Snapshot> {
    let mut history = vec![cluster.clone()];
    for slices in others {
        let endpoint_slices = snapshot(&[], [], slices).endpoint_slices;
        history.push(Snapshot { endpoint_slices, ..cluster.clone() });
    }
    history
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_says_what_the_specification_says_after_any_sequence_of_changes(
        clusters in prop::collection::vec((clusters(), other_slices()), 1..3)
    ) {
        let mut planner = DnsPlanner::default();
        let store = Store::default();
        let mut groups = std::sync::Arc::<Groups>::default();
        let history: Vec<Snapshot> = clusters.into_iter().flat_map(with_other_slices).collect();
        for cluster in &history {
            let planned = planner.plan(cluster);
            prop_assert_eq!(&planned.plan, &plan(cluster).plan, "memoised planning differs from planning anew");
            store.write(&groups, &planned.plan);
            groups = planned.plan.groups;
            let records = specified(cluster);
            for name in names_to_ask(cluster, &records) {
                for record_type in TYPES {
                    let wanted = expected(cluster, &records, &name, record_type);
                    prop_assert_eq!(answered(&store, &name, record_type), wanted, "{} {}", name, record_type);
                }
            }
        }
        let fresh = Store::default();
        fresh.write(&Groups::new(), &DnsPlanner::default().plan(history.last().unwrap()).plan);
        prop_assert_eq!(store.len(), fresh.len(), "names linger");
    }
}
