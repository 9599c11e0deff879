//! One request to a backend and its answer: endpoint, connection, retries on others, timeouts, upgrades.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;

use super::balance::{Choice, Endpoint, Loaded, choose};
use super::body::{Body, Held};
use super::compiled::{Places, Standing, Upstream};
use super::hygiene;
use super::limits::Counted;
use super::pool::{Connection, Pool, Speech, UpstreamError};
use super::upload::Upload;
use crate::annotations::{Retry, RetryOn};

/// Kept connections of one request that may turn out to be closed by the other side before that counts as a failure.
const MAX_STALE: u32 = 8;

/// What a request is forwarded with.
pub(super) struct Plan<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) standing: &'a Standing,
    pub(super) upstream: &'a Upstream,
    pub(super) choice: Choice<'a>,
    pub(super) retry: &'a Retry,
    pub(super) connect_timeout: Duration,
    /// For the backend to take a piece of the request, and to answer or go on answering.
    pub(super) send_timeout: Duration,
    pub(super) read_timeout: Duration,
    pub(super) upload: Arc<Upload>,
}

/// The answer and the endpoint that gave it.
pub(super) struct Answered {
    pub(super) response: Response<Incoming>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) held: Release,
}

/// Gives a connection back when its answer was read whole, and ends what was counted.
pub(super) struct Release {
    pool: Arc<Pool>,
    address: SocketAddr,
    speech: Speech,
    connection: Option<Connection>,
    _loaded: Loaded,
    pub(super) counted: Option<Counted>,
}

impl Held for Release {
    fn complete(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.keep(self.address, &self.speech, connection);
        }
    }
}

/// One attempt's end without an answer.
enum Failed {
    /// Nothing was sent; the request is whole.
    Unsent(Box<Request<Body>>),
    Broken,
    Timeout,
}

/// # Errors
/// 502, 503 or 504 where no endpoint gives an answer; another where the client does not send its body.
pub(super) async fn forward(plan: &Plan<'_>, head: Parts, body: Body) -> Result<Answered, StatusCode> {
    let endpoints = endpoints(&plan.upstream.places, plan.standing).await?;
    let repeatable = body.is_empty();
    let may_repeat = repeatable
        && (hygiene::is_idempotent(&head.method) || plan.retry.on.contains(&RetryOn::NonIdempotent));
    let started = Instant::now();
    let (mut tried, mut body, mut status) = (Vec::new(), Some(body), StatusCode::SERVICE_UNAVAILABLE);
    let (mut attempts, mut stale) = (0_u32, 0_u32);
    while let Some(endpoint) = choose(&endpoints, &plan.choice, &tried) {
        if attempts > 0 && !again(plan.retry, attempts, started) {
            break;
        }
        let connected =
            plan.pool.connection(endpoint.address, &plan.upstream.speech, plan.connect_timeout).await;
        let (connection, reused) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                endpoint.failed();
                tried.push(endpoint.address);
                attempts += 1;
                let (answer, condition) = of_connect(&error);
                status = answer;
                if plan.retry.on.contains(&condition) { continue } else { break }
            }
        };
        let Some(ready) = body.take().or_else(|| repeatable.then_some(Body::Empty)) else { break };
        let request = Request::from_parts(head.clone(), ready);
        match attempt(plan, connection, endpoint.clone(), request).await {
            Ok(answered) => {
                let asks = plan.retry.on.contains(&RetryOn::Status(answered.response.status().as_u16()));
                let others = tried.len() + 1 < endpoints.len();
                if asks && may_repeat && others && again(plan.retry, attempts + 1, started) {
                    tried.push(endpoint.address);
                    attempts += 1;
                    continue;
                }
                endpoint.succeeded();
                return Ok(answered);
            }
            // The endpoint closed a connection that was idle: it is asked again, on another connection.
            Err(Failed::Unsent(request)) if reused && stale < MAX_STALE => {
                stale += 1;
                body = Some(request.into_body());
            }
            Err(Failed::Broken) if reused && may_repeat && stale < MAX_STALE => stale += 1,
            Err(failed) => {
                // Not the endpoint's.
                if let Some(fault) = plan.upload.fault() {
                    return Err(fault.status());
                }
                endpoint.failed();
                tried.push(endpoint.address);
                attempts += 1;
                let (answer, condition) = match failed {
                    Failed::Timeout => (StatusCode::GATEWAY_TIMEOUT, RetryOn::Timeout),
                    Failed::Broken | Failed::Unsent(_) => (StatusCode::BAD_GATEWAY, RetryOn::Error),
                };
                status = answer;
                if let Failed::Unsent(request) = failed {
                    body = Some(request.into_body());
                } else if !may_repeat {
                    break;
                }
                if !plan.retry.on.contains(&condition) {
                    break;
                }
            }
        }
    }
    Err(status)
}

