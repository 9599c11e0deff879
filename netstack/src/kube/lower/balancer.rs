//! Lowering of what LoadBalancer Services ask for, and of MetalLB's objects (metallb.io/v1beta1). A pool's range that cannot be
//! read is left out; an address that a Service asks for and that cannot be read keeps it from getting another.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;
use weft_model::balancer::{
    AddressPool, AddressRange, Balancer, BalancerIngress, Condition, DualStack, L2Advertisement,
    PoolAllocation, PoolUsage,
};
use weft_model::policy::Selector;

use super::policy::selector;
use super::{Lowered, Notes, key, lower, wire};

/// Annotations that fix an address, those of MetalLB first, then kube-vip's and Cilium's; lists are separated by commas.
const FIXED: [&str; 7] = [
    "metallb.io/loadBalancerIPs",
    "metallb.universe.tf/loadBalancerIPs",
    "kube-vip.io/loadbalancerIPs",
    "lbipam.cilium.io/ips",
    "io.cilium/lb-ipam-ips",
    "weft.network/load-balancer-ips",
    "kube-vip.io/loadbalancerIP",
];
const POOL: [&str; 4] = [
    "metallb.io/address-pool",
    "metallb.io/ip-pool",
    "metallb.universe.tf/address-pool",
    "weft.network/address-pool",
];
const SHARING: [&str; 5] = [
    "metallb.io/allow-shared-ip",
    "metallb.universe.tf/allow-shared-ip",
    "lbipam.cilium.io/sharing-key",
    "io.cilium/lb-ipam-sharing-key",
    "weft.network/sharing-key",
];
/// Label of Services and Nodes by which k3s's ServiceLB chooses nodes.
const NODE_POOL_LABEL: &str = "svccontroller.k3s.cattle.io/lbpool";

/// In: the Service as it came; `clusterIPs` tell the families where `ipFamilies` does not.
pub(super) fn balancer(
    meta: &wire::Meta,
    spec: &wire::ServiceSpec,
    status: &wire::ServiceStatus,
    notes: &mut Notes,
) -> Option<Balancer> {
    if spec.kind.as_deref() != Some("LoadBalancer") {
        return None;
    }
    let class = spec.load_balancer_class.clone().filter(|class| !class.is_empty());
    let ours = Balancer { class: class.clone(), ..Balancer::default() }.is_ours();
    let ingress = status.load_balancer.iter().flat_map(|status| status.ingress.iter().flatten());
    let mut balancer = Balancer {
        class,
        dual_stack: match spec.ip_family_policy.as_deref() {
            Some("RequireDualStack") => DualStack::Require,
            Some("PreferDualStack") => DualStack::Prefer,
            _ => DualStack::Single,
        },
        families: families(spec),
        selector: spec.selector.clone().filter(|selector| !selector.is_empty()),
        node_pool: meta.labels.as_ref().and_then(|labels| labels.get(NODE_POOL_LABEL)).cloned(),
        ingress: ingress
            .map(|ingress| BalancerIngress {
                ip: ingress.ip.as_deref().and_then(|ip| ip.parse().ok()),
                hostname: ingress.hostname.clone(),
                ip_mode: ingress.ip_mode.clone(),
            })
            .collect(),
        conditions: conditions(status.conditions.as_deref().unwrap_or_default()),
        ..Balancer::default()
    };
    // What others' Services ask for is not for us to judge.
    if ours {
        asked(meta, spec, &mut balancer, notes);
    }
    Some(balancer)
}

