//! `weft install`: the binary, its flags and its units onto this host, and the services started.
//!
//! ```text
//!  flags, kubelet's kubeconfig, /etc/weft/agent.env --> Settled (all checked; nothing touched so far)
//!  Settled, service manager --> plan: files, commands --> written, restarted where something changed --> ready
//!  in a pod: the host's mounts and the projected token first (`pod`), the token's renewals afterwards
//! ```
//!
//! It can end at any instant: files are whole or absent, what is still to be restarted is on disk, and a second run does
//! the rest.

pub(crate) mod environment;
mod kubelet;
pub(crate) mod plan;
mod pod;
mod ready;
pub(crate) mod service;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use weft_netstack::kube::Endpoint;

use self::plan::{
    CREATED_FOLDERS, Content, ENVIRONMENT, InstalledFile, RUN_DIR, STATE_DIR, ServiceManager, Unit,
};
use self::service::Services;
use crate::Invalid;
use crate::agent::{Config, GivenArgs, start};
use crate::{files, uninstall};

#[derive(Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    pub(crate) given: GivenArgs,
    /// Whose units are written; by default the one that runs here
    #[arg(long, value_enum)]
    service_manager: Option<ServiceManager>,
    /// How long to wait until pods can come; 0 does not wait
    #[arg(long, default_value = "60s", value_parser = ready::limit)]
    wait: Duration,
    /// Run in the DaemonSet's container: install on the host and keep its token current
    #[arg(long)]
    in_pod: bool,
}

/// Flags that were checked, and the file that passes them on.
struct Settled {
    config: Config,
    words: Vec<String>,
    environment: String,
}

pub(crate) fn run(mut args: InstallArgs) -> anyhow::Result<()> {
    require_root("install")?;
    let mut binary = files::own_binary().context("open the running binary")?;
    let volume = if args.in_pod { Some(pod::enter_host()?) } else { None };
    if volume.is_some() {
        pod::complete(&mut args.given, std::env::var("NODE_NAME").ok()).map_err(invalid)?;
    }
    let settled = settle(args.given, args.in_pod)?;
    let manager = service::choose(args.service_manager)?;
    let services = Services { manager, in_pod: args.in_pod };
    let _only_one = lock(
        "where the DaemonSet installs this node, change its flags instead; otherwise wait until the other one ends",
    )?;
    if let Some(volume) = &volume {
        volume.hand_over()?.iter().for_each(|path| say("wrote", path));
    }
    let units = plan::units(settled.config.cluster.ingress.on);
    write_files(&settled, units, manager, &mut binary)?;
    for superfluous in plan::UNITS.iter().filter(|unit| !units.contains(unit)) {
        uninstall::remove_unit(services, *superfluous, true)?;
    }
    restart_units(services, units)?;
    match volume {
        Some(volume) => volume.stay(),
        None if manager == ServiceManager::None => crate::print(&plan::by_hand(&settled.words, units)),
        None if args.wait.is_zero() => Ok(()),
        None => ready::wait(args.wait, &settled.config.cni_conf_dir),
    }
}

/// One line of the report.
pub(crate) fn say(what: &str, object: impl Display) {
    say!("{what:<10} {object}");
}

fn invalid(error: anyhow::Error) -> anyhow::Error {
    Invalid(format!("{error:#}")).into()
}

pub(crate) fn require_root(command: &str) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "weft {command} changes files and services of the host and needs root; run it as root or with sudo"
    );
    Ok(())
}

/// One installation or uninstallation at a time; the other one is named by its pid, with `remedy`.
pub(crate) fn lock(remedy: &str) -> anyhow::Result<nix::fcntl::Flock<File>> {
    start::hold(&Path::new(RUN_DIR).join("install.lock"), |pid| {
        format!("weft install runs on this node already (pid {pid}); {remedy}")
    })
}

/// Everything that can be wrong with the flags is found here.
fn settle(given: GivenArgs, in_pod: bool) -> anyhow::Result<Settled> {
    let present = match std::fs::read_to_string(ENVIRONMENT) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("read {ENVIRONMENT}")),
    };
    match present {
        Some(text) if !in_pod && !given.any => kept(text)
            .context(ENVIRONMENT)
            .context("the flags of the installation that is there")
            .map_err(invalid),
        _ => new(given, in_pod),
    }
}