fn again(retry: &Retry, attempts: u32, started: Instant) -> bool {
    (retry.tries == 0 || attempts < retry.tries)
        && (retry.timeout.is_zero() || started.elapsed() < retry.timeout)
}

fn of_connect(error: &UpstreamError) -> (StatusCode, RetryOn) {
    match error {
        UpstreamError::ConnectTimeout(_) => (StatusCode::GATEWAY_TIMEOUT, RetryOn::Timeout),
        UpstreamError::Connect(_) | UpstreamError::Handshake(_) => (StatusCode::BAD_GATEWAY, RetryOn::Error),
    }
}

/// # Errors
/// 502 or 503 where there is none.
pub(super) async fn endpoints(
    places: &Places,
    standing: &Standing,
) -> Result<Arc<[Arc<Endpoint>]>, StatusCode> {
    match places {
        Places::Endpoints(endpoints) => Ok(endpoints.clone()),
        Places::None => Err(StatusCode::SERVICE_UNAVAILABLE),
        Places::Name(name, port) => {
            let resolved = tokio::net::lookup_host((name.as_str(), *port)).await;
            let resolved = resolved.map_err(|_| StatusCode::BAD_GATEWAY)?;
            Ok(resolved.map(|address| standing.endpoints.one(address)).collect())
        }
    }
}

async fn attempt(
    plan: &Plan<'_>,
    mut connection: Connection,
    endpoint: Arc<Endpoint>,
    request: Request<Body>,
) -> Result<Answered, Failed> {
    let loaded = Loaded::new(endpoint.clone());
    let sent = {
        let sending = connection.send(request);
        let mut sending = std::pin::pin!(sending);
        let begun = Instant::now();
        let due = || plan.upload.due(begun, plan.send_timeout, plan.read_timeout);
        loop {
            match tokio::time::timeout_at(due().into(), sending.as_mut()).await {
                Ok(sent) => break sent,
                Err(_) if due() > Instant::now() => {}
                Err(_) => return Err(Failed::Timeout),
            }
        }
    };
    match sent {
        Ok(response) => {
            plan.upload.answered();
            let held = Release {
                pool: plan.pool.clone(),
                address: endpoint.address,
                speech: plan.upstream.speech.clone(),
                connection: Some(connection),
                _loaded: loaded,
                counted: None,
            };
            Ok(Answered { response, endpoint, held })
        }
        Err((_, Some(request))) => Err(Failed::Unsent(Box::new(request))),
        Err((_, None)) => Err(Failed::Broken),
    }
}

/// The head as this backend wants it: target, version, Host.
pub(super) fn address(head: &mut Parts, speech: &Speech, target: &str, host: &str) -> Result<(), StatusCode> {
    if speech.http2 {
        let scheme = if speech.tls.is_some() { "https" } else { "http" };
        let uri = Uri::builder().scheme(scheme).authority(host).path_and_query(target).build();
        head.uri = uri.map_err(|_| StatusCode::BAD_REQUEST)?;
        head.version = Version::HTTP_2;
        head.headers.remove(header::HOST);
    } else {
        head.uri = target.parse().map_err(|_| StatusCode::BAD_REQUEST)?;
        head.version = Version::HTTP_11;
        head.headers.insert(header::HOST, HeaderValue::from_str(host).map_err(|_| StatusCode::BAD_REQUEST)?);
    }
    Ok(())
}
