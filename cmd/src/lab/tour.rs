//! `weft lab tour`: shows with real packets, in every family of the lab, what Weft does. Each step prints what is
//! shown, the command behind it and the result; the tour fails when a step does, and goes on to the next.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams};
use sha2::{Digest, Sha256};

use super::capture::{Capture, Rules};
use super::shell::{self, FoundPod};
use super::topology::{Family, Topology};
use super::{api, apply, expand, lifecycle, machine, netexec, status};

const NAME: &str = "echo.default.svc.cluster.local";
/// Words that pods exchange during the capture; nobody else says them.
const SECRET: &str = "weft-tour-plaintext-that-must-not-show";
/// The stream of the step that kills agents: so many bytes in so many seconds.
const STREAM_BYTES: u64 = 4_000_000;
const STREAM_SECONDS: u64 = 4;
/// From a change to its effect on the wire, generously.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// One family of the tour: how the commands say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Side {
    title: &'static str,
    curl: &'static str,
    getent: &'static str,
    ipv6: bool,
}

const IPV4: Side = Side { title: "IPv4", curl: "-4", getent: "ahostsv4", ipv6: false };
const IPV6: Side = Side { title: "IPv6", curl: "-6", getent: "ahostsv6", ipv6: true };

struct Tour {
    topology: Topology,
    sides: Vec<Side>,
    number: usize,
    failed: Vec<String>,
}

/// Runs the whole tour on the lab that is up.
pub(super) fn run() -> anyhow::Result<()> {
    let begin = Instant::now();
    let topology = machine::topology()?;
    ensure!(topology.nodes >= 2, "the tour shows traffic between nodes: it needs at least two");
    require_programs()?;
    let mut sides = Vec::new();
    sides.extend(topology.family.has_ipv4().then_some(IPV4));
    sides.extend(topology.family.has_ipv6().then_some(IPV6));
    if !api::is_up() {
        api::start(&topology)?;
    }
    let mut tour = Tour { topology, sides, number: 0, failed: Vec::new() };
    tour.step("Pods on every node, attached by the CNI plugin", Tour::pods);
    tour.step("A pod looks a Service up in the DNS of its own node", Tour::names);
    tour.step("The Service answers from pods on other nodes, in turn", Tour::balance);
    tour.step("Between the nodes there is nothing but WireGuard", Tour::encryption);
    tour.step("An endpoint is removed and traffic moves", Tour::removal);
    tour.step(
        "The agents are killed with -9 while connections stream: not one byte is lost",
        Tour::kill_agents,
    );
    tour.step("The API server is stopped and everything goes on", Tour::without_api);
    tour.step("A node reboots while the API server is away", Tour::reboot);
    tour.step("The API server comes back and agrees", Tour::api_back);
    tour.finish(begin)
}

fn require_programs() -> anyhow::Result<()> {
    for program in ["curl", "getent", "bash"] {
        let path = std::env::var("PATH").unwrap_or_default();
        let found = path.split(':').any(|directory| Path::new(directory).join(program).exists());
        ensure!(found, "the tour runs {program} in pods and does not find it: apt-get install {program}");
    }
    Ok(())
}

impl Tour {
    fn step(&mut self, title: &str, show: fn(&Self) -> anyhow::Result<String>) {
        self.number += 1;
        say!("\n{}. {title}", self.number);
        let begin = Instant::now();
        match show(self) {
            Ok(result) => say!("   ok: {result} ({:.1} s)", begin.elapsed().as_secs_f64()),
            Err(error) => {
                say!("   FAILED: {error:#}");
                self.failed.push(title.to_owned());
            }
        }
    }

    fn finish(self, begin: Instant) -> anyhow::Result<()> {
        let seconds = begin.elapsed().as_secs_f64();
        if !self.failed.is_empty() {
            bail!("{} of {} steps failed: {}", self.failed.len(), self.number, self.failed.join("; "));
        }
        say!("\nAll {} steps hold ({seconds:.0} s). The lab is still up; try next:", self.number);
        say!("  weft lab sh toolbox                     a shell in a pod: curl http://echo/hostname");
        say!("  export KUBECONFIG=$(weft lab kubeconfig)  then kubectl get nodes,pods,services -o wide");
        say!("  weft lab exec node1 -- weft status      what the agent of a node does and why");
        say!("  weft lab status                         machines, services, pods");
        say!("  weft lab apply -f FILE                  your own manifests");
        say!("End it with `weft lab down`, which leaves nothing behind.");
        Ok(())
    }

