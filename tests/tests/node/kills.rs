//! `kill -9` of the plugin, the agent and the tunnel at random instants, under a runtime that does as containerd does:
//! nothing of a pod outlives its DEL, and a pod that runs keeps all it has.
//!
//! `scripts/kills` does it for long. Which rounds there are follows from the seed; what a kill hits does not.

mod runtime;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;
use weft_netstack::kernel::conntrack::udp_flows;
use weft_tests::node::picture::Picture;
use weft_tests::node::{Node, holds_within, inside, ip, run, until, write};

use runtime::{Runtime, World};

/// Rounds of ADD and DEL between two looks at what is left.
const PHASE: u64 = 100;
const WORKERS: u64 = 12;
/// For a few calls of the plugin; a look at what is left comes sooner than the drift check, which comes once a minute.
const PATIENCE: Duration = Duration::from_secs(15);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn nothing_of_a_pod_is_left_whatever_is_killed_when() {
    inside(|| {
        let rounds = number("WEFT_KILL_ROUNDS").unwrap_or(200);
        let seed = number("WEFT_KILL_SEED").unwrap_or_else(rand::random);
        println!("WEFT_KILL_SEED={seed}");
        let mut node = Node::new();
        // A flow that is forgotten stays to be seen.
        write(Path::new("/proc/sys/net/netfilter/nf_conntrack_udp_timeout"), "3600");
        node.start_server_with_large_nodes();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        // The device is another one to the kernel once a tunnel has left it.
        node.end_tunnel(Signal::SIGKILL);
        node.start_tunnel();
        until("the tunnel", || ip("link show dev weft0").contains("state UP"));
        node.await_ready();
        let world = World::new(node.plugin());
        let before = Left::of(&node);
        assert_eq!(before.addresses, 0);
        let mut random = StdRng::seed_from_u64(seed);
        let started = Instant::now();
        for phase in 0..rounds.div_ceil(PHASE) {
            world.begin(phase * PHASE, PHASE.min(rounds - phase * PHASE));
            attach_and_kill(&mut node, &world, &mut random);
            node.await_ready();
            holds_within(PATIENCE, || before.differences(&Left::of(&node)).is_empty());
            let left = before.differences(&Left::of(&node));
            assert_eq!(left, [""; 0], "left after round {}", (phase + 1) * PHASE);
            println!("{} in {:.0?}, store {} bytes", world.figures(), started.elapsed(), store(&node));
        }
        world.assert_that_all_happened();
    });
}

fn attach_and_kill(node: &mut Node, world: &World, random: &mut StdRng) {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let mut runtime = Runtime::new(worker, world, random.random());
                scope.spawn(move || runtime.run())
            })
            .collect();
        let at_work = || workers.iter().any(|worker| !worker.is_finished());
        while at_work() {
            if random.random_bool(0.8) {
                // In the middle of something, after it has attached some.
                let attached = world.attached.load(Relaxed) + random.random_range(0..=WORKERS);
                holds_within(PATIENCE, || world.attached.load(Relaxed) >= attached || !at_work());
                let begun = world.begun.load(Relaxed);
                holds_within(PATIENCE, || world.begun.load(Relaxed) > begun || !at_work());
                std::thread::sleep(Duration::from_millis(random.random_range(0..30)));
            } else {
                // Perhaps it only begins.
                std::thread::sleep(Duration::from_millis(random.random_range(0..600)));
            }
            if random.random_bool(0.2) {
                node.end_tunnel(Signal::SIGKILL);
                node.start_tunnel();
                world.killed_tunnels.fetch_add(1, Relaxed);
            } else {
                node.end_agent(Signal::SIGKILL);
                std::thread::sleep(Duration::from_millis(random.random_range(0..200)));
                node.start_agent();
                world.killed_agents.fetch_add(1, Relaxed);
            }
        }
        for worker in workers {
            worker.join().expect("a worker found nothing wrong");
        }
    });
}

/// What a pod could leave behind.
struct Left {
    /// Links, addresses, routes, rules, nft objects with their elements, queueing disciplines, sysctls.
    kernel: Picture,
    /// That are leased, of all families.
    addresses: u64,
    /// To or from a pod's address.
    flows: BTreeSet<String>,
    /// Names of files.
    files: BTreeSet<String>,
}

impl Left {
    fn of(node: &Node) -> Self {
        let mut ipam = node.weft("ipam");
        let account = run(ipam.args(["show", "-o", "json", "--run-dir"]).arg(node.path("run")));
        let account: Value = serde_json::from_str(&account).expect("an account is JSON");
        let used =
            account["ranges"].as_array().into_iter().flatten().filter_map(|range| range["used"].as_u64());
        let flows = udp_flows().expect("flows can be listed");
        let of_pod = |address: std::net::SocketAddr| {
            let text = address.ip().to_string();
            text.starts_with("10.244.") || text.starts_with("fd00:10:244:")
        };
        Self {
            kernel: Picture::take(&[]),
            addresses: used.sum(),
            flows: flows
                .iter()
                .filter(|flow| of_pod(flow.reply.source) || of_pod(flow.original.source))
                .map(|flow| format!("{flow:?}"))
                .collect(),
            files: ["run", "cni", "bin", "state"].iter().flat_map(|name| files(&node.path(name))).collect(),
        }
    }

    fn differences(&self, later: &Self) -> Vec<String> {
        let mut found = self.kernel.differences(&later.kernel);
        if self.addresses != later.addresses {
            found.push(format!("{} addresses are leased, not {}", later.addresses, self.addresses));
        }
        found.extend(later.flows.difference(&self.flows).cloned());
        found.extend(later.files.symmetric_difference(&self.files).map(|file| format!("file {file}")));
        found
    }
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

/// Bytes of the leases.
fn store(node: &Node) -> u64 {
    let entries = std::fs::read_dir(node.path("run/leases")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}
