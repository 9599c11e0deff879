//! Network policies: 1,000 of them over 5,000 pods of both families, 110 of these on this node. What a change costs from the API
//! server's answer until the kernel has the rules, what a connection costs, and the memory of the agent.
//!
//! The peer is the same policies as chains of iptables and sets of ipset in kube-router's layout (`peer`). What kube-router says
//! of itself stands beside. Connections are measured with the agent held still: rules of ours, none, and the peer's, in turn.

mod peer;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use futures::stream;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, Patch, PatchParams, PostParams};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::rig::{NODE, Rig, ip, private_names, until};
use super::row::{Better, Row, median};
use peer::Peer;

const NAMESPACES: usize = 50;
const PODS: usize = 5_000;
/// The first of the pods are on this node.
const OWN_PODS: usize = 110;
const POLICIES: usize = 1_000;
const APPS: usize = 10;
/// Of each kind.
const CHANGES: usize = 20;
/// Of connections, each with our rules, with none, and with the peer's.
const ROUNDS: usize = 7;
const CONNECTIONS: usize = 3_000;
const PORT: u16 = 8080;
/// "Full sync of network policies", as kube-router's documentation has it.
const KUBE_ROUTER_SYNC: (&str, f64) = ("kube-router, published", 5_000.0);
const IPSET: &str = "iptables+ipset";
/// Requests to the API server at once.
const AT_ONCE: usize = 16;

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    private_names()?;
    let mut rig = Rig::start(weft)?;
    rig.start_agent()?;
    rig.await_ready()?;
    std::thread::sleep(Duration::from_secs(2));
    let idle = rig.resident_mib("agent")?;
    let own = attach(&rig)?;
    rig.runtime.block_on(make_objects(&rig.client, &own))?;
    let bench = Bench { rig, own };
    bench.settle()?;
    let loaded = bench.rig.resident_mib("agent")?;
    let mut rows = bench.changes()?;
    rows.extend(bench.connections()?);
    let more = loaded - idle;
    rows.push(Row::alone("memory of the agent for them", "MiB", more, Better::Lower, 40.0));
    rows.push(Row::alone("memory of the agent, all of it", "MiB", loaded, Better::Lower, None));
    Ok(rows)
}

/// A pod by its number: names, labels and addresses follow from it.
fn namespace(pod: usize) -> usize {
    pod % NAMESPACES
}

fn app(pod: usize) -> usize {
    pod / NAMESPACES % APPS
}

/// Of pods of other nodes; those of this node have what CNI gives.
fn addresses_elsewhere(pod: usize) -> [IpAddr; 2] {
    let (third, fourth) = (100 + pod / 200, 2 + pod % 200);
    [format!("10.244.{third}.{fourth}"), format!("fd00:10:244:{third:x}::{fourth:x}")]
        .map(|text| text.parse().unwrap_or(IpAddr::from([0, 0, 0, 0])))
}

fn addresses(pod: usize, own: &[[IpAddr; 2]]) -> [IpAddr; 2] {
    own.get(pod).copied().unwrap_or_else(|| addresses_elsewhere(pod))
}

/// Who policy `i` is about and whom it allows: pods of an app of its namespace; into them, those of the next app there and
/// everybody of the next namespace; out of them, those of the app after next, anywhere.
struct Rules {
    namespace: usize,
    subject: usize,
    from_app: usize,
    from_namespace: usize,
    to_app: usize,
}

fn rules(policy: usize) -> Rules {
    let subject = policy / NAMESPACES % APPS;
    Rules {
        namespace: policy % NAMESPACES,
        subject,
        from_app: (subject + 1) % APPS,
        from_namespace: (policy + 1) % NAMESPACES,
        to_app: (subject + 2) % APPS,
    }
}

fn policy(i: usize) -> Value {
    let of = rules(i);
    let labels = |app: usize| json!({"matchLabels": {"app": format!("a{app}")}});
    let other = json!({"matchLabels": {"kubernetes.io/metadata.name": format!("ns{}", of.from_namespace)}});
    let ports = json!([{"port": PORT}]);
    json!({
        "metadata": {"namespace": format!("ns{}", of.namespace), "name": format!("p{i}")},
        "spec": {
            "podSelector": labels(of.subject),
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": labels(of.from_app)}, {"namespaceSelector": other}], "ports": ports}],
            "egress": [{"to": [{"podSelector": labels(of.to_app), "namespaceSelector": {}}], "ports": ports}],
        },
    })
}

