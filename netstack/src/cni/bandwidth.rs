//! Limits of a pod's rate: what the annotations `kubernetes.io/ingress-bandwidth` and `egress-bandwidth` ask for, also while
//! the pod runs.
//!
//! ```text
//!  the Pod in the Snapshot, else runtimeConfig.bandwidth of ADD --> wanted (pure) --> Shaper: bucket, IFB
//! ```
//!
//! Meaning: as the `bandwidth` plugin (capability `bandwidth`, CNI conventions), ingress being what the pod receives. The
//! bursts that runtimes give (containerd: 4 Gbit) would make the limits void, so the burst is a tenth of a second's bytes,
//! within bounds.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;
use weft_model::Snapshot;
use weft_model::constants::{POD_LINK_PREFIX, SHAPER_LINK_PREFIX};
use weft_model::objects::Bandwidth;
use weft_plugin::wire::{CniError, Code, lower_case};

use super::Cni;
use super::attachment::AttachError;
use crate::kernel::link::{Link, LinkError, Links};
use crate::kernel::shaper::{Queues, Shape, Shaper};
use crate::kernel::sysctl;
use crate::reconcile::chain;
use crate::store::{Lease, LeaseRecords};

const MIN_BURST_BYTES: u64 = 64 * 1024;
const MAX_BURST_BYTES: u64 = 8 * 1024 * 1024;
/// What waits longer is dropped, as with the `bandwidth` plugin.
const LATENCY_MILLIS: u64 = 25;

/// `runtimeConfig.bandwidth`, its names in lower case; bits a second. Bursts are not read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Given {
    #[serde(rename = "ingressrate")]
    ingress_rate: u64,
    #[serde(rename = "egressrate")]
    egress_rate: u64,
}

/// What the runtime asks for.
pub(super) fn requested(config: &Value) -> Result<Bandwidth, CniError> {
    let Some(given) = config.pointer("/runtimeConfig/bandwidth").filter(|value| !value.is_null()) else {
        return Ok(Bandwidth::default());
    };
    let given: Given = Deserialize::deserialize(lower_case(given)).map_err(|error| {
        CniError::new(
            Code::InvalidConfig,
            format!("runtimeConfig.bandwidth: {error}; rates are whole bits a second"),
        )
    })?;
    let limit = |bits: u64| (bits != 0).then_some(bits);
    Ok(Bandwidth { ingress_bits: limit(given.ingress_rate), egress_bits: limit(given.egress_rate) })
}

/// The Pod's annotations of now; without the Pod, what ADD was told.
pub(super) fn wanted(lease: &Lease, snapshot: Option<&Snapshot>) -> Bandwidth {
    let pod = lease.pod.as_ref().zip(snapshot).and_then(|(key, snapshot)| snapshot.pods.get(key));
    let same = pod.filter(|pod| lease.pod_uid.is_empty() || pod.uid.is_empty() || pod.uid == lease.pod_uid);
    same.map_or(lease.bandwidth, |pod| pod.bandwidth)
}

fn shape(bits: u64) -> Shape {
    let rate = (bits / 8).max(1);
    let burst = (rate / 10).clamp(MIN_BURST_BYTES, MAX_BURST_BYTES);
    let limit = burst + rate.saturating_mul(LATENCY_MILLIS) / 1000;
    let narrow = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    Shape { rate, burst: narrow(burst), limit: narrow(limit) }
}

/// Name of the IFB device for a pod's link.
pub(super) fn ifb_of(link: &str) -> String {
    format!("{SHAPER_LINK_PREFIX}{}", link.strip_prefix(POD_LINK_PREFIX).unwrap_or(link))
}

/// Everything about rates that the kernel shows.
pub(super) struct Shaped {
    queues: Queues,
    /// IFB devices of ours.
    ifbs: BTreeMap<String, Link>,
}

impl Shaped {
    pub(super) fn holds(&self, link: &Link, wanted: &Bandwidth) -> bool {
        let root = wanted.ingress_bits.map(shape);
        let ifb = self.ifbs.get(&ifb_of(&link.name));
        let egress = match (wanted.egress_bits.map(shape), ifb) {
            (None, None) => !self.queues.is_redirected(link.index),
            (Some(shape), Some(ifb)) => {
                ifb.up && self.queues.holds(ifb.index, Some(&shape)) && self.queues.is_redirected(link.index)
            }
            _ => false,
        };
        self.queues.holds(link.index, root.as_ref()) && egress
    }
}

impl Cni {
    fn shaper(&self) -> Shaper {
        Shaper::new(self.netlink.handle.clone())
    }

    pub(super) async fn shaped(&self) -> Result<Shaped, AttachError> {
        let lists = self.lists.lock().await;
        let queues = Shaper::new(lists.handle.clone()).queues().await?;
        let ifbs = Links::new(lists.handle.clone()).list_by_prefix(SHAPER_LINK_PREFIX).await?;
        let ifbs = ifbs.into_iter().map(|link| (link.name.clone(), link)).collect();
        Ok(Shaped { queues, ifbs })
    }

