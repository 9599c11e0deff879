//! `weft dns explain`: what a pod's resolver hears for a name; `weft dns log`: what a pod asks. Both are asked of the agent of the
//! pod's node.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use weft_dns::{Explainer, Logged};
use weft_model::objects::Pod;
use weft_model::{PodKey, Snapshot};

use crate::status::ask;

/// Every name of a search path may wait for upstreams that do not answer.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Args)]
pub(crate) struct DnsArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a pod of this node hears for a name: its search path, each answer, where it comes from
    Explain(ExplainArgs),
    /// Show what a pod of this node asks from now on, and what it hears, until interrupted
    Log(LogArgs),
}

/// Whom it is about.
#[derive(Args)]
struct PodArgs {
    /// A pod on this node: NAME, or NAMESPACE/NAME
    pod: String,
    /// Namespace of a pod that is named without one
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Args)]
struct ExplainArgs {
    #[command(flatten)]
    of: PodArgs,
    /// What the pod asks for
    name: String,
}

#[derive(Args)]
struct LogArgs {
    #[command(flatten)]
    of: PodArgs,
    /// JSON: one object a line
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::status::Output,
}

pub(crate) fn run(args: &DnsArgs) -> anyhow::Result<()> {
    match &args.command {
        Command::Explain(args) => explain_to_person(args),
        Command::Log(args) => follow(args),
    }
}

impl PodArgs {
    /// Namespace and name.
    ///
    /// # Errors
    /// For what could not be either.
    fn named(&self) -> anyhow::Result<(&str, &str)> {
        let (namespace, name) = self.pod.split_once('/').unwrap_or((&self.namespace, &self.pod));
        ensure_plain(&[("namespace", namespace), ("pod", name)])?;
        Ok((namespace, name))
    }
}

/// Refuses what could not stand in a request.
fn ensure_plain(words: &[(&str, &str)]) -> anyhow::Result<()> {
    for (what, text) in words {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '*');
        anyhow::ensure!(
            !text.is_empty() && text.chars().all(plain),
            "{text:?} is no {what}: letters, digits, '-', '_' and '.' only"
        );
    }
    Ok(())
}

fn explain_to_person(args: &ExplainArgs) -> anyhow::Result<()> {
    let ExplainArgs { of, name } = args;
    let (namespace, pod) = of.named()?;
    ensure_plain(&[("name", name)])?;
    let path = format!("/dns/explain?pod={pod}&namespace={namespace}&name={name}");
    crate::print(&ask(&of.run_dir, &path, PATIENCE)?)
}

/// Between two questions for what was asked meanwhile.
const PAUSE: Duration = Duration::from_millis(300);

fn follow(args: &LogArgs) -> anyhow::Result<()> {
    let (namespace, pod) = args.of.named()?;
    let mut after = String::new();
    loop {
        let path = format!("/dns/log?pod={pod}&namespace={namespace}{after}");
        let answer = ask(&args.of.run_dir, &path, crate::status::PATIENCE)?;
        let page: Page =
            serde_json::from_str(&answer).context("the agent's answer is of another version of weft")?;
        if page.lost {
            eprintln!("weft: questions came too fast, some are missing");
        }
        let line = |entry: &Entry| match args.output {
            crate::status::Output::Text => Ok(text(entry)),
            crate::status::Output::Json => serde_json::to_string(entry),
        };
        let lines: Result<Vec<String>, _> =
            page.entries.iter().map(|entry| line(entry).map(|l| l + "\n")).collect();
        crate::print(&lines?.concat())?;
        after = format!("&after={}", page.last);
        std::thread::sleep(PAUSE);
    }
}

fn text(entry: &Entry) -> String {
    let Entry { time, transport, name, record_type, answer, microseconds, .. } = entry;
    format!("{time} {transport} {record_type:<5} {name}  {answer}  {microseconds} us")
}

/// Answer of `GET /dns/log`.
#[derive(Serialize, Deserialize)]
struct Page {
    entries: Vec<Entry>,
    last: u64,
    lost: bool,
}

/// One question of the pod.
#[derive(Serialize, Deserialize)]
struct Entry {
    /// RFC 3339, in milliseconds.
    time: String,
    client: std::net::IpAddr,
    transport: String,
    #[serde(rename = "type")]
    record_type: String,
    name: String,
    code: String,
    answer: String,
    microseconds: u64,
}

impl From<Logged> for Entry {
    fn from(logged: Logged) -> Self {
        let Logged { at, client, transport, name, record_type, code, answer, took } = logged;
        let time = jiff::Timestamp::try_from(at).map(|time| format!("{time:.3}")).unwrap_or_default();
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        Self { time, client, transport: transport.to_owned(), record_type, name, code, answer, microseconds }
    }
}

/// What the routes need: who explains, and where pods are found.
#[derive(Clone)]
pub(crate) struct Explaining {
    pub(crate) explainer: Explainer,
    pub(crate) snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
}

#[derive(Deserialize)]
struct Followed {
    pod: String,
    namespace: String,
    after: Option<u64>,
}

#[derive(Deserialize)]
struct Asked {
    pod: String,
    namespace: String,
    name: String,
}

/// The routes for the agent's Unix socket.
pub(crate) fn router(explaining: Explaining) -> Router {
    Router::new().route("/dns/explain", get(explain)).route("/dns/log", get(log)).with_state(explaining)
}

impl Explaining {
    fn pod_here(&self, namespace: &str, pod: &str) -> Result<Arc<Pod>, (StatusCode, String)> {
        let snapshot = self.snapshots.borrow().clone();
        let found = snapshot.as_ref().and_then(|s| Some((s, s.pods.get(&PodKey::new(namespace, pod))?)));
        let here = found
            .filter(|(snapshot, pod)| pod.node.as_ref() == Some(&snapshot.facts.name) && !pod.ips.is_empty());
        here.map(|(_, pod)| pod.clone()).ok_or_else(|| {
            let said =
                format!("pod {namespace}/{pod} has no address on this node; ask on the node where it runs");
            (StatusCode::NOT_FOUND, said)
        })
    }
}

async fn log(
    State(explaining): State<Explaining>,
    Query(Followed { pod, namespace, after }): Query<Followed>,
) -> Result<Json<Page>, (StatusCode, String)> {
    let found = explaining.pod_here(&namespace, &pod)?;
    if found.host_network {
        let said = format!(
            "pod {namespace}/{pod} has its node's addresses: its questions are not told from the node's"
        );
        return Err((StatusCode::UNPROCESSABLE_ENTITY, said));
    }
    let weft_dns::Page { entries, last, lost } = explaining.explainer.log(&found.ips, after);
    Ok(Json(Page { entries: entries.into_iter().map(Entry::from).collect(), last, lost }))
}

async fn explain(
    State(explaining): State<Explaining>,
    Query(Asked { pod, namespace, name }): Query<Asked>,
) -> Result<String, (StatusCode, String)> {
    let client = explaining.pod_here(&namespace, &pod)?.ips[0];
    let explained = explaining.explainer.explain(client, &namespace, &name).await;
    explained.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}
