//! The sentences of ingress-nginx's documentation, one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;

fn parsed(annotations: &[(&str, &str)]) -> Parsed {
    let annotations: BTreeMap<String, String> = annotations
        .iter()
        .map(|(name, value)| (format!("{ANNOTATION_PREFIX}{name}"), (*value).to_owned()))
        .collect();
    parse(&annotations)
}

fn settings(annotations: &[(&str, &str)]) -> Settings {
    let parsed = parsed(annotations);
    let bad: Vec<_> = parsed.findings.iter().filter(|it| it.severity != Severity::Note).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    parsed.settings
}

/// Severity and sentence of the only finding that is no note.
fn complaint(annotations: &[(&str, &str)]) -> (Severity, String) {
    let findings = parsed(annotations).findings;
    let bad: Vec<_> = findings.iter().filter(|it| it.severity != Severity::Note).collect();
    assert_eq!(bad.len(), 1, "{findings:#?}");
    (bad[0].severity, bad[0].sentence())
}

#[test]
fn without_annotations_the_defaults_hold() {
    let defaults = settings(&[]);
    assert!(
        defaults.ssl_redirect && !defaults.force_ssl_redirect && !defaults.use_regex && defaults.access_log
    );
    assert_eq!(defaults.body_limit_bytes, Some(1 << 20), "1m");
    assert_eq!(defaults.connect_timeout, Duration::from_secs(5));
    assert_eq!(
        (defaults.read_timeout, defaults.send_timeout),
        (Duration::from_secs(60), Duration::from_secs(60))
    );
    assert_eq!(defaults.retry.on, BTreeSet::from([RetryOn::Error, RetryOn::Timeout]));
    assert_eq!((defaults.retry.tries, defaults.retry.timeout), (3, Duration::ZERO));
    assert_eq!(defaults.limits.burst_multiplier, 5);
    assert_eq!(defaults.backend_protocol, BackendProtocol::Http);
    assert!(defaults.cors.is_none() && defaults.affinity.is_none() && defaults.canary.is_none());
    assert_eq!(defaults, Settings::default());
}

#[test]
fn sizes_have_units_and_zero_is_no_limit() {
    assert_eq!(settings(&[("proxy-body-size", "10m")]).body_limit_bytes, Some(10 << 20));
    assert_eq!(settings(&[("proxy-body-size", "8K")]).body_limit_bytes, Some(8192));
    assert_eq!(settings(&[("proxy-body-size", "0")]).body_limit_bytes, None);
    let (severity, sentence) = complaint(&[("proxy-body-size", "10MB")]);
    assert_eq!(severity, Severity::Invalid);
    assert_eq!(
        sentence,
        "annotation nginx.ingress.kubernetes.io/proxy-body-size \"10MB\" is no size such as 512k, 10m or 1g; the default \
         is used"
    );
}

#[test]
fn timeouts_are_unitless_seconds() {
    assert_eq!(settings(&[("proxy-read-timeout", "3600")]).read_timeout, Duration::from_secs(3600));
    assert_eq!(complaint(&[("proxy-read-timeout", "1h")]).0, Severity::Invalid);
}

#[test]
fn an_allow_list_that_cannot_be_read_lets_nobody_in() {
    let allowed = settings(&[("whitelist-source-range", "10.0.0.0/8, 192.0.2.7,fd00::/8")]);
    let ranges = ["10.0.0.0/8", "192.0.2.7/32", "fd00::/8"].map(|range| range.parse().unwrap());
    assert_eq!((allowed.allow, allowed.closed), (Some(ranges.to_vec()), false));
    let wrong = parsed(&[("allowlist-source-range", "10.0.0.0/8,office")]);
    assert!(wrong.settings.closed);
    assert!(wrong.findings[0].sentence().contains("\"office\", which is no CIDR; nobody is let in"));
}

#[test]
fn cors_has_the_documented_defaults() {
    let cors = settings(&[("enable-cors", "true")]).cors.unwrap();
    assert_eq!(cors.origins, ["*"]);
    assert_eq!(cors.methods, "GET, PUT, POST, DELETE, PATCH, OPTIONS");
    assert!(
        cors.headers.starts_with("DNT,Keep-Alive,User-Agent,")
            && cors.headers.ends_with("Range,Authorization")
    );
    assert_eq!((cors.credentials, cors.max_age_seconds, cors.expose.as_str()), (true, 1_728_000, ""));
    let several = [("enable-cors", "true"), ("cors-allow-origin", "https://a.example, https://*.b.example")];
    assert_eq!(settings(&several).cors.unwrap().origins, ["https://a.example", "https://*.b.example"]);
    assert!(settings(&[("cors-allow-origin", "https://a.example")]).cors.is_none(), "off unless enabled");
}

