//! `weft uninstall`: everything that `weft install` and the agent put on this host, taken off again.
//!
//! In: what is there. Out: the host as it was before. The CNI configuration goes first, so that no pod is sent our way;
//! the binary goes last, so that an uninstallation that was cut short can be run again.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Args;
use weft_netstack::cni::conflist;

use crate::agent::GivenArgs;
use crate::cleanup::{self, CleanupArgs};
use crate::files;
use crate::install::plan::{
    BINARY, CREATED_FOLDERS, ENVIRONMENT, RUN_DIR, STATE_DIR, ServiceManager, UNITS, Unit,
};
use crate::install::service::{self, Services};
use crate::install::{self, environment};

#[derive(Args)]
pub(crate) struct UninstallArgs {
    /// Where the CNI configuration is; by default where the installed flags say
    #[arg(long)]
    cni_conf_dir: Option<PathBuf>,
    /// Where the plugin is; by default where the installed flags say
    #[arg(long)]
    cni_bin_dir: Option<PathBuf>,
    /// Keep the private key and the last good snapshot
    #[arg(long)]
    keep_state: bool,
}

const DELETE_DAEMONSET: &str = "kubectl -n weft-system delete daemonset weft";

/// Refuses while an installation or an agent that is no service runs.
pub(crate) async fn run(args: UninstallArgs) -> anyhow::Result<()> {
    install::require_root("uninstall")?;
    let lock = install::lock(&format!(
        "where that is the DaemonSet's container, delete the DaemonSet first, else it brings Weft back: {DELETE_DAEMONSET}"
    ))?;
    if Path::new(STATE_DIR).join("api").exists() {
        say!(
            "the DaemonSet installed this node; where it still exists it brings Weft back: {DELETE_DAEMONSET}"
        );
    }
    let what_to_clean = with_installed_folders(args);
    if conflist::remove(&what_to_clean.cni_conf_dir)? {
        say!("removed CNI configuration");
    }
    for manager in [ServiceManager::Systemd, ServiceManager::Openrc] {
        remove_units(manager)?;
    }
    cleanup::clean(&what_to_clean).await?;
    drop(lock);
    remove_files()?;
    let left = left_over();
    ensure!(left.is_empty(), "these came back, is something of Weft running? {}", left.join(", "));
    say!("nothing of Weft is left on this node");
    Ok(())
}

/// The folders of the installed agent, where none were given. A file that cannot be read any more names none.
fn with_installed_folders(args: UninstallArgs) -> CleanupArgs {
    let text = std::fs::read_to_string(ENVIRONMENT).unwrap_or_default();
    let installed = environment::parse(&text).ok().and_then(|words| GivenArgs::parse(words).ok());
    let (conf, bin) = match installed {
        Some(given) => (given.agent.cni_conf_dir, given.agent.cni_bin_dir),
        None => (PathBuf::from("/etc/cni/net.d"), PathBuf::from("/opt/cni/bin")),
    };
    CleanupArgs {
        cni_conf_dir: args.cni_conf_dir.unwrap_or(conf),
        cni_bin_dir: args.cni_bin_dir.unwrap_or(bin),
        run_dir: RUN_DIR.into(),
        state_dir: STATE_DIR.into(),
        keep_state: args.keep_state,
        kube_proxy: false,
        dry_run: false,
    }
}

/// Stops and removes the units that are there. Where their service manager does not run, nothing runs by them.
fn remove_units(manager: ServiceManager) -> anyhow::Result<()> {
    let services = Services { manager, in_pod: false };
    let runs = service::find() == Some(manager);
    let mut removed = false;
    for unit in UNITS {
        removed |= remove_unit(services, unit, runs)?;
    }
    for call in manager.reload().into_iter().filter(|_| removed && runs) {
        services.run(&call)?;
        say!("ran {}", call.join(" "));
    }
    Ok(())
}

/// Stops the unit where its service manager runs, and removes its files; false where it is not there.
pub(crate) fn remove_unit(services: Services, unit: Unit, runs: bool) -> anyhow::Result<bool> {
    let manager = services.manager;
    let Some(path) = manager.unit_file(unit).filter(|path| path.exists()) else { return Ok(false) };
    for call in manager.stop_and_disable(unit).into_iter().filter(|_| runs) {
        services.run(&call)?;
        say!("ran {}", call.join(" "));
    }
    let removed = remove(&path)?;
    if let Some(log) = manager.unit_log(unit) {
        remove(&log)?;
    }
    Ok(removed)
}

fn remove(path: &Path) -> anyhow::Result<bool> {
    let removed = files::remove(path).with_context(|| format!("remove {}", path.display()))?;
    if removed {
        say!("removed {}", path.display());
    }
    Ok(removed)
}

/// Innermost folders first; the note of them goes after the others, so that it outlives an interruption.
fn remove_files() -> anyhow::Result<()> {
    let mut folders = install::created_folders()?;
    folders.reverse();
    let own = Path::new(CREATED_FOLDERS).parent();
    let (own, others): (Vec<_>, Vec<_>) =
        folders.into_iter().partition(|folder| Some(folder.as_path()) == own);
    remove(Path::new(ENVIRONMENT))?;
    remove(Path::new(BINARY))?;
    remove_folders(&others)?;
    remove(Path::new(CREATED_FOLDERS))?;
    remove_folders(&own)
}

fn remove_folders(folders: &[PathBuf]) -> anyhow::Result<()> {
    for folder in folders {
        let name = folder.display();
        if files::remove_empty_folder(folder).with_context(|| format!("remove {name}"))? {
            say!("removed {name}");
        } else if folder.exists() {
            say!("left {name}: it holds files of others");
        }
    }
    Ok(())
}

/// The second look at our files; the kernel's objects were looked at by the clean-up.
fn left_over() -> Vec<String> {
    let units = [ServiceManager::Systemd, ServiceManager::Openrc]
        .into_iter()
        .flat_map(|manager| UNITS.map(|unit| manager.unit_file(unit)))
        .flatten();
    let files = [BINARY, ENVIRONMENT, CREATED_FOLDERS].map(PathBuf::from);
    units.chain(files).filter(|path| path.exists()).map(|path| path.display().to_string()).collect()
}
