//! The rooms of a node, connected: who is given what. No decisions.

use std::io::Cursor;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use nix::errno::Errno;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use weft_ingress::apply::RoutesApplier;
use weft_ingress::plan::IngressPlanner;
use weft_lb::announce::{AnnouncePlanner, announcer};
use weft_lb::status::{StatusApplier, StatusPlanner};
use weft_model::balancer::AnswersFor;
use weft_model::node_facts::Observed;
use weft_model::snapshot::Attachments;
use weft_model::{NodeFacts, NodeName, Notice, Report, Snapshot};
use weft_netstack::admin::{self, Admin, Collect, Counters, Read};
use weft_netstack::cni::apply::PodLinksApplier;
use weft_netstack::cni::plan::PodLinksPlanner;
use weft_netstack::cni::{self, Caller, Cni, PodMtu, Readiness};
use weft_netstack::expose::plan::{IngressStatusPlanner, SlicesPlanner};
use weft_netstack::flows::{self, Recorded};
use weft_netstack::introduce::{self, Introduced};
use weft_netstack::kernel::facts;
use weft_netstack::kernel::memory::give_memory_back;
use weft_netstack::kernel::netns::Rtnetlink;
use weft_netstack::kernel::nft::Commits;
use weft_netstack::kernel::route::losses;
use weft_netstack::kernel::sysctl::Journal;
use weft_netstack::kernel::vip;
use weft_netstack::kube::{
    self, Access, Announcer, ApiStatus, Here, Lead, NodeCondition, Notices, Publisher, Publishing,
    SlicesWriter, StatusWriter, Watches, definitions, lease,
};
use weft_netstack::overlay::rotation::Rotation;
use weft_netstack::overlay::{self, OverlayApplier, OverlayPlanner};
use weft_netstack::policy::{self, Judge, PolicyApplier, PolicyPlanner};
use weft_netstack::proxy::{KubeProxyNames, ProxyApplier, ProxyHealth, ProxyPlanner};
use weft_netstack::reconcile::{
    Applier, Loop, LoopHandle, Pace, Planner, TaskGroup, Watchfulness, chain, vigil,
};
use weft_netstack::store::{LastGood, Leases};
use weft_plugin::loopback;

use super::config::Config;
use super::keep::{Configurations, Conflist, Saver};
use super::readiness::{self, Sources};
use crate::files;
use crate::kept::Kept;

/// What decides as the rules in the kernel do.
type Judges = watch::Receiver<Option<Arc<Judge>>>;
type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

const POLICY_OFF: &str = "off (--network-policy off): every NetworkPolicy is ignored";

