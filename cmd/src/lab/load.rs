//! `weft lab load`: asks HTTP URLs all the time and prints what came of it, a JSON line a second, totals since the start:
//!
//! ```text
//! {"requests":812,"failed":0,"longest_ms":11,"first_error":null}
//! ```
//!
//! For pods: it shows whether what happens to a cluster is noticed by those who use it. It runs until it is killed.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

/// Longer than any pause that is promised to be survived.
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Args, Debug)]
pub(super) struct LoadArgs {
    mode: Mode,
    /// Such as http://echo.default/hostname
    #[arg(required = true)]
    urls: Vec<Url>,
    /// Connections to each URL
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Pause of a connection between an answer and the next request
    #[arg(long, default_value_t = 20)]
    pause_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Ask on the same connections again and again; one that breaks is a failure, and is made anew
    Keep,
    /// Make a connection for every request, looking the name up each time
    New,
}

#[derive(Clone, Debug)]
struct Url {
    authority: String,
    path: String,
}

#[derive(Default)]
struct Totals {
    requests: u64,
    failed: u64,
    longest: Duration,
    first_error: Option<String>,
}

pub(super) fn run(args: &LoadArgs) -> anyhow::Result<()> {
    let totals = &Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for url in args.urls.iter().flat_map(|url| std::iter::repeat_n(url, args.connections)) {
            scope.spawn(move || ask_forever(args, url, totals));
        }
        loop {
            std::thread::sleep(Duration::from_secs(1));
            crate::print(&format!("{}\n", report(&locked(totals))))?;
        }
    })
}

impl std::str::FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix("http://").ok_or(format!("{text} does not begin with http://"))?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Self { authority, path: format!("/{path}") })
    }
}

fn ask_forever(args: &LoadArgs, url: &Url, totals: &Mutex<Totals>) {
    let mut kept = None;
    loop {
        let asked_at = Instant::now();
        let outcome = ask(&mut kept, url);
        if args.mode == Mode::New || outcome.is_err() {
            kept = None;
        }
        count(&mut locked(totals), asked_at.elapsed(), outcome);
        std::thread::sleep(Duration::from_millis(args.pause_ms));
    }
}

/// One request on the kept connection, or on a new one.
fn ask(kept: &mut Option<BufReader<TcpStream>>, url: &Url) -> Result<(), Error> {
    let connection = match kept {
        Some(connection) => connection,
        None => kept.insert(BufReader::new(connect(&url.authority)?)),
    };
    let request = format!("GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", url.path, url.authority);
    connection.get_mut().write_all(request.as_bytes())?;
    let mut status = String::new();
    if connection.read_line(&mut status)? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let mut length = 0;
    loop {
        let mut header = String::new();
        connection.read_line(&mut header)?;
        match header.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().map_err(|_| ErrorKind::InvalidData)?;
            }
            Some(_) => {}
            None => break,
        }
    }
    std::io::copy(&mut connection.take(length), &mut std::io::sink())?;
    if status.split(' ').nth(1) == Some("200") { Ok(()) } else { Err(Error::other(status.trim_end())) }
}

fn connect(authority: &str) -> Result<TcpStream, Error> {
    let address = authority.to_socket_addrs()?.next().ok_or(ErrorKind::NotFound)?;
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn count(totals: &mut Totals, took: Duration, outcome: Result<(), Error>) {
    totals.requests += 1;
    totals.longest = totals.longest.max(took);
    if let Err(error) = outcome {
        totals.failed += 1;
        totals.first_error.get_or_insert_with(|| error.to_string());
    }
}

fn report(totals: &Totals) -> serde_json::Value {
    let Totals { requests, failed, longest, first_error } = totals;
    serde_json::json!({
        "requests": requests, "failed": failed, "longest_ms": longest.as_millis(), "first_error": first_error
    })
}

fn locked(totals: &Mutex<Totals>) -> std::sync::MutexGuard<'_, Totals> {
    totals.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::*;

    /// Answers the given requests on one connection, then hangs up.
    fn server(answers: &'static [&'static str]) -> (Url, std::thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/x", listener.local_addr().unwrap()).parse().unwrap();
        let serve = move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            for answer in answers {
                let mut line = String::new();
                while stream.read_line(&mut line).unwrap() > 2 {
                    line.clear();
                }
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        };
        (url, std::thread::spawn(serve))
    }

    #[test]
    fn a_connection_is_kept_until_it_breaks_and_the_break_is_a_failure() {
        const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        let (url, serving) = server(&[OK, OK]);
        let mut kept = None;
        assert!(ask(&mut kept, &url).is_ok());
        assert!(ask(&mut kept, &url).is_ok(), "on the same connection");
        serving.join().unwrap();
        assert!(ask(&mut kept, &url).is_err(), "the server hung up");
    }

    #[test]
    fn an_answer_other_than_200_is_a_failure_with_its_status() {
        let (url, serving) = server(&["HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n"]);
        let error = ask(&mut None, &url).unwrap_err();
        assert_eq!(error.to_string(), "HTTP/1.1 503 Unavailable");
        serving.join().unwrap();
    }

    #[test]
    fn a_url_without_port_is_of_port_80() {
        let authority = |text: &str| text.parse::<Url>().map(|url| url.authority);
        assert_eq!(authority("http://echo.default/hostname").as_deref(), Ok("echo.default:80"));
        assert_eq!(authority("http://[fd00::1]/").as_deref(), Ok("[fd00::1]:80"));
        assert_eq!(authority("http://[fd00::1]:8080").as_deref(), Ok("[fd00::1]:8080"));
        assert!(authority("https://echo").is_err());
    }
}
