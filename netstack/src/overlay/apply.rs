//! Makes the host equal to an [`OverlayPlan`].
//!
//! Order: the table first, so that strictness stands before any route; then other programs' firewalls, sysctls, the device, WireGuard, routes. Each
//! step is tried whatever became of those before it.

use std::path::{Path, PathBuf};

use ipnet::IpNet;
use weft_model::constants::{TABLE_HOST, TUNNEL_LINK};
use weft_model::node_facts::WireguardBackend;
use weft_model::wireguard::PeerStatus;

use super::plan::OverlayPlan;
use super::sysctls;
use super::tunnel::{KEY_FILE, SOCKET_FILE, STATE_FILE, TunnelState, read_key};
use crate::control;
use crate::files::{self, Outlives};
use crate::kernel::link::{LinkError, Links};
use crate::kernel::nft::NftTable;
use crate::kernel::nft::passage::Passages;
use crate::kernel::route::Routes;
use crate::kernel::sysctl::Journal;
use crate::kernel::{tun, wireguard};
use crate::reconcile::{Applied, Applier, Trust, chain};

/// Owner of the table `weft-host`, the rules of ours in other programs' tables, the device `weft0` and the routes of the overlay.
pub struct OverlayApplier {
    table: NftTable,
    passages: Passages,
    links: Links,
    routes: Routes,
    run_dir: PathBuf,
    state_dir: PathBuf,
    /// What the last pass applied, with its details.
    applied: Option<(OverlayPlan, Vec<(String, String)>)>,
}

#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("write {path}")]
    WriteState { path: PathBuf, source: std::io::Error },
    #[error("encode {STATE_FILE} or decode the tunnel's answer")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Wireguard(#[from] wireguard::WireguardError),
    #[error("tell the tunnel on {path}: is `weft tunnel` running? start it (systemctl start weft-tunnel)")]
    Tunnel { path: PathBuf, source: std::io::Error },
    #[error("create the TUN device {TUNNEL_LINK}: needs root and /dev/net/tun (modprobe tun)")]
    Tun(#[source] std::io::Error),
    #[error(
        "the kernel has WireGuard now, and {TUNNEL_LINK} is still the TUN device of a running `weft tunnel`: end that (systemctl \
         restart weft-tunnel; it ends by itself where it is not needed)"
    )]
    Held,
    #[error("remove {what}")]
    Remove { what: String, source: std::io::Error },
}

impl OverlayApplier {
    /// `handle` and the calling threads must be in the node's network namespace. `run_dir` takes `tunnel.json`;
    /// `state_dir` holds `wireguard.key`.
    pub fn new(handle: rtnetlink::Handle, run_dir: PathBuf, state_dir: PathBuf) -> Self {
        Self {
            table: NftTable::new(TABLE_HOST),
            passages: Passages::default(),
            links: Links::new(handle.clone()),
            routes: Routes::new(handle),
            run_dir,
            state_dir,
            applied: None,
        }
    }
}

impl Applier for OverlayApplier {
    type Plan = OverlayPlan;

