//! A server on loopback for a test, and clients for it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses its part

use std::net::TcpListener;
use std::path::Path;

use kube::Client;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;
use weft_standalone::{Config, Server};

pub fn config(directory: &Path) -> Config {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = Config::new(directory, vec![listener]);
    config.cluster_cidrs = vec!["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()];
    config.service_cidrs = vec!["10.96.0.0/16".parse().unwrap(), "fd00:10:96::/112".parse().unwrap()];
    config.advertise_addresses = vec!["192.0.2.1".parse().unwrap()];
    config
}

pub struct World {
    pub server: Server,
    pub client: Client,
    pub directory: tempfile::TempDir,
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        change(&mut config);
        let server = Server::start(config).unwrap();
        let client = client(&server, server.admin_token()).await;
        Self { server, client, directory }
    }

    pub fn kubeconfig(&self) -> std::path::PathBuf {
        let path = self.directory.path().join("kubeconfig");
        self.server.write_kubeconfig(&path, self.server.addresses()[0], self.server.admin_token()).unwrap();
        path
    }

    /// Sends a request; returns the code and the JSON body.
    pub async fn http(&self, method: &str, path: &str, content_type: &str, body: &str) -> (u16, Value) {
        send(&self.client, method, path, content_type, body).await
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.http("GET", path, "application/json", "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.http("POST", path, "application/json", &body.to_string()).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        self.http("PUT", path, "application/json", &body.to_string()).await
    }
}

pub async fn client(server: &Server, token: &str) -> Client {
    let text = server.kubeconfig(server.addresses()[0], token);
    let kubeconfig = Kubeconfig::from_yaml(&text).unwrap();
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

pub async fn send(client: &Client, method: &str, path: &str, content_type: &str, body: &str) -> (u16, Value) {
    let request = axum::http::Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content_type)
        .body(Body::from(body.as_bytes().to_vec()))
        .unwrap();
    let response = client.send(request).await.unwrap();
    let code = response.status().as_u16();
    let bytes = response.into_body().collect_bytes().await.unwrap();
    (
        code,
        serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into())),
    )
}

/// Asks until it is so, at most ten seconds.
pub async fn eventually<F: Future<Output = Option<T>>, T>(what: &str, mut ask: impl FnMut() -> F) -> T {
    for _ in 0..200 {
        if let Some(answer) = ask().await {
            return answer;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}
