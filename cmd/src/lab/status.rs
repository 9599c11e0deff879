//! `weft lab status`: machines with their services, and pods, from the lab's own records (it works without the API
//! server).

use comfy_table::{Table, presets};
use kube::ResourceExt;

use super::process::read_json;
use super::supervisor::Services;
use super::{api, machine, paths, shell};

pub(super) fn print() -> anyhow::Result<()> {
    let topology = machine::topology()?;
    let mut machines = table(&["MACHINE", "STATE", "ADDRESSES", "SERVICES"]);
    for name in topology.machine_names() {
        let role = topology.role(&name)?;
        let addresses: Vec<String> =
            topology.lan_addresses(role).iter().map(|(address, _)| address.to_string()).collect();
        let state = if machine::running(&name).is_ok() { "up" } else { "down" };
        machines.add_row([name.clone(), state.to_owned(), addresses.join(" "), services(&name)]);
    }
    say!("{machines}\n\n{}", pods_table()?);
    for found in shell::all_pods()? {
        let pod = &found.record.pod;
        if let Some(complaint) = &found.record.complaint {
            say!("{}/{}: {complaint}", pod.namespace().unwrap_or_default(), pod.name_any());
        }
    }
    Ok(())
}

/// Pods of all nodes; also printed by the tour.
pub(super) fn pods_table() -> anyhow::Result<Table> {
    let mut pods = table(&["NAMESPACE", "POD", "PHASE", "NODE", "ADDRESSES"]);
    for found in shell::all_pods()? {
        let pod = &found.record.pod;
        pods.add_row([
            pod.namespace().unwrap_or_default(),
            pod.name_any(),
            found.record.phase.clone(),
            found.node,
            found.record.addresses.join(" "),
        ]);
    }
    Ok(pods)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.iter().copied());
    table
}

fn services(name: &str) -> String {
    if name == "lan" {
        return format!("API server {}", if api::is_up() { "up" } else { "stopped" });
    }
    let services: Services = read_json(&paths::node_services(name)).unwrap_or_default();
    let texts = services.iter().map(|(service, state)| {
        let running = match (state.pid, state.last_exit) {
            (Some(_), _) => "up",
            (None, Some(0)) => "not needed",
            (None, _) => "down",
        };
        match state.restarts {
            0 => format!("{service} {running}"),
            restarts => format!("{service} {running} (restarts: {restarts})"),
        }
    });
    texts.collect::<Vec<_>>().join(", ")
}
