//! Against a small API server that speaks list and watch: what is asked, and what becomes of every answer.

use std::collections::VecDeque;
use std::sync::Mutex;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use weft_model::NamespacedName;
use weft_model::ServiceKey;
use weft_model::node_facts::{Observed, WireguardBackend};
use weft_model::snapshot::AttachedPod;

use super::*;

/// The server's state: one collection a kind, and what the open watches are to be told.
#[derive(Default)]
struct Server {
    objects: BTreeMap<&'static str, Vec<Value>>,
    version: u64,
    watchers: BTreeMap<&'static str, mpsc::UnboundedSender<Value>>,
    /// Answers that the next watch requests of Services get instead of a stream.
    refusals: VecDeque<StatusCode>,
    /// Requests without this bearer token get 401.
    token: Option<&'static str>,
    /// A kind that nobody may list.
    forbidden: Option<&'static str>,
    /// Minor version, 34 when it is not set; `?` for an answer that cannot be read.
    minor: Option<&'static str>,
    requests: Vec<String>,
    patches: Vec<(String, Value)>,
}

type Shared = Arc<Mutex<Server>>;

fn plural(path: &str) -> Option<&'static str> {
    let last = path.rsplit('/').next()?;
    [
        "nodes",
        "configmaps",
        "namespaces",
        "services",
        "endpointslices",
        "pods",
        "networkpolicies",
        "ingressclasses",
        "ingresses",
        "servicecidrs",
        "ipaddresspools",
        "l2advertisements",
    ]
    .into_iter()
    .find(|kind| *kind == last)
}

fn refusal(code: StatusCode, reason: &str, message: &str) -> Response {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code.as_u16(),
        "reason": reason, "message": message,
    });
    (code, axum::Json(status)).into_response()
}

async fn answer(
    State(server): State<Shared>,
    uri: Uri,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let query = query.unwrap_or_default();
    let mut server = server.lock().unwrap();
    server.requests.push(format!("{}?{query}", uri.path()));
    let bearer = headers.get("authorization").and_then(|value| value.to_str().ok());
    if server.token.is_some_and(|token| bearer != Some(&format!("Bearer {token}"))) {
        return refusal(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized");
    }
    let Some(kind) = plural(uri.path()) else {
        let minor = server.minor.unwrap_or("34");
        if minor == "?" {
            return "no JSON".into_response();
        }
        return axum::Json(json!({
            "major": "1", "minor": minor, "gitVersion": format!("v1.{minor}.0"), "gitCommit": "", "gitTreeState": "",
            "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
        }))
        .into_response();
    };
    if server.forbidden == Some(kind) {
        let message = format!(
            "{kind} is forbidden: User \"system:serviceaccount:default:other\" cannot list resource \"{kind}\" in API group \"\" \
             at the cluster scope"
        );
        return refusal(StatusCode::FORBIDDEN, "Forbidden", &message);
    }
    if !query.contains("watch=true") {
        let items = server.objects.get(kind).cloned().unwrap_or_default();
        let version = server.version.to_string();
        return axum::Json(json!({
            "apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": version}, "items": items,
        }))
        .into_response();
    }
    if kind == "services"
        && let Some(code) = server.refusals.pop_front()
    {
        return refusal(code, "Expired", "refused by the test");
    }
    let (tx, mut rx) = mpsc::unbounded_channel::<Value>();
    server.watchers.insert(kind, tx);
    let lines = futures::stream::poll_fn(move |cx| {
        rx.poll_recv(cx)
            .map(|event| event.map(|event| Ok::<_, std::convert::Infallible>(format!("{event}\n"))))
    });
    Body::from_stream(lines).into_response()
}

async fn patch(State(server): State<Shared>, uri: Uri, axum::Json(patch): axum::Json<Value>) -> Response {
    server.lock().unwrap().patches.push((uri.path().to_owned(), patch));
    axum::Json(json!({"metadata": {"name": "n1"}})).into_response()
}

