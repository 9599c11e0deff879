//! Ingress: what a request over HTTP becomes.
//!
//! ```text
//!  Snapshot --plan--> RouteTable (values) + Problems
//!     annotations: what ingress-nginx's annotations say     certificate: whether chain and key go together, and when
//!  RouteTable --apply--> routes.json, a word to the process `weft ingress`
//!  RouteTable --explain--> why a request goes where it goes
//!  Snapshot --lint--> a verdict for every Ingress
//! ```

pub mod annotations;
pub mod apply;
pub mod certificate;
pub mod explain;
pub mod lint;
mod path;
pub mod plan;
pub mod proxy;
