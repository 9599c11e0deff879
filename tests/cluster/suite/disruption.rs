//! What goes wrong on every cluster, under load: processes killed, runtimes restarted, the API server away, a node without
//! power. Not one request may fail on a connection that stands, nor on a new one through a Service.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::RngExt as _;

use crate::cluster::{Cluster, NODES, PATIENCE, in_url};
use crate::load::Load;
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[
    case(
        "an agent killed again and again: a look-up waits for its resolver to ask again, none fails",
        look_ups,
    ),
    case(
        "agents killed 100 times at random: no request fails, on established and on new connections",
        agents_killed,
    ),
    case("the first packets of new pods arrive, while agents are killed", first_packets),
    case("tunnels killed: established connections go on", tunnels_killed),
    case("tunnels restarted in order: not one packet is lost, no session is made anew", tunnels_restarted),
    case("keys of all nodes rotated at once: not one packet is lost", keys_rotated),
    case("a kubelet restart is not noticed", kubelet_restarted),
    case("a restart of the container runtime is not noticed", runtime_restarted),
    case("the API server away: connections, new connections and DNS go on", api_server_away),
    case("a node reboots: its pods are back and reachable, the others notice nothing", node_reboots),
    case(
        "a node reboots without API server: overlay, Services and DNS are back from disk",
        reboot_without_api_server,
    ),
];

/// Two clients on other nodes than the server: connections that stand, and new ones by address.
fn loads(cluster: &Cluster) -> anyhow::Result<Vec<Load<'_>>> {
    Ok(vec![
        Load::on_established_connections(cluster, "node1", "steady")?,
        Load::on_established_connections(cluster, "node3", "steady")?,
        Load::on_new_connections_by_address(cluster, "node1", "steady")?,
    ])
}

