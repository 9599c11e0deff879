//! `meta.k8s.io/v1 Table`: what `kubectl get` prints. Pure but for the clock that ages are counted from.
//! In: stored objects. Out: columns and rows, with the columns of the real API server's printers.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{events, read, table_cells};
use crate::object;
use crate::resources::Resource;
use crate::store::Stored;

/// A column: name, type, and 0 for always or 1 for `-o wide`.
pub(super) type Column = (&'static str, &'static str, u8);

/// A Table of objects; `columns` says whether its definitions are wanted (a watch sends them once).
pub(super) fn of(
    resource: &Resource,
    objects: &[Arc<Stored>],
    include_object: &str,
    metadata: &Value,
    columns: bool,
) -> Value {
    let now = Timestamp::now();
    let rows: Vec<Value> = objects
        .iter()
        .map(|stored| {
            let object = stored.value();
            let cells = table_cells::cells(resource.collection(), &object, now);
            match include_object {
                "None" => json!({"cells": cells}),
                "Object" => json!({"cells": cells, "object": events::to_wire(resource, object)}),
                _ => json!({"cells": cells, "object": read::partial(&object)}),
            }
        })
        .collect();
    let definitions: Vec<Value> = table_cells::columns(resource.collection())
        .iter()
        .filter(|_| columns)
        .map(|(name, kind, priority)| {
            let format = if *name == "Name" { "name" } else { "" };
            json!({"name": name, "type": kind, "format": format, "description": name, "priority": priority})
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": definitions,
        "rows": rows})
}

/// How long ago a time at a path was, as kubectl writes ages; `<unknown>` without one.
pub(super) fn age(object: &Value, path: &[&str], now: Timestamp) -> String {
    let then: Option<Timestamp> = object::text(object, path).parse().ok();
    then.map_or_else(|| "<unknown>".to_owned(), |it| duration(now.as_second() - it.as_second()))
}

/// Seconds with at most two units (`k8s.io/apimachinery` HumanDuration).
fn duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let pair = |whole: i64, unit: char, rest: i64, small: char| {
        if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}{unit}{rest}{small}") }
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, 'm', seconds % 60, 's'),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, 'h', minutes % 60, 'm'),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(days / 365, 'y', days % 365, 'd'),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_at_most_two_units() {
        let cases = [
            (5, "5s"),
            (125, "2m5s"),
            (660, "11m"),
            (11_000, "3h3m"),
            (90_000, "25h"),
            (200_000, "2d7h"),
            (900_000, "10d"),
        ];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
