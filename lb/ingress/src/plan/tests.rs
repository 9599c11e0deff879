//! The sentences and tables of the Kubernetes Ingress documentation and API reference, one by one.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};
use weft_model::ingress::IngressConfig;
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, NodeFacts};
use weft_netstack::kube::Cluster;

use super::table::{Action, Backend, Host};
use super::*;
use crate::explain::{Question, decide, explain};

fn config() -> ClusterConfig {
    ClusterConfig {
        ingress: IngressConfig {
            on: true,
            classes: BTreeSet::from(["weft".to_owned()]),
            adopt_nginx: true,
            ..IngressConfig::default()
        },
        ..ClusterConfig::default()
    }
}

pub(crate) fn snapshot(documents: Vec<Value>) -> Snapshot {
    let facts = NodeFacts {
        name: "node-a".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    Cluster::from_documents(documents).snapshot(Generation(1), Arc::new(config()), Arc::new(facts))
}

fn plan(documents: Vec<Value>) -> Planned<RouteTable> {
    IngressPlanner::default().plan(&snapshot(documents))
}

pub(super) fn backend(service: &str) -> Value {
    json!({"service": {"name": service, "port": {"number": 80}}})
}

pub(super) fn path(kind: &str, path: &str, service: &str) -> Value {
    json!({"path": path, "pathType": kind, "backend": backend(service)})
}

pub(super) fn ingress_of(name: &str, day: u8, annotations: Value, spec: Value) -> Value {
    let mut spec = spec;
    if spec.get("ingressClassName").is_none() {
        spec["ingressClassName"] = json!("weft");
    }
    json!({"kind": "Ingress", "spec": spec, "metadata": {
        "name": name, "namespace": "default", "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z"),
        "annotations": annotations.as_object().unwrap().iter()
            .map(|(key, value)| (format!("nginx.ingress.kubernetes.io/{key}"), value.clone()))
            .collect::<serde_json::Map<_, _>>()}})
}

pub(super) fn rules(host: Option<&str>, paths: &[Value]) -> Value {
    let mut rule = json!({"http": {"paths": paths}});
    if let Some(host) = host {
        rule["host"] = json!(host);
    }
    json!({"rules": [rule]})
}

pub(super) fn service(name: &str) -> Value {
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "name": "http"}]}})
}

