//! Clusters that change: what is planned and handed over with memories is what would be without them.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};
use weft_model::snapshot::Objects;
use weft_model::{Planned, Snapshot};
use weft_netstack::reconcile::Planner as _;

use super::IngressPlanner;
use super::table::RouteTable;
use super::tests::{ingress_of, path, rules, secret, service, slice, snapshot};

const HOSTS: [Option<&str>; 5] =
    [None, Some("a.example"), Some("www.a.example"), Some("b.example"), Some("*.example")];
const KINDS: [&str; 3] = ["Exact", "Prefix", "ImplementationSpecific"];
const PATHS: [&str; 5] = ["/", "/a", "/a/", "/a/b", "/(x"];
const SERVICES: [&str; 3] = ["s0", "s1", "s2"];
/// What makes Ingresses and hosts depend on each other and on other objects; the first often.
const ANNOTATIONS: [&[(&str, &str)]; 14] = [
    &[],
    &[],
    &[],
    &[("canary", "true"), ("canary-weight", "20")],
    &[("server-alias", "b.example")],
    &[("server-alias", "c.example,*.d.example")],
    &[("from-to-www-redirect", "true")],
    &[("use-regex", "true")],
    &[("rewrite-target", "/$1")],
    &[("ssl-passthrough", "true")],
    &[("default-backend", "s2")],
    &[("auth-type", "basic"), ("auth-secret", "users")],
    &[("proxy-read-timeout", "7"), ("no-such", "1")],
    &[("auth-type", "basic"), ("auth-secret", "other/users")],
];

/// What a cluster has, so that two are alike where nothing changes between them.
#[derive(Clone, Debug)]
struct Described {
    ingresses: Vec<Option<Parts>>,
    services: Vec<bool>,
    endpoints: Vec<Vec<u8>>,
    users: Option<u8>,
    certificate: Option<bool>,
}

/// Day, annotations, rules (host, kind, path, Service), default backend, whether it has TLS.
type Parts = (u8, usize, Vec<(usize, usize, usize, usize)>, Option<usize>, bool);

fn described() -> impl Strategy<Value = Described> {
    let rule = (0..HOSTS.len(), 0..KINDS.len(), 0..PATHS.len(), 0..SERVICES.len());
    let default = proptest::option::weighted(0.2, 0..SERVICES.len());
    let ingress =
        (1..4_u8, 0..ANNOTATIONS.len(), proptest::collection::vec(rule, 0..4), default, any::<bool>());
    let ingresses = proptest::collection::vec(proptest::option::weighted(0.8, ingress), 5);
    let endpoints = proptest::collection::vec(proptest::collection::vec(1..4_u8, 0..3), 3);
    let services = proptest::collection::vec(proptest::bool::weighted(0.8), 3);
    let (users, certificate) = (proptest::option::of(0..3_u8), proptest::option::of(any::<bool>()));
    (ingresses, services, endpoints, users, certificate).prop_map(
        |(ingresses, services, endpoints, users, certificate)| Described {
            ingresses,
            services,
            endpoints,
            users,
            certificate,
        },
    )
}

/// The second differs from the first in one kind of object at most a few times.
fn changing() -> impl Strategy<Value = Vec<Described>> {
    (described(), proptest::collection::vec((described(), 0..8_usize), 1..6)).prop_map(|(first, others)| {
        let mut all = vec![first];
        for (other, what) in others {
            let mut next = all[all.len() - 1].clone();
            match what {
                0..5 => next.ingresses[what] = other.ingresses[what].clone(),
                5 => next.services = other.services,
                6 => next.endpoints = other.endpoints,
                _ => (next.users, next.certificate) = (other.users, other.certificate),
            }
            all.push(next);
        }
        all
    })
}

