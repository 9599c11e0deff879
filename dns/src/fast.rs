//! What is asked all the time, from octets to octets: one question for a name of the cluster, in the question's own
//! case, without a message in between.
//!
//! ```text
//!  datagram --read--> Asked --Reading::find--> Found --write--> reply          else: Outcome::Other, for `serve`
//! ```
//!
//! Takes part only where it knows the whole answer: anything unusual in a message (pointers in the question, EDNS of
//! another version, a second record, aliases to follow) is left to `serve`, whose answers are the measure of these.
//! Owner names are pointers to the question, so its case is kept (0x20).

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use crate::answer::{Soa, SoaPlace};
use crate::serve::{OPT_BYTES, PLAIN_UDP_BYTES, UDP_PAYLOAD_BYTES};
use crate::store::{DataRef, Found, NameRef, Reading, Records};
use crate::zone::{Data, TTL_SECONDS};

/// Octets of a message's header (RFC 1035 section 4.1.1), where the question begins.
pub(crate) const HEADER_BYTES: usize = 12;
/// Type, class: what follows the question's name.
const QUESTION_TAIL_BYTES: usize = 4;
/// Class IN.
const CLASS_IN: u16 = 1;
/// Type of the OPT record (RFC 6891).
const TYPE_OPT: u16 = 41;
/// Most octets of a name.
const MAX_NAME_OCTETS: usize = 255;

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The reply is written.
    Answered(ResponseCode),
    /// In no zone of ours; nothing is written.
    Elsewhere,
    /// Not for this path; nothing is written.
    Other,
}

/// A plain question.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    id: [u8; 2],
    recursion_desired: bool,
    checking_disabled: bool,
    /// Name, type and class as sent.
    question: &'a [u8],
    /// The name in lower case.
    name: [u8; MAX_NAME_OCTETS],
    name_len: usize,
    pub(crate) record_type: u16,
    edns: Option<AskedEdns>,
}

/// The client's OPT record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AskedEdns {
    payload_bytes: u16,
    dnssec_ok: bool,
}

impl<'a> Asked<'a> {
    /// `None` for whatever is not one plain question.
    pub(crate) fn read(packet: &'a [u8]) -> Option<Self> {
        let (header, rest) = packet.split_at_checked(HEADER_BYTES)?;
        let &[id0, id1, flags, more_flags, 0, 1, 0, 0, 0, 0, 0, additionals @ (0 | 1)] = header else {
            return None;
        };
        // QR, opcode, AA and TC clear; of the rest only AD and CD are a client's to set, and a code is a server's.
        if flags & 0b1111_1110 != 0 || more_flags & 0b1100_1111 != 0 {
            return None;
        }
        let name_len = name_octets(rest)?;
        let (question, rest) = rest.split_at_checked(name_len + QUESTION_TAIL_BYTES)?;
        let &[type0, type1, class0, class1] = question.get(name_len..)? else { return None };
        if u16::from_be_bytes([class0, class1]) != CLASS_IN {
            return None;
        }
        let edns = match additionals {
            0 if rest.is_empty() => None,
            1 => Some(read_opt(rest)?),
            _ => return None,
        };
        Some(Self {
            id: [id0, id1],
            recursion_desired: flags & 1 != 0,
            checking_disabled: more_flags & 0b0001_0000 != 0,
            question,
            name: lower(question.get(..name_len)?),
            name_len,
            record_type: u16::from_be_bytes([type0, type1]),
            edns,
        })
    }

    /// The name in lower-case wire format.
    pub(crate) fn name(&self) -> &[u8] {
        &self.name[..self.name_len]
    }

    /// Name, type and class as sent.
    pub(crate) fn question(&self) -> &[u8] {
        self.question
    }

    pub(crate) fn id(&self) -> [u8; 2] {
        self.id
    }

    /// EDNS flag DO (RFC 3225).
    pub(crate) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// What the client says it takes by UDP.
    pub(crate) fn takes_bytes(&self) -> u16 {
        self.edns.map_or(PLAIN_UDP_BYTES, |edns| edns.payload_bytes)
    }

    /// Header flag CD (RFC 4035).
    pub(crate) fn checking_disabled(&self) -> bool {
        self.checking_disabled
    }

    /// Third and fourth octet of a response that is not authoritative, without a code: QR, RD as asked; RA, CD as asked.
    pub(crate) fn response_flags(&self) -> [u8; 2] {
        [0b1000_0000 | u8::from(self.recursion_desired), 0b1000_0000 | u8::from(self.checking_disabled) << 4]
    }

    /// Most octets of a reply before its OPT record.
    pub(crate) fn room(&self) -> usize {
        self.limit() - if self.edns.is_some() { OPT_BYTES } else { 0 }
    }

