//! A Namespace's life: its `default` ServiceAccount, and when it is deleted, its content first and then itself. Pure.

use serde_json::{Value, json};

use super::created;
use crate::admission::Ambient;
use crate::api::deletion;
use crate::object;
use crate::status::ApiError;
use crate::store::{Change, Key, View};

pub(super) fn plan(view: &View, name: &str, ambient: &Ambient) -> Result<Vec<Change>, ApiError> {
    let key = Key::new("namespaces", "", name);
    let Some(stored) = view.get(&key) else { return Ok(Vec::new()) };
    let object = stored.value();
    if !object::is_deleting(&object) {
        return plan_account(view, name, ambient);
    }
    let content: Vec<_> = view.content(name).collect();
    let mut changes: Vec<Change> =
        content.iter().filter_map(|it| deletion(it, it.value(), ambient)).collect();
    let gone = changes.iter().filter(|it| matches!(it, Change::Delete(_))).count();
    if gone == content.len() {
        changes.extend(finish(key, object));
    }
    Ok(changes)
}

/// Empty: the Namespace goes, unless a finalizer of its own holds it.
fn finish(key: Key, mut object: Value) -> Vec<Change> {
    if !object::has_finalizers(&object) {
        return vec![Change::Delete(key)];
    }
    match object::remove(&mut object, &["spec", "finalizers"]) {
        Some(_) => vec![Change::Put(key, object)],
        None => Vec::new(),
    }
}

fn plan_account(view: &View, namespace: &str, ambient: &Ambient) -> Result<Vec<Change>, ApiError> {
    let account = json!({"metadata": {"name": "default"}});
    if view.get(&Key::new("serviceaccounts", namespace, "default")).is_some() {
        return Ok(Vec::new());
    }
    let (key, object) = created("serviceaccounts", namespace, account, ambient)?;
    Ok(vec![Change::Put(key, object)])
}