impl Server {
    /// Creates or replaces an object and tells the open watch.
    fn set(&mut self, kind: &'static str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let objects = self.objects.entry(kind).or_default();
        objects.retain(|known| known["metadata"]["name"] != object["metadata"]["name"]);
        objects.push(object.clone());
        self.tell(kind, json!({"type": "MODIFIED", "object": object}));
    }

    fn delete(&mut self, kind: &'static str, name: &str) {
        self.version += 1;
        let objects = self.objects.entry(kind).or_default();
        let at = objects.iter().position(|known| known["metadata"]["name"] == name).unwrap();
        let mut object = objects.remove(at);
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.tell(kind, json!({"type": "DELETED", "object": object}));
    }

    fn tell(&self, kind: &str, event: Value) {
        if let Some(watcher) = self.watchers.get(kind) {
            let _ = watcher.send(event);
        }
    }

    /// Requests that are neither watches nor the question for the version.
    fn lists(&self) -> impl Iterator<Item = &String> {
        self.requests
            .iter()
            .filter(|request| !request.contains("watch=true") && !request.contains("/version"))
    }

    fn count(&self, part: &str) -> usize {
        self.requests.iter().filter(|request| request.contains(part)).count()
    }
}

struct Rig {
    server: Shared,
    address: std::net::SocketAddr,
    serving: TaskGroup,
    _watching: TaskGroup,
    facts_tx: channel::Sender<NodeFacts>,
    attachments_tx: channel::Sender<Attachments>,
    _introduced_tx: channel::Sender<Introduced>,
    observed_tx: channel::Sender<Observed>,
    watches: Watches,
    access: Arc<Access>,
}

fn serve(tasks: &mut TaskGroup, server: &Shared, listener: tokio::net::TcpListener) {
    let router = Router::new().fallback(axum::routing::get(answer).patch(patch)).with_state(server.clone());
    tasks.start("api", async move { axum::serve(listener, router).await.map_err(|error| error.to_string()) });
}

fn facts(mtu_bytes: u32) -> NodeFacts {
    let uplink = weft_model::node_facts::Uplink {
        name: "eth0".into(),
        index: 2,
        mtu_bytes,
        addresses: vec![],
        subnets: vec![],
    };
    NodeFacts {
        name: "n1".into(),
        uplinks: vec![uplink],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    }
}

fn config() -> ClusterConfig {
    ClusterConfig::default()
}

impl Rig {
    async fn start(initial: Option<Snapshot>, prepare: impl FnOnce(&mut Server)) -> Self {
        Self::start_with_token(initial, None, prepare).await
    }