    /// Ends a reply whose counts stand already: an OPT record when there was one in the question (RFC 6891 section
    /// 6.1.1), with DO as asked.
    pub(crate) fn put_opt(&self, reply: &mut Vec<u8>) {
        let Some(edns) = self.edns else { return };
        let [payload0, payload1] = edns.payload_bytes.clamp(PLAIN_UDP_BYTES, UDP_PAYLOAD_BYTES).to_be_bytes();
        let [type0, type1] = TYPE_OPT.to_be_bytes();
        let flags = if edns.dnssec_ok { 0b1000_0000 } else { 0 };
        reply.extend_from_slice(&[0, type0, type1, payload0, payload1, 0, 0, flags, 0, 0, 0]);
        if let Some(count) = reply.get_mut(10..12).and_then(|count| count.first_chunk_mut::<2>()) {
            *count = u16::from_be_bytes(*count).saturating_add(1).to_be_bytes();
        }
    }

    /// Largest reply, its OPT record included.
    fn limit(&self) -> usize {
        usize::from(
            self.edns
                .map_or(PLAIN_UDP_BYTES, |edns| edns.payload_bytes.clamp(PLAIN_UDP_BYTES, UDP_PAYLOAD_BYTES)),
        )
    }
}

/// How long the name at the beginning of `bytes` is; `None` where it has a pointer, no end or more than [`MAX_NAME_OCTETS`].
pub(crate) fn name_octets(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let length = *bytes.get(at)?;
        at += 1 + usize::from(length);
        if length > 63 || at > MAX_NAME_OCTETS {
            return None;
        }
        if length == 0 {
            return Some(at);
        }
    }
}

/// At most [`MAX_NAME_OCTETS`], in lower case: length octets are below 'A'.
fn lower(name: &[u8]) -> [u8; MAX_NAME_OCTETS] {
    let mut lower = [0; MAX_NAME_OCTETS];
    lower[..name.len()].copy_from_slice(name);
    lower[..name.len()].make_ascii_lowercase();
    lower
}

/// An OPT record of version 0 that ends the packet and whose options are whole (RFC 6891 section 6.1.2).
fn read_opt(bytes: &[u8]) -> Option<AskedEdns> {
    let (&[0, type0, type1, size0, size1, 0, 0, flags, _, length0, length1], mut options) =
        bytes.split_first_chunk::<OPT_BYTES>()?
    else {
        return None;
    };
    if u16::from_be_bytes([type0, type1]) != TYPE_OPT
        || usize::from(u16::from_be_bytes([length0, length1])) != options.len()
    {
        return None;
    }
    while !options.is_empty() {
        let (&[_, _, length0, length1], rest) = options.split_first_chunk::<4>()?;
        options = rest.get(usize::from(u16::from_be_bytes([length0, length1]))..)?;
    }
    Some(AskedEdns { payload_bytes: u16::from_be_bytes([size0, size1]), dnssec_ok: flags & 0b1000_0000 != 0 })
}

/// Answers a question for a name of the cluster into `reply`, which is empty. `turn` rotates the records of a set.
pub(crate) fn answer(asked: &Asked<'_>, reading: &Reading<'_>, turn: usize, reply: &mut Vec<u8>) -> Outcome {
    let record_type = RecordType::from(asked.record_type);
    if matches!(record_type, RecordType::ANY | RecordType::AXFR | RecordType::IXFR | RecordType::OPT) {
        return Outcome::Other;
    }
    let mut writer = Writer::begin(asked, reply);
    let written = match reading.find(asked.name(), record_type) {
        Found::Records(records) => writer.records(&records, reading, turn),
        Found::Soa(place, soa) => writer.soa(place, soa, asked),
        Found::NoName(soa) => {
            writer.code = ResponseCode::NXDomain;
            writer.soa(SoaPlace::Authority, soa, asked)
        }
        Found::Elsewhere => {
            reply.clear();
            return Outcome::Elsewhere;
        }
        Found::NotReady | Found::Alias(_) => None,
    };
    if written.is_some() {
        let code = writer.code;
        writer.end(asked);
        return Outcome::Answered(code);
    }
    reply.clear();
    Outcome::Other
}

/// Writes one reply; the header comes last.
struct Writer<'a> {
    reply: &'a mut Vec<u8>,
    /// Octets that header, question and sections may have.
    room: usize,
    code: ResponseCode,
    truncated: bool,
    answers: u16,
    authorities: u16,
    additionals: u16,
}

impl<'a> Writer<'a> {
    fn begin(asked: &Asked<'_>, reply: &'a mut Vec<u8>) -> Self {
        reply.extend_from_slice(&[0; HEADER_BYTES]);
        reply.extend_from_slice(asked.question);
        Self {
            reply,
            room: asked.room(),
            code: ResponseCode::NoError,
            truncated: false,
            answers: 0,
            authorities: 0,
            additionals: 0,
        }
    }

