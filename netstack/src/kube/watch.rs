//! The watches, joined into one task that owns the [`Cluster`] and publishes Snapshots.
//!
//! A watch that breaks is resumed where it was, or lists anew after 410; meanwhile the last Snapshot stays. A burst of
//! events becomes one Snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::stream::{self, SelectAll, Stream, StreamExt};
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch as channel;
use tokio::time::Instant;
use weft_model::ingress::{Reference, Referred};
use weft_model::node_facts::Observed;
use weft_model::snapshot::Attachments;
use weft_model::{ClusterConfig, Generation, NodeFacts, Snapshot};

use super::client::{Access, Current};
use super::cluster::{Cluster, with_service_cidrs};
use super::document::{CONFIG_MAP, Document, Kind};
use super::failure::{Address, ApiFailure};
use super::referred::Reader;
use super::version::ServerVersion;
use crate::introduce::{Introduced, with_introduced};
use crate::reconcile::{TaskGroup, chain, sleep_until};

/// Events that arrive within this time after the first become one Snapshot: long enough for the Service and the
/// EndpointSlices of one rollout step, short against the 10 ms from event to rule.
const BURST: Duration = Duration::from_millis(2);
/// How long the server is to keep one watch open, in seconds. A connection that went dead silently is noticed 5 s
/// after that, and a resumed watch costs next to nothing.
const WATCH_SECONDS: u32 = 120;
/// Objects in one answer of a list: a page of Pods, 10 kB each, is in memory as a whole.
const PAGE_OBJECTS: u32 = 200;
/// How often a server that could not be reached is asked whether it is back, and how long an answer may take.
const PROBE: Duration = Duration::from_secs(1);
/// How long a server whose watches work may take to tell its version: small machines under load are slow.
const VERSION: Duration = Duration::from_secs(10);

/// What the task offers to others.
pub struct Watches {
    /// `None` until every kind has listed, unless the Store gave a Snapshot.
    pub snapshots: channel::Receiver<Option<Arc<Snapshot>>>,
    pub status: channel::Receiver<ApiStatus>,
}

/// Whether the API server is there, for `weft status` and for the node's readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiStatus {
    pub server: Address,
    /// Every watch has listed, and none is failing.
    pub connected: bool,
    /// When `connected` last changed.
    pub since: SystemTime,
    /// What keeps the watches from working, while it does; of several the one that explains most.
    pub failure: Option<ApiFailure>,
    /// `None` until the server was asked, which it is whenever the connection comes to be; then its last answer.
    pub version: Option<ServerVersion>,
}

impl ApiStatus {
    fn starting(server: Address) -> Self {
        Self { server, connected: false, since: SystemTime::now(), failure: None, version: None }
    }

    /// [`ApiStatus::failure`] as one line with the remedy.
    pub fn refusal(&self) -> Option<String> {
        self.failure.as_ref().map(|failure| failure.sentence(&self.server))
    }
}

/// What this node itself adds to the cluster's objects.
pub struct Here {
    pub facts: channel::Receiver<NodeFacts>,
    /// Added to the facts.
    pub observed: channel::Receiver<Observed>,
    /// What CNI has given; a change is published like that of an object, in the order in which it was made.
    pub attachments: channel::Receiver<Attachments>,
    /// What the other nodes say of their pods before the API does.
    pub introduced: channel::Receiver<Introduced>,
}

/// Starts the task `kube`. With `initial`, that Snapshot is published at once, marked `from_store`, with the facts, the
/// attachments and the configuration of today; it stays until every watch has listed.
pub fn start(
    tasks: &mut TaskGroup,
    access: &Arc<Access>,
    config: &ClusterConfig,
    here: Here,
    initial: Option<Snapshot>,
) -> Watches {
    let (snapshot_tx, snapshots) = channel::channel(None);
    let (status_tx, status) = channel::channel(ApiStatus::starting(access.address()));
    let (wanted_tx, wanted) = channel::channel(None);
    let known = initial.as_ref().map(|stored| stored.referred.clone()).unwrap_or_default();
    let (referred_tx, referred) = channel::channel(known);
    tasks.start("referred", Reader::new(access.clone(), wanted, referred_tx).run());
    let assembler = Assembler {
        cluster: initial.as_ref().map(Cluster::from_stored).unwrap_or_default(),
        generation: initial.as_ref().map(|stored| stored.generation).unwrap_or_default(),
        stored: initial,
        config: Arc::new(config.clone()),
        here,
        wanted_tx,
        referred,
        snapshot_tx,
    };
    tasks.start("kube", run(assembler, Connection::new(access.clone(), status_tx)));
    Watches { snapshots, status }
}

