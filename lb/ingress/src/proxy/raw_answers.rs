//! What backends say, as raw bytes over real sockets: what becomes of it at the client, and whether the connection is used again.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

use super::tests::{Rig, head_of, simple_table, status};

/// What a client makes of an answer.
#[derive(Debug, PartialEq)]
enum Seen {
    Whole(u16, String),
    /// It does not end as its head says.
    Broken,
}

fn seen(answer: &str) -> Seen {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let head = head.to_ascii_lowercase();
    let bodiless = head.starts_with("http/1.1 304") || head.starts_with("http/1.1 204");
    if let Some(length) = head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        let length: usize = length.parse().unwrap();
        return match body.len() == length || bodiless {
            true => Seen::Whole(status(answer), body.to_owned()),
            false => Seen::Broken,
        };
    }
    if !head.contains("transfer-encoding: chunked") {
        return if bodiless { Seen::Whole(status(answer), String::new()) } else { Seen::Broken };
    }
    let (mut rest, mut text) = (body, String::new());
    loop {
        let Some((size, after)) = rest.split_once("\r\n") else { return Seen::Broken };
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return Seen::Whole(status(answer), text);
        }
        let Some((piece, after)) = after.split_at_checked(size) else { return Seen::Broken };
        text.push_str(piece);
        rest = after.strip_prefix("\r\n").unwrap_or(after);
    }
}

/// The connections that requests came on, in their order.
type Asked = Arc<Mutex<Vec<usize>>>;

/// Does this with each request, which it is given with the number of its connection; `false` ends the connection.
fn backend(
    address: SocketAddr,
    answer: impl Fn(usize, String, &TcpStream) -> bool + Send + Sync + 'static,
) -> (SocketAddr, Asked) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Asked::default();
    let (all, answer) = (asked.clone(), Arc::new(answer));
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let (all, answer) = (all.clone(), answer.clone());
            std::thread::spawn(move || {
                while let Some(head) = head_of(&stream) {
                    all.lock().unwrap().push(number);
                    if !answer(number, head, &stream) {
                        return;
                    }
                }
            });
        }
    });
    (address, asked)
}

const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

fn say(mut stream: &TcpStream, text: &str) {
    // The proxy may have closed it.
    let _ = stream.write_all(text.as_bytes());
}

