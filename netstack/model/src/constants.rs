//! Every number and name that Weft claims on a host, with the reason, in one place.
//! Other rooms take them from here; a collision with another tool is mended here.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Routing protocol number of every route and rule of ours, so that clean-up finds exactly those.
/// 0x57 = 'W'; iproute2's rt_protos names nothing between 43 and 185.
pub const ROUTE_PROTOCOL: u8 = 0x57;
/// Of the routes and proxy neighbours by which a node answers for addresses of Services: another owner, so another number.
pub const ROUTE_PROTOCOL_LB: u8 = 0x58;
/// Table for what pods (and the host address) send to other nodes' own addresses: through the tunnel.
/// Not `main`, because what the host itself sends to a node must not take it (decision 5).
pub const TUNNEL_TABLE: u32 = 0x5745;
/// Priority of the rule `from podCIDR lookup TUNNEL_TABLE`: after `local` (0), far before `main` (32766).
pub const TUNNEL_RULE_PRIORITY: u32 = 5700;
/// Metric of the unreachable routes for the cluster range: anything more specific or better wins.
pub const UNREACHABLE_METRIC: u32 = 0x7000_0000;

/// The overlay device, kernel WireGuard or the persistent TUN of the userspace tunnel.
pub const TUNNEL_LINK: &str = "weft0";
/// Default UDP port of WireGuard, as IANA lists none and every tool uses this one.
pub const WIREGUARD_PORT: u16 = 51820;
/// UDP port on the `host` addresses, over which nodes introduce their new pods to each other. Beside the port of metrics, 9470.
pub const INTRODUCTION_PORT: u16 = 9471;
/// UDP port on the `host` addresses, on which nodes answer how large a packet came through.
pub const PATH_PORT: u16 = 9472;
/// Host ends of pod veths: this prefix and 10 hexadecimal digits (IFNAMSIZ allows 15 characters).
pub const POD_LINK_PREFIX: &str = "weftp";
/// IFB devices through which a pod's packets are led when its sending rate is limited: this prefix and the digits of its link.
pub const SHAPER_LINK_PREFIX: &str = "weftb";
/// Group of links whose pods have ended, which are about to be deleted. 'weft'; groups of people and tools are small numbers.
pub const ENDED_LINK_GROUP: u32 = u32::from_be_bytes(*b"weft");
/// Link-local gateway of every pod: never routed, so it cannot collide with a podCIDR.
pub const POD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
pub const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// MAC address of the host end of every pod veth: fixed, so that the pod's permanent neighbour never goes stale.
/// Locally administered, unicast.
pub const POD_GATEWAY_MAC: [u8; 6] = [0x02, 0x57, 0x45, 0x46, 0x54, 0x01];

/// nft tables, one per owner, all in family `inet`.
pub const TABLE_HOST: &str = "weft-host";
pub const TABLE_PROXY: &str = "weft-proxy";
pub const TABLE_CNI: &str = "weft-cni";
pub const TABLE_POLICY: &str = "weft-policy";

/// Base chain priorities. DNAT at -105: before other tools' dstnat (-100), so that leftovers of kube-proxy do not
/// win; filters on what left DNAT at -5; source NAT at 95, before others' srcnat (100); the last look at the
/// underlay after every NAT (300).
pub const PRIORITY_RAW: i32 = -300;
pub const PRIORITY_DNAT: i32 = -105;
/// What is judged by where it was sent to, before it is sent elsewhere.
pub const PRIORITY_BEFORE_DNAT: i32 = -106;
/// A hostPort gives way to a Service with the same port, as with kube-proxy and the `portmap` plugin.
pub const PRIORITY_HOSTPORT: i32 = -104;
pub const PRIORITY_FILTER: i32 = -5;
pub const PRIORITY_SNAT: i32 = 95;
pub const PRIORITY_LAST: i32 = 300;

/// Group of nflog to which denied packets are copied. 'WE'; others use small numbers.
pub const LOG_GROUP_DENIED: u16 = 0x5745;

/// Packet mark bit "masquerade this connection's packet", set by the proxy before DNAT, read in its postrouting.
/// kube-proxy uses 0x4000; a bit of our own keeps both usable during a migration.
pub const MARK_MASQUERADE: u32 = 0x0800_0000;

/// Node annotations, written by the node's own agent only (decision 15).
pub const ANNOTATION_PUBLIC_KEY: &str = "weft.network/public-key";
/// The key that replaces it as soon as the peers know it.
pub const ANNOTATION_NEXT_PUBLIC_KEY: &str = "weft.network/next-public-key";
pub const ANNOTATION_WIREGUARD_PORT: &str = "weft.network/wireguard-port";
/// Node annotations of people: where the node can be called, and how often it sends something so that a NAT stays open.
pub const ANNOTATION_ENDPOINT: &str = "weft.network/endpoint";
pub const ANNOTATION_KEEPALIVE: &str = "weft.network/persistent-keepalive";
pub const ANNOTATION_LINKS: &str = "weft.network/links";
pub const ANNOTATION_ANSWERS_FOR: &str = "weft.network/answers-for";

/// Condition of a Node, written by the node's own agent only: whether its kernel has the rules of network policies.
pub const CONDITION_NETWORK_POLICY: &str = "weft.network/NetworkPolicyReady";

/// NetworkPolicy annotation: `keep` lets connections that the policy would deny end by themselves; `cut`, the default, ends them.
pub const ANNOTATION_ESTABLISHED: &str = "weft.network/established";

/// MTU cost of WireGuard with an IPv6 outer header: 40 + 8 + 16 + 16.
pub const WIREGUARD_OVERHEAD_BYTES: u32 = 80;

/// Namespace and name of the Service through which the outside reaches the ingress of every node.
pub const INGRESS_SERVICE: (&str, &str) = ("weft-system", "weft-ingress");
/// Where the ingress listens on its own address: no privilege is needed for these, and the Service has 80 and 443.
pub const INGRESS_HTTP_PORT: u16 = 8080;
pub const INGRESS_HTTPS_PORT: u16 = 8443;
/// User and group of the process `weft ingress`, without a name: between those of people and systemd's dynamic ones, in a range
/// that nobody gives out (systemd's "Users, Groups, UIDs and GIDs on systemd Systems").
pub const INGRESS_USER: u32 = 61_057;
