//! The API server as an input: watches, lowering, and the one immutable Snapshot per generation.
//!
//! ```text
//!  watch Nodes, Namespaces, Services, EndpointSlices,
//!        Pods, NetworkPolicies, one ConfigMap --Document--> lower (pure) --+
//!  NodeFacts, attachments of CNI -----------------------------------------+--> Cluster --> Snapshot #g
//!  last good Snapshot from the Store -------------------------------------+
//!  problems, passing notices --events--> Event objects, for `kubectl describe`
//!  report of the policy loop --condition--> one condition of the own Node
//! ```
//!
//! What is valid of an object is used, and every field that is not becomes a [`weft_model::Problem`]; an object that cannot be
//! read at all is as if it were absent, but for a policy, which then isolates its namespace. The last good value of such an
//! object is deliberately not kept: the same
//! cluster always gives the same Snapshot, whatever came before, so a restart changes nothing.
//! The API server's absence changes nothing either: the last Snapshot stays.

mod client;
mod cluster;
mod condition;
pub mod definitions;
mod document;
mod events;
mod failure;
pub mod lease;
pub mod lower;
mod publish;
mod referred;
mod slices;
mod status;
mod version;
mod watch;
mod wire;

pub use client::{Access, ClientError, Endpoint};
pub use cluster::Cluster;
pub use condition::NodeCondition;
pub use document::{CONFIG_MAP, Document, Kind};
pub use events::{Announcer, Notices};
pub use failure::{Address, ApiFailure, Distrust};
pub use lease::Lead;
pub use publish::{Identity, Publication, Publisher, Publishing, publish};
pub use slices::{Slices, SlicesWriter};
pub use status::{StatusWriter, Statuses, Target};
pub use version::ServerVersion;
pub use watch::{ApiStatus, Here, Watches, start};

/// A time as metadata and statuses have it (`metav1.Time`).
fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
