//! `weft status`: what the agent of this node says of itself, for people or as JSON.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use weft_model::wireguard::{PeerCandidate, PeerView};
use weft_model::{Health, Report};
use weft_netstack::admin::Status;

/// How long the agent may take to say what it does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub(crate) struct StatusArgs {
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Text,
    Json,
}

pub(crate) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    if args.output == Output::Json {
        return crate::print(&(answer(&args.run_dir)? + "\n"));
    }
    crate::print(&text(&read(&args.run_dir)?))
}

/// What the agent whose socket is in `run_dir` says of itself now.
pub(crate) fn read(run_dir: &Path) -> anyhow::Result<Status> {
    serde_json::from_str(&answer(run_dir)?).context("the agent's answer is of another version of weft")
}

fn answer(run_dir: &Path) -> anyhow::Result<String> {
    ask(run_dir, "/status", PATIENCE)
}

/// What the agent whose socket is in `run_dir` answers to `GET path`.
pub(crate) fn ask(run_dir: &Path, path: &str, patience: Duration) -> anyhow::Result<String> {
    request(run_dir, "GET", path, patience)
}

/// As [`ask`], for what the agent is to do.
pub(crate) fn tell(run_dir: &Path, path: &str, patience: Duration) -> anyhow::Result<String> {
    request(run_dir, "POST", path, patience)
}

fn request(run_dir: &Path, method: &str, path: &str, patience: Duration) -> anyhow::Result<String> {
    let socket = run_dir.join("agent.sock");
    fetch(&socket, method, path, patience).map_err(|error| match error.is::<Refused>() {
        true => error,
        false => error.context(format!(
            "no agent answers on {}; is 'weft agent' running on this node?",
            socket.display()
        )),
    })
}

/// Body of the answer over a Unix socket; HTTP/1.0, so the answer ends with the connection. What the agent refuses is an error.
fn fetch(socket: &Path, method: &str, path: &str, patience: Duration) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: weft\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        Some("400" | "404" | "409" | "422" | "500") if !body.is_empty() => {
            Err(Refused(body.trim_end().to_owned()).into())
        }
        _ => anyhow::bail!("{}", head.lines().next().unwrap_or_default()),
    }
}

/// The agent's own sentence about what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

pub(crate) fn text(status: &Status) -> String {
    let mut lines = vec![
        format!("node        {}  (weft {})", status.node, status.version),
        format!("ready       {}", if status.ready { "yes" } else { "no" }),
    ];
    lines.extend(status.reasons.iter().map(|reason| format!("  because: {reason}")));
    lines.extend([
        format!("API server  {}", status.api_server),
        format!(
            "snapshot    {}{}",
            status.generation,
            if status.from_store { "  (last good one from disk)" } else { "" }
        ),
        format!("memory      {:.1} MiB", status.resident_bytes as f64 / 1024.0 / 1024.0),
        String::new(),
        loops(&status.loops).to_string(),
    ]);
    for report in &status.loops {
        lines.extend(report.details.iter().map(|(name, value)| format!("{} {name}: {value}", report.name)));
        lines.extend(report.failures.iter().map(|failure| format!("{} FAILED: {failure}", report.name)));
        lines.extend(report.problems.iter().map(|problem| format!("{} problem: {problem}", report.name)));
    }
    lines.extend(status.problems.iter().map(|problem| format!("problem: {problem}")));
    lines.extend(
        status.parts.get("observe").and_then(|part| part.as_str()).map(|text| format!("observe: {text}")),
    );
    let health = status.parts.get("proxy health").and_then(|part| part.as_str());
    lines.extend(health.map(|text| format!("proxy health: {text}")));
    let metrics = status.parts.get("dns metrics").and_then(|part| part.as_str());
    lines.extend(metrics.map(|text| format!("dns metrics: {text}")));
    lines.extend(
        status.parts.get("policy").and_then(|part| part.as_str()).map(|text| format!("policy: {text}")),
    );
    lines.extend(status.parts.get("cni").and_then(|part| part.as_str()).map(|text| format!("cni: {text}")));
    lines.extend(
        status.parts.get("writer").and_then(|part| part.as_str()).map(|text| format!("writer: {text}")),
    );
    let rotation = status.parts.get("key rotation").and_then(|part| part.as_str());
    let running = rotation.filter(|text| !text.is_empty());
    lines.extend(running.map(|text| format!("key rotation: {text}")));
    lines.extend(status.parts.get("peers").map(peers));
    lines.join("\n") + "\n"
}

/// A table of the overlay's peers, or the reason why there is none.
fn peers(part: &serde_json::Value) -> String {
    let Ok(peers) = serde_json::from_value::<Vec<PeerView>>(part.clone()) else {
        return format!("peers: {}", part.as_str().unwrap_or("unknown"));
    };
    if peers.is_empty() {
        return "peers: none".to_owned();
    }
    let mut table = Table::new();
    let header = ["NODE", "ENDPOINT", "OR ELSE", "HANDSHAKE", "RECEIVED", "SENT", "KEY"];
    table.load_preset(presets::NOTHING).set_header(header);
    let mut notes = String::new();
    for peer in peers {
        let node = peer.node.clone().unwrap_or_else(|| "unknown".to_owned());
        if let Some(bytes) = peer.narrow_path_bytes {
            notes.push_str(&format!("\npeer {node}: packets of more than {bytes} bytes do not reach it"));
        }
        let (endpoint, others) = whereabouts(&peer);
        let status = peer.status;
        table.add_row([
            node,
            endpoint,
            others,
            status
                .last_handshake_seconds
                .map_or_else(|| "none yet".to_owned(), |seconds| format!("{seconds} s ago")),
            format!("{} B", status.received_bytes),
            format!("{} B", status.sent_bytes),
            status.public_key.to_string(),
        ]);
    }
    format!("\n{table}{notes}")
}

/// Where the peer is and why, and where else it would be called.
fn whereabouts(peer: &PeerView) -> (String, String) {
    let text = |candidate: &PeerCandidate| format!("{} ({})", candidate.endpoint, candidate.kind);
    let Some(endpoint) = peer.status.endpoint else { return ("unknown".to_owned(), String::new()) };
    let (here, others): (Vec<_>, Vec<_>) =
        peer.candidates.iter().partition(|candidate| candidate.endpoint == endpoint);
    let here = here.first().map_or_else(|| format!("{endpoint} (called from there)"), |here| text(here));
    (here, others.into_iter().map(text).collect::<Vec<_>>().join(", "))
}

/// A table stays readable; JSON has the whole text.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 72;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

fn loops(reports: &[Report]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "LOOP",
        "HEALTH",
        "APPLIED",
        "PASSES",
        "LAST PASS",
        "LAST CHANGE",
    ]);
    for report in reports {
        let health = match report.health() {
            Health::Starting => "starting",
            Health::Ok => "ok",
            Health::Failing => "failing",
        };
        table.add_row([
            report.name.clone(),
            health.to_owned(),
            report.generation.to_string(),
            report.passes.to_string(),
            format!("{} us", report.last_pass_micros),
            shortened(report.last_change.as_deref().unwrap_or_default()),
        ]);
    }
    table
}
