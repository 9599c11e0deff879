//! What is in no zone of ours goes to upstream resolvers: bounded in all and for each client, with time limits, and kept
//! for a while.
//!
//! ```text
//!  question -> Cache -- fresh ------------------------------------------------------------------> answer
//!                   \- stale, missing -> one flight a question: race of the upstreams, the healthy first -> Cache
//! ```
//!
//! `upstreams` knows whom to ask, `exchange` asks one, over a connection of `tls` where nobody is to listen; `bailiwick` throws
//! away what is not about the question, `rebinding` what would lead inside where that is not wanted; `packet` is the answer as
//! octets, `cache` keeps it. One flight a question also ends loops: a question that comes back to us waits for itself, and then
//! for nobody.

mod bailiwick;
mod cache;
mod exchange;
mod packet;
mod rebinding;
mod tls;
mod upstreams;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name as WireName, RecordType};
use ipnet::IpNet;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::custom::Server;
use crate::fast::Asked;
use crate::name::Name;
use crate::quota::Quota;
use crate::resolv_conf::ResolvConf;
use crate::stats::{Stats, count};
use cache::{Cache, CacheKey, KeyBytes, Limits, Lookup, lifetime_seconds};
use exchange::Said;
use packet::{Age, Packet};
use tls::Dialer;
pub(crate) use tls::has_authority;
use upstreams::{Routes, Upstream, Upstreams};

