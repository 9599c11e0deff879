//! Every annotation of ingress-nginx (its documentation, last state 1.15) with what becomes of it here. `weft lint`, the table in
//! `docs/ingress.md` and the parser read the same list.

/// What an annotation does here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// As ingress-nginx has it.
    Same,
    /// It works, and this is what differs.
    Differs(&'static str),
    /// It changes nothing here, and nothing is lost by that; why.
    Needless(&'static str),
    /// It is not done; what to do instead.
    Not(&'static str),
}

impl Support {
    /// A word for tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Differs(_) => "differs",
            Self::Needless(_) => "needless",
            Self::Not(_) => "not supported",
        }
    }

    /// What there is to say beside the word.
    pub fn note(self) -> &'static str {
        match self {
            Self::Same => "",
            Self::Differs(note) | Self::Needless(note) | Self::Not(note) => note,
        }
    }
}

/// One annotation, without its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub name: &'static str,
    /// Empty when there is none.
    pub default: &'static str,
    pub support: Support,
}

const fn same(name: &'static str, default: &'static str) -> Known {
    Known { name, default, support: Support::Same }
}

const fn differs(name: &'static str, default: &'static str, note: &'static str) -> Known {
    Known { name, default, support: Support::Differs(note) }
}

const fn needless(name: &'static str, default: &'static str, why: &'static str) -> Known {
    Known { name, default, support: Support::Needless(why) }
}

const fn not(name: &'static str, instead: &'static str) -> Known {
    Known { name, default: "", support: Support::Not(instead) }
}

const STREAMED: &str = "bodies are streamed both ways with bounded memory, so there is no buffer to size";
const SNIPPET: &str = "raw nginx configuration is never run; say what it does with other annotations";
const WAF: &str = "there is no web application firewall; put one in front of the backend";
const TRACE: &str = "no traces are made; remove it";
const KEEPALIVE: &str = "connections to the authenticator are kept and reused by themselves";

