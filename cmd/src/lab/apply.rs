//! `weft lab apply` and `delete`: the objects of manifests through the API server, workloads as lab pods. An object
//! that fails does not stop the others; the command fails in the end.

use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::api;
use super::expand::{self, Binder, Item, NodeChoice, OWNER_LABEL, TEMPLATE_ANNOTATION};

/// So long a deleted pod may take until its name is free.
const DELETE_LIMIT: Duration = Duration::from_secs(15);

fn read(files: &[String]) -> anyhow::Result<Vec<Value>> {
    let mut documents = Vec::new();
    for file in files {
        let text = match file.as_str() {
            "-" => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("read standard input")?;
                text
            }
            path => std::fs::read_to_string(path).with_context(|| format!("read {path}"))?,
        };
        documents.extend(expand::parse(&text).with_context(|| format!("parse {file}"))?);
    }
    Ok(documents)
}

pub(super) fn apply_files(files: &[String]) -> anyhow::Result<()> {
    apply(read(files)?)
}

/// Applies parsed documents; prints a line an object.
pub(super) fn apply(documents: Vec<Value>) -> anyhow::Result<()> {
    api::ask(async |client| {
        let nodes = node_choices(&client).await?;
        let mut binder = Binder::new(&nodes);
        let mut failed = 0;
        for document in documents {
            let title = title_of(&document);
            let outcome = match expand::expand(document, &mut binder) {
                Ok(Item::Object(object)) => apply_object(&client, object).await.map(str::to_owned),
                Ok(Item::Workload(workload)) => apply_workload(&client, workload).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(what) => say!("{title} {what}"),
                Err(error) => {
                    failed += 1;
                    eprintln!("{title} failed: {error:#}");
                }
            }
        }
        if failed > 0 {
            bail!("{failed} failed, the rest is applied");
        }
        Ok(())
    })
}

/// Makes the objects that are not there yet; those that are stay as somebody may have changed them.
pub(super) fn ensure(documents: Vec<Value>) -> anyhow::Result<()> {
    api::ask(async |client| {
        for document in documents {
            let title = title_of(&document);
            let api = api_of(&client, &document).await?;
            let name = document["metadata"]["name"].as_str().unwrap_or_default();
            let there =
                api.get_opt(name).await.map_err(api::brief).with_context(|| format!("get {title}"))?;
            if there.is_none() {
                create(&api, document).await.with_context(|| format!("make {title}"))?;
            }
        }
        Ok(())
    })
}

pub(super) fn delete_files(files: &[String]) -> anyhow::Result<()> {
    let documents = read(files)?;
    api::ask(async |client| {
        let mut failed = 0;
        for document in documents.iter().rev() {
            match delete(&client, document).await {
                Ok(what) => say!("{} {what}", title_of(document)),
                Err(error) => {
                    failed += 1;
                    eprintln!("{} failed: {error:#}", title_of(document));
                }
            }
        }
        if failed > 0 {
            bail!("{failed} failed, the rest is deleted");
        }
        Ok(())
    })
}

fn title_of(document: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text(&document["kind"]).to_lowercase(), text(&document["metadata"]["name"]))
}

async fn node_choices(client: &Client) -> anyhow::Result<Vec<NodeChoice>> {
    let nodes = Api::<Node>::all(client.clone())
        .list(&ListParams::default())
        .await
        .map_err(api::brief)
        .context("list nodes")?;
    let mut choices: Vec<NodeChoice> = nodes
        .into_iter()
        .map(|node| NodeChoice { name: node.name_any(), labels: node.metadata.labels.unwrap_or_default() })
        .collect();
    choices.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    Ok(choices)
}

/// The API of a document's kind, as the server's discovery names it.
async fn api_of(client: &Client, document: &Value) -> anyhow::Result<Api<DynamicObject>> {
    let version = document["apiVersion"].as_str().unwrap_or_default();
    let kind = document["kind"].as_str().unwrap_or_default();
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let gvk = GroupVersionKind::gvk(group, version, kind);
    let (resource, capabilities): (ApiResource, _) = pinned_kind(client, &gvk)
        .await
        .map_err(api::brief)
        .with_context(|| format!("the API server does not serve {kind} of {}", document["apiVersion"]))?;
    let namespace = expand::namespace_of(document);
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => Api::namespaced_with(client.clone(), &namespace, &resource),
    })
}

