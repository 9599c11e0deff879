//! placeholder
#[derive(clap::Args)]
pub(crate) struct ServerArgs {}
pub(crate) async fn run(_args: ServerArgs) -> anyhow::Result<()> { anyhow::bail!("x") }
