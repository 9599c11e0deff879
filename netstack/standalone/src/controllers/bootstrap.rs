//! What every cluster has from the start: the first namespaces and the `kubernetes` Service. Pure plans, and one call that
//! runs them before the first request.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Settings, created, updated};
use crate::admission::{self, Ambient, ranges};
use crate::resources;
use crate::status::ApiError;
use crate::store::{Change, Key, Store, View};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Makes what is missing.
///
/// # Errors
/// When the store cannot be written or the ranges have no first address.
pub(crate) fn ensure_foundations(store: &Store, settings: &Settings) -> Result<(), ApiError> {
    for name in NAMESPACES {
        let ambient = Ambient::sample();
        store.commit(|view| {
            if view.get(&Key::new("namespaces", "", name)).is_some() {
                return Ok(Vec::new());
            }
            let (key, object) = created("namespaces", "", json!({"metadata": {"name": name}}), &ambient)?;
            Ok(vec![Change::Put(key, object)])
        })?;
    }
    let ambient = Ambient::sample();
    store.commit(|view| plan_kubernetes_service(view, settings, &ambient))?;
    Ok(())
}

/// `default/kubernetes` with the first Service address, and its endpoints.
pub(super) fn plan_kubernetes_service(
    view: &View,
    settings: &Settings,
    ambient: &Ambient,
) -> Result<Vec<Change>, ApiError> {
    let mut changes = Vec::new();
    let service = Key::new("services", "default", "kubernetes");
    if view.get(&service).is_none() && !settings.policy.service_cidrs.is_empty() {
        changes.push(service_change(view, settings, ambient)?);
    }
    if settings.advertise.is_empty() {
        return Ok(changes);
    }
    changes.extend(ensured(view, "endpoints", endpoints(settings), ambient)?);
    for (index, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let name =
            if index == 0 || settings.advertise[0].is_ipv6() { "kubernetes" } else { "kubernetes-ipv6" };
        if let Some(slice) = slice(settings, family, name) {
            changes.extend(ensured(view, "endpointslices", slice, ambient)?);
        }
    }
    Ok(changes)
}

fn service_change(view: &View, settings: &Settings, ambient: &Ambient) -> Result<Change, ApiError> {
    let resource = resources::stored("services").ok_or_else(|| ApiError::internal("no services"))?;
    let addresses: Vec<String> = settings
        .policy
        .service_cidrs
        .iter()
        .filter_map(|it| ranges::nth_address(it, 0))
        .map(|it| it.to_string())
        .collect();
    let policy = if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    let object = json!({"metadata": {"name": "kubernetes",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"type": "ClusterIP", "clusterIP": addresses.first(), "clusterIPs": addresses, "ipFamilyPolicy": policy,
            "ports": [{"name": "https", "port": 443, "targetPort": settings.advertise_port}]}});
    let (key, mut object) = created("services", "default", object, ambient)?;
    admission::allocate(resource, &mut object, None, view, &settings.policy, ambient)?;
    Ok(Change::Put(key, object))
}

fn endpoints(settings: &Settings) -> Value {
    let addresses: Vec<Value> = settings.advertise.iter().map(|it| json!({"ip": it.to_string()})).collect();
    json!({"metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": addresses,
            "ports": [{"name": "https", "port": settings.advertise_port, "protocol": "TCP"}]}]})
}

fn slice(settings: &Settings, family: &str, name: &str) -> Option<Value> {
    let is_family = |it: &&IpAddr| it.is_ipv4() == (family == "IPv4");
    let endpoints: Vec<Value> = settings
        .advertise
        .iter()
        .filter(is_family)
        .map(|it| json!({"addresses": [it.to_string()], "conditions": {"ready": true}}))
        .collect();
    (!endpoints.is_empty()).then(|| {
        json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": family,
            "endpoints": endpoints, "ports": [{"name": "https", "port": settings.advertise_port, "protocol": "TCP"}]})
    })
}

fn ensured(
    view: &View,
    collection: &'static str,
    wanted: Value,
    ambient: &Ambient,
) -> Result<Option<Change>, ApiError> {
    let (key, wanted) = created(collection, "default", wanted, ambient)?;
    match view.get(&key) {
        None => Ok(Some(Change::Put(key, wanted))),
        Some(stored) if stored.value().get("addressType") != wanted.get("addressType") => {
            Ok(Some(Change::Put(key, wanted)))
        }
        Some(stored) => updated(stored, wanted),
    }
}
