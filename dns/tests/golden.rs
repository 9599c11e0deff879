//! Golden stories: a cluster in code, the plan as zone text. `WEFT_GOLDEN=update` writes the texts anew.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;

use std::path::Path;

use common::*;
use weft_model::Snapshot;
use weft_model::objects::{Protocol, ServiceKind};

#[track_caller]
fn assert_story(story: &str, snapshot: &Snapshot) {
    let planned = plan(snapshot);
    let mut text = planned.plan.to_string();
    for problem in &planned.problems {
        text.push_str(&format!("; problem: {problem}\n"));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(story).join("dns.txt");
    if std::env::var_os("WEFT_GOLDEN").is_some_and(|value| value == "update") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{} differs; WEFT_GOLDEN=update writes it anew", path.display());
}

#[test]
fn every_kind_of_service() {
    assert_story("every-kind-of-service", &zoo());
}

#[test]
fn an_empty_cluster() {
    assert_story("empty-cluster", &snapshot(&[], [], []));
}

#[test]
fn objects_that_cannot_be_named() {
    let mut long_port = service("default", "long-port", cluster_ips(&["10.43.0.1"]));
    long_port.ports = vec![port(&"p".repeat(63), Protocol::Tcp, 80), port("web", Protocol::Tcp, 80)];
    let services = [
        long_port,
        service("default", "address", ServiceKind::ExternalName("192.0.2.1".to_owned())),
        service("default", "nowhere", ServiceKind::ExternalName(String::new())),
        service("default", "pending", cluster_ips(&[])),
        service("default", &"n".repeat(64), cluster_ips(&["10.43.0.2"])),
    ];
    assert_story("objects-that-cannot-be-named", &snapshot(&["default"], services, []));
}

#[test]
fn ranges_between_octets() {
    let mut cluster = snapshot(&["default"], [service("default", "web", cluster_ips(&["10.97.1.2"]))], []);
    let mut config = config();
    config.cluster_domain = "Example.Internal".to_owned();
    config.service_cidrs = vec!["10.96.0.0/12".parse().unwrap(), "fd00:43::/109".parse().unwrap()];
    cluster.config = config.into();
    assert_story("ranges-between-octets", &cluster);
}