    async fn start_with_token(
        initial: Option<Snapshot>,
        token_file: Option<std::path::PathBuf>,
        prepare: impl FnOnce(&mut Server),
    ) -> Self {
        let server = Shared::default();
        prepare(&mut server.lock().unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = TaskGroup::new();
        serve(&mut serving, &server, listener);
        let url = format!("http://{address}");
        let endpoint = crate::kube::Endpoint::Server { url, token_file, ca_file: None };
        let access = Arc::new(Access::open(endpoint).await.unwrap());
        let (facts_tx, facts_rx) = channel::channel(facts(1500));
        let (attachments_tx, attachments) = channel::channel(Attachments::default());
        let mut watching = TaskGroup::new();
        let (introduced_tx, introduced) = channel::channel(Introduced::default());
        let (observed_tx, observed) = channel::channel(Observed::default());
        let here = Here { facts: facts_rx, observed, attachments, introduced };
        let watches = start(&mut watching, &access, &config(), here, initial);
        Self {
            _introduced_tx: introduced_tx,
            observed_tx,
            server,
            address,
            serving,
            _watching: watching,
            facts_tx,
            attachments_tx,
            watches,
            access,
        }
    }

    /// Waits for a Snapshot of which `holds` is true.
    async fn until(&mut self, what: &str, holds: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let wait = self.watches.snapshots.wait_for(|s| s.as_ref().is_some_and(|snapshot| holds(snapshot)));
        let found = tokio::time::timeout(Duration::from_secs(20), wait).await;
        found.unwrap_or_else(|_| panic!("no Snapshot with {what}")).unwrap().clone().unwrap()
    }

    async fn until_asked(&self, what: &str, holds: impl Fn(&Server) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds(&self.server.lock().unwrap()) {
            assert!(Instant::now() < deadline, "the server was not asked for {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn watching(&self) {
        self.until_asked("every watch", |server| server.watchers.len() == Kind::ALL.len()).await;
    }

    /// The time in which something that must not happen would have happened.
    async fn settle(&self) {
        tokio::time::sleep(BURST * 30).await;
    }
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    })
}

fn has(snapshot: &Snapshot, name: &str) -> bool {
    snapshot.services.contains_key(&ServiceKey::new("default", name))
}

#[tokio::test]
async fn the_first_snapshot_comes_when_every_watch_has_listed() {
    let mut rig = Rig::start(None, |server| server.set("services", service("a", "10.96.0.1"))).await;
    let first = rig.until("anything", |_| true).await;
    assert_eq!(first.generation, Generation(1));
    assert!(has(&first, "a") && !first.from_store);
    let server = rig.server.lock().unwrap();
    let lists: Vec<&String> = server.lists().collect();
    assert_eq!(lists.len(), Kind::ALL.len());
    assert!(lists.iter().any(|list| list.starts_with("/apis/networking.k8s.io/v1/networkpolicies?")));
    let of_config_map = "/api/v1/namespaces/kube-system/configmaps?";
    assert!(
        lists
            .iter()
            .any(|list| list.starts_with(of_config_map) && list.contains("metadata.name%3Dcoredns-custom"))
    );
    assert!(lists.iter().any(|list| list.starts_with("/apis/discovery.k8s.io/v1/endpointslices?")));
}

#[tokio::test]
async fn an_attachment_is_in_the_next_snapshot_although_no_object_changed() {
    let mut rig = Rig::start(None, |_| ()).await;
    let first = rig.until("anything", |_| true).await;
    let pod = AttachedPod { pod: Some(NamespacedName::new("default", "web")), uid: "42".to_owned() };
    let attachments: Attachments = Arc::new([("10.244.1.2".parse().unwrap(), Arc::new(pod))].into());
    rig.attachments_tx.send_replace(attachments.clone());
    let second = rig.until("the attachment", |s| !s.attachments.is_empty()).await;
    assert_eq!((second.generation, &second.attachments), (first.generation.next(), &attachments));
}

#[tokio::test]
async fn objects_come_change_and_go_and_the_generation_grows() {
    let mut rig = Rig::start(None, |_| ()).await;
    rig.watching().await;
    let first = rig.until("anything", |_| true).await;
    rig.server.lock().unwrap().set("services", service("a", "10.96.0.1"));
    let second = rig.until("a", |s| has(s, "a")).await;
    assert_eq!(second.generation, first.generation.next());
    rig.server.lock().unwrap().delete("services", "a");
    let third = rig.until("no a", |s| !has(s, "a")).await;
    assert_eq!(third.generation, second.generation.next());
}

#[tokio::test]
async fn a_burst_becomes_few_snapshots_and_equal_events_none() {
    let mut rig = Rig::start(None, |_| ()).await;
    rig.watching().await;
    let first = rig.until("anything", |_| true).await;
    {
        let mut server = rig.server.lock().unwrap();
        (0..200).for_each(|i| server.set("services", service(&format!("s{i}"), &format!("10.96.1.{i}"))));
    }
    let all = rig.until("all 200", |s| s.services.len() == 200).await;
    assert!(all.generation.0 - first.generation.0 <= 20, "{} Snapshots for one burst", all.generation);
    rig.server.lock().unwrap().set("services", service("s7", "10.96.1.7"));
    rig.settle().await;
    assert_eq!(rig.watches.snapshots.borrow().as_ref().unwrap().generation, all.generation);
}

#[tokio::test]
async fn a_watch_that_expired_lists_anew_and_an_equal_list_publishes_nothing() {
    let mut rig = Rig::start(None, |server| server.set("services", service("a", "10.96.0.1"))).await;
    rig.watching().await;
    let first = rig.until("a", |s| has(s, "a")).await;
    let lists = rig.server.lock().unwrap().count("/services?");
    let gone = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": 410,
                      "reason": "Expired", "message": "too old resource version"});
    rig.server.lock().unwrap().tell("services", json!({"type": "ERROR", "object": gone}));
    rig.until_asked("Services again", |server| server.count("/services?") >= lists + 2).await;
    rig.settle().await;
    let now = rig.watches.snapshots.borrow().clone().unwrap();
    assert!(Arc::ptr_eq(&first, &now));
    assert_eq!(rig.watches.status.borrow().failure, None, "expiry is no failure");
}

