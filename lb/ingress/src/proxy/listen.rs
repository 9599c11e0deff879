//! Connections of clients: accepted, TLS by SNI, HTTP/1.1 or HTTP/2 by ALPN, each bounded in what it may hold and how long it
//! may be silent. One that is to end does so between two requests.

use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use http::StatusCode;
use http::header::{self, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use rustls::server::{Accepted, Acceptor};
use tokio::io::{AsyncRead as _, AsyncWriteExt as _, BufWriter, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::{StartHandshake, TlsStream};
use weft_model::constants::{INGRESS_HTTP_PORT, INGRESS_HTTPS_PORT};

use super::Worker;
use super::answer::{Peer, answer};
use super::arriving::Arriving;
use super::compiled::Passed;
use super::linger::Lingering;
use super::passthrough::{Passing, pass};
use super::proxy_protocol::{self, HeaderError, Origin};
use super::short;
use super::splice::Outlet;
use super::stats::{Refused, Stats};
use crate::certificate;

/// For how long clients may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the first byte of a connection to a whole head, and between two requests (nginx's keepalive_timeout is 75 s).
    pub head: Duration,
    /// Between two pieces of a request's body (nginx's client_body_timeout).
    pub body: Duration,
    /// For a PROXY header, for a TLS handshake, for the answer to a PING.
    pub handshake: Duration,
    /// Of both sides, while TLS is passed on as it is (nginx's proxy_timeout of streams).
    pub passthrough: Duration,
    /// With what was sent to them and they do not take (nginx's send_timeout).
    pub unread: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(60),
            body: Duration::from_secs(60),
            handshake: Duration::from_secs(10),
            passthrough: Duration::from_secs(600),
            unread: Duration::from_secs(60),
        }
    }
}

/// A kept HTTP/1.1 connection that is to end is told so with the answer to its next request (`Connection: close`); one on which
/// nothing is asked for so long is closed. Closing it at once would meet requests that are on their way.
const QUIET: Duration = Duration::from_secs(1);
/// Of one request head (nginx: 4 buffers of 8 kB).
const MAX_HEAD_BYTES: usize = 32 * 1024;
const MAX_FIELDS: usize = 100;
/// Of a ClientHello with its records; real ones have less than 2 kB.
const MAX_HELLO_BYTES: usize = 32 * 1024;
const MAX_STREAMS: u32 = 128;
/// Of what a TLS record holds at most (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 * 1024;
/// Streams that a client opened and reset at once and that wait still (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
const BACKLOG: u32 = 4096;

/// A listening socket of one of several threads: the kernel spreads connections over them.
///
/// # Errors
/// The address is not there, or taken by another program.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// How long the kernel waits for a window or an acknowledgement before it gives the connection up (TCP_USER_TIMEOUT, tcp(7)).
pub(super) fn wait_for_readers(stream: &TcpStream, patience: Duration) {
    let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = setsockopt(stream, TcpUserTimeout, &millis) {
        tracing::debug!(%error, "clients that read nothing are waited for");
    }
}

/// The port that clients know: the Service's, where it is ours that leads here.
fn client_port(own: u16) -> u16 {
    match own {
        INGRESS_HTTP_PORT => 80,
        INGRESS_HTTPS_PORT => 443,
        other => other,
    }
}

/// How far a listener is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// Connections from before end as soon as nothing is asked on them; new ones are served.
    Draining,
    /// No further connection is taken, and each ends as soon as nothing is asked on it.
    Ending,
}

/// What a listener's connections need to know of its end, and by what they are counted.
#[derive(Clone)]
pub struct Life {
    pub phase: watch::Receiver<Phase>,
    /// Held by connections that were taken before draining began.
    pub early: Weak<()>,
    /// Held by those that were taken since.
    pub late: Weak<()>,
    pub patience: Patience,
}

impl Life {
    /// The phase of the moment and what a connection holds that begins in it.
    fn begin(&self) -> (Phase, Option<Arc<()>>) {
        // One that is taken in the last moment has an end before it, too.
        let phase = (*self.phase.borrow()).min(Phase::Draining);
        let counted = if phase == Phase::Serving { &self.early } else { &self.late };
        (phase, counted.upgrade().or_else(|| self.late.upgrade()))
    }
}

