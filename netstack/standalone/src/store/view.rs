//! The server's memory: every object at its latest revision, the recent history, and the claims on addresses and ports.
//! Pure data: the [`super::Store`] guards it with a lock and puts it on disk.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use axum::body::Bytes;
use serde_json::Value;

use crate::object;
use crate::resources;
use crate::status::ApiError;

/// Where an object lives.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    /// [`resources::Resource::collection`].
    pub(crate) collection: &'static str,
    /// Empty for cluster-scoped objects.
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(
        collection: &'static str,
        namespace: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self { collection, namespace: namespace.into(), name: name.into() }
    }
}

/// One object at one revision: the JSON as it is served, and what selectors and allocation ask about it, taken out once.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) key: Key,
    /// `metadata.resourceVersion`.
    pub(crate) revision: u64,
    pub(crate) labels: BTreeMap<String, String>,
    /// Selectable fields that have a value.
    fields: Vec<(&'static str, String)>,
    /// Cluster-wide unique things it holds (see [`claims`]).
    claims: Vec<String>,
    pub(crate) json: Bytes,
}

impl Stored {
    /// # Errors
    /// When the value cannot be serialised, which no parsed JSON causes.
    pub(crate) fn new(key: Key, revision: u64, mut object: Value) -> Result<Self, serde_json::Error> {
        object::set(&mut object, &["metadata", "resourceVersion"], Value::String(revision.to_string()));
        let json = Bytes::from(serde_json::to_vec(&object)?);
        Ok(Self::of(key, revision, &object, json))
    }

    /// # Errors
    /// When the bytes are not JSON.
    pub(crate) fn from_json(key: Key, json: Bytes) -> Result<Self, serde_json::Error> {
        let object: Value = serde_json::from_slice(&json)?;
        let revision = object::text(&object, &["metadata", "resourceVersion"]).parse().unwrap_or(0);
        Ok(Self::of(key, revision, &object, json))
    }

    fn of(key: Key, revision: u64, object: &Value, json: Bytes) -> Self {
        let labels = object::text_map(object, &["metadata", "labels"]);
        let fields = selectable_fields(key.collection)
            .iter()
            .filter_map(|path| Some((*path, field_text(object, path)?)))
            .collect();
        let claims = claims(key.collection, object);
        Self { key, revision, labels, fields, claims, json }
    }

    /// The object, parsed again; `Null` only if memory held what is not JSON.
    #[must_use]
    pub(crate) fn value(&self) -> Value {
        serde_json::from_slice(&self.json).unwrap_or(Value::Null)
    }

    /// A selectable field, empty where it has no value.
    #[must_use]
    pub(crate) fn field(&self, path: &str) -> &str {
        match path {
            "metadata.name" => &self.key.name,
            "metadata.namespace" => &self.key.namespace,
            _ => self.fields.iter().find(|(it, _)| *it == path).map_or("", |(_, value)| value),
        }
    }
}

/// Field paths a collection can be selected by, beside `metadata.name` and `metadata.namespace`.
#[must_use]
pub(crate) fn selectable_fields(collection: &str) -> &'static [&'static str] {
    match collection {
        "pods" => &[
            "spec.nodeName",
            "spec.serviceAccountName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
        ],
        "events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "services" => &["spec.clusterIP", "spec.type"],
        "namespaces" => &["status.phase"],
        "nodes" => &["spec.unschedulable"],
        "secrets" => &["type"],
        _ => &[],
    }
}

