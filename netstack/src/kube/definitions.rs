//! Makes the CustomResourceDefinitions that Weft reads where a cluster has none of that name, and leaves all others as they are:
//! a user's own, of whatever version, is never changed and never removed. The holder of the Lease does it.

use std::sync::Arc;
use std::time::Duration;

use kube::api::PostParams;
use kube::core::Request;
use serde_json::Value;

use super::client::Access;
use super::lease::Lead;

/// Until the next try after one that failed, and between two looks at the Lease.
const AGAIN: Duration = Duration::from_secs(5);

/// Runs as long as the agent; does its work once.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn ensure(access: Arc<Access>, lead: Lead, definitions: Vec<Value>) -> Result<(), String> {
    let mut missing = definitions;
    while !missing.is_empty() {
        tokio::time::sleep(AGAIN).await;
        if !lead.is_held() {
            continue;
        }
        let mut failed = Vec::new();
        for definition in missing {
            let name = definition["metadata"]["name"].as_str().unwrap_or_default();
            match access.ask(async |client| create(&client, &definition).await).await {
                Ok(true) => tracing::info!(name, "made the CustomResourceDefinition"),
                Ok(false) => {}
                Err(failure) => {
                    tracing::debug!(?failure, name, "make the CustomResourceDefinition");
                    failed.push(definition);
                }
            }
        }
        missing = failed;
    }
    std::future::pending().await
}

/// False when it is there already, or when the server knows no such definitions (our embedded one serves the kinds itself).
async fn create(client: &kube::Client, definition: &Value) -> Result<bool, kube::Error> {
    let all = Request::new("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
    let request = all.create(&PostParams::default(), definition.to_string().into_bytes());
    match client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error),
    }
}
