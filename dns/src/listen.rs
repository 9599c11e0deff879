//! The sockets: one UDP socket (`udp`) and one TCP socket (`tcp`) for each address.
//!
//! One socket an address, so that an answer leaves from the address that was asked without IP_PKTINFO. Bound with IP_FREEBIND: the route that makes the address local may come later.

mod handover;
mod heart;
mod tcp;
mod udp;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::serve::Resolver;
use heart::Heart;
use udp::First;

pub use handover::Handover;

/// Questions that came while the thread was away from the CPU, or no agent ran, wait here: some ten thousand (the kernel
/// doubles this, and counts 768 octets for a small datagram).
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// A thread that gave no sign of life for so long is told about.
const SILENT: Duration = Duration::from_secs(5);

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
    #[error(
        "DNS address {address} has given no sign of life for {seconds} seconds, so another node's resolver is asked: the node may have \
         too little CPU; restart the agent if it stays so (systemctl restart weft-agent)"
    )]
    Silent { address: IpAddr, seconds: u64 },
}

/// The sockets that answer now. Dropping it closes them.
pub(crate) struct Listeners {
    resolver: Arc<Resolver>,
    port: u16,
    handover: Handover,
    servers: BTreeMap<(IpAddr, Transport), Serving>,
}

impl Listeners {
    pub(crate) fn new(resolver: Arc<Resolver>, port: u16, handover: Handover) -> Self {
        Self { resolver, port, handover, servers: BTreeMap::new() }
    }

    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.servers.keys().map(|(address, _)| *address).collect()
    }

    /// Opens what is missing and closes what is not wanted; every address is tried. Needs a tokio runtime.
    /// Returns what changed and what failed.
    /// `beating` are those of which another node's resolver is asked where nothing here gives signs of life.
    pub(crate) fn ensure(
        &mut self,
        wanted: &BTreeSet<IpAddr>,
        beating: &BTreeSet<IpAddr>,
    ) -> (Vec<String>, Vec<ListenError>) {
        let mut changed = Vec::new();
        let mut failed = Vec::new();
        self.servers.retain(|(address, transport), _| {
            let keep = wanted.contains(address);
            if !keep {
                self.handover.forget(SocketAddr::new(*address, self.port), *transport);
                changed.push(format!("closed {address}/{}", transport.name()));
            }
            keep
        });
        for &address in wanted {
            for transport in [Transport::Udp, Transport::Tcp] {
                if self.servers.contains_key(&(address, transport)) {
                    continue;
                }
                match self.open(address, transport, beating.contains(&address)) {
                    Ok(server) => {
                        self.servers.insert((address, transport), server);
                        changed.push(format!("listening on {address}/{}", transport.name()));
                    }
                    Err(error) => failed.push(error),
                }
            }
        }
        self.handover.drop_rest();
        (changed, failed)
    }

    /// Forgets sockets whose server has ended, so that `ensure` opens them again.
    pub(crate) fn forget_ended(&mut self) {
        self.servers.retain(|_, server| !server.has_ended());
    }

    /// Addresses of a thread that gives no sign of life, though it should.
    pub(crate) fn silent(&self) -> Vec<ListenError> {
        let silent = self.servers.iter().filter_map(|((address, _), server)| match server {
            Serving::Udp(server) => Some((*address, server.silent_for().filter(|age| *age > SILENT)?)),
            Serving::Tcp(_) => None,
        });
        silent.map(|(address, age)| ListenError::Silent { address, seconds: age.as_secs() }).collect()
    }

    fn open(&mut self, address: IpAddr, transport: Transport, beating: bool) -> Result<Serving, ListenError> {
        let address = SocketAddr::new(address, self.port);
        let opened = match transport {
            Transport::Udp => self.udp(address, beating).map(Serving::Udp),
            Transport::Tcp => self.tcp(address).map(Serving::Tcp),
        };
        opened.map_err(|source| named(address, transport.name(), source))
    }

    fn udp(&mut self, address: SocketAddr, beating: bool) -> io::Result<udp::Server> {
        let kept = self.handover.take_udp(address);
        let first = if kept.is_some() { First::Names } else { First::Questions };
        let socket = kept.map_or_else(|| open_udp(address), Ok)?;
        // Only a help: without the privilege the host's limit stays.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES);
        self.handover.keep(address, Transport::Udp, &socket);
        let heart = beating.then(|| Heart::new(address));
        udp::Server::start(socket, self.resolver.clone(), first, heart)
    }

    fn tcp(&mut self, address: SocketAddr) -> io::Result<JoinSet<()>> {
        let socket = self.handover.take_tcp(address).map_or_else(|| open_tcp(address), Ok)?;
        self.handover.keep(address, Transport::Tcp, &socket);
        socket.set_nonblocking(true)?;
        let mut task = JoinSet::new();
        task.spawn(tcp::serve(TcpListener::from_std(socket)?, self.resolver.clone()));
        Ok(task)
    }
}

/// The task behind one socket; ends when dropped.
enum Serving {
    Udp(udp::Server),
    Tcp(JoinSet<()>),
}

impl Serving {
    fn has_ended(&mut self) -> bool {
        match self {
            Self::Udp(server) => server.has_ended(),
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

fn open_udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    Ok(std::net::UdpSocket::from(bound(address, SockType::Datagram)?))
}

fn open_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = bound(address, SockType::Stream)?;
    listen(&socket, Backlog::new(1024)?)?;
    Ok(std::net::TcpListener::from(socket))
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
