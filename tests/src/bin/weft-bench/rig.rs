//! One node for a benchmark: the embedded API server, the tunnel and the agent in the namespaces of this process.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kube::api::{Api, Patch, PatchParams, PostParams};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup};
use serde_json::json;

pub(crate) const NODE: &str = "bench";
const UPLINK_V4: &str = "172.31.0.1/24";
const UPLINK_V6: &str = "fd00:31::1/64";
const API: &str = "172.31.0.1:6443";
pub(crate) const CIDRS: [&str; 4] =
    ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56", "--service-cidr", "10.96.0.0/16,fd00:10:96::/112"];
pub(crate) const CLUSTER_DNS: &str = "10.96.0.10,fd00:10:96::a";

pub(crate) struct Rig {
    weft: PathBuf,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) client: kube::Client,
    pub(crate) runtime: tokio::runtime::Runtime,
    children: Vec<(&'static str, Child)>,
    /// What a service manager keeps between two agents.
    kept: Vec<OwnedFd>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        for (name, child) in &mut self.children {
            if std::thread::panicking() || std::env::var_os("WEFT_BENCH_LOGS").is_some() {
                let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")));
                eprintln!("--- {name}\n{}", log.unwrap_or_default());
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Rig {
    /// Links, the API server and the Node; no agent yet.
    pub(crate) fn start(weft: &Path) -> anyhow::Result<Self> {
        ip("link set lo up")?;
        ip("link add up0 type veth peer name up1")?;
        ip(&format!("addr add {UPLINK_V4} dev up0"))?;
        ip(&format!("addr add {UPLINK_V6} dev up0 nodad"))?;
        ip("link set up0 up")?;
        ip("link set up1 up")?;
        let folder = tempfile::tempdir()?;
        let server = Command::new(weft)
            .args(["server", "--listen", API, "--advertise-address", "172.31.0.1"])
            // Hundreds of pods, and the addresses of those that ended rest.
            .args(["--node-cidr-mask-size-ipv4", "22"])
            .args(CIDRS)
            .arg("--data-dir")
            .arg(folder.path().join("server"))
            .arg("--kubeconfig-out")
            .arg(folder.path().join("kubeconfig"))
            .stderr(log(folder.path(), "server")?)
            .spawn()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(connect(&folder.path().join("kubeconfig")))?;
        let rig = Self {
            weft: weft.to_owned(),
            folder,
            client,
            runtime,
            children: vec![("server", server)],
            kept: vec![],
        };
        rig.runtime.block_on(make_node(&rig.client))?;
        Ok(rig)
    }

    /// The tunnel and the agent; returns the instant before the agent was started.
    pub(crate) fn start_agent(&mut self) -> anyhow::Result<Instant> {
        self.start_agent_with(&[])
    }

    /// With further flags for the agent.
    pub(crate) fn start_agent_with(&mut self, flags: &[&str]) -> anyhow::Result<Instant> {
        let folder = self.folder.path().to_owned();
        let started_at = self.start_agent_alone(flags)?;
        until("the private key", || folder.join("state/wireguard.key").exists())?;
        let mut tunnel = Command::new(&self.weft);
        tunnel.arg("tunnel").arg("--run-dir").arg(folder.join("run"));
        tunnel.arg("--state-dir").arg(folder.join("state"));
        self.children.push(("tunnel", tunnel.stderr(log(&folder, "tunnel")?).spawn()?));
        Ok(started_at)
    }

    /// The agent, beside a tunnel that runs; returns the instant before.
    pub(crate) fn start_agent_alone(&mut self, flags: &[&str]) -> anyhow::Result<Instant> {
        let folder = self.folder.path().to_owned();
        let mut agent = self.program();
        agent.args(["agent", "--node-name", NODE, "--cluster-dns", CLUSTER_DNS]).args(CIDRS).args(flags);
        agent.arg("--kubeconfig").arg(folder.join("kubeconfig"));
        agent.arg("--cni-conf-dir").arg(folder.join("cni")).arg("--cni-bin-dir").arg(folder.join("bin"));
        agent.arg("--run-dir").arg(folder.join("run")).arg("--state-dir").arg(folder.join("state"));
        let started_at = Instant::now();
        self.children.push(("agent", agent.stderr(log(&folder, "agent")?).spawn()?));
        Ok(started_at)
    }

    /// Every agent from now on gets these sockets, as a service manager keeps them from one to the next (sd_listen_fds(3)).
    pub(crate) fn keep(&mut self, sockets: &[OwnedFd]) -> anyhow::Result<()> {
        // A copy is inherited, the original is not.
        self.kept = sockets.iter().map(dup).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// The binary, with the sockets that are kept at descriptor 3 and above.
    fn program(&self) -> Command {
        if self.kept.is_empty() {
            return Command::new(&self.weft);
        }
        let aside =
            self.kept.iter().enumerate().map(|(n, fd)| format!("exec {{s{n}}}<&{}; ", fd.as_raw_fd()));
        let in_place = (0..self.kept.len()).map(|n| format!("exec {}<&$s{n}; ", n + 3));
        let moved: String = aside.chain(in_place).collect();
        let script = format!("{moved}LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\"", self.kept.len());
        let mut shell = Command::new("bash");
        shell.args(["-c", &script, "bash"]).arg(&self.weft);
        shell
    }

    /// Ends the agent with SIGKILL; the tunnel goes on.
    pub(crate) fn kill_agent(&mut self) -> anyhow::Result<()> {
        for (_, child) in self.children.iter_mut().filter(|(name, _)| *name == "agent") {
            child.kill()?;
            child.wait()?;
        }
        self.children.retain(|(name, _)| *name != "agent");
        Ok(())
    }

    /// Ends the agent as a service manager does; what it made in the kernel stays, and so does the tunnel.
    pub(crate) fn stop_agent(&mut self) -> anyhow::Result<()> {
        for (_, child) in self.children.iter_mut().filter(|(name, _)| *name == "agent") {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
            child.wait()?;
        }
        self.children.retain(|(name, _)| *name != "agent");
        Ok(())
    }

    /// Ends the agent and its tunnel, so that others may begin.
    pub(crate) fn end_agent(&mut self) -> anyhow::Result<()> {
        for (_, child) in self.children.iter_mut().filter(|(name, _)| matches!(*name, "agent" | "tunnel")) {
            child.kill()?;
            child.wait()?;
        }
        self.children.retain(|(name, _)| !matches!(*name, "agent" | "tunnel"));
        std::fs::remove_file(self.folder.path().join("cni/05-weft.conflist"))?;
        Ok(())
    }

    pub(crate) fn await_ready(&self) -> anyhow::Result<()> {
        until("the CNI configuration", || self.folder.path().join("cni/05-weft.conflist").exists())
    }

    pub(crate) fn pid(&self, name: &str) -> anyhow::Result<u32> {
        let child = self.children.iter().rev().find(|(n, _)| *n == name);
        child.map(|(_, child)| child.id()).with_context(|| format!("{name} was not started"))
    }

    /// Resident memory of a child in MiB.
    pub(crate) fn resident_mib(&self, name: &str) -> anyhow::Result<f64> {
        resident_mib(self.pid(name)?)
    }
}

/// Resident memory of a process in MiB.
pub(crate) fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no VmRSS value")?.parse()?;
    Ok(kib / 1024.0)
}

fn log(folder: &Path, name: &str) -> anyhow::Result<Stdio> {
    Ok(std::fs::File::create(folder.join(format!("{name}.log")))?.into())
}

pub(crate) fn ip(args: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args.split(' ')).output().context("run ip (Debian's iproute2)")?;
    ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Time of a process on the CPU in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let [user, kernel] = cpu_seconds_by_mode(pid);
    user + kernel
}

/// utime and stime of a process in seconds (proc_pid_stat(5), fields 14 and 15, in clock ticks of 10 ms).
pub(crate) fn cpu_seconds_by_mode(pid: u32) -> [f64; 2] {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid)).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = after_name.split_whitespace().skip(11);
    [0; 2].map(|_| fields.next().and_then(|field| field.parse::<f64>().ok()).unwrap_or_default() / 100.0)
}

