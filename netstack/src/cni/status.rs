//! STATUS: can ADD work now? Informational; ADD itself asks again.

use weft_plugin::wire::{CniError, Code};

use super::Cni;
use crate::reconcile::chain;

impl Cni {
    pub fn status(&self) -> Result<(), CniError> {
        let unavailable = |reason: String| CniError::new(Code::Unavailable, reason);
        self.node_for_add().map_err(|error| unavailable(error.msg))?;
        self.leases.ensure_writable().map_err(|error| unavailable(chain(&error)))
    }
}
