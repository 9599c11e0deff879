//! The sockets: one UDP socket with its own hickory-server, and one TCP socket (`tcp`), for each address.
//!
//! One socket an address, because a wildcard socket would answer from another address than it was asked at (hickory
//! does not use IP_PKTINFO). Bound with IP_FREEBIND: the route that makes the address local may come later.

mod tcp;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hickory_server::Server;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;

use crate::serve::Resolver;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error(
        "DNS address {address}/{transport} is taken by another process: stop it (ss -lnp 'sport = :{port}' names it; \
         often CoreDNS, dnsmasq or systemd-resolved) or choose another --cluster-dns",
        port = address.port()
    )]
    Taken { address: SocketAddr, transport: &'static str },
    #[error(
        "no right to listen on DNS address {address}/{transport}: run as root or with CAP_NET_BIND_SERVICE"
    )]
    NotAllowed { address: SocketAddr, transport: &'static str },
    #[error("listening on DNS address {address}/{transport}")]
    Other {
        address: SocketAddr,
        transport: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The sockets that answer now. Dropping it closes them.
pub(crate) struct Listeners {
    resolver: Arc<Resolver>,
    port: u16,
    servers: BTreeMap<(IpAddr, Transport), Serving>,
}

impl Listeners {
    pub(crate) fn new(resolver: Arc<Resolver>, port: u16) -> Self {
        Self { resolver, port, servers: BTreeMap::new() }
    }

    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.servers.keys().map(|(address, _)| *address).collect()
    }

    /// Opens what is missing and closes what is not wanted; every address is tried. Needs a tokio runtime.
    /// Returns what changed and what failed.
    pub(crate) fn ensure(&mut self, wanted: &BTreeSet<IpAddr>) -> (Vec<String>, Vec<ListenError>) {
        let mut changed = Vec::new();
        let mut failed = Vec::new();
        self.servers.retain(|(address, transport), _| {
            let keep = wanted.contains(address);
            if !keep {
                changed.push(format!("closed {address}/{}", transport.name()));
            }
            keep
        });
        for &address in wanted {
            for transport in [Transport::Udp, Transport::Tcp] {
                if self.servers.contains_key(&(address, transport)) {
                    continue;
                }
                match self.open(address, transport) {
                    Ok(server) => {
                        self.servers.insert((address, transport), server);
                        changed.push(format!("listening on {address}/{}", transport.name()));
                    }
                    Err(error) => failed.push(error),
                }
            }
        }
        (changed, failed)
    }

    /// Forgets sockets whose server has ended, so that `ensure` opens them again.
    pub(crate) async fn forget_ended(&mut self) {
        let mut ended = Vec::new();
        for (key, server) in &mut self.servers {
            if server.has_ended().await {
                ended.push(*key);
            }
        }
        for key in ended {
            self.servers.remove(&key);
        }
    }

    fn open(&self, address: IpAddr, transport: Transport) -> Result<Serving, ListenError> {
        let address = SocketAddr::new(address, self.port);
        let opened = match transport {
            Transport::Udp => open_udp(address).map(|socket| {
                let mut server = Server::new(Shared(self.resolver.clone()));
                server.register_socket(socket);
                Serving::Udp(server)
            }),
            Transport::Tcp => open_tcp(address).map(|listener| {
                let mut task = JoinSet::new();
                task.spawn(tcp::serve(listener, self.resolver.clone()));
                Serving::Tcp(task)
            }),
        };
        opened.map_err(|source| named(address, transport.name(), source))
    }
}

/// The task behind one socket; ends when dropped.
enum Serving {
    Udp(Server<Shared>),
    Tcp(JoinSet<()>),
}

impl Serving {
    async fn has_ended(&mut self) -> bool {
        match self {
            Self::Udp(server) => {
                tokio::time::timeout(Duration::ZERO, server.block_until_done()).await.is_ok()
            }
            Self::Tcp(task) => task.try_join_next().is_some(),
        }
    }
}

fn named(address: SocketAddr, transport: &'static str, source: io::Error) -> ListenError {
    match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Taken { address, transport },
        io::ErrorKind::PermissionDenied => ListenError::NotAllowed { address, transport },
        _ => ListenError::Other { address, transport, source },
    }
}

fn open_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::from(bound(address, SockType::Datagram)?);
    UdpSocket::from_std(socket)
}

fn open_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound(address, SockType::Stream)?;
    listen(&socket, Backlog::new(1024)?)?;
    TcpListener::from_std(std::net::TcpListener::from(socket))
}

/// A non-blocking socket bound to an address that need not be local yet. IP_FREEBIND holds for IPv6 sockets too
/// (the kernel passes level IP of an IPv6 socket on to IPv4's options).
fn bound(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    if kind == SockType::Stream {
        // Old connections in TIME_WAIT do not hinder a restart; a listener of another process still does.
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(address))?;
    Ok(socket)
}

/// One resolver behind many servers.
struct Shared(Arc<Resolver>);

#[async_trait::async_trait]
impl RequestHandler for Shared {
    async fn handle_request<R: ResponseHandler, T: hickory_server::net::runtime::Time>(
        &self,
        request: &Request,
        response_handle: R,
    ) -> ResponseInfo {
        self.0.handle_request::<R, T>(request, response_handle).await
    }
}
