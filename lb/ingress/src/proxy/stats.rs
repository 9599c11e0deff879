//! What is counted: requests of each route by method and status with their durations and sizes, and what was refused before a
//! route took it. Out: OpenMetrics text, under Weft's names and, on request, under those of ingress-nginx's dashboards.
//!
//! A route that nobody asked has no line, so the number of lines is bounded by what is in use.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use weft_model::NamespacedName;

/// Upper bounds in seconds, as Prometheus's clients and ingress-nginx have them.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Labels of a route: where it comes from and where it leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RouteLabels {
    pub(super) ingress: NamespacedName,
    pub(super) host: String,
    pub(super) path: String,
    /// Empty where it answers by itself.
    pub(super) service: String,
    /// Of its canary, empty without one.
    pub(super) canary: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Outcome {
    method: &'static str,
    status: u16,
    canary: bool,
}

#[derive(Default)]
struct Sums {
    outcomes: BTreeMap<Outcome, u64>,
    /// By the first bound that is not exceeded; the last is beyond all.
    durations: [u64; BUCKETS.len() + 1],
    seconds: f64,
    received_bytes: u64,
    sent_bytes: u64,
}

pub(super) struct RouteStats {
    labels: RouteLabels,
    sums: Mutex<Sums>,
    /// Connections that went to the backend as they were.
    passed: AtomicU64,
}

/// One request that is over.
pub(super) struct Finished<'a> {
    pub(super) method: &'a Method,
    pub(super) status: StatusCode,
    pub(super) canary: bool,
    pub(super) took: Duration,
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
}

impl RouteStats {
    pub(super) fn labels(&self) -> &RouteLabels {
        &self.labels
    }

    pub(super) fn pass(&self) {
        self.passed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count(&self, finished: &Finished<'_>) {
        let seconds = finished.took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        let (status, canary) = (finished.status.as_u16(), finished.canary);
        let outcome = Outcome { method: method_label(finished.method), status, canary };
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        *sums.outcomes.entry(outcome).or_default() += 1;
        if let Some(count) = sums.durations.get_mut(bucket) {
            *count += 1;
        }
        sums.seconds += seconds;
        sums.received_bytes += finished.received_bytes;
        sums.sent_bytes += finished.sent_bytes;
    }
}

/// A closed set: whoever invents methods makes no lines.
fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// Why something was refused before a route took it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// A head that RFC 9112 or RFC 9113 forbids, or one that is too long.
    Malformed,
    Host,
    Framing,
    Path,
    Connect,
    /// No route takes it: 404.
    NoRoute,
    /// No PROXY header where one is due, or a damaged one.
    ProxyHeader,
    TlsHandshake,
    /// TLS that was to be passed on, and no endpoint took it.
    NoEndpoint,
    /// The client was silent for too long.
    Slow,
    /// HTTP/2: too many resets, too much in one header list, frames that nobody may send.
    Flood,
}

const REFUSED: [(Refused, &str); 11] = [
    (Refused::Malformed, "malformed"),
    (Refused::Host, "host"),
    (Refused::Framing, "framing"),
    (Refused::Path, "path"),
    (Refused::Connect, "connect"),
    (Refused::NoRoute, "no_route"),
    (Refused::ProxyHeader, "proxy_header"),
    (Refused::TlsHandshake, "tls_handshake"),
    (Refused::NoEndpoint, "no_endpoint"),
    (Refused::Slow, "slow"),
    (Refused::Flood, "flood"),
];

/// Of the whole process.
#[derive(Default)]
pub(super) struct Stats {
    routes: Mutex<BTreeMap<RouteLabels, Arc<RouteStats>>>,
    refused: [AtomicU64; REFUSED.len()],
    connections: AtomicU64,
    /// Lines of the access log that nobody could write in time.
    pub(super) lines_lost: AtomicU64,
    /// Of answers, that went from socket to socket; nobody is told.
    pub(super) spliced_bytes: AtomicU64,
}