    /// As many as fit; addresses of SRV targets all or not at all. `None` when not one fits.
    fn records<'r>(&mut self, records: &Records<'r>, reading: &'r Reading<'_>, turn: usize) -> Option<()> {
        for data in records.rotated(turn) {
            if self.record(Owner::Question, &data).is_none() {
                self.truncated = true;
                break;
            }
            self.answers += 1;
        }
        if self.answers == 0 {
            return None;
        }
        if !self.truncated {
            let end = self.reply.len();
            for (target, data) in reading.targets(records) {
                if self.record(Owner::Name(target), &data).is_none() {
                    self.reply.truncate(end);
                    self.additionals = 0;
                    break;
                }
                self.additionals += 1;
            }
        }
        Some(())
    }

    fn soa(&mut self, place: SoaPlace, soa: &Soa, asked: &Asked<'_>) -> Option<()> {
        // The apex is the end of the name asked for.
        let apex_at = HEADER_BYTES + asked.name_len.checked_sub(soa.apex.wire().len())?;
        self.put_owner(Owner::At(apex_at));
        self.put_fixed(RecordType::SOA);
        self.with_length(|reply| {
            reply.extend_from_slice(soa.server.wire());
            reply.extend_from_slice(soa.mailbox.wire());
            reply.extend_from_slice(&Soa::SERIAL.to_be_bytes());
            for seconds in [Soa::REFRESH_SECONDS, Soa::RETRY_SECONDS, Soa::EXPIRE_SECONDS] {
                reply.extend_from_slice(&seconds.to_be_bytes());
            }
            reply.extend_from_slice(&Soa::MINIMUM_SECONDS.to_be_bytes());
        });
        match place {
            SoaPlace::Answer => self.answers = 1,
            SoaPlace::Authority => self.authorities = 1,
        }
        (self.reply.len() <= self.room).then_some(())
    }

    /// One whole record, or none.
    fn record(&mut self, owner: Owner<'_>, data: &DataRef<'_>) -> Option<()> {
        let start = self.reply.len();
        self.put_owner(owner);
        self.put_fixed(data.record_type());
        self.with_length(|reply| put_data(reply, data));
        if self.reply.len() > self.room {
            self.reply.truncate(start);
            return None;
        }
        Some(())
    }

    fn put_owner(&mut self, owner: Owner<'_>) {
        let pointer = |at: usize| 0xc000 | u16::try_from(at & 0x3fff).unwrap_or_default();
        match owner {
            Owner::Question => self.reply.extend_from_slice(&pointer(HEADER_BYTES).to_be_bytes()),
            Owner::At(at) => self.reply.extend_from_slice(&pointer(at).to_be_bytes()),
            Owner::Name(name) => name.put(self.reply),
        }
    }

    /// Type, class and TTL.
    fn put_fixed(&mut self, record_type: RecordType) {
        self.reply.extend_from_slice(&u16::from(record_type).to_be_bytes());
        self.reply.extend_from_slice(&CLASS_IN.to_be_bytes());
        self.reply.extend_from_slice(&TTL_SECONDS.to_be_bytes());
    }

    /// Data behind their length.
    fn with_length(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let at = self.reply.len();
        self.reply.extend_from_slice(&[0, 0]);
        put(self.reply);
        let length = u16::try_from(self.reply.len() - at - 2).unwrap_or(u16::MAX);
        self.reply[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }

    fn end(self, asked: &Asked<'_>) {
        const AUTHORITATIVE: u8 = 0b0000_0100;
        let [flags, more_flags] = asked.response_flags();
        let mut header = [0; HEADER_BYTES];
        header[..2].copy_from_slice(&asked.id);
        header[2] = flags | AUTHORITATIVE | u8::from(self.truncated) << 1;
        header[3] = more_flags | self.code.low();
        for (at, count) in [(4, 1), (6, self.answers), (8, self.authorities), (10, self.additionals)] {
            header[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        self.reply[..HEADER_BYTES].copy_from_slice(&header);
        asked.put_opt(self.reply);
    }
}

/// How the name that a record belongs to is written.
enum Owner<'a> {
    /// A pointer to the question's name.
    Question,
    /// A pointer into the question's name.
    At(usize),
    /// In full.
    Name(NameRef<'a>),
}

fn put_data(reply: &mut Vec<u8>, data: &DataRef<'_>) {
    match data {
        Data::A(address) => reply.extend_from_slice(&address.octets()),
        Data::Aaaa(address) => reply.extend_from_slice(&address.octets()),
        Data::Cname(name) | Data::Ns(name) | Data::Ptr(name) => name.put(reply),
        Data::Srv(srv) => {
            for number in [srv.priority, srv.weight, srv.port] {
                reply.extend_from_slice(&number.to_be_bytes());
            }
            srv.target.put(reply);
        }
        Data::Txt(text) => {
            let text = &text.as_bytes()[..text.len().min(255)];
            reply.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
            reply.extend_from_slice(text);
        }
    }
}
