//! Who may pass: ranges of addresses, passwords, client certificates; and what browsers may do (CORS). Pure.

use std::net::IpAddr;

use base64::Engine as _;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode};
use rustls::pki_types::{CertificateDer, UnixTime};

use super::answer::Peer;
use super::compiled::CompiledRoute;
use super::digest::{self, Nonces};
use super::htpasswd;
use super::variables::target;
use crate::annotations::{ClientTls, Cors, Satisfy, VerifyClient};
use crate::plan::table::RouteMaterials;

/// Why a request is answered here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// The client's address.
    Address,
    /// No password, or a wrong one; the realm.
    Password(String),
    /// The same by Digest; `stale`: it was right, but for a challenge that is over.
    Digest { realm: String, stale: bool },
    /// No certificate of the client, or one that is not trusted; where its browser is sent, if anywhere.
    Certificate(Option<String>),
    /// The certificate is trusted and for somebody else (`auth-tls-match-cn`).
    Name,
}

/// Addresses and passwords, one of which is enough under `satisfy: any`.
///
/// # Errors
/// What is not satisfied.
pub(super) fn admit(
    route: &CompiledRoute,
    client: IpAddr,
    head: &Parts,
    nonces: &Nonces,
) -> Result<(), Denial> {
    let settings = &route.route.settings;
    let allowed =
        settings.allow.as_ref().is_none_or(|ranges| ranges.iter().any(|range| range.contains(&client)));
    let denied = settings.deny.iter().any(|range| range.contains(&client));
    let by_address = if allowed && !denied { Ok(()) } else { Err(Denial::Address) };
    let Some(basic) = &settings.basic else { return by_address };
    let by_password = match basic.digest {
        true => digest(&route.route.materials, &basic.realm, head, nonces),
        false if password(&route.route.materials, &head.headers) => Ok(()),
        false => Err(Denial::Password(basic.realm.clone())),
    };
    let restricts = settings.allow.is_some() || !settings.deny.is_empty();
    match settings.satisfy {
        Satisfy::Any if restricts && by_address.is_ok() => Ok(()),
        Satisfy::Any => by_password,
        Satisfy::All => by_address.and(by_password),
    }
}

fn password(materials: &RouteMaterials, headers: &HeaderMap) -> bool {
    let Some(users) = &materials.users else { return false };
    let encoded = authorization(headers).and_then(|value| {
        let (scheme, encoded) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("basic").then_some(encoded.trim())
    });
    let decoded = encoded.and_then(|encoded| base64::engine::general_purpose::STANDARD.decode(encoded).ok());
    let Some(decoded) = decoded else { return false };
    let mut parts = decoded.splitn(2, |byte| *byte == b':');
    let (Some(user), Some(password)) = (parts.next(), parts.next()) else { return false };
    let hash = std::str::from_utf8(user).ok().and_then(|user| users.get(user));
    hash.is_some_and(|hash| htpasswd::verify(password, hash))
}

fn authorization(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()
}

fn digest(materials: &RouteMaterials, realm: &str, head: &Parts, nonces: &Nonces) -> Result<(), Denial> {
    let denial = |stale| Err(Denial::Digest { realm: realm.to_owned(), stale });
    let (Some(users), Some(given)) = (&materials.users, authorization(&head.headers)) else {
        return denial(false);
    };
    let asked = digest::Asked { method: head.method.as_str(), target: target(&head.uri), realm, users };
    match nonces.check(&asked, given) {
        digest::Verdict::Pass => Ok(()),
        digest::Verdict::Wrong => denial(false),
        digest::Verdict::Stale => denial(true),
    }
}

/// The certificate that the client showed, as its route wants it; returns what `ssl-client-verify` says.
///
/// # Errors
/// It is missing or not trusted.
pub(super) fn client_certificate(route: &CompiledRoute, peer: &Peer) -> Result<Option<&'static str>, Denial> {
    let Some(wanted) = route.route.settings.client_tls.as_ref().filter(|tls| tls.verify != VerifyClient::Off)
    else {
        return Ok(None);
    };
    let verified = verified(route, wanted, &peer.certificates)?;
    let subject = peer.names.as_ref().map_or("", |(subject, _)| subject);
    match &route.client_name {
        Some(pattern) if !pattern.is_match(subject) => Err(Denial::Name),
        _ => Ok(Some(verified)),
    }
}

fn verified(
    route: &CompiledRoute,
    wanted: &ClientTls,
    shown: &[CertificateDer<'static>],
) -> Result<&'static str, Denial> {
    let denial = || Denial::Certificate(wanted.error_page.clone());
    let Some((own, rest)) = shown.split_first() else {
        return if wanted.verify == VerifyClient::On { Err(denial()) } else { Ok("NONE") };
    };
    let trusted = route
        .client_verifier
        .as_ref()
        .is_some_and(|verifier| verifier.verify_client_cert(own, rest, UnixTime::now()).is_ok());
    match (trusted, wanted.verify) {
        (true, _) => Ok("SUCCESS"),
        (false, VerifyClient::OptionalNoCa) => Ok("FAILED"),
        (false, _) => Err(denial()),
    }
}

