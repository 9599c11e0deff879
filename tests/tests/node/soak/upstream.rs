//! A resolver of the host that goes from one fault to the next. What is true of a name follows from the name alone.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

pub(super) const ZONE: &str = "soak.example.";
const LOOK: Duration = Duration::from_millis(20);
/// What no answer may hold.
const LIE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    Right,
    /// Up to 400 ms late.
    Late,
    /// Replies that are none of ours come first.
    Forging,
    /// Records that nobody asked for stand beside the right ones.
    Stuffing,
    /// By UDP a part with TC.
    Cutting,
    /// Without the question's letters.
    LowerCase,
    /// Takes questions and says nothing.
    Silent,
    /// Nobody listens.
    Gone,
    /// SERVFAIL.
    Failing,
    /// Four seconds late.
    TooLate,
}

impl Manner {
    pub(super) const USABLE: [Self; 6] =
        [Self::Right, Self::Late, Self::Forging, Self::Stuffing, Self::Cutting, Self::LowerCase];
    pub(super) const UNUSABLE: [Self; 4] = [Self::Silent, Self::Gone, Self::Failing, Self::TooLate];
    const ALL: [Self; 10] = [
        Self::Right,
        Self::Late,
        Self::Forging,
        Self::Stuffing,
        Self::Cutting,
        Self::LowerCase,
        Self::Silent,
        Self::Gone,
        Self::Failing,
        Self::TooLate,
    ];

    pub(super) fn is_usable(self) -> bool {
        Self::USABLE.contains(&self)
    }
}

/// What is true of a question: the code and the records as text, in order.
pub(super) fn truth(name: &Name, kind: RecordType) -> (ResponseCode, Vec<Record>) {
    let text = name.to_lowercase().to_string();
    let label = text.split('.').next().unwrap_or_default();
    let (letter, number) = label.split_at(label.len().min(1));
    let number: u16 = number.parse().unwrap_or_default();
    let [high, low] = number.to_be_bytes();
    let record = |name: &Name, data| Record::from_rdata(name.clone(), 1 + u32::from(number) % 20, data);
    let address = |name: &Name| match kind {
        RecordType::A => Some(record(name, RData::A(A(Ipv4Addr::new(198, 18, high, low))))),
        RecordType::AAAA => {
            Some(record(name, RData::AAAA(AAAA(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number)))))
        }
        _ => None,
    };
    let records = match letter {
        "a" => address(name).into_iter().collect(),
        "v" => address(name).into_iter().filter(|_| kind == RecordType::A).collect(),
        "c" => {
            let target: Name = format!("a{number}.{ZONE}").parse().unwrap();
            let alias = record(name, RData::CNAME(CNAME(target.clone())));
            [Some(alias), address(&target)].into_iter().flatten().collect()
        }
        // Too long for a datagram.
        "t" if kind == RecordType::TXT => {
            let piece =
                |i| record(name, RData::TXT(TXT::new(vec![format!("{number}-{i}-{}", "x".repeat(100))])));
            (0..16).map(piece).collect()
        }
        "t" => Vec::new(),
        _ => return (ResponseCode::NXDomain, Vec::new()),
    };
    (ResponseCode::NoError, records)
}

fn reply(query: &Message) -> Message {
    let mut reply = query.clone();
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.recursion_available = true;
    let asked = &query.queries[0];
    let (code, records) = truth(&asked.name, asked.query_type);
    reply.metadata.response_code = code;
    if records.is_empty() {
        let zone: Name = ZONE.parse().unwrap();
        let soa = SOA::new(zone.clone(), zone.clone(), 1, 60, 60, 60, 5);
        reply.authorities.push(Record::from_rdata(zone, 5, RData::SOA(soa)));
    }
    reply.answers = records;
    reply
}

pub(super) struct Upstream {
    pub(super) address: IpAddr,
    manner: AtomicUsize,
    asked: AtomicUsize,
    stop: AtomicBool,
}

