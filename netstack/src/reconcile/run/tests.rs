//! Time is paused: these tests take no real time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use weft_model::config::ClusterConfig;
use weft_model::node_facts::{NodeFacts, WireguardBackend};
use weft_model::snapshot::AttachedPod;
use weft_model::{Generation, Health, NodeName, Planned, Snapshot};

use super::super::{Applied, Applier, Planner, Trust, Watchfulness, vigil};
use super::{Loop, LoopHandle, Pace};

struct GenerationPlanner;

impl Planner for GenerationPlanner {
    type Plan = u64;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<u64> {
        Planned::new(snapshot.generation.0, Vec::new())
    }
}

/// Remembers every pass; fails while `failing`.
#[derive(Clone, Default)]
struct Recorder {
    passes: Arc<Mutex<Vec<(u64, Trust)>>>,
    failing: Arc<Mutex<bool>>,
}

impl Applier for Recorder {
    type Plan = u64;

    async fn apply(&mut self, plan: &u64, trust: Trust) -> Applied {
        self.passes.lock().unwrap().push((*plan, trust));
        let failed = if *self.failing.lock().unwrap() { vec!["no".to_owned()] } else { Vec::new() };
        Applied { failed, ..Applied::default() }
    }
}

fn snapshot(generation: u64) -> Option<Arc<Snapshot>> {
    Some(Arc::new(Snapshot {
        generation: Generation(generation),
        config: Arc::new(ClusterConfig::default()),
        facts: Arc::new(NodeFacts {
            name: NodeName::from("a"),
            uplinks: Vec::new(),
            wireguard_backend: WireguardBackend::Kernel,
            foreign_routes: vec![],
            loopback: Default::default(),
            observed: Default::default(),
        }),
        nodes: Arc::default(),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::default(),
        endpoint_slices: Arc::default(),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }))
}

type Running = tokio::task::JoinHandle<Result<(), String>>;

fn start(
    first: Option<Arc<Snapshot>>,
) -> (watch::Sender<Option<Arc<Snapshot>>>, Recorder, LoopHandle, Running) {
    let (tx, rx) = watch::channel(first);
    let recorder = Recorder::default();
    let (run, handle) = Loop::new("test", GenerationPlanner, recorder.clone(), Pace::default(), rx);
    (tx, recorder, handle, tokio::spawn(run.run()))
}