/// In the order of the names.
pub static CATALOG: &[Known] = &[
    same("affinity", ""),
    same("affinity-canary-behavior", "sticky"),
    differs("affinity-mode", "balanced", "with `balanced` too, clients stay where they are"),
    same("allowlist-source-range", ""),
    same("app-root", ""),
    same("auth-always-set-cookie", "false"),
    not("auth-cache-duration", "the authenticator is asked for every request; let it answer fast"),
    not("auth-cache-key", "the authenticator is asked for every request; let it answer fast"),
    needless("auth-keepalive", "0", KEEPALIVE),
    needless("auth-keepalive-requests", "1000", KEEPALIVE),
    needless("auth-keepalive-share-vars", "false", KEEPALIVE),
    needless("auth-keepalive-timeout", "60", KEEPALIVE),
    same("auth-method", ""),
    differs("auth-proxy-set-headers", "", "only a ConfigMap of the Ingress's own namespace is read"),
    same("auth-realm", ""),
    same("auth-request-redirect", ""),
    same("auth-response-headers", ""),
    differs(
        "auth-secret",
        "",
        "only a Secret of the Ingress's own namespace is read; users with bcrypt or crypt hashes are not let in, write `$apr1$` or `{SHA}`",
    ),
    same("auth-secret-type", "auth-file"),
    same("auth-signin", ""),
    same("auth-signin-redirect-param", "rd"),
    not("auth-snippet", SNIPPET),
    same("auth-tls-error-page", ""),
    differs(
        "auth-tls-match-cn",
        "",
        "the pattern is of Rust's regex crate: no look-around, no back-references",
    ),
    same("auth-tls-pass-certificate-to-upstream", "false"),
    differs("auth-tls-secret", "", "only a Secret of the Ingress's own namespace is read"),
    same("auth-tls-verify-client", "on"),
    differs("auth-tls-verify-depth", "1", "a chain of any length is verified"),
    differs(
        "auth-type",
        "",
        "`digest`: a nonce is good for a minute and each of its counts once; who fails often is not shut out",
    ),
    same("auth-url", ""),
    differs("backend-protocol", "HTTP", "`FCGI` and `AUTO_HTTP` are not done"),
    same("canary", "false"),
    same("canary-by-cookie", ""),
    same("canary-by-header", ""),
    differs(
        "canary-by-header-pattern",
        "",
        "the pattern is of Rust's regex crate: no look-around, no back-references",
    ),
    same("canary-by-header-value", ""),
    same("canary-weight", "0"),
    same("canary-weight-total", "100"),
    needless("client-body-buffer-size", "16k", STREAMED),
    not("configuration-snippet", SNIPPET),
    not("connection-proxy-header", "Connection is a header of one hop and is never passed on"),
    same("cors-allow-credentials", "true"),
    same(
        "cors-allow-headers",
        "DNT,Keep-Alive,User-Agent,X-Requested-With,If-Modified-Since,Cache-Control,Content-Type,Range,Authorization",
    ),
    same("cors-allow-methods", "GET, PUT, POST, DELETE, PATCH, OPTIONS"),
    same("cors-allow-origin", "*"),
    same("cors-expose-headers", ""),
    same("cors-max-age", "1728000"),
    differs(
        "custom-headers",
        "",
        "only a ConfigMap of the Ingress's own namespace is read; every valid header name is allowed",
    ),
    same("custom-http-errors", ""),
    same("default-backend", ""),
    same("denylist-source-range", ""),
    not("disable-proxy-intercept-errors", "remove custom-http-errors instead"),
    same("enable-access-log", "true"),
    same("enable-cors", "false"),
    needless("enable-global-auth", "true", "there is no global authenticator"),
    not("enable-modsecurity", WAF),
    not("enable-opentelemetry", TRACE),
    not("enable-owasp-core-rules", WAF),
    not("enable-rewrite-log", "`weft ingress explain METHOD URL` shows what becomes of a request"),
    not("fastcgi-index", "FastCGI is not spoken; put a web server before the backend"),
    not("fastcgi-params-configmap", "FastCGI is not spoken; put a web server before the backend"),
    same("force-ssl-redirect", "false"),
    same("from-to-www-redirect", "false"),
    not("global-rate-limit", "limits are per client and node: use limit-rps"),
    not("global-rate-limit-ignored-cidrs", "limits are per client and node: use limit-allowlist"),
    not("global-rate-limit-key", "limits are per client and node: use limit-rps"),
    not("global-rate-limit-window", "limits are per client and node: use limit-rps"),
    not("http2-push-preload", "browsers have given up server push; remove it"),
    same("limit-allowlist", ""),
    same("limit-burst-multiplier", "5"),
    same("limit-connections", ""),
    same("limit-rate", "0"),
    same("limit-rate-after", "0"),
    same("limit-rpm", ""),
    same("limit-rps", ""),
    same("limit-whitelist", ""),
    differs("load-balance", "round_robin", "both values choose the less loaded of two endpoints at random"),
    same("mirror-host", ""),
    same("mirror-request-body", "on"),
    differs(
        "mirror-target",
        "",
        "a copy that is slower than the request itself is given up, nobody waits for it; a target without a path gets the request's own",
    ),
    not("modsecurity-snippet", WAF),
    not("modsecurity-transaction-id", WAF),
    not("opentelemetry-operation-name", TRACE),
    not("opentelemetry-trust-incoming-span", TRACE),
    same("permanent-redirect", ""),
    same("permanent-redirect-code", "301"),
    not("preserve-trailing-slash", "the path is passed on as it came; remove it"),
    needless("proxy-body-buffer-size", "", STREAMED),
    same("proxy-body-size", "1m"),
    needless("proxy-buffer-size", "4k", "heads of answers up to 64 kB pass"),
    needless("proxy-buffering", "off", STREAMED),
    needless("proxy-buffers-number", "4", STREAMED),
    needless("proxy-busy-buffers-size", "", STREAMED),
    same("proxy-connect-timeout", "5"),
    same("proxy-cookie-domain", "off"),
    same("proxy-cookie-path", "off"),
    differs("proxy-http-version", "1.1", "`1.0` is not done"),
    needless("proxy-max-temp-file-size", "1024m", "nothing is ever written to disk"),
    same("proxy-next-upstream", "error timeout"),
    same("proxy-next-upstream-timeout", "0"),
    same("proxy-next-upstream-tries", "3"),
    same("proxy-read-timeout", "60"),
    differs("proxy-redirect-from", "off", "`default` does nothing; write the prefix"),
    same("proxy-redirect-to", "off"),
    differs(
        "proxy-request-buffering",
        "on",
        "requests are streamed; only the beginning of a body is kept, so that it can be sent again",
    ),
    same("proxy-send-timeout", "60"),
    not("proxy-ssl-ciphers", "only safe cipher suites of TLS 1.2 and 1.3 are used; remove it"),
    same("proxy-ssl-name", ""),
    differs("proxy-ssl-protocols", "TLSv1.2 TLSv1.3", "TLS 1.2 and 1.3 are always both offered"),
    differs("proxy-ssl-secret", "", "only a Secret of the Ingress's own namespace is read"),
    same("proxy-ssl-server-name", "off"),
    same("proxy-ssl-verify", "off"),
    needless("proxy-ssl-verify-depth", "1", "a chain of any length is verified"),
    not("relative-redirects", "redirects name the whole URL; remove it"),
    same("rewrite-target", ""),
    same("satisfy", "all"),
    same("server-alias", ""),
    not("server-snippet", SNIPPET),
    same("service-upstream", "false"),
    same("session-cookie-change-on-failure", "false"),
    same("session-cookie-conditional-samesite-none", "false"),
    same("session-cookie-domain", ""),
    same("session-cookie-expires", ""),
    same("session-cookie-max-age", ""),
    same("session-cookie-name", "INGRESSCOOKIE"),
    same("session-cookie-path", "/"),
    same("session-cookie-samesite", ""),
    same("session-cookie-secure", ""),
    not("ssl-ciphers", "only safe cipher suites of TLS 1.2 and 1.3 are used; remove it"),
    same("ssl-passthrough", "false"),
    not("ssl-prefer-server-ciphers", "only safe cipher suites of TLS 1.2 and 1.3 are used; remove it"),
    same("ssl-redirect", "true"),
    not("stream-snippet", SNIPPET),
    same("temporal-redirect", ""),
    same("temporal-redirect-code", "302"),
    same("upstream-hash-by", ""),
    not("upstream-hash-by-subset", "every endpoint takes part; remove it"),
    not("upstream-hash-by-subset-size", "every endpoint takes part; remove it"),
    same("upstream-vhost", ""),
    not("use-port-in-redirects", "redirects name the port that the client used; remove it"),
    same("use-regex", "false"),
    same("whitelist-source-range", ""),
    same("x-forwarded-prefix", ""),
];

