//! Operations as one batch of netlink messages, and the way back from a refused message to the object it was about.

use std::fmt::Write as _;
use std::ops::Range;

use weft_model::ruleset::{Base, ChainKind, Element, Hook, Op, Rule, Set};

use super::element::{data_type, key_bytes, read_key, type_number, write_element};
use super::expression::{Answer, answers, write_rule};
use super::socket::Refusal;
use super::uapi::*;
use super::wire::{Attributes, Open, Writer, attribute_at};

/// The length of a nest is a u16 and counts its own header: a list of elements ends before that.
const LIST_BYTES: usize = 60_000;

/// A transaction in the making: begin, one message or more for each operation, end.
pub(crate) struct Batch<'a> {
    table: &'a str,
    writer: Writer,
    first_sequence: u32,
    /// Of each message: the operation it belongs to.
    owners: Vec<u32>,
    last: Option<Open>,
}

/// A batch ready to be sent.
pub(crate) struct Sealed {
    writer: Writer,
    first_sequence: u32,
    owners: Vec<u32>,
    last: usize,
}

impl<'a> Batch<'a> {
    /// The kernel refuses the batch with ERESTART unless its generation is still `generation`.
    pub(crate) fn begin(table: &'a str, generation: u32, first_sequence: u32) -> Self {
        let mut batch =
            Self { table, writer: Writer::default(), first_sequence, owners: Vec::new(), last: None };
        let open = batch.writer.open_message(BATCH_BEGIN, NLM_F_REQUEST, first_sequence, 0, SUBSYS_NFTABLES);
        batch.writer.be32(NFNL_BATCH_GENID, generation);
        batch.writer.close_message(open);
        batch
    }

    pub(crate) fn seal(mut self) -> Sealed {
        if let Some(last) = self.last {
            self.writer.add_flags(last, NLM_F_ACK);
        }
        let last = self.owners.len();
        let sequence = self.sequence(last + 1);
        let open = self.writer.open_message(BATCH_END, NLM_F_REQUEST, sequence, 0, SUBSYS_NFTABLES);
        self.writer.close_message(open);
        Sealed { writer: self.writer, first_sequence: self.first_sequence, owners: self.owners, last }
    }

    pub(crate) fn delete_table(&mut self) {
        self.message(0, DELTABLE, 0, NFTA_TABLE_NAME, |_| ());
    }

    /// Messages of operation number `index`.
    pub(crate) fn push(&mut self, index: usize, op: &Op<'_>) {
        match op {
            Op::AddTable => {
                self.message(index, NEWTABLE, NLM_F_CREATE, NFTA_TABLE_NAME, |w| w.be32(NFTA_TABLE_FLAGS, 0));
            }
            Op::FlushChain { name } => {
                self.message(index, DELRULE, 0, NFTA_RULE_TABLE, |w| w.string(NFTA_RULE_CHAIN, name));
            }
            Op::FlushSet { name } => {
                self.message(index, DELSETELEM, 0, NFTA_SET_ELEM_LIST_TABLE, |w| {
                    w.string(NFTA_SET_ELEM_LIST_SET, name);
                });
            }
            Op::DeleteSet { name } => {
                self.message(index, DELSET, 0, NFTA_SET_TABLE, |w| w.string(NFTA_SET_NAME, name));
            }
            Op::DeleteChain { name } => {
                self.message(index, DELCHAIN, 0, NFTA_CHAIN_TABLE, |w| w.string(NFTA_CHAIN_NAME, name));
            }
            Op::AddChain { name, base } => {
                self.message(index, NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, NFTA_CHAIN_TABLE, |w| {
                    w.string(NFTA_CHAIN_NAME, name);
                    if let Some(base) = base {
                        write_base(w, *base);
                    }
                });
            }
            Op::AddSet { name, set } => {
                self.message(index, NEWSET, NLM_F_CREATE | NLM_F_EXCL, NFTA_SET_TABLE, |w| {
                    w.string(NFTA_SET_NAME, name);
                    write_declaration(w, set, index);
                });
            }
            Op::DeleteElements { name, set, elements } => {
                self.elements(index, DELSETELEM, 0, name, set, elements);
            }
            Op::AddElements { name, set, elements } => {
                self.elements(index, NEWSETELEM, NLM_F_CREATE, name, set, elements);
            }
            Op::AddRule { chain, rule } => {
                for answer in answers(rule) {
                    self.rule(index, chain, rule, *answer);
                }
            }
        }
    }

    fn open(&mut self, index: usize, kind: u16, flags: u16) -> Open {
        self.owners.push(u32::try_from(index).unwrap_or(u32::MAX));
        let sequence = self.sequence(self.owners.len());
        let open = self.writer.open_message(nft(kind), NLM_F_REQUEST | flags, sequence, NFPROTO_INET, 0);
        self.last = Some(open);
        open
    }

    fn sequence(&self, message: usize) -> u32 {
        self.first_sequence.wrapping_add(u32::try_from(message).unwrap_or(u32::MAX))
    }

