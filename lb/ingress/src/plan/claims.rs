//! Who gets which host and path: every rule of every Ingress is a claim, the older claim wins, canaries join the claims that they
//! are the canaries of, and each host's routes come out in the order in which they are tried.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use weft_model::ingress::{BackendPort, Ingress, IngressBackend, IngressPath, PathType};
use weft_model::{NamespacedName, ObjectRef, Problem, Reason};

use super::Claimed;
use super::materials::Materials;
use super::table::{
    Action, BackendKey, CanaryBranch, Host, Origin, Passthrough, PathMatch, Route, RouteMaterials, Server,
    expression,
};
use crate::annotations::Settings;

/// Which objects name a backend, and in which field.
pub(super) type Wanted = Vec<(ObjectRef, String)>;

/// The hosts of all Ingresses. Each is planned by itself, and again only when an Ingress that names it is another than before.
#[derive(Default)]
pub(super) struct Claims {
    hosts: BTreeMap<Host, HostPlan>,
}

/// What was planned for one host, and of whom.
struct HostPlan {
    claimed: Vec<Arc<Claimed>>,
    server: Arc<Server>,
    wanted: BTreeMap<BackendKey, Wanted>,
    problems: Vec<Problem>,
}

impl HostPlan {
    fn is_of(&self, claimed: &[&Arc<Claimed>]) -> bool {
        self.claimed.len() == claimed.len()
            && self.claimed.iter().zip(claimed).all(|(known, one)| Arc::ptr_eq(known, one))
    }
}

impl Claims {
    /// The hosts of the table; `claimed` is in the order of age.
    pub(super) fn plan(
        &mut self,
        claimed: &[Arc<Claimed>],
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<Host, Arc<Server>> {
        let mut by_host: HashMap<&Host, Vec<&Arc<Claimed>>> = HashMap::new();
        for one in claimed {
            for host in one.hosts.keys() {
                by_host.entry(host).or_default().push(one);
            }
        }
        self.hosts.retain(|host, _| by_host.contains_key(host));
        for (host, claimed) in by_host {
            if !self.hosts.get(host).is_some_and(|planned| planned.is_of(&claimed)) {
                self.hosts.insert(host.clone(), Collector::plan(host, &claimed));
            }
        }
        problems.extend(self.hosts.values().flat_map(|planned| planned.problems.iter().cloned()));
        let served = self.hosts.iter().filter(|(_, planned)| *planned.server != Server::default());
        let mut hosts = served.map(|(host, planned)| (host.clone(), planned.server.clone())).collect();
        let mains = || claimed.iter().filter(|one| !one.is_canary());
        for one in mains().filter(|one| !one.parsed.settings.server_aliases.is_empty()) {
            alias(one, &mut hosts, problems);
        }
        for one in mains().filter(|one| one.parsed.settings.from_to_www) {
            redirect_www(&one.ingress, &mut hosts);
        }
        hosts
    }

    /// By whom each backend is named.
    pub(super) fn wanted(&self) -> BTreeMap<&BackendKey, Vec<&Wanted>> {
        let mut all: BTreeMap<&BackendKey, Vec<&Wanted>> = BTreeMap::new();
        for (key, wanted) in self.hosts.values().flat_map(|planned| &planned.wanted) {
            all.entry(key).or_default().push(wanted);
        }
        all
    }
}

/// One path of a host. A Prefix has no `/` at its end, so that `/foo` and `/foo/` are one claim.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    kind: PathType,
    path: String,
}

struct Claim {
    route: Route,
    /// The path as it was written, for hosts of expressions.
    written: String,
}

/// Collects the claims to one host.
struct Collector<'a> {
    host: &'a Host,
    claims: BTreeMap<Place, Claim>,
    passed: Option<Passthrough>,
    wanted: BTreeMap<BackendKey, Wanted>,
    problems: Vec<Problem>,
}

impl<'a> Collector<'a> {
    fn plan(host: &'a Host, claimed: &[&Arc<Claimed>]) -> HostPlan {
        let mut collector = Self {
            host,
            claims: BTreeMap::new(),
            passed: None,
            wanted: BTreeMap::new(),
            problems: Vec::new(),
        };
        for one in claimed.iter().filter(|one| !one.is_canary()) {
            collector.claim(one);
        }
        for one in claimed.iter().filter(|one| one.is_canary()) {
            collector.join(one);
        }
        let routes = collector.routes(claimed.iter().any(|one| one.has_expressions()));
        HostPlan {
            claimed: claimed.iter().map(|one| Arc::clone(one)).collect(),
            server: Arc::new(Server { routes, redirect_to: None, passthrough: collector.passed }),
            wanted: collector.wanted,
            problems: collector.problems,
        }
    }

