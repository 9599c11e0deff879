//! Against the kernel, in namespaces of their own; `ip` is the second witness.

use super::*;
use crate::kernel::netns::Rtnetlink;
use crate::kernel::testing::{NamedNetns, needs_root};

fn route(destination: &str, target: RouteTarget) -> Route {
    let destination = destination.parse().unwrap();
    Route { destination, table: None, target, source: None, metric: None, mtu_bytes: None }
}

fn link(name: &str) -> RouteTarget {
    RouteTarget::Link(name.to_owned())
}

fn rule(source: &str) -> SourceRule {
    SourceRule { source: source.parse().unwrap(), table: 0x5745, priority: 5700 }
}

/// A node with two links and an address a family.
fn node() -> NamedNetns {
    let node = NamedNetns::new("node");
    for command in [
        &["ip", "link", "set", "lo", "up"][..],
        &["ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0"],
        &["ip", "link", "add", "weftp0", "type", "veth", "peer", "name", "c0"],
        &["ip", "addr", "add", "192.0.2.1/24", "dev", "a0"],
        &["ip", "addr", "add", "2001:db8::1/64", "dev", "a0", "nodad"],
    ] {
        node.must(command);
    }
    for name in ["a0", "b0", "weftp0", "c0"] {
        node.must(&["ip", "link", "set", name, "up"]);
    }
    node
}

async fn apply(routes: &[Route], rules: &[SourceRule]) -> Applied {
    let connection = Rtnetlink::connect().unwrap();
    Routes::new(connection.handle.clone())
        .apply(&routes.iter().cloned().collect(), &rules.iter().cloned().collect())
        .await
}

fn everything() -> (Vec<Route>, Vec<SourceRule>) {
    let mut routes = vec![
        Route { source: Some("192.0.2.1".parse().unwrap()), ..route("10.1.0.0/24", link("a0")) },
        Route { source: Some("2001:db8::1".parse().unwrap()), ..route("fd01::/64", link("a0")) },
        Route { metric: Some(0x7000_0000), ..route("10.0.0.0/8", RouteTarget::Unreachable) },
        Route { metric: Some(0x7000_0000), ..route("fd00::/8", RouteTarget::Unreachable) },
        route("10.96.0.10/32", RouteTarget::Local),
        route("fd96::a/128", RouteTarget::Local),
        Route { table: Some(0x5745), ..route("192.0.2.2/32", link("a0")) },
        Route { table: Some(0x5745), ..route("2001:db8::2/128", link("a0")) },
    ];
    routes.sort();
    (routes, vec![rule("10.1.1.0/24"), rule("fd01:0:0:1::/64")])
}

#[test]
fn every_shape_of_route_is_applied_once_and_removed_again() {
    if !needs_root() {
        return;
    }
    let node = node();
    let (routes, rules) = everything();
    let first = node.block_on(apply(&routes, &rules));
    assert_eq!(
        (first.failed.clone(), first.changed.len()),
        (vec![], routes.len() + rules.len()),
        "{first:?}"
    );
    let main = node.must(&["ip", "route", "show", "table", "all", "proto", "87"]);
    assert!(main.contains("10.1.0.0/24 dev a0 scope link src 192.0.2.1"), "{main}");
    assert!(main.contains("unreachable 10.0.0.0/8"), "{main}");
    assert!(main.contains("local 10.96.0.10 dev lo table local"), "{main}");
    assert!(node.must(&["ip", "-6", "rule"]).contains("from fd01:0:0:1::/64 lookup 22341"));
    assert_eq!(node.block_on(apply(&routes, &rules)), Applied::default());
    let last = node.block_on(apply(&[], &[]));
    assert_eq!((last.failed.clone(), last.changed.len()), (vec![], routes.len() + rules.len()), "{last:?}");
    assert_eq!(node.must(&["ip", "route", "show", "table", "all", "proto", "87"]), "");
    assert_eq!(node.must(&["ip", "-6", "route", "show", "table", "all", "proto", "87"]), "");
    assert!(!node.must(&["ip", "rule"]).contains("5700"));
}

#[test]
fn a_route_that_changes_its_target_is_replaced() {
    if !needs_root() {
        return;
    }
    let node = node();
    for destination in ["10.1.0.0/24", "fd01::/64"] {
        let unreachable = route(destination, RouteTarget::Unreachable);
        assert_eq!(node.block_on(apply(&[unreachable], &[])).failed, Vec::<String>::new());
        for target in ["a0", "b0"] {
            let applied = node.block_on(apply(&[route(destination, link(target))], &[]));
            assert_eq!((applied.failed, applied.changed.len()), (vec![], 1), "{destination} {target}");
            let family = if destination.contains(':') { "-6" } else { "-4" };
            let shown = node.must(&["ip", family, "route", "show", "proto", "87"]);
            assert_eq!(shown.lines().count(), 1, "{shown}");
            assert!(shown.contains(&format!("{destination} dev {target}")), "{shown}");
        }
        node.block_on(apply(&[], &[]));
    }
}