    /// One echo pod a node and a toolbox on the first node.
    fn pods(&self) -> anyhow::Result<String> {
        apply::apply(expand::parse(&manifest(&self.topology))?)?;
        say("weft lab status");
        let wanted = usize::from(self.topology.nodes) + 1;
        settle(|| {
            let running = tour_pods()?.len();
            ensure!(running == wanted, "{running} of {wanted} pods run");
            Ok(())
        })?;
        quote(&status::pods_table()?.to_string());
        Ok(format!("{wanted} pods on {} nodes", self.topology.nodes))
    }

    fn names(&self) -> anyhow::Result<String> {
        let addresses = cluster_ips()?;
        for side in &self.sides {
            let wanted = side.pick(&addresses)?;
            settle(|| {
                let output = in_pod_quietly("toolbox", &format!("getent {} {NAME}", side.getent))?;
                ensure!(output.contains(wanted), "{NAME} is not {wanted}: {output:?}");
                Ok(())
            })?;
            in_pod("toolbox", &format!("getent {} {NAME}", side.getent))?;
        }
        Ok(format!("{NAME} is {}", addresses.join(" and ")))
    }

    fn balance(&self) -> anyhow::Result<String> {
        let requests = 20 * usize::from(self.topology.nodes);
        for side in &self.sides {
            settle(|| {
                in_pod_quietly("toolbox", &format!("curl -sS {} -m 2 http://{NAME}/hostname", side.curl))
                    .map(drop)
            })?;
            let counts = tally(&in_pod("toolbox", &many(side.curl, NAME, requests))?)?;
            let answers: usize = counts.values().sum();
            ensure!(answers == requests, "{answers} answers to {requests} requests ({})", side.title);
            let silent: Vec<String> =
                echo_names(&self.topology).filter(|name| !counts.contains_key(name)).collect();
            ensure!(silent.is_empty(), "no answer over {} from {}", side.title, silent.join(", "));
        }
        let address = cluster_ips()?.into_iter().next().context("no ClusterIP")?;
        let ask = format!(
            "exec 3<>/dev/udp/{address}/80; echo hostname >&3; timeout 2 dd bs=512 count=1 <&3 2>/dev/null"
        );
        let answer = in_pod("toolbox", &ask)?;
        ensure!(answer.starts_with("echo-"), "over UDP: {answer:?}");
        Ok(format!("{requests} requests a family, every pod answered; UDP too"))
    }

    /// Captures on the LAN while pods talk; the same words captured at the pod's own interface are the control.
    fn encryption(&self) -> anyhow::Result<String> {
        say("weft lab exec lan -- tcpdump -ni any     (the tour captures by itself)");
        let rules = Rules::new(&self.topology, SECRET)?;
        let toolbox = shell::find_pod("toolbox")?;
        let inner = toolbox.record.pid.context("the toolbox does not run")?;
        let switch = format!("/proc/{}/ns/net", machine::running("lan")?.pid);
        let wire = Capture::start(Path::new(&switch), rules.clone())?;
        let control = Capture::start_in_pod(machine::running(&toolbox.node)?.pid, inner, rules)?;
        let talk = self.talk_to_every_pod();
        let (wire, control) = (wire.finish()?, control.finish()?);
        let talked = talk?;
        let others: Vec<String> = wire.other.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        quote(&format!("on the LAN: {} WireGuard, {}", wire.wireguard, others.join(", ")));
        quote(&format!(
            "readable words of the pods: {} frames at the pod, {} on the LAN",
            control.plaintext, wire.plaintext
        ));
        ensure!(
            wire.violation_count == 0,
            "{} frames do not belong on the wire:\n      {}",
            wire.violation_count,
            wire.violations.join("\n      ")
        );
        ensure!(wire.plaintext == 0, "words of the pods are readable on the wire");
        ensure!(
            wire.wireguard > 0 && control.plaintext > 0,
            "the capture saw nothing: it would prove nothing"
        );
        Ok(format!("{talked} conversations with pods of other nodes, all of them encrypted"))
    }

    fn talk_to_every_pod(&self) -> anyhow::Result<usize> {
        let mut talked = 0;
        for pod in echo_pods()?.iter().filter(|pod| pod.node != "node1") {
            for side in &self.sides {
                let url =
                    format!("http://{}:8080/echo?msg={SECRET}", host(side.pick(&pod.record.addresses)?));
                let answer = in_pod("toolbox", &format!("curl -sS -g -m 5 '{url}'"))?;
                ensure!(answer.trim() == SECRET, "{url} answers {answer:?}");
                talked += 1;
            }
        }
        Ok(talked)
    }

