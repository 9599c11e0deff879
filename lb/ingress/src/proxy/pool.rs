//! Connections to backends: HTTP/1.1 ones are kept when an answer was read whole, an HTTP/2 one is shared.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use super::body::Body;
use super::exchange::{Http1, Stream};

/// Idle connections that a thread keeps to one endpoint: as many as clients of HTTP/2 ask on at once ask again in a moment.
const MAX_IDLE: usize = 512;

#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    #[error("connect")]
    Connect(#[source] std::io::Error),
    #[error("handshake")]
    Handshake(#[source] hyper::Error),
}

/// How a backend is spoken to; part of what tells pooled connections apart.
#[derive(Clone)]
pub(super) struct Speech {
    pub(super) http2: bool,
    pub(super) tls: Option<Tls>,
}

#[derive(Clone)]
pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    address: SocketAddr,
    http2: bool,
    /// Identity of the TLS configuration, which lives as long as its key is in the pool.
    tls: Option<(usize, String)>,
}

impl Key {
    fn new(address: SocketAddr, speech: &Speech) -> Self {
        let tls = speech
            .tls
            .as_ref()
            .map(|tls| (Arc::as_ptr(&tls.config) as usize, tls.name.to_str().into_owned()));
        Self { address, http2: speech.http2, tls }
    }
}

/// The addresses of the ingress: what it asks comes from them, so that NetworkPolicies know it.
pub(super) type Sources = ArcSwap<Vec<IpAddr>>;

#[derive(Default)]
pub(super) struct Pool {
    sources: Arc<Sources>,
    idle: Mutex<HashMap<Key, Vec<Idle>>>,
    shared: Mutex<HashMap<Key, (http2::SendRequest<Body>, Speech)>>,
}

struct Idle {
    connection: Box<Http1>,
    /// Keeps the identity in the key from being given to another configuration.
    _speech: Speech,
}

/// A connection that takes one request.
pub(super) enum Connection {
    One(Box<Http1>),
    Shared(http2::SendRequest<Body>),
}

impl Pool {
    pub(super) fn new(sources: Arc<Sources>) -> Self {
        Self { sources, ..Self::default() }
    }

    /// None of this machine's own loopback, which no other address reaches.
    fn source(&self, to: SocketAddr) -> Option<IpAddr> {
        let sources = self.sources.load();
        let same_family = sources.iter().find(|source| source.is_ipv4() == to.is_ipv4());
        same_family.copied().filter(|_| !to.ip().is_loopback())
    }

    /// One that is idle, and whether it was; otherwise a new one. For what may not be repeated an idle one is looked at twice.
    ///
    /// # Errors
    /// Nobody answers there, in time.
    pub(super) async fn connection(
        &self,
        address: SocketAddr,
        speech: &Speech,
        patience: Duration,
        may_repeat: bool,
    ) -> Result<(Connection, bool), UpstreamError> {
        if speech.http2 {
            if let Some(sender) = self.share(address, speech) {
                return Ok((Connection::Shared(sender), true));
            }
        } else if let Some(connection) = self.take(address, speech, may_repeat) {
            return Ok((Connection::One(connection), true));
        }
        match Box::pin(tokio::time::timeout(patience, self.connect(address, speech))).await {
            Ok(connected) => {
                let connection = connected?;
                if let Connection::Shared(sender) = &connection {
                    let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                    shared.insert(Key::new(address, speech), (sender.clone(), speech.clone()));
                }
                Ok((connection, false))
            }
            Err(_) => Err(UpstreamError::ConnectTimeout(patience)),
        }
    }

    async fn connect(&self, address: SocketAddr, speech: &Speech) -> Result<Connection, UpstreamError> {
        let stream = self.dial(address).await.map_err(UpstreamError::Connect)?;
        let stream = match &speech.tls {
            None => Stream::Plain(stream),
            Some(tls) => {
                let connector = TlsConnector::from(tls.config.clone());
                let stream = connector.connect(tls.name.clone(), stream).await;
                Stream::Tls(Box::new(stream.map_err(UpstreamError::Connect)?))
            }
        };
        if !speech.http2 {
            return Ok(Connection::One(Box::new(Http1::new(stream))));
        }
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .handshake(TokioIo::new(stream))
            .await
            .map_err(UpstreamError::Handshake)?;
        tokio::spawn(connection);
        Ok(Connection::Shared(sender))
    }

    /// A connection of nobody's kind yet.
    pub(super) async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = self.source(address) {
            // Which port is free depends on the other end, so it is chosen when that is known (ip(7)).
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            socket.bind(SocketAddr::new(source, 0))?;
        }
        let stream = socket.connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn take(&self, address: SocketAddr, speech: &Speech, may_repeat: bool) -> Option<Box<Http1>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let list = idle.get_mut(&Key::new(address, speech))?;
        let mut connections = std::iter::from_fn(|| list.pop()).map(|idle| idle.connection);
        let is_good = |one: &mut Box<Http1>| one.is_quiet() && (may_repeat || one.is_open());
        connections.find_map(|mut connection| is_good(&mut connection).then_some(connection))
    }

    fn share(&self, address: SocketAddr, speech: &Speech) -> Option<http2::SendRequest<Body>> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Key::new(address, speech);
        let (sender, _) = shared.get(&key)?;
        if sender.is_closed() {
            shared.remove(&key);
            return None;
        }
        Some(sender.clone())
    }

    /// Takes a connection back whose answer was read whole.
    pub(super) fn keep(&self, address: SocketAddr, speech: &Speech, connection: Box<Http1>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let list = idle.entry(Key::new(address, speech)).or_default();
        if list.len() < MAX_IDLE {
            list.push(Idle { connection, _speech: speech.clone() });
        }
    }

    /// Closes what is kept to endpoints that no route has any more, and what the other side closed.
    pub(super) fn tidy(&self, is_used: impl Fn(SocketAddr) -> bool) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|key, list| {
            list.retain_mut(|idle| {
                idle.connection.rest();
                idle.connection.is_quiet()
            });
            !list.is_empty() && is_used(key.address)
        });
        drop(idle);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|key, (sender, _)| !sender.is_closed() && is_used(key.address));
    }
}
