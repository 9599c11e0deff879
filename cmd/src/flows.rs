//! `weft flows`: what pods of this node were allowed and denied of late, from the agent.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use weft_netstack::flows::{End, Page, Record, Verdict};

use crate::policy::escape;
use crate::status::{PATIENCE, ask};

/// Between two questions when flows are followed.
const PAUSE: Duration = Duration::from_millis(300);

#[derive(Args)]
pub(crate) struct FlowsArgs {
    /// Go on until interrupted
    #[arg(short, long)]
    follow: bool,
    /// NAMESPACE/POD, or a pod of the namespace default, at either end
    #[arg(long)]
    pod: Option<String>,
    /// Namespace of a pod at either end
    #[arg(short, long)]
    namespace: Option<String>,
    #[arg(long, value_enum)]
    verdict: Option<Wanted>,
    /// Port of the destination
    #[arg(long)]
    port: Option<u16>,
    /// How many of those that are known, the latest
    #[arg(long, default_value_t = 100)]
    last: usize,
    /// JSON: one object a line
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::status::Output,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Wanted {
    Allowed,
    Denied,
}

pub(crate) fn run(args: &FlowsArgs) -> anyhow::Result<()> {
    let first = page(args, &format!("last={}", args.last))?;
    show(args, &first)?;
    if !args.follow {
        return Ok(());
    }
    let mut seen = first;
    loop {
        std::thread::sleep(PAUSE);
        let next = page(args, &format!("after={}", seen.last))?;
        show(args, &next)?;
        if next.lost > seen.lost {
            eprintln!("weft: flows came too fast, some are missing");
        }
        seen = next;
    }
}

fn page(args: &FlowsArgs, which: &str) -> anyhow::Result<Page> {
    let answer = ask(&args.run_dir, &format!("/flows?{which}{}", filter(args)), PATIENCE)?;
    serde_json::from_str(&answer).context("the agent's answer is of another version of weft")
}

/// Further parameters of the request.
fn filter(args: &FlowsArgs) -> String {
    let pod = args.pod.as_ref().map(|pod| match pod.contains('/') {
        true => escape(pod),
        false => format!("default/{}", escape(pod)),
    });
    let verdict = args.verdict.map(|verdict| match verdict {
        Wanted::Allowed => "allowed".to_owned(),
        Wanted::Denied => "denied".to_owned(),
    });
    let namespace = args.namespace.as_deref().map(escape);
    let port = args.port.map(|port| port.to_string());
    let given = [("pod", pod), ("namespace", namespace), ("verdict", verdict), ("port", port)];
    given.into_iter().filter_map(|(name, value)| Some(format!("&{name}={}", value?))).collect()
}

fn show(args: &FlowsArgs, page: &Page) -> anyhow::Result<()> {
    let line = |record: &Record| match args.output {
        crate::status::Output::Text => Ok(text(record)),
        crate::status::Output::Json => serde_json::to_string(record),
    };
    let lines: Result<Vec<String>, _> =
        page.flows.iter().map(|record| line(record).map(|l| l + "\n")).collect();
    crate::print(&lines?.concat())
}

fn text(record: &Record) -> String {
    let Record { time, source, destination, protocol, port, decided_by, .. } = record;
    let verdict = match record.verdict {
        Verdict::Allowed => "allowed",
        Verdict::Denied => "DENIED ",
    };
    let port = if *port == 0 { String::new() } else { format!(" {port}") };
    let service = record.service.as_ref().map(|name| format!(" (Service {name})")).unwrap_or_default();
    format!(
        "{time} {verdict} {} -> {}{service}, {protocol}{port}: {decided_by}",
        end(source),
        end(destination)
    )
}

fn end(end: &End) -> String {
    match &end.pod {
        Some(pod) => format!("{pod} {}", end.address),
        None => end.address.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_a_line() {
        let end = |address: &str, pod: Option<&str>| End {
            address: address.parse().unwrap(),
            pod: pod.map(str::to_owned),
        };
        let record = Record {
            time: "2026-01-02T03:04:05.006Z".to_owned(),
            verdict: Verdict::Denied,
            source: end("203.0.113.9", None),
            destination: end("fd00::2", Some("shop/web")),
            protocol: "tcp".to_owned(),
            port: 80,
            service: Some("shop/front".to_owned()),
            direction: None,
            decided_by: "ingress of shop/web: isolated by shop/deny, no rule allows it".to_owned(),
        };
        assert_eq!(
            text(&record),
            "2026-01-02T03:04:05.006Z DENIED  203.0.113.9 -> shop/web fd00::2 (Service shop/front), tcp 80: \
             ingress of shop/web: isolated by shop/deny, no rule allows it"
        );
    }
}