/// Questions under way at one time; more are refused at once, so that nobody can hold all memory and ports.
const MAX_UNDER_WAY: usize = 512;
/// Questions that one client waits for at one time.
const MAX_UNDER_WAY_PER_CLIENT: usize = 64;
/// A server that has said nothing for this long is not waited for alone.
const HEDGE: Duration = Duration::from_millis(400);
/// The same when all have been asked once.
const HEDGE_AGAIN: Duration = Duration::from_millis(1000);
/// All tries of one question: below glibc's 5 s, so that it hears SERVFAIL before it gives up.
const QUESTION_TIMEOUT: Duration = Duration::from_millis(4500);
/// How long a client waits when there is a stale answer: "a recommended value of 1.8 seconds" (RFC 8767 section 5).
const STALE_PATIENCE: Duration = Duration::from_millis(1800);

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
    #[error("the name is too long")]
    Name,
    #[error("the answer is too large to be given on")]
    TooLarge,
    #[error("asking {server}")]
    Exchange {
        server: Server,
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

/// How a flight ended. Shared by all who waited for it, an answer with TTL 0 too: they asked while it was under way.
type Landed = Result<Arc<Packet>, Arc<ForwardError>>;
type Waiting = watch::Receiver<Option<Landed>>;

/// Asks upstream resolvers.
pub(crate) struct Forwarder {
    shared: Arc<Shared>,
    quota: Quota,
    /// Flights end with the forwarder, not with who waits for them.
    tasks: Mutex<JoinSet<()>>,
}

/// What flights share.
struct Shared {
    upstreams: Mutex<Upstreams>,
    cache: RwLock<Cache>,
    flights: Mutex<HashMap<CacheKey, Waiting>>,
    permits: Arc<Semaphore>,
    /// Of the cluster.
    ranges: Mutex<Vec<IpNet>>,
    dialer: Arc<Dialer>,
    stats: Arc<Stats>,
}

impl Forwarder {
    /// `port` replaces port 53 of the nameservers (a resolv.conf cannot name one).
    pub(crate) fn new(resolv_conf: PathBuf, port: Option<u16>, stats: Arc<Stats>) -> Self {
        let shared = Shared {
            upstreams: Mutex::new(Upstreams::new(ResolvConf::new(resolv_conf), port)),
            cache: RwLock::default(),
            flights: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_UNDER_WAY)),
            ranges: Mutex::default(),
            dialer: Arc::default(),
            stats,
        };
        Self {
            shared: Arc::new(shared),
            quota: Quota::new(MAX_UNDER_WAY_PER_CLIENT),
            tasks: Mutex::default(),
        }
    }

    /// Tells which addresses are ours: never asked, that would be a loop.
    pub(crate) fn set_own(&self, own: BTreeSet<IpAddr>) {
        lock(&self.shared.upstreams).set_own(own);
    }

    /// The cluster's ranges, which answers lead inside to where that is not wanted.
    pub(crate) fn set_ranges(&self, ranges: Vec<IpNet>) {
        *lock(&self.shared.ranges) = ranges;
    }

    /// Tells whom to ask for which names, and how long answers may be kept (positive and negative ones, in seconds).
    pub(crate) fn configure(&self, routes: Routes, (positive, negative): (Option<u32>, Option<u32>)) {
        let limits = Limits::default();
        let limits = Limits {
            positive_seconds: positive.unwrap_or(limits.positive_seconds),
            negative_seconds: negative.unwrap_or(limits.negative_seconds),
        };
        let rerouted = lock(&self.shared.upstreams).set_routes(routes);
        let mut cache = self.shared.write_cache();
        if rerouted || cache.limits() != limits {
            cache.clear();
        }
        cache.set_limits(limits);
    }

    /// The host's nameservers that would be asked now, in order.
    pub(crate) fn nameservers(&self) -> Vec<SocketAddr> {
        self.shared.refresh(Instant::now());
        lock(&self.shared.upstreams).of_host()
    }

    /// Whom a question for the name would be asked of now, in order, and why one did not answer of late.
    pub(crate) fn servers_for(&self, name: &WireName) -> Vec<(Server, Option<String>)> {
        let (upstreams, now) = (lock(&self.shared.upstreams), Instant::now());
        let asked = upstreams.for_name(name, now).into_iter().map(|upstream| upstream.server);
        asked.map(|server| (server.clone(), upstreams.failure(&server, now))).collect()
    }

    /// Answers for the name that lead inside are emptied.
    pub(crate) fn stops_rebinding(&self, name: &Name) -> bool {
        lock(&self.shared.upstreams).rebinding(name).is_some()
    }

    /// The host's search path.
    pub(crate) fn search(&self) -> Vec<Name> {
        lock(&self.shared.upstreams).search()
    }

    /// Answers that are kept now.
    pub(crate) fn cached(&self) -> usize {
        self.shared.read_cache().len()
    }

    /// Answers that are kept: those that say what there is, and those that say that there is nothing.
    pub(crate) fn kept(&self) -> (usize, usize) {
        self.shared.read_cache().kept()
    }

    /// Answers that gave others their place in the cache.
    pub(crate) fn evicted(&self) -> u64 {
        self.shared.read_cache().evicted()
    }

    /// Writes an answer that is at hand into `reply`, which is empty; `None`, and nothing written, when there is none,
    /// it does not fit, or something is to be done beside.
    pub(crate) fn answer_cached(
        &self,
        asked: &Asked<'_>,
        now: Instant,
        reply: &mut Vec<u8>,
    ) -> Option<ResponseCode> {
        let key =
            KeyBytes::new(asked.name(), asked.record_type, asked.dnssec_ok(), asked.checking_disabled())?;
        let (packet, age) = self.shared.read_cache().at_hand(&key, now)?;
        let code = packet.write(asked, age, reply)?;
        self.shared.stats.count_hit(packet.is_denial());
        Some(code)
    }

    /// The answer of the upstreams, whatever its response code, or why there is none (SERVFAIL then).
    pub(crate) async fn resolve(&self, question: &Outside) -> Result<Message, Arc<ForwardError>> {
        let now = Instant::now();
        self.shared.refresh(now);
        let name = Name::from_hickory(&question.name).ok_or(ForwardError::Name)?;
        let record_type = u16::from(question.record_type);
        let key = KeyBytes::new(name.wire(), record_type, question.dnssec_ok, question.checking_disabled)
            .ok_or(ForwardError::Name)?;
        let found = self.shared.read_cache().look_up(&key, now);
        let (packet, age) = match found {
            Lookup::Fresh { packet, age, refresh } => {
                if refresh && self.flight(key.to_key(), question).is_ok() {
                    count(&self.shared.stats.prefetched);
                }
                self.shared.stats.count_hit(packet.is_denial());
                (packet, age)
            }
            Lookup::Stale { packet, retry } => {
                self.resolve_stale(key.to_key(), question, packet, retry).await
            }
            Lookup::Missing => {
                count(&self.shared.stats.misses);
                let _share = self.quota.take(question.client).ok_or(ForwardError::ClientBusy)?;
                (landed(self.flight(key.to_key(), question)?).await?, Age::Fresh(0))
            }
        };
        Ok(packet.message(age).ok_or(ForwardError::TooLarge)?)
    }

    /// A new answer if one comes soon, else the old one.
    async fn resolve_stale(
        &self,
        key: CacheKey,
        question: &Outside,
        stale: Arc<Packet>,
        retry: bool,
    ) -> (Arc<Packet>, Age) {
        if retry
            && let Some(_share) = self.quota.take(question.client)
            && let Ok(waiting) = self.flight(key, question)
            && let Ok(Ok(packet)) = tokio::time::timeout(STALE_PATIENCE, landed(waiting)).await
            && packet.is_helpful()
        {
            return (packet, Age::Fresh(0));
        }
        count(&self.shared.stats.served_stale);
        (stale, Age::Stale)
    }

    /// The flight of this question: one that is under way, else a new one.
    fn flight(&self, key: CacheKey, question: &Outside) -> Result<Waiting, ForwardError> {
        let mut flights = lock(&self.shared.flights);
        if let Some(waiting) = flights.get(&key) {
            return Ok(waiting.clone());
        }
        let permit = self.shared.permits.clone().try_acquire_owned().map_err(|_| {
            count(&self.shared.stats.rejected);
            ForwardError::Busy
        })?;
        let (tell, waiting) = watch::channel(None);
        flights.insert(key.clone(), waiting.clone());
        drop(flights);
        let (shared, question) = (self.shared.clone(), question.clone());
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let _permit = permit;
            let outcome = shared.ask_upstreams(&key, &question).await;
            lock(&shared.flights).remove(&key);
            tell.send_replace(Some(outcome));
        });
        Ok(waiting)
    }
}

