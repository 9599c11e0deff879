use tokio::sync::watch;
use weft_model::NodeName;

use super::*;
use crate::reconcile::{Applied, Applier, Loop, Pace, Planner, Trust};

struct Still;

impl Planner for Still {
    type Plan = ();

    fn plan(&mut self, _snapshot: &Snapshot) -> weft_model::Planned<()> {
        weft_model::Planned::new((), Vec::new())
    }
}

impl Applier for Still {
    type Plan = ();

    async fn apply(&mut self, _plan: &(), _trust: Trust) -> Applied {
        Applied::default()
    }
}

fn admin(obstacles: &[&str]) -> Admin {
    let obstacles: Vec<String> = obstacles.iter().map(ToString::to_string).collect();
    let (_tx, snapshot_rx) = watch::channel(None);
    let (_run, handle) = Loop::new("proxy", Still, Still, Pace::default(), snapshot_rx.clone());
    Admin {
        node: NodeName::from("a"),
        version: "0",
        loops: vec![handle],
        snapshot_rx,
        obstacles: Box::new(move || obstacles.clone()),
        api_server: Box::new(|| "connected".to_owned()),
        parts: vec![("leases", Box::new(|| 3.into()))],
        counters: vec![counters("dns_queries"), counters("coredns_dns_responses")],
        collectors: vec![],
        texts: vec![Box::new(|| "# TYPE beside gauge\nbeside 1\n".to_owned()), Box::new(String::new)],
    }
}

fn counters(name: &'static str) -> Counters {
    let read = || vec![("noerror", 7), ("nxdomain", 2)];
    Counters { name, help: "Queries answered", label: "rcode", read: Box::new(read) }
}

#[test]
fn a_node_is_not_ready_before_every_loop_has_applied() {
    let status = admin(&[]).status();
    assert!(!status.ready);
    assert_eq!(status.reasons, ["proxy: no Snapshot applied yet"]);
    assert_eq!(status.parts.get("leases"), Some(&3.into()));
}

#[test]
fn metrics_carry_every_loop_and_counter() {
    let text = metrics::encode(&admin(&[])).unwrap();
    assert!(text.contains("weft_loop_generation{loop=\"proxy\"} 0"), "{text}");
    assert!(text.contains("weft_dns_queries_total{rcode=\"nxdomain\"} 2"), "{text}");
    assert!(text.contains("\ncoredns_dns_responses_total{rcode=\"noerror\"} 7"), "{text}");
    assert!(text.ends_with("beside 1\n# EOF\n"), "{text}");
    assert_eq!(text.matches("# EOF").count(), 1);
}

#[tokio::test]
async fn what_keeps_pods_away_stands_alone_and_is_told_by_readyz() {
    let admin = Arc::new(admin(&["Node a has no podCIDR", "the API server is too old"]));
    assert_eq!(admin.status().reasons, ["Node a has no podCIDR", "the API server is too old"]);
    let answer = readyz(State(admin)).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body = axum::body::to_bytes(answer.into_body(), 1000).await.unwrap();
    assert_eq!(body, "Node a has no podCIDR\nthe API server is too old\n");
}
