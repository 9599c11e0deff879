//! One object as the API server sent it, before lowering: any JSON with a name. Parsing never fails on a field's type,
//! because one unreadable object must not fail the list it came in.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Namespace and name of the one ConfigMap that is read: where users of k3s and other clusters put DNS settings of their
/// own.
pub const CONFIG_MAP: (&str, &str) = ("kube-system", "coredns-custom");

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Node,
    /// Only [`CONFIG_MAP`].
    ConfigMap,
    Namespace,
    Service,
    EndpointSlice,
    Pod,
    NetworkPolicy,
    IngressClass,
    Ingress,
    ServiceCidr,
    IpAddressPool,
    L2Advertisement,
}

impl Kind {
    pub const ALL: [Self; 12] = [
        Self::Node,
        Self::ConfigMap,
        Self::Namespace,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::NetworkPolicy,
        Self::IngressClass,
        Self::Ingress,
        Self::ServiceCidr,
        Self::IpAddressPool,
        Self::L2Advertisement,
    ];

    /// `kind` as manifests write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::ConfigMap => "ConfigMap",
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::IngressClass => "IngressClass",
            Self::Ingress => "Ingress",
            Self::ServiceCidr => "ServiceCIDR",
            Self::IpAddressPool => "IPAddressPool",
            Self::L2Advertisement => "L2Advertisement",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn group(self) -> &'static str {
        match self {
            Self::EndpointSlice => "discovery.k8s.io",
            Self::NetworkPolicy | Self::IngressClass | Self::Ingress | Self::ServiceCidr => {
                "networking.k8s.io"
            }
            Self::IpAddressPool | Self::L2Advertisement => "metallb.io",
            _ => "",
        }
    }

    fn version(self) -> &'static str {
        if self.group() == "metallb.io" { "v1beta1" } else { "v1" }
    }

    /// Clusters may lack it: then there are none. ServiceCIDRs came with Kubernetes 1.33.
    pub(super) fn is_optional(self) -> bool {
        matches!(self, Self::ServiceCidr | Self::IpAddressPool | Self::L2Advertisement)
    }

    /// `apiVersion` as manifests write it.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.version().to_owned(),
            group => format!("{group}/{}", self.version()),
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::ConfigMap => "configmaps",
            Self::Namespace => "namespaces",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Pod => "pods",
            Self::NetworkPolicy => "networkpolicies",
            Self::IngressClass => "ingressclasses",
            Self::Ingress => "ingresses",
            Self::ServiceCidr => "servicecidrs",
            Self::IpAddressPool => "ipaddresspools",
            Self::L2Advertisement => "l2advertisements",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Document {
    /// Only name, namespace and resourceVersion.
    meta: ObjectMeta,
    pub value: Value,
}

impl Document {
    pub fn new(mut value: Value) -> Self {
        strip(&mut value);
        let field = |name: &str| value["metadata"][name].as_str().map(str::to_owned);
        let meta = ObjectMeta {
            name: field("name"),
            namespace: field("namespace"),
            resource_version: field("resourceVersion"),
            ..ObjectMeta::default()
        };
        Self { meta, value }
    }

    /// The objects of a kind in a namespace; an empty one stands for objects that have none.
    pub(super) fn api(client: kube::Client, kind: Kind, namespace: &str) -> Api<Self> {
        match namespace {
            "" => Api::all_with(client, &kind),
            namespace => Api::namespaced_with(client, namespace, &kind),
        }
    }

    /// The object of this name as it is now. By a list of one, which needs no right that the watches do not need.
    pub(super) async fn find(
        client: kube::Client,
        kind: Kind,
        (namespace, name): (&str, &str),
    ) -> Result<Option<Self>, kube::Error> {
        let of_name = ListParams::default().fields(&format!("metadata.name={name}"));
        let listed = Self::api(client, kind, namespace).list(&of_name).await?;
        Ok(listed.items.into_iter().next())
    }

    /// Empty when the object has none.
    pub fn namespace(&self) -> &str {
        self.meta.namespace.as_deref().unwrap_or_default()
    }

    pub fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }
}

/// Drops at once what takes most of an object's memory and is never read: who wrote which field, and nearly all of a
/// container. A page of a list holds hundreds of objects.
fn strip(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if !spec.contains_key("containers") {
        return;
    }
    for list in ["containers", "initContainers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        for container in containers.filter_map(Value::as_object_mut) {
            container.retain(|field, _| matches!(field.as_str(), "ports" | "restartPolicy"));
        }
    }
    for field in ["volumes", "affinity", "tolerations", "topologySpreadConstraints"] {
        spec.remove(field);
    }
    if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
        status.retain(|field, _| matches!(field.as_str(), "phase" | "podIP" | "podIPs"));
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::new)
    }
}

impl kube::Resource for Document {
    type DynamicType = Kind;
    type Scope = DynamicResourceScope;

    fn kind(kind: &Kind) -> Cow<'_, str> {
        kind.name().into()
    }

    fn group(kind: &Kind) -> Cow<'_, str> {
        kind.group().into()
    }

    fn version(kind: &Kind) -> Cow<'_, str> {
        kind.version().into()
    }

    fn plural(kind: &Kind) -> Cow<'_, str> {
        kind.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
