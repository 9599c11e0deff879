//! What is applied to a cluster names exactly what the code uses, and its documents name each other.

#![allow(clippy::unwrap_used, reason = "a test's set-up fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde::Deserialize;
use serde_yaml_ng::Value;
use weft_tests::node::{binary, run};

type Access = BTreeMap<(String, String), BTreeSet<String>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    verbs: Vec<String>,
}

fn objects(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text).map(|one| Value::deserialize(one).unwrap()).collect()
}

fn granted() -> Access {
    let mut access = Access::new();
    for object in objects(weft_manifests::RBAC).into_iter().chain(objects(weft_manifests::INGRESS)) {
        if !matches!(object.get("kind").and_then(|kind| kind.as_str()), Some("ClusterRole" | "Role")) {
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

/// What `netstack::kube` does: a watch lists first; what Ingresses refer to is read by its name; the own Node's annotations and one
/// condition are patched; Events are made; the holder of the Lease writes statuses.
fn used() -> Access {
    let watched = [
        ("", "nodes"),
        ("", "configmaps"),
        ("", "namespaces"),
        ("", "services"),
        ("", "pods"),
        ("discovery.k8s.io", "endpointslices"),
        ("networking.k8s.io", "networkpolicies"),
        ("metallb.io", "ipaddresspools"),
        ("metallb.io", "l2advertisements"),
        ("networking.k8s.io", "ingresses"),
        ("networking.k8s.io", "ingressclasses"),
        ("networking.k8s.io", "servicecidrs"),
    ];
    let mut access: Access = watched
        .into_iter()
        .map(|(group, resource)| {
            ((group.into(), resource.into()), BTreeSet::from(["list".into(), "watch".into()]))
        })
        .collect();
    access.entry((String::new(), "nodes".into())).or_default().insert("patch".into());
    access.entry((String::new(), "nodes/status".into())).or_default().insert("patch".into());
    access.entry((String::new(), "events".into())).or_default().insert("create".into());
    access.entry((String::new(), "services/status".into())).or_default().insert("patch".into());
    access.entry(("metallb.io".into(), "ipaddresspools/status".into())).or_default().insert("patch".into());
    for resource in ["secrets", "configmaps"] {
        access.entry((String::new(), resource.into())).or_default().insert("get".into());
    }
    access.entry(("networking.k8s.io".into(), "ingresses/status".into())).or_default().insert("patch".into());
    let slices = access.entry(("discovery.k8s.io".into(), "endpointslices".into())).or_default();
    slices.extend(["create", "update", "delete"].map(str::to_owned));
    let definitions = ("apiextensions.k8s.io".into(), "customresourcedefinitions".into());
    access.entry(definitions).or_default().insert("create".into());
    let lease = access.entry(("coordination.k8s.io".into(), "leases".into())).or_default();
    lease.extend(["get", "create", "update"].map(str::to_owned));
    access
}

#[test]
fn the_cluster_role_names_exactly_the_verbs_used() {
    assert_eq!(granted(), used());
}

/// What `weft manifests` prints, one object a document.
fn printed(flags: &[&str]) -> Vec<Value> {
    let text = run(Command::new(binary()).arg("manifests").args(flags));
    objects(&text)
}

/// The only object of that kind.
fn of_kind(objects: &[Value], kind: &str) -> Value {
    let found: Vec<_> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    found[0].clone()
}

#[test]
fn every_document_is_an_object_and_comes_after_what_it_needs() {
    let objects = printed(&[]);
    let kinds: Vec<_> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        [
            "Namespace",
            "ServiceAccount",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
            "DaemonSet",
            "Service",
        ]
    );
    for object in &objects {
        assert!(object["apiVersion"].is_string() && object["metadata"]["name"].is_string(), "{object:?}");
    }
}

/// Secrets may be read where something is served that refers to them, by name, and nowhere else.
#[test]
fn what_the_ingress_needs_is_printed_where_it_is_on() {
    let of_ingress = |flags: &[&str]| -> Vec<String> {
        let named = |object: &Value| {
            let text = serde_yaml_ng::to_string(object).unwrap();
            (text.contains("weft.network/ingress")
                || text.contains("weft-ingress")
                || text.contains("secrets"))
            .then(|| object["kind"].as_str().unwrap().to_owned())
        };
        printed(flags).iter().filter(|object| object["kind"] != "DaemonSet").filter_map(named).collect()
    };
    assert_eq!(of_ingress(&[]), [""; 0]);
    assert_eq!(
        of_ingress(&["--ingress", "on"]),
        ["IngressClass", "Service", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]
    );
    let service = of_kind(&objects(weft_manifests::INGRESS), "Service");
    let (namespace, name) = weft_model::constants::INGRESS_SERVICE;
    assert_eq!(
        (&service["metadata"]["namespace"], &service["metadata"]["name"]),
        (&namespace.into(), &name.into())
    );
    assert!(service["spec"].get("selector").is_none());
    assert_eq!(service["spec"]["externalTrafficPolicy"], "Local");
    let class = of_kind(&objects(weft_manifests::INGRESS), "IngressClass");
    assert_eq!(class["spec"]["controller"], weft_model::ingress::CONTROLLER);
    for rule in of_kind(&objects(weft_manifests::INGRESS), "ClusterRole")["rules"].as_sequence().unwrap() {
        let text = serde_yaml_ng::to_string(rule).unwrap();
        assert!(!text.contains("secrets") || (text.contains("get") && !text.contains("list")), "{text}");
    }
}

#[test]
fn rights_policy_and_daemonset_speak_of_one_service_account() {
    let objects = printed(&[]);
    let account = of_kind(&objects, "ServiceAccount")["metadata"].clone();
    let (name, namespace) = (account["name"].as_str().unwrap(), account["namespace"].as_str().unwrap());
    assert_eq!(of_kind(&objects, "Namespace")["metadata"]["name"], namespace);
    for binding in objects.iter().filter(|object| object["kind"] == "ClusterRoleBinding") {
        let subject = &binding["subjects"][0];
        assert_eq!((&subject["name"], &subject["namespace"]), (&account["name"], &account["namespace"]));
    }
    let policy = of_kind(&objects, "ValidatingAdmissionPolicy");
    let condition = policy["spec"]["matchConditions"][0]["expression"].as_str().unwrap();
    assert_eq!(
        condition,
        format!("request.userInfo.username == \"system:serviceaccount:{namespace}:{name}\"")
    );
    let daemonset = of_kind(&objects, "DaemonSet");
    assert_eq!(daemonset["metadata"]["namespace"], namespace);
    assert_eq!(daemonset["spec"]["template"]["spec"]["serviceAccountName"], name);
    let binding = of_kind(&objects, "ValidatingAdmissionPolicyBinding");
    assert_eq!(binding["spec"]["policyName"], policy["metadata"]["name"]);
}

/// A rejection that says nothing helps nobody, and a policy that is skipped when it fails protects nobody.
#[test]
fn the_policy_fails_closed_and_every_rejection_has_a_message() {
    let policy = of_kind(&printed(&[]), "ValidatingAdmissionPolicy");
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");
    let validations = policy["spec"]["validations"].as_sequence().unwrap();
    assert!(validations.len() >= 8 && validations.iter().all(|one| one["messageExpression"].is_string()));
}

#[test]
fn what_the_daemonset_mounts_is_what_its_container_reads() {
    let daemonset = of_kind(&printed(&["--image", "registry.example/weft:1"]), "DaemonSet");
    let spec = &daemonset["spec"]["template"]["spec"];
    let container = &spec["containers"][0];
    assert_eq!(container["image"], "registry.example/weft:1");
    assert_eq!(container["args"][0], "install");
    assert_eq!(container["volumeMounts"][0]["mountPath"], "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!((&spec["hostPID"], &spec["hostNetwork"]), (&true.into(), &true.into()));
    let sources = spec["volumes"][0]["projected"]["sources"].as_sequence().unwrap();
    assert_eq!(sources[0]["serviceAccountToken"]["path"], "token");
    assert_eq!(sources[1]["configMap"]["items"][0]["path"], "ca.crt");
}

#[test]
fn the_dns_service_has_the_given_addresses() {
    let flags = ["--cluster-dns", "10.96.0.10,fd00:96::a", "--service-cidr", "10.96.0.0/16,fd00:96::/112"];
    let service = of_kind(&printed(&flags), "Service");
    assert_eq!(
        service["spec"]["clusterIPs"],
        serde_yaml_ng::from_str::<Value>("[10.96.0.10, 'fd00:96::a']").unwrap()
    );
    assert!(service["spec"].get("selector").is_none());
}