#[test]
fn passwords_need_a_secret_and_a_type_that_there_is() {
    let basic = settings(&[("auth-type", "basic"), ("auth-secret", "users"), ("auth-realm", "Staff")]);
    let expected = BasicAuth { secret: "users".into(), map: false, realm: "Staff".into(), digest: false };
    assert_eq!(basic.basic, Some(expected.clone()));
    let digest = settings(&[("auth-type", "Digest"), ("auth-secret", "users"), ("auth-realm", "Staff")]);
    assert_eq!(digest.basic, Some(BasicAuth { digest: true, ..expected }));
    for wrong in
        [[("auth-type", "basic"), ("auth-realm", "x")], [("auth-type", "ntlm"), ("auth-secret", "users")]]
    {
        let parsed = parsed(&wrong);
        assert!(parsed.settings.closed && parsed.settings.basic.is_none(), "{wrong:?}");
        assert!(parsed.findings.iter().any(|it| it.sentence().contains("nobody is let in")));
    }
}

#[test]
fn an_authenticator_is_a_url() {
    let auth = settings(&[
        ("auth-url", "https://auth.example.com/check"),
        ("auth-signin", "https://auth.example.com/start?rd=$escaped_request_uri"),
        ("auth-response-headers", "X-User, X-Groups"),
        ("auth-method", "post"),
    ]);
    let auth = auth.forward_auth.unwrap();
    assert_eq!((auth.method.as_deref(), auth.signin_parameter.as_str()), (Some("POST"), "rd"));
    assert_eq!(auth.response_headers, ["X-User", "X-Groups"]);
    assert!(parsed(&[("auth-url", "auth.example.com")]).settings.closed);
}

#[test]
fn a_canary_has_weight_header_and_cookie() {
    let canary = settings(&[("canary", "true"), ("canary-weight", "10")]).canary.unwrap();
    assert_eq!((canary.weight, canary.weight_total), (10, 100));
    let of_total = [("canary", "true"), ("canary-weight", "150"), ("canary-weight-total", "1000")];
    assert_eq!(settings(&of_total).canary.unwrap().weight, 150);
    assert_eq!(complaint(&[("canary", "true"), ("canary-weight", "150")]).0, Severity::Invalid);
    let pattern =
        complaint(&[("canary", "true"), ("canary-by-header", "X"), ("canary-by-header-pattern", "(")]);
    assert!(pattern.1.contains("is no regular expression"), "{}", pattern.1);
    assert!(settings(&[("canary-weight", "10")]).canary.is_none(), "without canary the others say nothing");
}

#[test]
fn affinity_by_cookie_has_the_documented_defaults() {
    let affinity = settings(&[("affinity", "cookie")]).affinity.unwrap();
    assert_eq!((affinity.cookie.name.as_str(), affinity.persistent), ("INGRESSCOOKIE", false));
    assert_eq!((affinity.cookie.secure, affinity.cookie.same_site), (None, None));
    assert_eq!(complaint(&[("affinity", "ip")]).0, Severity::Invalid);
    let named = settings(&[
        ("affinity", "cookie"),
        ("affinity-mode", "persistent"),
        ("session-cookie-name", "route"),
        ("session-cookie-expires", "86400"),
        ("session-cookie-samesite", "Lax"),
    ]);
    let named = named.affinity.unwrap();
    assert!(named.persistent);
    assert_eq!((named.cookie.expires_seconds, named.cookie.same_site), (Some(86_400), Some(SameSite::Lax)));
}

#[test]
fn conditions_of_the_next_endpoint_are_nginx_words() {
    let on = |text: &str| settings(&[("proxy-next-upstream", text)]).retry.on;
    assert_eq!(
        on("error timeout http_503 non_idempotent"),
        BTreeSet::from([RetryOn::Error, RetryOn::Timeout, RetryOn::Status(503), RetryOn::NonIdempotent])
    );
    assert!(on("off").is_empty());
    assert_eq!(complaint(&[("proxy-next-upstream", "error http_418")]).0, Severity::Invalid);
}

#[test]
fn redirect_pairs_belong_together() {
    let both = [("proxy-redirect-from", "http://a/"), ("proxy-redirect-to", "https://b/")];
    assert_eq!(settings(&both).location, Some(("http://a/".into(), "https://b/".into())));
    assert!(complaint(&[("proxy-redirect-from", "http://a/")]).1.contains("without the other"));
    let domain = settings(&[("proxy-cookie-domain", "a.internal b.example")]);
    assert_eq!(domain.cookie_domain, Some(("a.internal".into(), "b.example".into())));
    assert_eq!(settings(&[("proxy-cookie-path", "off")]).cookie_path, None);
}

#[test]
fn a_permanent_redirect_goes_before_a_temporal_one() {
    let both = settings(&[("temporal-redirect", "https://t/"), ("permanent-redirect", "https://p/")]);
    assert_eq!(both.redirect, Some(HttpRedirect { code: 301, url: "https://p/".into() }));
    let coded = settings(&[("temporal-redirect", "https://t/"), ("temporal-redirect-code", "307")]);
    assert_eq!(coded.redirect.unwrap().code, 307);
}

