//! `weft tunnel`: the userspace WireGuard process.

use std::path::PathBuf;

use clap::Args;

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
    anyhow::bail!("to be wired: {} {}", args.run_dir.display(), args.state_dir.display())
}