    fn removal(&self) -> anyhow::Result<String> {
        // Not on the node that reboots later: its pods shall come back with the addresses that others know.
        let gone = if self.topology.nodes > 2 { "echo-2" } else { "echo-1" };
        say(&format!("kubectl delete pod {gone}"));
        let begin = Instant::now();
        api::ask(async |client| {
            let pods: Api<Pod> = Api::namespaced(client, "default");
            pods.delete(gone, &DeleteParams::default()).await.context("delete the pod").map(drop)
        })?;
        let mut moved = None;
        let result = self.sides.iter().try_for_each(|side| {
            settle(|| {
                let counts = tally(&in_pod_quietly("toolbox", &many(side.curl, NAME, 20))?)?;
                ensure!(!counts.contains_key(gone), "{gone} still answers");
                Ok(())
            })?;
            moved.get_or_insert_with(|| begin.elapsed());
            let counts = tally(&in_pod("toolbox", &many(side.curl, NAME, 30))?)?;
            let answers: usize = counts.values().sum();
            ensure!(
                answers == 30 && !counts.contains_key(gone),
                "{answers} of 30 answers over {}",
                side.title
            );
            Ok(())
        });
        // The steps after this one want every pod, whatever this one showed.
        let restored = apply::apply(expand::parse(&manifest(&self.topology))?);
        result.and(restored)?;
        settle(|| shell::find_pod(gone).map(drop))?;
        let moved = moved.unwrap_or_default().as_secs_f64();
        Ok(format!("the others answer everything, {moved:.2} s after the deletion; {gone} is made again"))
    }

    fn kill_agents(&self) -> anyhow::Result<String> {
        let addresses = cluster_ips()?;
        let expected = digest();
        let before = self.agents()?;
        let digests = std::thread::scope(|scope| {
            let streams: Vec<_> = self
                .sides
                .iter()
                .map(|side| Ok((side, scope.spawn(stream_command(side, &addresses)?))))
                .collect::<anyhow::Result<_>>()?;
            std::thread::sleep(Duration::from_secs(1));
            for node in self.topology.node_names() {
                say(&format!("weft lab kill-agent {node}"));
                shell::kill_agent(&node)?;
            }
            for side in &self.sides {
                // A new connection while no agent runs: the rules are in the kernel.
                let url = format!("http://{}/hostname", host(side.pick(&addresses)?));
                in_pod("toolbox", &format!("curl -sS -g -m 5 {url}"))?;
            }
            streams
                .into_iter()
                .map(|(side, stream)| {
                    let output = stream.join().map_err(|_| anyhow!("a stream's thread panicked"))??;
                    Ok((side.title, output.split_whitespace().next().unwrap_or_default().to_owned()))
                })
                .collect::<anyhow::Result<Vec<_>>>()
        })?;
        for (title, digest) in &digests {
            quote(&format!("{title}: sha256 of {STREAM_BYTES} bytes received {digest}"));
            ensure!(*digest == expected, "the {title} stream is not what was sent ({expected})");
        }
        settle(|| {
            let now = self.agents()?;
            ensure!(now.iter().all(|agent| !before.contains(agent)), "an agent has not been started again");
            Ok(())
        })?;
        Ok("every byte arrived, new connections were served, and the agents run again".to_owned())
    }

    fn agents(&self) -> anyhow::Result<Vec<super::process::Recorded>> {
        self.topology.node_names().iter().map(|node| shell::agent_process(node)).collect()
    }

    fn without_api(&self) -> anyhow::Result<String> {
        say("weft lab stop-api");
        shell::stop_api()?;
        for side in &self.sides {
            let counts = tally(&in_pod("toolbox", &many(side.curl, NAME, 30))?)?;
            let answers: usize = counts.values().sum();
            ensure!(answers == 30, "{answers} of 30 answers over {}", side.title);
        }
        Ok("names resolve and Services answer".to_owned())
    }