    /// Makes the kernel limit `link` as wanted; does nothing that is done already.
    pub(super) async fn limit(
        &self,
        link: &Link,
        wanted: &Bandwidth,
        shaped: &Shaped,
    ) -> Result<(), AttachError> {
        let (shaper, links, name) = (self.shaper(), self.links(), &link.name);
        let root = wanted.ingress_bits.map(shape);
        if !shaped.queues.holds(link.index, root.as_ref()) {
            shaper.shape(name, link.index, root.as_ref()).await?;
        }
        let ifb_name = ifb_of(name);
        let Some(egress) = wanted.egress_bits.map(shape) else {
            if shaped.queues.is_redirected(link.index) {
                shaper.end_redirection(name, link.index).await?;
            }
            links.delete(&ifb_name).await?;
            return Ok(());
        };
        let ifb = ensure_ifb(&shaper, &links, &ifb_name, link.mtu_bytes).await?;
        if !shaped.queues.holds(ifb.index, Some(&egress)) {
            shaper.shape(&ifb_name, ifb.index, Some(&egress)).await?;
        }
        let is_whole = shaped.ifbs.contains_key(&ifb_name) && shaped.queues.is_redirected(link.index);
        if !is_whole {
            if shaped.queues.is_redirected(link.index) {
                shaper.end_redirection(name, link.index).await?;
            }
            shaper.redirect(name, link.index, ifb.index).await?;
        }
        Ok(())
    }

    /// Every live link as wanted, and no IFB device without one. Returns the links that were changed, and failures.
    pub(super) async fn reconcile_limits(
        &self,
        live: &BTreeMap<String, LeaseRecords>,
        links: &[Link],
    ) -> (Vec<String>, Vec<String>) {
        let (mut changed, mut failed) = (Vec::new(), Vec::new());
        let shaped = match self.shaped().await {
            Ok(shaped) => shaped,
            Err(error) => return (changed, vec![chain(&error)]),
        };
        let snapshot = self.snapshot();
        let mut needed = BTreeSet::new();
        for (name, leases) in live {
            let Some(link) = links.iter().find(|link| link.name == *name) else { continue };
            let wanted = leases
                .values()
                .next()
                .map_or(Bandwidth::default(), |lease| wanted(lease, snapshot.as_deref()));
            if wanted.egress_bits.is_some() {
                needed.insert(ifb_of(name));
            }
            if shaped.holds(link, &wanted) {
                continue;
            }
            match self.limit(link, &wanted, &shaped).await {
                Ok(()) => changed.push(name.clone()),
                Err(error) => failed.push(chain(&error)),
            }
        }
        for stray in shaped.ifbs.keys().filter(|ifb| !needed.contains(*ifb)) {
            if let Err(error) = self.links().delete(stray).await {
                failed.push(chain(&error));
            }
        }
        (changed, failed)
    }
}

async fn ensure_ifb(shaper: &Shaper, links: &Links, name: &str, mtu_bytes: u32) -> Result<Link, AttachError> {
    if let Some(found) = links.find(name).await? {
        if !found.up {
            links.set_up(name, found.index).await?;
        }
        return Ok(found);
    }
    shaper.add_ifb(name, mtu_bytes).await?;
    // It takes no part in IPv6; where there is none, there is nothing to switch off.
    let _ = sysctl::ensure(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1");
    let made = links.find(name).await?;
    made.ok_or_else(|| AttachError::Link(LinkError::missing("find link", name)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_read_in_any_case_and_zero_is_no_limit() {
        let given = |bandwidth: Value| requested(&json!({"runtimeConfig": {"bandwidth": bandwidth}}));
        let both = Bandwidth { ingress_bits: Some(1_000_000), egress_bits: Some(2_000_000) };
        let lower =
            json!({"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u32, "egressRate": 2_000_000});
        assert_eq!(given(lower).unwrap(), both);
        // As containerd writes it.
        let upper =
            json!({"IngressRate": 1_000_000, "IngressBurst": 1, "EgressRate": 2_000_000, "EgressBurst": 1});
        assert_eq!(given(upper).unwrap(), both);
        let one = json!({"ingressRate": 0, "egressRate": 5000});
        assert_eq!(given(one).unwrap(), Bandwidth { ingress_bits: None, egress_bits: Some(5000) });
        assert_eq!(requested(&json!({})).unwrap(), Bandwidth::default());
        let error = given(json!({"ingressRate": "10M"})).unwrap_err();
        assert_eq!(error.code, 7);
        assert!(error.msg.contains("runtimeConfig.bandwidth") && error.msg.contains("bits"), "{error}");
    }

    #[test]
    fn a_bucket_holds_a_tenth_of_a_second_within_bounds() {
        let of = |bits| shape(bits);
        assert_eq!(of(80_000_000), Shape { rate: 10_000_000, burst: 1_000_000, limit: 1_250_000 });
        assert_eq!(of(1_000), Shape { rate: 125, burst: 65_536, limit: 65_539 });
        assert_eq!(of(1_000_000_000_000_000).burst, 8 * 1024 * 1024);
        assert_eq!(of(1_000_000_000_000_000).limit, u32::MAX);
    }

    #[test]
    fn names_of_ifb_devices_fit() {
        assert_eq!(ifb_of("weftp0123456789"), "weftb0123456789");
    }
}
