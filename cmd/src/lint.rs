//! `weft lint`: what would become of Ingresses here, from files without a cluster or from the agent of this node.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use serde::Deserialize as _;
use weft_ingress::lint::{Verdict, Word, lint};
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, Snapshot};
use weft_netstack::kube::Cluster;

use crate::status::{PATIENCE, ask};

#[derive(Args)]
pub(crate) struct LintArgs {
    /// Manifests; `-` is standard input
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    files: Vec<PathBuf>,
    /// Every Ingress of the cluster, whatever its class, as this node's agent sees it
    #[arg(long)]
    all: bool,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

/// Fails when one Ingress needs correction.
pub(crate) fn run(args: &LintArgs) -> anyhow::Result<()> {
    let text = match args.all {
        true => ask(&args.run_dir, "/ingress/lint", PATIENCE)?,
        false => text(&lint(&snapshot(&args.files)?, false)),
    };
    crate::print(&text)?;
    anyhow::ensure!(!needs_correction(&text), "an Ingress needs correction");
    Ok(())
}

/// A verdict each, and the numbers in the end.
pub(crate) fn text(verdicts: &[Verdict]) -> String {
    let mut text: String = verdicts.iter().map(ToString::to_string).collect();
    let count = |word| verdicts.iter().filter(|verdict| verdict.word == word).count();
    let words = [Word::Works, Word::Differs, Word::Loses, Word::Wrong];
    let counts: Vec<String> = words
        .into_iter()
        .filter(|word| count(*word) > 0)
        .map(|word| format!("{} {word}", count(word)))
        .collect();
    match verdicts.len() {
        0 => text.push_str("There is no Ingress.\n"),
        number => text.push_str(&format!("{number} Ingresses: {}\n", counts.join(", "))),
    }
    text
}

fn needs_correction(text: &str) -> bool {
    let verdict = format!(": {}", Word::Wrong);
    text.lines().any(|line| line.starts_with("Ingress ") && line.ends_with(&verdict))
}

fn snapshot(files: &[PathBuf]) -> anyhow::Result<Snapshot> {
    let mut documents = Vec::new();
    for file in files {
        let text = match file.to_str() {
            Some("-") => std::io::read_to_string(std::io::stdin()).context("read standard input")?,
            _ => std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?,
        };
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let value = serde_json::Value::deserialize(document)
                .with_context(|| format!("{} is no YAML", file.display()))?;
            documents.extend(flattened(value).into_iter().map(completed));
        }
    }
    let config = ClusterConfig::default();
    let facts = NodeFacts {
        name: NodeName("".into()),
        uplinks: Vec::new(),
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: Vec::new(),
        loopback: Default::default(),
        observed: Default::default(),
    };
    Ok(Cluster::from_documents(documents).snapshot(Generation(1), Arc::new(config), Arc::new(facts)))
}

/// The items of a list, as `kubectl get -o yaml` prints one.
fn flattened(value: serde_json::Value) -> Vec<serde_json::Value> {
    match value["items"].as_array() {
        Some(items) if value["kind"].as_str().is_some_and(|kind| kind.ends_with("List")) => items.clone(),
        _ => vec![value],
    }
}

/// A manifest has no time yet, and often no namespace.
fn completed(mut value: serde_json::Value) -> serde_json::Value {
    let Some(metadata) = value.get_mut("metadata").and_then(serde_json::Value::as_object_mut) else {
        return value;
    };
    metadata.entry("namespace").or_insert("default".into());
    metadata.entry("creationTimestamp").or_insert("1970-01-01T00:00:00Z".into());
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_without_a_cluster_has_a_verdict_an_ingress() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ingress.yaml");
        let ingress = |name: &str, annotation: &str| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata:\n  name: {name}\n  annotations: {{{annotation}}}\n\
                 spec:\n  defaultBackend: {{service: {{name: web, port: {{number: 80}}}}}}\n---\n"
            )
        };
        let mistake = r#"nginx.ingress.kubernetes.io/rate-limit: "1""#;
        std::fs::write(&path, format!("{}{}", ingress("a", mistake), "# only a comment\n")).unwrap();
        let text = text(&lint(&snapshot(&[path]).unwrap(), false));
        assert!(text.starts_with("Ingress default/a: works without what is named\n"), "{text}");
        assert!(text.contains("\n1 Ingresses: 1 works without what is named\n"), "{text}");
        assert!(!needs_correction(&text) && needs_correction("Ingress a/b: needs correction\n"));
    }
}