/// Status and fields of the answer to somebody who may not pass.
pub(super) fn answer(denial: &Denial, nonces: &Nonces) -> (StatusCode, Option<(header::HeaderName, String)>) {
    match denial {
        Denial::Digest { realm, stale } => {
            let challenge = nonces.challenge(realm, *stale);
            (StatusCode::UNAUTHORIZED, Some((header::WWW_AUTHENTICATE, challenge)))
        }
        Denial::Address | Denial::Name => (StatusCode::FORBIDDEN, None),
        Denial::Password(realm) => {
            let quoted: String = realm.chars().filter(|letter| !matches!(letter, '"' | '\\')).collect();
            (StatusCode::UNAUTHORIZED, Some((header::WWW_AUTHENTICATE, format!("Basic realm=\"{quoted}\""))))
        }
        Denial::Certificate(None) => (StatusCode::BAD_REQUEST, None),
        Denial::Certificate(Some(page)) => (StatusCode::FOUND, Some((header::LOCATION, page.clone()))),
    }
}

/// Whether the request only asks what it may ask.
pub(super) fn is_preflight(method: &Method, cors: Option<&Cors>) -> bool {
    cors.is_some() && method == Method::OPTIONS
}

/// The fields that an answer to this origin has.
pub(super) fn cors_fields(cors: &Cors, origin: Option<&str>, preflight: bool) -> Vec<(&'static str, String)> {
    let every = cors.origins.is_empty() || cors.origins.iter().any(|origin| origin == "*");
    let allowed = match origin {
        _ if every => "*".to_owned(),
        Some(origin) if cors.origins.iter().any(|known| matches_origin(known, origin)) => origin.to_owned(),
        _ => return vec![("vary", "Origin".to_owned())],
    };
    let mut fields = vec![("access-control-allow-origin", allowed)];
    if !every {
        fields.push(("vary", "Origin".to_owned()));
    }
    // With "*" browsers refuse the two together (Fetch standard, 3.3.5).
    if cors.credentials && !every {
        fields.push(("access-control-allow-credentials", "true".to_owned()));
    }
    if !cors.expose.is_empty() {
        fields.push(("access-control-expose-headers", cors.expose.clone()));
    }
    if preflight {
        fields.push(("access-control-allow-methods", cors.methods.clone()));
        fields.push(("access-control-allow-headers", cors.headers.clone()));
        fields.push(("access-control-max-age", cors.max_age_seconds.to_string()));
    }
    fields
}

/// `https://*.example.com` stands for one label.
fn matches_origin(known: &str, origin: &str) -> bool {
    match known.split_once("*.") {
        None => known.eq_ignore_ascii_case(origin),
        Some((before, after)) => {
            origin.strip_prefix(before).and_then(|rest| rest.split_once('.')).is_some_and(|(label, rest)| {
                let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
                !label.is_empty() && label.bytes().all(legal) && rest.eq_ignore_ascii_case(after)
            })
        }
    }
}

/// Puts fields into an answer.
pub(super) fn put(headers: &mut HeaderMap, fields: Vec<(&'static str, String)>) {
    for (name, value) in fields {
        let Ok(value) = HeaderValue::from_str(&value) else { continue };
        if name == "vary" {
            headers.append(name, value);
        } else {
            headers.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&str]) -> Cors {
        Cors {
            origins: origins.iter().map(|origin| (*origin).to_owned()).collect(),
            methods: "GET".into(),
            headers: "X".into(),
            expose: String::new(),
            credentials: true,
            max_age_seconds: 5,
        }
    }

    fn allowed(origins: &[&str], origin: &str) -> Option<String> {
        let fields = cors_fields(&cors(origins), Some(origin), false);
        fields.into_iter().find(|(name, _)| *name == "access-control-allow-origin").map(|(_, value)| value)
    }

    #[test]
    fn an_origin_is_echoed_when_it_is_listed() {
        assert_eq!(
            allowed(&["https://a.com", "https://*.b.com"], "https://x.b.com").as_deref(),
            Some("https://x.b.com")
        );
        assert_eq!(allowed(&["https://*.b.com"], "https://x.y.b.com"), None);
        assert_eq!(allowed(&["https://*.b.com"], "https://evil.com/.b.com"), None);
        assert_eq!(allowed(&["https://a.com"], "https://b.com"), None);
    }

    #[test]
    fn credentials_are_not_offered_to_everybody() {
        let fields = cors_fields(&cors(&["*"]), Some("https://a.com"), true);
        assert!(fields.iter().all(|(name, _)| *name != "access-control-allow-credentials"));
        assert!(fields.contains(&("access-control-allow-origin", "*".to_owned())));
    }
}
