//! The proxy over real sockets: Ingresses as users write them, planned, served, and asked with raw bytes.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use weft_model::ingress::{Answer, Bytes, Data, Front, Reference};
use weft_model::{NamespacedName, SharedMap};
use weft_netstack::reconcile::Planner as _;

use super::*;
use crate::plan::IngressPlanner;
use crate::plan::table::{Backend, Target};
use crate::plan::tests::snapshot;

/// Answers each request with its name, the request line and the fields it got; `/sleep` never answers, `/second` takes one; an Upgrade is
/// accepted and echoes.
pub(super) fn backend(name: &'static str) -> SocketAddr {
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
    if head.contains("/second") {
        std::thread::sleep(Duration::from_secs(1));
    }
    let status = match (head.contains("/deny"), head.contains("/broken")) {
        (true, _) => "401 Unauthorized",
        (_, true) => "503 Service Unavailable",
        _ => "200 OK",
    };
    let body = if head.contains("/big") { "x".repeat(60 * 1024) } else { format!("{name}\n{head}") };
    let extra = "X-User: ann\r\nConnection: X-Hop\r\nX-Hop: 1\r\n";
    let answer = format!("HTTP/1.1 {status}\r\n{extra}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).ok()
}

pub(super) fn head_of(mut stream: &StdStream) -> Option<String> {
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
pub(super) struct Rig {
    pub(super) plain: SocketAddr,
    pub(super) plain_6: SocketAddr,
    pub(super) tls: SocketAddr,
    pub(super) tls_6: SocketAddr,
    pub(super) proxy: Arc<Proxy>,
    pub(super) phase: watch::Sender<listen::Phase>,
    pub(super) open: Arc<()>,
}

impl Rig {
    pub(super) fn start(table: &RouteTable) -> Self {
        Self::start_for_readers(table, Duration::from_secs(60))
    }

    /// With no more patience than this for clients that read nothing.
    pub(super) fn start_for_readers(table: &RouteTable, unread: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tickets = folder.path().join("tickets.key");
        tickets::prepare(&tickets).unwrap();
        Self::start_with(table, &tickets, unread)
    }

    /// With the keys for session tickets that stand there.
    fn start_with(table: &RouteTable, tickets: &std::path::Path, unread: Duration) -> Self {
        let proxy = Proxy::new(tickets).unwrap();
        proxy.apply(table);
        let (phase, phases) = watch::channel(listen::Phase::Serving);
        let open = Arc::new(());
        let life = listen::Life {
            phase: phases,
            early: Arc::downgrade(&open),
            late: Arc::downgrade(&open),
            patience: listen::Patience {
                head: Duration::from_secs(2),
                body: Duration::from_secs(1),
                handshake: Duration::from_secs(2),
                passthrough: Duration::from_secs(1),
                unread,
            },
        };
        let (tell, told) = std::sync::mpsc::channel();
        let worker = proxy.worker();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let any_6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
                let [plain, plain_6, tls, tls_6] =
                    [any, any_6, any, any_6].map(|at| listen::bind(at).unwrap());
                let bound = [&plain, &plain_6, &tls, &tls_6];
                tell.send(bound.map(|bound| bound.local_addr().unwrap())).unwrap();
                let serve = |listener, https| listen::serve(worker.clone(), listener, https, life.clone());
                tokio::join!(
                    serve(plain, false),
                    serve(plain_6, false),
                    serve(tls, true),
                    serve(tls_6, true)
                );
            });
        });
        let [plain, plain_6, tls, tls_6] = told.recv().unwrap();
        Self { plain, plain_6, tls, tls_6, proxy, phase, open }
    }

    /// Everything that comes back for these bytes, until the proxy closes or is silent.
    fn raw(&self, bytes: &[u8]) -> String {
        Self::raw_at(self.plain, bytes)
    }

    pub(super) fn raw_at(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = StdStream::connect(address).unwrap();
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

pub(super) fn status(answer: &str) -> u16 {
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
    let mut referred = SharedMap::new();
    for (secret, key, value) in secrets {
        let data = Data(BTreeMap::from([((*key).to_owned(), Bytes(value.as_bytes().to_vec()))]));
        let name = NamespacedName::new("default", *secret);
        referred.insert(Reference::Secret(name), Arc::new(Answer::Found(data)));
    }
    snapshot.referred = Arc::new(referred);
    let mut table = IngressPlanner::default().plan(&snapshot).plan;
    for (key, backend) in &mut table.backends {
        let found = services.iter().find(|(name, _)| **name == *key.service.name);
        let Some((_, addresses)) = found else { continue };
        let target =
            |address: &SocketAddr| Target { address: *address, terminating: false, pod: None, node: None };
        *backend = Arc::new(Backend::Endpoints(addresses.iter().map(target).collect()));
    }
    table
}

fn simple(annotations: &Value, path: (&str, &str)) -> Rig {
    let document = ingress("web", "a.com", annotations, &[(path.0, path.1, "web")]);
    Rig::start(&table(vec![document], &[("web", &[backend("web")])], &[]))
}

/// All of `a.com` goes to one backend.
pub(super) fn simple_table(annotations: &Value, web: SocketAddr) -> RouteTable {
    let document = ingress("web", "a.com", annotations, &[("Prefix", "/", "web")]);
    table(vec![document], &[("web", &[web])], &[])
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
        (
            "a coding beside chunked (6.1)",
            "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
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
    let answer = rig.get("a.com", "/", "Authorization: Basic YW5uOnBhc3N3b3Jk\r\n");
    assert_eq!(status(&answer), 200);
    assert!(!answer.contains("authorization"), "the backend is not told the password: {answer}");
    assert_eq!(status(&rig.get("a.com", "/", "Authorization: Basic YW5uOnBhc3N3b3Jx\r\n")), 401);
    let open = simple(&json!({}), ("Prefix", "/"));
    assert!(open.get("a.com", "/", "Authorization: Bearer x\r\n").contains("authorization: Bearer x"));
}

#[test]
fn a_password_by_digest_passes_once_for_each_count() {
    let md5 = |text: &str| super::htpasswd::hex(&super::htpasswd::md5(text.as_bytes()));
    let ha1 = md5("ann:Cellar:secret");
    for (kind, key, value) in [
        ("auth-file", "auth", format!("# staff\nann:Attic:0\nann:Cellar:{ha1}\n")),
        ("auth-map", "ann", format!("Cellar:{ha1}")),
    ] {
        let annotations = json!({"auth-type": "digest", "auth-secret": "users", "auth-secret-type": kind,
            "auth-realm": "Cellar"});
        let document = ingress("web", "a.com", &annotations, &[("Prefix", "/", "web")]);
        let rig =
            Rig::start(&table(vec![document], &[("web", &[backend("web")])], &[("users", key, &value)]));
        let challenge = |answer: &str| field(answer, "www-authenticate").unwrap_or_default().to_owned();
        let asked = challenge(&rig.get("a.com", "/x?y", ""));
        let nonce = asked.split("nonce=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        assert_eq!(asked, format!("Digest realm=\"Cellar\", qop=\"auth\", algorithm=MD5, nonce=\"{nonce}\""));
        let told = |user: &str, ha1: &str| {
            let response = md5(&format!("{ha1}:{nonce}:00000001:c:auth:{}", md5("GET:/x?y")));
            format!(
                "Authorization: Digest username=\"{user}\", realm=\"Cellar\", nonce=\"{nonce}\", uri=\"/x?y\", \
                 nc=00000001, cnonce=\"c\", qop=auth, response=\"{response}\"\r\n"
            )
        };
        assert_eq!(status(&rig.get("a.com", "/x?y", &told("ann", &md5("ann:Cellar:wrong")))), 401, "{kind}");
        assert_eq!(status(&rig.get("a.com", "/x?y", &told("bob", &ha1))), 401, "{kind}");
        let answer = rig.get("a.com", "/x?y", &told("ann", &ha1));
        assert_eq!((status(&answer), answer.contains("Digest")), (200, false), "{kind}: {answer}");
        let again = rig.get("a.com", "/x?y", &told("ann", &ha1));
        assert_eq!(
            (status(&again), challenge(&again).ends_with(", stale=true")),
            (401, true),
            "{kind}: {again}"
        );
        assert_eq!(status(&rig.get("a.com", "/other", &told("ann", &ha1))), 401, "{kind}");
    }
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
    let (_held, dead) = dead();
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

pub(super) fn certificate(host: &str) -> crate::plan::table::Certificate {
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    crate::plan::table::Certificate {
        secret: NamespacedName::new("default", format!("{host}-tls")),
        chain_pem: Bytes(made.cert.pem().into_bytes()),
        key_pem: Bytes(made.signing_key.serialize_pem().into_bytes()),
    }
}

type Http2 = hyper::client::conn::http2::SendRequest<body::Body>;

/// TLS of a client that offers HTTP/2 and trusts everybody.
pub(super) async fn tls_for_http_2(
    at: SocketAddr,
    name: &'static str,
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    let config = tls::client_config(None, None, true).unwrap();
    let stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(name).unwrap();
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap()
}

/// A client that speaks HTTP/2 to `a.com`, and the future that drives it.
async fn http_2(rig: &Rig) -> (Http2, impl Future<Output = hyper::Result<()>> + Send + use<>) {
    let stream = tls_for_http_2(rig.tls, "a.com").await;
    let executor = hyper_util::rt::TokioExecutor::new();
    hyper::client::conn::http2::handshake(executor, hyper_util::rt::TokioIo::new(stream)).await.unwrap()
}

#[tokio::test]
async fn http_2_over_tls_by_sni_reaches_the_backend_and_shows_a_renewed_certificate() {
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.certificates.insert("a.com".to_owned(), certificate("a.com").into());
    table.default_certificate = Some(certificate("default").into());
    let rig = Rig::start(&table);
    let shown = async |name: &'static str| {
        let stream = tls_for_http_2(rig.tls, name).await;
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
    table.certificates.insert("a.com".to_owned(), certificate("a.com").into());
    rig.proxy.apply(&table);
    assert_ne!(shown("a.com").await.1, own, "renewed");
}

/// A backend behind a host without TLS annotations, with these proxies in front.
fn behind(trusted: &[&str], proxy_protocol: bool, annotations: &Value) -> Rig {
    let document = ingress("web", "a.com", annotations, &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.front =
        Front { trusted: trusted.iter().map(|range| range.parse().unwrap()).collect(), proxy_protocol };
    Rig::start(&table)
}

#[test]
fn what_a_trusted_proxy_in_front_says_of_the_client_is_believed_in_both_families() {
    let rig = behind(&["127.0.0.0/8", "::1/128"], false, &json!({"denylist-source-range": "192.0.2.66"}));
    let ask = |at, fields: &str| {
        let text = format!("GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{fields}\r\n");
        Rig::raw_at(at, text.as_bytes())
    };
    for at in [rig.plain, rig.plain_6] {
        let fields = "X-Forwarded-For: 6.6.6.6, 2001:db8::1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.com\r\n";
        let got = ask(at, fields);
        for line in [
            "x-real-ip: 2001:db8::1",
            "x-forwarded-for: 2001:db8::1",
            "x-original-forwarded-for: 6.6.6.6, 2001:db8::1",
            "x-forwarded-proto: https",
            "x-forwarded-port: 443",
            "x-forwarded-host: shop.com",
            "host: shop.com",
        ] {
            assert!(got.lines().any(|got| got == line), "{line}: {got}");
        }
        assert_eq!(status(&ask(at, "X-Forwarded-For: 192.0.2.66\r\n")), 403, "lists are for the client");
        assert_eq!(status(&ask(at, "X-Forwarded-For: 192.0.2.66, 192.0.2.1\r\n")), 200);
        let by = if at.is_ipv6() { "\"[::1]\"" } else { "127.0.0.1" };
        let got = ask(at, "Forwarded: for=192.0.2.7;proto=https\r\n");
        assert!(got.contains(&format!("forwarded: for=192.0.2.7;proto=https, for={by}\r\n")), "{got}");
        assert!(
            got.contains("x-real-ip: 192.0.2.7\r\n") && got.contains("x-forwarded-proto: https\r\n"),
            "{got}"
        );
    }
}

/// ingress-nginx: `ssl-redirect` respects X-Forwarded-Proto of a load balancer that has ended TLS.
#[test]
fn where_a_trusted_proxy_ended_tls_nobody_is_sent_to_https_again() {
    let rig = behind(&["127.0.0.1/32"], false, &json!({"force-ssl-redirect": "true"}));
    assert_eq!(status(&rig.get("a.com", "/", "X-Forwarded-Proto: https\r\n")), 200);
    assert_eq!(status(&rig.get("a.com", "/", "X-Forwarded-Proto: http\r\n")), 308);
    let answer = rig.get("a.com", "/x", "X-Forwarded-Host: shop.com:8080\r\n");
    assert_eq!(field(&answer, "location"), Some("https://shop.com/x"));
    let rig = behind(&["192.0.2.0/24"], false, &json!({"force-ssl-redirect": "true"}));
    assert_eq!(status(&rig.get("a.com", "/", "X-Forwarded-Proto: https\r\n")), 308, "said by a stranger");
}

#[test]
fn a_load_balancers_proxy_header_names_the_client_in_both_versions_and_families() {
    let rig = behind(&["127.0.0.1/32", "::1/128"], true, &json!({}));
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n";
    let mut version_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    version_2.extend([192, 0, 2, 7, 10, 0, 0, 1, 0x12, 0x67, 1, 187]);
    for at in [rig.plain, rig.plain_6] {
        let ask = |header: &[u8]| Rig::raw_at(at, &[header, request].concat());
        let got = ask(b"PROXY TCP6 2001:db8::7 fd00::1 4711 443\r\n");
        assert!(
            got.contains("x-real-ip: 2001:db8::7\r\n") && got.contains("x-forwarded-port: 443\r\n"),
            "{got}"
        );
        assert!(!got.contains("6.6.6.6"), "the client itself is not trusted: {got}");
        assert!(ask(&version_2).contains("x-real-ip: 192.0.2.7\r\n"));
        let own = ask(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00");
        assert_eq!(status(&own), 200, "a health check of the load balancer itself");
        assert_eq!(ask(b""), "", "a connection that begins otherwise is closed");
    }
    let strangers = behind(&["192.0.2.0/24"], true, &json!({}));
    assert_eq!(status(&strangers.raw(request)), 200);
    let forged = [&b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 443\r\n"[..], request].concat();
    assert_eq!(status(&strangers.raw(&forged)), 400, "whoever is not trusted cannot name another client");
}

#[test]
fn a_proxy_header_that_comes_byte_by_byte_is_taken_whole() {
    let rig = behind(&["127.0.0.1/32"], true, &json!({}));
    let mut stream = StdStream::connect(rig.plain).unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 80\r\nGET / HTTP/1.1\r\nHost: a.com\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(status(&head_of(&stream).unwrap()), 200);
}

/// Sends a request on a kept connection and returns the head of the answer, its body read.
fn on_kept(mut stream: &StdStream, path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a.com\r\n\r\n").as_bytes()).unwrap();
    let head = head_of(stream).unwrap();
    let length: usize = field(&head, "content-length").unwrap().parse().unwrap();
    stream.read_exact(&mut vec![0; length]).unwrap();
    head
}

fn ends_within(mut stream: &StdStream, patience: Duration) -> bool {
    stream.set_read_timeout(Some(patience)).unwrap();
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn a_drain_ends_kept_connections_with_their_next_answer_and_idle_ones_by_themselves() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    let [idle, kept, busy] = [(); 3].map(|()| StdStream::connect(rig.plain_6).unwrap());
    for stream in [&idle, &kept] {
        assert_eq!(field(&on_kept(stream, "/"), "connection"), None);
    }
    let asked =
        std::thread::spawn(move || (on_kept(&busy, "/second"), ends_within(&busy, Duration::from_secs(1))));
    std::thread::sleep(Duration::from_millis(300));
    rig.phase.send_replace(listen::Phase::Draining);
    let (answer, ended) = asked.join().unwrap();
    assert_eq!((status(&answer), field(&answer, "connection"), ended), (200, Some("close"), true));
    // A request that crosses the word is answered still: the connection was quiet for less than a second.
    assert!(ends_within(&idle, Duration::from_secs(2)));
    let rig = simple(&json!({}), ("Prefix", "/"));
    let kept = StdStream::connect(rig.plain).unwrap();
    on_kept(&kept, "/");
    rig.phase.send_replace(listen::Phase::Draining);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(field(&on_kept(&kept, "/"), "connection"), Some("close"));
    assert!(ends_within(&kept, Duration::from_millis(500)));
    let new = StdStream::connect(rig.plain).unwrap();
    assert_eq!(field(&on_kept(&new, "/"), "connection"), None, "new ones are served as ever meanwhile");
    rig.phase.send_replace(listen::Phase::Ending);
    assert!(ends_within(&new, Duration::from_secs(2)));
}

#[tokio::test]
async fn a_drain_ends_http_2_with_goaway_after_the_requests_that_are_under_way() {
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.default_certificate = Some(certificate("a.com").into());
    let rig = Rig::start(&table);
    let (mut sender, connection) = http_2(&rig).await;
    let ended = tokio::spawn(connection);
    let request = || http::Request::get("https://a.com/second").body(body::Body::Empty).unwrap();
    let under_way = sender.send_request(request());
    let drained = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        rig.phase.send_replace(listen::Phase::Draining);
    };
    let (answer, ()) = tokio::join!(under_way, drained);
    assert_eq!(answer.unwrap().status(), 200);
    tokio::time::timeout(Duration::from_secs(2), ended).await.unwrap().unwrap().expect("GOAWAY is no error");
    assert!(sender.send_request(request()).await.is_err(), "the client must take another connection");
}

/// What is written, for everybody who holds it.
#[derive(Clone, Default)]
pub(super) struct Paper(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Paper {
    /// The lines as JSON, once there are so many.
    pub(super) fn lines(&self, count: usize) -> Vec<Value> {
        for _ in 0..200 {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            if lines.len() >= count {
                return lines;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("fewer than {count} lines")
    }
}

#[test]
fn each_request_is_a_json_line_where_the_log_is_on() {
    let quiet = json!({"enable-access-log": "false"});
    let documents = vec![
        ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]),
        ingress("quiet", "q.com", &quiet, &[("Prefix", "/", "web")]),
    ];
    let web = backend("web");
    let mut table = table(documents, &[("web", &[web])], &[]);
    table.front.trusted = vec!["127.0.0.1/32".parse().unwrap()];
    let rig = Rig::start(&table);
    let paper = Paper::default();
    rig.proxy.log_to(paper.clone());
    rig.get("a.com", "/before", "");
    table.observe.access_log = true;
    rig.proxy.apply(&table);
    rig.get("q.com", "/", "");
    let answer = rig.get("a.com", "/x?y=1", "User-Agent: a\"b\r\nX-Forwarded-For: 2001:db8::1\r\n");
    rig.get("nobody.com", "/", "");
    rig.raw(b"GET /%00 HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n");
    let lines = paper.lines(3);
    assert_eq!(lines.len(), 3, "{lines:#?}");
    let mut first = lines[0].clone();
    let first = first.as_object_mut().unwrap();
    let (time, seconds) = (first.remove("time").unwrap(), first.remove("seconds").unwrap());
    assert!(time.as_str().unwrap().ends_with('Z') && seconds.as_f64().unwrap() > 0.0);
    let body = answer.split("\r\n\r\n").skip(1).collect::<Vec<_>>().join("\r\n\r\n");
    let expected = json!({"client": "2001:db8::1", "method": "GET", "host": "a.com", "target": "/x?y=1",
        "protocol": "HTTP/1.1", "https": false, "user_agent": "a\"b", "status": 200, "received_bytes": 0,
        "sent_bytes": body.len(), "namespace": "default", "ingress": "web", "service": "web",
        "endpoint": web.to_string()});
    assert_eq!(Value::Object(first.clone()), expected);
    assert_eq!((&lines[1]["status"], &lines[1]["ingress"]), (&json!(404), &Value::Null));
    assert_eq!((&lines[2]["status"], &lines[2]["target"]), (&json!(400), &json!("/%00")));
}

#[test]
fn requests_are_counted_by_route_and_what_is_refused_by_its_reason() {
    let main = ingress("main", "a.com", &json!({}), &[("Prefix", "/", "main")]);
    let canary = json!({"canary": "true", "canary-by-header": "X-Canary"});
    let canary = ingress("next", "a.com", &canary, &[("Prefix", "/", "next")]);
    let mut table =
        table(vec![main, canary], &[("main", &[backend("main")]), ("next", &[backend("next")])], &[]);
    table.observe.nginx_metrics = true;
    table.front = Front { trusted: vec!["::1/128".parse().unwrap()], proxy_protocol: true };
    let rig = Rig::start(&table);
    for _ in 0..3 {
        rig.get("a.com", "/", "");
    }
    rig.get("a.com", "/broken", "X-Canary: always\r\n");
    rig.get("b.com", "/", "");
    rig.get("a b", "/", "");
    rig.raw(b"GET / HTTP/1.1\r\nHost: a.com\r\nX : 1\r\n\r\n");
    Rig::raw_at(rig.plain_6, b"GET / HTTP/1.1\r\n\r\n");
    Rig::raw_at(rig.tls, b"GET / HTTP/1.1\r\n\r\n");
    let text = rig.proxy.metrics();
    let labels = r#"namespace="default",ingress="main",host="a.com",path="/",service="main""#;
    for (part, count) in [
        (format!("weft_ingress_requests_total{{{labels},status=\"200\"}}"), 3),
        (format!("weft_ingress_requests_total{{{labels},status=\"503\"}}"), 1),
        (format!("weft_ingress_request_duration_seconds_count{{{labels}}}"), 4),
        ("weft_ingress_refused_total{reason=\"no_route\"}".to_owned(), 1),
        ("weft_ingress_refused_total{reason=\"host\"}".to_owned(), 1),
        ("weft_ingress_refused_total{reason=\"malformed\"}".to_owned(), 1),
        ("weft_ingress_refused_total{reason=\"proxy_header\"}".to_owned(), 1),
        ("weft_ingress_refused_total{reason=\"tls_handshake\"}".to_owned(), 1),
    ] {
        let line = format!("{part} {count}\n");
        // A connection is counted when it has ended.
        let told = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            rig.proxy.metrics().contains(&line)
        });
        assert!(told, "{line}{}", rig.proxy.metrics());
    }
    assert!(text.contains("method=\"GET\",status=\"503\",canary=\"next\"} 1\n"), "{text}");
}

#[tokio::test]
async fn a_client_resumes_its_tls_session_after_a_restart() {
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.default_certificate = Some(certificate("a.com").into());
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("tickets.key");
    tickets::prepare(&keys).unwrap();
    let config = tls::client_config(None, None, false).unwrap();
    let handshake = async |rig: &Rig| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("a.com").unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(config.clone()).connect(name, stream).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert_eq!(status(&String::from_utf8_lossy(&answer)), 200);
        stream.get_ref().1.handshake_kind().unwrap()
    };
    assert_eq!(
        handshake(&Rig::start_with(&table, &keys, Duration::from_secs(60))).await,
        rustls::HandshakeKind::Full
    );
    assert_eq!(
        handshake(&Rig::start_with(&table, &keys, Duration::from_secs(60))).await,
        rustls::HandshakeKind::Resumed
    );
    assert_eq!(handshake(&Rig::start(&table)).await, rustls::HandshakeKind::Full, "another node's keys");
}

#[test]
fn a_mirror_gets_each_request_with_its_body_and_the_client_only_the_backends_answer() {
    let (mirror, copies) = recorder();
    let rig = |annotations: Value| simple(&annotations, ("Prefix", "/"));
    let post = |rig: &Rig, framing: &str, body: &str| {
        let text =
            format!("POST /x?y=1 HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{framing}\r\n\r\n{body}");
        let answer = rig.raw(text.as_bytes());
        assert_eq!((status(&answer), who(&answer)), (200, "web"));
        copies.recv_timeout(Duration::from_secs(5)).unwrap()
    };
    let all = rig(json!({"mirror-target": format!("http://{mirror}$request_uri")}));
    let copy = post(&all, "Content-Length: 3", "abc");
    assert!(copy.starts_with("POST /x?y=1 HTTP/1.1\r\n") && copy.ends_with("\r\n\r\nabc"), "{copy}");
    assert!(
        copy.contains(&format!("host: {mirror}\r\n")) && copy.contains("x-real-ip: 127.0.0.1\r\n"),
        "{copy}"
    );
    let copy = post(&all, "Transfer-Encoding: chunked", "3\r\nabc\r\n0\r\n\r\n");
    assert!(copy.ends_with("3\r\nabc\r\n0\r\n\r\n"), "{copy}");
    let head = rig(json!({"mirror-target": format!("http://{mirror}"), "mirror-request-body": "off",
        "mirror-host": "copy.example"}));
    let copy = post(&head, "Content-Length: 3", "abc");
    assert!(copy.starts_with("POST /x?y=1 HTTP/1.1\r\n") && copy.ends_with("\r\n\r\n"), "{copy}");
    assert!(copy.contains("host: copy.example\r\n") && !copy.contains("content-length: 3"), "{copy}");
    let dead = rig(json!({"mirror-target": "http://127.0.0.1:1/"}));
    assert_eq!(who(&dead.get("a.com", "/", "")), "web", "a mirror that is away costs nothing");
}

/// Takes one request a connection, gives it to the test, and never answers.
fn recorder() -> (SocketAddr, std::sync::mpsc::Receiver<String>) {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut text = head_of(&stream).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                text.push_str(std::str::from_utf8(&piece[..length]).unwrap());
            }
            open.push(stream);
            if tell.send(text).is_err() {
                return;
            }
        }
    });
    (address, told)
}

