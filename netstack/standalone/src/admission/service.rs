//! What a Service gets from the cluster: families, ClusterIPs, node ports, the health check port. Pure.
//! In: the Service as asked for, the stored one, the view with its claims, the ranges. Out: the Service filled in, or causes.
//! Rules: Kubernetes API reference (ServiceSpec) and KEP-563 (dual stack).

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Policy, ranges};
use crate::object;
use crate::status::Cause;
use crate::store::{Key, View, port_claim};

/// `--service-node-port-range` of the real API server.
const NODE_PORTS: (u64, u64) = (30_000, 32_767);

struct Allocation<'a> {
    view: &'a View,
    policy: &'a Policy,
    key: Key,
    random: u128,
    is_update: bool,
    causes: Vec<Cause>,
}

/// Fills in everything; the causes say what cannot be had (nothing may be stored then).
pub(super) fn allocate(
    service: &mut Value,
    stored: Option<&Value>,
    view: &View,
    policy: &Policy,
    random: u128,
) -> Vec<Cause> {
    let key = Key::new("services", object::namespace(service), object::name(service));
    let mut allocation =
        Allocation { view, policy, key, random, is_update: stored.is_some(), causes: Vec::new() };
    if object::text(service, &["spec", "type"]) == "ExternalName" {
        release(service);
    } else if let Some(families) = allocation.families(service) {
        allocation.addresses(service, &families);
    }
    allocation.node_ports(service);
    allocation.health_check_port(service);
    if object::text(service, &["spec", "type"]) != "LoadBalancer" {
        object::set(service, &["status"], json!({"loadBalancer": {}}));
    }
    allocation.causes
}

fn release(service: &mut Value) {
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
        object::remove(service, &["spec", field]);
    }
}

fn invalid(field: impl Into<String>, message: impl Into<String>) -> Cause {
    Cause { reason: "FieldValueInvalid", message: message.into(), field: field.into() }
}

fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The addresses asked for: `clusterIPs`, or the one of `clusterIP`.
fn requested_addresses(service: &Value) -> Vec<String> {
    let all = object::texts(service, &["spec", "clusterIPs"]);
    let one = object::text(service, &["spec", "clusterIP"]);
    if all.is_empty() && !one.is_empty() { vec![one.to_owned()] } else { all }
}

fn other(family: &str) -> &'static str {
    if family == "IPv4" { "IPv6" } else { "IPv4" }
}