/// The annotation of this name.
pub fn find(name: &str) -> Option<&'static Known> {
    CATALOG.binary_search_by(|known| known.name.cmp(name)).ok().map(|index| &CATALOG[index])
}

/// What guides write and never existed, with what they mean. Nearness of letters alone would miss it.
const MISTAKES: &[(&str, &str)] = &[
    ("auth-basic", "auth-type"),
    ("auth-basic-realm", "auth-realm"),
    ("auth-basic-user-file", "auth-secret"),
    ("client-max-body-size", "proxy-body-size"),
    ("cors-allowed-origins", "cors-allow-origin"),
    ("rate-limit", "limit-rps"),
    ("rate-limit-window", "limit-rpm"),
    ("redirect-to-https", "ssl-redirect"),
    ("secure-backends", "backend-protocol"),
    ("server-snippets", "server-snippet"),
    ("sticky-session", "affinity"),
    ("timeout", "proxy-read-timeout"),
    ("websocket-services", "proxy-read-timeout"),
];

/// The real annotation that is nearest to a name that does not exist; `None` when nothing is near.
pub fn nearest(name: &str) -> Option<&'static str> {
    if let Some((_, real)) = MISTAKES.iter().find(|(wrong, _)| *wrong == name) {
        return Some(real);
    }
    let by_distance = CATALOG.iter().map(|known| (distance(name, known.name), known.name));
    let (distance, found) = by_distance.min()?;
    (distance <= 2 + name.len() / 5).then_some(found)
}

/// Levenshtein's: insertions, deletions and substitutions of a byte.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_in_order_and_once() {
        assert!(CATALOG.windows(2).all(|pair| pair[0].name < pair[1].name));
        assert!(CATALOG.iter().all(|known| find(known.name) == Some(known)));
    }

    #[test]
    fn the_table_of_the_manual_is_this_list() {
        let manual = include_str!("../../../../docs/ingress.md");
        let (_, table) = manual.split_once("\n## Annotations\n").unwrap();
        let written: Vec<&str> = table.lines().filter(|line| line.starts_with("| `")).collect();
        let row = |known: &Known| {
            let default =
                if known.default.is_empty() { String::new() } else { format!("`{}`", known.default) };
            format!("| `{}` | {default} | {} | {} |", known.name, known.support.word(), known.support.note())
        };
        let listed: Vec<String> = CATALOG.iter().map(row).collect();
        assert_eq!(written, listed);
    }

    #[test]
    fn the_nearest_real_name_is_what_was_meant() {
        for (wrong, real) in [
            ("rate-limit", "limit-rps"),
            ("auth-basic", "auth-type"),
            ("server-snippets", "server-snippet"),
            ("ssl-redirects", "ssl-redirect"),
            ("proxy-body-sise", "proxy-body-size"),
            ("enable-cor", "enable-cors"),
        ] {
            assert_eq!(nearest(wrong), Some(real), "{wrong}");
        }
        assert_eq!(nearest("zzzzzzzzzzzz"), None);
    }
}
