//! Commands that go into the lab: shells and commands in pods and on machines, logs, and the small faults
//! (`kill-agent`, `stop-api`).

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, bail, ensure};
use kube::ResourceExt;
use nix::sys::signal::Signal;

use super::process::{Recorded, outer_pid, read_json};
use super::sandbox::{PodRecord, records_of};
use super::supervisor::Services;
use super::{api, machine, namespace, paths};

/// A pod that runs in the lab.
pub(super) struct FoundPod {
    pub(super) node: String,
    pub(super) record: PodRecord,
}

/// Every pod on record, by node and order.
pub(super) fn all_pods() -> anyhow::Result<Vec<FoundPod>> {
    let mut found = Vec::new();
    for node in machine::topology()?.node_names() {
        let records = records_of(&node)?;
        found.extend(records.into_iter().map(|record| FoundPod { node: node.clone(), record }));
    }
    Ok(found)
}

/// The running pod that `text` (NAME or NAMESPACE/NAME) means. A name alone means `default`, or the only one.
pub(super) fn find_pod(text: &str) -> anyhow::Result<FoundPod> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    let mut found: Vec<FoundPod> = all_pods()?
        .into_iter()
        .filter(|pod| pod.record.pod.name_any() == name && pod.record.pid.is_some())
        .filter(|pod| namespace.is_none() || pod.record.pod.namespace().as_deref() == namespace)
        .collect();
    found.sort_by_key(|pod| pod.record.pod.namespace().as_deref() != Some("default"));
    let ambiguous = found.len() > 1 && found[0].record.pod.namespace().as_deref() != Some("default");
    ensure!(!ambiguous, "several pods are named {name}; say NAMESPACE/{name}");
    found.into_iter().next().with_context(|| format!("no running pod {text}; `weft lab status` lists them"))
}

fn command_of(words: &[String], prompt: &str) -> Command {
    let mut command = match words.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new("/bin/bash");
            command.args(["--norc", "-i"]).env("PS1", format!("{prompt}:\\w# "));
            command
        }
    };
    // `weft` inside the lab is the lab's own copy.
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    let own = Path::new(paths::BINARY).parent().unwrap_or(Path::new("/")).display();
    command.env("PATH", format!("{own}:{path}")).env_remove("KUBECONFIG");
    command
}

/// The exit code as a shell says it.
fn code_of(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

pub(super) fn in_pod(pod: &str, words: &[String]) -> anyhow::Result<i32> {
    let found = find_pod(pod)?;
    let first = machine::running(&found.node)?.pid;
    let mut command = command_of(words, pod);
    namespace::run_inside(first, found.record.pid, &mut command).map(code_of)
}

pub(super) fn on_machine(name: &str, words: &[String]) -> anyhow::Result<i32> {
    machine::topology()?.role(name)?;
    let first = machine::running(name)?.pid;
    let mut command = command_of(words, name);
    if paths::node_kubeconfig(name).exists() {
        command.env("KUBECONFIG", paths::node_kubeconfig(name));
    }
    namespace::run_inside(first, None, &mut command).map(code_of)
}

pub(super) fn print_kubeconfig() -> anyhow::Result<()> {
    machine::topology()?;
    say!("{}", paths::admin_kubeconfig().display());
    Ok(())
}

/// The agent of a node as this machine numbers its processes.
pub(super) fn agent_process(node: &str) -> anyhow::Result<Recorded> {
    machine::topology()?.expect_node(node)?;
    let first = machine::running(node)?.pid;
    let services: Services = read_json(&paths::node_services(node))?;
    let inner = services.get("agent").and_then(|agent| agent.pid);
    let inner = inner.with_context(|| format!("the agent of {node} does not run at the moment"))?;
    let outer = outer_pid(first, inner).with_context(|| format!("the agent of {node} has just ended"))?;
    Recorded::observe(outer)
}

/// SIGKILL for the agent of a node; the process that it was.
pub(super) fn kill_agent(node: &str) -> anyhow::Result<Recorded> {
    let agent = agent_process(node)?;
    agent.signal(Signal::SIGKILL)?;
    say!("killed the agent of {node} (process {})", agent.pid);
    Ok(agent)
}

pub(super) fn stop_api() -> anyhow::Result<()> {
    machine::topology()?;
    say!("{}", if api::stop()? { "the API server is stopped" } else { "the API server was stopped already" });
    Ok(())
}

pub(super) fn start_api() -> anyhow::Result<()> {
    let topology = machine::topology()?;
    if api::is_up() {
        say!("the API server was up already");
        return Ok(());
    }
    api::start(&topology)?;
    say!("the API server is up");
    Ok(())
}

/// Prints the log files of a machine, each line with its file's name when there are several.
pub(super) fn print_logs(name: &str, process: Option<&str>) -> anyhow::Result<()> {
    machine::topology()?.role(name)?;
    let directory = paths::machine(name).join("log");
    let mut logs = BTreeMap::new();
    for entry in
        std::fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?.flatten()
    {
        let stem =
            entry.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        if process.is_none_or(|wanted| wanted == stem) {
            logs.insert(stem, std::fs::read(entry.path())?);
        }
    }
    if logs.is_empty() {
        bail!("no such log; `weft lab logs {name}` shows all");
    }
    for (stem, text) in &logs {
        for line in String::from_utf8_lossy(text).lines() {
            say!("{stem:<8} {line}");
        }
    }
    Ok(())
}

/// Standard output of a command in a pod; an error with its standard error when it fails.
pub(super) fn output_in_pod(pod: &str, words: &[&str]) -> anyhow::Result<String> {
    let found = find_pod(pod)?;
    let inner = found.record.pid.context("the pod does not run")?;
    output(&found.node, Some(inner), pod, words)
}

/// Standard output of a command on a machine.
pub(super) fn output_on_machine(name: &str, words: &[&str]) -> anyhow::Result<String> {
    output(name, None, name, words)
}

fn output(machine: &str, inner: Option<i32>, place: &str, words: &[&str]) -> anyhow::Result<String> {
    let first = machine::running(machine)?.pid;
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let mut command = command_of(&words, place);
    let output = namespace::inside(first, move || {
        if let Some(inner) = inner {
            namespace::Namespaces::of(inner)?.enter()?;
        }
        command.stdin(std::process::Stdio::null()).output().context("start the command")
    })?;
    let (text, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(
        output.status.success(),
        "in {place}: exit code {}: {}{}",
        code_of(output.status),
        text,
        complaint.trim()
    );
    Ok(text.into_owned())
}
