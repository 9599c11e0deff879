//! The latest outcome of one loop: feeds health, metrics and `weft status`.

use serde::{Deserialize, Serialize};

use crate::ids::Generation;
use crate::problem::Problem;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the loop: `overlay`, `proxy`, `dns`, ...
    pub name: String,
    /// Generation of the last Snapshot applied without a failure; 0 before the first.
    pub generation: Generation,
    /// Passes since start.
    pub passes: u64,
    /// What the last pass that changed something changed, for a person.
    pub last_change: Option<String>,
    pub problems: Vec<Problem>,
    /// Failures of the last pass, each an error chain on one line; empty after a clean pass.
    pub failures: Vec<String>,
    /// Duration of the last pass in microseconds.
    pub last_pass_micros: u64,
    /// Milliseconds until the next retry after a failure.
    pub retry_in_millis: Option<u64>,
    /// Facts of the domain for `weft status`: short name, value.
    pub details: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// No pass has succeeded yet.
    Starting,
    Ok,
    /// The last pass failed; what was applied before stays in place.
    Failing,
}

impl Report {
    pub fn health(&self) -> Health {
        match (self.failures.is_empty(), self.generation) {
            (false, _) => Health::Failing,
            (true, Generation(0)) => Health::Starting,
            (true, _) => Health::Ok,
        }
    }
}
