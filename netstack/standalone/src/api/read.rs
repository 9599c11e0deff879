//! get and list, and the rendering of stored objects in the form asked for.
//! In: a [`Call`]. Out: responses built from the JSON that memory holds, without parsing it where the form allows.

use std::sync::Arc;

use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::Shape;
use super::{Api, Call, bytes_response, events, json_response, table};
use crate::object;
use crate::resources::Resource;
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::ApiError;
use crate::store::{Key, Stored, View, selectable_fields};

/// Which objects of a collection a list or watch is about.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) collection: &'static str,
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    labels: LabelSelector,
    fields: FieldSelector,
}

impl Filter {
    /// # Errors
    /// 400 for selectors that cannot be read.
    pub(super) fn of(call: &Call) -> Result<Self, ApiError> {
        let collection = call.target.resource.collection();
        let mut supported = vec!["metadata.name", "metadata.namespace"];
        supported.extend(selectable_fields(collection));
        // events.k8s.io calls the same fields by its own name.
        let text = call.options.field_selector.replace("regarding.", "involvedObject.");
        let fields = FieldSelector::parse(&text, &supported)?;
        let labels = LabelSelector::parse(&call.options.label_selector)?;
        let name = call.target.name.clone().or_else(|| fields.required("metadata.name").map(str::to_owned));
        Ok(Self { collection, namespace: call.target.namespace.clone(), name, labels, fields })
    }

    pub(super) fn matches(&self, stored: &Stored) -> bool {
        self.is_place_of(&stored.key)
            && self.labels.matches(&stored.labels)
            && (self.fields.is_empty() || self.fields.matches(|path| stored.field(path)))
    }

    /// Whether an object is of the collection, namespace and name asked for, whatever its labels and fields.
    pub(super) fn is_in_place(&self, stored: &Stored) -> bool {
        self.is_place_of(&stored.key)
    }

    fn is_place_of(&self, key: &Key) -> bool {
        key.collection == self.collection
            && self.namespace.as_ref().is_none_or(|it| *it == key.namespace)
            && self.name.as_ref().is_none_or(|it| *it == key.name)
    }

    pub(super) fn objects<'a>(&'a self, view: &'a View) -> impl Iterator<Item = &'a Arc<Stored>> + 'a {
        self.objects_after(Key::new(self.collection, "", ""), view)
    }

    fn objects_after<'a>(
        &'a self,
        before: Key,
        view: &'a View,
    ) -> impl Iterator<Item = &'a Arc<Stored>> + 'a {
        view.list_after(before, self.namespace.as_deref()).filter(|it| self.matches(it))
    }
}

impl Call {
    /// # Errors
    /// 405 when the URL names no object.
    pub(super) fn key(&self) -> Result<Key, ApiError> {
        let name = self.target.name.clone().ok_or_else(ApiError::method_not_allowed)?;
        let namespace = self.target.namespace.clone().unwrap_or_default();
        Ok(Key::new(self.target.resource.collection(), namespace, name))
    }

    pub(super) fn not_found(&self) -> ApiError {
        ApiError::not_found(self.target.resource, self.target.name.as_deref().unwrap_or_default())
    }
}

impl Api {
    pub(super) fn get(&self, call: &Call) -> Result<Response, ApiError> {
        let key = call.key()?;
        let stored = self.store.read(|view| view.get(&key).cloned()).ok_or_else(|| call.not_found())?;
        Ok(bytes_response(StatusCode::OK, render(call, &stored, true)))
    }

