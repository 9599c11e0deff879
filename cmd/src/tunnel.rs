//! `weft tunnel`: the userspace WireGuard process.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use weft_model::constants::TUNNEL_LINK;
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
    #[command(flatten)]
    log: LogArgs,
}

pub(crate) fn run(args: TunnelArgs) -> anyhow::Result<()> {
    args.log.start()?;
    await_key(&args.state_dir.join(tunnel::KEY_FILE));
    let config =
        TunnelConfig { run_dir: args.run_dir, state_dir: args.state_dir, link: TUNNEL_LINK.to_owned() };
    tunnel::run(config).map_err(Into::into)
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
