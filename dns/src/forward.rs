//! What is in no zone of ours goes to the host's resolvers: bounded in all and for each client, with time limits,
//! and kept for a while.
//!
//! ```text
//!  Outside question -> cache -> resolv.conf's nameservers, the healthy ones first: UDP, TCP when truncated
//! ```
//!
//! One exchange has its own socket with a random port and a random id; a datagram that is not from the server asked,
//! not for that id or not for that question is ignored (RFC 5452 section 9).

mod cache;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name as WireName, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::name::Name;
use crate::quota::Quota;
use crate::resolv_conf::ResolvConf;
use crate::stats::{Stats, count};
use cache::{Cache, CacheKey};

/// Questions under way at one time; more are refused at once, so that one pod cannot hold memory and ports.
const MAX_UNDER_WAY: usize = 256;
/// Questions of one client under way at one time.
const MAX_UNDER_WAY_PER_CLIENT: usize = 64;
/// One try with one server. glibc's own patience is 5 s.
const TRY_TIMEOUT: Duration = Duration::from_millis(1500);
/// All tries of one question: below glibc's 5 s, so that it hears SERVFAIL before it gives up.
const QUESTION_TIMEOUT: Duration = Duration::from_millis(4500);
/// A server that did not answer is asked last for this long.
const PENALTY: Duration = Duration::from_secs(10);
/// The resolv.conf is looked at this often at most.
const CONF_CHECK: Duration = Duration::from_secs(1);
/// UDP payload we ask for: DNS flag day 2020, fits every path without fragments.
const UDP_PAYLOAD_BYTES: u16 = 1232;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    #[error("no usable nameserver in the host's resolv.conf")]
    NoNameserver,
    #[error("too many questions under way ({MAX_UNDER_WAY})")]
    Busy,
    #[error("too many questions of one client under way ({MAX_UNDER_WAY_PER_CLIENT})")]
    ClientBusy,
    #[error("no nameserver answered in {QUESTION_TIMEOUT:?}")]
    Timeout,
    #[error("asking {server}")]
    Exchange {
        server: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// A question as the client asked it.
#[derive(Clone, Debug)]
pub(crate) struct Outside {
    pub(crate) client: IpAddr,
    /// In the client's case.
    pub(crate) name: WireName,
    pub(crate) record_type: RecordType,
    /// EDNS flag DO (RFC 3225).
    pub(crate) dnssec_ok: bool,
    /// Header flag CD (RFC 4035).
    pub(crate) checking_disabled: bool,
}

/// Asks the resolvers of the host.
pub(crate) struct Forwarder {
    upstreams: Mutex<Upstreams>,
    cache: Mutex<Cache>,
    permits: Semaphore,
    quota: Quota,
    /// Addresses we answer on: never asked, that would be a loop.
    own: ArcSwap<BTreeSet<IpAddr>>,
    port: Option<u16>,
    stats: Arc<Stats>,
}

struct Upstreams {
    conf: ResolvConf,
    checked_at: Option<Instant>,
    failed_at: BTreeMap<SocketAddr, Instant>,
}

impl Forwarder {
    /// `port` replaces port 53 of the nameservers (a resolv.conf cannot name one).
    pub(crate) fn new(resolv_conf: PathBuf, port: Option<u16>, stats: Arc<Stats>) -> Self {
        let conf = ResolvConf::new(resolv_conf);
        Self {
            upstreams: Mutex::new(Upstreams { conf, checked_at: None, failed_at: BTreeMap::new() }),
            cache: Mutex::default(),
            permits: Semaphore::new(MAX_UNDER_WAY),
            quota: Quota::new(MAX_UNDER_WAY_PER_CLIENT),
            own: ArcSwap::default(),
            port,
            stats,
        }
    }

    /// Tells which addresses are ours.
    pub(crate) fn set_own(&self, own: BTreeSet<IpAddr>) {
        self.own.store(Arc::new(own));
    }

    /// The nameservers that would be asked now, in order.
    pub(crate) fn nameservers(&self) -> Vec<SocketAddr> {
        let now = Instant::now();
        let own = self.own.load();
        let mut upstreams = lock(&self.upstreams);
        if upstreams.checked_at.is_none_or(|at| now.duration_since(at) >= CONF_CHECK) {
            upstreams.checked_at = Some(now);
            if upstreams.conf.refresh() {
                tracing::info!(nameservers = ?upstreams.conf.nameservers, "resolvers of the host");
                upstreams.failed_at.clear();
                // Another network may see other names.
                lock(&self.cache).clear();
            }
        }
        let mut servers: Vec<SocketAddr> =
            upstreams.conf.nameservers.iter().filter(|server| !own.contains(&server.ip())).copied().collect();
        let failed_at = &upstreams.failed_at;
        servers
            .sort_by_key(|server| failed_at.get(server).is_some_and(|at| now.duration_since(*at) < PENALTY));
        if let Some(port) = self.port {
            servers.iter_mut().for_each(|server| server.set_port(port));
        }
        servers
    }

    /// The answer of the host's resolvers, whatever its response code, or why there is none (SERVFAIL then).
    pub(crate) async fn resolve(&self, question: &Outside) -> Result<Message, ForwardError> {
        let servers = self.nameservers();
        let key = Name::from_hickory(&question.name).map(|name| CacheKey {
            name,
            record_type: question.record_type,
            dnssec_ok: question.dnssec_ok,
            checking_disabled: question.checking_disabled,
        });
        if let Some(key) = &key
            && let Some(message) = lock(&self.cache).find(key, Instant::now())
        {
            count(&self.stats.cache_hits);
            return Ok(message);
        }
        if servers.is_empty() {
            return Err(ForwardError::NoNameserver);
        }
        let _share = self.quota.take(question.client).ok_or(ForwardError::ClientBusy)?;
        let _permit = self.permits.try_acquire().map_err(|_| ForwardError::Busy)?;
        count(&self.stats.forwarded);
        let asked = tokio::time::timeout(QUESTION_TIMEOUT, self.ask_all(&servers, question)).await;
        let message = asked.unwrap_or(Err(ForwardError::Timeout))?;
        if let Some(key) = key {
            lock(&self.cache).keep(key, &message, Instant::now());
        }
        Ok(message)
    }

    /// Every server once, then once more; an answer that says "not me" counts only when nobody says better.
    async fn ask_all(&self, servers: &[SocketAddr], question: &Outside) -> Result<Message, ForwardError> {
        let mut unhelpful = None;
        let mut failure = ForwardError::NoNameserver;
        for round in 0..2 {
            for &server in servers {
                match ask(server, question).await {
                    Ok(message) if is_helpful(message.metadata.response_code) => {
                        self.note(server, None);
                        return Ok(message);
                    }
                    Ok(message) => unhelpful = Some(message),
                    Err(source) => {
                        tracing::debug!(%server, %source, round, "a resolver of the host did not answer");
                        count(&self.stats.upstream_failures);
                        self.note(server, Some(Instant::now()));
                        failure = ForwardError::Exchange { server, source };
                    }
                }
            }
            if let Some(message) = unhelpful {
                return Ok(message);
            }
        }
        Err(failure)
    }

    fn note(&self, server: SocketAddr, failed_at: Option<Instant>) {
        let mut upstreams = lock(&self.upstreams);
        let listed = upstreams.conf.nameservers.iter().find(|listed| listed.ip() == server.ip()).copied();
        match (listed, failed_at) {
            (Some(listed), Some(at)) => drop(upstreams.failed_at.insert(listed, at)),
            (Some(listed), None) => drop(upstreams.failed_at.remove(&listed)),
            (None, _) => {}
        }
    }
}

fn is_helpful(code: ResponseCode) -> bool {
    matches!(code, ResponseCode::NoError | ResponseCode::NXDomain)
}

/// One server: with EDNS, without it when the server does not know EDNS, by TCP when the answer was cut.
async fn ask(server: SocketAddr, question: &Outside) -> std::io::Result<Message> {
    let mut message = ask_udp(server, &query(question, true)).await?;
    let mut edns = true;
    if matches!(message.metadata.response_code, ResponseCode::FormErr | ResponseCode::NotImp) {
        edns = false;
        message = ask_udp(server, &query(question, false)).await?;
    }
    if message.metadata.truncation {
        match ask_tcp(server, &query(question, edns)).await {
            Ok(whole) => return Ok(whole),
            // The client hears that it was cut and may try TCP itself.
            Err(error) => tracing::debug!(%server, %error, "no TCP answer after a truncated one"),
        }
    }
    Ok(message)
}

/// A new message with a random id.
fn query(question: &Outside, edns: bool) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.add_query(Query::query(question.name.clone(), question.record_type));
    if edns {
        let mut options = Edns::new();
        options.set_max_payload(UDP_PAYLOAD_BYTES).set_version(0).set_dnssec_ok(question.dnssec_ok);
        message.set_edns(options);
    }
    message
}

