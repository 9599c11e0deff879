//! Whom to ask: the host's resolvers or those of a domain, the healthy ones first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hickory_proto::rr::Name as WireName;

use crate::custom::{Rebinding, Route, Server, Target};
use crate::name::Name;
use crate::resolv_conf::ResolvConf;

/// A server that did not answer is asked last for this long.
const PENALTY: Duration = Duration::from_secs(10);
/// The resolv.conf is looked at this often at most.
const CONF_CHECK: Duration = Duration::from_secs(1);

/// Resolvers by domain; a name is asked of the longest domain that it is in, and of the host's resolvers when it is in
/// none. Of an empty list nobody is asked.
pub(crate) type Routes = BTreeMap<Name, Route>;

/// One server to ask now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Upstream {
    pub(super) server: Server,
    /// Names come back as they were spelled, as far as is known.
    pub(super) keeps_case: bool,
}

#[derive(Default)]
struct Health {
    /// When it did not answer, and why.
    failed: Option<(Instant, String)>,
    loses_case: bool,
}

impl Health {
    fn failure(&self, now: Instant) -> Option<&str> {
        let failed = self.failed.as_ref().filter(|(at, _)| now.saturating_duration_since(*at) < PENALTY);
        failed.map(|(_, why)| why.as_str())
    }
}

pub(super) struct Upstreams {
    conf: ResolvConf,
    checked_at: Option<Instant>,
    routes: Routes,
    /// Only of servers that are or were listed: as many as somebody configured.
    health: BTreeMap<Server, Health>,
    /// Addresses we answer on: never asked, that would be a loop.
    own: BTreeSet<IpAddr>,
    /// Replaces port 53 of the host's resolvers (a resolv.conf cannot name one).
    port: Option<u16>,
}

impl Upstreams {
    pub(super) fn new(conf: ResolvConf, port: Option<u16>) -> Self {
        let (routes, health, own) = (Routes::new(), BTreeMap::new(), BTreeSet::new());
        Self { conf, checked_at: None, routes, health, own, port }
    }

    /// Reads the resolv.conf again if it is time. True when there are resolvers and they are others than before: another
    /// network may see other names.
    pub(super) fn refresh(&mut self, now: Instant) -> bool {
        if self.checked_at.is_some_and(|at| now.duration_since(at) < CONF_CHECK) {
            return false;
        }
        self.checked_at = Some(now);
        let changed = self.conf.refresh();
        if changed {
            tracing::info!(nameservers = ?self.conf.nameservers, "resolvers of the host");
            self.health.clear();
        }
        changed && !self.conf.nameservers.is_empty()
    }

    pub(super) fn set_own(&mut self, own: BTreeSet<IpAddr>) {
        self.own = own;
    }

    /// True when they are others than before.
    pub(super) fn set_routes(&mut self, routes: Routes) -> bool {
        let changed = self.routes != routes;
        self.routes = routes;
        changed
    }

    /// The host's resolvers, in the order of the file.
    pub(super) fn of_host(&self) -> Vec<SocketAddr> {
        let usable = self.conf.nameservers.iter().filter(|server| !self.own.contains(&server.ip()));
        let with_port =
            |server: &SocketAddr| SocketAddr::new(server.ip(), self.port.unwrap_or(server.port()));
        // A link-local address needs its zone, so only a replaced port makes a new one.
        usable.map(|server| if self.port.is_some() { with_port(server) } else { *server }).collect()
    }

    /// The host's search path.
    pub(super) fn search(&self) -> Vec<Name> {
        self.conf.search.clone()
    }

    /// Whom to ask for the name, the best first.
    pub(super) fn for_name(&self, name: &WireName, now: Instant) -> Vec<Upstream> {
        let routed = Name::from_hickory(name).and_then(|name| match &self.route(&name)?.target {
            Target::Host => None,
            Target::Servers(servers) => Some(
                servers.iter().filter(|server| !self.own.contains(&server.address.ip())).cloned().collect(),
            ),
        });
        let of_host = || self.of_host().into_iter().map(Server::plain).collect();
        let servers: Vec<Server> = routed.unwrap_or_else(of_host);
        let health = |server: &Server| self.health.get(server);
        let mut upstreams: Vec<Upstream> = servers
            .into_iter()
            .map(|server| Upstream {
                keeps_case: !health(&server).is_some_and(|health| health.loses_case),
                server,
            })
            .collect();
        upstreams.sort_by_key(|upstream| {
            health(&upstream.server).is_some_and(|health| health.failure(now).is_some())
        });
        upstreams
    }

