//! The table of routes made ready for requests: hosts hashed, expressions compiled, endpoints with what is known of them.
//!
//! A change makes a new one, which takes the place of the old in one step; requests under way end on the old.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use regex::Regex;
use rustls::pki_types::ServerName;
use rustls::server::danger::ClientCertVerifier;
use tokio::sync::Semaphore;
use weft_model::NamespacedName;
use weft_model::ingress::{Front, Observe};

use super::balance::{Directory, Endpoint};
use super::digest::Nonces;
use super::limits::Clients;
use super::mirror::MAX_COPIES;
use super::pool::{Speech, Tls};
use super::stats::{RouteLabels, RouteStats, Stats};
use super::tls;
use crate::annotations::{BackendProtocol, ProxyVersion, VerifyClient};
use crate::plan::table::{
    Action, Backend, BackendKey, Host, Passthrough, PathMatch, Route, RouteMaterials, RouteTable, Server,
    expression,
};

/// What outlives a change of routes.
pub(super) struct Standing {
    pub(super) endpoints: Directory,
    clients: Mutex<HashMap<NamespacedName, Arc<Clients>>>,
    pub(super) stats: Arc<Stats>,
    /// Copies of requests (`mirror`) that may be begun.
    pub(super) copies: Arc<Semaphore>,
    pub(super) nonces: Nonces,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            endpoints: Directory::default(),
            clients: Mutex::default(),
            stats: Arc::default(),
            copies: Arc::new(Semaphore::new(MAX_COPIES)),
            nonces: Nonces::default(),
        }
    }
}

impl Standing {
    fn clients(&self, ingress: &NamespacedName) -> Arc<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.entry(ingress.clone()).or_default().clone()
    }

    /// Forgets what no table holds any more.
    pub(super) fn tidy(&self) {
        self.endpoints.tidy();
        self.stats.tidy();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|_, known| Arc::strong_count(known) > 1);
    }
}

#[derive(Default)]
pub(super) struct Compiled {
    exact: HashMap<String, Arc<CompiledServer>>,
    /// By what follows the first label.
    wildcard: HashMap<String, Arc<CompiledServer>>,
    any: Option<Arc<CompiledServer>>,
    backends: BTreeMap<BackendKey, (Arc<Backend>, Places)>,
    pub(super) addresses: BTreeSet<SocketAddr>,
    pub(super) front: Front,
    pub(super) observe: Observe,
}

pub(super) struct CompiledServer {
    made_from: Arc<Server>,
    /// In the order in which they are tried.
    routes: Vec<Arc<CompiledRoute>>,
    /// Where in it what stands, so that none of many is looked at in vain.
    index: Index,
    pub(super) redirect_to: Option<String>,
    passed: Option<Arc<Passed>>,
}

/// Where TLS goes as it is.
pub(super) struct Passed {
    pub(super) places: Places,
    pub(super) proxy_protocol: Option<ProxyVersion>,
    pub(super) stats: Arc<RouteStats>,
}

/// Places in a list of routes.
#[derive(Default)]
struct Index {
    exact: HashMap<String, usize>,
    prefix: HashMap<String, usize>,
    /// Those that have to be asked one by one.
    others: Vec<usize>,
}

impl Index {
    fn new(routes: &[Arc<CompiledRoute>]) -> Self {
        let mut index = Self::default();
        for (place, route) in routes.iter().enumerate() {
            match &route.matcher {
                Matcher::Plain(PathMatch::Exact(text)) => {
                    index.exact.entry(text.clone()).or_insert(place);
                }
                Matcher::Plain(PathMatch::Prefix(text)) => {
                    index.prefix.entry(text.clone()).or_insert(place);
                }
                _ => index.others.push(place),
            }
        }
        index
    }
}

impl CompiledServer {
    /// The first that matches.
    fn find(&self, path: &str) -> Option<&Arc<CompiledRoute>> {
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        let prefixes = ends.filter_map(|end| self.index.prefix.get(path.get(..end)?));
        let hashed = prefixes.chain(self.index.exact.get(path)).min().copied();
        let before = |place: &&usize| hashed.is_none_or(|hashed| **place < hashed);
        let mut others = self.index.others.iter().take_while(before);
        let other = others.find(|place| self.routes.get(**place).is_some_and(|route| route.matches(path)));
        self.routes.get(other.copied().or(hashed)?)
    }
}

