//! A container runtime of several threads. A sandbox whose ADD fails is taken down (DEL until that succeeds) and made anew
//! with another name, as the kubelet and containerd do; one that ran is taken down in one of three ways.

use std::collections::BTreeMap;
use std::fmt;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use weft_netstack::cni::ipam::QUARANTINE_SECONDS;
use weft_tests::node::{Cni, Plugin, UPLINK_ADDRESSES, addresses, ip, netns};

/// The longest that one pod's coming or going takes while agents are killed, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// The plugin asks to be called again.
const TRY_AGAIN: u64 = 11;

/// What the workers share, and what happened so far.
pub(super) struct World {
    plugin: Plugin,
    next_round: AtomicU64,
    last_round: AtomicU64,
    /// Calls of the plugin that have begun, so that kills can hit them.
    pub(super) begun: AtomicU64,
    pub(super) attached: AtomicU64,
    refused: AtomicU64,
    killed_plugins: AtomicU64,
    pub(super) killed_agents: AtomicU64,
    pub(super) killed_tunnels: AtomicU64,
    collected: AtomicU64,
    with_host_port: AtomicU64,
    with_bandwidth: AtomicU64,
    /// A worker found something wrong: the others stop, so that the logs end there.
    failed: AtomicBool,
    /// GC names all that run, so no pod may come or go meanwhile.
    names: RwLock<()>,
    /// Whose an address is, and when it was given back.
    holders: Mutex<BTreeMap<String, Holder>>,
}

enum Holder {
    Pod(String),
    Nobody { since: Instant },
}

impl World {
    pub(super) fn new(plugin: Plugin) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            plugin,
            next_round: zero(),
            last_round: zero(),
            begun: zero(),
            attached: zero(),
            refused: zero(),
            killed_plugins: zero(),
            killed_agents: zero(),
            killed_tunnels: zero(),
            collected: zero(),
            with_host_port: zero(),
            with_bandwidth: zero(),
            failed: AtomicBool::new(false),
            names: RwLock::default(),
            holders: Mutex::default(),
        }
    }

    pub(super) fn begin(&self, first: u64, rounds: u64) {
        self.next_round.store(first, Relaxed);
        self.last_round.store(first + rounds, Relaxed);
    }

    fn counts(&self) -> [(&'static str, &AtomicU64); 8] {
        [
            ("pods attached", &self.attached),
            ("ADDs failed or killed", &self.refused),
            ("plugins killed", &self.killed_plugins),
            ("agents killed", &self.killed_agents),
            ("tunnels killed", &self.killed_tunnels),
            ("GCs", &self.collected),
            ("with hostPort", &self.with_host_port),
            ("with bandwidth", &self.with_bandwidth),
        ]
    }

    pub(super) fn figures(&self) -> impl fmt::Display {
        self.counts().map(|(name, count)| format!("{} {name}", count.load(Relaxed))).join(", ")
    }

    /// A run in which nothing was killed would show nothing.
    pub(super) fn assert_that_all_happened(&self) {
        for (name, count) in self.counts() {
            assert!(count.load(Relaxed) > 0, "no {name}");
        }
    }

    fn hold(&self, pod: &Pod) {
        let mut holders = self.holders.lock().expect("no worker found something wrong");
        for address in &pod.addresses {
            match holders.insert(address.clone(), Holder::Pod(pod.name.clone())) {
                None => {}
                Some(Holder::Pod(other)) => panic!("{address} is given to {} and {other}", pod.name),
                Some(Holder::Nobody { since }) => {
                    // The node counts whole seconds.
                    let rested = since.elapsed() + Duration::from_secs(2);
                    assert!(rested.as_secs() >= QUARANTINE_SECONDS, "{address} rested for {rested:?} only");
                }
            }
        }
    }

    fn let_go(&self, pod: &Pod) {
        let mut holders = self.holders.lock().expect("no worker found something wrong");
        let nobody = || Holder::Nobody { since: Instant::now() };
        holders.extend(pod.addresses.iter().map(|address| (address.clone(), nobody())));
    }

    /// As `cni.dev/valid-attachments`.
    fn running(&self) -> Value {
        let holders = self.holders.lock().expect("no worker found something wrong");
        let pods = holders.values().filter_map(|holder| match holder {
            Holder::Pod(pod) => Some(json!({"containerID": pod, "ifname": "eth0"})),
            Holder::Nobody { .. } => None,
        });
        pods.collect()
    }
}

/// A sandbox: its namespace and what its ADD was told.
struct Pod {
    name: String,
    asked: Value,
    /// IPv4 first; none before it was attached.
    addresses: Vec<String>,
    printed: Value,
}

/// Of a worker, while it lives.
struct Told<'a>(&'a World);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, Relaxed);
        }
    }
}

pub(super) struct Runtime<'a> {
    worker: u64,
    world: &'a World,
    random: StdRng,
    sandboxes: u64,
}

impl<'a> Runtime<'a> {
    pub(super) fn new(worker: u64, world: &'a World, seed: u64) -> Self {
        Self { worker, world, random: StdRng::seed_from_u64(seed), sandboxes: 0 }
    }

    pub(super) fn run(&mut self) {
        let _told = Told(self.world);
        while !self.world.failed.load(Relaxed) {
            let round = self.world.next_round.fetch_add(1, Relaxed);
            if round >= self.world.last_round.load(Relaxed) {
                return;
            }
            self.round(round);
        }
    }