async fn ask_udp(server: SocketAddr, query: &Message) -> std::io::Result<Message> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    within(TRY_TIMEOUT, async {
        let socket = UdpSocket::bind(any).await?;
        socket.connect(server).await?;
        socket.send(&encode(query)?).await?;
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if let Some(message) = decode(&buffer[..length]).filter(|message| is_reply(message, query)) {
                return Ok(message);
            }
        }
    })
    .await
}

async fn ask_tcp(server: SocketAddr, query: &Message) -> std::io::Result<Message> {
    within(TRY_TIMEOUT, async {
        let mut stream = TcpStream::connect(server).await?;
        let bytes = encode(query)?;
        let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat()).await?;
        let length = stream.read_u16().await?;
        let mut buffer = vec![0; usize::from(length)];
        stream.read_exact(&mut buffer).await?;
        decode(&buffer)
            .filter(|message| is_reply(message, query))
            .ok_or_else(|| std::io::Error::other("the TCP answer is for another question"))
    })
    .await
}

async fn within<T>(limit: Duration, work: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let timed_out = || std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer in {limit:?}"));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}

fn encode(message: &Message) -> std::io::Result<Vec<u8>> {
    message.to_vec().map_err(std::io::Error::other)
}

fn decode(bytes: &[u8]) -> Option<Message> {
    Message::from_vec(bytes).ok()
}

/// Same id, a response, and for our question (names compare without case).
fn is_reply(message: &Message, query: &Message) -> bool {
    message.metadata.message_type == MessageType::Response
        && message.metadata.id == query.metadata.id
        && message.queries == query.queries
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