/// Accepts until the phase is [`Phase::Ending`]; connections go on until they are idle.
pub async fn serve(worker: Arc<Worker>, listener: TcpListener, https: bool, mut life: Life) {
    let port = listener.local_addr().map_or(0, |address| client_port(address.port()));
    loop {
        let accepted = tokio::select! {
            biased;
            _ = life.phase.wait_for(|phase| *phase == Phase::Ending) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                wait_for_readers(&stream, life.patience.unread);
                let (begun, open) = life.begin();
                let peer = Peer {
                    client,
                    port,
                    asked: None,
                    https,
                    certificates: Vec::new(),
                    names: None,
                    patience: life.patience,
                    open,
                };
                let until = Until { phase: life.phase.clone(), begun };
                tokio::spawn(connection(worker.clone(), stream, peer, until));
            }
            // Out of descriptors: those that are open go on, and one of them ends soon.
            Err(error) => {
                tracing::warn!(%error, port, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// The end of one connection: a phase beyond the one that it began in.
#[derive(Clone)]
pub(super) struct Until {
    phase: watch::Receiver<Phase>,
    begun: Phase,
}

impl Until {
    pub(super) fn has_come(&self) -> bool {
        *self.phase.borrow() > self.begun
    }

    /// A kept connection on which nothing is asked ends then.
    pub(super) async fn quiet(self) {
        self.come().await;
        tokio::time::sleep(QUIET).await;
    }

    async fn come(mut self) {
        // A sender that is gone never says stop.
        if self.phase.wait_for(|phase| *phase > self.begun).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn connection(worker: Arc<Worker>, mut stream: TcpStream, mut peer: Peer, until: Until) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "nodelay");
    }
    let stats = worker.proxy.standing.stats.clone();
    let _connected = stats.connected();
    if let Err(error) = origin(&worker, &mut stream, &mut peer).await {
        stats.refuse(Refused::ProxyHeader);
        tracing::debug!(client = %peer.client, error = weft_netstack::reconcile::chain(&error), "connection refused");
        return;
    }
    if !peer.https {
        return http_1(worker, stream, peer, until).await;
    }
    let client = peer.client;
    let shaken = Box::pin(tokio::time::timeout(peer.patience.handshake, handshake(&worker, stream))).await;
    match shaken {
        Ok(Ok(Shaken::Passed(stream, hello, to))) => {
            let own = || stream.local_addr().map(|own| SocketAddr::new(own.ip(), peer.port));
            let Ok(asked) = peer.asked.map_or_else(own, Ok) else { return };
            let passing = Passing { stream, hello, client, asked };
            Box::pin(pass(&worker, &to, passing, peer.patience.passthrough)).await;
        }
        Ok(Ok(Shaken::Here(stream))) => {
            let (_, session) = stream.get_ref();
            let certificates = session.peer_certificates().unwrap_or_default();
            peer.certificates = certificates.iter().map(|one| one.clone().into_owned()).collect();
            peer.names = certificates.first().and_then(|own| certificate::names(own));
            // In boxes: a connection without TLS has no room for them.
            match session.alpn_protocol() {
                Some(b"h2") => Box::pin(http_2(worker, stream, peer, until)).await,
                _ => Box::pin(http_1(worker, stream, peer, until)).await,
            }
        }
        Ok(Err(error)) => {
            stats.refuse(Refused::TlsHandshake);
            tracing::debug!(%client, %error, "TLS handshake");
        }
        Err(_) => {
            stats.refuse(Refused::Slow);
            tracing::debug!(%client, "TLS handshake: nothing came");
        }
    }
}

/// Whose connection it is, where a load balancer in front is to say so.
async fn origin(worker: &Worker, stream: &mut TcpStream, peer: &mut Peer) -> Result<(), HeaderError> {
    let expected = {
        let front = &worker.proxy.compiled.load().front;
        front.proxy_protocol && front.trusts(peer.address())
    };
    if !expected {
        return Ok(());
    }
    let read = tokio::time::timeout(peer.patience.handshake, proxy_protocol::read(stream)).await;
    if let Origin::Passed { client, asked } =
        read.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))?
    {
        (peer.client, peer.port, peer.asked) = (client, client_port(asked.port()), Some(asked));
    }
    Ok(())
}

/// A connection on the TLS listener.
#[expect(clippy::large_enum_variant, reason = "it is taken apart at once")]
enum Shaken {
    Here(TlsStream<TcpStream>),
    /// With what was read of it and where it goes.
    Passed(TcpStream, Vec<u8>, Arc<Passed>),
}

async fn handshake(worker: &Worker, mut stream: TcpStream) -> io::Result<Shaken> {
    let (accepted, hello) = client_hello(&mut stream).await?;
    let proxy = &worker.proxy;
    let asked = accepted.client_hello();
    if let Some(to) = proxy.compiled.load().passed(asked.server_name()) {
        return Ok(Shaken::Passed(stream, hello, to.clone()));
    }
    let mutual = proxy.certificates.load().is_mutual(asked.server_name());
    let config = if mutual { &proxy.tls.mutual } else { &proxy.tls.plain };
    StartHandshake::from_parts(accepted, stream).into_stream(config.clone()).await.map(Shaken::Here)
}

/// The client's first message as rustls reads it, and its bytes for whoever is to read it instead.
async fn client_hello(stream: &mut TcpStream) -> io::Result<(Accepted, Vec<u8>)> {
    let (mut acceptor, mut bytes) = (Acceptor::default(), Vec::new());
    let read = poll_fn(|context| {
        loop {
            let mut source = Heard { stream, context, bytes: &mut bytes };
            match acceptor.read_tls(&mut source) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) if bytes.len() > MAX_HELLO_BYTES => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a ClientHello without end",
                    )));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => return Poll::Ready(Ok(Ok(accepted))),
                Err(refusal) => return Poll::Ready(Ok(Err(refusal))),
            }
        }
    });
    match read.await? {
        Ok(accepted) => Ok((accepted, bytes)),
        Err((error, mut alert)) => {
            let mut told = Vec::new();
            alert.write_all(&mut told)?;
            stream.write_all(&told).await?;
            Err(io::Error::new(io::ErrorKind::InvalidData, error))
        }
    }
}

