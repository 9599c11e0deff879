//! Ways through the firewalls of other programs (Docker, ufw, firewalld, a rule set of the administrator's own).
//!
//! ```text
//!  [Passage] --+
//!              +--> accept rules to add at the head of their chains, rules of ours to take away --> one transaction
//!  base chains that end in a drop, and what of ours stands in them --+
//! ```
//!
//! A base chain of type filter ends in a drop when its policy says so or its last rule drops or rejects whatever reaches it.
//! Our rules are known by the identity in their user data, whoever made a chain; they are written as iptables itself would
//! write them, so that its listings stay readable. Chains of the older iptables (x_tables) are not seen.

use std::sync::PoisonError;

use nix::errno::Errno;
use weft_model::ruleset::{Field, Hook, Passage, Rule, Statement};

use super::batch::{HOOKS, Identity, write_body};
use super::expression::Answer;
use super::foreign::{self, About};
use super::socket::NetfilterSocket;
use super::uapi::*;
use super::wire::{Attributes, Message, Writer};
use super::{ATTEMPTS, NftError, exchange, generation, read_generation};
use crate::reconcile::Trust;

const NFTA_CHAIN_POLICY_DROP: u32 = 0;
/// Tables of ours.
const OWN_PREFIX: &str = "weft-";
/// For names of errors: no table of one owner.
const FOREIGN: &str = "of others";
const ABOUT: About = About { owner: FOREIGN, doing: "let ours through a chain that drops" };

/// What [`Passages::ensure`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// One line per change.
    pub changed: Vec<String>,
    /// Chains that end in a drop and now let ours through, such as `ip filter FORWARD`.
    pub open: Vec<String>,
}

/// Owner of the rules of ours in tables of others. Calls are synchronous.
#[derive(Default)]
pub struct Passages {
    socket: Option<NetfilterSocket>,
    settled: Option<Settled>,
}

struct Settled {
    wanted: Vec<Passage>,
    generation: u32,
    open: Vec<String>,
}

/// A foreign base chain, and what it holds.
#[derive(Debug)]
struct Chain {
    family: u8,
    table: String,
    name: String,
    hook: Hook,
    drops: bool,
    ours: Vec<(Identity, u64)>,
}

impl Chain {
    fn text(&self) -> String {
        let family = match self.family {
            NFPROTO_IPV4 => "ip",
            NFPROTO_IPV6 => "ip6",
            _ => "inet",
        };
        format!("{family} {} {}", self.table, self.name)
    }

    /// `None` for a table of both families.
    fn ipv6(&self) -> Option<bool> {
        match self.family {
            NFPROTO_IPV4 => Some(false),
            NFPROTO_IPV6 => Some(true),
            _ => None,
        }
    }
}

enum Change<'a> {
    Add(&'a Rule),
    /// By its handle.
    Delete(u64),
}

impl Passages {
    /// Makes every foreign chain that ends in a drop let `wanted` through, and no other hold a rule of ours. With
    /// [`Trust::Shadow`] nothing is read unless somebody outside this process committed since.
    pub fn ensure(&mut self, wanted: &[Passage], trust: Trust) -> Result<Outcome, NftError> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => none.insert(NetfilterSocket::open().map_err(NftError::Open)?),
        };
        for _ in 0..ATTEMPTS {
            let turn = generation::turn(socket.netns_cookie());
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let now = read_generation(socket, FOREIGN)?;
            let settled = self.settled.take().filter(|settled| {
                let ours = generation::all_ours(socket.netns_cookie(), settled.generation, now);
                trust == Trust::Shadow && settled.wanted == wanted && ours
            });
            if let Some(settled) = settled {
                let open = settled.open.clone();
                self.settled = Some(Settled { generation: now, ..settled });
                return Ok(Outcome { changed: Vec::new(), open });
            }
            let chains = match chains(socket) {
                Err(Errno::ENOENT) => continue,
                other => other.map_err(|errno| exchange(FOREIGN, "read the chains", errno))?,
            };
            let changes: Vec<(&Chain, Change<'_>)> =
                chains.iter().flat_map(|chain| changes(chain, wanted).map(move |it| (chain, it))).collect();
            let written = foreign::commit(socket, ABOUT, now, &changes, write_change)?;
            if !written {
                continue;
            }
            let open: Vec<String> = chains
                .iter()
                .filter(|chain| chain.drops && !rules(chain, wanted).is_empty())
                .map(Chain::text)
                .collect();
            let generation = now.wrapping_add(u32::from(!changes.is_empty())).max(1);
            self.settled = Some(Settled { wanted: wanted.to_vec(), generation, open: open.clone() });
            return Ok(Outcome { changed: changes.iter().map(line).collect(), open });
        }
        Err(NftError::Contended { table: FOREIGN.to_owned() })
    }
}

fn line((chain, change): &(&Chain, Change<'_>)) -> String {
    match change {
        Change::Add(rule) => {
            format!("let {} through {}", rule.comment.as_deref().unwrap_or("ours"), chain.text())
        }
        Change::Delete(_) => format!("no rule of ours in {}", chain.text()),
    }
}

/// The rules that a chain shall hold.
fn rules<'a>(chain: &Chain, wanted: &'a [Passage]) -> Vec<&'a Rule> {
    let fits = |passage: &&Passage| {
        passage.hook == chain.hook && chain.ipv6().is_none_or(|ipv6| !names_family(&passage.rule, !ipv6))
    };
    if chain.drops { wanted.iter().filter(fits).map(|passage| &passage.rule).collect() } else { Vec::new() }
}

fn names_family(rule: &Rule, ipv6: bool) -> bool {
    let of_family = |field: &Field| match ipv6 {
        false => matches!(field, Field::Ip4Source | Field::Ip4Destination),
        true => matches!(field, Field::Ip6Source | Field::Ip6Destination),
    };
    rule.statements.iter().any(|s| matches!(s, Statement::Match { field, .. } if of_family(field)))
}

