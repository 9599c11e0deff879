//! A kube-proxy on this node: one that runs, and what one left in the kernel.
//!
//! In flow processes, links and the rule set; out flows one sentence with the remedy, and on request a clean-up. Chains of
//! the older iptables (x_tables) are not seen; virtual servers of IPVS are named, not removed.

use std::collections::BTreeMap;
use std::fs;

use crate::kernel::nft::NftError;
use crate::kernel::nft::kube_proxy::{Leftover, leftovers};

/// The dummy link of ipvs mode, which bears every address of a Service.
const IPVS_LINK: &str = "kube-ipvs0";

/// What of kube-proxy is on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeProxy {
    /// Process ids in this network namespace.
    pub running: Vec<u32>,
    pub leftovers: Vec<Leftover>,
    pub ipvs: bool,
}

impl KubeProxy {
    /// Looks at the calling thread's network namespace.
    pub fn look() -> Result<Self, NftError> {
        let ipvs = nix::net::if_::if_nametoindex(IPVS_LINK).is_ok();
        Ok(Self { running: running(), leftovers: leftovers()?, ipvs })
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
        if !self.leftovers.is_empty() {
            there.push(format!("has rules here ({})", summary(&self.leftovers)));
            remedies.push("run `weft cleanup --kube-proxy` on this node");
        }
        if self.ipvs {
            there.push(format!("has virtual servers of IPVS here (link {IPVS_LINK})"));
            remedies.push("run `kube-proxy --cleanup` on this node or reboot it");
        }
        (!there.is_empty()).then(|| format!("{}: {}", there.join(" and "), remedies.join(", then ")))
    }
}

/// Tables by name, chains and rules by number.
fn summary(leftovers: &[Leftover]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut tables = Vec::new();
    for leftover in leftovers {
        match leftover {
            Leftover::Table { .. } => tables.push(leftover.to_string()),
            Leftover::Chain(_) => *counts.entry("chains KUBE-* of iptables".to_owned()).or_default() += 1,
            Leftover::Jump { .. } => *counts.entry("rules that jump to them".to_owned()).or_default() += 1,
        }
    }
    let counted = counts.iter().map(|(what, count)| format!("{count} {what}"));
    tables.into_iter().chain(counted).collect::<Vec<_>>().join(", ")
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
                     1 rules that jump to them) and has virtual servers of IPVS here (link kube-ipvs0): stop it \
                     (kubectl -n kube-system delete daemonset kube-proxy), then run `weft cleanup --kube-proxy` on \
                     this node, then run `kube-proxy --cleanup` on this node or reboot it",
                    process.id()
                )
            );
        });
    }
}
