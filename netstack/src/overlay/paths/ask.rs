//! The sockets: one a family, bound to this node's `host` address, that asks and answers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::net::UdpSocket;
use tokio::sync::watch;
use weft_model::constants::PATH_PORT;
use weft_model::node_facts::Observed;
use weft_model::objects::Node;
use weft_model::snapshot::Objects;
use weft_model::{NodeFacts, NodeName, Snapshot};

use super::{Path, Question};
use crate::host_socket::{HostAddress, Snapshots, is_node};
use crate::kernel::udp;
use crate::overlay::mtu_bytes;
use crate::reconcile::{TaskGroup, sleep_until};

const QUESTION: &[u8; 8] = b"weft-pq1";
const ANSWER: &[u8; 8] = b"weft-pa1";
const HEADER_LEN: usize = 16;

/// Starts the tasks, which keep [`Observed::narrow_paths`].
pub(in crate::overlay) fn start(
    tasks: &mut TaskGroup,
    snapshots: &Snapshots,
    observed: &Arc<watch::Sender<Observed>>,
) {
    for (name, ipv6) in [("paths-ipv4", false), ("paths-ipv6", true)] {
        let address = HostAddress { ipv6, snapshots: snapshots.clone() };
        let family = Family { address, observed: observed.clone(), paths: BTreeMap::new(), followed: None };
        tasks.start(name, family.run());
    }
}

struct Family {
    address: HostAddress,
    observed: Arc<watch::Sender<Observed>>,
    paths: BTreeMap<IpAddr, (NodeName, Path)>,
    /// What the paths were made from.
    followed: Option<(Objects<NodeName, Node>, Arc<NodeFacts>)>,
}

impl Family {
    async fn run(mut self) -> Result<(), String> {
        let ipv6 = self.address.ipv6;
        loop {
            let (socket, host) =
                self.address.bind(PATH_PORT, |socket| udp::send_unfragmented(socket, ipv6)).await?;
            self.talk(&socket, host).await?;
        }
    }

    /// Until the address is another one.
    async fn talk(&mut self, socket: &UdpSocket, host: IpAddr) -> Result<(), String> {
        let mut buffer = vec![0; 65_536];
        self.follow();
        while self.address.now() == Some(host) {
            self.ask(socket);
            let due = self.paths.values().map(|(_, path)| path.due).min();
            tokio::select! {
                received = socket.recv_from(&mut buffer) => match received {
                    Ok((bytes, from)) => self.take(socket, &buffer[..bytes], from),
                    // An ICMP error about an earlier datagram: that node does not listen.
                    Err(error) => tracing::debug!(%error, "paths"),
                },
                () = sleep_until(due.map(Into::into)) => {}
                changed = self.address.changed() => {
                    changed?;
                    self.follow();
                }
            }
        }
        Ok(())
    }

    /// The nodes of the Snapshot, each with a path; a new one begins soon, a node that left takes its verdict along.
    fn follow(&mut self) {
        let Some(snapshot) = self.address.snapshots.borrow().clone() else { return };
        let followed = self.followed.replace((snapshot.nodes.clone(), snapshot.facts.clone()));
        let (mut moved, mut same) = (false, false);
        if let Some((nodes, facts)) = followed {
            moved = facts.uplinks != snapshot.facts.uplinks;
            same = Arc::ptr_eq(&nodes, &snapshot.nodes) && Arc::ptr_eq(&facts, &snapshot.facts);
        }
        if same {
            return;
        }
        let (now, whole) = (Instant::now(), mtu_bytes(&snapshot));
        let known = snapshot.facts.observed.narrow_paths.clone();
        let mut old = std::mem::take(&mut self.paths);
        for (name, host) in asked(&snapshot, self.address.ipv6) {
            let path = match old.remove(&host).filter(|(known, _)| *known == name) {
                Some((_, mut path)) => {
                    if moved || path.whole != whole {
                        path.look_again(whole, now);
                    }
                    path
                }
                None => Path::new(whole, known.get(&name).copied(), now),
            };
            self.paths.insert(host, (name, path));
        }
        for (name, path) in old.into_values().filter(|(_, path)| path.narrow.is_some()) {
            tell(&self.observed, &name, path.narrow, None);
        }
    }

    /// Without waiting: what the socket does not take is lost, like a datagram on its way.
    fn ask(&mut self, socket: &UdpSocket) {
        let now = Instant::now();
        for (host, (_, path)) in &mut self.paths {
            let Some(question) = path.step(now) else { continue };
            let datagram = datagram(question, host.is_ipv6());
            if let Err(error) = socket.try_send_to(&datagram, SocketAddr::new(*host, PATH_PORT)) {
                tracing::debug!(%error, %host, "a question is not sent");
            }
        }
    }

    /// Only nodes are heard and answered.
    fn take(&mut self, socket: &UdpSocket, datagram: &[u8], from: SocketAddr) {
        let Some((kind, nonce)) = datagram.get(..HEADER_LEN).and_then(|head| head.split_first_chunk::<8>())
        else {
            return;
        };
        let snapshot = self.address.snapshots.borrow().clone();
        if !is_node(snapshot.as_deref(), from, PATH_PORT) {
            return;
        }
        match (kind, <[u8; 8]>::try_from(nonce)) {
            (QUESTION, Ok(nonce)) => {
                let answer = [*ANSWER, nonce].concat();
                if let Err(error) = socket.try_send_to(&answer, from) {
                    tracing::debug!(%error, %from, "an answer is not sent");
                }
            }
            (ANSWER, Ok(nonce)) => {
                let Some((name, path)) = self.paths.get_mut(&from.ip()) else { return };
                let before = path.narrow;
                if path.hear(u64::from_be_bytes(nonce), Instant::now()) {
                    tell(&self.observed, name, before, path.narrow);
                }
            }
            _ => {}
        }
    }
}

fn tell(observed: &watch::Sender<Observed>, node: &NodeName, before: Option<u32>, narrow: Option<u32>) {
    if before == narrow {
        return;
    }
    match narrow {
        Some(bytes) => tracing::warn!(node = node.0, bytes, "larger packets do not reach the node"),
        None => tracing::info!(node = node.0, "packets of every size reach the node"),
    }
    observed.send_if_modified(|observed| {
        let paths = &mut observed.narrow_paths;
        match narrow {
            Some(bytes) => paths.insert(node.clone(), bytes) != Some(bytes),
            None => paths.remove(node).is_some(),
        }
    });
}

/// Zeros after the head, so that the whole packet has the size that is asked about (RFC 791, RFC 8200, RFC 768).
fn datagram(question: Question, ipv6: bool) -> Vec<u8> {
    let headers = if ipv6 { 40 + 8 } else { 20 + 8 };
    let mut datagram = [*QUESTION, question.nonce.to_be_bytes()].concat();
    datagram.resize((question.bytes as usize).saturating_sub(headers).max(HEADER_LEN), 0);
    datagram
}

/// The other nodes with keys and their `host` addresses of this family; over IPv6 only where one of the two has no range of IPv4.
fn asked(snapshot: &Snapshot, ipv6: bool) -> Vec<(NodeName, IpAddr)> {
    let Some(this) = snapshot.own_node() else { return Vec::new() };
    let peers = snapshot.nodes.values().filter(|node| node.name != this.name && node.public_key.is_some());
    peers.filter_map(|node| Some((node.name.clone(), node.host_for(this, ipv6)?))).collect()
}
