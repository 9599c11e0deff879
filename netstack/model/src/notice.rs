//! What a person should see on an object: becomes a Kubernetes Event.

use serde::{Deserialize, Serialize};

use crate::problem::{ObjectRef, Problem};

/// One Event to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Notice {
    /// The object it is shown on.
    pub object: ObjectRef,
    pub severity: Severity,
    /// CamelCase, short, of a small set.
    pub reason: String,
    /// One sentence for a person.
    pub message: String,
}

/// `type` of an Event (core/v1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    Normal,
    Warning,
}

impl Notice {
    pub fn new(
        object: ObjectRef,
        severity: Severity,
        reason: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { object, severity, reason: reason.into(), message: message.into() }
    }
}

impl From<&Problem> for Notice {
    fn from(problem: &Problem) -> Self {
        Self::new(
            problem.object.clone(),
            Severity::Warning,
            format!("{:?}", problem.reason),
            problem.message.clone(),
        )
    }
}
