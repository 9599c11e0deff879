//! What a request must be before it is looked at, and what it must lose before it goes on (RFC 9110, RFC 9112). Pure.
//!
//! hyper has parsed the head: obs-fold, NUL, bare LF in chunk lines and wrong lengths never come here. What it leaves to
//! a proxy is here: one Host, a target that agrees with it, one framing, hop-by-hop fields, who the client is.

use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri, Version};

use super::front::{Chain, Client};
use super::stats::Refused;
use crate::path;

/// Why a request is refused before any route is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("Host is missing or stands there more than once (RFC 9112 3.2)")]
    Host,
    #[error("Host and the target's authority differ (RFC 9112 3.2.2)")]
    Authority,
    #[error("Content-Length and Transfer-Encoding together, or a coding beside chunked (RFC 9112 6.1)")]
    Framing,
    #[error("the path holds NUL, a broken escape, or leaves the root")]
    Path,
    #[error("CONNECT is not for this server")]
    Connect,
}

impl Refusal {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    pub(super) fn counted(self) -> Refused {
        match self {
            Self::Host | Self::Authority => Refused::Host,
            Self::Framing => Refused::Framing,
            Self::Path => Refused::Path,
            Self::Connect => Refused::Connect,
        }
    }
}

/// What routes look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    /// Lower case, without port and final dot.
    pub(super) host: String,
    /// Host with its port, as the client wrote it.
    pub(super) authority: String,
    /// Unescaped and normalised.
    pub(super) path: String,
}

/// # Errors
/// Why the request gets 400 or 405.
pub(super) fn admit(
    method: &Method,
    uri: &Uri,
    version: Version,
    headers: &HeaderMap,
) -> Result<Admitted, Refusal> {
    if method == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    let one_length = headers.get_all(header::CONTENT_LENGTH).iter().count() <= 1;
    if !one_length
        || (headers.contains_key(header::CONTENT_LENGTH) && headers.contains_key(header::TRANSFER_ENCODING))
    {
        return Err(Refusal::Framing);
    }
    // What goes on has a framing of its own, so a coding beside it would be lost (RFC 9112 6.1).
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if !codings.next().is_none_or(chunked) || codings.next().is_some() {
        return Err(Refusal::Framing);
    }
    // The whole server is meant by OPTIONS only (RFC 9112 3.2.4).
    if uri.path() == "*" && method != Method::OPTIONS {
        return Err(Refusal::Path);
    }
    let authority = authority(uri, version, headers)?;
    let host = bare_host(&authority).ok_or(Refusal::Host)?;
    let path = path::normal(uri.path()).ok_or(Refusal::Path)?;
    Ok(Admitted { host, authority, path })
}

fn authority(uri: &Uri, version: Version, headers: &HeaderMap) -> Result<String, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(Refusal::Host);
    }
    let first = first.map(|host| host.to_str().map_err(|_| Refusal::Host)).transpose()?;
    match (uri.authority(), first) {
        (Some(target), Some(host)) if !target.as_str().eq_ignore_ascii_case(host) => Err(Refusal::Authority),
        (Some(target), None) if version == Version::HTTP_11 => {
            let _ = target;
            Err(Refusal::Host)
        }
        (Some(target), _) => Ok(target.as_str().to_owned()),
        (None, Some(host)) => Ok(host.to_owned()),
        (None, None) => Err(Refusal::Host),
    }
}

/// `None` for what can be no host: userinfo, spaces, an empty name, a port that is no number.
pub(super) fn bare_host(authority: &str) -> Option<String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (inner, after) = rest.split_once(']')?;
            inner.parse::<std::net::Ipv6Addr>().ok()?;
            (inner, after.strip_prefix(':').or(after.is_empty().then_some(""))?)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._~:".contains(&b);
    let good = !host.is_empty() && host.bytes().all(legal) && port.bytes().all(|b| b.is_ascii_digit());
    good.then(|| host.trim_end_matches('.').to_ascii_lowercase())
}

/// Fields that are between two neighbours only, whether or not Connection names them (RFC 9110 7.6.1).
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
    "proxy-authenticate",
];

