//! The ring and its filter, Events as values; names are tried with real packets beside the policies.

use std::net::IpAddr;

use super::*;
use crate::policy::Direction;

fn end(address: &str, pod: Option<&str>) -> End {
    End { address: address.parse::<IpAddr>().unwrap(), pod: pod.map(str::to_owned) }
}

fn denied(source: &str, port: u16) -> Record {
    Record {
        time: "2026-01-02T03:04:05.006Z".to_owned(),
        verdict: Verdict::Denied,
        source: end(source, Some("shop/client")),
        destination: end("10.244.1.5", Some("store/db")),
        protocol: "tcp".to_owned(),
        port,
        service: Some("store/db".to_owned()),
        direction: Some(Direction::Ingress),
        decided_by: "ingress of store/db: isolated by store/deny, no rule allows it".to_owned(),
    }
}

fn allowed(port: u16) -> Record {
    let verdict = Verdict::Allowed;
    Record { verdict, direction: None, decided_by: "no policy".to_owned(), ..denied("10.244.1.9", port) }
}

fn ports(page: &Page) -> Vec<u16> {
    page.flows.iter().map(|record| record.port).collect()
}

#[test]
fn the_ring_stays_below_its_bound_and_keeps_the_latest() {
    let mut ring = Ring::default();
    let sixty_thousand = 1..=60_000u16;
    for port in sixty_thousand {
        ring.push(denied("10.244.1.9", port));
        ring.push(allowed(port));
        assert!(ring.bytes() < 10_000_000, "unused room included: {}", ring.bytes());
    }
    let all = ring.page(&Query::default());
    assert!(all.flows.len() > 8_000, "{}", all.flows.len());
    assert_eq!(all.flows.last().unwrap().port, 60_000);
    let numbers: Vec<u16> = ports(&all);
    assert!(numbers.is_sorted(), "oldest first, both verdicts mixed");
}

#[test]
fn a_crowd_of_allowed_flows_does_not_push_out_what_was_denied() {
    let mut ring = Ring::default();
    ring.push(denied("10.244.1.9", 1));
    for _ in 0..60_000 {
        ring.push(allowed(2));
    }
    let query = Query { verdict: Some(Verdict::Denied), ..Query::default() };
    assert_eq!(ports(&ring.page(&query)), [1]);
}

#[test]
fn each_filter_counts_and_all_must_hold() {
    let mut ring = Ring::default();
    ring.push(denied("10.244.1.9", 1));
    ring.push(allowed(2));
    ring.push(Record { source: end("203.0.113.9", None), ..denied("10.244.1.9", 3) });
    let found = |query: Query| ports(&ring.page(&query));
    let given = Query::default;
    assert_eq!(found(given()), [1, 2, 3]);
    assert_eq!(found(Query { pod: Some("store/db".into()), ..given() }), [1, 2, 3]);
    assert_eq!(found(Query { pod: Some("shop/client".into()), ..given() }), [1, 2]);
    assert_eq!(found(Query { pod: Some("shop/cli".into()), ..given() }), [] as [u16; 0]);
    assert_eq!(found(Query { namespace: Some("shop".into()), ..given() }), [1, 2]);
    assert_eq!(found(Query { namespace: Some("sho".into()), ..given() }), [] as [u16; 0]);
    assert_eq!(found(Query { verdict: Some(Verdict::Denied), ..given() }), [1, 3]);
    assert_eq!(found(Query { port: Some(3), ..given() }), [3]);
    assert_eq!(found(Query { port: Some(3), verdict: Some(Verdict::Allowed), ..given() }), [] as [u16; 0]);
    assert_eq!(found(Query { last: Some(2), ..given() }), [2, 3]);
}

#[test]
fn following_gives_each_flow_once_and_survives_a_new_agent() {
    let mut ring = Ring::default();
    ring.push(denied("10.244.1.9", 1));
    let first = ring.page(&Query::default());
    ring.push(denied("10.244.1.9", 2));
    let next = ring.page(&Query { after: Some(first.last), ..Query::default() });
    assert_eq!(ports(&next), [2]);
    assert_eq!(ports(&ring.page(&Query { after: Some(next.last), ..Query::default() })), [] as [u16; 0]);
    let mut of_next_life = Ring::default();
    of_next_life.push(denied("10.244.1.9", 9));
    assert_eq!(ports(&of_next_life.page(&Query { after: Some(next.last), ..Query::default() })), [9]);
}

#[test]
fn the_pod_whose_policies_deny_is_told_with_the_other_end_and_the_policy() {
    let now = Instant::now();
    let notice = Teller::default().notice(&denied("10.244.1.9", 80), now).unwrap();
    assert_eq!(notice.object.to_string(), "Pod store/db");
    assert_eq!(notice.reason, "PolicyDenied");
    assert_eq!(
        notice.message,
        "ingress from shop/client (10.244.1.9) (Service store/db), tcp port 80, is denied: ingress of store/db: isolated by \
         store/deny, no rule allows it; `weft policy explain` says more"
    );
    let egress = Record { direction: Some(Direction::Egress), ..denied("10.244.1.9", 80) };
    let notice = Teller::default().notice(&egress, now).unwrap();
    assert_eq!(notice.object.to_string(), "Pod shop/client");
}

#[test]
fn events_of_denials_are_few() {
    let mut teller = Teller::default();
    let start = Instant::now();
    let told = |teller: &mut Teller, port, seconds| {
        teller.notice(&denied("10.244.1.9", port), start + Duration::from_secs(seconds)).is_some()
    };
    assert!(told(&mut teller, 1, 0));
    assert!(!told(&mut teller, 2, 0), "one a second");
    assert!(told(&mut teller, 2, 1));
    assert!(!told(&mut teller, 1, 599), "the same only after ten minutes");
    assert!(told(&mut teller, 1, 601));
    assert!(teller.notice(&allowed(3), start + Duration::from_secs(700)).is_none());
}

#[tokio::test(start_paused = true)]
async fn no_more_than_a_thousand_are_taken_in_a_second() {
    let begin = Instant::now();
    let mut pace = Pace::default();
    for _ in 0..100 {
        pace.take(100).await;
    }
    let seconds = begin.elapsed().as_secs();
    assert!((9..=10).contains(&seconds), "{seconds}");
}