    /// The last node goes through a power cycle; nobody can tell it anything but its own disk.
    fn reboot(&self) -> anyhow::Result<String> {
        let node = format!("node{}", self.topology.nodes);
        let pod = format!("echo-{}", self.topology.nodes);
        say(&format!("weft lab reboot {node}"));
        let before = shell::find_pod(&pod)?.record.addresses;
        let begin = Instant::now();
        lifecycle::reboot(&node)?;
        for side in &self.sides {
            settle(|| {
                let found = shell::find_pod(&pod)?;
                let url = format!("http://{}:8080/hostname", host(side.pick(&found.record.addresses)?));
                let answer = in_pod_quietly("toolbox", &format!("curl -sS -g -m 2 {url}"))?;
                ensure!(answer == pod, "{url} answers {answer:?}");
                Ok(())
            })
            .with_context(|| format!("{pod} from node1 over {}", side.title))?;
            let look_up = format!("getent {} {NAME}", side.getent);
            settle(|| in_pod_quietly(&pod, &look_up).map(drop)).with_context(|| format!("DNS on {node}"))?;
        }
        let back = begin.elapsed().as_secs_f64();
        let after = shell::find_pod(&pod)?.record.addresses;
        if before != after {
            // As in any cluster: who has not heard of the new address cannot use it.
            return Ok(format!(
                "{back:.1} s after power-off its pod answers across nodes, at {}",
                after.join(" ")
            ));
        }
        for side in &self.sides {
            in_pod(&pod, &format!("getent {} {NAME}", side.getent))?;
            let counts = tally(&in_pod(&pod, &many(side.curl, NAME, 30))?)?;
            let answers: usize = counts.values().sum();
            ensure!(answers == 30, "{answers} of 30 answers over {} from {pod}", side.title);
        }
        Ok(format!("{back:.1} s after power-off its pod answers across nodes, with DNS and Services"))
    }

    fn api_back(&self) -> anyhow::Result<String> {
        say("weft lab start-api");
        shell::start_api()?;
        say("kubectl get nodes,pods -o wide");
        settle(|| {
            api::ask(async |client| {
                let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
                let ready = nodes.iter().filter(|node| lifecycle::is_ready(node)).count();
                ensure!(ready == usize::from(self.topology.nodes), "{ready} nodes are Ready");
                let pods = Api::<Pod>::namespaced(client, "default").list(&ListParams::default()).await?;
                for found in tour_pods()? {
                    let name = found.record.pod.name_any();
                    let known = pods.iter().find(|pod| pod.name_any() == name).context("a pod is missing")?;
                    let ips =
                        known.status.as_ref().and_then(|status| status.pod_ips.clone()).unwrap_or_default();
                    let ips: Vec<String> = ips.into_iter().map(|one| one.ip).collect();
                    ensure!(
                        ips == found.record.addresses,
                        "{name} has {:?}, not {ips:?}",
                        found.record.addresses
                    );
                }
                Ok(())
            })
        })?;
        for node in self.topology.node_names() {
            settle(|| {
                let text = shell::output_on_machine(&node, &["weft", "status", "-o", "json"])?;
                let status: serde_json::Value =
                    serde_json::from_str(&text).context("the status of an agent")?;
                let api = status["api_server"].as_str().unwrap_or_default();
                ensure!(api.starts_with("connected"), "the agent of {node} says of the API server: {api}");
                Ok(())
            })?;
        }
        for side in &self.sides {
            settle(|| {
                let counts = tally(&in_pod_quietly("toolbox", &many(side.curl, NAME, 40))?)?;
                ensure!(counts.len() == usize::from(self.topology.nodes), "{counts:?} over {}", side.title);
                Ok(())
            })?;
            in_pod("toolbox", &many(side.curl, NAME, 40))?;
        }
        Ok("every node Ready, every agent connected, every pod known with its addresses and answering"
            .to_owned())
    }
}

impl Side {
    /// The address of this family.
    fn pick(self, addresses: &[String]) -> anyhow::Result<&str> {
        let found = addresses.iter().find(|address| address.contains(':') == self.ipv6);
        found.map(String::as_str).with_context(|| format!("no {} address in {addresses:?}", self.title))
    }
}