/// Runs the installed plugin for each pod of this node; their addresses.
fn attach(rig: &Rig) -> anyhow::Result<Vec<[IpAddr; 2]>> {
    let folder = rig.folder.path();
    let list: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("cni/05-weft.conflist"))?)?;
    let mut config = list["plugins"][0].clone();
    config["name"] = list["name"].clone();
    config["cniVersion"] = "1.0.0".into();
    (0..OWN_PODS)
        .map(|pod| {
            ip(&format!("netns add pod{pod}"))?;
            let args =
                format!("K8S_POD_NAMESPACE=ns{};K8S_POD_NAME=pod{pod};IgnoreUnknown=1", namespace(pod));
            let mut command = Command::new(folder.join("bin/weft"));
            command.env_clear().env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", format!("pod{pod}"));
            command.env("CNI_IFNAME", "eth0").env("CNI_PATH", folder.join("bin")).env("CNI_ARGS", args);
            command.env("CNI_NETNS", format!("/run/netns/pod{pod}"));
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let written =
                child.stdin.take().context("no standard input")?.write_all(config.to_string().as_bytes());
            let said = child.wait_with_output()?.stdout;
            let result: Value = serde_json::from_slice(&said)?;
            written.with_context(|| result.to_string())?;
            let address = |i: usize| -> anyhow::Result<IpAddr> {
                let text = result["ips"][i]["address"].as_str().with_context(|| result.to_string())?;
                Ok(text.split('/').next().unwrap_or_default().parse()?)
            };
            Ok([address(0)?, address(1)?])
        })
        .collect()
}

async fn make_objects(client: &kube::Client, own: &[[IpAddr; 2]]) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for i in 0..NAMESPACES {
        let object = serde_json::from_value(json!({"metadata": {"name": format!("ns{i}")}}))?;
        namespaces.create(&PostParams::default(), &object).await?;
    }
    let pods = stream::iter(0..PODS).map(|pod| make_pod(client, pod, addresses(pod, own)));
    pods.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await.into_iter().collect::<anyhow::Result<()>>()?;
    let policies = stream::iter(0..POLICIES).map(|i| make_policy(client, i));
    policies.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await.into_iter().collect()
}

fn pods_of(client: &kube::Client, pod: usize) -> Api<Pod> {
    Api::namespaced(client.clone(), &format!("ns{}", namespace(pod)))
}

