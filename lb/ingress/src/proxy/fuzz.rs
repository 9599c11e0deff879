//! Bytes that nobody wrote by hand, against the real listener: framings of HTTP/1.1 judged by an oracle that follows RFC 9112 section 6, and
//! damaged ClientHellos.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body::Body as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use serde_json::json;

use super::codec::{self, Chunks, Framing};
use super::tests::{Rig, backend, client_hello, passing, served, simple_table, status};

/// Whole requests as the backend understood them: path and body.
type Understood = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A backend whose HTTP/1.1 is hyper's: what it understands is what a request has become.
fn listening() -> (SocketAddr, Understood) {
    let understood = Understood::default();
    let all = understood.clone();
    let address = served(move |stream| {
        let all = all.clone();
        let service = service_fn(move |request: http::Request<Incoming>| {
            let all = all.clone();
            async move {
                let path = request.uri().path().to_owned();
                let (mut incoming, mut body) = (Box::pin(request.into_body()), Vec::new());
                while let Some(frame) =
                    std::future::poll_fn(|context| incoming.as_mut().poll_frame(context)).await
                {
                    body.extend(frame?.into_data().unwrap_or_default());
                }
                all.lock().unwrap().push((path, body));
                Ok::<_, hyper::Error>(http::Response::new(super::body::Body::text("understood")))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new();
        let connection = connection.serve_connection(TokioIo::new(stream), service);
        async move { drop(connection.await) }
    });
    (address, understood)
}

/// What may become of a request, by the text of the specification.
#[derive(Debug, PartialEq)]
struct Allowed {
    refused: bool,
    /// Its body, when it may pass.
    body: Option<Vec<u8>>,
}

const REFUSED: Allowed = Allowed { refused: true, body: None };

/// RFC 9112 6.3, for a request whose fields are `(name, value)` and what follows its head.
fn judged(version: &str, fields: &[(&str, &str)], rest: &[u8]) -> Allowed {
    // 5.1: no whitespace between name and colon.
    if fields.iter().any(|(name, _)| name.ends_with(' ')) {
        return REFUSED;
    }
    let values = |wanted: &str| {
        let found = fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found
            .flat_map(|(_, value)| value.split(','))
            .map(|item| item.trim_matches([' ', '\t']))
            .collect::<Vec<_>>()
    };
    let (codings, lengths) = (values("transfer-encoding"), values("content-length"));
    if !codings.is_empty() {
        let named: Vec<&str> = codings.iter().copied().filter(|coding| !coding.is_empty()).collect();
        // 6.1: chunked is last and once, other codings would go on as if they were none, and HTTP/1.0 has none.
        if version == "1.0" || named.len() != 1 || !named[0].eq_ignore_ascii_case("chunked") {
            return REFUSED;
        }
        let (body, strict) = unchunked(rest);
        let body = body.map(|(body, _)| body);
        // RFC 9110 5.6.1.2 wants empty elements to be passed over; to refuse them harms nobody.
        let strict = strict && named.len() == codings.len();
        return Allowed { refused: !strict || !lengths.is_empty() || body.is_none(), body };
    }
    if lengths.is_empty() {
        return Allowed { refused: false, body: Some(Vec::new()) };
    }
    let numbers: Option<Vec<usize>> = lengths
        .iter()
        .map(|text| text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok()).flatten())
        .collect();
    match numbers.as_deref() {
        Some([first, others @ ..]) if others.iter().all(|other| other == first) => {
            let body = rest.get(..*first).map(<[u8]>::to_vec);
            Allowed { refused: !others.is_empty() || body.is_none(), body }
        }
        _ => REFUSED,
    }
}

/// A body and what follows it.
type Unchunked<'a> = (Vec<u8>, &'a [u8]);

/// 7.1. Whether it is so by every letter: spaces after a size may be forgiven.
fn unchunked(mut rest: &[u8]) -> (Option<Unchunked<'_>>, bool) {
    let (mut body, mut strict) = (Vec::new(), true);
    loop {
        let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else { return (None, strict) };
        let line = std::str::from_utf8(&rest[..end]).unwrap();
        let size = line.split(';').next().unwrap();
        let bare = size.trim_end_matches([' ', '\t']);
        strict &= size == bare;
        let valid = !bare.is_empty()
            && bare.bytes().all(|digit| digit.is_ascii_hexdigit())
            && !line.contains(['\r', '\n']);
        let Some(size) = usize::from_str_radix(bare, 16).ok().filter(|_| valid) else {
            return (None, strict);
        };
        rest = &rest[end + 2..];
        if size == 0 {
            // Fields of the trailer, then an empty line.
            let trailer = std::str::from_utf8(rest).unwrap();
            let mut fields = trailer.split("\r\n").take_while(|line| !line.is_empty());
            let token = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
            let named = |line: &str| {
                line.split_once(':').is_some_and(|(name, _)| !name.is_empty() && name.chars().all(token))
                    && !line.contains(['\r', '\n'])
            };
            let end = if trailer.starts_with("\r\n") {
                Some(2)
            } else {
                trailer.find("\r\n\r\n").map(|end| end + 4)
            };
            let after = end.and_then(|end| rest.get(end..)).filter(|_| fields.all(named));
            return (after.map(|after| (body, after)), strict);
        }
        let Some((piece, after)) = rest.split_at_checked(size) else { return (None, strict) };
        body.extend_from_slice(piece);
        match after.strip_prefix(b"\r\n") {
            Some(after) => rest = after,
            None => return (None, strict),
        }
    }
}

fn field() -> impl Strategy<Value = (&'static str, &'static str)> {
    let codings = prop::sample::select(vec![
        "chunked",
        "Chunked",
        "chunked ",
        "\tchunked",
        ",chunked",
        "chunked,",
        "gzip, chunked",
        "chunked, gzip",
        "chunked, chunked",
        "identity",
        "xchunked",
        "chunked;q=1",
        "\"chunked\"",
        "gzip",
        "",
    ]);
    let lengths = prop::sample::select(vec![
        "5",
        "05",
        "5 ",
        "+5",
        "-5",
        "0x5",
        "5, 5",
        "5,6",
        "6",
        "0",
        "",
        "5.0",
        "5;",
        "99999999999999999999999",
        "1e1",
    ]);
    let names = |of: [&'static str; 5]| prop::sample::select(of.to_vec());
    prop_oneof![
        (
            names([
                "Transfer-Encoding",
                "transfer-encoding",
                "TRANSFER-ENCODING",
                "Transfer-Encoding ",
                "Transfer_Encoding"
            ]),
            codings
        ),
        (
            names([
                "Content-Length",
                "content-length",
                "CONTENT-LENGTH",
                "Content-Length ",
                "Content_Length"
            ]),
            lengths
        ),
    ]
}

fn body() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "",
        "hello",
        "5\r\nhello\r\n0\r\n\r\n",
        "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n",
        "5;a=b;c=\"d\"\r\nhello\r\n0\r\n\r\n",
        "00005\r\nhello\r\n000\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "5\nhello\n0\n\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhelloX\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "\r\nhello\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\r\n",
    ])
}

