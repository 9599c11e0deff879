//! Whole plans for small clusters, both families.

use std::collections::BTreeMap;
use std::sync::Arc;

use weft_model::constants::PRIORITY_LAST;
use weft_model::node_facts::Uplink;
use weft_model::ruleset::{Hook, Statement, Verdict};
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, WgPublicKey};

use super::*;

/// A node with everything derived from its number; `dual`, IPv4-only or IPv6-only.
fn node(number: u8, ipv4: bool, ipv6: bool) -> Node {
    let (mut pod_cidrs, mut internal_ips) = (Vec::new(), Vec::new());
    if ipv4 {
        pod_cidrs.push(format!("10.42.{number}.0/24").parse().unwrap());
        internal_ips.push(format!("192.0.2.{number}").parse().unwrap());
    }
    if ipv6 {
        pod_cidrs.push(format!("fd42:0:0:{number}::/64").parse().unwrap());
        internal_ips.push(format!("2001:db8::{number}").parse().unwrap());
    }
    Node {
        name: NodeName(format!("node-{number}").into()),
        uid: format!("uid-{number}"),
        created: i64::from(number),
        labels: BTreeMap::new(),
        pod_cidrs,
        internal_ips,
        leaving: false,
        cordoned: false,
        links: None,
        public_key: Some(WgPublicKey([number; 32])),
        next_public_key: None,
        answers_for: Default::default(),
        unready: false,
        reach: Default::default(),
        wireguard_port: None,
    }
}

pub(in crate::overlay) fn dual(number: u8) -> Node {
    node(number, true, true)
}

