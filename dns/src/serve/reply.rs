//! Records to a reply, and a reply to octets that fit the client: hickory's encoder, never more than was asked for.

use std::sync::{Arc, Mutex, PoisonError};

use hickory_proto::op::{Edns, Message, Metadata, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name as WireName, RData, Record};
use hickory_proto::serialize::binary::BinEncoder;
use hickory_server::net::NetError;
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::{MessageResponse, MessageResponseBuilder};

use super::HEADER_BYTES;
use crate::answer::{Local, Soa, SoaPlace};
use crate::name::Name;
use crate::zone::{Data, TTL_SECONDS};

/// Largest UDP answer, whatever the client would take (DNS flag day 2020).
pub(crate) const UDP_PAYLOAD_BYTES: u16 = 1232;
/// Largest answer to a client without EDNS (RFC 1035 section 4.2.1).
pub(crate) const PLAIN_UDP_BYTES: u16 = 512;
/// An OPT record without options (RFC 6891 section 6.1.2).
pub(crate) const OPT_BYTES: usize = 11;

/// Sections of an answer, before they are cut to the client's size.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) metadata: Metadata,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
    pub(super) additionals: Vec<Record>,
}

impl Reply {
    pub(super) fn failed(request: &Metadata, code: ResponseCode) -> Self {
        let mut metadata = Metadata::response_from_request(request);
        metadata.recursion_available = true;
        metadata.response_code = code;
        Self { metadata, answers: Vec::new(), authorities: Vec::new(), additionals: Vec::new() }
    }
}

/// The reply for `target` as one for `asked`, an alias of it.
pub(super) fn led_to(mut reply: Reply, asked: &WireName, target: WireName) -> Reply {
    let ttl = reply.answers.iter().map(|record| record.ttl).min().unwrap_or(TTL_SECONDS);
    let alias = Record::from_rdata(asked.clone(), ttl, RData::CNAME(CNAME(target)));
    reply.answers.insert(0, alias);
    reply.metadata.authoritative = false;
    reply
}

/// A forwarded answer under the client's id, its owner names in the client's case.
pub(super) fn relay(request: &Metadata, message: Message, asked: &WireName) -> Reply {
    let mut reply = Reply::failed(request, message.metadata.response_code);
    reply.metadata.truncation = message.metadata.truncation;
    reply.metadata.authentic_data = message.metadata.authentic_data;
    reply.answers = message.answers;
    for record in reply.answers.iter_mut().filter(|record| record.name == *asked) {
        record.name = asked.clone();
    }
    reply.authorities = message.authorities;
    reply
}

/// Our own answer: authoritative, the first owner name in the question's case.
pub(super) fn render(request: &Metadata, local: Local, asked: &WireName) -> Reply {
    let code = if local.name_error { ResponseCode::NXDomain } else { ResponseCode::NoError };
    let mut reply = Reply::failed(request, code);
    reply.metadata.authoritative = true;
    let first = Name::from_hickory(asked);
    let owner = |name: &Name| if first.as_ref() == Some(name) { asked.clone() } else { name.to_hickory() };
    let record = |(name, data): (Name, Data)| Record::from_rdata(owner(&name), TTL_SECONDS, rdata(data));
    reply.answers = local.records.into_iter().map(record).collect();
    reply.additionals = local.additionals.into_iter().map(record).collect();
    match local.soa {
        Some((SoaPlace::Answer, soa)) => reply.answers.push(soa_record(owner(&soa.apex), &soa)),
        Some((SoaPlace::Authority, soa)) => reply.authorities.push(soa_record(owner(&soa.apex), &soa)),
        None => {}
    }
    reply
}

pub(super) fn rdata(data: Data) -> RData {
    match data {
        Data::A(address) => RData::A(A(address)),
        Data::Aaaa(address) => RData::AAAA(AAAA(address)),
        Data::Cname(name) => RData::CNAME(CNAME(name.to_hickory())),
        Data::Ns(name) => RData::NS(NS(name.to_hickory())),
        Data::Ptr(name) => RData::PTR(PTR(name.to_hickory())),
        Data::Srv(srv) => RData::SRV(SRV::new(srv.priority, srv.weight, srv.port, srv.target.to_hickory())),
        Data::Txt(text) => RData::TXT(TXT::new(vec![text])),
    }
}

