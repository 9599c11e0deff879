//! The API server as an administrator sees it: JSON in, JSON out.

use std::path::Path;
use std::time::{Duration, Instant};

use kube::api::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use serde_json::Value;

/// A client of the embedded API server; every call must succeed.
pub struct Api {
    runtime: tokio::runtime::Runtime,
    client: kube::Client,
}

impl Api {
    /// Waits for the server.
    pub(super) fn connect(kubeconfig: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            if let Some(client) = runtime.block_on(try_connect(kubeconfig)) {
                return Self { runtime, client };
            }
            assert!(Instant::now() < deadline, "the API server did not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `collection` such as `/api/v1/nodes`.
    pub fn create(&self, collection: &str, object: &Value) -> Value {
        let request =
            Request::new(collection).create(&PostParams::default(), object.to_string().into_bytes());
        self.answer(collection, self.client.request(request.expect("a create request")))
    }

    pub fn merge(&self, collection: &str, name: &str, patch: &Value) -> Value {
        let request = Request::new(collection).patch(name, &PatchParams::default(), &Patch::Merge(patch));
        self.answer(name, self.client.request(request.expect("a patch request")))
    }

    pub fn merge_status(&self, collection: &str, name: &str, patch: &Value) -> Value {
        let patch = Patch::Merge(patch);
        let request =
            Request::new(collection).patch_subresource("status", name, &PatchParams::default(), &patch);
        self.answer(name, self.client.request(request.expect("a patch request")))
    }

    pub fn read(&self, collection: &str, name: &str) -> Value {
        let request = Request::new(collection).get(name, &GetParams::default());
        self.answer(name, self.client.request(request.expect("a get request")))
    }

    pub fn list(&self, collection: &str) -> Vec<Value> {
        let request = Request::new(collection).list(&ListParams::default());
        let listed = self.answer(collection, self.client.request(request.expect("a list request")));
        listed["items"].as_array().cloned().unwrap_or_default()
    }

    pub fn delete(&self, collection: &str, name: &str) {
        let request = Request::new(collection).delete(name, &DeleteParams::default());
        self.answer(name, self.client.request(request.expect("a delete request")));
    }

    fn answer(&self, what: &str, request: impl Future<Output = Result<Value, kube::Error>>) -> Value {
        self.runtime.block_on(request).unwrap_or_else(|error| panic!("{what}: {error}"))
    }
}

async fn try_connect(kubeconfig: &Path) -> Option<kube::Client> {
    let config = kube::config::Kubeconfig::read_from(kubeconfig).ok()?;
    let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.ok()?;
    let client = kube::Client::try_from(config).ok()?;
    client.apiserver_version().await.ok().map(|_| client)
}