impl Upstream {
    pub(super) fn new(address: &str) -> Self {
        let address = address.parse().unwrap();
        Self {
            address,
            manner: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(super) fn set(&self, manner: Manner) {
        let at = Manner::ALL.iter().position(|one| *one == manner).unwrap();
        self.manner.store(at, Ordering::SeqCst);
    }

    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    pub(super) fn end(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    fn manner(&self) -> Manner {
        Manner::ALL[self.manner.load(Ordering::SeqCst)]
    }

    fn serves(&self) -> bool {
        !self.stop.load(Ordering::SeqCst) && self.manner() != Manner::Gone
    }

    /// Until [`Self::end`].
    pub(super) fn run(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            if self.manner() == Manner::Gone {
                std::thread::sleep(LOOK);
                continue;
            }
            let at = SocketAddr::new(self.address, 53);
            let (udp, tcp) = (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap());
            udp.set_read_timeout(Some(LOOK)).unwrap();
            tcp.set_nonblocking(true).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| self.tcp(&tcp));
                self.udp(&udp);
            });
        }
    }

    fn udp(&self, socket: &UdpSocket) {
        std::thread::scope(|scope| {
            let mut buffer = [0; 4096];
            while self.serves() {
                let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let count = self.asked.fetch_add(1, Ordering::SeqCst);
                let manner = self.manner();
                let send = move || {
                    for reply in replies(manner, &query) {
                        let _unheard = socket.send_to(&reply, client);
                    }
                };
                match manner {
                    Manner::Silent => {}
                    Manner::Late | Manner::TooLate => {
                        let millis = if manner == Manner::Late { (count % 400) as u64 } else { 4000 };
                        scope.spawn(move || {
                            std::thread::sleep(Duration::from_millis(millis));
                            send();
                        });
                    }
                    _ => send(),
                }
            }
        });
    }

    fn tcp(&self, listener: &TcpListener) {
        while self.serves() {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            let manner = self.manner();
            if !manner.is_usable() {
                continue;
            }
            self.asked.fetch_add(1, Ordering::SeqCst);
            let mut answer = || -> std::io::Result<()> {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut bytes)?;
                let reply = reply(&Message::from_vec(&bytes).unwrap()).to_vec().unwrap();
                let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                stream.write_all(&[&length[..], &reply].concat())
            };
            let _gave_up = answer();
        }
    }
}

/// What goes back by UDP, in this order.
fn replies(manner: Manner, query: &Message) -> Vec<Vec<u8>> {
    let mut right = reply(query);
    if right.answers.iter().any(|record| record.record_type() == RecordType::TXT) || manner == Manner::Cutting
    {
        right.answers.truncate(1);
        right.metadata.truncation = true;
    }
    let lie = |name: Name| Record::from_rdata(name, 600, RData::A(A(LIE)));
    let mut first = Vec::new();
    match manner {
        Manner::Failing => {
            right.metadata.response_code = ResponseCode::ServFail;
            right.answers.clear();
            right.authorities.clear();
        }
        Manner::LowerCase => right.queries[0].name = right.queries[0].name.to_lowercase(),
        Manner::Stuffing => {
            // No alias leads to these.
            let others = ["v7.soak.example.", "kubernetes.default.svc.cluster.local.", "bank.example."];
            let others = others.map(|name| lie(name.parse().unwrap()));
            let asked = right.queries[0].name.to_lowercase();
            let about_others = || others.iter().filter(|record| record.name != asked).cloned();
            right.answers.extend(about_others());
            right.authorities.extend(about_others());
            right.additionals.extend(about_others());
        }
        Manner::Forging => {
            let mut forged = right.clone();
            forged.metadata.truncation = false;
            forged.metadata.response_code = ResponseCode::NoError;
            forged.authorities.clear();
            forged.answers = vec![lie(query.queries[0].name.clone())];
            let mut wrong_id = forged.clone();
            wrong_id.metadata.id ^= 1;
            let mut wrong_name = forged.clone();
            wrong_name.queries[0].name = format!("x.{ZONE}").parse().unwrap();
            let mut wrong_kind = forged.clone();
            wrong_kind.queries[0].query_type = RecordType::MX;
            let mut no_question = forged.clone();
            no_question.queries.clear();
            let mut a_query = forged;
            a_query.metadata.message_type = MessageType::Query;
            first =
                [wrong_id, wrong_name, wrong_kind, no_question, a_query].map(|m| m.to_vec().unwrap()).into();
            first.push(b"garbage".to_vec());
            first.push(Vec::new());
        }
        _ => {}
    }
    first.push(right.to_vec().unwrap());
    first
}