/// An address as URLs write it.
fn host(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

fn say(command: &str) {
    say!("   $ {command}");
}

fn quote(text: &str) {
    for line in text.lines() {
        say!("     {}", line.trim_end());
    }
}

/// Runs a shell line in a pod, shown as the command a person would type.
fn in_pod(pod: &str, line: &str) -> anyhow::Result<String> {
    say(&format!("weft lab sh {pod} -- bash -c \"{line}\""));
    let output = in_pod_quietly(pod, line)?;
    quote(&output);
    Ok(output)
}

fn in_pod_quietly(pod: &str, line: &str) -> anyhow::Result<String> {
    shell::output_in_pod(pod, &["bash", "-o", "pipefail", "-c", line])
}

/// Tries until it holds; the last failure when it never does.
fn settle(mut check: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        match check() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Many requests, each over a connection of its own, counted by the pod that answered.
fn many(curl: &str, name: &str, requests: usize) -> String {
    format!("curl -sS {curl} -m 30 -w '\\n' 'http://{name}/hostname?[1-{requests}]' | sort | uniq -c")
}

/// The lines of `uniq -c`.
fn tally(output: &str) -> anyhow::Result<BTreeMap<String, usize>> {
    let line = |line: &str| -> anyhow::Result<(String, usize)> {
        let (count, name) =
            line.trim().split_once(' ').with_context(|| format!("{line:?} is not a count"))?;
        Ok((name.to_owned(), count.parse().with_context(|| format!("{line:?} is not a count"))?))
    };
    output.lines().map(line).collect()
}

fn stream_command(
    side: &Side,
    addresses: &[String],
) -> anyhow::Result<impl FnOnce() -> anyhow::Result<String> + Send + use<>> {
    let url = format!(
        "http://{}/stream?bytes={STREAM_BYTES}&seconds={STREAM_SECONDS}",
        host(side.pick(addresses)?)
    );
    let line = format!("curl -sS -g -m 30 '{url}' | sha256sum");
    say(&format!("weft lab sh toolbox -- bash -c \"{line}\" &"));
    Ok(move || in_pod_quietly("toolbox", &line))
}

/// SHA-256 of the stream as it must arrive, in hexadecimal.
fn digest() -> String {
    let digest = Sha256::digest(netexec::stream_content(0, STREAM_BYTES));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn echo_names(topology: &Topology) -> impl Iterator<Item = String> {
    (1..=topology.nodes).map(|index| format!("echo-{index}"))
}

/// Running pods of the tour.
fn tour_pods() -> anyhow::Result<Vec<FoundPod>> {
    let is_ours = |name: &str| name == "toolbox" || name.starts_with("echo-");
    let mut pods = shell::all_pods()?;
    pods.retain(|pod| pod.record.phase == "Running" && is_ours(&pod.record.pod.name_any()));
    Ok(pods)
}

fn echo_pods() -> anyhow::Result<Vec<FoundPod>> {
    let mut pods = tour_pods()?;
    pods.retain(|pod| pod.record.pod.name_any() != "toolbox");
    Ok(pods)
}

fn cluster_ips() -> anyhow::Result<Vec<String>> {
    api::ask(async |client| {
        let service =
            Api::<Service>::namespaced(client, "default").get("echo").await.context("get Service echo")?;
        service.spec.and_then(|spec| spec.cluster_ips).context("Service echo has no ClusterIP")
    })
}

fn manifest(topology: &Topology) -> String {
    let policy = if topology.family == Family::Dual { "RequireDualStack" } else { "SingleStack" };
    let nodes = topology.nodes;
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: echo, namespace: default}}
spec:
  ipFamilyPolicy: {policy}
  selector: {{app: echo}}
  ports:
  - {{name: http, port: 80, targetPort: 8080, protocol: TCP}}
  - {{name: udp, port: 80, targetPort: 8080, protocol: UDP}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: echo, namespace: default}}
spec:
  replicas: {nodes}
  selector: {{matchLabels: {{app: echo}}}}
  template:
    metadata: {{labels: {{app: echo}}}}
    spec:
      containers:
      - {{name: server, image: weft.network/netexec, ports: [{{containerPort: 8080}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: toolbox, namespace: default, labels: {{app: toolbox}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node1}}
  containers:
  - {{name: server, image: weft.network/netexec}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tours_manifest_puts_one_echo_pod_on_every_node() {
        let topology = Topology { family: Family::Dual, nodes: 3, loopback_port: 1 };
        let documents = expand::parse(&manifest(&topology)).unwrap();
        let kinds: Vec<&str> = documents.iter().map(|document| document["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["Service", "Deployment", "Pod"]);
        assert_eq!(documents[0]["spec"]["ipFamilyPolicy"], "RequireDualStack");
        assert_eq!(documents[1]["spec"]["replicas"], 3);
    }

    #[test]
    fn the_lines_of_uniq_are_counted_and_others_refused() {
        let counts = tally("     12 echo-1\n      8 echo-2\n").unwrap();
        assert_eq!(counts, BTreeMap::from([("echo-1".to_owned(), 12), ("echo-2".to_owned(), 8)]));
        assert!(tally("nonsense").is_err());
    }
}