    fn claim(&mut self, one: &Claimed) {
        for (field, path) in one.paths_of(self.host) {
            self.claim_path(one, field, path);
        }
        let Some(default) = &one.ingress.default_backend else { return };
        let path = IngressPath { path: "/".to_owned(), kind: PathType::Prefix, backend: default.clone() };
        // A rule for / of the same Ingress says more than its default.
        let own =
            self.claims.get(&place(&path)).is_some_and(|claim| claim.route.origin.ingress == one.ingress.key);
        if !own {
            self.claim_path(one, "spec.defaultBackend".to_owned(), &path);
        }
    }

    fn claim_path(&mut self, one: &Claimed, field: String, path: &IngressPath) {
        let (host, base) = (self.host, &one.base);
        let place = place(path);
        if let Some(claim) = self.claims.get(&place) {
            let holder = &claim.route.origin;
            let message = format!(
                "{field}: {host}{} belongs to the older {holder}, so requests go there; remove one of the two",
                path.path
            );
            self.problems.push(Problem::new(one.object(), Reason::Conflict, message));
            return;
        }
        let passes = base.settings.ssl_passthrough;
        let action = match passes {
            true => match self.pass(one, &field, path) {
                Some(action) => action,
                None => return,
            },
            false => {
                self.tell_of_passthrough(one, &field);
                self.action(one, &field, &path.backend)
            }
        };
        let fallback = base.fallback.clone();
        if let Some(key) = &fallback {
            self.want(key, one.object(), "the annotation default-backend".to_owned());
        }
        let route = Route {
            // Set when all claims are there.
            matcher: PathMatch::Exact(String::new()),
            origin: Origin { ingress: one.ingress.key.clone(), field },
            action,
            canary: None,
            fallback,
            settings: base.settings.clone(),
            materials: base.materials.clone(),
            to_https: passes || to_https(&one.ingress, &base.settings, host),
        };
        self.claims.insert(place, Claim { route, written: path.path.clone() });
    }

    /// Gives the host's TLS to the backend, and says what becomes of requests over HTTP. A path that nobody sees is no claim.
    fn pass(&mut self, one: &Claimed, field: &str, path: &IngressPath) -> Option<Action> {
        let host = self.host;
        let mut told = |reason, message: String| {
            self.problems.push(Problem::new(one.object(), reason, format!("{field}: {message}")));
        };
        if !matches!(path.path.as_str(), "" | "/") {
            let path = &path.path;
            told(
                Reason::InvalidField,
                format!(
                    "with ssl-passthrough nobody here sees a path, so {path} changes nothing; only / does"
                ),
            );
            return None;
        }
        let refuse = |why: String| Some(Action::Refuse { status: 503, why });
        if *host == Host::Any {
            let why = "ssl-passthrough needs a host: TLS is passed on by the name that the client asks for";
            told(Reason::InvalidField, format!("{why}; name one, requests get 503 meanwhile"));
            return refuse(why.to_owned());
        }
        if let Some(claim) = self.claims.values().find(|claim| claim.route.origin.ingress != one.ingress.key)
        {
            let why = format!("TLS of {host} is ended here for the older {}", claim.route.origin);
            told(
                Reason::Conflict,
                format!(
                    "{why}, so it is not passed on and requests get 503; take another host or remove that one"
                ),
            );
            return refuse(why);
        }
        let action = self.action(one, field, &path.backend);
        let Action::Forward(backend) = action else { return Some(action) };
        let origin = Origin { ingress: one.ingress.key.clone(), field: field.to_owned() };
        let proxy_protocol = one.base.settings.proxy_protocol;
        self.passed = Some(Passthrough { backend, origin, proxy_protocol });
        // A client that has a connection for another name may ask here (RFC 9110 15.5.20).
        Some(Action::Refuse {
            status: 421,
            why: "TLS of this host is passed on to its backend as it is".to_owned(),
        })
    }