/// Starts every part of the node in `tasks`.
pub(super) async fn wire(config: &Config, tasks: &mut TaskGroup) -> anyhow::Result<Option<Saver>> {
    let path = config.state_dir.join("store");
    let reading = tokio::task::spawn_blocking(move || last_good(&path));
    let access = Arc::new(Access::open(config.api_server.clone()).await?);
    let leases = Arc::new(Leases::open(config.run_dir.join("leases"))?);
    let (facts_rx, follow_facts) = facts::watch(config.node.clone(), config.cluster.ranges()).await?;
    tasks.start("facts", follow_facts);

    let (durable, initial) = reading.await.context("read the last good snapshot")?;
    let (attachments_tx, attachments) = watch::channel(cni::attachments(&leases.records()));
    let (introduced_tx, introduced) = watch::channel(Introduced::default());
    let (observed_tx, observed) = watch::channel(observed_before(initial.as_ref()));
    let here = Here { facts: facts_rx.clone(), observed, attachments: attachments.clone(), introduced };
    let Watches { snapshots, status } = kube::start(tasks, &access, &config.cluster, here, initial);
    introduce::start(tasks, &snapshots, &attachments, introduced_tx);
    overlay::observe(tasks, &snapshots, observed_tx, facts_rx.borrow().wireguard_backend);
    let lead = lease::start(tasks, access.clone(), config.node.clone());

    let dns = start_dns(config, leases.clone());
    let overlay = overlay_applier(config, tasks)?;
    let mut loops = Loops { tasks, snapshots: snapshots.clone(), handles: Vec::new() };
    // The first: pods' questions wait in its sockets.
    loops.start("dns", dns.planner, dns.applier, Pace::default());
    // The tunnel is a process of its own and may come late: pods wait for this loop, so it is not tried rarely.
    let impatient = Pace { max_backoff: Duration::from_secs(1), ..Pace::default() };
    let overlay =
        loops.start("overlay", OverlayPlanner { open_firewalls: config.open_firewalls }, overlay, impatient);
    let (proxy_health, proxy_metrics) = start_proxy(&mut loops);
    let (answers_for_tx, answers_for) = watch::channel(None);
    let rotation = publish(&mut loops, config, &access, answers_for)?;
    let (policy, judge) = start_policy(&mut loops, config.network_policy, impatient)?.unzip();
    start_ingress(&mut loops, config, &access, &lead, impatient).await;
    let sources = Sources {
        snapshots: snapshots.clone(),
        api: status.clone(),
        overlay: overlay.clone(),
        policy: policy.clone(),
    };
    let verdicts = policy.map(|policy| policy.reports());
    let told = Told { attachments: attachments_tx, verdicts: verdicts.clone() };
    let cni = open_cni(snapshots.clone(), leases, sources.readiness(), told).await?;
    let (notices, passing) = Notices::channel();
    let (balancer, balancer_counters) =
        start_load_balancer(&mut loops, config, &access, (&lead, notices.clone(), answers_for_tx)).await?;
    let pod_links = loops.start("cni", PodLinksPlanner, PodLinksApplier::new(cni.clone()), Pace::default());
    let handles = loops.handles;
    let flows = record_flows(tasks, snapshots.clone(), judge, notices);
    tell_the_cluster(tasks, (access, config.node.clone()), &snapshots, (&handles, verdicts), passing);
    watch_others(tasks, &handles, [overlay, pod_links])?;

    let (pages, page_texts) = Pages::new();
    let (found_tx, found) = watch::channel(Configurations::default());
    let obstacles = obstacle_texts(sources.clone(), found.clone());
    let mut admin = admin(config, handles, snapshots.clone(), status, facts_rx, dns.stats, obstacles);
    let others = found.clone();
    let (rotating, keys) = (rotation.clone(), overlay::rotation::router(rotation));
    admin.parts.extend([
        said("key rotation", move || rotating.progress().unwrap_or_default()),
        said("writer", move || lead.text()),
        said("cni", move || others.borrow().note.clone()),
    ]);
    admin.parts.extend(page_texts);
    admin.counters.extend(balancer_counters);
    let coredns_names = dns.coredns_names;
    admin.collectors.extend([proxy_metrics, Box::new(move || Box::new(coredns_names.clone()))]);
    admin.parts.extend((!config.network_policy).then(|| said("policy", || POLICY_OFF.to_owned())));
    let admin = Arc::new(admin);
    let socket = config.run_dir.join("agent.sock");
    let explaining = crate::dns::Explaining { explainer: dns.explainer, snapshots: snapshots.clone() };
    let router = cni::server::router(cni)
        .merge(admin::status_router(admin.clone()))
        .merge(keys)
        .merge(policy::explain::router(snapshots.clone()))
        .merge(crate::dns::router(explaining))
        .merge(crate::ingress::router(snapshots.clone()))
        .merge(balancer)
        .merge(flows);
    serve_unix(tasks, &socket, router)?;
    pages.serve(config, tasks, admin, proxy_health);

    install_plugin(&config.cni_bin_dir)?;
    tasks.start("readiness", readiness::tell(sources.clone(), found));
    let folder = config.cni_conf_dir.clone();
    tasks.start("conflist", Conflist { folder, socket, sources, found: found_tx }.run());
    Ok(durable.map(|store| start_saver(tasks, Saver { store, snapshots })))
}

