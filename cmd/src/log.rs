//! Logs on standard error, for people or as JSON.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

#[derive(Clone, Debug, Args)]
pub(crate) struct LogArgs {
    /// How log lines look
    #[arg(long, value_enum, default_value = "human")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or directives such as `weft_dns=debug`
    #[arg(long, default_value = "info")]
    log_level: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Human,
    Json,
}

impl LogArgs {
    /// Installs the logger of this process; call once.
    pub(crate) fn start(&self) -> anyhow::Result<()> {
        // hickory logs every query at info and every dropped reply at warn; what kube_client logs of a lost connection the
        // watches say once and better.
        let directives = format!("hickory_server=warn,hickory_net=error,kube_client=off,{}", self.log_level);
        let filter = EnvFilter::try_new(directives)
            .map_err(|error| crate::Invalid(format!("--log-level {}: {error}", self.log_level)))?;
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Human => {
                builder
                    .with_target(false)
                    .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                    .init();
            }
            LogFormat::Json => builder.json().flatten_event(true).init(),
        }
        Ok(())
    }
}
