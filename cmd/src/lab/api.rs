//! The lab's API server: `weft server` on this machine, listening on the lab's LAN for the nodes and on loopback for
//! the person at the shell. Its sockets are made by the lab and handed over as a service manager does
//! (sd_listen_fds(3)), since they belong to two network namespaces.

use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::signal::Signal;
use rand::RngExt;
use serde_json::{Value, json};

use super::machine::{open_log, running};
use super::process::{Recorded, write_json, write_private};
use super::topology::{API_PORT, Topology};
use super::{namespace, paths};

/// A first start makes keys and an empty store; later ones read the store.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A client for the kubeconfig at `path`.
pub(super) async fn client(path: &Path) -> anyhow::Result<Client> {
    // Another part of this process may have chosen the provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("use {}", path.display()))?;
    config.connect_timeout = Some(Duration::from_secs(2));
    Client::try_from(config).context("make a client")
}

/// Runs one conversation of a command with the API server.
pub(super) fn ask<T>(talk: impl AsyncFnOnce(Client) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { talk(client(&paths::admin_kubeconfig()).await?).await })
}

/// The server's own sentence when it refused, instead of the whole answer.
pub(super) fn brief(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{} ({})", status.message, status.code),
        other => other.into(),
    }
}

pub(super) fn is_up() -> bool {
    Recorded::read(&paths::process_record("api")).is_some_and(Recorded::is_alive)
}

/// Starts the server and waits until it answers; writes the kubeconfigs of the nodes and of the user.
pub(super) fn start(topology: &Topology) -> anyhow::Result<()> {
    let directory = paths::api_directory();
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    ensure_tokens(topology)?;
    let log = open_log(&paths::log("lan", "server"))?;
    let mut command = Command::new(paths::BINARY);
    command.args(["lab", "api"]).stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().context("start the API server")?;
    let recorded = Recorded::observe(i32::try_from(child.id())?)?;
    write_json(&paths::process_record("api"), &recorded)?;
    let mut go = child.stdin.take().context("standard input of the API server")?;
    go.write_all(b"go\n").context("let the API server go on")?;
    drop(go);
    // Collected when it ends, also while this process lives on.
    std::thread::spawn(move || child.wait());
    wait_until_it_answers(topology)
}

/// Writes the kubeconfigs and waits until the server that was started answers.
pub(super) fn wait_until_it_answers(topology: &Topology) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let answer = write_kubeconfigs(topology).and_then(|()| ask(async |client| version(client).await));
        let Err(error) = answer else { return Ok(()) };
        let log = paths::log("lan", "server");
        if !is_up() {
            bail!("the API server ended while starting:\n{}", tail(&log, 5));
        }
        if Instant::now() > deadline {
            bail!("the API server does not answer ({error:#}); see {}", log.display());
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}

async fn version(client: Client) -> anyhow::Result<()> {
    client.apiserver_version().await.context("ask for the version").map(drop)
}

/// The last lines of a file, for an error message.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// SIGTERM, then SIGKILL. Says whether there was one to stop.
pub(super) fn stop() -> anyhow::Result<bool> {
    let Some(recorded) = Recorded::read(&paths::process_record("api")).filter(|recorded| recorded.is_alive())
    else {
        return Ok(false);
    };
    recorded.signal(Signal::SIGTERM)?;
    if recorded.wait_gone(STOP_LIMIT).is_err() {
        recorded.kill_and_wait()?;
    }
    fs::remove_file(paths::process_record("api")).ok();
    Ok(true)
}

/// The body of `weft lab api`: makes the sockets, waits for the word that it is on record, becomes `weft server`.
pub(super) fn run() -> anyhow::Result<()> {
    close_inherited()?;
    nix::unistd::setsid().context("start a session")?;
    let mut first = OwnedFd::from(File::open("/dev/null")?);
    let mut second = OwnedFd::from(File::open("/dev/null")?);
    ensure!((first.as_raw_fd(), second.as_raw_fd()) == (3, 4), "descriptors 3 and 4 are taken");
    let topology = super::machine::topology()?;
    let switch = format!("/proc/{}/ns/net", running("lan")?.pid);
    let lan = namespace::inside_network(Path::new(&switch), || {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, API_PORT)).context("listen on the LAN")
    })?;
    let loopback = TcpListener::bind((Ipv4Addr::LOCALHOST, topology.loopback_port)).with_context(|| {
        format!(
            "listen on 127.0.0.1:{}; `weft lab down` and `up` choose another port",
            topology.loopback_port
        )
    })?;
    let mut word = String::new();
    std::io::stdin().lock().read_line(&mut word).context("wait for the word")?;
    ensure!(word == "go\n", "the lab went away before the API server was ready");
    nix::unistd::dup2_stdin(File::open("/dev/null")?).context("detach standard input")?;
    nix::unistd::dup2(&lan, &mut first).context("hand the LAN's socket over")?;
    nix::unistd::dup2(&loopback, &mut second).context("hand the loopback's socket over")?;
    let error = Command::new(paths::BINARY)
        .args(server_arguments(&topology))
        .env("LISTEN_FDS", "2")
        .env("LISTEN_PID", std::process::id().to_string())
        .exec();
    Err(error).context("become `weft server`")
}

