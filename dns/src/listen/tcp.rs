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
/// Of a connection's questions that are read at once.
const READ_BYTES: usize = 2048;
/// Of answers that are sent at the latest.
const WRITE_BYTES: usize = 16 * 1024;
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
    // The answers behind those that are on their way do not wait for the client's acknowledgement (RFC 896).
    stream.set_nodelay(true)?;
    let stream = BufReader::with_capacity(READ_BYTES, stream);
    let mut line = Line { stream, answers: Vec::new(), waiting: 0, since: Instant::now() };
    while let Some(bytes) = line.question(resolver).await? {
        let Some(answer) = answer(bytes, client, resolver, &mut line).await? else { break };
        line.put(&answer)?;
        if line.answers.len() > WRITE_BYTES {
            line.send(resolver).await?;
        }
    }
    line.send(resolver).await
}

/// `None` for what deserves no answer, which ends the conversation.
async fn answer(
    bytes: Vec<u8>,
    client: SocketAddr,
    resolver: &Resolver,
    line: &mut Line,
) -> io::Result<Option<Vec<u8>>> {
    let (now, stats, log) = (Instant::now(), resolver.stats(), resolver.log());
    stats.count_requests(Protocol::Tcp, 1);
    stats.count_asked(&came(&bytes, Asked::read(&bytes).as_ref(), client, Protocol::Tcp), 1);
    if !resolver.rate().admits(client.ip(), now) {
        stats.count_dropped(Dropped::Rate);
        log.note(client, Protocol::Tcp, &bytes, Heard::Nothing(Dropped::Rate), now);
        return Ok(None);
    }
    let at_hand = at_hand(resolver, &bytes, client, now);
    let question = log.is_looked_at().then(|| bytes.clone());
    let answer = match at_hand {
        Some(answer) => Some(answer),
        None => {
            // Those before do not wait for an upstream.
            line.send(resolver).await?;
            resolver.exchange(bytes, client, Protocol::Tcp).await
        }
    };
    if let Some(answer) = &answer {
        if let Some(question) = question {
            log.note(client, Protocol::Tcp, &question, Heard::Answer(answer), now);
        }
        stats.count_sent(Protocol::Tcp, answer.len(), 1);
    }
    Ok(answer)
}

/// A connection, and the answers that wait until no whole question is left of what was read: who sends many questions at once (RFC
/// 7766 section 6.2.1.1) gets many answers at once.
struct Line {
    stream: BufReader<TcpStream>,
    /// Frames.
    answers: Vec<u8>,
    waiting: usize,
    /// When the first of them was asked for.
    since: Instant,
}

impl Line {
    /// `None` when the client closed between two messages.
    async fn question(&mut self, resolver: &Resolver) -> io::Result<Option<Vec<u8>>> {
        if !begins_with_frame(self.stream.buffer()) {
            self.send(resolver).await?;
        }
        let question = within(read_frame(&mut self.stream)).await?;
        if self.waiting == 0 {
            self.since = Instant::now();
        }
        Ok(question)
    }

    fn put(&mut self, answer: &[u8]) -> io::Result<()> {
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        self.answers.extend_from_slice(&length.to_be_bytes());
        self.answers.extend_from_slice(answer);
        self.waiting += 1;
        Ok(())
    }

    async fn send(&mut self, resolver: &Resolver) -> io::Result<()> {
        if self.answers.is_empty() {
            return Ok(());
        }
        within(self.stream.write_all(&self.answers)).await?;
        resolver.stats().count_duration(self.since.elapsed(), std::mem::take(&mut self.waiting));
        // An idle connection holds no memory for answers.
        self.answers = Vec::new();
        Ok(())
    }
}

/// The first frame is all there.
fn begins_with_frame(read: &[u8]) -> bool {
    read.split_first_chunk()
        .is_some_and(|(length, rest)| usize::from(u16::from_be_bytes(*length)) <= rest.len())
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
