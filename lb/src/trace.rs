//! `weft lb status` and `weft lb trace`: what this node knows of addresses, for a person. In: the Snapshot, the plan and what the
//! announcer does. Out: text. Pure but for the routes of the agent's socket.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::sync::watch;
use weft_model::objects::{Service, TrafficPolicy};
use weft_model::{NodeName, Snapshot};

use crate::allocate::{self, Allocation, Grant};
use crate::announce::{Announced, Plan, Standing};

/// Where the answers come from.
#[derive(Clone)]
pub struct Views {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub plan: watch::Receiver<Option<Arc<Plan>>>,
    pub standing: watch::Receiver<Standing>,
}

#[derive(Deserialize)]
struct Question {
    address: IpAddr,
}

/// `GET /lb/status` and `GET /lb/trace?address=..`, for the router of the agent's socket.
pub fn router(views: Views) -> Router {
    let status_of = |State(views): State<Views>| async move { answer(&views, status) };
    let trace_of = |State(views): State<Views>, Query(question): Query<Question>| async move {
        answer(&views, |snapshot, plan, standing| trace(snapshot, plan, standing, question.address))
    };
    Router::new().route("/lb/status", get(status_of)).route("/lb/trace", get(trace_of)).with_state(views)
}

fn answer(views: &Views, text: impl FnOnce(&Snapshot, &Plan, &Standing) -> String) -> Response {
    let (snapshot, plan) = (views.snapshots.borrow().clone(), views.plan.borrow().clone());
    match snapshot.zip(plan) {
        Some((snapshot, plan)) => text(&snapshot, &plan, &views.standing.borrow()).into_response(),
        None => {
            let message = "the agent has not read this cluster's objects yet";
            (StatusCode::UNPROCESSABLE_ENTITY, message).into_response()
        }
    }
}

/// Who answers, as this node sees it.
fn answering<'a>(announced: &'a Announced, standing: &Standing) -> Option<&'a NodeName> {
    announced
        .candidates
        .iter()
        .find(|node| !standing.dead.contains(*node) && !standing.silent.contains(*node))
}

fn state(node: &NodeName, standing: &Standing) -> &'static str {
    match (standing.dead.contains(node), standing.silent.contains(node)) {
        (true, _) => " (dead)",
        (_, true) => " (its agent is silent)",
        _ => "",
    }
}

pub fn status(snapshot: &Snapshot, plan: &Plan, standing: &Standing) -> String {
    let Allocation { grants, problems, .. } = allocate::allocate(snapshot);
    let mut text = String::new();
    for (key, grant) in &grants {
        let addresses: Vec<String> = grant.addresses.iter().map(IpAddr::to_string).collect();
        let addresses = if addresses.is_empty() { "none yet".to_owned() } else { addresses.join(", ") };
        let _ = writeln!(text, "{key}  {addresses}  ({})", origin(grant));
        for ip in &grant.addresses {
            if let Some(announced) = plan.addresses.get(ip) {
                let _ = writeln!(text, "  {ip}: {}", who(snapshot, plan, *ip, announced, standing));
            }
        }
    }
    if grants.is_empty() {
        text.push_str("no Service of type LoadBalancer\n");
    }
    for problem in problems {
        let _ = writeln!(text, "problem: {problem}");
    }
    text
}

fn origin(grant: &Grant) -> String {
    let pools: Vec<&str> = grant.pools.iter().map(String::as_str).collect();
    match pools.as_slice() {
        [] if grant.addresses.is_empty() => "pending".to_owned(),
        [] => "addresses of nodes".to_owned(),
        pools => format!("of IPAddressPool {}", pools.join(", ")),
    }
}

fn who(snapshot: &Snapshot, plan: &Plan, ip: IpAddr, announced: &Announced, standing: &Standing) -> String {
    if let Some(mac) = standing.contested.get(&ip) {
        return format!("contested: the machine with MAC {mac} answers for it, so no node claims it");
    }
    match answering(announced, standing) {
        Some(node) if *node == plan.node && standing.held.contains(&ip) => {
            format!("Node {node} (this node) answers by ARP or neighbour discovery")
        }
        Some(node) if *node == plan.node && announced.links.is_empty() => {
            format!("Node {node} (this node) is to answer, but no link of it holds the subnet")
        }
        Some(node) if *node == plan.node => {
            format!("Node {node} (this node) is to answer, and does not yet (no quorum, or it asks the LAN)")
        }
        Some(node) if snapshot.nodes.get(node).is_some_and(|it| it.answers_for.held.contains(&ip)) => {
            format!("Node {node} answers by ARP or neighbour discovery")
        }
        Some(node) => format!("Node {node} is to answer (`weft lb status` there says why it does not yet)"),
        None => {
            "no node may answer (externalTrafficPolicy Local without ready endpoints, or no node selected)"
                .to_owned()
        }
    }
}

pub fn trace(snapshot: &Snapshot, plan: &Plan, standing: &Standing, ip: IpAddr) -> String {
    let mut text = format!("address    {ip}\n");
    match plan.addresses.get(&ip) {
        Some(announced) => {
            let _ = writeln!(text, "answers    {}", who(snapshot, plan, ip, announced, standing));
            let order: Vec<String> =
                announced.candidates.iter().map(|node| format!("{node}{}", state(node, standing))).collect();
            let _ = writeln!(text, "in order   {}", order.join(", "));
            if let Some(node) = standing.before.get(&ip) {
                let _ = writeln!(text, "before     {node}: connections that it knows go on there");
            }
            let links: Vec<&str> = announced.links.keys().map(String::as_str).collect();
            let _ = writeln!(text, "links here {}", links.join(", "));
            let mac = standing.macs.iter().filter(|(link, _)| announced.links.contains_key(*link));
            for (link, mac) in mac.filter(|_| standing.held.contains(&ip)) {
                let _ = writeln!(text, "from MAC   {mac} ({link})");
            }
        }
        None => match snapshot.nodes.values().find(|node| node.internal_ips.contains(&ip)) {
            Some(node) => {
                let _ = writeln!(text, "answers    Node {}, whose own address it is", node.name);
            }
            None => text.push_str("answers    no node: it is no LoadBalancer address of an IPAddressPool\n"),
        },
    }
    for service in snapshot.services.values().filter(|service| service.load_balancer_ips.contains(&ip)) {
        of_service(&mut text, service, snapshot);
    }
    text
}

fn of_service(text: &mut String, service: &Service, snapshot: &Snapshot) {
    let policy = match service.external_traffic_policy {
        TrafficPolicy::Cluster => "Cluster: the answering node forwards to any endpoint",
        TrafficPolicy::Local => "Local: the answering node's own endpoints, the client's address is kept",
    };
    let _ = writeln!(text, "Service    {} (externalTrafficPolicy {policy})", service.key);
    for port in &service.ports {
        let _ = writeln!(text, "  port     {}/{}", port.port, port.protocol.name());
    }
    for endpoint in snapshot.slices_of(&service.key).flat_map(|slice| &slice.endpoints) {
        let node = endpoint.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
        let ready = if endpoint.ready { "" } else { ", not ready" };
        let _ = writeln!(text, "  endpoint {}{node}{ready}", endpoint.address);
    }
}
