//! HTTP for load balancers, on addresses that anybody may reach: one request a connection, few connections at a time, each
//! for a few seconds at most. In: a path. Out: what the given function answers.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

/// Connections of one port at a time; further ones wait.
const CONNECTIONS: usize = 32;
/// From the first byte to the last; load balancers wait less.
const PATIENCE: Duration = Duration::from_secs(5);
const REQUEST_BYTES: usize = 4096;
/// After a failed accept, such as without a free file descriptor.
const BREATH: Duration = Duration::from_millis(100);

pub(super) type Answers = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

impl Answer {
    /// 200 or 503.
    pub(super) fn json(ok: bool, body: String) -> Self {
        let headers = vec![
            ("Content-Type", "application/json".to_owned()),
            ("X-Content-Type-Options", "nosniff".to_owned()),
        ];
        Self { status: if ok { 200 } else { 503 }, headers, body }
    }

    pub(super) fn not_found() -> Self {
        Self { status: 404, headers: Vec::new(), body: "404 page not found\n".to_owned() }
    }

    #[must_use]
    pub(super) fn header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    fn text(&self, with_body: bool) -> String {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            _ => "Service Unavailable",
        };
        let headers: String =
            self.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let body = if with_body { self.body.as_str() } else { "" };
        format!(
            "HTTP/1.1 {} {reason}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.status,
            self.body.len()
        )
    }
}

/// A port that is served until the value is dropped.
pub(super) struct Serving {
    task: JoinHandle<()>,
}

impl Serving {
    pub(super) fn start(listener: TcpListener, answers: Answers) -> Self {
        Self { task: tokio::spawn(serve(listener, answers)) }
    }

    /// Returns when the port is closed.
    pub(super) async fn end(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// For ever; the connections end with it.
pub(super) async fn serve(listener: TcpListener, answers: Answers) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answers = answers.clone();
                connections.spawn(async move {
                    let _place = place;
                    // A client that goes away or never asks is nobody's business.
                    let _ = tokio::time::timeout(PATIENCE, exchange(stream, answers)).await;
                });
            }
            Err(_) => tokio::time::sleep(BREATH).await,
        }
    }
}

async fn exchange(mut stream: TcpStream, answers: Answers) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < REQUEST_BYTES {
        if stream.read_buf(&mut request).await? == 0 {
            break;
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let text = match parse(&String::from_utf8_lossy(line)) {
        Some((method, path)) => answers(path).text(method != "HEAD"),
        None => Answer { status: 400, headers: Vec::new(), body: "400 Bad Request\n".to_owned() }.text(true),
    };
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

/// Method and path of `GET /path?query HTTP/1.1`.
fn parse(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let path = target.split('?').next()?;
    (version.starts_with("HTTP/1.") && path.starts_with('/')).then_some((method, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_request_line_of_http_is_understood() {
        assert_eq!(parse("GET /healthz?full HTTP/1.1"), Some(("GET", "/healthz")));
        assert_eq!(parse("HEAD / HTTP/1.0"), Some(("HEAD", "/")));
        for wrong in ["", "GET", "GET /", "GET healthz HTTP/1.1", "\u{16}\u{3}\u{1}", "GET / SSH-2.0"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn an_answer_to_head_has_the_length_and_no_body() {
        let answer = Answer::json(false, "{}".to_owned()).header("X-Weight", "0".to_owned());
        assert_eq!(
            answer.text(false),
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
             X-Weight: 0\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
        );
        assert!(answer.text(true).ends_with("\r\n\r\n{}"));
    }
}