/// The own Node says which key is this node's, which one comes next, and which addresses it answers for.
fn publish(
    loops: &mut Loops<'_>,
    config: &Config,
    access: &Arc<Access>,
    answers_for: watch::Receiver<Option<AnswersFor>>,
) -> anyhow::Result<Arc<Rotation>> {
    let (state_dir, run_dir) = (config.state_dir.clone(), config.run_dir.clone());
    let rotation =
        Rotation::open(state_dir, run_dir, config.cluster.wireguard_port, loops.snapshots.clone())?;
    let publishing = Publishing { identity: rotation.identity(), answers_for: answers_for.clone() };
    let publish = loops.start("publish", publishing, Publisher::new(access.clone()), Pace::default());
    loops.tasks.start("answers", nudge_when_changed(answers_for, publish.clone()));
    loops.tasks.start("rotation", rotation.clone().run(config.max_key_age, publish));
    Ok(rotation)
}

/// Never ends: a value without a sender changes no more.
async fn nudge_when_changed<T>(mut value: watch::Receiver<T>, of: LoopHandle) -> Result<(), String> {
    while value.changed().await.is_ok() {
        of.nudge();
    }
    std::future::pending().await
}

fn start_saver(tasks: &mut TaskGroup, saver: Saver) -> Saver {
    tasks.start("saver", saver.clone().run());
    saver
}

/// Beside the rest of the start: names are answered once this is read, and of a large cluster it is much.
///
/// Without it the node works, until it reboots while the API server is away.
fn last_good(path: &Path) -> (Option<Arc<LastGood>>, Option<Snapshot>) {
    let found = match LastGood::read(path) {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(error = chain(&error), "running without the last good snapshot");
            return (None, None);
        }
    };
    give_memory_back();
    tell_of_damage(found.set_aside.as_deref());
    if let Some(reason) = found.read.unreadable {
        tracing::warn!(reason, "starting without the last good snapshot");
    }
    (Some(Arc::new(found.last_good)), found.read.snapshot)
}

/// What is known of the ways to the peers stays while they are away.
fn observed_before(stored: Option<&Snapshot>) -> Observed {
    stored.map(|stored| stored.facts.observed.clone()).unwrap_or_default()
}

fn tell_of_damage(set_aside: Option<&Path>) {
    if let Some(damaged) = set_aside {
        tracing::error!(damaged = %damaged.display(), "the store was damaged: set aside, a new one is in use");
    }
}

struct Loops<'a> {
    tasks: &'a mut TaskGroup,
    snapshots: Snapshots,
    handles: Vec<LoopHandle>,
}

impl Loops<'_> {
    fn start<P, A>(&mut self, name: &'static str, planner: P, applier: A, pace: Pace) -> LoopHandle
    where
        P: Planner,
        A: Applier<Plan = P::Plan>,
    {
        let (run, handle) = Loop::new(name, planner, applier, pace, self.snapshots.clone());
        self.tasks.start(name, run.run());
        self.handles.push(handle.clone());
        handle
    }
}

fn start_dns(config: &Config, leases: Arc<Leases>) -> weft_dns::Dns {
    let options = weft_dns::Options {
        resolv_conf: config.resolv_conf.clone(),
        queries_per_second: Some(config.dns_rate_limit),
        ..weft_dns::Options::default()
    };
    let namespace_of = move |address| leases.pod_of(address).map(|pod| pod.namespace.to_string());
    let Kept { udp, tcp, store } = Kept::from_environment();
    let handover = weft_dns::Handover { udp, tcp, store };
    weft_dns::start(&config.cluster, options, handover, Arc::new(namespace_of))
}

/// Its netlink connection lives as long as the agent.
fn overlay_applier(config: &Config, tasks: &mut TaskGroup) -> anyhow::Result<OverlayApplier> {
    let netlink = Rtnetlink::connect().context("open an rtnetlink socket")?;
    let overlay =
        OverlayApplier::new(netlink.handle.clone(), config.run_dir.clone(), config.state_dir.clone());
    tasks.start("netlink", async move {
        let _alive = netlink;
        std::future::pending().await
    });
    Ok(overlay)
}

