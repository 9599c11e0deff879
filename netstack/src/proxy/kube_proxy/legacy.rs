//! What kube-proxy keeps in the older iptables (x_tables), which only that iptables' own programs read and write.
//!
//! In flows what `iptables-legacy-save` prints; out flow [`Leftover`]s, and on request what `iptables-legacy-restore` reads to
//! delete exactly those, all of a table at once. A table that nothing has used is not looked at: looking would make it.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use crate::kernel::nft::kube_proxy::is_theirs;

/// One of the two families: its programs, and where the kernel names the tables in use.
#[derive(Debug)]
struct Family {
    /// For `-save` and `-restore`.
    program: &'static str,
    /// The same where the older one is the only one.
    alone: &'static str,
    in_use: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family { program: "iptables-legacy", alone: "iptables", in_use: "/proc/thread-self/net/ip_tables_names" },
    Family {
        program: "ip6tables-legacy",
        alone: "ip6tables",
        in_use: "/proc/thread-self/net/ip6_tables_names",
    },
];

/// What the programs of the newer iptables say of themselves.
const NEWER: &str = "nf_tables";

#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    #[error("run {program}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} failed: {said}")]
    Failed { program: String, said: String },
}

/// One object of kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// A rule in a chain of the host that leads into one of kube-proxy's.
    Jump {
        table: Table,
        chain: String,
        to: String,
        /// As `-save` prints it, without `-A`.
        rule: String,
    },
    Chain {
        table: Table,
        chain: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    pub ipv6: bool,
    pub name: String,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", FAMILIES[usize::from(self.ipv6)].program, self.name)
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump { table, chain, to, .. } => {
                write!(f, "rule of chain {table} {chain} that jumps to {to}")
            }
            Self::Chain { table, chain } => write!(f, "chain {table} {chain}"),
        }
    }
}

/// What a look at the older iptables shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    pub(super) leftovers: Vec<Leftover>,
    /// Tables in use that cannot be read, since the host has no program for it.
    pub(super) unread: Vec<Table>,
}

/// Looks at the calling thread's network namespace.
pub(super) fn look() -> Result<Looked, LegacyError> {
    let mut looked = Looked::default();
    for (family, ipv6) in FAMILIES.iter().zip([false, true]) {
        let tables: BTreeSet<String> = in_use(family).into_iter().collect();
        if tables.is_empty() {
            continue;
        }
        match program(family) {
            None => looked.unread.extend(tables.into_iter().map(|name| Table { ipv6, name })),
            Some(program) => {
                for table in tables {
                    let text = run(&format!("{program}-save"), &["-t", &table], "")?;
                    looked.leftovers.extend(read(&Table { ipv6, name: table }, &text));
                }
            }
        }
    }
    looked.leftovers.sort();
    Ok(looked)
}

/// Deletes `leftovers`, all of a table at once.
pub(super) fn remove(leftovers: &[Leftover]) -> Result<(), LegacyError> {
    for (family, ipv6) in FAMILIES.iter().zip([false, true]) {
        let of_family: Vec<&Leftover> = leftovers.iter().filter(|one| one.table().ipv6 == ipv6).collect();
        if let (false, Some(program)) = (of_family.is_empty(), program(family)) {
            run(&format!("{program}-restore"), &["--noflush", "--wait"], &script(&of_family))?;
        }
    }
    Ok(())
}

impl Leftover {
    fn table(&self) -> &Table {
        match self {
            Self::Jump { table, .. } | Self::Chain { table, .. } => table,
        }
    }
}

fn in_use(family: &Family) -> Vec<String> {
    let names = std::fs::read_to_string(family.in_use).unwrap_or_default();
    names.lines().map(ToOwned::to_owned).collect()
}

