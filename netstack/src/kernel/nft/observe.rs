//! The kernel's table as a value, so that one and the same difference serves changes and repairs.
//!
//! Rules are recognised by the identity in their user data: a chain whose rules are those of the plan is read as the
//! plan's, any other as a chain of foreign rules. What no plan could have made is read as something that differs from
//! the plan, so that it is deleted and built again.

use std::collections::BTreeMap;

use nix::errno::Errno;
use weft_model::ruleset::{Base, Chain, ChainKind, Hook, Rule, Set, SetData, Table};

use super::batch::{Identity, Unplanned, read_base};
use super::element::{Found, RawElement, Wanted, data_of_type, key_bytes, key_types};
use super::socket::NetfilterSocket;
use super::uapi::*;
use super::wire::{Attributes, Message, Writer};

const NFTA_CHAIN_FLAGS: u16 = 10;
/// Chains and sets of one rule only (`jump { ... }`, `{ 1, 2 }`): they live and die with it.
const NFT_CHAIN_BINDING: u32 = 4;
const NFT_SET_ANONYMOUS: u32 = 1;
const NFT_TABLE_F_DORMANT: u32 = 1;
/// Timeouts are kept in ticks, at most 10 ms long.
const TICK_MILLIS: u64 = 10;

pub(crate) struct Observed {
    pub(crate) table: Table,
    /// Somebody switched the table off (`flags dormant`).
    pub(crate) dormant: bool,
}

/// Reads the table; `None` when it is not there. Elements of sets with a timeout are not read.
pub(crate) fn observe(
    socket: &mut NetfilterSocket,
    name: &str,
    desired: &Table,
) -> Result<Option<Observed>, Errno> {
    let Some(flags) = table_flags(socket, name)? else { return Ok(None) };
    let mut chains = observe_chains(socket, name, desired)?;
    observe_rules(socket, name, desired, &mut chains)?;
    let sets = observe_sets(socket, name, desired)?;
    let table = Table { name: name.to_owned(), chains, sets };
    Ok(Some(Observed { table, dormant: flags & NFT_TABLE_F_DORMANT != 0 }))
}

fn table_flags(socket: &mut NetfilterSocket, name: &str) -> Result<Option<u32>, Errno> {
    let mut flags = None;
    let asked = socket.request(
        nft(GETTABLE),
        NFPROTO_INET,
        |writer| writer.string(NFTA_TABLE_NAME, name),
        |message| {
            flags = Some(message.attributes().find(NFTA_TABLE_FLAGS).and_then(|f| f.be32()).unwrap_or(0));
        },
    );
    match asked {
        Err(Errno::ENOENT) => Ok(None),
        other => other.map(|()| flags),
    }
}

fn observe_chains(
    socket: &mut NetfilterSocket,
    table: &str,
    desired: &Table,
) -> Result<BTreeMap<String, Chain>, Errno> {
    socket.dump(
        nft(GETCHAIN),
        NFPROTO_INET,
        |writer| writer.string(NFTA_CHAIN_TABLE, table),
        |chains: &mut BTreeMap<String, Chain>, message| {
            let attributes = message.attributes();
            let flags = attributes.find(NFTA_CHAIN_FLAGS).and_then(|flags| flags.be32()).unwrap_or(0);
            if !belongs(&message, NFTA_CHAIN_TABLE, table) || flags & NFT_CHAIN_BINDING != 0 {
                return;
            }
            if let Some(name) = attributes.find(NFTA_CHAIN_NAME).map(|name| name.string()) {
                let wanted = desired.chains.get(&name).and_then(|chain| chain.base);
                let base = read_base(attributes).unwrap_or_else(|Unplanned| other_base(wanted));
                chains.insert(name, Chain { base, rules: Vec::new() });
            }
        },
    )
}

/// The chain is kept for a dump that ignores the table, as those of some kernels do.
fn belongs(message: &Message<'_>, attribute: u16, table: &str) -> bool {
    message.family() == NFPROTO_INET
        && message.attributes().find(attribute).is_some_and(|name| name.string() == table)
}

/// A base that is not the wanted one.
fn other_base(wanted: Option<Base>) -> Option<Base> {
    match wanted {
        Some(_) => None,
        None => Some(Base { kind: ChainKind::Filter, hook: Hook::Input, priority: 0 }),
    }
}

type Identities = BTreeMap<String, Vec<Option<Identity>>>;

fn observe_rules(
    socket: &mut NetfilterSocket,
    table: &str,
    desired: &Table,
    chains: &mut BTreeMap<String, Chain>,
) -> Result<(), Errno> {
    let found = socket.dump(
        nft(GETRULE),
        NFPROTO_INET,
        |writer| writer.string(NFTA_RULE_TABLE, table),
        |found: &mut Identities, message| {
            let attributes = message.attributes();
            if let Some(chain) = attributes.find(NFTA_RULE_CHAIN)
                && belongs(&message, NFTA_RULE_TABLE, table)
            {
                let userdata = attributes.find(NFTA_RULE_USERDATA);
                let identity = userdata.and_then(|userdata| Identity::read(userdata.value));
                found.entry(chain.string()).or_default().push(identity);
            }
        },
    )?;
    let mut wanted = Vec::new();
    for (name, identities) in found {
        let Some(chain) = chains.get_mut(&name) else { continue };
        let rules = desired.chains.get(&name).map_or(&[][..], |chain| &chain.rules);
        wanted.clear();
        rules.iter().for_each(|rule| Identity::of_rule(rule, &mut wanted));
        let same = wanted.iter().copied().map(Some).eq(identities);
        chain.rules = if same { rules.to_vec() } else { vec![foreign_rule()] };
    }
    Ok(())
}

