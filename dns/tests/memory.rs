//! Memory of the names of a large cluster: 10,000 dual-stack Services and 50,000 endpoints of headless ones.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::*;
use weft_dns::{DnsPlan, DnsPlanner, Groups, Store};
use weft_model::Snapshot;
use weft_model::objects::{Protocol, ServiceKind};
use weft_netstack::reconcile::Planner as _;

/// What the names may take, the plan's and the store's share together.
const MOST_BYTES: usize = 16 << 20;

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

/// Of this process, less what it has from files: the code that runs for the first time is no name (proc_pid_statm(5)).
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages = |field| statm.split(' ').nth(field).unwrap().parse::<usize>().unwrap();
    (pages(1) - pages(2)) * 4096
}

#[test]
fn the_names_of_a_large_cluster_take_so_much_memory_and_no_more() {
    let cluster = large();
    let before = resident_bytes();
    let mut planner = DnsPlanner::default();
    let started_at = Instant::now();
    let planned = planner.plan(&cluster);
    assert_eq!(planned.problems, Vec::new());
    let of_plan = resident_bytes() - before;
    let planned_at = started_at.elapsed();
    let store = Store::new(None);
    store.write(&Groups::new(), &planned.plan);
    let taken = resident_bytes() - before;
    assert!(store.len() > 153_000, "{}", store.len());
    eprintln!(
        "{} names take {:.1} MiB, {} octets each; {:.1} MiB of it are the plan, made in {planned_at:?}, written in {:?}",
        store.len(),
        taken as f64 / 1_048_576.0,
        taken / store.len(),
        of_plan as f64 / 1_048_576.0,
        started_at.elapsed() - planned_at,
    );
    assert!(taken <= MOST_BYTES, "{taken} octets for {} names", store.len());
    changes_leave_nothing_behind(&store, &mut planner, planned.plan, &cluster);
}

/// A thousand Services have one address, then another, many times over.
fn changes_leave_nothing_behind(store: &Store, planner: &mut DnsPlanner, first: DnsPlan, cluster: &Snapshot) {
    let names = store.len();
    let mut plan = first;
    let mut after_some_rounds = 0;
    for round in 0..16 {
        // What is not needed any more has its limits by then.
        if round == 8 {
            after_some_rounds = resident_bytes();
        }
        let mut services = (*cluster.services).clone();
        for service in services.values_mut().take(1000).filter(|_| round % 2 == 0) {
            if let ServiceKind::ClusterIps(_) = &service.kind {
                let mut other = (**service).clone();
                other.kind = cluster_ips(&["10.43.255.1"]);
                *service = Arc::new(other);
            }
        }
        let changed = Snapshot { services: Arc::new(services), ..cluster.clone() };
        let next = planner.plan(&changed).plan;
        let changes = store.write(&plan.groups, &next).len();
        assert!((900..=1000).contains(&changes), "{changes}");
        plan = next;
    }
    assert_eq!(store.len(), names, "the last round is as the first");
    let grown = resident_bytes().saturating_sub(after_some_rounds);
    assert!(grown < 1 << 19, "{grown} octets more after changes");
}
