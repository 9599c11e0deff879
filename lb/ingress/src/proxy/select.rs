//! Which backend of a route is asked: the canary or the main one (cookie of affinity, header, cookie, weight), and the cookie
//! that holds a client to its endpoint.

use http::header::{HeaderMap, HeaderValue};

use super::balance::Endpoint;
use super::compiled::{CompiledRoute, Places, Upstream};
use super::variables::cookie_of;
use crate::annotations::{Affinity, SameSite};

/// The backend, and the value of the affinity cookie when the client has one.
pub(super) fn select<'r, 'h>(
    route: &'r CompiledRoute,
    headers: &'h HeaderMap,
) -> Option<(&'r Upstream, Option<&'h str>)> {
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

/// Whether the cookie's endpoint is one of this backend.
pub(super) fn holds(upstream: &Upstream, token: &str) -> bool {
    matches!(&upstream.places, Places::Endpoints(endpoints) if endpoints.iter().any(|one| one.token() == token))
}

/// Set-Cookie for a client that is held to this endpoint from now on.
pub(super) fn cookie(
    affinity: &Affinity,
    endpoint: &Endpoint,
    https: bool,
    agent: Option<&HeaderValue>,
) -> String {
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
        Some(SameSite::None) if cookie.conditional_same_site_none && misreads_none(agent) => {}
        Some(SameSite::None) => text.push_str("; SameSite=None"),
        Some(SameSite::Lax) => text.push_str("; SameSite=Lax"),
        Some(SameSite::Strict) => text.push_str("; SameSite=Strict"),
    }
    text
}

/// Browsers that drop a cookie with `SameSite=None`, or take it for Strict (`session-cookie-conditional-samesite-none`; the list is
/// chromium.org's "SameSite=None: Known Incompatible Clients").
fn misreads_none(agent: Option<&HeaderValue>) -> bool {
    let Some(agent) = agent.and_then(|agent| agent.to_str().ok()) else { return false };
    let version_after = |mark: &str| {
        let (_, rest) = agent.split_once(mark)?;
        let numbers: Vec<u32> = rest
            .split(|letter: char| !letter.is_ascii_digit())
            .map_while(|number| number.parse().ok())
            .take(3)
            .collect();
        (!numbers.is_empty()).then_some(numbers)
    };
    let first_of = |mark: &str| version_after(mark).and_then(|version| version.first().copied());
    let chromium = first_of("Chrome/").or_else(|| first_of("Chromium/"));
    if let Some(version) = version_after("UCBrowser/") {
        return version.as_slice() < [12, 13, 2].as_slice();
    }
    let is_webkit = agent.contains("AppleWebKit/");
    let ios_12 = agent.contains("(iP") && first_of(" OS ") == Some(12) && is_webkit;
    let mojave = version_after("Mac OS X ").is_some_and(|version| version.starts_with(&[10, 14]));
    ios_12
        || (mojave && is_webkit && chromium.is_none())
        || chromium.is_some_and(|major| (51..=66).contains(&major))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_that_misread_samesite_none_are_known() {
        let misreads = |agent: &'static str| misreads_none(Some(&HeaderValue::from_static(agent)));
        for (agent, does) in [
            (
                "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/60.0.3112.90 Safari/537.36",
                true,
            ),
            (
                "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36",
                false,
            ),
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 12_4 like Mac OS X) AppleWebKit/605.1.15 Version/12.1 Mobile/15E148 Safari/604.1",
                true,
            ),
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_1 like Mac OS X) AppleWebKit/605.1.15 Version/17.1 Mobile/15E148 Safari/604.1",
                false,
            ),
            (
                "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_14_6) AppleWebKit/605.1.15 Version/12.1.2 Safari/605.1.15",
                true,
            ),
            (
                "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_14_6) AppleWebKit/537.36 Chrome/120.0.0.0 Safari/537.36",
                false,
            ),
            (
                "Mozilla/5.0 (Linux; U; Android 9) AppleWebKit/537.36 Chrome/57.0 UCBrowser/12.13.0.1207 Mobile Safari/537.36",
                true,
            ),
            (
                "Mozilla/5.0 (Linux; U; Android 9) AppleWebKit/537.36 Chrome/57.0 UCBrowser/12.13.2.1208 Mobile Safari/537.36",
                false,
            ),
            ("curl/8.5.0", false),
        ] {
            assert_eq!(misreads(agent), does, "{agent}");
        }
        assert!(!misreads_none(None));
    }
}