/// Polls every millisecond, for ten seconds at most.
pub(crate) fn until(what: &str, holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    until_within(Duration::from_secs(10), what, holds)
}

/// Polls every millisecond, no longer than `patience`.
pub(crate) fn until_within(
    patience: Duration,
    what: &str,
    mut holds: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !holds() {
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", patience.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

async fn connect(kubeconfig: &Path) -> anyhow::Result<kube::Client> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(config) = kube::config::Kubeconfig::read_from(kubeconfig) {
            let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
            let client = kube::Client::try_from(config)?;
            if client.apiserver_version().await.is_ok() {
                return Ok(client);
            }
        }
        ensure!(Instant::now() < deadline, "the API server did not come up");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn make_node(client: &kube::Client) -> anyhow::Result<()> {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": NODE}}))?;
    nodes.create(&PostParams::default(), &node).await?;
    let addresses = json!([
        {"type": "InternalIP", "address": "172.31.0.1"},
        {"type": "InternalIP", "address": "fd00:31::1"},
        {"type": "Hostname", "address": NODE},
    ]);
    let status = json!({"status": {"addresses": addresses}});
    nodes.patch_status(NODE, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

/// A program to measure beside. The project's script makes it outside the work tree, once, and prints where it is.
pub(crate) struct Peer {
    pub(crate) script: &'static str,
    pub(crate) args: &'static [&'static str],
}

impl Peer {
    pub(crate) fn path(&self) -> anyhow::Result<PathBuf> {
        let script = Path::new("tests/tools").join(self.script);
        let output = Command::new(&script).args(self.args).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "{} failed", script.display());
        Ok(String::from_utf8(output.stdout)?.trim().into())
    }
}

/// A mount namespace of our own still shares the folder of named namespaces; a private tmpfs keeps the names ours.
pub(crate) fn private_names() -> anyhow::Result<()> {
    std::fs::create_dir_all("/run/netns")?;
    let mounted = Command::new("mount").args(["-t", "tmpfs", "none", "/run/netns"]).status()?;
    ensure!(mounted.success(), "mount a private /run/netns");
    Ok(())
}
