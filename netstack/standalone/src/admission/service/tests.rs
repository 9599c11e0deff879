//! Stories of allocation, each through the rules of an update as the API runs them.

use serde_json::{Value, json};

use crate::admission::{self, Part, Policy};
use crate::resources::find;
use crate::status::ApiError;
use crate::store::{Change, Key, Store};

fn policy() -> Policy {
    Policy { service_cidrs: vec!["10.96.0.0/24".parse().unwrap(), "fd00:96::/112".parse().unwrap()] }
}

struct World {
    store: Store,
    _directory: tempfile::TempDir,
    policy: Policy,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { store: Store::open(directory.path(), 64).unwrap(), _directory: directory, policy: policy() }
    }

    /// Creates or updates, as the API does.
    fn put(&self, name: &str, spec: &Value) -> Result<Value, ApiError> {
        let services = find("", "v1", "services").unwrap();
        let key = Key::new("services", "default", name);
        let ambient = admission::Ambient { now: jiff::Timestamp::UNIX_EPOCH, random: 0 };
        let stored = self.store.commit(|view| {
            let mut object = json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec});
            let old = view.get(&key).map(|it| it.value());
            admission::apply_defaults(services, &mut object);
            if let Some(old) = &old {
                object = admission::admit_update(services, Part::Main, old, object)?;
            }
            admission::check(services, &object)?;
            admission::allocate(services, &mut object, old.as_ref(), view, &self.policy, &ambient)?;
            Ok(vec![Change::Put(key.clone(), object)])
        })?;
        Ok(stored[0].value()["spec"].clone())
    }
}

#[test]
fn a_plain_service_gets_one_address_of_the_first_family() {
    let world = World::new();
    let spec = world.put("a", &json!({"ports": [{"port": 80}]})).unwrap();
    assert_eq!(spec["clusterIP"], "10.96.0.17");
    assert_eq!(spec["clusterIPs"], json!(["10.96.0.17"]));
    assert_eq!(spec["ipFamilies"], json!(["IPv4"]));
    assert_eq!(spec["ipFamilyPolicy"], "SingleStack");
    let next = world.put("b", &json!({"ports": [{"port": 80}]})).unwrap();
    assert_eq!(next["clusterIP"], "10.96.0.18");
}

#[test]
fn an_update_without_addresses_keeps_them_and_dual_stack_adds_the_second() {
    let world = World::new();
    let first = world.put("a", &json!({"ports": [{"port": 80}]})).unwrap();
    let both =
        world.put("a", &json!({"ports": [{"port": 81}], "ipFamilyPolicy": "PreferDualStack"})).unwrap();
    assert_eq!(both["clusterIPs"], json!([first["clusterIP"], "fd00:96::101"]));
    let mut back = both.clone();
    back["ipFamilyPolicy"] = json!("SingleStack");
    let single = world.put("a", &back).unwrap();
    assert_eq!(single["clusterIPs"], json!([first["clusterIP"]]));
    assert_eq!(single["ipFamilies"], json!(["IPv4"]));
}

#[test]
fn an_address_asked_for_is_given_or_refused_with_the_field() {
    let world = World::new();
    let asked = world.put("a", &json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})).unwrap();
    assert_eq!(asked["clusterIPs"], json!(["10.96.0.10"]));
    for (address, why) in
        [("10.96.0.10", "already allocated"), ("10.97.0.1", "not in the valid range"), ("x", "valid IP")]
    {
        let error = world.put("b", &json!({"clusterIP": address, "ports": [{"port": 53}]})).unwrap_err();
        assert_eq!((error.code, error.causes[0].field.as_str()), (422, "spec.clusterIPs[0]"), "{error}");
        assert!(error.message.contains(why), "{error}");
    }
    let v6 = world.put("c", &json!({"clusterIP": "fd00:96::a", "ports": [{"port": 53}]})).unwrap();
    assert_eq!(v6["ipFamilies"], json!(["IPv6"]));
}

#[test]
fn the_address_of_a_service_does_not_change() {
    let world = World::new();
    world.put("a", &json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})).unwrap();
    let error = world.put("a", &json!({"clusterIP": "10.96.0.11", "ports": [{"port": 53}]})).unwrap_err();
    assert_eq!((error.code, error.causes[0].field.as_str()), (422, "spec.clusterIPs[0]"));
}