/// What the API server is told beside statuses: Events, and the condition of the own Node, which the reports of the policies' loop decide.
fn tell_the_cluster(
    tasks: &mut TaskGroup,
    (access, node): (Arc<Access>, NodeName),
    snapshots: &Snapshots,
    (loops, policy): (&[LoopHandle], Option<watch::Receiver<Report>>),
    passing: mpsc::Receiver<Notice>,
) {
    let condition = NodeCondition { access: access.clone(), node: node.clone(), policy };
    tasks.start("condition", condition.run());
    let reports = loops.iter().map(LoopHandle::reports).collect();
    let announcer = Announcer { access, node, snapshots: snapshots.clone(), reports, passing };
    tasks.start("events", announcer.run());
}

/// What others take away is put back at once, not at the next drift check.
fn watch_others(
    tasks: &mut TaskGroup,
    loops: &[LoopHandle],
    with_routes: [LoopHandle; 2],
) -> anyhow::Result<()> {
    let mut commits = Commits::open().context("watch the rule set")?;
    tasks.start("rules", vigil(Watchfulness::default(), move || commits.foreign(), loops.to_vec()));
    tasks.start(
        "routes",
        losses(move || with_routes.iter().for_each(LoopHandle::nudge)).context("watch the routes")?,
    );
    Ok(())
}

/// A sentence of its own in `weft status`.
fn said<T: Into<serde_json::Value>>(
    name: &'static str,
    text: impl Fn() -> T + Send + Sync + 'static,
) -> (&'static str, Read<serde_json::Value>) {
    (name, Box::new(move || text().into()))
}

/// What keeps pods away, as `weft status` says it.
fn obstacle_texts(sources: Sources, found: watch::Receiver<Configurations>) -> Read<Vec<String>> {
    Box::new(move || {
        let of_node = sources.obstacles().into_iter().map(|obstacle| obstacle.sentence);
        of_node.chain(found.borrow().objection.clone()).collect()
    })
}

fn start_proxy(loops: &mut Loops<'_>) -> (Arc<ProxyHealth>, Collect) {
    let proxy = ProxyApplier::new();
    let (health, metrics) = (proxy.health(), proxy.metrics());
    let snapshots = loops.snapshots.clone();
    let handle = loops.start("proxy", ProxyPlanner::default(), proxy, Pace::default());
    loops.tasks.start("proxy-metrics", metrics.clone().follow(snapshots, handle.reports()));
    let names = KubeProxyNames { metrics, tally: handle.tally() };
    (health, Box::new(move || Box::new(names.clone())))
}

/// Routes for the process `weft ingress`, and what the one writer says of it; switched off, what was served is served no longer.
async fn start_ingress(
    loops: &mut Loops<'_>,
    config: &Config,
    access: &Arc<Access>,
    lead: &Lead,
    impatient: Pace,
) {
    if !config.cluster.ingress.on {
        if let Err(error) = weft_ingress::apply::withdraw(&config.run_dir).await {
            tracing::warn!(error = chain(&error), "Ingresses are still served");
        }
        return;
    }
    loops.start("ingress", IngressPlanner::default(), RoutesApplier::new(&config.run_dir), impatient);
    let slices = SlicesWriter::new(access.clone(), lead.clone());
    let slices = loops.start("ingress-endpoints", SlicesPlanner, slices, Pace::default());
    let writer = StatusWriter::new(access.clone(), lead.clone());
    let planner = IngressStatusPlanner { on: config.ingress_status };
    let statuses = loops.start("ingress-status", planner, writer, Pace::default());
    loops.tasks.start("ingress-lead", lease::wake(lead.clone(), vec![slices, statuses]));
}

