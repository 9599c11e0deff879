//! `POST /cni/{add,del,check,status,gc}` and `GET /ipam`, `/ipam/ADDRESS` on the agent's Unix socket. Bodies of CNI: [`CniRequest`] in, the very text that the
//! plugin prints out. Status 200 for success, 409 for a CNI error.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::Value;
use weft_plugin::wire::{CniError, CniRequest, Code, NEWEST_VERSION};

use super::{Caller, Cni};

/// To be merged into the router of `/run/weft/agent.sock`, which is to be served with connect info of [`Caller`].
pub fn router(cni: Arc<Cni>) -> Router {
    Router::new()
        .route("/cni/add", post(add))
        .route("/cni/del", post(del))
        .route("/cni/check", post(check))
        .route("/cni/status", post(status))
        .route("/cni/gc", post(gc))
        .route("/ipam", get(account))
        .route("/ipam/{address}", get(explain))
        .with_state(cni)
}

async fn account(State(cni): State<Arc<Cni>>) -> Response {
    Json(cni.account()).into_response()
}

async fn explain(State(cni): State<Arc<Cni>>, Path(address): Path<IpAddr>) -> Response {
    (cni.explain(address).join("\n") + "\n").into_response()
}

async fn add(
    State(cni): State<Arc<Cni>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Json(request): Json<CniRequest>,
) -> Response {
    operate(request, |request, version| async move {
        let added = cni.add(&request, &caller).await;
        log("ADD", &request, added.as_ref().err());
        added.map(|result| Some(result.render(version)))
    })
    .await
}

async fn del(
    State(cni): State<Arc<Cni>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Json(request): Json<CniRequest>,
) -> Response {
    operate(request, |request, _| async move {
        let deleted = cni.del(&request, &caller).await;
        log("DEL", &request, deleted.as_ref().err());
        deleted.map(|()| None)
    })
    .await
}

async fn check(State(cni): State<Arc<Cni>>, Json(request): Json<CniRequest>) -> Response {
    operate(request, |request, _| async move { cni.check(&request).await.map(|()| None) }).await
}

async fn status(State(cni): State<Arc<Cni>>, Json(request): Json<CniRequest>) -> Response {
    operate(request, |_, _| async move { cni.status().map(|()| None) }).await
}

async fn gc(
    State(cni): State<Arc<Cni>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Json(request): Json<CniRequest>,
) -> Response {
    operate(request, |request, _| async move {
        let collected = cni.gc(&request, &caller).await;
        log("GC", &request, collected.as_ref().err());
        collected.map(|()| None)
    })
    .await
}

/// In a task of its own: a plugin that is killed half-way must not leave half an ADD behind.
async fn operate<F, R>(request: CniRequest, operation: F) -> Response
where
    F: FnOnce(CniRequest, &'static str) -> R,
    R: Future<Output = Result<Option<Value>, CniError>> + Send + 'static,
{
    let version = match request.version() {
        Ok(version) => version,
        Err(error) => return answer(NEWEST_VERSION, Err(error)),
    };
    let outcome = tokio::spawn(operation(request, version)).await;
    let outcome = outcome.unwrap_or_else(|error| {
        Err(CniError::new(Code::TryAgainLater, format!("the agent failed inside: {error}")))
    });
    answer(version, outcome)
}

fn answer(version: &str, outcome: Result<Option<Value>, CniError>) -> Response {
    match outcome {
        Ok(Some(result)) => Json(result).into_response(),
        Ok(None) => StatusCode::OK.into_response(),
        Err(error) => (StatusCode::CONFLICT, Json(error.render(version))).into_response(),
    }
}

fn log(verb: &str, request: &CniRequest, error: Option<&CniError>) {
    let pod = request.args.get("K8S_POD_NAME").map_or("", String::as_str);
    let namespace = request.args.get("K8S_POD_NAMESPACE").map_or("", String::as_str);
    let container = request.container_id.as_str();
    match error {
        None => tracing::info!(verb, namespace, pod, container, "CNI"),
        Some(error) => tracing::warn!(verb, namespace, pod, container, error = %error, "CNI"),
    }
}
