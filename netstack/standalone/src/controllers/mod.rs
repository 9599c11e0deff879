//! The controllers a network needs, inside the server: each is a pure plan over the view, run by one loop.
//! In: the store's history (which objects changed). Out: transactions. A plan runs under the store's write lock, so what
//! it decides on is what it writes to; doing it again changes nothing.

mod bootstrap;
mod endpoints;
mod namespaces;
mod nodes;
mod slices;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

pub(crate) use bootstrap::ensure_foundations;
pub(crate) use nodes::node_prefix;

use crate::admission::{self, Ambient, Part};
use crate::object;
use crate::resources;
use crate::status::ApiError;
use crate::store::{Change, Event, EventKind, Key, Store, Stored, View};

/// What the controllers are told once.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) policy: admission::Policy,
    /// Ranges that nodes get pod ranges from, each with the prefix length of a node's part.
    pub(crate) node_ranges: Vec<(IpNet, u8)>,
    /// Where the `kubernetes` Service leads.
    pub(crate) advertise: Vec<IpAddr>,
    pub(crate) advertise_port: u16,
}

/// How long Events are kept, as the real API server's `--event-ttl`.
const EVENT_LIFETIME_SECONDS: i64 = 3600;
const EXPIRY_INTERVAL: Duration = Duration::from_mins(1);

/// Something to look at again; carries only its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Namespace(String),
    Node(String),
    Service(String, String),
    /// A Service was deleted: its Endpoints go too.
    ServiceGone(String, String),
    /// A Node was deleted: its pods go too.
    NodeGone(String),
    Foundations,
}

/// Runs until dropped.
pub(crate) async fn run(store: Arc<Store>, settings: Settings) {
    let mut revisions = store.revisions();
    let mut position = None;
    let mut expiry = tokio::time::interval(EXPIRY_INTERVAL);
    loop {
        revisions.mark_unchanged();
        let (revision, work) = store.read(|view| pending(view, position));
        for item in work {
            if let Err(error) = perform(&store, &settings, &item) {
                tracing::warn!(?item, %error, "controller");
            }
        }
        position = Some(revision);
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            _ = expiry.tick() => expire_events(&store),
        }
    }
}

/// Everything, at first and when the history has moved on; otherwise what changed since.
fn pending(view: &View, position: Option<u64>) -> (u64, BTreeSet<Work>) {
    let events = position.and_then(|it| view.events_after(it).ok());
    let work = match events {
        Some(events) => events.flat_map(|it| work_of(view, it)).collect(),
        None => all_work(view),
    };
    (view.revision(), work)
}

fn all_work(view: &View) -> BTreeSet<Work> {
    let mut work = BTreeSet::from([Work::Foundations]);
    work.extend(view.list("namespaces", None).map(|it| Work::Namespace(it.key.name.clone())));
    work.extend(view.list("nodes", None).map(|it| Work::Node(it.key.name.clone())));
    work.extend(view.list("services", None).map(|it| service_work(&it.key.namespace, &it.key.name)));
    work.extend(view.list("endpointslices", None).filter_map(|it| slice_work(it)));
    work
}

fn service_work(namespace: &str, name: &str) -> Work {
    Work::Service(namespace.to_owned(), name.to_owned())
}

fn slice_work(slice: &Stored) -> Option<Work> {
    Some(service_work(&slice.key.namespace, slice.labels.get(slices::SERVICE_NAME_LABEL)?))
}

fn work_of(view: &View, event: &Event) -> Vec<Work> {
    let stored = &event.object;
    let Key { collection, namespace, name } = &stored.key;
    let is_gone = event.kind == EventKind::Deleted;
    let mut work = match *collection {
        "namespaces" => vec![Work::Namespace(name.clone())],
        "nodes" if is_gone => vec![Work::NodeGone(name.clone())],
        "nodes" => vec![Work::Node(name.clone())],
        "services" if is_gone => vec![Work::ServiceGone(namespace.clone(), name.clone())],
        "services" | "endpoints" => vec![service_work(namespace, name)],
        "endpointslices" => slice_work(stored).into_iter().collect(),
        "pods" => selecting_services(view, event),
        _ => Vec::new(),
    };
    if !namespace.is_empty() {
        let home = view.get(&Key::new("namespaces", "", namespace.as_str()));
        if is_gone && home.is_some_and(|it| it.field("status.phase") == "Terminating") {
            work.push(Work::Namespace(namespace.clone()));
        }
        if namespace == "default" && (name == "kubernetes" || collection == &"endpointslices") {
            work.push(Work::Foundations);
        }
    }
    work
}

