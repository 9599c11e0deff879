//! Connections of clients: accepted, TLS by SNI, HTTP/1.1 or HTTP/2 by ALPN, each bounded in what it may hold and how long it
//! may be silent.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_rustls::LazyConfigAcceptor;
use weft_model::constants::{INGRESS_HTTP_PORT, INGRESS_HTTPS_PORT};

use super::Worker;
use super::answer::{Peer, answer};

/// From the first byte of a connection to a whole head, and between two requests (nginx's keepalive_timeout is 75 s).
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Of one request head (nginx: 4 buffers of 8 kB).
const MAX_HEAD_BYTES: usize = 32 * 1024;
const MAX_FIELDS: usize = 100;
const MAX_STREAMS: u32 = 128;
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

/// The port that clients know: the Service's, where it is ours that leads here.
fn client_port(own: u16) -> u16 {
    match own {
        INGRESS_HTTP_PORT => 80,
        INGRESS_HTTPS_PORT => 443,
        other => other,
    }
}

/// Accepts until `stop` says so; connections go on until they are idle.
pub async fn serve(worker: Arc<Worker>, listener: TcpListener, https: bool, mut stop: watch::Receiver<bool>) {
    let port = listener.local_addr().map_or(0, |address| client_port(address.port()));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, client)) => {
                let peer = Peer { client, port, https, certificates: Vec::new() };
                tokio::spawn(connection(worker.clone(), stream, peer, stop.clone()));
            }
            // Out of descriptors: those that are open go on, and one of them ends soon.
            Err(error) => {
                tracing::warn!(%error, port, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(worker: Arc<Worker>, stream: TcpStream, mut peer: Peer, stop: watch::Receiver<bool>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "nodelay");
    }
    if !peer.https {
        return http_1(worker, stream, peer, stop).await;
    }
    let client = peer.client;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(&worker, stream)).await {
        Ok(Ok(stream)) => {
            let (_, session) = stream.get_ref();
            let certificates = session.peer_certificates().unwrap_or_default();
            peer.certificates = certificates.iter().map(|one| one.clone().into_owned()).collect();
            if session.alpn_protocol() == Some(b"h2") {
                http_2(worker, stream, peer, stop).await;
            } else {
                http_1(worker, stream, peer, stop).await;
            }
        }
        Ok(Err(error)) => tracing::debug!(%client, %error, "TLS handshake"),
        Err(_) => tracing::debug!(%client, "TLS handshake: nothing came"),
    }
}

async fn handshake(
    worker: &Worker,
    stream: TcpStream,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let proxy = &worker.proxy;
    let mutual = proxy.certificates.load().is_mutual(start.client_hello().server_name());
    let config = if mutual { &proxy.tls.mutual } else { &proxy.tls.plain };
    start.into_stream(config.clone()).await
}

async fn http_1<S>(worker: Arc<Worker>, stream: S, peer: Peer, stop: watch::Receiver<bool>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let peer = Arc::new(peer);
    let service = service_fn(move |request| {
        let (worker, peer) = (worker.clone(), peer.clone());
        async move { Ok::<_, std::convert::Infallible>(answer(&worker, &peer, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    until_idle(connection, |connection| connection.graceful_shutdown(), stop).await;
}

async fn http_2<S>(worker: Arc<Worker>, stream: S, peer: Peer, stop: watch::Receiver<bool>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let peer = Arc::new(peer);
    let service = service_fn(move |request| {
        let (worker, peer) = (worker.clone(), peer.clone());
        async move {
            let mut response = answer(&worker, &peer, request).await;
            *response.version_mut() = http::Version::HTTP_2;
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(32 * 1024)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .keep_alive_interval(HEAD_TIMEOUT)
        .keep_alive_timeout(HANDSHAKE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    until_idle(connection, |connection| connection.graceful_shutdown(), stop).await;
}

/// Once told to stop it takes no further request.
async fn until_idle<C>(connection: C, shut_down: impl FnOnce(Pin<&mut C>), stop: watch::Receiver<bool>)
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(stop) => {
            shut_down(connection.as_mut());
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection");
    }
}

async fn told(mut stop: watch::Receiver<bool>) {
    // A sender that is gone never says stop.
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}