/// An installation without flags is an upgrade: the flags stay.
fn kept(text: String) -> anyhow::Result<Settled> {
    let given = GivenArgs::parse(environment::parse(&text)?)?;
    let words = given.words.clone();
    let config = given.agent.validate()?;
    check(&config)?;
    Ok(Settled { config, words, environment: text })
}

fn new(mut given: GivenArgs, in_pod: bool) -> anyhow::Result<Settled> {
    // Ranges first: they are wrong or right whatever the kubelet says.
    given.agent.cluster().map_err(invalid)?;
    if given.agent.api_server.is_none() && given.agent.kubeconfig.is_none() {
        let found = kubelet::find()?;
        say("API server", format_args!("{}, from {}", found.url, found.path.display()));
        given.push("--api-server", &found.url);
        given.agent.api_server = Some(found.url);
    }
    let checked = || {
        let words = given.words;
        let environment = environment::render(&words)?;
        let config = given.agent.validate()?;
        check(&config)?;
        if !in_pod {
            usable(&config.api_server)?;
        }
        Ok(Settled { config, words, environment })
    };
    checked().map_err(invalid)
}

/// What the agent accepts and a service cannot have.
fn check(config: &Config) -> anyhow::Result<()> {
    let services_own =
        [("--run-dir", &config.run_dir, RUN_DIR), ("--state-dir", &config.state_dir, STATE_DIR)];
    for (flag, given, own) in services_own {
        ensure!(
            given == Path::new(own),
            "{flag} {}: installed services use {own}; leave it out",
            given.display()
        );
    }
    let (kubeconfig, token_file, ca_file) = match &config.api_server {
        Endpoint::Kubeconfig(path) => (Some(path), None, None),
        Endpoint::Server { token_file, ca_file, .. } => (None, token_file.as_ref(), ca_file.as_ref()),
    };
    let paths = [
        ("--kubeconfig", kubeconfig),
        ("--token-file", token_file),
        ("--ca-file", ca_file),
        ("--resolv-conf", Some(&config.resolv_conf)),
        ("--cni-conf-dir", Some(&config.cni_conf_dir)),
        ("--cni-bin-dir", Some(&config.cni_bin_dir)),
    ];
    for (flag, path) in paths {
        let relative = path.filter(|path| !path.is_absolute());
        ensure!(
            relative.is_none(),
            "{flag} {relative:?} is relative; services start in /: give the whole path"
        );
    }
    Ok(())
}