#[test]
fn an_answer_is_sent_at_its_rate_after_what_is_free() {
    let rig = simple(&json!({"limit-rate": "100", "limit-rate-after": "50"}), ("Prefix", "/"));
    // The backend answers with the head that it got.
    let long = format!("X-Long: {}\r\n", "x".repeat(20_000));
    let started = std::time::Instant::now();
    assert_eq!(status(&rig.get("a.com", "/", &long)), 200);
    assert!(started.elapsed() < Duration::from_millis(150), "20 kB of 50 are free");
    let slow = simple(&json!({"limit-rate": "20"}), ("Prefix", "/"));
    let started = std::time::Instant::now();
    let answer = slow.get("a.com", "/big", "");
    let took = started.elapsed();
    assert_eq!(answer.split("\r\n\r\n").nth(1).map(str::len), Some(60 * 1024));
    assert!((2.0..5.0).contains(&took.as_secs_f64()), "60 kB at 20 kB a second: {took:?}");
}

#[test]
fn the_cookie_of_an_endpoint_that_failed_stays_unless_it_is_told_to_change() {
    for (change, sets) in [("false", false), ("true", true)] {
        let annotations = json!({"affinity": "cookie", "session-cookie-name": "route",
            "session-cookie-change-on-failure": change});
        let document = ingress("web", "a.com", &annotations, &[("Prefix", "/", "web")]);
        let (_held, dead) = dead();
        let rig = Rig::start(&table(vec![document], &[("web", &[dead, backend("web")])], &[]));
        let token = rig.proxy.standing.endpoints.one(dead).token();
        let answer = rig.get("a.com", "/", &format!("Cookie: route={token}\r\n"));
        assert_eq!((who(&answer), field(&answer, "set-cookie").is_some()), ("web", sets), "{answer}");
        let gone = rig.get("a.com", "/", "Cookie: route=0123456789abcdef\r\n");
        assert!(field(&gone, "set-cookie").is_some(), "an endpoint that is no more");
    }
}

