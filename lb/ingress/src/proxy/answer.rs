//! What becomes of one request: refused, redirected, asked who it is, forwarded; in the order of nginx's phases.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt as _;

use super::access;
use super::arriving::Arriving;
use super::balance::Choice;
use super::body::Body;
use super::compiled::{Compiled, CompiledRoute, Found, Upstream};
use super::digest::Nonces;
use super::forward::{self, Answered, Plan, address, forward};
use super::front::{self, Client};
use super::hygiene::{self, Admitted, Told};
use super::limits::{self, Counted};
use super::listen::Patience;
use super::log::{self, Line, Record};
use super::select::{cookie, holds, select};
use super::stats::Refused;
use super::upload::{Fault, Upload};
use super::variables::{self, as_path, escaped, target};
use super::{Worker, authenticate, mirror};
use crate::annotations::Settings;
use crate::plan::table::Action;

/// What is known of a connection.
pub(super) struct Peer {
    /// The other end, or whom a load balancer's PROXY header names.
    pub(super) client: SocketAddr,
    /// The port that the client asked.
    pub(super) port: u16,
    /// The address and port that it asked, where a load balancer's PROXY header names them.
    pub(super) asked: Option<SocketAddr>,
    pub(super) https: bool,
    /// What the client showed, its own certificate first.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// Subject and issuer of that one, where they can be read.
    pub(super) names: Option<(String, String)>,
    pub(super) patience: Patience,
    /// Counts the connection, and what became of it, among those that a drain waits for.
    pub(super) open: Option<Arc<()>>,
}

impl Peer {
    pub(super) fn address(&self) -> IpAddr {
        self.client.ip().to_canonical()
    }
}

/// A request that was admitted, with the route that takes it.
struct Taken<'a> {
    worker: &'a Worker,
    peer: &'a Peer,
    route: Arc<CompiledRoute>,
    admitted: Admitted,
    client: Client,
    /// Who answered, once somebody did.
    via: OnceLock<Via>,
}

struct Via {
    endpoint: SocketAddr,
    canary: bool,
}

/// A request as it came.
struct Asked {
    head: Parts,
    body: Arriving,
}