/// Switched off, it leaves nothing behind of an agent that had it on.
fn start_policy(loops: &mut Loops<'_>, on: bool, pace: Pace) -> anyhow::Result<Option<(LoopHandle, Judges)>> {
    if on {
        let applier = PolicyApplier::new();
        let judge = applier.judge();
        return Ok(Some((loops.start("policy", PolicyPlanner::default(), applier, pace), judge)));
    }
    policy::remove().context("remove the rules of network policies")?;
    Ok(None)
}

/// Every node plans the statuses; the one with the lead writes them, and makes MetalLB's kinds where there are none.
async fn start_load_balancer(
    loops: &mut Loops<'_>,
    config: &Config,
    access: &Arc<Access>,
    (lead, notices, answers_for): (&Lead, Notices, watch::Sender<Option<AnswersFor>>),
) -> anyhow::Result<(Router, Option<Counters>)> {
    if !config.load_balancer {
        let netlink = Rtnetlink::connect().context("open an rtnetlink socket")?;
        vip::remove_all(&netlink.handle).await;
        answers_for.send_replace(Some(AnswersFor::default()));
        return Ok((Router::new(), None));
    }
    let (applier, standing, plan, announcer) =
        announcer(notices.clone(), Journal::of(&config.run_dir), answers_for);
    loops.start("lb", AnnouncePlanner::default(), applier, Pace::default());
    loops.tasks.start("announcer", announcer.run());
    let writer = StatusWriter::new(access.clone(), lead.clone());
    let statuses = StatusApplier::new(writer, notices);
    let statuses = loops.start("lb-status", StatusPlanner::default(), statuses, Pace::default());
    loops.tasks.start("lead", lease::wake(lead.clone(), vec![statuses]));
    let definitions = crate::manifests::documents(weft_manifests::METALLB)?;
    loops.tasks.start("definitions", definitions::ensure(access.clone(), lead.clone(), definitions));
    let views =
        weft_lb::trace::Views { snapshots: loops.snapshots.clone(), plan, standing: standing.clone() };
    let malformed = Counters {
        name: "lb_malformed_packets",
        help: "Packets of the LAN that were dropped because they are not well-formed, by protocol",
        label: "protocol",
        read: Box::new(move || {
            let malformed = standing.borrow().malformed;
            vec![("arp", malformed.arp), ("neighbour discovery", malformed.neighbour_discovery)]
        }),
    };
    Ok((weft_lb::trace::router(views), Some(malformed)))
}

/// Flows are told by whom policies decide about: with the engine off there is nothing to ask, and nothing is recorded.
fn record_flows(
    tasks: &mut TaskGroup,
    snapshots: Snapshots,
    judge: Option<Judges>,
    notices: Notices,
) -> Router {
    let Some(judge) = judge else {
        return flows::refusal("no flows are recorded: the agent runs with --network-policy off");
    };
    let recorded = Recorded::default();
    let sources = flows::Sources { snapshots, judge };
    tasks.start("denied-flows", flows::record_denied(recorded.clone(), sources.clone(), notices));
    tasks.start("allowed-flows", flows::record_allowed(recorded.clone(), sources));
    flows::router(recorded)
}

/// How CNI and the policies hear of each other: addresses given one way, verdicts in the kernel the other.
struct Told {
    attachments: watch::Sender<Attachments>,
    verdicts: Option<watch::Receiver<Report>>,
}

/// Leases are made true before the first request is served.
async fn open_cni(
    snapshots: Snapshots,
    leases: Arc<Leases>,
    readiness: Readiness,
    told: Told,
) -> anyhow::Result<Arc<Cni>> {
    let pod_mtu_bytes: PodMtu = Arc::new(overlay::mtu_bytes);
    let Told { attachments, verdicts } = told;
    let inputs = cni::Inputs { snapshots, leases, readiness, pod_mtu_bytes, attachments, verdicts };
    let cni = Arc::new(Cni::open(inputs).context("open an rtnetlink socket")?);
    let outcome = cni.reconcile().await;
    for failure in &outcome.failed {
        tracing::warn!(failure, "leases");
    }
    Ok(cni)
}