pub(super) fn slice(service: &str, endpoints: &[(&str, bool, bool)]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(address, ready, terminating)| {
            json!({"addresses": [address], "nodeName": "node-b", "targetRef": {"kind": "Pod", "name": "p"},
                "conditions": {"ready": ready, "serving": true, "terminating": terminating}})
        })
        .collect();
    json!({"kind": "EndpointSlice", "metadata": {"name": format!("{service}-1"), "namespace": "default",
        "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints})
}

/// The Service that a request goes to, or the status or redirect that answers it.
fn answer(planned: &Planned<RouteTable>, url: &str) -> String {
    let question = Question::new("GET", url).unwrap();
    match decide(&planned.plan, &question.host, &question.path) {
        None => "404".to_owned(),
        Some((_, route)) if route.to_https && !question.https => "https".to_owned(),
        Some((_, route)) => match &route.action {
            Action::Forward(key) => key.service.name.to_string(),
            Action::Redirect(redirect) => format!("{} {}", redirect.code, redirect.url),
            Action::Refuse { status, .. } => status.to_string(),
        },
    }
}

fn messages(planned: &Planned<RouteTable>) -> Vec<String> {
    planned.problems.iter().map(ToString::to_string).collect()
}

/// The table "Examples" of the section "Path types", row by row: kind, paths, request path, which path matches.
#[test]
fn the_examples_of_the_path_types_hold() {
    /// Paths of the Ingress, path of the request, the path that matches.
    type Row = (&'static [(&'static str, &'static str)], &'static str, Option<&'static str>);
    let rows: &[Row] = &[
        (&[("Prefix", "/")], "/", Some("/")),
        (&[("Prefix", "/")], "/any/path", Some("/")),
        (&[("Exact", "/foo")], "/foo", Some("/foo")),
        (&[("Exact", "/foo")], "/bar", None),
        (&[("Exact", "/foo")], "/foo/", None),
        (&[("Exact", "/foo/")], "/foo", None),
        (&[("Prefix", "/foo")], "/foo", Some("/foo")),
        (&[("Prefix", "/foo")], "/foo/", Some("/foo")),
        (&[("Prefix", "/foo/")], "/foo", Some("/foo/")),
        (&[("Prefix", "/foo/")], "/foo/", Some("/foo/")),
        (&[("Prefix", "/aaa/bb")], "/aaa/bbb", None),
        (&[("Prefix", "/aaa/bbb")], "/aaa/bbb", Some("/aaa/bbb")),
        (&[("Prefix", "/aaa/bbb/")], "/aaa/bbb", Some("/aaa/bbb/")),
        (&[("Prefix", "/aaa/bbb")], "/aaa/bbb/", Some("/aaa/bbb")),
        (&[("Prefix", "/aaa/bbb")], "/aaa/bbb/ccc", Some("/aaa/bbb")),
        (&[("Prefix", "/aaa/bbb")], "/aaa/bbbxyz", None),
        (&[("Prefix", "/"), ("Prefix", "/aaa")], "/aaa/ccc", Some("/aaa")),
        (&[("Prefix", "/"), ("Prefix", "/aaa"), ("Prefix", "/aaa/bbb")], "/aaa/bbb", Some("/aaa/bbb")),
        (&[("Prefix", "/"), ("Prefix", "/aaa"), ("Prefix", "/aaa/bbb")], "/ccc", Some("/")),
        (&[("Prefix", "/aaa")], "/ccc", None),
        (&[("Prefix", "/foo"), ("Exact", "/foo")], "/foo", Some("/foo")),
    ];
    for (paths, request, expected) in rows {
        let named = |(i, (kind, text)): (usize, &(&str, &str))| path(kind, text, &format!("s{i}"));
        let list: Vec<Value> = paths.iter().enumerate().map(named).collect();
        let planned = plan(vec![ingress_of("web", 1, json!({}), rules(None, &list))]);
        let got = answer(&planned, &format!("http://any.example{request}"));
        // "In some cases ... Exact path type [is given precedence] over prefix path type."
        let exact = |index: &usize| paths[*index].0 == "Exact";
        let index = expected.map(|text| {
            let of_text: Vec<usize> = (0..paths.len()).filter(|i| paths[*i].1 == text).collect();
            of_text.iter().copied().find(exact).unwrap_or(of_text[0])
        });
        let wanted = index.map_or("404".to_owned(), |i| format!("s{i}"));
        assert_eq!(got, wanted, "{paths:?} {request}");
    }
}

/// The table of the section "Hostname wildcards".
#[test]
fn a_wildcard_covers_exactly_one_label() {
    let planned =
        plan(vec![ingress_of("web", 1, json!({}), rules(Some("*.foo.com"), &[path("Prefix", "/", "web")]))]);
    assert_eq!(answer(&planned, "http://bar.foo.com/"), "web", "matches based on shared suffix");
    assert_eq!(answer(&planned, "http://baz.bar.foo.com/"), "404", "wildcard only covers a single DNS label");
    assert_eq!(answer(&planned, "http://foo.com/"), "404", "wildcard only covers a single DNS label");
}

#[test]
fn an_exact_host_goes_before_a_wildcard_and_both_before_every_host() {
    let planned = plan(vec![
        ingress_of("any", 1, json!({}), rules(None, &[path("Prefix", "/", "any")])),
        ingress_of("wild", 2, json!({}), rules(Some("*.foo.com"), &[path("Prefix", "/", "wild")])),
        ingress_of("own", 3, json!({}), rules(Some("a.foo.com"), &[path("Prefix", "/x", "own")])),
    ]);
    assert_eq!(answer(&planned, "http://a.foo.com/x"), "own");
    assert_eq!(answer(&planned, "http://b.foo.com/x"), "wild");
    assert_eq!(answer(&planned, "http://other.example/x"), "any");
    assert_eq!(answer(&planned, "http://a.foo.com/y"), "any", "a rule without a host is for all traffic");
}

/// "If no rules are specified, all traffic is sent to the default backend"; "if none of the hosts or paths match, the traffic is
/// routed to your default backend".
#[test]
fn the_default_backend_takes_what_nothing_matches() {
    let planned = plan(vec![ingress_of("all", 1, json!({}), json!({"defaultBackend": backend("fallback")}))]);
    assert_eq!(answer(&planned, "http://any.example/any"), "fallback");
    let mut spec = rules(Some("a.example"), &[path("Prefix", "/x", "web")]);
    spec["defaultBackend"] = backend("fallback");
    let planned = plan(vec![ingress_of("one", 1, json!({}), spec)]);
    assert_eq!(answer(&planned, "http://a.example/x/1"), "web");
    assert_eq!(answer(&planned, "http://a.example/y"), "fallback");
    assert_eq!(answer(&planned, "http://b.example/y"), "404", "its rules are for another host");
}

#[test]
fn an_ingress_of_another_class_is_none_of_our_business() {
    let of = |class: &str| {
        let mut spec = rules(None, &[path("Prefix", "/", "web")]);
        spec["ingressClassName"] = json!(class);
        answer(&plan(vec![ingress_of("web", 1, json!({}), spec)]), "http://a.example/")
    };
    assert_eq!((of("weft").as_str(), of("nginx").as_str(), of("traefik").as_str()), ("web", "web", "404"));
}

#[test]
fn of_two_that_claim_one_path_the_older_wins_and_the_newer_is_told() {
    let one = |name: &str, day, text: &str| {
        ingress_of(name, day, json!({}), rules(Some("a.example"), &[path("Prefix", text, name)]))
    };
    let planned =
        plan(vec![service("older"), service("newer"), one("newer", 2, "/foo/"), one("older", 1, "/foo")]);
    assert_eq!(answer(&planned, "http://a.example/foo"), "older");
    assert_eq!(
        messages(&planned),
        [
            "Ingress default/newer: Conflict: spec.rules[0].http.paths[0]: a.example/foo/ belongs to the older Ingress \
          default/older spec.rules[0].http.paths[0], so requests go there; remove one of the two"
        ]
    );
}

#[test]
fn with_one_rewrite_all_paths_of_the_host_are_expressions() {
    let planned = plan(vec![
        ingress_of(
            "api",
            1,
            json!({"rewrite-target": "/$2"}),
            rules(Some("a.example"), &[path("ImplementationSpecific", "/api/v1(/|$)(.*)", "api")]),
        ),
        ingress_of("web", 2, json!({}), rules(Some("a.example"), &[path("Exact", "/Web", "web")])),
        ingress_of("other", 3, json!({}), rules(Some("b.example"), &[path("Exact", "/Web", "other")])),
    ]);
    assert_eq!(answer(&planned, "http://a.example/api/v1/things"), "api");
    assert_eq!(answer(&planned, "http://a.example/API/V1"), "api", "case-insensitive");
    assert_eq!(answer(&planned, "http://a.example/api/v10"), "404");
    assert_eq!(answer(&planned, "http://a.example/website"), "web", "even Exact is a prefix there");
    assert_eq!(answer(&planned, "http://b.example/website"), "404", "another host is not concerned");
}

#[test]
fn a_path_that_is_no_expression_answers_503_and_is_told() {
    let planned = plan(vec![ingress_of(
        "api",
        1,
        json!({"use-regex": "true"}),
        rules(
            Some("a.example"),
            &[path("ImplementationSpecific", "/api/(v1", "api"), path("Prefix", "/ok", "api")],
        ),
    )]);
    assert_eq!(answer(&planned, "http://a.example/api/v1"), "503");
    assert_eq!(answer(&planned, "http://a.example/ok"), "api");
    let told = messages(&planned);
    assert!(
        told.iter()
            .any(|it| it.contains("spec.rules[0].http.paths[0].path \"/api/(v1\" is no regular expression")),
        "{told:#?}"
    );
}

#[test]
fn endpoints_are_those_that_are_ready() {
    let web = ingress_of("web", 1, json!({}), rules(None, &[path("Prefix", "/", "web")]));
    let endpoints = |list: &[(&str, bool, bool)]| {
        let planned = plan(vec![web.clone(), service("web"), slice("web", list)]);
        let backend = planned.plan.backends.values().next().unwrap().clone();
        let Backend::Endpoints(targets) = &*backend else { panic!("{backend:?}") };
        targets.iter().map(|it| (it.address.to_string(), it.terminating)).collect::<Vec<_>>()
    };
    assert_eq!(
        endpoints(&[("10.1.0.3", true, false), ("10.1.0.2", true, false), ("10.1.0.4", false, true)]),
        [("10.1.0.2:8080".to_owned(), false), ("10.1.0.3:8080".to_owned(), false)]
    );
    assert_eq!(
        endpoints(&[("10.1.0.4", false, true)]),
        [("10.1.0.4:8080".to_owned(), true)],
        "better than nobody"
    );
    assert!(endpoints(&[]).is_empty());
}

#[test]
fn a_backend_that_does_not_exist_is_told_and_answers_503() {
    let web = |port: Value| {
        let path =
            json!({"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": port}}});
        ingress_of("web", 1, json!({}), rules(None, &[path]))
    };
    let told = |documents: Vec<Value>| messages(&plan(documents)).join("\n");
    assert_eq!(
        told(vec![web(json!({"number": 80}))]),
        "Ingress default/web: Missing: spec.rules[0].http.paths[0].backend: there is no Service default/web; requests get 503 \
         meanwhile"
    );
    assert!(
        told(vec![service("web"), web(json!({"number": 81}))])
            .contains("Service default/web has no port 81 (it has 80 http)")
    );
    assert_eq!(told(vec![service("web"), web(json!({"name": "http"}))]), "", "named ports");
}

#[test]
fn a_canary_joins_the_rule_of_another_ingress() {
    let app = |name: &str, day, annotations: Value| {
        ingress_of(name, day, annotations, rules(Some("a.example"), &[path("Prefix", "/", name)]))
    };
    let planned = plan(vec![
        service("main"),
        service("v2"),
        service("v3"),
        app("v2", 1, json!({"canary": "true", "canary-weight": "10"})),
        app("main", 2, json!({})),
        app("v3", 3, json!({"canary": "true", "canary-weight": "5"})),
    ]);
    assert_eq!(answer(&planned, "http://a.example/"), "main");
    let (_, route) = decide(&planned.plan, "a.example", "/").unwrap();
    let canary = route.canary.as_ref().unwrap();
    assert_eq!((&*canary.backend.service.name, canary.rule.weight), ("v2", 10));
    assert!(messages(&planned)[0].starts_with(
        "Ingress default/v3: Conflict: spec.rules[0].http.paths[0]: a.example/ has the canary of"
    ));
    let alone = plan(vec![service("v2"), app("v2", 1, json!({"canary": "true"}))]);
    assert!(messages(&alone)[0].contains("there is nothing to be the canary of"));
}

pub(super) fn secret(name: &str, data: &[(&str, &str)]) -> Value {
    let data: serde_json::Map<_, _> =
        data.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    json!({"kind": "Secret", "metadata": {"name": name, "namespace": "default"}, "stringData": data})
}

pub(super) fn pair(host: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn with_tls(annotations: Value) -> Value {
    let mut spec = rules(Some("a.example"), &[path("Prefix", "/", "web")]);
    spec["tls"] = json!([{"hosts": ["a.example"], "secretName": "tls"}]);
    ingress_of("web", 1, annotations, spec)
}

#[test]
fn a_certificate_out_of_its_time_is_told_and_served_still() {
    let (chain, key) = pair("a.example");
    let documents =
        vec![service("web"), with_tls(json!({})), secret("tls", &[("tls.crt", &chain), ("tls.key", &key)])];
    let at = |now: fn() -> Timestamp| IngressPlanner::at(now).plan(&snapshot(documents.clone()));
    // rcgen's certificates hold from 1975 to 4096.
    for (now, said) in [
        ((|| Timestamp::UNIX_EPOCH) as fn() -> Timestamp, "is not valid before 1975-01-01T00:00:00Z"),
        (|| Timestamp::from_second(70_000_000_000).unwrap(), "expired at 4096-01-01T00:00:00Z; renew it"),
    ] {
        let planned = at(now);
        let sentence = format!(
            "Ingress default/web: InvalidField: spec.tls[0].secretName: Secret default/tls: its certificate {said}"
        );
        assert!(messages(&planned)[0].starts_with(&sentence), "{:?}", messages(&planned));
        assert!(planned.plan.certificates.contains_key("a.example"));
    }
    assert_eq!(messages(&at(|| Timestamp::from_second(1_800_000_000).unwrap())), [""; 0]);
}

#[test]
fn a_host_with_a_certificate_redirects_to_https_unless_told_otherwise() {
    let (chain, key) = pair("a.example");
    let of = |annotations: Value| {
        let planned = plan(vec![
            service("web"),
            with_tls(annotations),
            secret("tls", &[("tls.crt", &chain), ("tls.key", &key)]),
        ]);
        assert_eq!(messages(&planned), [""; 0]);
        assert!(planned.plan.certificates.contains_key("a.example") && planned.plan.waiting.is_empty());
        (answer(&planned, "http://a.example/"), answer(&planned, "https://a.example/"))
    };
    assert_eq!(of(json!({})), ("https".to_owned(), "web".to_owned()));
    assert_eq!(of(json!({"ssl-redirect": "false"})), ("web".to_owned(), "web".to_owned()));
    let plain = ingress_of(
        "web",
        1,
        json!({"force-ssl-redirect": "true"}),
        rules(None, &[path("Prefix", "/", "web")]),
    );
    assert_eq!(answer(&plan(vec![plain]), "http://a.example/"), "https", "even without a TLS block");
}

#[test]
fn a_certificate_that_cannot_be_used_is_told_and_the_routes_stay() {
    let (chain, key) = pair("a.example");
    let (_, other) = pair("a.example");
    let told = |secrets: Vec<Value>| {
        let planned = plan([vec![service("web"), with_tls(json!({}))], secrets].concat());
        assert_eq!(answer(&planned, "https://a.example/"), "web");
        assert!(planned.plan.certificates.is_empty());
        (messages(&planned).join("\n"), planned.plan.waiting.len())
    };
    assert_eq!(told(vec![]), (String::new(), 1), "it is being asked for");
    let mismatch = told(vec![secret("tls", &[("tls.crt", &chain), ("tls.key", &other)])]).0;
    assert!(
        mismatch.contains("spec.tls[0].secretName: Secret default/tls: tls.key is not the key of"),
        "{mismatch}"
    );
    assert!(mismatch.ends_with("TLS to its hosts fails meanwhile"), "{mismatch}");
    assert!(told(vec![secret("tls", &[("tls.key", &key)])]).0.contains("the Secret has no tls.crt"));
}

#[test]
fn a_backend_whose_users_are_unknown_lets_nobody_in() {
    let annotations = json!({"auth-type": "basic", "auth-secret": "users"});
    let web = ingress_of("web", 1, annotations, rules(None, &[path("Prefix", "/", "web")]));
    let with = |data: &[(&str, &str)]| plan(vec![service("web"), web.clone(), secret("users", data)]);
    assert_eq!(answer(&with(&[("wrong", "x")]), "http://a/"), "503");
    let good = with(&[("auth", "amy:$apr1$x\n# note\nbob:{SHA}y\n")]);
    assert_eq!(answer(&good, "http://a/"), "web");
    let (_, route) = decide(&good.plan, "a", "/").unwrap();
    assert_eq!(route.materials.users.as_ref().unwrap().keys().collect::<Vec<_>>(), ["amy", "bob"]);
    let foreign = json!({"auth-type": "basic", "auth-secret": "kube-system/admin"});
    let foreign =
        plan(vec![service("web"), ingress_of("web", 1, foreign, rules(None, &[path("Prefix", "/", "web")]))]);
    assert_eq!(answer(&foreign, "http://a/"), "503");
    assert!(messages(&foreign)[0].contains("is of another namespace"), "{:?}", messages(&foreign));
}

#[test]
fn users_of_digest_are_those_of_its_realm_and_there_are_some() {
    let annotations = json!({"auth-type": "digest", "auth-secret": "users", "auth-realm": "Cellar"});
    let web = ingress_of("web", 1, annotations, rules(None, &[path("Prefix", "/", "web")]));
    let with = |auth: &str| plan(vec![service("web"), web.clone(), secret("users", &[("auth", auth)])]);
    let good = with("amy:Attic:0\namy:Cellar:1\n");
    assert_eq!((answer(&good, "http://a/").as_str(), messages(&good).len()), ("web", 0));
    let (_, route) = decide(&good.plan, "a", "/").unwrap();
    assert_eq!(
        route.materials.users.as_ref().unwrap().keys().collect::<Vec<_>>(),
        ["amy:Attic", "amy:Cellar"]
    );
    for file in ["amy:$apr1$x$y", "amy:Attic:0", ""] {
        let wrong = with(file);
        assert_eq!(answer(&wrong, "http://a/"), "503", "{file}");
        assert!(messages(&wrong)[0].contains("no user of the realm \"Cellar\""), "{:?}", messages(&wrong));
    }
}

#[test]
fn an_alias_is_one_more_name_unless_a_rule_has_it() {
    let planned = plan(vec![
        service("web"),
        service("b"),
        ingress_of(
            "web",
            1,
            json!({"server-alias": "alias.example,b.example"}),
            rules(Some("a.example"), &[path("Prefix", "/", "web")]),
        ),
        ingress_of("b", 2, json!({}), rules(Some("b.example"), &[path("Prefix", "/", "b")])),
    ]);
    assert_eq!(answer(&planned, "http://alias.example/"), "web");
    assert_eq!(answer(&planned, "http://b.example/"), "b");
    assert!(messages(&planned)[0].contains("annotation server-alias: b.example belongs to"));
}

#[test]
fn www_is_redirected_to_the_name_of_the_rule() {
    let web = ingress_of(
        "web",
        1,
        json!({"from-to-www-redirect": "true"}),
        rules(Some("a.example"), &[path("Prefix", "/", "web")]),
    );
    let planned = plan(vec![web]);
    let server = &planned.plan.hosts[&Host::Exact("www.a.example".to_owned())];
    assert_eq!(server.redirect_to.as_deref(), Some("a.example"));
}

#[test]
fn an_unknown_annotation_is_a_problem_and_the_ingress_still_routes() {
    let web = ingress_of("web", 1, json!({"rate-limit": "100"}), rules(None, &[path("Prefix", "/", "web")]));
    let planned = plan(vec![service("web"), web]);
    assert_eq!(answer(&planned, "http://a/"), "web");
    assert_eq!(
        messages(&planned),
        [
            "Ingress default/web: NotSupported: annotation nginx.ingress.kubernetes.io/rate-limit does not exist and changes \
          nothing: the nearest real one is nginx.ingress.kubernetes.io/limit-rps"
        ]
    );
}

#[test]
fn hosts_of_one_certificate_share_it_after_reading_too() {
    let (chain, key) = pair("a.example");
    let mut web = with_tls(json!({}));
    web["spec"]["tls"][0]["hosts"] = json!(["a.example", "b.example"]);
    let planned = plan(vec![service("web"), web, secret("tls", &[("tls.crt", &chain), ("tls.key", &key)])]);
    let read = RouteTable::decode(&planned.plan.encode().unwrap()).unwrap();
    for table in [&planned.plan, &read] {
        assert!(Arc::ptr_eq(&table.certificates["a.example"], &table.certificates["b.example"]));
    }
}

/// ingress-nginx: an alias is another `server_name` of the same server, expressions included.
#[test]
fn an_alias_has_the_routes_of_its_host_as_they_are() {
    let annotations = json!({"server-alias": "b.example", "use-regex": "true"});
    let of = rules(Some("a.example"), &[path("ImplementationSpecific", "/v[0-9]", "web")]);
    let planned = plan(vec![service("web"), ingress_of("web", 1, annotations, of)]);
    for host in ["a.example", "b.example"] {
        assert_eq!(answer(&planned, &format!("http://{host}/v1/x")), "web");
        assert_eq!(answer(&planned, &format!("http://{host}/vx")), "404");
    }
}

#[test]
fn a_table_is_the_same_after_it_was_written_and_read() {
    let (chain, key) = pair("a.example");
    let annotations = json!({"auth-type": "basic", "auth-secret": "users", "canary-weight": "1", "affinity": "cookie",
        "whitelist-source-range": "10.0.0.0/8", "proxy-next-upstream": "error http_503", "server-alias": "*.b.example"});
    let planned = plan(vec![
        service("web"),
        slice("web", &[("10.1.0.2", true, false)]),
        with_tls(annotations),
        ingress_of("any", 2, json!({}), json!({"defaultBackend": backend("gone")})),
        secret("tls", &[("tls.crt", &chain), ("tls.key", &key)]),
        secret("users", &[("auth", "amy:x")]),
    ]);
    let text = planned.plan.encode().unwrap();
    assert_eq!(RouteTable::decode(&text).unwrap(), planned.plan);
    assert!(planned.plan.hosts.len() == 3 && !planned.plan.certificates.is_empty());
}

#[test]
fn settings_that_many_routes_have_are_written_and_held_once() {
    let web = |host: &str, annotations: Value| {
        let paths = ["/a", "/b", "/c"].map(|text| path("Prefix", text, "web"));
        ingress_of(host, 1, annotations, rules(Some(host), &paths))
    };
    let other = json!({"proxy-read-timeout": "7"});
    let planned =
        plan(vec![web("a.example", json!({})), web("b.example", json!({})), web("c.example", other)]);
    let text = planned.plan.encode().unwrap();
    assert_eq!(String::from_utf8_lossy(&text).matches("\"body_limit_bytes\"").count(), 2);
    let read = RouteTable::decode(&text).unwrap();
    assert_eq!(read, planned.plan);
    let of = |host: &str| read.hosts[&Host::Exact(host.to_owned())].routes[0].settings.clone();
    assert!(
        Arc::ptr_eq(&of("a.example"), &of("b.example")) && !Arc::ptr_eq(&of("a.example"), &of("c.example"))
    );
    assert!(RouteTable::decode(&text[..text.len() - 1]).is_err());
}

#[test]
fn a_file_of_the_version_before_has_settings_in_each_route_and_is_read() {
    let annotations = json!({"proxy-read-timeout": "7"});
    let web = ingress_of("web", 1, annotations, rules(Some("a.example"), &[path("Prefix", "/", "web")]));
    let planned = plan(vec![web]);
    let mut file: Value = serde_json::from_slice(&planned.plan.encode().unwrap()).unwrap();
    let settings = file["settings"][0].take();
    let mut before = file["table"].take();
    before["hosts"]["a.example"]["routes"][0]["settings"] = settings;
    assert_eq!(RouteTable::decode(&serde_json::to_vec(&before).unwrap()).unwrap(), planned.plan);
    before["hosts"] = json!(7);
    assert!(RouteTable::decode(&serde_json::to_vec(&before).unwrap()).is_err());
}

#[test]
fn a_plan_made_with_memories_equals_one_made_anew() {
    let mut planner = IngressPlanner::default();
    let web = |kind: &str| ingress_of("web", 1, json!({}), rules(None, &[path(kind, "/", "web")]));
    let stages = [
        vec![web("Prefix")],
        vec![web("Prefix"), service("web")],
        vec![web("Exact"), service("web"), slice("web", &[("10.1.0.2", true, false)])],
        vec![web("Exact"), service("web"), slice("web", &[("10.1.0.3", true, false)])],
        vec![],
    ];
    for stage in stages {
        let snapshot = snapshot(stage);
        assert_eq!(planner.plan(&snapshot), IngressPlanner::default().plan(&snapshot));
    }
}

#[test]
fn an_explanation_names_object_rule_endpoints_and_why_not_another() {
    let planned = plan(vec![
        service("web"),
        service("api"),
        slice("api", &[("10.1.0.2", true, false)]),
        ingress_of(
            "web",
            1,
            json!({}),
            rules(
                Some("a.example"),
                &[path("Prefix", "/", "web"), path("Prefix", "/api", "api"), path("Exact", "/x", "web")],
            ),
        ),
    ]);
    let text = explain(&planned.plan, &Question::new("GET", "http://a.example/api/1").unwrap()).join("\n");
    assert_eq!(
        text,
        "GET http://a.example/api/1\n\
         taken by Ingress default/web spec.rules[0].http.paths[1]: host a.example, path /api/\n\
         backend default/api:80: one of\n  \
           10.1.0.2:8080 Pod default/p on node-b\n\
         not Ingress default/web spec.rules[0].http.paths[2]: host a.example, path = /x: /api/1 is not meant\n\
         not Ingress default/web spec.rules[0].http.paths[0]: host a.example, path /: it matches too, and a longer path or a \
         more exact host goes first"
    );
    let nowhere = explain(&planned.plan, &Question::new("GET", "http://b.example/").unwrap());
    assert_eq!(nowhere[1], "404: no rule has the host b.example, and none is for every host");
}

fn passing(name: &str, day: u8, host: Option<&str>, paths: &[Value]) -> Value {
    ingress_of(name, day, json!({"ssl-passthrough": "true"}), rules(host, paths))
}

/// ingress-nginx: the path / decides, the older Ingress of a host says whether its TLS is passed on.
#[test]
fn tls_of_a_host_is_passed_on_where_its_older_ingress_says_so() {
    let root = || path("Prefix", "/", "vault");
    let mut told = passing("vault", 1, Some("v.example"), &[root(), path("Prefix", "/api", "web")]);
    told["metadata"]["annotations"]["weft.network/proxy-protocol"] = json!("v1");
    let planned = plan(vec![
        service("vault"),
        slice("vault", &[("10.1.0.2", true, false)]),
        service("web"),
        told,
        passing("wild", 1, Some("*.w.example"), &[path("ImplementationSpecific", "", "vault")]),
        ingress_of("late", 2, json!({}), rules(Some("v.example"), &[path("Prefix", "/x", "web")])),
        ingress_of(
            "next",
            2,
            json!({"canary": "true", "canary-weight": "1"}),
            rules(Some("v.example"), &[root()]),
        ),
        ingress_of("first", 1, json!({}), rules(Some("e.example"), &[path("Prefix", "/x", "web")])),
        passing("second", 2, Some("e.example"), &[root()]),
        passing("any", 1, None, &[root()]),
    ]);
    let passed = |host: &str| planned.plan.hosts[&Host::of(Some(host))].passthrough.as_ref();
    let vault = passed("v.example").unwrap();
    assert_eq!(vault.origin.to_string(), "Ingress default/vault spec.rules[0].http.paths[0]");
    assert_eq!(vault.proxy_protocol, Some(crate::annotations::ProxyVersion::V1));
    assert!(
        matches!(&*planned.plan.backends[&vault.backend], Backend::Endpoints(targets) if targets.len() == 1)
    );
    assert!(passed("*.w.example").is_some() && passed("e.example").is_none());
    for (url, expected) in [
        ("http://v.example/api", "https"),
        ("https://v.example/api", "421"),
        ("http://v.example/x", "web"),
        ("http://a.w.example/", "https"),
        ("https://e.example/x", "web"),
        ("https://e.example/", "503"),
        ("https://other.example/", "503"),
    ] {
        assert_eq!(answer(&planned, url).as_str(), expected, "{url}");
    }
    let messages = messages(&planned);
    for (ingress, part) in [
        ("vault", "paths[1]: with ssl-passthrough nobody here sees a path, so /api changes nothing"),
        ("late", "TLS of v.example is passed on as it is by the older Ingress default/vault"),
        ("next", "so there is nothing to be the canary of"),
        ("second", "TLS of e.example is ended here for the older Ingress default/first"),
        ("any", "ssl-passthrough needs a host"),
    ] {
        let about = format!("Ingress default/{ingress}: ");
        let found = messages.iter().filter(|told| told.starts_with(&about)).collect::<Vec<_>>();
        assert!(found.len() == 1 && found[0].contains(part), "{ingress}: {messages:#?}");
    }
    assert_eq!(messages.len(), 5, "{messages:#?}");
    let text = planned.plan.encode().unwrap();
    assert_eq!(RouteTable::decode(&text).unwrap(), planned.plan);
    let story = |url: &str| explain(&planned.plan, &Question::new("GET", url).unwrap()).join("\n");
    assert_eq!(
        story("https://v.example/x"),
        "GET https://v.example/x\n\
         taken by Ingress default/vault spec.rules[0].http.paths[0]: host v.example, whatever the path\n\
         its TLS is passed on as it is, after a PROXY header v1: annotation ssl-passthrough, no other does anything\n\
         backend default/vault:80: one of\n  \
           10.1.0.2:8080 Pod default/p on node-b"
    );
    assert!(story("http://v.example/").contains("(308): TLS of this host is passed on"));
    let listed = crate::explain::routes(&planned.plan);
    let line = "  TLS as it is -> default/vault:80 (1 endpoints), PROXY v1, Ingress default/vault spec.rules[0].http.paths[0]\n";
    assert!(listed.contains(line), "{listed}");
}