fn asked(meta: &wire::Meta, spec: &wire::ServiceSpec, balancer: &mut Balancer, notes: &mut Notes) {
    let annotation = |names: &[&'static str]| {
        let found = names.iter().find_map(|name| Some((*name, meta.annotations.as_ref()?.get(*name)?)));
        found.map(|(name, text)| (name, text.trim().to_owned())).filter(|(_, text)| !text.is_empty())
    };
    let by_spec = || {
        let text = spec.load_balancer_ip.clone().filter(|text| !text.is_empty())?;
        Some(("spec.loadBalancerIP", text))
    };
    let fixed = annotation(&FIXED).map(|(name, text)| (format!("annotation {name}"), text));
    let fixed = fixed.or_else(|| by_spec().map(|(name, text)| (name.to_owned(), text)));
    if let Some((field, text)) = fixed {
        let texts: Vec<&str> = text.split(',').map(str::trim).filter(|text| !text.is_empty()).collect();
        let read: Vec<IpAddr> = texts.iter().filter_map(|text| notes.ip(&field, text)).collect();
        balancer.unreadable = read.len() != texts.len();
        balancer.fixed = notes.one_a_family(&field, read, IpAddr::is_ipv6);
    }
    balancer.pool = annotation(&POOL).map(|(_, text)| text);
    balancer.sharing_key = annotation(&SHARING).map(|(_, text)| text);
}

fn families(spec: &wire::ServiceSpec) -> Vec<bool> {
    let named = spec.ip_families.iter().flatten().filter_map(|family| match family.as_str() {
        "IPv4" => Some(false),
        "IPv6" => Some(true),
        _ => None,
    });
    let named: Vec<bool> = named.collect();
    if !named.is_empty() {
        return named;
    }
    let texts = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let mut families: Vec<bool> = Vec::new();
    for ip in texts.filter_map(|text| text.parse::<IpAddr>().ok()) {
        if !families.contains(&ip.is_ipv6()) {
            families.push(ip.is_ipv6());
        }
    }
    families
}

fn conditions(wires: &[wire::Condition]) -> Vec<Condition> {
    let lowered = wires.iter().map(|wire| Condition {
        kind: wire.kind.clone(),
        status: wire.status.clone(),
        reason: wire.reason.clone(),
        message: wire.message.clone(),
        last_transition: wire.last_transition_time.clone(),
    });
    lowered.collect()
}

pub fn address_pool(document: &Value) -> Lowered<AddressPool> {
    lower("IPAddressPool", document, |wire: wire::IpAddressPool, notes| {
        let spec = wire.spec;
        let mut ranges: Vec<AddressRange> = Vec::new();
        for (i, text) in spec.addresses.iter().flatten().enumerate() {
            match AddressRange::parse(text) {
                Some(range) => ranges.push(range),
                None => notes.invalid(format!(
                    "spec.addresses[{i}] {text:?} is neither a CIDR nor FIRST-LAST of one family; correct it"
                )),
            }
        }
        let status = wire.status.unwrap_or_default();
        Some(AddressPool {
            key: key(&wire.metadata),
            created: notes.created(wire.metadata.creation_timestamp.as_deref()),
            labels: wire.metadata.labels.unwrap_or_default(),
            ranges,
            auto_assign: spec.auto_assign.unwrap_or(true),
            avoid_buggy_ips: spec.avoid_buggy_ips.unwrap_or(false),
            allocation: spec.service_allocation.map(|wire| allocation(wire, notes)),
            usage: PoolUsage {
                assigned_v4: status.assigned_v4.unwrap_or(-1),
                assigned_v6: status.assigned_v6.unwrap_or(-1),
                available_v4: status.available_v4.unwrap_or(-1),
                available_v6: status.available_v6.unwrap_or(-1),
            },
        })
    })
}

fn allocation(wire: wire::ServiceAllocation, notes: &mut Notes) -> PoolAllocation {
    let field = "spec.serviceAllocation";
    PoolAllocation {
        priority: wire.priority.and_then(|priority| u32::try_from(priority).ok()).unwrap_or(0),
        namespaces: wire.namespaces.into_iter().flatten().collect(),
        namespace_selectors: selectors(
            &format!("{field}.namespaceSelectors"),
            wire.namespace_selectors,
            notes,
        ),
        service_selectors: selectors(&format!("{field}.serviceSelectors"), wire.service_selectors, notes),
    }
}

pub fn l2_advertisement(document: &Value) -> Lowered<L2Advertisement> {
    lower("L2Advertisement", document, |wire: wire::L2Advertisement, notes| {
        let spec = wire.spec;
        let set = |texts: Option<Vec<String>>| texts.into_iter().flatten().collect::<BTreeSet<String>>();
        Some(L2Advertisement {
            key: key(&wire.metadata),
            pools: set(spec.ip_address_pools),
            pool_selectors: selectors("spec.ipAddressPoolSelectors", spec.ip_address_pool_selectors, notes),
            node_selectors: selectors("spec.nodeSelectors", spec.node_selectors, notes),
            interfaces: set(spec.interfaces),
        })
    })
}

