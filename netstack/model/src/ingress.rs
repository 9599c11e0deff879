//! Ingress v1 (networking.k8s.io/v1) lowered: classes, Ingresses, and what they refer to by name.
//!
//! Annotations stay text here; `weft_ingress::annotations` says what they mean.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::NamespacedName;
use crate::snapshot::Objects;

/// `spec.controller` of the IngressClasses that are ours.
pub const CONTROLLER: &str = "weft.network/ingress";
/// The same of ingress-nginx, honoured when [`IngressConfig::adopt_nginx`].
pub const NGINX_CONTROLLER: &str = "k8s.io/ingress-nginx";
/// Name that ingress-nginx's class has in nearly every cluster; honoured without its object too, because removing that
/// controller removes the object.
pub const NGINX_CLASS: &str = "nginx";
/// The annotations that are understood begin so.
pub const ANNOTATION_PREFIX: &str = "nginx.ingress.kubernetes.io/";
/// The class as it was written before `spec.ingressClassName`.
pub const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

/// Annotations whose value is the name of a Secret, `name` or `namespace/name`.
pub const SECRET_ANNOTATIONS: [&str; 3] = ["auth-secret", "auth-tls-secret", "proxy-ssl-secret"];
/// Annotations whose value is the name of a ConfigMap.
pub const CONFIG_MAP_ANNOTATIONS: [&str; 2] = ["auth-proxy-set-headers", "custom-headers"];

/// What the operator decided about Ingresses; the same on every node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressConfig {
    /// `--ingress`; off, no Ingress is ours and nothing they refer to is read.
    pub on: bool,
    /// `--ingress-class`: names that are ours with or without an IngressClass object.
    pub classes: BTreeSet<String>,
    /// `--adopt-ingress-nginx`: ingress-nginx's class is ours too.
    pub adopt_nginx: bool,
    /// `--ingress-default-certificate`: the Secret whose certificate answers where no other does.
    pub default_certificate: Option<NamespacedName>,
    #[serde(default)]
    pub front: Front,
    #[serde(default)]
    pub observe: Observe,
}

/// What the ingress tells of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observe {
    /// `--ingress-access-log`: a JSON object a request on the standard output of the process.
    pub access_log: bool,
    /// `--ingress-nginx-metrics`: metrics under the names of ingress-nginx too.
    pub nginx_metrics: bool,
}

/// What stands between clients and the ingress.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Front {
    /// `--ingress-trusted-ranges`: addresses of proxies and load balancers; what they say of clients is believed.
    pub trusted: Vec<IpNet>,
    /// `--ingress-proxy-protocol`: their connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
}