    fn message(
        &mut self,
        index: usize,
        kind: u16,
        flags: u16,
        table_attribute: u16,
        rest: impl FnOnce(&mut Writer),
    ) {
        let open = self.open(index, kind, flags);
        self.writer.string(table_attribute, self.table);
        rest(&mut self.writer);
        self.writer.close_message(open);
    }

    fn elements(
        &mut self,
        index: usize,
        kind: u16,
        flags: u16,
        name: &str,
        set: &Set,
        elements: &[Element<'_>],
    ) {
        let mut rest = elements.iter().peekable();
        while rest.peek().is_some() {
            let message = self.open(index, kind, flags);
            self.writer.string(NFTA_SET_ELEM_LIST_TABLE, self.table);
            self.writer.string(NFTA_SET_ELEM_LIST_SET, name);
            let list = self.writer.open_nest(NFTA_SET_ELEM_LIST_ELEMENTS);
            let begin = self.writer.len();
            while self.writer.len() - begin < LIST_BYTES
                && let Some((key, data)) = rest.next()
            {
                write_element(&mut self.writer, set.interval, *key, (kind == NEWSETELEM).then_some(data));
            }
            self.writer.close_nest(list);
            self.writer.close_message(message);
        }
    }

    fn rule(&mut self, index: usize, chain: &str, rule: &Rule, answer: Answer) {
        let open = self.open(index, NEWRULE, NLM_F_CREATE | NLM_F_APPEND);
        self.writer.string(NFTA_RULE_TABLE, self.table);
        self.writer.string(NFTA_RULE_CHAIN, chain);
        write_body(&mut self.writer, rule, answer, None);
        self.writer.close_message(open);
    }
}

impl Sealed {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// How many sequence numbers the batch uses.
    pub(crate) fn sequences(&self) -> u32 {
        u32::try_from(self.owners.len() + 2).unwrap_or(u32::MAX)
    }

    pub(crate) fn last_sequence(&self) -> u32 {
        self.first_sequence.wrapping_add(u32::try_from(self.last).unwrap_or(u32::MAX))
    }

