//! Strategic merge patch: like a merge patch, but lists whose items have a key are merged item by item, which is what
//! `kubectl apply`, `edit` and `patch` send for built-in kinds. Pure. In: object and patch. Out: the object, changed in place.
//! Source: the `x-kubernetes-patch-*` extensions of the Kubernetes OpenAPI document for the kinds served here, and
//! "Notes on the strategic merge patch" (directives `$patch`, `$deleteFromPrimitiveList`, `$setElementOrder`, `$retainKeys`).

use serde_json::{Map, Value};

use crate::status::ApiError;

/// How a list merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListRule {
    /// Items are objects, the same when this field is.
    Keyed(&'static str),
    /// A set of plain values.
    Set,
    Atomic,
}

/// The rule of a list by the names of its kind, of the object it is in and of itself.
fn list_rule(kind: &str, parent: &str, field: &str) -> ListRule {
    match (kind, parent, field) {
        (_, "metadata", "ownerReferences") => ListRule::Keyed("uid"),
        (_, "metadata", "finalizers") | ("Node", "spec", "podCIDRs") => ListRule::Set,
        ("Pod", "spec", "containers" | "initContainers" | "ephemeralContainers" | "volumes")
        | ("Pod", "spec", "imagePullSecrets" | "schedulingGates" | "resourceClaims")
        | ("Pod", _, "env")
        | ("ServiceAccount", "", "secrets" | "imagePullSecrets") => ListRule::Keyed("name"),
        ("Pod", "spec", "hostAliases") | ("Pod", "status", "podIPs" | "hostIPs") => ListRule::Keyed("ip"),
        ("Pod", "spec", "topologySpreadConstraints") => ListRule::Keyed("topologyKey"),
        ("Pod", _, "volumeMounts") => ListRule::Keyed("mountPath"),
        ("Pod", _, "volumeDevices") => ListRule::Keyed("devicePath"),
        ("Pod", "containers" | "initContainers" | "ephemeralContainers", "ports") => {
            ListRule::Keyed("containerPort")
        }
        ("Service", "spec", "ports") => ListRule::Keyed("port"),
        ("Node", "status", "addresses") | (_, "status", "conditions") => ListRule::Keyed("type"),
        _ => ListRule::Atomic,
    }
}

/// Merges `patch` into `object`.
///
/// # Errors
/// 400 for a directive or list item that cannot be read.
pub(super) fn merge(kind: &str, object: &mut Value, patch: &Value) -> Result<(), ApiError> {
    merge_object(kind, "", object, patch)
}

fn unreadable(what: &str) -> ApiError {
    ApiError::bad_request(format!("unable to apply strategic merge patch: {what}"))
}

fn merge_object(kind: &str, here: &str, object: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let Some(fields) = patch.as_object() else {
        *object = patch.clone();
        return Ok(());
    };
    match fields.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *object = Value::Object(plain(fields));
            return Ok(());
        }
        Some("delete") => {
            *object = Value::Object(Map::new());
            return Ok(());
        }
        None | Some("merge") => {}
        Some(other) => return Err(unreadable(&format!("unknown directive $patch: {other}"))),
    }
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Some(target) = object.as_object_mut() else { return Ok(()) };
    if let Some(keys) = fields.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|key, _| keys.iter().any(|it| it.as_str() == Some(key)));
    }
    for (key, value) in fields {
        if let Some(list) = key.strip_prefix("$deleteFromPrimitiveList/") {
            delete_from_set(target, list, value);
        } else if !key.starts_with('$') {
            merge_field(kind, here, target, key, value)?;
        }
    }
    for (key, value) in fields {
        if let Some(list) = key.strip_prefix("$setElementOrder/") {
            reorder(target, list, list_rule(kind, here, list), value);
        }
    }
    Ok(())
}

fn merge_field(
    kind: &str,
    here: &str,
    target: &mut Map<String, Value>,
    key: &str,
    value: &Value,
) -> Result<(), ApiError> {
    match value {
        Value::Null => {
            target.remove(key);
            Ok(())
        }
        Value::Object(_) => {
            let field = target.entry(key.to_owned()).or_insert(Value::Null);
            merge_object(kind, key, field, value)
        }
        Value::Array(items) => {
            let field = target.entry(key.to_owned()).or_insert_with(|| Value::Array(Vec::new()));
            merge_list(kind, key, list_rule(kind, here, key), field, items)
        }
        plain => {
            target.insert(key.to_owned(), plain.clone());
            Ok(())
        }
    }
}

