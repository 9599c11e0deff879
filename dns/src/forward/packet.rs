//! A forwarded answer as octets: encoded once, then given to every client with its own id, case, flags and lower TTLs.
//!
//! The question stands in lower case and every pointer of the encoder leads into the message, whose question has the
//! length of any client's spelling: so the client's own question can take its place.

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::Name as WireName;

use crate::fast::{Asked, HEADER_BYTES};

/// TTL of a stale answer (RFC 8767 section 4: "a TTL of 30 seconds").
const STALE_TTL_SECONDS: u32 = 30;

/// How old an answer is for the one who gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    /// Seconds to take from each TTL.
    Fresh(u32),
    /// Its TTLs are over.
    Stale,
}

impl Age {
    fn apply(self, ttl: u32) -> u32 {
        match self {
            Self::Fresh(age) => ttl.saturating_sub(age),
            Self::Stale => STALE_TTL_SECONDS,
        }
    }
}

/// An encoded answer without OPT record, under id 0.
#[derive(Debug)]
pub(crate) struct Packet {
    bytes: Box<[u8]>,
    /// Where the TTLs stand.
    ttls: Box<[u16]>,
    /// Octets of name, type and class.
    question_len: usize,
}

impl Packet {
    /// `None` for an answer that cannot be encoded in a message of 65,535 octets.
    pub(crate) fn new(mut message: Message, asked: &WireName) -> Option<Self> {
        let name = asked.to_lowercase();
        // An extended code speaks about our own EDNS (RFC 6891 section 6.1.3), not about the client's.
        if message.metadata.response_code.high() > 0 {
            message.metadata.response_code = ResponseCode::ServFail;
        }
        message.metadata.id = 0;
        message.metadata.message_type = MessageType::Response;
        message.metadata.authoritative = false;
        message.metadata.recursion_available = true;
        message.edns = None;
        let [query] = message.queries.as_mut_slice() else { return None };
        query.name = name.clone();
        for section in [&mut message.answers, &mut message.authorities, &mut message.additionals] {
            section
                .iter_mut()
                .filter(|record| record.name == name)
                .for_each(|record| record.name = name.clone());
        }
        let bytes = message.to_vec().ok()?.into_boxed_slice();
        let (ttls, question_len) = layout(&bytes)?;
        Some(Self { bytes, ttls: ttls.into(), question_len })
    }

    /// It says that the name is there, or that it is not; anything else is a failure.
    pub(crate) fn is_helpful(&self) -> bool {
        matches!(self.bytes[3] & 0x0f, 0 | 3)
    }

    /// It does not say what was asked for: the name is not there, has no such record, or nobody knows.
    pub(crate) fn is_denial(&self) -> bool {
        self.bytes[3] & 0x0f != 0 || self.bytes[6..8] == [0, 0]
    }

    /// Memory it takes, about.
    pub(crate) fn cost_bytes(&self) -> usize {
        size_of::<Self>() + self.bytes.len() + 2 * self.ttls.len()
    }

    /// The answer as hickory's message, for whoever cuts or adds to it.
    pub(crate) fn message(&self, age: Age) -> Option<Message> {
        let mut message = Message::from_vec(&self.bytes).ok()?;
        for section in [&mut message.answers, &mut message.authorities, &mut message.additionals] {
            section.iter_mut().for_each(|record| record.ttl = age.apply(record.ttl));
        }
        Some(message)
    }

    /// Writes the answer for this client into `reply`, which is empty. `None` when it does not fit, and nothing is written.
    pub(crate) fn write(&self, asked: &Asked<'_>, age: Age, reply: &mut Vec<u8>) -> Option<ResponseCode> {
        if asked.question().len() != self.question_len || self.bytes.len() > asked.room() {
            return None;
        }
        reply.extend_from_slice(&self.bytes);
        reply[HEADER_BYTES..HEADER_BYTES + self.question_len].copy_from_slice(asked.question());
        for &at in &self.ttls {
            let ttl = reply[usize::from(at)..].first_chunk_mut::<4>()?;
            *ttl = age.apply(u32::from_be_bytes(*ttl)).to_be_bytes();
        }
        let (old_flags, old_more) = (self.bytes[2], self.bytes[3]);
        let [flags, more] = asked.response_flags();
        const TRUNCATION: u8 = 0b0000_0010;
        const AUTHENTIC_DATA_AND_CODE: u8 = 0b0010_1111;
        reply[..2].copy_from_slice(&asked.id());
        reply[2] = flags | old_flags & TRUNCATION;
        reply[3] = more | old_more & AUTHENTIC_DATA_AND_CODE;
        asked.put_opt(reply);
        Some(ResponseCode::from_low(old_more & 0x0f))
    }
}

