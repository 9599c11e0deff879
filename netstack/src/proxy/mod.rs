//! Services in the kernel: ClusterIP and NodePort, TCP, UDP and SCTP, as one nft table of element-only maps.
//!
//! ```text
//!  prerouting, output (nat)   daddr . proto . dport  --vmap service-ips-->  lb4-N: mark, dnat to map endpoints[random mod N]
//!                             (node IPs)  proto . dport  --vmap nodeports-->  np4-N
//!  prerouting, output (filter, after DNAT)  still a Service's address?  no endpoints: reject; Local without one: drop
//!  postrouting (nat)          marked, and the answer would not come back here: masquerade
//! ```
//!
//! One Service changes only its own elements: `service` lowers one Service and its slices (pure, memoised by `plan`), `layout`
//! holds the chains and the shape of the maps, `apply` commits them and removes the UDP flows that would keep to a gone
//! endpoint. LoadBalancer and external IPs, `ClientIP` affinity and topology hints are not handled yet.

mod apply;
mod contradictions;
mod layout;
mod plan;
mod service;
mod stale;

pub use apply::ProxyApplier;
pub use plan::{ProxyPlan, ProxyPlanner};
pub use stale::{UdpDestination, UdpTargets};