    pub(super) fn list(&self, call: &Call) -> Result<Response, ApiError> {
        let filter = Filter::of(call)?;
        let page = self.store.read(|view| Page::of(call, &filter, view))?;
        let (objects, list_metadata) = (&page.objects, page.metadata());
        let resource = call.target.resource;
        if call.shape == Shape::Table {
            let table = table::of(resource, objects, &call.options.include_object, &list_metadata, true);
            return Ok(json_response(StatusCode::OK, &table));
        }
        let (kind, version) = match call.shape {
            Shape::Metadata => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
            _ => (format!("{}List", resource.kind), resource.api_version()),
        };
        let mut json =
            format!(r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{list_metadata},"items":["#)
                .into_bytes();
        for (index, stored) in objects.iter().enumerate() {
            if index > 0 {
                json.push(b',');
            }
            json.extend_from_slice(&render(call, stored, false));
        }
        json.extend_from_slice(b"]}");
        Ok(bytes_response(StatusCode::OK, Bytes::from(json)))
    }
}

/// A list, or a part of one (Kubernetes API concepts, "Retrieving large results sets in chunks"). Every part names the revision of the
/// first, so that a watch from there tells what changed between two parts: each shows its objects as they are now.
struct Page {
    revision: u64,
    objects: Vec<Arc<Stored>>,
    /// The last object, where others follow.
    ended_at: Option<(String, String)>,
}

/// What `continue` holds.
#[derive(Deserialize)]
struct Continuation {
    revision: u64,
    /// Namespace and name of the object before.
    after: (String, String),
}

impl Page {
    /// # Errors
    /// 400 for a continuation that is not of this server, 410 when the history no longer reaches back to its revision.
    fn of(call: &Call, filter: &Filter, view: &View) -> Result<Self, ApiError> {
        check_revision(call, view)?;
        let begun = Continuation::of(call)?;
        if let Some(begun) = &begun {
            drop(view.events_after(begun.revision)?);
        }
        let (namespace, name) = begun.as_ref().map(|begun| begun.after.clone()).unwrap_or_default();
        let rest = filter.objects_after(Key::new(filter.collection, namespace, name), view);
        let limit = if call.options.limit == 0 { usize::MAX } else { call.options.limit };
        let mut objects: Vec<Arc<Stored>> = rest.take(limit.saturating_add(1)).cloned().collect();
        let ended_at = (objects.len() > limit).then(|| {
            let last = &objects[limit - 1].key;
            (last.namespace.clone(), last.name.clone())
        });
        objects.truncate(limit);
        Ok(Self { revision: begun.map_or(view.revision(), |begun| begun.revision), objects, ended_at })
    }

    fn metadata(&self) -> Value {
        let mut metadata = json!({"resourceVersion": self.revision.to_string()});
        if let Some(after) = self.ended_at.clone() {
            metadata["continue"] = Continuation { revision: self.revision, after }.to_text().into();
        }
        metadata
    }
}

impl Continuation {
    fn of(call: &Call) -> Result<Option<Self>, ApiError> {
        let text = &call.options.continuation;
        if text.is_empty() {
            return Ok(None);
        }
        if !call.options.resource_version.is_empty() {
            return Err(ApiError::bad_request("resourceVersion is not allowed beside continue"));
        }
        let read = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        read.map(Some).ok_or_else(|| ApiError::bad_request(format!("continue: Invalid value: {text:?}")))
    }

    fn to_text(&self) -> String {
        let json = json!({"revision": self.revision, "after": self.after});
        URL_SAFE_NO_PAD.encode(json.to_string())
    }
}

/// The latest revision serves every list that does not ask for one exactly.
fn check_revision(call: &Call, view: &View) -> Result<(), ApiError> {
    let Some(asked) = call.options.revision()? else { return Ok(()) };
    if asked > view.revision() {
        return Err(ApiError::too_large_revision(asked, view.revision()));
    }
    if call.options.resource_version_match == "Exact" && asked != view.revision() {
        return Err(ApiError::expired(asked, view.revision()));
    }
    Ok(())
}

/// One object in the form asked for. `first` says whether a Table has to bring its column definitions.
pub(super) fn render(call: &Call, stored: &Arc<Stored>, first: bool) -> Bytes {
    let resource = call.target.resource;
    match call.shape {
        Shape::Object if !resource.is_converted() => stored.json.clone(),
        Shape::Object => Bytes::from(events::to_wire(resource, stored.value()).to_string()),
        Shape::Metadata => Bytes::from(partial(&stored.value()).to_string()),
        Shape::Table => {
            let metadata = json!({"resourceVersion": stored.revision.to_string()});
            let one = std::slice::from_ref(stored);
            Bytes::from(table::of(resource, one, &call.options.include_object, &metadata, first).to_string())
        }
    }
}

/// `PartialObjectMetadata` of an object.
pub(super) fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object.get("metadata")})
}

/// An object that is not stored (dry run) in the form asked for.
pub(super) fn render_value(call: &Call, object: &Value) -> Value {
    match call.shape {
        Shape::Metadata => partial(object),
        _ => events::to_wire(call.target.resource, object.clone()),
    }
}

/// An empty object of a kind at a revision: what a bookmark carries.
pub(super) fn bookmark(resource: &Resource, shape: Shape, revision: u64, initial_end: bool) -> Value {
    let (kind, version) = match shape {
        Shape::Metadata => ("PartialObjectMetadata".to_owned(), "meta.k8s.io/v1".to_owned()),
        _ => (resource.kind.to_owned(), resource.api_version()),
    };
    let mut object = json!({"kind": kind, "apiVersion": version,
        "metadata": {"resourceVersion": revision.to_string(), "creationTimestamp": null}});
    if initial_end {
        object::set(&mut object, &["metadata", "annotations"], json!({"k8s.io/initial-events-end": "true"}));
    }
    object
}
