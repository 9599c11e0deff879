//! Reading and writing the few parts of a JSON object that every kind has. In and out: `serde_json::Value`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Text at a path of keys, empty where it is absent or of another type.
#[must_use]
pub(crate) fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    at(object, path).and_then(Value::as_str).unwrap_or_default()
}

/// Value at a path of keys; absent and null are the same.
#[must_use]
pub(crate) fn at<'a>(object: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, key| value.get(key)).filter(|it| !it.is_null())
}

/// Items of a list at a path, none where it is absent.
pub(crate) fn list<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Texts of a list at a path.
#[must_use]
pub(crate) fn texts(object: &Value, path: &[&str]) -> Vec<String> {
    list(object, path).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// A map of texts at a path (labels, selectors).
#[must_use]
pub(crate) fn text_map(object: &Value, path: &[&str]) -> BTreeMap<String, String> {
    let entries = at(object, path).and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// Sets a value at a path, making objects on the way (and replacing what is not an object).
pub(crate) fn set(object: &mut Value, path: &[&str], value: Value) {
    let Some((last, parents)) = path.split_last() else { return };
    let mut here = object;
    for key in parents {
        here = map(here).entry((*key).to_owned()).or_insert_with(|| Value::Object(Map::new()));
    }
    map(here).insert((*last).to_owned(), value);
}

/// Sets a value only where there is none (absent or null).
pub(crate) fn default(object: &mut Value, path: &[&str], value: Value) {
    if at(object, path).is_none() {
        set(object, path, value);
    }
}

/// Takes the value at a path away.
pub(crate) fn remove(object: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, parents) = path.split_last()?;
    let parent = parents.iter().try_fold(object, |value, key| value.get_mut(key))?;
    parent.as_object_mut()?.remove(*last)
}

/// Sets the value, or removes the path for `None`.
pub(crate) fn put(object: &mut Value, path: &[&str], value: Option<Value>) {
    match value {
        Some(value) => set(object, path, value),
        None => {
            remove(object, path);
        }
    }
}

fn map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("made an object above")
}

#[must_use]
pub(crate) fn name(object: &Value) -> &str {
    text(object, &["metadata", "name"])
}

#[must_use]
pub(crate) fn namespace(object: &Value) -> &str {
    text(object, &["metadata", "namespace"])
}

#[must_use]
pub(crate) fn is_deleting(object: &Value) -> bool {
    at(object, &["metadata", "deletionTimestamp"]).is_some()
}

#[must_use]
pub(crate) fn has_finalizers(object: &Value) -> bool {
    !list(object, &["metadata", "finalizers"]).is_empty()
}