pub(super) struct CompiledRoute {
    pub(super) route: Arc<Route>,
    matcher: Matcher,
    pub(super) upstream: Option<Upstream>,
    pub(super) canary: Option<(Option<Regex>, Upstream)>,
    pub(super) fallback: Option<Upstream>,
    pub(super) clients: Arc<Clients>,
    pub(super) stats: Arc<RouteStats>,
    pub(super) client_verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// `auth-tls-match-cn`.
    pub(super) client_name: Option<Regex>,
    /// Why every request gets 503: something that protects the backend is asked for and cannot be done.
    pub(super) closed: Option<&'static str>,
}

/// A backend and how it is spoken to.
#[derive(Clone)]
pub(super) struct Upstream {
    pub(super) places: Places,
    pub(super) speech: Speech,
}

#[derive(Clone)]
pub(super) enum Places {
    Endpoints(Arc<[Arc<Endpoint>]>),
    /// Resolved when it is asked.
    Name(String, u16),
    None,
}

enum Matcher {
    Plain(PathMatch),
    Regex(Regex),
    /// An expression that cannot be compiled; the planner has told it.
    Never,
}

/// A route that takes a request.
pub(super) enum Found<'a> {
    Route(&'a Arc<CompiledRoute>),
    /// The host is another name of this one.
    OtherName(&'a str),
}

impl Compiled {
    /// What is the same in the table `before` is not made anew: an expression and the TLS of a backend take long.
    pub(super) fn new(table: &RouteTable, before: &Self, standing: &Standing) -> Self {
        let mut compiled = Self { front: table.front.clone(), observe: table.observe, ..Self::default() };
        let mut others = BTreeSet::new();
        for (key, backend) in &table.backends {
            let known = before.backends.get(key).filter(|(known, _)| known == backend);
            let places = known.map(|(_, places)| places.clone()).unwrap_or_else(|| {
                others.insert(key);
                places(backend, standing)
            });
            if let Backend::Endpoints(targets) = &**backend {
                compiled.addresses.extend(targets.iter().map(|target| target.address));
            }
            compiled.backends.insert(key.clone(), (backend.clone(), places));
        }
        others.extend(before.backends.keys().filter(|key| !table.backends.contains_key(key)));
        for (host, server) in &table.hosts {
            let is_same = |known: &&Arc<CompiledServer>| {
                known.made_from == *server && !server.backends().any(|key| others.contains(key))
            };
            let ready = before.server(host).filter(is_same).cloned();
            let ready =
                ready.unwrap_or_else(|| Arc::new(server_of(host, server, &compiled.backends, standing)));
            match host {
                Host::Exact(name) => drop(compiled.exact.insert(name.clone(), ready)),
                Host::Wildcard(rest) => drop(compiled.wildcard.insert(rest.clone(), ready)),
                Host::Any => compiled.any = Some(ready),
            }
        }
        compiled
    }

    fn server(&self, host: &Host) -> Option<&Arc<CompiledServer>> {
        match host {
            Host::Exact(name) => self.exact.get(name),
            Host::Wildcard(rest) => self.wildcard.get(rest),
            Host::Any => self.any.as_ref(),
        }
    }

    /// The host's own rules, else a wildcard's; where none of their paths is meant, the rules for every host.
    pub(super) fn find(&self, host: &str, path: &str) -> Option<Found<'_>> {
        let named = self.named(host);
        if let Some(other) = named.and_then(|server| server.redirect_to.as_deref()) {
            return Some(Found::OtherName(other));
        }
        let mut servers = named.into_iter().chain(self.any.as_deref());
        servers.find_map(|server| server.find(path)).map(Found::Route)
    }

    fn named(&self, host: &str) -> Option<&CompiledServer> {
        let wildcard = || host.split_once('.').and_then(|(_, rest)| self.wildcard.get(rest));
        self.exact.get(host).or_else(wildcard).map(Arc::as_ref)
    }

    /// Where TLS goes whose ClientHello asks for this name, when it is not for this proxy.
    pub(super) fn passed(&self, name: Option<&str>) -> Option<&Arc<Passed>> {
        let name = name?.trim_end_matches('.').to_ascii_lowercase();
        self.named(&name)?.passed.as_ref()
    }
}

