//! The node: watches, Snapshot, loops, appliers and the kernel edge. See ARCHITECTURE.md for the picture.
//!
//! ```text
//!  kube -> Snapshot -> overlay / proxy / policy planners -> reconcile::Loop -> kernel (netlink)
//!  cni  (request/response) -> store (leases) -> kernel
//!  kernel (nflog, conntrack) -> flows (named, in a ring) -> `weft flows`, Events
//!  Report of every loop -> admin (status, health, metrics)
//! ```

pub mod admin;
pub mod cni;
pub mod control;
pub mod expose;
mod files;
pub mod flows;
mod host_socket;
pub mod introduce;
pub mod kernel;
pub mod kube;
pub mod overlay;
pub mod policy;
pub mod proxy;
pub mod reconcile;
pub mod store;

/// For what a panic elsewhere leaves whole enough.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
