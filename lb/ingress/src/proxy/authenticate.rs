//! Forward authentication (`auth-url`), by the rules of nginx's auth_request: 2xx passes, 401 and 403 are the answer, all else
//! is an error. `auth-signin` makes a redirect of 401.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use super::Worker;
use super::answer::{plain, redirect};
use super::balance::Choice;
use super::body::Body;
use super::compiled::{Places, Upstream};
use super::forward::{Plan, address, forward};
use super::hygiene;
use super::pool::{Speech, Tls};
use super::tls;
use super::upload::Upload;
use super::variables::{Request, escaped, target};
use crate::annotations::{ForwardAuth, Retry, RetryOn};

/// How long the authenticator may take (ingress-nginx leaves it at nginx's 60 s to read, 5 s to connect).
const CONNECT: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_secs(60);

pub(super) struct Question<'a> {
    pub(super) worker: &'a Worker,
    pub(super) auth: &'a ForwardAuth,
    /// Of `auth-proxy-set-headers`.
    pub(super) fields: &'a BTreeMap<String, String>,
    pub(super) request: &'a Request<'a>,
}

pub(super) struct Pass {
    /// Of `auth-response-headers`, for the backend.
    pub(super) fields: Vec<(HeaderName, HeaderValue)>,
    /// Set-Cookie, for the client.
    pub(super) cookies: Vec<HeaderValue>,
}

pub(super) enum Verdict {
    Pass(Pass),
    Answer(Response<Body>),
}

/// Statuses whose answers get the authenticator's cookies (nginx's add_header without `always`).
pub(super) fn passes_cookies(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 201 | 204 | 206 | 301 | 302 | 303 | 304 | 307 | 308)
}

pub(super) async fn ask(question: &Question<'_>) -> Verdict {
    let error = || Verdict::Answer(plain(StatusCode::INTERNAL_SERVER_ERROR));
    let Some(answered) = sub_request(question).await else { return error() };
    let (head, _) = answered.into_parts();
    match head.status.as_u16() {
        200..=299 => Verdict::Pass(passed(question.auth, &head.headers)),
        401 => Verdict::Answer(unauthorized(question, &head.headers)),
        403 => Verdict::Answer(plain(StatusCode::FORBIDDEN)),
        _ => error(),
    }
}

/// The answer's head; its body is read to the end, so that the connection is used again.
async fn sub_request(question: &Question<'_>) -> Option<Response<()>> {
    let url: Uri = question.request.expand(&question.auth.url).parse().ok()?;
    let upstream = upstream(&url)?;
    let (mut head, ()) = http::Request::new(()).into_parts();
    head.method = question.auth.method.as_ref().map_or(Some(Method::GET), |method| method.parse().ok())?;
    head.headers = fields(question)?;
    address(&mut head, &upstream.speech, target(&url), url.authority()?.as_str()).ok()?;
    let retry = Retry { on: BTreeSet::from([RetryOn::Error]), tries: 2, timeout: Duration::ZERO };
    let plan = Plan {
        pool: &question.worker.pool,
        standing: &question.worker.proxy.standing,
        upstream: &upstream,
        choice: Choice::LeastOfTwo,
        retry: &retry,
        connect_timeout: CONNECT,
        send_timeout: READ,
        read_timeout: READ,
        upload: Upload::default(),
        told: None,
    };
    let answered = forward(&plan, &head, Body::Empty).await.ok()?;
    let (head, mut body) = answered.response.into_parts();
    drop(body.whole());
    answered.held.end(&mut body);
    Some(Response::from_parts(head, ()))
}

/// A place that a URL names; over TLS whoever it is.
pub(super) fn upstream(url: &Uri) -> Option<Upstream> {
    let secure = match url.scheme_str()? {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let host = url.host()?.trim_matches(['[', ']']).to_owned();
    let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let tls = match secure {
        false => None,
        true => Some(Tls { config: unverified()?, name: ServerName::try_from(host.clone()).ok()? }),
    };
    Some(Upstream { places: Places::Name(host, port), speech: Speech { http2: false, tls } })
}

/// nginx does not verify it either (`proxy_ssl_verify off`).
fn unverified() -> Option<Arc<ClientConfig>> {
    static CONFIG: OnceLock<Option<Arc<ClientConfig>>> = OnceLock::new();
    CONFIG.get_or_init(|| tls::client_config(None, None, false).ok()).clone()
}

fn fields(question: &Question<'_>) -> Option<HeaderMap> {
    let Question { auth, request, .. } = question;
    let mut headers = request.headers.clone();
    hygiene::strip_hop_by_hop(&mut headers);
    for name in [header::CONTENT_LENGTH, header::EXPECT, header::HOST] {
        headers.remove(name);
    }
    hygiene::untold(&mut headers, None);
    hygiene::Told { client: request.client, admitted: request.admitted, prefix: None }.put(&mut headers);
    headers.remove("x-forwarded-port");
    let original = format!("{}://{}{}", request.scheme(), request.admitted.authority, target(request.uri));
    let redirect = auth
        .request_redirect
        .as_ref()
        .map_or_else(|| target(request.uri).to_owned(), |text| request.expand(text));
    let texts = [
        ("x-original-url", original.as_str()),
        ("x-original-method", request.method.as_str()),
        ("x-sent-from", "weft-ingress"),
        ("x-auth-request-redirect", redirect.as_str()),
    ];
    for (name, value) in texts {
        headers.insert(name, HeaderValue::from_str(value).ok()?);
    }
    for (name, value) in question.fields {
        headers.insert(name.parse::<HeaderName>().ok()?, HeaderValue::from_str(&request.expand(value)).ok()?);
    }
    Some(headers)
}

/// A field that the authenticator does not name is empty, so that a client cannot write it.
fn passed(auth: &ForwardAuth, headers: &HeaderMap) -> Pass {
    let names = auth.response_headers.iter().filter_map(|name| name.parse::<HeaderName>().ok());
    let fields = names.map(|name| {
        let value = headers.get(&name).cloned().unwrap_or(HeaderValue::from_static(""));
        (name, value)
    });
    Pass { fields: fields.collect(), cookies: headers.get_all(header::SET_COOKIE).iter().cloned().collect() }
}

fn unauthorized(question: &Question<'_>, headers: &HeaderMap) -> Response<Body> {
    let Question { auth, request, .. } = question;
    let mut response = match &auth.signin {
        Some(signin) => {
            let mut url = request.expand(signin);
            let parameter = format!("{}=", auth.signin_parameter);
            if !signin.contains(&parameter) {
                let back =
                    format!("{}://{}{}", request.scheme(), request.admitted.authority, target(request.uri));
                let mark = if url.contains('?') { '&' } else { '?' };
                url.push_str(&format!("{mark}{parameter}{}", escaped(&back)));
            }
            redirect(302, &url)
        }
        None => plain(StatusCode::UNAUTHORIZED),
    };
    for name in [header::WWW_AUTHENTICATE, header::SET_COOKIE] {
        for value in headers.get_all(&name) {
            response.headers_mut().append(&name, value.clone());
        }
    }
    response
}
