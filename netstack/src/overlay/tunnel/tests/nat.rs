//! A host behind a NAT that forgets soon: it is reached as long as its keepalives keep the way open.

use super::*;

/// Seconds after which the NAT forgets a flow in which nothing was sent.
const MEMORY_SECONDS: u64 = 2;

impl Host {
    /// Rewrites the port of what the host's tunnel sends and lets in only answers, as a home router does.
    fn hide_behind_nat(&self) {
        let rules = format!(
            "table inet nat {{
                chain post {{ type nat hook postrouting priority 100; udp sport {PORT} masquerade to :20000-30000; }}
                chain in {{ type filter hook input priority 0; udp dport {PORT} ct state new drop; }}
            }}"
        );
        self.netns.must(&["nft", &rules]);
        for name in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
            let path = format!("/proc/sys/net/netfilter/{name}");
            self.inside(|| std::fs::write(&path, MEMORY_SECONDS.to_string()).unwrap());
        }
    }

    fn peer(
        &self,
        endpoint: Option<SocketAddr>,
        keepalive_seconds: Option<u16>,
    ) -> (WgPublicKey, WireguardPeer) {
        let peer = WireguardPeer {
            node: format!("node-{}", self.number),
            next_key: None,
            endpoint,
            other_endpoints: Vec::new(),
            allowed_ips: self.ranges().iter().map(|range| range.parse().unwrap()).collect(),
            keepalive_seconds,
        };
        (self.key, peer)
    }

    fn write_peer(&self, peer: (WgPublicKey, WireguardPeer)) {
        let (own_keys, own_addresses) = (vec![self.key], Vec::new());
        let wireguard =
            WireguardPlan { listen_port: PORT, own_keys, own_addresses, peers: BTreeMap::from([peer]) };
        let state = TunnelState { wireguard, mtu_bytes: MTU };
        std::fs::write(self.dir.path().join(STATE_FILE), serde_json::to_vec(&state).unwrap()).unwrap();
    }
}

#[test]
fn a_host_behind_a_nat_is_reached_after_silence_when_it_keeps_the_way_open_and_only_then() {
    if !needs_root() {
        return;
    }
    for ipv6 in [false, true] {
        for keepalive in [Some(1), None] {
            let (switch, mut hosts) = (switch(), [1, 2].map(Host::new));
            hosts[0].prepare(&switch, &[2]);
            hosts[1].prepare(&switch, &[1]);
            hosts[0].hide_behind_nat();
            let public = SocketAddr::new(hosts[1].underlay(ipv6), PORT);
            hosts[0].write_peer(hosts[1].peer(Some(public), keepalive));
            // Its own address is all that is known of it, and nothing gets through to that.
            let private = SocketAddr::new(hosts[0].underlay(ipv6), PORT);
            hosts[1].write_peer(hosts[0].peer(Some(private), None));
            hosts[1].start();
            hosts[0].start();
            hosts[0].reaches(hosts[1].inner(true), PATIENCE);
            std::thread::sleep(Duration::from_secs(3 * MEMORY_SECONDS));
            let hidden = hosts[0].inner(false).to_string();
            let (reached, said) = hosts[1].netns.exec(&["ping", "-c", "1", "-W", "1", &hidden]);
            assert_eq!(reached, keepalive.is_some(), "IPv6 {ipv6}, keepalive {keepalive:?}: {said}");
            let endpoint = hosts[1].status(&hosts[0]).endpoint.unwrap();
            assert!((20_000..=30_000).contains(&endpoint.port()), "{endpoint}");
        }
    }
}