/// An address that refuses connections as long as the socket is held: nobody else gets its port.
fn dead() -> (tokio::net::TcpSocket, SocketAddr) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// How often the proxy has refused for this reason.
fn refused(rig: &Rig, reason: &str) -> u64 {
    let text = rig.proxy.metrics();
    let start = format!("weft_ingress_refused_total{{reason=\"{reason}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&start)).unwrap().parse().unwrap()
}

#[test]
fn clients_that_only_drip_are_cut_off_and_counted() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    for (address, first) in [
        (rig.plain, &b"GET / HTTP/1.1\r\nHost: a.com\r\n"[..]),
        (rig.plain_6, b"G"),
        (rig.tls, b"\x16\x03\x01"),
    ] {
        let mut stream = StdStream::connect(address).unwrap();
        stream.write_all(first).unwrap();
        let started = std::time::Instant::now();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // A byte of a field every tenth of a second, for as long as it is taken.
        let ended = loop {
            let dripped = address == rig.tls || stream.write_all(b"X").is_ok();
            let mut piece = [0; 256];
            match stream.read(&mut piece) {
                Ok(0) => break true,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break true,
                _ if !dripped => break true,
                _ if started.elapsed() > Duration::from_secs(5) => break false,
                _ => {}
            }
        };
        assert!(ended && started.elapsed() >= Duration::from_millis(1500), "{:?}", started.elapsed());
    }
    let counted = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        refused(&rig, "slow") == 3
    });
    assert!(counted, "{}", refused(&rig, "slow"));
    assert_eq!(status(&rig.get("a.com", "/", "")), 200, "others are served");
}

