//! The watches, joined into one task that owns the [`Cluster`] and publishes Snapshots.
//!
//! A watch that breaks is resumed where it was, or lists anew after 410; meanwhile the last Snapshot stays. A burst of
//! events becomes one Snapshot.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::stream::{self, SelectAll, Stream, StreamExt};
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch as channel;
use tokio::time::Instant;
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, Snapshot};

use super::cluster::Cluster;
use super::document::{Document, Kind};
use crate::reconcile::{TaskGroup, chain};

/// Events that arrive within this time after the first become one Snapshot: long enough for the Service and the
/// EndpointSlices of one rollout step, short against the 10 ms from event to rule.
const BURST: Duration = Duration::from_millis(2);
/// How long the server is to keep one watch open, in seconds. A connection that went dead silently is noticed 5 s
/// after that, and a resumed watch costs next to nothing.
const WATCH_SECONDS: u32 = 120;
/// How often a server that could not be reached is asked whether it is back.
const PROBE: Duration = Duration::from_secs(1);

/// What the task offers to others.
pub struct Watches {
    /// `None` until every kind has listed, unless the Store gave a Snapshot.
    pub snapshots: channel::Receiver<Option<Arc<Snapshot>>>,
    pub status: channel::Receiver<ApiStatus>,
}

/// Whether the API server is there, for `weft status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiStatus {
    pub connected: bool,
    /// When `connected` last changed.
    pub since: SystemTime,
    /// The last failure, as a chain on one line; kept for people after the connection is back.
    pub last_error: Option<String>,
}

/// Starts the task `kube`. With `initial`, that Snapshot is published at once, marked `from_store`, with the facts and
/// the configuration of today; it stays until every watch has listed.
pub fn start(
    tasks: &mut TaskGroup,
    client: Client,
    config: ClusterConfig,
    facts: channel::Receiver<NodeFacts>,
    initial: Option<Snapshot>,
) -> Watches {
    let (snapshot_tx, snapshots) = channel::channel(None);
    let starting = ApiStatus { connected: false, since: SystemTime::now(), last_error: None };
    let (status_tx, status) = channel::channel(starting);
    let assembler = Assembler {
        cluster: initial.as_ref().map(Cluster::from_stored).unwrap_or_default(),
        generation: initial.as_ref().map(|stored| stored.generation).unwrap_or_default(),
        stored: initial,
        config: Arc::new(config),
        facts,
        snapshot_tx,
    };
    tasks.start("kube", run(assembler, Connection::new(client, status_tx)));
    Watches { snapshots, status }
}

type Events = SelectAll<Pin<Box<dyn Stream<Item = (Kind, watcher::Result<Event<Document>>)> + Send>>>;

/// One watch a kind. Every watch is of the whole cluster, except that Pods are those of this node.
fn watches(client: &Client, node: &NodeName) -> Events {
    let watch = |kind: Kind| {
        let mut config = watcher::Config::default().timeout(WATCH_SECONDS);
        if kind == Kind::Pod {
            config = config.fields(&format!("spec.nodeName={node}"));
        }
        let api: Api<Document> = Api::all_with(client.clone(), &kind);
        stream::repeat_with(move || until_gone(watcher(api.clone(), config.clone())))
            .flatten()
            .backoff(Retry::default())
            .map(move |event| (kind, event))
            .boxed()
    };
    Kind::ALL.into_iter().map(watch).collect()
}

/// Ends a watch that the server refuses with 410 at its start, so that a new one lists anew; `watcher` itself handles a 410
/// that arrives as an event.
fn until_gone<S>(events: S) -> impl Stream<Item = watcher::Result<Event<Document>>> + Send
where
    S: Stream<Item = watcher::Result<Event<Document>>> + Send,
{
    stream::unfold(Some(Box::pin(events)), |events| async {
        let mut events = events?;
        let event = events.next().await?;
        let refused = matches!(&event, Err(error @ watcher::Error::WatchStartFailed(_)) if is_expired(error));
        Some((event, (!refused).then_some(events)))
    })
}