const SECOND: &str = "GET /second HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";

/// So many cases, unless PROPTEST_CASES says how many.
fn config(cases: u32) -> ProptestConfig {
    let of_environment = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => of_environment,
        None => ProptestConfig { cases, ..of_environment },
    }
}

#[test]
fn a_framing_means_to_the_backend_what_rfc_9112_says_or_is_refused() {
    let (address, understood) = listening();
    let rig = Rig::start(&simple_table(&json!({}), address));
    let config = config(400);
    let case = (
        prop::sample::select(vec!["1.1", "1.1", "1.1", "1.0"]),
        prop::collection::vec(field(), 0..3),
        body(),
    );
    proptest!(config, |((version, fields, body) in case)| {
        understood.lock().unwrap().clear();
        let lines: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let rest = format!("{body}{SECOND}");
        let text = format!("POST /first HTTP/{version}\r\nHost: a.com\r\n{lines}\r\n{rest}");
        let allowed = judged(version, &fields, rest.as_bytes());
        let mut stream = StdStream::connect(rig.plain).unwrap();
        // One that may pass ends by itself; one that cannot may be waited for until it is clear that no more will come.
        let patience = if allowed.body.is_some() { 5000 } else { 100 };
        stream.set_read_timeout(Some(Duration::from_millis(patience))).unwrap();
        let _ = stream.write_all(text.as_bytes());
        let mut answers = Vec::new();
        if stream.read_to_end(&mut answers).is_err() {
            prop_assert!(allowed.body.is_none(), "it does not end: {}", text);
            let _ = stream.shutdown(Shutdown::Write);
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let _ = stream.read_to_end(&mut answers);
        }
        let answers = String::from_utf8_lossy(&answers).into_owned();
        let heard = understood.lock().unwrap().clone();
        match heard.first() {
            Some((path, body)) if path == "/first" => {
                prop_assert_eq!(Some(body), allowed.body.as_ref(), "{}\n{:?}", text, heard);
                prop_assert_eq!(status(&answers), 200, "{}\n{}", text, answers);
            }
            // It was refused, so nothing behind it was a request.
            _ => {
                prop_assert!(allowed.refused && heard.is_empty(), "{}\n{}\n{:?}\n{:?}", text, answers, allowed, heard);
                prop_assert!(answers.matches("HTTP/1.").count() <= 1, "{}\n{}", text, answers);
            }
        }
    });
}

