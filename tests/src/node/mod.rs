//! One node in namespaces of its own: the embedded API server, the tunnel and the agent as real processes.
//!
//! ```text
//!  #[test] -> inside(body) -> unshare (network, mounts, pids) -> the same test executable, this test only -> body
//!  body -> Node: links, `weft server`, a Node object -> `weft tunnel`, `weft agent`, `weft cni`, `weft status`
//! ```
//!
//! Everything that a test does happens in those namespaces: the machine sees nothing of it, and the end of the inner
//! process ends all others. Every function panics when what it promises does not come true.

mod api;
mod inside;
pub mod picture;
mod process;
mod query;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

pub use api::Api;
pub use inside::inside;
pub use process::Process;
pub use query::{dig, dns_answers};

/// Name of the Node object.
pub const NODE: &str = "n1";
pub const UPLINK: &str = "up0";
pub const UPLINK_ADDRESSES: [&str; 2] = ["172.31.0.1", "fd00:31::1"];
/// The cluster's DNS, IPv4 first.
pub const DNS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
const API: [&str; 2] = ["172.31.0.1:6443", "[fd00:31::1]:6443"];
const TOKEN: &str = "an-agent-bound-to-n1";
const CIDRS: [&str; 4] =
    ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56", "--service-cidr", "10.96.0.0/16,fd00:10:96::/112"];
/// The longest that anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The node and its processes; they end with it.
pub struct Node {
    weft: PathBuf,
    folder: tempfile::TempDir,
    api: Option<Api>,
    server: Option<Process>,
    tunnel: Option<Process>,
    agent: Option<Process>,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// Links and folders; no process of ours yet.
    pub fn new() -> Self {
        ip("link set lo up");
        ip(&format!("link add {UPLINK} type veth peer name up1"));
        for link in [UPLINK, "up1"] {
            // Addresses are whole at once, so that pictures differ only by what we do.
            write(Path::new(&format!("/proc/sys/net/ipv6/conf/{link}/accept_dad")), "0");
        }
        ip(&format!("addr add {}/24 dev {UPLINK}", UPLINK_ADDRESSES[0]));
        ip(&format!("addr add {}/64 dev {UPLINK} nodad", UPLINK_ADDRESSES[1]));
        ip(&format!("link set {UPLINK} up"));
        ip("link set up1 up");
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        std::fs::create_dir_all("/run/netns").expect("make /run/netns");
        run(Command::new("mount").args(["-t", "tmpfs", "none", "/run/netns"]));
        // Nothing outside this namespace answers; the names of the cluster need no resolver.
        write(&folder.path().join("resolv.conf"), "nameserver 172.31.0.53\n");
        let line = format!("{TOKEN},system:serviceaccount:weft-system:weft-agent,weft.network:node:{NODE}\n");
        write(&folder.path().join("tokens"), &line);
        write(&folder.path().join("token"), TOKEN);
        Self { weft: binary(), folder, api: None, server: None, tunnel: None, agent: None }
    }

    /// The whole: the API server with the Node object, the tunnel and the agent, ready for pods.
    pub fn running() -> Self {
        let mut node = Self::new();
        node.start_server();
        node.make_node_object();
        node.start_agent();
        node.start_tunnel();
        node.await_ready();
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn weft(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.weft);
        command.arg(subcommand);
        command
    }

    pub fn start_server(&mut self) {
        self.start_server_with(&CIDRS);
    }

    /// With pod ranges that the first Node takes whole.
    pub fn start_server_with_ranges_for_one_node(&mut self) {
        self.start_server_with(&[CIDRS[0], "10.244.0.0/24,fd00:10:244::/64", CIDRS[2], CIDRS[3]]);
    }

    /// Where a node has tens of thousands of addresses of each family.
    pub fn start_server_with_large_nodes(&mut self) {
        self.start_server_with(&[&CIDRS[..], &["--node-cidr-mask-size-ipv4", "17"]].concat());
    }

    /// With ranges of ClusterIPs other than the agent's.
    pub fn start_server_with_service_range(&mut self, range: &str) {
        self.start_server_with(&[CIDRS[0], CIDRS[1], CIDRS[2], range]);
    }

    fn start_server_with(&mut self, ranges: &[&str]) {
        let mut command = self.weft("server");
        for (listen, address) in API.iter().zip(UPLINK_ADDRESSES) {
            command.args(["--listen", listen, "--advertise-address", address]);
        }
        command.args(ranges);
        command.arg("--data-dir").arg(self.path("server")).arg("--token-file").arg(self.path("tokens"));
        command.arg("--kubeconfig-out").arg(self.path("kubeconfig"));
        self.server = Some(Process::start("server", &mut command, self.folder.path()));
        self.api = Some(Api::connect(&self.path("kubeconfig")));
    }

    pub fn stop_server(&mut self) {
        self.server.take().expect("a server runs").end(Signal::SIGTERM);
        self.api = None;
    }

    /// The API server's objects, as an administrator.
    pub fn api(&self) -> &Api {
        self.api.as_ref().expect("a server runs")
    }

