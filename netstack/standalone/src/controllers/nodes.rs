//! Pod ranges of Nodes, and what happens to the pods of a deleted Node. Pure.
//! In: the view and the cluster's ranges. Out: a Node with `spec.podCIDRs`, one range a family, kept for its life.

use ipnet::IpNet;
use serde_json::json;

use super::updated;
use crate::admission::{Ambient, ranges};
use crate::api::deletion;
use crate::object;
use crate::status::ApiError;
use crate::store::{Change, Key, View};

pub(super) fn plan(view: &View, name: &str, node_ranges: &[(IpNet, u8)]) -> Result<Vec<Change>, ApiError> {
    let Some(stored) = view.get(&Key::new("nodes", "", name)) else { return Ok(Vec::new()) };
    let mut node = stored.value();
    if node_ranges.is_empty() || !object::list(&node, &["spec", "podCIDRs"]).is_empty() {
        return Ok(Vec::new());
    }
    let used = used_ranges(view);
    let Some(free) = node_ranges.iter().map(|it| free_range(it, &used)).collect::<Option<Vec<IpNet>>>()
    else {
        return Err(ApiError::internal(format!("no pod range is free for node {name}")));
    };
    object::set(&mut node, &["spec", "podCIDR"], json!(free.first()));
    object::set(&mut node, &["spec", "podCIDRs"], json!(free));
    Ok(updated(stored, node)?.into_iter().collect())
}

fn used_ranges(view: &View) -> Vec<IpNet> {
    let texts = view.list("nodes", None).flat_map(|it| object::texts(&it.value(), &["spec", "podCIDRs"]));
    texts.filter_map(|it| it.parse().ok()).collect()
}

/// The first part of the range that overlaps no node's.
fn free_range((range, prefix_length): &(IpNet, u8), used: &[IpNet]) -> Option<IpNet> {
    let overlaps = |candidate: &IpNet| used.iter().any(|it| it.contains(candidate) || candidate.contains(it));
    ranges::subnets(range, *prefix_length).find(|it| !overlaps(it))
}

/// Pods of a Node that is gone are gone with it.
pub(super) fn plan_gone(view: &View, name: &str, ambient: &Ambient) -> Vec<Change> {
    if view.get(&Key::new("nodes", "", name)).is_some() {
        return Vec::new();
    }
    let pods = view.list("pods", None).filter(|it| it.field("spec.nodeName") == name);
    pods.filter_map(|it| deletion(it, it.value(), ambient)).collect()
}

/// The prefix length of a node's part of a cluster range: as asked for (24 and 64 by default), or where the cluster
/// range is no larger than that, 4 (IPv4) or 8 (IPv6) bits longer than it, but always with room for some pods.
#[must_use]
pub(crate) fn node_prefix(range: &IpNet, asked_v4: u8, asked_v6: u8) -> u8 {
    let (asked, more, most) = if range.addr().is_ipv4() { (asked_v4, 4, 29) } else { (asked_v6, 8, 120) };
    let length = range.prefix_len();
    if asked > length { asked } else { (length + more).min(most).max(length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_free_range_is_taken_and_overlaps_count() {
        let range = (net("10.244.0.0/16"), 24);
        assert_eq!(free_range(&range, &[]), Some(net("10.244.0.0/24")));
        assert_eq!(
            free_range(&range, &[net("10.244.0.0/23"), net("10.244.2.128/25")]),
            Some(net("10.244.3.0/24"))
        );
        assert_eq!(free_range(&(net("10.0.0.0/24"), 24), &[net("10.0.0.0/8")]), None);
    }

    #[test]
    fn a_small_cluster_range_is_still_divided() {
        assert_eq!(node_prefix(&net("10.244.0.0/16"), 24, 64), 24);
        assert_eq!(node_prefix(&net("10.244.0.0/24"), 24, 64), 28);
        assert_eq!(node_prefix(&net("fd00::/56"), 24, 64), 64);
        assert_eq!(node_prefix(&net("fd00::/64"), 24, 64), 72);
        assert_eq!(node_prefix(&net("fd00::/112"), 24, 64), 120);
    }
}
