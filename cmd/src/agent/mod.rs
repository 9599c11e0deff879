//! `weft agent`: wires the rooms of one node together and runs until a task ends or SIGTERM comes.
//!
//! The data plane stays in place when the agent ends, however it ends.

mod config;
mod given;
mod keep;
mod readiness;
pub(crate) mod start;
mod wire;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use weft_netstack::kernel::memory::{be_frugal, give_memory_back_now_and_then};
use weft_netstack::reconcile::TaskGroup;

pub(crate) use config::{AgentArgs, Config, api_server, disjoint, one_a_family};
pub(crate) use given::GivenArgs;

pub(crate) fn run(args: AgentArgs) -> anyhow::Result<()> {
    args.log.start()?;
    let config = args.validate().map_err(|error| crate::Invalid(format!("{error:#}")))?;
    start::require_root()?;
    let _lock = start::lock(&config.run_dir)?;
    start::require_nftables()?;
    be_frugal();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_park(give_memory_back_now_and_then)
        .enable_all()
        .build()
        .context("start the async runtime")?
        .block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut tasks = TaskGroup::new();
    let saver = wire::wire(&config, &mut tasks).await?;
    tracing::info!(node = %config.node, version = env!("CARGO_PKG_VERSION"), "agent started");
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        reason = tasks.first_end() => Some(reason),
    };
    drop(tasks);
    if let Some(saver) = saver {
        saver.save_now();
    }
    match ended {
        None => {
            tracing::info!("agent stops; the data plane stays in place");
            Ok(())
        }
        Some(reason) => anyhow::bail!(reason),
    }
}