/// A connection as rustls reads it; what it reads is kept.
struct Heard<'a, 'b> {
    stream: &'a mut TcpStream,
    context: &'a mut Context<'b>,
    bytes: &'a mut Vec<u8>,
}

impl io::Read for Heard<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut into = ReadBuf::new(into);
        match Pin::new(&mut *self.stream).poll_read(self.context, &mut into) {
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
            Poll::Ready(read) => {
                read?;
                self.bytes.extend_from_slice(into.filled());
                Ok(into.filled().len())
            }
        }
    }
}

async fn http_1<S>(worker: Arc<Worker>, stream: S, peer: Peer, until: Until)
where
    S: tokio::io::AsyncRead + Outlet + Send + 'static,
{
    if let Some(rest) = short::serve(&worker, stream, &peer, &until).await {
        // In a box: a connection of usual requests has no room for it.
        Box::pin(http_1_whole(worker, rest, peer, until)).await;
    }
}

/// All of HTTP/1.1, as hyper has it.
async fn http_1_whole<S>(worker: Arc<Worker>, stream: S, peer: Peer, until: Until)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (patience, stats) = (peer.patience, worker.proxy.standing.stats.clone());
    let peer = Arc::new(peer);
    let end = until.clone();
    let service = service_fn(move |request| {
        let (worker, peer, end) = (worker.clone(), peer.clone(), end.clone());
        async move {
            // In a box: hyper keeps room for what this returns as long as the connection lasts, idle or not.
            let mut response = Box::pin(answer(&worker, &peer, Arriving::of(request))).await;
            if end.has_come() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let ended = until_idle(connection, |connection| connection.graceful_shutdown(), until.quiet()).await;
    tell(&stats, ended);
}

async fn http_2(worker: Arc<Worker>, stream: TlsStream<TcpStream>, peer: Peer, until: Until) {
    // Frames of streams that are ready together leave together: without it each of them is a record and a system call.
    let stream = BufWriter::with_capacity(RECORD_BYTES, Lingering::new(stream, peer.open.clone()));
    let (patience, stats) = (peer.patience, worker.proxy.standing.stats.clone());
    let peer = Arc::new(peer);
    let service = service_fn(move |request| {
        let (worker, peer) = (worker.clone(), peer.clone());
        async move {
            // In a box: hyper moves the whole of it more than once.
            let mut response = Box::pin(answer(&worker, &peer, Arriving::of(request))).await;
            *response.version_mut() = http::Version::HTTP_2;
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(32 * 1024)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .keep_alive_interval(patience.head)
        .keep_alive_timeout(patience.handshake)
        .serve_connection(TokioIo::new(stream), service);
    // GOAWAY first names no stream: what the client has sent meanwhile is served (RFC 9113 6.8).
    let ended = until_idle(connection, |connection| connection.graceful_shutdown(), until.come()).await;
    tell(&stats, ended);
}

/// Once `end` has come it takes no further request.
async fn until_idle<C>(
    connection: C,
    shut_down: impl FnOnce(Pin<&mut C>),
    end: impl Future<Output = ()>,
) -> hyper::Result<()>
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = end => {
            shut_down(connection.as_mut());
            connection.await
        }
    }
}

/// Counts a connection that was ended for what its client did; one that simply broke is none.
fn tell(stats: &Stats, ended: hyper::Result<()>) {
    let Err(error) = ended else { return };
    let of_http_2 = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    if error.is_timeout() {
        stats.refuse(Refused::Slow);
    } else if error.is_parse() {
        stats.refuse(Refused::Malformed);
    } else if of_http_2.is_some_and(|error| error.is_go_away() && error.is_library()) {
        // This side ended the connection.
        stats.refuse(Refused::Flood);
    }
    tracing::debug!(error = weft_netstack::reconcile::chain(&error), "connection");
}