/// The stem of the programs for a family; `None` where the host has none.
fn program(family: &Family) -> Option<&'static str> {
    let version = |stem: &str| {
        let output = Command::new(format!("{stem}-save")).arg("--version").output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    [family.program, family.alone]
        .into_iter()
        .find(|stem| version(stem).is_some_and(|version| !version.contains(NEWER)))
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, LegacyError> {
    let talk = || -> io::Result<Output> {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = talk().map_err(|source| LegacyError::Run { program: program.to_owned(), source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        return Err(LegacyError::Failed { program: program.to_owned(), said });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// kube-proxy's chains in what `-save` printed of one table, and the rules elsewhere that lead into them.
fn read(table: &Table, text: &str) -> Vec<Leftover> {
    let chain = |line: &str| {
        let chain = line.strip_prefix(':')?.split(' ').next().filter(|chain| is_theirs(chain))?.to_owned();
        Some(Leftover::Chain { table: table.clone(), chain })
    };
    let jump = |line: &str| {
        let rule = line.strip_prefix("-A ")?;
        let chain = rule.split(' ').next().filter(|chain| !is_theirs(chain))?.to_owned();
        let to = target(rule).filter(|to| is_theirs(to))?.to_owned();
        Some(Leftover::Jump { table: table.clone(), chain, to, rule: rule.to_owned() })
    };
    text.lines().filter_map(|line| chain(line).or_else(|| jump(line))).collect()
}

/// Where a rule jumps or goes to; words in quotes are a comment's.
fn target(rule: &str) -> Option<&str> {
    let unquoted: Vec<&str> =
        rule.split('"').step_by(2).flat_map(|part| part.split(' ').filter(|word| !word.is_empty())).collect();
    let at = unquoted.iter().position(|word| matches!(*word, "-j" | "-g"))?;
    unquoted.get(at + 1).copied()
}

/// What `-restore --noflush` reads: a chain that is declared is emptied, and so may be deleted once nothing leads to it.
fn script(leftovers: &[&Leftover]) -> String {
    let tables: BTreeSet<&str> = leftovers.iter().map(|one| one.table().name.as_str()).collect();
    let mut text = String::new();
    for table in tables {
        let here = || leftovers.iter().filter(|one| one.table().name == table);
        let chains = || {
            here().filter_map(|one| match one {
                Leftover::Chain { chain, .. } => Some(chain),
                Leftover::Jump { .. } => None,
            })
        };
        let jumps = here().filter_map(|one| match one {
            Leftover::Jump { rule, .. } => Some(rule),
            Leftover::Chain { .. } => None,
        });
        text += &format!("*{table}\n");
        text.extend(chains().map(|chain| format!(":{chain} - [0:0]\n")));
        text.extend(jumps.map(|rule| format!("-D {rule}\n")));
        text.extend(chains().map(|chain| format!("-X {chain}\n")));
        text += "COMMIT\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::tests::{in_namespace, run as sh};

    /// In the kernel, as kube-proxy's iptables mode and a kubelet leave it, beside rules of the host's own.
    const HOST_AND_KUBE_PROXY: &str = r#"*nat
:PREROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes -j service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "not -j KUBE-SERVICES" -j MINE
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SVC-BBBBBBBBBBBBBBBB -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 192.0.2.1:6443
-A MINE -p tcp -m tcp --dport 2222 -j REDIRECT --to-ports 22
COMMIT
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
COMMIT
"#;

    fn nat() -> Table {
        Table { ipv6: false, name: "nat".to_owned() }
    }

    #[test]
    fn chains_of_kube_proxy_are_told_from_those_of_the_kubelet_and_of_the_host() {
        let nat_text = HOST_AND_KUBE_PROXY.split("COMMIT").next().unwrap();
        let said: Vec<String> = read(&nat(), nat_text).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "chain iptables-legacy nat KUBE-SEP-AAAAAAAAAAAAAAAA",
                "chain iptables-legacy nat KUBE-SERVICES",
                "chain iptables-legacy nat KUBE-SVC-BBBBBBBBBBBBBBBB",
                "rule of chain iptables-legacy nat PREROUTING that jumps to KUBE-SERVICES",
            ]
        );
    }

    #[test]
    fn a_script_empties_unlinks_and_deletes_in_that_order() {
        let chain = Leftover::Chain { table: nat(), chain: "KUBE-SERVICES".to_owned() };
        let jump = Leftover::Jump {
            table: nat(),
            chain: "OUTPUT".to_owned(),
            to: "KUBE-SERVICES".to_owned(),
            rule: "OUTPUT -m comment --comment \"service portals\" -j KUBE-SERVICES".to_owned(),
        };
        assert_eq!(
            script(&[&jump, &chain]),
            "*nat\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -m comment --comment \"service portals\" -j KUBE-SERVICES\n\
             -X KUBE-SERVICES\nCOMMIT\n"
        );
    }

    #[test]
    fn in_the_kernel_only_what_is_kube_proxys_goes() {
        in_namespace(|| {
            if program(&FAMILIES[0]).is_none() {
                eprintln!("SKIPPED: the host has no iptables-legacy");
                return;
            }
            assert_eq!(look().unwrap(), Looked::default());
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("rules");
            std::fs::write(&path, HOST_AND_KUBE_PROXY).unwrap();
            let (path, v6) =
                (path.display(), r"sed 's/10.96.0.1.32/fd00::1\/128/; s/192.0.2.1:6443/[2001:db8::1]:6443/'");
            sh(&format!("iptables-legacy-restore {path}; {v6} {path} | ip6tables-legacy-restore"));
            let found = look().unwrap().leftovers;
            assert_eq!(found.len(), 12, "{found:?}");
            remove(&found).unwrap();
            assert_eq!(look().unwrap(), Looked::default());
            for save in ["iptables-legacy-save", "ip6tables-legacy-save"] {
                let left = sh(save);
                for kept in ["KUBE-KUBELET-CANARY", "-A INPUT -j KUBE-FIREWALL", "--to-ports 22", "-j MINE"] {
                    assert!(left.contains(kept), "{kept} is gone: {left}");
                }
            }
        });
    }
}
