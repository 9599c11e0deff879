//! Nothing of a pod is on the underlay in clear, whatever happens to the nodes: one capture at the switch, which every frame between
//! machines passes, from before the first disturbance until after the last.
//!
//! Frames that the test itself sends with a pod's address show that the capture works and that it has come so far: after each
//! disturbance they are waited for, so that what is found belongs to it.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::cluster::{Cluster, NODES};
use crate::disruption::{agents_ready, keys, kill};
use crate::install::{change_image, image};
use crate::{Case, case};

pub(crate) const CASES: &[Case] = &[case(
    "start, churn, crashes, restarts, upgrade, rotation: nothing of a pod range is on any link in clear",
    nothing_in_clear_whatever_happens,
)];

const IN_CLEAR: &str = "(net 10.244.0.0/16 or net fd00:10:244::/56)";
/// Of no pod; the client host sends from them.
const MARKERS: [&str; 2] = ["10.244.255.77", "fd00:10:244:ff::77"];
/// What sends all the while, from every node: to pods and nodes of all nodes by address and through Services, and to the API
/// server, in both families, with a new connection each.
const TALKERS: &str = "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: talk, namespace: suite}
spec:
  selector: {matchLabels: {app: talk}}
  template:
    metadata: {labels: {app: talk}}
    spec:
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      containers:
      - name: talk
        image: weft.network/test:1
        command: [bash, -c]
        args:
        - |
          ask() { curl -gsk -m 1 -o /dev/null \"$1\"; }
          while true; do
            pods=$(dig +short +time=1 +tries=1 echo-headless.suite.svc.cluster.local A; dig +short +time=1 +tries=1 echo-headless.suite.svc.cluster.local AAAA)
            for address in $pods; do
              case $address in *:*) at=[$address] ;; *) at=$address ;; esac
              ask http://$at:8080/hostname &
              ping -c 3 -i 0.05 -W 1 $address > /dev/null &
              echo hostname > /dev/udp/$address/8081
            done
            for host in 172.30.98.11 172.30.98.12 172.30.98.13 [fd00:30:98::11] [fd00:30:98::12] [fd00:30:98::13]; do
              ask http://$host:18080/hostname &
            done
            for url in http://SERVICE4/hostname http://[SERVICE6]/hostname https://172.30.98.1:6443/livez https://[fd00:30:98::1]:6443/livez; do
              ask $url &
            done
            wait
            sleep 0.05
          done
";

/// tcpdump on every link of the switch.
struct Capture<'a> {
    cluster: &'a Cluster,
    tcpdump: Child,
    file: String,
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        for address in MARKERS {
            let _ = self.cluster.on("client", &format!("ip address del {address} dev lo"));
        }
    }
}

impl<'a> Capture<'a> {
    fn start(cluster: &'a Cluster) -> anyhow::Result<Self> {
        for address in MARKERS {
            let bits = if address.contains(':') { "128 nodad" } else { "32" };
            let (bits, flag) = bits.split_once(' ').unwrap_or((bits, ""));
            cluster.on("client", &format!("ip address replace {address}/{bits} dev lo {flag}"))?;
        }
        let file = cluster.run_folder.join("leaks.pcap").display().to_string();
        let filter = format!("{IN_CLEAR} or udp port 51820");
        // Not by `exec`, which stays its parent: what is killed must be tcpdump itself.
        let lan = cluster.run_folder.file_name().context("the cluster's name")?.display().to_string();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{lan}"));
        command.args(["tcpdump", "-Z", "root", "-ni", "any", "-s", "96", "-B", "65536", "-U"]);
        command.args(["--immediate-mode", "-w", &file, &filter]).stdin(Stdio::null());
        let tcpdump = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("start tcpdump")?;
        let capture = Self { cluster, tcpdump, file };
        cluster
            .within(Duration::from_secs(10), "the capture sees what the test leaks", || capture.settle())?;
        Ok(capture)
    }

    /// Leaks a packet of each family and waits until it is seen.
    fn settle(&self) -> anyhow::Result<()> {
        for (address, to) in MARKERS.iter().zip(["172.30.98.1", "fd00:30:98::1"]) {
            let before = self.count(&format!("src host {address}"))?;
            self.cluster.on("client", &format!("ping -c 1 -W 1 -I {address} {to} > /dev/null || true"))?;
            self.cluster.within(Duration::from_secs(5), "the capture sees what the test leaks", || {
                ensure!(self.count(&format!("src host {address}"))? > before, "{address} is not seen");
                Ok(())
            })?;
        }
        Ok(())
    }

    fn lines(&self, filter: &str) -> anyhow::Result<Vec<String>> {
        // The last record may be half written.
        let line = format!("tcpdump -ttnnr {} '{filter}' 2>/dev/null || true", self.file);
        Ok(self.cluster.on("lan", &line)?.lines().map(str::to_owned).collect())
    }

    fn count(&self, filter: &str) -> anyhow::Result<usize> {
        Ok(self.lines(filter)?.len())
    }

    /// What of pods was in clear so far.
    fn in_clear(&self) -> anyhow::Result<Vec<String>> {
        self.settle()?;
        let [v4, v6] = MARKERS;
        self.lines(&format!("{IN_CLEAR} and not host {v4} and not host {v6}"))
    }
}

fn nothing_in_clear_whatever_happens(cluster: &Cluster) -> anyhow::Result<()> {
    let ips = cluster.cluster_ips("echo")?;
    let talkers = TALKERS.replace("SERVICE4", &ips[0]).replace("SERVICE6", &ips[1]);
    let capture = Capture::start(cluster)?;
    cluster.apply(&talkers)?;
    let outcome = disturb(cluster, &capture);
    cluster.delete(&talkers)?;
    outcome
}