#[test]
fn headless_services_have_no_address_and_external_names_release_theirs() {
    let world = World::new();
    let headless = world
        .put("h", &json!({"clusterIP": "None", "selector": {"a": "b"}, "ports": [{"port": 1}]}))
        .unwrap();
    assert_eq!(headless["clusterIPs"], json!(["None"]));
    assert_eq!(headless["ipFamilies"], json!(["IPv4"]));
    let anywhere = world.put("s", &json!({"clusterIP": "None"})).unwrap();
    assert_eq!(anywhere["ipFamilyPolicy"], "RequireDualStack");

    let before = world.put("a", &json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})).unwrap();
    let mut external = before.clone();
    external["type"] = json!("ExternalName");
    external["externalName"] = json!("example.org");
    let external = world.put("a", &external).unwrap();
    assert!(external.get("clusterIP").is_none() && external.get("ipFamilies").is_none());
    assert!(
        world.put("b", &json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})).is_ok(),
        "free again"
    );
    let back = world.put("a", &json!({"type": "ClusterIP", "ports": [{"port": 53}]})).unwrap();
    assert_eq!(back["clusterIP"], "10.96.0.17");
}

#[test]
fn node_ports_are_shared_by_protocols_kept_by_updates_and_dropped_with_the_type() {
    let world = World::new();
    let ports =
        json!([{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53, "protocol": "TCP"}]);
    let spec = world.put("a", &json!({"type": "NodePort", "ports": ports})).unwrap();
    assert_eq!(spec["ports"][0]["nodePort"], 30086);
    assert_eq!(spec["ports"][1]["nodePort"], 30086);
    let again = world.put("a", &json!({"type": "NodePort", "ports": ports})).unwrap();
    assert_eq!(again["ports"][1]["nodePort"], 30086);
    let taken = json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 30086}]});
    assert_eq!(world.put("b", &taken).unwrap_err().causes[0].field, "spec.ports[0].nodePort");
    let out = json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]});
    assert!(world.put("b", &out).unwrap_err().message.contains("30000-32767"));
    let mut plain = spec.clone();
    plain["type"] = json!("ClusterIP");
    let plain = world.put("a", &plain).unwrap();
    assert!(plain["ports"][0].get("nodePort").is_none());
    assert!(world.put("b", &taken).is_ok());
}

#[test]
fn local_load_balancers_get_a_health_check_port() {
    let world = World::new();
    let asked = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]});
    let spec = world.put("a", &asked).unwrap();
    let port = spec["healthCheckNodePort"].as_u64().unwrap();
    assert!((30_000..=32_767).contains(&port) && spec["ports"][0]["nodePort"] != port);
    assert_eq!(world.put("a", &asked).unwrap()["healthCheckNodePort"], port, "an update keeps it");
    let without =
        json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
    assert!(world.put("b", &without).unwrap()["ports"][0].get("nodePort").is_none());
}

#[test]
fn a_single_stack_cluster_refuses_what_needs_two_families() {
    let mut world = World::new();
    world.policy.service_cidrs.truncate(1);
    let error =
        world.put("a", &json!({"ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 1}]})).unwrap_err();
    assert_eq!(error.causes[0].field, "spec.ipFamilyPolicy");
    let error = world.put("a", &json!({"ipFamilies": ["IPv6"], "ports": [{"port": 1}]})).unwrap_err();
    assert_eq!(error.causes[0].field, "spec.ipFamilies[0]");
    let prefer =
        world.put("a", &json!({"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 1}]})).unwrap();
    assert_eq!(prefer["ipFamilies"], json!(["IPv4"]));
}

#[test]
fn a_service_that_is_no_load_balancer_any_more_loses_its_addresses() {
    let world = World::new();
    let mut asked = json!({"type": "LoadBalancer", "ports": [{"port": 80}]});
    world.put("a", &asked).unwrap();
    asked["type"] = json!("ClusterIP");
    let services = crate::resources::find("", "v1", "services").unwrap();
    let mut object = json!({"metadata": {"name": "a", "namespace": "default"}, "spec": asked,
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}});
    let ambient = admission::Ambient { now: jiff::Timestamp::UNIX_EPOCH, random: 1 };
    let view = crate::store::View::default();
    admission::apply_defaults(services, &mut object);
    assert_eq!(object["status"]["loadBalancer"]["ingress"][0]["ipMode"], "VIP");
    admission::allocate(services, &mut object, None, &view, &world.policy, &ambient).unwrap();
    assert_eq!(object["status"], json!({"loadBalancer": {}}));
}
