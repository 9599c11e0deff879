//! `weft lb`: addresses of Services, and who answers for them, from the agent of this node.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::status::{PATIENCE, ask};

#[derive(Args)]
pub(crate) struct LbArgs {
    #[command(subcommand)]
    command: LbCommand,
}

#[derive(Subcommand)]
enum LbCommand {
    /// Every address with its Services, its pool and the node that answers for it
    Status(StatusArgs),
    /// One address: who answers, from which MAC, and to which endpoints it leads
    Trace(TraceArgs),
}

#[derive(Args)]
struct StatusArgs {
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Args)]
struct TraceArgs {
    address: IpAddr,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

pub(crate) fn run(args: &LbArgs) -> anyhow::Result<()> {
    let answer = match &args.command {
        LbCommand::Status(args) => ask(&args.run_dir, "/lb/status", PATIENCE)?,
        LbCommand::Trace(args) => {
            ask(&args.run_dir, &format!("/lb/trace?address={}", args.address), PATIENCE)?
        }
    };
    crate::print(&answer)
}