async fn landed(mut waiting: Waiting) -> Landed {
    match waiting.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone().unwrap_or_else(|| Err(Arc::new(ForwardError::Timeout))),
        // The forwarder ends.
        Err(_) => Err(Arc::new(ForwardError::Timeout)),
    }
}

impl Shared {
    fn read_cache(&self) -> std::sync::RwLockReadGuard<'_, Cache> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_cache(&self) -> std::sync::RwLockWriteGuard<'_, Cache> {
        self.cache.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh(&self, now: Instant) {
        if lock(&self.upstreams).refresh(now) {
            self.write_cache().clear();
        }
    }

    /// Asks, throws away what is not about the question, keeps the rest.
    async fn ask_upstreams(&self, key: &CacheKey, question: &Outside) -> Landed {
        let begun = Instant::now();
        let upstreams = lock(&self.upstreams).for_name(&question.name, begun);
        if upstreams.is_empty() {
            return Err(Arc::new(ForwardError::NoNameserver));
        }
        count(&self.stats.forwarded);
        let asked = tokio::time::timeout(QUESTION_TIMEOUT, self.race(&upstreams, question)).await;
        let now = Instant::now();
        match asked.unwrap_or(Err(ForwardError::Timeout)) {
            Ok(message) => {
                let message = bailiwick::within(message, &question.name);
                let limits = self.read_cache().limits();
                let (message, lifetime) = match self.leads_inside(&message, question) {
                    Some(address) => (self.emptied(message, question, address), limits.negative_seconds),
                    None => {
                        let lifetime = lifetime_seconds(&message, limits);
                        (message, lifetime)
                    }
                };
                let failed = !is_helpful(message.metadata.response_code);
                let packet = Packet::new(message, &question.name).ok_or(ForwardError::TooLarge)?;
                let packet = Arc::new(packet);
                if failed {
                    self.note_failure(key, question, begun, now);
                } else {
                    self.write_cache().keep(key.clone(), packet.clone(), lifetime, now);
                }
                Ok(packet)
            }
            Err(error) => {
                self.note_failure(key, question, begun, now);
                Err(Arc::new(error))
            }
        }
    }

    fn leads_inside(&self, message: &Message, question: &Outside) -> Option<IpAddr> {
        let name = Name::from_hickory(&question.name)?;
        let rule = lock(&self.upstreams).rebinding(&name)?;
        rebinding::leads_inside(message, &rule, &lock(&self.ranges))
    }

    /// "No such record" instead, whatever else was in it.
    fn emptied(&self, mut message: Message, question: &Outside, address: IpAddr) -> Message {
        tracing::warn!(
            name = %question.name, %address, client = %question.client,
            "answer of an upstream leads inside, so it is not given on (stop-dns-rebind)"
        );
        count(&self.stats.rebindings);
        message.answers.clear();
        message.authorities.clear();
        message
    }

    fn note_failure(&self, key: &CacheKey, question: &Outside, asked: Instant, now: Instant) {
        let failure = || {
            let mut message = Message::new(0, MessageType::Response, OpCode::Query);
            message.metadata.response_code = ResponseCode::ServFail;
            message.add_query(Query::query(question.name.clone(), question.record_type));
            Packet::new(message, &question.name)
        };
        self.write_cache().note_failure(key.clone(), failure, asked, now);
    }

    /// Every server once, then once more, each beside those that have not answered yet; the first helpful and whole answer wins. A
    /// part of one counts only when nobody gives the whole, "not me" only when nobody says better.
    async fn race(&self, upstreams: &[Upstream], question: &Outside) -> Result<Message, ForwardError> {
        let mut race = Race::new(upstreams, question, &self.dialer);
        let (mut part, mut unhelpful) = (None, None);
        let mut failure = ForwardError::NoNameserver;
        loop {
            race.start_due();
            let Some((server, outcome)) = race.next().await else {
                return part.or(unhelpful).ok_or(failure);
            };
            if let Some((took, outcome)) = &outcome {
                let code = outcome.as_ref().ok().map(|said| said.message.metadata.response_code.into());
                self.stats.count_upstream(&server.to_string(), code, *took);
            }
            match outcome.map(|(_, outcome)| outcome) {
                Some(Ok(Said { message, loses_case })) => {
                    lock(&self.upstreams).note_answered(&server, loses_case);
                    let helps = is_helpful(message.metadata.response_code);
                    if helps && !message.metadata.truncation {
                        self.note_silent(&race);
                        return Ok(message);
                    }
                    race.leave_out(&server);
                    if helps {
                        part = Some(message);
                    } else {
                        unhelpful = Some(message);
                    }
                }
                Some(Err(source)) => {
                    self.note_failed(&server, &source.to_string());
                    failure = ForwardError::Exchange { server, source };
                }
                // Only time has passed.
                None => {}
            }
        }
    }

    /// A server that is asked over TLS may be a wrong one: somebody has to know.
    fn note_failed(&self, server: &Server, why: &str) {
        count(&self.stats.upstream_failures);
        let is_news = lock(&self.upstreams).note_failed(server, Instant::now(), why);
        if is_news && server.tls.is_some() {
            tracing::warn!(%server, why, "an upstream did not answer");
        } else {
            tracing::debug!(%server, why, "an upstream did not answer");
        }
    }

    /// Those that others had to be asked for are asked last for a while.
    fn note_silent(&self, race: &Race<'_>) {
        let now = Instant::now();
        let silent = race.under_way.iter().filter(|(_, since)| now.duration_since(*since) >= HEDGE);
        for (server, _) in silent {
            count(&self.stats.upstream_failures);
            lock(&self.upstreams).note_failed(server, now, "others were faster");
        }
    }
}

/// Tries of one question that are under way, and those to come.
struct Race<'a> {
    question: &'a Outside,
    dialer: &'a Arc<Dialer>,
    /// Each with how long it is waited for alone.
    to_come: VecDeque<(Upstream, Duration)>,
    next_at: Instant,
    under_way: Vec<(Server, Instant)>,
    tries: JoinSet<(Server, std::io::Result<Said>)>,
}

