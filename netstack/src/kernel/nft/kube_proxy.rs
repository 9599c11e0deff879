//! What kube-proxy keeps in nf_tables: its own tables of nftables mode, and the chains that `iptables` (nft) made for it.
//!
//! In flow the chains and rules of the kernel; out flow [`Leftover`]s, and on request one transaction that deletes exactly
//! those. Chains that a kubelet makes (KUBE-FIREWALL, KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT), those of other programs
//! (KUBE-ROUTER-...) and all other rules of the chains of the host stay.

use std::fmt;
use std::sync::PoisonError;

use nix::errno::Errno;

use super::foreign::{self, About};
use super::socket::NetfilterSocket;
use super::uapi::*;
use super::wire::{Attributes, Message, Writer};
use super::{ATTEMPTS, NftError, exchange, generation, read_generation};

/// The table of nftables mode, one in `ip` and one in `ip6` (kubernetes, pkg/proxy/nftables).
const TABLE: &str = "kube-proxy";
/// Chains of iptables and ipvs mode (kubernetes, pkg/proxy/iptables and pkg/proxy/ipvs) ...
const CHAINS: [&str; 14] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-POSTROUTING",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-MARK-MASQ",
    "KUBE-MARK-DROP",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];
/// ... and those with a hash behind them, of one Service or endpoint each.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];
/// For names of errors: no table of one owner.
const THEIRS: &str = "of kube-proxy";
const ABOUT: About = About { owner: THEIRS, doing: "delete its rules" };

/// One object of kube-proxy, in the order in which they can be deleted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// A rule in a chain of the host that leads into one of kube-proxy's.
    Jump {
        place: Place,
        handle: u64,
        to: String,
    },
    Chain(Place),
    Table {
        family: u8,
        name: String,
    },
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub family: u8,
    pub table: String,
    pub chain: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", family(self.family), self.table, self.chain)
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump { place, to, .. } => write!(f, "rule of chain {place} that jumps to {to}"),
            Self::Chain(place) => write!(f, "chain {place}"),
            Self::Table { family: number, name } => write!(f, "nft table {} {name}", family(*number)),
        }
    }
}

fn family(number: u8) -> &'static str {
    if number == NFPROTO_IPV6 { "ip6" } else { "ip" }
}

/// Everything of kube-proxy, sorted.
pub fn leftovers() -> Result<Vec<Leftover>, NftError> {
    let mut socket = NetfilterSocket::open().map_err(NftError::Open)?;
    find(&mut socket).map_err(|errno| exchange(THEIRS, "read the rule set", errno))
}

/// Deletes everything of kube-proxy in one transaction; returns what was there.
pub fn remove_leftovers() -> Result<Vec<Leftover>, NftError> {
    let mut socket = NetfilterSocket::open().map_err(NftError::Open)?;
    let turn = generation::turn(socket.netns_cookie());
    for _ in 0..ATTEMPTS {
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = read_generation(&mut socket, THEIRS)?;
        let found = find(&mut socket).map_err(|errno| exchange(THEIRS, "read the rule set", errno))?;
        if foreign::commit(&mut socket, ABOUT, now, &steps(&found), write_step)? {
            return Ok(found);
        }
    }
    Err(NftError::Contended { table: THEIRS.to_owned() })
}

fn find(socket: &mut NetfilterSocket) -> Result<Vec<Leftover>, Errno> {
    let mut found = Vec::new();
    for family in [NFPROTO_IPV4, NFPROTO_IPV6] {
        let table = |found: &mut Vec<Leftover>, message: Message<'_>| found.extend(read_table(&message));
        found.extend(socket.dump(nft(GETTABLE), family, |_| (), table)?);
        let chain = |found: &mut Vec<Leftover>, message: Message<'_>| found.extend(read_chain(&message));
        let chains: Vec<Leftover> = socket.dump(nft(GETCHAIN), family, |_| (), chain)?;
        if !chains.is_empty() {
            let jump = |found: &mut Vec<Leftover>, message: Message<'_>| found.extend(read_jump(&message));
            found.extend(socket.dump(nft(GETRULE), family, |_| (), jump)?);
        }
        found.extend(chains);
    }
    found.sort();
    Ok(found)
}

