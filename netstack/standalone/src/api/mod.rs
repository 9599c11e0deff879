//! The HTTP face: one handler that routes by path. In: requests with a bearer token. Out: JSON objects, lists, Tables,
//! watch streams, or a `Status` that says why not. Decides nothing about objects: that is [`crate::admission`].

pub(crate) use delete::deletion;

mod delete;

mod discovery;
mod events;
mod openapi;
mod patch;
mod protobuf;
mod read;
mod request;
mod strategic;
mod table;
mod table_cells;
mod watch;
mod write;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use crate::admission::Policy;
use crate::auth::{Identity, Verb, Verifier};
use crate::status::ApiError;
use crate::store::Store;
use request::{Options, Shape, Target};

/// The largest request body, as the real API server's (3 MiB).
const MAX_BODY_BYTES: usize = 3 * 1024 * 1024;

/// What every request needs.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) store: Arc<Store>,
    pub(crate) policy: Policy,
    pub(crate) verifier: Verifier,
}

/// One authenticated request for objects.
#[derive(Clone, Debug)]
struct Call {
    target: Target,
    options: Options,
    shape: Shape,
    identity: Identity,
}

pub(crate) fn router(api: Arc<Api>) -> Router {
    Router::new().fallback(answer).with_state(api)
}

async fn answer(State(api): State<Arc<Api>>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = api.respond(request).await.unwrap_or_else(|error| error_response(&error));
    tracing::debug!(%method, path, status = response.status().as_u16(), "request");
    response
}

impl Api {
    async fn respond(self: &Arc<Self>, request: Request) -> Result<Response, ApiError> {
        let path = request.uri().path();
        if let Some(answer) = discovery::public(path) {
            return Ok(answer);
        }
        let identity = self.verifier.identify(request.headers())?;
        if let Some(answer) = discovery::answer(path, request.headers()) {
            return if request.method() == Method::GET {
                Ok(answer)
            } else {
                Err(ApiError::method_not_allowed())
            };
        }
        let target = Target::parse(path).ok_or_else(ApiError::unknown_path)?;
        let options = Options::parse(request.uri())?;
        let shape = Shape::parse(request.headers())?;
        let call = Call { target, options, shape, identity };
        self.dispatch(call, request).await
    }

    async fn dispatch(self: &Arc<Self>, call: Call, request: Request) -> Result<Response, ApiError> {
        let verb = verb(request.method(), &call)?;
        call.identity.authorize(verb, call.target.resource, call.target.name.as_deref())?;
        if let Some(subresource) = call.target.subresource.as_deref() {
            let exists = subresource == "status" && call.target.resource.status;
            if !exists {
                return Err(ApiError::unknown_path());
            }
            if matches!(verb, Verb::Create | Verb::Delete | Verb::Watch) {
                return Err(ApiError::method_not_allowed());
            }
        }
        match verb {
            Verb::Get => self.get(&call),
            Verb::List => self.list(&call),
            Verb::Watch => self.watch(&call),
            Verb::Create => self.create(call, request).await,
            Verb::Update => self.replace(call, request).await,
            Verb::Patch => self.patch(call, request).await,
            Verb::Delete => self.delete(call, request).await,
            Verb::DeleteCollection => self.delete_collection(call, request).await,
        }
    }
}

fn verb(method: &Method, call: &Call) -> Result<Verb, ApiError> {
    let named = call.target.name.is_some();
    match (method.as_str(), named) {
        ("GET" | "HEAD", _) if call.options.watch => Ok(Verb::Watch),
        ("GET" | "HEAD", true) => Ok(Verb::Get),
        ("GET" | "HEAD", false) => Ok(Verb::List),
        ("POST", false) => Ok(Verb::Create),
        ("PUT", true) => Ok(Verb::Update),
        ("PATCH", true) => Ok(Verb::Patch),
        ("DELETE", true) => Ok(Verb::Delete),
        ("DELETE", false) => Ok(Verb::DeleteCollection),
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn error_response(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json_response(status, &error.to_json());
    if let Some(seconds) = error.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if error.code == 401 {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn json_response(status: StatusCode, value: &Value) -> Response {
    bytes_response(status, Bytes::from(value.to_string()))
}

fn bytes_response(status: StatusCode, json: Bytes) -> Response {
    body_response(status, "application/json", Body::from(json))
}

fn body_response(status: StatusCode, content_type: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// The media type of a body without its parameters.
fn content_type(request: &Request) -> String {
    let value =
        request.headers().get(header::CONTENT_TYPE).and_then(|it| it.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_owned()
}

/// # Errors
/// 413 for a body over the limit, 400 when it breaks off.
async fn body(request: Request) -> Result<Bytes, ApiError> {
    let announced =
        request.headers().get(header::CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
    if announced.is_some_and(|it: usize| it > MAX_BODY_BYTES) {
        return Err(too_large());
    }
    let result = axum::body::to_bytes(request.into_body(), MAX_BODY_BYTES + 1).await;
    let bytes = result.map_err(|error| ApiError::bad_request(format!("reading the body: {error}")))?;
    if bytes.len() > MAX_BODY_BYTES { Err(too_large()) } else { Ok(bytes) }
}

fn too_large() -> ApiError {
    let message = format!("Request entity too large: limit is {MAX_BODY_BYTES}");
    ApiError::new(413, "RequestEntityTooLarge", message)
}

/// An object in JSON, or in protobuf where [`protobuf`] knows the kind.
async fn object_body(request: Request) -> Result<Value, ApiError> {
    match content_type(&request).as_str() {
        "application/json" | "" => {
            let bytes = body(request).await?;
            serde_json::from_slice(&bytes)
                .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))
        }
        "application/vnd.kubernetes.protobuf" => {
            protobuf::decode(&body(request).await?).ok_or_else(|| unsupported_media_type("application/json"))
        }
        _ => Err(unsupported_media_type("application/json")),
    }
}

fn unsupported_media_type(accepted: &str) -> ApiError {
    let message = format!(
        "the body of the request was in an unknown format - accepted media types include: {accepted}"
    );
    ApiError::new(415, "UnsupportedMediaType", message)
}

fn success(details: &Value) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}