type Events = SelectAll<Pin<Box<dyn Stream<Item = (Kind, watcher::Result<Event<Document>>)> + Send>>>;

/// One watch a kind. Every watch is of the whole cluster, except that of ConfigMaps it is one.
fn watches(access: &Arc<Access>) -> Events {
    let watch = |kind: Kind| {
        let mut config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE_OBJECTS);
        let (namespace, name) = CONFIG_MAP;
        if kind == Kind::ConfigMap {
            config = config.fields(&format!("metadata.name={name}"));
        }
        let access = access.clone();
        stream::repeat_with(move || {
            let used = access.current();
            let api: Api<Document> = match kind {
                Kind::ConfigMap => Api::namespaced_with(used.client.clone(), namespace, &kind),
                _ => Api::all_with(used.client.clone(), &kind),
            };
            until_gone(watcher(api, config.clone()), access.clone(), used)
        })
        .flatten()
        .flat_map(move |event| stream::iter(listed_without(kind, event)))
        .backoff(Retry::default())
        .map(move |event| (kind, event))
        .boxed()
    };
    Kind::ALL.into_iter().map(watch).collect()
}

/// Ends a watch that cannot go on as it is, so that a new one lists anew: one that the server refuses with 410 at its start
/// (`watcher` itself handles a 410 that arrives as an event), and one whose client was replaced.
fn until_gone<S>(
    events: S,
    access: Arc<Access>,
    used: Current,
) -> impl Stream<Item = watcher::Result<Event<Document>>> + Send
where
    S: Stream<Item = watcher::Result<Event<Document>>> + Send,
{
    let watch = (Box::pin(events), access, used);
    stream::unfold(Some(watch), |watch| async {
        let (mut events, access, used) = watch?;
        let event = events.next().await?;
        let gone = match &event {
            Ok(_) => false,
            Err(error @ watcher::Error::WatchStartFailed(_)) if is_expired(error) => true,
            Err(error) => access.is_renewed(&used, &ApiFailure::of_watch(error)).await,
        };
        Some((event, (!gone).then_some((events, access, used))))
    })
}

type Listed = watcher::Result<Event<Document>>;

/// A kind that clusters may lack, and this one does: there are none, until it appears.
fn listed_without(kind: Kind, event: Listed) -> Vec<Listed> {
    match &event {
        Err(error) if kind.is_optional() && is_absent(error) => {
            vec![Ok(Event::Init), Ok(Event::InitDone), event]
        }
        _ => vec![event],
    }
}

async fn run(mut assembler: Assembler, mut connection: Connection) -> Result<(), String> {
    let mut events = watches(&connection.access);
    let mut publish_at = None;
    let mut published_at = Instant::now();
    assembler.publish();
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some((kind, Ok(event))) => {
                    connection.works(kind, &event);
                    if assembler.take(kind, event) {
                        publish_at.get_or_insert_with(|| Instant::now() + BURST);
                    }
                }
                Some((kind, Err(error))) => connection.fails(kind, &error),
                None => return Err("every watch ended".to_owned()),
            },
            changed = assembler.here.facts.changed() => {
                changed.map_err(|_| "the node facts ended".to_owned())?;
                publish_at.get_or_insert_with(|| Instant::now() + BURST);
            }
            changed = assembler.here.observed.changed() => {
                changed.map_err(|_| "the observations ended".to_owned())?;
                publish_at.get_or_insert_with(|| Instant::now() + BURST);
            }
            changed = assembler.here.attachments.changed() => {
                changed.map_err(|_| "the attachments ended".to_owned())?;
                // The ADD of a pod waits for it, and is alone as a rule.
                let at = published_at + BURST;
                publish_at = Some(publish_at.map_or(at, |publish_at: Instant| publish_at.min(at)));
            }
            changed = assembler.here.introduced.changed() => {
                changed.map_err(|_| "the introductions ended".to_owned())?;
                publish_at.get_or_insert_with(|| Instant::now() + BURST);
            }
            changed = assembler.referred.changed() => {
                changed.map_err(|_| "the reader of Secrets ended".to_owned())?;
                let referred = assembler.referred.borrow_and_update().clone();
                if assembler.cluster.refer(referred) {
                    publish_at.get_or_insert_with(|| Instant::now() + BURST);
                }
            }
            () = sleep_until(publish_at) => {
                publish_at = None;
                published_at = Instant::now();
                assembler.publish();
            }
            answer = &mut connection.probe => connection.probed(answer),
        }
    }
}