    pub fn make_node_object(&self) {
        self.api().create("/api/v1/nodes", &json!({"metadata": {"name": NODE}}));
        let addresses = UPLINK_ADDRESSES.map(|address| json!({"type": "InternalIP", "address": address}));
        self.api().merge_status("/api/v1/nodes", NODE, &json!({"status": {"addresses": addresses}}));
    }

    /// The agent's command line, with a token that is bound to this node.
    pub fn agent_command(&self) -> Command {
        let mut command = self.weft("agent");
        command.args(["--node-name", NODE, "--cluster-dns", &DNS.join(",")]).args(CIDRS);
        command
            .args(["--api-server", &format!("https://{}", API[0]), "--token-file"])
            .arg(self.path("token"));
        command.arg("--ca-file").arg(self.path("server/ca.crt"));
        command.arg("--resolv-conf").arg(self.path("resolv.conf"));
        command.arg("--cni-conf-dir").arg(self.path("cni")).arg("--cni-bin-dir").arg(self.path("bin"));
        self.with_folders(command)
    }

    fn with_folders(&self, mut command: Command) -> Command {
        command.arg("--run-dir").arg(self.path("run")).arg("--state-dir").arg(self.path("state"));
        command
    }

    pub fn start_agent(&mut self) {
        let mut command = self.agent_command();
        self.start_agent_with(&mut command);
    }

    pub fn start_agent_with(&mut self, command: &mut Command) {
        self.agent = Some(Process::start("agent", command, self.folder.path()));
    }

    /// The tunnel; it needs the private key that the agent makes.
    pub fn start_tunnel(&mut self) {
        let key = self.path("state/wireguard.key");
        until("the private key", || key.exists());
        self.tunnel = Some(Process::start("tunnel", &mut self.tunnel_command(), self.folder.path()));
    }

    pub fn tunnel_command(&self) -> Command {
        self.with_folders(self.weft("tunnel"))
    }

    pub fn stop_tunnel(&mut self) {
        self.end_tunnel(Signal::SIGTERM);
    }

    pub fn end_tunnel(&mut self, signal: Signal) {
        self.tunnel.take().expect("a tunnel runs").end(signal);
    }

    pub fn tunnel_has_ended(&mut self) -> bool {
        self.tunnel.as_mut().expect("a tunnel was started").has_ended()
    }

    pub fn agent(&self) -> &Process {
        self.agent.as_ref().expect("an agent runs")
    }

    pub fn end_agent(&mut self, signal: Signal) {
        self.agent.take().expect("an agent runs").end(signal);
    }

    /// What the agent of any start so far said on standard error.
    pub fn agent_log(&self) -> String {
        std::fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// `weft status -o json`; `None` while no agent answers.
    pub fn try_status(&self) -> Option<Value> {
        let output = self.weft("status").args(["-o", "json", "--run-dir"]).arg(self.path("run")).output();
        serde_json::from_slice(&output.ok()?.stdout).ok()
    }

    pub fn status(&self) -> Value {
        self.try_status().expect("an agent answers")
    }

    /// Every loop has applied and pods may come.
    pub fn await_ready(&self) {
        let ready = || self.try_status().is_some_and(|status| status["ready"] == true);
        if !holds_within(PATIENCE, || ready() && self.path("cni/05-weft.conflist").exists()) {
            panic!("the agent did not become ready: {:#}", self.try_status().unwrap_or_default());
        }
    }

    /// Failures of the last pass of a loop, in one text; empty after a clean pass.
    pub fn failures(&self, name: &str) -> String {
        let status = self.try_status().unwrap_or_default();
        let loops = status["loops"].as_array().cloned().unwrap_or_default();
        let found = loops.iter().find(|report| report["name"] == name).expect("a loop of that name");
        found["failures"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join("; ")
    }

    /// Problems of every loop and of the objects that could not be read, a line each.
    pub fn problems(&self) -> Vec<String> {
        let status = self.status();
        let of_loops = status["loops"].as_array().into_iter().flatten();
        let of_loops = of_loops.filter_map(|report| report["problems"].as_array()).flatten();
        let objects = status["problems"].as_array().into_iter().flatten();
        of_loops.chain(objects).map(ToString::to_string).collect()
    }

    /// Pods can come; a loop that pods do not need may fail.
    pub fn await_conflist(&self) {
        let conflist = self.path("cni/05-weft.conflist");
        until("the CNI configuration", || conflist.exists());
    }

    /// `weft cleanup` with this node's folders.
    pub fn cleanup_command(&self) -> Command {
        let mut command = self.with_folders(self.weft("cleanup"));
        command.arg("--cni-conf-dir").arg(self.path("cni")).arg("--cni-bin-dir").arg(self.path("bin"));
        command
    }

    /// The installed plugin.
    pub fn plugin(&self) -> Plugin {
        Plugin { folder: self.folder.path().to_owned() }
    }

    /// Runs the installed plugin as a container runtime does (CNI specification, section 2); the configuration is
    /// the agent's conflist, as it is or would be, with `version`. An empty `netns` is not passed on.
    pub fn cni(&self, verb: &str, version: &str, pod: &str, netns: &str, previous: Option<&Value>) -> Cni {
        let plugin = self.plugin();
        let mut config = plugin.config(version);
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        plugin.call(&mut plugin.command(verb, pod, &format!("u-{pod}"), netns), &config)
    }

    /// The same of a pod that the API server has, by its uid; in the namespace that bears its name.
    pub fn cni_of(&self, verb: &str, pod: &str, uid: &str) -> Cni {
        let plugin = self.plugin();
        plugin.call(&mut plugin.command(verb, pod, uid, &netns(pod)), &plugin.config("1.0.0"))
    }

    /// Makes a namespace and attaches it; its result.
    pub fn add_pod(&self, pod: &str) -> Value {
        ip(&format!("netns add {pod}"));
        self.cni("ADD", "1.0.0", pod, &netns(pod), None).succeeded()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // Debian's nft must list whatever a test made: some versions abort on what the kernel accepts.
            run(Command::new("nft").args(["list", "ruleset"]));
            run(Command::new("nft").args(["-j", "list", "ruleset"]));
            return;
        }
        for name in ["server", "tunnel", "agent"] {
            let log = std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            eprintln!("---- end of {name}.log\n{}", tail.join("\n"));
        }
    }
}

/// The plugin and its configuration, as a container runtime finds them.
#[derive(Clone)]
pub struct Plugin {
    /// Of the node.
    folder: PathBuf,
}

impl Plugin {
    /// The agent's conflist, as it is or would be, for one plugin.
    pub fn config(&self, version: &str) -> Value {
        let text = std::fs::read_to_string(self.folder.join("cni/05-weft.conflist"));
        let socket = self.folder.join("run/agent.sock");
        let text = text.unwrap_or_else(|_| weft_netstack::cni::conflist::render(&socket));
        let list: Value = serde_json::from_str(&text).expect("a conflist is JSON");
        let mut config = list["plugins"][0].clone();
        config["name"] = list["name"].clone();
        config["cniVersion"] = version.into();
        config
    }