/// The credential is there and can be read. Opens no connection.
fn usable(api_server: &Endpoint) -> anyhow::Result<()> {
    if let Endpoint::Server { url, token_file, ca_file } = api_server
        && url.starts_with("https:")
    {
        let complete = token_file.is_some() && ca_file.is_some();
        ensure!(complete, "{url} wants to know who asks: give --token-file and --ca-file, or --kubeconfig");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(weft_netstack::kube::Access::open(api_server.clone()))?;
    Ok(())
}

/// Writes what is not right yet. Who has to be restarted for it is on disk before it is written.
fn write_files(
    settled: &Settled,
    units: &[Unit],
    manager: ServiceManager,
    binary: &mut File,
) -> anyhow::Result<()> {
    let wanted = plan::files(manager, &settled.environment, units);
    note_folders(&wanted, &settled.config)?;
    for file in &wanted {
        let path = file.path.display();
        let right = match &file.content {
            Content::OwnBinary => files::is_right(&file.path, file.mode, binary),
            Content::Text(text) => files::is_right(&file.path, file.mode, &mut Cursor::new(text)),
        };
        if right.with_context(|| format!("read {path}"))? {
            say("unchanged", path);
            continue;
        }
        for unit in &file.units {
            let marker = unit.restart_marker();
            files::ensure(&marker, 0o600, &mut Cursor::new(""))
                .with_context(|| format!("write {}", marker.display()))?;
        }
        let written = match &file.content {
            Content::OwnBinary => files::ensure(&file.path, file.mode, binary),
            Content::Text(text) => files::ensure(&file.path, file.mode, &mut Cursor::new(text)),
        };
        written.with_context(|| format!("write {path}"))?;
        say("wrote", path);
    }
    Ok(())
}

/// Adds the folders that are about to be made, by us or by the agent, to those noted so far.
fn note_folders(wanted: &[InstalledFile], config: &Config) -> anyhow::Result<()> {
    let noted = created_folders()?;
    let parents = wanted.iter().filter_map(|file| file.path.parent());
    let folders = parents.chain([config.cni_conf_dir.as_path(), config.cni_bin_dir.as_path()]);
    let all: BTreeSet<PathBuf> = noted.into_iter().chain(folders.flat_map(files::missing_folders)).collect();
    let text: String = all.iter().map(|folder| format!("{}\n", folder.display())).collect();
    let changed = files::ensure(Path::new(CREATED_FOLDERS), 0o644, &mut Cursor::new(text));
    if changed.with_context(|| format!("write {CREATED_FOLDERS}"))? {
        say("wrote", CREATED_FOLDERS);
    }
    Ok(())
}

/// Folders that installations made on this host, outermost first.
pub(crate) fn created_folders() -> anyhow::Result<Vec<PathBuf>> {
    match std::fs::read_to_string(CREATED_FOLDERS) {
        Ok(text) => Ok(text.lines().map(PathBuf::from).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read {CREATED_FOLDERS}")),
    }
}

fn restart_units(services: Services, units: &[Unit]) -> anyhow::Result<()> {
    for call in services.manager.reload().into_iter().chain(services.manager.enable(units)) {
        services.run(&call)?;
        say("ran", call.join(" "));
    }
    for unit in units {
        restart_unit(services, *unit)?;
    }
    Ok(())
}

fn restart_unit(services: Services, unit: Unit) -> anyhow::Result<()> {
    let manager = services.manager;
    let (Some(is_active), Some(restart)) = (manager.is_active(unit), manager.restart(unit)) else {
        return Ok(());
    };
    let marker = unit.restart_marker();
    let Some(reason) = plan::restart_reason(marker.exists(), services.succeeds(&is_active)?) else {
        say("unchanged", format_args!("{} runs", unit.name()));
        return Ok(());
    };
    services.run(&restart)?;
    files::remove(&marker).with_context(|| format!("remove {}", marker.display()))?;
    say("restarted", format_args!("{}: {reason}", unit.name()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(flags: &[&str]) -> String {
        let given = GivenArgs::parse(flags.iter().copied()).unwrap();
        let error = new(given, true).err().unwrap();
        assert!(error.is::<Invalid>(), "{error:#}");
        format!("{error:#}")
    }

    const SERVER: [&str; 2] = ["--api-server", "https://192.0.2.1:6443"];

    #[test]
    fn a_flag_that_a_service_cannot_have_is_named() {
        let with = |more: &[&str]| refused(&[&SERVER[..], more].concat());
        assert!(with(&["--run-dir", "/tmp/run"]).contains("--run-dir /tmp/run"));
        assert!(with(&["--state-dir", "/tmp/state"]).contains("--state-dir"));
        assert!(with(&["--token-file", "token"]).contains("--token-file"));
        assert!(with(&["--cni-bin-dir", "/opt/a b"]).contains("/opt/a b"));
        assert!(with(&["--cluster-dns", "10.99.0.1"]).contains("--cluster-dns 10.99.0.1"));
        assert!(refused(&["--api-server", "192.0.2.1"]).contains("--api-server"));
    }

    #[test]
    fn a_credential_has_to_be_there() {
        let refused = |flags: &[&str]| {
            let given = GivenArgs::parse([&SERVER[..], flags].concat()).unwrap();
            format!("{:#}", new(given, false).err().unwrap())
        };
        assert!(refused(&[]).contains("--token-file and --ca-file"));
        assert!(
            refused(&["--token-file", "/nowhere/token", "--ca-file", "/nowhere/ca"]).contains("/nowhere/ca")
        );
    }

    #[test]
    fn flags_are_kept_as_they_stand_in_the_file() {
        let text = "# mine\nWEFT_AGENT_ARGS='--api-server https://192.0.2.1:6443 --node-name n1'\n";
        let settled = kept(text.to_owned()).unwrap();
        assert_eq!((settled.environment.as_str(), &*settled.config.node.0), (text, "n1"));
        assert!(kept("WEFT_AGENT_ARGS=--colour".to_owned()).is_err());
        assert!(kept(String::new()).is_err());
    }
}
