//! Manifests to what the lab creates: workload kinds become pods, bound to nodes in turn; all else stays as it is.
//! Pure: parsed YAML documents and the nodes in, objects and notes for the user out.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};

/// Label on every pod that a workload was expanded to: `deployment.NAME`.
pub(super) const OWNER_LABEL: &str = "lab.weft.network/owner";
/// Annotation with a hash of the template, so that an unchanged pod is left alone.
pub(super) const TEMPLATE_ANNOTATION: &str = "lab.weft.network/template";

/// A node that pods can be bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeChoice {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
}

/// A workload that became pods.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Expanded {
    /// `Deployment/web`.
    pub(super) title: String,
    pub(super) namespace: String,
    /// Value of the owner label.
    pub(super) owner: String,
    pub(super) pods: Vec<Value>,
}

/// One document of a manifest, ready to be applied.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Object(Value),
    Workload(Expanded),
}

/// Parses a YAML file of several documents; a `List` counts as its items, an empty document as none.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut documents = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let value = Value::deserialize(document).with_context(|| format!("document {}", index + 1))?;
        if value.is_null() {
            continue;
        }
        let is_list = value["kind"].as_str().is_some_and(|kind| kind == "List");
        match value["items"].as_array() {
            Some(items) if is_list => documents.extend(items.iter().cloned()),
            _ => documents.push(value),
        }
    }
    for document in &documents {
        for field in ["apiVersion", "kind"] {
            if !document[field].is_string() {
                bail!("a document without {field}");
            }
        }
        if !document["metadata"]["name"].is_string() {
            bail!("{} without metadata.name", document["kind"].as_str().unwrap_or_default());
        }
    }
    Ok(documents)
}

/// Binds pods to nodes in turn, over all workloads of one call.
pub(super) struct Binder<'a> {
    nodes: &'a [NodeChoice],
    next: usize,
}

impl<'a> Binder<'a> {
    pub(super) fn new(nodes: &'a [NodeChoice]) -> Self {
        Self { nodes, next: 0 }
    }

    /// Nodes that the pod's `nodeSelector` allows.
    fn allowed(&self, spec: &Value) -> Vec<&'a NodeChoice> {
        let selector = spec["nodeSelector"].as_object();
        let matches = |node: &&NodeChoice| {
            selector.is_none_or(|wanted| {
                wanted.iter().all(|(key, value)| node.labels.get(key).map(String::as_str) == value.as_str())
            })
        };
        self.nodes.iter().filter(matches).collect()
    }

    fn bind(&mut self, pod: &mut Value) -> anyhow::Result<()> {
        if pod["spec"]["nodeName"].is_string() {
            return Ok(());
        }
        let allowed = self.allowed(&pod["spec"]);
        if allowed.is_empty() {
            bail!("no node has the labels of nodeSelector {}", pod["spec"]["nodeSelector"]);
        }
        pod["spec"]["nodeName"] = json!(allowed[self.next % allowed.len()].name);
        self.next += 1;
        Ok(())
    }
}

/// `absent` where the field is not there or null.
fn count(value: &Value, field: &str, absent: usize) -> anyhow::Result<usize> {
    if value.is_null() {
        return Ok(absent);
    }
    let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
    count.with_context(|| format!("{field} is {value}: give a whole number, 0 or more"))
}

/// Expands one document. Kinds that make pods later or from outside (CronJob) are refused by name.
pub(super) fn expand(document: Value, binder: &mut Binder<'_>) -> anyhow::Result<Item> {
    let kind = document["kind"].as_str().unwrap_or_default().to_owned();
    let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let spec = &document["spec"];
    let count = |field: &str| count(&spec[field], &format!("spec.{field}"), 1);
    let item = match kind.as_str() {
        "Pod" => {
            let mut pod = document;
            let hash = hash_of(&pod["spec"]);
            pod["metadata"]["annotations"][TEMPLATE_ANNOTATION] = json!(hash);
            binder.bind(&mut pod)?;
            return Ok(Item::Object(pod));
        }
        "Deployment" | "ReplicaSet" | "ReplicationController" => numbered(
            &document,
            &(1..=count("replicas")?).map(|i| format!("{name}-{i}")).collect::<Vec<_>>(),
            binder,
        ),
        "Job" => {
            let total = count(if spec["completions"].is_null() { "parallelism" } else { "completions" })?;
            numbered(&document, &(1..=total).map(|i| format!("{name}-{i}")).collect::<Vec<_>>(), binder)
        }
        "StatefulSet" => stateful(&document, &name, count("replicas")?, binder),
        "DaemonSet" => one_each(&document, &name, binder),
        "CronJob" => bail!("the lab does not run CronJobs"),
        _ => return Ok(Item::Object(document)),
    };
    item.map(|pods| {
        Item::Workload(Expanded {
            title: format!("{kind}/{name}"),
            namespace: namespace_of(&document),
            owner: owner_of(&kind, &name),
            pods,
        })
    })
    .with_context(|| format!("{kind}/{name}"))
}

