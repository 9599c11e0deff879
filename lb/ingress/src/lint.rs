//! What would become of Ingresses here: a verdict for each, whoever's they are now. Pure; `weft lint` prints it.

use std::collections::BTreeMap;
use std::sync::Arc;

use weft_model::ingress::CLASS_ANNOTATION;
use weft_model::{NamespacedName, ObjectRef, Problem, Reason, Snapshot};
use weft_netstack::reconcile::Planner;

use crate::annotations::{Severity, parse};
use crate::plan::IngressPlanner;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Word {
    /// As with ingress-nginx.
    Works,
    /// It routes, and something is not the same.
    Differs,
    /// It routes, and something that is written there changes nothing.
    Loses,
    /// Something in it is wrong.
    Wrong,
}

impl std::fmt::Display for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Works => "works",
            Self::Differs => "works with a difference",
            Self::Loses => "works without what is named",
            Self::Wrong => "needs correction",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub ingress: NamespacedName,
    pub word: Word,
    /// A sentence each.
    pub lines: Vec<String>,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Ingress {}: {}", self.ingress, self.word)?;
        self.lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// One verdict an Ingress, in the order of their names. With `whole_cluster`, what an Ingress refers to and is not there is
/// wrong; a file alone does not hold it.
pub fn lint(snapshot: &Snapshot, whole_cluster: bool) -> Vec<Verdict> {
    let adopted = adopted(snapshot);
    let planned = IngressPlanner::default().plan(&adopted);
    let mut verdicts: BTreeMap<NamespacedName, Verdict> = BTreeMap::new();
    for ingress in adopted.ingresses.values() {
        let notes = parse(&ingress.annotations).findings;
        let notes = notes.iter().filter(|finding| finding.severity == Severity::Note);
        let lines: Vec<String> = notes.map(|finding| finding.sentence()).collect();
        let word = if lines.is_empty() { Word::Works } else { Word::Differs };
        verdicts.insert(ingress.key.clone(), Verdict { ingress: ingress.key.clone(), word, lines });
    }
    let relevant = |problem: &&Problem| whole_cluster || problem.reason != Reason::Missing;
    for problem in snapshot.problems.iter().chain(&planned.problems).filter(relevant) {
        let ObjectRef { kind, namespace, name } = &problem.object;
        if kind != "Ingress" {
            continue;
        }
        let key = NamespacedName::new(namespace, name);
        let unread = || Verdict { ingress: key.clone(), word: Word::Works, lines: Vec::new() };
        let verdict = verdicts.entry(key.clone()).or_insert_with(unread);
        let word = if problem.reason == Reason::NotSupported { Word::Loses } else { Word::Wrong };
        verdict.word = verdict.word.max(word);
        verdict.lines.push(problem.message.clone());
    }
    verdicts.into_values().collect()
}

/// The same objects, with every Ingress ours.
fn adopted(snapshot: &Snapshot) -> Snapshot {
    const OURS: &str = "weft.network/lint";
    let mut config = (*snapshot.config).clone();
    config.ingress.on = true;
    config.ingress.classes.insert(OURS.to_owned());
    let ingresses = snapshot.ingresses.iter().map(|(key, ingress)| {
        let mut ingress = (**ingress).clone();
        ingress.annotations.remove(CLASS_ANNOTATION);
        ingress.class = Some(OURS.to_owned());
        (key.clone(), Arc::new(ingress))
    });
    Snapshot { config: Arc::new(config), ingresses: Arc::new(ingresses.collect()), ..snapshot.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::plan::tests::snapshot;

    fn ingress(name: &str, annotation: Option<(&str, &str)>) -> Value {
        let annotations: serde_json::Map<String, Value> = annotation
            .map(|(key, value)| (format!("nginx.ingress.kubernetes.io/{key}"), json!(value)))
            .into_iter()
            .collect();
        json!({"kind": "Ingress",
            "metadata": {"name": name, "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": annotations},
            "spec": {"ingressClassName": "anything", "rules": [{"host": format!("{name}.example"), "http": {"paths": [
                {"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 80}}}}]}}]}})
    }

    #[test]
    fn every_ingress_has_a_verdict_whatever_its_class() {
        let verdicts = lint(
            &snapshot(vec![
                ingress("plain", None),
                ingress("digest", Some(("proxy-body-size", "10MB"))),
                ingress("snippet", Some(("server-snippet", "x"))),
                ingress("balance", Some(("load-balance", "ewma"))),
                ingress("guide", Some(("rate-limit", "1"))),
            ]),
            false,
        );
        let words: Vec<(&str, Word)> = verdicts.iter().map(|it| (&*it.ingress.name, it.word)).collect();
        assert_eq!(
            words,
            [
                ("balance", Word::Differs),
                ("digest", Word::Wrong),
                ("guide", Word::Loses),
                ("plain", Word::Works),
                ("snippet", Word::Loses)
            ]
        );
        assert!(
            verdicts[2].to_string().contains("the nearest real one is nginx.ingress.kubernetes.io/limit-rps")
        );
    }

    #[test]
    fn what_a_cluster_lacks_is_wrong_only_where_the_cluster_is_known() {
        let documents = || vec![ingress("plain", None)];
        assert_eq!(lint(&snapshot(documents()), false)[0].word, Word::Works);
        let known = lint(&snapshot(documents()), true);
        assert_eq!(known[0].word, Word::Wrong);
        assert!(known[0].lines[0].contains("there is no Service default/web"));
    }
}