    fn round(&mut self, round: u64) {
        let asked = self.wishes();
        let deadline = Instant::now() + PATIENCE;
        let pod = loop {
            assert!(Instant::now() < deadline, "no pod in round {round}");
            if let Some(pod) = self.attach(round, &asked) {
                break pod;
            }
        };
        self.world.attached.fetch_add(1, Relaxed);
        self.use_it(&pod);
        self.take_down(&pod);
    }

    /// `runtimeConfig` of the round. A worker has one port for all its pods: one that is not given back is refused.
    fn wishes(&mut self) -> Value {
        let mut asked = json!({});
        if self.random.random_bool(0.5) {
            let port = 20_000 + self.worker;
            let mapping = |protocol| json!({"hostPort": port, "containerPort": 8080, "protocol": protocol});
            asked["portMappings"] = json!([mapping("udp"), mapping("tcp")]);
            self.world.with_host_port.fetch_add(1, Relaxed);
        }
        if self.random.random_bool(0.4) {
            asked["bandwidth"] = json!({"ingressRate": 100_000_000, "egressRate": 50_000_000});
            self.world.with_bandwidth.fetch_add(1, Relaxed);
        }
        asked
    }

    /// One sandbox; gone again when it cannot be attached.
    fn attach(&mut self, round: u64, asked: &Value) -> Option<Pod> {
        self.sandboxes += 1;
        let name = format!("r{round}-w{}-{}", self.worker, self.sandboxes);
        ip(&format!("netns add {name}"));
        let mut pod = Pod { name, asked: asked.clone(), addresses: Vec::new(), printed: Value::Null };
        let names = self.world.names.read().expect("no worker found something wrong");
        let added = self.call("ADD", &pod, &netns(&pod.name), &json!({}));
        if let Some(Cni { failed: false, printed }) = added {
            pod.addresses = addresses(&printed);
            pod.printed = printed;
            assert_eq!(pod.addresses.len(), 2, "{}", pod.printed);
            self.world.hold(&pod);
            return Some(pod);
        }
        drop(names);
        self.world.refused.fetch_add(1, Relaxed);
        self.delete(&pod, &netns(&pod.name));
        ip(&format!("netns del {}", pod.name));
        None
    }

    /// The pod lives for a while, is called at its port, and is whole.
    fn use_it(&mut self, pod: &Pod) {
        if pod.asked["portMappings"].is_array() {
            for (local, node) in ["0.0.0.0:0", "[::]:0"].iter().zip(UPLINK_ADDRESSES) {
                let socket = UdpSocket::bind(local).expect("make a UDP socket");
                let port = 20_000 + u16::try_from(self.worker).expect("few workers");
                // Nobody listens in the pod; the flow remains.
                socket.send_to(b"x", (node, port)).expect("send a datagram");
            }
        }
        std::thread::sleep(Duration::from_millis(self.random.random_range(0..60)));
        if self.random.random_bool(0.25) {
            let previous = json!({"prevResult": pod.printed});
            self.until_done("CHECK", pod, &netns(&pod.name), &previous);
        }
    }

    /// As a runtime ends a pod, or after the loss of its namespace, or not at all until GC.
    fn take_down(&mut self, pod: &Pod) {
        let way = self.random.random_range(0..10);
        let names = self.world.names.read().expect("no worker found something wrong");
        self.world.let_go(pod);
        drop(names);
        if way < 6 {
            self.delete(pod, &netns(&pod.name));
            ip(&format!("netns del {}", pod.name));
            return;
        }
        ip(&format!("netns del {}", pod.name));
        if way < 9 {
            self.delete(pod, "");
        } else {
            let _alone = self.world.names.write().expect("no worker found something wrong");
            let valid = json!({"cni.dev/valid-attachments": self.world.running()});
            self.until_done("GC", pod, "", &valid);
            self.world.collected.fetch_add(1, Relaxed);
        }
    }

    fn delete(&mut self, pod: &Pod, netns: &str) {
        let previous = if pod.printed.is_null() { json!({}) } else { json!({"prevResult": pod.printed}) };
        self.until_done("DEL", pod, netns, &previous);
    }

    fn until_done(&mut self, verb: &str, pod: &Pod, netns: &str, more: &Value) {
        let deadline = Instant::now() + PATIENCE;
        while self.call(verb, pod, netns, more).is_none_or(|cni| cni.failed) {
            assert!(!self.world.failed.load(Relaxed), "another worker found something wrong");
            assert!(Instant::now() < deadline, "{verb} of {} is not done", pod.name);
            std::thread::sleep(Duration::from_millis(self.random.random_range(5..50)));
        }
    }

    /// `None` for a plugin that was killed. A refusal must be one that another try may overcome.
    fn call(&mut self, verb: &str, pod: &Pod, netns: &str, more: &Value) -> Option<Cni> {
        let plugin = &self.world.plugin;
        let mut config = plugin.config("1.1.0");
        config["runtimeConfig"] = pod.asked.clone();
        config.as_object_mut()?.extend(more.as_object()?.clone());
        let mut command = plugin.command(verb, &pod.name, &format!("u-{}", pod.name), netns);
        let kill_after = Duration::from_millis(self.random.random_range(0..40));
        let killed = self.random.random_bool(0.25);
        self.world.begun.fetch_add(1, Relaxed);
        let called = match killed {
            true => plugin.call_for(kill_after, &mut command, &config),
            false => Some(plugin.call(&mut command, &config)),
        };
        match &called {
            None => _ = self.world.killed_plugins.fetch_add(1, Relaxed),
            Some(cni) if cni.failed => {
                assert_eq!(cni.printed["code"], TRY_AGAIN, "{verb} of {}: {:#}", pod.name, cni.printed);
            }
            Some(_) => {}
        }
        called
    }
}