/// Closes what a shell or make left open, so that 3 and 4 are free.
fn close_inherited() -> anyhow::Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&descriptor| descriptor > 2)
        .collect();
    for descriptor in open {
        // The directory that was just read is in the list and closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

fn server_arguments(topology: &Topology) -> Vec<String> {
    let directory = paths::api_directory();
    let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let gateways: Vec<String> = topology.gateways().iter().map(ToString::to_string).collect();
    let mut words = vec!["server".to_owned(), "--data-dir".to_owned(), file("data")];
    let mut add = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
    add("--cluster-cidr", topology.cluster_cidrs().join(","));
    add("--service-cidr", topology.service_cidrs().join(","));
    add("--advertise-address", gateways[0].clone());
    for name in gateways.iter().map(String::as_str).chain(["127.0.0.1", "localhost"]) {
        add("--tls-san", name.to_owned());
    }
    add("--kubeconfig-out", file("kubeconfig"));
    add("--token-file", file("tokens"));
    words
}

/// Who may ask the API server: a user and its groups, as the token file writes them.
struct Account(String);

impl Account {
    fn admin() -> Self {
        Self("weft-lab-admin,system:masters".to_owned())
    }

    fn kubelet(node: &str) -> Self {
        Self(format!("system:node:{node},system:nodes"))
    }

    /// The ServiceAccount of `weft manifests`, bound to a node as in a real cluster.
    fn agent(node: &str) -> Self {
        Self(format!("system:serviceaccount:weft-system:weft-agent,weft.network:node:{node}"))
    }

    fn user(&self) -> &str {
        self.0.split(',').next().unwrap_or_default()
    }

    fn token(&self) -> anyhow::Result<String> {
        let path = paths::api_directory().join("tokens");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut lines = text.lines().filter_map(|line| line.split_once(','));
        let found = lines.find(|(_, account)| *account == self.0);
        found.map(|(token, _)| token.to_owned()).with_context(|| format!("no token of {}", self.user()))
    }
}

/// Lines `token,user,groups`, made once for every account of the lab.
fn ensure_tokens(topology: &Topology) -> anyhow::Result<()> {
    let path = paths::api_directory().join("tokens");
    let mut text = fs::read_to_string(&path).unwrap_or_default();
    let of_nodes =
        topology.node_names().into_iter().flat_map(|node| [Account::kubelet(&node), Account::agent(&node)]);
    for Account(account) in std::iter::once(Account::admin()).chain(of_nodes) {
        if !text.lines().any(|line| line.split_once(',').is_some_and(|(_, known)| known == account)) {
            text.push_str(&format!("{:032x},{account}\n", rand::rng().random::<u128>()));
        }
    }
    write_private(&path, text)
}

/// From the server's own kubeconfig (for the certificate authority): the user's with the loopback address, the nodes'
/// with the LAN address.
fn write_kubeconfigs(topology: &Topology) -> anyhow::Result<()> {
    let path = paths::api_directory().join("kubeconfig");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let original: Value = serde_yaml_ng::from_slice(&text).context("parse the server's kubeconfig")?;
    let authority = original["clusters"][0]["cluster"]["certificate-authority-data"]
        .as_str()
        .context("the server's kubeconfig names no certificate authority")?;
    let loopback = format!("https://127.0.0.1:{}", topology.loopback_port);
    write_kubeconfig(&paths::admin_kubeconfig(), &loopback, authority, &Account::admin())?;
    let gateway = topology.gateways()[0];
    let lan = format!("https://{}", std::net::SocketAddr::new(gateway, API_PORT));
    for node in topology.node_names() {
        write_kubeconfig(&paths::node_kubeconfig(&node), &lan, authority, &Account::kubelet(&node))?;
        write_kubeconfig(&paths::agent_kubeconfig(&node), &lan, authority, &Account::agent(&node))?;
    }
    Ok(())
}

fn write_kubeconfig(path: &Path, server: &str, authority: &str, account: &Account) -> anyhow::Result<()> {
    let user = account.user();
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "weft-lab",
        "clusters": [{ "name": "weft-lab", "cluster": { "server": server, "certificate-authority-data": authority } }],
        "users": [{ "name": user, "user": { "token": account.token()? } }],
        "contexts": [{ "name": "weft-lab", "context": { "cluster": "weft-lab", "user": user } }],
    });
    write_private(path, serde_yaml_ng::to_string(&kubeconfig)?)
}