/// Never fails: what goes wrong has its status.
pub(super) async fn answer(worker: &Worker, peer: &Peer, request: Request<Arriving>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let version = head.version;
    let mut asked = Asked { head, body };
    let compiled = worker.proxy.compiled.load_full();
    let client = front::client(&compiled.front, peer, &asked.head.headers);
    let mut record = record(worker, &compiled, &client, &asked.head);
    let mut response = match admit(worker, &asked.head) {
        Ok(admitted) => by_route(worker, peer, &mut asked, (&compiled, admitted, client), &mut record).await,
        Err(status) => {
            let mut response = plain(status);
            // Whoever sends this may see the next message begin elsewhere (RFC 9112 6.3); HTTP/2 has no such field.
            if matches!(version, Version::HTTP_10 | Version::HTTP_11) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    };
    record.status = response.status();
    response.body_mut().follow(record);
    response
}

fn admit(worker: &Worker, head: &Parts) -> Result<Admitted, StatusCode> {
    let admitted = hygiene::admit(&head.method, &head.uri, head.version, &head.headers);
    admitted.map_err(|refusal| {
        worker.proxy.standing.stats.refuse(refusal.counted());
        refusal.status()
    })
}

fn record(worker: &Worker, compiled: &Compiled, client: &Client, head: &Parts) -> Record {
    let text = |name: HeaderName| {
        head.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let line = || {
        Box::new(Line {
            time: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string(),
            client: client.address,
            method: head.method.to_string(),
            host: head.uri.authority().map_or_else(
                || text(header::HOST).unwrap_or_default(),
                |authority| authority.as_str().to_owned(),
            ),
            target: target(&head.uri).to_owned(),
            protocol: log::protocol(head.version),
            https: client.https,
            referer: text(header::REFERER),
            user_agent: text(header::USER_AGENT),
        })
    };
    let log = worker.proxy.log.get().filter(|_| compiled.observe.access_log);
    Record {
        stats: worker.proxy.standing.stats.clone(),
        route: None,
        line: log.map(|log| (line(), log.clone())),
        started: Instant::now(),
        method: head.method.clone(),
        status: StatusCode::OK,
        canary: false,
        endpoint: None,
        received_bytes: content_length(&head.headers).unwrap_or(0),
        sent_bytes: 0,
    }
}

/// The route's answer, or that there is none.
async fn by_route(
    worker: &Worker,
    peer: &Peer,
    asked: &mut Asked,
    (compiled, mut admitted, mut client): (&Compiled, Admitted, Client),
    record: &mut Record,
) -> Response<Body> {
    if let Some(host) = client.host.take() {
        admitted.authority = host;
    }
    let route = match compiled.find(&admitted.host, &admitted.path) {
        None => {
            worker.proxy.standing.stats.refuse(Refused::NoRoute);
            return plain(StatusCode::NOT_FOUND);
        }
        Some(Found::OtherName(other)) => {
            let scheme = if client.https { "https" } else { "http" };
            return redirect(308, &format!("{scheme}://{other}{}", target(&asked.head.uri)));
        }
        Some(Found::Route(route)) => route.clone(),
    };
    record.route = Some(route.stats.clone());
    if !route.route.settings.access_log {
        record.line = None;
    }
    let taken = Taken { worker, peer, route, admitted, client, via: OnceLock::new() };
    let response = taken_answer(&taken, asked).await;
    if let Some(via) = taken.via.get() {
        (record.endpoint, record.canary) = (Some(via.endpoint), via.canary);
    }
    response
}

async fn taken_answer(taken: &Taken<'_>, asked: &mut Asked) -> Response<Body> {
    let origin =
        asked.head.headers.get(header::ORIGIN).and_then(|origin| origin.to_str().ok()).map(str::to_owned);
    let settings = &taken.route.route.settings;
    let preflight = access::is_preflight(&asked.head.method, settings.cors.as_ref());
    let mut response = match early(taken, &asked.head, preflight) {
        Some(response) => response,
        None => late(taken, asked).await,
    };
    if let Some(cors) = &settings.cors {
        access::put(response.headers_mut(), access::cors_fields(cors, origin.as_deref(), preflight));
    }
    for (name, value) in &taken.route.route.materials.answer_headers {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            response.headers_mut().insert(name, value);
        }
    }
    // ingress-nginx's default (`hsts`), on hosts that are served over TLS.
    if taken.client.https && taken.route.route.to_https {
        let always = HeaderValue::from_static("max-age=31536000; includeSubDomains");
        response.headers_mut().insert(header::STRICT_TRANSPORT_SECURITY, always);
    }
    response
}

/// nginx's rewrite phase: what is answered without asking who it is.
fn early(taken: &Taken<'_>, head: &Parts, preflight: bool) -> Option<Response<Body>> {
    let (route, settings) = (&taken.route.route, &taken.route.route.settings);
    if taken.route.closed.is_some() {
        return Some(plain(StatusCode::SERVICE_UNAVAILABLE));
    }
    if route.to_https && !taken.client.https {
        let host = hygiene::bare_host(&taken.admitted.authority);
        let host = bracketed(host.as_ref().unwrap_or(&taken.admitted.host));
        return Some(redirect(308, &format!("https://{host}{}", target(&head.uri))));
    }
    if let Some(root) = settings.app_root.as_ref().filter(|_| taken.admitted.path == "/") {
        let scheme = if taken.client.https { "https" } else { "http" };
        return Some(redirect(302, &format!("{scheme}://{}{root}", taken.admitted.authority)));
    }
    match &route.action {
        Action::Redirect(to) => Some(redirect(to.code, &variables(taken, head).expand(&to.url))),
        Action::Refuse { status, .. } => {
            Some(plain(StatusCode::from_u16(*status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)))
        }
        Action::Forward(_) => preflight.then(|| empty(StatusCode::NO_CONTENT)),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn variables<'a>(taken: &'a Taken<'_>, head: &'a Parts) -> variables::Request<'a> {
    variables::Request {
        method: &head.method,
        uri: &head.uri,
        headers: &head.headers,
        admitted: &taken.admitted,
        client: &taken.client,
    }
}

/// Limits, access, then the backend.
async fn late(taken: &Taken<'_>, asked: &mut Asked) -> Response<Body> {
    let head = &mut asked.head;
    let settings = &taken.route.route.settings;
    let client = taken.client.address;
    let Ok(counted) = limits::admit(&taken.route.clients, &settings.limits, client) else {
        return plain(StatusCode::SERVICE_UNAVAILABLE);
    };
    let verified = access::client_certificate(&taken.route, taken.peer);
    let nonces = &taken.worker.proxy.standing.nonces;
    let admitted =
        verified.and_then(|verified| access::admit(&taken.route, client, head, nonces).map(|()| verified));
    let verified = match admitted {
        Ok(verified) => verified,
        Err(denial) => return denied(&denial, nonces),
    };
    let too_long = |limit: u64| content_length(&head.headers).is_some_and(|length| length > limit);
    if settings.body_limit_bytes.is_some_and(too_long) {
        return plain(StatusCode::PAYLOAD_TOO_LARGE);
    }
    let (mut cookies, mut of_authenticator) = (Vec::new(), Vec::new());
    if let Some(auth) = &settings.forward_auth {
        let question = authenticate::Question {
            worker: taken.worker,
            auth,
            fields: &taken.route.route.materials.auth_headers,
            request: &variables(taken, head),
        };
        match Box::pin(authenticate::ask(&question)).await {
            authenticate::Verdict::Pass(pass) => {
                (cookies, of_authenticator) = (pass.cookies, pass.fields);
            }
            authenticate::Verdict::Answer(response) => return response,
        }
    }
    if settings.basic.is_some() {
        // The password is for this proxy.
        head.headers.remove(header::AUTHORIZATION);
    }
    for (name, value) in of_authenticator {
        head.headers.insert(name, value);
    }
    client_fields(taken, &mut head.headers, verified);
    let mut response = backend(taken, asked, counted).await;
    let passes = settings.forward_auth.as_ref().is_some_and(|auth| auth.always_set_cookie)
        || authenticate::passes_cookies(response.status());
    for cookie in cookies.into_iter().filter(|_| passes) {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn denied(denial: &access::Denial, nonces: &Nonces) -> Response<Body> {
    let (status, field) = access::answer(denial, nonces);
    let mut response = plain(status);
    if let Some((name, value)) = field
        && let Ok(value) = HeaderValue::from_str(&value)
    {
        response.headers_mut().insert(name, value);
    }
    response
}

/// `ssl-client-*`, which a client cannot write itself.
fn client_fields(taken: &Taken<'_>, headers: &mut HeaderMap, verified: Option<&'static str>) {
    let own = ["ssl-client-verify", "ssl-client-cert", "ssl-client-subject-dn", "ssl-client-issuer-dn"];
    if headers.keys().any(|name| own.contains(&name.as_str())) {
        for name in own {
            headers.remove(name);
        }
    }
    let Some(verified) = verified else { return };
    headers.insert("ssl-client-verify", HeaderValue::from_static(verified));
    if let Some((subject, issuer)) = &taken.peer.names {
        for (name, value) in [("ssl-client-subject-dn", subject), ("ssl-client-issuer-dn", issuer)] {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        }
    }
    let wanted = taken.route.route.settings.client_tls.as_ref().is_some_and(|tls| tls.pass_certificate);
    if let Some(own) = taken.peer.certificates.first().filter(|_| wanted)
        && let Ok(value) = HeaderValue::from_str(&escaped(&pem(own)))
    {
        headers.insert("ssl-client-cert", value);
    }
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in encoded.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// To the backend; where it has no endpoint, or an answer of `custom-http-errors`, to the fallback.
async fn backend(taken: &Taken<'_>, asked: &mut Asked, counted: Option<Counted>) -> Response<Body> {
    let Asked { head, body: incoming } = asked;
    let settings = &taken.route.route.settings;
    let hash = settings.hash_by.as_ref().map(|text| variables(taken, head).expand(text));
    let vhost = settings.upstream_vhost.as_ref().map(|host| variables(taken, head).expand(host));
    let host = vhost.as_deref().unwrap_or(&taken.admitted.authority);
    let path = path_of(taken, &head.uri);
    let from_client = head.version == Version::HTTP_11;
    let client = head.extensions.remove::<OnUpgrade>();
    let incoming = std::mem::replace(incoming, Arriving::none());
    let has_body = !http_body::Body::is_end_stream(&incoming);
    let upload = if has_body { Upload::new() } else { Upload::default() };
    let prefix = settings.x_forwarded_prefix.as_deref();
    let upgrade = prepare(&mut head.headers, prefix).filter(|_| from_client);
    let told = Told { client: &taken.client, admitted: &taken.admitted, prefix };
    let for_others = settings.mirror.is_some() || taken.route.fallback.is_some();
    if for_others {
        told.put(&mut head.headers);
    }
    let copy = settings.mirror.as_ref().and_then(|mirror| {
        mirror::start(taken.worker, mirror, &variables(taken, head), (&head.headers, has_body))
    });
    let body =
        Body::request(incoming, settings.body_limit_bytes, taken.peer.patience.body, upload.clone(), copy);
    let Some((upstream, held)) = select(&taken.route, &head.headers) else {
        return plain(StatusCode::SERVICE_UNAVAILABLE);
    };
    let canary = taken.route.canary.as_ref().is_some_and(|(_, canary)| std::ptr::eq(canary, upstream));
    let held = held.map(str::to_owned);
    let choice = match (&held, &hash) {
        (Some(token), _) => Choice::Sticky(token),
        (None, Some(key)) => Choice::Hash(key),
        (None, None) => Choice::LeastOfTwo,
    };
    if let Err(status) = address(head, &upstream.speech, &path, host) {
        return plain(status);
    }
    if let Some(protocol) = &upgrade {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, protocol.clone());
    }
    // For the page of an error, where somebody gives it.
    let for_page = taken.route.fallback.as_ref().map(|_| head.headers.clone());
    let agent = settings.affinity.as_ref().and_then(|_| head.headers.get(header::USER_AGENT).cloned());
    let mut plan = plan(taken, upstream, choice, upload.clone());
    plan.told = Some(told).filter(|_| !for_others);
    let answered = forward(&plan, head, body).await;
    if let Some(fault) = upload.fault() {
        return faulty(fault, from_client);
    }
    match answered {
        Ok(answered) => {
            let _ = taken.via.set(Via { endpoint: answered.endpoint.address, canary });
            let status = answered.response.status();
            if status == StatusCode::SWITCHING_PROTOCOLS {
                return match (client, upgrade) {
                    (Some(client), Some(_)) => tunnel(answered, client, (counted, taken.peer.open.clone())),
                    _ => plain(StatusCode::BAD_GATEWAY),
                };
            }
            if settings.custom_http_errors.contains(&status.as_u16())
                && let Some(page) = Box::pin(error_page(taken, for_page, status, &path)).await
            {
                return page;
            }
            let sticky = settings.affinity.as_ref().filter(|affinity| match held.as_deref() {
                None => true,
                Some(token) if token == answered.endpoint.token() => false,
                // Its endpoint is there and failed: the client comes back to it, unless it is told to move.
                Some(token) => affinity.change_on_failure || !holds(upstream, token),
            });
            let set = sticky
                .map(|affinity| cookie(affinity, &answered.endpoint, taken.client.https, agent.as_ref()));
            returned(taken, answered, counted, set)
        }
        Err(status) => {
            let page = Box::pin(error_page(taken, for_page, status, &path)).await;
            page.unwrap_or_else(|| plain(status))
        }
    }
}

/// For a client that did not send its body.
fn faulty(fault: Fault, http_1: bool) -> Response<Body> {
    let mut response = plain(fault.status());
    // RFC 9110 15.5.9; HTTP/2 has no such field.
    if fault == Fault::Silent && http_1 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn plan<'a>(taken: &'a Taken<'_>, upstream: &'a Upstream, choice: Choice<'a>, upload: Upload) -> Plan<'a> {
    let settings = &taken.route.route.settings;
    Plan {
        pool: &taken.worker.pool,
        standing: &taken.worker.proxy.standing,
        upstream,
        choice,
        retry: &settings.retry,
        connect_timeout: settings.connect_timeout,
        send_timeout: settings.send_timeout,
        read_timeout: settings.read_timeout,
        upload,
        told: None,
    }
}

/// Path and query that the backend gets.
fn path_of(taken: &Taken<'_>, uri: &Uri) -> String {
    match taken.route.rewritten(&taken.admitted.path) {
        None => target(uri).to_owned(),
        Some(rewritten) => {
            let path = as_path(&rewritten);
            match uri.query() {
                Some(query) if path.contains('?') => format!("{path}&{query}"),
                Some(query) => format!("{path}?{query}"),
                None => path,
            }
        }
    }
}

/// Makes the client's fields those of the proxy's own request; returns the protocol of an upgrade.
fn prepare(headers: &mut HeaderMap, prefix: Option<&str>) -> Option<HeaderValue> {
    let upgrade = hygiene::strip_hop_by_hop(headers);
    headers.remove(header::EXPECT);
    hygiene::untold(headers, prefix);
    upgrade
}

/// The default backend's page for a status (`custom-http-errors`), as ingress-nginx asks for it.
async fn error_page(
    taken: &Taken<'_>,
    asked: Option<HeaderMap>,
    status: StatusCode,
    uri: &str,
) -> Option<Response<Body>> {
    let (fallback, mut headers) = (taken.route.fallback.as_ref()?, asked?);
    let origin = &taken.route.route.origin.ingress;
    let accept = headers.get(header::ACCEPT).cloned().unwrap_or(HeaderValue::from_static("*/*"));
    for name in [header::CONTENT_LENGTH, header::CONNECTION, header::UPGRADE, header::CONTENT_TYPE] {
        headers.remove(name);
    }
    let texts = [
        ("x-code", status.as_str()),
        ("x-original-uri", uri),
        ("x-namespace", &*origin.namespace),
        ("x-ingress-name", &*origin.name),
    ];
    for (name, value) in texts {
        headers.insert(name, HeaderValue::from_str(value).ok()?);
    }
    headers.insert("x-format", accept);
    let (mut head, ()) = Request::new(()).into_parts();
    head.headers = headers;
    address(&mut head, &fallback.speech, "/", &taken.admitted.authority).ok()?;
    let plan = plan(taken, fallback, Choice::LeastOfTwo, Upload::default());
    let answered = forward(&plan, &head, Body::Empty).await.ok()?;
    Some(returned(taken, answered, None, None))
}

/// The backend's answer as the client gets it.
fn returned(
    taken: &Taken<'_>,
    answered: Answered,
    counted: Option<Counted>,
    cookie: Option<String>,
) -> Response<Body> {
    let settings = &taken.route.route.settings;
    let (mut head, incoming) = answered.response.into_parts();
    head.version = Version::HTTP_11;
    head.extensions.clear();
    hygiene::strip_hop_by_hop(&mut head.headers);
    rewrite_fields(settings, &mut head.headers);
    if let Some(Ok(cookie)) = cookie.map(|cookie| HeaderValue::from_str(&cookie)) {
        head.headers.append(header::SET_COOKIE, cookie);
    }
    let mut held = answered.held;
    held.counted = counted;
    Response::from_parts(head, Body::answer(incoming, settings.read_timeout, settings.pace, held))
}

/// `proxy-redirect-*`, `proxy-cookie-domain`, `proxy-cookie-path`.
fn rewrite_fields(settings: &Settings, headers: &mut HeaderMap) {
    if let Some((from, to)) = settings.location.as_ref().filter(|(from, _)| from != "default") {
        for name in [header::LOCATION, header::REFRESH] {
            let new = headers.get(&name).and_then(|value| value.to_str().ok()).and_then(|value| {
                let rest = value.strip_prefix(from.as_str())?;
                HeaderValue::from_str(&format!("{to}{rest}")).ok()
            });
            if let Some(new) = new {
                headers.insert(name, new);
            }
        }
    }
    if settings.cookie_domain.is_none() && settings.cookie_path.is_none() {
        return;
    }
    let cookies: Vec<HeaderValue> = headers.get_all(header::SET_COOKIE).iter().cloned().collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        let text = cookie.to_str().map(|text| rewritten_cookie(settings, text));
        let cookie = text.ok().and_then(|text| HeaderValue::from_str(&text).ok()).unwrap_or(cookie);
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn rewritten_cookie(settings: &Settings, text: &str) -> String {
    let attribute = |attribute: &str| -> String {
        let Some((name, value)) = attribute.trim().split_once('=') else {
            return attribute.trim().to_owned();
        };
        let pair = match name.to_ascii_lowercase().as_str() {
            "domain" => settings.cookie_domain.as_ref(),
            "path" => settings.cookie_path.as_ref(),
            _ => None,
        };
        let new = pair.and_then(|(from, to)| {
            let rest = value.strip_prefix(from.as_str())?;
            (name.eq_ignore_ascii_case("path") || rest.is_empty()).then(|| format!("{to}{rest}"))
        });
        format!("{name}={}", new.as_deref().unwrap_or(value))
    };
    let mut parts = text.split(';');
    let first = parts.next().unwrap_or_default().trim().to_owned();
    std::iter::once(first).chain(parts.map(attribute)).collect::<Vec<_>>().join("; ")
}

/// Both sides agreed on another protocol: bytes go to and fro until one side ends.
fn tunnel(
    answered: Answered,
    client: OnUpgrade,
    counted: (Option<Counted>, Option<Arc<()>>),
) -> Response<Body> {
    let forward::Answered { response, held, .. } = answered;
    let (mut head, backend) = response.into_parts();
    let Some((mut backend, already)) = backend.upgraded() else { return plain(StatusCode::BAD_GATEWAY) };
    let protocol = head.headers.get(header::UPGRADE).cloned();
    hygiene::strip_hop_by_hop(&mut head.headers);
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        head.headers.insert(header::UPGRADE, protocol);
    }
    tokio::spawn(async move {
        let _counted = (held, counted);
        let Ok(client) = client.await else { return };
        let mut client = TokioIo::new(client);
        let tunnelled = async {
            client.write_all(&already).await?;
            client.flush().await?;
            tokio::io::copy_bidirectional(&mut client, &mut backend).await
        };
        if let Err(error) = tunnelled.await {
            tracing::debug!(%error, "tunnel");
        }
    });
    Response::from_parts(head, Body::Empty)
}

/// A status with its name as text.
pub(super) fn plain(status: StatusCode) -> Response<Body> {
    let text = format!("{} {}\n", status.as_u16(), status.canonical_reason().unwrap_or_default());
    let mut response = Response::new(Body::text(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = status;
    response
}

/// To another URL; where it can stand in no field, 500.
pub(super) fn redirect(code: u16, url: &str) -> Response<Body> {
    match (StatusCode::from_u16(code), HeaderValue::from_str(url)) {
        (Ok(status), Ok(url)) => {
            let mut response = plain(status);
            response.headers_mut().insert(header::LOCATION, url);
            response
        }
        _ => plain(StatusCode::INTERNAL_SERVER_ERROR),
    }
}
