//! create, replace and patch: the object goes through [`crate::admission`] under the store's write lock, and the answer
//! waits until it is on disk. In: a [`Call`] and a body. Out: the object as stored, with warnings.

use std::cell::RefCell;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::Value;

use super::patch::Patch;
use super::read::{render, render_value};
use super::{Api, Call, bytes_response, events, json_response, object_body};
use crate::admission::{self, Ambient, Part};
use crate::object;
use crate::resources::{self, Resource};
use crate::status::{ApiError, Cause};
use crate::store::{Change, Key, Stored, View};

/// What to do with the stored object.
enum Modification {
    Replace(Value),
    Patch(Patch),
}

/// The result of a write: stored, or (dry run, nothing to change) only computed.
enum Written {
    Stored(Arc<Stored>),
    Computed(Value),
}

impl Api {
    pub(super) async fn create(&self, call: Call, request: Request) -> Result<Response, ApiError> {
        let resource = call.target.resource;
        let (shape, sent, warnings) = decode(&call, object_body(request).await?)?;
        let namespace = namespace_of(&call, &sent)?;
        let ambient = Ambient::sample();
        let mut object = admission::admit_new(shape, &namespace, sent, &ambient)?;
        admission::apply_defaults(shape, &mut object);
        admission::check(shape, &object)?;
        let key = Key::new(shape.collection(), namespace, object::name(&object));
        let computed = RefCell::new(None);
        let stored = self.store.commit(|view| {
            namespace_accepts(resource, &key, view)?;
            if view.get(&key).is_some() {
                return Err(ApiError::already_exists(resource, &key.name));
            }
            admission::allocate(shape, &mut object, None, view, &self.policy, &ambient)?;
            if call.options.dry_run {
                computed.replace(Some(object));
                return Ok(Vec::new());
            }
            Ok(vec![Change::Put(key, object)])
        })?;
        self.answer_written(&call, StatusCode::CREATED, written(stored, computed)?, &warnings).await
    }

    pub(super) async fn replace(&self, call: Call, request: Request) -> Result<Response, ApiError> {
        let sent = object_body(request).await?;
        let name = call.target.name.as_deref().unwrap_or_default();
        let given = object::name(&sent);
        if given != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
        namespace_of(&call, &sent)?;
        self.modify(call, Modification::Replace(sent)).await
    }

    pub(super) async fn patch(&self, call: Call, request: Request) -> Result<Response, ApiError> {
        let patch = Patch::read(request).await?;
        self.modify(call, Modification::Patch(patch)).await
    }

    async fn modify(&self, call: Call, modification: Modification) -> Result<Response, ApiError> {
        let key = call.key()?;
        let ambient = Ambient::sample();
        let computed = RefCell::new(None);
        let warnings = RefCell::new(Vec::new());
        let stored = self.store.commit(|view| {
            let old = view.get(&key).ok_or_else(|| call.not_found())?.value();
            let (new, unknown) = self.modified(&call, &old, &modification, view, &ambient)?;
            warnings.replace(unknown);
            let is_gone =
                object::is_deleting(&new) && !object::has_finalizers(&new) && key.collection != "namespaces";
            if call.options.dry_run || (new == old && !is_gone) {
                computed.replace(Some(new));
                return Ok(Vec::new());
            }
            if is_gone {
                return Ok(vec![Change::Put(key.clone(), new), Change::Delete(key)]);
            }
            Ok(vec![Change::Put(key, new)])
        })?;
        let warnings = warnings.into_inner();
        self.answer_written(&call, StatusCode::OK, written(stored, computed)?, &warnings).await
    }

    /// The stored object after a modification, and its warnings.
    fn modified(
        &self,
        call: &Call,
        old: &Value,
        modification: &Modification,
        view: &View,
        ambient: &Ambient,
    ) -> Result<(Value, Vec<String>), ApiError> {
        let sent = match modification {
            Modification::Replace(sent) => sent.clone(),
            Modification::Patch(patch) => {
                patch.apply(call.target.resource, events::to_wire(call.target.resource, old.clone()))?
            }
        };
        let (shape, mut sent, warnings) = decode(call, sent)?;
        check_preconditions(call, old, &sent)?;
        admission::apply_defaults(shape, &mut sent);
        let part = if call.target.subresource.is_some() { Part::Status } else { Part::Main };
        let mut new = admission::admit_update(shape, part, old, sent)?;
        // Of the metadata only the store changes this.
        let revision = object::text(old, &["metadata", "resourceVersion"]).to_owned();
        object::set(&mut new, &["metadata", "resourceVersion"], Value::String(revision));
        admission::check(shape, &new)?;
        if part == Part::Main {
            admission::allocate(shape, &mut new, Some(old), view, &self.policy, ambient)?;
        }
        call.identity.authorize_change(shape, old, &new)?;
        Ok((new, warnings))
    }