#[test]
fn too_many_fields_and_tricks_with_paths_get_their_status() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    let many: String = (0..101).map(|number| format!("X-{number}: 1\r\n")).collect();
    assert_eq!(status(&rig.get("a.com", "/", &many)), 431);
    for (path, wanted) in [
        ("/..", 400),
        ("/%2e%2e/", 400),
        ("/a/%2E%2e/%2e./x", 400),
        ("/a%2f..%2f..%2fetc", 400),
        ("/a%00b", 400),
        ("/a%", 400),
        ("/a%4", 400),
        ("/%gg", 400),
        ("/a/../b", 200),
        ("//a//b", 200),
        ("/%252e%252e/", 200),
        ("/a;/..;/b", 200),
        ("/\u{e9}", 200),
        ("*", 400),
    ] {
        let got = status(&rig.get("a.com", path, ""));
        assert_eq!(got, wanted, "{path}");
    }
    assert_eq!(refused(&rig, "path"), 9);
}

#[tokio::test]
async fn a_name_in_the_handshake_that_is_no_name_or_that_nobody_has_ends_it() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.certificates.insert("aaaa.com".to_owned(), certificate("aaaa.com").into());
    let rig = Rig::start(&table);
    for (name, sound) in [("aaaa.com", true), ("bbbb.com", false), ("aa\0a.com", false), ("a a..com", false)]
    {
        let config = tls::client_config(None, None, true).unwrap();
        let wanted = rustls::pki_types::ServerName::try_from("aaaa.com").unwrap();
        let mut hello = Vec::new();
        rustls::ClientConnection::new(config, wanted).unwrap().write_tls(&mut hello).unwrap();
        let at = hello.windows(8).position(|bytes| bytes == b"aaaa.com").unwrap();
        hello[at..at + 8].copy_from_slice(name.as_bytes());
        let mut stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
        stream.write_all(&hello).await.unwrap();
        let mut kind = [0; 1];
        stream.read_exact(&mut kind).await.unwrap();
        // Handshake or alert (RFC 8446 5.1).
        assert_eq!(kind[0], if sound { 22 } else { 21 }, "{name:?}");
    }
    for _ in 0..100 {
        if refused(&rig, "tls_handshake") >= 3 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not counted");
}

