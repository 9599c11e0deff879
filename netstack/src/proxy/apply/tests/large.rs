//! Services as large as the API allows: more endpoints than one EndpointSlice holds, and many ports.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::ops::Range;

use super::*;

/// discovery.k8s.io/v1, `endpoints`: "Each slice may include a maximum of 1000 endpoints."
const OF_A_SLICE: usize = 1_000;
const ENDPOINTS: usize = 1_500;
const PORTS: u16 = 64;

fn endpoint(ipv6: bool, number: usize) -> String {
    let (third, fourth) = (32 + number / 250, 1 + number % 250);
    if ipv6 { format!("fd00:244:0:20::{third}:{fourth}") } else { format!("10.244.{third}.{fourth}") }
}

fn service(ports: &[Value]) -> Value {
    json!({
        "kind": "Service", "metadata": {"name": "large", "namespace": "default"},
        "spec": {"clusterIPs": FAMILIES.each_ref().map(|family| family.vip), "ports": ports},
    })
}

/// Both families' slices of these endpoints.
fn slices(name: &str, numbers: Range<usize>, ports: &[Value]) -> [Value; 2] {
    [false, true].map(|ipv6| {
        let of = |number| json!({"addresses": [endpoint(ipv6, number)], "nodeName": "node-b"});
        json!({
            "kind": "EndpointSlice", "addressType": if ipv6 { "IPv6" } else { "IPv4" }, "ports": ports,
            "endpoints": numbers.clone().map(of).collect::<Vec<Value>>(),
            "metadata": {
                "name": format!("{name}-{ipv6}"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": "large"},
            },
        })
    })
}

/// Servers behind `weft0` at all addresses of the endpoints; they answer with the address and port that was asked.
fn serve_everywhere(rig: &Rig, ports: Range<u16>) {
    for family in &FAMILIES {
        let range = if family.ipv6 { "fd00:244:0:20::/64" } else { "10.244.32.0/20" };
        let (remote, space) = (family.remote, &rig.spaces[REMOTE]);
        run(&format!(
            "ip route add {range} via {remote} dev weft0; ip -n {space} route add local {range} dev lo"
        ));
    }
    for port in ports {
        let listener = rig.within(REMOTE, move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let asked = stream.local_addr().unwrap();
                let _ = write!(stream, "{}", SocketAddr::new(asked.ip().to_canonical(), asked.port()));
            }
        });
    }
}

#[test]
fn a_service_reaches_more_endpoints_than_a_slice_holds_and_one_that_goes_costs_a_few_elements() {
    in_node(|rig| {
        serve_everywhere(rig, 8080..8081);
        let (service_ports, slice_ports) = ([json!({"port": 80})], [json!({"port": 8080})]);
        let objects = |endpoints: usize| -> Vec<Value> {
            let first = slices("first", 0..OF_A_SLICE, &slice_ports);
            let second = slices("second", OF_A_SLICE..endpoints, &slice_ports);
            [service(&service_ports)].into_iter().chain(first).chain(second).collect()
        };
        rig.apply(objects(ENDPOINTS));
        for family in &FAMILIES {
            let reached = |number: usize| at(&endpoint(family.ipv6, number), 8080).to_string();
            let all: BTreeSet<String> = (0..ENDPOINTS).map(reached).collect();
            let of_second: BTreeSet<String> = (OF_A_SLICE..ENDPOINTS).map(reached).collect();
            let seen: BTreeSet<String> = rig.within(POD_A, || {
                (0..400).map(|_| ask(at(family.vip, 80)).unwrap()).collect::<BTreeSet<String>>()
            });
            assert!(seen.is_subset(&all), "{:?}", seen.difference(&all));
            assert!(seen.len() > 250, "400 connections reached {} of {ENDPOINTS} endpoints", seen.len());
            assert!(!seen.is_disjoint(&of_second));
        }
        let changed = rig.apply(objects(ENDPOINTS - 1)).changed;
        assert!(changed.len() < 20, "{changed:#?}");
        for family in &FAMILIES {
            rig.within(POD_A, || (0..50).for_each(|_| assert!(ask(at(family.vip, 80)).is_ok())));
        }
    });
}

#[test]
fn each_of_64_ports_leads_to_its_own_target() {
    in_node(|rig| {
        serve_everywhere(rig, 9_000..9_000 + PORTS);
        let named = |first: u16| -> Vec<Value> {
            (0..PORTS).map(|i| json!({"name": format!("p{i}"), "port": first + i})).collect()
        };
        let slices = slices("one", 0..1, &named(9_000));
        rig.apply([service(&named(1_000))].into_iter().chain(slices).collect());
        for family in &FAMILIES {
            let target = endpoint(family.ipv6, 0);
            rig.within(POD_A, move || {
                for i in 0..PORTS {
                    let answer = ask(at(family.vip, 1_000 + i)).unwrap();
                    assert_eq!(answer, at(&target, 9_000 + i).to_string());
                }
            });
        }
    });
}