    /// What answers for the name must not lead to; `None` when they may lead anywhere.
    pub(super) fn rebinding(&self, name: &Name) -> Option<Rebinding> {
        let rule = self.route(name)?.rebinding.as_ref()?;
        (!rule.except.iter().any(|domain| name.is_in(domain))).then(|| rule.clone())
    }

    /// Of the longest domain that the name is in.
    fn route(&self, name: &Name) -> Option<&Route> {
        let of_domains = self.routes.iter().filter(|(domain, _)| name.is_in(domain));
        of_domains.max_by_key(|(domain, _)| domain.wire().len()).map(|(_, route)| route)
    }

    /// Why the server did not answer of late.
    pub(super) fn failure(&self, server: &Server, now: Instant) -> Option<String> {
        self.health.get(server)?.failure(now).map(str::to_owned)
    }

    /// True when it failed for another reason than lately, or did not fail at all.
    pub(super) fn note_failed(&mut self, server: &Server, now: Instant, why: &str) -> bool {
        let health = self.health.entry(server.clone()).or_default();
        let is_news = health.failed.as_ref().is_none_or(|(_, known)| known != why);
        health.failed = Some((now, why.to_owned()));
        is_news
    }

    pub(super) fn note_answered(&mut self, server: &Server, loses_case: bool) {
        let health = self.health.entry(server.clone()).or_default();
        health.failed = None;
        health.loses_case |= loses_case;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstreams(text: &str) -> (tempfile::TempDir, Upstreams) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        std::fs::write(&path, text).unwrap();
        let mut upstreams = Upstreams::new(ResolvConf::new(path), None);
        upstreams.refresh(Instant::now());
        (folder, upstreams)
    }

    fn asked(upstreams: &Upstreams, name: &str, now: Instant) -> Vec<String> {
        let name = WireName::from_ascii(name).unwrap();
        upstreams.for_name(&name, now).iter().map(|upstream| upstream.server.to_string()).collect()
    }

    #[test]
    fn a_server_that_failed_is_asked_last_for_a_while() {
        let (_folder, mut upstreams) = upstreams("nameserver 192.0.2.1\nnameserver 192.0.2.2\n");
        let now = Instant::now();
        assert_eq!(asked(&upstreams, "a.example.", now), ["192.0.2.1:53", "192.0.2.2:53"]);
        let first = Server::plain("192.0.2.1:53".parse().unwrap());
        assert!(upstreams.note_failed(&first, now, "it is dead"));
        assert!(!upstreams.note_failed(&first, now, "it is dead"), "that is known");
        assert_eq!(asked(&upstreams, "a.example.", now), ["192.0.2.2:53", "192.0.2.1:53"]);
        assert_eq!(asked(&upstreams, "a.example.", now + PENALTY), ["192.0.2.1:53", "192.0.2.2:53"]);
        upstreams.note_answered(&first, false);
        assert_eq!(asked(&upstreams, "a.example.", now), ["192.0.2.1:53", "192.0.2.2:53"]);
    }

    #[test]
    fn the_longest_domain_decides_and_our_own_address_is_never_asked() {
        let (_folder, mut upstreams) = upstreams("nameserver 192.0.2.1\n");
        let now = Instant::now();
        let to = |target| Route { target, rebinding: None };
        let server = |text: &&str| Server::plain(text.parse().unwrap());
        let servers = |list: &[&str]| to(Target::Servers(list.iter().map(server).collect()));
        upstreams.set_own(["10.43.0.10".parse().unwrap()].into());
        upstreams.set_routes(Routes::from([
            (Name::parse("lan").unwrap(), servers(&["192.0.2.7:5353"])),
            (Name::parse("host.lan").unwrap(), to(Target::Host)),
            (Name::parse("nobody.lan").unwrap(), servers(&[])),
            (Name::parse("deep.lan").unwrap(), servers(&["[2001:db8::1]:53", "10.43.0.10:53"])),
        ]));
        assert_eq!(asked(&upstreams, "printer.LAN.", now), ["192.0.2.7:5353"]);
        assert_eq!(asked(&upstreams, "a.deep.lan.", now), ["[2001:db8::1]:53"]);
        assert_eq!(asked(&upstreams, "plan.", now), ["192.0.2.1:53"]);
        assert_eq!(asked(&upstreams, "a.host.lan.", now), ["192.0.2.1:53"]);
        assert_eq!(asked(&upstreams, "a.nobody.lan.", now), [""; 0]);
    }
}