#[test]
fn an_unknown_annotation_is_told_with_the_nearest_real_one() {
    let (severity, sentence) = complaint(&[("rate-limit", "100")]);
    assert_eq!(severity, Severity::Unknown);
    assert_eq!(
        sentence,
        "annotation nginx.ingress.kubernetes.io/rate-limit does not exist and changes nothing: the nearest real one is \
         nginx.ingress.kubernetes.io/limit-rps"
    );
    assert!(complaint(&[("auth-basic", "Authentication Required")]).1.contains("kubernetes.io/auth-type"));
}

#[test]
fn what_is_not_done_is_told_with_what_to_do_instead() {
    let (severity, sentence) = complaint(&[("configuration-snippet", "deny all;")]);
    assert_eq!(severity, Severity::NotSupported);
    assert!(
        sentence.contains("is not supported and changes nothing: raw nginx configuration is never run"),
        "{sentence}"
    );
}

#[test]
fn every_annotation_of_the_catalogue_is_read_or_told() {
    for known in catalog::CATALOG {
        let findings = parsed(&[(known.name, "\u{1}")]).findings;
        let silent = findings.is_empty();
        // Free text may hold anything; its place in the plan is tested there.
        let free = [
            "rewrite-target",
            "default-backend",
            "service-upstream",
            "custom-headers",
            "upstream-hash-by",
            "auth-secret",
            "auth-tls-secret",
            "proxy-ssl-secret",
            "auth-proxy-set-headers",
        ];
        let elsewhere =
            ["auth-", "session-cookie-", "affinity-", "canary-", "cors-", "mirror-", "proxy-ssl-"];
        let needless = matches!(known.support, Support::Needless(_));
        let partial = elsewhere.iter().any(|prefix| known.name.starts_with(prefix));
        assert!(
            !silent || free.contains(&known.name) || partial || needless,
            "{} passes in silence",
            known.name
        );
    }
}

#[test]
fn annotations_of_others_are_none_of_our_business() {
    let foreign = BTreeMap::from([("cert-manager.io/cluster-issuer".to_owned(), "le".to_owned())]);
    assert!(parse(&foreign).findings.is_empty());
}

#[test]
fn beside_ssl_passthrough_the_others_do_nothing_and_that_is_told() {
    let alone =
        settings(&[("ssl-passthrough", "true"), ("ssl-redirect", "true"), ("backend-protocol", "HTTPS")]);
    assert_eq!(alone, Settings { ssl_passthrough: true, ..Settings::default() });
    // One that closes a route elsewhere has nothing to close here.
    let (severity, sentence) = complaint(&[
        ("ssl-passthrough", "true"),
        ("auth-type", "digest"),
        ("whitelist-source-range", "office"),
        ("ssl-redirect", "false"),
    ]);
    assert_eq!(severity, Severity::NotSupported);
    assert!(
        sentence.contains("remove auth-type, ssl-redirect, whitelist-source-range, or end TLS here"),
        "{sentence}"
    );
    let unknown = complaint(&[("ssl-passthrough", "true"), ("rate-limit", "1")]);
    assert_eq!(unknown.0, Severity::Unknown);
    assert_eq!(complaint(&[("ssl-passthrough", "both")]).0, Severity::Invalid);
}

#[test]
fn the_proxy_header_for_backends_has_two_versions_and_goes_with_ssl_passthrough() {
    let parsed = |annotations: &[(&str, &str)]| {
        parse(&annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    };
    let passthrough = ("nginx.ingress.kubernetes.io/ssl-passthrough", "true");
    let good = parsed(&[passthrough, ("weft.network/proxy-protocol", "v2")]);
    assert_eq!((good.settings.proxy_protocol, good.findings), (Some(ProxyVersion::V2), vec![]));
    for (annotations, severity, part) in [
        (
            &[passthrough, ("weft.network/proxy-protocol", "3")][..],
            Severity::Invalid,
            "\"3\" is none of v1, v2",
        ),
        (
            &[("weft.network/proxy-protocol", "v1")],
            Severity::NotSupported,
            "changes nothing without ssl-passthrough",
        ),
        (&[("weft.network/proxy", "v1")], Severity::Unknown, "the only one is weft.network/proxy-protocol"),
    ] {
        let parsed = parsed(annotations);
        assert_eq!(parsed.settings.proxy_protocol, None);
        let [finding] = &parsed.findings[..] else { panic!("{parsed:#?}") };
        let sentence = finding.sentence();
        assert_eq!(finding.severity, severity);
        assert!(
            sentence.starts_with("annotation weft.network/proxy") && sentence.contains(part),
            "{sentence}"
        );
    }
}