/// Services of the pod's namespace whose selector fits the pod as it is or as it was.
fn selecting_services(view: &View, event: &Event) -> Vec<Work> {
    let namespace = event.object.key.namespace.as_str();
    let before = event.previous.as_ref().map(|it| &it.labels);
    view.list("services", Some(namespace))
        .filter(|service| {
            let selector = object::text_map(&service.value(), &["spec", "selector"]);
            selects(&selector, &event.object.labels) || before.is_some_and(|it| selects(&selector, it))
        })
        .map(|service| service_work(namespace, &service.key.name))
        .collect()
}

/// The empty selector of a Service selects nothing: its endpoints are made by hand.
fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn perform(store: &Store, settings: &Settings, work: &Work) -> Result<(), ApiError> {
    let ambient = Ambient::sample();
    store.commit(|view| match work {
        Work::Namespace(name) => namespaces::plan(view, name, &ambient),
        Work::Node(name) => nodes::plan(view, name, &settings.node_ranges),
        Work::NodeGone(name) => Ok(nodes::plan_gone(view, name, &ambient)),
        Work::Service(namespace, name) => endpoints::plan(view, namespace, name, &ambient),
        Work::ServiceGone(namespace, name) => endpoints::plan_gone(view, namespace, name, &ambient),
        Work::Foundations => bootstrap::plan_kubernetes_service(view, settings, &ambient),
    })?;
    Ok(())
}

fn expire_events(store: &Store) {
    let now = jiff::Timestamp::now().as_second();
    let is_old = |stored: &Stored| {
        let event = stored.value();
        let times =
            [&["series", "lastObservedTime"][..], &["lastTimestamp"], &["metadata", "creationTimestamp"]];
        let last = times.iter().find_map(|it| object::text(&event, it).parse::<jiff::Timestamp>().ok());
        last.is_some_and(|it| now - it.as_second() > EVENT_LIFETIME_SECONDS)
    };
    let result = store.commit(|view| {
        let old = view.list("events", None).filter(|it| is_old(it));
        Ok(old.map(|it| Change::Delete(it.key.clone())).collect())
    });
    if let Err(error) = result {
        tracing::warn!(%error, "expiring events");
    }
}

/// A new object as the API would create it.
fn created(
    collection: &str,
    namespace: &str,
    object: Value,
    ambient: &Ambient,
) -> Result<(Key, Value), ApiError> {
    let resource = resources::stored(collection).ok_or_else(|| ApiError::internal("unknown collection"))?;
    let (object, _) = admission::decode(resource, object, admission::Strictness::Ignore)?;
    let mut object = admission::admit_new(resource, namespace, object, ambient)?;
    object["apiVersion"] = Value::String(resource.api_version());
    object["kind"] = Value::String(resource.kind.to_owned());
    admission::apply_defaults(resource, &mut object);
    admission::check(resource, &object)?;
    Ok((Key::new(resource.collection(), namespace, object::name(&object)), object))
}

/// A change to an existing object as the API would make it; `None` when nothing changes.
fn updated(stored: &Stored, object: Value) -> Result<Option<Change>, ApiError> {
    let resource =
        resources::stored(stored.key.collection).ok_or_else(|| ApiError::internal("unknown collection"))?;
    let old = stored.value();
    let mut object = admission::admit_update(resource, Part::Main, &old, object)?;
    admission::apply_defaults(resource, &mut object);
    object::set(&mut object, &["metadata", "resourceVersion"], Value::String(stored.revision.to_string()));
    admission::check(resource, &object)?;
    Ok((object != old).then(|| Change::Put(stored.key.clone(), object)))
}

/// The first Service address of a range: the `kubernetes` Service's.
pub(crate) fn first_address(range: &IpNet) -> Option<IpAddr> {
    admission::ranges::nth_address(range, 0)
}
