//! The applier: owner of the nft table `weft-proxy`, and of the UDP flows that went through it.

use std::sync::Arc;

use weft_model::constants::TABLE_PROXY;

use super::plan::ProxyPlan;
use super::stale::UdpTargets;
use crate::kernel::nft::NftTable;
use crate::reconcile::{Applied, Applier, Trust, chain};

/// Commits the table in one transaction, then removes stale UDP flows.
pub struct ProxyApplier {
    table: NftTable,
    /// What the flows were last reconciled with.
    udp: Option<Arc<UdpTargets>>,
}

impl Default for ProxyApplier {
    fn default() -> Self {
        Self::new()
    }
}

impl ProxyApplier {
    pub fn new() -> Self {
        Self { table: NftTable::new(TABLE_PROXY), udp: None }
    }
}

impl Applier for ProxyApplier {
    type Plan = ProxyPlan;

    async fn apply(&mut self, plan: &ProxyPlan, trust: Trust) -> Applied {
        let mut applied = Applied::default();
        match self.table.apply(&plan.table, trust) {
            Ok(changed) => applied.changed = changed,
            Err(error) => {
                // Flows are looked at only under rules that send the next packet to the right place.
                applied.failed.push(format!("table {TABLE_PROXY}: {}", chain(&error)));
                return applied;
            }
        }
        self.udp = Some(plan.udp.clone());
        applied
    }
}
