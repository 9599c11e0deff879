//! Kernel WireGuard over generic netlink, through the crate wireguard-control. In the calling thread's namespace.

use std::io;
use std::net::SocketAddr;
use std::time::SystemTime;

use weft_model::WgPublicKey;
use weft_model::wireguard::{PeerStatus, WireguardPeer, WireguardPlan};
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo};

#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    #[error("{0} is no name of a link")]
    Name(String),
    #[error("{operation} WireGuard device {link}")]
    Device { operation: &'static str, link: String, source: io::Error },
}

fn interface(link: &str) -> Result<InterfaceName, WireguardError> {
    link.parse().map_err(|_| WireguardError::Name(link.to_owned()))
}

fn observe(link: &str) -> Result<Device, WireguardError> {
    Device::get(&interface(link)?, Backend::Kernel).map_err(|source| WireguardError::Device {
        operation: "read",
        link: link.to_owned(),
        source,
    })
}

/// Creates the device when it is absent and makes key, port and peers equal to `plan`, touching only what differs: an
/// unchanged peer keeps its session. Returns one line per change.
pub fn apply(
    link: &str,
    private_key: &[u8; 32],
    plan: &WireguardPlan,
) -> Result<Vec<String>, WireguardError> {
    let name = interface(link)?;
    let failed =
        |operation| move |source| WireguardError::Device { operation, link: link.to_owned(), source };
    let mut changed = Vec::new();
    if nix::net::if_::if_nametoindex(link).is_err() {
        DeviceUpdate::new().apply(&name, Backend::Kernel).map_err(failed("create"))?;
        changed.push(format!("link {link} (kernel WireGuard)"));
    }
    let seen = observe(link)?;
    let mut update = DeviceUpdate::new();
    let mut lines = Vec::new();
    // By its public key: the kernel clamps the private one, and setting it again would end every session.
    if seen.public_key != Some(Key(*private_key).get_public()) {
        update = update.set_private_key(Key(*private_key));
        lines.push("private key".to_owned());
    }
    if seen.listen_port != Some(plan.listen_port) {
        update = update.set_listen_port(plan.listen_port);
        lines.push(format!("port {}", plan.listen_port));
    }
    for peer in &seen.peers {
        let key = WgPublicKey(peer.config.public_key.0);
        if !plan.peers.contains_key(&key) {
            update = update.remove_peer_by_key(&peer.config.public_key);
            lines.push(format!("no peer {key}"));
        }
    }
    for (key, wanted) in &plan.peers {
        let known = seen.peers.iter().find(|peer| peer.config.public_key.0 == key.0);
        if !known.is_some_and(|peer| is(peer, wanted)) {
            update = update.add_peer(builder(key, wanted));
            lines.push(format!("peer {} ({key})", wanted.node));
        }
    }
    if !lines.is_empty() {
        update.apply(&name, Backend::Kernel).map_err(failed("configure"))?;
        changed.extend(lines.into_iter().map(|line| format!("{link}: {line}")));
    }
    Ok(changed)
}

/// Counters of every peer, by key.
pub fn peers(link: &str) -> Result<Vec<PeerStatus>, WireguardError> {
    let mut peers: Vec<PeerStatus> = observe(link)?.peers.iter().map(status).collect();
    peers.sort_by_key(|peer| peer.public_key);
    Ok(peers)
}

/// The peer is called there from now on; all else stays.
pub fn set_endpoint(link: &str, key: &WgPublicKey, endpoint: SocketAddr) -> Result<(), WireguardError> {
    let peer = PeerConfigBuilder::new(&Key(key.0)).set_endpoint(endpoint);
    let update = DeviceUpdate::new().add_peer(peer).apply(&interface(link)?, Backend::Kernel);
    update.map_err(|source| WireguardError::Device { operation: "configure", link: link.to_owned(), source })
}

/// The peer is as wanted; its endpoint may have roamed.
fn is(seen: &PeerInfo, wanted: &WireguardPeer) -> bool {
    let mut allowed: Vec<_> = seen.config.allowed_ips.iter().map(|ip| (ip.address, ip.cidr)).collect();
    let mut expected: Vec<_> =
        wanted.allowed_ips.iter().map(|net| (net.network(), net.prefix_len())).collect();
    allowed.sort_unstable();
    expected.sort_unstable();
    allowed == expected
        && seen.config.persistent_keepalive_interval.unwrap_or(0) == wanted.keepalive_seconds.unwrap_or(0)
        && (seen.config.endpoint.is_some() || wanted.endpoint.is_none())
}

/// The endpoint is given with every change of a peer: a node that moved has other allowed IPs, too.
fn builder(key: &WgPublicKey, wanted: &WireguardPeer) -> PeerConfigBuilder {
    let mut builder = PeerConfigBuilder::new(&Key(key.0)).replace_allowed_ips();
    for net in &wanted.allowed_ips {
        builder = builder.add_allowed_ip(net.network(), net.prefix_len());
    }
    builder = match wanted.keepalive_seconds {
        Some(seconds) => builder.set_persistent_keepalive_interval(seconds),
        None => builder.unset_persistent_keepalive(),
    };
    match wanted.endpoint {
        Some(endpoint) => builder.set_endpoint(endpoint),
        None => builder,
    }
}

fn status(peer: &PeerInfo) -> PeerStatus {
    let since = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default().as_secs();
    PeerStatus {
        public_key: WgPublicKey(peer.config.public_key.0),
        own_key: None,
        endpoint: peer.config.endpoint,
        last_handshake_seconds: peer.stats.last_handshake_time.map(since),
        received_bytes: peer.stats.rx_bytes,
        sent_bytes: peer.stats.tx_bytes,
    }
}
