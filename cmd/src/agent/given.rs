//! The agent's flags twice: as values to be checked, and as the words that a service is started with.
//!
//! In: a command line that contains the agent's flags among others. Out: [`AgentArgs`], and the words that give another
//! process the same values. No flag is listed twice: clap knows them.

use anyhow::Context as _;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches, Parser};

use super::AgentArgs;

/// Flags that are passed on even when they have their default: every node of a cluster must agree on them.
const ALWAYS: [&str; 4] = ["cluster_cidr", "service_cidr", "cluster_dns", "cluster_domain"];

/// To be flattened into the flags of a command that passes the agent's flags on.
pub(crate) struct GivenArgs {
    pub(crate) agent: AgentArgs,
    /// `--flag value` for each flag that was given, and for those that every node must agree on.
    pub(crate) words: Vec<String>,
    /// False when the command line has none of the agent's flags.
    pub(crate) any: bool,
}

/// The agent's flags alone: what stands in an environment file.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    given: GivenArgs,
}

impl GivenArgs {
    /// The flags in `words`, as the agent itself would read them; the error names the first wrong one.
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Self> {
        let line = Line::try_parse_from(words).map_err(|error| {
            let text = error.to_string();
            anyhow::anyhow!(text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
        });
        line.map(|line| line.given).context("flags of weft agent")
    }

    /// Adds a flag that was not given.
    pub(crate) fn push(&mut self, flag: &str, value: &str) {
        self.words.extend([flag.to_owned(), value.to_owned()]);
    }
}

impl Args for GivenArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        AgentArgs::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        AgentArgs::augment_args_for_update(command)
    }
}

impl FromArgMatches for GivenArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let command = AgentArgs::augment_args(clap::Command::new("agent"));
        let (mut words, mut any) = (Vec::new(), false);
        for flag in command.get_arguments() {
            let id = flag.get_id().as_str();
            any |= given(id);
            let (true, Some(name)) = (given(id) || ALWAYS.contains(&id), flag.get_long()) else { continue };
            let values: Vec<_> = matches.get_raw(id).into_iter().flatten().collect();
            let values: Vec<_> = values.iter().map(|value| value.to_string_lossy()).collect();
            words.extend([format!("--{name}"), values.join(",")]);
        }
        Ok(Self { agent: AgentArgs::from_arg_matches(matches)?, words, any })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[&str]) -> Vec<String> {
        GivenArgs::parse(line.iter().copied()).unwrap().words
    }

    const RANGES: [&str; 8] = [
        "--cluster-cidr",
        "10.42.0.0/16,fd00:10:42::/56",
        "--service-cidr",
        "10.43.0.0/16,fd00:10:43::/112",
        "--cluster-dns",
        "10.43.0.10,fd00:10:43::a",
        "--cluster-domain",
        "cluster.local",
    ];

    #[test]
    fn what_every_node_must_agree_on_is_always_passed_on() {
        assert_eq!(words(&[]), RANGES);
        assert!(!GivenArgs::parse([]).unwrap().any);
    }

    #[test]
    fn what_was_given_is_passed_on_and_the_words_mean_the_same() {
        let given = [
            "--api-server=https://[fd00::1]:6443",
            "--cluster-cidr",
            "10.1.0.0/16",
            "--wireguard-port",
            "1",
            "--log-level",
            "weft_dns=debug,info",
        ];
        let once = words(&given);
        assert_eq!(once[..4], ["--api-server", "https://[fd00::1]:6443", "--cluster-cidr", "10.1.0.0/16"]);
        assert_eq!(once[once.len() - 4..], ["--wireguard-port", "1", "--log-level", "weft_dns=debug,info"]);
        assert_eq!(words(&once.iter().map(String::as_str).collect::<Vec<_>>()), once);
        assert!(GivenArgs::parse(given).unwrap().any);
    }

    #[test]
    fn a_wrong_flag_is_named_in_one_line() {
        let message = format!("{:#}", GivenArgs::parse(["--colour", "red"]).err().unwrap());
        assert!(message.contains("--colour") && message.lines().count() == 1, "{message}");
    }
}
