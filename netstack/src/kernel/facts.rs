//! Node facts from the kernel: uplinks and the WireGuard backend, once or whenever they change.
//!
//! In: link, address and route dumps, a trial of `kind wireguard`, rtnetlink's multicast groups. Out: [`NodeFacts`].

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use rtnetlink::{LinkWireguard, MulticastGroup};
use tokio::sync::watch;
use weft_model::NodeName;
use weft_model::constants::{POD_LINK_PREFIX, TUNNEL_LINK};
use weft_model::node_facts::{NodeFacts, Observed, Uplink, WireguardBackend};

use super::link::{Link, LinkAddress, LinkError, Links, cause};
use super::monitor;
use super::netns::{Netns, NetnsError, Rtnetlink};
use super::route::{RouteError, foreign_routes};

#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    #[error("open an rtnetlink socket")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("try a WireGuard link in a namespace of its own")]
    Wireguard(#[source] io::Error),
}

/// Facts of the calling thread's network namespace, now. `ranges` are those of pods and Services.
pub async fn read(name: NodeName, ranges: &[IpNet]) -> Result<NodeFacts, FactsError> {
    let wireguard_backend = wireguard_backend().await?;
    let connection = Rtnetlink::connect().map_err(FactsError::Socket)?;
    let empty = NodeFacts {
        name,
        uplinks: Vec::new(),
        wireguard_backend,
        foreign_routes: Vec::new(),
        loopback: BTreeSet::new(),
        observed: Observed::default(),
    };
    read_again(&connection.handle, ranges, &empty).await
}

/// How long links and addresses must be quiet before they are read again: `ip` and DHCP clients change several things
/// in a row.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Facts under ceaseless changes are at most this old.
const DEBOUNCE_LIMIT: Duration = Duration::from_secs(1);

/// Under memory pressure the kernel drops notifications (ENOBUFS); a fact is never older than this.
const RE_READ: Duration = Duration::from_secs(30);

