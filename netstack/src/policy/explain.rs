//! `weft policy explain`: the decision about a first packet, rule by rule, for pods anywhere in the cluster. In: a Snapshot and
//! a question. Out: text for a person. Pure but for the route of the agent's socket.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use weft_model::objects::{Node, Pod, Protocol};
use weft_model::{PodKey, Snapshot};

use super::directory::{Directory, Subject};
use super::meaning::{Allow, Direction, Other, Policies, Side};

/// What is asked, as it was typed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// `NAMESPACE/POD`, a pod of the namespace `default`, or an address.
    pub source: String,
    pub destination: String,
    /// `NUMBER` or `NUMBER/PROTOCOL`; TCP by default.
    pub port: String,
}

/// `GET /policy/explain?source=..&destination=..&port=..`, for the router of the agent's socket.
pub fn router(snapshots: watch::Receiver<Option<Arc<Snapshot>>>) -> Router {
    Router::new().route("/policy/explain", get(answer)).with_state(snapshots)
}

async fn answer(
    State(snapshots): State<watch::Receiver<Option<Arc<Snapshot>>>>,
    Query(question): Query<Question>,
) -> Response {
    let snapshot = snapshots.borrow().clone();
    let explained = match snapshot {
        None => Err("the agent has not read this cluster's objects yet".to_owned()),
        Some(snapshot) => explain(&snapshot, &question),
    };
    match explained {
        Ok(text) => text.into_response(),
        Err(reason) => (StatusCode::UNPROCESSABLE_ENTITY, reason).into_response(),
    }
}

/// One end of the connection.
struct End {
    title: String,
    addresses: Vec<IpAddr>,
    /// `None` for what no policy selects: addresses outside, nodes, the resolver.
    pod: Option<Arc<Pod>>,
}

/// The decision in every family that both ends have.
///
/// # Errors
/// One sentence when the question cannot be understood, or names what is not there.
pub fn explain(snapshot: &Snapshot, question: &Question) -> Result<String, String> {
    let directory = Directory::of(snapshot);
    let (protocol, port) = parse_port(&question.port)?;
    let source = end(&question.source, snapshot, &directory)?;
    let destination = end(&question.destination, snapshot, &directory)?;
    let mut text = String::new();
    for from in &source.addresses {
        for to in destination.addresses.iter().filter(|to| to.is_ipv6() == from.is_ipv6()) {
            let _ = writeln!(
                text,
                "{} ({from}) to {} ({to}), {} port {port}",
                source.title,
                destination.title,
                protocol.name()
            );
            let case = Case { snapshot, directory: &directory, source: &source, destination: &destination };
            case.decide(*from, *to, protocol, port, &mut text);
        }
    }
    if text.is_empty() {
        return Err(format!("{} and {} have no address of the same family", source.title, destination.title));
    }
    Ok(text)
}

struct Case<'a> {
    snapshot: &'a Snapshot,
    directory: &'a Directory,
    source: &'a End,
    destination: &'a End,
}

