//! The two shapes of an Event: `v1` (stored) and `events.k8s.io/v1`. Pure renaming both ways, as the API server converts.

use serde_json::{Value, json};

use crate::resources::{self, Resource};

/// Field names in `v1` and in `events.k8s.io/v1`.
const NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// A stored object in the shape of the resource that was asked for.
pub(super) fn to_wire(resource: &Resource, mut stored: Value) -> Value {
    if resource.is_converted() {
        rename(&mut stored, NAMES.into_iter());
        stored["apiVersion"] = json!(resource.api_version());
    }
    stored
}

/// An object of any resource in the shape it is stored in.
pub(super) fn from_wire(resource: &Resource, mut sent: Value) -> Value {
    if resource.is_converted() {
        rename(&mut sent, NAMES.into_iter().map(|(core, wire)| (wire, core)));
    }
    if let Some(shape) = resources::stored(resource.collection()) {
        sent["apiVersion"] = json!(shape.api_version());
        sent["kind"] = json!(shape.kind);
    }
    sent
}

fn rename(object: &mut Value, names: impl Iterator<Item = (&'static str, &'static str)>) {
    let Some(fields) = object.as_object_mut() else { return };
    for (from, to) in names {
        if let Some(value) = fields.remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reads_the_same_after_both_conversions() {
        let wire = resources::find("events.k8s.io", "v1", "events").unwrap();
        let sent = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "regarding": {"name": "a"}, "note": "n"});
        let stored = from_wire(wire, sent.clone());
        assert_eq!(
            stored,
            json!({"apiVersion": "v1", "kind": "Event", "involvedObject": {"name": "a"}, "message": "n"})
        );
        assert_eq!(to_wire(wire, stored), sent);
    }
}