/// Stands for rules that are not those of the plan.
fn foreign_rule() -> Rule {
    Rule::new(Vec::new()).comment("rules that are not of the plan")
}

fn observe_sets(
    socket: &mut NetfilterSocket,
    table: &str,
    desired: &Table,
) -> Result<BTreeMap<String, Set>, Errno> {
    let mut sets = observe_declarations(socket, table)?;
    for (name, set) in &mut sets {
        let wanted = desired.sets.get(name);
        if let (Some(wanted), Some(millis)) = (wanted.and_then(|set| set.timeout_millis), set.timeout_millis)
            && wanted.abs_diff(millis) < TICK_MILLIS
        {
            set.timeout_millis = Some(wanted);
        }
        // Elements are compared only where the declaration is right; else the set is built again.
        let comparable = wanted.filter(|wanted| set.timeout_millis.is_none() && set.same_declaration(wanted));
        let Some(wanted) = comparable.map(Wanted::of) else { continue };
        let found = socket.dump(
            nft(GETSETELEM),
            NFPROTO_INET,
            |writer| elements_of(writer, table, name),
            |found: &mut Found, message| {
                let list = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS);
                let elements = list.iter().flat_map(|list| list.nested());
                elements.for_each(|element| found.take(&element, &wanted));
            },
        )?;
        match found.groups(&wanted) {
            Some(groups) => set.groups = groups,
            None => *set = unplanned_set(),
        }
    }
    Ok(sets)
}

pub(crate) fn observe_declarations(
    socket: &mut NetfilterSocket,
    table: &str,
) -> Result<BTreeMap<String, Set>, Errno> {
    socket.dump(
        nft(GETSET),
        NFPROTO_INET,
        |writer| writer.string(NFTA_SET_TABLE, table),
        |sets: &mut BTreeMap<String, Set>, message| {
            let attributes = message.attributes();
            let flags = attributes.find(NFTA_SET_FLAGS).and_then(|flags| flags.be32()).unwrap_or(0);
            if let Some(name) = attributes.find(NFTA_SET_NAME)
                && belongs(&message, NFTA_SET_TABLE, table)
                && flags & NFT_SET_ANONYMOUS == 0
            {
                sets.insert(name.string(), read_declaration(attributes, flags).unwrap_or(unplanned_set()));
            }
        },
    )
}

/// A declaration that no plan has.
fn unplanned_set() -> Set {
    // A map of verdicts, because its elements have to go before it does.
    Set::new(Vec::new(), SetData::Verdict)
}

fn read_declaration(attributes: Attributes<'_>, flags: u32) -> Option<Set> {
    if flags & !(NFT_SET_INTERVAL | NFT_SET_MAP | NFT_SET_TIMEOUT | NFT_SET_EVAL) != 0 {
        return None;
    }
    let key = key_types(attributes.find(NFTA_SET_KEY_TYPE)?.be32()?)?;
    if attributes.find(NFTA_SET_KEY_LEN)?.be32()? as usize != key_bytes(&key) {
        return None;
    }
    let data = match flags & NFT_SET_MAP {
        0 => SetData::None,
        _ => data_of_type(attributes.find(NFTA_SET_DATA_TYPE)?.be32()?)?,
    };
    let mut set = Set::new(key, data);
    set.interval = flags & NFT_SET_INTERVAL != 0;
    if flags & NFT_SET_TIMEOUT != 0 {
        // Without a default the elements carry their own: no set of a plan does that.
        set.timeout_millis = Some(attributes.find(NFTA_SET_TIMEOUT).and_then(|t| t.be64()).unwrap_or(0));
    }
    let size = attributes.find(NFTA_SET_DESC).and_then(|desc| desc.nested().find(NFTA_SET_DESC_SIZE));
    let size = size.and_then(|size| size.be32());
    if flags & NFT_SET_EVAL != 0 {
        set.dynamic_size = Some(size.unwrap_or(0));
    } else {
        set.room = size;
    }
    Some(set)
}

/// Elements of one set; ENOENT when the set or its table is not there.
pub(crate) fn raw_elements(
    socket: &mut NetfilterSocket,
    table: &str,
    set: &str,
) -> Result<Vec<RawElement>, Errno> {
    socket.dump(
        nft(GETSETELEM),
        NFPROTO_INET,
        |writer| elements_of(writer, table, set),
        |elements: &mut Vec<RawElement>, message| {
            if let Some(list) = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS) {
                elements.extend(list.nested().filter_map(|element| RawElement::read(&element)));
            }
        },
    )
}

fn elements_of(writer: &mut Writer, table: &str, set: &str) {
    writer.string(NFTA_SET_ELEM_LIST_TABLE, table);
    writer.string(NFTA_SET_ELEM_LIST_SET, set);
}