/// Facts now, and a task that keeps the receiver current for as long as it runs. It ends only with an error.
pub async fn watch(
    name: NodeName,
    ranges: Vec<IpNet>,
) -> Result<(watch::Receiver<NodeFacts>, impl Future<Output = Result<(), String>> + Send + 'static), FactsError>
{
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let mut messages = monitor::open(&groups).map_err(FactsError::Socket)?;
    let connection = Rtnetlink::connect().map_err(FactsError::Socket)?;
    let facts = read(name, &ranges).await?;
    let (sender, receiver) = watch::channel(facts);
    let task = async move {
        while !matches!(tokio::time::timeout(RE_READ, messages.next()).await, Ok(None)) {
            settle(&mut messages).await;
            let known = sender.borrow().clone();
            match read_again(&connection.handle, &ranges, &known).await {
                Ok(now) => publish(&sender, now),
                Err(error) => {
                    tracing::warn!(error = %crate::reconcile::chain(&error), "read the node's links")
                }
            }
        }
        Err(monitor::ENDED.to_owned())
    };
    Ok((receiver, task))
}

fn publish(sender: &watch::Sender<NodeFacts>, now: NodeFacts) {
    sender.send_if_modified(|facts| {
        let changed = *facts != now;
        *facts = now;
        changed
    });
}

async fn settle<M>(messages: &mut (impl futures::Stream<Item = M> + Unpin)) {
    let quiet = async { while let Ok(Some(_)) = tokio::time::timeout(DEBOUNCE, messages.next()).await {} };
    let _ = tokio::time::timeout(DEBOUNCE_LIMIT, quiet).await;
}

/// `known` with what may change while the agent runs.
async fn read_again(
    handle: &rtnetlink::Handle,
    ranges: &[IpNet],
    known: &NodeFacts,
) -> Result<NodeFacts, FactsError> {
    let of_host = Links::new(handle.clone());
    let addresses = of_host.addresses(None).await?;
    let links = of_host.list().await?;
    let foreign_routes = foreign_routes(handle, &links, ranges).await?;
    let of_loopback = links.iter().filter(|link| link.loopback);
    let loopback = of_loopback.flat_map(|link| global_addresses(link.index, &addresses));
    let loopback = loopback.map(|net| net.addr()).collect();
    Ok(NodeFacts { uplinks: uplinks(links, &addresses), foreign_routes, loopback, ..known.clone() })
}

/// Links that are up, not loopback, not ours and carry a global address; by name, addresses in order.
fn uplinks(links: Vec<Link>, addresses: &[LinkAddress]) -> Vec<Uplink> {
    let ours = |name: &str| name == TUNNEL_LINK || name.starts_with(POD_LINK_PREFIX);
    let mut uplinks: Vec<Uplink> = links
        .into_iter()
        .filter(|link| link.up && !link.loopback && !ours(&link.name))
        .map(|link| Uplink {
            addresses: global_addresses(link.index, addresses).map(|net| net.addr()).collect(),
            subnets: global_addresses(link.index, addresses).map(|net| net.trunc()).collect(),
            name: link.name,
            index: link.index,
            mtu_bytes: link.mtu_bytes,
        })
        .filter(|uplink| !uplink.addresses.is_empty())
        .collect();
    uplinks.sort_by(|a, b| a.name.cmp(&b.name));
    uplinks
}

/// Sorted, without duplicates.
fn global_addresses(index: u32, addresses: &[LinkAddress]) -> impl Iterator<Item = IpNet> {
    let on_link = addresses.iter().filter(|address| address.index == index && address.global);
    on_link.map(|address| address.address).collect::<BTreeSet<_>>().into_iter()
}

/// Tries to make a WireGuard link where nobody sees it: only that tells whether the kernel has (or can load) it.
pub async fn wireguard_backend() -> Result<WireguardBackend, FactsError> {
    let netns = Netns::throwaway()?;
    let connection = netns.connect()?;
    let made = connection.handle.link().add(LinkWireguard::new("probe").build()).execute().await;
    match made.map_err(cause) {
        Ok(()) => Ok(WireguardBackend::Kernel),
        Err(refused) if refused.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(WireguardBackend::Userspace),
        Err(other) => Err(FactsError::Wireguard(other)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    fn node() -> NamedNetns {
        let node = NamedNetns::new("node");
        for name in ["up0", "down0", "weft0", "weftp1", "bare0"] {
            node.must(&["ip", "link", "add", name, "type", "veth", "peer", "name", &format!("{name}p")]);
            if name != "bare0" {
                node.must(&["ip", "addr", "add", "192.0.2.7/24", "dev", name]);
            }
            if name != "down0" {
                node.must(&["ip", "link", "set", name, "up"]);
            }
        }
        node.must(&["ip", "link", "set", "up0", "mtu", "1400"]);
        node.must(&["ip", "link", "set", "lo", "up"]);
        node.must(&["ip", "addr", "add", "198.51.100.7/32", "dev", "lo"]);
        node.must(&["ip", "addr", "add", "2001:db8::7/64", "dev", "up0", "nodad"]);
        node
    }

    #[test]
    fn an_uplink_is_up_has_a_global_address_and_is_not_ours() {
        if !needs_root() {
            return;
        }
        let node = node();
        let facts = node.block_on(read("n1".into(), &[])).unwrap();
        let names: Vec<_> = facts.uplinks.iter().map(|uplink| uplink.name.as_str()).collect();
        assert_eq!(names, ["up0"]);
        let addresses: Vec<IpAddr> = vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        assert_eq!((facts.uplinks[0].mtu_bytes, &facts.uplinks[0].addresses), (1400, &addresses));
        assert_eq!(facts.loopback, BTreeSet::from(["198.51.100.7".parse().unwrap()]));
        let wireguard_works = node.exec(&["ip", "link", "add", "wgtest", "type", "wireguard"]).0;
        assert_eq!(facts.wireguard_backend == WireguardBackend::Kernel, wireguard_works);
    }

    #[test]
    fn a_new_address_reaches_the_watcher() {
        if !needs_root() {
            return;
        }
        let node = node();
        node.block_on(async {
            let (mut facts, task) = watch("n1".into(), Vec::new()).await.unwrap();
            let task = tokio::spawn(task);
            node.must(&["ip", "addr", "add", "192.0.2.8/24", "dev", "up0"]);
            node.must(&["ip", "addr", "add", "192.0.2.9/24", "dev", "up0"]);
            tokio::time::timeout(Duration::from_secs(5), facts.changed()).await.unwrap().unwrap();
            assert_eq!(facts.borrow().uplinks[0].addresses.len(), 4);
            task.abort();
        });
    }
}