fn documents(described: &Described, pair: &(String, String)) -> Vec<Value> {
    let mut documents = Vec::new();
    for (i, one) in described.ingresses.iter().enumerate() {
        let Some((day, annotations, of, default, tls)) = one else { continue };
        let mut spec = json!({"rules": []});
        for (host, kind, text, to) in of {
            let mut one = rules(HOSTS[*host], &[path(KINDS[*kind], PATHS[*text], SERVICES[*to])]);
            spec["rules"].as_array_mut().unwrap().push(one["rules"][0].take());
        }
        if let Some(to) = default {
            spec["defaultBackend"] = super::tests::backend(SERVICES[*to]);
        }
        if *tls {
            spec["tls"] = json!([{"hosts": ["a.example"], "secretName": "tls"}]);
        }
        let annotations: BTreeMap<_, _> = ANNOTATIONS[*annotations].iter().copied().collect();
        documents.push(ingress_of(&format!("i{i}"), *day, json!(annotations), spec));
    }
    for (i, there) in described.services.iter().enumerate() {
        let addresses: Vec<String> = described.endpoints[i].iter().map(|n| format!("10.1.{i}.{n}")).collect();
        let endpoints: Vec<_> = addresses.iter().map(|address| (address.as_str(), true, false)).collect();
        documents.extend(there.then(|| service(SERVICES[i])));
        documents.push(slice(SERVICES[i], &endpoints));
    }
    documents.extend(described.users.map(|n| secret("users", &[("auth", &format!("amy:{n}"))])));
    let key = |right: bool| if right { pair.1.as_str() } else { "no key" };
    documents.extend(
        described.certificate.map(|right| secret("tls", &[("tls.crt", &pair.0), ("tls.key", key(right))])),
    );
    documents
}

/// As the watch has it: what is the same stays the same object.
fn sharing(mut now: Snapshot, before: Option<&Snapshot>) -> Snapshot {
    if let Some(before) = before {
        share(&mut now.ingresses, &before.ingresses);
        share(&mut now.services, &before.services);
        share(&mut now.endpoint_slices, &before.endpoint_slices);
        share(&mut now.referred, &before.referred);
    }
    now
}

fn share<K: Ord + Clone, V: PartialEq>(now: &mut Objects<K, V>, before: &Objects<K, V>) {
    for (key, one) in before.iter() {
        if now.get(key).is_some_and(|found| found == one) {
            Arc::make_mut(now).insert(key.clone(), one.clone());
        }
    }
}

/// Of a cluster that changes, one after the other.
pub(crate) fn tables() -> impl Strategy<Value = Vec<RouteTable>> {
    let pair = super::tests::pair("a.example");
    let plan = move |one: &Described| IngressPlanner::default().plan(&snapshot(documents(one, &pair))).plan;
    changing().prop_map(move |clusters| clusters.iter().map(&plan).collect())
}

fn sorted(planned: &Planned<RouteTable>) -> Vec<String> {
    let mut told: Vec<String> = planned.problems.iter().map(|problem| format!("{problem:?}")).collect();
    told.sort();
    told
}

proptest! {
    #[test]
    fn what_changes_is_planned_and_handed_over_as_if_all_were_new(clusters in changing()) {
        let pair = super::tests::pair("a.example");
        let (mut planner, mut before) = (IngressPlanner::default(), None);
        let (mut file, mut read): (Vec<u8>, Option<RouteTable>) = (Vec::new(), None);
        for described in &clusters {
            let now = sharing(snapshot(documents(described, &pair)), before.as_ref());
            let (planned, anew) = (planner.plan(&now), IngressPlanner::default().plan(&now));
            prop_assert_eq!(&planned.plan, &anew.plan);
            prop_assert_eq!(sorted(&planned), sorted(&anew));
            let table = planned.plan;
            match &mut read {
                None => {
                    file = table.encode().unwrap();
                    read = Some(RouteTable::decode(&file).unwrap());
                }
                Some(read) => match table.encode_change(read).unwrap() {
                    None => prop_assert_eq!(&*read, &table),
                    Some(line) => {
                        prop_assert!(!line[1..].contains(&b'\n') && line[0] == b'\n');
                        file.extend(&line);
                        read.change(&line[1..]).unwrap();
                    }
                },
            }
            prop_assert_eq!(read.as_ref(), Some(&table));
            prop_assert_eq!(RouteTable::decode(&file).unwrap(), table);
            before = Some(now);
        }
    }
}
