//! A kube-proxy on this node: one that runs, and what one left in the kernel.
//!
//! In flow processes, links, both rule sets (nf_tables, and `legacy` the older x_tables) and the virtual servers of IPVS; out flows one
//! sentence with the remedy, and on request a clean-up. Virtual servers are named, not removed.

mod legacy;

use std::collections::BTreeMap;
use std::fs;

use crate::kernel::nft::NftError;
use crate::kernel::nft::kube_proxy::{self, Leftover};

pub use legacy::LegacyError;

/// The dummy link of ipvs mode, which bears every address of a Service.
pub const IPVS_LINK: &str = "kube-ipvs0";
/// Virtual servers, one a line that begins with its protocol; absent where the kernel has no IPVS (ip_vs_ctl.c).
const IPVS_SERVERS: &str = "/proc/thread-self/net/ip_vs";
const IPVS_PROTOCOLS: [&str; 4] = ["TCP ", "UDP ", "SCTP ", "FWM "];

/// What of kube-proxy is on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeProxy {
    /// Process ids in this network namespace.
    pub running: Vec<u32>,
    pub leftovers: Vec<Leftover>,
    pub legacy: Vec<legacy::Leftover>,
    /// Tables of the older iptables that are in use here and cannot be read for want of its programs.
    pub unread: Vec<legacy::Table>,
    /// The link of ipvs mode is there.
    pub ipvs_link: bool,
    pub ipvs_servers: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum KubeProxyError {
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error(transparent)]
    Legacy(#[from] LegacyError),
}

impl KubeProxy {
    /// Looks at the calling thread's network namespace.
    pub fn look() -> Result<Self, KubeProxyError> {
        let looked = legacy::look()?;
        Ok(Self {
            running: running(),
            leftovers: kube_proxy::leftovers()?,
            legacy: looked.leftovers,
            unread: looked.unread,
            ipvs_link: nix::net::if_::if_nametoindex(IPVS_LINK).is_ok(),
            ipvs_servers: servers(&fs::read_to_string(IPVS_SERVERS).unwrap_or_default()),
        })
    }

    /// A line for each object that [`Self::remove`] deletes.
    pub fn objects(&self) -> impl Iterator<Item = String> {
        self.leftovers.iter().map(ToString::to_string).chain(self.legacy.iter().map(ToString::to_string))
    }

    /// Deletes the rules, in nf_tables all at once, then in the older iptables a table at once.
    pub fn remove(&self) -> Result<(), KubeProxyError> {
        kube_proxy::remove_leftovers()?;
        Ok(legacy::remove(&self.legacy)?)
    }

    /// One line that says what is there and what to do; `None` when nothing is.
    pub fn sentence(&self) -> Option<String> {
        let mut there = Vec::new();
        let mut remedies = Vec::new();
        if !self.running.is_empty() {
            let pids: Vec<String> = self.running.iter().map(ToString::to_string).collect();
            there.push(format!("runs beside Weft (pid {})", pids.join(", ")));
            remedies.push("stop it (kubectl -n kube-system delete daemonset kube-proxy)");
        }
        if self.objects().next().is_some() {
            there.push(format!("has rules here ({})", self.summary()));
        }
        if self.ipvs_link {
            there.push(format!("has the Services' addresses here (link {IPVS_LINK})"));
        }
        if self.ipvs_link || self.objects().next().is_some() {
            remedies.push("run `weft cleanup --kube-proxy` on this node");
        }
        if self.ipvs_servers > 0 {
            there.push(format!("perhaps has virtual servers of IPVS here ({})", self.ipvs_servers));
            remedies.push("run `kube-proxy --cleanup` on this node or reboot it");
        }
        (!there.is_empty()).then(|| format!("{}: {}", there.join(" and "), remedies.join(", then ")))
    }
}

