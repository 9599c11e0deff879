//! What the node says of itself: `/status` for the CLI, `/metrics`, `/healthz` and `/readyz` for machines.
//!
//! In flow handles of the loops and closures that read a part's state; out flow JSON and Prometheus text. Nothing here
//! decides or changes anything.

mod metrics;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use weft_model::{Generation, Health, NodeName, Report, Snapshot};

use crate::reconcile::LoopHandle;

pub use metrics::{Collect, Counters};

/// The answer of `GET /status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub node: NodeName,
    pub version: String,
    /// Pods can come, every loop has applied a Snapshot and none is failing.
    pub ready: bool,
    /// Why it is not ready, a line each with the remedy; empty when it is.
    pub reasons: Vec<String>,
    pub generation: Generation,
    /// The Snapshot's cluster part is the last good one from disk; the API server has not been seen yet.
    pub from_store: bool,
    /// `connected`, or since when and why not.
    pub api_server: String,
    /// Resident memory of the agent in bytes.
    pub resident_bytes: u64,
    pub loops: Vec<Report>,
    /// Objects that could not be read at all.
    pub problems: Vec<String>,
    /// Further parts, each in its own shape; `peers` is a list of `weft_model::wireguard::PeerStatus` or why there is none.
    pub parts: serde_json::Map<String, serde_json::Value>,
}

pub type Read<T> = Box<dyn Fn() -> T + Send + Sync>;

/// Everything that is shown, with the handles to read it.
pub struct Admin {
    pub node: NodeName,
    pub version: &'static str,
    pub loops: Vec<LoopHandle>,
    pub snapshot_rx: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What keeps pods away, a line each with the remedy.
    pub obstacles: Read<Vec<String>>,
    pub api_server: Read<String>,
    pub parts: Vec<(&'static str, Read<serde_json::Value>)>,
    pub counters: Vec<Counters>,
    pub collectors: Vec<Collect>,
    /// Families of the processes beside the agent: OpenMetrics text without its end, empty while one is away.
    pub texts: Vec<Read<String>>,
}

impl Admin {
    pub fn status(&self) -> Status {
        let snapshot = self.snapshot_rx.borrow().clone();
        let loops: Vec<Report> = self.loops.iter().map(LoopHandle::report).collect();
        let reasons = self.reasons(&loops);
        Status {
            node: self.node.clone(),
            version: self.version.to_owned(),
            ready: reasons.is_empty(),
            reasons,
            generation: snapshot.as_ref().map_or(Generation(0), |s| s.generation),
            from_store: snapshot.as_ref().is_some_and(|s| s.from_store),
            api_server: (self.api_server)(),
            resident_bytes: metrics::resident_bytes(),
            loops,
            problems: snapshot
                .map(|s| s.problems.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            parts: self.parts.iter().map(|(name, read)| ((*name).to_owned(), read())).collect(),
        }
    }

    /// A loop that waits for what an obstacle keeps away adds nothing, nor does one whose failure is the obstacle.
    fn reasons(&self, loops: &[Report]) -> Vec<String> {
        let mut reasons = (self.obstacles)();
        let blocked = !reasons.is_empty();
        let known = reasons.concat();
        let behind = loops.iter().filter_map(|report| match (report.health(), report.failures.first()) {
            (Health::Ok, _) => None,
            (_, Some(failure)) => (!known.contains(failure)).then(|| format!("{}: {failure}", report.name)),
            (_, None) => (!blocked).then(|| format!("{}: no Snapshot applied yet", report.name)),
        });
        reasons.extend(behind);
        reasons
    }
}

/// Routes for the agent's Unix socket.
pub fn status_router(admin: Arc<Admin>) -> Router {
    Router::new().route("/status", get(status)).with_state(admin)
}

/// The route `/metrics` alone, for listeners that others may reach.
pub fn metrics_router(admin: Arc<Admin>) -> Router {
    Router::new().route("/metrics", get(metrics_text)).with_state(admin)
}

/// Routes for the loopback listener: `/metrics`, `/healthz`, `/readyz`.
pub fn observe_router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(admin)
}

/// Off the async threads: parts may ask other processes and wait for them.
async fn status(State(admin): State<Arc<Admin>>) -> Response {
    match tokio::task::spawn_blocking(move || admin.status()).await {
        Ok(status) => axum::Json(status).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    let loops: Vec<Report> = admin.loops.iter().map(LoopHandle::report).collect();
    let reasons = admin.reasons(&loops);
    if reasons.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
}

/// Off the async threads, as the status.
async fn metrics_text(State(admin): State<Arc<Admin>>) -> Response {
    let encoded =
        tokio::task::spawn_blocking(move || metrics::encode(&admin).map_err(|error| error.to_string()));
    match encoded.await.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

#[cfg(test)]
mod tests;