/// One that is understood in part only selects nothing, as long as there is another; the problem names it.
fn selectors(field: &str, wires: Option<Vec<wire::LabelSelector>>, notes: &mut Notes) -> Vec<Selector> {
    let wires = wires.unwrap_or_default().into_iter().enumerate();
    let read = wires.map(|(i, wire)| selector(&format!("{field}[{i}]"), wire, notes));
    read.map(|read| read.unwrap_or_else(|_| Selector::nothing())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kube::lower::service;

    fn lowered(annotations: Value, mut spec: Value) -> (Option<Balancer>, Vec<String>) {
        spec["type"] = "LoadBalancer".into();
        spec["clusterIPs"] = json!(["10.96.0.1"]);
        let object =
            json!({"metadata": {"name": "a", "namespace": "n", "annotations": annotations}, "spec": spec});
        let lowered = service(&object);
        let problems = lowered.problems.into_iter().map(|problem| problem.message).collect();
        (lowered.value.unwrap().balancer.map(|balancer| *balancer), problems)
    }

    #[test]
    fn addresses_pools_and_sharing_are_asked_for_in_the_words_of_every_predecessor() {
        for (name, text) in FIXED.map(|name| (name, "192.0.2.1")) {
            let balancer = lowered(json!({name: text}), json!({})).0.unwrap();
            assert_eq!(balancer.fixed, ["192.0.2.1".parse::<IpAddr>().unwrap()], "{name}");
        }
        for name in POOL {
            assert_eq!(lowered(json!({name: "p"}), json!({})).0.unwrap().pool.as_deref(), Some("p"));
        }
        for name in SHARING {
            assert_eq!(lowered(json!({name: "k"}), json!({})).0.unwrap().sharing_key.as_deref(), Some("k"));
        }
        let both = json!({"metallb.io/loadBalancerIPs": "192.0.2.1, 2001:db8::1"});
        let balancer = lowered(both, json!({"loadBalancerIP": "192.0.2.9"})).0.unwrap();
        assert_eq!(balancer.fixed.len(), 2, "the annotation goes before the deprecated field");
        assert_eq!(lowered(json!({}), json!({"loadBalancerIP": "192.0.2.9"})).0.unwrap().fixed.len(), 1);
    }

    #[test]
    fn an_address_that_cannot_be_read_is_named_and_replaced_by_no_other() {
        let (balancer, problems) = lowered(json!({"metallb.io/loadBalancerIPs": "192.0.2.1,x"}), json!({}));
        assert!(balancer.unwrap().unreadable);
        assert!(problems[0].contains("metallb.io/loadBalancerIPs"), "{problems:?}");
    }

    #[test]
    fn what_services_of_other_classes_ask_for_is_not_judged() {
        let (balancer, problems) = lowered(
            json!({"metallb.io/loadBalancerIPs": "x"}),
            json!({"loadBalancerClass": "example.com/other"}),
        );
        assert!(!balancer.unwrap().is_ours());
        assert_eq!(problems, [""; 0]);
    }

    #[test]
    fn a_pool_keeps_the_ranges_that_can_be_read() {
        let lowered = address_pool(&json!({"metadata": {"name": "p", "namespace": "m"}, "spec": {
            "addresses": ["192.0.2.0/28", "oops", "2001:db8::1-2001:db8::9"], "autoAssign": false,
            "serviceAllocation": {"priority": 5, "namespaces": ["a"],
                "serviceSelectors": [{"matchLabels": {"app": "x"}}]}}}));
        let pool = lowered.value.unwrap();
        assert_eq!((pool.ranges.len(), pool.auto_assign), (2, false));
        assert_eq!(pool.allocation.unwrap().priority, 5);
        assert!(lowered.problems[0].message.contains("spec.addresses[1] \"oops\""));
    }
}
