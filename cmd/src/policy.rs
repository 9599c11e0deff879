//! `weft policy`: what network policies decide, from the agent of this node.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::status::{PATIENCE, ask};

#[derive(Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Say whether a connection is allowed, rule by rule; of any two pods of the cluster
    Explain(ExplainArgs),
}

#[derive(Args)]
struct ExplainArgs {
    /// NAMESPACE/POD, a pod of the namespace default, or an address
    source: String,
    /// The same; of a Service name one of its pods
    destination: String,
    /// Such as 80 or 53/udp
    port: String,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

pub(crate) fn run(args: &PolicyArgs) -> anyhow::Result<()> {
    let PolicyCommand::Explain(question) = &args.command;
    crate::print(&ask(&question.run_dir, &path(question), PATIENCE)?)
}

/// Request path with the question.
fn path(question: &ExplainArgs) -> String {
    let [source, destination, port] =
        [&question.source, &question.destination, &question.port].map(|text| escape(text));
    format!("/policy/explain?source={source}&destination={destination}&port={port}")
}

/// For a query: whatever is no plain character of a name or an address is escaped.
pub(crate) fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'/' | b':' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_escaped_into_one_path() {
        let question = ExplainArgs {
            source: "shop/web".to_owned(),
            destination: "fd00::1".to_owned(),
            port: "80 &x".to_owned(),
            run_dir: PathBuf::new(),
        };
        assert_eq!(path(&question), "/policy/explain?source=shop/web&destination=fd00::1&port=80%20%26x");
    }
}
