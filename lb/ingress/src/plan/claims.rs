//! Who gets which host and path: every rule of every Ingress is a claim, the older claim wins, canaries join the claims that they
//! are the canaries of, and each host's routes come out in the order in which they are tried.

use std::collections::{BTreeMap, BTreeSet};
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

pub(super) struct Claims {
    pub(super) hosts: BTreeMap<Host, Server>,
    wanted: BTreeMap<BackendKey, Wanted>,
}

/// One path of one host. A Prefix has no `/` at its end, so that `/foo` and `/foo/` are one claim.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    host: Host,
    kind: PathType,
    path: String,
}

struct Claim {
    route: Route,
    /// The path as it was written, for hosts of expressions.
    written: String,
}

/// Collects the claims of all Ingresses.
struct Collector<'a, 'b> {
    claims: BTreeMap<Place, Claim>,
    passed: BTreeMap<Host, Passthrough>,
    wanted: BTreeMap<BackendKey, Wanted>,
    materials: &'a mut Materials<'b>,
    problems: &'a mut Vec<Problem>,
}

impl Claims {
    /// `claimed` is in the order of age.
    pub(super) fn of(
        claimed: &[Claimed],
        materials: &mut Materials<'_>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut collector = Collector {
            claims: BTreeMap::new(),
            passed: BTreeMap::new(),
            wanted: BTreeMap::new(),
            materials,
            problems,
        };
        let (canaries, mains): (Vec<_>, Vec<_>) =
            claimed.iter().partition(|one| one.parsed.settings.canary.is_some());
        for one in &mains {
            collector.claim(one);
        }
        for one in &canaries {
            collector.join(one);
        }
        collector.alias(&mains);
        let expressions = expression_hosts(claimed);
        let Collector { claims, passed, wanted, problems, .. } = collector;
        let mut hosts = servers(claims, &expressions, problems);
        for (host, passthrough) in passed {
            hosts.entry(host).or_default().passthrough = Some(passthrough);
        }
        redirect_www(&mains, &mut hosts);
        Self { hosts, wanted }
    }

    pub(super) fn backends(&self) -> BTreeMap<BackendKey, Wanted> {
        self.wanted.clone()
    }
}

/// Hosts whose paths are expressions, because one Ingress says so.
fn expression_hosts(claimed: &[Claimed]) -> BTreeSet<Host> {
    let says = |one: &&Claimed| {
        let settings = &one.parsed.settings;
        settings.use_regex || settings.rewrite_target.is_some()
    };
    let of = |one: &Claimed| {
        one.ingress.rules.iter().map(|rule| Host::of(rule.host.as_deref())).collect::<Vec<_>>()
    };
    claimed.iter().filter(says).flat_map(of).collect()
}

impl Collector<'_, '_> {
    fn claim(&mut self, one: &Claimed) {
        let base = Base::of(one, self.materials, self.problems);
        for (i, rule) in one.ingress.rules.iter().enumerate() {
            let host = Host::of(rule.host.as_deref());
            for (j, path) in rule.paths.iter().enumerate() {
                let field = format!("spec.rules[{i}].http.paths[{j}]");
                self.claim_path(one, &base, host.clone(), field, path);
            }
        }
        let Some(default) = &one.ingress.default_backend else { return };
        let hosts: BTreeSet<Host> = match one.ingress.rules.is_empty() {
            true => BTreeSet::from([Host::Any]),
            false => one.ingress.rules.iter().map(|rule| Host::of(rule.host.as_deref())).collect(),
        };
        let path = IngressPath { path: "/".to_owned(), kind: PathType::Prefix, backend: default.clone() };
        for host in hosts {
            let place = place(host.clone(), &path);
            // A rule for / of the same Ingress says more than its default.
            let own =
                self.claims.get(&place).is_some_and(|claim| claim.route.origin.ingress == one.ingress.key);
            if !own {
                self.claim_path(one, &base, host, "spec.defaultBackend".to_owned(), &path);
            }
        }
    }

