//! Between the wire and the pure answers: hickory-server hands in a request, this hands back records.
//!
//! ```text
//!  Request -> admit -> Question -> Store::answer --Local-----------------> Reply -> fit to the client -> wire
//!                    \--Custom::answer-------\--Elsewhere, onward alias-> Forwarder --^
//! ```
//!
//! [`Resolver::exchange`] is the way from octets to octets that UDP (what `fast` leaves) and TCP share: it drops
//! responses (QR=1) and answers what cannot be read with FORMERR.

mod reply;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hickory_proto::op::{MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, Name as WireName, Record, RecordType};
use hickory_server::net::runtime::{Time, TokioTime};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use tokio::sync::Semaphore;
use weft_netstack::reconcile::chain;

use crate::Namespaces;
use crate::answer::{Answer, Local, Question};
use crate::autopath::rest_of_path;
use crate::custom::{Custom, Rewritten, Verdict};
use crate::fast::{self, Asked, Outcome, name_octets};
use crate::forward::{ForwardError, Forwarder, Outside};
use crate::log::QueryLog;
use crate::name::Name;
use crate::rate::Rate;
use crate::stats::{Came, Dropped, Refused, Stats};
use crate::store::{Reading, Store};
use reply::{Encoded, Reply, fit, led_to, limit_bytes, rdata, relay, render, reply_edns};
pub(crate) use reply::{OPT_BYTES, PLAIN_UDP_BYTES, UDP_PAYLOAD_BYTES};

/// Octets of a message's header (RFC 1035 section 4.1.1).
const HEADER_BYTES: usize = 12;
/// Of the header's third octet: that it is a response, the operation, "recursion desired".
const QR: u8 = 0b1000_0000;
const OPCODE: u8 = 0b0111_1000;
const RD: u8 = 0b0000_0001;

/// How long a question for a name of the cluster waits for the first plan, as after a restart: short enough to be answered
/// before the client asks again (glibc: 5 s).
const HOLD: Duration = Duration::from_secs(3);
/// So many may wait; the others hear SERVFAIL.
const MOST_HELD: usize = 1024;

/// What every socket shares.
pub(crate) struct Resolver {
    store: Arc<Store>,
    forwarder: Arc<Forwarder>,
    stats: Arc<Stats>,
    turn: AtomicUsize,
    holding: Semaphore,
    /// What users add.
    custom: ArcSwap<Custom>,
    namespaces: Namespaces,
    rate: Rate,
    log: QueryLog,
}

/// The question, or why a request without a proper one is refused.
fn admit(request: &Request) -> Result<(Question, Outside), Refused> {
    if request.version() > 0 {
        return Err(Refused::Version);
    }
    if request.metadata.op_code != OpCode::Query {
        return Err(Refused::Operation);
    }
    if is_signed(request) {
        return Err(Refused::Signed);
    }
    let [query] = request.queries.queries() else { return Err(Refused::Questions) };
    if query.query_class() != DNSClass::IN {
        return Err(Refused::Class);
    }
    match query.query_type() {
        RecordType::AXFR | RecordType::IXFR => return Err(Refused::Transfer),
        RecordType::OPT => return Err(Refused::Type),
        _ => {}
    }
    let original = query.original().name();
    let name = Name::from_hickory(original).ok_or(Refused::Malformed)?;
    let outside = Outside {
        client: request.src().ip(),
        name: original.clone(),
        record_type: query.query_type(),
        dnssec_ok: request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
        checking_disabled: request.metadata.checking_disabled,
    };
    Ok((Question { name, record_type: query.query_type() }, outside))
}

/// By TSIG, or by SIG(0) (RFC 2931). Without its DNSSEC feature hickory leaves these records where they stand.
fn is_signed(request: &Request) -> bool {
    let is_signature = |record: &Record| matches!(record.record_type(), RecordType::TSIG | RecordType::SIG);
    request.signature.is_some() || request.additionals.iter().any(is_signature)
}

