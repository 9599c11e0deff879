//! `weft tunnel`: the userspace WireGuard process.

use std::path::PathBuf;

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
    let config =
        TunnelConfig { run_dir: args.run_dir, state_dir: args.state_dir, link: TUNNEL_LINK.to_owned() };
    tunnel::run(config).map_err(Into::into)
}
