//! Routes and rules of our own protocol number over rtnetlink.

use std::collections::BTreeSet;

use weft_model::route::{Route, SourceRule};

use crate::reconcile::Applied;

/// Owner of every route and rule with `constants::ROUTE_PROTOCOL`, except routes to pod links (those are CNI's).
pub struct Routes {
    _handle: rtnetlink::Handle,
}

impl Routes {
    pub fn new(handle: rtnetlink::Handle) -> Self {
        Self { _handle: handle }
    }

    /// Observes the kernel's, adds what is missing, replaces what differs, then removes what is not wanted.
    /// A route to a link that does not exist is a failure of that route only.
    pub async fn apply(&mut self, _routes: &BTreeSet<Route>, _rules: &BTreeSet<SourceRule>) -> Applied {
        todo!("cni branch")
    }
}