    async fn apply(&mut self, plan: &OverlayPlan, trust: Trust) -> Applied {
        // Most Snapshots are of no concern here, and each look at the host costs more than planning.
        if let Some((_, details)) =
            self.applied.as_ref().filter(|(before, _)| trust == Trust::Shadow && before == plan)
        {
            return Applied { details: details.clone(), ..Applied::default() };
        }
        let mut applied = Applied::default();
        note(&mut applied, self.table.apply(&plan.table, trust));
        let passages = self.passages.ensure(&plan.passages, trust);
        let opened = passages.as_ref().map(|outcome| outcome.open.join(", ")).unwrap_or_default();
        note(&mut applied, passages.map(|outcome| outcome.changed));
        sysctls::apply(&plan.sysctls, Some(&Journal::of(&self.run_dir)), &mut applied);
        // Kernel WireGuard makes its own device; the tunnel is told once the device is whole.
        let backend = match plan.backend {
            WireguardBackend::Kernel => "kernel",
            WireguardBackend::Userspace => "userspace",
        };
        match plan.backend {
            WireguardBackend::Kernel => self.apply_kernel_wireguard(plan, &mut applied),
            WireguardBackend::Userspace => note(&mut applied, ensure_tun()),
        }
        if link_exists() {
            sysctls::apply(&plan.link_sysctls, None, &mut applied);
        }
        note(&mut applied, self.apply_link(plan).await);
        if plan.backend == WireguardBackend::Userspace {
            note(&mut applied, self.apply_tunnel(plan, trust).await);
        }
        let Applied { changed, failed, .. } = self.routes.apply(&plan.routes, &plan.rules).await;
        applied.changed.extend(changed);
        applied.failed.extend(failed);
        applied.details = vec![
            ("backend".to_owned(), backend.to_owned()),
            ("peers".to_owned(), plan.wireguard.peers.len().to_string()),
            ("mtu".to_owned(), plan.mtu_bytes.to_string()),
        ];
        if !plan.stand_ins.is_empty() {
            let names: Vec<_> = plan.stand_ins.iter().map(|node| &*node.0).collect();
            applied.details.push(("DNS in need".to_owned(), names.join(" ")));
        }
        if !opened.is_empty() {
            applied.details.push(("passes the firewalls".to_owned(), opened));
        }
        self.applied = Some((plan.clone(), applied.details.clone()));
        applied
    }
}

impl OverlayApplier {
    /// A TUN of a time when the kernel had no WireGuard makes way.
    fn apply_kernel_wireguard(&self, plan: &OverlayPlan, applied: &mut Applied) {
        let key = match read_key(&self.state_dir.join(KEY_FILE)) {
            Ok(key) => key,
            Err(error) => return applied.failed.push(chain(&error)),
        };
        let mut outcome = wireguard::apply(TUNNEL_LINK, &key, &plan.wireguard);
        if outcome.is_err() && tun::remove_persistent(TUNNEL_LINK).is_ok_and(|was_tun| was_tun) {
            if link_exists() {
                return applied.failed.push(OverlayError::Held.to_string());
            }
            applied.changed.push(format!("no link {TUNNEL_LINK} (TUN)"));
            outcome = wireguard::apply(TUNNEL_LINK, &key, &plan.wireguard);
        }
        note(applied, outcome);
    }

    /// MTU, addresses and "up" of a device that exists.
    async fn apply_link(&self, plan: &OverlayPlan) -> Result<Vec<String>, LinkError> {
        let mut changed = Vec::new();
        let Some(link) = self.links.find(TUNNEL_LINK).await? else { return Ok(changed) };
        if link.mtu_bytes != plan.mtu_bytes {
            self.links.set_mtu(TUNNEL_LINK, link.index, plan.mtu_bytes).await?;
            changed.push(format!("{TUNNEL_LINK}: mtu {}", plan.mtu_bytes));
        }
        if !link.up {
            self.links.set_up(TUNNEL_LINK, link.index).await?;
            changed.push(format!("{TUNNEL_LINK}: up"));
        }
        let seen: Vec<IpNet> =
            self.links.addresses(Some(link.index)).await?.into_iter().map(|seen| seen.address).collect();
        for address in plan.host_addresses.iter().filter(|address| !seen.contains(address)) {
            self.links.ensure_address(TUNNEL_LINK, link.index, *address).await?;
            changed.push(format!("{TUNNEL_LINK}: address {address}"));
        }
        Ok(changed)
    }