    /// A younger rule for a host whose TLS is passed on.
    fn tell_of_passthrough(&mut self, one: &Claimed, field: &str) {
        if let Some(passed) = &self.passed {
            let message = format!(
                "{field}: TLS of {} is passed on as it is by the older {}, so only requests without TLS come here; take \
                 another host or remove one of the two",
                self.host, passed.origin
            );
            self.problems.push(Problem::new(one.object(), Reason::Conflict, message));
        }
    }

    fn action(&mut self, one: &Claimed, field: &str, backend: &IngressBackend) -> Action {
        if let Some(why) = &one.base.closed {
            return Action::Refuse { status: 503, why: why.clone() };
        }
        if let Some(redirect) = &one.base.settings.redirect {
            return Action::Redirect(redirect.clone());
        }
        match backend {
            IngressBackend::Service { name, port } => {
                let key = key(&one.ingress, name, port, one.base.settings.service_upstream);
                self.want(&key, one.object(), format!("{field}.backend"));
                Action::Forward(key)
            }
            IngressBackend::Resource(name) => {
                let why = format!("{name} is no Service");
                let message =
                    format!("{field}.backend: {why}, so requests get 503; name a Service in its place");
                self.problems.push(Problem::new(one.object(), Reason::NotSupported, message));
                Action::Refuse { status: 503, why }
            }
        }
    }

    fn want(&mut self, key: &BackendKey, object: ObjectRef, field: String) {
        self.wanted.entry(key.clone()).or_default().push((object, field));
    }

    /// A canary takes a share of the requests of a path that another Ingress has.
    fn join(&mut self, one: &Claimed) {
        let Some(rule) = &one.parsed.settings.canary else { return };
        let host = self.host;
        for (field, path) in one.paths_of(host) {
            let IngressBackend::Service { name, port } = &path.backend else { continue };
            let key = key(&one.ingress, name, port, one.parsed.settings.service_upstream);
            let origin = Origin { ingress: one.ingress.key.clone(), field: field.clone() };
            let refusal = match self.claims.get_mut(&place(path)) {
                None => Some(format!(
                    "{field}: no other Ingress has {host}{} with the same pathType, so there is nothing to be the \
                     canary of; add one without the annotation canary",
                    path.path
                )),
                Some(claim) => match &claim.route.canary {
                    Some(first) => Some(format!(
                        "{field}: {host}{} has the canary of {} already, and one is all that a rule has; remove one",
                        path.path, first.origin
                    )),
                    None if self.passed.is_some() => Some(format!(
                        "{field}: TLS of {host} is passed on as it is, so there is nothing to be the canary of; remove it"
                    )),
                    None => {
                        claim.route.canary =
                            Some(CanaryBranch { origin, rule: rule.clone(), backend: key.clone() });
                        None
                    }
                },
            };
            match refusal {
                Some(message) => self.problems.push(Problem::new(one.object(), Reason::Conflict, message)),
                None => self.want(&key, one.object(), format!("{field}.backend")),
            }
        }
    }

    /// In the order in which they are tried. `by_expression`: paths are expressions, because one Ingress says so.
    fn routes(&mut self, by_expression: bool) -> Vec<Arc<Route>> {
        let mut routes = Vec::new();
        for (place, Claim { mut route, written }) in std::mem::take(&mut self.claims) {
            route.matcher = match (by_expression, place.kind) {
                (true, _) => match expression(&written) {
                    Ok(_) => PathMatch::Regex(written),
                    Err(error) => self.refuse_expression(&mut route, &written, &error),
                },
                (false, PathType::Exact) => PathMatch::Exact(place.path),
                (false, PathType::Prefix) => PathMatch::Prefix(place.path),
                (false, PathType::ImplementationSpecific) => PathMatch::Text(place.path),
            };
            routes.push(Arc::new(route));
        }
        routes.sort_by(in_turn);
        routes
    }

    fn refuse_expression(&mut self, route: &mut Route, written: &str, error: &regex::Error) -> PathMatch {
        let why = error.to_string();
        let why = why.lines().last().unwrap_or("unreadable").trim().to_owned();
        let message = format!(
            "{}.path {written:?} is no regular expression ({why}), and paths of {} are such; requests that begin \
             like it get 503 until it is corrected",
            route.origin.field, self.host
        );
        let key = &route.origin.ingress;
        let object = ObjectRef::new("Ingress", &key.namespace, &key.name);
        self.problems.push(Problem::new(object, Reason::InvalidField, message));
        route.action = Action::Refuse { status: 503, why: "its path is no regular expression".to_owned() };
        PathMatch::Text(literal(written))
    }
}