    /// The container bears the pod's name. An empty `netns` is not passed on.
    pub fn command(&self, verb: &str, pod: &str, uid: &str, netns: &str) -> Command {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID={uid}");
        let mut command = Command::new(self.folder.join("bin/weft"));
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", pod).env("CNI_IFNAME", "eth0");
        command.env("CNI_PATH", self.folder.join("bin")).env("CNI_ARGS", args);
        if !netns.is_empty() {
            command.env("CNI_NETNS", netns);
        }
        command
    }

    pub fn call(&self, command: &mut Command, config: &Value) -> Cni {
        Cni::of(&process::with_input(command, &config.to_string()))
    }

    /// The same, ended by SIGKILL after this time. `None` when that came before its end.
    pub fn call_for(&self, time: Duration, command: &mut Command, config: &Value) -> Option<Cni> {
        let output = process::with_input_for(Some(time), command, &config.to_string());
        output.status.code().map(|_| Cni::of(&output))
    }
}

/// Where `ip netns add` puts a pod.
pub fn netns(pod: &str) -> String {
    format!("/run/netns/{pod}")
}

/// What the plugin printed, and whether it failed.
#[derive(Debug)]
pub struct Cni {
    pub failed: bool,
    pub printed: Value,
}

impl Cni {
    fn of(output: &Output) -> Self {
        let printed = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text).expect("the plugin prints JSON"),
        };
        Self { failed: !output.status.success(), printed }
    }

    pub fn succeeded(self) -> Value {
        assert!(!self.failed, "the plugin failed: {:#}", self.printed);
        self.printed
    }
}

/// Addresses of a CNI result without their prefix lengths, IPv4 first.
pub fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    ips.iter().filter_map(|ip| ip["address"].as_str()?.split('/').next()).map(str::to_owned).collect()
}

/// `WEFT_BIN`, else the binary beside the folder of the test executable.
pub fn binary() -> PathBuf {
    if let Some(given) = std::env::var_os("WEFT_BIN") {
        return std::fs::canonicalize(&given).unwrap_or_else(|error| panic!("WEFT_BIN {given:?}: {error}"));
    }
    let own = std::env::current_exe().expect("the running executable");
    let weft = own.parent().and_then(Path::parent).map(|folder| folder.join("weft")).expect("a build folder");
    assert!(weft.exists(), "{} is missing; 'make debug' builds it", weft.display());
    weft
}

/// `ip ARGS`, words separated by one space.
pub fn ip(args: &str) -> String {
    run(Command::new("ip").args(args.split(' ')))
}

/// Standard output of a command that must succeed.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit code and standard error of a command that ends by itself.
pub fn refusal(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).trim_end().to_owned())
}

pub fn write(path: &Path, text: impl AsRef<[u8]>) {
    std::fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Waits until `condition` holds; panics with `what` when it does not in time.
pub fn until(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(PATIENCE, condition), "waited {PATIENCE:?} for {what}");
}

pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