/// Turns the cluster of now into the next Snapshot.
struct Assembler {
    cluster: Cluster,
    generation: Generation,
    /// What the Store gave; gone when every kind has listed.
    stored: Option<Snapshot>,
    config: Arc<ClusterConfig>,
    here: Here,
    /// What Ingresses refer to, for the task that reads it, and what that task has read.
    wanted_tx: channel::Sender<Option<BTreeSet<Reference>>>,
    referred: channel::Receiver<Referred>,
    snapshot_tx: channel::Sender<Option<Arc<Snapshot>>>,
}

impl Assembler {
    /// One event of a watch; true when a Snapshot would differ.
    fn take(&mut self, kind: Kind, event: Event<Document>) -> bool {
        let changed = self.cluster.apply(kind, event);
        if changed && matches!(kind, Kind::Ingress | Kind::IngressClass) {
            let wanted = self.cluster.references(&self.config.ingress);
            self.wanted_tx.send_if_modified(|known| {
                let differs = *known != wanted;
                *known = wanted;
                differs
            });
        }
        changed
    }

    fn publish(&mut self) {
        let facts = self.facts_now();
        let attachments = self.here.attachments.borrow_and_update().clone();
        let complete = self.cluster.is_complete();
        let published = self.snapshot_tx.borrow().clone();
        let generation = self.generation.next();
        let snapshot = match &self.stored {
            Some(stored) if !complete => Snapshot {
                generation,
                config: with_service_cidrs(self.config.clone(), &stored.service_cidrs),
                facts,
                attachments,
                from_store: true,
                ..stored.clone()
            },
            None if !complete => return,
            _ => {
                let cluster = self.cluster.snapshot(generation, self.config.clone(), facts);
                let introduced = self.here.introduced.borrow_and_update();
                let last = published.as_ref().map(|published| &published.pods);
                let pods = with_introduced(&cluster.pods, &cluster.nodes, &introduced, last);
                Snapshot { attachments, pods, ..cluster }
            }
        };
        if complete {
            self.stored = None;
        }
        if published.is_some_and(|published| snapshot.differs_only_in_generation(&published)) {
            return;
        }
        self.generation = generation;
        self.snapshot_tx.send_replace(Some(Arc::new(snapshot)));
    }

    /// The facts, as the same `Arc` as before while they are equal.
    fn facts_now(&mut self) -> Arc<NodeFacts> {
        let observed = self.here.observed.borrow_and_update().clone();
        let facts = NodeFacts { observed, ..self.here.facts.borrow_and_update().clone() };
        match &*self.snapshot_tx.borrow() {
            Some(published) if *published.facts == facts => published.facts.clone(),
            _ => Arc::new(facts),
        }
    }
}

/// The server has no such kind. The error stays in the stream, so that it is asked again, ever more rarely.
fn is_absent(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}

/// Knows which watches fail, and keeps [`ApiStatus`].
struct Connection {
    access: Arc<Access>,
    status_tx: channel::Sender<ApiStatus>,
    /// Of the watches that have answered or failed: why one fails.
    seen: BTreeMap<Kind, Option<ApiFailure>>,
    /// Resolves with the server's version, or why there is none; never while nobody waits for it.
    probe: Probe,
    /// The version is wanted: the connection is new.
    asks_version: bool,
}

