//! The first process of a pod (`weft lab pod DIRECTORY`): gives the pod its view (host name, resolver, hosts), runs the
//! containers that have a `command` and, for the others, the built-in server. Flows in: `order.json`. Flows out: the
//! file `ready`, and the exit code when every container has ended.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use kube::ResourceExt;
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};
use serde::{Deserialize, Serialize};

use super::process::{read_json, write_json};
use super::topology::{CLUSTER_DOMAIN, Topology};
use super::{namespace, netexec};

/// Pause before an ended container is started again.
const RESTART_DELAY: Duration = Duration::from_millis(500);

/// What a pod's first process is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Order {
    hostname: String,
    resolv_conf: String,
    hosts: String,
    /// Containers that run a command of the host.
    commands: Vec<HostCommand>,
    /// Ports of the built-in server; empty when no container wants it.
    server_ports: Vec<u16>,
    restart: Restart,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HostCommand {
    name: String,
    words: Vec<String>,
    environment: BTreeMap<String, String>,
    directory: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Restart {
    Always,
    OnFailure,
    Never,
}

impl Order {
    pub(super) fn new(pod: &Pod, addresses: &[String], topology: &Topology) -> Self {
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let hostname = spec.hostname.clone().unwrap_or_else(|| pod.name_any());
        let (commands, servers): (Vec<&Container>, Vec<&Container>) =
            spec.containers.iter().partition(|container| has_command(container));
        Self {
            resolv_conf: resolv_conf(pod, spec, topology),
            hosts: hosts(spec, &hostname, addresses),
            commands: commands.into_iter().map(|container| host_command(pod, container)).collect(),
            server_ports: server_ports(&servers),
            restart: match spec.restart_policy.as_deref() {
                Some("Never") => Restart::Never,
                Some("OnFailure") => Restart::OnFailure,
                _ => Restart::Always,
            },
            hostname,
        }
    }

    pub(super) fn save(&self, directory: &Path) -> anyhow::Result<()> {
        write_json(&directory.join("order.json"), self)
    }
}

fn has_command(container: &Container) -> bool {
    container.command.as_ref().is_some_and(|words| !words.is_empty())
}

/// TCP and UDP ports of the built-in server: what the containers declare, what agnhost's flags say, else 8080.
fn server_ports(containers: &[&Container]) -> Vec<u16> {
    let mut ports = Vec::new();
    for container in containers {
        let declared = container.ports.iter().flatten().map(|port| port.container_port);
        let flags = container.args.iter().flatten().filter_map(|argument| {
            let value =
                argument.strip_prefix("--http-port=").or_else(|| argument.strip_prefix("--udp-port="))?;
            value.parse().ok()
        });
        ports.extend(declared.chain(flags).filter_map(|port| u16::try_from(port).ok()));
    }
    if ports.is_empty() && !containers.is_empty() {
        ports.push(8080);
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn host_command(pod: &Pod, container: &Container) -> HostCommand {
    let words = container.command.iter().chain(container.args.iter()).flatten().cloned().collect();
    let mut environment: BTreeMap<String, String> = container
        .env
        .iter()
        .flatten()
        .filter_map(|variable| Some((variable.name.clone(), variable.value.clone()?)))
        .collect();
    environment.entry("HOSTNAME".to_owned()).or_insert_with(|| pod.name_any());
    HostCommand { name: container.name.clone(), words, environment, directory: container.working_dir.clone() }
}

/// `dnsPolicy` as the kubelet turns it into resolv.conf (Kubernetes: DNS for Services and Pods).
fn resolv_conf(pod: &Pod, spec: &PodSpec, topology: &Topology) -> String {
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let cluster_first = match policy {
        "ClusterFirst" => !spec.host_network.unwrap_or(false),
        "ClusterFirstWithHostNet" => true,
        _ => false,
    };
    let mut servers: Vec<String> = match policy {
        "None" => Vec::new(),
        _ if cluster_first => topology.cluster_dns().into_iter().map(str::to_owned).collect(),
        _ => topology.gateways().iter().map(ToString::to_string).collect(),
    };
    let mut search = Vec::new();
    let mut options = Vec::new();
    if cluster_first {
        let namespace = pod.namespace().unwrap_or_else(|| "default".to_owned());
        search.push(format!("{namespace}.svc.{CLUSTER_DOMAIN}"));
        search.extend([format!("svc.{CLUSTER_DOMAIN}"), CLUSTER_DOMAIN.to_owned()]);
        options.push("ndots:5".to_owned());
    }
    if let Some(config) = &spec.dns_config {
        servers.extend(config.nameservers.iter().flatten().cloned());
        search.extend(config.searches.iter().flatten().cloned());
        options.extend(config.options.iter().flatten().filter_map(|option| {
            let name = option.name.as_ref()?;
            Some(option.value.as_ref().map_or_else(|| name.clone(), |value| format!("{name}:{value}")))
        }));
    }
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (word, values) in [("search", search), ("options", options)] {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    }
    text
}

fn hosts(spec: &PodSpec, hostname: &str, addresses: &[String]) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    let names = match &spec.subdomain {
        Some(subdomain) => format!("{hostname}.{subdomain} {hostname}"),
        None => hostname.to_owned(),
    };
    for address in addresses {
        text.push_str(&format!("{address} {names}\n"));
    }
    for alias in spec.host_aliases.iter().flatten() {
        text.push_str(&format!("{} {}\n", alias.ip, alias.hostnames.clone().unwrap_or_default().join(" ")));
    }
    text
}

/// The body of `weft lab pod DIRECTORY`. Ends with the worst exit code of its containers.
pub(super) fn run(directory: &Path) -> anyhow::Result<i32> {
    ensure!(std::process::id() == 1, "`weft lab pod` is started by a node of the lab only");
    nix::unistd::setsid().context("start a session")?;
    let order: Order = read_json(&directory.join("order.json"))?;
    namespace::make_mounts_private()?;
    namespace::mount_new("proc", "/proc")?;
    namespace::mount_new("sysfs", "/sys")?;
    nix::unistd::sethostname(&order.hostname).context("set the host name")?;
    namespace::cover_file(Path::new("/etc/resolv.conf"), &order.resolv_conf, &directory.join("resolv.conf"))?;
    namespace::cover_file(Path::new("/etc/hosts"), &order.hosts, &directory.join("hosts"))?;
    let name = format!("{}\n", order.hostname);
    namespace::cover_file(Path::new("/etc/hostname"), &name, &directory.join("hostname"))?;
    if !order.server_ports.is_empty() {
        netexec::start(&order.hostname, &order.server_ports)?;
    }
    let ready = directory.join("ready");
    run_commands(&order, &ready)
}

/// Runs the commands, starts them again as the policy says, and collects orphans. With a built-in server it never
/// ends.
fn run_commands(order: &Order, ready: &PathBuf) -> anyhow::Result<i32> {
    let mut running: BTreeMap<i32, &HostCommand> = BTreeMap::new();
    for command in &order.commands {
        running.insert(spawn(command)?, command);
    }
    fs::write(ready, "").with_context(|| format!("write {}", ready.display()))?;
    let mut worst = 0;
    loop {
        if running.is_empty() && order.server_ports.is_empty() {
            return Ok(worst);
        }
        let (pid, code) = match wait() {
            Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32),
            Err(Errno::ECHILD) => {
                std::thread::sleep(Duration::from_secs(1));
                continue;
            }
            _ => continue,
        };
        let Some(command) = running.remove(&pid) else { continue };
        eprintln!("container {} ended with {code}", command.name);
        let again = match order.restart {
            Restart::Always => true,
            Restart::OnFailure => code != 0,
            Restart::Never => false,
        };
        if again {
            std::thread::sleep(RESTART_DELAY);
            running.insert(spawn(command)?, command);
        } else {
            worst = worst.max(code);
        }
    }
}

fn spawn(command: &HostCommand) -> anyhow::Result<i32> {
    let (program, arguments) = command.words.split_first().context("an empty command")?;
    let mut process = Command::new(program);
    process.args(arguments).envs(&command.environment);
    if let Some(directory) = &command.directory {
        process.current_dir(directory);
    }
    let child = process.spawn().with_context(|| format!("start {program} (a command of this host)"))?;
    i32::try_from(child.id()).context("pid")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::topology::Family;
    use super::*;

    fn order(pod: serde_json::Value) -> Order {
        let topology = Topology { family: Family::Dual, nodes: 3, loopback_port: 1 };
        let pod: Pod = serde_json::from_value(pod).unwrap();
        Order::new(&pod, &["10.244.0.2".to_owned(), "fd00:10:244::2".to_owned()], &topology)
    }

    #[test]
    fn a_pod_asks_the_cluster_dns_of_both_families_with_the_usual_search_list() {
        let order = order(json!({
            "metadata": { "name": "a", "namespace": "shop" },
            "spec": { "containers": [{ "name": "c", "image": "unknown" }] },
        }));
        assert_eq!(
            order.resolv_conf,
            "nameserver 10.96.0.10\nnameserver fd00:10:96::a\n\
             search shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
    }

    #[test]
    fn an_image_without_command_is_the_built_in_server_on_its_container_ports() {
        let order = order(json!({
            "metadata": { "name": "a" },
            "spec": { "containers": [
                { "name": "web", "image": "nginx", "ports": [{ "containerPort": 3000 }] },
                { "name": "agnhost", "image": "agnhost", "args": ["netexec", "--http-port=8081"] },
            ]},
        }));
        assert_eq!((order.server_ports, order.commands), (vec![3000, 8081], vec![]));
    }

    #[test]
    fn a_command_runs_on_the_host_with_its_arguments_and_no_server() {
        let order = order(json!({
            "metadata": { "name": "a" },
            "spec": { "restartPolicy": "Never", "containers": [
                { "name": "c", "command": ["sleep"], "args": ["5"], "env": [{ "name": "A", "value": "b" }] },
            ]},
        }));
        assert!(order.server_ports.is_empty());
        assert_eq!(order.commands[0].words, ["sleep", "5"]);
        assert_eq!(order.commands[0].environment["A"], "b");
        assert_eq!(order.restart, Restart::Never);
    }

    #[test]
    fn a_pod_with_a_subdomain_knows_itself_by_its_full_name() {
        let order = order(json!({
            "metadata": { "name": "db-0" },
            "spec": { "hostname": "db-0", "subdomain": "db", "containers": [{ "name": "c" }] },
        }));
        assert!(order.hosts.contains("fd00:10:244::2 db-0.db db-0\n"), "{}", order.hosts);
    }
}
