//! What a load balancer reads, from KEP-3836 and the Service documentation.

use std::io::{Read as _, Write as _};

use serde_json::Value;

use super::*;

const NOW: &str = "2026-01-01T00:00:10Z";

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn checks(leaving: bool, counts: LocalEndpoints) -> Arc<HealthChecks> {
    let services = BTreeMap::from([(ServiceKey::new("shop", "web"), (31_000, counts))]);
    Arc::new(HealthChecks { node_ips: vec!["127.0.0.1".parse().unwrap()], leaving, services })
}

fn body(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap()
}

#[test]
fn a_node_is_unhealthy_until_its_rules_are_programmed_and_while_they_cannot_be() {
    let health = ProxyHealth::default();
    let statuses = || ["/healthz", "/livez"].map(|path| health.answer(path, at(NOW)).status);
    assert_eq!(statuses(), [503, 503]);
    assert_eq!(body(&health.answer("/livez", at(NOW)))["lastUpdated"], "0001-01-01T00:00:00Z");
    health.programmed(checks(false, LocalEndpoints::default()), at("2026-01-01T00:00:00Z"));
    assert_eq!(statuses(), [200, 200]);
    let expected = json!({"lastUpdated": NOW, "currentTime": NOW, "healthy": true, "nodeEligible": true});
    assert_eq!(body(&health.answer("/healthz", at(NOW))), expected);
    health.failed();
    assert_eq!(statuses(), [503, 503]);
    let expected = json!({"lastUpdated": "2026-01-01T00:00:00Z", "currentTime": NOW, "healthy": false});
    assert_eq!(body(&health.answer("/livez", at(NOW))), expected);
    assert_eq!(health.answer("/metrics", at(NOW)).status, 404);
}

#[test]
fn a_node_that_is_about_to_go_fails_healthz_and_lives() {
    let health = ProxyHealth::default();
    health.programmed(checks(true, LocalEndpoints::default()), at(NOW));
    let answer = health.answer("/healthz", at(NOW));
    assert_eq!((answer.status, body(&answer)["nodeEligible"].clone()), (503, json!(false)));
    assert_eq!(health.answer("/livez", at(NOW)).status, 200);
}

#[test]
fn a_health_check_port_counts_the_endpoints_of_its_family() {
    let health = ProxyHealth::default();
    let web = ServiceKey::new("shop", "web");
    health.programmed(checks(false, LocalEndpoints { ipv4: 2, ipv6: 0 }), at(NOW));
    let v4 = health.answer_for(&web, false);
    let expected = json!({"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": true});
    assert_eq!((v4.status, body(&v4)), (200, expected));
    assert!(v4.headers.contains(&("X-Load-Balancing-Endpoint-Weight", "2".to_owned())));
    assert_eq!(health.answer_for(&web, true).status, 503, "no IPv6 endpoint");
    health.failed();
    let failed = health.answer_for(&web, false);
    assert_eq!((failed.status, body(&failed)["serviceProxyHealthy"].clone()), (503, json!(false)));
}

fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_open_change_hands_and_close_and_one_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let was_free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (free, taken_at) = (was_free.local_addr().unwrap(), taken.local_addr().unwrap());
    drop(was_free);
    let health = Arc::new(ProxyHealth::default());
    let mut ports = HealthPorts::default();
    let counts = LocalEndpoints { ipv4: 1, ipv6: 1 };
    let with = |services: &[(&str, u16)]| {
        let services = services.iter().map(|(name, port)| (ServiceKey::new("shop", *name), (*port, counts)));
        Arc::new(HealthChecks { services: services.collect(), ..(*checks(false, counts)).clone() })
    };
    let both = with(&[("a", free.port()), ("b", taken_at.port())]);
    health.programmed(both.clone(), at(NOW));
    let failed = ports.reconcile(&health, &both).await;
    assert_eq!(failed.len(), 1);
    assert!(failed[0].contains(&format!("Service shop/b cannot answer on {taken_at}")), "{failed:?}");
    assert!(ask(free).unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    drop(taken);
    assert_eq!(ports.reconcile(&health, &both).await, Vec::<String>::new());
    assert!(ask(taken_at).unwrap().contains("\"name\":\"b\""));
    let moved = with(&[("b", free.port())]);
    health.programmed(moved.clone(), at(NOW));
    assert_eq!(ports.reconcile(&health, &moved).await, Vec::<String>::new());
    assert!(ask(free).unwrap().contains("\"name\":\"b\""));
    assert!(ask(taken_at).is_err(), "closed");
}

#[tokio::test]
async fn a_client_that_says_nothing_holds_no_other_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let health = Arc::new(ProxyHealth::default());
    health.programmed(checks(false, LocalEndpoints::default()), at(NOW));
    let _serving = Serving::start(listener, Arc::new(move |path: &str| health.answer(path, at(NOW))));
    let silent: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let answer = tokio::task::spawn_blocking(move || ask(address)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    drop(silent);
}
