//! The server that lab pods run: the endpoints of agnhost's netexec over HTTP (`/`, `/hostname`, `/clientip`,
//! `/echo?msg=`, `/healthz`), its words over UDP (`hostname`, `clientip`, `echo MSG`), and `/stream?bytes=N&seconds=S`,
//! which sends known content slowly. A thread a connection: small, and enough for a pod of the lab.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;

/// A request line or header line longer than this ends the connection.
const MAX_LINE_BYTES: u64 = 16 * 1024;
const MAX_HEADER_LINES: usize = 100;
/// A silent client is let go after this.
const SILENCE: Duration = Duration::from_secs(60);
const STACK_BYTES: usize = 128 * 1024;
/// Size of one piece of a stream; pieces are spread evenly over the stream's time.
const PIECE_BYTES: u64 = 4096;

/// Listens on every port with TCP and UDP and answers on threads; returns when all sockets are bound.
pub(super) fn start(hostname: &str, ports: &[u16]) -> anyhow::Result<()> {
    let hostname: Arc<str> = hostname.into();
    for &port in ports {
        let listener =
            both_families(port, TcpListener::bind).with_context(|| format!("listen on TCP {port}"))?;
        let socket = both_families(port, UdpSocket::bind).with_context(|| format!("listen on UDP {port}"))?;
        let name = Arc::clone(&hostname);
        spawn(move || serve_tcp(&listener, &name))?;
        let name = Arc::clone(&hostname);
        spawn(move || serve_udp(&socket, &name))?;
    }
    Ok(())
}

/// `weft lab netexec`: serves until it is killed.
pub(super) fn run(ports: &[u16]) -> anyhow::Result<()> {
    let hostname = nix::unistd::gethostname().context("host name")?;
    start(&hostname.to_string_lossy(), ports)?;
    loop {
        nix::unistd::pause();
    }
}

/// One socket for both families, or IPv4 alone where the kernel has no IPv6.
fn both_families<S>(port: u16, bind: impl Fn(SocketAddr) -> io::Result<S>) -> io::Result<S> {
    bind((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        _ => bind((Ipv4Addr::UNSPECIFIED, port).into()),
    })
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work).map(drop)
}

/// A peer as people know it: an IPv4 address is not shown inside IPv6.
fn peer_text(peer: SocketAddr) -> String {
    let ip = match peer.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    };
    SocketAddr::new(ip, peer.port()).to_string()
}

fn serve_udp(socket: &UdpSocket, hostname: &str) {
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        // A client that is gone already is not our concern.
        let _ =
            socket.send_to(udp_answer(text.trim_end_matches(['\r', '\n']), hostname, peer).as_bytes(), peer);
    }
}

fn udp_answer(request: &str, hostname: &str, peer: SocketAddr) -> String {
    match request.split_once(' ').unwrap_or((request, "")) {
        ("hostname" | "hostName", _) => hostname.to_owned(),
        ("clientip", _) => peer_text(peer),
        ("echo", message) => message.to_owned(),
        _ => "commands: hostname, clientip, echo MSG".to_owned(),
    }
}

fn serve_tcp(listener: &TcpListener, hostname: &Arc<str>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors: let others end before the next try.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let hostname = Arc::clone(hostname);
        // Without a thread the connection is closed, which tells the client enough.
        let _ = spawn(move || {
            let _ = serve_connection(stream, &hostname);
        });
    }
}

fn serve_connection(stream: TcpStream, hostname: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    let mut reader = BufReader::with_capacity(2048, stream);
    let request = read_line(&mut reader)?;
    for _ in 0..MAX_HEADER_LINES {
        if read_line(&mut reader)?.is_empty() {
            break;
        }
    }
    let mut stream = reader.into_inner();
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let body = match path {
        _ if !matches!(method, "GET" | "HEAD" | "POST") => {
            return respond(&mut stream, "405 Method Not Allowed", "");
        }
        "/hostname" | "/hostName" => hostname.to_owned(),
        "/clientip" => peer_text(peer),
        "/echo" => parameter(query, "msg").unwrap_or_default(),
        "/healthz" | "/readyz" => "ok".to_owned(),
        "/" => format!("NOW: {}", jiff::Timestamp::now()),
        "/stream" => return send_stream(&mut stream, query),
        _ => return respond(&mut stream, "404 Not Found", "404 page not found"),
    };
    respond(&mut stream, "200 OK", &body)
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if !line.ends_with(b"\n") {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

fn respond(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n");
    stream.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes())
}

/// One parameter of a query, percent-decoded.
fn parameter(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    Some(percent_decode(value))
}

/// RFC 3986 section 2.1, and `+` for a blank as HTML forms write it. A broken escape stands for itself.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (bytes[at], escaped) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                at += 2;
            }
            (b'+', _) => decoded.push(b' '),
            (byte, _) => decoded.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// `bytes` bytes of known content, spread over `seconds`.
