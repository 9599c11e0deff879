//! The same policies in kube-router's layout: a chain a policy, a set for its pods and one for the peers of each rule, a chain a
//! pod of this node that jumps to the chains of its policies, two rules a pod in one chain that `FORWARD` jumps to. Every change writes all of it anew.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::Command;
use std::time::Instant;

use super::{APPS, NAMESPACES, PODS, POLICIES, PORT, addresses, app, feed, namespace, rules};

/// What `ipset restore` and `iptables-restore` read, by family.
pub(super) struct Peer {
    sets: [String; 2],
    rules: [String; 2],
}

const COMMANDS: [&str; 2] = ["iptables-restore", "ip6tables-restore"];
const JUMP: &str = "FORWARD -j KUBE-ROUTER-FORWARD";
const NOBODY_ALLOWED: &str = "-m mark ! --mark 0x10000/0x10000 -j REJECT";

impl Peer {
    pub(super) fn of(own: &[[IpAddr; 2]]) -> Self {
        let members = |family: usize, is: &dyn Fn(usize) -> bool| -> Vec<IpAddr> {
            (0..PODS).filter(|pod| is(*pod)).map(|pod| addresses(pod, own)[family]).collect()
        };
        let sets = [0, 1].map(|family| {
            let mut text = String::new();
            for i in 0..POLICIES {
                let of = rules(i);
                let about = |pod: usize, ns: usize, wanted: usize| namespace(pod) == ns && app(pod) == wanted;
                let subject = members(family, &|pod| about(pod, of.namespace, of.subject));
                let from = members(family, &|pod| {
                    about(pod, of.namespace, of.from_app) || namespace(pod) == of.from_namespace
                });
                let to = members(family, &|pod| app(pod) == of.to_app);
                for (name, addresses) in [("POD", subject), ("SRC", from), ("DST", to)] {
                    write_set(&mut text, &set_name(name, family, i), family, &addresses);
                }
            }
            text
        });
        let rules = [0, 1].map(|family| restore(family, own));
        Self { sets, rules }
    }

    /// One full sync, in milliseconds. Making the text is not counted.
    pub(super) fn sync(&self) -> anyhow::Result<f64> {
        let started_at = Instant::now();
        for ((sets, rules), command) in self.sets.iter().zip(&self.rules).zip(COMMANDS) {
            feed(Command::new("ipset").args(["restore", "-exist"]), sets)?;
            feed(Command::new(command).args(["-w", "5"]), rules)?;
        }
        Ok(started_at.elapsed().as_secs_f64() * 1000.0)
    }

    /// Lets packets pass by its rules, or go through them again.
    pub(super) fn switch(&self, on: bool) -> anyhow::Result<()> {
        let verb = if on { "-A" } else { "-D" };
        for command in COMMANDS {
            feed(
                Command::new(command).args(["--noflush", "-w", "5"]),
                &format!("*filter\n{verb} {JUMP}\nCOMMIT\n"),
            )?;
        }
        Ok(())
    }

    pub(super) fn remove(&self) -> anyhow::Result<()> {
        for command in COMMANDS {
            feed(&mut Command::new(command), "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")?;
        }
        feed(Command::new("ipset").arg("restore"), "flush\ndestroy\n")
    }
}

fn set_name(name: &str, family: usize, policy: usize) -> String {
    format!("KUBE-{name}-{}-{policy}", family * 2 + 4)
}

/// Made beside, filled, and put in place of what was there.
fn write_set(text: &mut String, name: &str, family: usize, addresses: &[IpAddr]) {
    let kind = ["inet", "inet6"][family];
    for set in [name, "TMP"] {
        let set = if set == "TMP" { format!("TMP-{kind}") } else { set.to_owned() };
        let _ = writeln!(text, "create {set} hash:ip family {kind}");
    }
    let _ = writeln!(text, "flush TMP-{kind}");
    for address in addresses {
        let _ = writeln!(text, "add TMP-{kind} {address}");
    }
    let _ = writeln!(text, "swap TMP-{kind} {name}");
}

/// The whole filter table of a family.
fn restore(family: usize, own: &[[IpAddr; 2]]) -> String {
    let mut chains = String::from("*filter\n:FORWARD ACCEPT [0:0]\n:KUBE-ROUTER-FORWARD - [0:0]\n");
    let mut text = format!("-A {JUMP}\n");
    for i in 0..POLICIES {
        let _ = writeln!(chains, ":KUBE-NWPLCY-{i} - [0:0]");
        for (source, destination) in [("SRC", "POD"), ("POD", "DST")] {
            let [source, destination] = [source, destination].map(|name| set_name(name, family, i));
            let pair = format!("-m set --match-set {source} src -m set --match-set {destination} dst");
            let _ = writeln!(
                text,
                "-A KUBE-NWPLCY-{i} {pair} -p tcp -m tcp --dport {PORT} -j MARK --set-xmark 0x10000/0x10000\n\
                 -A KUBE-NWPLCY-{i} {pair} -p tcp -m tcp --dport {PORT} -m mark --mark 0x10000/0x10000 -j RETURN"
            );
        }
    }
    for (pod, own_addresses) in own.iter().enumerate() {
        let address = own_addresses[family];
        let _ = writeln!(chains, ":KUBE-POD-FW-{pod} - [0:0]");
        let _ = writeln!(text, "-A KUBE-POD-FW-{pod} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        let of_pod =
            (0..POLICIES).filter(|i| i % NAMESPACES == namespace(pod) && i / NAMESPACES % APPS == app(pod));
        for i in of_pod {
            let _ = writeln!(text, "-A KUBE-POD-FW-{pod} -j KUBE-NWPLCY-{i}");
        }
        let _ = writeln!(text, "-A KUBE-POD-FW-{pod} {NOBODY_ALLOWED}");
        let _ = writeln!(text, "-A KUBE-POD-FW-{pod} -j MARK --set-xmark 0x0/0x10000");
        for way in ["-d", "-s"] {
            let _ = writeln!(text, "-A KUBE-ROUTER-FORWARD {way} {address} -j KUBE-POD-FW-{pod}");
        }
    }
    format!("{chains}{text}COMMIT\n")
}