fn soa_record(owner: WireName, soa: &Soa) -> Record {
    let data = SOA::new(
        soa.server.to_hickory(),
        soa.mailbox.to_hickory(),
        Soa::SERIAL,
        Soa::REFRESH_SECONDS,
        Soa::RETRY_SECONDS,
        Soa::EXPIRE_SECONDS,
        Soa::MINIMUM_SECONDS,
    );
    Record::from_rdata(owner, TTL_SECONDS, RData::SOA(data))
}

/// The OPT record of the answer: there is one when the request had one (RFC 6891 section 6.1.1), with DO as asked.
/// Its size is what hickory's encoder holds the answer to, so it is the client's, at most ours.
pub(super) fn reply_edns(request: &Request) -> Option<Edns> {
    let asked = request.edns.as_ref()?;
    let mut edns = Edns::new();
    edns.set_max_payload(asked.max_payload().clamp(PLAIN_UDP_BYTES, UDP_PAYLOAD_BYTES))
        .set_version(0)
        .set_dnssec_ok(asked.flags().dnssec_ok);
    Some(edns)
}

/// Cuts the sections to `limit` octets: additional records go silently, a cut of the rest sets TC. Whole records
/// only, as many as fit; room for the OPT record is kept.
pub(super) fn fit(reply: &mut Reply, request: &Request, limit: usize, has_edns: bool) {
    let room = if has_edns { limit.saturating_sub(OPT_BYTES) } else { limit };
    if at_most_bytes(reply, request) <= room {
        return;
    }
    if !trial(reply, request, room).is_some_and(|counts| counts.truncated) {
        return;
    }
    reply.additionals.clear();
    match trial(reply, request, room) {
        Some(counts) if !counts.truncated => {}
        Some(counts) => {
            reply.answers.truncate(usize::from(counts.answers));
            reply.authorities.truncate(usize::from(counts.authorities));
            reply.metadata.truncation = true;
        }
        None => *reply = Reply::failed(&request.metadata, ResponseCode::ServFail),
    }
}

/// Size without any name compression and with the largest data of the types that we answer ourselves; other types
/// count as too large, so that they are tried.
fn at_most_bytes(reply: &Reply, request: &Request) -> usize {
    const RECORD_BYTES: usize = 10;
    let sections = [&reply.answers, &reply.authorities, &reply.additionals];
    let records = sections.into_iter().flatten().map(|record| {
        let data = match &record.data {
            RData::A(_) => 4,
            RData::AAAA(_) => 16,
            _ => 600,
        };
        record.name.len() + 1 + RECORD_BYTES + data
    });
    HEADER_BYTES + request.queries.as_bytes().len() + records.sum::<usize>()
}

struct Counts {
    answers: u16,
    authorities: u16,
    truncated: bool,
}

/// How many records hickory's encoder gets into `room` octets.
fn trial(reply: &Reply, request: &Request, room: usize) -> Option<Counts> {
    let mut bytes = Vec::with_capacity(room);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(u16::try_from(room).unwrap_or(u16::MAX));
    let mut metadata = reply.metadata;
    metadata.truncation = false;
    let none = std::iter::empty::<&Record>;
    let response = MessageResponseBuilder::new(&request.queries, None).build(
        metadata,
        &reply.answers,
        &reply.authorities,
        none(),
        &reply.additionals,
    );
    let info = response.destructive_emit(&mut encoder).ok()?;
    let counts = info.counts();
    Some(Counts { answers: counts.answers, authorities: counts.authorities, truncated: info.truncation })
}

pub(super) fn limit_bytes(protocol: Protocol, edns: Option<&Edns>) -> usize {
    match protocol {
        Protocol::Udp => usize::from(edns.map_or(PLAIN_UDP_BYTES, Edns::max_payload)),
        _ => usize::from(u16::MAX),
    }
}

/// Takes the one answer to a request, encoded.
#[derive(Clone)]
pub(super) struct Encoded {
    pub(super) protocol: Protocol,
    pub(super) bytes: Arc<Mutex<Vec<u8>>>,
}

#[async_trait::async_trait]
impl ResponseHandler for Encoded {
    async fn send_response<'a>(
        &mut self,
        response: MessageResponse<
            '_,
            'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
        >,
    ) -> Result<ResponseInfo, NetError> {
        let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP_BYTES));
        let mut encoder = BinEncoder::new(&mut bytes);
        let limit = limit_bytes(self.protocol, response.edns());
        encoder.set_max_size(u16::try_from(limit).unwrap_or(u16::MAX));
        let info = response.destructive_emit(&mut encoder)?;
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        Ok(info)
    }
}
