//! The overlay device and its peers as a value; applied by kernel WireGuard or by `weft tunnel`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::WgPublicKey;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPlan {
    pub listen_port: u16,
    /// Public keys of this node that its Node names, the one to come last.
    #[serde(default)]
    pub own_keys: Vec<WgPublicKey>,
    /// Of this node's uplinks. Another value than before: the peers are called, so that they learn where this node is now.
    #[serde(default)]
    pub own_addresses: Vec<IpAddr>,
    pub peers: BTreeMap<WgPublicKey, WireguardPeer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPeer {
    /// Name of the peer's Node, for people.
    pub node: String,
    /// The key the peer is about to change to; the overlay accepts it beside the present one.
    #[serde(default)]
    pub next_key: Option<WgPublicKey>,
    /// Where it is called first.
    pub endpoint: Option<SocketAddr>,
    /// Where else it may be, best first: called when nothing comes back from there.
    #[serde(default)]
    pub other_endpoints: Vec<SocketAddr>,
    /// podCIDRs and node addresses of the peer, sorted.
    pub allowed_ips: Vec<IpNet>,
    pub keepalive_seconds: Option<u16>,
}

/// Counters of one peer, read from the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub public_key: WgPublicKey,
    /// The key of ours that the peer accepted last; unknown with kernel WireGuard.
    #[serde(default)]
    pub own_key: Option<WgPublicKey>,
    pub endpoint: Option<SocketAddr>,
    /// Seconds since the last completed handshake.
    pub last_handshake_seconds: Option<u64>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// A peer as `weft status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    #[serde(flatten)]
    pub status: PeerStatus,
    /// Name of the peer's Node.
    #[serde(default)]
    pub node: Option<String>,
    /// Where it may be called, best first.
    #[serde(default)]
    pub candidates: Vec<PeerCandidate>,
    /// Bytes of the largest packet that reaches it, where that is less than the tunnel takes.
    #[serde(default)]
    pub narrow_path_bytes: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerCandidate {
    pub endpoint: SocketAddr,
    /// What says so: `same subnet`, `annotation`, `InternalIP`, `ExternalIP`.
    pub kind: String,
}