fn disturb(cluster: &Cluster, capture: &Capture<'_>) -> anyhow::Result<()> {
    type Step = (&'static str, fn(&Cluster) -> anyhow::Result<()>);
    let steps: [Step; 7] = [
        ("pods start on every node", talkers_run),
        ("a node starts", node_starts),
        ("pods come and go", pods_churn),
        ("agents and tunnels crash", crashes),
        ("tunnels restart in order", tunnels_restart),
        ("keys are replaced", rotation),
        ("another build replaces every process, and back", upgrade),
    ];
    for (what, step) in steps {
        let before = capture.count("udp port 51820")?;
        step(cluster).context(what)?;
        let clear = capture.in_clear()?;
        ensure!(clear.is_empty(), "while {what}: {} frames in clear: {:?}", clear.len(), clear.first());
        let sealed = capture.count("udp port 51820")? - before;
        ensure!(sealed > 500, "while {what} only {sealed} frames of WireGuard: pods did not talk");
        println!("        {what}: none in clear, {sealed} frames of WireGuard");
    }
    rules_flushed(cluster, capture)
}

fn talkers_run(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["rollout", "status", "daemonset/talk", "--timeout=120s"])?;
    std::thread::sleep(Duration::from_secs(3));
    Ok(())
}

fn node_starts(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.power("cycle", "node3")?;
    cluster.node_is_back("node3")?;
    talkers_run(cluster)
}

fn pods_churn(cluster: &Cluster) -> anyhow::Result<()> {
    for replicas in ["12", "2", "4"] {
        cluster.kubectl(&["scale", "deployment/web", &format!("--replicas={replicas}")])?;
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
    }
    for what in ["daemonset/talk", "daemonset/echo"] {
        cluster.kubectl(&["rollout", "restart", what])?;
        cluster.kubectl(&["rollout", "status", what, "--timeout=180s"])?;
    }
    Ok(())
}

fn crashes(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES.repeat(3) {
        for unit in ["weft-agent", "weft-tunnel"] {
            // It may be on its way up from the kill before.
            cluster.within(Duration::from_secs(10), "a process to kill", || {
                ensure!(kill(cluster, node, unit)?, "no {unit} runs on {node}");
                Ok(())
            })?;
            std::thread::sleep(Duration::from_millis(700));
        }
    }
    agents_ready(cluster)
}

fn tunnels_restart(cluster: &Cluster) -> anyhow::Result<()> {
    for node in NODES.repeat(3) {
        cluster.on(node, "systemctl restart weft-tunnel")?;
        std::thread::sleep(Duration::from_millis(700));
    }
    agents_ready(cluster)
}

fn rotation(cluster: &Cluster) -> anyhow::Result<()> {
    let before = NODES.iter().map(|node| keys(cluster, node)).collect::<anyhow::Result<Vec<_>>>()?;
    for node in NODES {
        cluster.on(node, "weft key rotate")?;
    }
    for (node, before) in NODES.iter().zip(&before) {
        cluster.within(Duration::from_secs(40), "the next key has taken over", || {
            let now = keys(cluster, node)?;
            ensure!(now.len() == 1 && now != *before, "{node}: {now:?} after {before:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn upgrade(cluster: &Cluster) -> anyhow::Result<()> {
    let first = image(cluster)?;
    change_image(cluster, "weft:other")?;
    change_image(cluster, &first)
}

/// Somebody takes every table away. What is between pods and nodes stays in the tunnel, which needs no table; what pods send to the
/// outside or to a ClusterIP has nothing to rewrite or drop it until the agent has put the tables back.
fn rules_flushed(cluster: &Cluster, capture: &Capture<'_>) -> anyhow::Result<()> {
    for node in NODES {
        cluster.on(node, "nft flush ruleset")?;
        let flushed_at = Instant::now();
        cluster.within(Duration::from_secs(15), "the tables are back", || {
            cluster.on(node, "nft list table inet weft-host > /dev/null").map(drop)
        })?;
        println!("        {node}: tables taken away, weft-host back after {:?}", flushed_at.elapsed());
        std::thread::sleep(Duration::from_secs(3));
    }
    let clear = capture.in_clear()?;
    let time = |line: &String| line.split(' ').next().and_then(|word| word.parse::<f64>().ok());
    let times: Vec<f64> = clear.iter().filter_map(time).collect();
    // Three flushes, each a burst.
    let bursts = times.chunk_by(|a, b| b - a < 2.0);
    let longest = bursts.map(|burst| burst[burst.len() - 1] - burst[0]).fold(0.0, f64::max);
    println!("        tables taken away: {} frames in clear, for {longest:.2} s at most", clear.len());
    ensure!(longest < 2.0, "in clear for {longest} s: {:?}", clear.last());
    let [v4, v6] = ["10.244.0.0/16", "fd00:10:244::/56"];
    let inside = capture.lines(&format!(
        "(src net {v4} and dst net {v4}) or (src net {v6} and dst net {v6})
         or (net {v4} and net 172.30.98.8/29) or (net {v6} and net fd00:30:98::10/124)"
    ))?;
    ensure!(inside.is_empty(), "between pods or to nodes in clear: {:?}", inside.first());
    std::thread::sleep(Duration::from_secs(2));
    let after = capture.in_clear()?;
    ensure!(after.len() == clear.len(), "in clear after the tables were back: {:?}", after.last());
    Ok(())
}