impl<'a> Race<'a> {
    fn new(upstreams: &[Upstream], question: &'a Outside, dialer: &'a Arc<Dialer>) -> Self {
        let rounds = [HEDGE, HEDGE_AGAIN].into_iter();
        let to_come =
            rounds.flat_map(|patience| upstreams.iter().map(move |upstream| (upstream.clone(), patience)));
        Self {
            question,
            dialer,
            to_come: to_come.collect(),
            next_at: Instant::now(),
            under_way: Vec::new(),
            tries: JoinSet::new(),
        }
    }

    /// Asks the next server if it is time, or if nobody else is being asked.
    fn start_due(&mut self) {
        let now = Instant::now();
        if now < self.next_at && !self.tries.is_empty() {
            return;
        }
        let Some((Upstream { server, keeps_case }, patience)) = self.to_come.pop_front() else { return };
        self.under_way.push((server.clone(), now));
        let (question, dialer) = (self.question.clone(), self.dialer.clone());
        self.tries.spawn(async move {
            let said = exchange::ask(&server, &question, keeps_case, &dialer).await;
            (server, said)
        });
        self.next_at = now + patience;
    }

    /// How the next try ended and how long it took, or nothing when it is time for another; `None` when all have ended.
    async fn next(&mut self) -> Option<(Server, Option<(Duration, std::io::Result<Said>)>)> {
        let due = tokio::time::sleep_until(self.next_at.into());
        tokio::select! {
            biased;
            Some(ended) = self.tries.join_next() => {
                // A try neither panics nor is aborted while the race lasts.
                let (server, outcome) = ended.ok()?;
                let now = Instant::now();
                let asked_at = self.under_way.iter().find(|(other, _)| *other == server);
                let took = asked_at.map_or(Duration::ZERO, |(_, since)| now.duration_since(*since));
                self.under_way.retain(|(other, _)| *other != server);
                self.next_at = now;
                Some((server, Some((took, outcome))))
            }
            () = due, if !self.to_come.is_empty() => Some((self.to_come[0].0.server.clone(), None)),
            else => None,
        }
    }

    /// It said that it does not know.
    fn leave_out(&mut self, server: &Server) {
        self.to_come.retain(|(upstream, _)| upstream.server != *server);
    }
}

fn is_helpful(code: ResponseCode) -> bool {
    matches!(code, ResponseCode::NoError | ResponseCode::NXDomain)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