    /// Writes `tunnel.json` when it differs, and tells the tunnel then or when nothing is taken for granted.
    async fn apply_tunnel(&self, plan: &OverlayPlan, trust: Trust) -> Result<Vec<String>, OverlayError> {
        let state = TunnelState { wireguard: plan.wireguard.clone(), mtu_bytes: plan.mtu_bytes };
        let mut text = serde_json::to_vec_pretty(&state)?;
        text.push(b'\n');
        let path = self.run_dir.join(STATE_FILE);
        let differs = std::fs::read(&path).ok().as_deref() != Some(&text);
        let mut changed = Vec::new();
        if differs {
            files::replace(&path, &path.with_extension("json.new"), 0o666, &text, Outlives::PowerCut)
                .map_err(|source| OverlayError::WriteState { path: path.clone(), source })?;
            changed.push(format!("{STATE_FILE}: {} peers", state.wireguard.peers.len()));
        }
        if differs || trust == Trust::Nothing {
            tell_tunnel(self.run_dir.join(SOCKET_FILE)).await?;
        }
        Ok(changed)
    }
}

/// `POST /apply`; a tunnel that hangs must not hold up the runtime.
async fn tell_tunnel(path: PathBuf) -> Result<(), OverlayError> {
    let socket = path.clone();
    let asked = tokio::task::spawn_blocking(move || control::request(&socket, "POST", "/apply")).await;
    let answer = asked.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    answer.map(|_| ()).map_err(|source| OverlayError::Tunnel { path, source })
}

/// Counters of the peers, from whoever carries them. Blocks for at most a few seconds.
pub fn peers(run_dir: &Path, backend: WireguardBackend) -> Result<Vec<PeerStatus>, OverlayError> {
    match backend {
        WireguardBackend::Kernel => Ok(wireguard::peers(TUNNEL_LINK)?),
        WireguardBackend::Userspace => {
            let path = run_dir.join(SOCKET_FILE);
            let body = control::request(&path, "GET", "/peers")
                .map_err(|source| OverlayError::Tunnel { path, source })?;
            Ok(serde_json::from_str(&body)?)
        }
    }
}

/// Removes what the overlay put on this host: routes and rules first, the device, the table last, so that nothing leaves
/// in clear meanwhile. Each step reports for itself. Stop agent and tunnel before: a running tunnel keeps the device.
/// `run_dir` remembers the sysctls, whoever changed them.
pub async fn cleanup(handle: rtnetlink::Handle, run_dir: &Path) -> Applied {
    let mut applied = Routes::new(handle.clone()).apply(&Default::default(), &Default::default()).await;
    let removed = |what: &str, was_there| if was_there { vec![format!("no {what}")] } else { Vec::new() };
    let link = match tun::remove_persistent(TUNNEL_LINK) {
        // Kernel WireGuard is no TUN.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        outcome => outcome,
    };
    let link = link.map(|was_tun| removed(&format!("link {TUNNEL_LINK}"), was_tun));
    let what = format!("link {TUNNEL_LINK}");
    note(&mut applied, link.map_err(|source| OverlayError::Remove { what, source }));
    let rest = Links::new(handle).delete(TUNNEL_LINK).await;
    note(&mut applied, rest.map(|was_there| removed(&format!("link {TUNNEL_LINK}"), was_there)));
    let passages = Passages::default().ensure(&[], Trust::Nothing);
    note(&mut applied, passages.map(|outcome| outcome.changed));
    let table = NftTable::delete(TABLE_HOST);
    note(&mut applied, table.map(|was_there| removed(&format!("nft table {TABLE_HOST}"), was_there)));
    Journal::of(run_dir).restore(&mut applied);
    applied
}

/// Without the device its settings are no failure of their own.
fn link_exists() -> bool {
    nix::net::if_::if_nametoindex(TUNNEL_LINK).is_ok()
}

fn ensure_tun() -> Result<Vec<String>, OverlayError> {
    let created = tun::ensure_persistent(TUNNEL_LINK).map_err(OverlayError::Tun)?;
    Ok(if created { vec![format!("link {TUNNEL_LINK} (TUN)")] } else { Vec::new() })
}

fn note<E: std::error::Error>(applied: &mut Applied, outcome: Result<Vec<String>, E>) {
    match outcome {
        Ok(changed) => applied.changed.extend(changed),
        Err(error) => applied.failed.push(chain(&error)),
    }
}

#[cfg(test)]
mod tests;