async fn run(mut assembler: Assembler, mut connection: Connection) -> Result<(), String> {
    let node = assembler.facts.borrow().name.clone();
    let mut events = watches(&connection.client, &node);
    let mut publish_at = None;
    assembler.publish();
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some((kind, Ok(event))) => {
                    connection.works(kind, &event);
                    if assembler.cluster.apply(kind, event) {
                        publish_at.get_or_insert_with(|| Instant::now() + BURST);
                    }
                }
                Some((kind, Err(error))) => connection.fails(kind, &error),
                None => return Err("every watch ended".to_owned()),
            },
            changed = assembler.facts.changed() => {
                changed.map_err(|_| "the node facts ended".to_owned())?;
                publish_at.get_or_insert_with(|| Instant::now() + BURST);
            }
            () = sleep_until(publish_at) => {
                publish_at = None;
                assembler.publish();
            }
            reachable = &mut connection.probe => connection.probed(reachable),
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Turns the cluster of now into the next Snapshot.
struct Assembler {
    cluster: Cluster,
    generation: Generation,
    /// What the Store gave; gone when every kind has listed.
    stored: Option<Snapshot>,
    config: Arc<ClusterConfig>,
    facts: channel::Receiver<NodeFacts>,
    snapshot_tx: channel::Sender<Option<Arc<Snapshot>>>,
}

impl Assembler {
    fn publish(&mut self) {
        let facts = self.facts_now();
        let complete = self.cluster.is_complete();
        let generation = self.generation.next();
        let snapshot = match &self.stored {
            Some(stored) if !complete => Snapshot {
                generation,
                config: self.config.clone(),
                facts,
                from_store: true,
                ..stored.clone()
            },
            None if !complete => return,
            _ => self.cluster.snapshot(generation, self.config.clone(), facts),
        };
        if complete {
            self.stored = None;
        }
        let published = self.snapshot_tx.borrow().clone();
        if published.is_some_and(|published| same_but_generation(&published, &snapshot)) {
            return;
        }
        self.generation = generation;
        self.snapshot_tx.send_replace(Some(Arc::new(snapshot)));
    }

    /// The facts, as the same `Arc` as before while they are equal.
    fn facts_now(&mut self) -> Arc<NodeFacts> {
        let facts = self.facts.borrow_and_update();
        match &*self.snapshot_tx.borrow() {
            Some(published) if *published.facts == *facts => published.facts.clone(),
            _ => Arc::new(facts.clone()),
        }
    }
}

/// Compares identities first: a whole-cluster comparison happens only where a map was rebuilt.
fn same_but_generation(a: &Snapshot, b: &Snapshot) -> bool {
    fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
        Arc::ptr_eq(a, b) || a == b
    }
    a.from_store == b.from_store
        && same(&a.config, &b.config)
        && same(&a.facts, &b.facts)
        && same(&a.nodes, &b.nodes)
        && same(&a.namespaces, &b.namespaces)
        && same(&a.services, &b.services)
        && same(&a.endpoint_slices, &b.endpoint_slices)
        && same(&a.local_pods, &b.local_pods)
        && same(&a.problems, &b.problems)
}

/// Knows which watches fail, and keeps [`ApiStatus`].
struct Connection {
    client: Client,
    status_tx: channel::Sender<ApiStatus>,
    /// State of the watches that have answered or failed.
    seen: BTreeMap<Kind, Failure>,
    /// Resolves with whether the server can be reached again; never while none is held to be unreachable.
    probe: Probe,
}

type Probe = Pin<Box<dyn Future<Output = bool> + Send>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    None,
    /// The server could not be reached: the watch resumes silently, so a probe tells when it is back.
    Unreachable,
    /// The server answered with a refusal: only the watch itself can tell when that has changed.
    Refused,
}