/// Which of two routes is tried first.
fn in_turn(a: &Arc<Route>, b: &Arc<Route>) -> std::cmp::Ordering {
    a.matcher.order().cmp(&b.matcher.order())
}

/// `server-alias`: the same routes under more names, unless a rule has that name.
fn alias(one: &Claimed, hosts: &mut BTreeMap<Host, Arc<Server>>, problems: &mut Vec<Problem>) {
    for alias in &one.parsed.settings.server_aliases {
        let alias_host = Host::of(Some(alias));
        if let Some(route) = hosts.get(&alias_host).and_then(|server| server.routes.first()) {
            let message = format!(
                "annotation server-alias: {alias} belongs to {}, so it is no alias; remove it",
                route.origin
            );
            problems.push(Problem::new(one.object(), Reason::Conflict, message));
            continue;
        }
        let named = one.hosts.iter().filter(|(_, rules)| !rules.is_empty()).map(|(host, _)| host);
        let servers = named.filter_map(|host| hosts.get(host));
        let mut routes: Vec<Arc<Route>> = servers.flat_map(|server| server.routes.clone()).collect();
        routes.sort_by(in_turn);
        routes.dedup_by(|later, first| later.matcher == first.matcher);
        if !routes.is_empty() {
            hosts.insert(alias_host, Arc::new(Server { routes, ..Server::default() }));
        }
    }
}

fn key(ingress: &Ingress, service: &str, port: &BackendPort, by_service: bool) -> BackendKey {
    BackendKey {
        service: NamespacedName::new(&ingress.key.namespace, service),
        port: port.clone(),
        by_service,
    }
}

fn place(path: &IngressPath) -> Place {
    let text = match path.kind {
        PathType::Prefix => path.path.trim_end_matches('/').to_owned(),
        _ => path.path.clone(),
    };
    Place { kind: path.kind, path: text }
}

/// The redirect to HTTPS: asked for, or by itself where the host has a certificate of this Ingress.
fn to_https(ingress: &Ingress, settings: &Settings, host: &Host) -> bool {
    let covered = ingress.tls.iter().any(|tls| {
        tls.hosts.is_empty() || tls.hosts.iter().any(|listed| covers(&Host::of(Some(listed)), host))
    });
    settings.force_ssl_redirect || (settings.ssl_redirect && covered)
}

fn covers(listed: &Host, host: &Host) -> bool {
    match host {
        Host::Exact(name) => listed.matches(name),
        other => listed == other,
    }
}

/// What all routes of one Ingress share.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Base {
    settings: Arc<Settings>,
    materials: RouteMaterials,
    fallback: Option<BackendKey>,
    /// Why every request is refused.
    closed: Option<String>,
}

impl Base {
    pub(super) fn of(
        ingress: &Ingress,
        settings: &Settings,
        materials: &mut Materials<'_>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let (found, mut closed) = materials.of_routes(ingress, settings, problems);
        if settings.closed {
            closed = Some("an annotation that protects the backend cannot be honoured".to_owned());
        }
        let fallback = settings.default_backend.as_deref().and_then(|name| {
            let port = materials.first_port(ingress, name);
            if port.is_none() {
                let message = format!(
                    "annotation default-backend: there is no Service {}/{name} with a port; name one of the same namespace",
                    ingress.key.namespace
                );
                problems.push(Problem::new(super::object(ingress), Reason::Missing, message));
            }
            port.map(|port| key(ingress, name, &BackendPort::Number(port), false))
        });
        Self { settings: Arc::new(settings.clone()), materials: found, fallback, closed }
    }
}

/// The beginning of a path that is no expression for sure.
fn literal(path: &str) -> String {
    path.chars().take_while(|c| !"()[]{}|*+?^$\\.".contains(*c)).collect()
}

/// `from-to-www-redirect`: the host with or without `www.`, whichever no rule has.
fn redirect_www(ingress: &Ingress, hosts: &mut BTreeMap<Host, Arc<Server>>) {
    for name in ingress.rules.iter().filter_map(|rule| rule.host.as_deref()) {
        if name.starts_with("*.") {
            continue;
        }
        let other = match name.strip_prefix("www.") {
            Some(bare) => bare.to_owned(),
            None => format!("www.{name}"),
        };
        let redirect = || Arc::new(Server { redirect_to: Some(name.to_owned()), ..Server::default() });
        hosts.entry(Host::Exact(other)).or_insert_with(redirect);
    }
}
