use super::*;
use crate::overlay::OverlayPlanner;
use crate::overlay::plan::tests::{dual, snapshot};
use crate::reconcile::Planner as _;

fn said(nodes: Vec<Node>) -> Vec<String> {
    let snapshot = snapshot(nodes);
    let problems = OverlayPlanner { open_firewalls: true }.plan(&snapshot).problems;
    objections(&snapshot, &problems)
}

fn with_cidrs(cidrs: &[&str]) -> Node {
    Node { pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(), ..dual(1) }
}

#[test]
fn a_node_with_a_range_of_each_family_or_of_one_may_carry_pods() {
    assert_eq!(said(vec![dual(1), dual(2)]), [""; 0]);
    assert_eq!(said(vec![with_cidrs(&["10.42.1.0/24"]), dual(2)]), [""; 0]);
}

#[test]
fn a_route_of_others_within_the_clusters_ranges_is_named_with_its_range() {
    let mut snapshot = snapshot(vec![dual(1)]);
    assert_eq!(overlaps(&snapshot), [""; 0]);
    let route = |destination: &str, link: Option<&str>| ForeignRoute {
        destination: destination.parse().unwrap(),
        link: link.map(str::to_owned),
    };
    let mut facts = (*snapshot.facts).clone();
    facts.foreign_routes = vec![route("10.42.7.0/24", Some("docker0")), route("fd43::/120", None)];
    snapshot.facts = std::sync::Arc::new(facts);
    let said = overlaps(&snapshot);
    assert!(
        said[0].starts_with(
            "route 10.42.7.0/24 dev docker0 of this host lies within --cluster-cidr 10.42.0.0/16 and takes packets away from it; \
             remove it (ip route del 10.42.7.0/24 dev docker0)"
        ),
        "{said:?}"
    );
    assert!(said[1].starts_with("route fd43::/120 of this host lies within --service-cidr"), "{said:?}");
    let planned = OverlayPlanner { open_firewalls: true }.plan(&snapshot);
    assert_eq!(planned.problems.len(), 2, "{:?}", planned.problems);
    assert_eq!(objections(&snapshot, &planned.problems), [""; 0], "a node that carries pods goes on");
}

#[test]
fn a_node_that_is_not_there_is_named_with_the_flag() {
    let expected = "there is no Node node-1 in the cluster; register this machine's kubelet, or give --node-name the name of \
                    its Node";
    assert_eq!(said(vec![dual(2)]), [expected]);
}

#[test]
fn a_node_without_a_range_names_what_gives_it_one() {
    let expected = "Node node-1 has no podCIDR; start kube-controller-manager with --allocate-node-cidrs=true \
                    --cluster-cidr=10.42.0.0/16,fd42::/48, or set spec.podCIDRs of the Node";
    assert_eq!(said(vec![with_cidrs(&[])]), [expected]);
}

#[test]
fn a_range_outside_the_clusters_or_too_small_is_named() {
    let outside = "Node node-1: podCIDR 10.244.1.0/24 is outside --cluster-cidr 10.42.0.0/16,fd42::/48; give every agent the \
                   --cluster-cidr of kube-controller-manager";
    assert_eq!(said(vec![with_cidrs(&["10.244.1.0/24", "fd42:0:0:1::/64"])]), [outside]);
    let small = "Node node-1: podCIDR 10.42.1.0/31 is too small, at least four addresses are needed; give the Node a larger \
                 one";
    assert_eq!(said(vec![with_cidrs(&["10.42.1.0/31"])]), [small]);
}

#[test]
fn of_two_nodes_with_one_range_or_address_the_younger_names_both() {
    let elder = |node: Node| Node { created: 0, ..node };
    let range = elder(Node { pod_cidrs: dual(1).pod_cidrs, ..dual(2) });
    let expected = "Node node-1: podCIDR 10.42.1.0/24 belongs to the older Node node-2; this Node is left out of the overlay \
                    until one of the two is deleted or claims another";
    assert_eq!(said(vec![dual(1), range]), [expected]);
    let address = elder(Node { internal_ips: dual(1).internal_ips, ..dual(2) });
    let expected = "Node node-1: InternalIP 192.0.2.1 belongs to the older Node node-2; this Node is left out of the overlay \
                    until one of the two is deleted or claims another";
    assert_eq!(said(vec![dual(1), address]), [expected]);
    let younger = Node { created: 9, pod_cidrs: dual(1).pod_cidrs, ..dual(2) };
    assert_eq!(said(vec![dual(1), younger]), [""; 0]);
}
