//! Keeps links, leases and anti-spoofing rules together for as long as the agent runs.

use std::sync::Arc;

use super::plan::PodLinks;
use super::{Cni, Reconciled};
use crate::reconcile::{Applied, Applier, Trust};

/// Applier of loop `cni`; the plan says when, [`Cni::reconcile`] does it.
pub struct PodLinksApplier {
    cni: Arc<Cni>,
    applied: Option<PodLinks>,
}

impl PodLinksApplier {
    pub fn new(cni: Arc<Cni>) -> Self {
        Self { cni, applied: None }
    }

    /// Pods and addresses, for `weft status`.
    fn details(&self, plan: &PodLinks) -> Vec<(String, String)> {
        let leases = self.cni.leases.records();
        let count = |cidr: &ipnet::IpNet, released: bool| {
            leases.iter().filter(|(ip, l)| cidr.contains(*ip) && l.released.is_some() == released).count()
        };
        let line =
            |cidr: &ipnet::IpNet| format!("{} used, {} resting", count(cidr, false), count(cidr, true));
        plan.pod_cidrs.iter().map(|cidr| (cidr.to_string(), line(cidr))).collect()
    }
}

impl Applier for PodLinksApplier {
    type Plan = PodLinks;

    async fn apply(&mut self, plan: &PodLinks, trust: Trust) -> Applied {
        let reconciled = match trust {
            Trust::Shadow if self.applied.as_ref() == Some(plan) => Reconciled::default(),
            Trust::Shadow | Trust::Nothing => self.cni.reconcile().await,
        };
        self.applied = reconciled.failed.is_empty().then(|| plan.clone());
        Applied { details: self.details(plan), ..reconciled.into() }
    }
}

impl From<Reconciled> for Applied {
    fn from(done: Reconciled) -> Self {
        let mut changed = done.rules;
        changed.extend(done.released.iter().map(|address| format!("release {address}: its link is gone")));
        changed.extend(
            done.rebuilt.iter().map(|address| format!("lease {address} again: its link has no lease")),
        );
        changed.extend(done.completed.iter().map(|link| format!("complete link {link}")));
        changed.extend(done.limited.iter().map(|link| format!("limit the rate of {link} anew")));
        changed.extend(
            done.removed_links.iter().map(|link| format!("delete link {link}: it belongs to nothing")),
        );
        Self { changed, failed: done.failed, details: Vec::new() }
    }
}
