use super::*;

fn due(object: ObjectRef, message: &str) -> Due {
    Due::standing(Notice::new(object, Severity::Warning, "InvalidField", message))
}

#[test]
fn an_event_stands_in_the_namespace_of_its_object_and_of_others_in_default() {
    let node = NodeName("node1".into());
    let of_service =
        event(&due(ObjectRef::new("Service", "shop", "web"), "port 0"), Kind::Service, "u", &node);
    assert_eq!(of_service["metadata"]["namespace"], "shop");
    assert_eq!(of_service["involvedObject"]["namespace"], "shop");
    let of_node = event(&due(ObjectRef::new("Node", "", "node1"), "no podCIDR"), Kind::Node, "u", &node);
    assert_eq!(of_node["metadata"]["namespace"], "default");
    assert_eq!(of_node["involvedObject"]["namespace"], "");
    let policy = ObjectRef::new("NetworkPolicy", "shop", "web");
    let of_policy = event(&due(policy, "peer"), Kind::NetworkPolicy, "u", &node);
    assert_eq!(of_policy["involvedObject"]["apiVersion"], "networking.k8s.io/v1");
}

#[test]
fn a_message_is_cut_at_a_characters_border() {
    assert_eq!(cut("short"), "short");
    let long = "ä".repeat(1000);
    assert_eq!(cut(&long).len(), MESSAGE_BYTES);
    assert_eq!(cut(&format!("x{long}")).len(), MESSAGE_BYTES - 1);
}
