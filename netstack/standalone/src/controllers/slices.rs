//! Distribution of endpoints over EndpointSlices, with as little change as can be. Pure.
//! In: what the endpoints of a Service are to be, and the slices there are. Out: changes. At most 100 endpoints a slice, as
//! the real controller; an endpoint stays in its slice; a family without endpoints keeps one empty slice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

use super::{created, updated};
use crate::admission::Ambient;
use crate::object;
use crate::status::ApiError;
use crate::store::{Change, Stored};

pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
pub(super) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MOST_ENDPOINTS: usize = 100;

/// What a Service's slices of one manager are to say.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Without name, endpoints, ports and addressType.
    pub(super) template: Value,
    /// Families that have slices, even empty ones.
    pub(super) families: Vec<&'static str>,
    pub(super) groups: Vec<Group>,
}

/// Endpoints that share a family and ports, so that they can share slices.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) family: &'static str,
    pub(super) ports: Value,
    pub(super) endpoints: Vec<Value>,
}

impl Wanted {
    /// Adds an endpoint to the group of its family and ports.
    pub(super) fn add(&mut self, family: &'static str, ports: &Value, endpoint: Value) {
        match self.groups.iter_mut().find(|it| it.family == family && it.ports == *ports) {
            Some(group) => group.endpoints.push(endpoint),
            None => self.groups.push(Group { family, ports: ports.clone(), endpoints: vec![endpoint] }),
        }
    }
}

struct Slice {
    stored: Option<Arc<Stored>>,
    family: &'static str,
    ports: Value,
    endpoints: Vec<Value>,
}

/// Changes that turn `existing` (all of one Service and one manager) into what is wanted.
pub(super) fn plan(
    wanted: Wanted,
    existing: &[Arc<Stored>],
    ambient: &Ambient,
) -> Result<Vec<Change>, ApiError> {
    let Wanted { template, families, groups } = wanted;
    let mut unused: VecDeque<(Arc<Stored>, Value)> =
        existing.iter().map(|it| (it.clone(), it.value())).collect();
    let mut slices = Vec::new();
    let by_ports: Vec<Group> = groups;
    for group in by_ports {
        distribute(group, &mut unused, &mut slices);
    }
    for family in families {
        if !slices.iter().any(|it| it.family == family) {
            let stored = take(&mut unused, |it| object::text(it, &["addressType"]) == family);
            let ports =
                stored.as_ref().map_or(json!([]), |(_, it)| it.get("ports").cloned().unwrap_or(json!([])));
            slices.push(Slice { stored: stored.map(|it| it.0), family, ports, endpoints: Vec::new() });
        }
    }
    let mut changes: Vec<Change> = unused.into_iter().map(|(it, _)| Change::Delete(it.key.clone())).collect();
    for (index, slice) in slices.into_iter().enumerate() {
        changes.extend(change(slice, &template, index, ambient)?);
    }
    Ok(changes)
}

fn take(
    unused: &mut VecDeque<(Arc<Stored>, Value)>,
    fits: impl Fn(&Value) -> bool,
) -> Option<(Arc<Stored>, Value)> {
    let index = unused.iter().position(|(_, it)| fits(it))?;
    unused.remove(index)
}

/// Names an endpoint across changes of its conditions.
fn identity(endpoint: &Value) -> String {
    format!("{}/{}", endpoint["addresses"][0], object::text(endpoint, &["targetRef", "uid"]))
}

fn distribute(group: Group, unused: &mut VecDeque<(Arc<Stored>, Value)>, slices: &mut Vec<Slice>) {
    let Group { family, ports, endpoints } = group;
    let mut remaining: BTreeMap<String, Value> =
        endpoints.into_iter().map(|it| (identity(&it), it)).collect();
    let fits = |it: &Value| object::text(it, &["addressType"]) == family && it.get("ports") == Some(&ports);
    let mut own = Vec::new();
    while let Some((stored, value)) = take(unused, fits) {
        let kept =
            object::list(&value, &["endpoints"]).iter().filter_map(|it| remaining.remove(&identity(it)));
        own.push((stored, kept.collect::<Vec<_>>()));
    }
    // Slices that lost everything are filled last, so that they can go.
    own.sort_by_key(|(_, kept)| kept.is_empty());
    let mut rest = remaining.into_values();
    for (stored, mut kept) in own {
        let room = MOST_ENDPOINTS.saturating_sub(kept.len());
        kept.extend(rest.by_ref().take(room));
        if kept.is_empty() {
            let value = stored.value();
            unused.push_back((stored, value));
        } else {
            slices.push(Slice { stored: Some(stored), family, ports: ports.clone(), endpoints: kept });
        }
    }
    loop {
        let endpoints: Vec<Value> = rest.by_ref().take(MOST_ENDPOINTS).collect();
        if endpoints.is_empty() {
            return;
        }
        // A slice of other ports is rather rewritten than deleted.
        let stored = take(unused, |it| object::text(it, &["addressType"]) == family).map(|it| it.0);
        slices.push(Slice { stored, family, ports: ports.clone(), endpoints });
    }
}

fn change(
    slice: Slice,
    template: &Value,
    index: usize,
    ambient: &Ambient,
) -> Result<Option<Change>, ApiError> {
    let mut object = template.clone();
    object["addressType"] = json!(slice.family);
    object["endpoints"] = json!(slice.endpoints);
    object["ports"] = slice.ports;
    if let Some(stored) = slice.stored {
        let annotations = object::at(&stored.value(), &["metadata", "annotations"]).cloned();
        object::put(&mut object, &["metadata", "annotations"], annotations);
        object["apiVersion"] = json!("discovery.k8s.io/v1");
        object["kind"] = json!("EndpointSlice");
        return updated(&stored, object);
    }
    let turns = u32::try_from(index * 7 % 128).unwrap_or(0);
    let ambient = Ambient { now: ambient.now, random: ambient.random.rotate_left(turns) ^ index as u128 };
    let namespace = object::namespace(&object).to_owned();
    let (key, object) = created("endpointslices", &namespace, object, &ambient)?;
    Ok(Some(Change::Put(key, object)))
}
