//! One request to a backend and its answer: endpoint, connection, retries on others, timeouts, upgrades.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::client::conn::http2;

use super::balance::{Choice, Endpoint, Loaded, choose};
use super::body::Body;
use super::compiled::{Places, Standing, Upstream};
use super::exchange::{Answer, ExchangeError};
use super::hygiene::{self, Told};
use super::limits::Counted;
use super::pool::{Connection, Pool, Speech, UpstreamError};
use super::upload::{Deadline, Upload};
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
    pub(super) upload: Upload,
    /// What is to be said of the client and does not stand among the fields of the request.
    pub(super) told: Option<Told<'a>>,
}

/// The answer and the endpoint that gave it.
pub(super) struct Answered {
    pub(super) response: Response<Answer>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) held: Release,
}

/// Gives a connection back when its answer was read whole, and ends what was counted.
pub(super) struct Release {
    pool: Arc<Pool>,
    address: SocketAddr,
    speech: Speech,
    _loaded: Loaded,
    pub(super) counted: Option<Counted>,
}

impl Release {
    /// Nobody reads on: what was read to its end leaves its connection for the next request.
    pub(super) fn end(&self, answer: &mut Answer) {
        if let Some(connection) = answer.release() {
            self.pool.keep(self.address, &self.speech, connection);
        }
    }
}

/// One attempt's end without an answer.
enum Failed {
    /// Nothing was sent; the body is whole.
    Unsent(Body),
    /// The connection ended without a word.
    Silent,
    Broken,
    Timeout,
}

/// # Errors
/// 502, 503 or 504 where no endpoint gives an answer; another where the client does not send its body.
pub(super) async fn forward(plan: &Plan<'_>, head: &Parts, body: Body) -> Result<Answered, StatusCode> {
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
        let connected = plan
            .pool
            .connection(endpoint.address, &plan.upstream.speech, plan.connect_timeout, may_repeat)
            .await;
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
        match attempt(plan, connection, endpoint.clone(), (head, ready)).await {
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
            Err(Failed::Unsent(whole)) if reused && stale < MAX_STALE => {
                stale += 1;
                body = Some(whole);
            }
            Err(Failed::Silent) if reused && may_repeat && stale < MAX_STALE => stale += 1,
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
                    _ => (StatusCode::BAD_GATEWAY, RetryOn::Error),
                };
                status = answer;
                if let Failed::Unsent(whole) = failed {
                    body = Some(whole);
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
            let resolved = Box::pin(tokio::net::lookup_host((name.as_str(), *port))).await;
            let resolved = resolved.map_err(|_| StatusCode::BAD_GATEWAY)?;
            Ok(resolved.map(|address| standing.endpoints.one(address)).collect())
        }
    }
}

async fn attempt(
    plan: &Plan<'_>,
    connection: Connection,
    endpoint: Arc<Endpoint>,
    (head, body): (&Parts, Body),
) -> Result<Answered, Failed> {
    let loaded = Loaded::new(endpoint.clone());
    let (send, read) = (plan.send_timeout, plan.read_timeout);
    let deadline = Deadline { upload: plan.upload.clone(), begun: Instant::now(), send, read };
    let response = match connection {
        Connection::One(connection) => {
            connection.ask(head, plan.told, body, &deadline).await.map_err(|(error, whole)| {
                tracing::debug!(
                    endpoint = %endpoint.address,
                    error = weft_netstack::reconcile::chain(&error),
                    "no answer"
                );
                match (error, whole) {
                    (ExchangeError::Timeout, _) => Failed::Timeout,
                    (_, Some(whole)) => Failed::Unsent(whole),
                    (ExchangeError::Silent, None) => Failed::Silent,
                    (_, None) => Failed::Broken,
                }
            })?
        }
        Connection::Shared(sender) => {
            let mut request = Request::from_parts(head.clone(), body);
            if let Some(told) = plan.told {
                told.put(request.headers_mut());
            }
            Box::pin(ask_http_2(sender, request, &deadline)).await?
        }
    };
    plan.upload.answered();
    let held = Release {
        pool: plan.pool.clone(),
        address: endpoint.address,
        speech: plan.upstream.speech.clone(),
        _loaded: loaded,
        counted: None,
    };
    Ok(Answered { response, endpoint, held })
}

async fn ask_http_2(
    mut sender: http2::SendRequest<Body>,
    request: Request<Body>,
    deadline: &Deadline,
) -> Result<Response<Answer>, Failed> {
    let mut sending = std::pin::pin!(sender.try_send_request(request));
    let sent = loop {
        match tokio::time::timeout_at(deadline.at().into(), sending.as_mut()).await {
            Ok(sent) => break sent,
            Err(_) if deadline.at() > Instant::now() => {}
            Err(_) => return Err(Failed::Timeout),
        }
    };
    match sent {
        Ok(response) => Ok(response.map(Answer::Shared)),
        Err(mut failed) => Err(match failed.take_message() {
            Some(request) => Failed::Unsent(request.into_body()),
            None => Failed::Silent,
        }),
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
        return Ok(());
    }
    // Of a target no more than path and query goes to a backend of HTTP/1.1.
    if head.uri.path_and_query().is_none_or(|own| own.as_str() != target) {
        head.uri = target.parse().map_err(|_| StatusCode::BAD_REQUEST)?;
    }
    head.version = Version::HTTP_11;
    let own = head.headers.get(header::HOST);
    if own.is_none_or(|own| own.as_bytes() != host.as_bytes()) {
        head.headers.insert(header::HOST, HeaderValue::from_str(host).map_err(|_| StatusCode::BAD_REQUEST)?);
    }
    Ok(())
}