fn send_stream(stream: &mut TcpStream, query: &str) -> io::Result<()> {
    let number = |name| parameter(query, name).and_then(|text| text.parse::<u64>().ok());
    let total = number("bytes").unwrap_or(1_000_000);
    let duration = Duration::from_secs(number("seconds").unwrap_or(5).min(3600));
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n";
    stream.write_all(format!("{head}Content-Length: {total}\r\n\r\n").as_bytes())?;
    let start = Instant::now();
    let mut sent = 0;
    while sent < total {
        let piece = stream_content(sent, PIECE_BYTES.min(total - sent));
        stream.write_all(&piece)?;
        sent += PIECE_BYTES.min(total - sent);
        #[allow(clippy::cast_precision_loss)] // a share of the time, not an account
        let due = start + duration.mul_f64(sent as f64 / total as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// The known content: lines of 16 bytes, each the number of its first byte, so that a lost, doubled or moved byte
/// shows. `length` bytes from `offset`.
pub(super) fn stream_content(offset: u64, length: u64) -> Vec<u8> {
    let mut content = Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 32);
    let first_line = offset / 16;
    let last_line = (offset + length).div_ceil(16);
    for line in first_line..last_line {
        content.extend_from_slice(format!("{:015}\n", line * 16 % 1_000_000_000_000_000).as_bytes());
    }
    let skip = usize::try_from(offset % 16).unwrap_or(0);
    content.drain(..skip);
    content.truncate(usize::try_from(length).unwrap_or(0));
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_port() -> u16 {
        TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port()
    }

    fn ask(address: &str, target: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    #[test]
    fn the_server_answers_over_http_in_both_families() {
        let port = free_port();
        start("pod-a", &[port]).unwrap();
        for host in ["127.0.0.1", "[::1]"] {
            let address = format!("{host}:{port}");
            assert_eq!(ask(&address, "/hostname"), "pod-a");
            assert_eq!(ask(&address, "/echo?msg=a%20b+c%"), "a b c%");
            assert!(ask(&address, "/clientip").starts_with(&format!("{host}:")));
            assert_eq!(ask(&address, "/nothing"), "404 page not found");
        }
    }

    #[test]
    fn the_server_answers_over_udp_in_both_families() {
        let port = free_port();
        start("pod-b", &[port]).unwrap();
        for host in ["127.0.0.1", "::1"] {
            let socket = UdpSocket::bind((host, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut buffer = [0; 100];
            let mut ask = |word: &str| {
                socket.send_to(word.as_bytes(), (host, port)).unwrap();
                let length = socket.recv(&mut buffer).unwrap();
                String::from_utf8_lossy(&buffer[..length]).into_owned()
            };
            assert_eq!(ask("hostname\n"), "pod-b");
            assert_eq!(ask("echo two words"), "two words");
            assert_eq!(ask("clientip"), socket.local_addr().unwrap().to_string());
        }
    }

    #[test]
    fn a_stream_is_the_known_content_whatever_the_size_of_its_pieces() {
        let whole = stream_content(0, 10_000);
        assert!(whole.starts_with(b"000000000000000\n000000000000016\n"));
        let mut pieces = Vec::new();
        while pieces.len() < whole.len() {
            let left = whole.len() - pieces.len();
            pieces.extend(stream_content(pieces.len() as u64, left.min(777) as u64));
        }
        assert_eq!(pieces, whole);
        let port = free_port();
        start("pod-c", &[port]).unwrap();
        assert_eq!(ask(&format!("[::1]:{port}"), "/stream?bytes=10000&seconds=0").as_bytes(), whole);
    }
}
