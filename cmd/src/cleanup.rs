//! `weft cleanup`: takes everything of ours off this node and proves it by looking again. With `--kube-proxy` what another
//! proxy left instead.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use weft_model::constants::{TABLE_POLICY, TABLE_PROXY};
use weft_netstack::cni::{self, conflist};
use weft_netstack::kernel::link::Links;
use weft_netstack::kernel::netns::Rtnetlink;
use weft_netstack::kernel::nft::NftTable;
use weft_netstack::kernel::vip;
use weft_netstack::overlay;
use weft_netstack::proxy::{IPVS_LINK, KubeProxy};
use weft_netstack::reconcile::chain;
use weft_plugin::loopback;

use crate::agent::start;
use crate::files;

#[derive(Args)]
pub(crate) struct CleanupArgs {
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub(crate) cni_conf_dir: PathBuf,
    #[arg(long, default_value = "/opt/cni/bin")]
    pub(crate) cni_bin_dir: PathBuf,
    #[arg(long, default_value = "/run/weft")]
    pub(crate) run_dir: PathBuf,
    #[arg(long, default_value = "/var/lib/weft")]
    pub(crate) state_dir: PathBuf,
    /// Keep the private key and the last good snapshot
    #[arg(long)]
    pub(crate) keep_state: bool,
    /// Instead, remove the rules that a kube-proxy left on this node; Weft may be running
    #[arg(long, conflicts_with = "keep_state")]
    pub(crate) kube_proxy: bool,
    /// With --kube-proxy: only print what would be removed
    #[arg(long, requires = "kube_proxy")]
    pub(crate) dry_run: bool,
}

pub(crate) async fn run(args: CleanupArgs) -> anyhow::Result<()> {
    start::require_root()?;
    if args.kube_proxy {
        return clean_kube_proxy(args.dry_run).await;
    }
    clean(&args).await?;
    say!("nothing of Weft is left on this node");
    Ok(())
}

/// Prints each object, then removes them, unless a kube-proxy runs that would put them back.
async fn clean_kube_proxy(dry_run: bool) -> anyhow::Result<()> {
    let there = KubeProxy::look()?;
    let link = there.ipvs_link.then(|| format!("link {IPVS_LINK}"));
    let objects: Vec<String> = there.objects().chain(link).collect();
    for object in &objects {
        say!("{} {object}", if dry_run { "would remove" } else { "removing" });
    }
    if let Some(pid) = there.running.first() {
        bail!(
            "kube-proxy runs (pid {pid}) and would put its rules back; stop it first: \
             kubectl -n kube-system delete daemonset kube-proxy"
        );
    }
    if !dry_run {
        there.remove()?;
        if there.ipvs_link {
            let netlink = Rtnetlink::connect().context("open an rtnetlink socket")?;
            Links::new(netlink.handle.clone()).delete(IPVS_LINK).await?;
        }
        let left = KubeProxy::look()?;
        let count = left.objects().count() + usize::from(left.ipvs_link);
        ensure!(count == 0, "{count} objects of kube-proxy came back; what makes them?");
    }
    ensure!(
        there.ipvs_servers == 0,
        "{} virtual servers of IPVS are left, which may be kube-proxy's: run `kube-proxy --cleanup` or reboot",
        there.ipvs_servers
    );
    if !dry_run || objects.is_empty() {
        say!("no rule of kube-proxy is left in {}", read(&there));
    }
    Ok(())
}

/// Where one could look.
fn read(there: &KubeProxy) -> String {
    let unread: Vec<String> = there.unread.iter().map(ToString::to_string).collect();
    match unread.as_slice() {
        [] => "nf_tables and x_tables".to_owned(),
        _ => format!(
            "nf_tables; the tables {} of the older iptables are in use and cannot be read without its programs",
            unread.join(", ")
        ),
    }
}

/// Refuses while an agent runs. Every step is tried; a second look then has to find nothing.
pub(crate) async fn clean(args: &CleanupArgs) -> anyhow::Result<()> {
    let lock = start::lock(&args.run_dir)?;
    let first = remove(args).await?;
    for line in &first.removed {
        say!("removed {}", object(line));
    }
    let second = remove(args).await?;
    drop(lock);
    if args.run_dir.exists() {
        std::fs::remove_dir_all(&args.run_dir)
            .with_context(|| format!("remove {}", args.run_dir.display()))?;
    }
    ensure!(second.failed.is_empty(), "not everything could be removed: {}", second.failed.join("; "));
    ensure!(
        second.removed.is_empty(),
        "these came back, is something of Weft running? {}",
        second.removed.join("; ")
    );
    Ok(())
}

#[derive(Default)]
struct Outcome {
    removed: Vec<String>,
    failed: Vec<String>,
}

impl Outcome {
    fn note(&mut self, what: &str, was_there: Result<bool, impl std::error::Error>) {
        match was_there {
            Ok(true) => self.removed.push(what.to_owned()),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {}", chain(&error))),
        }
    }
}

/// The conflist first, so that no pod is sent our way; the strict rules last, so that nothing leaves in clear meanwhile.
async fn remove(args: &CleanupArgs) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    outcome.note("CNI configuration", conflist::remove(&args.cni_conf_dir));
    let loopback = args.cni_bin_dir.join(loopback::PLUGIN);
    if std::fs::read_link(&loopback).is_ok_and(|target| target == Path::new("weft")) {
        outcome.note(&format!("{}", loopback.display()), files::remove(&loopback));
    }
    let plugin = args.cni_bin_dir.join("weft");
    outcome.note(&format!("{}", plugin.display()), files::remove(&plugin));

    let netlink = Rtnetlink::connect().context("open an rtnetlink socket")?;
    let pods = cni::cleanup::remove_all(&netlink.handle).await;
    outcome.removed.extend(pods.changed);
    outcome.failed.extend(pods.failed);
    let answered = vip::remove_all(&netlink.handle).await;
    outcome.removed.extend(answered.changed);
    outcome.failed.extend(answered.failed);
    outcome.note("nft table weft-proxy", NftTable::delete(TABLE_PROXY));
    outcome.note("nft table weft-policy", NftTable::delete(TABLE_POLICY));
    let overlay = overlay::cleanup(netlink.handle.clone(), &args.run_dir).await;
    outcome.removed.extend(overlay.changed);
    outcome.failed.extend(overlay.failed);

    for name in ["store", "tunnel.json", "tunnel.sock", "agent.sock", "ingress"] {
        let path = args.run_dir.join(name);
        outcome.note(&path.display().to_string(), remove_any(&path));
    }
    if !args.keep_state {
        outcome.note(&args.state_dir.display().to_string(), remove_any(&args.state_dir));
    }
    Ok(outcome)
}

/// The object in the name of a change that took it away.
fn object(change: &str) -> &str {
    ["no ", "delete "].iter().find_map(|prefix| change.strip_prefix(prefix)).unwrap_or(change)
}

fn remove_any(path: &Path) -> std::io::Result<bool> {
    if path.is_dir() {
        return std::fs::remove_dir_all(path).map(|()| true);
    }
    files::remove(path)
}
