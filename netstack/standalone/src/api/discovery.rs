//! Discovery: which groups, versions and resources there are, in the classic and the aggregated form, the version, and
//! health. Pure. In: a path and the `Accept` header. Out: the answer, or nothing when the path is not one of these.
//! Source: Kubernetes API concepts ("API Discovery"), KEP-3352.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::{body_response, json_response, openapi};
use crate::resources::{self, RESOURCES, Resource};

/// The Kubernetes version whose API this server follows.
const MINOR: &str = "34";
const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// Paths that need no token: the version and health.
pub(super) fn public(path: &str) -> Option<Response> {
    let probe = ["/healthz", "/livez", "/readyz"].iter().any(|it| path.strip_prefix(it).is_some_and(is_end));
    if probe {
        return Some(body_response(StatusCode::OK, "text/plain; charset=utf-8", Body::from("ok")));
    }
    (path == "/version" || path == "/version/").then(|| json_response(StatusCode::OK, &version()))
}

fn is_end(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('/')
}

fn version() -> Value {
    json!({"major": "1", "minor": MINOR, "gitVersion": format!("v1.{MINOR}.0+weft.{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "",
        "compiler": "rustc", "platform": format!("linux/{}", platform())})
}

fn platform() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Discovery documents and the OpenAPI ones.
pub(super) fn answer(path: &str, headers: &HeaderMap) -> Option<Response> {
    let path = path.trim_end_matches('/');
    if let Some(document) = openapi::answer(path) {
        return Some(json_response(StatusCode::OK, &document));
    }
    if path == "/openapi/v2" {
        let media_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return Some(body_response(StatusCode::OK, media_type, Body::from(openapi::V2_DOCUMENT)));
    }
    let aggregated = aggregated_version(headers);
    let document = match (path, aggregated) {
        ("/api", Some(version)) => return Some(aggregated_list(version, |it| it.is_empty())),
        ("/apis", Some(version)) => return Some(aggregated_list(version, |it| !it.is_empty())),
        ("/api", None) => {
            json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        }
        ("/apis", None) => {
            let groups: Vec<Value> = named_groups().into_iter().map(group).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ("/api/v1", _) => resource_list("", "v1")?,
        ("", _) => json!({"paths": paths()}),
        _ => match *path.strip_prefix("/apis/")?.split('/').collect::<Vec<_>>().as_slice() {
            [name] => group(named_groups().into_iter().find(|it| *it == name)?),
            [name, version] => resource_list(name, version)?,
            _ => return None,
        },
    };
    Some(json_response(StatusCode::OK, &document))
}

fn named_groups() -> Vec<&'static str> {
    resources::groups().into_iter().filter(|it| !it.is_empty()).collect()
}

fn paths() -> Vec<String> {
    let mut paths: Vec<String> = [
        "/api",
        "/api/v1",
        "/apis",
        "/healthz",
        "/livez",
        "/openapi/v2",
        "/openapi/v3",
        "/readyz",
        "/version",
    ]
    .map(str::to_owned)
    .to_vec();
    for group in named_groups() {
        paths.push(format!("/apis/{group}"));
        paths.extend(resources::versions(group).map(|version| format!("/apis/{group}/{version}")));
    }
    paths
}

fn group(name: &str) -> Value {
    let version = |version: &str| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    let versions: Vec<Value> = resources::versions(name).map(version).collect();
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": versions, "preferredVersion": versions.first()})
}

fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for resource in RESOURCES.iter().filter(|it| it.group == group && it.version == version) {
        list.push(json!({"name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "verbs": verbs(resource), "shortNames": resource.short_names,
            "categories": resource.categories}));
        if resource.status {
            list.push(json!({"name": format!("{}/status", resource.plural), "singularName": "",
                "namespaced": resource.namespaced, "kind": resource.kind, "verbs": ["get", "patch", "update"]}));
        }
    }
    let version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    (!list.is_empty()).then(
        || json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": list}),
    )
}

fn verbs(resource: &Resource) -> Vec<&'static str> {
    VERBS.into_iter().filter(|it| resource.plural != "namespaces" || *it != "deletecollection").collect()
}

/// `v2` or `v2beta1` when the client would rather have the aggregated form.
fn aggregated_version(headers: &HeaderMap) -> Option<&'static str> {
    let accept = headers.get(header::ACCEPT)?.to_str().ok()?;
    let first =
        accept.split(',').find(|it| it.contains("as=APIGroupDiscoveryList") && it.contains("json"))?;
    match first.split(';').find_map(|it| it.trim().strip_prefix("v="))? {
        "v2" => Some("v2"),
        "v2beta1" => Some("v2beta1"),
        _ => None,
    }
}

fn aggregated_list(version: &'static str, wanted: impl Fn(&str) -> bool) -> Response {
    let groups: Vec<Value> =
        resources::groups().into_iter().filter(|it| wanted(it)).map(aggregated_group).collect();
    let document = json!({"kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {}, "items": groups});
    let content_type = if version == "v2" {
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    } else {
        "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
    };
    body_response(StatusCode::OK, content_type, Body::from(document.to_string()))
}

fn aggregated_group(name: &str) -> Value {
    let version = |version: &str| {
        let of_version = RESOURCES.iter().filter(|it| (it.group, it.version) == (name, version));
        let resources: Vec<Value> = of_version.map(aggregated_resource).collect();
        json!({"version": version, "freshness": "Current", "resources": resources})
    };
    let versions: Vec<Value> = resources::versions(name).map(version).collect();
    json!({"metadata": {"name": name, "creationTimestamp": null}, "versions": versions})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let kind = json!({"group": resource.group, "version": resource.version, "kind": resource.kind});
    let status =
        json!([{"subresource": "status", "responseKind": kind, "verbs": ["get", "patch", "update"]}]);
    json!({"resource": resource.plural, "responseKind": kind, "singularResource": resource.singular,
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" }, "verbs": verbs(resource),
        "shortNames": resource.short_names, "categories": resource.categories,
        "subresources": if resource.status { status } else { json!([]) }})
}
