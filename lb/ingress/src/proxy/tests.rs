//! The proxy over real sockets: Ingresses as users write them, planned, served, and asked with raw bytes.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use weft_model::NamespacedName;
use weft_model::ingress::{Answer, Bytes, Data, Reference};
use weft_netstack::reconcile::Planner as _;

use super::*;
use crate::plan::IngressPlanner;
use crate::plan::table::{Backend, Target};
use crate::plan::tests::snapshot;

/// Answers each request with its name, the request line and the fields it got; `/sleep` never answers; an Upgrade is
/// accepted and echoes.
fn backend(name: &'static str) -> SocketAddr {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || while serve_one(name, &stream).is_some() {});
        }
    });
    address
}

fn serve_one(name: &str, mut stream: &StdStream) -> Option<()> {
    let head = head_of(stream)?;
    let lower = head.to_ascii_lowercase();
    if lower.contains("upgrade: websocket") {
        stream
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            )
            .ok()?;
        let mut byte = [0; 1];
        while stream.read(&mut byte).ok()? > 0 {
            stream.write_all(&byte).ok()?;
        }
        return None;
    }
    if let Some(length) = lower.split("content-length: ").nth(1) {
        let length: usize = length.lines().next()?.trim().parse().ok()?;
        stream.read_exact(&mut vec![0; length]).ok()?;
    }
    if lower.contains("transfer-encoding: chunked") {
        let mut text = Vec::new();
        let mut byte = [0; 1];
        while !text.ends_with(b"0\r\n\r\n") {
            stream.read_exact(&mut byte).ok()?;
            text.push(byte[0]);
        }
    }
    if head.contains("/sleep") {
        std::thread::sleep(Duration::from_secs(20));
    }
    let status = match (head.contains("/deny"), head.contains("/broken")) {
        (true, _) => "401 Unauthorized",
        (_, true) => "503 Service Unavailable",
        _ => "200 OK",
    };
    let body = format!("{name}\n{head}");
    let extra = "X-User: ann\r\nConnection: X-Hop\r\nX-Hop: 1\r\n";
    let answer = format!("HTTP/1.1 {status}\r\n{extra}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).ok()
}

fn head_of(mut stream: &StdStream) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0; 1]);
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}

/// A proxy on loopback, plain and TLS, with a thread of its own.
struct Rig {
    plain: SocketAddr,
    tls: SocketAddr,
    proxy: Arc<Proxy>,
    _stop: watch::Sender<bool>,
}

impl Rig {
    fn start(table: &RouteTable) -> Self {
        let proxy = Proxy::new().unwrap();
        proxy.apply(table);
        let (stop, stopped) = watch::channel(false);
        let (tell, told) = std::sync::mpsc::channel();
        let worker = proxy.worker();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let (plain, tls) = (listen::bind(any).unwrap(), listen::bind(any).unwrap());
                tell.send((plain.local_addr().unwrap(), tls.local_addr().unwrap())).unwrap();
                let plain = listen::serve(worker.clone(), plain, false, stopped.clone());
                tokio::join!(plain, listen::serve(worker, tls, true, stopped));
            });
        });
        let (plain, tls) = told.recv().unwrap();
        Self { plain, tls, proxy, _stop: stop }
    }

    /// Everything that comes back for these bytes, until the proxy closes or is silent.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = StdStream::connect(self.plain).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // A proxy that refuses early may close before all is written.
        let _ = stream.write_all(bytes);
        let (mut text, mut piece) = (Vec::new(), [0; 4096]);
        while let Ok(length @ 1..) = stream.read(&mut piece) {
            text.extend_from_slice(&piece[..length]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn get(&self, host: &str, path: &str, fields: &str) -> String {
        self.raw(
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{fields}\r\n").as_bytes(),
        )
    }
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default()
}

fn field<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let head = answer.split("\r\n\r\n").next()?;
    head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
}

/// Which backend answered.
fn who(answer: &str) -> &str {
    answer.split("\r\n\r\n").nth(1).and_then(|body| body.lines().next()).unwrap_or_default()
}