fn field_text(object: &Value, path: &str) -> Option<String> {
    let keys: Vec<&str> =
        if path == "source" { vec!["source", "component"] } else { path.split('.').collect() };
    match object::at(object, &keys)? {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// What an object holds that no other may: `ip/<address>` and `port/<protocol>/<number>` of Services, `cidr/<range>` of Nodes.
fn claims(collection: &str, object: &Value) -> Vec<String> {
    match collection {
        "services" => service_claims(object),
        "nodes" => {
            object::texts(object, &["spec", "podCIDRs"]).iter().map(|it| format!("cidr/{it}")).collect()
        }
        _ => Vec::new(),
    }
}

fn service_claims(service: &Value) -> Vec<String> {
    let addresses = object::texts(service, &["spec", "clusterIPs"]);
    let mut claims: Vec<String> =
        addresses.iter().filter(|it| *it != "None").map(|it| format!("ip/{it}")).collect();
    for port in object::list(service, &["spec", "ports"]) {
        if let Some(number) = object::at(port, &["nodePort"]).and_then(Value::as_u64) {
            claims.push(port_claim(object::text(port, &["protocol"]), number));
        }
    }
    if let Some(number) = object::at(service, &["spec", "healthCheckNodePort"]).and_then(Value::as_u64) {
        claims.push(port_claim("TCP", number));
    }
    claims
}

/// The claim on a node port.
#[must_use]
pub(crate) fn port_claim(protocol: &str, number: u64) -> String {
    let protocol = if protocol.is_empty() { "TCP" } else { protocol };
    format!("port/{protocol}/{number}")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    Added,
    Modified,
    Deleted,
}

/// One change, as the history keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) revision: u64,
    pub(crate) kind: EventKind,
    /// The object after the change; for a deletion its last state, at the revision of the deletion.
    pub(crate) object: Arc<Stored>,
    /// The object before a modification; `None` when it is not known (history read back from disk).
    pub(crate) previous: Option<Arc<Stored>>,
}

/// Everything the server knows at one revision.
#[derive(Debug, Default)]
pub(crate) struct View {
    objects: BTreeMap<Key, Arc<Stored>>,
    claims: HashMap<String, Key>,
    history: VecDeque<Event>,
    revision: u64,
    /// Watches can start at this revision or later.
    oldest: u64,
}

impl View {
    #[must_use]
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    #[must_use]
    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Stored>> {
        self.objects.get(key)
    }

    /// Objects of a collection, of one namespace or (`None`) all, in the order of namespace and name.
    pub(crate) fn list<'a>(
        &'a self,
        collection: &'static str,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = &'a Arc<Stored>> + 'a {
        self.list_after(Key::new(collection, "", ""), namespace)
    }

    /// Those of them that come after `before`, which need not be there.
    pub(crate) fn list_after<'a>(
        &'a self,
        before: Key,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = &'a Arc<Stored>> + 'a {
        let collection = before.collection;
        let begin = before.max(Key::new(collection, namespace.unwrap_or_default(), ""));
        let rest = self.objects.range((Bound::Excluded(begin), Bound::Unbounded));
        rest.map(|(_, stored)| stored).take_while(move |it| {
            it.key.collection == collection && namespace.is_none_or(|ns| it.key.namespace == ns)
        })
    }

    /// All objects of a namespace, of every collection.
    pub(crate) fn content<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Stored>> + 'a {
        let collections = resources::RESOURCES.iter().filter(|it| it.namespaced && !it.is_converted());
        collections.flat_map(move |it| self.list(it.collection(), Some(namespace)))
    }

    /// Who holds a claim.
    #[must_use]
    pub(crate) fn holder(&self, claim: &str) -> Option<&Key> {
        self.claims.get(claim)
    }

    /// Changes after a revision, oldest first.
    ///
    /// # Errors
    /// 410 when the history no longer reaches back so far, or the revision is of another life of the store.
    pub(crate) fn events_after(&self, revision: u64) -> Result<impl Iterator<Item = &Event>, ApiError> {
        if revision < self.oldest || revision > self.revision {
            return Err(ApiError::expired(revision, self.oldest));
        }
        let start = self.history.partition_point(|it| it.revision <= revision);
        Ok(self.history.range(start..))
    }

    /// What is needed to continue after a restart: see [`super::Store::open`].
    pub(super) fn restore(revision: u64, objects: Vec<Stored>, history: VecDeque<Event>) -> Self {
        let oldest = history.front().map_or(revision, |it| it.revision - 1);
        let mut view = Self { revision, oldest, history, ..Self::default() };
        for stored in objects {
            view.insert(Arc::new(stored));
        }
        view
    }

    fn insert(&mut self, stored: Arc<Stored>) -> Option<Arc<Stored>> {
        let previous = self.objects.insert(stored.key.clone(), stored.clone());
        self.release(previous.as_deref());
        for claim in &stored.claims {
            self.claims.insert(claim.clone(), stored.key.clone());
        }
        previous
    }

    fn release(&mut self, stored: Option<&Stored>) {
        for claim in stored.iter().flat_map(|it| &it.claims) {
            if self.claims.get(claim) == stored.map(|it| &it.key) {
                self.claims.remove(claim);
            }
        }
    }

    /// Takes one change in; returns the revision whose history entry fell out, if one did.
    pub(super) fn record(&mut self, stored: Arc<Stored>, deleted: bool, capacity: usize) -> Option<u64> {
        let revision = stored.revision;
        let (kind, previous) = if deleted {
            let previous = self.objects.remove(&stored.key);
            self.release(previous.as_deref());
            (EventKind::Deleted, previous)
        } else {
            let previous = self.insert(stored.clone());
            (if previous.is_some() { EventKind::Modified } else { EventKind::Added }, previous)
        };
        self.revision = revision;
        self.history.push_back(Event { revision, kind, object: stored, previous });
        if self.history.len() <= capacity {
            return None;
        }
        let dropped = self.history.pop_front()?.revision;
        self.oldest = dropped;
        Some(dropped)
    }
}