impl Case<'_> {
    fn decide(&self, from: IpAddr, to: IpAddr, protocol: Protocol, port: u16, text: &mut String) {
        if from == to {
            text.push_str("  allowed: a pod always reaches itself\n");
            return;
        }
        let other = |address| (address, self.directory.bearers(address));
        let mut allowed = true;
        for (direction, own, subject, (address, bearers)) in [
            (Direction::Egress, from, self.source, other(to)),
            (Direction::Ingress, to, self.destination, other(from)),
        ] {
            let other = Other { address, bearers: &bearers, protocol: protocol.number(), port };
            allowed &= self.side(direction, own, subject, &other, text);
        }
        text.push_str(if allowed { "  allowed\n" } else { "  denied\n" });
    }

    /// One direction; true when it allows. `own` is the subject's address.
    fn side(
        &self,
        direction: Direction,
        own: IpAddr,
        subject: &End,
        other: &Other<'_>,
        text: &mut String,
    ) -> bool {
        let (name, title) = (direction.name(), &subject.title);
        let known = match (&subject.pod, self.directory.subject(own)) {
            (Some(pod), _) => Subject::Known(pod),
            (None, Subject::Unknown(namespace)) => Subject::Unknown(namespace),
            (None, _) => {
                let _ = writeln!(text, "  {name} of {title}: no pod, so no policy selects it");
                return true;
            }
        };
        if direction == Direction::Ingress && self.is_own_node(subject, other.address) {
            let _ = writeln!(text, "  {name} of {title}: its own node always reaches it");
            return true;
        }
        let Some(side) = Side::of(direction, &known, &Policies(&self.snapshot.policies)) else {
            let _ = writeln!(text, "  {name} of {title}: no policy isolates it");
            return true;
        };
        let isolating: Vec<String> = side.policies.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "  {name} of {title}: isolated by {}", isolating.join(", "));
        for allow in &side.allows {
            let _ =
                writeln!(text, "    {} {name}[{}]: {}", allow.policy, allow.index, self.rule(allow, other));
        }
        let allows = side.allows(other, self.directory);
        if !allows {
            text.push_str("    no rule allows it\n");
        }
        allows
    }

    fn rule(&self, allow: &Allow, other: &Other<'_>) -> &'static str {
        match (allow.means(other, self.directory), allow.has_port(other)) {
            (true, true) => "allows it",
            (true, false) => "the peer matches, the port does not",
            (false, true) => "the port matches, the peer does not",
            (false, false) => "neither peer nor port matches",
        }
    }

    /// A pod that only CNI knows is on this node.
    fn is_own_node(&self, subject: &End, address: IpAddr) -> bool {
        let name = match &subject.pod {
            Some(pod) => pod.node.as_ref(),
            None => Some(&self.snapshot.facts.name),
        };
        name.and_then(|name| self.snapshot.nodes.get(name)).is_some_and(|node| bears(node, address))
    }
}

/// Whether the address is one of the node's own.
fn bears(node: &Node, address: IpAddr) -> bool {
    node.internal_ips.contains(&address) || node.hosts().any(|ip| ip == address)
}

fn parse_port(text: &str) -> Result<(Protocol, u16), String> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(format!("{other:?} is no protocol; use tcp, udp or sctp")),
    };
    let number = number.parse().ok().filter(|number| *number != 0);
    let port = number.ok_or_else(|| format!("{text:?} is no port; write it like 80 or 53/udp"))?;
    Ok((protocol, port))
}

fn end(text: &str, snapshot: &Snapshot, directory: &Directory) -> Result<End, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return address_end(address, snapshot, directory);
    }
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    let key = PodKey::new(namespace, name);
    let pod = directory
        .pod(&key)
        .ok_or_else(|| format!("there is no Pod {key}; give NAMESPACE/POD or an address"))?;
    if pod.host_network {
        let node = pod.node.as_ref().and_then(|name| snapshot.nodes.get(name));
        let addresses = node.map(|node| node.primary_ips().collect()).unwrap_or_default();
        return Ok(End { title: format!("{key}, which counts as its node"), addresses, pod: None });
    }
    let addresses: Vec<IpAddr> = directory.addresses_of(&key).into_iter().collect();
    if addresses.is_empty() {
        return Err(format!("Pod {key} has no address yet"));
    }
    Ok(End { title: key.to_string(), addresses, pod: Some(pod.clone()) })
}

fn address_end(address: IpAddr, snapshot: &Snapshot, directory: &Directory) -> Result<End, String> {
    let resolver = snapshot.config.resolver_addresses().any(|ip| ip == address);
    if !resolver && snapshot.config.service_cidrs.iter().any(|cidr| cidr.contains(&address)) {
        return Err(format!(
            "{address} is a Service's: policies judge the pods behind it; ask about one of these"
        ));
    }
    let bearers = directory.bearers(address);
    let (title, pod) = match bearers[..] {
        _ if resolver => ("the cluster's DNS".to_owned(), None),
        _ if directory.has_several_names(address) => ("a node's ingress".to_owned(), None),
        [pod] => (pod.key.to_string(), Some(pod.clone())),
        [] if matches!(directory.subject(address), Subject::Unknown(_)) => {
            ("a pod that the API has not shown yet".to_owned(), None)
        }
        _ => (node_title(address, snapshot).unwrap_or_else(|| "an address outside".to_owned()), None),
    };
    Ok(End { title, addresses: vec![address], pod })
}

fn node_title(address: IpAddr, snapshot: &Snapshot) -> Option<String> {
    snapshot.nodes.values().find(|node| bears(node, address)).map(|node| format!("node {}", node.name))
}
