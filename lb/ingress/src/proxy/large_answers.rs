//! Large answers over real sockets, byte for byte: what goes from socket to socket, what does not, and what becomes of either where
//! somebody is slow, leaves, breaks off or says too much.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use super::RouteTable;
use super::listen::Phase;
use super::splice::{MAX_PIPES, MIN_BYTES};
use super::tests::{Paper, Rig, certificate, head_of, simple_table, status, tls_for_http_2};

const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);
/// Enough for a pipe, with what may be read of it together with its head.
const LARGE: usize = 300_000;
/// More than the sockets between a backend and a client hold (`tcp_rmem`: 32 MiB each, where much is allowed).
const HUGE: usize = 128 << 20;

/// The body of this length: no part of one is a part of another.
fn body(length: usize) -> Vec<u8> {
    let mut numbers = Numbers(length as u64);
    let block: Vec<u8> =
        std::iter::repeat_with(|| numbers.next().to_le_bytes()).take(8_209).flatten().collect();
    let mut bytes = block.repeat(length / block.len() + 1);
    for piece in bytes.chunks_exact_mut(4_093) {
        piece[..8].copy_from_slice(&numbers.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The same from one seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Does this with each request, whose path is a number; `false` ends the connection. Counts the connections.
fn backend(
    address: SocketAddr,
    answer: impl Fn(usize, &mut TcpStream) -> io::Result<bool> + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let (count, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(answer));
    let counted = count.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let answer = answer.clone();
            std::thread::spawn(move || {
                while let Some(head) = head_of(&stream) {
                    let number = head.split(['/', ' ']).nth(2).unwrap().parse().unwrap();
                    // The proxy may have closed it.
                    if !answer(number, &mut stream).unwrap_or_default() {
                        return;
                    }
                }
            });
        }
    });
    (address, count)
}

fn says_length(stream: &mut TcpStream, length: usize) -> io::Result<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes())
}

/// As many bytes as the path says.
fn whole(length: usize, stream: &mut TcpStream) -> io::Result<bool> {
    says_length(stream, length)?;
    stream.write_all(&body(length))?;
    Ok(true)
}

fn table(web: SocketAddr) -> RouteTable {
    let mut table = simple_table(&json!({"proxy-read-timeout": "1"}), web);
    table.default_certificate = Some(certificate("a.com").into());
    table
}

fn rig(web: SocketAddr) -> Rig {
    Rig::start(&table(web))
}

fn spliced(rig: &Rig) -> u64 {
    rig.proxy.standing.stats.spliced_bytes.load(Ordering::Relaxed)
}

fn request(path: usize) -> String {
    format!("GET /{path} HTTP/1.1\r\nHost: a.com\r\n\r\n")
}

fn asking(at: SocketAddr, path: usize) -> TcpStream {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(request(path).as_bytes()).unwrap();
    stream
}

/// Reads a body of this length behind its head; what comes of it, if it ends before.
fn read_body(mut stream: &TcpStream, length: usize) -> Vec<u8> {
    let head = head_of(stream).unwrap();
    assert_eq!(status(&head), 200, "{head}");
    assert!(head.contains(&format!("content-length: {length}\r\n")), "{head}");
    let mut got = Vec::new();
    let _ = (&mut stream).take(length as u64).read_to_end(&mut got);
    got
}

/// Without printing them.
fn assert_same(got: &[u8], expected: &[u8], what: &str) {
    let at = got.iter().zip(expected).position(|(got, expected)| got != expected);
    assert!(got == expected, "{what}: {} of {} bytes, differs at {at:?}", got.len(), expected.len());
}

fn assert_comes_whole(at: SocketAddr, length: usize) {
    assert_same(&read_body(&asking(at, length), length), &body(length), "a body");
}