fn read_table(message: &Message<'_>) -> Option<Leftover> {
    let name = message.attributes().find(NFTA_TABLE_NAME)?.string();
    (name == TABLE).then(|| Leftover::Table { family: message.family(), name })
}

fn read_chain(message: &Message<'_>) -> Option<Leftover> {
    let attributes = message.attributes();
    let (table, chain) =
        (attributes.find(NFTA_CHAIN_TABLE)?.string(), attributes.find(NFTA_CHAIN_NAME)?.string());
    let base = attributes.find(NFTA_CHAIN_HOOK).is_some();
    (is_theirs(&chain) && !base).then(|| Leftover::Chain(Place { family: message.family(), table, chain }))
}

fn read_jump(message: &Message<'_>) -> Option<Leftover> {
    let rule = message.attributes();
    let (table, chain) = (rule.find(NFTA_RULE_TABLE)?.string(), rule.find(NFTA_RULE_CHAIN)?.string());
    let to = destination(rule.find(NFTA_RULE_EXPRESSIONS)?.nested())?;
    let handle = rule.find(NFTA_RULE_HANDLE)?.be64()?;
    let place = Place { family: message.family(), table, chain };
    (is_theirs(&to) && !is_theirs(&place.chain)).then_some(Leftover::Jump { place, handle, to })
}

/// The chain that a rule jumps or goes to.
fn destination(expressions: Attributes<'_>) -> Option<String> {
    let mut named = expressions.filter_map(|expression| {
        let expression = expression.nested();
        let name = expression.find(NFTA_EXPR_NAME)?.string();
        let data = expression.find(NFTA_EXPR_DATA)?.nested();
        (name == "immediate").then_some(data)
    });
    named.find_map(|data| {
        let verdict = data.find(NFTA_IMMEDIATE_DATA)?.nested().find(NFTA_DATA_VERDICT)?.nested();
        Some(verdict.find(NFTA_VERDICT_CHAIN)?.string())
    })
}

/// Whether a chain of that name is kube-proxy's, in the older iptables too.
pub(crate) fn is_theirs(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// Kinds of messages with what they delete: rules go before the chains that they lead to.
fn steps(found: &[Leftover]) -> Vec<(u16, &Leftover)> {
    let chains = || found.iter().filter(|leftover| matches!(leftover, Leftover::Chain(_)));
    let jumps = found.iter().filter(|leftover| matches!(leftover, Leftover::Jump { .. }));
    let tables = found.iter().filter(|leftover| matches!(leftover, Leftover::Table { .. }));
    jumps
        .chain(chains())
        .map(|leftover| (DELRULE, leftover))
        .chain(chains().map(|leftover| (DELCHAIN, leftover)))
        .chain(tables.map(|leftover| (DELTABLE, leftover)))
        .collect()
}

fn write_step(writer: &mut Writer, sequence: u32, flags: u16, (kind, leftover): &(u16, &Leftover)) {
    let kind = *kind;
    let family = match leftover {
        Leftover::Jump { place, .. } | Leftover::Chain(place) => place.family,
        Leftover::Table { family, .. } => *family,
    };
    let message = writer.open_message(nft(kind), flags, sequence, family, 0);
    match leftover {
        Leftover::Jump { place, handle, .. } => {
            writer.string(NFTA_RULE_TABLE, &place.table);
            writer.string(NFTA_RULE_CHAIN, &place.chain);
            writer.be64(NFTA_RULE_HANDLE, *handle);
        }
        Leftover::Chain(place) if kind == DELRULE => {
            writer.string(NFTA_RULE_TABLE, &place.table);
            writer.string(NFTA_RULE_CHAIN, &place.chain);
        }
        Leftover::Chain(place) => {
            writer.string(NFTA_CHAIN_TABLE, &place.table);
            writer.string(NFTA_CHAIN_NAME, &place.chain);
        }
        Leftover::Table { name, .. } => writer.string(NFTA_TABLE_NAME, name),
    }
    writer.close_message(message);
}