/// Chunks by the letter, and with bytes put in, taken out or changed.
fn chunks() -> impl Strategy<Value = Vec<u8>> {
    let line =
        prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\r\n", ";a=b\r\n", "  \r\n", " ;a\r\n", "\n"]);
    let chunk = (0..20_usize, line).prop_map(|(size, line)| match size {
        0 => String::new(),
        size => format!("{size:x}{line}{}\r\n", "x".repeat(size)),
    });
    let trailer = prop::sample::select(vec!["", "", "", "X-A: 1\r\n", "X-A: 1\r\nX-B: 2\r\n", "X A: 1\r\n"]);
    let after = prop::sample::select(vec!["", "", "HTTP/1.1 200 OK\r\n\r\n", "\r\n"]);
    let whole = (prop::collection::vec(chunk, 0..4), trailer, after).prop_map(|(chunks, trailer, after)| {
        format!("{}0\r\n{trailer}\r\n{after}", chunks.concat()).into_bytes()
    });
    let damage = (any::<prop::sample::Index>(), prop::sample::select(b"0aF5 \r\n;x:-".to_vec()), 0..3_u8);
    (whole, prop::collection::vec(damage, 0..3)).prop_map(|(mut text, damage)| {
        for (at, byte, how) in damage {
            let at = at.index(text.len());
            match how {
                0 => text[at] = byte,
                1 => text.insert(at, byte),
                _ => drop(text.remove(at)),
            }
        }
        text
    })
}

/// The body and what follows it, as the decoder has it that gets these bytes in pieces of these lengths.
fn decoded(text: &[u8], lengths: impl IntoIterator<Item = usize>) -> Option<(Vec<u8>, Vec<u8>)> {
    let (mut framing, mut buffer) = (Framing::Chunked(Chunks::default()), bytes::BytesMut::new());
    let (mut lengths, mut rest, mut body) = (lengths.into_iter(), text, Vec::new());
    loop {
        match framing.next(&mut buffer).ok()? {
            codec::Piece::Data(data) => {
                assert!(!data.is_empty());
                body.extend_from_slice(&data);
                if framing.is_over(&mut buffer) {
                    return Some((body, [&buffer, rest].concat()));
                }
            }
            codec::Piece::Trailer(_) => {}
            codec::Piece::End => return Some((body, [&buffer, rest].concat())),
            codec::Piece::More if rest.is_empty() => return None,
            codec::Piece::More => {
                let (piece, after) = rest.split_at(lengths.next().unwrap_or(rest.len()).clamp(1, rest.len()));
                buffer.extend_from_slice(piece);
                rest = after;
            }
        }
    }
}

#[test]
fn a_chunked_answer_ends_where_rfc_9112_says_wherever_it_is_cut() {
    let config = config(4000);
    proptest!(config, |(text in chunks(), lengths in prop::collection::vec(1..12_usize, 0..12))| {
        let expected = unchunked(&text).0.map(|(body, after)| (body, after.to_vec()));
        let shown = String::from_utf8_lossy(&text);
        prop_assert_eq!(decoded(&text, []), expected.clone(), "whole: {:?}", shown);
        prop_assert_eq!(decoded(&text, std::iter::repeat(1)), expected.clone(), "byte by byte: {:?}", shown);
        prop_assert_eq!(decoded(&text, lengths), expected.clone(), "{:?}", shown);
        for cut in 1..text.len() {
            prop_assert_eq!(decoded(&text, [cut]), expected.clone(), "cut at {}: {:?}", cut, shown);
        }
    });
}