async fn make_pod(client: &kube::Client, pod: usize, addresses: [IpAddr; 2]) -> anyhow::Result<()> {
    let node = if pod < OWN_PODS { NODE } else { "elsewhere" };
    let object = json!({
        "metadata": {"name": format!("pod{pod}"), "labels": {"app": format!("a{}", app(pod)), "pod-template-hash": "5d9f8c7b6"}},
        "spec": {"nodeName": node, "containers": [{"name": "a", "image": "a", "ports": [{"name": "web", "containerPort": PORT}]}]},
    });
    let api = pods_of(client, pod);
    api.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    let ips = addresses.map(|ip| json!({"ip": ip}));
    let status = json!({"status": {"phase": "Running", "podIP": addresses[0], "podIPs": ips}});
    api.patch_status(&format!("pod{pod}"), &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

async fn make_policy(client: &kube::Client, i: usize) -> anyhow::Result<()> {
    let api: Api<NetworkPolicy> = Api::namespaced(client.clone(), &format!("ns{}", rules(i).namespace));
    api.create(&PostParams::default(), &serde_json::from_value(policy(i))?).await?;
    Ok(())
}

struct Bench {
    rig: Rig,
    own: Vec<[IpAddr; 2]>,
}

/// Medians in milliseconds.
struct Change {
    /// From the API server's answer until the kernel has it.
    seen: f64,
    /// Planning, committing and looking for connections to cut.
    pass: f64,
    /// The transaction alone.
    commit: f64,
}

/// What the policies' loop says of itself.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    generation: u64,
    pass_micros: f64,
    commit_micros: f64,
}

impl Bench {
    /// Waits until the policies' loop has nothing more to do.
    fn settle(&self) -> anyhow::Result<()> {
        let mut last = Said::default();
        for _ in 0..60 {
            std::thread::sleep(Duration::from_secs(1));
            let now = self.report()?;
            if now.generation == last.generation && now.generation > 1 {
                return Ok(());
            }
            last = now;
        }
        anyhow::bail!("the policies were not settled in a minute: {last:?}")
    }

    fn report(&self) -> anyhow::Result<Said> {
        let mut stream = UnixStream::connect(self.rig.folder.path().join("run/agent.sock"))?;
        stream.write_all(b"GET /status HTTP/1.0\r\nHost: weft\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").context("no HTTP answer")?.1;
        let status: Value = serde_json::from_str(body)?;
        let loops = status["loops"].as_array().context("no loops")?;
        let policy = loops.iter().find(|report| report["name"] == "policy").context("no policy loop")?;
        let details = policy["details"].as_array().context("no details")?;
        let commit = details.iter().find(|detail| detail[0] == "last transaction").map(|detail| &detail[1]);
        let commit = commit.and_then(|text| text.as_str()?.split(' ').next()?.parse().ok());
        Ok(Said {
            generation: policy["generation"].as_u64().context("no generation")?,
            pass_micros: policy["last_pass_micros"].as_f64().context("no duration")?,
            commit_micros: commit.context("no duration of a transaction")?,
        })
    }

    fn time(&self, change: impl Fn(usize) -> anyhow::Result<Instant>) -> anyhow::Result<Change> {
        let (mut seen, mut passes, mut commits) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..CHANGES {
            let before = self.report()?.generation;
            let answered_at = change(i)?;
            let mut said = Said::default();
            until("the rules", || {
                self.report().is_ok_and(|now| {
                    said = now;
                    now.generation > before
                })
            })?;
            seen.push(answered_at.elapsed().as_secs_f64() * 1000.0);
            passes.push(said.pass_micros / 1000.0);
            commits.push(said.commit_micros / 1000.0);
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(Change { seen: median(seen), pass: median(passes), commit: median(commits) })
    }

    fn changes(&self) -> anyhow::Result<Vec<Row>> {
        let Rig { client, runtime, .. } = &self.rig;
        // The address comes with the status; what is made before has none, and changes nothing.
        for i in 0..CHANGES {
            let pod = PODS + i;
            runtime.block_on(async {
                let object = json!({
                    "metadata": {"name": format!("pod{pod}"), "labels": {"app": format!("a{}", app(pod))}},
                    "spec": {"nodeName": "elsewhere", "containers": [{"name": "a", "image": "a"}]},
                });
                pods_of(client, pod).create(&PostParams::default(), &serde_json::from_value(object)?).await?;
                anyhow::Ok(())
            })?;
        }
        self.settle()?;
        let pods = self.time(|i| {
            let pod = PODS + i;
            let ips = addresses_elsewhere(pod).map(|ip| json!({"ip": ip}));
            let status = Patch::Merge(json!({"status": {"phase": "Running", "podIPs": ips}}));
            runtime.block_on(pods_of(client, pod).patch_status(
                &format!("pod{pod}"),
                &PatchParams::default(),
                &status,
            ))?;
            Ok(Instant::now())
        })?;
        let labels = self.time(|i| {
            let pod = OWN_PODS + i;
            let patch =
                Patch::Merge(json!({"metadata": {"labels": {"app": format!("a{}", (app(pod) + 5) % APPS)}}}));
            runtime.block_on(pods_of(client, pod).patch(
                &format!("pod{pod}"),
                &PatchParams::default(),
                &patch,
            ))?;
            Ok(Instant::now())
        })?;
        let policies = self.time(|i| {
            runtime.block_on(make_policy(client, POLICIES + i))?;
            Ok(Instant::now())
        })?;
        let peer = Peer::of(&self.own);
        let sync = median((0..3).map(|_| peer.sync()).collect::<anyhow::Result<Vec<f64>>>()?);
        peer.remove()?;
        let mut rows = Vec::new();
        for (what, change) in
            [("one pod added", &pods), ("one label changed", &labels), ("one policy added", &policies)]
        {
            let row = |name: &str, figure, target: Option<f64>| {
                Row::alone(&format!("{what}, {name} p50"), "ms", figure, Better::Lower, target)
            };
            rows.push(row("API answer to rules", change.seen, Some(50.0)));
            rows.push(row("plan and commit", change.pass, None));
            rows.push(row("transaction in the kernel", change.commit, Some(1.0)));
            let beside = |peer, target| {
                Row::beside(
                    &format!("{what}, to the kernel p50"),
                    "ms",
                    change.pass,
                    peer,
                    Better::Lower,
                    target,
                )
            };
            rows.push(beside((IPSET, sync), 0.1));
            rows.push(beside(KUBE_ROUTER_SYNC, 0.1));
        }
        Ok(rows)
    }

    /// With the agent held still, so that it puts nothing back.
    fn connections(&self) -> anyhow::Result<Vec<Row>> {
        let agent = Pid::from_raw(i32::try_from(self.rig.pid("agent")?)?);
        kill(agent, Signal::SIGSTOP)?;
        let outcome = self.connections_in_turn();
        kill(agent, Signal::SIGCONT)?;
        outcome
    }

    fn connections_in_turn(&self) -> anyhow::Result<Vec<Row>> {
        // Of app a2 in ns0, and of app a0 in ns1: allowed at both ends, by the second peer of the first rule.
        let (server, client) = (100, 1);
        let rules = said(Command::new("nft").args(["list", "table", "inet", "weft-policy"]))?;
        ensure!(rules.contains("jump in4-"), "no pod is isolated");
        let peer = Peer::of(&self.own);
        peer.sync()?;
        peer.switch(false)?;
        let mut rates = [0, 1].map(|_| [Vec::new(), Vec::new(), Vec::new()]);
        for (family, [ours, none, theirs]) in rates.iter_mut().enumerate() {
            let at = SocketAddr::new(self.own[server][family], PORT);
            let listener = within(server, move || Ok(TcpListener::bind(at)?))?;
            std::thread::spawn(move || listener.incoming().for_each(drop));
            for _ in 0..ROUNDS {
                ours.push(within(client, move || rate(at))?);
                nft("delete table inet weft-policy")?;
                none.push(within(client, move || rate(at))?);
                peer.switch(true)?;
                theirs.push(within(client, move || rate(at))?);
                peer.switch(false)?;
                nft(&rules)?;
            }
        }
        peer.remove()?;
        let mut rows = Vec::new();
        for (family, [ours, none, theirs]) in ["IPv4", "IPv6"].into_iter().zip(rates) {
            let [ours, none, theirs] = [ours, none, theirs].map(median);
            let name = format!("connections, policies on, {family}");
            rows.push(Row::beside(&name, "1/s", ours, ("no policies", none), Better::Higher, 0.9));
            rows.push(Row::beside(&name, "1/s", ours, (IPSET, theirs), Better::Higher, 1.0));
        }
        Ok(rows)
    }
}

/// Runs in the namespace of a pod, on a thread of its own.
fn within<T: Send + 'static>(
    pod: usize,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let thread = std::thread::spawn(move || {
        let netns = std::fs::File::open(format!("/run/netns/pod{pod}"))?;
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    });
    thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
}

/// Connections a second, one after the other, each ended by a reset so that its port is free again.
fn rate(to: SocketAddr) -> anyhow::Result<f64> {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    let started_at = Instant::now();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        setsockopt(&stream, sockopt::Linger, &at_once)?;
    }
    Ok(CONNECTIONS as f64 / started_at.elapsed().as_secs_f64())
}

fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn nft(text: &str) -> anyhow::Result<()> {
    feed(Command::new("nft").args(["-f", "-"]), text)
}

/// Runs a command with text on standard input.
fn feed(command: &mut Command, text: &str) -> anyhow::Result<()> {
    let mut child =
        command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context(format!("{command:?}"))?;
    // A command that ends before it has read everything says why.
    let written = child.stdin.take().context("no standard input")?.write_all(text.as_bytes());
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    written.with_context(|| format!("{command:?}"))
}
