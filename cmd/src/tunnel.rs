//! `weft tunnel`: the userspace WireGuard process.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use weft_model::constants::TUNNEL_LINK;
use weft_model::node_facts::WireguardBackend;
use weft_netstack::kernel::descriptor_store::Kept;
use weft_netstack::kernel::facts;
use weft_netstack::kernel::memory::be_frugal;
use weft_netstack::overlay::tunnel::{self, TunnelConfig};

use crate::log::LogArgs;

#[derive(Args)]
pub(crate) struct TunnelArgs {
    /// Where tunnel.json is read and tunnel.sock is served
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    /// Where the private key is
    #[arg(long, default_value = "/var/lib/weft")]
    state_dir: PathBuf,
    /// End at once, with success, where the kernel has WireGuard
    #[arg(long)]
    unless_kernel: bool,
    /// Only say whether the kernel has WireGuard: exit code 0 when it has, 1 when it has not or cannot be asked
    #[arg(long)]
    check_kernel: bool,
    #[command(flatten)]
    log: LogArgs,
}

pub(crate) fn run(args: TunnelArgs) -> anyhow::Result<()> {
    args.log.start()?;
    if args.check_kernel {
        anyhow::ensure!(kernel_has_wireguard()?, "the kernel has no WireGuard: the tunnel is needed");
        return Ok(());
    }
    if args.unless_kernel && kernel_has_wireguard()? {
        tracing::info!("the kernel has WireGuard: no tunnel is needed");
        return Ok(());
    }
    be_frugal();
    await_key(&args.state_dir.join(tunnel::KEY_FILE));
    let config =
        TunnelConfig { run_dir: args.run_dir, state_dir: args.state_dir, link: TUNNEL_LINK.to_owned() };
    tunnel::run(config, Kept::from_environment()).map_err(Into::into)
}

/// As the agent finds out.
fn kernel_has_wireguard() -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(facts::wireguard_backend())? == WireguardBackend::Kernel)
}

/// On a node's first start the agent makes the key while this process starts. After the limit the tunnel itself says what
/// is missing.
fn await_key(path: &Path) {
    const LIMIT: Duration = Duration::from_secs(30);
    let started_at = Instant::now();
    while !path.exists() && started_at.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(20));
    }
}
