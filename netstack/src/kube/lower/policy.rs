//! Lowering of NetworkPolicies (networking.k8s.io/v1). What cannot be understood denies what it would have decided: a peer or a
//! port is left out, a rule allows nothing, a policy isolates and allows nothing.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::Value;
use weft_model::NamespacedName;
use weft_model::constants::ANNOTATION_ESTABLISHED;
use weft_model::policy::{
    Condition, NetworkPolicy, Peer, PolicyPort, PolicyRule, Ports, Requirement, Selector,
};

use super::{Lowered, Notes, key, lower, wire};

/// Never `None`: a policy that cannot be read at all isolates every pod of its namespace.
pub fn network_policy(document: &Value) -> Lowered<NetworkPolicy> {
    let mut lowered =
        lower("NetworkPolicy", document, |wire: wire::NetworkPolicy, notes| Some(policy(wire, notes)));
    if lowered.value.is_none() {
        for problem in &mut lowered.problems {
            problem.message += "; until then every pod of the namespace is isolated";
        }
        let text = |field: &str| document["metadata"][field].as_str().unwrap_or_default();
        lowered.value = Some(NetworkPolicy {
            key: NamespacedName::new(text("namespace"), text("name")),
            subject: Selector::default(),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
            keep_established: false,
        });
    }
    lowered
}

fn policy(wire: wire::NetworkPolicy, notes: &mut Notes) -> NetworkPolicy {
    let spec = wire.spec;
    let annotations = wire.metadata.annotations.as_ref();
    let keep_established =
        keep_established(annotations.and_then(|all| all.get(ANNOTATION_ESTABLISHED)), notes);
    let subject = selector("spec.podSelector", spec.pod_selector.unwrap_or_default(), notes);
    let understood = subject.is_ok() && knows(notes, "spec", &spec.unknown, "the policy allows nothing");
    let (ingress, egress) = directions(spec.policy_types.as_deref(), spec.egress.as_deref(), notes);
    let mut rules = |on: bool, name: &str, rules: Option<Vec<wire::PolicyRule>>| {
        on.then(|| {
            let rules = rules.unwrap_or_default().into_iter().enumerate();
            let lowered: Vec<_> =
                rules.map(|(i, rule)| self::rule(&format!("spec.{name}[{i}]"), name, rule, notes)).collect();
            if understood { lowered } else { Vec::new() }
        })
    };
    NetworkPolicy {
        key: key(&wire.metadata),
        ingress: rules(ingress, "ingress", spec.ingress),
        egress: rules(egress, "egress", spec.egress),
        subject: subject.unwrap_or_else(|widest| widest),
        keep_established,
    }
}

fn keep_established(annotation: Option<&String>, notes: &mut Notes) -> bool {
    match annotation.map(String::as_str) {
        None | Some("cut") => false,
        Some("keep") => true,
        Some(other) => {
            notes.invalid(format!(
                "annotation {ANNOTATION_ESTABLISHED} {other:?} is unknown; cut is used until it is cut or keep"
            ));
            false
        }
    }
}

/// Whether the policy is about ingress and about egress. Without policyTypes: about ingress always, about egress when it has
/// egress rules.
fn directions(
    types: Option<&[String]>,
    egress: Option<&[wire::PolicyRule]>,
    notes: &mut Notes,
) -> (bool, bool) {
    let types = types.unwrap_or_default();
    if types.is_empty() {
        return (true, egress.is_some_and(|rules| !rules.is_empty()));
    }
    for (i, unknown) in
        types.iter().enumerate().filter(|(_, name)| !matches!(name.as_str(), "Ingress" | "Egress"))
    {
        notes.invalid(format!(
            "spec.policyTypes[{i}] {unknown:?} is unknown and decides nothing; use Ingress or Egress"
        ));
    }
    let has = |wanted: &str| types.iter().any(|name| name == wanted);
    (has("Ingress"), has("Egress"))
}

fn rule(field: &str, direction: &str, wire: wire::PolicyRule, notes: &mut Notes) -> PolicyRule {
    let (peers, name, (misplaced, wrong)) = match direction {
        "ingress" => (wire.from, "from", (wire.to, "to")),
        _ => (wire.to, "to", (wire.from, "from")),
    };
    let known = knows(notes, field, &wire.unknown, "the rule allows nothing");
    if misplaced.is_some() {
        notes.invalid(format!(
            "{field}.{wrong} has no place in {direction}; the rule allows nothing until it is {name}"
        ));
    }
    let peers = listed(peers).map(|peers| {
        let peers = peers.into_iter().enumerate();
        let mut peers: Vec<Peer> =
            peers.filter_map(|(i, peer)| self::peer(&format!("{field}.{name}[{i}]"), peer, notes)).collect();
        peers.sort();
        peers.dedup();
        peers
    });
    let ports = listed(wire.ports).map(|ports| {
        let ports = ports.into_iter().enumerate();
        let mut ports: Vec<PolicyPort> =
            ports.filter_map(|(i, port)| self::port(&format!("{field}.ports[{i}]"), port, notes)).collect();
        ports.sort();
        ports.dedup();
        ports
    });
    let peers = if known && misplaced.is_none() { peers } else { Some(Vec::new()) };
    PolicyRule { peers, ports }
}

/// "If this field is empty or missing, this rule matches all".
fn listed<T>(list: Option<Vec<T>>) -> Option<Vec<T>> {
    list.filter(|list| !list.is_empty())
}

