//! Routes of the host's own that lie within the cluster's ranges: Docker's, a VPN's, what another network left behind.

use ipnet::IpNet;
use netlink_packet_route::route::RouteMessage;
use weft_model::constants::{POD_LINK_PREFIX, TUNNEL_LINK};
use weft_model::node_facts::ForeignRoute;

use super::RouteError;
use super::kernel_view::{self, PROTOCOL, destination, output};
use crate::kernel::link::Link;

const TABLE_MAIN: u8 = 254;

/// Those of table `main` whose destination lies within one of `ranges`, sorted. `links` are those of the host. A route that contains a range is none: ours
/// are more specific.
pub async fn foreign_routes(
    handle: &rtnetlink::Handle,
    links: &[Link],
    ranges: &[IpNet],
) -> Result<Vec<ForeignRoute>, RouteError> {
    let all = kernel_view::dump_all(handle).await?;
    let mut found: Vec<ForeignRoute> =
        all.iter().filter_map(|message| foreign(message, ranges, links)).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

fn foreign(message: &RouteMessage, ranges: &[IpNet], links: &[Link]) -> Option<ForeignRoute> {
    let destination = destination(message)?;
    let theirs = message.header.table == TABLE_MAIN && message.header.protocol != PROTOCOL;
    let within = ranges.iter().any(|range| range.contains(&destination));
    let name =
        |index| links.iter().find(|link| link.index == index).map_or("?", |link| &link.name).to_owned();
    let link = output(message).map(name);
    let of_ours = |link: &String| link == TUNNEL_LINK || link.starts_with(POD_LINK_PREFIX);
    (theirs && within && !link.as_ref().is_some_and(of_ours)).then_some(ForeignRoute { destination, link })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::link::Links;
    use crate::kernel::netns::Rtnetlink;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn only_routes_of_others_within_a_range_are_seen() {
        if !needs_root() {
            return;
        }
        let node = NamedNetns::new("node");
        for link in ["docker0", "weft0", "weftp1"] {
            node.must(&["ip", "link", "add", link, "type", "veth", "peer", "name", &format!("{link}p")]);
            node.must(&["ip", "link", "set", link, "up"]);
            node.must(&["ip", "link", "set", &format!("{link}p"), "up"]);
        }
        node.must(&["ip", "address", "add", "10.42.7.1/24", "dev", "docker0"]);
        node.must(&["ip", "address", "add", "fd42:0:0:1::1/128", "dev", "weft0", "nodad"]);
        for route in [
            "10.0.0.0/8 dev docker0",
            "default dev docker0",
            "10.43.0.0/16 dev docker0",
            "10.42.1.2/32 dev weftp1",
            "10.42.2.0/24 dev docker0 proto 87",
            "10.42.3.0/24 dev docker0 table 100",
            "blackhole 10.42.4.0/26",
            "unreachable fd42:0:0:9::/64",
        ] {
            node.must(&[&["ip", "route", "add"][..], &route.split(' ').collect::<Vec<_>>()].concat());
        }
        let ranges = ["10.42.0.0/16", "10.43.0.0/16", "fd42::/48"].map(|range| range.parse().unwrap());
        let found = node.block_on(async {
            let netlink = Rtnetlink::connect().unwrap();
            let links = Links::new(netlink.handle.clone()).list().await.unwrap();
            foreign_routes(&netlink.handle, &links, &ranges).await.unwrap()
        });
        let said: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "10.42.4.0/26",
                "10.42.7.0/24 dev docker0",
                "10.43.0.0/16 dev docker0",
                "fd42:0:0:9::/64 dev lo"
            ]
        );
    }
}
