//! nftables over raw netlink: one [`NftTable`] owns one table of family `inet`.

use weft_model::ruleset::{Datum, ElementData, Table};

use crate::reconcile::Trust;

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("nftables: {0}")]
    Kernel(String),
}

/// Owner of one kernel table. Calls are synchronous: the kernel handles a batch inside `send`.
pub struct NftTable {
    _name: &'static str,
}

impl NftTable {
    pub fn new(name: &'static str) -> Self {
        Self { _name: name }
    }

    /// Makes the kernel's table equal to `desired` in one transaction; returns one line per change.
    pub fn apply(&mut self, _desired: &Table, _trust: Trust) -> Result<Vec<String>, NftError> {
        todo!("kernel-nft branch")
    }

    /// Adds elements at run time (sets with a timeout, CNI's anti-spoofing set); existing ones are kept or refreshed.
    pub fn insert(&mut self, _set: &str, _elements: &[(Vec<Datum>, ElementData)]) -> Result<(), NftError> {
        todo!("kernel-nft branch")
    }

    /// Deletes elements; absent ones are no error.
    pub fn remove(&mut self, _set: &str, _keys: &[Vec<Datum>]) -> Result<(), NftError> {
        todo!("kernel-nft branch")
    }

    /// Deletes a whole table; an absent one is no error. True when it was there.
    pub fn delete(_name: &str) -> Result<bool, NftError> {
        todo!("kernel-nft branch")
    }
}