impl KubeProxy {
    /// Tables by name, chains and rules by number.
    fn summary(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut tables = Vec::new();
        for leftover in &self.leftovers {
            match leftover {
                Leftover::Table { .. } => tables.push(leftover.to_string()),
                Leftover::Chain(_) => *counts.entry("chains KUBE-* of iptables").or_default() += 1,
                Leftover::Jump { .. } => *counts.entry("rules that jump to them").or_default() += 1,
            }
        }
        for leftover in &self.legacy {
            match leftover {
                legacy::Leftover::Chain { .. } => {
                    *counts.entry("chains KUBE-* of iptables-legacy").or_default() += 1;
                }
                legacy::Leftover::Jump { .. } => *counts.entry("rules that jump to them").or_default() += 1,
            }
        }
        let counted = counts.iter().map(|(what, count)| format!("{count} {what}"));
        tables.into_iter().chain(counted).collect::<Vec<_>>().join(", ")
    }
}

/// Virtual servers in the kernel's list of them.
fn servers(list: &str) -> usize {
    list.lines().filter(|line| IPVS_PROTOCOLS.iter().any(|protocol| line.starts_with(protocol))).count()
}

/// Processes of that name in the calling thread's network namespace.
fn running() -> Vec<u32> {
    let Ok(own) = fs::read_link("/proc/thread-self/ns/net") else { return Vec::new() };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let named =
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "kube-proxy\n");
            named && fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|netns| netns == own)
        })
        .collect();
    pids.sort_unstable();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::tests::{in_namespace, run};

    #[test]
    fn a_node_without_kube_proxy_says_nothing() {
        assert_eq!(KubeProxy::default().sentence(), None);
        in_namespace(|| assert_eq!(KubeProxy::look().unwrap(), KubeProxy::default()));
    }

    #[test]
    fn a_process_rules_and_the_link_of_ipvs_are_named_with_their_remedies() {
        in_namespace(|| {
            run("nft add table ip kube-proxy; iptables-nft -t nat -N KUBE-SERVICES");
            run("iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES; ip link add kube-ipvs0 type veth");
            let folder = tempfile::tempdir().unwrap();
            let program = folder.path().join("kube-proxy");
            // A copy could be busy: whatever another test starts meanwhile holds it open for writing.
            std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
            let mut process = std::process::Command::new(program).arg("60").spawn().unwrap();
            // The kernel lets the parent go on before it names the child.
            let comm = format!("/proc/{}/comm", process.id());
            while fs::read_to_string(&comm).unwrap() != "kube-proxy\n" {
                std::thread::yield_now();
            }
            let looked = KubeProxy::look().unwrap();
            process.kill().unwrap();
            process.wait().unwrap();
            assert_eq!(looked.running, [process.id()]);
            assert_eq!(
                looked.sentence().unwrap(),
                format!(
                    "runs beside Weft (pid {}) and has rules here (nft table ip kube-proxy, 1 chains KUBE-* of iptables, \
                     1 rules that jump to them) and has the Services' addresses here (link kube-ipvs0): stop it \
                     (kubectl -n kube-system delete daemonset kube-proxy), then run `weft cleanup --kube-proxy` on \
                     this node",
                    process.id()
                )
            );
        });
    }

    /// The kernel's list as ip_vs_ctl.c prints it.
    #[test]
    fn virtual_servers_are_counted_and_their_endpoints_are_not() {
        let list = "IP Virtual Server version 1.2.1 (size=4096)\n\
                    Prot LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n\
                    TCP  0A600001:01BB rr \n  -> C0000201:192B      Masq    1      0          0         \n\
                    UDP  [fd00:0096:0000:0000:0000:0000:0000:000a]:0035 rr \n";
        assert_eq!(servers(list), 2);
        assert_eq!(servers(""), 0);
        let some = KubeProxy { ipvs_servers: 2, ..KubeProxy::default() };
        let sentence = some.sentence().unwrap();
        assert!(sentence.contains("IPVS here (2): run `kube-proxy --cleanup`"), "{sentence}");
    }
}
