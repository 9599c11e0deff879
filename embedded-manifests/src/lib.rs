//! YAML compiled into the binary: what `kubectl apply` needs before agents can run on a cluster.
//! No template logic; `tests/tests/manifests.rs` holds it against the verbs the code uses.

/// Namespace, ServiceAccount, ClusterRole and its binding.
pub const RBAC: &str = include_str!("../manifests/rbac.yaml");

/// Every document, in the order in which they are applied.
pub fn all() -> String {
    RBAC.to_owned()
}