impl Resolver {
    pub(crate) fn new(
        store: Arc<Store>,
        forwarder: Arc<Forwarder>,
        stats: Arc<Stats>,
        namespaces: Namespaces,
        rate: Rate,
    ) -> Self {
        let (turn, holding) = (AtomicUsize::new(0), Semaphore::new(MOST_HELD));
        Self {
            store,
            forwarder,
            stats,
            turn,
            holding,
            custom: ArcSwap::default(),
            namespaces,
            rate,
            log: QueryLog::default(),
        }
    }

    /// True when it says something else than before.
    pub(crate) fn set_custom(&self, custom: Custom) -> bool {
        let before = self.custom.load();
        let changed = !before.says_the_same(&custom);
        if **before != custom {
            self.custom.store(Arc::new(custom));
        }
        changed
    }

    /// What users add, for a batch.
    pub(crate) fn custom(&self) -> Arc<Custom> {
        self.custom.load_full()
    }

    /// What the records of the next answer are rotated by.
    pub(crate) fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// The names to read in batches.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The answers of upstreams that are at hand.
    pub(crate) fn forwarder(&self) -> &Forwarder {
        &self.forwarder
    }

    /// How often a client may ask.
    pub(crate) fn rate(&self) -> &Rate {
        &self.rate
    }

    /// What people look at.
    pub(crate) fn log(&self) -> &QueryLog {
        &self.log
    }

    /// Where answers and what is dropped are counted.
    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Writes an answer that is at hand into `reply`, which is empty; `None`, and nothing written, when there is none. It has the
    /// size that UDP allows, and tells when it was cut to it.
    pub(crate) fn at_hand(
        &self,
        asked: &Asked<'_>,
        custom: &Custom,
        reading: &Reading<'_>,
        now: Instant,
        reply: &mut Vec<u8>,
    ) -> Option<ResponseCode> {
        if custom.concerns(asked.name()) {
            return None;
        }
        match fast::answer(asked, reading, self.next_turn(), reply) {
            // A search path may lead on from here.
            Outcome::Answered(ResponseCode::NXDomain) if custom.walks_paths() => {
                reply.clear();
                None
            }
            Outcome::Answered(code) => Some(code),
            Outcome::Elsewhere => self.forwarder.answer_cached(asked, now, reply),
            Outcome::Other => None,
        }
    }