/// HTTP/2 by hand: what the server says for these frames, until it closes or has said `enough`.
async fn frames(rig: &Rig, sent: Vec<u8>, enough: impl Fn(&[Frame]) -> bool) -> Vec<Frame> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let stream = tls_for_http_2(rig.tls, "a.com").await;
    let (mut from, mut to) = tokio::io::split(stream);
    let writing = tokio::spawn(async move {
        let _ = to.write_all(&sent).await;
        let _ = to.flush().await;
        // Kept open: the server is to close it.
        tokio::time::sleep(Duration::from_secs(5)).await;
    });
    let mut heard = Vec::new();
    let reading = async {
        while !enough(&heard) {
            let mut head = [0; 9];
            if from.read_exact(&mut head).await.is_err() {
                return;
            }
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let mut content = vec![0; length];
            if from.read_exact(&mut content).await.is_err() {
                return;
            }
            heard.push(Frame { kind: head[3], content });
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reading).await.expect("the server says nothing");
    writing.abort();
    heard
}

struct Frame {
    kind: u8,
    content: Vec<u8>,
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

fn preface(settings: &[u8]) -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(SETTINGS, 0, 0, settings).as_slice()].concat()
}

/// `GET https://a.com/` (RFC 7541, appendix A).
const GET: &[u8] = b"\x82\x87\x84\x41\x05a.com";

fn error_of(heard: &[Frame]) -> Option<u32> {
    let goaway = heard.iter().find(|frame| frame.kind == GOAWAY)?;
    Some(u32::from_be_bytes(goaway.content[4..8].try_into().unwrap()))
}

fn http_2_rig() -> Rig {
    let document = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![document], &[("web", &[backend("web")])], &[]);
    table.default_certificate = Some(certificate("a.com").into());
    Rig::start(&table)
}

