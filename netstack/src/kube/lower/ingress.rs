//! Lowering of Ingress, IngressClass, and what Ingresses refer to. A rule or path that cannot be read is left out and named; the others route on.

use base64::Engine as _;
use serde_json::Value;
use weft_model::NamespacedName;
use weft_model::ingress::{
    BackendPort, Bytes, Data, Ingress, IngressBackend, IngressClass, IngressPath, IngressRule, IngressTls,
    PathType, Reference,
};

use super::{Lowered, Notes, key, lower};
use crate::kube::wire;

/// Annotation of the IngressClass that Ingresses without a class get.
const DEFAULT_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";
/// What no planner reads and may be large.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

pub fn ingress_class(document: &Value) -> Lowered<IngressClass> {
    lower("IngressClass", document, |wire: wire::IngressClass, _| {
        let annotations = wire.metadata.annotations.unwrap_or_default();
        Some(IngressClass {
            name: wire.metadata.name,
            controller: wire.spec.controller.unwrap_or_default(),
            is_default: annotations.get(DEFAULT_CLASS).is_some_and(|value| value == "true"),
        })
    })
}

pub fn ingress(document: &Value) -> Lowered<Ingress> {
    lower("Ingress", document, |wire: wire::Ingress, notes| {
        let meta = wire.metadata;
        let spec = wire.spec;
        let shown = wire.status.load_balancer.and_then(|status| status.ingress).unwrap_or_default();
        let mut annotations = meta.annotations.clone().unwrap_or_default();
        annotations.remove(LAST_APPLIED);
        let default = spec.default_backend.filter(|it| it.service.is_some() || it.resource.is_some());
        Some(Ingress {
            key: key(&meta),
            created: notes.created(meta.creation_timestamp.as_deref()),
            uid: meta.uid.unwrap_or_default(),
            annotations,
            class: spec.ingress_class_name.filter(|name| !name.is_empty()),
            default_backend: default.and_then(|it| backend("spec.defaultBackend", it, notes)),
            tls: tls(spec.tls.unwrap_or_default(), notes),
            rules: rules(spec.rules.unwrap_or_default(), notes),
            status: shown
                .into_iter()
                .filter_map(|one| one.ip.or(one.hostname).filter(|it| !it.is_empty()))
                .collect(),
        })
    })
}

fn tls(list: Vec<wire::IngressTls>, notes: &mut Notes) -> Vec<IngressTls> {
    let lowered = list.into_iter().enumerate().map(|(i, tls)| IngressTls {
        hosts: tls
            .hosts
            .unwrap_or_default()
            .iter()
            .enumerate()
            .filter_map(|(j, host)| self::host(&format!("spec.tls[{i}].hosts[{j}]"), host, notes))
            .collect(),
        secret: tls.secret_name.filter(|name| !name.is_empty()),
    });
    lowered.collect()
}

fn rules(list: Vec<wire::IngressRule>, notes: &mut Notes) -> Vec<IngressRule> {
    let mut rules = Vec::new();
    for (i, rule) in list.into_iter().enumerate() {
        let field = format!("spec.rules[{i}]");
        let text = rule.host.filter(|host| !host.is_empty());
        let host = match text {
            None => None,
            Some(text) => match self::host(&format!("{field}.host"), &text, notes) {
                Some(host) => Some(host),
                None => continue,
            },
        };
        let paths = rule.http.and_then(|http| http.paths).unwrap_or_default();
        let paths = paths.into_iter().enumerate();
        let lowered =
            paths.filter_map(|(j, path)| self::path(&format!("{field}.http.paths[{j}]"), path, notes));
        rules.push(IngressRule { host, paths: lowered.collect() });
    }
    rules
}

/// A DNS name in lower case, whose first label may be `*`.
fn host(field: &str, text: &str, notes: &mut Notes) -> Option<String> {
    let host = text.to_ascii_lowercase();
    let name = host.strip_prefix("*.").unwrap_or(&host);
    let label = |label: &str| {
        let legal = label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (1..=63).contains(&label.len()) && legal && !label.starts_with('-') && !label.ends_with('-')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        notes.invalid(format!(
            "{field} {text:?} is no host name; write one such as shop.example.com, or *.example.com for every name with \
             one more label"
        ));
        return None;
    }
    Some(host)
}

fn path(field: &str, path: wire::IngressPath, notes: &mut Notes) -> Option<IngressPath> {
    let kind = match path.path_type.as_deref() {
        Some("Exact") => PathType::Exact,
        Some("Prefix") => PathType::Prefix,
        Some("ImplementationSpecific") => PathType::ImplementationSpecific,
        other => {
            let said = other.unwrap_or_default();
            notes.invalid(format!(
                "{field}.pathType {said:?} is unknown; use Exact, Prefix or ImplementationSpecific"
            ));
            return None;
        }
    };
    let text = path.path.unwrap_or_default();
    if !text.starts_with('/') && (kind != PathType::ImplementationSpecific || !text.is_empty()) {
        notes.invalid(format!("{field}.path {text:?} does not begin with /; write the whole path"));
        return None;
    }
    Some(IngressPath {
        kind,
        path: text,
        backend: backend(&format!("{field}.backend"), path.backend, notes)?,
    })
}

fn backend(field: &str, backend: wire::IngressBackend, notes: &mut Notes) -> Option<IngressBackend> {
    if let Some(resource) = backend.resource {
        let name = |text: Option<String>| text.unwrap_or_default();
        return Some(IngressBackend::Resource(format!("{}/{}", name(resource.kind), name(resource.name))));
    }
    let service = backend.service.filter(|service| !service.name.is_empty());
    let Some(service) = service else {
        notes.invalid(format!("{field}.service.name is empty; name the Service that answers"));
        return None;
    };
    let port = service.port.unwrap_or_default();
    let port = match (port.name.filter(|name| !name.is_empty()), port.number) {
        (Some(name), _) => BackendPort::Name(name),
        (None, Some(number)) => {
            BackendPort::Number(notes.port(&format!("{field}.service.port.number"), number)?)
        }
        (None, None) => {
            notes.invalid(format!("{field}.service.port is empty; give its number or its name"));
            return None;
        }
    };
    Some(IngressBackend::Service { name: service.name, port })
}

/// A Secret or ConfigMap under the name by which Ingresses refer to it; nothing for another kind. A value of a Secret that
/// is no base64 is left out: the API server lets none in.
pub fn referred(document: &Value) -> Option<(Reference, Data)> {
    let text = |field: &str| document["metadata"][field].as_str().unwrap_or_default();
    let key = NamespacedName::new(text("namespace"), text("name"));
    let values = |field: &str| document[field].as_object().into_iter().flatten();
    let decode = |value: &Value| base64::engine::general_purpose::STANDARD.decode(value.as_str()?).ok();
    let encoded =
        |field| values(field).filter_map(|(name, value)| Some((name.clone(), Bytes(decode(value)?))));
    let plain =
        |field| values(field).filter_map(|(name, value)| Some((name.clone(), Bytes(value.as_str()?.into()))));
    match document["kind"].as_str()? {
        "Secret" => {
            Some((Reference::Secret(key), Data(encoded("data").chain(plain("stringData")).collect())))
        }
        "ConfigMap" => {
            Some((Reference::ConfigMap(key), Data(plain("data").chain(encoded("binaryData")).collect())))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