fn admin(
    config: &Config,
    loops: Vec<LoopHandle>,
    snapshot_rx: Snapshots,
    api: watch::Receiver<ApiStatus>,
    facts: watch::Receiver<NodeFacts>,
    dns: Arc<weft_dns::Stats>,
    obstacles: Read<Vec<String>>,
) -> Admin {
    let run_dir = config.run_dir.clone();
    let snapshots = snapshot_rx.clone();
    Admin {
        node: config.node.clone(),
        version: env!("CARGO_PKG_VERSION"),
        loops,
        snapshot_rx,
        obstacles,
        api_server: Box::new(move || api_text(&api.borrow())),
        parts: vec![(
            "peers",
            Box::new(move || match overlay::peers(&run_dir, facts.borrow().wireguard_backend) {
                Ok(peers) => {
                    let snapshot = snapshots.borrow().clone();
                    serde_json::json!(overlay::endpoints::explain(snapshot.as_deref(), peers))
                }
                Err(error) => chain(&error).into(),
            }),
        )],
        counters: dns_counters(dns),
        collectors: Vec::new(),
        texts: if config.cluster.ingress.on { vec![ingress_metrics(&config.run_dir)] } else { Vec::new() },
    }
}

fn ingress_metrics(run_dir: &std::path::Path) -> Read<String> {
    let socket = run_dir.join(weft_ingress::apply::FOLDER).join(weft_ingress::apply::SOCKET_FILE);
    Box::new(move || weft_netstack::control::request(&socket, "GET", "/metrics").unwrap_or_default())
}

/// Under our own names.
fn dns_counters(stats: Arc<weft_dns::Stats>) -> Vec<Counters> {
    type Values = Vec<(&'static str, u64)>;
    let family = |name, help, label, read: fn(&weft_dns::Stats) -> Values| {
        let stats = stats.clone();
        Counters { name, help, label, read: Box::new(move || read(&stats)) }
    };
    vec![
        family("dns_requests", "DNS messages that came, by transport", "proto", |stats| {
            stats.requests().to_vec()
        }),
        family("dns_responses", "DNS answers sent, by response code", "rcode", |stats| {
            stats.responses().to_vec()
        }),
        family("dns_dropped", "DNS messages without an answer, by reason", "reason", |stats| stats.dropped()),
        family(
            "dns_refused",
            "DNS messages answered without being looked up, by reason",
            "reason",
            |stats| stats.refused(),
        ),
        family(
            "dns_outside",
            "DNS names outside the cluster, by what became of the question or of an upstream",
            "event",
            |stats| stats.outside().to_vec(),
        ),
    ]
}

fn api_text(status: &ApiStatus) -> String {
    let seconds = status.since.elapsed().unwrap_or(Duration::ZERO).as_secs();
    let version = status.version.as_ref().map(|version| format!(", {}", version.text())).unwrap_or_default();
    match (status.refusal(), status.connected) {
        (_, true) => format!("connected for {seconds} s ({}{version})", status.server),
        (Some(refusal), false) => format!("away for {seconds} s: {refusal}"),
        (None, false) => format!("not reached yet ({seconds} s, {})", status.server),
    }
}

/// A socket left by a dead agent is replaced: the lock says that no other agent lives.
fn serve_unix(tasks: &mut TaskGroup, path: &Path, router: Router) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let router = router.into_make_service_with_connect_info::<Caller>();
    tasks.start("socket", async move { axum::serve(listener, router).await.map_err(|error| chain(&error)) });
    Ok(())
}

/// How often an address that is taken is tried again.
const REBIND: Duration = Duration::from_secs(2);

/// The pages for machines, each told how its listener does.
struct Pages {
    observed: watch::Sender<String>,
    dns_metrics: watch::Sender<String>,
    proxy_health: watch::Sender<String>,
}

