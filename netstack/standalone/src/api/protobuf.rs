//! Bodies in the Kubernetes protobuf encoding, for the kinds that kubectl creates through its typed clients
//! (`kubectl create namespace|configmap|secret|service|serviceaccount`), which send nothing else. Pure.
//! In: bytes: `k8s\0` and a `runtime.Unknown` (`k8s.io/apimachinery/pkg/runtime/generated.proto`). Out: JSON.
//! Field numbers: `generated.proto` of `k8s.io/api/core/v1` and `k8s.io/apimachinery`. Other kinds are refused (415).

use base64::Engine as _;
use serde_json::{Map, Value, json};

#[derive(Clone, Copy)]
enum Field {
    Text,
    Texts,
    Number,
    Flag,
    TextMap,
    BytesMap,
    Message(Schema),
    Messages(Schema),
    IntOrString,
}

type Schema = &'static [(u64, &'static str, Field)];

const METADATA: Schema = &[
    (1, "name", Field::Text),
    (2, "generateName", Field::Text),
    (3, "namespace", Field::Text),
    (5, "uid", Field::Text),
    (6, "resourceVersion", Field::Text),
    (11, "labels", Field::TextMap),
    (12, "annotations", Field::TextMap),
    (14, "finalizers", Field::Texts),
];
const NAMESPACE: Schema = &[(1, "metadata", Field::Message(METADATA))];
const CONFIG_MAP: Schema = &[
    (1, "metadata", Field::Message(METADATA)),
    (2, "data", Field::TextMap),
    (3, "binaryData", Field::BytesMap),
    (4, "immutable", Field::Flag),
];
const SECRET: Schema = &[
    (1, "metadata", Field::Message(METADATA)),
    (2, "data", Field::BytesMap),
    (3, "type", Field::Text),
    (4, "stringData", Field::TextMap),
    (5, "immutable", Field::Flag),
];
const SERVICE_ACCOUNT: Schema =
    &[(1, "metadata", Field::Message(METADATA)), (4, "automountServiceAccountToken", Field::Flag)];
const SERVICE: Schema =
    &[(1, "metadata", Field::Message(METADATA)), (2, "spec", Field::Message(SERVICE_SPEC))];
const SERVICE_SPEC: Schema = &[
    (1, "ports", Field::Messages(SERVICE_PORT)),
    (2, "selector", Field::TextMap),
    (3, "clusterIP", Field::Text),
    (4, "type", Field::Text),
    (5, "externalIPs", Field::Texts),
    (7, "sessionAffinity", Field::Text),
    (8, "loadBalancerIP", Field::Text),
    (9, "loadBalancerSourceRanges", Field::Texts),
    (10, "externalName", Field::Text),
    (11, "externalTrafficPolicy", Field::Text),
    (12, "healthCheckNodePort", Field::Number),
    (13, "publishNotReadyAddresses", Field::Flag),
    (17, "ipFamilyPolicy", Field::Text),
    (18, "clusterIPs", Field::Texts),
    (19, "ipFamilies", Field::Texts),
    (20, "allocateLoadBalancerNodePorts", Field::Flag),
    (21, "loadBalancerClass", Field::Text),
    (22, "internalTrafficPolicy", Field::Text),
    (23, "trafficDistribution", Field::Text),
];
const SERVICE_PORT: Schema = &[
    (1, "name", Field::Text),
    (2, "protocol", Field::Text),
    (3, "port", Field::Number),
    (4, "targetPort", Field::IntOrString),
    (5, "nodePort", Field::Number),
    (6, "appProtocol", Field::Text),
];

/// The object, or `None` when the bytes are damaged or of a kind that is not in the table.
pub(super) fn decode(bytes: &[u8]) -> Option<Value> {
    let envelope = fields(bytes.strip_prefix(b"k8s\0")?)?;
    let type_meta = fields(block(&envelope, 1)?)?;
    let text = |number| block(&type_meta, number).and_then(|it| std::str::from_utf8(it).ok());
    let (version, kind) = (text(1)?, text(2)?);
    let schema = match (version, kind) {
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Secret") => SECRET,
        ("v1", "ServiceAccount") => SERVICE_ACCOUNT,
        ("v1", "Service") => SERVICE,
        _ => return None,
    };
    let mut object = message(block(&envelope, 2)?, schema)?;
    object["apiVersion"] = json!(version);
    object["kind"] = json!(kind);
    Some(object)
}