fn await_load(rig: &Rig, web: SocketAddr, load: usize) {
    let endpoint = rig.proxy.standing.endpoints.one(web);
    let until = Instant::now() + Duration::from_secs(5);
    while endpoint.load.load(Ordering::Relaxed) != load {
        assert!(Instant::now() < until, "the endpoint has no load of {load}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// On one connection of the client and one of the backend, some requests asked ahead.
#[test]
fn bodies_of_any_length_are_the_same_in_both_families_and_counted_to_the_byte() {
    let mut numbers = Numbers(1);
    let least = MIN_BYTES as usize;
    let edges = [least - 1, least, least + 1, least + 8_000, least + 8_191, least + 8_192, least + 8_193];
    for (address, of_rig) in [(V4, (|rig| rig.plain_6) as fn(&Rig) -> SocketAddr), (V6, |rig| rig.plain)] {
        // In pieces of any size.
        let (web, connections) = backend(address, |length, stream| {
            says_length(stream, length)?;
            let mut numbers = Numbers(length as u64);
            let whole = body(length);
            let mut rest = whole.as_slice();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((1 + numbers.below(200_000)).min(rest.len()));
                stream.write_all(piece)?;
                rest = after;
            }
            Ok(true)
        });
        let rig = rig(web);
        let paper = Paper::default();
        rig.proxy.log_to(paper.clone());
        let mut table = simple_table(&json!({}), web);
        table.observe.access_log = true;
        table.observe.nginx_metrics = true;
        rig.proxy.apply(&table);
        let mut lengths = vec![0, 1, 8_191, 300, 1 << 20, 2];
        lengths.extend(edges);
        lengths.extend((0..12).map(|_| numbers.below(3 << 20)));
        let stream = asking(of_rig(&rig), lengths[0]);
        for (number, length) in lengths.iter().enumerate() {
            if number + 1 < lengths.len() {
                (&stream).write_all(request(lengths[number + 1]).as_bytes()).unwrap();
            }
            assert_same(&read_body(&stream, *length), &body(*length), "a body");
        }
        assert_eq!(connections.load(Ordering::SeqCst), 1);
        let sum: usize = lengths.iter().sum();
        let by_copy: usize = lengths.iter().map(|length| (*length).min(least + 16_384)).sum();
        assert!(spliced(&rig) as usize >= sum - by_copy, "{} of {sum}", spliced(&rig));
        let logged: Vec<u64> =
            paper.lines(lengths.len()).iter().map(|line| line["sent_bytes"].as_u64().unwrap()).collect();
        assert_eq!(logged, lengths.iter().map(|length| *length as u64).collect::<Vec<_>>());
        let metrics = rig.proxy.metrics();
        let counted = metrics.lines().find(|line| line.contains("response_size_sum{")).unwrap();
        assert!(counted.ends_with(&format!(" {sum}")), "{counted}");
    }
}

#[test]
fn a_client_that_reads_slowly_holds_its_backend_back_and_loses_nothing() {
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    // Made before, since it takes its time.
    let whole = Arc::new(body(HUGE));
    let sent = whole.clone();
    let (web, _) = backend(V6, move |length, stream| {
        says_length(stream, length)?;
        for piece in sent.chunks(65_536) {
            stream.write_all(piece)?;
            counted.fetch_add(piece.len(), Ordering::SeqCst);
        }
        Ok(true)
    });
    let rig = rig(web);
    let client = asking(rig.plain, HUGE);
    let mut held = 0;
    // Until no more is taken for longer than a backend may be silent.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(1_500));
        let before = std::mem::replace(&mut held, written.load(Ordering::SeqCst));
        if held > 0 && held == before {
            break;
        }
    }
    assert!(held > 0 && held < HUGE, "{held} bytes wait for nobody");
    assert_same(&read_body(&client, HUGE), &whole, "a body");
}

#[test]
fn a_client_that_reads_nothing_for_too_long_is_given_up() {
    let (tell, told) = channel();
    let huge = body(HUGE);
    let (web, _) = backend(V4, move |length, stream| {
        let sent = says_length(stream, length).and_then(|()| stream.write_all(&huge));
        tell.send(sent.is_err()).unwrap();
        sent.map(|()| true)
    });
    let rig = Rig::start_for_readers(&table(web), Duration::from_secs(1));
    let clients = [asking(rig.plain, HUGE), asking(rig.plain_6, HUGE)];
    for _ in &clients {
        assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(true), "the backend was rid of its answer");
    }
    for client in &clients {
        assert!(read_body(client, HUGE).len() < HUGE);
    }
}

#[test]
fn a_client_that_leaves_ends_its_body_and_others_get_only_their_own() {
    let (tell, told) = channel();
    let huge = body(HUGE);
    let (web, _) = backend(V4, move |length, stream| {
        if length != HUGE {
            return whole(length, stream);
        }
        let sent = says_length(stream, length).and_then(|()| stream.write_all(&huge));
        tell.send(sent.is_err()).unwrap();
        sent.map(|()| true)
    });
    let rig = rig(web);
    for _ in 0..3 {
        let mut client = asking(rig.plain_6, HUGE);
        client.read_exact(&mut vec![0; 1 << 20]).unwrap();
        drop(client);
        await_load(&rig, web, 0);
        assert!(told.recv_timeout(Duration::from_secs(5)).unwrap(), "the backend sees it");
        for length in [LARGE, LARGE + 1, 3 * LARGE] {
            assert_comes_whole(rig.plain, length);
        }
    }
    assert!(spliced(&rig) > 0);
}