fn asks(rig: &Rig, request_line: &str, fields: &str) -> String {
    let text = format!("{request_line} HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{fields}\r\n");
    Rig::raw_at(rig.plain, text.as_bytes())
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// One answer, and what is to come of it.
struct Case {
    name: &'static str,
    answer: String,
    /// The backend closes its connection after it.
    closes: bool,
    /// What follows must come with the answer: later it is nobody's.
    at_once: bool,
    seen: Seen,
    reused: bool,
}

fn case(name: &'static str, answer: impl Into<String>, seen: Seen, reused: bool) -> Case {
    Case { name, answer: answer.into(), closes: false, at_once: false, seen, reused }
}

fn closing(name: &'static str, answer: impl Into<String>, seen: Seen) -> Case {
    Case { closes: true, ..case(name, answer, seen, false) }
}

fn followed(name: &'static str, answer: impl Into<String>, seen: Seen) -> Case {
    Case { at_once: true, ..case(name, answer, seen, false) }
}

fn whole(text: &str) -> Seen {
    Seen::Whole(200, text.to_owned())
}

/// Fields of an answer that is to be refused.
fn refused(name: &'static str, fields: &str, body: &str) -> Case {
    case(name, format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n{body}"), bad_gateway(), false)
}

fn bad_gateway() -> Seen {
    Seen::Whole(502, "502 Bad Gateway\n".to_owned())
}

fn chunked(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
}

/// RFC 9112 6.3, what may be understood.
fn sound() -> Vec<Case> {
    vec![
        case("a length", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", whole("hi"), true),
        case(
            "the same length twice",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2, 2\r\n\r\nhi",
            whole("hi"),
            true,
        ),
        case("no bytes", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", whole(""), true),
        case("chunks", chunked("1\r\nh\r\n1\r\ni\r\n0\r\n\r\n"), whole("hi"), true),
        case(
            "sizes with zeros, spaces and extensions",
            chunked("0001 ;a=\"b\";c\r\nh\r\n1  \r\ni\r\n000;x\r\n\r\n"),
            whole("hi"),
            true,
        ),
        case("a trailer", chunked("2\r\nhi\r\n0\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n"), whole("hi"), true),
        closing("until the end of the connection", "HTTP/1.1 200 OK\r\n\r\nhi", whole("hi")),
        case(
            "Connection: close",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x, Close\r\n\r\nhi",
            whole("hi"),
            false,
        ),
        case("HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", whole("hi"), false),
        case(
            "HTTP/1.0 with keep-alive",
            "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: Keep-Alive\r\n\r\nhi",
            whole("hi"),
            true,
        ),
        case("204", "HTTP/1.1 204 No Content\r\n\r\n", Seen::Whole(204, String::new()), true),
        case(
            "304 with the length of what it does not send",
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            Seen::Whole(304, String::new()),
            true,
        ),
        case(
            "interim answers",
            format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n{OK}"),
            whole("ok"),
            true,
        ),
        case("a status that nobody knows", OK.replace("200 OK", "799"), Seen::Whole(799, "ok".into()), true),
        case(
            "line feeds alone in the head (2.2)",
            "HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
            whole("hi"),
            true,
        ),
        followed("bytes after a length", format!("{OK}{OK}"), whole("ok")),
        followed("bytes after the last chunk", chunked("2\r\nhi\r\n0\r\n\r\nHTTP/1.1 2"), whole("hi")),
        followed("bytes after a trailer", chunked("2\r\nhi\r\n0\r\nA: 1\r\n\r\n\r\n"), whole("hi")),
        followed(
            "a body where there is none",
            "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nhi",
            Seen::Whole(204, String::new()),
        ),
    ]
}

/// What may be understood in two ways, or in none.
fn ambiguous() -> Vec<Case> {
    let head = |line: &str| format!("{line}\r\nContent-Length: 2\r\n\r\nhi");
    let hint = "HTTP/1.1 103 Early Hints\r\n\r\n";
    let many: String = (0..101).map(|number| format!("X-{number}: 1\r\n")).collect();
    let body = "2\r\nhi\r\n0\r\n\r\n";
    vec![
        refused("both framings", "Content-Length: 2\r\nTransfer-Encoding: chunked", body),
        refused("both, the other way round", "Transfer-Encoding: chunked\r\nContent-Length: 2", body),
        refused("lengths that differ", "Content-Length: 2\r\nContent-Length: 3", "hi"),
        refused("lengths that differ in one field", "Content-Length: 2, 3", "hi"),
        refused("a length with a sign", "Content-Length: +2", "hi"),
        refused("a negative length", "Content-Length: -2", "hi"),
        refused("a length in hexadecimal", "Content-Length: 0x2", "hi"),
        refused("no length", "Content-Length: ", "hi"),
        refused("half a list", "Content-Length: 2,", "hi"),
        refused("a length beyond all", "Content-Length: 99999999999999999999", "hi"),
        refused("another coding before chunked", "Transfer-Encoding: gzip, chunked", body),
        refused("chunked is not last", "Transfer-Encoding: chunked, gzip", body),
        refused("an unknown coding", "Transfer-Encoding: xchunked", body),
        refused("identity", "Transfer-Encoding: identity", "hi"),
        refused("chunked twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", body),
        refused("a vertical tab", "Transfer-Encoding: \x0bchunked", body),
        case("chunked in HTTP/1.0", chunked(body).replace("HTTP/1.1", "HTTP/1.0"), bad_gateway(), false),
        refused("space before the colon", "Content-Length : 2", "hi"),
        refused("obs-fold", "X-A: 1\r\n 2\r\nContent-Length: 2", "hi"),
        refused("NUL", "X-A: 1\0\r\nContent-Length: 2", "hi"),
        refused("too many fields", &format!("{many}Content-Length: 2"), "hi"),
        refused("a head of 70 kB", &format!("X-A: {}\r\nContent-Length: 2", "x".repeat(70_000)), "hi"),
        case("no version", head("200 OK"), bad_gateway(), false),
        case("HTTP/2.0", head("HTTP/2.0 200 OK"), bad_gateway(), false),
        case("a status of two digits", head("HTTP/1.1 20 OK"), bad_gateway(), false),
        case("status 099", head("HTTP/1.1 099 X"), bad_gateway(), false),
        case("interim answers without end", format!("{}{OK}", hint.repeat(17)), bad_gateway(), false),
        case(
            "another protocol that nobody asked for",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            bad_gateway(),
            false,
        ),
        closing("nothing", "", bad_gateway()),
        closing("half a head", "HTTP/1.1 200 OK\r\nContent-Le", bad_gateway()),
    ]
}

/// What is cut short or damaged after its head: a client must not take it for whole.
fn broken() -> Vec<Case> {
    let damaged = |name, body: &str| case(name, chunked(body), Seen::Broken, false);
    let cut = |name, body: &str| closing(name, chunked(body), Seen::Broken);
    let extended = format!("1;{}\r\nx\r\n", "x".repeat(3_000));
    let many: String = (0..101).map(|number| format!("X-{number}: 1\r\n")).collect();
    vec![
        closing("too few bytes", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi", Seen::Broken),
        closing("no byte of some", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Seen::Broken),
        cut("no chunk", ""),
        cut("half a chunk", "5\r\nhi"),
        cut("a chunk without its line end", "2\r\nhi"),
        cut("no last chunk", "2\r\nhi\r\n"),
        cut("half of the last chunk", "2\r\nhi\r\n0\r\n"),
        cut("half a trailer", "2\r\nhi\r\n0\r\nX-Sum: 1\r\n"),
        damaged("a size that is none", "2\r\nhi\r\nx\r\nhi\r\n0\r\n\r\n"),
        damaged("a size with a sign", "+2\r\nhi\r\n0\r\n\r\n"),
        damaged("a size with a prefix", "0x2\r\nhi\r\n0\r\n\r\n"),
        damaged("a size beyond all", "2\r\nhi\r\n10000000000000002\r\nhi\r\n0\r\n\r\n"),
        damaged("an empty size", "2\r\nhi\r\n\r\n0\r\n\r\n"),
        damaged("a space before a size", " 2\r\nhi\r\n0\r\n\r\n"),
        damaged("text behind a size", "2 x\r\nhi\r\n0\r\n\r\n"),
        damaged("line feeds alone", "2\nhi\n0\n\n"),
        damaged("a line feed in an extension", "2;a\nb\r\nhi\r\n0\r\n\r\n"),
        damaged("a carriage return in an extension", "2;a\rb\r\nhi\r\n0\r\n\r\n"),
        damaged("more data than its size", "2\r\nhi!\r\n0\r\n\r\n"),
        damaged("an endless line", &format!("2;{}\r\nhi\r\n0\r\n\r\n", "x".repeat(5_000))),
        damaged("endless extensions", &format!("{}0\r\n\r\n", extended.repeat(6))),
        damaged("a trailer that is none", "2\r\nhi\r\n0\r\nX Sum\r\n\r\n"),
        damaged("a trailer with line feeds alone", "2\r\nhi\r\n0\r\nX: 1\nY: 2\r\n\r\n"),
        damaged("too many fields in the trailer", &format!("2\r\nhi\r\n0\r\n{many}\r\n")),
        damaged("a trailer of 70 kB", &format!("2\r\nhi\r\n0\r\nX: {}\r\n\r\n", "x".repeat(70_000))),
    ]
}

/// Each answer in one piece and byte by byte, for IPv4 and IPv6.
#[test]
fn an_answer_means_what_rfc_9112_says_or_is_refused_and_its_connection_is_used_again_only_where_that_is_sure()
{
    let cases: Vec<Case> = [sound(), ambiguous(), broken()].into_iter().flatten().collect();
    let said = |case: &Case| (case.answer.clone(), case.closes, case.at_once);
    let script: Arc<Vec<(String, bool, bool)>> = Arc::new(cases.iter().map(said).collect());
    let mut wrong = Vec::new();
    for (address, bytewise) in [(V4, false), (V6, true)] {
        let script = script.clone();
        let (address, asked) = backend(address, move |_, head, stream| {
            let number: Option<usize> = head.split(['/', ' ']).nth(2).and_then(|text| text.parse().ok());
            let Some((answer, closes, at_once)) = number.and_then(|number| script.get(number)) else {
                say(stream, OK);
                return true;
            };
            if bytewise && !at_once && answer.len() < 200 {
                stream.set_nodelay(true).unwrap();
                for byte in answer.chars() {
                    say(stream, byte.encode_utf8(&mut [0; 4]));
                    std::thread::sleep(Duration::from_micros(300));
                }
            } else {
                say(stream, answer);
            }
            !closes
        });
        let rig = Rig::start(&simple_table(&json!({"proxy-read-timeout": "2"}), address));
        let last = || *asked.lock().unwrap().last().unwrap();
        for (number, case) in cases.iter().enumerate() {
            let got = seen(&asks(&rig, &format!("GET /{number}"), ""));
            let before = last();
            let next = seen(&asks(&rig, "GET /next", ""));
            let reused = last() == before;
            if (&got, reused, &next) != (&case.seen, case.reused, &whole("ok")) {
                wrong.push(format!("{}: {got:?}, reused: {reused}, then {next:?}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_answer_to_head_has_no_body_whatever_its_fields_say() {
    let (address, asked) = backend(V4, |_, head, stream| {
        let fields =
            if head.contains("/chunked") { "Transfer-Encoding: chunked" } else { "Content-Length: 5" };
        say(stream, &format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n"));
        true
    });
    let rig = Rig::start(&simple_table(&json!({}), address));
    assert!(asks(&rig, "HEAD /", "").contains("content-length: 5\r\n"));
    for path in ["/chunked", "/"] {
        let answer = asks(&rig, &format!("HEAD {path}"), "");
        assert_eq!((status(&answer), answer.ends_with("\r\n\r\n")), (200, true), "{answer}");
    }
    assert_eq!(*asked.lock().unwrap(), [0, 0, 0]);
}

/// A backend of HTTP/1.1 may close a kept connection, or break its word, at any time.
#[test]
fn a_kept_connection_that_was_closed_or_spoke_unasked_takes_no_request() {
    for (late, post) in [("", true), ("", false), (OK, true), (OK, false)] {
        let (address, asked) = backend(V6, move |number, _, stream| {
            say(stream, OK);
            if number == 0 {
                std::thread::sleep(Duration::from_millis(50));
                say(stream, late);
            }
            number != 0 || !late.is_empty()
        });
        let rig = Rig::start(&simple_table(&json!({}), address));
        assert_eq!(seen(&asks(&rig, "GET /", "")), whole("ok"));
        std::thread::sleep(Duration::from_millis(150));
        let next = match post {
            true => asks(&rig, "POST /", "Content-Length: 0\r\n"),
            false => asks(&rig, "GET /", ""),
        };
        assert_eq!(seen(&next), whole("ok"));
        assert_eq!(*asked.lock().unwrap(), [0, 1], "{late:?} {post}");
    }
}

#[test]
fn a_kept_connection_that_closes_under_a_request_costs_nobody_an_answer_and_repeats_only_what_may_be_repeated()
 {
    for (line, fields, expected) in [
        ("GET /", "", (whole("ok"), vec![0, 0, 1])),
        ("POST /", "Content-Length: 0\r\n", (bad_gateway(), vec![0, 0])),
    ] {
        let (address, asked) = backend(V4, |number, head, stream| {
            let dies = number == 0 && !head.contains("/first");
            if !dies {
                say(stream, OK);
            }
            !dies
        });
        let rig = Rig::start(&simple_table(&json!({}), address));
        assert_eq!(seen(&asks(&rig, "GET /first", "")), whole("ok"));
        assert_eq!((seen(&asks(&rig, line, fields)), asked.lock().unwrap().clone()), expected, "{line}");
    }
}

fn read_body(mut stream: &TcpStream, length: usize) -> usize {
    let (mut got, mut piece) = (0, [0; 65_536]);
    while got < length {
        match stream.read(&mut piece) {
            Ok(more @ 1..) => got += more,
            _ => break,
        }
    }
    got
}

const UPLOAD: usize = 8_000_000;

/// Sends a body of [`UPLOAD`] bytes, all of it before a byte of the answer is read.
fn uploads(rig: &Rig) -> String {
    let head =
        format!("POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: {UPLOAD}\r\n\r\n");
    Rig::raw_at(rig.plain, &[head.as_bytes(), &vec![b'x'; UPLOAD]].concat())
}

#[test]
fn an_answer_that_comes_during_an_upload_is_passed_on_and_the_upload_goes_on() {
    let (tell, told) = std::sync::mpsc::channel();
    let (address, asked) = backend(V4, move |_, _, stream| {
        say(stream, OK);
        tell.send(read_body(stream, UPLOAD)).is_ok()
    });
    let rig = Rig::start(&simple_table(&json!({"proxy-body-size": "0"}), address));
    for expected in [vec![0], vec![0, 1]] {
        assert_eq!(seen(&uploads(&rig)), whole("ok"));
        assert_eq!(told.recv_timeout(Duration::from_secs(5)).unwrap(), UPLOAD);
        assert_eq!(*asked.lock().unwrap(), expected, "its connection takes no other request");
    }
}

/// A client that reads nothing until it has sent all must not wait for its own answer.
#[test]
fn an_answer_that_nobody_reads_yet_does_not_hold_the_upload_back() {
    let (address, _) = backend(V4, |_, _, stream| {
        let writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {UPLOAD}\r\n\r\n");
            say(&writer, &head);
            say(&writer, &"y".repeat(UPLOAD));
        });
        let got = read_body(stream, UPLOAD);
        writing.join().unwrap();
        got == UPLOAD
    });
    let rig = Rig::start(&simple_table(&json!({"proxy-body-size": "0"}), address));
    assert_eq!(seen(&uploads(&rig)), whole(&"y".repeat(UPLOAD)));
}

#[test]
fn a_backend_that_refuses_an_upload_and_closes_is_heard() {
    let (address, _) = backend(V6, |_, _, stream| {
        // By then the upload waits; what is not read of it makes the kernel send a reset right behind the answer.
        std::thread::sleep(Duration::from_millis(100));
        say(stream, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
        false
    });
    let rig = Rig::start(&simple_table(&json!({"proxy-body-size": "0"}), address));
    for _ in 0..5 {
        let answer = uploads(&rig);
        assert_eq!(status(&answer), 403, "{answer}");
    }
}

/// The framing of a request is the proxy's own, and says what its body is.
#[test]
fn a_request_goes_on_with_one_framing_and_only_the_trailer_that_it_announces() {
    let (tell, told) = std::sync::mpsc::channel();
    let (address, asked) = backend(V4, move |_, head, stream| {
        let mut body = Vec::new();
        let length = head.split("content-length: ").nth(1).map(|rest| rest.lines().next().unwrap());
        match length.map(|length| length.parse().unwrap()) {
            Some(length) => {
                body.resize(length, 0);
                (&*stream).read_exact(&mut body).unwrap();
            }
            None if head.contains("transfer-encoding: chunked\r\n") => {
                while !body.ends_with(b"\r\n\r\n") {
                    let mut byte = [0; 1];
                    (&*stream).read_exact(&mut byte).unwrap();
                    body.push(byte[0]);
                }
            }
            None => {}
        }
        say(stream, OK);
        tell.send((head, String::from_utf8(body).unwrap())).is_ok()
    });
    let rig = Rig::start(&simple_table(&json!({}), address));
    let trailer = "Transfer-Encoding: chunked\r\nTrailer: X-Sum, Content-Length\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-B: 2\r\nContent-Length: 9\r\n";
    for (line, fields, framing, body) in [
        ("GET /", "", None, ""),
        ("POST /", "Content-Length: 0\r\n", Some("content-length: 0"), ""),
        ("POST /", "Content-Length: 003\r\n\r\nabc", Some("content-length: 3"), "abc"),
        ("GET /", "Content-Length: 3\r\n\r\nabc", Some("content-length: 3"), "abc"),
        ("POST /", trailer, Some("transfer-encoding: chunked"), "3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"),
    ] {
        assert_eq!(seen(&asks(&rig, line, fields)), whole("ok"));
        let (head, got) = told.recv_timeout(Duration::from_secs(5)).unwrap();
        let framings: Vec<&str> = head
            .lines()
            .filter(|line| line.starts_with("content-length:") || line.starts_with("transfer-encoding:"))
            .collect();
        assert_eq!((framings.as_slice(), got.as_str()), (framing.as_slice(), body), "{line} {fields}");
    }
    assert!(asked.lock().unwrap().iter().all(|number| *number == 0), "one connection for all");
}
