//! `weft cleanup`: takes everything of ours off this node and proves it by looking again.

use std::path::PathBuf;

use clap::Args;

#[derive(Args)]
pub(crate) struct CleanupArgs {
    #[arg(long, default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    #[arg(long, default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    #[arg(long, default_value = "/var/lib/weft")]
    state_dir: PathBuf,
}

pub(crate) async fn run(args: CleanupArgs) -> anyhow::Result<()> {
    let _ = args;
    anyhow::bail!("to be wired")
}
