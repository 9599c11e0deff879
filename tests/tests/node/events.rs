//! What cannot be honoured is told where people look: on the object, by an Event.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weft_tests::node::{Node, inside, until};

use crate::objects::{self, SERVICES};

const EVENTS: &str = "/api/v1/namespaces/default/events";

fn events_of(node: &Node, kind: &str, name: &str) -> Vec<Value> {
    let mut events = node.api().list(EVENTS);
    events.retain(|event| event["involvedObject"]["kind"] == kind && event["involvedObject"]["name"] == name);
    events
}

#[test]
fn a_service_that_cannot_be_honoured_bears_one_event_over_restarts() {
    inside(|| {
        let mut node = Node::running();
        objects::make_service(node.api(), "good", &["10.244.9.9", "fd00:10:244:9::9"]);
        let spec = json!({"ports": [{"port": 80}], "externalIPs": ["192.0.2.7"]});
        let made = node.api().create(SERVICES, &json!({"metadata": {"name": "greedy"}, "spec": spec}));
        until("the Event", || !events_of(&node, "Service", "greedy").is_empty());
        let event = events_of(&node, "Service", "greedy").remove(0);
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["involvedObject"]["uid"], made["metadata"]["uid"], "kubectl describe asks by it");
        let message = event["message"].as_str().unwrap();
        assert!(message.contains("spec.externalIPs") && message.contains("--external-ip-range"), "{message}");
        assert_eq!(event["source"], json!({"component": "weft", "host": "n1"}));
        node.end_agent(Signal::SIGKILL);
        node.start_agent();
        node.await_ready();
        std::thread::sleep(Duration::from_secs(8));
        assert_eq!(events_of(&node, "Service", "greedy"), [event], "the same, once");
        assert_eq!(events_of(&node, "Service", "good"), [Value::Null; 0]);
    });
}