/// Kinds that `expand` turns into pods.
pub(super) fn is_workload(kind: &str) -> bool {
    matches!(
        kind,
        "Deployment" | "ReplicaSet" | "ReplicationController" | "Job" | "StatefulSet" | "DaemonSet"
    )
}

pub(super) fn owner_of(kind: &str, name: &str) -> String {
    format!("{}.{name}", kind.to_lowercase())
}

pub(super) fn namespace_of(document: &Value) -> String {
    document["metadata"]["namespace"].as_str().unwrap_or("default").to_owned()
}

fn numbered(document: &Value, names: &[String], binder: &mut Binder<'_>) -> anyhow::Result<Vec<Value>> {
    names
        .iter()
        .map(|name| {
            let mut pod = pod_of(document, name)?;
            binder.bind(&mut pod)?;
            Ok(pod)
        })
        .collect()
}

/// StatefulSet: ordinals from `spec.ordinals.start`, stable host names, the governing Service as subdomain.
fn stateful(
    document: &Value,
    name: &str,
    replicas: usize,
    binder: &mut Binder<'_>,
) -> anyhow::Result<Vec<Value>> {
    let start = count(&document["spec"]["ordinals"]["start"], "spec.ordinals.start", 0)?;
    (start..start + replicas)
        .map(|ordinal| {
            let pod_name = format!("{name}-{ordinal}");
            let mut pod = pod_of(document, &pod_name)?;
            pod["spec"]["hostname"] = json!(pod_name);
            if let Some(service) = document["spec"]["serviceName"].as_str() {
                pod["spec"]["subdomain"] = json!(service);
            }
            pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] = json!(pod_name);
            pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = json!(ordinal.to_string());
            binder.bind(&mut pod)?;
            Ok(pod)
        })
        .collect()
}

fn one_each(document: &Value, name: &str, binder: &mut Binder<'_>) -> anyhow::Result<Vec<Value>> {
    binder
        .allowed(&document["spec"]["template"]["spec"])
        .into_iter()
        .map(|node| {
            let mut pod = pod_of(document, &format!("{name}-{}", node.name))?;
            pod["spec"]["nodeName"] = json!(node.name);
            Ok(pod)
        })
        .collect()
}