impl Pages {
    /// With what `weft status` says of them.
    fn new() -> (Self, [(&'static str, Read<serde_json::Value>); 3]) {
        let (observed, observe_outcome) = watch::channel(String::new());
        let (dns_metrics, dns_metrics_outcome) = watch::channel("off".to_owned());
        let (proxy_health, health_outcome) = watch::channel(String::new());
        let texts = [
            said("observe", move || observe_outcome.borrow().clone()),
            said("dns metrics", move || dns_metrics_outcome.borrow().clone()),
            said("proxy health", move || health_outcome.borrow().clone()),
        ];
        (Self { observed, dns_metrics, proxy_health }, texts)
    }

    fn serve(self, config: &Config, tasks: &mut TaskGroup, admin: Arc<Admin>, health: Arc<ProxyHealth>) {
        if let Some(address) = config.dns_metrics_address {
            let router = admin::metrics_router(admin.clone());
            // The same page where what watches a CoreDNS looks for it.
            let page = ("DNS metrics", "--dns-metrics-address");
            tasks.start("dns-metrics", serve_page(address, page, router, self.dns_metrics));
        }
        let router = admin::observe_router(admin);
        let page = ("metrics and health", "--observe-address");
        tasks.start("observe", serve_page(config.observe_address, page, router, self.observed));
        let address = config.proxy_health_address;
        tasks.start("proxy-health", serve_proxy_health(address, health, self.proxy_health));
    }
}

/// What machines read of the node. Pods need none of it: while the address is taken, the node works and `outcome` says what to do.
async fn serve_page(
    address: SocketAddr,
    (what, flag): (&str, &str),
    router: Router,
    outcome: watch::Sender<String>,
) -> Result<(), String> {
    let listener = bind(address, what, flag, &outcome).await;
    axum::serve(listener, router).await.map_err(|error| chain(&error))
}

/// Load balancers need it, pods do not.
async fn serve_proxy_health(
    address: SocketAddr,
    health: Arc<ProxyHealth>,
    outcome: watch::Sender<String>,
) -> Result<(), String> {
    let listener = bind(address, "the proxy's health", "--proxy-health-address", &outcome).await;
    health.serve(listener).await;
    Ok(())
}

/// Tries until it can.
async fn bind(address: SocketAddr, what: &str, flag: &str, outcome: &watch::Sender<String>) -> TcpListener {
    let listener = loop {
        match listen(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let said =
                    format!("{address} for {what} cannot be used: {error}; free it or give another {flag}");
                if *outcome.borrow() != said {
                    tracing::error!("{said}");
                }
                outcome.send_replace(said);
            }
        }
        tokio::time::sleep(REBIND).await;
    };
    outcome.send_replace(format!("listening on {address}"));
    listener
}

/// `[::]` takes both families; on a host without IPv6 it means `0.0.0.0`.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let without_ipv6 = |error: &std::io::Error| {
        let errno = error.raw_os_error().map(Errno::from_raw);
        matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
    };
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && without_ipv6(&error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        outcome => outcome,
    }
}

/// The program that is the plugin: small and quick to start. `None` in a build without one.
#[cfg(carries_plugin)]
const PLUGIN: Option<&[u8]> = Some(include_bytes!(env!("WEFT_PLUGIN")));
#[cfg(not(carries_plugin))]
const PLUGIN: Option<&[u8]> = None;

/// Writes the plugin `weft`, or else this very binary, to where runtimes look for it, atomically, unless it is there already. Without a
/// plugin `loopback`, which others may have put there, the name leads to ours.
fn install_plugin(folder: &Path) -> anyhow::Result<()> {
    let plugin = folder.join("weft");
    let written = match PLUGIN {
        // Where the whole binary lies in that folder it is the plugin: it must not be replaced by less.
        Some(_) if files::is_own_binary(&plugin) => Ok(false),
        Some(program) => files::ensure(&plugin, 0o755, &mut Cursor::new(program)),
        None => files::own_binary().and_then(|mut own| files::ensure(&plugin, 0o755, &mut own)),
    };
    written
        .and_then(|_| match symlink("weft", folder.join(loopback::PLUGIN)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            outcome => outcome,
        })
        .with_context(|| {
            format!("install the CNI plugin as {}; give a writable --cni-bin-dir", plugin.display())
        })
}