async fn settle() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_happens_before_the_first_snapshot() {
    let (tx, recorder, handle, _task) = start(None);
    settle().await;
    assert!(recorder.passes.lock().unwrap().is_empty());
    assert_eq!(handle.report().health(), Health::Starting);
    tx.send(snapshot(1)).unwrap();
    settle().await;
    assert_eq!(*recorder.passes.lock().unwrap(), [(1, Trust::Nothing)]);
    assert_eq!(handle.report().health(), Health::Ok);
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_changes_becomes_one_pass_with_the_latest() {
    let (tx, recorder, _handle, _task) = start(snapshot(1));
    settle().await;
    for generation in 2..=9 {
        tx.send(snapshot(generation)).unwrap();
    }
    settle().await;
    assert_eq!(*recorder.passes.lock().unwrap(), [(1, Trust::Nothing), (9, Trust::Shadow)]);
}

/// As [`GenerationPlanner`], but pods of the node do not matter.
struct Indifferent;

impl Planner for Indifferent {
    type Plan = u64;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<u64> {
        GenerationPlanner.plan(snapshot)
    }
}

fn with_pod(generation: u64, address: &str) -> Option<Arc<Snapshot>> {
    let attached = (address.parse().unwrap(), Arc::new(AttachedPod { pod: None, uid: String::new() }));
    let plain = Arc::unwrap_or_clone(snapshot(generation).unwrap());
    Some(Arc::new(Snapshot { attachments: Arc::new([attached].into()), ..plain }))
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_does_not_follow_pods_is_spared_their_coming_and_going_and_nothing_else() {
    let (tx, rx) = watch::channel(snapshot(1));
    let recorder = Recorder::default();
    let (run, handle) = Loop::new("test", Indifferent, recorder.clone(), Pace::default(), rx);
    tokio::spawn(run.run());
    settle().await;
    for (generation, address) in [(2, "10.42.0.5"), (3, "fd00:42::5")] {
        tx.send(with_pod(generation, address)).unwrap();
        settle().await;
        assert_eq!(handle.report().generation, Generation(generation), "what was applied holds for it too");
    }
    assert_eq!(*recorder.passes.lock().unwrap(), [(1, Trust::Nothing)]);
    let changed = Arc::unwrap_or_clone(with_pod(4, "10.42.0.6").unwrap());
    tx.send(Some(Arc::new(Snapshot { from_store: true, ..changed }))).unwrap();
    settle().await;
    assert_eq!(recorder.passes.lock().unwrap().last(), Some(&(4, Trust::Shadow)));
    tx.send(with_pod(5, "10.42.0.7")).unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;
    let passes = recorder.passes.lock().unwrap().clone();
    assert_eq!(passes[2..], [(5, Trust::Shadow), (5, Trust::Nothing)], "the drift check comes as ever");
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_retried_with_growing_gaps_and_heals() {
    let (_tx, recorder, handle, _task) = start(snapshot(1));
    *recorder.failing.lock().unwrap() = true;
    tokio::time::sleep(Duration::from_millis(750)).await;
    // Passes at 0, 100, 300 and 700 ms.
    assert_eq!(recorder.passes.lock().unwrap().len(), 4);
    assert_eq!(handle.report().health(), Health::Failing);
    *recorder.failing.lock().unwrap() = false;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(handle.report().health(), Health::Ok);
    assert_eq!(recorder.passes.lock().unwrap().last(), Some(&(1, Trust::Nothing)));
}

#[tokio::test(start_paused = true)]
async fn drift_is_checked_without_any_change() {
    let (_tx, recorder, _handle, _task) = start(snapshot(1));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(*recorder.passes.lock().unwrap(), [(1, Trust::Nothing), (1, Trust::Nothing)]);
}

#[tokio::test(start_paused = true)]
async fn a_nudge_observes_the_outside_anew() {
    let (_tx, recorder, handle, _task) = start(snapshot(1));
    settle().await;
    handle.nudge();
    settle().await;
    assert_eq!(*recorder.passes.lock().unwrap(), [(1, Trust::Nothing), (1, Trust::Nothing)]);
}

#[tokio::test(start_paused = true)]
async fn the_loop_ends_when_no_snapshot_can_come() {
    let (tx, _recorder, _handle, task) = start(snapshot(1));
    settle().await;
    drop(tx);
    assert_eq!(task.await.unwrap(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_change_of_others_wakes_the_loop_within_a_second_and_a_restless_neighbour_every_ten() {
    let (_tx, recorder, handle, _task) = start(snapshot(1));
    settle().await;
    let answers = Arc::new(Mutex::new(vec![true]));
    let asked = answers.clone();
    let ask = move || Ok::<_, std::io::Error>(asked.lock().unwrap().pop().unwrap_or(false));
    let watch = tokio::spawn(vigil(Watchfulness::default(), ask, vec![handle]));
    let passes = || recorder.passes.lock().unwrap().len();
    let before = passes();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(passes(), before + 1);
    assert_eq!(recorder.passes.lock().unwrap().last(), Some(&(1, Trust::Nothing)));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(passes(), before + 1, "nobody changed anything");
    answers.lock().unwrap().extend([true; 1000]);
    // Ten times after 0.5 s, then after 1, 2, 4 and 8 s, then every 10 s.
    tokio::time::sleep(Duration::from_secs(5 + 15 + 20 + 1)).await;
    assert_eq!(passes(), before + 1 + 10 + 4 + 2);
    watch.abort();
}