    /// The encoded answer to one encoded message; `None` when it deserves none.
    pub(crate) async fn exchange(
        &self,
        bytes: Vec<u8>,
        client: SocketAddr,
        protocol: Protocol,
    ) -> Option<Vec<u8>> {
        if let Some(reason) = undeserving(&bytes, client) {
            self.stats.count_dropped(reason);
            return None;
        }
        let (bare, refused) = bare_refusal(&bytes);
        let readable = has_one_question(&bytes) && has_plain_name(&bytes);
        let request = readable.then(|| Request::from_bytes(bytes, client, protocol).ok());
        let Some(request) = request.flatten() else {
            self.stats.count_refused(refused);
            self.stats.count_response(refused.code());
            return Some(bare.into());
        };
        let answer = Encoded { protocol, bytes: Arc::default() };
        self.handle_request::<_, TokioTime>(&request, answer.clone()).await;
        let bytes = std::mem::take(&mut *answer.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        (!bytes.is_empty()).then_some(bytes)
    }

    async fn reply(&self, request: &Request) -> Reply {
        let (question, outside) = match admit(request) {
            Ok(admitted) => admitted,
            Err(refused) => {
                self.stats.count_refused(refused);
                return Reply::failed(&request.metadata, refused.code());
            }
        };
        let custom = self.custom();
        let logged = custom.logs(&question.name).then(|| (Instant::now(), outside.clone()));
        let reply = match custom.rewrite(&question.name) {
            None => self.look_up(request, &custom, question, outside).await,
            Some(Rewritten(name)) => {
                let (asked, instead) = (outside.name.clone(), name.to_hickory());
                let question = Question { name, ..question };
                let outside = Outside { name: instead.clone(), ..outside };
                let mut reply = self.look_up(request, &custom, question, outside).await;
                let renamed = reply.answers.iter_mut().filter(|record| record.name == instead);
                renamed.for_each(|record| record.name = asked.clone());
                reply
            }
        };
        if let Some((since, asked)) = logged {
            log(&asked, &reply, since.elapsed());
        }
        reply
    }

    /// What users say about the name, else what the cluster has, else what upstreams say.
    async fn look_up(
        &self,
        request: &Request,
        custom: &Custom,
        question: Question,
        outside: Outside,
    ) -> Reply {
        match self.of_users(request, custom, &question, &outside).await {
            Some(reply) => reply,
            None => self.of_cluster(request, custom, question, outside).await,
        }
    }

    /// `None` for what users leave to the cluster.
    async fn of_users(
        &self,
        request: &Request,
        custom: &Custom,
        question: &Question,
        outside: &Outside,
    ) -> Option<Reply> {
        let answered = |code| {
            let mut reply = Reply::failed(&request.metadata, code);
            reply.metadata.authoritative = true;
            reply
        };
        match custom.answer(&question.name, question.record_type) {
            Verdict::Passed { cluster: true } => None,
            Verdict::Passed { cluster: false } => Some(self.forwarded(request, outside).await),
            Verdict::Hosts { data, ttl_seconds } => {
                let mut reply = answered(ResponseCode::NoError);
                let record = |data| Record::from_rdata(outside.name.clone(), ttl_seconds, rdata(data));
                reply.answers = data.into_iter().map(record).collect();
                Some(reply)
            }
            Verdict::Records { code, answers, authorities, onward } => {
                let mut reply = answered(code);
                (reply.answers, reply.authorities) = (answers, authorities);
                let same = reply.answers.iter_mut().filter(|record| record.name == outside.name);
                same.for_each(|record| record.name = outside.name.clone());
                match onward {
                    Some(target) => {
                        Some(self.go_on(request, reply, question.record_type, target, outside).await)
                    }
                    None => Some(reply),
                }
            }
        }
    }

    /// Adds what the name that an alias leads to has.
    async fn go_on(
        &self,
        request: &Request,
        mut reply: Reply,
        record_type: RecordType,
        target: WireName,
        outside: &Outside,
    ) -> Reply {
        let Some(name) = Name::from_hickory(&target) else { return reply };
        let outside = Outside { name: target, ..outside.clone() };
        let rest = match self.store.answer(&Question { name, record_type }, self.next_turn()) {
            Answer::Local(local) => self.local(request, local, outside).await,
            Answer::Elsewhere => self.forwarded(request, &outside).await,
            Answer::NotReady | Answer::AliasLoop => Reply::failed(&request.metadata, ResponseCode::ServFail),
        };
        reply.metadata.response_code = rest.metadata.response_code;
        reply.answers.extend(rest.answers);
        reply.authorities.extend(rest.authorities);
        reply
    }

    async fn of_cluster(
        &self,
        request: &Request,
        custom: &Custom,
        question: Question,
        outside: Outside,
    ) -> Reply {
        let turn = self.next_turn();
        let mut answer = self.store.answer(&question, turn);
        if matches!(answer, Answer::NotReady) && self.became_ready().await {
            answer = self.store.answer(&question, turn);
        }
        match answer {
            Answer::Local(local) if local.name_error && custom.walks_paths() => {
                let walked = self.walk_path(request, custom, &question, &outside).await;
                match walked {
                    Some(reply) => reply,
                    None => self.local(request, local, outside).await,
                }
            }
            Answer::Local(local) => self.local(request, local, outside).await,
            Answer::Elsewhere => self.forwarded(request, &outside).await,
            Answer::NotReady | Answer::AliasLoop => Reply::failed(&request.metadata, ResponseCode::ServFail),
        }
    }

    /// The answer at the end of the pod's search path, when the question was its beginning: an alias to the first name that
    /// exists. `None` when there is none, or it cannot be told: the pod then goes on by itself.
    async fn walk_path(
        &self,
        request: &Request,
        custom: &Custom,
        question: &Question,
        outside: &Outside,
    ) -> Option<Reply> {
        if !matches!(question.record_type, RecordType::A | RecordType::AAAA) {
            return None;
        }
        let namespace = (self.namespaces)(outside.client.to_canonical())?;
        let domain = self.store.domain()?;
        let path = rest_of_path(&question.name, &namespace, &domain, &self.forwarder.search())?;
        for name in path {
            let target = name.to_hickory();
            let question = Question { name, record_type: question.record_type };
            let inner = Outside { name: target.clone(), ..outside.clone() };
            let found = match self.of_users(request, custom, &question, &inner).await {
                Some(reply) => reply,
                None => match self.store.answer(&question, self.next_turn()) {
                    Answer::Local(local) => self.local(request, local, inner).await,
                    Answer::Elsewhere => self.forwarded(request, &inner).await,
                    Answer::NotReady | Answer::AliasLoop => return None,
                },
            };
            match found.metadata.response_code {
                ResponseCode::NXDomain => {}
                ResponseCode::NoError => return Some(led_to(found, &outside.name, target)),
                _ => return None,
            }
        }
        None
    }

    /// Waits for the first plan; false when it did not come in time, or too many wait.
    async fn became_ready(&self) -> bool {
        let Ok(_place) = self.holding.try_acquire() else { return false };
        tokio::time::timeout(HOLD, self.store.until_ready()).await.is_ok()
    }

    async fn local(&self, request: &Request, local: Local, outside: Outside) -> Reply {
        let onward = local.onward.clone();
        let mut reply = render(&request.metadata, local, &outside.name);
        let Some(target) = onward else { return reply };
        let outside = Outside { name: target.to_hickory(), ..outside };
        match self.forwarder.resolve(&outside).await {
            Ok(message) => {
                reply.metadata.response_code = message.metadata.response_code;
                reply.answers.extend(message.answers);
                reply.authorities.extend(message.authorities);
                reply
            }
            Err(error) => unresolved(&request.metadata, &outside, &error),
        }
    }

    async fn forwarded(&self, request: &Request, outside: &Outside) -> Reply {
        match self.forwarder.resolve(outside).await {
            Ok(message) => relay(&request.metadata, message, &outside.name),
            Err(error) => unresolved(&request.metadata, outside, &error),
        }
    }
}

/// One line of the query log.
fn log(asked: &Outside, reply: &Reply, took: Duration) {
    tracing::info!(
        client = %asked.client,
        name = %asked.name,
        record_type = %asked.record_type,
        rcode = %reply.metadata.response_code,
        answers = reply.answers.len(),
        took_us = took.as_micros(),
        "DNS query"
    );
}

fn unresolved(request: &Metadata, outside: &Outside, error: &ForwardError) -> Reply {
    tracing::debug!(name = %outside.name, reason = chain(error), "not forwarded");
    Reply::failed(request, ResponseCode::ServFail)
}

/// Why a message gets no answer at all: an answer to an answer could go round for ever.
pub(crate) fn undeserving(bytes: &[u8], client: SocketAddr) -> Option<Dropped> {
    match bytes.get(2) {
        _ if bytes.len() < HEADER_BYTES => Some(Dropped::Short),
        Some(flags) if flags & QR != 0 => Some(Dropped::Response),
        _ if !is_answerable(client) => Some(Dropped::Source),
        _ => None,
    }
}

/// "A DNS message with OPCODE = 0 MUST NOT include a QDCOUNT value greater than 1" (RFC 9619), and without a question there
/// is nothing to answer. The others would only be read to be repeated.
fn has_one_question(bytes: &[u8]) -> bool {
    matches!(bytes, [_, _, _, _, 0, 1, ..])
}

/// The question's name has no pointer: before it stands only the header, which is no name, and which is another in the answer
/// (RFC 1035 section 4.1.4: "a prior occurance of the same name").
fn has_plain_name(bytes: &[u8]) -> bool {
    behind_name(bytes).is_some()
}

/// Where the question's name ends; `None` where it has a pointer or no end.
fn behind_name(bytes: &[u8]) -> Option<usize> {
    Some(HEADER_BYTES + name_octets(bytes.get(HEADER_BYTES..)?)?)
}

/// What is counted of a message; `asked` where it is a plain question.
pub(crate) fn came(bytes: &[u8], asked: Option<&Asked<'_>>, client: SocketAddr, protocol: Protocol) -> Came {
    let unusual_type = || {
        let at = behind_name(bytes)?;
        bytes.get(at..)?.first_chunk().map(|octets| u16::from_be_bytes(*octets))
    };
    Came {
        protocol,
        ipv6: client.is_ipv6(),
        record_type: asked.map(|asked| asked.record_type).or_else(unusual_type),
        dnssec_ok: asked.is_some_and(Asked::dnssec_ok),
        takes_bytes: match protocol {
            Protocol::Udp => asked.map_or(PLAIN_UDP_BYTES, Asked::takes_bytes),
            _ => u16::MAX,
        },
    }
}

/// The answer to a message of which only the header can be read or matters: FORMERR, or NOTIMP for another operation than
/// a query.
fn bare_refusal(bytes: &[u8]) -> ([u8; HEADER_BYTES], Refused) {
    let mut header = [0; HEADER_BYTES];
    let &[id0, id1, flags, ..] = bytes else { return (header, Refused::Malformed) };
    let refused = match flags & OPCODE {
        0 if has_one_question(bytes) => Refused::Malformed,
        0 => Refused::Questions,
        _ => Refused::Operation,
    };
    header[..4].copy_from_slice(&[id0, id1, QR | flags & (OPCODE | RD), refused.code().low()]);
    (header, refused)
}

/// No answer goes to an address that many hosts may listen on.
fn is_answerable(source: SocketAddr) -> bool {
    let ip = source.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !(ip.is_multicast() || ip.is_unspecified() || broadcast || source.port() == 0)
}

#[async_trait::async_trait]
impl RequestHandler for Resolver {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handle: R,
    ) -> ResponseInfo {
        let mut reply = self.reply(request).await;
        // Of an answer that no upstream gives whole; by TCP a client does not look whether it is.
        if reply.metadata.truncation && request.protocol() == Protocol::Tcp {
            reply = Reply::failed(&request.metadata, ResponseCode::ServFail);
        }
        let edns = reply_edns(request);
        fit(&mut reply, request, limit_bytes(request.protocol(), edns.as_ref()), edns.is_some());
        self.stats.count_response(reply.metadata.response_code);
        let response = MessageResponseBuilder::new(&request.queries, edns.as_ref()).build(
            reply.metadata,
            &reply.answers,
            &reply.authorities,
            std::iter::empty::<&Record>(),
            &reply.additionals,
        );
        match response_handle.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(client = %request.src(), %error, "answer not sent");
                silent(request)
            }
        }
    }
}

/// What hickory-server wants to hear when nothing was sent.
fn silent(request: &Request) -> ResponseInfo {
    let mut metadata = Metadata::new(request.metadata.id, MessageType::Response, request.metadata.op_code);
    metadata.response_code = ResponseCode::ServFail;
    ResponseInfo::from(hickory_proto::op::Header {
        metadata,
        counts: hickory_proto::op::HeaderCounts::default(),
    })
}

#[cfg(test)]
mod both_paths;
#[cfg(test)]
mod tests;