fn ingress(name: &str, host: &str, annotations: &Value, paths: &[(&str, &str, &str)]) -> Value {
    let annotations: serde_json::Map<_, _> = annotations
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| (format!("nginx.ingress.kubernetes.io/{key}"), value.clone()))
        .collect();
    let paths: Vec<Value> = paths
        .iter()
        .map(|(kind, path, service)| {
            json!({"path": path, "pathType": kind,
                "backend": {"service": {"name": service, "port": {"number": 80}}}})
        })
        .collect();
    json!({"kind": "Ingress",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations,
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"ingressClassName": "weft", "rules": [{"host": host, "http": {"paths": paths}}]}})
}

/// The planned table, with these endpoints for each Service.
fn table(
    documents: Vec<Value>,
    services: &[(&str, &[SocketAddr])],
    secrets: &[(&str, &str, &str)],
) -> RouteTable {
    let service = |name: &str| {
        json!({"kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "name": "http"}]}})
    };
    let mut documents = documents;
    documents.extend(services.iter().map(|(name, _)| service(name)));
    let mut snapshot = snapshot(documents);
    let mut referred = BTreeMap::new();
    for (secret, key, value) in secrets {
        let data = Data(BTreeMap::from([((*key).to_owned(), Bytes(value.as_bytes().to_vec()))]));
        let name = NamespacedName::new("default", *secret);
        referred.insert(Reference::Secret(name), Arc::new(Answer::Found(data)));
    }
    snapshot.referred = Arc::new(referred);
    let mut table = IngressPlanner::default().plan(&snapshot).plan;
    for (key, backend) in &mut table.backends {
        let found = services.iter().find(|(name, _)| *name == key.service.name);
        let Some((_, addresses)) = found else { continue };
        let target =
            |address: &SocketAddr| Target { address: *address, terminating: false, pod: None, node: None };
        *backend = Arc::new(Backend::Endpoints(addresses.iter().map(target).collect()));
    }
    table
}

fn simple(annotations: &Value, path: (&str, &str)) -> Rig {
    let web = backend("web");
    Rig::start(&table(
        vec![ingress("web", "a.com", annotations, &[(path.0, path.1, "web")])],
        &[("web", &[web])],
        &[],
    ))
}

/// RFC 9112, sentence by sentence: what a request may not be.
#[test]
fn raw_requests_get_the_status_that_the_specification_asks_for() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    let matrix: &[(&str, &str, u16)] = &[
        ("plain", "GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n", 200),
        ("HTTP/1.0 with Host", "GET / HTTP/1.0\r\nHost: a.com\r\n\r\n", 200),
        ("absolute form", "GET http://a.com/ HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n", 200),
        (
            "chunked",
            "POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            200,
        ),
        ("no Host (3.2)", "GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        ("two Hosts (3.2)", "GET / HTTP/1.1\r\nHost: a.com\r\nHost: a.com\r\nConnection: close\r\n\r\n", 400),
        ("invalid Host (3.2)", "GET / HTTP/1.1\r\nHost: a com\r\nConnection: close\r\n\r\n", 400),
        (
            "absolute form against Host (3.2.2)",
            "GET http://a.com/ HTTP/1.1\r\nHost: b.com\r\nConnection: close\r\n\r\n",
            400,
        ),
        (
            "space before the colon (5.1)",
            "GET / HTTP/1.1\r\nHost: a.com\r\nX-A : 1\r\nConnection: close\r\n\r\n",
            400,
        ),
        ("obs-fold (5.2)", "GET / HTTP/1.1\r\nHost: a.com\r\nX-A: 1\r\n 2\r\nConnection: close\r\n\r\n", 400),
        ("NUL in a value", "GET / HTTP/1.1\r\nHost: a.com\r\nX-A: 1\0\r\nConnection: close\r\n\r\n", 400),
        (
            "lengths that differ (6.3)",
            "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            400,
        ),
        (
            "a length that is no number (6.3)",
            "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: +3\r\n\r\nabc",
            400,
        ),
        (
            "chunked is not last (6.1)",
            "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            "unknown coding (6.1)",
            "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            "chunked in HTTP/1.0 (6.1)",
            "POST / HTTP/1.0\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        ("no version (3)", "GET /\r\nHost: a.com\r\n\r\n", 400),
        ("CONNECT", "CONNECT a.com:443 HTTP/1.1\r\nHost: a.com:443\r\nConnection: close\r\n\r\n", 405),
        ("broken escape", "GET /%zz HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n", 400),
        ("escaped NUL", "GET /%00 HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n", 400),
        ("out of the root", "GET /..%2f HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n", 400),
        ("another host", "GET / HTTP/1.1\r\nHost: b.com\r\nConnection: close\r\n\r\n", 404),
    ];
    let wrong: Vec<String> = matrix
        .iter()
        .filter_map(|(name, bytes, wanted)| {
            let got = status(&rig.raw(bytes.as_bytes()));
            (got != *wanted).then(|| format!("{name}: {got}, not {wanted}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let long = format!("GET / HTTP/1.1\r\nHost: a.com\r\nX: {}\r\n\r\n", "x".repeat(70_000));
    assert_eq!(status(&rig.raw(long.as_bytes())), 431);
}

/// RFC 9112 6.3: with both framings the message ends by Transfer-Encoding, or is refused; never by Content-Length, which
/// would make a second request of the body.
#[test]
fn a_request_with_two_framings_is_never_two_requests() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    for fields in
        ["Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3"]
    {
        let text = format!(
            "POST / HTTP/1.1\r\nHost: a.com\r\n{fields}\r\nConnection: close\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a.com\r\n\r\n"
        );
        let answer = rig.raw(text.as_bytes());
        assert!(!answer.contains("/smuggled"), "{answer}");
        let answers = answer.lines().filter(|line| line.starts_with("HTTP/1.1 ")).count();
        assert_eq!(answers, 1, "{answer}");
        assert!(!answer.contains("content-length: 3"), "{answer}");
    }
}

#[test]
fn prefixes_match_by_element_and_backends_learn_who_asked() {
    let (auth, web) = (backend("auth"), backend("web"));
    let document = ingress(
        "web",
        "a.com",
        &json!({"x-forwarded-prefix": "/p"}),
        &[("Prefix", "/auth", "auth"), ("Prefix", "/", "web")],
    );
    let rig = Rig::start(&table(vec![document], &[("auth", &[auth]), ("web", &[web])], &[]));
    assert_eq!(who(&rig.get("a.com", "/auth/x?q=1", "")), "auth");
    assert_eq!(who(&rig.get("a.com", "/authx", "")), "web");
    assert_eq!(who(&rig.get("a.com", "/x/..%2fauth", "")), "auth", "as the backend will read it");
    let answer = rig.get(
        "a.com",
        "/",
        "X-Forwarded-For: 9.9.9.9\r\nX-Real-IP: 9.9.9.9\r\nTE: gzip\r\nKeep-Alive: 5\r\n",
    );
    let got = answer.to_ascii_lowercase();
    assert!(got.contains("x-forwarded-for: 127.0.0.1") && got.contains("x-real-ip: 127.0.0.1"), "{got}");
    assert!(
        got.contains("x-forwarded-prefix: /p") && got.contains("host: a.com") && !got.contains("9.9.9.9"),
        "{got}"
    );
    assert!(!got.contains("te: gzip") && !got.contains("keep-alive: 5"), "{got}");
    assert_eq!(field(&answer, "x-hop"), None, "{answer}");
}

#[test]
fn a_rewrite_takes_what_the_path_captured() {
    let rig = simple(
        &json!({"use-regex": "true", "rewrite-target": "/$2"}),
        ("ImplementationSpecific", "/api/v1(/|$)(.*)"),
    );
    assert!(rig.get("a.com", "/api/v1/things?a=1", "").contains("GET /things?a=1 HTTP/1.1"));
    assert!(
        rig.get("a.com", "/API/V1/x%20y", "").contains("GET /x%20y HTTP/1.1"),
        "without case, encoded again"
    );
    assert_eq!(status(&rig.get("a.com", "/other", "")), 404);
}

#[test]
fn redirects_are_answered_without_a_backend() {
    let rig = simple(&json!({"force-ssl-redirect": "true"}), ("Prefix", "/"));
    let answer = rig.get("a.com", "/x?y=1", "");
    assert_eq!((status(&answer), field(&answer, "location")), (308, Some("https://a.com/x?y=1")));
    let rig = simple(&json!({"permanent-redirect": "https://b.com/"}), ("Prefix", "/"));
    let answer = rig.get("a.com", "/", "");
    assert_eq!((status(&answer), field(&answer, "location")), (301, Some("https://b.com/")));
    let rig = simple(&json!({"app-root": "/app"}), ("Prefix", "/"));
    assert_eq!(field(&rig.get("a.com", "/", ""), "location"), Some("http://a.com/app"));
    assert_eq!(who(&rig.get("a.com", "/other", "")), "web");
}

#[test]
fn bodies_beyond_the_limit_get_413() {
    let rig = simple(&json!({"proxy-body-size": "1k"}), ("Prefix", "/"));
    let post = |fields: &str, body: &str| {
        rig.raw(
            format!("POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{fields}\r\n\r\n{body}")
                .as_bytes(),
        )
    };
    assert_eq!(status(&post("Content-Length: 1024", &"x".repeat(1024))), 200);
    assert_eq!(status(&post("Content-Length: 1025", &"x".repeat(1025))), 413);
    let chunked = format!("800\r\n{}\r\n0\r\n\r\n", "x".repeat(0x800));
    assert_eq!(status(&post("Transfer-Encoding: chunked", &chunked)), 413);
}

#[test]
fn who_may_not_pass_does_not() {
    let rig = simple(&json!({"whitelist-source-range": "10.0.0.0/8"}), ("Prefix", "/"));
    assert_eq!(status(&rig.get("a.com", "/", "")), 403);
    let rig = simple(&json!({"denylist-source-range": "127.0.0.0/8"}), ("Prefix", "/"));
    assert_eq!(status(&rig.get("a.com", "/", "")), 403);
    let annotations = json!({"auth-type": "basic", "auth-secret": "users", "auth-realm": "Cellar"});
    let document = ingress("web", "a.com", &annotations, &[("Prefix", "/", "web")]);
    let users = "ann:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=";
    let rig = Rig::start(&table(vec![document], &[("web", &[backend("web")])], &[("users", "auth", users)]));
    let answer = rig.get("a.com", "/", "");
    assert_eq!((status(&answer), field(&answer, "www-authenticate")), (401, Some("Basic realm=\"Cellar\"")));
    assert_eq!(status(&rig.get("a.com", "/", "Authorization: Basic YW5uOnBhc3N3b3Jk\r\n")), 200);
    assert_eq!(status(&rig.get("a.com", "/", "Authorization: Basic YW5uOnBhc3N3b3Jx\r\n")), 401);
}

#[test]
fn forward_authentication_passes_refuses_and_sends_to_the_sign_in() {
    let authenticator = backend("authenticator");
    let rig = |path: &str| {
        let annotations = json!({"auth-url": format!("http://{authenticator}{path}"),
            "auth-signin": "https://login.com/start", "auth-response-headers": "X-User"});
        simple(&annotations, ("Prefix", "/"))
    };
    let answer = rig("/ok").get("a.com", "/", "X-User: root\r\n");
    assert_eq!((status(&answer), who(&answer)), (200, "web"));
    assert!(answer.contains("x-user: ann") && !answer.contains("root"), "{answer}");
    let answer = rig("/deny").get("a.com", "/x?y", "");
    let signin = "https://login.com/start?rd=http%3A%2F%2Fa.com%2Fx%3Fy";
    assert_eq!((status(&answer), field(&answer, "location")), (302, Some(signin)));
    assert_eq!(status(&rig("/broken").get("a.com", "/", "")), 500);
}

#[test]
fn a_burst_beyond_the_rate_gets_503() {
    let rig = simple(&json!({"limit-rps": "1", "limit-burst-multiplier": "3"}), ("Prefix", "/"));
    let passed = (0..10).filter(|_| status(&rig.get("a.com", "/", "")) == 200).count();
    assert!((4..=5).contains(&passed), "one, a burst of three, and what a second brings: {passed}");
}

#[test]
fn browsers_are_told_what_they_may_do() {
    let rig = simple(&json!({"enable-cors": "true", "cors-allow-origin": "https://my.app"}), ("Prefix", "/"));
    let preflight =
        rig.raw(b"OPTIONS / HTTP/1.1\r\nHost: a.com\r\nOrigin: https://my.app\r\nConnection: close\r\n\r\n");
    assert_eq!(status(&preflight), 204, "{preflight}");
    assert_eq!(field(&preflight, "access-control-allow-origin"), Some("https://my.app"));
    assert_eq!(field(&preflight, "access-control-max-age"), Some("1728000"));
    let other = rig.get("a.com", "/", "Origin: https://evil.app\r\n");
    assert_eq!((status(&other), field(&other, "access-control-allow-origin")), (200, None));
}

#[test]
fn a_dead_endpoint_costs_no_request() {
    let dead = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let rig = Rig::start(&table(vec![document], &[("web", &[dead, backend("web")])], &[]));
    assert!((0..20).all(|_| who(&rig.get("a.com", "/", "")) == "web"));
    let none = ingress("none", "n.com", &json!({}), &[("Prefix", "/", "none"), ("Prefix", "/dead", "dead")]);
    rig.proxy.apply(&table(vec![none], &[("none", &[]), ("dead", &[dead])], &[]));
    assert_eq!(status(&rig.get("n.com", "/", "")), 503);
    assert_eq!(status(&rig.get("n.com", "/dead", "")), 502);
    assert_eq!(status(&rig.get("a.com", "/", "")), 404, "the table is another now");
}

#[test]
fn a_backend_that_is_silent_gets_504() {
    let rig = simple(&json!({"proxy-read-timeout": "1", "proxy-next-upstream": "off"}), ("Prefix", "/"));
    assert_eq!(status(&rig.get("a.com", "/sleep", "")), 504);
}

#[test]
fn a_cookie_holds_a_client_to_its_endpoint() {
    let document = ingress(
        "web",
        "a.com",
        &json!({"affinity": "cookie", "session-cookie-name": "route"}),
        &[("Prefix", "/", "web")],
    );
    let two = [backend("one"), backend("two")];
    let rig = Rig::start(&table(vec![document], &[("web", &two)], &[]));
    let first = rig.get("a.com", "/", "");
    let cookie = field(&first, "set-cookie").unwrap().split(';').next().unwrap().to_owned();
    assert!(cookie.starts_with("route="), "{cookie}");
    for _ in 0..10 {
        let next = rig.get("a.com", "/", &format!("Cookie: {cookie}\r\n"));
        assert_eq!((who(&next), field(&next, "set-cookie")), (who(&first), None));
    }
}

#[test]
fn the_canary_is_asked_by_header_and_by_weight() {
    let main = ingress("main", "a.com", &json!({}), &[("Prefix", "/", "main")]);
    let canary = json!({"canary": "true", "canary-by-header": "X-Canary", "canary-weight": "30"});
    let canary = ingress("next", "a.com", &canary, &[("Prefix", "/", "next")]);
    let rig = Rig::start(&table(
        vec![main, canary],
        &[("main", &[backend("main")]), ("next", &[backend("next")])],
        &[],
    ));
    assert_eq!(who(&rig.get("a.com", "/", "X-Canary: always\r\n")), "next");
    assert_eq!(who(&rig.get("a.com", "/", "X-Canary: never\r\n")), "main");
    let share = (0..300).filter(|_| who(&rig.get("a.com", "/", "")) == "next").count();
    assert!((50..=135).contains(&share), "30 % of 300: {share}");
}

#[test]
fn a_websocket_goes_through_without_an_annotation() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    let mut stream = StdStream::connect(rig.plain).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
        .write_all(b"GET /ws HTTP/1.1\r\nHost: a.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .unwrap();
    let head = head_of(&stream).unwrap();
    assert_eq!(status(&head), 101, "{head}");
    stream.write_all(b"hello").unwrap();
    let mut echoed = [0; 5];
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"hello");
}

#[tokio::test]
async fn http_2_over_tls_by_sni_reaches_the_backend_and_shows_a_renewed_certificate() {
    let certificate = |host: &str| {
        let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
        crate::plan::table::Certificate {
            secret: NamespacedName::new("default", format!("{host}-tls")),
            chain_pem: Bytes(made.cert.pem().into_bytes()),
            key_pem: Bytes(made.signing_key.serialize_pem().into_bytes()),
        }
    };
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.certificates.insert("a.com".to_owned(), certificate("a.com"));
    table.default_certificate = Some(certificate("default"));
    let rig = Rig::start(&table);
    let shown = async |name: &'static str| {
        let config = tls::client_config(None, None, true).unwrap();
        let stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from(name).unwrap();
        let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
        let own = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("https://a.com/x").body(body::Body::Empty).unwrap();
        (sender.send_request(request).await.unwrap().status(), own)
    };
    let ((status, own), (_, default)) = (shown("a.com").await, shown("b.com").await);
    assert_eq!(status, 200);
    assert_ne!(own, default);
    table.certificates.insert("a.com".to_owned(), certificate("a.com"));
    rig.proxy.apply(&table);
    assert_ne!(shown("a.com").await.1, own, "renewed");
}