async fn apply_object(client: &Client, mut document: Value) -> anyhow::Result<&'static str> {
    let api = api_of(client, &document).await?;
    let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let existing = api.get_opt(&name).await.map_err(api::brief).context("get")?;
    let Some(existing) = existing else {
        create(&api, document).await?;
        return Ok("created");
    };
    let existing = serde_json::to_value(existing)?;
    if document["kind"] == "Pod" {
        return replace_pod(&api, &existing, document).await;
    }
    document["metadata"]["resourceVersion"] = existing["metadata"]["resourceVersion"].clone();
    keep_allocated(&mut document, &existing);
    let object: DynamicObject = serde_json::from_value(document)?;
    api.replace(&name, &PostParams::default(), &object).await.map_err(api::brief).context("replace")?;
    Ok("replaced")
}

async fn create(api: &Api<DynamicObject>, document: Value) -> anyhow::Result<()> {
    let object: DynamicObject = serde_json::from_value(document)?;
    api.create(&PostParams::default(), &object).await.map_err(api::brief).context("create").map(drop)
}

/// A Service keeps the addresses it was given when a manifest does not name any.
fn keep_allocated(document: &mut Value, existing: &Value) {
    if document["kind"] != "Service" || document["spec"]["type"] == "ExternalName" {
        return;
    }
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"] {
        if document["spec"][field].is_null() && !existing["spec"][field].is_null() {
            document["spec"][field] = existing["spec"][field].clone();
        }
    }
}

/// A pod's spec cannot be changed: one with another template is deleted and made anew.
async fn replace_pod(
    api: &Api<DynamicObject>,
    existing: &Value,
    document: Value,
) -> anyhow::Result<&'static str> {
    let template = |pod: &Value| pod["metadata"]["annotations"][TEMPLATE_ANNOTATION].clone();
    let leaving = !existing["metadata"]["deletionTimestamp"].is_null();
    if template(existing) == template(&document) && !leaving {
        return Ok("unchanged");
    }
    let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    delete_and_wait(api, &name).await?;
    create(api, document).await?;
    Ok("replaced")
}

async fn delete_and_wait(api: &Api<DynamicObject>, name: &str) -> anyhow::Result<()> {
    delete_quietly(api, name).await?;
    let deadline = Instant::now() + DELETE_LIMIT;
    while api.get_opt(name).await.map_err(api::brief).context("get")?.is_some() {
        if Instant::now() > deadline {
            bail!("{name} is still there after {} s", DELETE_LIMIT.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Deletes; says whether there was one.
async fn delete_quietly(api: &Api<DynamicObject>, name: &str) -> anyhow::Result<bool> {
    match api.delete(name, &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(api::brief(error)).with_context(|| format!("delete {name}")),
    }
}

/// Brings the pods of a workload to what it says; surplus pods of an earlier size go.
async fn apply_workload(client: &Client, workload: expand::Expanded) -> anyhow::Result<String> {
    let api = pod_api(client, &workload.namespace).await?;
    let wanted: Vec<String> =
        workload.pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect();
    for name in pods_of(&api, &workload.owner).await? {
        if !wanted.contains(&name) {
            delete_quietly(&api, &name).await?;
        }
    }
    let mut unchanged = 0;
    for pod in workload.pods {
        unchanged += usize::from(apply_object(client, pod).await? == "unchanged");
    }
    let changed = wanted.len() - unchanged;
    Ok(format!("expanded to {} lab pods ({changed} new, {unchanged} unchanged)", wanted.len()))
}

async fn pod_api(client: &Client, namespace: &str) -> anyhow::Result<Api<DynamicObject>> {
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": namespace } });
    api_of(client, &pod).await
}

async fn pods_of(api: &Api<DynamicObject>, owner: &str) -> anyhow::Result<Vec<String>> {
    let list = ListParams::default().labels(&format!("{OWNER_LABEL}={owner}"));
    let pods = api.list(&list).await.map_err(api::brief).context("list pods")?;
    let owned = |pod: &DynamicObject| pod.labels().get(OWNER_LABEL).map(String::as_str) == Some(owner);
    Ok(pods.into_iter().filter(owned).map(|pod| pod.name_any()).collect())
}

async fn delete(client: &Client, document: &Value) -> anyhow::Result<String> {
    let kind = document["kind"].as_str().unwrap_or_default();
    let name = document["metadata"]["name"].as_str().unwrap_or_default();
    if expand::is_workload(kind) {
        let api = pod_api(client, &expand::namespace_of(document)).await?;
        let pods = pods_of(&api, &expand::owner_of(kind, name)).await?;
        for pod in &pods {
            delete_quietly(&api, pod).await?;
        }
        return Ok(format!("deleted ({} lab pods)", pods.len()));
    }
    let api = api_of(client, document).await?;
    Ok(if delete_quietly(&api, name).await? { "deleted" } else { "not found" }.to_owned())
}