impl Front {
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|range| range.contains(&address))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressClass {
    pub name: String,
    pub controller: String,
    /// Annotation `ingressclass.kubernetes.io/is-default-class`.
    pub is_default: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingress {
    pub key: NamespacedName,
    pub uid: String,
    /// Seconds since the epoch; of two that claim one host and path the older wins.
    pub created: i64,
    pub annotations: BTreeMap<String, String>,
    /// `spec.ingressClassName`.
    pub class: Option<String>,
    pub default_backend: Option<IngressBackend>,
    pub tls: Vec<IngressTls>,
    pub rules: Vec<IngressRule>,
    /// `status.loadBalancer.ingress`, each address or host name as text.
    pub status: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressTls {
    /// Lower case.
    pub hosts: Vec<String>,
    /// Empty means the default certificate.
    pub secret: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressRule {
    /// Lower case; `None` is every host. `*.` at the front stands for one label.
    pub host: Option<String>,
    pub paths: Vec<IngressPath>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressPath {
    /// As written; only ImplementationSpecific may leave it empty.
    pub path: String,
    pub kind: PathType,
    pub backend: IngressBackend,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PathType {
    Exact,
    Prefix,
    ImplementationSpecific,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum IngressBackend {
    Service {
        name: String,
        port: BackendPort,
    },
    /// Another object, `Kind/name`: nothing that HTTP could be sent to.
    Resource(String),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum BackendPort {
    Number(u16),
    Name(String),
}

impl fmt::Display for BackendPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Ingress {
    /// An annotation of ingress-nginx by its short name.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(&format!("{ANNOTATION_PREFIX}{name}")).map(String::as_str)
    }

    /// `name` or `namespace/name`, as annotations refer to objects.
    pub fn referred(&self, text: &str) -> NamespacedName {
        match text.trim().split_once('/') {
            Some((namespace, name)) => NamespacedName::new(namespace, name),
            None => NamespacedName::new(&self.key.namespace, text.trim()),
        }
    }

    /// Secrets of its own namespace that it refers to. One of another namespace is never read: whoever may write an
    /// Ingress would read every Secret of the cluster.
    pub fn secrets(&self) -> BTreeSet<NamespacedName> {
        let tls = self.tls.iter().filter_map(|tls| tls.secret.as_deref()).map(|name| self.referred(name));
        tls.chain(self.named_by(&SECRET_ANNOTATIONS)).filter(|key| self.may_read(key)).collect()
    }

    pub fn config_maps(&self) -> BTreeSet<NamespacedName> {
        self.named_by(&CONFIG_MAP_ANNOTATIONS).filter(|key| self.may_read(key)).collect()
    }

    fn may_read(&self, key: &NamespacedName) -> bool {
        key.namespace == self.key.namespace && !key.name.is_empty()
    }

    fn named_by<'a>(&'a self, annotations: &'a [&str]) -> impl Iterator<Item = NamespacedName> + 'a {
        annotations.iter().filter_map(|name| self.annotation(name)).map(|text| self.referred(text))
    }
}

/// Whether an Ingress is ours. Annotation before `spec.ingressClassName`, as ingress-nginx has it; without either the
/// class that is marked as default decides.
pub fn is_ours(ingress: &Ingress, classes: &Objects<String, IngressClass>, config: &IngressConfig) -> bool {
    let ours = |class: &IngressClass| {
        class.controller == CONTROLLER || (config.adopt_nginx && class.controller == NGINX_CONTROLLER)
    };
    let named = ingress.annotations.get(CLASS_ANNOTATION).or(ingress.class.as_ref());
    config.on
        && match named {
            Some(name) => match classes.get(name) {
                Some(class) => ours(class),
                None => config.classes.contains(name) || (config.adopt_nginx && name == NGINX_CLASS),
            },
            None => classes.values().any(|class| class.is_default && ours(class)),
        }
}

/// Something that is read by its name because an Ingress of ours refers to it; prints and serialises as
/// `Secret namespace/name`, so that it can be a JSON key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reference {
    Secret(NamespacedName),
    ConfigMap(NamespacedName),
}

impl Reference {
    pub fn key(&self) -> &NamespacedName {
        let (Self::Secret(key) | Self::ConfigMap(key)) = self;
        key
    }

    /// `kind` as manifests write it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Secret(_) => "Secret",
            Self::ConfigMap(_) => "ConfigMap",
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.key())
    }
}

impl Serialize for Reference {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.split_once(' ').and_then(|(kind, key)| {
            let (namespace, name) = key.split_once('/')?;
            let key = NamespacedName::new(namespace, name);
            match kind {
                "Secret" => Some(Self::Secret(key)),
                "ConfigMap" => Some(Self::ConfigMap(key)),
                _ => None,
            }
        });
        parsed.ok_or_else(|| serde::de::Error::custom("expected a kind and namespace/name"))
    }
}

/// What all of our Ingresses refer to.
pub fn references(
    ingresses: &Objects<NamespacedName, Ingress>,
    classes: &Objects<String, IngressClass>,
    config: &IngressConfig,
) -> BTreeSet<Reference> {
    if !config.on {
        return BTreeSet::new();
    }
    let ours = ingresses.values().filter(|ingress| is_ours(ingress, classes, config));
    let of_ingresses = ours.flat_map(|ingress| {
        let secrets = ingress.secrets().into_iter().map(Reference::Secret);
        secrets.chain(ingress.config_maps().into_iter().map(Reference::ConfigMap))
    });
    of_ingresses.chain(config.default_certificate.clone().map(Reference::Secret)).collect()
}

/// What was read by name. A key that is not there was not asked for yet.
pub type Referred = Objects<Reference, Answer>;

/// What the API server said of a name. Debug output never shows the bytes of a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Found(Data),
    Absent,
    /// Why it may not be read, in one line.
    Refused(String),
}

/// `data` of a Secret or a ConfigMap.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Data(pub BTreeMap<String, Bytes>);

impl Data {
    pub fn bytes(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key).map(|bytes| bytes.0.as_slice())
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Bytes that serialise as base64, as in a Secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(text);
        bytes.map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn ingress(class: Option<&str>, annotations: &[(&str, &str)]) -> Ingress {
        Ingress {
            key: NamespacedName::new("default", "web"),
            uid: String::new(),
            created: 0,
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            class: class.map(str::to_owned),
            default_backend: None,
            tls: vec![IngressTls { hosts: vec![], secret: Some("tls".to_owned()) }],
            rules: vec![],
            status: vec![],
        }
    }

    fn classes(list: &[(&str, &str, bool)]) -> Objects<String, IngressClass> {
        let class = |(name, controller, is_default): &(&str, &str, bool)| IngressClass {
            name: (*name).to_owned(),
            controller: (*controller).to_owned(),
            is_default: *is_default,
        };
        Arc::new(list.iter().map(|one| (one.0.to_owned(), Arc::new(class(one)))).collect())
    }

    fn on(adopt_nginx: bool) -> IngressConfig {
        IngressConfig {
            on: true,
            classes: BTreeSet::from(["weft".to_owned()]),
            adopt_nginx,
            default_certificate: None,
            front: Front::default(),
            observe: Observe::default(),
        }
    }

    #[test]
    fn an_ingress_is_ours_by_its_class() {
        let known = classes(&[
            ("weft", CONTROLLER, false),
            ("edge", CONTROLLER, false),
            ("nginx", NGINX_CONTROLLER, false),
            ("traefik", "traefik.io/ingress-controller", true),
        ]);
        let is = |class, annotations: &[(&str, &str)], config: &IngressConfig| {
            is_ours(&ingress(class, annotations), &known, config)
        };
        assert!(is(Some("weft"), &[], &on(false)));
        assert!(is(Some("edge"), &[], &on(false)), "any class with our controller");
        assert!(!is(Some("nginx"), &[], &on(false)), "not without being asked");
        assert!(is(Some("nginx"), &[], &on(true)));
        assert!(!is(Some("traefik"), &[], &on(true)));
        assert!(!is(None, &[], &on(true)), "the default class is another's");
        assert!(is(Some("traefik"), &[(CLASS_ANNOTATION, "weft")], &on(false)), "the annotation goes first");
        assert!(!is(Some("weft"), &[], &IngressConfig::default()), "off");
    }

    #[test]
    fn a_class_without_its_object_is_ours_by_name_only() {
        let none = classes(&[]);
        assert!(is_ours(&ingress(Some("weft"), &[]), &none, &on(false)));
        assert!(is_ours(&ingress(Some("nginx"), &[]), &none, &on(true)));
        assert!(!is_ours(&ingress(Some("edge"), &[]), &none, &on(true)));
        assert!(!is_ours(&ingress(None, &[]), &none, &on(true)));
        let ours = classes(&[("weft", CONTROLLER, true)]);
        assert!(is_ours(&ingress(None, &[]), &ours, &on(false)), "the default class is ours");
    }

    #[test]
    fn only_what_an_ingress_of_ours_names_in_its_own_namespace_is_read() {
        let secret = |name: &str| format!("{ANNOTATION_PREFIX}{name}");
        let (auth, tls, headers) =
            (secret("auth-secret"), secret("auth-tls-secret"), secret("custom-headers"));
        let annotations =
            [(auth.as_str(), "users"), (tls.as_str(), "kube-system/admin"), (headers.as_str(), "default/h")];
        let objects = |class| {
            let one = ingress(Some(class), &annotations);
            Arc::new([(one.key.clone(), Arc::new(one))].into())
        };
        let key = |name| NamespacedName::new("default", name);
        assert_eq!(
            references(&objects("weft"), &classes(&[]), &on(false)),
            BTreeSet::from([
                Reference::Secret(key("tls")),
                Reference::Secret(key("users")),
                Reference::ConfigMap(key("h"))
            ])
        );
        assert!(references(&objects("other"), &classes(&[]), &on(false)).is_empty());
    }

    #[test]
    fn what_a_secret_holds_is_not_printed() {
        let data = Data(BTreeMap::from([("tls.key".to_owned(), Bytes(b"private".to_vec()))]));
        assert_eq!(format!("{:?}", Answer::Found(data)), "Found({\"tls.key\"})");
    }
}
