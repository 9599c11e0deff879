//! What of an upstream's answer is about the question; the rest could only mislead (RFC 5452 section 6, RFC 2181 5.4.1).
//! Pure.

use std::collections::BTreeSet;

use hickory_proto::op::Message;
use hickory_proto::rr::{Name as WireName, RData, Record, RecordType};

/// Aliases followed; a longer chain is cut.
const MAX_ALIASES: usize = 16;

/// Keeps the answers for the name asked for and for the aliases it leads to, the SOA and NS (with their DNSSEC records)
/// of the names above them, and no additional records: a stub resolver has no use for them.
pub(super) fn within(mut message: Message, asked: &WireName) -> Message {
    let names = chain(&message.answers, asked);
    message.answers.retain(|record| names.contains(&record.name) || is_dname_above(record, &names));
    message
        .authorities
        .retain(|record| names.iter().any(|name| record.name.zone_of(name)) || is_denial(record));
    message.additionals.clear();
    message
}

/// The name asked for, and every name that an alias of the chain leads to.
fn chain(answers: &[Record], asked: &WireName) -> BTreeSet<WireName> {
    let mut names = BTreeSet::from([asked.clone()]);
    let mut last = asked.clone();
    for _ in 0..MAX_ALIASES {
        let next = answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if record.name == last => Some(target.0.clone()),
            _ => None,
        });
        match next {
            Some(next) if names.insert(next.clone()) => last = next,
            _ => break,
        }
    }
    names
}

/// A DNAME (RFC 6672) that one of the aliases was made from, with its signature.
fn is_dname_above(record: &Record, names: &BTreeSet<WireName>) -> bool {
    const DNAME: RecordType = RecordType::Unknown(39);
    let is_dname = record.record_type() == DNAME || record.record_type() == RecordType::RRSIG;
    is_dname && names.iter().any(|name| record.name.zone_of(name))
}

/// NSEC and NSEC3 stand beside the names that they deny.
fn is_denial(record: &Record) -> bool {
    matches!(record.record_type(), RecordType::NSEC | RecordType::NSEC3 | RecordType::RRSIG)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::rdata::{A, CNAME, NS, SOA};

    use super::*;

    fn name(text: &str) -> WireName {
        WireName::from_ascii(text).unwrap()
    }

    fn record(owner: &str, data: RData) -> Record {
        Record::from_rdata(name(owner), 60, data)
    }

    fn owners(records: &[Record]) -> Vec<String> {
        records.iter().map(|record| record.name.to_ascii()).collect()
    }

    #[test]
    fn the_chain_of_aliases_stays_and_what_was_not_asked_for_goes() {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.answers = vec![
            record("www.example.com.", RData::CNAME(CNAME(name("cdn.example.net.")))),
            record("CDN.example.net.", RData::A(A::new(192, 0, 2, 1))),
            record("bank.example.", RData::A(A::new(203, 0, 113, 66))),
        ];
        message.authorities = vec![
            record("example.net.", RData::NS(NS(name("ns.example.net.")))),
            record("bank.example.", RData::NS(NS(name("ns.evil.example.")))),
            record("example.com.", RData::SOA(SOA::new(name("a."), name("b."), 1, 1, 1, 1, 1))),
        ];
        message.additionals = vec![record("bank.example.", RData::A(A::new(203, 0, 113, 66)))];
        let kept = within(message, &name("WWW.example.com."));
        assert_eq!(owners(&kept.answers), ["www.example.com.", "CDN.example.net."]);
        assert_eq!(owners(&kept.authorities), ["example.net.", "example.com."]);
        assert!(kept.additionals.is_empty());
    }

    #[test]
    fn aliases_in_a_circle_end() {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.answers = vec![
            record("a.example.", RData::CNAME(CNAME(name("b.example.")))),
            record("b.example.", RData::CNAME(CNAME(name("a.example.")))),
        ];
        assert_eq!(within(message, &name("a.example.")).answers.len(), 2);
    }
}