fn unharmed(loads: &[Load<'_>], when: &str) -> anyhow::Result<()> {
    loads.iter().try_for_each(|load| load.unharmed(when))
}

pub(crate) fn agents_ready(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES {
        cluster.within(Duration::from_secs(60), "the agent is ready", || {
            let status = cluster.status(node)?;
            ensure!(status["ready"] == true, "{node}: {status}");
            Ok(())
        })?;
    }
    Ok(())
}

fn pid(cluster: &Cluster, node: &str, unit: &str) -> anyhow::Result<String> {
    cluster.on(node, &format!("cat /run/node/units/{unit}.service.pid"))
}

/// SIGKILL to a unit's process; true when there was one.
pub(crate) fn kill(cluster: &Cluster, node: &str, unit: &str) -> anyhow::Result<bool> {
    Ok(cluster
        .on(node, &format!("kill -KILL $(cat /run/node/units/{unit}.service.pid) && echo killed || true"))?
        .contains("killed"))
}

fn agents_killed(cluster: &Cluster) -> anyhow::Result<()> {
    const KILLS: u32 = 100;
    let loads = loads(cluster)?;
    let mut random = rand::rng();
    let mut killed = 0;
    for _ in 0..KILLS * 10 {
        let node = NODES[random.random_range(0..NODES.len())];
        killed += u32::from(kill(cluster, node, "weft-agent").unwrap_or(false));
        if killed == KILLS {
            break;
        }
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
    }
    ensure!(killed == KILLS, "only {killed} agents could be killed");
    unharmed(&loads, "after 100 kills")?;
    agents_ready(cluster)
}

/// Kills come further apart than a resolver's second try (glibc: 5 s): the first may meet the gap, the second does not.
fn look_ups(cluster: &Cluster) -> anyhow::Result<()> {
    let load = Load::on_new_connections(cluster, "node3", "steady")?;
    for _ in 0..6 {
        ensure!(kill(cluster, "node3", "weft-agent")?, "no agent runs on node3");
        std::thread::sleep(Duration::from_secs(8));
    }
    load.unharmed("after six kills")
}

fn first_packets(cluster: &Cluster) -> anyhow::Result<()> {
    let job = |count: u32| {
        format!(
            "
apiVersion: batch/v1
kind: Job
metadata: {{name: first-packets, namespace: suite}}
spec:
  completions: {count}
  parallelism: 8
  backoffLimit: 0
  template:
    metadata: {{labels: {{app: first-packets}}}}
    spec:
      restartPolicy: Never
      containers:
      - name: first
        image: weft.network/test:1
        command: [bash, -c, 'curl -sS -m 12 http://echo/hostname && curl -sS -m 12 -6 http://echo/hostname']
"
        )
    };
    cluster.apply(&job(24))?;
    let done = cluster.within(Duration::from_secs(180), "every pod succeeded", || {
        for node in NODES {
            let _ = kill(cluster, node, "weft-agent");
        }
        std::thread::sleep(Duration::from_secs(3));
        let job = cluster.object(&["job", "first-packets"])?;
        ensure!(job["status"]["succeeded"] == 24, "{}", job["status"]);
        Ok(())
    });
    let job_status = cluster.object(&["job", "first-packets"])?["status"].clone();
    let said = cluster.kubectl(&["logs", "-l", "app=first-packets", "--tail=3", "--prefix"])?;
    cluster.delete(&job(24))?;
    done.with_context(|| format!("{job_status}; pods said: {said}"))?;
    ensure!(job_status["failed"].as_i64().unwrap_or(0) == 0, "{job_status}; {said}");
    agents_ready(cluster)
}

fn tunnels_killed(cluster: &Cluster) -> anyhow::Result<()> {
    let loads = loads(cluster)?;
    for node in NODES.repeat(3) {
        let before = pid(cluster, node, "weft-tunnel")?;
        ensure!(kill(cluster, node, "weft-tunnel")?, "no tunnel runs on {node}");
        cluster.within(Duration::from_secs(10), "the tunnel runs again", || {
            ensure!(pid(cluster, node, "weft-tunnel")? != before, "not started again");
            Ok(())
        })?;
        std::thread::sleep(Duration::from_secs(2));
    }
    unharmed(&loads, "after nine kills")
}

/// The public key that a node uses and, while it is being replaced, the next one.
pub(crate) fn keys(cluster: &Cluster, node: &str) -> anyhow::Result<Vec<String>> {
    let shown = cluster.on(node, "weft key show")?;
    let key = |line: &str| {
        let (what, rest) = line.split_once("key ")?;
        ["", "next "].contains(&what).then(|| rest.split_whitespace().next().map(str::to_owned))?
    };
    Ok(shown.lines().filter_map(key).collect())
}

/// From a pod to pods on the other nodes, 100 packets a second of each family to each: none may be lost while it happens.
fn none_lost_while(cluster: &Cluster, happens: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    const PACKETS: u32 = 2000;
    let client = cluster.pod_on("tools", "node1")?;
    let servers = [cluster.pod_on("echo", "node2")?, cluster.pod_on("echo", "node3")?];
    let addresses: Vec<&String> = servers.iter().flat_map(|pod| &pod.addresses).collect();
    let line = |address: &String| format!("ping -q -i 0.01 -w 60 -c {PACKETS} {address}");
    std::thread::scope(|scope| {
        let pings: Vec<_> = addresses
            .iter()
            .map(|address| scope.spawn(|| cluster.in_pod(&client.name, &line(address))))
            .collect();
        std::thread::sleep(Duration::from_secs(2));
        let happened = happens();
        for ping in pings {
            let said = ping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            ensure!(said.contains(&format!("{PACKETS} packets transmitted, {PACKETS} ")), "{said}");
        }
        happened
    })
}

/// Seconds since the latest handshake with each peer, by node and peer.
fn handshakes(cluster: &Cluster) -> anyhow::Result<Vec<(String, u64)>> {
    let mut all = Vec::new();
    for node in NODES {
        let status = cluster.status(node)?;
        for peer in status["parts"]["peers"].as_array().context("peers in the status")? {
            let age = peer["last_handshake_seconds"].as_u64().with_context(|| format!("{node}: {peer}"))?;
            all.push((format!("{node} with {}", peer["public_key"]), age));
        }
    }
    ensure!(all.len() == 6, "{all:?}");
    Ok(all)
}

fn tunnels_restarted(cluster: &Cluster) -> anyhow::Result<()> {
    let loads = loads(cluster)?;
    // All sessions are made anew, so that none becomes due meanwhile.
    for node in NODES {
        kill(cluster, node, "weft-tunnel")?;
    }
    cluster.within(Duration::from_secs(20), "new sessions", || {
        let young = handshakes(cluster)?;
        ensure!(young.iter().all(|(_, age)| *age < 20), "{young:?}");
        Ok(())
    })?;
    let (before, first) = (handshakes(cluster)?, Instant::now());
    none_lost_while(cluster, || {
        for node in NODES.repeat(4) {
            let old = pid(cluster, node, "weft-tunnel")?;
            cluster.on(node, "systemctl restart weft-tunnel")?;
            cluster.within(Duration::from_secs(10), "another process", || {
                ensure!(pid(cluster, node, "weft-tunnel")? != old, "{node}: not restarted");
                Ok(())
            })?;
        }
        Ok(())
    })?;
    let passed = first.elapsed().as_secs();
    for ((peer, now), (_, then)) in handshakes(cluster)?.iter().zip(&before) {
        ensure!(now + 1 >= then + passed, "{peer}: a new handshake {now} s ago");
    }
    unharmed(&loads, "after twelve restarts")
}

fn keys_rotated(cluster: &Cluster) -> anyhow::Result<()> {
    let loads = loads(cluster)?;
    let before = NODES.iter().map(|node| keys(cluster, node)).collect::<anyhow::Result<Vec<_>>>()?;
    none_lost_while(cluster, || {
        for node in NODES {
            cluster.on(node, "weft key rotate")?;
        }
        let started_at = Instant::now();
        for (node, before) in NODES.iter().zip(&before) {
            cluster.within(Duration::from_secs(30), "the next key has taken over", || {
                let now = keys(cluster, node)?;
                ensure!(now.len() == 1 && now != *before, "{node}: {now:?} after {before:?}");
                let annotations = &cluster.object(&["node", node])?["metadata"]["annotations"];
                ensure!(annotations["weft.network/public-key"] == now[0], "{node}: {annotations}");
                Ok(())
            })?;
        }
        println!("        all keys replaced after {:.1} s", started_at.elapsed().as_secs_f32());
        Ok(())
    })?;
    unharmed(&loads, "after every key was replaced")
}

fn restarted(cluster: &Cluster, unit: &str) -> anyhow::Result<()> {
    let loads = loads(cluster)?;
    for node in NODES {
        let before = pid(cluster, node, unit)?;
        cluster.on(node, &format!("systemctl restart {unit}"))?;
        cluster.within(Duration::from_secs(20), "the unit runs again", || {
            ensure!(pid(cluster, node, unit)? != before, "not restarted");
            Ok(())
        })?;
    }
    cluster.within(PATIENCE, "nodes Ready", || cluster.nodes_ready())?;
    unharmed(&loads, "after the restart")?;
    // What was attached before is known after: an old pod ends and a new one starts.
    cluster.kubectl(&["rollout", "restart", "daemonset/tools"])?;
    cluster.kubectl(&["rollout", "status", "daemonset/tools", "--timeout=120s"]).map(drop)
}

fn kubelet_restarted(cluster: &Cluster) -> anyhow::Result<()> {
    restarted(cluster, "kubelet")
}

fn runtime_restarted(cluster: &Cluster) -> anyhow::Result<()> {
    restarted(cluster, "containerd")
}

/// What a node's own shell finds: a Service across nodes in both families, and its name.
fn works_without_api_server(cluster: &Cluster, node: &str, ips: &[String]) -> anyhow::Result<()> {
    for ip in ips {
        let said = cluster.on(node, &format!("curl -sS -m 3 'http://{}/hostname'", in_url(ip)))?;
        ensure!(said.trim() == "steady", "{said}");
    }
    let said = cluster.on(node, "dig +short +time=1 @10.96.0.10 steady.suite.svc.cluster.local A")?;
    ensure!(said.trim() == ips[0], "DNS: {said}");
    Ok(())
}

fn api_server_away(cluster: &Cluster) -> anyhow::Result<()> {
    let mut loads = loads(cluster)?;
    loads.push(Load::on_new_connections(cluster, "node3", "steady")?);
    let ips = cluster.cluster_ips("steady")?;
    cluster.control_plane("stop", "kube-apiserver")?;
    let meanwhile = (0..10).try_for_each(|_| {
        std::thread::sleep(Duration::from_secs(1));
        NODES.iter().try_for_each(|node| works_without_api_server(cluster, node, &ips))
    });
    cluster.control_plane("start", "kube-apiserver")?;
    meanwhile?;
    unharmed(&loads, "while the API server was away")?;
    for node in NODES {
        cluster.within(Duration::from_secs(20), "agents are connected again", || {
            let status = cluster.status(node)?;
            let api = status["api_server"].as_str().unwrap_or_default();
            ensure!(api.starts_with("connected"), "{node}: {api}");
            Ok(())
        })?;
    }
    Ok(())
}

fn node_reboots(cluster: &Cluster) -> anyhow::Result<()> {
    let load = Load::on_established_connections(cluster, "node1", "steady")?;
    cluster.power("cycle", "node3")?;
    cluster.node_is_back("node3")?;
    load.unharmed("while another node rebooted")
}

fn reboot_without_api_server(cluster: &Cluster) -> anyhow::Result<()> {
    let load = Load::on_established_connections(cluster, "node1", "steady")?;
    let ips = cluster.cluster_ips("steady")?;
    cluster.control_plane("stop", "kube-apiserver")?;
    let meanwhile = cluster.power("cycle", "node3").and_then(|()| {
        cluster.within(Duration::from_secs(30), "the node from its disk", || {
            works_without_api_server(cluster, "node3", &ips)
        })
    });
    cluster.control_plane("start", "kube-apiserver")?;
    meanwhile?;
    cluster.node_is_back("node3")?;
    load.unharmed("while another node rebooted without API server")
}