#[test]
fn a_body_that_ends_too_early_or_stalls_is_cut_and_never_looks_whole() {
    let (stall, until) = channel::<()>();
    let until = Mutex::new(until);
    let (web, _) = backend(V6, move |path, stream| {
        says_length(stream, LARGE)?;
        match path {
            0 => stream.write_all(&body(LARGE)[..LARGE - 1])?,
            _ => {
                stream.write_all(&body(LARGE)[..LARGE / 2])?;
                let _ = until.lock().unwrap().recv();
            }
        }
        Ok(false)
    });
    let rig = rig(web);
    let started = Instant::now();
    assert_same(&read_body(&asking(rig.plain, 0), LARGE), &body(LARGE)[..LARGE - 1], "one byte less");
    assert!(started.elapsed() < Duration::from_millis(700), "a backend that has gone is not waited for");
    let started = Instant::now();
    assert_same(&read_body(&asking(rig.plain_6, 1), LARGE), &body(LARGE)[..LARGE / 2], "a half");
    let took = started.elapsed().as_secs_f64();
    assert!((0.9..3.0).contains(&took), "proxy-read-timeout is a second: {took}");
    assert!(spliced(&rig) > 0);
    await_load(&rig, web, 0);
    drop(stall);
}

/// A pause after each piece, all together longer than the backend may be silent.
#[test]
fn a_body_that_comes_slowly_but_comes_is_whole() {
    let (web, _) = backend(V4, |length, stream| {
        says_length(stream, length)?;
        for piece in body(length).chunks(length / 6 + 1) {
            stream.write_all(piece)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(true)
    });
    let rig = rig(web);
    assert_comes_whole(rig.plain, LARGE);
    assert!(spliced(&rig) > LARGE as u64 / 2);
}

#[test]
fn what_a_backend_sends_beyond_the_length_is_nobodys() {
    let (web, connections) = backend(V4, |length, stream| {
        let mut all = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
        all.extend(body(length));
        if length == LARGE {
            all.extend_from_slice(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil");
        }
        stream.write_all(&all)?;
        Ok(true)
    });
    let rig = rig(web);
    // At once, and when all of it has come.
    for (pause, in_all) in [(Duration::ZERO, 3), (Duration::from_millis(50), 5)] {
        let client = asking(rig.plain, LARGE);
        for (asked, next) in [(LARGE, 5), (5, LARGE), (LARGE, LARGE + 7)] {
            std::thread::sleep(pause);
            (&client).write_all(request(next).as_bytes()).unwrap();
            assert_same(&read_body(&client, asked), &body(asked), "a body");
        }
        assert_same(&read_body(&client, LARGE + 7), &body(LARGE + 7), "the last body");
        let made = connections.load(Ordering::SeqCst);
        assert_eq!(made, in_all, "a connection that said too much takes no other request");
    }
    assert!(spliced(&rig) > 4 * LARGE as u64);
}

/// A gate that opens for all.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// Sends half, and the rest when the gate opens.
fn halves(address: SocketAddr, gate: &Arc<Gate>) -> SocketAddr {
    let gate = gate.clone();
    let halves = move |length: usize, stream: &mut TcpStream| {
        says_length(stream, length)?;
        let whole = body(length);
        let (half, rest) = whole.split_at(length / 2);
        stream.write_all(half)?;
        gate.pass();
        stream.write_all(rest)?;
        Ok(true)
    };
    backend(address, halves).0
}

#[test]
fn more_bodies_at_once_than_pipes_are_whole_too() {
    const MORE: usize = 8;
    let gate = Arc::new(Gate::default());
    let web = halves(V4, &gate);
    let rig = Rig::start(&simple_table(&json!({}), web));
    let length = |number: usize| LARGE + number;
    let clients: Vec<_> = (0..MAX_PIPES + MORE).map(|number| asking(rig.plain_6, length(number))).collect();
    await_load(&rig, web, clients.len());
    let half = |length: usize| (length / 2 - 32_768) as u64;
    let until = Instant::now() + Duration::from_secs(5);
    while spliced(&rig) < MAX_PIPES as u64 * half(LARGE) {
        assert!(Instant::now() < until, "{}", spliced(&rig));
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(200));
    gate.open();
    for (number, client) in clients.iter().enumerate() {
        assert_same(&read_body(client, length(number)), &body(length(number)), "one of many");
    }
    assert!(spliced(&rig) < (MAX_PIPES * (LARGE + MAX_PIPES + MORE)) as u64, "some were read and written");
    assert_comes_whole(rig.plain, LARGE);
}

#[test]
fn a_drain_waits_for_a_body_that_is_under_way() {
    let gate = Arc::new(Gate::default());
    let rig = rig(halves(V6, &gate));
    let client = asking(rig.plain_6, LARGE);
    await_spliced(&rig, LARGE as u64 / 4);
    rig.phase.send_replace(Phase::Draining);
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        Arc::weak_count(&rig.open) > 0 && Arc::strong_count(&rig.open) > 1,
        "the connection is waited for"
    );
    gate.open();
    assert_same(&read_body(&client, LARGE), &body(LARGE), "a body");
    (&client).write_all(request(LARGE).as_bytes()).unwrap();
    assert!(head_of(&client).unwrap().contains("connection: close\r\n"));
}

fn await_spliced(rig: &Rig, least: u64) {
    let until = Instant::now() + Duration::from_secs(5);
    while spliced(rig) < least {
        assert!(Instant::now() < until, "{} bytes were spliced", spliced(rig));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What is no plain body with a length between two plain connections is read and written, or has none.
#[test]
fn other_bodies_do_not_go_from_socket_to_socket() {
    let chunked = |stream: &mut TcpStream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for piece in body(LARGE).chunks(100_000) {
            stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes())?;
            stream.write_all(piece)?;
            stream.write_all(b"\r\n")?;
        }
        stream.write_all(b"0\r\n\r\n")?;
        Ok(true)
    };
    let (web, _) = backend(V4, move |path, stream| match path {
        0 => chunked(stream),
        1 => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            stream.write_all(&body(LARGE))?;
            Ok(false)
        }
        2 => says_length(stream, LARGE).map(|()| true),
        3 => {
            stream.write_all(
                format!("HTTP/1.1 304 Not Modified\r\nContent-Length: {LARGE}\r\n\r\n").as_bytes(),
            )?;
            Ok(true)
        }
        length => whole(length, stream),
    });
    let rig = rig(web);
    for path in [0, 1] {
        let got =
            asked_raw(&rig, &format!("GET /{path} HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n"));
        assert_same(&unchunked(&got), &body(LARGE), "of unknown length");
    }
    let old = asked_raw(&rig, &format!("GET /{LARGE} HTTP/1.0\r\nHost: a.com\r\n\r\n"));
    assert_same(&old, &body(LARGE), "HTTP/1.0");
    for line in ["HEAD /2", "GET /3"] {
        let got = asked_raw(&rig, &format!("{line} HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n"));
        assert_same(&got, b"", line);
    }
    assert_eq!(spliced(&rig), 0);
    assert_comes_whole(rig.plain, LARGE);
    let after = spliced(&rig);
    assert!(after > 0);
    let mut table = simple_table(&json!({"limit-rate": "2000"}), web);
    table.default_certificate = Some(certificate("a.com").into());
    rig.proxy.apply(&table);
    assert_comes_whole(rig.plain, LARGE);
    assert_eq!(spliced(&rig), after, "an answer that is held back");
}

