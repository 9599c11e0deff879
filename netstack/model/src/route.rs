//! Routes, rules and link settings as values; `netstack::kernel` applies them.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    pub destination: IpNet,
    /// `None` is `main` (or `local` for [`RouteTarget::Local`]).
    pub table: Option<u32>,
    pub target: RouteTarget,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub metric: Option<u32>,
    /// Larger packets are refused (their senders are told), where the link would take them.
    #[serde(default)]
    pub mtu_bytes: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RouteTarget {
    /// Out of this link, by name.
    Link(String),
    /// ICMP unreachable to whoever sends there.
    Unreachable,
    /// AnyIP: delivered locally although no interface has the address (`local ADDR dev lo`).
    Local,
}

/// `ip rule add from SOURCE lookup TABLE priority PRIORITY`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SourceRule {
    pub source: IpNet,
    pub table: u32,
    pub priority: u32,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            RouteTarget::Link(link) => write!(f, "{} dev {link}", self.destination)?,
            RouteTarget::Unreachable => write!(f, "unreachable {}", self.destination)?,
            RouteTarget::Local => write!(f, "local {} dev lo", self.destination)?,
        }
        if let Some(table) = self.table {
            write!(f, " table {table}")?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(metric) = self.metric {
            write!(f, " metric {metric}")?;
        }
        self.mtu_bytes.map_or(Ok(()), |bytes| write!(f, " mtu {bytes}"))
    }
}

impl fmt::Display for SourceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: from {} lookup {}", self.priority, self.source, self.table)
    }
}