enum Wire<'a> {
    Varint(u64),
    Block(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The fields of one message in their order.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Wire<'_>)>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let wire = match tag & 7 {
            0 => Wire::Varint(varint(&mut bytes)?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (block, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Wire::Block(block)
            }
            _ => return None,
        };
        fields.push((tag >> 3, wire));
    }
    Some(fields)
}

fn block<'a>(fields: &[(u64, Wire<'a>)], number: u64) -> Option<&'a [u8]> {
    fields.iter().find_map(|(it, wire)| match wire {
        Wire::Block(block) if *it == number => Some(*block),
        _ => None,
    })
}

/// Empty texts and zero numbers are what Go writes for "not said": they are left out.
fn message(bytes: &[u8], schema: Schema) -> Option<Value> {
    let mut object = Map::new();
    for (number, wire) in fields(bytes)? {
        let Some((_, name, field)) = schema.iter().find(|(it, ..)| *it == number) else { continue };
        put(&mut object, name, *field, &wire)?;
    }
    Some(Value::Object(object))
}

fn put(object: &mut Map<String, Value>, name: &str, field: Field, wire: &Wire<'_>) -> Option<()> {
    let list = |object: &mut Map<String, Value>, item: Value| {
        if let Some(items) = object.entry(name).or_insert_with(|| json!([])).as_array_mut() {
            items.push(item);
        }
    };
    match (field, wire) {
        (Field::Text, Wire::Block([])) | (Field::Number, Wire::Varint(0)) => {}
        (Field::Text, Wire::Block(bytes)) => {
            object.insert(name.to_owned(), json!(std::str::from_utf8(bytes).ok()?));
        }
        (Field::Number, Wire::Varint(number)) => {
            object.insert(name.to_owned(), json!(number.cast_signed()));
        }
        (Field::Flag, Wire::Varint(flag)) => {
            object.insert(name.to_owned(), json!(*flag != 0));
        }
        (Field::Texts, Wire::Block(bytes)) => list(object, json!(std::str::from_utf8(bytes).ok()?)),
        (Field::Message(schema), Wire::Block(bytes)) => {
            object.insert(name.to_owned(), message(bytes, schema)?);
        }
        (Field::Messages(schema), Wire::Block(bytes)) => list(object, message(bytes, schema)?),
        (Field::IntOrString, Wire::Block(bytes)) => {
            let union = message(bytes, &[(2, "number", Field::Number), (3, "text", Field::Text)])?;
            if let Some(value) = union.get("text").or(union.get("number")) {
                object.insert(name.to_owned(), value.clone());
            }
        }
        (Field::TextMap | Field::BytesMap, Wire::Block(bytes)) => {
            let entry = fields(bytes)?;
            let key = std::str::from_utf8(block(&entry, 1).unwrap_or_default()).ok()?;
            let value = block(&entry, 2).unwrap_or_default();
            let value = match field {
                Field::BytesMap => base64::engine::general_purpose::STANDARD.encode(value),
                _ => std::str::from_utf8(value).ok()?.to_owned(),
            };
            let map = object.entry(name).or_insert_with(|| json!({}));
            map[key] = json!(value);
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_map_is_read_and_damage_is_refused() {
        let raw = b"\x0a\x03\x0a\x01a\x12\x06\x0a\x01k\x12\x01v";
        let mut bytes = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12".to_vec();
        bytes.push(u8::try_from(raw.len()).unwrap());
        bytes.extend_from_slice(raw);
        let expected =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}});
        assert_eq!(decode(&bytes), Some(expected));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]).filter(|it| it["data"].is_object()), None, "cut at {length}");
        }
    }
}