    fn claim_path(&mut self, one: &Claimed, base: &Base, host: Host, field: String, path: &IngressPath) {
        let place = place(host.clone(), path);
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
            true => match self.pass(one, base, &host, &field, path) {
                Some(action) => action,
                None => return,
            },
            false => {
                self.tell_of_passthrough(one, &host, &field);
                self.action(one, base, &field, &path.backend)
            }
        };
        let fallback = base.fallback.clone();
        if let Some(key) = &fallback {
            self.want(key, one.object(), "the annotation default-backend".to_owned());
        }
        let route = Route {
            // Set when the kind of the host is known.
            matcher: PathMatch::Exact(String::new()),
            origin: Origin { ingress: one.ingress.key.clone(), field },
            action,
            canary: None,
            fallback,
            settings: base.settings.clone(),
            materials: base.materials.clone(),
            to_https: passes || to_https(&one.ingress, &base.settings, &host),
        };
        self.claims.insert(place, Claim { route, written: path.path.clone() });
    }

    /// Gives the host's TLS to the backend, and says what becomes of requests over HTTP. A path that nobody sees is no claim.
    fn pass(
        &mut self,
        one: &Claimed,
        base: &Base,
        host: &Host,
        field: &str,
        path: &IngressPath,
    ) -> Option<Action> {
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
        let holder = self
            .claims
            .iter()
            .find(|(place, claim)| place.host == *host && claim.route.origin.ingress != one.ingress.key);
        if *host == Host::Any {
            let why = "ssl-passthrough needs a host: TLS is passed on by the name that the client asks for";
            told(Reason::InvalidField, format!("{why}; name one, requests get 503 meanwhile"));
            return refuse(why.to_owned());
        }
        if let Some((_, claim)) = holder {
            let why = format!("TLS of {host} is ended here for the older {}", claim.route.origin);
            told(
                Reason::Conflict,
                format!(
                    "{why}, so it is not passed on and requests get 503; take another host or remove that one"
                ),
            );
            return refuse(why);
        }
        let action = self.action(one, base, field, &path.backend);
        let Action::Forward(backend) = action else { return Some(action) };
        let origin = Origin { ingress: one.ingress.key.clone(), field: field.to_owned() };
        let proxy_protocol = base.settings.proxy_protocol;
        self.passed.insert(host.clone(), Passthrough { backend, origin, proxy_protocol });
        // A client that has a connection for another name may ask here (RFC 9110 15.5.20).
        Some(Action::Refuse {
            status: 421,
            why: "TLS of this host is passed on to its backend as it is".to_owned(),
        })
    }

    /// A younger rule for a host whose TLS is passed on.
    fn tell_of_passthrough(&mut self, one: &Claimed, host: &Host, field: &str) {
        if let Some(passed) = self.passed.get(host) {
            let message = format!(
                "{field}: TLS of {host} is passed on as it is by the older {}, so only requests without TLS come here; take \
                 another host or remove one of the two",
                passed.origin
            );
            self.problems.push(Problem::new(one.object(), Reason::Conflict, message));
        }
    }

    fn action(&mut self, one: &Claimed, base: &Base, field: &str, backend: &IngressBackend) -> Action {
        if let Some(why) = &base.closed {
            return Action::Refuse { status: 503, why: why.clone() };
        }
        if let Some(redirect) = &base.settings.redirect {
            return Action::Redirect(redirect.clone());
        }
        match backend {
            IngressBackend::Service { name, port } => {
                let key = key(&one.ingress, name, port, base.settings.service_upstream);
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
        for (i, ingress_rule) in one.ingress.rules.iter().enumerate() {
            let host = Host::of(ingress_rule.host.as_deref());
            for (j, path) in ingress_rule.paths.iter().enumerate() {
                let field = format!("spec.rules[{i}].http.paths[{j}]");
                let place = place(host.clone(), path);
                let IngressBackend::Service { name, port } = &path.backend else { continue };
                let key = key(&one.ingress, name, port, one.parsed.settings.service_upstream);
                let origin = Origin { ingress: one.ingress.key.clone(), field: field.clone() };
                let refusal = match self.claims.get_mut(&place) {
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
                        None if self.passed.contains_key(&host) => Some(format!(
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
                    Some(message) => {
                        self.problems.push(Problem::new(one.object(), Reason::Conflict, message))
                    }
                    None => self.want(&key, one.object(), format!("{field}.backend")),
                }
            }
        }
    }

    /// `server-alias`: the same routes under more names, unless a rule has that name.
    fn alias(&mut self, mains: &[&Claimed]) {
        for one in mains {
            for alias in &one.parsed.settings.server_aliases {
                let alias_host = Host::of(Some(alias));
                let holder = self.claims.iter().find(|(place, _)| place.host == alias_host);
                if let Some((_, claim)) = holder {
                    let message = format!(
                        "annotation server-alias: {alias} belongs to {}, so it is no alias; remove it",
                        claim.route.origin
                    );
                    self.problems.push(Problem::new(one.object(), Reason::Conflict, message));
                    continue;
                }
                let hosts: BTreeSet<Host> =
                    one.ingress.rules.iter().map(|rule| Host::of(rule.host.as_deref())).collect();
                let copies: Vec<(Place, Claim)> = self
                    .claims
                    .iter()
                    .filter(|(place, _)| hosts.contains(&place.host))
                    .map(|(place, claim)| {
                        let place = Place { host: alias_host.clone(), ..place.clone() };
                        (place, Claim { route: claim.route.clone(), written: claim.written.clone() })
                    })
                    .collect();
                self.claims.extend(copies);
            }
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

fn place(host: Host, path: &IngressPath) -> Place {
    let text = match path.kind {
        PathType::Prefix => path.path.trim_end_matches('/').to_owned(),
        _ => path.path.clone(),
    };
    Place { host, kind: path.kind, path: text }
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
struct Base {
    settings: Arc<Settings>,
    materials: RouteMaterials,
    fallback: Option<BackendKey>,
    /// Why every request is refused.
    closed: Option<String>,
}

impl Base {
    fn of(one: &Claimed, materials: &mut Materials<'_>, problems: &mut Vec<Problem>) -> Self {
        let settings = Arc::new(one.parsed.settings.clone());
        let (found, mut closed) = materials.of_routes(&one.ingress, &settings, problems);
        if settings.closed {
            closed = Some("an annotation that protects the backend cannot be honoured".to_owned());
        }
        let fallback = settings.default_backend.as_deref().and_then(|name| {
            let port = materials.first_port(&one.ingress, name);
            if port.is_none() {
                let message = format!(
                    "annotation default-backend: there is no Service {}/{name} with a port; name one of the same namespace",
                    one.ingress.key.namespace
                );
                problems.push(Problem::new(one.object(), Reason::Missing, message));
            }
            port.map(|port| key(&one.ingress, name, &BackendPort::Number(port), false))
        });
        Self { settings, materials: found, fallback, closed }
    }
}

fn servers(
    claims: BTreeMap<Place, Claim>,
    expressions: &BTreeSet<Host>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Host, Server> {
    let mut hosts: BTreeMap<Host, Vec<Route>> = BTreeMap::new();
    for (place, Claim { mut route, written }) in claims {
        route.matcher = match (expressions.contains(&place.host), place.kind) {
            (true, _) => match expression(&written) {
                Ok(_) => PathMatch::Regex(written),
                Err(error) => {
                    let why = error.to_string();
                    let why = why.lines().last().unwrap_or("unreadable").trim().to_owned();
                    let message = format!(
                        "{}.path {written:?} is no regular expression ({why}), and paths of {} are such; requests that begin \
                         like it get 503 until it is corrected",
                        route.origin.field, place.host
                    );
                    let key = &route.origin.ingress;
                    let object = ObjectRef::new("Ingress", &key.namespace, &key.name);
                    problems.push(Problem::new(object, Reason::InvalidField, message));
                    route.action =
                        Action::Refuse { status: 503, why: "its path is no regular expression".to_owned() };
                    PathMatch::Text(literal(&written))
                }
            },
            (false, PathType::Exact) => PathMatch::Exact(place.path),
            (false, PathType::Prefix) => PathMatch::Prefix(place.path),
            (false, PathType::ImplementationSpecific) => PathMatch::Text(place.path),
        };
        hosts.entry(place.host).or_default().push(route);
    }
    let server = |mut routes: Vec<Route>| {
        routes.sort_by(|a, b| a.matcher.order().cmp(&b.matcher.order()));
        Server { routes: routes.into_iter().map(Arc::new).collect(), ..Server::default() }
    };
    hosts.into_iter().map(|(host, routes)| (host, server(routes))).collect()
}

/// The beginning of a path that is no expression for sure.
fn literal(path: &str) -> String {
    path.chars().take_while(|c| !"()[]{}|*+?^$\\.".contains(*c)).collect()
}

/// `from-to-www-redirect`: the host with or without `www.`, whichever no rule has.
fn redirect_www(mains: &[&Claimed], hosts: &mut BTreeMap<Host, Server>) {
    for one in mains.iter().filter(|one| one.parsed.settings.from_to_www) {
        for name in one.ingress.rules.iter().filter_map(|rule| rule.host.as_deref()) {
            if name.starts_with("*.") {
                continue;
            }
            let other = match name.strip_prefix("www.") {
                Some(bare) => bare.to_owned(),
                None => format!("www.{name}"),
            };
            let redirect = Server { redirect_to: Some(name.to_owned()), ..Server::default() };
            hosts.entry(Host::Exact(other)).or_insert(redirect);
        }
    }
}
