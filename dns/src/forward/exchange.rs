//! One question to one upstream resolver: UDP with a random port, id and spelling; TCP when that is cut or doubtful; or TLS
//! alone, where nobody on the way can read, change or add anything.
//!
//! A datagram that is not from the server asked, not for that id or not for that question is ignored (RFC 5452 section 9).
//! The letters of the name are sent in random case, which a forger would have to guess too
//! (draft-vixie-dnsext-dns0x20); a server that changes them is asked again by TCP.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::Name as WireName;
use hickory_proto::rr::rdata::opt::EdnsOption;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use super::Outside;
use super::tls::Dialer;
use crate::custom::{Server, Tls};
use crate::serve::UDP_PAYLOAD_BYTES;

/// One try by one transport. glibc's own patience is 5 s.
const TRY_TIMEOUT: Duration = Duration::from_millis(2000);

/// What a server said, and what was learnt about it.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) message: Message,
    /// It does not give names back as they were spelled.
    pub(super) loses_case: bool,
}

/// In the way that the server is to be asked.
pub(super) async fn ask(
    server: &Server,
    question: &Outside,
    keeps_case: bool,
    dialer: &Dialer,
) -> io::Result<Said> {
    match &server.tls {
        None => ask_plainly(server.address, question, keeps_case).await,
        Some(tls) => ask_tls(server, tls, question, dialer).await,
    }
}

/// With EDNS, and without it when the server does not know EDNS.
async fn ask_tls(server: &Server, tls: &Tls, question: &Outside, dialer: &Dialer) -> io::Result<Said> {
    let mut message = exchange_tls(server, tls, &padded(query(question, true, false)), dialer).await?;
    if matches!(message.metadata.response_code, ResponseCode::FormErr | ResponseCode::NotImp) {
        message = exchange_tls(server, tls, &query(question, false, false), dialer).await?;
    }
    Ok(Said { message, loses_case: false })
}

/// By a connection that is there, and by a new one when there is none or it has ended meanwhile.
async fn exchange_tls(server: &Server, tls: &Tls, query: &Message, dialer: &Dialer) -> io::Result<Message> {
    within(TRY_TIMEOUT, async {
        if let Some(mut connection) = dialer.idle(server, Instant::now())
            && let Ok(message) = by_stream(&mut connection, query).await
        {
            dialer.keep(server, connection, Instant::now());
            return Ok(message);
        }
        let mut connection = dialer.connect(server, tls, Instant::now()).await?;
        let message = by_stream(&mut connection, query).await?;
        dialer.keep(server, connection, Instant::now());
        Ok(message)
    })
    .await
}

/// To a multiple of 128 octets, so that the length says little about the name (RFC 7830, RFC 8467 section 4.1).
fn padded(mut query: Message) -> Message {
    const PADDING: u16 = 12;
    const BLOCK_BYTES: usize = 128;
    const OPTION_BYTES: usize = 4;
    let length = query.to_vec().map_or(0, |bytes| bytes.len()) + OPTION_BYTES;
    let padding = vec![0; length.next_multiple_of(BLOCK_BYTES) - length];
    if let Some(edns) = query.edns.as_mut() {
        edns.options_mut().insert(EdnsOption::Unknown(PADDING, padding));
    }
    query
}

/// Plainly: with EDNS, without it when the server does not know EDNS, by TCP when the answer was cut or its
/// spelling is not ours. `keeps_case`: whether to spell the name at random.
async fn ask_plainly(server: SocketAddr, question: &Outside, keeps_case: bool) -> io::Result<Said> {
    let mut edns = true;
    let mut spelled = query(question, edns, keeps_case);
    let mut message = ask_udp(server, &spelled).await?;
    if matches!(message.metadata.response_code, ResponseCode::FormErr | ResponseCode::NotImp) {
        edns = false;
        spelled = query(question, edns, keeps_case);
        message = ask_udp(server, &spelled).await?;
    }
    let loses_case = keeps_case && !same_spelling(&message, &spelled);
    if loses_case {
        // By TCP nobody can slip an answer in.
        return ask_tcp(server, &query(question, edns, false))
            .await
            .map(|message| Said { message, loses_case });
    }
    if message.metadata.truncation {
        match ask_tcp(server, &query(question, edns, false)).await {
            Ok(message) => return Ok(Said { message, loses_case }),
            // Whoever gets no better one from another server hears that it is a part.
            Err(error) => tracing::debug!(%server, %error, "no TCP answer after a truncated one"),
        }
    }
    Ok(Said { message, loses_case })
}

/// A new message with a random id.
fn query(question: &Outside, edns: bool, random_case: bool) -> Message {
    let mut message = Message::query();
    message.metadata.id = rand::random();
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    let name = if random_case { randomly_spelled(&question.name) } else { question.name.clone() };
    message.add_query(Query::query(name, question.record_type));
    if edns {
        let mut options = Edns::new();
        options.set_max_payload(UDP_PAYLOAD_BYTES).set_version(0).set_dnssec_ok(question.dnssec_ok);
        message.set_edns(options);
    }
    message
}

fn randomly_spelled(name: &WireName) -> WireName {
    let spelled = name.iter().map(|label| {
        let letter =
            |octet: &u8| if rand::random() { octet.to_ascii_uppercase() } else { octet.to_ascii_lowercase() };
        label.iter().map(letter).collect::<Vec<u8>>()
    });
    let mut spelled = WireName::from_labels(spelled.collect::<Vec<_>>()).unwrap_or_else(|_| name.clone());
    spelled.set_fqdn(true);
    spelled
}

fn same_spelling(message: &Message, query: &Message) -> bool {
    let names = message.queries.iter().zip(&query.queries);
    names.into_iter().all(|(said, asked)| said.name.eq_case(&asked.name))
}

async fn ask_udp(server: SocketAddr, query: &Message) -> io::Result<Message> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    within(TRY_TIMEOUT, async {
        let socket = UdpSocket::bind(any).await?;
        socket.connect(server).await?;
        socket.send(&encode(query)?).await?;
        let mut buffer = vec![0; 4096];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if let Some(message) = decode(&buffer[..length]).filter(|message| is_reply(message, query)) {
                return Ok(message);
            }
        }
    })
    .await
}

async fn ask_tcp(server: SocketAddr, query: &Message) -> io::Result<Message> {
    within(TRY_TIMEOUT, async {
        let mut stream = TcpStream::connect(server).await?;
        by_stream(&mut stream, query).await
    })
    .await
}

/// A question and its answer, each behind its length (RFC 1035 section 4.2.2).
async fn by_stream(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    query: &Message,
) -> io::Result<Message> {
    let bytes = encode(query)?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat()).await?;
    stream.flush().await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    decode(&buffer)
        .filter(|message| is_reply(message, query))
        .ok_or_else(|| io::Error::other("the answer is for another question"))
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let timed_out = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {limit:?}"));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
}

fn encode(message: &Message) -> io::Result<Vec<u8>> {
    message.to_vec().map_err(io::Error::other)
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
