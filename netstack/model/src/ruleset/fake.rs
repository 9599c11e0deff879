//! A kernel table in memory that refuses what the kernel refuses: what is there already (EEXIST), what is not there
//! (ENOENT), what is still in use (EBUSY), more than there is room for (ENFILE). A transaction is carried out as a whole or not at all.

use super::{ElementData, Op, Set, Statement, Table, Verdict};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Errno {
    Exists,
    NoEntry,
    Busy,
    Full,
    /// Asked for by the test.
    Injected,
}

/// The one table there may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FakeKernel {
    pub(super) table: Option<Table>,
    /// Refuse the operation of this number in the next transaction.
    pub(super) fail_at: Option<usize>,
}

impl FakeKernel {
    pub(super) fn commit(&mut self, ops: &[Op<'_>]) -> Result<(), Errno> {
        let fail_at = self.fail_at.take();
        let mut table = self.table.clone();
        for (index, op) in ops.iter().enumerate() {
            if fail_at == Some(index) {
                return Err(Errno::Injected);
            }
            if *op == Op::AddTable {
                table.get_or_insert_default();
            } else {
                carry_out(table.as_mut().ok_or(Errno::NoEntry)?, op)?;
            }
        }
        self.table = table;
        Ok(())
    }
}

fn carry_out(table: &mut Table, op: &Op<'_>) -> Result<(), Errno> {
    match op {
        Op::AddTable => {}
        Op::FlushChain { name } => {
            table.chains.get_mut(*name).ok_or(Errno::NoEntry)?.rules.clear();
        }
        Op::FlushSet { name } => table.sets.get_mut(*name).ok_or(Errno::NoEntry)?.groups.clear(),
        Op::DeleteSet { name } => {
            let used = statements(table).any(|statement| statement.set_name() == Some(name));
            let set = table.sets.get(*name).ok_or(Errno::NoEntry)?;
            // Older kernels let go of the chains only when the transaction is over.
            let holds_chains = set.elements().any(|(_, data)| verdict_target(&data).is_some());
            ensure(!used && !holds_chains, Errno::Busy)?;
            table.sets.remove(*name);
        }
        Op::DeleteChain { name } => {
            let chain = table.chains.get(*name).ok_or(Errno::NoEntry)?;
            ensure(chain.rules.is_empty() && !holds(table, name), Errno::Busy)?;
            table.chains.remove(*name);
        }
        Op::AddChain { name, base } => {
            ensure(!table.chains.contains_key(*name), Errno::Exists)?;
            table.chains.insert((*name).into(), super::Chain { base: *base, rules: Vec::new() });
        }
        Op::AddSet { name, set } => {
            ensure(!table.sets.contains_key(*name), Errno::Exists)?;
            table.sets.insert((*name).into(), set.declaration());
        }
        Op::AddRule { chain, rule } => {
            for statement in &rule.statements {
                let set = statement.set_name().is_none_or(|set| table.sets.contains_key(set));
                let target = target(statement).is_none_or(|chain| table.chains.contains_key(chain));
                ensure(set && target, Errno::NoEntry)?;
            }
            table.chains.get_mut(*chain).ok_or(Errno::NoEntry)?.rules.push((*rule).clone());
        }
        Op::DeleteElements { name, elements, .. } => {
            let group = elements_of(table.sets.get_mut(*name).ok_or(Errno::NoEntry)?);
            for (key, data) in elements {
                ensure(group.remove(key).as_ref() == Some(data), Errno::NoEntry)?;
            }
        }
        Op::AddElements { name, elements, .. } => {
            for (_, data) in elements {
                let known = verdict_target(data).is_none_or(|chain| table.chains.contains_key(chain));
                ensure(known, Errno::NoEntry)?;
            }
            let set = table.sets.get_mut(*name).ok_or(Errno::NoEntry)?;
            let room = set.room;
            let group = elements_of(set);
            for (key, data) in elements {
                ensure(group.insert(key, data).is_none(), Errno::Exists)?;
            }
            ensure(room.is_none_or(|room| group.len() <= room as usize), Errno::Full)?;
        }
    }
    Ok(())
}

fn ensure(holds: bool, errno: Errno) -> Result<(), Errno> {
    if holds { Ok(()) } else { Err(errno) }
}

/// The kernel knows no groups: all elements stand in one.
fn elements_of(set: &mut Set) -> &mut super::Elements {
    std::sync::Arc::make_mut(set.groups.get_or_default("".into()))
}

fn statements(table: &Table) -> impl Iterator<Item = &Statement> {
    table.chains.values().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.statements)
}

fn target(statement: &Statement) -> Option<&str> {
    match statement {
        Statement::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => Some(chain),
        _ => None,
    }
}

fn verdict_target(data: &ElementData) -> Option<&str> {
    match data {
        ElementData::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => Some(chain),
        _ => None,
    }
}

/// A rule or element leads to the chain.
fn holds(table: &Table, chain: &str) -> bool {
    statements(table).any(|statement| target(statement) == Some(chain))
        || table.sets.values().flat_map(Set::elements).any(|(_, data)| verdict_target(&data) == Some(chain))
}
