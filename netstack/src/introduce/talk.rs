//! The sockets: one a family, bound to this node's `host` address, that sends and hears introductions.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::watch;
use weft_model::Snapshot;
use weft_model::constants::INTRODUCTION_PORT;
use weft_model::snapshot::Attachments;

use super::{Introduced, audience, datagrams, hear, newly_attached};
use crate::host_socket::{HostAddress, is_node};
use crate::reconcile::{TaskGroup, sleep_until};

/// Pods that are attached together are introduced together.
const GATHER: Duration = Duration::from_millis(5);
/// A datagram may be lost, as while the tunnel shakes hands: each is sent again after this time, once.
const AGAIN: Duration = Duration::from_millis(300);

/// Starts the tasks; `introduced` is what the other nodes say.
pub fn start(
    tasks: &mut TaskGroup,
    snapshots: &watch::Receiver<Option<Arc<Snapshot>>>,
    attachments: &watch::Receiver<Attachments>,
    introduced: watch::Sender<Introduced>,
) {
    let introduced = Arc::new(introduced);
    for (name, ipv6) in [("introduce-ipv4", false), ("introduce-ipv6", true)] {
        let (snapshots, attachments) = (snapshots.clone(), attachments.clone());
        let address = HostAddress { ipv6, snapshots };
        let family = Family { address, attachments, introduced: introduced.clone() };
        tasks.start(name, family.run());
    }
}

struct Family {
    address: HostAddress,
    attachments: watch::Receiver<Attachments>,
    introduced: Arc<watch::Sender<Introduced>>,
}

impl Family {
    async fn run(mut self) -> Result<(), String> {
        loop {
            let (socket, host) = self.address.bind(INTRODUCTION_PORT, |_| Ok(())).await?;
            self.talk(&socket, host).await?;
        }
    }

    /// Until the address is another one.
    async fn talk(&mut self, socket: &UdpSocket, host: IpAddr) -> Result<(), String> {
        let mut known = self.attachments.borrow_and_update().clone();
        let mut again: VecDeque<(tokio::time::Instant, Vec<Vec<u8>>)> = VecDeque::new();
        let mut buffer = vec![0; 2048];
        while self.address.now() == Some(host) {
            let due = again.front().map(|(due, _)| *due);
            tokio::select! {
                received = socket.recv_from(&mut buffer) => match received {
                    Ok((bytes, from)) => self.take(&buffer[..bytes], from),
                    // An ICMP error about an earlier datagram: that node does not listen.
                    Err(error) => tracing::debug!(%error, "introductions"),
                },
                changed = self.attachments.changed() => {
                    changed.map_err(|_| "the attachments ended".to_owned())?;
                    tokio::time::sleep(GATHER).await;
                    let now = self.attachments.borrow_and_update().clone();
                    let new = datagrams(&newly_attached(&known, &now));
                    known = now;
                    if self.say(socket, host, &new) {
                        again.push_back((tokio::time::Instant::now() + AGAIN, new));
                    }
                }
                () = sleep_until(due) => {
                    if let Some((_, datagrams)) = again.pop_front() {
                        self.say(socket, host, &datagrams);
                    }
                }
                changed = self.address.changed() => changed?,
            }
        }
        Ok(())
    }

    /// Without waiting: what the socket does not take is lost, like a datagram on its way. False where nobody is told.
    fn say(&self, socket: &UdpSocket, own: IpAddr, datagrams: &[Vec<u8>]) -> bool {
        let Some(snapshot) = self.address.snapshots.borrow().clone().filter(|_| !datagrams.is_empty()) else {
            return false;
        };
        let audience = audience(&snapshot, own);
        for host in &audience {
            let to = SocketAddr::new(*host, INTRODUCTION_PORT);
            for datagram in datagrams {
                if let Err(error) = socket.try_send_to(datagram, to) {
                    tracing::debug!(%error, %to, "an introduction is not sent");
                }
            }
        }
        !audience.is_empty()
    }

    /// Only nodes are heard.
    fn take(&self, datagram: &[u8], from: SocketAddr) {
        let snapshot = self.address.snapshots.borrow().clone();
        if !is_node(snapshot.as_deref(), from, INTRODUCTION_PORT) {
            tracing::debug!(%from, "an introduction by somebody who is no node");
            return;
        }
        let mut readable = true;
        self.introduced.send_modify(|introduced| {
            readable = hear(introduced, datagram, from.ip(), Instant::now());
        });
        if !readable {
            tracing::debug!(%from, "an introduction that cannot be read");
        }
    }
}
