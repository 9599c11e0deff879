//! A node introduces its new pods to the other nodes, so that policies know them there before they are Ready.
//!
//! ```text
//!  attachments of CNI --> introduction, over the tunnel --> the other nodes: Introduced --> with_introduced --> Snapshot
//! ```
//!
//! The API shows a pod's addresses when its kubelet reports, often together with its readiness; what a policy allows the pod would come later
//! than the pod's first packets. (That the pod itself is isolated waits for nobody.) An introduction adds to what the API says and never
//! contradicts it: it counts only for a pod that the API shows with that uid, without addresses, on the node from whose `host` address
//! it came, and only for addresses of that node's ranges. Table `weft-host` lets no source of the pod ranges in from the
//! underlay, and no pod can send with an address that is not its own. What gets lost is told by the API, only later.

mod talk;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use weft_model::objects::{Node, Pod, host_address, ingress_address};
use weft_model::snapshot::{Attachments, Objects};
use weft_model::{NodeName, PodKey, Snapshot};

pub use talk::start;

/// Introductions that are kept at most; the oldest go first.
const KEPT: usize = 4096;
/// And how long: the API has long shown the pod then.
const LASTS: Duration = Duration::from_secs(600);
/// Bytes of a datagram, so that none needs fragments in the tunnel at the smallest MTU of IPv6.
const DATAGRAM_BYTES: usize = 1200;

/// What the other nodes said, by pod.
pub type Introduced = Arc<BTreeMap<PodKey, Heard>>;

/// What one node said of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    uid: String,
    addresses: Vec<IpAddr>,
    /// `host` address of the node that said it.
    from: IpAddr,
    at: Instant,
}

/// As it is sent, in a JSON array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Introduction {
    pod: PodKey,
    uid: String,
    addresses: Vec<IpAddr>,
}

/// Pods that were attached since; those of which the container runtime did not tell who they are cannot be introduced.
fn newly_attached(before: &Attachments, now: &Attachments) -> Vec<Introduction> {
    let mut pods: BTreeMap<(&PodKey, &String), (bool, Vec<IpAddr>)> = BTreeMap::new();
    for (address, attached) in now.iter().filter(|(_, attached)| !attached.uid.is_empty()) {
        let Some(pod) = &attached.pod else { continue };
        let (is_new, addresses) = pods.entry((pod, &attached.uid)).or_default();
        *is_new |= before.get(address) != Some(attached);
        addresses.push(*address);
    }
    let introduced = pods.into_iter().filter(|(_, (is_new, _))| *is_new);
    introduced
        .map(|((pod, uid), (_, addresses))| Introduction { pod: pod.clone(), uid: uid.clone(), addresses })
        .collect()
}

/// As few datagrams as hold them.
fn datagrams(introductions: &[Introduction]) -> Vec<Vec<u8>> {
    let mut datagrams: Vec<Vec<u8>> = Vec::new();
    for introduction in introductions {
        let Ok(text) = serde_json::to_vec(introduction) else { continue };
        match datagrams.last_mut() {
            Some(last) if last.len() + text.len() + 2 <= DATAGRAM_BYTES => last.push(b','),
            _ => datagrams.push(vec![b'[']),
        }
        if let Some(last) = datagrams.last_mut() {
            last.extend(text);
        }
    }
    datagrams.iter_mut().for_each(|datagram| datagram.push(b']'));
    datagrams
}

/// Takes a datagram that came from `from` in; false where it cannot be read.
fn hear(introduced: &mut Introduced, datagram: &[u8], from: IpAddr, now: Instant) -> bool {
    let Ok(introductions) = serde_json::from_slice::<Vec<Introduction>>(datagram) else { return false };
    let heard = Arc::make_mut(introduced);
    heard.retain(|_, heard| now.duration_since(heard.at) < LASTS);
    for Introduction { pod, uid, addresses } in introductions {
        heard.insert(pod, Heard { uid, addresses, from, at: now });
        if heard.len() > KEPT {
            let oldest = heard.iter().min_by_key(|(_, heard)| heard.at).map(|(pod, _)| pod.clone());
            oldest.and_then(|oldest| heard.remove(&oldest));
        }
    }
    true
}

/// The pods of a Snapshot, those that the API shows without addresses with what their own nodes said. The same map where nobody said
/// anything that counts; a pod that is as in `last` is the same object.
pub fn with_introduced(
    pods: &Objects<PodKey, Pod>,
    nodes: &Objects<NodeName, Node>,
    introduced: &Introduced,
    last: Option<&Objects<PodKey, Pod>>,
) -> Objects<PodKey, Pod> {
    let named = introduced.iter().filter_map(|(key, heard)| {
        let pod = pods.get(key)?;
        counts(heard, pod, nodes.get(pod.node.as_ref()?)?).then_some(())?;
        let named = Pod { ips: heard.addresses.clone(), ..Pod::clone(pod) };
        let known = last.and_then(|last| last.get(key)).filter(|known| ***known == named);
        Some((key.clone(), known.cloned().unwrap_or_else(|| Arc::new(named))))
    });
    let named: Vec<_> = named.collect();
    if named.is_empty() {
        return pods.clone();
    }
    let mut all = pods.clone();
    Arc::make_mut(&mut all).extend(named);
    all
}

fn counts(heard: &Heard, pod: &Pod, node: &Node) -> bool {
    let of_node = |address: &IpAddr| {
        let range = node.pod_cidrs.iter().find(|cidr| cidr.contains(address));
        range.is_some_and(|range| ![host_address(range), ingress_address(range)].contains(&Some(*address)))
    };
    pod.uid == heard.uid
        && pod.ips.is_empty()
        && !pod.host_network
        && !pod.terminated
        && node.hosts().any(|host| host == heard.from)
        && heard.addresses.iter().all(of_node)
}

/// Where to introduce pods, for the task that sends from `own`: the nodes' `host` addresses of its family. A node is told once: over
/// IPv6 only where it, or this node, has no range of IPv4. Nobody where there are no policies.
fn audience(snapshot: &Snapshot, own: IpAddr) -> Vec<IpAddr> {
    let Some(this) = snapshot.own_node() else { return Vec::new() };
    let others = snapshot.nodes.values().filter(|node| node.name != this.name);
    let asked = others.filter_map(|node| node.host_for(this, own.is_ipv6()));
    asked.filter(|_| !snapshot.policies.is_empty()).collect()
}

#[cfg(test)]
mod tests;