/// Names that Connection must not take away: the framing and what says where a message goes.
const KEPT: [&str; 3] = ["content-length", "host", "authorization"];

/// Takes every hop-by-hop field away; returns the protocol that Upgrade asked for, when Connection says so.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    if !headers.keys().any(|name| HOP_BY_HOP.contains(&name.as_str())) {
        return None;
    }
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let upgrade = named.contains(&header::UPGRADE).then(|| headers.get(header::UPGRADE).cloned()).flatten();
    let trailers =
        headers.get_all(header::TE).iter().any(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in named
        .iter()
        .filter(|name| !KEPT.contains(&name.as_str()) && !name.as_str().starts_with("x-forwarded-"))
    {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    upgrade
}

const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_SCHEME: HeaderName = HeaderName::from_static("x-forwarded-scheme");
const X_FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
const X_SCHEME: HeaderName = HeaderName::from_static("x-scheme");
const X_ORIGINAL_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-original-forwarded-for");

/// What a backend is told of who asked and how.
#[derive(Clone, Copy)]
pub(super) struct Told<'a> {
    pub(super) client: &'a Client,
    pub(super) admitted: &'a Admitted,
    /// `x-forwarded-prefix`, where the route says so.
    pub(super) prefix: Option<&'a str>,
}

impl Told<'_> {
    fn each(&self, mut tell: impl FnMut(HeaderName, &str)) {
        let Self { client, admitted, prefix } = self;
        match &client.chain {
            Chain::None => {}
            Chain::ForwardedFor(list) => tell(X_ORIGINAL_FORWARDED_FOR, list),
            // RFC 7239 4: each proxy adds an element for the one whom it was asked by.
            Chain::Forwarded(list, IpAddr::V4(by)) => tell(header::FORWARDED, &format!("{list}, for={by}")),
            Chain::Forwarded(list, IpAddr::V6(by)) => {
                tell(header::FORWARDED, &format!("{list}, for=\"[{by}]\""));
            }
        }
        let address = client.address.to_string();
        tell(X_REAL_IP, &address);
        tell(X_FORWARDED_FOR, &address);
        tell(X_FORWARDED_HOST, &admitted.authority);
        match client.port {
            80 => tell(X_FORWARDED_PORT, "80"),
            443 => tell(X_FORWARDED_PORT, "443"),
            port => tell(X_FORWARDED_PORT, &port.to_string()),
        }
        let scheme = if client.https { "https" } else { "http" };
        for name in [X_FORWARDED_PROTO, X_FORWARDED_SCHEME, X_SCHEME] {
            tell(name, scheme);
        }
        if let Some(prefix) = prefix {
            tell(X_FORWARDED_PREFIX, prefix);
        }
    }

    /// Among the fields of a request, from which [`untold`] has taken what it said itself.
    pub(super) fn put(&self, headers: &mut HeaderMap) {
        self.each(|name, text| {
            if let Ok(value) = HeaderValue::from_str(text) {
                headers.insert(name, value);
            }
        });
    }

    /// The same as bytes of a head of HTTP/1.1.
    pub(super) fn write(&self, into: &mut Vec<u8>) {
        self.each(|name, text| {
            // As `HeaderValue::from_str` has it.
            if text.bytes().all(|byte| matches!(byte, b'\t' | b' '..=b'~')) {
                for part in [name.as_str(), ": ", text, "\r\n"] {
                    into.extend_from_slice(part.as_bytes());
                }
            }
        });
    }
}

/// What a request says of its client goes no further than [`Client`] has believed it.
pub(super) fn untold(headers: &mut HeaderMap, prefix: Option<&str>) {
    const OWN: [&str; 10] = [
        "forwarded",
        "proxy",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-proto",
        "x-forwarded-scheme",
        "x-original-forwarded-for",
        "x-real-ip",
        "x-scheme",
    ];
    if headers.keys().any(|name| OWN.contains(&name.as_str())) {
        for name in OWN {
            headers.remove(name);
        }
    }
    if prefix.is_some() {
        headers.remove(X_FORWARDED_PREFIX);
    }
}