/// Where the TTLs of a message stand, and how long its one question is.
fn layout(bytes: &[u8]) -> Option<(Vec<u16>, usize)> {
    let header = bytes.first_chunk::<HEADER_BYTES>()?;
    let count = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let mut at = skip_name(bytes, HEADER_BYTES)? + 4;
    let question_len = at - HEADER_BYTES;
    let mut ttls = Vec::new();
    for _ in 0..count(6) + count(8) + count(10) {
        at = skip_name(bytes, at)?;
        ttls.push(u16::try_from(at + 4).ok()?);
        let length = bytes.get(at + 8..at + 10)?;
        at += 10 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    }
    (at == bytes.len()).then_some((ttls, question_len))
}

/// The place behind the name at `at`.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            0xc0.. => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Edns, OpCode, Query};
    use hickory_proto::rr::rdata::{A, CNAME, SOA};
    use hickory_proto::rr::{RData, Record, RecordType};

    use super::*;

    fn name(text: &str) -> WireName {
        WireName::from_ascii(text).unwrap()
    }

    fn answer() -> Message {
        let mut message = Message::new(9, MessageType::Response, OpCode::Query);
        message.metadata.authentic_data = true;
        message.metadata.authoritative = true;
        message.add_query(Query::query(name("wWw.example.com."), RecordType::A));
        message.answers = vec![
            Record::from_rdata(name("www.EXAMPLE.com."), 300, RData::CNAME(CNAME(name("cdn.example.com.")))),
            Record::from_rdata(name("cdn.example.com."), 60, RData::A(A::new(192, 0, 2, 80))),
        ];
        let soa = SOA::new(name("ns.example.com."), name("hostmaster.example.com."), 1, 2, 3, 4, 5);
        message.authorities = vec![Record::from_rdata(name("example.com."), 900, RData::SOA(soa))];
        message.set_edns(Edns::new());
        message
    }

    fn question(text: &str, payload: Option<u16>) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 77;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name(text), RecordType::A));
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload).set_dnssec_ok(true);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn each_client_gets_its_own_id_case_flags_and_lower_ttls() {
        let packet = Packet::new(answer(), &name("www.example.com.")).unwrap();
        for payload in [None, Some(1232)] {
            let bytes = question("Www.ExamplE.com.", payload);
            let mut reply = Vec::new();
            let code = packet.write(&Asked::read(&bytes).unwrap(), Age::Fresh(50), &mut reply).unwrap();
            assert_eq!(code, ResponseCode::NoError);
            let message = Message::from_vec(&reply).unwrap();
            assert_eq!(
                (message.metadata.id, message.queries[0].name.to_ascii()),
                (77, "Www.ExamplE.com.".to_owned())
            );
            assert_eq!(message.answers[0].name.to_ascii(), "Www.ExamplE.com.");
            let metadata = message.metadata;
            assert!(metadata.recursion_desired && metadata.recursion_available && metadata.authentic_data);
            assert!(!metadata.authoritative && !metadata.truncation);
            let ttls: Vec<u32> = message.answers.iter().chain(&message.authorities).map(|r| r.ttl).collect();
            assert_eq!(ttls, [250, 10, 850]);
            assert_eq!(message.edns.is_some(), payload.is_some());
            // The records are those of the message that the other path relays.
            let other = packet.message(Age::Fresh(50)).unwrap();
            assert_eq!((message.answers, message.authorities), (other.answers, other.authorities));
        }
    }

    #[test]
    fn a_stale_answer_has_thirty_seconds() {
        let packet = Packet::new(answer(), &name("www.example.com.")).unwrap();
        assert!(packet.message(Age::Stale).unwrap().answers.iter().all(|record| record.ttl == 30));
        let bytes = question("www.example.com.", None);
        let mut reply = Vec::new();
        packet.write(&Asked::read(&bytes).unwrap(), Age::Stale, &mut reply).unwrap();
        assert!(Message::from_vec(&reply).unwrap().answers.iter().all(|record| record.ttl == 30));
    }

    #[test]
    fn what_does_not_fit_the_client_is_not_written() {
        let mut large = answer();
        let more =
            (0..40).map(|n| Record::from_rdata(name("cdn.example.com."), 60, RData::A(A::new(192, 0, 2, n))));
        large.answers.extend(more);
        let packet = Packet::new(large, &name("www.example.com.")).unwrap();
        let mut reply = Vec::new();
        for (payload, fits) in [(None, false), (Some(600), false), (Some(1232), true)] {
            let bytes = question("www.example.com.", payload);
            let written = packet.write(&Asked::read(&bytes).unwrap(), Age::Fresh(0), &mut reply);
            assert_eq!((written.is_some(), reply.is_empty()), (fits, !fits));
        }
    }

    #[test]
    fn a_code_about_our_own_edns_is_a_failure_for_the_client() {
        let mut bad = answer();
        bad.metadata.response_code = ResponseCode::BADVERS;
        let packet = Packet::new(bad, &name("www.example.com.")).unwrap();
        assert_eq!(packet.message(Age::Fresh(0)).unwrap().metadata.response_code, ResponseCode::ServFail);
    }
}
