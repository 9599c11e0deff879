//! How the agent speaks to the processes beside it (tunnel, ingress): HTTP/1.1 over a Unix socket, one request a connection. Each
//! takes `POST /apply`, which makes it read its document anew -> 204, or 500 with the reason.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(2);
/// Request line and headers together.
const MAX_REQUEST_BYTES: u64 = 16 * 1024;

pub struct Response {
    pub status: u16,
    pub body: String,
}

/// Binds the socket, replacing what a process that died left there. Makes the folder: after a reboot the process may come
/// before the agent.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Answers requests one after another; ends when the socket fails.
pub fn serve(listener: &UnixListener, answer: impl Fn(&str, &str) -> Response) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = answer_one(&stream, &answer) {
            tracing::debug!(%error, "control connection");
        }
    }
}

fn answer_one(stream: &UnixStream, answer: impl Fn(&str, &str) -> Response) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut reader = BufReader::new(stream).take(MAX_REQUEST_BYTES);
    let mut request_line = String::new();
    reader.read_line(&mut request_line)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 0 && !header.trim().is_empty() {
        header.clear();
    }
    let mut words = request_line.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let Response { status, body } = answer(method, path);
    let text = match status {
        200 => "OK",
        204 => "No Content",
        404 => "Not Found",
        _ => "Internal Server Error",
    };
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status} {text}\r\nConnection: close\r\n")?;
    if status == 204 {
        return write!(stream, "\r\n");
    }
    write!(stream, "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// One request to such a socket, as the agent sends it; returns the body of a 2xx answer.
///
/// Errors: nobody listens (`NotFound`, `ConnectionRefused`), or it answered with a failure (`Other`, its text).
pub fn request(socket: &Path, method: &str, path: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: weft\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let ok = head.split_whitespace().nth(1).is_some_and(|status| status.starts_with('2'));
    if ok { Ok(body.to_owned()) } else { Err(io::Error::other(body.to_owned())) }
}
