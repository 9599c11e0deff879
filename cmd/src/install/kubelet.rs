//! The API server's address as the kubelet of this node knows it.
//!
//! In: the kubelet's kubeconfig. Out: the `server:` of its current context.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

/// Where kubelets have it: k3s and rke2, kubeadm, others. The first that exists counts.
const KUBECONFIGS: [&str; 4] = [
    "/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
    "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/kubeconfig",
];

/// An API server and the file that named it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) url: String,
    pub(super) path: PathBuf,
}

/// Reads the first kubeconfig that exists.
pub(super) fn find() -> anyhow::Result<Found> {
    for path in KUBECONFIGS.map(Path::new) {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let url = server(&text).with_context(|| format!("{}; give --api-server", path.display()))?;
                return Ok(Found { url, path: path.to_owned() });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    bail!(
        "the API server is not named, and the kubelet's kubeconfig is in none of {}; give --api-server or --kubeconfig",
        KUBECONFIGS.join(", ")
    )
}

#[derive(Deserialize)]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
    #[serde(default, rename = "current-context")]
    current_context: String,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
struct Cluster {
    server: String,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
}

/// `server:` of the current context's cluster, or of the only cluster where no context is current.
fn server(text: &str) -> anyhow::Result<String> {
    let config: Kubeconfig = serde_yaml_ng::from_str(text).context("not a kubeconfig")?;
    let context = config.contexts.iter().find(|context| context.name == config.current_context);
    let cluster = match context {
        Some(context) => config.clusters.iter().find(|cluster| cluster.name == context.context.cluster),
        None if config.current_context.is_empty() && config.clusters.len() == 1 => config.clusters.first(),
        None => None,
    };
    let cluster = cluster.context("its current-context leads to no cluster")?;
    ensure!(!cluster.cluster.server.is_empty(), "the server of cluster {} is empty", cluster.name);
    Ok(cluster.cluster.server.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kubeadm writes it, shortened.
    const KUBEADM: &str = "
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: AAAA
    server: https://192.0.2.10:6443
  name: kubernetes
- cluster: {server: https://192.0.2.99:6443}
  name: other
contexts:
- context: {cluster: other, user: x}
  name: other
- context:
    cluster: kubernetes
    user: system:node:n1
  name: system:node:n1@kubernetes
current-context: system:node:n1@kubernetes
kind: Config
users:
- name: system:node:n1
  user: {client-certificate: /var/lib/kubelet/pki/kubelet-client-current.pem}
";

    #[test]
    fn the_current_contexts_server_is_taken() {
        assert_eq!(server(KUBEADM).unwrap(), "https://192.0.2.10:6443");
        let k3s = "clusters: [{name: local, cluster: {server: 'https://127.0.0.1:6444'}}]\n\
                   contexts: [{name: Default, context: {cluster: local}}]\ncurrent-context: Default\n";
        assert_eq!(server(k3s).unwrap(), "https://127.0.0.1:6444");
        let without_context = "clusters: [{name: a, cluster: {server: 'https://a'}}]";
        assert_eq!(server(without_context).unwrap(), "https://a");
    }

    #[test]
    fn what_names_no_server_is_refused() {
        for text in [
            "",
            "[]",
            "clusters: []",
            "clusters: [{name: a, cluster: {server: ''}}]",
            "clusters: [{name: a, cluster: {server: x}}]\ncurrent-context: b",
            &KUBEADM.replace("    cluster: kubernetes", "    cluster: gone"),
        ] {
            assert!(server(text).is_err(), "{text}");
        }
    }
}