#[test]
fn a_route_takes_a_smaller_mtu_and_gives_it_up_again() {
    if !needs_root() {
        return;
    }
    let node = node();
    for (family, destination) in [("-4", "10.1.0.0/24"), ("-6", "fd01::/64")] {
        let plain = route(destination, link("a0"));
        for (mtu_bytes, shown) in
            [(None, ""), (Some(1300), " mtu 1300"), (Some(1280), " mtu 1280"), (None, "")]
        {
            let wanted = [Route { mtu_bytes, ..plain.clone() }];
            let applied = node.block_on(apply(&wanted, &[]));
            assert_eq!((applied.failed, applied.changed.len()), (vec![], 1), "{destination} {mtu_bytes:?}");
            let table = node.must(&["ip", family, "route", "show", "proto", "87"]);
            assert_eq!(table.lines().count(), 1, "{table}");
            assert!(table.contains(shown) && table.contains(" mtu ") == mtu_bytes.is_some(), "{table}");
            assert_eq!(node.block_on(apply(&wanted, &[])), Applied::default());
        }
        node.block_on(apply(&[], &[]));
    }
}

#[test]
fn one_failing_route_stops_no_other() {
    if !needs_root() {
        return;
    }
    let node = node();
    let applied =
        node.block_on(apply(&[route("10.1.0.0/24", link("gone")), route("10.2.0.0/24", link("a0"))], &[]));
    assert_eq!(applied.failed, ["add route 10.1.0.0/24 dev gone: there is no link gone"]);
    assert_eq!(applied.changed, ["route 10.2.0.0/24 dev a0"]);
}

#[test]
fn of_two_routes_that_the_kernel_cannot_tell_apart_one_is_named() {
    if !needs_root() {
        return;
    }
    let node = node();
    let routes = [route("10.1.0.0/24", link("a0")), route("10.1.0.0/24", link("b0"))];
    for changes in [1, 0] {
        let applied = node.block_on(apply(&routes, &[]));
        assert_eq!(applied.failed, ["route 10.1.0.0/24 dev b0: 10.1.0.0/24 dev a0 is wanted too"]);
        assert_eq!(applied.changed.len(), changes);
    }
}

#[test]
fn foreign_routes_and_pod_routes_are_left_alone() {
    if !needs_root() {
        return;
    }
    let node = node();
    node.must(&["ip", "route", "add", "10.9.0.0/24", "dev", "a0"]);
    node.must(&["ip", "route", "add", "10.1.0.5/32", "dev", "weftp0", "proto", "87"]);
    assert_eq!(node.block_on(apply(&[], &[])), Applied::default());
    let foreign = route("10.9.0.0/24", link("b0"));
    let applied = node.block_on(apply(&[foreign], &[]));
    assert_eq!(applied.failed, ["add route 10.9.0.0/24 dev b0: File exists (os error 17)"]);
    assert!(node.must(&["ip", "route"]).contains("10.9.0.0/24 dev a0"));
    node.must(&["ip", "route", "add", "fd09::/64", "dev", "a0"]);
    let applied = node.block_on(apply(&[route("fd09::/64", link("b0"))], &[]));
    assert_eq!(applied.failed, ["add route fd09::/64 dev b0: File exists (os error 17)"]);
}

#[test]
fn the_routes_of_a_pod_attached_between_the_two_dumps_are_left_alone() {
    if !needs_root() {
        return;
    }
    let node = node();
    let seen = node.block_on(async {
        let connection = Rtnetlink::connect().unwrap();
        let links = LinkIndexes::observe(&Links::new(connection.handle.clone())).await.unwrap();
        node.must(&["ip", "link", "add", "weftp1", "type", "veth", "peer", "name", "d0"]);
        node.must(&["ip", "link", "set", "weftp1", "up"]);
        node.must(&["ip", "link", "set", "d0", "up"]);
        node.must(&["ip", "route", "add", "10.1.0.6/32", "dev", "weftp1", "proto", "87"]);
        node.must(&["ip", "route", "add", "fd01::6/128", "dev", "weftp1", "proto", "87"]);
        kernel_view::routes(&connection.handle, &links).await.unwrap()
    });
    assert_eq!(seen.iter().map(ToString::to_string).collect::<Vec<_>>(), [""; 0]);
}
