//! UDP among the nodes: a socket on this node's `host` address, so through the tunnel and in nobody else's reach.
//!
//! Table `weft-host` lets no source of the pod ranges in from the underlay, and no pod can send with an address that is not its own.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::watch;
use weft_model::Snapshot;

/// Until the next try to have the socket; the address comes with the overlay.
const RETRY: Duration = Duration::from_millis(500);

pub(crate) type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// This node's `host` address of one family.
pub(crate) struct HostAddress {
    pub(crate) ipv6: bool,
    pub(crate) snapshots: Snapshots,
}

impl HostAddress {
    pub(crate) fn now(&self) -> Option<IpAddr> {
        let snapshot = self.snapshots.borrow();
        snapshot.as_ref()?.own_node()?.hosts().find(|host| host.is_ipv6() == self.ipv6)
    }

    /// Waits for the address. `prepare` is what the socket needs before it is used.
    ///
    /// Errors: the Snapshots ended.
    pub(crate) async fn bind(
        &mut self,
        port: u16,
        prepare: impl Fn(&UdpSocket) -> std::io::Result<()>,
    ) -> Result<(UdpSocket, IpAddr), String> {
        loop {
            let Some(host) = self.now() else {
                self.changed().await?;
                continue;
            };
            match UdpSocket::bind((host, port)).await.and_then(|socket| prepare(&socket).map(|()| socket)) {
                Ok(socket) => return Ok((socket, host)),
                Err(error) => {
                    tracing::debug!(%error, %host, port, "no socket on the host address yet");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Until there is another Snapshot than at the last call.
    pub(crate) async fn changed(&mut self) -> Result<(), String> {
        self.snapshots.changed().await.map_err(|_| "the Snapshots ended".to_owned())
    }
}

/// `from` is the `host` address of a node, and the datagram came from `port` there.
pub(crate) fn is_node(snapshot: Option<&Snapshot>, from: SocketAddr, port: u16) -> bool {
    let mut hosts =
        snapshot.into_iter().flat_map(|snapshot| snapshot.nodes.values().flat_map(|node| node.hosts()));
    from.port() == port && hosts.any(|host| host == from.ip())
}