/// A request's head, usual and unusual, and what follows it.
fn heads() -> impl Strategy<Value = String> {
    let lines = prop::sample::select(vec![
        "GET / HTTP/1.1",
        "GET / HTTP/1.1",
        "GET /x?y=1 HTTP/1.1",
        "HEAD /x HTTP/1.1",
        "POST / HTTP/1.1",
        "FOO /x HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "GET http://a.com/x HTTP/1.1",
        "GET x HTTP/1.1",
        "GET  / HTTP/1.1",
        "get / HTTP/1.1",
        "GET /a#b HTTP/1.1",
        "GET /\u{e9} HTTP/1.1",
        "GET /a%zz HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "GET / HTTP/1.0",
        "GET / HTTP/1.2",
        "GET / HTTP/1.1 ",
        "GET /",
        "\r\nGET / HTTP/1.1",
        " GET / HTTP/1.1",
    ]);
    let fields = prop::sample::select(vec![
        "Host: a.com",
        "HOST: a.com:80",
        "Host: b.com",
        "Host:",
        "Host: a.com, a.com",
        "Connection: close",
        "Connection: Keep-Alive",
        "Connection: x-a, close",
        "Connection: host",
        "Content-Length: 0",
        "Content-Length: 00",
        "Content-Length: 2",
        "Content-Length:",
        "Transfer-Encoding: chunked",
        "TE: trailers",
        "Expect: 100-continue",
        "Keep-Alive: 5",
        "X-A: 1",
        "X-A:",
        "X-A:  a\tb  ",
        "X-A: \u{e9}",
        "X-A: a\0b",
        "X-A : 1",
        "X A: 1",
        " X-A: 1",
        ": 1",
        "X-A",
        "X-Forwarded-For: 6.6.6.6",
        "Cookie: a=1; b=2",
    ]);
    let after = prop::sample::select(vec!["", "", "0\r\n\r\n", "hi", "\r\n", "\0"]);
    (
        lines,
        prop::option::weighted(0.8, Just("Host: a.com")),
        prop::collection::vec((fields, ends()), 0..4),
        ends(),
        after,
    )
        .prop_map(|(line, host, fields, end, after)| {
            let host = host.map(|host| format!("{host}\r\n")).unwrap_or_default();
            let has = |start: &str| fields.iter().any(|(field, _)| field.starts_with(start));
            // A body that is damaged is refused by whoever meets the damage first.
            let after = match (has("Transfer-Encoding"), has("Content-Length: 2")) {
                (true, _) => "0\r\n\r\n",
                (false, true) => "hi",
                _ => after,
            };
            let fields: String = fields.iter().map(|(field, end)| format!("{field}{end}")).collect();
            format!("{line}\r\n{host}{fields}{end}{after}")
        })
}

fn ends() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\n"])
}

/// What comes back after the answer to a first request, without the time.
fn after_first(at: SocketAddr, first: &str, rest: &str) -> Vec<String> {
    let answers = Rig::raw_at(at, format!("{first}{rest}").as_bytes());
    let (head, body) = answers.split_once("\r\n\r\n").unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let rest = body.get(length.parse().unwrap()..).unwrap();
    let mut lines: Vec<String> =
        rest.lines().filter(|line| !line.starts_with("date: ")).map(str::to_owned).collect();
    // Fields may have another order.
    lines.sort();
    lines
}

/// A connection that begins with something unusual is hyper's from then on.
#[test]
fn the_short_path_answers_whatever_comes_as_hyper_does() {
    // It answers with the head that it got.
    let rig = Rig::start(&simple_table(&json!({}), backend("web")));
    let config = config(300);
    let last = "GET /last HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    let ask = |head: &str, field: &str| {
        let first = format!("GET / HTTP/1.1\r\nHost: a.com\r\n{field}\r\n");
        after_first(rig.plain, &first, &format!("{head}{last}"))
    };
    let both = |head: &str| [ask(head, ""), ask(head, "Keep-Alive: 5\r\n")];
    let [short, whole] =
        both("GET / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(short, whole, "a length that is said twice");
    proptest!(config, |(head in heads())| {
        let [short, whole] = both(&head);
        prop_assert_eq!(short, whole, "{:?}", head);
    });
}

#[test]
fn a_damaged_hello_reaches_a_backend_as_it_is_or_not_at_all() {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let rig = Rig::start(&passing(&json!({}), &[listener.local_addr().unwrap()]));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut got = Vec::new();
            let _ = stream.read_to_end(&mut got);
            if tell.send(got).is_err() {
                return;
            }
        }
    });
    let hello = client_hello("pass.com");
    let config = config(300);
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    proptest!(config, |(damage in damage, cut in prop::option::of(any::<prop::sample::Index>()))| {
        let mut sent = hello.clone();
        for (at, byte) in &damage {
            let at = at.index(sent.len());
            sent[at] = *byte;
        }
        if let Some(cut) = cut {
            sent.truncate(cut.index(sent.len()));
        }
        let mut stream = StdStream::connect(rig.tls).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(&sent).unwrap();
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        prop_assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "it is left open");
        // What is said here is an alert or a handshake with the certificate of other hosts (RFC 8446 5.1).
        if let Some(kind) = answer.first() {
            prop_assert!(matches!(kind, 21 | 22), "{:?}", answer);
        }
        let passed = told.recv_timeout(Duration::from_millis(if answer.is_empty() { 20 } else { 0 }));
        match passed {
            Ok(got) => prop_assert_eq!(got, sent),
            Err(_) => prop_assert!(!damage.is_empty() || cut.is_some(), "a sound hello is passed on"),
        }
    });
}
