//! Golden stories: `golden/STORY/cluster.yaml` is real Kubernetes YAML; what node `node-a` plans for it stands beside it.
//! `WEFT_GOLDEN=update cargo test -p weft-tests --test golden` writes the files anew; read the difference before you commit it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Deserialize;
use weft_model::node_facts::WireguardBackend;
use weft_model::snapshot::{AttachedPod, Attachments};
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, Problem, ProxyConfig, Snapshot};
use weft_netstack::kube::Cluster;
use weft_netstack::policy::PolicyPlanner;
use weft_netstack::proxy::ProxyPlanner;
use weft_netstack::reconcile::Planner;

fn snapshot(cluster: &Path) -> Result<Snapshot> {
    let text = fs::read_to_string(cluster)?;
    let documents: Vec<serde_json::Value> = serde_yaml_ng::Deserializer::from_str(&text)
        .map(serde_json::Value::deserialize)
        .collect::<Result<_, _>>()?;
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse()?, "fd00:244::/56".parse()?],
        service_cidrs: vec!["10.96.0.0/16".parse()?, "fd00:96::/112".parse()?],
        cluster_dns: vec!["10.96.0.10".parse()?, "fd00:96::a".parse()?],
        proxy: ProxyConfig {
            external_ip_ranges: vec!["198.51.100.64/26".parse()?, "192.0.2.0/24".parse()?],
            node_port_ranges: vec![],
        },
        ..ClusterConfig::default()
    };
    let name = NodeName::from("node-a");
    let cluster = Cluster::from_documents(documents);
    let facts = NodeFacts {
        name,
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let snapshot = cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts));
    Ok(Snapshot { attachments: attachments(&snapshot), ..snapshot })
}

/// CNI has attached every pod of the node where the API shows it.
fn attachments(snapshot: &Snapshot) -> Attachments {
    let here = snapshot.pods.values().filter(|pod| pod.node.as_ref() == Some(&snapshot.facts.name));
    let attached = here.flat_map(|pod| {
        let attached = Arc::new(AttachedPod { pod: Some(pod.key.clone()), uid: String::new() });
        pod.ips.iter().map(move |ip| (*ip, attached.clone()))
    });
    Arc::new(attached.collect())
}

/// File name and expected content of everything planned for one story.
fn plan(snapshot: &Snapshot) -> Vec<(&'static str, String)> {
    let proxy = ProxyPlanner::default().plan(snapshot);
    let policy = PolicyPlanner::default().plan(snapshot);
    let problems = snapshot.problems.iter().chain(&proxy.problems).chain(&policy.problems);
    let problems: Vec<String> = problems.map(Problem::to_string).collect();
    let mut files = vec![("nft.txt", proxy.plan.table.to_string()), ("problems.txt", lines(&problems))];
    if !snapshot.policies.is_empty() {
        files.push(("policy.txt", policy.plan.table.to_string()));
    }
    files
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn stories() -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut stories = Vec::new();
    for entry in fs::read_dir(folder)? {
        stories.push(entry?.path());
    }
    stories.sort();
    Ok(stories)
}

#[test]
fn every_story_plans_what_stands_beside_it() -> Result<()> {
    let update = std::env::var("WEFT_GOLDEN").is_ok_and(|value| value == "update");
    let mut different = Vec::new();
    let stories = stories()?;
    assert!(!stories.is_empty());
    for story in stories {
        let snapshot = snapshot(&story.join("cluster.yaml")).with_context(|| story.display().to_string())?;
        for (name, planned) in plan(&snapshot) {
            let file = story.join(name);
            if update {
                fs::write(&file, &planned)?;
            } else if fs::read_to_string(&file).unwrap_or_default() != planned {
                different.push(format!("{}:\n{planned}", file.display()));
            }
        }
    }
    assert!(different.is_empty(), "planned now, unlike the files:\n{}", different.join("\n"));
    Ok(())
}
