//! The running cluster, as an administrator sees it: kubectl, the nodes' shells, the host outside, and the power switch. All
//! through the scripts of `tests/cluster`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// Where the fixtures live.
pub(crate) const NAMESPACE: &str = "suite";
/// A busy machine starts a pod in this time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// As long as the kubelet waits at most before it starts a container again, which several reboots in a row made end.
const BACK_OFF: Duration = Duration::from_secs(300);
const FIXTURES: &str = include_str!("fixtures.yaml");

pub(crate) struct Cluster {
    scripts: PathBuf,
    /// Keys, logs and binaries of the cluster while it is up (`lib.sh`).
    pub(crate) run_folder: PathBuf,
}

/// The pods of a DaemonSet by node, with what the API says of them.
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) node: String,
    /// IPv4 first.
    pub(crate) addresses: Vec<String>,
}

impl Cluster {
    /// Applies the fixtures and waits until all of them are Ready.
    pub(crate) fn prepare() -> anyhow::Result<Self> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster");
        let name = std::env::var("WEFT_CLUSTER").unwrap_or_else(|_| "weft-cluster".to_owned());
        let run_folder = Path::new("/run").join(name);
        ensure!(run_folder.exists(), "no cluster is up: run 'make cluster' first");
        let cluster = Self { scripts, run_folder };
        cluster.within(PATIENCE, "the default ServiceAccount's ConfigMap", || {
            cluster.kubectl(&["-n", "default", "get", "configmap", "kube-root-ca.crt"]).map(drop)
        })?;
        cluster.apply(FIXTURES)?;
        for name in ["daemonset/echo", "daemonset/host", "daemonset/tools", "deployment/web"] {
            cluster.kubectl(&["rollout", "status", name, "--timeout=120s"])?;
        }
        cluster.kubectl(&["wait", "--for=condition=Ready", "pod/steady", "--timeout=120s"])?;
        Ok(cluster)
    }

    pub(crate) fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.scripts.join(name));
        command.stdin(Stdio::null());
        command
    }

    /// Standard output of kubectl in the suite's namespace; an error carries what it said.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        said(self.script("kubectl").args(["--namespace", NAMESPACE]).args(arguments))
    }

    pub(crate) fn object(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut words = vec!["get", "-o", "json"];
        words.extend(arguments);
        serde_json::from_str(&self.kubectl(&words)?).context("kubectl's JSON")
    }

    pub(crate) fn apply(&self, manifest: &str) -> anyhow::Result<String> {
        self.feed(&["apply", "-f", "-"], manifest)
    }

    pub(crate) fn delete(&self, manifest: &str) -> anyhow::Result<String> {
        self.feed(&["delete", "--ignore-not-found", "--wait=true", "--grace-period=1", "-f", "-"], manifest)
    }

    /// For objects that name another namespace themselves.
    pub(crate) fn apply_elsewhere(&self, manifest: &str) -> anyhow::Result<String> {
        feed(self.script("kubectl").args(["apply", "-f", "-"]), manifest)
    }

    pub(crate) fn delete_elsewhere(&self, manifest: &str) -> anyhow::Result<String> {
        feed(self.script("kubectl").args(["delete", "--ignore-not-found", "-f", "-"]), manifest)
    }

    fn feed(&self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        feed(self.script("kubectl").args(["--namespace", NAMESPACE]).args(arguments), input)
    }

    /// Runs a shell line in a pod.
    pub(crate) fn in_pod(&self, pod: &str, line: &str) -> anyhow::Result<String> {
        self.kubectl(&["exec", pod, "--", "bash", "-c", line])
    }

    /// Runs a shell line on a node, on `lan` or on `client`.
    pub(crate) fn on(&self, machine: &str, line: &str) -> anyhow::Result<String> {
        said(self.script("exec").args([machine, "bash", "-c", line]))
    }

    pub(crate) fn power(&self, verb: &str, node: &str) -> anyhow::Result<()> {
        said(self.script("power").args([verb, node])).map(drop)
    }

    pub(crate) fn control_plane(&self, verb: &str, part: &str) -> anyhow::Result<()> {
        said(self.script("control-plane").args([verb, part])).map(drop)
    }

    /// Pods with label `app`, in the order of their nodes.
    pub(crate) fn pods(&self, app: &str) -> anyhow::Result<Vec<Pod>> {
        let list = self.object(&["pods", "-l", &format!("app={app}")])?;
        let items = list["items"].as_array().context("a list of pods")?;
        let mut pods: Vec<Pod> = items.iter().map(pod).collect();
        pods.sort_by(|a, b| (&a.node, &a.name).cmp(&(&b.node, &b.name)));
        ensure!(!pods.is_empty(), "no pods with app={app}");
        Ok(pods)
    }

    /// The pod of app `app` on `node`.
    pub(crate) fn pod_on(&self, app: &str, node: &str) -> anyhow::Result<Pod> {
        let found = self.pods(app)?.into_iter().find(|pod| pod.node == node);
        found.with_context(|| format!("no pod of {app} on {node}"))
    }

    /// ClusterIPs of a Service, IPv4 first.
    pub(crate) fn cluster_ips(&self, service: &str) -> anyhow::Result<Vec<String>> {
        let object = self.object(&["service", service])?;
        let mut ips = strings(&object["spec"]["clusterIPs"]);
        ips.sort_by_key(|ip| ip.contains(':'));
        Ok(ips)
    }

    pub(crate) fn node_addresses(node: &str) -> [String; 2] {
        let number = node.trim_start_matches("node");
        [format!("172.30.98.1{number}"), format!("fd00:30:98::1{number}")]
    }

    pub(crate) fn nodes_ready(&self) -> anyhow::Result<()> {
        self.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=90s"]).map(drop)
    }

    /// Waits until the fixtures of a node that was away are back, reachable across nodes, and named by every node's resolver.
    pub(crate) fn node_is_back(&self, node: &str) -> anyhow::Result<()> {
        self.within(PATIENCE, "nodes Ready", || self.nodes_ready())?;
        self.within(BACK_OFF + PATIENCE, "the pods of the node", || {
            let echo = self.pod_on("echo", node)?;
            ensure!(echo.addresses.len() == 2, "{} has {:?}", echo.name, echo.addresses);
            for client in self.pods("tools")? {
                let named =
                    self.in_pod(&client.name, "dig +short echo-headless.suite.svc.cluster.local A")?;
                ensure!(named.contains(&echo.addresses[0]), "{} is told {named}", client.name);
                for address in &echo.addresses {
                    let line = format!("curl -sS -m 2 'http://{}:8080/hostname'", in_url(address));
                    ensure!(self.in_pod(&client.name, &line)?.trim() == echo.name, "{address}");
                }
                let said = self.in_pod(&client.name, "curl -sS -m 3 http://steady/hostname")?;
                ensure!(said.trim() == "steady", "{said}");
            }
            Ok(())
        })
    }

    /// `weft status -o json` of a node.
    pub(crate) fn status(&self, node: &str) -> anyhow::Result<Value> {
        serde_json::from_str(&self.on(node, "weft status -o json")?).context("the status is JSON")
    }

    /// Tries until it succeeds; the error is that of the last try.
    pub(crate) fn within<T>(
        &self,
        limit: Duration,
        what: &str,
        mut attempt: impl FnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let started_at = Instant::now();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(error) if started_at.elapsed() > limit => {
                    return Err(error.context(format!("not within {} s: {what}", limit.as_secs())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }
}

/// All at once, as most of the time of a check of what is denied is waiting; the first failure.
pub(crate) fn at_once<T: Sync>(
    items: &[T],
    check: impl Fn(&T) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let running: Vec<_> = items.iter().map(|item| scope.spawn(|| check(item))).collect();
        running
            .into_iter()
            .try_for_each(|check| check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn pod(object: &Value) -> Pod {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let ips = object["status"]["podIPs"].as_array().cloned().unwrap_or_default();
    let mut addresses: Vec<String> = ips.iter().map(|entry| text(&entry["ip"])).collect();
    addresses.sort_by_key(|address| address.contains(':'));
    Pod { name: text(&object["metadata"]["name"]), node: text(&object["spec"]["nodeName"]), addresses }
}

pub(crate) fn strings(value: &Value) -> Vec<String> {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

/// An address as it stands in a URL.
pub(crate) fn in_url(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// The shell line that sends one datagram and prints the answer.
pub(crate) fn ask_by_udp(address: &str, port: u16, word: &str) -> String {
    format!("exec 3<>/dev/udp/{address}/{port}; echo {word} >&3; timeout 2 dd bs=512 count=1 <&3 2>/dev/null")
}

/// What a command prints; it must succeed.
pub(crate) fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    checked(command, output)
}

fn feed(command: &mut Command, input: &str) -> anyhow::Result<String> {
    use std::io::Write as _;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("run kubectl")?;
    child.stdin.take().context("kubectl's input")?.write_all(input.as_bytes())?;
    checked(command, child.wait_with_output()?)
}

fn checked(command: &Command, output: Output) -> anyhow::Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {} {}", words.join(" "), stdout.trim(), stderr.trim());
    }
    Ok(stdout)
}