    /// What the refusal is about: the operation, and the element where the kernel says which. `None` when it is about
    /// the transaction as a whole.
    pub(crate) fn object(&self, refusal: &Refusal, ops: &[Op<'_>]) -> Option<String> {
        let number = refusal.sequence.wrapping_sub(self.first_sequence).checked_sub(1)? as usize;
        let op = ops.get(usize::try_from(*self.owners.get(number)?).ok()?)?;
        let mut text = op.to_string();
        if let Op::AddElements { set, .. } | Op::DeleteElements { set, .. } = op
            && let Some(element) = self.element(refusal, set)
        {
            let _ = write!(text, ", at {element}");
        }
        Some(text)
    }

    fn element(&self, refusal: &Refusal, set: &Set) -> Option<String> {
        let range = self.message(refusal.sequence)?;
        let message = &self.writer.bytes()[range];
        let element = message.get(attribute_at(message, refusal.offset?)?)?;
        let key = Attributes::of(element).find(NFTA_SET_ELEM_KEY)?.nested().find(NFTA_DATA_VALUE)?;
        let key = read_key(&set.key, key.value)?;
        Some(key.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . "))
    }

    fn message(&self, sequence: u32) -> Option<Range<usize>> {
        let mut begin = 0;
        super::wire::messages(self.bytes()).find_map(|message| {
            let end = begin + super::wire::HEADER_BYTES + message.payload.len();
            let range = begin..end;
            begin = end.next_multiple_of(4);
            (message.sequence == sequence).then_some(range)
        })
    }
}

/// Hook numbers of NF_INET_*; a policy is always accept.
pub(crate) const HOOKS: [(Hook, u32); 5] =
    [(Hook::Prerouting, 0), (Hook::Input, 1), (Hook::Forward, 2), (Hook::Output, 3), (Hook::Postrouting, 4)];
const KINDS: [(ChainKind, &str); 3] =
    [(ChainKind::Filter, "filter"), (ChainKind::Nat, "nat"), (ChainKind::Route, "route")];

fn write_base(writer: &mut Writer, base: Base) {
    let hook = HOOKS.iter().find(|(hook, _)| *hook == base.hook).map_or(0, |(_, number)| *number);
    let kind = KINDS.iter().find(|(kind, _)| *kind == base.kind).map_or("", |(_, name)| *name);
    writer.nest(NFTA_CHAIN_HOOK, |w| {
        w.be32(NFTA_HOOK_HOOKNUM, hook);
        w.be32(NFTA_HOOK_PRIORITY, base.priority.cast_unsigned());
    });
    writer.be32(NFTA_CHAIN_POLICY, NF_ACCEPT.cast_unsigned());
    writer.string(NFTA_CHAIN_TYPE, kind);
}

/// The base of a chain message: `Ok(None)` for a chain without a hook, `Err` for one that no plan could have made.
pub(crate) fn read_base(chain: Attributes<'_>) -> Result<Option<Base>, Unplanned> {
    let Some(hook) = chain.find(NFTA_CHAIN_HOOK) else { return Ok(None) };
    let read = || {
        let number = hook.nested().find(NFTA_HOOK_HOOKNUM)?.be32()?;
        let kind = chain.find(NFTA_CHAIN_TYPE)?.string();
        let policy = chain.find(NFTA_CHAIN_POLICY)?.be32()?;
        Some(Base {
            kind: KINDS.iter().find(|(_, name)| *name == kind)?.0,
            hook: HOOKS.iter().find(|(_, known)| *known == number)?.0,
            priority: hook.nested().find(NFTA_HOOK_PRIORITY)?.be32()?.cast_signed(),
        })
        .filter(|_| policy == NF_ACCEPT.cast_unsigned())
    };
    read().map(Some).ok_or(Unplanned)
}

/// An object in the kernel is nothing a plan could have made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unplanned;

fn write_declaration(writer: &mut Writer, set: &Set, id: usize) {
    let data = data_type(set.data);
    let flags = [
        (set.interval, NFT_SET_INTERVAL),
        (data.is_some(), NFT_SET_MAP),
        (set.timeout_millis.is_some(), NFT_SET_TIMEOUT),
        (set.dynamic_size.is_some(), NFT_SET_EVAL),
    ];
    writer.be32(NFTA_SET_FLAGS, flags.iter().filter(|(on, _)| *on).map(|(_, flag)| flag).sum());
    writer.be32(NFTA_SET_KEY_TYPE, type_number(&set.key));
    writer.be32(NFTA_SET_KEY_LEN, u32::try_from(key_bytes(&set.key)).unwrap_or(0));
    if let Some((number, bytes)) = data {
        writer.be32(NFTA_SET_DATA_TYPE, number);
        writer.be32(NFTA_SET_DATA_LEN, u32::try_from(bytes).unwrap_or(0));
    }
    if let Some(size) = set.dynamic_size.or(set.room) {
        writer.nest(NFTA_SET_DESC, |writer| writer.be32(NFTA_SET_DESC_SIZE, size));
    }
    // Any number that no other set of the transaction has.
    writer.be32(NFTA_SET_ID, u32::try_from(id + 1).unwrap_or(1));
    if let Some(millis) = set.timeout_millis {
        writer.be64(NFTA_SET_TIMEOUT, millis);
    }
}

/// Hash of what a rule of the kernel does and says; it stands in the rule's user data, since the kernel gives
/// expressions back in other words than it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64);

/// FNV-1a, 64 bit (draft-eastlake-fnv): stable over builds and machines; nobody gains by a collision.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

/// Types of entries in a rule's user data: the comment is nft's (NFTNL_UDATA_RULE_COMMENT), the identity ours; nft
/// passes over types it does not know.
const USERDATA_COMMENT: u8 = 0;
const USERDATA_IDENTITY: u8 = 0x57;
/// NFTNL_UDATA_COMMENT_MAXLEN, without the final NUL.
const COMMENT_BYTES: usize = 127;

impl Identity {
    /// Of what [`write_body`] writes.
    pub(crate) fn of_body(rule: &Rule, answer: Answer, ipv6: Option<bool>) -> Self {
        write_body(&mut Writer::default(), rule, answer, ipv6)
    }

    fn of(expressions: &[u8], comment: Option<&str>) -> Self {
        let comment = comment.unwrap_or("\0").as_bytes();
        let hash = expressions.iter().chain(comment);
        Self(hash.fold(FNV_OFFSET, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME)))
    }

    /// Of the kernel's rules that one rule of a plan makes.
    pub(crate) fn of_rule(rule: &Rule, scratch: &mut Vec<Self>) {
        scratch.extend(answers(rule).iter().map(|answer| Self::of_body(rule, *answer, None)));
    }

    /// From the user data of a rule of the kernel.
    pub(crate) fn read(mut userdata: &[u8]) -> Option<Self> {
        while let [kind, length, rest @ ..] = userdata {
            let value = rest.get(..usize::from(*length))?;
            if *kind == USERDATA_IDENTITY {
                return Some(Self(u64::from_be_bytes(value.try_into().ok()?)));
            }
            userdata = &rest[value.len()..];
        }
        None
    }
}

/// What a rule does and the user data by which it is known; `ipv6` is the family of its table, `None` for `inet`.
pub(crate) fn write_body(writer: &mut Writer, rule: &Rule, answer: Answer, ipv6: Option<bool>) -> Identity {
    let begin = writer.len();
    writer.nest(NFTA_RULE_EXPRESSIONS, |writer| write_rule(writer, rule, answer, ipv6));
    let identity = Identity::of(&writer.bytes()[begin..], rule.comment.as_deref());
    write_userdata(writer, rule.comment.as_deref(), identity);
    identity
}

fn write_userdata(writer: &mut Writer, comment: Option<&str>, identity: Identity) {
    let identity = identity.0.to_be_bytes();
    let ours = [&[USERDATA_IDENTITY, 8][..], &identity].concat();
    let Some(comment) = comment else {
        writer.attribute(NFTA_RULE_USERDATA, &ours);
        return;
    };
    let comment = &comment[..comment.floor_char_boundary(COMMENT_BYTES)];
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    let parts = [&[USERDATA_COMMENT, length], comment.as_bytes(), &[0], &ours];
    writer.attribute_parts(NFTA_RULE_USERDATA, &parts);
}
