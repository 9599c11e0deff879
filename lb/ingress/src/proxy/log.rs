//! The access log: one JSON object a request on standard output, where the table asks for it. Proxy threads hand lines to one
//! writer and never wait for it; what it cannot take in time is counted and lost.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use http::{Method, StatusCode, Version};
use serde::Serialize;

use super::stats::{Finished, RouteStats, Stats};

/// Lines that wait for the writer.
const QUEUE: usize = 4096;

/// What is known of a request when its head was read.
#[derive(Serialize)]
pub(super) struct Line {
    /// RFC 3339, when the head was read.
    pub(super) time: String,
    pub(super) client: IpAddr,
    pub(super) method: String,
    pub(super) host: String,
    /// Path and query as the client wrote them.
    pub(super) target: String,
    pub(super) protocol: &'static str,
    pub(super) https: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) referer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user_agent: Option<String>,
}

/// The whole line.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    line: &'a Line,
    status: u16,
    received_bytes: u64,
    sent_bytes: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingress: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<SocketAddr>,
}

/// Whoever writes lines.
#[derive(Clone)]
pub(super) struct AccessLog(SyncSender<String>);

impl AccessLog {
    /// Lines go to `out`, from a thread of their own that ends with the last sender.
    pub(super) fn start(out: impl std::io::Write + Send + 'static) -> std::io::Result<Self> {
        let (sender, lines) = sync_channel(QUEUE);
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || write_all(&lines, out))?;
        Ok(Self(sender))
    }
}

/// Written out whenever no further line waits.
fn write_all(lines: &Receiver<String>, out: impl std::io::Write) {
    let mut out = std::io::BufWriter::with_capacity(64 * 1024, out);
    while let Ok(first) = lines.recv() {
        let mut waiting = std::iter::once(first).chain(lines.try_iter());
        let written = waiting.try_for_each(|line| out.write_all(line.as_bytes()));
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::warn!(%error, "the access log cannot be written");
        }
    }
}

/// Follows one request to the last byte of its answer; dropped, it is counted and logged.
pub(super) struct Record {
    pub(super) stats: Arc<Stats>,
    pub(super) route: Option<Arc<RouteStats>>,
    pub(super) line: Option<(Box<Line>, AccessLog)>,
    pub(super) started: std::time::Instant,
    pub(super) method: Method,
    pub(super) status: StatusCode,
    pub(super) canary: bool,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
}

impl Drop for Record {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        if let Some(route) = &self.route {
            route.count(&Finished {
                method: &self.method,
                status: self.status,
                canary: self.canary,
                took,
                received_bytes: self.received_bytes,
                sent_bytes: self.sent_bytes,
            });
        }
        let Some((line, log)) = self.line.take() else { return };
        let labels = self.route.as_ref().map(|route| route.labels());
        let written = Written {
            line: &line,
            status: self.status.as_u16(),
            received_bytes: self.received_bytes,
            sent_bytes: self.sent_bytes,
            seconds: (took.as_secs_f64() * 1e6).round() / 1e6,
            namespace: labels.map(|labels| &*labels.ingress.namespace),
            ingress: labels.map(|labels| &*labels.ingress.name),
            service: labels.map(|labels| labels.service.as_str()).filter(|service| !service.is_empty()),
            endpoint: self.endpoint,
        };
        let text = serde_json::to_string(&written).map(|text| text + "\n");
        if text.map(|text| log.0.try_send(text).is_ok()).is_ok_and(|sent| sent) {
            return;
        }
        self.stats.lines_lost.fetch_add(1, Ordering::Relaxed);
    }
}

pub(super) fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2.0",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}
