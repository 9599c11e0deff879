//! Names in endpoints of Nodes, asked of the host's resolver again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use weft_model::Snapshot;
use weft_model::node_facts::Observed;
use weft_model::objects::Host;

use crate::host_socket::Snapshots;

/// A node whose address changes is found again within this time, should it not call by itself.
const AGAIN: Duration = Duration::from_secs(60);
const AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

/// Keeps [`Observed::names`] current; a name that cannot be resolved keeps its last addresses. Ends when the Snapshots end.
pub(super) async fn follow(
    mut snapshots: Snapshots,
    observed: Arc<watch::Sender<Observed>>,
) -> Result<(), String> {
    let mut silent = BTreeSet::new();
    loop {
        let wanted = wanted(snapshots.borrow_and_update().as_deref());
        let answers = join_all(wanted.iter().map(|name| resolve(name))).await;
        let answers: BTreeMap<&String, _> = wanted.iter().zip(answers).collect();
        for (name, answer) in &answers {
            match answer {
                Ok(_) => _ = silent.remove(*name),
                Err(error) if silent.insert((*name).clone()) => {
                    tracing::warn!(name, error, "an endpoint's name is not resolved");
                }
                Err(_) => {}
            }
        }
        let failed = answers.values().any(Result::is_err);
        observed.send_if_modified(|observed| learn(&mut observed.names, answers));
        let pause = if failed { AGAIN_AFTER_FAILURE } else { AGAIN };
        let next = Instant::now() + pause;
        loop {
            tokio::select! {
                () = sleep_until(next) => break,
                changed = snapshots.changed() => {
                    changed.map_err(|_| "the Snapshots ended".to_owned())?;
                    if self::wanted(snapshots.borrow_and_update().as_deref()) != wanted {
                        break;
                    }
                }
            }
        }
    }
}

/// Names of other nodes.
fn wanted(snapshot: Option<&Snapshot>) -> BTreeSet<String> {
    let Some(snapshot) = snapshot else { return BTreeSet::new() };
    let others = snapshot.nodes.values().filter(|node| node.name != snapshot.facts.name);
    let names = others.filter_map(|node| match &node.reach.endpoint.as_ref()?.host {
        Host::Name(name) => Some(name.clone()),
        Host::Address(_) => None,
    });
    names.collect()
}

/// Sorted; at least one address.
async fn resolve(name: &str) -> Result<Vec<IpAddr>, String> {
    let found = timeout(PATIENCE, tokio::net::lookup_host((name, 0))).await;
    let found = found.map_err(|_| "no answer in time".to_owned())?.map_err(|error| error.to_string())?;
    let addresses: BTreeSet<IpAddr> = found.map(|address| address.ip()).collect();
    if addresses.is_empty() { Err("no addresses".to_owned()) } else { Ok(addresses.into_iter().collect()) }
}

/// True when something is other than before.
fn learn(
    names: &mut BTreeMap<String, Vec<IpAddr>>,
    answers: BTreeMap<&String, Result<Vec<IpAddr>, String>>,
) -> bool {
    let known = names.clone();
    names.retain(|name, _| answers.contains_key(name));
    names.extend(answers.into_iter().filter_map(|(name, answer)| Some((name.clone(), answer.ok()?))));
    *names != known
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_that_fails_keeps_its_addresses_and_one_that_nobody_has_is_forgotten() {
        let [edge, home, gone] = ["edge.example", "home.example", "gone.example"].map(str::to_owned);
        let old = ip("192.0.2.1");
        let mut names = BTreeMap::from([(edge.clone(), vec![old]), (gone, vec![old])]);
        let failed = || Err("no answer in time".to_owned());
        let found = || Ok(vec![ip("192.0.2.7"), ip("2001:db8::7")]);
        assert!(learn(&mut names, BTreeMap::from([(&edge, failed()), (&home, found())])));
        let expected = BTreeMap::from([(edge.clone(), vec![old]), (home.clone(), found().unwrap())]);
        assert_eq!(names, expected);
        assert!(!learn(&mut names, BTreeMap::from([(&edge, failed()), (&home, found())])));
    }

    #[tokio::test]
    async fn the_hosts_resolver_is_asked() {
        let addresses = resolve("localhost").await.unwrap();
        assert!(addresses.contains(&ip("127.0.0.1")) || addresses.contains(&ip("::1")), "{addresses:?}");
        assert!(resolve("no-such-host.invalid").await.is_err());
    }
}