impl CompiledRoute {
    fn matches(&self, path: &str) -> bool {
        match &self.matcher {
            Matcher::Plain(plain) => plain.matches(path),
            Matcher::Regex(expression) => expression.is_match(path),
            Matcher::Never => false,
        }
    }

    /// `rewrite-target` with the captures of the path's expression.
    pub(super) fn rewritten(&self, path: &str) -> Option<String> {
        let target = self.route.settings.rewrite_target.as_deref()?;
        let captures = match &self.matcher {
            Matcher::Regex(expression) => expression.captures(path),
            _ => None,
        };
        let mut text = String::with_capacity(target.len());
        let mut rest = target.chars().peekable();
        while let Some(letter) = rest.next() {
            match rest.peek().and_then(|digit| digit.to_digit(10)) {
                Some(number) if letter == '$' => {
                    rest.next();
                    let group = captures.as_ref().and_then(|found| found.get(number as usize));
                    text.push_str(group.map_or("", |group| group.as_str()));
                }
                _ => text.push(letter),
            }
        }
        if !text.starts_with('/') {
            text.insert(0, '/');
        }
        Some(text)
    }
}

/// Hosts that ask for a certificate of the client.
pub(super) fn mutual(table: &RouteTable) -> BTreeSet<String> {
    let asks = |server: &Server| server.routes.iter().any(|route| asks_for_certificate(route));
    table.hosts.iter().filter(|(_, server)| asks(server)).map(|(host, _)| host.to_string()).collect()
}

fn asks_for_certificate(route: &Route) -> bool {
    route.settings.client_tls.as_ref().is_some_and(|tls| tls.verify != VerifyClient::Off)
}

fn places(backend: &Backend, standing: &Standing) -> Places {
    match backend {
        Backend::Endpoints(targets) if targets.is_empty() => Places::None,
        Backend::Endpoints(targets) => Places::Endpoints(standing.endpoints.of(targets).into()),
        Backend::Name(name, port) => Places::Name(name.clone(), *port),
        Backend::Missing(_) => Places::None,
    }
}

fn places_of(key: &BackendKey, all: &BTreeMap<BackendKey, (Arc<Backend>, Places)>) -> Places {
    all.get(key).map_or(Places::None, |(_, places)| places.clone())
}

fn server_of(
    host: &Host,
    server: &Arc<Server>,
    places: &BTreeMap<BackendKey, (Arc<Backend>, Places)>,
    standing: &Standing,
) -> CompiledServer {
    let routes: Vec<_> =
        server.routes.iter().map(|route| Arc::new(route_of(host, route, places, standing))).collect();
    let passed = server.passthrough.as_ref().map(|passthrough| {
        let Passthrough { backend, origin, proxy_protocol } = passthrough;
        let labels = RouteLabels {
            ingress: origin.ingress.clone(),
            host: host.to_string(),
            path: "/".to_owned(),
            service: backend.service.name.to_string(),
            canary: String::new(),
        };
        Arc::new(Passed {
            places: places_of(backend, places),
            proxy_protocol: *proxy_protocol,
            stats: standing.stats.of(labels),
        })
    });
    CompiledServer {
        made_from: server.clone(),
        index: Index::new(&routes),
        routes,
        redirect_to: server.redirect_to.clone(),
        passed,
    }
}