#[tokio::test]
async fn a_watch_refused_with_410_lists_anew_and_finds_what_was_deleted_meanwhile() {
    let mut rig = Rig::start(None, |server| {
        server.set("services", service("a", "10.96.0.1"));
        server.set("services", service("b", "10.96.0.2"));
    })
    .await;
    rig.watching().await;
    let first = rig.until("a and b", |s| has(s, "a") && has(s, "b")).await;
    {
        let mut server = rig.server.lock().unwrap();
        server.refusals.push_back(StatusCode::GONE);
        server.watchers.remove("services");
        server.delete("services", "a");
    }
    let after = rig.until("no a", |s| !has(s, "a")).await;
    let key = ServiceKey::new("default", "b");
    assert!(Arc::ptr_eq(&first.services[&key], &after.services[&key]));
}

#[tokio::test]
async fn a_broken_watch_resumes_without_a_list() {
    let mut rig = Rig::start(None, |_| ()).await;
    rig.watching().await;
    rig.until("anything", |_| true).await;
    let before = rig.server.lock().unwrap().lists().count();
    rig.server.lock().unwrap().watchers.clear();
    rig.watching().await;
    rig.server.lock().unwrap().set("services", service("late", "10.96.0.1"));
    rig.until("late", |s| has(s, "late")).await;
    assert_eq!(rig.server.lock().unwrap().lists().count(), before);
}

#[tokio::test]
async fn garbage_in_a_list_and_in_a_watch_touches_only_itself() {
    let mut rig = Rig::start(None, |server| {
        server.set("services", json!({"metadata": {"name": "bad", "namespace": "default"}, "spec": ["?"]}));
        server.set("services", service("good", "10.96.0.1"));
        server.set("endpointslices", json!({"metadata": {"name": "worse", "labels": 5}}));
    })
    .await;
    rig.watching().await;
    let first = rig.until("anything", |_| true).await;
    assert!(has(&first, "good") && !has(&first, "bad"));
    let named: Vec<String> = first.problems.iter().map(|p| p.object.to_string()).collect();
    assert_eq!(named, ["EndpointSlice worse", "Service default/bad"]);
    rig.server.lock().unwrap().set("services", service("bad", "10.96.0.2"));
    let mended = rig.until("bad mended", |s| has(s, "bad")).await;
    assert_eq!(mended.problems.len(), 1);
    rig.server.lock().unwrap().tell("services", json!({"type": "MODIFIED", "object": 5}));
    rig.server.lock().unwrap().set("services", service("later", "10.96.0.3"));
    rig.until("what came after an event without an object", |s| has(s, "later")).await;
}

