//! As much OpenAPI v3 as kubectl reads before it writes: that PATCH of every kind knows `fieldValidation` (so that kubectl
//! leaves validation to the server) and which patches there are. Schemas are not published: `kubectl explain` finds none.
//! For kinds that are not served kubectl asks the OpenAPI v2 document, which has no paths here.

use serde_json::{Map, Value, json};

use crate::resources::{self, RESOURCES, Resource};

/// The OpenAPI v2 document as `openapi.v2.Document` of gnostic in protobuf, the only form kubectl asks for: `swagger: "2.0"`
/// and `info { title: "Kubernetes" version: "unversioned" }`.
pub(super) const V2_DOCUMENT: &[u8] = b"\x0a\x032.0\x12\x19\x0a\x0aKubernetes\x12\x0bunversioned";

/// `/openapi/v3` and the document of one group and version.
pub(super) fn answer(path: &str) -> Option<Value> {
    if path == "/openapi/v3" {
        let entries = resources::group_versions().into_iter().map(|(group, version)| {
            let place = place(group, version);
            let url = format!("/openapi/v3/{place}?hash={}", env!("CARGO_PKG_VERSION"));
            (place, json!({"serverRelativeURL": url}))
        });
        return Some(json!({"paths": entries.collect::<Map<_, _>>()}));
    }
    let wanted = path.strip_prefix("/openapi/v3/")?;
    let of =
        resources::group_versions().into_iter().find(|(group, version)| place(group, version) == wanted)?;
    let paths: Map<String, Value> = RESOURCES
        .iter()
        .filter(|it| (it.group, it.version) == of)
        .map(|it| (object_path(it), json!({"patch": patch_operation(it)})))
        .collect();
    Some(
        json!({"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "unversioned"}, "paths": paths,
        "components": {"schemas": {}}}),
    )
}

fn place(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

fn object_path(resource: &Resource) -> String {
    let place = place(resource.group, resource.version);
    if resource.namespaced {
        format!("/{place}/namespaces/{{namespace}}/{}/{{name}}", resource.plural)
    } else {
        format!("/{place}/{}/{{name}}", resource.plural)
    }
}

fn patch_operation(resource: &Resource) -> Value {
    let query = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string"}});
    let body = json!({"schema": {"type": "object"}});
    json!({"operationId": format!("patch{}{}", resource.group.replace('.', ""), resource.kind),
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "parameters": [query("dryRun"), query("fieldValidation")],
        "requestBody": {"content": {"application/json-patch+json": body, "application/merge-patch+json": body,
            "application/strategic-merge-patch+json": body}},
        "responses": {"200": {"description": "OK"}}})
}
