//! The embedded API server and the few controllers a cluster without Kubernetes needs.
//! In: HTTP requests of kubectl, agents and tests. Out: objects in a sled store, watch streams, allocated addresses.
//!
//! ```text
//! request -> auth -> api (route, decode) -> admission (pure: schema, defaults, rules, allocation) -> store (sled, history)
//!                                              ^                                                       |
//! watch streams <------------------------------+------------------ controllers (pure plans) <---------+
//! ```
//!
//! It never pretends: what it lacks answers 404, 405 or 415. Kinds nobody here runs (Deployments and the like) are not served.

mod admission;
mod api;
mod auth;
mod controllers;
mod listen;
mod object;
pub mod resources;
mod selector;
mod server;
mod status;
mod store;
mod tls;

pub use auth::{AGENT_USER, Identity, NODE_GROUP_PREFIX, TokenFileError, parse_tokens};
pub use listen::{ListenError, bind, inherited};
pub use server::{Config, Error, Server, serve};
pub use status::{ApiError, Cause};
pub use store::{HISTORY_CAPACITY, StoreError};
pub use tls::TlsError;
