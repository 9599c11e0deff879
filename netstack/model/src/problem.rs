//! An input that cannot be honoured, tied to its object. Planners return problems beside the plan and never fail.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The object a problem came from; prints as `Service default/web`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectRef {
    pub kind: String,
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    pub name: String,
}

impl ObjectRef {
    pub fn new(kind: impl Into<String>, namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        let [namespace, name] = [namespace.as_ref(), name.as_ref()].map(str::to_owned);
        Self { kind: kind.into(), namespace, name }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// Closed set of reason codes: stable, CamelCase, usable as an Event reason and a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// A field does not hold what its type promises.
    InvalidField,
    /// Two objects claim the same thing; the older keeps it.
    Conflict,
    /// The object asks for something this version does not do.
    NotSupported,
    /// Something the object needs is not there (yet).
    Missing,
    /// It works, but less well than it should.
    Degraded,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    pub object: ObjectRef,
    pub reason: Reason,
    /// One sentence for a person: the field, what is wrong, what to do.
    pub message: String,
}

impl Problem {
    pub fn new(object: ObjectRef, reason: Reason, message: impl Into<String>) -> Self {
        Self { object, reason, message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}: {}", self.object, self.reason, self.message)
    }
}

/// What a planner returns: the whole desired state and what could not be honoured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned<P> {
    pub plan: P,
    /// Sorted, without duplicates.
    pub problems: Vec<Problem>,
}

impl<P> Planned<P> {
    pub fn new(plan: P, mut problems: Vec<Problem>) -> Self {
        problems.sort();
        problems.dedup();
        Self { plan, problems }
    }
}