/// Counts a connection while it lives.
pub(super) struct Connected(Arc<Stats>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stats {
    /// What is counted of a route; the same after a change of routes that leaves its labels.
    pub(super) fn of(&self, labels: RouteLabels) -> Arc<RouteStats> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(RouteStats { labels: labels.clone(), sums: Mutex::default(), passed: AtomicU64::new(0) })
        };
        routes.entry(labels.clone()).or_insert_with(new).clone()
    }

    /// Forgets routes that no table holds any more.
    pub(super) fn tidy(&self) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.retain(|_, stats| Arc::strong_count(stats) > 1);
    }

    pub(super) fn refuse(&self, why: Refused) {
        let at = REFUSED.iter().position(|(known, _)| *known == why);
        if let Some(count) = at.and_then(|at| self.refused.get(at)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn connected(self: &Arc<Self>) -> Connected {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connected(self.clone())
    }

    /// OpenMetrics text without its end.
    pub(super) fn text(&self, nginx: bool) -> String {
        let routes: Vec<Arc<RouteStats>> =
            self.routes.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut text = self.own(&routes);
        if nginx {
            text.push_str(&as_nginx(&routes, self.connections.load(Ordering::Relaxed)));
        }
        text
    }

    fn own(&self, routes: &[Arc<RouteStats>]) -> String {
        let mut text = String::new();
        head(&mut text, "weft_ingress_requests", "counter", "Requests that a route took");
        for stats in routes {
            let labels = stats.labels.own();
            let mut by_status: BTreeMap<u16, u64> = BTreeMap::new();
            for (outcome, count) in &stats.lock().outcomes {
                *by_status.entry(outcome.status).or_default() += count;
            }
            for (status, count) in by_status {
                line(
                    &mut text,
                    "weft_ingress_requests_total",
                    &format!("{labels},status=\"{status}\""),
                    count,
                );
            }
        }
        histogram(&mut text, "weft_ingress_request_duration_seconds", routes, RouteLabels::own);
        head(&mut text, "weft_ingress_passed", "counter", "Connections whose TLS was passed on as it was");
        for stats in routes {
            let passed = stats.passed.load(Ordering::Relaxed);
            if passed > 0 {
                line(&mut text, "weft_ingress_passed_total", &stats.labels.own(), passed);
            }
        }
        head(&mut text, "weft_ingress_refused", "counter", "What was refused before a route took it");
        for ((_, reason), count) in REFUSED.iter().zip(&self.refused) {
            let count = count.load(Ordering::Relaxed);
            line(&mut text, "weft_ingress_refused_total", &format!("reason=\"{reason}\""), count);
        }
        head(&mut text, "weft_ingress_connections", "gauge", "Connections of clients that are open");
        let _ = writeln!(text, "weft_ingress_connections {}", self.connections.load(Ordering::Relaxed));
        head(
            &mut text,
            "weft_ingress_access_log_lost",
            "counter",
            "Lines of the access log that were not written",
        );
        let lost = self.lines_lost.load(Ordering::Relaxed);
        let _ = writeln!(text, "weft_ingress_access_log_lost_total {lost}");
        text
    }
}

impl RouteStats {
    fn lock(&self) -> std::sync::MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RouteLabels {
    fn own(&self) -> String {
        let NamespacedName { namespace, name } = &self.ingress;
        let [host, path, service] = [&self.host, &self.path, &self.service].map(|text| escaped(text));
        format!(
            "namespace=\"{namespace}\",ingress=\"{name}\",host=\"{host}\",path=\"{path}\",service=\"{service}\""
        )
    }

    fn nginx(&self) -> String {
        const CONTROLLER: &str = "controller_class=\"k8s.io/ingress-nginx\",controller_namespace=\"weft-system\",controller_pod=\"weft-ingress\"";
        format!("{CONTROLLER},{}", self.own())
    }
}

/// In the names and labels of ingress-nginx 1.x. Its counter has no `_total`, which only an unknown type may lack.
fn as_nginx(routes: &[Arc<RouteStats>], connections: u64) -> String {
    const PREFIX: &str = "nginx_ingress_controller";
    let mut text = String::new();
    head(&mut text, &format!("{PREFIX}_requests"), "unknown", "The total number of client requests");
    for stats in routes {
        let labels = stats.labels.nginx();
        for (Outcome { method, status, canary }, count) in &stats.lock().outcomes {
            let canary = if *canary { stats.labels.canary.as_str() } else { "" };
            let labels = format!("{labels},method=\"{method}\",status=\"{status}\",canary=\"{canary}\"");
            line(&mut text, &format!("{PREFIX}_requests"), &labels, *count);
        }
    }
    histogram(&mut text, &format!("{PREFIX}_request_duration_seconds"), routes, RouteLabels::nginx);
    for (name, read) in [
        ("request_size", (|sums: &Sums| sums.received_bytes) as fn(&Sums) -> u64),
        ("response_size", |sums: &Sums| sums.sent_bytes),
    ] {
        let name = format!("{PREFIX}_{name}");
        head(&mut text, &name, "summary", "Bytes of bodies");
        for stats in routes {
            let sums = stats.lock();
            let count = sums.outcomes.values().sum::<u64>();
            if count > 0 {
                line(&mut text, &format!("{name}_sum"), &stats.labels.nginx(), read(&sums));
                line(&mut text, &format!("{name}_count"), &stats.labels.nginx(), count);
            }
        }
    }
    let name = format!("{PREFIX}_nginx_process_connections");
    head(&mut text, &name, "gauge", "Current number of client connections");
    line(&mut text, &name, "state=\"active\"", connections);
    text
}

fn histogram(text: &mut String, name: &str, routes: &[Arc<RouteStats>], labels: fn(&RouteLabels) -> String) {
    head(text, name, "histogram", "From a request's head to the last byte of its answer");
    for stats in routes {
        let labels = labels(&stats.labels);
        let sums = stats.lock();
        let total: u64 = sums.durations.iter().sum();
        if total == 0 {
            continue;
        }
        let mut below = 0;
        for (bound, count) in BUCKETS.iter().zip(&sums.durations) {
            below += count;
            line(text, &format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), below);
        }
        line(text, &format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), total);
        let _ = writeln!(text, "{name}_sum{{{labels}}} {}", sums.seconds);
        line(text, &format!("{name}_count"), &labels, total);
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: u64) {
    let _ = writeln!(text, "{name}{{{labels}}} {value}");
}

/// A label's value (OpenMetrics 1.0, "ABNF").
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels_of(host: &str) -> RouteLabels {
        RouteLabels {
            ingress: NamespacedName::new("default", "web"),
            host: host.to_owned(),
            path: "/a\"b".into(),
            service: "web".into(),
            canary: "next".into(),
        }
    }

    fn counted() -> Arc<Stats> {
        let stats = Arc::new(Stats::default());
        let labels = labels_of("a.com");
        let route = stats.of(labels.clone());
        for (method, status, milliseconds, canary) in
            [(Method::GET, 200, 3, false), (Method::GET, 200, 30, true), (Method::POST, 503, 20_000, false)]
        {
            route.count(&Finished {
                method: &method,
                status: StatusCode::from_u16(status).unwrap(),
                canary,
                took: Duration::from_millis(milliseconds),
                received_bytes: 5,
                sent_bytes: 100,
            });
        }
        assert_eq!(stats.of(labels).lock().sent_bytes, 300, "the same route");
        stats.of(labels_of("silent.com"));
        stats.refuse(Refused::NoRoute);
        stats
    }

    #[test]
    fn a_route_that_was_asked_has_its_lines_and_no_other() {
        let text = counted().text(false);
        let labels = r#"namespace="default",ingress="web",host="a.com",path="/a\"b",service="web""#;
        for line in [
            format!("weft_ingress_requests_total{{{labels},status=\"200\"}} 2"),
            format!("weft_ingress_request_duration_seconds_bucket{{{labels},le=\"0.005\"}} 1"),
            format!("weft_ingress_request_duration_seconds_bucket{{{labels},le=\"10\"}} 2"),
            format!("weft_ingress_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} 3"),
            "weft_ingress_refused_total{reason=\"no_route\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|got| got == line), "{line}\n{text}");
        }
        assert!(!text.contains("silent.com") && !text.contains("nginx"), "{text}");
    }

    #[test]
    fn dashboards_of_ingress_nginx_find_their_names() {
        let text = counted().text(true);
        for part in [
            r#"nginx_ingress_controller_requests{controller_class="k8s.io/ingress-nginx""#,
            r#"method="GET",status="200",canary="next"} 1"#,
            "nginx_ingress_controller_request_duration_seconds_bucket{",
            "nginx_ingress_controller_response_size_sum{",
            "nginx_ingress_controller_nginx_process_connections{state=\"active\"} 0",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn what_no_table_holds_is_forgotten() {
        let stats = Stats::default();
        let held = stats.of(labels_of("held.com"));
        stats.of(labels_of("gone.com"));
        stats.tidy();
        let routes = stats.routes.lock().unwrap();
        assert_eq!(routes.values().map(|one| one.labels().host.as_str()).collect::<Vec<_>>(), ["held.com"]);
        drop(held);
    }
}
