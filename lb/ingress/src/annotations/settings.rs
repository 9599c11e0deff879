//! The annotations of one Ingress as typed values, every default filled in (ingress-nginx documentation, last state 1.15).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::PROXY_PROTOCOL;
use super::read::{Reader, is_token};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// What protects the backend cannot be honoured: every request is refused.
    pub closed: bool,
    pub rewrite_target: Option<String>,
    /// Paths of the whole host are case-insensitive regular expressions.
    pub use_regex: bool,
    pub app_root: Option<String>,
    pub ssl_redirect: bool,
    pub force_ssl_redirect: bool,
    /// `permanent-redirect` or `temporal-redirect`: answered instead of forwarded.
    pub redirect: Option<HttpRedirect>,
    pub from_to_www: bool,
    pub backend_protocol: BackendProtocol,
    /// `None` is unlimited.
    pub body_limit_bytes: Option<u64>,
    pub connect_timeout: Duration,
    pub send_timeout: Duration,
    pub read_timeout: Duration,
    pub allow: Option<Vec<IpNet>>,
    pub deny: Vec<IpNet>,
    pub cors: Option<Cors>,
    pub basic: Option<BasicAuth>,
    pub forward_auth: Option<ForwardAuth>,
    pub satisfy: Satisfy,
    pub limits: Limits,
    pub affinity: Option<Affinity>,
    pub canary: Option<Canary>,
    pub custom_http_errors: BTreeSet<u16>,
    /// `default-backend`: a Service of the same namespace.
    pub default_backend: Option<String>,
    pub upstream_vhost: Option<String>,
    pub server_aliases: Vec<String>,
    pub service_upstream: bool,
    /// TLS goes to the backend as it is; every other annotation of ingress-nginx then has its default.
    pub ssl_passthrough: bool,
    /// `weft.network/proxy-protocol`: what a backend that gets TLS as it is hears first.
    #[serde(default)]
    pub proxy_protocol: Option<ProxyVersion>,
    pub x_forwarded_prefix: Option<String>,
    pub client_tls: Option<ClientTls>,
    pub retry: Retry,
    pub upstream_tls: UpstreamTls,
    /// `from` and `to` of Set-Cookie's Domain and Path.
    pub cookie_domain: Option<(String, String)>,
    pub cookie_path: Option<(String, String)>,
    /// `from` and `to` of Location and Refresh.
    pub location: Option<(String, String)>,
    pub custom_headers: Option<String>,
    /// nginx variables, such as `$request_uri`.
    pub hash_by: Option<String>,
    pub mirror: Option<Mirror>,
    /// `limit-rate` and `limit-rate-after`.
    #[serde(default)]
    pub pace: Option<Pace>,
    pub access_log: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRedirect {
    pub code: u16,
    pub url: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendProtocol {
    Http,
    Https,
    Grpc,
    Grpcs,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cors {
    pub origins: Vec<String>,
    pub methods: String,
    pub headers: String,
    pub expose: String,
    pub credentials: bool,
    pub max_age_seconds: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BasicAuth {
    pub secret: String,
    /// `auth-map`: every key of the Secret is a user. Otherwise key `auth` holds an htpasswd file.
    pub map: bool,
    pub realm: String,
    /// Passwords are asked for by Digest, and the Secret holds hashes of htdigest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub digest: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardAuth {
    pub url: String,
    /// `None` is GET.
    pub method: Option<String>,
    pub signin: Option<String>,
    pub signin_parameter: String,
    pub response_headers: Vec<String>,
    pub request_redirect: Option<String>,
    pub always_set_cookie: bool,
    /// ConfigMap of headers to the authenticator.
    pub set_headers: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Satisfy {
    All,
    Any,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub requests_per_second: Option<u32>,
    pub requests_per_minute: Option<u32>,
    pub connections: Option<u32>,
    pub burst_multiplier: u32,
    pub exempt: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Affinity {
    pub persistent: bool,
    pub cookie: AffinityCookie,
    /// `affinity-canary-behavior: legacy`: the cookie does not hold a client on the canary.
    pub legacy_canary: bool,
    pub change_on_failure: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityCookie {
    pub name: String,
    pub max_age_seconds: Option<u32>,
    pub expires_seconds: Option<u32>,
    /// `None` is the path of the rule.
    pub path: Option<String>,
    pub domain: Option<String>,
    pub same_site: Option<SameSite>,
    /// `None` follows the request.
    pub secure: Option<bool>,
    pub conditional_same_site_none: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SameSite {
    None,
    Lax,
    Strict,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    pub weight: u32,
    pub weight_total: u32,
    pub header: Option<String>,
    pub header_value: Option<String>,
    pub header_pattern: Option<String>,
    pub cookie: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientTls {
    pub secret: String,
    pub verify: VerifyClient,
    pub depth: u32,
    pub error_page: Option<String>,
    pub pass_certificate: bool,
    pub match_cn: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VerifyClient {
    On,
    Off,
    Optional,
    OptionalNoCa,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    pub on: BTreeSet<RetryOn>,
    /// Attempts in all; 0 is unlimited.
    pub tries: u32,
    /// Zero is unlimited.
    pub timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RetryOn {
    Error,
    Timeout,
    InvalidHeader,
    Status(u16),
    NonIdempotent,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamTls {
    pub secret: Option<String>,
    pub verify: bool,
    pub name: Option<String>,
    pub send_name: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    pub target: String,
    pub host: Option<String>,
    pub body: bool,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyVersion {
    V1,
    V2,
}

impl std::fmt::Display for ProxyVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// What an answer may be sent at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    pub bytes_per_second: u64,
    /// So much goes out unhindered.
    pub after_bytes: u64,
}

const CORS_METHODS: &str = "GET, PUT, POST, DELETE, PATCH, OPTIONS";
const CORS_HEADERS: &str = "DNT,Keep-Alive,User-Agent,X-Requested-With,If-Modified-Since,Cache-Control,Content-Type,Range,Authorization";
/// `proxy-body-size` (nginx's client_max_body_size, as ingress-nginx sets it).
const BODY_LIMIT_BYTES: u64 = 1 << 20;

/// With `ssl-passthrough` nobody reads the others.
pub(super) fn read(r: &mut Reader<'_>) -> Settings {
    let ssl_passthrough = r.flag("ssl-passthrough", false);
    let proxy_protocol = r.word(PROXY_PROTOCOL, &[("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)]);
    if ssl_passthrough {
        return Settings { ssl_passthrough, proxy_protocol, ..Settings::default() };
    }
    if proxy_protocol.is_some() {
        let instead = "changes nothing without ssl-passthrough: backends of requests get X-Forwarded-For";
        r.differs(PROXY_PROTOCOL, instead);
    }
    of_requests(r)
}

fn of_requests(r: &mut Reader<'_>) -> Settings {
    let rewrite_target = r.text("rewrite-target").map(str::to_owned);
    let settings = Settings {
        use_regex: r.flag("use-regex", false),
        app_root: path(r, "app-root"),
        ssl_redirect: r.flag("ssl-redirect", true),
        force_ssl_redirect: r.flag("force-ssl-redirect", false),
        redirect: redirect(r),
        from_to_www: r.flag("from-to-www-redirect", false),
        backend_protocol: backend_protocol(r),
        body_limit_bytes: match r.bytes("proxy-body-size") {
            None => Some(BODY_LIMIT_BYTES),
            Some(0) => None,
            limit => limit,
        },
        connect_timeout: r.seconds("proxy-connect-timeout").unwrap_or(Duration::from_secs(5)),
        send_timeout: r.seconds("proxy-send-timeout").unwrap_or(Duration::from_secs(60)),
        read_timeout: r.seconds("proxy-read-timeout").unwrap_or(Duration::from_secs(60)),
        allow: allow(r),
        deny: r.ranges("denylist-source-range").unwrap_or_default(),
        cors: cors(r),
        basic: basic(r),
        forward_auth: forward_auth(r),
        satisfy: r.word("satisfy", &[("all", Satisfy::All), ("any", Satisfy::Any)]).unwrap_or(Satisfy::All),
        limits: limits(r),
        affinity: affinity(r),
        canary: canary(r),
        custom_http_errors: custom_http_errors(r),
        default_backend: r.text("default-backend").map(str::to_owned),
        upstream_vhost: r.header_value("upstream-vhost"),
        server_aliases: server_aliases(r),
        service_upstream: r.flag("service-upstream", false),
        ssl_passthrough: false,
        proxy_protocol: None,
        x_forwarded_prefix: r.header_value("x-forwarded-prefix"),
        client_tls: client_tls(r),
        retry: retry(r),
        upstream_tls: upstream_tls(r),
        cookie_domain: pair(r, "proxy-cookie-domain"),
        cookie_path: pair(r, "proxy-cookie-path"),
        location: location(r),
        custom_headers: r.text("custom-headers").map(str::to_owned),
        hash_by: r.text("upstream-hash-by").map(str::to_owned),
        mirror: mirror(r),
        pace: pace(r),
        access_log: r.flag("enable-access-log", true),
        rewrite_target,
        closed: false,
    };
    load_balance(r);
    ignored_values(r);
    Settings { closed: r.closed, ..settings }
}

fn path(r: &mut Reader<'_>, name: &str) -> Option<String> {
    let text = r.header_value(name)?;
    if text.starts_with('/') {
        return Some(text);
    }
    r.wrong(name, "does not begin with /; write the whole path");
    None
}

/// The permanent one goes first when both are there.
fn redirect(r: &mut Reader<'_>) -> Option<HttpRedirect> {
    let kinds = [
        ("permanent-redirect", "permanent-redirect-code", 301),
        ("temporal-redirect", "temporal-redirect-code", 302),
    ];
    let mut found = None;
    for (name, code_name, default) in kinds {
        let code = r.status(code_name, 300, 308).unwrap_or(default);
        if let Some(url) = r.header_value(name) {
            found = found.or(Some(HttpRedirect { code, url }));
        }
    }
    found
}

fn backend_protocol(r: &mut Reader<'_>) -> BackendProtocol {
    let words = [
        ("HTTP", BackendProtocol::Http),
        ("HTTPS", BackendProtocol::Https),
        ("GRPC", BackendProtocol::Grpc),
        ("GRPCS", BackendProtocol::Grpcs),
    ];
    r.word("backend-protocol", &words).unwrap_or(BackendProtocol::Http)
}

fn allow(r: &mut Reader<'_>) -> Option<Vec<IpNet>> {
    let (old, new) = (r.ranges("whitelist-source-range"), r.ranges("allowlist-source-range"));
    if old.is_some() && new.is_some() && old != new {
        r.differs("whitelist-source-range", "is not used beside allowlist-source-range; keep one of the two");
    }
    new.or(old)
}

fn cors(r: &mut Reader<'_>) -> Option<Cors> {
    let on = r.flag("enable-cors", false);
    let text = |r: &mut Reader<'_>, name: &str, default: &str| {
        r.header_value(name).unwrap_or_else(|| default.to_owned())
    };
    let mut origins = r.list("cors-allow-origin");
    let good = |origin: &String| {
        origin == "*"
            || origin.split_once("://").is_some_and(|(scheme, host)| !scheme.is_empty() && !host.is_empty())
    };
    if let Some(bad) = origins.iter().find(|origin| !good(origin)).cloned() {
        r.wrong(
            "cors-allow-origin",
            format!("holds {bad:?}, which is no origin such as https://app.example.com; it is left out"),
        );
        origins.retain(good);
    } else if origins.is_empty() {
        origins.push("*".to_owned());
    }
    let cors = Cors {
        origins,
        methods: text(r, "cors-allow-methods", CORS_METHODS),
        headers: text(r, "cors-allow-headers", CORS_HEADERS),
        expose: text(r, "cors-expose-headers", ""),
        credentials: r.flag("cors-allow-credentials", true),
        max_age_seconds: r.number("cors-max-age", 0, u32::MAX).unwrap_or(1_728_000),
    };
    on.then_some(cors)
}

/// A type that there is not closes the route: it was to be protected.
fn basic(r: &mut Reader<'_>) -> Option<BasicAuth> {
    let map = r.word("auth-secret-type", &[("auth-file", false), ("auth-map", true)]).unwrap_or(false);
    let realm = r.header_value("auth-realm").unwrap_or_default();
    let digest = match r.text("auth-type")?.to_ascii_lowercase().as_str() {
        "basic" => false,
        "digest" => true,
        _ => {
            r.wrong("auth-type", "is neither \"basic\" nor \"digest\"; nobody is let in until it is");
            r.closed = true;
            return None;
        }
    };
    let Some(secret) = r.text("auth-secret") else {
        r.wrong("auth-type", "needs the annotation auth-secret; nobody is let in until it names a Secret");
        r.closed = true;
        return None;
    };
    Some(BasicAuth { secret: secret.to_owned(), map, realm, digest })
}

fn forward_auth(r: &mut Reader<'_>) -> Option<ForwardAuth> {
    let method = r.header_value("auth-method").map(|method| method.to_ascii_uppercase());
    let method = match method {
        Some(method) if !is_token(&method) => {
            r.wrong("auth-method", "is no HTTP method; GET is used");
            None
        }
        method => method,
    };
    r.text("auth-url")?;
    let Some(url) = r.url("auth-url") else {
        r.closed = true;
        return None;
    };
    Some(ForwardAuth {
        url,
        method,
        signin: r.header_value("auth-signin"),
        signin_parameter: r.header_value("auth-signin-redirect-param").unwrap_or_else(|| "rd".to_owned()),
        response_headers: r.header_names("auth-response-headers"),
        request_redirect: r.header_value("auth-request-redirect"),
        always_set_cookie: r.flag("auth-always-set-cookie", false),
        set_headers: r.text("auth-proxy-set-headers").map(str::to_owned),
    })
}

fn limits(r: &mut Reader<'_>) -> Limits {
    let exempt = r.ranges("limit-allowlist").or_else(|| r.ranges("limit-whitelist"));
    let rate = |r: &mut Reader<'_>, name: &str| r.number(name, 0, 1_000_000).filter(|rate| *rate > 0);
    Limits {
        requests_per_second: rate(r, "limit-rps"),
        requests_per_minute: rate(r, "limit-rpm"),
        connections: rate(r, "limit-connections"),
        burst_multiplier: r.number("limit-burst-multiplier", 1, 10_000).unwrap_or(5),
        exempt: exempt.unwrap_or_default(),
    }
}

fn affinity(r: &mut Reader<'_>) -> Option<Affinity> {
    let same_site = [("None", SameSite::None), ("Lax", SameSite::Lax), ("Strict", SameSite::Strict)];
    let name = r.header_value("session-cookie-name").unwrap_or_else(|| "INGRESSCOOKIE".to_owned());
    let name = if is_token(&name) {
        name
    } else {
        r.wrong("session-cookie-name", "is no name of a cookie; INGRESSCOOKIE is used");
        "INGRESSCOOKIE".to_owned()
    };
    let secure = r.text("session-cookie-secure").is_some().then(|| r.flag("session-cookie-secure", false));
    let cookie = AffinityCookie {
        name,
        max_age_seconds: r.number("session-cookie-max-age", 0, u32::MAX),
        expires_seconds: r.number("session-cookie-expires", 0, u32::MAX),
        path: r.header_value("session-cookie-path"),
        domain: r.header_value("session-cookie-domain"),
        same_site: r.word("session-cookie-samesite", &same_site),
        secure,
        conditional_same_site_none: r.flag("session-cookie-conditional-samesite-none", false),
    };
    let modes = [("balanced", false), ("persistent", true)];
    let affinity = Affinity {
        persistent: r.word("affinity-mode", &modes).unwrap_or(false),
        cookie,
        legacy_canary: r
            .word("affinity-canary-behavior", &[("sticky", false), ("legacy", true)])
            .unwrap_or(false),
        change_on_failure: r.flag("session-cookie-change-on-failure", false),
    };
    r.word("affinity", &[("cookie", ())]).map(|()| affinity)
}

/// Order of decision: header, cookie, weight.
fn canary(r: &mut Reader<'_>) -> Option<Canary> {
    let total = r.number("canary-weight-total", 1, u32::MAX).unwrap_or(100);
    let canary = Canary {
        weight: r.number("canary-weight", 0, total).unwrap_or(0),
        weight_total: total,
        header: r.header_value("canary-by-header"),
        header_value: r.header_value("canary-by-header-value"),
        header_pattern: r.pattern("canary-by-header-pattern"),
        cookie: r.header_value("canary-by-cookie"),
    };
    r.flag("canary", false).then_some(canary)
}

fn custom_http_errors(r: &mut Reader<'_>) -> BTreeSet<u16> {
    let mut codes = BTreeSet::new();
    for item in r.list("custom-http-errors") {
        match item.parse() {
            Ok(code) if (300..=599).contains(&code) => {
                codes.insert(code);
            }
            _ => r.wrong(
                "custom-http-errors",
                format!("holds {item:?}, which is no status from 300 to 599; it is left out"),
            ),
        }
    }
    codes
}

fn server_aliases(r: &mut Reader<'_>) -> Vec<String> {
    let aliases = r.list("server-alias").into_iter().map(|alias| alias.to_ascii_lowercase());
    let legal = |alias: &String| {
        let name = alias.strip_prefix("*.").unwrap_or(alias);
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
    };
    let (good, bad): (Vec<_>, Vec<_>) = aliases.partition(legal);
    for alias in bad {
        r.wrong("server-alias", format!("holds {alias:?}, which is no host name; it is left out"));
    }
    good
}

/// Whoever asks for certificates and names none that can be verified lets nobody in.
fn client_tls(r: &mut Reader<'_>) -> Option<ClientTls> {
    let words = [
        ("on", VerifyClient::On),
        ("off", VerifyClient::Off),
        ("optional", VerifyClient::Optional),
        ("optional_no_ca", VerifyClient::OptionalNoCa),
    ];
    let verify = r.word("auth-tls-verify-client", &words).unwrap_or(VerifyClient::On);
    let match_cn = r.pattern("auth-tls-match-cn");
    if match_cn.is_none() && r.text("auth-tls-match-cn").is_some() {
        r.closed = true;
    }
    Some(ClientTls {
        secret: r.text("auth-tls-secret")?.to_owned(),
        verify,
        depth: r.number("auth-tls-verify-depth", 0, 100).unwrap_or(1),
        error_page: r.header_value("auth-tls-error-page"),
        pass_certificate: r.flag("auth-tls-pass-certificate-to-upstream", false),
        match_cn,
    })
}

fn retry(r: &mut Reader<'_>) -> Retry {
    let mut on = BTreeSet::new();
    for word in r.text("proxy-next-upstream").unwrap_or("error timeout").split_whitespace() {
        match word {
            "error" => on.insert(RetryOn::Error),
            "timeout" => on.insert(RetryOn::Timeout),
            "invalid_header" => on.insert(RetryOn::InvalidHeader),
            "non_idempotent" => on.insert(RetryOn::NonIdempotent),
            "http_500" | "http_502" | "http_503" | "http_504" | "http_403" | "http_404" | "http_429" => {
                on.insert(RetryOn::Status(word[5..].parse().unwrap_or(500)))
            }
            "off" => {
                on.clear();
                break;
            }
            other => {
                let other = other.to_owned();
                r.wrong("proxy-next-upstream", format!("holds {other:?}, which is no condition of nginx's proxy_next_upstream; it is left out"));
                continue;
            }
        };
    }
    Retry {
        on,
        tries: r.number("proxy-next-upstream-tries", 0, 100).unwrap_or(3),
        timeout: r.seconds("proxy-next-upstream-timeout").unwrap_or_default(),
    }
}

fn upstream_tls(r: &mut Reader<'_>) -> UpstreamTls {
    UpstreamTls {
        secret: r.text("proxy-ssl-secret").map(str::to_owned),
        verify: r.flag("proxy-ssl-verify", false),
        name: r.header_value("proxy-ssl-name"),
        send_name: r.flag("proxy-ssl-server-name", false),
    }
}

/// `FROM TO`, as nginx's proxy_cookie_domain and proxy_cookie_path take it.
fn pair(r: &mut Reader<'_>, name: &str) -> Option<(String, String)> {
    let text = r.header_value(name)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    match words.as_slice() {
        ["off"] => None,
        [from, to] => Some(((*from).to_owned(), (*to).to_owned())),
        _ => {
            r.wrong(name, "is not \"off\" and not two words, the old and the new");
            None
        }
    }
}

/// Both or neither.
fn location(r: &mut Reader<'_>) -> Option<(String, String)> {
    let value = |r: &mut Reader<'_>, name: &str| r.header_value(name).filter(|text| text != "off");
    match (value(r, "proxy-redirect-from"), value(r, "proxy-redirect-to")) {
        (Some(from), Some(to)) => Some((from, to)),
        (Some(from), None) if from == "default" => Some((from, String::new())),
        (None, None) => None,
        (from, _) => {
            let alone = if from.is_some() { "proxy-redirect-from" } else { "proxy-redirect-to" };
            r.wrong(alone, "changes nothing without the other of proxy-redirect-from and proxy-redirect-to");
            None
        }
    }
}

/// The body goes too unless it is switched off.
fn mirror(r: &mut Reader<'_>) -> Option<Mirror> {
    let (host, body) = (r.header_value("mirror-host"), r.flag("mirror-request-body", true));
    Some(Mirror { host, body, target: r.url("mirror-target")? })
}

/// Kilobytes; zero is no limit.
fn pace(r: &mut Reader<'_>) -> Option<Pace> {
    let kilobytes = |r: &mut Reader<'_>, name: &str| r.number(name, 0, u32::MAX).unwrap_or(0);
    let after_bytes = u64::from(kilobytes(r, "limit-rate-after")) * 1024;
    let bytes_per_second = u64::from(kilobytes(r, "limit-rate")) * 1024;
    (bytes_per_second > 0).then_some(Pace { bytes_per_second, after_bytes })
}

fn load_balance(r: &mut Reader<'_>) {
    r.word("load-balance", &[("round_robin", ()), ("ewma", ())]);
}

/// Values that are read only to be told when they are wrong.
fn ignored_values(r: &mut Reader<'_>) {
    for name in ["proxy-buffering", "proxy-request-buffering"] {
        r.flag(name, false);
    }
    for name in [
        "proxy-buffer-size",
        "client-body-buffer-size",
        "proxy-busy-buffers-size",
        "proxy-max-temp-file-size",
    ] {
        r.bytes(name);
    }
    r.number("proxy-buffers-number", 1, 65_535);
    r.number("proxy-ssl-verify-depth", 0, 100);
    r.word("proxy-http-version", &[("1.1", ())]);
}

impl Settings {
    /// Whether no other object is named whose content the routes need.
    pub fn refers_to_nothing(&self) -> bool {
        let headers = self.forward_auth.as_ref().and_then(|auth| auth.set_headers.as_ref());
        self.basic.is_none()
            && self.client_tls.is_none()
            && self.upstream_tls.secret.is_none()
            && headers.is_none()
            && self.custom_headers.is_none()
            && self.default_backend.is_none()
    }
}

impl Default for Settings {
    fn default() -> Self {
        read(&mut Reader::new(&BTreeMap::new()))
    }
}