/// The pod template under a name, labelled with its owner.
fn pod_of(document: &Value, name: &str) -> anyhow::Result<Value> {
    let template = &document["spec"]["template"];
    if !template["spec"]["containers"].is_array() {
        bail!("spec.template.spec.containers is missing");
    }
    let kind = document["kind"].as_str().unwrap_or_default();
    let owner = document["metadata"]["name"].as_str().unwrap_or_default();
    let mut metadata = json!({ "name": name, "namespace": namespace_of(document) });
    for field in ["labels", "annotations"] {
        metadata[field] = template["metadata"][field].clone();
        if metadata[field].is_null() {
            metadata[field] = json!({});
        }
    }
    metadata["labels"][OWNER_LABEL] = json!(owner_of(kind, owner));
    metadata["annotations"][TEMPLATE_ANNOTATION] = json!(hash_of(template));
    Ok(json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"] }))
}

/// Object keys of `Value` are sorted, so equal templates have equal text.
fn hash_of(value: &Value) -> String {
    let mut hasher = DefaultHasher::new();
    value.to_string().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Vec<NodeChoice> {
        ["node1", "node2", "node3"]
            .map(|name| NodeChoice {
                name: name.to_owned(),
                labels: BTreeMap::from([("kubernetes.io/hostname".to_owned(), name.to_owned())]),
            })
            .to_vec()
    }

    fn pods(text: &str) -> Vec<Value> {
        let nodes = nodes();
        let mut binder = Binder::new(&nodes);
        let mut pods = Vec::new();
        for document in parse(text).unwrap() {
            match expand(document, &mut binder).unwrap() {
                Item::Workload(expanded) => pods.extend(expanded.pods),
                Item::Object(object) => pods.push(object),
            }
        }
        pods
    }

    fn names_and_nodes(pods: &[Value]) -> Vec<(&str, &str)> {
        pods.iter()
            .map(|pod| {
                (pod["metadata"]["name"].as_str().unwrap(), pod["spec"]["nodeName"].as_str().unwrap_or("-"))
            })
            .collect()
    }

    #[test]
    fn a_deployment_becomes_pods_on_the_nodes_in_turn_with_the_templates_labels() {
        let pods = pods(
            "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {replicas: 4, \
             template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: x}]}}}}",
        );
        let expected = [("web-1", "node1"), ("web-2", "node2"), ("web-3", "node3"), ("web-4", "node1")];
        assert_eq!(names_and_nodes(&pods), expected);
        assert_eq!(pods[0]["metadata"]["labels"], json!({ "app": "web", OWNER_LABEL: "deployment.web" }));
    }

    #[test]
    fn a_count_that_is_no_number_is_refused_by_its_field() {
        for (kind, spec, said) in [
            (
                "Deployment",
                "{replicas: twelve}",
                "spec.replicas is \"twelve\": give a whole number, 0 or more",
            ),
            ("StatefulSet", "{replicas: -1}", "spec.replicas is -1: give a whole number, 0 or more"),
            (
                "StatefulSet",
                "{ordinals: {start: 1.5}}",
                "spec.ordinals.start is 1.5: give a whole number, 0 or more",
            ),
            ("Job", "{completions: [2]}", "spec.completions is [2]: give a whole number, 0 or more"),
        ] {
            let document =
                parse(&format!("{{apiVersion: v1, kind: {kind}, metadata: {{name: a}}, spec: {spec}}}"));
            let nodes = nodes();
            let expanded = expand(document.unwrap().remove(0), &mut Binder::new(&nodes));
            let refused = expanded.err().map(|error| error.root_cause().to_string());
            assert_eq!(refused.as_deref(), Some(said), "{kind}");
        }
    }

    #[test]
    fn a_statefulset_gives_its_pods_ordinals_host_names_and_the_governing_service() {
        let pods = pods(
            "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: db, namespace: shop}, spec: {replicas: 2, \
             serviceName: data, template: {spec: {containers: [{name: c}]}}}}",
        );
        assert_eq!(names_and_nodes(&pods), [("db-0", "node1"), ("db-1", "node2")]);
        assert_eq!(pods[1]["spec"]["hostname"], "db-1");
        assert_eq!(pods[1]["spec"]["subdomain"], "data");
        assert_eq!(pods[1]["metadata"]["namespace"], "shop");
    }

    #[test]
    fn a_daemonset_becomes_one_pod_a_node_that_its_selector_allows() {
        let manifest = |selector: &str| {
            format!(
                "{{apiVersion: apps/v1, kind: DaemonSet, metadata: {{name: d}}, spec: {{template: {{spec: \
                 {{{selector} containers: [{{name: c}}]}}}}}}}}"
            )
        };
        assert_eq!(pods(&manifest("")).len(), 3);
        let one = pods(&manifest("nodeSelector: {kubernetes.io/hostname: node2},"));
        assert_eq!(names_and_nodes(&one), [("d-node2", "node2")]);
    }

    #[test]
    fn a_changed_template_changes_the_hash_and_an_unchanged_one_does_not() {
        let hash = |image: &str| {
            let pods = pods(&format!(
                "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: a}}, spec: {{template: {{spec: \
                 {{containers: [{{name: c, image: {image}}}]}}}}}}}}"
            ));
            pods[0]["metadata"]["annotations"][TEMPLATE_ANNOTATION].clone()
        };
        assert_eq!(hash("a"), hash("a"));
        assert_ne!(hash("a"), hash("b"));
    }

    #[test]
    fn a_pod_whose_selector_no_node_has_is_refused_with_the_selector() {
        let nodes = nodes();
        let document = parse(
            "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {nodeSelector: {disk: ssd}, containers: []}}",
        );
        let error = expand(document.unwrap().remove(0), &mut Binder::new(&nodes)).unwrap_err();
        assert!(error.to_string().contains("disk"), "{error}");
    }

    #[test]
    fn documents_lists_comments_and_empty_documents_are_read_in_order() {
        let text = "# nothing\n---\n{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Service, \
                    metadata: {name: a}}]}\n---\n---\n{apiVersion: v1, kind: Service, metadata: {name: b}}\n";
        let names: Vec<Value> =
            parse(text).unwrap().iter().map(|one| one["metadata"]["name"].clone()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_manifest_without_a_name_is_refused() {
        assert!(parse("{apiVersion: v1, kind: Service, metadata: {}}").is_err());
    }
}
