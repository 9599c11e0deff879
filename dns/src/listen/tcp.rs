//! DNS over TCP with a bound on connections, so that no pod can use the agent's file descriptors up.
//!
//! hickory-server's own TCP loop takes any number of connections and spins when descriptors run out; this one hands
//! the same requests to the same [`Resolver`], and gives what is at hand at once. Frames are RFC 7766: a length of two octets, then the message.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_server::net::xfer::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::fast::Asked;
use crate::log::Heard;
use crate::quota::Quota;
use crate::serve::{PLAIN_UDP_BYTES, Resolver, came, undeserving};
use crate::stats::Dropped;

/// Connections of one listening socket; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 128;
/// Connections of one client; more are closed at once.
const MAX_CONNECTIONS_PER_CLIENT: usize = 16;
/// A client that sends no whole question, or takes no whole answer, for this long is disconnected (RFC 7766
/// section 6.2.3: seconds).
const IDLE: Duration = Duration::from_secs(10);
/// Pause after a failed accept: descriptors or memory ran out, or the client is gone already.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until it is dropped.
pub(super) async fn serve(listener: TcpListener, resolver: Arc<Resolver>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let quota = Quota::new(MAX_CONNECTIONS_PER_CLIENT);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // The semaphore is never closed, so this only waits.
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "DNS connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(share) = quota.take(client.ip()) else { continue };
        let resolver = resolver.clone();
        connections.spawn(async move {
            let _held = (permit, share);
            if let Err(error) = converse(stream, client, &resolver).await {
                tracing::debug!(%client, %error, "DNS connection ended");
            }
        });
    }
}

/// Question after question, answered in order, until the client closes, idles, asks too often or sends what deserves no answer.
async fn converse(stream: TcpStream, client: SocketAddr, resolver: &Resolver) -> io::Result<()> {
    // A frame's length and its message come together, so they are read together.
    let mut stream = BufReader::with_capacity(usize::from(PLAIN_UDP_BYTES), stream);
    loop {
        let Some(bytes) = within(read_frame(&mut stream)).await? else { return Ok(()) };
        resolver.stats().count_requests(Protocol::Tcp, 1);
        let (now, stats) = (Instant::now(), resolver.stats());
        stats.count_asked(&came(&bytes, Asked::read(&bytes).as_ref(), client, Protocol::Tcp), 1);
        if !resolver.rate().admits(client.ip(), now) {
            stats.count_dropped(Dropped::Rate);
            resolver.log().note(client, Protocol::Tcp, &bytes, Heard::Nothing(Dropped::Rate), now);
            return Ok(());
        }
        let at_hand = at_hand(resolver, &bytes, client, now);
        let question = resolver.log().is_looked_at().then(|| bytes.clone());
        let answer = match at_hand {
            Some(answer) => answer,
            None => match resolver.exchange(bytes, client, Protocol::Tcp).await {
                Some(answer) => answer,
                None => return Ok(()),
            },
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let frame = [&length.to_be_bytes()[..], answer.as_slice()].concat();
        within(stream.write_all(&frame)).await?;
        if let Some(question) = question {
            resolver.log().note(client, Protocol::Tcp, &question, Heard::Answer(&answer), now);
        }
        stats.count_sent(Protocol::Tcp, answer.len(), 1);
        stats.count_duration(now.elapsed(), 1);
    }
}

/// The answer that UDP would give, when it is at hand and whole.
fn at_hand(resolver: &Resolver, bytes: &[u8], client: SocketAddr, now: Instant) -> Option<Vec<u8>> {
    const TRUNCATION: u8 = 0b0000_0010;
    let asked = Asked::read(bytes).filter(|_| undeserving(bytes, client).is_none())?;
    let mut reply = Vec::with_capacity(usize::from(PLAIN_UDP_BYTES));
    let code = resolver.at_hand(&asked, &resolver.custom(), &resolver.store().read(), now, &mut reply)?;
    if reply.get(2)? & TRUNCATION != 0 {
        return None;
    }
    resolver.stats().count_response(code);
    Some(reply)
}

/// `None` when the client closed between two messages.
async fn read_frame(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let idle = || io::Error::new(io::ErrorKind::TimedOut, "idle");
    tokio::time::timeout(IDLE, work).await.unwrap_or_else(|_| Err(idle()))
}
