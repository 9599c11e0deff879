//! A thousand services in one transaction, then one endpoint.

use std::time::Instant;

use super::*;

fn endpoints(service: usize) -> Vec<(String, u16)> {
    (1..=5).map(|n| (format!("10.{}.{}.{n}", 1 + service / 250, service % 250), 8080)).collect()
}

fn many(count: usize) -> Table {
    let backends: Vec<_> = (0..count).map(endpoints).collect();
    let backends: Vec<Vec<_>> =
        backends.iter().map(|list| list.iter().map(|(a, port)| (a.as_str(), *port)).collect()).collect();
    let vips: Vec<_> = (0..count).map(|n| format!("10.96.{}.{}", n / 250, n % 250)).collect();
    let services: Vec<_> =
        vips.iter().zip(&backends).map(|(vip, list)| (vip.as_str(), 80, list.as_slice())).collect();
    proxy(&services)
}

#[test]
fn a_thousand_services_load_in_one_transaction_and_an_endpoint_costs_one_element() {
    in_namespace(|| {
        let mut desired = many(1000);
        let mut owner = NftTable::new("weft-proxy");
        let before = owner.generation().unwrap();
        let start = Instant::now();
        owner.apply(&desired, Trust::Nothing).unwrap();
        println!("1000 services x 5 endpoints: {:?}", start.elapsed());
        assert_eq!(owner.generation().unwrap(), before + 1, "one transaction");
        assert_eq!(owner.elements("endpoints").unwrap().len(), 5000);
        let set = desired.sets.get_mut("endpoints").unwrap();
        let service = set.groups.get_mut("10.96.3.7").unwrap();
        let key = service.keys().next().unwrap().to_vec();
        let data = ElementData::AddressAndPort("10.200.0.1".parse().unwrap(), 9090);
        Arc::make_mut(service).insert(&key, &data);
        let start = Instant::now();
        let changed = owner.apply(&desired, Trust::Shadow).unwrap();
        println!("one endpoint: {:?}", start.elapsed());
        assert_eq!(changed.len(), 2, "{changed:?}");
        assert!(
            changed[1].starts_with("add element endpoints { 10.96.3.7 . tcp . 80 . 0 : 10.200.0.1 . 9090")
        );
        let start = Instant::now();
        settles(&mut owner, &desired);
        println!("three looks at it, two of them at the kernel: {:?}", start.elapsed());
        shows("10.96.3.7 . tcp . 80 . 0x00000000 : 10.200.0.1 . 9090");
    });
}

#[test]
fn endpoint_after_endpoint_the_shadow_stays_right() {
    in_namespace(|| {
        let mut desired = many(1000);
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let mut times = Vec::new();
        for round in 0..200u16 {
            let set = desired.sets.get_mut("endpoints").unwrap();
            let service = set.groups.values_mut().nth(usize::from(round) * 5).unwrap();
            let key = service.keys().last().unwrap().to_vec();
            let data = ElementData::AddressAndPort("10.200.0.1".parse().unwrap(), round);
            // As a planner does: a new group, the other 999 untouched.
            let mut elements = service.as_ref().clone();
            elements.insert(&key, &data);
            *service = Arc::new(elements);
            let start = Instant::now();
            assert_eq!(owner.apply(&desired, Trust::Shadow).unwrap().len(), 2);
            times.push(start.elapsed());
        }
        times.sort_unstable();
        println!("one endpoint, median: {:?}", times[times.len() / 2]);
        settles(&mut owner, &desired);
    });
}

#[test]
fn a_batch_of_many_megabytes_with_a_fault_at_its_end_is_refused_as_a_whole() {
    in_namespace(|| {
        let mut desired = many(1000);
        let key = vec![ip("10.99.99.99"), Datum::Protocol(Protocol::Tcp), Datum::Port(1)];
        let set = desired.sets.get_mut("service-ips").unwrap();
        set.groups.insert("~".into(), group([(key, ElementData::Verdict(goto("nowhere")))]));
        let mut owner = NftTable::new("weft-proxy");
        let error = owner.apply(&desired, Trust::Nothing).unwrap_err();
        assert!(crate::reconcile::chain(&error).contains("at 10.99.99.99 . tcp . 1: ENOENT"), "{error}");
        shows_not("weft-proxy");
    });
}