impl Allocation<'_> {
    fn range(&self, wanted: &str) -> Option<&IpNet> {
        self.policy.service_cidrs.iter().find(|it| family(&it.addr()) == wanted)
    }

    fn is_free(&self, claim: &str) -> bool {
        self.view.holder(claim).is_none_or(|holder| *holder == self.key)
    }

    /// Decides `ipFamilies` and `ipFamilyPolicy`; `None` when a cause stands in the way.
    fn families(&mut self, service: &mut Value) -> Option<Vec<String>> {
        let addresses = requested_addresses(service);
        let mut families = object::texts(service, &["spec", "ipFamilies"]);
        let headless = addresses.first().is_some_and(|it| it == "None");
        let anywhere = headless && object::text_map(service, &["spec", "selector"]).is_empty();
        let policy = match object::text(service, &["spec", "ipFamilyPolicy"]) {
            "" if families.len() > 1 || addresses.len() > 1 || anywhere => "RequireDualStack".to_owned(),
            "" => "SingleStack".to_owned(),
            said => said.to_owned(),
        };
        if families.is_empty() {
            let of_address = addresses.first().and_then(|it| it.parse().ok()).map(|it: IpAddr| family(&it));
            let first = self.policy.service_cidrs.first().map(|it| family(&it.addr()));
            families.push(of_address.or(first)?.to_owned());
        }
        let second = other(&families[0]);
        let can_second = self.range(second).is_some() || anywhere;
        match policy.as_str() {
            "SingleStack" if families.len() > 1 && !self.is_update => {
                let message = "may only hold one value when ipFamilyPolicy is SingleStack";
                self.causes.push(invalid("spec.ipFamilies", message));
            }
            "SingleStack" => families.truncate(1),
            "RequireDualStack" if !can_second => {
                let message = "this cluster is not configured for dual-stack services";
                self.causes.push(invalid("spec.ipFamilyPolicy", message));
            }
            _ if can_second && families.len() == 1 => families.push(second.to_owned()),
            _ => {}
        }
        for (index, wanted) in families.iter().enumerate() {
            if self.range(wanted).is_none() && !anywhere {
                let field = format!("spec.ipFamilies[{index}]");
                self.causes.push(invalid(field, format!("{wanted:?}: not configured on this cluster")));
            }
        }
        object::set(service, &["spec", "ipFamilyPolicy"], json!(policy));
        object::set(service, &["spec", "ipFamilies"], json!(families));
        self.causes.is_empty().then_some(families)
    }

    fn addresses(&mut self, service: &mut Value, families: &[String]) {
        let requested = requested_addresses(service);
        if requested.first().is_some_and(|it| it == "None") {
            object::set(service, &["spec", "clusterIP"], json!("None"));
            object::set(service, &["spec", "clusterIPs"], json!(["None"]));
            return;
        }
        let one = object::text(service, &["spec", "clusterIP"]);
        if !one.is_empty() && requested.first().is_some_and(|it| it != one) {
            self.causes.push(invalid("spec.clusterIPs", "must match spec.clusterIP in its first element"));
            return;
        }
        let mut addresses = Vec::new();
        for (index, wanted) in families.iter().enumerate() {
            let address = match requested.get(index).filter(|it| !it.is_empty()) {
                Some(text) => self.explicit_address(index, wanted, text),
                None => self.any_address(index, wanted),
            };
            addresses.extend(address.map(|it| it.to_string()));
        }
        object::put(service, &["spec", "clusterIP"], addresses.first().map(|it| json!(it)));
        object::set(service, &["spec", "clusterIPs"], json!(addresses));
    }

    fn explicit_address(&mut self, index: usize, wanted: &str, text: &str) -> Option<IpAddr> {
        let field = format!("spec.clusterIPs[{index}]");
        let address: Option<IpAddr> = text.parse().ok();
        let range = self.range(wanted).copied();
        let complaint = match (address, range) {
            (None, _) => "must be a valid IP address, or \"None\"".to_owned(),
            (Some(address), _) if family(&address) != wanted => format!("expected an {wanted} value"),
            (Some(address), Some(range)) if !range.contains(&address) => {
                format!("the provided IP ({address}) is not in the valid range {range}")
            }
            (Some(address), _) if !self.is_free(&format!("ip/{address}")) => {
                format!("failed to allocate IP {address}: provided IP is already allocated")
            }
            (Some(address), _) => return Some(address),
        };
        self.causes.push(invalid(field, format!("{text:?}: {complaint}")));
        None
    }

    fn any_address(&mut self, index: usize, wanted: &str) -> Option<IpAddr> {
        let range = *self.range(wanted)?;
        // The first address belongs to the `kubernetes` Service, also before it exists.
        let first = ranges::nth_address(&range, 0);
        let free = |it: IpAddr| Some(it) != first && self.is_free(&format!("ip/{it}"));
        let address = ranges::free_address(&range, self.random, free);
        if address.is_none() {
            let message = format!("no address is free in {range}");
            self.causes.push(invalid(format!("spec.clusterIPs[{index}]"), message));
        }
        address
    }

    fn node_ports(&mut self, service: &mut Value) {
        let kind = object::text(service, &["spec", "type"]).to_owned();
        let wanted = object::at(service, &["spec", "allocateLoadBalancerNodePorts"]) != Some(&json!(false));
        let allocates = kind == "NodePort" || (kind == "LoadBalancer" && wanted);
        let may_have = allocates || kind == "LoadBalancer";
        let Some(ports) = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut) else { return };
        let mut taken = BTreeSet::new();
        for index in 0..ports.len() {
            let protocol = object::text(&ports[index], &["protocol"]).to_owned();
            let explicit = ports[index].get("nodePort").and_then(Value::as_u64).filter(|it| *it != 0);
            if !may_have {
                if explicit.is_some() && !self.is_update {
                    let message = format!("may not be used when `type` is '{kind}'");
                    let field = format!("spec.ports[{index}].nodePort");
                    self.causes.push(Cause { reason: "FieldValueForbidden", message, field });
                }
                object::remove(&mut ports[index], &["nodePort"]);
                continue;
            }
            let number = match explicit {
                Some(number) => self.explicit_port(index, &protocol, number, &taken),
                None if allocates => self.any_port(ports, index, &protocol, &taken),
                None => None,
            };
            taken.extend(number.map(|it| port_claim(&protocol, it)));
            object::put(&mut ports[index], &["nodePort"], number.map(|it| json!(it)));
        }
    }

    fn explicit_port(
        &mut self,
        index: usize,
        protocol: &str,
        number: u64,
        taken: &BTreeSet<String>,
    ) -> Option<u64> {
        let claim = port_claim(protocol, number);
        let complaint = if !(NODE_PORTS.0..=NODE_PORTS.1).contains(&number) {
            format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                NODE_PORTS.0, NODE_PORTS.1
            )
        } else if taken.contains(&claim) || !self.is_free(&claim) {
            "provided port is already allocated".to_owned()
        } else {
            return Some(number);
        };
        self.causes.push(invalid(format!("spec.ports[{index}].nodePort"), format!("{number}: {complaint}")));
        None
    }

    /// The node port of a sibling that has the same port in another protocol, or else any free one.
    fn any_port(
        &mut self,
        ports: &[Value],
        index: usize,
        protocol: &str,
        taken: &BTreeSet<String>,
    ) -> Option<u64> {
        let free = |number: u64| {
            let claim = port_claim(protocol, number);
            !taken.contains(&claim) && self.is_free(&claim)
        };
        let sibling = ports
            .iter()
            .filter(|it| it.get("port") == ports[index].get("port"))
            .find_map(|it| it.get("nodePort")?.as_u64())
            .filter(|number| free(*number));
        let random = self.random.rotate_left(u32::try_from(index % 100).unwrap_or(0));
        let number = sibling.or_else(|| ranges::free_port(NODE_PORTS.0, NODE_PORTS.1, random, free));
        if number.is_none() {
            self.causes.push(invalid(format!("spec.ports[{index}].nodePort"), "no node port is free"));
        }
        number
    }

    fn health_check_port(&mut self, service: &mut Value) {
        let needs = object::text(service, &["spec", "type"]) == "LoadBalancer"
            && object::text(service, &["spec", "externalTrafficPolicy"]) == "Local";
        if !needs {
            object::remove(service, &["spec", "healthCheckNodePort"]);
            return;
        }
        let own: BTreeSet<u64> = object::list(service, &["spec", "ports"])
            .iter()
            .filter_map(|it| it.get("nodePort")?.as_u64())
            .collect();
        let free = |number: u64| !own.contains(&number) && self.is_free(&port_claim("TCP", number));
        let asked = object::at(service, &["spec", "healthCheckNodePort"]).and_then(Value::as_u64);
        let number = match asked.filter(|it| *it != 0) {
            Some(number) if free(number) && (NODE_PORTS.0..=NODE_PORTS.1).contains(&number) => Some(number),
            Some(_) => None,
            None => ranges::free_port(NODE_PORTS.0, NODE_PORTS.1, self.random.rotate_left(101), free),
        };
        match number {
            Some(number) => object::set(service, &["spec", "healthCheckNodePort"], json!(number)),
            None => {
                self.causes.push(invalid("spec.healthCheckNodePort", "the port is taken or out of range"))
            }
        }
    }
}

#[cfg(test)]
mod tests;
