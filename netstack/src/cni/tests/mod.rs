//! The plugin against the real kernel: a node and pods as namespaces, the agent's router on a Unix socket, the
//! plugin's own code as the client.

mod attach;
mod faults;
mod reconcile;
pub(in crate::cni) mod rig;
mod spoof;
