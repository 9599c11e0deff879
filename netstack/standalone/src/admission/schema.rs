//! The schema check: an object is read as its Kubernetes type and written back, so that wrong types are errors with a
//! path and unknown fields are found. In: JSON as sent. Out: JSON in the type's shape, with warnings.

use serde_json::{Value, json};

use crate::object;
use crate::resources::Resource;
use crate::status::ApiError;

/// `fieldValidation` of a write (Kubernetes API concepts, "Field validation").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Strictness {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// The object in its type's shape, and a warning for each unknown field.
///
/// # Errors
/// 400 for another kind than the URL names, a wrong type, or (`Strict`) unknown fields.
pub(crate) fn decode(
    resource: &Resource,
    mut sent: Value,
    strictness: Strictness,
) -> Result<(Value, Vec<String>), ApiError> {
    check_kind(resource, &sent)?;
    quantities_to_text(resource, &mut sent);
    object::remove(&mut sent, &["metadata", "managedFields"]);
    let decoded = (resource.decode)(sent.clone()).map_err(|error| wrong_type(resource, &error))?;
    let mut unknown = Vec::new();
    if strictness != Strictness::Ignore {
        unknown_fields(&sent, &decoded, "", &mut unknown);
    }
    if strictness == Strictness::Strict && !unknown.is_empty() {
        let list: Vec<String> = unknown.iter().map(|it| format!("unknown field \"{it}\"")).collect();
        let message = format!("strict decoding error: {}", list.join(", "));
        return Err(ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {message}",
            resource.kind, resource.version, resource.kind
        )));
    }
    Ok((decoded, unknown.into_iter().map(|it| format!("unknown field \"{it}\"")).collect()))
}

fn check_kind(resource: &Resource, sent: &Value) -> Result<(), ApiError> {
    if !sent.is_object() {
        return Err(ApiError::bad_request("the body must be a JSON object"));
    }
    let (version, kind) = (object::text(sent, &["apiVersion"]), object::text(sent, &["kind"]));
    if (!version.is_empty() && version != resource.api_version())
        || (!kind.is_empty() && kind != resource.kind)
    {
        return Err(ApiError::bad_request(format!(
            "the object provided is {kind} {version}, the URL is for {} {}",
            resource.kind,
            resource.api_version()
        )));
    }
    Ok(())
}

fn wrong_type(resource: &Resource, error: &serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    ApiError::bad_request(format!(
        "{} in version \"{}\" cannot be handled as a {}: {}: {}",
        resource.kind,
        resource.version,
        resource.kind,
        error.path(),
        error.inner()
    ))
}

/// Kubernetes reads quantities written as numbers (`cpu: 1`); the type wants text.
fn quantities_to_text(resource: &Resource, object: &mut Value) {
    match resource.collection() {
        "nodes" => {
            for list in ["capacity", "allocatable"] {
                numbers_to_text(object.pointer_mut(&format!("/status/{list}")));
            }
        }
        "pods" => {
            for list in ["containers", "initContainers"] {
                let containers = object.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut);
                for container in containers.into_iter().flatten() {
                    numbers_to_text(container.pointer_mut("/resources/limits"));
                    numbers_to_text(container.pointer_mut("/resources/requests"));
                }
            }
            numbers_to_text(object.pointer_mut("/spec/overhead"));
        }
        _ => {}
    }
}

fn numbers_to_text(quantities: Option<&mut Value>) {
    for (_, value) in quantities.and_then(Value::as_object_mut).into_iter().flatten() {
        if value.is_number() {
            *value = json!(value.to_string());
        }
    }
}

/// Fields of `sent` that the decoded object lacks; null and empty values are no loss.
fn unknown_fields(sent: &Value, decoded: &Value, path: &str, unknown: &mut Vec<String>) {
    match (sent, decoded) {
        (Value::Object(sent), Value::Object(decoded)) => {
            for (key, value) in sent.iter().filter(|(_, value)| !value.is_null()) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match decoded.get(key) {
                    Some(known) => unknown_fields(value, known, &path, unknown),
                    None if is_empty(value) => {}
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(sent), Value::Array(decoded)) => {
            for (index, (value, known)) in sent.iter().zip(decoded).enumerate() {
                unknown_fields(value, known, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;

    #[test]
    fn unknown_fields_are_dropped_with_a_warning_or_refused() {
        let services = find("", "v1", "services").unwrap();
        let sent = json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80, "prot": "TCP"}], "slector": {}}});
        let (object, warnings) = decode(services, sent.clone(), Strictness::Warn).unwrap();
        assert_eq!(warnings, ["unknown field \"spec.ports[0].prot\"", "unknown field \"spec.slector\""]);
        assert!(object["spec"].get("slector").is_none());
        assert_eq!(decode(services, sent, Strictness::Strict).unwrap_err().code, 400);
    }

    #[test]
    fn quantities_may_be_numbers() {
        let pods = find("", "v1", "pods").unwrap();
        let sent = json!({"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": 1}}}]}});
        let (object, _) = decode(pods, sent, Strictness::Strict).unwrap();
        assert_eq!(object["spec"]["containers"][0]["resources"]["limits"]["cpu"], "1");
    }

    #[test]
    fn another_kind_than_the_url_names_is_refused() {
        let pods = find("", "v1", "pods").unwrap();
        let sent = json!({"apiVersion": "v1", "kind": "Service"});
        assert_eq!(decode(pods, sent, Strictness::Warn).unwrap_err().code, 400);
    }
}
