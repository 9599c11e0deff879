//! Routes and rules of our own protocol number over rtnetlink.
//!
//! [`Routes`] is the applier of planned routes and rules; [`LinkRoute`] is what CNI puts on pod links, which
//! [`Routes`] never touches.

mod foreign;
mod kernel_view;
mod losses;
mod pod;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use weft_model::route::{Route, RouteTarget, SourceRule};

use super::link::{LinkError, Links, cause};
use crate::reconcile::{Applied, chain};
use kernel_view::{Key, LinkIndexes, Seen, route_message, rule_message};

pub use foreign::foreign_routes;
pub use losses::losses;
pub use pod::{LinkRoute, link_routes};

#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("{operation}")]
    Observe { operation: &'static str, source: std::io::Error },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{operation} route {route}")]
    Route { operation: &'static str, route: String, source: std::io::Error },
    #[error("{operation} rule {rule}")]
    Rule { operation: &'static str, rule: String, source: std::io::Error },
    #[error("add route {route}: there is no link {link}")]
    NoLink { route: String, link: String },
}

/// Owner of every route and rule with `constants::ROUTE_PROTOCOL`, except routes to pod links (those are CNI's).
pub struct Routes {
    handle: rtnetlink::Handle,
}

impl Routes {
    pub fn new(handle: rtnetlink::Handle) -> Self {
        Self { handle }
    }

    /// Observes the kernel's, adds what is missing, replaces what differs, then removes what is not wanted.
    /// A route to a link that does not exist is a failure of that route only.
    pub async fn apply(&mut self, routes: &BTreeSet<Route>, rules: &BTreeSet<SourceRule>) -> Applied {
        let mut applied = Applied::default();
        if let Err(error) = self.apply_routes(routes, &mut applied).await {
            applied.failed.push(chain(&error));
        }
        if let Err(error) = self.apply_rules(rules, &mut applied).await {
            applied.failed.push(chain(&error));
        }
        applied
    }

    /// Two looks at the kernel: what a replace did to a neighbour with the same key is seen, not assumed.
    async fn apply_routes(&self, wanted: &BTreeSet<Route>, applied: &mut Applied) -> Result<(), RouteError> {
        let links = LinkIndexes::observe(&Links::new(self.handle.clone())).await?;
        let seen = kernel_view::routes(&self.handle, &links).await?;
        let seen_by_key: BTreeMap<_, _> = seen.iter().filter_map(|seen| Some((seen.key()?, seen))).collect();
        let wanted = by_key(wanted, applied);
        let mut changed = false;
        for (key, route) in &wanted {
            let present = seen_by_key.get(key);
            if present.is_some_and(|seen| seen.is(route)) {
                continue;
            }
            changed = true;
            match self.put_route(route, &links, present.is_some()).await {
                Ok(()) => applied.changed.push(format!("route {route}")),
                Err(error) => applied.failed.push(chain(&error)),
            }
        }
        let seen = if changed { kernel_view::routes(&self.handle, &links).await? } else { seen };
        let is_wanted =
            |seen: &Seen| seen.key().and_then(|key| wanted.get(&key)).is_some_and(|route| seen.is(route));
        for unwanted in seen.into_iter().filter(|seen| !is_wanted(seen)) {
            let line = format!("no route {unwanted}");
            match self.remove_route(unwanted).await {
                Ok(()) => applied.changed.push(line),
                Err(error) => applied.failed.push(chain(&error)),
            }
        }
        Ok(())
    }

    async fn put_route(&self, route: &Route, links: &LinkIndexes, replace: bool) -> Result<(), RouteError> {
        let message = route_message(route, links).ok_or_else(|| RouteError::NoLink {
            route: route.to_string(),
            link: match &route.target {
                RouteTarget::Link(link) => link.clone(),
                _ => "lo".to_owned(),
            },
        })?;
        let request = self.handle.route().add(message);
        let request = if replace { request.replace() } else { request };
        let put = request.execute().await;
        put.map_err(|error| RouteError::Route {
            operation: if replace { "replace" } else { "add" },
            route: route.to_string(),
            source: cause(error),
        })
    }

    async fn remove_route(&self, seen: Seen) -> Result<(), RouteError> {
        let route = seen.to_string();
        let removed = self.handle.route().del(without_ephemera(seen.message)).execute().await;
        match removed.map_err(cause) {
            Err(gone) if gone.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            removed => removed.map_err(|source| RouteError::Route { operation: "remove", route, source }),
        }
    }

    async fn apply_rules(
        &self,
        wanted: &BTreeSet<SourceRule>,
        applied: &mut Applied,
    ) -> Result<(), RouteError> {
        let seen = kernel_view::rules(&self.handle).await?;
        for rule in wanted.iter().filter(|rule| !seen.iter().any(|(have, _)| have.as_ref() == Some(rule))) {
            match self.add_rule(rule).await {
                Ok(()) => applied.changed.push(format!("rule {rule}")),
                Err(error) => applied.failed.push(chain(&error)),
            }
        }
        for (rule, message) in seen {
            if rule.as_ref().is_some_and(|rule| wanted.contains(rule)) {
                continue;
            }
            let name = rule.map_or_else(|| format!("{message:?}"), |rule| rule.to_string());
            match self.remove_rule(&name, message).await {
                Ok(()) => applied.changed.push(format!("no rule {name}")),
                Err(error) => applied.failed.push(chain(&error)),
            }
        }
        Ok(())
    }

    async fn add_rule(&self, rule: &SourceRule) -> Result<(), RouteError> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule_message(rule);
        let added = request.execute().await;
        added.map_err(|error| RouteError::Rule {
            operation: "add",
            rule: rule.to_string(),
            source: cause(error),
        })
    }

    async fn remove_rule(&self, name: &str, message: RuleMessage) -> Result<(), RouteError> {
        let removed = self.handle.rule().del(message).execute().await;
        match removed.map_err(cause) {
            Err(gone) if gone.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            removed => removed.map_err(|source| RouteError::Rule {
                operation: "remove",
                rule: name.to_owned(),
                source,
            }),
        }
    }
}

/// The kernel holds one route per key; of two wanted ones the first in order is taken and the other named.
fn by_key<'a>(wanted: &'a BTreeSet<Route>, applied: &mut Applied) -> BTreeMap<Key, &'a Route> {
    let mut routes = BTreeMap::new();
    for route in wanted {
        match routes.entry(kernel_view::key(route)) {
            Entry::Vacant(free) => {
                free.insert(route);
            }
            Entry::Occupied(taken) => {
                applied.failed.push(format!("route {route}: {} is wanted too", taken.get()));
            }
        }
    }
    routes
}

/// A dumped route carries counters that a delete request must not.
fn without_ephemera(mut message: RouteMessage) -> RouteMessage {
    use netlink_packet_route::route::RouteAttribute as A;
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            A::Destination(_) | A::Table(_) | A::Oif(_) | A::Priority(_) | A::PrefSource(_) | A::Gateway(_)
        )
    });
    message.header.flags = netlink_packet_route::route::RouteFlags::empty();
    message
}
