//! The plugin `loopback`: containerd up to 1.7 attaches every sandbox to a network of its own making, `cni-loopback`, before it
//! attaches it to the cluster's, and finds no pod startable without a plugin of that name. It brings `lo` up and says so.
//!
//! In: a network configuration of `type` `loopback`. Out: a result in the version asked for. Needs no agent.

use std::io;

use serde_json::{Value, json};

use super::wire::{CniError, Code};
use crate::kernel::link::Links;
use crate::kernel::netns::{Netns, NetnsError, Rtnetlink};

/// `type` in the configuration, and the plugin's file name.
pub const PLUGIN: &str = "loopback";
/// containerd asks in 0.3.1.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const LINK: &str = "lo";

/// Does `verb` in the namespace at `netns`; the text is for standard output.
pub(super) fn execute(verb: &str, netns: &str, config: &Value) -> Result<String, CniError> {
    let asked = config.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    let Some(version) = VERSIONS.into_iter().find(|version| *version == asked) else {
        return Err(CniError::new(
            Code::IncompatibleVersion,
            format!("cniVersion {asked:?} is not supported"),
        )
        .details(format!("supported: {}", VERSIONS.join(", "))));
    };
    match verb {
        "ADD" => {
            in_namespace(netns, bring_up)?;
            Ok(format!("{:#}\n", result(netns, version)))
        }
        "CHECK" => match in_namespace(netns, is_up)? {
            true => Ok(String::new()),
            false => Err(CniError::new(Code::Mismatch, format!("{LINK} in {netns} is down"))),
        },
        // It ends with the namespace.
        _ => Ok(String::new()),
    }
}

async fn bring_up(links: Links) -> Result<(), CniError> {
    let outcome = async { links.set_up(LINK, links.index(LINK).await?).await };
    outcome.await.map_err(|error| CniError::new(Code::Kernel, error.to_string()))
}

async fn is_up(links: Links) -> Result<bool, CniError> {
    let found = links.find(LINK).await.map_err(|error| CniError::new(Code::Kernel, error.to_string()))?;
    Ok(found.is_some_and(|link| link.up))
}

fn in_namespace<T: Send, F: Future<Output = Result<T, CniError>>>(
    netns: &str,
    work: impl FnOnce(Links) -> F + Send,
) -> Result<T, CniError> {
    let unusable = |error: NetnsError| CniError::new(Code::UnknownContainer, error.to_string());
    let failed = |error: io::Error| CniError::new(Code::Kernel, error.to_string());
    let inside = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        runtime.block_on(async {
            let netlink = Rtnetlink::connect().map_err(failed)?;
            work(Links::new(netlink.handle.clone())).await
        })
    };
    Netns::open(netns).and_then(|netns| netns.run(inside)).map_err(unusable)?
}

/// Until 0.4.0 an address says its family.
fn result(netns: &str, version: &str) -> Value {
    let ips = [("4", "127.0.0.1/8"), ("6", "::1/128")].map(|(family, address)| {
        let mut entry = json!({ "address": address, "interface": 0 });
        if version.starts_with("0.") {
            entry["version"] = json!(family);
        }
        entry
    });
    let interface = json!({ "name": LINK, "mac": "00:00:00:00:00:00", "sandbox": netns });
    json!({ "cniVersion": version, "interfaces": [interface], "ips": ips, "dns": {} })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::needs_root;

    /// What containerd 1.6 hands over.
    fn config() -> Value {
        json!({ "cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback" })
    }

    #[test]
    fn add_brings_lo_up_and_check_sees_it() {
        if !needs_root() {
            return;
        }
        let netns = Netns::throwaway().unwrap();
        let path = format!("/proc/self/fd/{}", netns.as_raw_fd());
        assert_eq!(execute("CHECK", &path, &config()).unwrap_err().code, Code::Mismatch as u32);
        let printed = execute("ADD", &path, &config()).unwrap();
        let result: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&result["cniVersion"], &result["ips"][1]["version"]), (&json!("0.3.1"), &json!("6")));
        assert_eq!(execute("CHECK", &path, &config()), Ok(String::new()));
        let answered = netns.run(|| std::net::UdpSocket::bind("127.0.0.1:0").is_ok()).unwrap();
        assert!(answered, "127.0.0.1 is an address there");
        assert_eq!(execute("DEL", &path, &config()), Ok(String::new()));
    }

    #[test]
    fn a_namespace_that_is_gone_is_error_3_and_no_failure_of_del() {
        assert_eq!(execute("ADD", "/nowhere", &config()).unwrap_err().code, Code::UnknownContainer as u32);
        assert_eq!(execute("DEL", "/nowhere", &config()), Ok(String::new()));
    }

    #[test]
    fn an_unknown_version_is_error_1() {
        let config = json!({ "cniVersion": "9.9.9", "type": "loopback" });
        assert_eq!(execute("ADD", "", &config).unwrap_err().code, Code::IncompatibleVersion as u32);
    }
}