/// The bytes after the head of the one answer.
fn asked_raw(rig: &Rig, text: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(rig.plain).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    head_of(&stream).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    got
}

fn unchunked(mut text: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let end = text.windows(2).position(|two| two == b"\r\n").expect("a size");
        let size = usize::from_str_radix(std::str::from_utf8(&text[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.extend_from_slice(&text[end + 2..end + 2 + size]);
        text = &text[end + 4 + size..];
    }
}

#[tokio::test]
async fn large_answers_over_tls_are_whole_in_either_version() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (web, _) = backend(V6, whole);
    let rig = rig(web);
    let mut config = (*super::tls::client_config(None, None, false).unwrap()).clone();
    config.alpn_protocols.clear();
    let name = rustls::pki_types::ServerName::try_from("a.com").unwrap();
    let stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    stream.write_all(request(LARGE).as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let mut got = vec![0; LARGE];
    stream.read_exact(&mut got).await.unwrap();
    assert_same(&got, &body(LARGE), "HTTP/1.1 over TLS");
    let stream = tls_for_http_2(rig.tls_6, "a.com").await;
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(format!("https://a.com/{LARGE}")).body(()).unwrap();
    let (response, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
    let mut answer = response.await.unwrap().into_body();
    let mut got = Vec::new();
    while let Some(piece) = answer.data().await {
        let piece = piece.unwrap();
        answer.flow_control().release_capacity(piece.len()).unwrap();
        got.extend_from_slice(&piece);
    }
    assert_same(&got, &body(LARGE), "HTTP/2");
    assert_eq!(spliced(&rig), 0);
}

#[test]
fn a_part_of_a_body_goes_from_socket_to_socket_too() {
    let (web, _) = backend(V4, |length, stream| {
        let head = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-299999/900000";
        stream.write_all(format!("{head}\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
        stream.write_all(&body(length))?;
        Ok(true)
    });
    let rig = rig(web);
    let mut stream = asking(rig.plain, LARGE);
    let head = head_of(&stream).unwrap();
    assert!(status(&head) == 206 && head.contains("content-range: bytes 0-299999/900000\r\n"), "{head}");
    let mut got = vec![0; LARGE];
    stream.read_exact(&mut got).unwrap();
    assert_same(&got, &body(LARGE), "a part");
    assert!(spliced(&rig) > 0);
}
