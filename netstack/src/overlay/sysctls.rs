//! Kernel settings of the host and of `weft0`, changed only where they differ.

use std::io;

use super::plan::Sysctl;
use crate::kernel::sysctl::{self, Journal};
use crate::reconcile::Applied;

/// Applies in order. With a `journal` the old values are remembered.
pub(super) fn apply(sysctls: &[Sysctl], journal: Option<&Journal>, applied: &mut Applied) {
    for wanted in sysctls {
        match apply_one(wanted, journal) {
            Ok(None) => {}
            Ok(Some(old)) => {
                applied.changed.push(format!("sysctl {}: {old} -> {}", wanted.name, wanted.value));
            }
            Err(error) => applied.failed.push(format!("sysctl {} = {}: {error}", wanted.name, wanted.value)),
        }
    }
}

fn apply_one(wanted: &Sysctl, journal: Option<&Journal>) -> io::Result<Option<String>> {
    if let Some(condition) = &wanted.only_if
        && sysctl::read(&wanted.name)? != *condition
    {
        return Ok(None);
    }
    match journal {
        Some(journal) => journal.ensure(&wanted.name, &wanted.value),
        None => sysctl::ensure(&wanted.name, &wanted.value),
    }
}
