//! Memory of the names of a large cluster: 10,000 dual-stack Services and 50,000 endpoints of headless ones.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;

use common::*;
use weft_dns::{DnsPlanner, Groups, Store};
use weft_model::Snapshot;
use weft_model::objects::{Protocol, ServiceKind};
use weft_netstack::reconcile::Planner as _;

/// What one name may take, with its share of everything: the plan's and the store's.
const BYTES_PER_NAME: usize = 400;

fn large() -> Snapshot {
    let namespaces: Vec<String> = (0..100).map(|n| format!("ns-{n}")).collect();
    let mut services = Vec::new();
    let mut slices = Vec::new();
    for n in 0..10_000 {
        let [high, low] = u16::try_from(n).unwrap().to_be_bytes();
        let addresses = [format!("10.43.{high}.{low}"), format!("fd00:43::{n:x}")];
        let kind = cluster_ips(&addresses.each_ref().map(String::as_str));
        let mut service = service(&namespaces[n % 100], &format!("svc-{}", n / 100), kind);
        service.ports = vec![port("http", Protocol::Tcp, 80)];
        services.push(service);
    }
    for n in 0..1000 {
        let name = format!("set-{}", n / 100);
        let address = |pod: usize| format!("10.42.{}.{}", n / 4, n % 4 * 50 + pod);
        let endpoints = (0..50).map(|pod| endpoint(&address(pod), None, true)).collect();
        services.push(service(&namespaces[n % 100], &name, ServiceKind::Headless));
        let ports = [("http", Protocol::Tcp, 8080)];
        slices.push(slice(&namespaces[n % 100], &name, &format!("{name}-4"), &ports, endpoints));
    }
    let namespaces: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    snapshot(&namespaces, services, slices)
}

/// Of this process, from `/proc` (proc_pid_statm(5)).
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn the_names_of_a_large_cluster_take_so_much_memory_and_no_more() {
    let cluster = large();
    let before = resident_bytes();
    let mut planner = DnsPlanner::default();
    let planned = planner.plan(&cluster);
    assert_eq!(planned.problems, Vec::new());
    let store = Store::new(None);
    store.write(&Groups::new(), &planned.plan);
    let taken = resident_bytes() - before;
    assert!(store.len() > 153_000, "{}", store.len());
    eprintln!(
        "{} names take {:.1} MiB, {} octets each",
        store.len(),
        taken as f64 / 1_048_576.0,
        taken / store.len()
    );
    assert!(taken / store.len() <= BYTES_PER_NAME, "{taken} octets for {} names", store.len());
}
