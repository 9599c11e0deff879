//! What load balancers ask a node: is it healthy, and has it endpoints of a Service? In flow the plan's checks and whether the
//! rules are programmed, from the applier; out flow HTTP answers with kube-proxy's status codes and bodies (KEP-3836).
//!
//! ```text
//!  applier --programmed / failed--> State --read at each request--> /healthz, /livez      (--proxy-health-address)
//!                                                                   healthCheckNodePort   (node's own addresses)
//! ```

mod http;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;
use weft_model::ServiceKey;

use super::metrics::ProxyMetrics;
use super::service::LocalEndpoints;
use http::{Answer, Serving};

/// What the plan says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthChecks {
    /// Where the health check ports answer.
    pub(super) node_ips: Vec<IpAddr>,
    /// The node is about to go, or there is no Node: no new connections should come through it.
    pub(super) leaving: bool,
    pub(super) services: BTreeMap<ServiceKey, (u16, LocalEndpoints)>,
}

/// Read by every request.
#[derive(Clone, Debug, Default)]
struct State {
    checks: Arc<HealthChecks>,
    /// The rules in the kernel are those of the last plan.
    programmed: bool,
    /// When they last were.
    updated: Option<Timestamp>,
}

/// The health of this node's proxy; unhealthy until the rules are programmed for the first time.
#[derive(Default)]
pub struct ProxyHealth {
    state: ArcSwap<State>,
    metrics: Arc<ProxyMetrics>,
}

impl ProxyHealth {
    pub(super) fn new(metrics: Arc<ProxyMetrics>) -> Self {
        Self { metrics, ..Self::default() }
    }

    pub(super) fn programmed(&self, checks: Arc<HealthChecks>, now: Timestamp) {
        self.state.store(Arc::new(State { checks, programmed: true, updated: Some(now) }));
    }

    pub(super) fn failed(&self) {
        let before = self.state.load_full();
        self.state.store(Arc::new(State { programmed: false, ..(*before).clone() }));
    }

    /// Answers `/healthz` (503 also while the node is about to go) and `/livez` for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let answer = move |path: &str| self.answer(path, Timestamp::now());
        http::serve(listener, Arc::new(answer)).await;
    }

    fn answer(&self, path: &str, now: Timestamp) -> Answer {
        let State { checks, programmed, updated } = &**self.state.load();
        let (eligible, counted) = match path {
            "/healthz" => (Some(!checks.leaving), self.metrics.healthz()),
            "/livez" => (None, self.metrics.livez()),
            _ => return Answer::not_found(),
        };
        let ok = *programmed && eligible != Some(false);
        counted.count(ok);
        // As kube-proxy has it: recent while all is well, even if nothing had to be changed for long.
        let updated = if ok { Some(now) } else { *updated };
        let mut body = json!({
            "lastUpdated": updated.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |time| time.to_string()),
            "currentTime": now.to_string(),
            "healthy": programmed,
        });
        if let Some(eligible) = eligible {
            body["nodeEligible"] = eligible.into();
        }
        Answer::json(ok, body.to_string())
    }

    /// What the health check port of a Service says at an address of one family.
    fn answer_for(&self, service: &ServiceKey, ipv6: bool) -> Answer {
        let state = self.state.load();
        let counts = state.checks.services.get(service).map(|(_, counts)| *counts).unwrap_or_default();
        let count = if ipv6 { counts.ipv6 } else { counts.ipv4 };
        let body = json!({
            "service": {"namespace": service.namespace, "name": service.name},
            "localEndpoints": count,
            "serviceProxyHealthy": state.programmed,
        });
        let answer = Answer::json(count > 0 && state.programmed, body.to_string());
        answer.header("X-Load-Balancing-Endpoint-Weight", count.to_string())
    }
}

/// The open health check ports.
#[derive(Default)]
pub(super) struct HealthPorts {
    open: BTreeMap<(SocketAddr, ServiceKey), Serving>,
}

impl HealthPorts {
    /// Opens and closes what differs; a line for each that cannot be opened, which the next pass tries again.
    pub(super) async fn reconcile(
        &mut self,
        health: &Arc<ProxyHealth>,
        checks: &HealthChecks,
    ) -> Vec<String> {
        let wanted: BTreeSet<(SocketAddr, ServiceKey)> = checks
            .services
            .iter()
            .flat_map(|(key, (port, _))| {
                checks.node_ips.iter().map(|ip| (SocketAddr::new(*ip, *port), key.clone()))
            })
            .collect();
        // One after the other: a closed port is free for another Service at once.
        let closed: Vec<_> = self.open.extract_if(.., |port, _| !wanted.contains(port)).collect();
        for (_, serving) in closed {
            serving.end().await;
        }
        let mut failed = Vec::new();
        for (address, service) in wanted {
            if self.open.contains_key(&(address, service.clone())) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    let serving = serve_port(health.clone(), listener, address.is_ipv6(), service.clone());
                    self.open.insert((address, service), serving);
                }
                Err(error) => failed.push(format!(
                    "healthCheckNodePort of Service {service} cannot answer on {address}: {error}; free the port"
                )),
            }
        }
        failed
    }
}

fn serve_port(health: Arc<ProxyHealth>, listener: TcpListener, ipv6: bool, service: ServiceKey) -> Serving {
    let answer = move |_: &str| health.answer_for(&service, ipv6);
    Serving::start(listener, Arc::new(answer))
}

#[cfg(test)]
mod tests;
