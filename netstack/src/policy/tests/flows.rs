//! Flows as they are recorded, with real packets.

use super::*;
use crate::flows::{self, Record, Recorded, Verdict};

/// What is recorded within some seconds, until `enough` of it is there.
fn recorded_until(recorded: &Recorded, enough: impl Fn(&[Record]) -> bool) -> Vec<Record> {
    for _ in 0..100 {
        let flows = recorded.page(&flows::Query::default()).flows;
        if enough(&flows) {
            return flows;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    recorded.page(&flows::Query::default()).flows
}

impl Rig {
    /// Records as the agent does, in the node's namespace; Events come out of the receiver.
    fn record(&self, snapshot: &Snapshot) -> (Recorded, tokio::sync::mpsc::Receiver<weft_model::Notice>) {
        let snapshots = tokio::sync::watch::Sender::new(Some(Arc::new(snapshot.clone())));
        let sources = flows::Sources { snapshots: snapshots.subscribe(), judge: self.applier.judge() };
        let (notices, passing) = crate::kube::Notices::channel();
        let recorded = Recorded::default();
        let (denied, allowed) = (recorded.clone(), recorded.clone());
        let node = File::open("/proc/thread-self/ns/net").unwrap();
        std::thread::spawn(move || {
            setns(&node, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let _snapshots = snapshots;
                let denied = flows::record_denied(denied, sources.clone(), notices);
                let allowed = flows::record_allowed(allowed, sources);
                let _ = tokio::join!(denied, allowed);
            });
        });
        // Sockets are open when this thread's first flow would be seen; what comes before is nobody's.
        std::thread::sleep(Duration::from_millis(300));
        (recorded, passing)
    }
}

#[test]
fn every_denied_flow_is_recorded_with_names_service_and_policy() {
    in_node(|rig| {
        let objects = with(vec![deny_all()]);
        let snapshot = snapshot(objects);
        rig.apply_snapshot(&snapshot);
        let (recorded, mut passing) = rig.record(&snapshot);
        for family in &FAMILIES {
            assert!(!rig.tcp(REMOTE, family.a, 80));
            assert!(!rig.udp(A, family.b, 53));
        }
        let flows = recorded_until(&recorded, |flows| flows.len() >= 4);
        for family in &FAMILIES {
            let of = |source: &str, to: &str, protocol: &str, port| {
                let ends = (source.parse::<IpAddr>().unwrap(), to.parse::<IpAddr>().unwrap());
                let is = |record: &&Record| {
                    (record.source.address, record.destination.address) == ends
                        && record.protocol == protocol
                        && record.port == port
                };
                let found: Vec<&Record> = flows.iter().filter(is).collect();
                assert_eq!(found.len(), 1, "retransmissions are one flow: {flows:#?}");
                found[0].clone()
            };
            let ingress = of(family.remote, family.a, "tcp", 80);
            assert_eq!(ingress.verdict, Verdict::Denied);
            assert_eq!(ingress.destination.pod.as_deref(), Some("shop/a"));
            assert_eq!(ingress.decided_by, "ingress of shop/a: isolated by shop/deny-all, no rule allows it");
            let egress = of(family.a, family.b, "udp", 53);
            assert_eq!(egress.source.pod.as_deref(), Some("shop/a"));
            assert_eq!(egress.destination.pod.as_deref(), Some("shop/b"));
            assert_eq!(egress.decided_by, "egress of shop/a: isolated by shop/deny-all, no rule allows it");
        }
        let event = passing.try_recv().unwrap();
        assert_eq!(event.object.to_string(), "Pod shop/a");
    });
}

#[test]
fn an_allowed_flow_is_recorded_with_the_rule_and_the_service_that_was_called() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
        }
        let [v4, v6] = &FAMILIES;
        let service = json!({
            "kind": "Service", "metadata": {"namespace": "shop", "name": "b"},
            "spec": {"clusterIPs": [v4.vip, v6.vip], "ports": [{"port": 80}]},
        });
        let slice = |family: &str, address: &str| {
            json!({
                "kind": "EndpointSlice", "addressType": family, "ports": [{"name": "", "port": 8080}],
                "endpoints": [{"addresses": [address], "nodeName": "node-a"}],
                "metadata": {"namespace": "shop", "name": family, "labels": {"kubernetes.io/service-name": "b"}},
            })
        };
        let services = vec![service, slice("IPv4", v4.b), slice("IPv6", v6.b)];
        rig.apply_services(services.clone());
        let into_b =
            policy("into-b", "b", json!({"ingress": [{"from": from("nobody")}, {"from": from("a")}]}));
        let snapshot = snapshot(with([services, vec![into_b]].concat()));
        rig.apply_snapshot(&snapshot);
        let (recorded, _passing) = rig.record(&snapshot);
        for family in &FAMILIES {
            assert!(rig.tcp(A, family.vip, 80));
            assert!(!rig.tcp(OUTSIDE, family.vip, 80));
        }
        let flows = recorded_until(&recorded, |flows| flows.len() >= 4);
        for family in &FAMILIES {
            let to_b = |record: &&Record| record.destination.address.to_string() == family.b;
            let [allowed, denied] = [Verdict::Allowed, Verdict::Denied].map(|verdict| {
                let found: Vec<&Record> =
                    flows.iter().filter(to_b).filter(|record| record.verdict == verdict).collect();
                assert_eq!(found.len(), 1, "{verdict:?} {flows:#?}");
                found[0]
            });
            assert_eq!(allowed.source.pod.as_deref(), Some("shop/a"));
            assert_eq!((allowed.decided_by.as_str(), allowed.port), ("shop/into-b ingress[1]", 8080));
            assert_eq!(denied.source.pod, None);
            assert_eq!(denied.source.address.to_string(), family.outside);
            for record in [allowed, denied] {
                assert_eq!(record.service.as_deref(), Some("shop/b"), "{record:?}");
            }
        }
    });
}

#[test]
fn a_denied_flood_is_a_few_records() {
    in_node(|rig| {
        let snapshot = snapshot(with(vec![deny_all()]));
        rig.apply_snapshot(&snapshot);
        let (recorded, _passing) = rig.record(&snapshot);
        let to: IpAddr = FAMILIES[0].b.parse().unwrap();
        rig.within(A, move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for _ in 0..20_000 {
                let _ = socket.send_to(b"x", SocketAddr::new(to, 9));
            }
        });
        let flows = recorded_until(&recorded, |flows| !flows.is_empty());
        std::thread::sleep(Duration::from_millis(500));
        let after = recorded.page(&flows::Query::default()).flows;
        assert!(!flows.is_empty() && after.len() <= 3, "{after:#?}");
    });
}
