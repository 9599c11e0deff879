//! What becomes of one request and why: which object and rule take it, which endpoints answer, and why not another. Pure.

use crate::path;
use crate::plan::table::{Action, Backend, BackendKey, Host, Passthrough, Route, RouteTable, Server};

/// A request as far as routes look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub method: String,
    pub https: bool,
    /// Lower case, without a port.
    pub host: String,
    /// Normalised, without the query.
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidQuestion {
    #[error("{0:?} is no HTTP method; write one such as GET")]
    Method(String),
    #[error("{0:?} is no URL such as https://shop.example.com/cart")]
    Url(String),
}

impl Question {
    /// # Errors
    /// What is no method or no URL.
    pub fn new(method: &str, url: &str) -> Result<Self, InvalidQuestion> {
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_alphabetic()) {
            return Err(InvalidQuestion::Method(method.to_owned()));
        }
        let invalid = || InvalidQuestion::Url(url.to_owned());
        let (scheme, rest) = url.split_once("://").ok_or_else(invalid)?;
        let https = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(invalid()),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let host = match authority.strip_prefix('[') {
            Some(v6) => v6.split(']').next().unwrap_or_default(),
            None => authority.split(':').next().unwrap_or_default(),
        };
        if host.is_empty() {
            return Err(invalid());
        }
        let path = path::normal(path.split(['?', '#']).next().unwrap_or_default()).ok_or_else(invalid)?;
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        Ok(Self { method: method.to_ascii_uppercase(), https, host, path })
    }
}

/// Servers that may answer for a name, the more exact first: its own, a wildcard's, that of rules without a host.
pub fn candidates<'a>(table: &'a RouteTable, host: &str) -> Vec<(&'a Host, &'a Server)> {
    let own = table.hosts.iter().find(|(known, _)| matches!(known, Host::Exact(_)) && known.matches(host));
    let wildcard =
        || table.hosts.iter().find(|(known, _)| matches!(known, Host::Wildcard(_)) && known.matches(host));
    let named = own.or_else(wildcard);
    let any = table.hosts.get_key_value(&Host::Any);
    named.into_iter().chain(any).map(|(known, server)| (known, server.as_ref())).collect()
}

/// The route that takes the request.
pub fn decide<'a>(table: &'a RouteTable, host: &str, path: &str) -> Option<(&'a Host, &'a Route)> {
    candidates(table, host).into_iter().find_map(|(known, server)| {
        let route = server.routes.iter().find(|route| route.matcher.matches(path))?;
        Some((known, route.as_ref()))
    })
}

/// The whole story, one line a sentence.
pub fn explain(table: &RouteTable, question: &Question) -> Vec<String> {
    let Question { method, https, host, path } = question;
    let scheme = if *https { "https" } else { "http" };
    let mut lines = vec![format!("{method} {scheme}://{host}{path}")];
    let candidates = candidates(table, host);
    if let Some((known, Server { redirect_to: Some(other), .. })) = candidates.first() {
        lines.push(format!("answered by a redirect to {scheme}://{other}{path}: {known} is only its other name (from-to-www-redirect)"));
        return lines;
    }
    if let Some((known, Server { passthrough: Some(passed), .. })) = candidates.first().filter(|_| *https) {
        let Passthrough { backend: key, origin, proxy_protocol } = passed;
        lines.push(format!("taken by {origin}: host {known}, whatever the path"));
        let header =
            proxy_protocol.map(|version| format!(", after a PROXY header {version}")).unwrap_or_default();
        lines.push(format!(
            "its TLS is passed on as it is{header}: annotation ssl-passthrough, no other does anything"
        ));
        backend(table, key, &mut lines);
        return lines;
    }
    if candidates.is_empty() {
        lines.push(format!("404: no rule has the host {host}, and none is for every host"));
        return lines;
    }
    match decide(table, host, path) {
        None => lines.push("404: no path of these hosts matches".to_owned()),
        Some((known, route)) => taken(table, question, known, route, &mut lines),
    }
    others(&candidates, host, path, &mut lines);
    lines
}

fn taken(table: &RouteTable, question: &Question, host: &Host, route: &Route, lines: &mut Vec<String>) {
    lines.push(format!("taken by {}: host {host}, path {}", route.origin, route.matcher));
    if route.to_https && !question.https {
        let why = match route.settings.ssl_passthrough {
            true => "TLS of this host is passed on by the annotation ssl-passthrough",
            false => "the annotations ssl-redirect and force-ssl-redirect decide that",
        };
        lines.push(format!("answered by a redirect to https (308): {why}"));
        return;
    }
    if question.path == "/"
        && let Some(root) = &route.settings.app_root
    {
        lines.push(format!("answered by a redirect to {root} (302): annotation app-root"));
        return;
    }
    match &route.action {
        Action::Redirect(redirect) => {
            lines.push(format!("answered by a redirect to {} ({})", redirect.url, redirect.code));
        }
        Action::Refuse { status, why } => lines.push(format!("answered with {status}: {why}")),
        Action::Forward(key) => {
            if let Some(canary) = &route.canary {
                let rule = &canary.rule;
                let mut ways = Vec::new();
                ways.extend(rule.header.as_ref().map(|name| format!("by header {name}")));
                ways.extend(rule.cookie.as_ref().map(|name| format!("by cookie {name}")));
                ways.push(format!("{} of {} requests", rule.weight, rule.weight_total));
                lines.push(format!(
                    "first asked is the canary {} ({}), whose backend is:",
                    canary.origin,
                    ways.join(", then ")
                ));
                backend(table, &canary.backend, lines);
            }
            backend(table, key, lines);
            if let Some(fallback) = &route.fallback {
                lines.push("where it has no endpoint, default-backend:".to_owned());
                backend(table, fallback, lines);
            }
        }
    }
}