/// Whether a request may be sent twice (RFC 9110 9.2.2).
pub(super) fn is_idempotent(method: &Method) -> bool {
    method.is_idempotent()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in list {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    fn asked(uri: &'static str, list: &[(&'static str, &'static str)]) -> Result<Admitted, Refusal> {
        admit(&Method::GET, &Uri::from_static(uri), Version::HTTP_11, &map(list))
    }

    #[test]
    fn a_request_names_one_host() {
        assert_eq!(asked("/", &[("host", "Shop.Example.com.:80")]).unwrap().host, "shop.example.com");
        assert_eq!(asked("/", &[("host", "[fd00::1]:80")]).unwrap().host, "fd00::1");
        assert_eq!(asked("/", &[]), Err(Refusal::Host));
        assert_eq!(asked("/", &[("host", "a"), ("host", "b")]), Err(Refusal::Host));
        assert_eq!(asked("/", &[("host", "a b")]), Err(Refusal::Host));
        assert_eq!(asked("/", &[("host", "user@a")]), Err(Refusal::Host));
        assert_eq!(asked("http://a/", &[("host", "b")]), Err(Refusal::Authority));
        assert_eq!(asked("http://a/", &[("host", "a")]).unwrap().host, "a");
    }

    #[test]
    fn two_framings_are_none() {
        let both = [("host", "a"), ("content-length", "3"), ("transfer-encoding", "chunked")];
        assert_eq!(asked("/", &both), Err(Refusal::Framing));
        assert_eq!(
            asked("/", &[("host", "a"), ("content-length", "3"), ("content-length", "3")]),
            Err(Refusal::Framing)
        );
    }

    #[test]
    fn what_is_between_neighbours_goes_no_further() {
        let mut headers = map(&[
            ("connection", "X-A, close, Content-Length"),
            ("x-a", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("content-length", "3"),
            ("x-b", "2"),
        ]);
        assert_eq!(strip_hop_by_hop(&mut headers), None);
        assert_eq!(
            headers,
            map(&[("content-length", "3"), ("x-b", "2"), ("te", "trailers")]),
            "the length stays: it frames the body"
        );
        let mut upgrade = map(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(strip_hop_by_hop(&mut upgrade), Some(HeaderValue::from_static("websocket")));
        assert!(upgrade.is_empty());
    }

    #[test]
    fn what_clients_say_of_themselves_is_replaced() {
        let mut headers =
            map(&[("x-forwarded-for", "1.2.3.4"), ("forwarded", "for=1.2.3.4"), ("proxy", "x")]);
        let admitted = Admitted { host: "a".into(), authority: "a:80".into(), path: "/".into() };
        let address = "10.0.0.9".parse().unwrap();
        let mut client = Client { address, https: true, port: 443, host: None, chain: Chain::None };
        let tell = |headers: &mut HeaderMap, client: &Client| {
            let told = Told { client, admitted: &admitted, prefix: Some("/p") };
            untold(headers, told.prefix);
            let mut written = Vec::new();
            told.write(&mut written);
            told.put(headers);
            let lines: Vec<String> = headers
                .iter()
                .map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap()))
                .collect();
            assert_eq!(lines.concat().into_bytes(), written, "both ways say the same");
        };
        tell(&mut headers, &client);
        assert_eq!(headers.get("x-forwarded-for").unwrap(), "10.0.0.9");
        assert_eq!(headers.get("x-forwarded-proto").unwrap(), "https");
        assert!(headers.get("forwarded").is_none() && headers.get("proxy").is_none());
        client.chain = Chain::ForwardedFor("1.2.3.4, 10.0.0.9".into());
        tell(&mut headers, &client);
        assert_eq!(headers.get("x-original-forwarded-for").unwrap(), "1.2.3.4, 10.0.0.9");
        client.chain = Chain::Forwarded("for=1.2.3.4".into(), "fd00::1".parse().unwrap());
        tell(&mut headers, &client);
        assert_eq!(headers.get("forwarded").unwrap(), "for=1.2.3.4, for=\"[fd00::1]\"");
        assert!(headers.get("x-original-forwarded-for").is_none());
    }
}
