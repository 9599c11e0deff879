//! What happens to an object between the request and the store: schema, defaults, rules, allocation. All pure; time and
//! randomness come in as [`Ambient`]. In: the object as sent, the stored one, the [`View`]. Out: the object to store, or why not.

mod defaults;
pub(crate) mod ranges;
mod rules;
mod schema;
mod service;
mod validate;
mod validate_network;

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Value, json};

pub(crate) use defaults::apply as apply_defaults;
pub(crate) use schema::{Strictness, decode};

use crate::object;
use crate::resources::Resource;
use crate::status::{ApiError, Cause};
use crate::store::View;

/// The world as one request sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ambient {
    pub(crate) now: Timestamp,
    /// Fresh random bits: uids, generated names, where allocation starts to look.
    pub(crate) random: u128,
}

impl Ambient {
    pub(crate) fn sample() -> Self {
        Self { now: Timestamp::now(), random: rand::random() }
    }

    /// RFC 3339 in whole seconds, as `metav1.Time`.
    pub(crate) fn time(&self) -> String {
        self.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// A random (version 4) UUID.
    pub(crate) fn uid(&self) -> String {
        let bits = (self.random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
        let hex = format!("{bits:032x}");
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// Five characters of the alphabet that Kubernetes uses for generated names (no vowels, no look-alikes).
    pub(crate) fn suffix(&self) -> String {
        const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
        let mut bits = self.random;
        (0..5)
            .map(|_| {
                let index = (bits % ALPHABET.len() as u128) as usize;
                bits /= ALPHABET.len() as u128;
                char::from(ALPHABET[index])
            })
            .collect()
    }
}

/// The ranges that addresses of Services come from, in the order of the cluster's families.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) service_cidrs: Vec<IpNet>,
}

/// Which part of an object a write is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Main,
    Status,
}

/// A new object, ready to be stored; its name is final.
///
/// # Errors
/// 422 with every wrong field.
pub(crate) fn admit_new(
    resource: &Resource,
    namespace: &str,
    mut object: Value,
    ambient: &Ambient,
) -> Result<Value, ApiError> {
    let prefix = object::text(&object, &["metadata", "generateName"]).to_owned();
    if object::name(&object).is_empty() && !prefix.is_empty() {
        // Kubernetes cuts the prefix so that the whole name has at most 63 characters.
        let prefix: String = prefix.chars().take(58).collect();
        object::set(&mut object, &["metadata", "name"], json!(format!("{prefix}{}", ambient.suffix())));
    }
    for field in
        ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields", "resourceVersion"]
    {
        object::remove(&mut object, &["metadata", field]);
    }
    if resource.namespaced {
        object::set(&mut object, &["metadata", "namespace"], json!(namespace));
    }
    object::set(&mut object, &["metadata", "uid"], json!(ambient.uid()));
    object::set(&mut object, &["metadata", "creationTimestamp"], json!(ambient.time()));
    if object::at(&object, &["spec"]).is_some() {
        object::set(&mut object, &["metadata", "generation"], json!(1));
    }
    defaults::initial_status(resource, &mut object);
    Ok(object)
}

/// Name, metadata and the kind's own rules.
///
/// # Errors
/// 422 with every wrong field.
pub(crate) fn check(resource: &Resource, object: &Value) -> Result<(), ApiError> {
    let causes = validate::causes(resource, object);
    refuse(resource, object, causes)
}

fn refuse(resource: &Resource, object: &Value, causes: Vec<Cause>) -> Result<(), ApiError> {
    if causes.is_empty() { Ok(()) } else { Err(ApiError::invalid(resource, object::name(object), causes)) }
}

/// Gives a Service its addresses and ports; other kinds pass.
///
/// # Errors
/// 422 when an address or port asked for cannot be had, 500 when a range is used up.
pub(crate) fn allocate(
    resource: &Resource,
    object: &mut Value,
    stored: Option<&Value>,
    view: &View,
    policy: &Policy,
    ambient: &Ambient,
) -> Result<(), ApiError> {
    if resource.collection() == "services" {
        let causes = service::allocate(object, stored, view, policy, ambient.random);
        refuse(resource, object, causes)?;
    }
    Ok(())
}

/// What an update of `stored` by `sent` means: fields no client may change are kept, the other part is kept,
/// the generation counts changes of anything but metadata and status.
///
/// # Errors
/// 422 for a change of what may not change.
pub(crate) fn admit_update(
    resource: &Resource,
    part: Part,
    stored: &Value,
    mut object: Value,
) -> Result<Value, ApiError> {
    keep_system_metadata(stored, &mut object);
    if resource.status {
        match part {
            Part::Main => object::put(&mut object, &["status"], stored.get("status").cloned()),
            Part::Status => object = with_status_of(stored, &object),
        }
    }
    if part == Part::Main {
        rules::carry_over(resource, stored, &mut object);
    }
    refuse(resource, stored, rules::immutable(resource, stored, &object))?;
    if object::at(&object, &["metadata", "generation"]).is_some() && content(stored) != content(&object) {
        let generation = object::at(stored, &["metadata", "generation"]).and_then(Value::as_u64).unwrap_or(0);
        object::set(&mut object, &["metadata", "generation"], json!(generation + 1));
    }
    Ok(object)
}

fn keep_system_metadata(stored: &Value, object: &mut Value) {
    const KEPT: [&str; 8] = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
    ];
    for field in KEPT {
        object::put(object, &["metadata", field], object::at(stored, &["metadata", field]).cloned());
    }
    for field in ["selfLink", "managedFields"] {
        object::remove(object, &["metadata", field]);
    }
}

