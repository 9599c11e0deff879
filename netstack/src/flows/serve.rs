//! `GET /flows?pod=..&namespace=..&verdict=..&port=..&after=..&last=..` on the agent's socket: a [`super::Page`] as JSON.

use axum::extract::{Query as Parameters, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};

use super::{Page, Query, Recorded};

pub fn router(recorded: Recorded) -> Router {
    Router::new().route("/flows", get(page)).with_state(recorded)
}

async fn page(State(recorded): State<Recorded>, Parameters(query): Parameters<Query>) -> Json<Page> {
    Json(recorded.page(&query))
}

/// Where nothing is recorded.
pub fn refusal(reason: &'static str) -> Router {
    Router::new().route("/flows", get(move || async move { (StatusCode::NOT_FOUND, reason) }))
}
