//! `weft dns explain`: what a pod's resolver hears for a name, asked of the agent of the pod's node.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use clap::{Args, Subcommand};
use serde::Deserialize;
use tokio::sync::watch;
use weft_dns::Explainer;
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
}

#[derive(Args)]
struct ExplainArgs {
    /// Name of a pod on this node
    pod: String,
    /// What the pod asks for
    name: String,
    /// Namespace of the pod
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

pub(crate) fn run(args: &DnsArgs) -> anyhow::Result<()> {
    let Command::Explain(ExplainArgs { pod, name, namespace, run_dir }) = &args.command;
    for (what, text) in [("pod", pod), ("namespace", namespace), ("name", name)] {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '*');
        anyhow::ensure!(
            !text.is_empty() && text.chars().all(plain),
            "{text:?} is no {what}: letters, digits, '-', '_' and '.' only"
        );
    }
    let path = format!("/dns/explain?pod={pod}&namespace={namespace}&name={name}");
    crate::print(&ask(run_dir, &path, PATIENCE)?)
}

/// What the route needs: who explains, and where pods are found.
#[derive(Clone)]
pub(crate) struct Explaining {
    pub(crate) explainer: Explainer,
    pub(crate) snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
}

#[derive(Deserialize)]
struct Asked {
    pod: String,
    namespace: String,
    name: String,
}

/// The route for the agent's Unix socket.
pub(crate) fn router(explaining: Explaining) -> Router {
    Router::new().route("/dns/explain", get(explain)).with_state(explaining)
}

async fn explain(
    State(Explaining { explainer, snapshots }): State<Explaining>,
    Query(Asked { pod, namespace, name }): Query<Asked>,
) -> Result<String, (StatusCode, String)> {
    let snapshot = snapshots.borrow().clone();
    let found = snapshot.as_ref().and_then(|s| Some((s, s.pods.get(&PodKey::new(&namespace, &pod))?)));
    let here = found.filter(|(snapshot, pod)| pod.node.as_ref() == Some(&snapshot.facts.name));
    let client = here.and_then(|(_, pod)| pod.ips.first().copied()).ok_or_else(|| {
        let said =
            format!("pod {namespace}/{pod} has no address on this node; ask on the node where it runs");
        (StatusCode::NOT_FOUND, said)
    })?;
    let explained = explainer.explain(client, &namespace, &name).await;
    explained.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}