async fn await_flood(rig: &Rig, count: u64) {
    for _ in 0..100 {
        if refused(rig, "flood") >= count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not counted: {}", rig.proxy.metrics());
}

/// ENHANCE_YOUR_CALM (RFC 9113 7).
const CALM: u32 = 0xb;

#[tokio::test]
async fn a_client_that_resets_what_it_asks_is_told_to_calm_down() {
    let rig = http_2_rig();
    let mut sent = preface(&[]);
    for number in 0..2000 {
        let stream = 2 * number + 1;
        sent.extend(frame(HEADERS, 0x5, stream, GET));
        sent.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    let heard = frames(&rig, sent, |heard| error_of(heard).is_some_and(|error| error != 0)).await;
    assert_eq!(error_of(&heard), Some(CALM));
    await_flood(&rig, 1).await;
    let heard = frames(&rig, [preface(&[]), frame(HEADERS, 0x5, 1, GET)].concat(), |heard| {
        heard.iter().any(|frame| frame.kind == HEADERS)
    });
    assert!(!heard.await.is_empty(), "others are served");
}

#[tokio::test]
async fn a_head_without_end_ends_the_connection() {
    let rig = http_2_rig();
    let mut sent = [preface(&[]), frame(HEADERS, 0x1, 1, GET)].concat();
    // Literals that nobody is to remember, 16 kB a frame, 16 MB in all.
    let field = [b"\x00\x01x\x7f\x01".as_slice(), &[b'y'; 128]].concat();
    let block = field.repeat(16_000 / field.len());
    for _ in 0..1000 {
        sent.extend(frame(CONTINUATION, 0, 1, &block));
    }
    let heard = frames(&rig, sent, |heard| error_of(heard).is_some()).await;
    assert_eq!(error_of(&heard), Some(CALM));
    await_flood(&rig, 1).await;
}

#[tokio::test]
async fn header_tables_stay_small_whatever_the_client_says() {
    let rig = http_2_rig();
    let answered = |heard: &[Frame]| heard.iter().any(|frame| frame.kind == HEADERS);
    // SETTINGS_HEADER_TABLE_SIZE of 4 GB is for what the server sends; it need not use it.
    let huge = [0, 1, 0xff, 0xff, 0xff, 0xff];
    let heard = frames(&rig, [preface(&huge), frame(HEADERS, 0x5, 1, GET)].concat(), answered).await;
    assert!(answered(&heard));
    // A table beyond what the server allows (RFC 7541 6.3), 65,536 bytes.
    let grown = [b"\x3f\xe1\xff\x03".as_slice(), GET].concat();
    let heard = frames(&rig, [preface(&[]), frame(HEADERS, 0x5, 1, &grown)].concat(), |heard| {
        error_of(heard).is_some()
    });
    // COMPRESSION_ERROR is what it is called; PROTOCOL_ERROR is what the h2 crate says.
    assert!(matches!(error_of(&heard.await), Some(1 | 9)));
    await_flood(&rig, 1).await;
    // One field of 3 kB in the table, named again and again: 36 kB of fields, or 3 MB, from a few bytes.
    let entry = [b"\x40\x01x\x7f\xb9\x16".as_slice(), &[b'y'; 3000]].concat();
    let bomb = |count: usize| {
        let block = [GET, &entry, &vec![0xbe; count]].concat();
        [preface(&[]), frame(HEADERS, 0x5, 1, &block)].concat()
    };
    let ended = |heard: &[Frame]| answered(heard) || error_of(heard).is_some();
    let heard = frames(&rig, bomb(11), ended).await;
    let refusal = heard.iter().find(|frame| frame.kind == HEADERS).map(|frame| frame.content.clone());
    // `:status` 431, a literal whose value is Huffman-coded (RFC 7541 6.2.1, 5.2).
    assert_eq!(refusal.as_deref().and_then(|block| block.get(..5)), Some(&b"\x48\x83\x69\x90\xff"[..]));
    assert_eq!(error_of(&frames(&rig, bomb(1000), ended).await), Some(CALM));
    await_flood(&rig, 2).await;
}

/// A certificate for a client of this name, and the PEM of the authority that made it.
fn client_identity(name: &str) -> (crate::plan::table::Certificate, String) {
    let mut authority = rcgen::CertificateParams::new([]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = authority.self_signed(&key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, key);
    let mut wanted = rcgen::CertificateParams::new([]).unwrap();
    wanted.distinguished_name = rcgen::DistinguishedName::new();
    wanted.distinguished_name.push(rcgen::DnType::CommonName, name);
    wanted.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let own_key = rcgen::KeyPair::generate().unwrap();
    let made = wanted.signed_by(&own_key, &issuer).unwrap();
    let identity = crate::plan::table::Certificate {
        secret: NamespacedName::new("default", "client"),
        chain_pem: Bytes(made.pem().into_bytes()),
        key_pem: Bytes(own_key.serialize_pem().into_bytes()),
    };
    (identity, pem)
}

#[tokio::test]
async fn a_client_shows_a_certificate_that_is_trusted_and_has_the_wanted_name() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (ann, authority) = client_identity("ann");
    let (stranger, _) = client_identity("ann");
    let rig = |annotations: Value| {
        let document = ingress("web", "a.com", &annotations, &[("Prefix", "/", "web")]);
        let mut table =
            table(vec![document], &[("web", &[backend("web")])], &[("authority", "ca.crt", &authority)]);
        table.default_certificate = Some(certificate("a.com").into());
        Rig::start(&table)
    };
    let ask = async |rig: &Rig, identity: Option<&crate::plan::table::Certificate>| {
        let config = tls::client_config(None, identity, false).unwrap();
        let stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("a.com").unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
        let request =
            b"GET / HTTP/1.1\r\nHost: a.com\r\nssl-client-subject-dn: CN=root\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let trusting = rig(json!({"auth-tls-secret": "authority"}));
    let answer = ask(&trusting, Some(&ann)).await;
    assert_eq!(status(&answer), 200, "{answer}");
    for line in
        ["ssl-client-verify: SUCCESS", "ssl-client-subject-dn: CN=ann", "ssl-client-issuer-dn: CN=authority"]
    {
        assert!(answer.lines().any(|got| got == line), "{line}: {answer}");
    }
    assert!(!answer.contains("CN=root"), "{answer}");
    for nobody in [None, Some(&stranger)] {
        assert_eq!(status(&ask(&trusting, nobody).await), 400);
    }
    let named = |pattern: &str| rig(json!({"auth-tls-secret": "authority", "auth-tls-match-cn": pattern}));
    assert_eq!(status(&ask(&named("CN=(ann|bob)"), Some(&ann)).await), 200);
    assert_eq!(status(&ask(&named("CN=bob"), Some(&ann)).await), 403);
    assert_eq!(status(&ask(&named("CN=ann"), None).await), 400, "there is no name to compare");
    assert_eq!(status(&ask(&named("CN=ann"), Some(&stranger)).await), 400, "the right name from nobody");
}

/// Ends TLS with a certificate of its own for `pass.com`, and says whose connection the PROXY header before it names.
fn tls_backend(header: bool) -> SocketAddr {
    use tokio::io::AsyncWriteExt as _;
    let own = certificate("pass.com");
    let (chain, key) = crate::certificate::pair(&own.chain_pem.0, &own.key_pem.0).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    served(move |mut stream| {
        let acceptor = acceptor.clone();
        async move {
            let named = match header {
                true => format!("{:?}", proxy_protocol::read(&mut stream).await.unwrap()),
                false => String::new(),
            };
            let mut stream = acceptor.accept(stream).await.unwrap();
            stream.write_all(format!("passed {named}").as_bytes()).await.unwrap();
            let _ = stream.shutdown().await;
        }
    })
}

/// A backend on a thread of its own that does this with each connection.
pub(super) fn served<F>(connection: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(connection(stream));
            }
        });
    });
    told.recv().unwrap()
}

pub(super) fn passing(annotations: &Value, endpoints: &[SocketAddr]) -> RouteTable {
    let mut pass =
        ingress("pass", "pass.com", &json!({"ssl-passthrough": "true"}), &[("Prefix", "/", "pass")]);
    for (key, value) in annotations.as_object().unwrap() {
        pass["metadata"]["annotations"][key] = value.clone();
    }
    let web = ingress("web", "a.com", &json!({}), &[("Prefix", "/", "web")]);
    let mut table = table(vec![pass, web], &[("pass", endpoints), ("web", &[backend("web")])], &[]);
    table.default_certificate = Some(certificate("a.com").into());
    table
}

/// What the other end says over TLS, and its certificate.
async fn heard_over_tls(at: SocketAddr, name: &'static str, sent: &[u8]) -> (String, Vec<u8>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let config = tls::client_config(None, None, false).unwrap();
    let stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(name).unwrap();
    let mut config = (*config).clone();
    config.alpn_protocols.clear();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let own = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    stream.write_all(sent).await.unwrap();
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    (String::from_utf8_lossy(&text).into_owned(), own)
}

#[tokio::test]
async fn tls_that_is_passed_on_ends_at_the_backend_and_that_of_other_hosts_here() {
    let (_held, dead) = dead();
    let rig = Rig::start(&passing(&json!({}), &[dead, tls_backend(false)]));
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    for at in [rig.tls, rig.tls_6] {
        let (answer, here) = heard_over_tls(at, "a.com", request).await;
        assert_eq!(who(&answer), "web");
        for _ in 0..4 {
            let (text, own) = heard_over_tls(at, "pass.com", b"").await;
            assert_eq!(text, "passed ");
            assert_ne!(own, here, "the backend's own");
        }
        let misdirected = b"GET / HTTP/1.1\r\nHost: pass.com\r\nConnection: close\r\n\r\n";
        assert_eq!(status(&heard_over_tls(at, "a.com", misdirected).await.0), 421);
    }
    let text = rig.proxy.metrics();
    let labels = r#"namespace="default",ingress="pass",host="pass.com",path="/",service="pass""#;
    assert!(text.contains(&format!("weft_ingress_passed_total{{{labels}}} 8\n")), "{text}");
    let answer = rig.get("pass.com", "/x?y=1", "");
    assert_eq!((status(&answer), field(&answer, "location")), (308, Some("https://pass.com/x?y=1")));
    let passed = |name| rig.proxy.compiled.load().passed(Some(name)).is_some();
    assert!(passed("PASS.com.") && !passed("a.com") && !passed("x.pass.com"));
}