#[tokio::test]
async fn the_stored_snapshot_stands_until_every_watch_has_listed() {
    let mut donor = Rig::start(None, |server| server.set("services", service("old", "10.96.0.1"))).await;
    let stored = donor.until("old", |s| has(s, "old")).await;
    let mut rig = Rig::start(Some((*stored).clone()), |server| {
        server.set("services", service("old", "10.96.0.1"));
        server.set("services", service("new", "10.96.0.2"));
    })
    .await;
    let first = rig.until("the stored one", |_| true).await;
    if first.from_store {
        assert!(has(&first, "old") && !has(&first, "new"));
        assert!(first.generation > stored.generation);
    }
    let listed = rig.until("the listed one", |s| !s.from_store).await;
    assert!(has(&listed, "new"));
    let key = ServiceKey::new("default", "old");
    assert!(Arc::ptr_eq(&listed.services[&key], &stored.services[&key]));
}

#[tokio::test]
async fn without_an_api_server_the_stored_snapshot_stands_and_follows_the_facts() {
    let mut donor = Rig::start(None, |server| server.set("services", service("old", "10.96.0.1"))).await;
    let stored = donor.until("old", |s| has(s, "old")).await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let endpoint =
        crate::kube::Endpoint::Server { url: format!("http://{nobody}"), token_file: None, ca_file: None };
    let access = Arc::new(Access::open(endpoint).await.unwrap());
    let (facts_tx, facts_rx) = channel::channel(facts(1500));
    let mut tasks = TaskGroup::new();
    let (_attachments_tx, attachments) = channel::channel(Attachments::default());
    let (_introduced_tx, introduced) = channel::channel(Introduced::default());
    let (_observed_tx, observed) = channel::channel(Observed::default());
    let here = Here { facts: facts_rx, observed, attachments, introduced };
    let mut watches = start(&mut tasks, &access, &config(), here, Some((*stored).clone()));
    watches.snapshots.wait_for(Option::is_some).await.unwrap();
    facts_tx.send_replace(facts(9000));
    let jumbo = |s: &Option<Arc<Snapshot>>| s.as_ref().unwrap().facts.uplinks[0].mtu_bytes == 9000;
    let now = watches.snapshots.wait_for(jumbo).await.unwrap().clone().unwrap();
    assert!(now.from_store && has(&now, "old"));
    let failed = watches.status.wait_for(|status| status.failure.is_some()).await.unwrap().clone();
    assert!(!failed.connected);
}

#[tokio::test]
async fn what_the_node_finds_out_is_part_of_its_facts() {
    let mut rig = Rig::start(None, |_| {}).await;
    rig.until("facts", |s| s.facts.observed == Observed::default()).await;
    let names = [("edge.example".to_owned(), vec!["192.0.2.7".parse().unwrap()])].into();
    let found = Observed { names, narrow_paths: [("n2".into(), 1300)].into() };
    rig.observed_tx.send_replace(found.clone());
    rig.until("found", |s| s.facts.observed == found && s.facts.uplinks == facts(1500).uplinks).await;
}

#[tokio::test]
async fn losing_the_server_changes_nothing_but_the_status_and_it_is_found_again() {
    let mut rig = Rig::start(None, |server| server.set("services", service("a", "10.96.0.1"))).await;
    rig.watching().await;
    let before = rig.until("a", |s| has(s, "a")).await;
    rig.watches.status.wait_for(|status| status.connected).await.unwrap();
    rig.serving = TaskGroup::new();
    rig.server.lock().unwrap().watchers.clear();
    rig.watches.status.wait_for(|status| !status.connected).await.unwrap();
    let during = rig.watches.snapshots.borrow().clone().unwrap();
    assert!(Arc::ptr_eq(&before, &during));
    let listener = tokio::net::TcpListener::bind(rig.address).await.unwrap();
    serve(&mut rig.serving, &rig.server, listener);
    rig.server.lock().unwrap().set("services", service("b", "10.96.0.2"));
    rig.watching().await;
    rig.watches.status.wait_for(|status| status.connected).await.unwrap();
    assert_eq!(rig.watches.status.borrow().failure, None);
    rig.server.lock().unwrap().set("services", service("c", "10.96.0.3"));
    rig.until("c", |s| has(s, "c")).await;
    let _ = &rig.facts_tx;
}