fn route_of(
    host: &Host,
    route: &Arc<Route>,
    places: &BTreeMap<BackendKey, (Arc<Backend>, Places)>,
    standing: &Standing,
) -> CompiledRoute {
    let settings = &route.settings;
    let mut closed = None;
    let speech = speech(route).unwrap_or_else(|_| {
        closed = Some("the TLS of its backends cannot be set up");
        Speech { http2: false, tls: None }
    });
    let upstream = |key: &BackendKey, speech: &Speech| Upstream {
        places: places_of(key, places),
        speech: speech.clone(),
    };
    let canary = route.canary.as_ref().map(|canary| {
        let pattern = canary.rule.header_pattern.as_ref().map(|pattern| Regex::new(pattern));
        (pattern.and_then(Result::ok), upstream(&canary.backend, &speech))
    });
    let client_verifier = verifier(&route.materials);
    if asks_for_certificate(route) && client_verifier.is_none() && !accepts_any(route) {
        closed = Some("the authorities of client certificates cannot be used");
    }
    let client_name =
        settings.client_tls.as_ref().and_then(|tls| tls.match_cn.as_ref()).map(|text| Regex::new(text));
    if client_name.as_ref().is_some_and(Result::is_err) {
        closed = Some("auth-tls-match-cn is no expression");
    }
    let client_name = client_name.and_then(Result::ok);
    CompiledRoute {
        matcher: match &route.matcher {
            PathMatch::Regex(text) => expression(text).map_or(Matcher::Never, Matcher::Regex),
            plain => Matcher::Plain(plain.clone()),
        },
        upstream: match &route.action {
            Action::Forward(key) => Some(upstream(key, &speech)),
            _ => None,
        },
        canary,
        fallback: route.fallback.as_ref().map(|key| upstream(key, &Speech { http2: false, tls: None })),
        clients: standing.clients(&route.origin.ingress),
        stats: standing.stats.of(labels(host, route)),
        client_verifier,
        client_name,
        closed: if settings.closed { Some("what protects it cannot be honoured") } else { closed },
        route: route.clone(),
    }
}

fn labels(host: &Host, route: &Route) -> RouteLabels {
    RouteLabels {
        ingress: route.origin.ingress.clone(),
        host: host.to_string(),
        path: route.matcher.path().to_owned(),
        service: match &route.action {
            Action::Forward(key) => key.service.name.to_string(),
            _ => String::new(),
        },
        canary: route
            .canary
            .as_ref()
            .map_or_else(String::new, |canary| canary.backend.service.name.to_string()),
    }
}

fn accepts_any(route: &Route) -> bool {
    route.settings.client_tls.as_ref().is_some_and(|tls| tls.verify == VerifyClient::OptionalNoCa)
}

fn verifier(materials: &RouteMaterials) -> Option<Arc<dyn ClientCertVerifier>> {
    tls::client_verifier(&materials.client_authorities.as_ref()?.0).ok()
}