fn backend(table: &RouteTable, key: &BackendKey, lines: &mut Vec<String>) {
    match table.backends.get(key).map(|backend| &**backend) {
        Some(Backend::Endpoints(targets)) if targets.is_empty() => {
            lines.push(format!("backend {key}: 503, no endpoint is ready"));
        }
        Some(Backend::Endpoints(targets)) => {
            lines.push(format!("backend {key}: one of"));
            for target in targets {
                let pod = target.pod.as_ref().map(|pod| format!(" Pod {pod}")).unwrap_or_default();
                let node = target.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
                let ending = if target.terminating { ", about to end" } else { "" };
                lines.push(format!("  {}{pod}{node}{ending}", target.address));
            }
        }
        Some(Backend::Name(name, port)) => {
            lines.push(format!("backend {key}: {name}:{port}, a name outside the cluster"))
        }
        Some(Backend::Missing(why)) => lines.push(format!("backend {key}: 503, {why}")),
        None => lines.push(format!("backend {key}: 503")),
    }
}

/// The whole table, host by host, each in the order in which its routes are tried.
pub fn routes(table: &RouteTable) -> String {
    let mut text = String::new();
    for (host, server) in &table.hosts {
        let tls = match host {
            Host::Any => table.default_certificate.as_ref(),
            named => table.certificates.get(&named.to_string()),
        };
        let tls = tls.map(|found| format!(" (certificate of Secret {})", found.secret)).unwrap_or_default();
        text.push_str(&format!("{host}{tls}\n"));
        if let Some(other) = &server.redirect_to {
            text.push_str(&format!("  redirected to {other}\n"));
        }
        if let Some(Passthrough { backend, origin, proxy_protocol }) = &server.passthrough {
            let header = proxy_protocol.map(|version| format!(", PROXY {version}")).unwrap_or_default();
            let backend = described(table, backend);
            text.push_str(&format!("  TLS as it is -> {backend}{header}, {origin}\n"));
        }
        for route in &server.routes {
            let what = match &route.action {
                Action::Forward(key) => described(table, key),
                Action::Redirect(redirect) => format!("{} {}", redirect.code, redirect.url),
                Action::Refuse { status, why } => format!("{status}: {why}"),
            };
            text.push_str(&format!("  {} -> {what}, {}\n", route.matcher, route.origin));
        }
    }
    if text.is_empty() { "There is no route.\n".to_owned() } else { text }
}

fn described(table: &RouteTable, key: &BackendKey) -> String {
    let state = match table.backends.get(key).map(|backend| &**backend) {
        Some(Backend::Endpoints(targets)) => format!("{} endpoints", targets.len()),
        Some(Backend::Name(name, port)) => format!("{name}:{port}"),
        Some(Backend::Missing(why)) => format!("503: {why}"),
        None => "503".to_owned(),
    };
    format!("{key} ({state})")
}

/// Why not another.
fn others(candidates: &[(&Host, &Server)], host: &str, path: &str, lines: &mut Vec<String>) {
    let mut found = false;
    for (known, server) in candidates {
        for route in &server.routes {
            let why = match (route.matcher.matches(path), found) {
                (true, false) => {
                    found = true;
                    continue;
                }
                (true, true) => {
                    "it matches too, and a longer path or a more exact host goes first".to_owned()
                }
                (false, _) => format!("{path} is not meant"),
            };
            lines.push(format!("not {}: host {known}, path {}: {why}", route.origin, route.matcher));
        }
    }
    if let Some((Host::Exact(_), _)) = candidates.first() {
        return;
    }
    if !candidates.iter().any(|(known, _)| **known != Host::Any) {
        lines.push(format!("no rule names the host {host}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_a_method_and_a_url() {
        let question = Question::new("get", "https://Shop.Example.com:8443/a//b/../c/?x=1").unwrap();
        assert_eq!(
            question,
            Question {
                method: "GET".into(),
                https: true,
                host: "shop.example.com".into(),
                path: "/a/c/".into()
            }
        );
        assert_eq!(Question::new("GET", "http://a").unwrap().path, "/");
        assert_eq!(Question::new("GET", "http://a/b%2Fc").unwrap().path, "/b/c", "as requests are");
        assert!(Question::new("GET", "http://a/%zz").is_err());
        assert!(Question::new("GET", "shop.example.com/").is_err());
        assert!(Question::new("G ET", "http://a/").is_err());
    }
}