#[tokio::test]
async fn the_identity_is_written_once_with_a_merge_patch_of_the_own_node_only() {
    use crate::kube::{Identity, Publisher, Publishing};
    use crate::reconcile::{Applier, Planner, Trust};
    let mut rig = Rig::start(None, |server| server.set("nodes", json!({"metadata": {"name": "n1"}}))).await;
    let snapshot = rig.until("the Node", |s| s.own_node().is_some()).await;
    let public_key = weft_model::WgPublicKey([7; 32]);
    let identity = Identity { public_key, next_public_key: None, wireguard_port: 51820 };
    let (said, answers_for) = tokio::sync::watch::channel(None);
    let identity = tokio::sync::watch::Sender::new(identity).subscribe();
    let mut identity = Publishing { identity, answers_for };
    let due = identity.plan(&snapshot).plan;
    let applied = Publisher::new(rig.access.clone()).apply(&due, Trust::Nothing).await;
    assert_eq!((applied.changed.len(), applied.failed), (1, vec![]));
    let annotations = json!({
        "weft.network/public-key": public_key.to_string(), "weft.network/wireguard-port": "51820",
        "weft.network/links": snapshot.facts.link_subnets().to_string(),
    });
    let written = rig.server.lock().unwrap().patches.clone();
    let mut with_null = annotations.clone();
    with_null["weft.network/next-public-key"] = json!(null);
    with_null["weft.network/answers-for"] = json!(null);
    let expected = json!({"metadata": {"annotations": with_null}});
    assert_eq!(written, [("/api/v1/nodes/n1".to_owned(), expected)]);
    let node = json!({"metadata": {"name": "n1", "annotations": annotations}});
    rig.watching().await;
    rig.server.lock().unwrap().set("nodes", node);
    let after = rig.until("the key", |s| s.own_node().is_some_and(|n| n.public_key.is_some())).await;
    assert_eq!(identity.plan(&after).plan, None);
    let answers_for = "192.0.2.1 192.0.2.2=02:00:00:00:00:07".parse::<weft_model::balancer::AnswersFor>();
    said.send_replace(answers_for.ok());
    let due = identity.plan(&after).plan;
    Publisher::new(rig.access.clone()).apply(&due, Trust::Nothing).await;
    let written = rig.server.lock().unwrap().patches.last().unwrap().1.clone();
    let text = &written["metadata"]["annotations"]["weft.network/answers-for"];
    assert_eq!(text, "192.0.2.1 192.0.2.2=02:00:00:00:00:07");
}

impl Rig {
    async fn until_status(&mut self, what: &str, holds: impl Fn(&ApiStatus) -> bool) -> ApiStatus {
        let wait = self.watches.status.wait_for(|status| holds(status));
        let found = tokio::time::timeout(Duration::from_secs(20), wait).await;
        found.unwrap_or_else(|_| panic!("no status with {what}")).unwrap().clone()
    }
}

#[tokio::test]
async fn a_token_that_is_not_accepted_is_named_and_a_new_one_is_taken_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, "expired").unwrap();
    let prepare = |server: &mut Server| {
        server.token = Some("good");
        server.set("services", service("a", "10.96.0.1"));
    };
    let mut rig = Rig::start_with_token(None, Some(token_file.clone()), prepare).await;
    let refused = rig.until_status("a refusal", |status| status.failure.is_some()).await;
    let expected = format!(
        "API server http://{}: it does not accept the token of --token-file {} (Unauthorized); it expired or is of another \
         cluster: the DaemonSet rotates that file, without it put a new token there; it is taken at once",
        rig.address,
        token_file.display()
    );
    assert_eq!(refused.refusal(), Some(expected));
    assert_eq!(*rig.watches.snapshots.borrow(), None);
    // As `kubectl create token` writes it.
    std::fs::write(&token_file, "good\n").unwrap();
    let replaced_at = Instant::now();
    rig.until_status("a connection", |status| status.connected).await;
    assert!(replaced_at.elapsed() < Duration::from_secs(5), "{:?}", replaced_at.elapsed());
    rig.until("a", |s| has(s, "a")).await;
}

