//! The registry: every resource the server knows, as one flat table.
//! In: nothing. Out: [`Resource`] entries that discovery, routing, storage, tables and validation read.
//! Workload kinds (apps/v1, batch/v1) are left out on purpose: nothing here runs them, so kubectl says "no matches".

use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Endpoints, Event, Namespace, Node, Pod, Secret, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    events::v1::Event as EventsV1Event,
    networking::v1::{Ingress, IngressClass, NetworkPolicy},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

mod metallb;

/// Reads a JSON object as its kind and writes it back: unknown fields vanish, wrong types are errors with their path.
pub(crate) type Decode = fn(Value) -> Result<Value, serde_path_to_error::Error<serde_json::Error>>;

/// One resource of one group and version.
#[derive(Debug)]
pub struct Resource {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    /// Lower-case plural, the segment of the URL.
    pub plural: &'static str,
    pub singular: &'static str,
    pub short_names: &'static [&'static str],
    pub namespaced: bool,
    /// Has a `status` subresource: main writes keep the status, status writes keep the rest.
    pub status: bool,
    pub categories: &'static [&'static str],
    pub(crate) decode: Decode,
    /// The plural under which objects are stored, where it is not `plural` of this very entry.
    stored_as: Option<&'static str>,
}

impl Resource {
    /// Name of the stored collection: the two Event kinds share one.
    #[must_use]
    pub fn collection(&self) -> &'static str {
        self.stored_as.unwrap_or(self.plural)
    }

    /// `v1` or `group/version`.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods` or `leases.coordination.k8s.io`, as Status messages name it.
    #[must_use]
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// Whether objects are kept in the shape of another entry and renamed on the way in and out.
    #[must_use]
    pub fn is_converted(&self) -> bool {
        self.stored_as.is_some()
    }
}

fn decode<T: DeserializeOwned + Serialize>(
    value: Value,
) -> Result<Value, serde_path_to_error::Error<serde_json::Error>> {
    let typed: T = serde_path_to_error::deserialize(value)?;
    serde_path_to_error::serialize(&typed, serde_json::value::Serializer)
}

const fn resource(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    decode: Decode,
) -> Resource {
    Resource {
        group,
        version: "v1",
        kind,
        plural,
        singular,
        short_names: &[],
        namespaced: true,
        status: false,
        categories: &[],
        decode,
        stored_as: None,
    }
}

/// Every resource; the order is the order of discovery.
pub static RESOURCES: &[Resource] = &[
    Resource {
        short_names: &["ns"],
        namespaced: false,
        status: true,
        ..resource("", "Namespace", "namespaces", "namespace", decode::<Namespace>)
    },
    Resource {
        short_names: &["no"],
        namespaced: false,
        status: true,
        ..resource("", "Node", "nodes", "node", decode::<Node>)
    },
    Resource {
        short_names: &["po"],
        status: true,
        categories: &["all"],
        ..resource("", "Pod", "pods", "pod", decode::<Pod>)
    },
    Resource {
        short_names: &["svc"],
        status: true,
        categories: &["all"],
        ..resource("", "Service", "services", "service", decode::<Service>)
    },
    Resource {
        short_names: &["ep"],
        ..resource("", "Endpoints", "endpoints", "endpoints", decode::<Endpoints>)
    },
    Resource {
        short_names: &["cm"],
        ..resource("", "ConfigMap", "configmaps", "configmap", decode::<ConfigMap>)
    },
    resource("", "Secret", "secrets", "secret", decode::<Secret>),
    Resource {
        short_names: &["sa"],
        ..resource("", "ServiceAccount", "serviceaccounts", "serviceaccount", decode::<ServiceAccount>)
    },
    Resource { short_names: &["ev"], ..resource("", "Event", "events", "event", decode::<Event>) },
    resource("discovery.k8s.io", "EndpointSlice", "endpointslices", "endpointslice", decode::<EndpointSlice>),
    resource("coordination.k8s.io", "Lease", "leases", "lease", decode::<Lease>),
    Resource {
        short_names: &["netpol"],
        ..resource(
            "networking.k8s.io",
            "NetworkPolicy",
            "networkpolicies",
            "networkpolicy",
            decode::<NetworkPolicy>,
        )
    },
    Resource {
        short_names: &["ing"],
        status: true,
        ..resource("networking.k8s.io", "Ingress", "ingresses", "ingress", decode::<Ingress>)
    },
    Resource {
        namespaced: false,
        ..resource(
            "networking.k8s.io",
            "IngressClass",
            "ingressclasses",
            "ingressclass",
            decode::<IngressClass>,
        )
    },
    Resource {
        version: "v1beta1",
        status: true,
        ..resource(
            "metallb.io",
            "IPAddressPool",
            "ipaddresspools",
            "ipaddresspool",
            decode::<metallb::IpAddressPool>,
        )
    },
    Resource {
        version: "v1beta1",
        status: true,
        ..resource(
            "metallb.io",
            "L2Advertisement",
            "l2advertisements",
            "l2advertisement",
            decode::<metallb::L2Advertisement>,
        )
    },
    Resource {
        short_names: &["ev"],
        stored_as: Some("events"),
        ..resource("events.k8s.io", "Event", "events", "event", decode::<EventsV1Event>)
    },
];

/// The resource a URL names.
#[must_use]
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|it| it.group == group && it.version == version && it.plural == plural)
}

/// The entry in whose shape a collection is stored.
#[must_use]
pub fn stored(collection: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|it| it.stored_as.is_none() && it.plural == collection)
}

/// Groups in the order of discovery, the core group (empty) first.
#[must_use]
pub fn groups() -> Vec<&'static str> {
    let mut groups = Vec::new();
    for resource in RESOURCES {
        if !groups.contains(&resource.group) {
            groups.push(resource.group);
        }
    }
    groups
}

/// Every group with each of its versions, in the order of their resources.
pub(crate) fn group_versions() -> Vec<(&'static str, &'static str)> {
    let mut found = Vec::new();
    for resource in RESOURCES {
        let pair = (resource.group, resource.version);
        if !found.contains(&pair) {
            found.push(pair);
        }
    }
    found
}

/// The versions that a group has.
pub(crate) fn versions(group: &str) -> impl Iterator<Item = &'static str> {
    group_versions().into_iter().filter(move |(of, _)| *of == group).map(|(_, version)| version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stored_collection_has_one_shape() {
        for resource in RESOURCES {
            let shape = stored(resource.collection()).expect("a stored shape");
            assert_eq!(shape.plural, resource.collection());
        }
    }

    #[test]
    fn workload_kinds_are_not_served() {
        assert!(groups().iter().all(|group| *group != "apps" && *group != "batch"));
    }

    #[test]
    fn a_wrong_type_is_named_by_its_path() {
        let service = serde_json::json!({"spec": {"ports": [{"port": "abc"}]}});
        let error = (find("", "v1", "services").unwrap().decode)(service).unwrap_err();
        assert_eq!(error.path().to_string(), "spec.ports[0].port");
    }
}