fn merge_list(
    kind: &str,
    key: &str,
    rule: ListRule,
    field: &mut Value,
    items: &[Value],
) -> Result<(), ApiError> {
    let replaces = items.iter().any(|it| it.get("$patch").and_then(Value::as_str) == Some("replace"));
    let (false, Some(target)) = (replaces || rule == ListRule::Atomic, field.as_array_mut()) else {
        let kept = items.iter().filter(|it| it.get("$patch").is_none());
        *field = Value::Array(kept.cloned().collect());
        return Ok(());
    };
    for item in items {
        match rule {
            ListRule::Keyed(name) => merge_item(kind, key, name, target, item)?,
            _ if !target.contains(item) => target.push(item.clone()),
            _ => {}
        }
    }
    Ok(())
}

fn merge_item(
    kind: &str,
    list: &str,
    key: &str,
    target: &mut Vec<Value>,
    item: &Value,
) -> Result<(), ApiError> {
    let id =
        item.get(key).ok_or_else(|| unreadable(&format!("an item of {list} lacks its merge key {key}")))?;
    if item.get("$patch").and_then(Value::as_str) == Some("delete") {
        target.retain(|it| it.get(key) != Some(id));
        return Ok(());
    }
    if let Some(existing) = target.iter_mut().find(|it| it.get(key) == Some(id)) {
        return merge_object(kind, list, existing, item);
    }
    let mut new = Value::Object(Map::new());
    merge_object(kind, list, &mut new, item)?;
    target.push(new);
    Ok(())
}

fn delete_from_set(target: &mut Map<String, Value>, list: &str, values: &Value) {
    let gone = values.as_array().map_or(&[][..], Vec::as_slice);
    if let Some(items) = target.get_mut(list).and_then(Value::as_array_mut) {
        items.retain(|it| !gone.contains(it));
    }
}

/// Puts the items named into their order; the others keep their places after them.
fn reorder(target: &mut Map<String, Value>, list: &str, rule: ListRule, order: &Value) {
    let Some(items) = target.get_mut(list).and_then(Value::as_array_mut) else { return };
    let order = order.as_array().map_or(&[][..], Vec::as_slice);
    let id = |item: &Value| match rule {
        ListRule::Keyed(key) => item.get(key).cloned().unwrap_or(Value::Null),
        _ => item.clone(),
    };
    items.sort_by_key(|item| order.iter().position(|it| id(it) == id(item)).unwrap_or(order.len()));
}

/// The fields without directives.
fn plain(fields: &Map<String, Value>) -> Map<String, Value> {
    fields
        .iter()
        .filter(|(key, _)| !key.starts_with('$'))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merged(kind: &str, mut object: Value, patch: &Value) -> Value {
        merge(kind, &mut object, patch).unwrap();
        object
    }

    #[test]
    fn service_ports_merge_by_port() {
        let object = json!({"spec": {"ports": [{"port": 80, "name": "a", "nodePort": 30000}, {"port": 81, "name": "b"}]}});
        let patch = json!({"spec": {"$setElementOrder/ports": [{"port": 443}, {"port": 80}],
            "ports": [{"port": 443, "name": "c"}, {"port": 80, "name": "d"}, {"port": 81, "$patch": "delete"}]}});
        let expected = json!({"spec": {"ports": [{"port": 443, "name": "c"}, {"port": 80, "name": "d", "nodePort": 30000}]}});
        assert_eq!(merged("Service", object, &patch), expected);
    }

    #[test]
    fn other_lists_are_replaced_and_null_removes() {
        let object = json!({"spec": {"ingress": [{"ports": [{"port": 1}]}], "policyTypes": ["Ingress"]}});
        let patch = json!({"spec": {"ingress": [{}], "policyTypes": null}});
        assert_eq!(merged("NetworkPolicy", object, &patch), json!({"spec": {"ingress": [{}]}}));
    }

    #[test]
    fn finalizers_are_a_set_and_directives_replace_or_retain() {
        let object = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {"finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"]}});
        assert_eq!(merged("Pod", object, &patch)["metadata"]["finalizers"], json!(["b", "c"]));
        let object = json!({"data": {"a": "1", "b": "2"}});
        let patch = json!({"data": {"$patch": "replace", "c": "3"}});
        assert_eq!(merged("ConfigMap", object.clone(), &patch), json!({"data": {"c": "3"}}));
        let patch = json!({"data": {"$retainKeys": ["a"]}});
        assert_eq!(merged("ConfigMap", object, &patch), json!({"data": {"a": "1"}}));
    }

    #[test]
    fn an_item_without_its_key_is_refused() {
        let patch = json!({"spec": {"ports": [{"name": "x"}]}});
        assert_eq!(merge("Service", &mut json!({}), &patch).unwrap_err().code, 400);
    }
}
