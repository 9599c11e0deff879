//! The plugin against the real kernel: a node and pods as namespaces, the agent's router on a Unix socket, the
//! plugin's own code as the client.

mod attach;
mod bandwidth;
mod faults;
mod first_packet;
mod hostport;
mod reconcile;
pub(crate) mod rig;
mod spoof;