fn speech(route: &Route) -> Result<Speech, tls::TlsError> {
    let (http2, secure) = match route.settings.backend_protocol {
        BackendProtocol::Http => (false, false),
        BackendProtocol::Https => (false, true),
        BackendProtocol::Grpc => (true, false),
        BackendProtocol::Grpcs => (true, true),
    };
    if !secure {
        return Ok(Speech { http2, tls: None });
    }
    let wanted = &route.settings.upstream_tls;
    let authorities =
        wanted.verify.then(|| route.materials.upstream_authorities.as_ref().map(|pem| pem.0.as_slice()));
    let authorities = match authorities {
        Some(None) => return Err(tls::TlsError::Authorities),
        Some(found) => found,
        None => None,
    };
    let mut config = tls::client_config(authorities, route.materials.upstream_certificate.as_ref(), http2)?;
    if !wanted.send_name {
        Arc::make_mut(&mut config).enable_sni = false;
    }
    let service = match &route.action {
        Action::Forward(key) => format!("{}.{}.svc", key.service.name, key.service.namespace),
        _ => String::from("backend"),
    };
    let name = wanted.name.clone().unwrap_or(service);
    let name = ServerName::try_from(name).map_err(|_| tls::TlsError::Authorities)?;
    Ok(Speech { http2, tls: Some(Tls { config, name }) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use weft_netstack::reconcile::Planner as _;

    use super::*;
    use crate::explain::decide;
    use crate::plan::IngressPlanner;
    use crate::plan::changes::tables;
    use crate::plan::tests::snapshot;

    const KINDS: [&str; 3] = ["Exact", "Prefix", "ImplementationSpecific"];

    fn table(paths: &[(usize, String)], regex: bool) -> RouteTable {
        let backend = json!({"service": {"name": "web", "port": {"number": 80}}});
        let paths: Vec<Value> = paths
            .iter()
            .map(|(kind, path)| json!({"path": path, "pathType": KINDS[*kind], "backend": backend}))
            .collect();
        let annotations = json!({"nginx.ingress.kubernetes.io/use-regex": regex.to_string()});
        let metadata = json!({"name": "web", "namespace": "default", "annotations": annotations,
            "creationTimestamp": "2026-01-01T00:00:00Z"});
        let spec =
            json!({"ingressClassName": "weft", "rules": [{"host": "a.com", "http": {"paths": paths}}]});
        let ingress = json!({"kind": "Ingress", "metadata": metadata, "spec": spec});
        IngressPlanner::default().plan(&snapshot(vec![ingress])).plan
    }

    /// Every route of the table with what it leads to.
    fn described(compiled: &Compiled) -> Vec<String> {
        let addresses = |upstream: &Upstream| match &upstream.places {
            Places::Endpoints(all) => format!("{:?}", all.iter().map(|one| one.address).collect::<Vec<_>>()),
            Places::Name(name, port) => format!("{name}:{port}"),
            Places::None => "none".to_owned(),
        };
        let route = |host: &str, route: &CompiledRoute| {
            let canary = route.canary.as_ref().map(|(_, upstream)| addresses(upstream));
            let leads =
                (route.upstream.as_ref().map(addresses), canary, route.fallback.as_ref().map(addresses));
            format!("{host} {:?} {leads:?} {:?}", route.route, route.closed)
        };
        let server = |(host, server): (&String, &Arc<CompiledServer>)| {
            let passed = server.passed.as_ref().map(|passed| {
                addresses(&Upstream {
                    places: passed.places.clone(),
                    speech: Speech { http2: false, tls: None },
                })
            });
            let mut lines: Vec<String> = server.routes.iter().map(|one| route(host, one)).collect();
            lines.push(format!("{host} {:?} {passed:?}", server.redirect_to));
            lines
        };
        let any = compiled.any.as_ref().map(|server| ("*".to_owned(), server.clone()));
        let all = compiled.exact.iter().chain(&compiled.wildcard);
        let mut lines: Vec<String> =
            all.chain(any.as_ref().map(|(host, server)| (host, server))).flat_map(server).collect();
        lines.sort();
        lines.push(format!("{:?}", compiled.addresses));
        lines
    }

    proptest! {
        #[test]
        fn what_is_made_of_a_change_is_what_would_be_made_of_the_whole(tables in tables()) {
            let (standing, mut compiled) = (Standing::default(), Compiled::default());
            for table in tables {
                compiled = Compiled::new(&table, &compiled, &standing);
                let anew = Compiled::new(&table, &Compiled::default(), &standing);
                prop_assert_eq!(described(&compiled), described(&anew));
            }
        }

        #[test]
        fn the_index_takes_the_route_that_a_look_at_each_in_turn_takes(
            paths in proptest::collection::vec((0..3_usize, "(/[ab]{1,2}){0,3}/?"), 1..12),
            asked in proptest::collection::vec("(/[ab]{1,2}){0,4}/?", 1..30),
            regex in any::<bool>(),
        ) {
            let paths: Vec<_> = paths.into_iter().map(|(kind, path)| (kind, format!("/{}", path.trim_start_matches('/')))).collect();
            let table = table(&paths, regex);
            let compiled = Compiled::new(&table, &Compiled::default(), &Standing::default());
            for asked in asked {
                let path = format!("/{}", asked.trim_start_matches('/'));
                let found = compiled.find("a.com", &path).map(|found| match found {
                    Found::Route(route) => route.route.clone(),
                    Found::OtherName(_) => unreachable!("no host has another name"),
                });
                let expected = decide(&table, "a.com", &path).map(|(_, route)| Arc::new(route.clone()));
                prop_assert_eq!(found, expected, "{} of {:?}", path, paths);
            }
        }
    }
}