impl Connection {
    fn new(client: Client, status_tx: channel::Sender<ApiStatus>) -> Self {
        Self { client, status_tx, seen: BTreeMap::new(), probe: Box::pin(std::future::pending()) }
    }

    /// An `Init` says only that a list is going to be asked for; all else came from the server.
    fn works(&mut self, kind: Kind, event: &Event<Document>) {
        if !matches!(event, Event::Init) && self.seen.insert(kind, Failure::None) != Some(Failure::None) {
            self.update(None);
        }
    }

    fn fails(&mut self, kind: Kind, error: &watcher::Error) {
        if is_expired(error) {
            tracing::debug!(kind = kind.name(), "watch expired, listing anew");
            return;
        }
        let text = format!("watch of {}: {}", kind.name(), chain(error));
        tracing::debug!(error = text, "watch failed");
        let failure = if is_refusal(error) { Failure::Refused } else { Failure::Unreachable };
        let probing = self.is_probing();
        self.seen.insert(kind, failure);
        if !probing && self.is_probing() {
            self.probe = probe(self.client.clone());
        }
        self.update(Some(text));
    }

    fn is_probing(&self) -> bool {
        self.seen.values().any(|failure| *failure == Failure::Unreachable)
    }

    fn probed(&mut self, reachable: bool) {
        if reachable {
            let unreachable = self.seen.values_mut().filter(|failure| **failure == Failure::Unreachable);
            unreachable.for_each(|failure| *failure = Failure::None);
            self.update(None);
        }
        self.probe =
            if self.is_probing() { probe(self.client.clone()) } else { Box::pin(std::future::pending()) };
    }

    fn update(&self, error: Option<String>) {
        let connected = self.seen.len() == Kind::ALL.len() && self.seen.values().all(|f| *f == Failure::None);
        self.status_tx.send_if_modified(|status| {
            let before = status.clone();
            if status.connected != connected {
                status.connected = connected;
                status.since = SystemTime::now();
                match &error {
                    Some(error) => tracing::warn!(error, "API server lost; the data plane stays as it is"),
                    None => tracing::info!(connected, "API server"),
                }
            }
            if error.is_some() {
                status.last_error = error;
            }
            before != *status
        });
    }
}

/// Asks for the server's version after [`PROBE`]; any answer, a refusal too, shows that it is there.
fn probe(client: Client) -> Probe {
    Box::pin(async move {
        tokio::time::sleep(PROBE).await;
        let answer = tokio::time::timeout(PROBE, client.apiserver_version()).await;
        matches!(answer, Ok(Ok(_) | Err(kube::Error::Api(_))))
    })
}

/// 410 Gone: the watch fell behind and lists anew; that is no failure.
fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

fn is_refusal(error: &watcher::Error) -> bool {
    use watcher::Error;
    match error {
        Error::WatchError(_) | Error::NoResourceVersion => true,
        Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error) => {
            matches!(error, kube::Error::Api(_) | kube::Error::SerdeError(_))
        }
    }
}

/// Waits before a broken watch is tried again: 100 ms doubling to 2 s, each shortened by up to half at random, so that a
/// thousand nodes do not come back at once. It starts over after [`CALM`] without a failure; an event alone proves
/// little, as `Init` comes before the server was even asked.
#[derive(Default)]
struct Retry {
    failures: u32,
    failed_at: Option<Instant>,
}

const CALM: Duration = Duration::from_secs(10);

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.failed_at.is_some_and(|at| at.elapsed() > CALM) {
            self.failures = 0;
        }
        self.failed_at = Some(Instant::now());
        let longest = Duration::from_millis(100 << self.failures.min(5)).min(Duration::from_secs(2));
        self.failures = self.failures.saturating_add(1);
        Some(longest.mul_f64(1.0 - rand::random::<f64>() / 2.0))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests;