/// Seen from `node-1` of a dual-stack cluster.
pub(in crate::overlay) fn snapshot(nodes: Vec<Node>) -> Snapshot {
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let config = ClusterConfig {
        cluster_cidrs: parse(&["10.42.0.0/16", "fd42::/48"]),
        service_cidrs: parse(&["10.43.0.0/16", "fd43::/108"]),
        cluster_dns: ["10.43.0.10", "fd43::a"].iter().map(|text| text.parse().unwrap()).collect(),
        ..ClusterConfig::default()
    };
    let addresses = nodes.iter().find(|node| *node.name.0 == *"node-1").map(|node| node.internal_ips.clone());
    let uplink = Uplink {
        name: "eth0".to_owned(),
        index: 2,
        mtu_bytes: 1500,
        addresses: addresses.unwrap_or_default(),
        subnets: vec![],
    };
    let facts = NodeFacts {
        name: "node-1".into(),
        uplinks: vec![uplink],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    Snapshot {
        generation: Generation(1),
        config: Arc::new(config),
        facts: Arc::new(facts),
        nodes: Arc::new(nodes.into_iter().map(|node| (node.name.clone(), Arc::new(node))).collect()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::default(),
        endpoint_slices: Arc::default(),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

fn plan(nodes: Vec<Node>) -> (OverlayPlan, Vec<String>) {
    let Planned { plan, problems } = OverlayPlanner { open_firewalls: true }.plan(&snapshot(nodes));
    (plan, problems.iter().map(ToString::to_string).collect())
}

fn lines<T: ToString>(values: impl IntoIterator<Item = T>) -> Vec<String> {
    let mut lines: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    lines.sort();
    lines
}

fn peers(plan: &OverlayPlan) -> Vec<String> {
    let peers = plan.wireguard.peers.values();
    lines(peers.map(|peer| {
        let allowed = lines(&peer.allowed_ips).join(" ");
        let endpoint = peer.endpoint.map_or("nowhere".to_owned(), |endpoint| endpoint.to_string());
        format!("{} at {endpoint}: {allowed}", peer.node)
    }))
}

#[test]
fn a_dual_stack_node_reaches_pods_and_nodes_through_the_tunnel_in_both_families() {
    let (plan, problems) = plan(vec![dual(1), dual(2)]);
    assert_eq!(problems, [""; 0]);
    assert_eq!(
        peers(&plan),
        ["node-2 at 192.0.2.2:51820: 10.42.2.0/24 192.0.2.2/32 2001:db8::2/128 fd42:0:0:2::/64"]
    );
    let others = lines(plan.wireguard.peers.values().flat_map(|peer| &peer.other_endpoints));
    assert_eq!(others, ["[2001:db8::2]:51820"]);
    assert_eq!(lines(&plan.wireguard.own_addresses), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(plan.wireguard.listen_port, 51820);
    assert_eq!(
        (plan.mtu_bytes, lines(&plan.host_addresses)),
        (1420, vec!["10.42.1.1/32".to_owned(), "fd42:0:0:1::1/128".to_owned()])
    );
    assert_eq!(
        lines(&plan.routes),
        [
            "10.42.2.0/24 dev weft0 src 10.42.1.1",
            "192.0.2.2/32 dev weft0 table 22341",
            "2001:db8::2/128 dev weft0 table 22341",
            "fd42:0:0:2::/64 dev weft0 src fd42:0:0:1::1",
            "local 10.43.0.10/32 dev lo",
            "local fd43::a/128 dev lo",
            "unreachable 10.42.0.0/16 metric 1879048192",
            "unreachable 10.42.1.0/24 metric 1879048192",
            "unreachable 192.0.2.2/32 table 22341 metric 1879048192",
            "unreachable 2001:db8::2/128 table 22341 metric 1879048192",
            "unreachable fd42:0:0:1::/64 metric 1879048192",
            "unreachable fd42::/48 metric 1879048192",
        ]
    );
    assert_eq!(
        lines(&plan.rules),
        ["5700: from 10.42.1.0/24 lookup 22341", "5700: from fd42:0:0:1::/64 lookup 22341"]
    );
    let sysctls: Vec<_> =
        plan.sysctls.iter().chain(&plan.link_sysctls).map(|s| format!("{}={}", s.name, s.value)).collect();
    assert_eq!(
        sysctls,
        [
            "net/ipv4/ip_forward=1",
            "net/ipv6/conf/eth0/accept_ra=2",
            "net/ipv6/conf/all/forwarding=1",
            "net/ipv4/conf/weft0/rp_filter=2",
            "net/ipv6/conf/weft0/disable_ipv6=0",
            "net/ipv6/conf/weft0/addr_gen_mode=1",
            "net/ipv6/conf/weft0/accept_ra=0",
        ]
    );
}

#[test]
fn a_path_that_carries_less_narrows_the_routes_to_its_node_and_says_so_there() {
    let mut snapshot = snapshot(vec![dual(1), dual(2), dual(3)]);
    Arc::make_mut(&mut snapshot.facts).observed.narrow_paths = [("node-2".into(), 1200)].into();
    let Planned { plan, problems } = OverlayPlanner { open_firewalls: true }.plan(&snapshot);
    let narrow = lines(plan.routes.iter().filter(|route| route.mtu_bytes.is_some()));
    assert_eq!(
        narrow,
        [
            "10.42.2.0/24 dev weft0 src 10.42.1.1 mtu 1200",
            "192.0.2.2/32 dev weft0 table 22341 mtu 1200",
            "2001:db8::2/128 dev weft0 table 22341 mtu 1280",
            "fd42:0:0:2::/64 dev weft0 src fd42:0:0:1::1 mtu 1280",
        ]
    );
    assert_eq!(problems.len(), 1);
    let said = problems[0].to_string();
    assert!(said.starts_with("Node node-2: ") && said.contains("more than 1200 bytes"), "{said}");
}

#[test]
fn an_ipv4_only_node_leaves_ipv6_alone_and_lets_its_peer_keep_both() {
    let (plan, problems) = plan(vec![node(1, true, false), dual(2)]);
    assert_eq!(problems, [""; 0]);
    assert_eq!(
        peers(&plan),
        ["node-2 at 192.0.2.2:51820: 10.42.2.0/24 192.0.2.2/32 2001:db8::2/128 fd42:0:0:2::/64"]
    );
    assert!(plan.routes.iter().all(|route| route.destination.addr().is_ipv4()));
    assert!(plan.sysctls.iter().chain(&plan.link_sysctls).all(|sysctl| sysctl.name.starts_with("net/ipv4")));
}

#[test]
fn an_ipv6_only_node_calls_its_peers_over_ipv6() {
    let (plan, problems) = plan(vec![node(1, false, true), dual(2), node(3, true, false)]);
    assert_eq!(
        peers(&plan),
        [
            "node-2 at [2001:db8::2]:51820: 10.42.2.0/24 192.0.2.2/32 2001:db8::2/128 fd42:0:0:2::/64",
            "node-3 at nowhere: 10.42.3.0/24 192.0.2.3/32",
        ]
    );
    assert_eq!(
        problems,
        [
            "Node node-3: Missing: shares no address family with this node: it can only be reached once it calls"
        ]
    );
    assert!(plan.routes.iter().all(|route| route.destination.addr().is_ipv6()));
    assert_eq!(lines(&plan.host_addresses), ["fd42:0:0:1::1/128"]);
}

#[test]
fn of_two_nodes_that_claim_the_same_the_older_keeps_it() {
    let thief = |change: fn(&mut Node)| {
        let mut thief = dual(9);
        change(&mut thief);
        let (plan, problems) = plan(vec![dual(1), dual(2), thief]);
        assert_eq!(lines(plan.wireguard.peers.values().map(|peer| &peer.node)), ["node-2"]);
        problems
    };
    assert_eq!(
        thief(|node| node.pod_cidrs[0] = "10.42.2.128/25".parse().unwrap()),
        [
            "Node node-9: Conflict: podCIDR 10.42.2.128/25 belongs to the older Node node-2; this Node is left out of \
             the overlay until one of the two is deleted or claims another"
        ]
    );
    assert_eq!(
        thief(|node| node.internal_ips[1] = "2001:db8::2".parse().unwrap()),
        [
            "Node node-9: Conflict: InternalIP 2001:db8::2 belongs to the older Node node-2; this Node is left out of \
             the overlay until one of the two is deleted or claims another"
        ]
    );
    let key = WgPublicKey([2; 32]);
    assert_eq!(
        thief(|node| node.public_key = Some(WgPublicKey([2; 32]))),
        [format!(
            "Node node-9: Conflict: public key {key} belongs to the older Node node-2; this Node is left out of the \
             overlay until one of the two is deleted or claims another"
        )]
    );
}

#[test]
fn a_node_cannot_claim_addresses_of_pods_or_services_or_ranges_outside_the_cluster() {
    let mut liar = dual(3);
    liar.internal_ips[0] = "10.43.0.10".parse().unwrap();
    liar.pod_cidrs[0] = "0.0.0.0/1".parse().unwrap();
    let (plan, problems) = plan(vec![dual(1), liar]);
    assert_eq!(peers(&plan), ["node-3 at [2001:db8::3]:51820: 2001:db8::3/128 fd42:0:0:3::/64"]);
    assert_eq!(
        problems,
        [
            "Node node-3: InvalidField: InternalIP 10.43.0.10 lies inside a pod or Service range; it is ignored",
            "Node node-3: InvalidField: spec.podCIDRs: 0.0.0.0/1 is not inside the cluster's range; it is ignored",
        ]
    );
}

#[test]
fn a_node_without_a_key_is_unreachable_instead_of_reached_in_clear() {
    let mut keyless = dual(2);
    keyless.public_key = None;
    let (plan, problems) = plan(vec![dual(1), keyless]);
    assert_eq!((peers(&plan), problems), (vec![], vec![]));
    let routes = lines(&plan.routes);
    assert!(
        routes.contains(&"unreachable 192.0.2.2/32 table 22341 metric 1879048192".to_owned()),
        "{routes:?}"
    );
    assert!(!routes.iter().any(|route| route.contains("weft0")), "{routes:?}");
    assert!(plan.table.sets["nodes4"].groups.contains_key("node-2"), "its traffic is not masqueraded either");
}

#[test]
fn the_host_is_strict_before_its_own_node_and_any_peer_are_known() {
    let (plan, problems) = plan(vec![]);
    assert_eq!(problems, [""; 0]);
    assert_eq!(
        lines(&plan.routes),
        [
            "local 10.43.0.10/32 dev lo",
            "local fd43::a/128 dev lo",
            "unreachable 10.42.0.0/16 metric 1879048192",
            "unreachable fd42::/48 metric 1879048192",
        ]
    );
    let last = &plan.table.chains["underlay-out"];
    assert_eq!(last.base.map(|base| (base.hook, base.priority)), Some((Hook::Postrouting, PRIORITY_LAST)));
    let ends = |chain: &str| {
        let rules = plan.table.chains[chain].rules.iter();
        rules.map(|rule| rule.statements.last().cloned().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(ends("underlay-out"), [Statement::Verdict(Verdict::Jump("to-underlay".into()))]);
    // Source and destination, both families.
    assert_eq!(ends("to-underlay"), vec![Statement::Verdict(Verdict::Drop); 4]);
    assert!(plan.table.chains["masquerade"].rules.is_empty());
}

/// Rules of a chain of `weft-host` as nft writes them.
fn rules(plan: &OverlayPlan, chain: &str) -> Vec<String> {
    plan.table.chains[chain].rules.iter().map(ToString::to_string).collect()
}

#[test]
fn questions_are_untracked_while_this_node_answers_and_else_go_to_another() {
    let (plan, _) = plan(vec![dual(1), dual(2)]);
    assert_eq!(
        rules(&plan, "dns-questions"),
        [
            "ip daddr 10.43.0.10 ip daddr @answering4 notrack accept",
            "ip6 daddr fd43::a ip6 daddr @answering6 notrack accept",
            "ip daddr 10.42.1.1 notrack accept",
            "ip6 daddr fd42:0:0:1::1 notrack accept",
        ]
    );
    let because = "comment \"the resolver of this node gives no sign of life\"";
    let led = |to: &str| {
        ["udp", "tcp"].map(|protocol| {
            let (vip, version) =
                if to.contains('[') { ("ip6 daddr fd43::a", "ip6") } else { ("ip daddr 10.43.0.10", "ip") };
            format!("{vip} meta l4proto {protocol} th dport 53 counter dnat {version} to {to} {because}")
        })
    };
    let both = [led("10.42.2.1:53"), led("[fd42:0:0:2::1]:53")].concat();
    assert_eq!((rules(&plan, "stand-in"), rules(&plan, "stand-in-output")), (both.clone(), both));
    assert_eq!(lines(plan.stand_ins.iter().map(|name| &name.0)), ["node-2"]);
}

#[test]
fn a_node_alone_answers_in_any_case() {
    let mut keyless = dual(2);
    keyless.public_key = None;
    let (mut unready, mut leaving) = (dual(3), dual(4));
    (unready.unready, leaving.leaving) = (true, true);
    for nodes in [vec![], vec![dual(1)], vec![dual(1), keyless, unready, leaving]] {
        let (plan, _) = plan(nodes);
        assert_eq!(
            rules(&plan, "dns-questions")[..2],
            ["ip daddr 10.43.0.10 notrack accept", "ip6 daddr fd43::a notrack accept"]
        );
        assert_eq!((rules(&plan, "stand-in"), plan.stand_ins.len()), (vec![], 0));
    }
}

/// A circle by name, so that two nodes that fail lean on two others.
#[test]
fn the_next_node_by_name_stands_in_unless_it_is_not_ready() {
    let of = |own: u8, change: fn(&mut Node)| {
        let mut nodes = vec![dual(1), dual(2), dual(3)];
        change(&mut nodes[1]);
        let mut snapshot = snapshot(nodes);
        Arc::make_mut(&mut snapshot.facts).name = NodeName(format!("node-{own}").into());
        let planned = OverlayPlanner { open_firewalls: true }.plan(&snapshot).plan;
        lines(planned.stand_ins.iter().map(|name| &name.0)).join(" ")
    };
    assert_eq!([1, 2, 3].map(|own| of(own, |_| ())), ["node-2", "node-3", "node-1"]);
    assert_eq!(of(1, |node| node.unready = true), "node-3");
    assert_eq!(of(1, |node| node.leaving = true), "node-3");
    assert_eq!(of(1, |node| node.pod_cidrs.truncate(1)), "node-2 node-3", "each family has its own");
}

#[test]
fn a_range_without_room_for_pods_is_a_problem() {
    let mut tiny = node(1, true, false);
    tiny.pod_cidrs[0] = "10.42.1.0/31".parse().unwrap();
    let (plan, problems) = plan(vec![tiny]);
    assert!(plan.host_addresses.is_empty());
    assert_eq!(
        problems,
        [
            "Node node-1: InvalidField: spec.podCIDRs: 10.42.1.0/31 is too small: at least four addresses are needed"
        ]
    );
}

#[test]
fn the_order_of_nodes_does_not_change_the_plan() {
    let (forward, _) = plan(vec![dual(1), dual(2), dual(3)]);
    let (backward, _) = plan(vec![dual(3), dual(2), dual(1)]);
    assert_eq!(forward, backward);
}
