//! delete and deletecollection. In: a [`Call`] and perhaps `DeleteOptions`. Out: a `Status`, or the object while something
//! (a finalizer, the content of a Namespace) still holds it. Deletion is at once: there is no kubelet to wait for; propagation has no effect.

use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::read::{Filter, render};
use super::{Api, Call, body, bytes_response, json_response, success};
use crate::admission::Ambient;
use crate::object;
use crate::resources::Resource;
use crate::status::ApiError;
use crate::store::{Change, Stored};

/// Namespaces that the cluster itself needs.
const PROTECTED: [&str; 3] = ["default", "kube-system", "kube-public"];

impl Api {
    pub(super) async fn delete(&self, call: Call, request: Request) -> Result<Response, ApiError> {
        let options = options(request).await?;
        let dry_run = call.options.dry_run || !object::list(&options, &["dryRun"]).is_empty();
        let key = call.key()?;
        let resource = call.target.resource;
        let ambient = Ambient::sample();
        if resource.plural == "namespaces" && PROTECTED.contains(&key.name.as_str()) {
            return Err(ApiError::forbidden(resource, &key.name, "this namespace may not be deleted"));
        }
        let mut details = Value::Null;
        let mut is_held = false;
        let stored = self.store.commit(|view| {
            let stored = view.get(&key).ok_or_else(|| call.not_found())?;
            check_preconditions(resource, &options, stored)?;
            let object = stored.value();
            details = json!({"name": key.name, "group": resource.group, "kind": resource.plural,
                "uid": object::text(&object, &["metadata", "uid"])});
            let change = deletion(stored, object, &ambient);
            is_held = !matches!(change, Some(Change::Delete(_)));
            Ok(change.filter(|_| !dry_run).into_iter().collect())
        })?;
        if let Some(last) = stored.last() {
            self.store.durable(last.revision).await?;
        }
        if !is_held || dry_run {
            return Ok(json_response(StatusCode::OK, &success(&details)));
        }
        let current = self.store.read(|view| view.get(&key).cloned());
        current.map_or_else(
            || Ok(json_response(StatusCode::OK, &success(&details))),
            |it| Ok(bytes_response(StatusCode::OK, render(&call, &it, true))),
        )
    }

    pub(super) async fn delete_collection(&self, call: Call, request: Request) -> Result<Response, ApiError> {
        let resource = call.target.resource;
        if resource.plural == "namespaces" || (resource.namespaced && call.target.namespace.is_none()) {
            return Err(ApiError::method_not_allowed());
        }
        options(request).await?;
        let filter = Filter::of(&call)?;
        let ambient = Ambient::sample();
        let stored = self.store.commit(|view| {
            if call.options.dry_run {
                return Ok(Vec::new());
            }
            Ok(filter.objects(view).filter_map(|it| deletion(it, it.value(), &ambient)).collect())
        })?;
        if let Some(last) = stored.last() {
            self.store.durable(last.revision).await?;
        }
        Ok(json_response(
            StatusCode::OK,
            &success(&json!({"group": resource.group, "kind": resource.plural})),
        ))
    }
}

/// The first step of deleting an object: gone, or marked while something holds it; `None` when it is marked already.
pub(crate) fn deletion(stored: &Stored, mut object: Value, ambient: &Ambient) -> Option<Change> {
    let is_namespace = stored.key.collection == "namespaces";
    if !is_namespace && !object::has_finalizers(&object) {
        return Some(Change::Delete(stored.key.clone()));
    }
    if object::is_deleting(&object) {
        return None;
    }
    object::set(&mut object, &["metadata", "deletionTimestamp"], json!(ambient.time()));
    if is_namespace {
        object::set(&mut object, &["status", "phase"], json!("Terminating"));
    } else {
        object::set(&mut object, &["metadata", "deletionGracePeriodSeconds"], json!(0));
    }
    Some(Change::Put(stored.key.clone(), object))
}

async fn options(request: Request) -> Result<Value, ApiError> {
    let bytes = body(request).await?;
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&bytes).map_err(|error| ApiError::bad_request(format!("DeleteOptions: {error}")))
}

fn check_preconditions(resource: &Resource, options: &Value, stored: &Stored) -> Result<(), ApiError> {
    let object = stored.value();
    for field in ["uid", "resourceVersion"] {
        let asked = object::text(options, &["preconditions", field]);
        let actual = object::text(&object, &["metadata", field]);
        if !asked.is_empty() && asked != actual {
            let why =
                format!("Precondition failed: {field} in precondition: {asked}, in object meta: {actual}");
            return Err(ApiError::conflict(resource, &stored.key.name, &why));
        }
    }
    Ok(())
}
