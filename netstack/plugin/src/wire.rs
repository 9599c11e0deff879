//! What travels: the request of the plugin to the agent, and CNI's own results and errors.
//!
//! Source: CNI specification 1.1.0, sections "Section 2: Execution Protocol" and "Section 5: Result Types".

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Versions this plugin speaks; a result is in the version that was asked for.
pub const SUPPORTED_VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
/// The newest, for answers to requests that name none.
pub const NEWEST_VERSION: &str = "1.1.0";

/// Body of `POST /cni/{add,del,check,status,gc}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CniRequest {
    /// `CNI_CONTAINERID`; empty for STATUS and GC.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; may be empty for DEL.
    pub netns: String,
    /// `CNI_ARGS`: `K8S_POD_NAMESPACE`, `K8S_POD_NAME`, `K8S_POD_UID` and others.
    pub args: BTreeMap<String, String>,
    /// The network configuration of standard input.
    pub config: Value,
}

impl CniRequest {
    /// `cniVersion` of the configuration, when it is one we speak.
    pub fn version(&self) -> Result<&'static str, CniError> {
        let asked = self.config.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
        SUPPORTED_VERSIONS.into_iter().find(|version| *version == asked).ok_or_else(|| {
            CniError::new(Code::IncompatibleVersion, format!("cniVersion {asked} is not supported"))
                .details(format!("supported: {}", SUPPORTED_VERSIONS.join(", ")))
        })
    }
}

/// Error codes of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion = 1,
    UnsupportedField = 2,
    /// The container is unknown or gone: the runtime need not clean up.
    UnknownContainer = 3,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfig = 7,
    TryAgainLater = 11,
    /// STATUS: ADD cannot work now.
    Unavailable = 50,
    /// STATUS: and existing containers may have limited connectivity.
    Limited = 51,
    /// From 100 on, codes belong to the plugin: the kernel refused.
    Kernel = 100,
    /// CHECK found something else than ADD made.
    Mismatch = 101,
    /// No address is free.
    Exhausted = 102,
    /// The Store cannot be written.
    Store = 103,
    /// Another pod of the node has this hostPort.
    HostPortTaken = 104,
}

/// The error object of the specification, still without its `cniVersion`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    pub code: u32,
    pub msg: String,
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code: code as u32, msg: msg.into(), details: String::new() }
    }

    #[must_use]
    pub fn details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    pub fn render(&self, version: &str) -> Value {
        let mut value = json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            value["details"] = json!(self.details);
        }
        value
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (CNI error {})", self.msg, self.code)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for CniError {}

/// What ADD made, independent of the version asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddResult {
    pub host_link: String,
    pub host_mac: [u8; 6],
    pub ifname: String,
    pub mac: [u8; 6],
    pub netns: String,
    pub mtu_bytes: u32,
    /// Address and gateway, the Node's primary family first.
    pub addresses: Vec<(IpAddr, IpAddr)>,
}

impl AddResult {
    /// The result object: 0.4.0 says the family of an address, 1.1.0 says the MTU of an interface.
    pub fn render(&self, version: &str) -> Value {
        let ips: Vec<Value> =
            self.addresses.iter().map(|(ip, gateway)| ip_entry(*ip, *gateway, version)).collect();
        let routes: Vec<Value> = self
            .addresses
            .iter()
            .map(|(ip, gateway)| json!({ "dst": if ip.is_ipv6() { "::/0" } else { "0.0.0.0/0" }, "gw": gateway }))
            .collect();
        let mut interfaces = [
            json!({ "name": self.host_link, "mac": mac_text(self.host_mac) }),
            json!({ "name": self.ifname, "mac": mac_text(self.mac), "sandbox": self.netns }),
        ];
        if version == "1.1.0" {
            for interface in &mut interfaces {
                interface["mtu"] = json!(self.mtu_bytes);
            }
        }
        json!({ "cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {} })
    }
}

fn ip_entry(ip: IpAddr, gateway: IpAddr, version: &str) -> Value {
    let mut entry = json!({ "address": IpNet::from(ip), "gateway": gateway, "interface": 1 });
    if version == "0.4.0" {
        entry["version"] = json!(if ip.is_ipv6() { "6" } else { "4" });
    }
    entry
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Answer to VERSION, which asks nobody.
pub fn versions() -> Value {
    json!({ "cniVersion": NEWEST_VERSION, "supportedVersions": SUPPORTED_VERSIONS })
}

/// `K8S_POD_NAME=web-0;K8S_POD_NAMESPACE=default` as a map; empty parts are nothing.
pub fn parse_args(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    let parts = text.split(';').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                CniError::new(Code::InvalidEnvironment, format!("CNI_ARGS: {part:?} is not KEY=VALUE"))
            })?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

/// A value of `runtimeConfig` with its names in lower case. The conventions say `hostPort`, containerd writes `HostPort`: plugins in
/// Go do not tell them apart.
pub fn lower_case(given: &Value) -> Value {
    match given {
        Value::Array(entries) => entries.iter().map(lower_case).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.to_ascii_lowercase(), lower_case(value))).collect()
        }
        other => other.clone(),
    }
}

