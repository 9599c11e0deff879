//! Services in the kernel at every kind of address, TCP, UDP and SCTP, as one nft table of element-only maps.
//!
//! ```text
//!  prerouting, output (nat)   daddr . proto . dport  --vmap firewalls-->  may this client come? else drop
//!                             daddr . proto . dport  --vmap service-ips-->  lb4-N: mark, dnat to map endpoints[random mod N]
//!                                                                           sticky-lb4-N: stay4-ENDPOINT: as last time
//!                             (node IPs)  proto . dport  --vmap nodeports-->  np4-N
//!  prerouting, output (filter, after DNAT)  still a Service's address?  no endpoints: reject; Local without one: drop
//!  postrouting (nat)          marked, and the answer would not come back here: masquerade
//! ```
//!
//! One Service changes only its own elements: `service` lowers one Service and its slices (pure, memoised by `plan`) with
//! `endpoints` (who may answer) and `external` (which addresses it may have); `claims` says who has what two Services want;
//! `layout` holds the shape of the table, `emission` what a Service puts into it. `apply` commits it and removes the UDP flows
//! (`stale`) and the affinity of clients (`affinity`) that would keep to a gone endpoint; `health` tells load balancers;
//! `kube_proxy` sees what this proxy takes over from, `metrics` counts under its names.

mod affinity;
mod apply;
mod claims;
mod contradictions;
mod emission;
mod endpoints;
mod external;
mod health;
mod kube_proxy;
mod layout;
mod metrics;
mod plan;
mod service;
mod stale;

pub use affinity::{AffinityIndex, AffinityTargets};
pub use apply::ProxyApplier;
pub use health::{HealthChecks, ProxyHealth};
pub use kube_proxy::{IPVS_LINK, KubeProxy, KubeProxyError, LegacyError};
pub use metrics::{KubeProxyNames, ProxyMetrics};
pub use plan::{ProxyPlan, ProxyPlanner, WithoutLocal};
pub use service::LocalEndpoints;
pub use stale::{UdpDestination, UdpTargets};