    async fn answer_written(
        &self,
        call: &Call,
        status: StatusCode,
        written: Written,
        warnings: &[String],
    ) -> Result<Response, ApiError> {
        let mut response = match written {
            Written::Stored(stored) => {
                self.store.durable(stored.revision).await?;
                bytes_response(status, render(call, &stored, true))
            }
            Written::Computed(object) => json_response(status, &render_value(call, &object)),
        };
        for warning in warnings {
            let text = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
            if let Ok(value) = HeaderValue::from_str(&text) {
                response.headers_mut().append(header::WARNING, value);
            }
        }
        Ok(response)
    }
}

fn written(stored: Vec<Arc<Stored>>, computed: RefCell<Option<Value>>) -> Result<Written, ApiError> {
    match (stored.into_iter().last(), computed.into_inner()) {
        (Some(stored), _) => Ok(Written::Stored(stored)),
        (None, Some(object)) => Ok(Written::Computed(object)),
        (None, None) => Err(ApiError::internal("the write had no result")),
    }
}

/// The object in the shape it is stored in, the entry of that shape, and warnings.
fn decode(call: &Call, sent: Value) -> Result<(&'static Resource, Value, Vec<String>), ApiError> {
    let resource = call.target.resource;
    let (object, warnings) = admission::decode(resource, sent, call.options.strictness)?;
    let shape =
        resources::stored(resource.collection()).ok_or_else(|| ApiError::internal("no stored shape"))?;
    Ok((shape, events::from_wire(resource, object), warnings))
}

/// The namespace of the URL, which the object may repeat but not contradict.
fn namespace_of(call: &Call, sent: &Value) -> Result<String, ApiError> {
    let given = object::namespace(sent);
    let place = call.target.namespace.as_deref();
    match (call.target.resource.namespaced, place) {
        (false, _) if given.is_empty() => Ok(String::new()),
        (true, Some(place)) if given.is_empty() || given == place => Ok(place.to_owned()),
        (true, None) => Err(ApiError::method_not_allowed()),
        _ => Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        )),
    }
}

fn namespace_accepts(resource: &Resource, key: &Key, view: &View) -> Result<(), ApiError> {
    if !resource.namespaced {
        return Ok(());
    }
    let namespaces = resources::stored("namespaces").ok_or_else(|| ApiError::internal("no namespaces"))?;
    let namespace = view
        .get(&Key::new("namespaces", "", key.namespace.as_str()))
        .ok_or_else(|| ApiError::not_found(namespaces, &key.namespace))?;
    if object::is_deleting(&namespace.value()) {
        let why = format!(
            "unable to create new content in namespace {} because it is being terminated",
            key.namespace
        );
        let mut error = ApiError::forbidden(resource, &key.name, &why);
        error.causes = vec![Cause {
            reason: "NamespaceTerminating",
            message: format!("namespace {} is being terminated", key.namespace),
            field: "metadata.namespace".to_owned(),
        }];
        return Err(error);
    }
    Ok(())
}

/// Optimistic concurrency: a resourceVersion or uid in the object must be the stored one.
fn check_preconditions(call: &Call, old: &Value, sent: &Value) -> Result<(), ApiError> {
    let conflict = |why: &str| Err(ApiError::conflict(call.target.resource, object::name(old), why));
    let differs = |field: &str| {
        let given = object::text(sent, &["metadata", field]);
        !given.is_empty() && given != object::text(old, &["metadata", field])
    };
    if differs("uid") {
        return conflict("Precondition failed: UID in precondition does not match UID in object meta");
    }
    if differs("resourceVersion") {
        return conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        );
    }
    Ok(())
}