#[tokio::test]
async fn a_token_that_expires_later_keeps_the_snapshot_and_a_new_one_mends_the_watches() {
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, "first").unwrap();
    let mut rig =
        Rig::start_with_token(None, Some(token_file.clone()), |server| server.token = Some("first")).await;
    rig.watching().await;
    let before = rig.until("anything", |_| true).await;
    {
        let mut server = rig.server.lock().unwrap();
        server.token = Some("second");
        server.watchers.clear();
    }
    let lost = rig.until_status("the loss", |status| status.failure.is_some()).await;
    assert_eq!(lost.failure, Some(ApiFailure::Unauthenticated("Unauthorized".to_owned())));
    assert!(Arc::ptr_eq(&before, &rig.watches.snapshots.borrow().clone().unwrap()));
    std::fs::write(&token_file, "second").unwrap();
    rig.until_status("a connection", |status| status.connected).await;
    rig.watching().await;
    rig.server.lock().unwrap().set("services", service("later", "10.96.0.3"));
    rig.until("later", |s| has(s, "later")).await;
}

#[tokio::test]
async fn a_right_that_is_missing_is_named_and_its_grant_is_noticed() {
    let mut rig = Rig::start(None, |server| server.forbidden = Some("services")).await;
    let refused = rig.until_status("a refusal", |status| status.failure.is_some()).await;
    let expected = format!(
        "API server http://{}: services is forbidden: User \"system:serviceaccount:default:other\" cannot list resource \
         \"services\" in API group \"\" at the cluster scope; grant it with 'weft manifests | kubectl apply -f -'",
        rig.address
    );
    assert_eq!(refused.refusal(), Some(expected));
    rig.server.lock().unwrap().forbidden = None;
    let mended = rig.until_status("a connection", |status| status.connected).await;
    assert_eq!(mended.failure, None);
}

#[tokio::test]
async fn the_version_is_asked_when_the_connection_comes_to_be_and_again_when_it_is_back() {
    let mut rig = Rig::start(None, |server| server.minor = Some("29")).await;
    let old = rig.until_status("a version", |status| status.version.is_some()).await;
    let refusal = old.version.unwrap().refusal(&old.server);
    let expected = format!(
        "API server http://{} is of Kubernetes v1.29.0, Weft needs 1.30 or newer: upgrade the control plane",
        rig.address
    );
    assert_eq!(refusal, Some(expected));
    rig.watching().await;
    rig.serving = TaskGroup::new();
    rig.server.lock().unwrap().watchers.clear();
    rig.until_status("the loss", |status| !status.connected).await;
    rig.server.lock().unwrap().minor = Some("30");
    let listener = tokio::net::TcpListener::bind(rig.address).await.unwrap();
    serve(&mut rig.serving, &rig.server, listener);
    let new = ServerVersion::Supported("v1.30.0".to_owned());
    rig.until_status("the new version", |status| status.version.as_ref() == Some(&new)).await;
}

#[tokio::test]
async fn a_version_that_cannot_be_read_is_no_error() {
    let mut rig = Rig::start(None, |server| server.minor = Some("?")).await;
    let status = rig.until_status("a version", |status| status.version.is_some()).await;
    assert!(status.connected && status.failure.is_none());
    assert_eq!(status.version.unwrap().refusal(&status.server), None);
}
