//! `weft key`: this node's WireGuard key, shown and replaced by its agent.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::status::{PATIENCE, ask, tell};

#[derive(Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
    /// Where the agent's socket is
    #[arg(long, global = true, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Show the public key, its age, and what a running rotation waits for
    Show,
    /// Replace the key pair; connections stay
    Rotate,
}

pub(crate) fn run(args: &KeyArgs) -> anyhow::Result<()> {
    crate::print(&match args.command {
        KeyCommand::Show => ask(&args.run_dir, "/key", PATIENCE)?,
        KeyCommand::Rotate => tell(&args.run_dir, "/key/rotate", PATIENCE)?,
    })
}
