//! The overlay device and its peers as a value; applied by kernel WireGuard or by `weft tunnel`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::WgPublicKey;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPlan {
    pub listen_port: u16,
    /// Public keys of this node that its Node names, the one to come last.
    #[serde(default)]
    pub own_keys: Vec<WgPublicKey>,
    pub peers: BTreeMap<WgPublicKey, WireguardPeer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPeer {
    /// Name of the peer's Node, for people.
    pub node: String,
    /// The key the peer is about to change to; the overlay accepts it beside the present one.
    #[serde(default)]
    pub next_key: Option<WgPublicKey>,
    pub endpoint: Option<SocketAddr>,
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
