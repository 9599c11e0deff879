//! TLS that goes to a backend as it is (`ssl-passthrough`): an endpoint by the name in the ClientHello, then bytes to and fro until
//! one side ends, or both are silent for too long.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::Worker;
use super::balance::{Choice, Loaded, choose};
use super::compiled::Passed;
use super::forward::endpoints;
use super::listen::wait_for_readers;
use super::proxy_protocol;
use super::stats::Refused;

/// Endpoints that are tried, and how long each (the defaults of `proxy-next-upstream-tries` and `proxy-connect-timeout`).
const TRIES: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Read at once in one direction. Nothing is held for a connection that is silent.
const PIECE_BYTES: usize = 16 * 1024;

/// A connection that is to be passed on.
pub(super) struct Passing {
    pub(super) stream: TcpStream,
    /// What was read of it.
    pub(super) hello: Vec<u8>,
    pub(super) client: SocketAddr,
    /// The address and port that the client asked.
    pub(super) asked: SocketAddr,
}

/// Serves the connection to its end; one that no endpoint takes is closed.
pub(super) async fn pass(worker: &Worker, to: &Passed, passing: Passing, patience: Duration) {
    let Passing { stream, hello, client, asked } = passing;
    let Some((backend, _loaded)) = connect(worker, to).await else {
        worker.proxy.standing.stats.refuse(Refused::NoEndpoint);
        tracing::debug!(%client, "TLS is not passed on: no endpoint takes it");
        return;
    };
    to.stats.pass();
    let mut first =
        to.proxy_protocol.map(|version| proxy_protocol::header(version, client, asked)).unwrap_or_default();
    first.extend(hello);
    if let Err(error) = relay(stream, backend, &first, patience).await {
        tracing::debug!(%client, %error, "TLS that is passed on");
    }
}

async fn connect(worker: &Worker, to: &Passed) -> Option<(TcpStream, Loaded)> {
    let endpoints = endpoints(&to.places, &worker.proxy.standing).await.ok()?;
    let mut tried = Vec::new();
    while tried.len() < TRIES {
        let endpoint = choose(&endpoints, &Choice::LeastOfTwo, &tried)?;
        if let Ok(Ok(stream)) =
            tokio::time::timeout(CONNECT_TIMEOUT, worker.pool.dial(endpoint.address)).await
        {
            endpoint.succeeded();
            return Some((stream, Loaded::new(endpoint)));
        }
        endpoint.failed();
        tried.push(endpoint.address);
    }
    None
}

async fn relay(
    mut client: TcpStream,
    mut backend: TcpStream,
    first: &[u8],
    patience: Duration,
) -> io::Result<()> {
    wait_for_readers(&client, patience);
    backend.write_all(first).await?;
    let (from_client, to_client) = client.split();
    let (from_backend, to_backend) = backend.split();
    let lively = Lively::new();
    tokio::select! {
        ended = async {
            tokio::try_join!(one_way(from_client, to_backend, &lively), one_way(from_backend, to_client, &lively))
        } => ended.map(drop),
        () = lively.silence(patience) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Until `from` ends, which the other side is told.
async fn one_way(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, lively: &Lively) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        if from.read_buf(&mut piece).await? == 0 {
            return to.shutdown().await;
        }
        lively.note();
        to.write_all(&piece).await?;
    }
}

/// When something came last.
struct Lively {
    begun: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
}

impl Lively {
    fn new() -> Self {
        Self { begun: Instant::now(), last: AtomicU64::new(0) }
    }

    fn note(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Until nothing has come for so long.
    async fn silence(&self, patience: Duration) {
        loop {
            let end = self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed)) + patience;
            if Instant::now() >= end {
                return;
            }
            tokio::time::sleep_until(end.into()).await;
        }
    }
}
