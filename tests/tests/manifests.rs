//! What is installed names exactly the verbs that the code uses.

#![allow(clippy::unwrap_used, reason = "a test's set-up fails the test")]

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

type Access = BTreeMap<(String, String), BTreeSet<String>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    verbs: Vec<String>,
}

fn granted() -> Access {
    let mut access = Access::new();
    for document in serde_yaml_ng::Deserializer::from_str(weft_manifests::RBAC) {
        let object = serde_yaml_ng::Value::deserialize(document).unwrap();
        if object.get("kind").and_then(|kind| kind.as_str()) != Some("ClusterRole") {
            continue;
        }
        let rules: Vec<Rule> = serde_yaml_ng::from_value(object.get("rules").unwrap().clone()).unwrap();
        for rule in rules {
            for group in &rule.api_groups {
                for resource in &rule.resources {
                    access
                        .entry((group.clone(), resource.clone()))
                        .or_default()
                        .extend(rule.verbs.iter().cloned());
                }
            }
        }
    }
    access
}

/// What `netstack::kube` does: a watch lists first; the own Node's annotations are written with a merge patch.
fn used() -> Access {
    let watched = [
        ("", "nodes"),
        ("", "namespaces"),
        ("", "services"),
        ("", "pods"),
        ("discovery.k8s.io", "endpointslices"),
    ];
    let mut access: Access = watched
        .into_iter()
        .map(|(group, resource)| {
            ((group.into(), resource.into()), BTreeSet::from(["list".into(), "watch".into()]))
        })
        .collect();
    access.entry((String::new(), "nodes".into())).or_default().insert("patch".into());
    access
}

#[test]
fn the_cluster_role_names_exactly_the_verbs_used() {
    assert_eq!(granted(), used());
}
