//! Which backend of a route is asked: the canary or the main one (cookie of affinity, header, cookie, weight), and the cookie
//! that holds a client to its endpoint.

use http::header::HeaderMap;

use super::balance::Endpoint;
use super::compiled::{CompiledRoute, Places, Upstream};
use super::variables::cookie_of;
use crate::annotations::{Affinity, SameSite};

/// The backend, and the value of the affinity cookie when the client has one.
pub(super) fn select<'a>(
    route: &'a CompiledRoute,
    headers: &'a HeaderMap,
) -> Option<(&'a Upstream, Option<&'a str>)> {
    let main = route.upstream.as_ref()?;
    let affinity = route.route.settings.affinity.as_ref();
    let cookie = affinity.and_then(|affinity| cookie_of(headers, &affinity.cookie.name));
    let Some((pattern, canary)) = &route.canary else { return Some((main, cookie)) };
    let sticky = affinity.is_some_and(|affinity| !affinity.legacy_canary);
    if let Some(token) = cookie.filter(|_| sticky) {
        let held = [main, canary].into_iter().find(|upstream| holds(upstream, token));
        if let Some(held) = held {
            return Some((held, cookie));
        }
    }
    let rule = &route.route.canary.as_ref()?.rule;
    let by_header = rule.header.as_ref().and_then(|name| headers.get(name)).and_then(|value| {
        let value = value.to_str().ok()?;
        match (&rule.header_value, pattern) {
            (Some(wanted), _) => (wanted == value).then_some(true),
            (None, Some(pattern)) => pattern.is_match(value).then_some(true),
            (None, None) => always_or_never(value),
        }
    });
    let by_cookie = || rule.cookie.as_ref().and_then(|name| always_or_never(cookie_of(headers, name)?));
    let by_weight = || rand::random_range(0..rule.weight_total.max(1)) < rule.weight;
    let to_canary = by_header.or_else(by_cookie).unwrap_or_else(by_weight);
    Some((if to_canary { canary } else { main }, cookie))
}

fn always_or_never(value: &str) -> Option<bool> {
    match value {
        "always" => Some(true),
        "never" => Some(false),
        _ => None,
    }
}

fn holds(upstream: &Upstream, token: &str) -> bool {
    matches!(&upstream.places, Places::Endpoints(endpoints) if endpoints.iter().any(|one| one.token() == token))
}

/// Set-Cookie for a client that is held to this endpoint from now on.
pub(super) fn cookie(affinity: &Affinity, endpoint: &Endpoint, https: bool) -> String {
    let cookie = &affinity.cookie;
    let mut text =
        format!("{}={}; Path={}", cookie.name, endpoint.token(), cookie.path.as_deref().unwrap_or("/"));
    if let Some(seconds) = cookie.max_age_seconds.or(cookie.expires_seconds) {
        text.push_str(&format!("; Max-Age={seconds}"));
    }
    if let Some(domain) = &cookie.domain {
        text.push_str(&format!("; Domain={domain}"));
    }
    if cookie.secure.unwrap_or(https) {
        text.push_str("; Secure");
    }
    text.push_str("; HttpOnly");
    match cookie.same_site {
        None => {}
        Some(SameSite::None) => text.push_str("; SameSite=None"),
        Some(SameSite::Lax) => text.push_str("; SameSite=Lax"),
        Some(SameSite::Strict) => text.push_str("; SameSite=Strict"),
    }
    text
}