/// The stored object with the status (and the labels, annotations and finalizers) of the one sent.
fn with_status_of(stored: &Value, sent: &Value) -> Value {
    let mut object = stored.clone();
    object::put(&mut object, &["status"], sent.get("status").cloned());
    for field in ["labels", "annotations", "finalizers"] {
        object::put(&mut object, &["metadata", field], object::at(sent, &["metadata", field]).cloned());
    }
    object
}

/// Everything whose change counts as a new generation.
fn content(object: &Value) -> Vec<(&String, &Value)> {
    let fields = object.as_object().into_iter().flatten();
    fields.filter(|(key, _)| !matches!(key.as_str(), "metadata" | "status" | "apiVersion" | "kind")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ambient(random: u128) -> Ambient {
        Ambient { now: Timestamp::UNIX_EPOCH, random }
    }

    #[test]
    fn uids_are_version_four_and_names_have_the_kubernetes_alphabet() {
        assert_eq!(ambient(0).uid(), "00000000-0000-4000-8000-000000000000");
        assert_eq!(ambient(u128::MAX).uid(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(ambient(0).suffix(), "bbbbb");
        assert_eq!(ambient(0).time(), "1970-01-01T00:00:00Z");
    }

    #[test]
    fn a_status_write_leaves_the_spec_and_a_main_write_leaves_the_status() {
        let pods = crate::resources::find("", "v1", "pods").unwrap();
        let stored = json!({"metadata": {"name": "a", "generation": 1}, "spec": {"nodeName": "n"}, "status": {"phase": "Pending"}});
        let sent =
            json!({"metadata": {"name": "a"}, "spec": {"nodeName": "other"}, "status": {"phase": "Running"}});
        let status = admit_update(pods, Part::Status, &stored, sent).unwrap();
        assert_eq!(status["spec"]["nodeName"], "n");
        assert_eq!(status["status"]["phase"], "Running");
        assert_eq!(status["metadata"]["generation"], 1);
        let sent = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 5}, "status": {"phase": "Failed"}});
        let main = admit_update(pods, Part::Main, &stored, sent).unwrap();
        assert_eq!(main["status"]["phase"], "Pending");
        assert_eq!(main["metadata"]["generation"], 2);
    }
}