fn changes<'a>(chain: &Chain, wanted: &'a [Passage]) -> impl Iterator<Item = Change<'a>> {
    let mut missing: Vec<(Identity, &Rule)> =
        rules(chain, wanted).into_iter().map(|rule| (identity(chain, rule), rule)).collect();
    let mut surplus = Vec::new();
    for (present, handle) in &chain.ours {
        match missing.iter().position(|(identity, _)| identity == present) {
            Some(at) => drop(missing.remove(at)),
            None => surplus.push(*handle),
        }
    }
    surplus.into_iter().map(Change::Delete).chain(missing.into_iter().map(|(_, rule)| Change::Add(rule)))
}

fn identity(chain: &Chain, rule: &Rule) -> Identity {
    Identity::of_body(rule, Answer::Unreachable, chain.ipv6())
}

fn write_change(writer: &mut Writer, sequence: u32, flags: u16, (chain, change): &(&Chain, Change<'_>)) {
    let (kind, more) = match change {
        Change::Add(_) => (NEWRULE, NLM_F_CREATE),
        Change::Delete(_) => (DELRULE, 0),
    };
    let message = writer.open_message(nft(kind), flags | more, sequence, chain.family, 0);
    writer.string(NFTA_RULE_TABLE, &chain.table);
    writer.string(NFTA_RULE_CHAIN, &chain.name);
    match change {
        Change::Delete(handle) => writer.be64(NFTA_RULE_HANDLE, *handle),
        Change::Add(rule) => {
            write_body(writer, rule, Answer::Unreachable, chain.ipv6());
        }
    }
    writer.close_message(message);
}

/// Every foreign base chain of type filter, with what it holds.
fn chains(socket: &mut NetfilterSocket) -> Result<Vec<Chain>, Errno> {
    let mut chains = socket.dump(
        nft(GETCHAIN),
        0,
        |_| (),
        |chains: &mut Vec<Chain>, message| chains.extend(read_chain(&message)),
    )?;
    for chain in &mut chains {
        let (table, name) = (chain.table.clone(), chain.name.clone());
        let rules = socket.dump(
            nft(GETRULE),
            chain.family,
            |writer| {
                writer.string(NFTA_RULE_TABLE, &table);
                writer.string(NFTA_RULE_CHAIN, &name);
            },
            |rules: &mut Rules, message| rules.read(message.attributes(), &table, &name),
        )?;
        chain.drops |= rules.last_drops;
        chain.ours = rules.ours;
    }
    Ok(chains)
}

fn read_chain(message: &Message<'_>) -> Option<Chain> {
    let attributes = message.attributes();
    let hook = attributes.find(NFTA_CHAIN_HOOK)?.nested().find(NFTA_HOOK_HOOKNUM)?.be32()?;
    let hook = HOOKS.iter().find(|(_, number)| *number == hook)?.0;
    let chain = Chain {
        family: message.family(),
        table: attributes.find(NFTA_CHAIN_TABLE)?.string(),
        name: attributes.find(NFTA_CHAIN_NAME)?.string(),
        hook,
        drops: attributes.find(NFTA_CHAIN_POLICY)?.be32()? == NFTA_CHAIN_POLICY_DROP,
        ours: Vec::new(),
    };
    let of_ip = matches!(chain.family, NFPROTO_INET | NFPROTO_IPV4 | NFPROTO_IPV6);
    let filters = attributes.find(NFTA_CHAIN_TYPE)?.string() == "filter";
    (of_ip && filters && !chain.table.starts_with(OWN_PREFIX)).then_some(chain)
}

/// What is to be known of a chain's rules.
#[derive(Default)]
struct Rules {
    ours: Vec<(Identity, u64)>,
    last_drops: bool,
}

impl Rules {
    fn read(&mut self, rule: Attributes<'_>, table: &str, chain: &str) {
        let is = |kind, name: &str| rule.find(kind).is_some_and(|found| found.string() == name);
        // Kernels before 4.7 dump every chain's.
        if !is(NFTA_RULE_TABLE, table) || !is(NFTA_RULE_CHAIN, chain) {
            return;
        }
        let identity = rule.find(NFTA_RULE_USERDATA).and_then(|data| Identity::read(data.value));
        let handle = rule.find(NFTA_RULE_HANDLE).and_then(|handle| handle.be64());
        self.ours.extend(identity.zip(handle));
        self.last_drops = rule.find(NFTA_RULE_EXPRESSIONS).is_some_and(|list| drops_all(list.nested()));
    }
}

/// Nothing is matched before a drop or reject.
fn drops_all(expressions: Attributes<'_>) -> bool {
    let mut named = expressions.filter_map(|expression| {
        let expression = expression.nested();
        Some((expression.find(NFTA_EXPR_NAME)?.string(), expression.find(NFTA_EXPR_DATA)?.nested()))
    });
    match named.find(|(name, _)| !matches!(name.as_str(), "counter" | "log")) {
        Some((name, _)) if name == "reject" => true,
        Some((name, data)) if name == "immediate" => verdict(data) == Some(NF_DROP),
        Some((name, data)) if name == "target" => {
            data.find(NFTA_TARGET_NAME).is_some_and(|target| target.string() == "REJECT")
        }
        _ => false,
    }
}

fn verdict(immediate: Attributes<'_>) -> Option<i32> {
    let data = immediate.find(NFTA_IMMEDIATE_DATA)?.nested();
    let verdict = data.find(NFTA_DATA_VERDICT)?.nested().find(NFTA_VERDICT_CODE)?;
    Some(verdict.be32()?.cast_signed())
}
