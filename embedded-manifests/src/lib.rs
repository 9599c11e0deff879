//! Files compiled into the binary: what `kubectl apply` needs, and the units that `weft install` writes.
//! No template logic; `weft manifests` puts values into the parsed documents. `tests/tests/manifests.rs` holds them against
//! what the code does.

/// Namespace, ServiceAccount, ClusterRole and its binding.
pub const RBAC: &str = include_str!("../manifests/rbac.yaml");

/// ValidatingAdmissionPolicy and its binding: an agent writes its own Node only.
pub const POLICY: &str = include_str!("../manifests/policy.yaml");

/// The DaemonSet that installs; image, flags and probe address are put in.
pub const DAEMONSET: &str = include_str!("../manifests/daemonset.yaml");

/// The Service of the cluster's DNS; addresses and families are put in.
pub const KUBE_DNS: &str = include_str!("../manifests/kube-dns.yaml");

/// CustomResourceDefinitions of MetalLB's kinds, for clusters that have none.
pub const METALLB: &str = include_str!("../manifests/metallb.yaml");

/// IngressClass, Service and rights of the ingress; printed where Ingresses are served.
pub const INGRESS: &str = include_str!("../manifests/ingress.yaml");

/// Unit files, as they are written.
pub mod units {
    pub const SYSTEMD_AGENT: &str = include_str!("../units/systemd/weft-agent.service");
    pub const SYSTEMD_TUNNEL: &str = include_str!("../units/systemd/weft-tunnel.service");
    pub const SYSTEMD_INGRESS: &str = include_str!("../units/systemd/weft-ingress.service");
    pub const OPENRC_AGENT: &str = include_str!("../units/openrc/weft-agent");
    pub const OPENRC_TUNNEL: &str = include_str!("../units/openrc/weft-tunnel");
    pub const OPENRC_INGRESS: &str = include_str!("../units/openrc/weft-ingress");
}
