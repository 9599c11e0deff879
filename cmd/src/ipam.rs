//! `weft ipam`: which pod has which address of this node, from its agent.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use weft_netstack::cni::account::{Account, AddressUse, RangeUse};

use crate::status::{Output, PATIENCE, ask};

#[derive(Args)]
pub(crate) struct IpamArgs {
    #[command(subcommand)]
    command: IpamCommand,
    /// Where the agent's socket is
    #[arg(long, global = true, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Subcommand)]
enum IpamCommand {
    /// Show the node's pod ranges and every address in use or resting
    Show {
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
    /// Say what an address is and whose
    Explain { address: IpAddr },
}

pub(crate) fn run(args: &IpamArgs) -> anyhow::Result<()> {
    match args.command {
        IpamCommand::Explain { address } => {
            crate::print(&ask(&args.run_dir, &format!("/ipam/{address}"), PATIENCE)?)
        }
        IpamCommand::Show { output } => {
            let answer = ask(&args.run_dir, "/ipam", PATIENCE)?;
            if output == Output::Json {
                return crate::print(&(answer + "\n"));
            }
            let account = serde_json::from_str(&answer);
            crate::print(&text(&account.context("the agent's answer is of another version of weft")?))
        }
    }
}

fn text(account: &Account) -> String {
    let range = |range: &RangeUse| {
        format!("{}: {} used, {} resting, {} free\n", range.cidr, range.used, range.resting, range.free)
    };
    let ranges: String = account.ranges.iter().map(range).collect();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["ADDRESS", "POD", "STATE", "LINK", "HOST PORTS"]);
    for AddressUse { address, pod, link, host_ports, resting_seconds, .. } in &account.addresses {
        let state = match resting_seconds {
            None => "used".to_owned(),
            Some(0) => "free".to_owned(),
            Some(left) => format!("rests {left} s"),
        };
        let pod = pod.clone().unwrap_or_else(|| "unknown".to_owned());
        table.add_row([address.to_string(), pod, state, link.clone(), host_ports.join(", ")]);
    }
    format!("{ranges}\n{table}\n")
}