/// `container_id` and `ifname` of GC's `cni.dev/valid-attachments`.
pub fn valid_attachments(config: &Value) -> Result<Vec<(String, String)>, CniError> {
    let invalid =
        |what: &str| CniError::new(Code::InvalidConfig, format!("cni.dev/valid-attachments: {what}"));
    let list = config
        .get("cni.dev/valid-attachments")
        .or_else(|| config.get("cni.dev/attachments"))
        .ok_or_else(|| invalid("missing"))?;
    let list = list.as_array().ok_or_else(|| invalid("not a list"))?;
    list.iter()
        .map(|entry| {
            let field = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
            field("containerID")
                .zip(field("ifname"))
                .ok_or_else(|| invalid("an entry lacks containerID or ifname"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> AddResult {
        AddResult {
            host_link: "weftp0123456789a".to_owned(),
            host_mac: [2, 0x57, 0x45, 0x46, 0x54, 1],
            ifname: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            netns: "/run/netns/a".to_owned(),
            mtu_bytes: 1420,
            addresses: vec![
                ("10.244.1.2".parse().unwrap(), "169.254.1.1".parse().unwrap()),
                ("fd00::2".parse().unwrap(), "fe80::1".parse().unwrap()),
            ],
        }
    }

    #[test]
    fn a_result_is_in_the_version_asked() {
        let old = result().render("0.4.0");
        assert_eq!(
            old["ips"][0],
            json!({"address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1, "version": "4"})
        );
        assert_eq!(old["ips"][1]["version"], "6");
        let middle = result().render("1.0.0");
        assert_eq!(
            (&middle["ips"][0]["version"], &middle["interfaces"][1]["mtu"]),
            (&Value::Null, &Value::Null)
        );
        let new = result().render("1.1.0");
        assert_eq!(new["interfaces"][1]["mtu"], 1420);
        assert_eq!(
            new["routes"],
            json!([
                {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}
            ])
        );
        assert_eq!(new["cniVersion"], "1.1.0");
    }

    #[test]
    fn a_version_we_do_not_speak_is_error_1() {
        let request =
            |version: &str| CniRequest { config: json!({"cniVersion": version}), ..CniRequest::default() };
        assert_eq!(request("1.0.0").version(), Ok("1.0.0"));
        assert_eq!(request("0.2.0").version().unwrap_err().code, 1);
        assert_eq!(CniRequest::default().version().unwrap_err().code, 1);
    }

    #[test]
    fn args_are_pairs() {
        let args = parse_args("IgnoreUnknown=1;K8S_POD_NAME=web-0;").unwrap();
        assert_eq!(args["K8S_POD_NAME"], "web-0");
        assert_eq!(parse_args("x").unwrap_err().code, 4);
    }

    #[test]
    fn gc_without_a_list_is_refused_rather_than_deleting_everything() {
        assert_eq!(valid_attachments(&json!({})).unwrap_err().code, 7);
        assert_eq!(valid_attachments(&json!({"cni.dev/valid-attachments": [{}]})).unwrap_err().code, 7);
        let config = json!({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]});
        assert_eq!(valid_attachments(&config).unwrap(), [("a".to_owned(), "eth0".to_owned())]);
    }
}
