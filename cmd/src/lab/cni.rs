//! The container runtime's side of CNI 1.0/1.1 (SPEC.md, "Section 3: Execution of network configurations"): reads the
//! network configuration list and runs its plugins as a runtime does, with the protocol's variables and standard input.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

use super::reaper::Reaper;

const CONFIGURATION_DIRECTORY: &str = "/etc/cni/net.d";
const PLUGIN_DIRECTORY: &str = "/opt/cni/bin";

/// One attachment: a pod's namespace and what the protocol calls it.
#[derive(Clone, Debug)]
pub(super) struct Attachment {
    pub(super) container_id: String,
    pub(super) netns: PathBuf,
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) uid: String,
    /// `hostPort`s as the capability `portMappings` hands them over.
    pub(super) port_mappings: Vec<Value>,
}

/// The first configuration list by name, as runtimes choose it.
pub(super) fn configuration() -> Option<PathBuf> {
    let mut lists: Vec<PathBuf> = std::fs::read_dir(CONFIGURATION_DIRECTORY)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "conflist"))
        .collect();
    lists.sort();
    lists.into_iter().next()
}

/// ADD through every plugin of the list; the result of the last one.
pub(super) fn add(reaper: &Reaper, attachment: &Attachment) -> anyhow::Result<Value> {
    let list = read_configuration()?;
    let mut previous = None;
    for plugin in plugins(&list)? {
        let configuration = plugin_configuration(&list, plugin, &attachment.port_mappings, previous.as_ref());
        previous =
            Some(run(reaper, "ADD", attachment, plugin, &configuration)?.context("ADD gave no result")?);
    }
    previous.context("the configuration list names no plugin")
}

/// DEL through the plugins in reverse order, each given the result of ADD.
pub(super) fn del(reaper: &Reaper, attachment: &Attachment, result: Option<&Value>) -> anyhow::Result<()> {
    let list = read_configuration()?;
    for plugin in plugins(&list)?.iter().rev() {
        let configuration = plugin_configuration(&list, plugin, &attachment.port_mappings, result);
        run(reaper, "DEL", attachment, plugin, &configuration)?;
    }
    Ok(())
}

/// Addresses of a result, without prefix lengths.
pub(super) fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    ips.iter().filter_map(|ip| ip["address"].as_str()?.split('/').next()).map(str::to_owned).collect()
}

fn read_configuration() -> anyhow::Result<Value> {
    let path = configuration().context("no CNI configuration yet: the agent writes it when ADD can work")?;
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

fn plugins(list: &Value) -> anyhow::Result<&Vec<Value>> {
    list["plugins"].as_array().context("the configuration list has no plugins")
}

/// What a plugin has the capability for becomes `runtimeConfig`; the capabilities themselves are not passed on.
fn plugin_configuration(
    list: &Value,
    plugin: &Value,
    port_mappings: &[Value],
    previous: Option<&Value>,
) -> Value {
    let mut configuration = plugin.clone();
    let capable = configuration["capabilities"]["portMappings"] == true;
    if let Some(fields) = configuration.as_object_mut() {
        fields.remove("capabilities");
    }
    if capable && !port_mappings.is_empty() {
        configuration["runtimeConfig"] = json!({ "portMappings": port_mappings });
    }
    configuration["cniVersion"] = list["cniVersion"].clone();
    configuration["name"] = list["name"].clone();
    if let Some(previous) = previous {
        configuration["prevResult"] = previous.clone();
    }
    configuration
}

/// Runs one plugin. Its error object becomes the error's text.
fn run(
    reaper: &Reaper,
    verb: &str,
    attachment: &Attachment,
    plugin: &Value,
    configuration: &Value,
) -> anyhow::Result<Option<Value>> {
    let kind = plugin["type"].as_str().context("a plugin without a type")?;
    let mut command = Command::new(Path::new(PLUGIN_DIRECTORY).join(kind));
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", &attachment.container_id)
        .env("CNI_NETNS", &attachment.netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", PLUGIN_DIRECTORY)
        .env("CNI_ARGS", arguments(attachment))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut running = reaper.spawn(&mut command).with_context(|| format!("start the plugin {kind}"))?;
    if let Some(mut input) = running.child.stdin.take() {
        input.write_all(configuration.to_string().as_bytes()).context("write to the plugin")?;
    }
    let mut output = Vec::new();
    if let Some(mut pipe) = running.child.stdout.take() {
        pipe.read_to_end(&mut output).context("read from the plugin")?;
    }
    let code = running.ended.recv().context("wait for the plugin")?;
    let answer = serde_json::from_slice::<Value>(&output).ok();
    if code != 0 {
        let error = answer.unwrap_or_else(|| json!({ "msg": String::from_utf8_lossy(&output) }));
        bail!(complaint(kind, verb, code, &error));
    }
    if verb == "ADD" && answer.is_none() {
        return Err(anyhow!("{kind} {verb}: standard output is not a result"));
    }
    Ok(answer)
}

fn arguments(attachment: &Attachment) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        attachment.namespace, attachment.pod, attachment.container_id, attachment.uid
    )
}

fn complaint(kind: &str, verb: &str, code: i32, error: &Value) -> String {
    let message = error["msg"].as_str().unwrap_or_default();
    let details = error["details"].as_str().filter(|details| !details.is_empty());
    match details {
        Some(details) => format!("{kind} {verb} failed ({code}): {message}: {details}"),
        None => format!("{kind} {verb} failed ({code}): {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_given_the_lists_name_and_version_what_it_is_capable_of_and_the_previous_result() {
        let list =
            json!({ "cniVersion": "1.1.0", "name": "weft", "plugins": [{ "type": "weft", "mtu": 1420 }] });
        let previous = json!({ "ips": [] });
        let ports = [json!({ "hostPort": 80, "containerPort": 8080 })];
        assert_eq!(
            plugin_configuration(&list, &list["plugins"][0], &ports, Some(&previous)),
            json!({ "cniVersion": "1.1.0", "name": "weft", "type": "weft", "mtu": 1420, "prevResult": { "ips": [] } })
        );
        let capable = json!({ "type": "weft", "capabilities": { "portMappings": true } });
        assert_eq!(
            plugin_configuration(&list, &capable, &ports, None),
            json!({ "cniVersion": "1.1.0", "name": "weft", "type": "weft", "runtimeConfig": { "portMappings": ports } })
        );
    }

    #[test]
    fn addresses_come_in_the_order_of_the_result_without_their_prefix_lengths() {
        let result = json!({ "ips": [{ "address": "10.244.0.2/32" }, { "address": "fd00:10:244::2/128" }] });
        assert_eq!(addresses(&result), ["10.244.0.2", "fd00:10:244::2"]);
    }
}
