//! Requests: as many as h2load can (Debian's nghttp2-client), or at a fixed rate, or none on many connections.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::OTHER_CORE;

/// What h2load says at its end.
pub(super) struct Said {
    pub(super) done: f64,
    pub(super) per_second: f64,
    /// Answers other than 2xx, and requests without one.
    pub(super) failed: f64,
}

/// `options` are h2load's own, of HTTP/1.1 with `--h1`; the requests go to `address`, whatever `url` names.
pub(super) fn h2load(address: SocketAddr, options: &[&str], urls: &[String]) -> anyhow::Result<Said> {
    let output = Command::new("taskset")
        .args(["--cpu-list", OTHER_CORE, "h2load", &format!("--connect-to={address}")])
        .args(options)
        .args(urls)
        .stdin(Stdio::null())
        .output()
        .context("run h2load (Debian's nghttp2-client)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    said(&text).with_context(|| format!("h2load said: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// ```text
/// finished in 1.00s, 106973.00 req/s, 20.51MB/s
/// requests: 106973 total, 107037 started, 106973 done, 106973 succeeded, 0 failed, 0 errored, 0 timeout
/// ```
fn said(text: &str) -> Option<Said> {
    let number = |word: &str| word.parse::<f64>().ok();
    let finished = text.lines().find_map(|line| line.strip_prefix("finished in "))?;
    let per_second = number(finished.split(", ").nth(1)?.strip_suffix(" req/s")?)?;
    let requests = text.lines().find_map(|line| line.strip_prefix("requests: "))?;
    let of = |what: &str| requests.split(", ").find_map(|part| number(part.strip_suffix(what)?.trim()));
    let codes = text.lines().find_map(|line| line.strip_prefix("status codes: "))?;
    let others = codes.split(", ").filter(|part| !part.ends_with(" 2xx"));
    let others: f64 = others.filter_map(|part| number(part.split(' ').next()?)).sum();
    Some(Said {
        done: of("done")?,
        per_second,
        failed: of("failed")? + of("errored")? + of("timeout")? + others,
    })
}

fn request(host: &str, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: weft-bench\r\n\r\n").into_bytes()
}

/// One request and its whole answer, which must be 200 with a length; the bytes of the answer.
pub(super) fn ask(mut stream: &TcpStream, host: &str, path: &str) -> anyhow::Result<usize> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&request(host, path))?;
    let (mut answer, mut piece) = (Vec::new(), [0; 16 * 1024]);
    loop {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "the connection ended");
        answer.extend_from_slice(&piece[..read]);
        if let Some(length) = answer_length(&answer)? {
            ensure!(answer.len() <= length, "more than an answer");
            if answer.len() == length {
                return Ok(length);
            }
        }
    }
}

/// Head and body, once the head is there.
fn answer_length(answer: &[u8]) -> anyhow::Result<Option<usize>> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    Ok(Some(end + 4 + length.context("no length")?.trim().parse::<usize>()?))
}

/// Connections on which one request was answered, and that stay.
pub(super) fn idle(address: SocketAddr, host: &str, count: usize) -> anyhow::Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let stream = TcpStream::connect(address)?;
            ask(&stream, host, "/p0")?;
            Ok(stream)
        })
        .collect()
}

/// Milliseconds from the moment that each request was due, at `per_second` for `duration` over so many connections; one that found no
/// connection free has waited since then, too. Every answer has the same length.
pub(super) fn latencies(
    address: SocketAddr,
    host: &str,
    (per_second, duration, connections): (f64, Duration, usize),
) -> anyhow::Result<Vec<f64>> {
    let streams = idle(address, host, connections)?;
    let mut length = 0;
    for stream in &streams {
        length = ask(stream, host, "/p0")?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
    }
    // When a connection's request was due, and bytes of the answer that are missing still.
    let mut busy: Vec<Option<(Instant, usize)>> = vec![None; connections];
    let mut waiting: Vec<_> =
        streams.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)).collect();
    let request = request(host, "/p0");
    let pause = Duration::from_secs_f64(1.0 / per_second);
    let count = (per_second * duration.as_secs_f64()) as u32;
    let (mut sent, mut took, mut free) = (0, Vec::new(), (0..connections).collect::<Vec<_>>());
    let (started_at, mut piece) = (Instant::now(), vec![0; 16 * 1024]);
    while took.len() < count as usize {
        ensure!(started_at.elapsed() < duration * 4, "{} of {count} answers in time", took.len());
        while sent < count && Instant::now() >= started_at + pause * sent {
            let Some(number) = free.pop() else { break };
            (&streams[number]).write_all(&request)?;
            busy[number] = Some((started_at + pause * sent, length));
            sent += 1;
        }
        // It never sleeps: a timer would wake it too late for what is due.
        if poll(&mut waiting, PollTimeout::ZERO)? == 0 {
            continue;
        }
        for (number, _) in waiting.iter().enumerate().filter(|(_, waits)| waits.any() == Some(true)) {
            let (due, missing) = busy[number].as_mut().context("an answer that nobody asked for")?;
            match (&streams[number]).read(&mut piece) {
                Ok(read) if read == 0 || read > *missing => anyhow::bail!("no whole answer: {read}"),
                Ok(read) => *missing -= read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if *missing == 0 {
                took.push(due.elapsed().as_secs_f64() * 1e3);
                busy[number] = None;
                free.push(number);
            }
        }
    }
    Ok(took)
}