fn peer(field: &str, wire: wire::PolicyPeer, notes: &mut Notes) -> Option<Peer> {
    if !knows(notes, field, &wire.unknown, "this peer allows nothing") {
        return None;
    }
    match (wire.ip_block, wire.namespace_selector, wire.pod_selector) {
        (Some(block), None, None) => self::block(&format!("{field}.ipBlock"), &block, notes),
        (Some(_), ..) => {
            notes.invalid(format!(
                "{field} has both ipBlock and a selector; this peer allows nothing until they are two peers"
            ));
            None
        }
        (None, None, None) => {
            notes.invalid(format!(
                "{field} names nobody; give it a podSelector, a namespaceSelector or an ipBlock"
            ));
            None
        }
        (None, namespaces, pods) => {
            let namespaces = namespaces
                .map(|wire| selector(&format!("{field}.namespaceSelector"), wire, notes))
                .transpose();
            let pods = selector(&format!("{field}.podSelector"), pods.unwrap_or_default(), notes);
            Some(Peer::Pods { namespaces: namespaces.ok()?, pods: pods.ok()? })
        }
    }
}

fn block(field: &str, wire: &wire::IpBlock, notes: &mut Notes) -> Option<Peer> {
    let nothing = "this peer allows nothing until it is corrected";
    let mut parse = |field: &str, text: &str| {
        let parsed = text.parse::<IpNet>().ok();
        if parsed.is_none() {
            notes.invalid(format!("{field} {text:?} is not a CIDR; {nothing}"));
        }
        parsed.map(|net| net.trunc())
    };
    let cidr = parse(&format!("{field}.cidr"), &wire.cidr);
    let texts = wire.except.iter().flatten().enumerate();
    let except: Vec<Option<IpNet>> =
        texts.map(|(i, text)| parse(&format!("{field}.except[{i}]"), text)).collect();
    let known = knows(notes, field, &wire.unknown, "this peer allows nothing");
    let (cidr, mut except) = (cidr?, except.into_iter().collect::<Option<Vec<IpNet>>>()?);
    let mut inside = true;
    for (i, net) in except.iter().enumerate().filter(|(_, net)| !cidr.contains(*net)) {
        notes.invalid(format!("{field}.except[{i}] {net} is outside of cidr {cidr}; {nothing}"));
        inside = false;
    }
    except.sort();
    except.dedup();
    (known && inside).then_some(Peer::Block { cidr, except })
}

fn port(field: &str, wire: wire::PolicyPort, notes: &mut Notes) -> Option<PolicyPort> {
    let nothing = "this port allows nothing until it is corrected";
    let known = knows(notes, field, &wire.unknown, "this port allows nothing");
    let protocol = notes.protocol(field, wire.protocol)?;
    let number = |name: &str, number: i64, notes: &mut Notes| notes.port(&format!("{field}.{name}"), number);
    let ports = match (wire.port, wire.end_port) {
        (None, None) => Ports::All,
        (None, Some(end)) => {
            notes.invalid(format!("{field}.endPort {end} stands without port; {nothing}"));
            return None;
        }
        (Some(Value::String(name)), Some(end)) => {
            notes.invalid(format!("{field}.endPort {end} cannot go with the name {name:?}; {nothing}"));
            return None;
        }
        (Some(Value::String(name)), None) if !name.is_empty() => Ports::Named(name),
        (Some(port), end) => {
            let Some(first) = port.as_i64() else {
                notes.invalid(format!("{field}.port {port} is neither a number nor a name; {nothing}"));
                return None;
            };
            let first = number("port", first, notes)?;
            let last = end.map_or(Some(first), |end| number("endPort", end, notes))?;
            if last < first {
                notes.invalid(format!("{field}.endPort {last} is below port {first}; {nothing}"));
                return None;
            }
            Ports::Range(first, last)
        }
    };
    known.then_some(PolicyPort { protocol, ports })
}

/// The selector; as an error, with what was understood of it, which selects more.
pub(super) fn selector(
    field: &str,
    wire: wire::LabelSelector,
    notes: &mut Notes,
) -> Result<Selector, Selector> {
    let equal = wire.match_labels.unwrap_or_default().into_iter();
    let mut requirements: Vec<Requirement> = equal
        .map(|(key, value)| Requirement { key, condition: Condition::In(BTreeSet::from([value])) })
        .collect();
    let mut whole = knows(notes, field, &wire.unknown, "the selector allows nothing");
    for (i, expression) in wire.match_expressions.unwrap_or_default().into_iter().enumerate() {
        let values: BTreeSet<String> = expression.values.unwrap_or_default().into_iter().collect();
        let condition = match (expression.operator.as_str(), values.is_empty()) {
            ("In", false) => Condition::In(values),
            ("NotIn", false) => Condition::NotIn(values),
            ("Exists", true) => Condition::Exists,
            ("DoesNotExist", true) => Condition::DoesNotExist,
            (operator, _) => {
                notes.invalid(format!(
                    "{field}.matchExpressions[{i}] {operator:?} with {} values cannot be understood, so the selector allows \
                     nothing; use In or NotIn with values, Exists or DoesNotExist without",
                    values.len()
                ));
                whole = false;
                continue;
            }
        };
        requirements.push(Requirement { key: expression.key, condition });
    }
    let selector = Selector::new(requirements);
    if whole { Ok(selector) } else { Err(selector) }
}

/// False, and said, when there are fields that this version does not know.
fn knows(notes: &mut Notes, field: &str, unknown: &wire::Unknown, meanwhile: &str) -> bool {
    for name in unknown.keys() {
        notes.invalid(format!(
            "{field}.{name} is not known to this version of weft; {meanwhile} until it is removed"
        ));
    }
    unknown.is_empty()
}

#[cfg(test)]
mod tests;
