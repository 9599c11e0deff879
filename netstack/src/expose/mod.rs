//! How the outside finds the ingress of every node, and what Ingresses say about it.
//!
//! ```text
//!  Nodes --podCIDR--> ingress addresses --> EndpointSlices of Service weft-system/weft-ingress    (loop ingress-endpoints)
//!  status of that Service + Ingresses of ours --> status.loadBalancer of each                      (loop ingress-status)
//! ```
//!
//! The Service has no selector and keeps traffic on the node that it reaches (`externalTrafficPolicy: Local`), so the client's
//! address is kept. Every node plans the same, and the one that holds the Lease writes (`kube::slices`, `kube::status`).

pub mod plan;