type Probe = Pin<Box<dyn Future<Output = Result<ServerVersion, ApiFailure>> + Send>>;

impl Connection {
    fn new(access: Arc<Access>, status_tx: channel::Sender<ApiStatus>) -> Self {
        let probe = Box::pin(std::future::pending());
        Self { access, status_tx, seen: BTreeMap::new(), probe, asks_version: false }
    }

    /// An `Init` says only that a list is going to be asked for; all else came from the server.
    fn works(&mut self, kind: Kind, event: &Event<Document>) {
        if !matches!(event, Event::Init) && self.seen.insert(kind, None) != Some(None) {
            self.update();
        }
    }

    fn fails(&mut self, kind: Kind, error: &watcher::Error) {
        if kind.is_optional() && is_absent(error) {
            return;
        }
        if is_expired(error) {
            tracing::debug!(kind = kind.name(), "watch expired, listing anew");
            return;
        }
        tracing::debug!(kind = kind.name(), error = chain(error), "watch failed");
        let probing = self.is_probing();
        self.seen.insert(kind, Some(ApiFailure::of_watch(error)));
        if !probing && self.is_probing() {
            self.probe = probe(&self.access, PROBE, PROBE);
        }
        self.update();
    }

    /// A server that could not be reached lets its watches resume silently, so a probe tells when it is back. A refusal is
    /// withdrawn by the watch itself.
    fn is_probing(&self) -> bool {
        self.seen.values().flatten().any(ApiFailure::is_silence)
    }

    /// Any answer, a refusal too, shows that the server is there.
    fn probed(&mut self, answer: Result<ServerVersion, ApiFailure>) {
        let silent = matches!(&answer, Err(failure) if failure.is_silence());
        if !silent {
            let version = answer.unwrap_or_else(|failure| {
                tracing::debug!(?failure, "the API server does not tell its version");
                ServerVersion::Unknown("of an unknown version".to_owned())
            });
            self.asks_version = false;
            self.status_tx.send_modify(|status| status.version = Some(version));
            self.seen
                .values_mut()
                .filter(|seen| seen.as_ref().is_some_and(ApiFailure::is_silence))
                .for_each(|seen| *seen = None);
            self.update();
        }
        self.probe = match (self.is_probing(), self.asks_version) {
            (true, _) => probe(&self.access, PROBE, PROBE),
            (false, true) => probe(&self.access, PROBE, VERSION),
            (false, false) => Box::pin(std::future::pending()),
        };
    }

    fn update(&mut self) {
        let failure = self.seen.values().flatten().min().cloned();
        let connected = self.seen.len() == Kind::ALL.len() && failure.is_none();
        let before = self.status_tx.borrow().clone();
        if before.connected == connected && before.failure == failure {
            return;
        }
        let since = if before.connected == connected { before.since } else { SystemTime::now() };
        let now = ApiStatus { server: self.access.address(), connected, since, failure, ..before.clone() };
        log(&before, &now);
        if connected && !before.connected {
            self.asks_version = true;
            self.probe = probe(&self.access, Duration::ZERO, VERSION);
        }
        self.status_tx.send_replace(now);
    }
}

/// A failure is said once, however often it is met.
fn log(before: &ApiStatus, now: &ApiStatus) {
    if now.connected {
        tracing::info!(server = %now.server, "API server connected");
    } else if let Some(refusal) = now.refusal().filter(|_| now.failure != before.failure) {
        match before.connected {
            true => tracing::warn!(refusal, "API server lost; the data plane stays as it is"),
            false => tracing::warn!(refusal, "API server not usable"),
        }
    }
}

/// Asks for the server's version after `wait`, for at most `patience`.
fn probe(access: &Access, wait: Duration, patience: Duration) -> Probe {
    let client = access.current().client;
    Box::pin(async move {
        tokio::time::sleep(wait).await;
        match tokio::time::timeout(patience, client.apiserver_version()).await {
            Ok(Ok(info)) => Ok(ServerVersion::of(&info)),
            Ok(Err(error)) => Err(ApiFailure::of(&error)),
            Err(_) => Err(ApiFailure::Unreachable(format!("no answer within {} s", patience.as_secs()))),
        }
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