#[tokio::test]
async fn a_backend_that_gets_tls_as_it_is_hears_first_whose_connection_it_is() {
    for version in ["v1", "v2"] {
        let annotation = json!({"weft.network/proxy-protocol": version});
        let mut table = passing(&annotation, &[tls_backend(true)]);
        let rig = Rig::start(&table);
        for at in [rig.tls, rig.tls_6] {
            let (text, _) = heard_over_tls(at, "pass.com", b"").await;
            let address = at.ip();
            assert!(
                text.contains(&format!("asked: {at}"))
                    && text.contains(&format!("client: {}", SocketAddr::new(address, 0)).replace(":0", ":")),
                "{version}: {text}"
            );
        }
        // What a load balancer in front says goes on.
        table.front = Front { trusted: vec!["127.0.0.1/32".parse().unwrap()], proxy_protocol: true };
        rig.proxy.apply(&table);
        let mut stream = tokio::net::TcpStream::connect(rig.tls).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"PROXY TCP6 2001:db8::7 fd00::1 4711 443\r\n")
            .await
            .unwrap();
        let config = tls::client_config(None, None, false).unwrap();
        let mut config = (*config).clone();
        config.alpn_protocols.clear();
        let name = rustls::pki_types::ServerName::try_from("pass.com").unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let mut text = String::new();
        let _ = tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await;
        assert_eq!(text, "passed Passed { client: [2001:db8::7]:4711, asked: [fd00::1]:443 }");
    }
}

pub(super) fn client_hello(name: &'static str) -> Vec<u8> {
    let config = tls::client_config(None, None, true).unwrap();
    let name = rustls::pki_types::ServerName::try_from(name).unwrap();
    let mut hello = Vec::new();
    rustls::ClientConnection::new(config, name).unwrap().write_tls(&mut hello).unwrap();
    hello
}

/// Echoes what it gets; when nothing more comes, it says goodbye.
fn echo() -> SocketAddr {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut piece) {
                    stream.write_all(&piece[..length]).unwrap();
                }
                let _ = stream.write_all(b"goodbye");
            });
        }
    });
    address
}

#[test]
fn bytes_that_are_passed_on_are_the_same_and_each_side_may_end_first() {
    let rig = Rig::start(&passing(&json!({}), &[echo()]));
    let hello = client_hello("pass.com");
    let mut stream = StdStream::connect(rig.tls).unwrap();
    stream.set_nodelay(true).unwrap();
    // A byte at a time, and behind the hello what no TLS would be.
    for byte in &hello {
        stream.write_all(&[*byte]).unwrap();
    }
    let long: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 251) as u8).collect();
    let sent = [&hello[..], &long].concat();
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        writer.write_all(&long).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert_eq!(got.len(), sent.len() + 7);
    assert!(got.starts_with(&sent) && got.ends_with(b"goodbye"));
}

#[test]
fn a_passed_connection_lasts_while_bytes_come_and_through_a_drain() {
    let rig = Rig::start(&passing(&json!({}), &[echo()]));
    let mut stream = StdStream::connect(rig.tls_6).unwrap();
    let hello = client_hello("pass.com");
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut vec![0; hello.len()]).unwrap();
    rig.phase.send_replace(listen::Phase::Draining);
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(400));
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
        assert_eq!(Arc::strong_count(&rig.open), 2, "it is waited for");
    }
    let started = std::time::Instant::now();
    assert!(ends_within(&stream, Duration::from_secs(3)));
    assert!(started.elapsed() > Duration::from_millis(900), "{:?}", started.elapsed());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(Arc::strong_count(&rig.open), 1);
}

#[test]
fn tls_that_no_endpoint_takes_and_a_hello_without_end_are_closed_and_counted() {
    let (_held, dead) = dead();
    for endpoints in [&[dead][..], &[]] {
        let rig = Rig::start(&passing(&json!({}), endpoints));
        let mut stream = StdStream::connect(rig.tls).unwrap();
        stream.write_all(&client_hello("pass.com")).unwrap();
        assert!(ends_within(&stream, Duration::from_secs(2)));
        assert_eq!(refused(&rig, "no_endpoint"), 1);
    }
    let rig = Rig::start(&passing(&json!({}), &[echo()]));
    let mut stream = StdStream::connect(rig.tls).unwrap();
    // A ClientHello of 16 MB in records of 100 bytes (RFC 8446 4, 5.1).
    let mut record = vec![22, 3, 1, 0, 100];
    record.extend([1, 0xff, 0xff, 0xff]);
    record.extend([0; 96]);
    record.extend([&[22, 3, 1, 0, 100][..], &[0; 100]].concat().repeat(1000));
    let _ = stream.write_all(&record);
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let read = stream.read(&mut [0; 1]);
    let reset = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(read.map_or_else(reset, |length| length == 0), "before it is too slow");
    let counted = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        refused(&rig, "tls_handshake") == 1
    });
    assert!(counted);
}

/// Reads the head of a request, and of its body nothing, but the few kilobytes that its socket holds; never answers.
fn deaf() -> SocketAddr {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    nix::sys::socket::setsockopt(&listener, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let open: Vec<_> = listener.incoming().flatten().map(|stream| (head_of(&stream), stream)).collect();
        drop(open);
    });
    address
}

fn upload_rig(annotations: &Value, web: SocketAddr) -> Rig {
    let mut table = simple_table(annotations, web);
    table.default_certificate = Some(certificate("a.com").into());
    Rig::start(&table)
}

