//! What is valid of an Ingress is used, and every field that is not is named.

use serde_json::json;

use super::*;

fn messages<T>(lowered: &Lowered<T>) -> Vec<&str> {
    lowered.problems.iter().map(|problem| problem.message.as_str()).collect()
}

#[test]
fn an_ingress_is_lowered_with_hosts_in_lower_case() {
    let lowered = ingress(&json!({
        "metadata": {"name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z", "annotations":
            {"nginx.ingress.kubernetes.io/app-root": "/a", LAST_APPLIED: "{}"}},
        "spec": {"ingressClassName": "nginx", "tls": [{"hosts": ["Shop.example.com"], "secretName": "tls"}], "rules": [
            {"host": "Shop.Example.com", "http": {"paths": [
                {"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 80}}}},
                {"path": "/m", "pathType": "Exact", "backend": {"service": {"name": "web", "port": {"name": "metrics"}}}}]}}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "lb.example"}]}}
    }));
    assert_eq!(messages(&lowered), [""; 0]);
    let ingress = lowered.value.unwrap();
    assert_eq!(ingress.rules[0].host.as_deref(), Some("shop.example.com"));
    assert_eq!(ingress.tls[0].hosts, ["shop.example.com"]);
    let metrics = IngressBackend::Service { name: "web".into(), port: BackendPort::Name("metrics".into()) };
    assert_eq!(ingress.rules[0].paths[1].backend, metrics);
    assert_eq!(ingress.status, ["192.0.2.1", "lb.example"]);
    assert_eq!(ingress.annotations.len(), 1, "what kubectl remembers is not kept");
}

#[test]
fn a_wrong_path_or_host_is_named_and_the_others_stay() {
    let good = json!({"path": "/ok", "pathType": "Exact", "backend": {"service": {"name": "web", "port": {"number": 80}}}});
    let lowered = ingress(&json!({
        "metadata": {"name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"rules": [
            {"host": "bad_host", "http": {"paths": [good]}},
            {"host": "*.example.com", "http": {"paths": [
                {"path": "/a", "backend": {"service": {"name": "web", "port": {"number": 80}}}},
                {"path": "a", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 80}}}},
                {"path": "/b", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 70000}}}},
                {"path": "/c", "pathType": "Prefix", "backend": {"service": {"name": "web"}}},
                {"path": "/d", "pathType": "Prefix"},
                good]}}]}
    }));
    let ingress = lowered.value.clone().unwrap();
    assert_eq!(ingress.rules.len(), 1);
    assert_eq!(ingress.rules[0].paths.iter().map(|path| path.path.as_str()).collect::<Vec<_>>(), ["/ok"]);
    let begins = [
        "spec.rules[0].host \"bad_host\" is no host name",
        "spec.rules[1].http.paths[0].pathType \"\" is unknown",
        "spec.rules[1].http.paths[1].path \"a\" does not begin with /",
        "spec.rules[1].http.paths[2].backend.service.port.number 70000 is no port",
        "spec.rules[1].http.paths[3].backend.service.port is empty",
        "spec.rules[1].http.paths[4].backend.service.name is empty",
    ];
    let messages = messages(&lowered);
    assert_eq!(messages.len(), begins.len(), "{messages:#?}");
    for (message, begin) in messages.iter().zip(begins) {
        assert!(message.starts_with(begin), "{message}");
    }
}

#[test]
fn classes_say_whose_they_are_and_which_is_the_default() {
    let class = |annotation: &str| {
        ingress_class(&json!({"metadata": {"name": "weft", "annotations": {DEFAULT_CLASS: annotation}},
            "spec": {"controller": "weft.network/ingress"}}))
    };
    assert!(class("true").value.unwrap().is_default);
    assert!(!class("yes").value.unwrap().is_default);
}

#[test]
fn a_secret_is_decoded_and_a_config_map_is_text() {
    let metadata = json!({"name": "x", "namespace": "d"});
    let secret = json!({"kind": "Secret", "metadata": metadata, "data": {"auth": "YQ==", "bad": "%"}});
    let (reference, data) = referred(&secret).unwrap();
    assert_eq!((reference.to_string(), data.bytes("auth")), ("Secret d/x".to_owned(), Some(&b"a"[..])));
    assert_eq!(data.bytes("bad"), None);
    let config_map = json!({"kind": "ConfigMap", "metadata": metadata, "data": {"X-A": "1"}});
    let (reference, data) = referred(&config_map).unwrap();
    assert_eq!((reference.to_string(), data.bytes("X-A")), ("ConfigMap d/x".to_owned(), Some(&b"1"[..])));
    assert!(referred(&json!({"kind": "Pod"})).is_none());
}