/// Sends the pieces of a body of this length, each after its pause, over HTTP/2, and returns the status of the answer.
async fn uploaded_over_http_2(rig: &Rig, pieces: Vec<(Duration, usize)>) -> u16 {
    let stream = tls_for_http_2(rig.tls_6, "a.com").await;
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://a.com/").body(()).unwrap();
    let (response, mut body) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    tokio::spawn(async move {
        for (pause, length) in pieces {
            tokio::time::sleep(pause).await;
            if body.send_data(vec![b'x'; length].into(), false).is_err() {
                return;
            }
        }
        std::future::pending::<()>().await;
    });
    response.await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_client_whose_body_stalls_gets_408_and_the_endpoint_is_not_blamed() {
    let rig = upload_rig(&json!({"proxy-read-timeout": "3", "proxy-send-timeout": "3"}), backend("web"));
    for at in [rig.plain, rig.plain_6] {
        for framing in ["Content-Length: 9\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
            let started = std::time::Instant::now();
            let answer = Rig::raw_at(at, format!("POST / HTTP/1.1\r\nHost: a.com\r\n{framing}").as_bytes());
            assert_eq!((status(&answer), field(&answer, "connection")), (408, Some("close")), "{answer}");
            assert!((1.0..2.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
        }
    }
    let started = std::time::Instant::now();
    assert_eq!(uploaded_over_http_2(&rig, vec![(Duration::ZERO, 3)]).await, 408);
    assert!((1.0..2.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
    let endpoint = rig.proxy.compiled.load().addresses.first().copied().unwrap();
    assert!(!rig.proxy.standing.endpoints.one(endpoint).has_failed());
}

#[test]
fn a_body_that_comes_slowly_but_comes_is_served() {
    let rig = upload_rig(&json!({"proxy-read-timeout": "1", "proxy-send-timeout": "1"}), backend("web"));
    let mut stream = StdStream::connect(rig.plain).unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 6\r\n\r\n").unwrap();
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(500));
        stream.write_all(b"x").unwrap();
    }
    assert_eq!(status(&head_of(&stream).unwrap()), 200);
}

#[tokio::test]
async fn a_backend_that_takes_no_more_of_a_body_gets_504_after_its_own_time() {
    let annotations = json!({"proxy-send-timeout": "1", "proxy-read-timeout": "30", "proxy-body-size": "0"});
    let rig = upload_rig(&annotations, deaf());
    let started = std::time::Instant::now();
    let mut stream = StdStream::connect(rig.plain).unwrap();
    let mut writer = stream.try_clone().unwrap();
    std::thread::spawn(move || {
        writer.write_all(b"POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 100000000\r\n\r\n").unwrap();
        let _ = writer.write_all(&vec![b'x'; 100_000_000]);
    });
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut line = [0; 12];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"HTTP/1.1 504");
    assert!((1.0..4.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
    let started = std::time::Instant::now();
    let much = vec![(Duration::ZERO, 100_000_000)];
    assert_eq!(uploaded_over_http_2(&rig, much).await, 504);
    assert!((1.0..4.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
}

/// A stream of gRPC: the backend has begun to answer, and the client says nothing for longer than a body may be silent.
#[test]
fn a_client_may_be_silent_once_the_answer_has_begun() {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let rig = upload_rig(&json!({}), listener.local_addr().unwrap());
    let backend = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        head_of(&stream).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n").unwrap();
        let mut body = Vec::new();
        let mut byte = [0; 1];
        while !body.ends_with(b"0\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            body.push(byte[0]);
        }
        stream.write_all(b"3\r\nbye\r\n0\r\n\r\n").unwrap();
        String::from_utf8(body).unwrap()
    });
    let mut stream = StdStream::connect(rig.plain).unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        .unwrap();
    assert_eq!(status(&head_of(&stream).unwrap()), 200);
    std::thread::sleep(Duration::from_millis(2500));
    stream.write_all(b"1\r\nb\r\n0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    while !answer.ends_with(b"0\r\n\r\n") {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    assert_eq!(String::from_utf8(answer).unwrap(), "2\r\nhi\r\n3\r\nbye\r\n0\r\n\r\n");
    assert!(backend.join().unwrap().contains("b\r\n"));
}

/// RFC 9113 8.1: an answer may come before the request is whole. curl 7.88 fails when the stream is reset while it sends.
#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let rig = upload_rig(&json!({"proxy-body-size": "1k", "force-ssl-redirect": "true"}), backend("web"));
    let stream = tls_for_http_2(rig.tls, "a.com").await;
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://a.com/").header("content-length", 5_000_000).body(()).unwrap();
    let (response, mut body) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data(vec![b'x'; 4_000_000].into(), false).unwrap();
    assert_eq!(response.await.unwrap().status(), 413);
    // More than a window: somebody takes it.
    body.reserve_capacity(1_000_000);
    tokio::time::sleep(Duration::from_millis(300)).await;
    body.send_data(vec![b'x'; 1_000_000].into(), true).unwrap();
    let reset = std::future::poll_fn(|context| body.poll_reset(context));
    let reset = tokio::time::timeout(Duration::from_secs(2), reset).await;
    assert!(!matches!(reset, Ok(Ok(_))), "{reset:?}");
    // Over HTTP/1.1 the connection even lasts.
    let mut stream = StdStream::connect(rig.plain).unwrap();
    let body = "x".repeat(500_000);
    for _ in 0..2 {
        let head = format!("POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
        let answer = head_of(&stream).unwrap();
        assert_eq!((status(&answer), field(&answer, "connection")), (308, None));
        stream.read_exact(&mut vec![0; field(&answer, "content-length").unwrap().parse().unwrap()]).unwrap();
    }
}

/// Bytes of a client that reads slowly must not make the kernel reset a connection whose last answer is on its way.
#[tokio::test]
async fn a_drain_loses_nothing_of_a_large_answer_that_is_read_slowly() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const LENGTH: usize = 2_000_000;
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let rig = upload_rig(&json!({}), listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        head_of(&stream).unwrap();
        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n").as_bytes()).unwrap();
        stream.write_all(&vec![b'x'; LENGTH]).unwrap();
        std::thread::sleep(Duration::from_secs(10));
    });
    let stream = tls_for_http_2(rig.tls, "a.com").await;
    let (mut from, mut to) = tokio::io::split(stream);
    // SETTINGS_INITIAL_WINDOW_SIZE and a WINDOW_UPDATE of the connection: more than the answer.
    let window = [0, 4, 0x7f, 0xff, 0xff, 0xff];
    let update = frame(8, 0, 0, &0x7000_0000_u32.to_be_bytes());
    to.write_all(&[preface(&window), update, frame(HEADERS, 0x5, 1, GET)].concat()).await.unwrap();
    // By now all of it waits in the sockets.
    tokio::time::sleep(Duration::from_millis(700)).await;
    rig.phase.send_replace(listen::Phase::Draining);
    tokio::spawn(async move {
        // The server asks when a client has heard of its end (RFC 9113 6.8), and it has; further words are for nobody.
        while to.write_all(&frame(6, 1, 0, &[0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54])).await.is_ok() {
            let _ = to.flush().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut got = 0;
    loop {
        let mut head = [0; 9];
        if from.read_exact(&mut head).await.is_err() {
            break;
        }
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        from.read_exact(&mut vec![0; length]).await.unwrap();
        if head[3] == 0 {
            got += length;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert_eq!(got, LENGTH);
}

/// Requests that come in one piece, some for the short path and some for hyper, are answered in their order.
#[test]
fn pipelined_requests_are_answered_one_after_the_other_whichever_path_they_take() {
    let rig = simple(&json!({}), ("Prefix", "/"));
    let usual = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a.com\r\n\r\n");
    let upload = "POST /3 HTTP/1.1\r\nHost: a.com\r\nContent-Length: 3\r\n\r\nabc";
    let last = "GET /5 HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    let short = format!("{}{}{}{}{last}", usual("/1"), usual("/2"), usual("/3"), usual("/4"));
    let mixed = format!("{}{}{upload}{}{last}", usual("/1"), usual("/2"), usual("/4"));
    for (text, third) in [(&short, "GET /3"), (&mixed, "POST /3")] {
        let answers = rig.raw(text.as_bytes());
        let asked: Vec<&str> = answers.lines().filter_map(|line| line.strip_suffix(" HTTP/1.1")).collect();
        assert_eq!(asked, ["GET /1", "GET /2", third, "GET /4", "GET /5"], "{answers}");
        assert_eq!(answers.matches("HTTP/1.1 200 OK\r\n").count(), 5, "{answers}");
    }
}

#[test]
fn a_client_that_leaves_ends_its_request_before_the_answer_and_within_it() {
    let (address, _) = recorder();
    for web in [address, endless()] {
        let rig = upload_rig(&json!({}), web);
        let endpoint = rig.proxy.standing.endpoints.one(web);
        let load = |wanted: usize| {
            (0..200).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                endpoint.load.load(std::sync::atomic::Ordering::Relaxed) == wanted
            })
        };
        let mut stream = StdStream::connect(rig.plain_6).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n").unwrap();
        assert!(load(1), "it is asked");
        drop(stream);
        assert!(load(0), "nobody waits for it any more");
    }
}

/// Begins an answer that it never ends.
fn endless() -> SocketAddr {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let open: Vec<_> = listener
            .incoming()
            .flatten()
            .inspect(|mut stream| {
                head_of(stream).unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc").unwrap();
            })
            .collect();
        drop(open);
    });
    address
}
