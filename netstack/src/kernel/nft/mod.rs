//! nftables over raw netlink: one [`NftTable`] owns one table of family `inet`.
//!
//! ```text
//!  desired Table --+
//!                  +--diff--> [Op] --batch--> one send --> acknowledged, or every refusal with its object
//!  shadow, or -----+
//!  observed Table
//! ```
//!
//! The kernel checks and carries out a whole batch inside `send`, or nothing of it. Every batch names the generation of
//! the rule set it was made for: when anybody else changed anything meanwhile, the kernel refuses it and it is made
//! anew. Policies of base chains are always accept. Nothing is ever flushed that is right.

pub mod answers;
mod batch;
mod element;
mod expression;
mod foreign;
mod generation;
pub mod kube_proxy;
mod observe;
pub mod passage;
mod socket;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod uapi;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use weft_model::ruleset::{Datum, Element, ElementData, Elements, Op, Set, SetData, Table, diff};

use crate::reconcile::Trust;

use batch::Batch;
use observe::{observe, observe_declarations, raw_elements};
pub(crate) use socket::NetfilterSocket;

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("open a netfilter socket")]
    Open(#[source] io::Error),
    #[error("table {table}: {operation}")]
    Exchange {
        table: String,
        operation: &'static str,
        #[source]
        source: Errno,
    },
    /// The kernel refused the transaction and changed nothing.
    #[error("table {table}: {object}")]
    Refused {
        table: String,
        /// The operation and the chain, set or element it is about.
        object: String,
        #[source]
        source: KernelRefusal,
    },
    #[error("table {table}: other programs change the rule set faster than it can be read")]
    Contended { table: String },
    #[error("table {table}: the plan is for table {planned}")]
    OtherTable { table: String, planned: String },
    #[error("table {table}: no set {set}")]
    NoSet { table: String, set: String },
    #[error("table {table}: set {set} holds what no plan could have made")]
    Unreadable { table: String, set: String },
}

/// Why the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{errno}{}{}", .message.as_ref().map(|m| format!(": {m}")).unwrap_or_default(),
    if *.others > 0 { format!(" (and {others} more refusals)") } else { String::new() })]
pub struct KernelRefusal {
    errno: Errno,
    /// The kernel's own sentence, where it has one.
    message: Option<String>,
    others: usize,
}

/// A batch is made anew this often when others commit at the same time.
const ATTEMPTS: usize = 32;

/// Notices commits of others, to which an owner's next look at the kernel is the answer.
pub struct Commits {
    socket: NetfilterSocket,
    seen: u32,
}

impl Commits {
    /// Of the calling thread's network namespace, from now on.
    pub fn open() -> Result<Self, NftError> {
        let mut socket = NetfilterSocket::open().map_err(NftError::Open)?;
        let seen = read_generation(&mut socket, "any")?;
        Ok(Self { socket, seen })
    }

    /// Whether anybody outside this process has committed since the last call.
    pub fn foreign(&mut self) -> Result<bool, NftError> {
        let netns = self.socket.netns_cookie();
        let turn = generation::turn(netns);
        let _no_commit_of_ours = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = read_generation(&mut self.socket, "any")?;
        let before = std::mem::replace(&mut self.seen, now);
        Ok(!generation::all_ours(netns, before, now))
    }
}

/// Owner of one kernel table. Calls are synchronous: the kernel handles a batch inside `send`. The socket belongs to
/// the network namespace of the thread that makes the first call.
pub struct NftTable {
    name: &'static str,
    socket: Option<NetfilterSocket>,
    shadow: Option<Shadow>,
    kernel_took: Option<Duration>,
}

/// What the table is as long as only this process changes the rule set.
struct Shadow {
    table: Table,
    generation: u32,
}

/// Why a batch was not carried out.
enum Failure {
    /// Others committed meanwhile.
    Stale,
    Refused {
        errno: Errno,
        error: NftError,
    },
    Broken(NftError),
}

impl NftTable {
    pub fn new(name: &'static str) -> Self {
        Self { name, socket: None, shadow: None, kernel_took: None }
    }

    /// Makes the kernel's table equal to `desired` in one transaction; returns one line per change.
    ///
    /// Elements of sets with a timeout are left alone. With [`Trust::Shadow`] the kernel is read only when somebody
    /// outside this process committed since.
    pub fn apply(&mut self, desired: &Table, trust: Trust) -> Result<Vec<String>, NftError> {
        if desired.name != self.name {
            let planned = desired.name.clone();
            return Err(NftError::OtherTable { table: self.name.to_owned(), planned });
        }
        let mut trust = trust;
        for _ in 0..ATTEMPTS {
            let turn = self.turn()?;
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let generation = self.generation()?;
            if trust == Trust::Nothing || !self.shadow_holds(generation) {
                self.shadow = None;
            }
            let from_shadow = self.shadow.is_some();
            match self.apply_at(desired, generation) {
                Ok(changed) => return Ok(changed),
                Err(Failure::Stale) => {}
                Err(Failure::Refused { .. }) if from_shadow => trust = Trust::Nothing,
                Err(Failure::Refused { error, .. } | Failure::Broken(error)) => {
                    self.shadow = None;
                    return Err(error);
                }
            }
        }
        self.shadow = None;
        Err(self.contended())
    }

    /// Processor time that the kernel took for the last transaction of `apply`; `None` when there was nothing to send.
    pub fn kernel_took(&self) -> Option<Duration> {
        self.kernel_took
    }

    /// Adds elements at run time (sets with a timeout, CNI's anti-spoofing set); existing ones are kept or refreshed:
    /// in a set with a timeout it begins anew, in a map the data is replaced.
    pub fn insert(&mut self, set: &str, elements: &[(Vec<Datum>, ElementData)]) -> Result<(), NftError> {
        if elements.is_empty() {
            return Ok(());
        }
        let declaration = self.declaration(set)?;
        let all: Elements = elements.iter().cloned().collect();
        let added: Vec<Element<'_>> = all.iter().collect();
        let mut removed = Vec::new();
        for _ in 0..ATTEMPTS {
            let turn = self.turn()?;
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let generation = self.generation()?;
            let add = |elements| Op::AddElements { name: set, set: &declaration, elements };
            let delete = |elements| Op::DeleteElements { name: set, set: &declaration, elements };
            // Older kernels do not renew the timeout of an element that is there: add, delete and add renews it
            // whether it is there or not.
            let ops = match declaration.timeout_millis {
                Some(_) => vec![add(added.clone()), delete(added.clone()), add(added.clone())],
                None if removed.is_empty() => vec![add(added.clone())],
                None => vec![delete(std::mem::take(&mut removed)), add(added.clone())],
            };
            match self.commit(&ops, generation) {
                Ok(()) => {
                    self.remember(set, &declaration, |shadow| insert_elements(shadow, elements));
                    return Ok(());
                }
                Err(Failure::Stale) => {}
                Err(Failure::Refused { errno: Errno::EEXIST, .. }) if declaration.data != SetData::None => {
                    let present = self.read(set)?;
                    removed = added.iter().filter(|(key, _)| present.contains_key(key)).cloned().collect();
                }
                Err(Failure::Refused { error, .. } | Failure::Broken(error)) => return Err(error),
            }
        }
        Err(self.contended())
    }

    /// Deletes elements; absent ones are no error, nor is an absent set or table.
    pub fn remove(&mut self, set: &str, keys: &[Vec<Datum>]) -> Result<(), NftError> {
        let declaration = match self.declaration(set) {
            Err(NftError::NoSet { .. }) => return Ok(()),
            other => other?,
        };
        let mut keys: Elements = keys.iter().map(|key| (key.clone(), ElementData::None)).collect();
        for _ in 0..ATTEMPTS {
            if keys.is_empty() {
                return Ok(());
            }
            let turn = self.turn()?;
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let generation = self.generation()?;
            let elements = keys.iter().collect();
            match self.commit(&[Op::DeleteElements { name: set, set: &declaration, elements }], generation) {
                Ok(()) => {
                    self.remember(set, &declaration, |shadow| remove_elements(shadow, &keys));
                    return Ok(());
                }
                Err(Failure::Stale) => {}
                Err(Failure::Refused { errno: Errno::ENOENT, .. }) => {
                    self.shadow = None;
                    let present = match self.read(set) {
                        Err(NftError::NoSet { .. }) => return Ok(()),
                        other => other?,
                    };
                    keys.retain(|key, _| present.contains_key(&key));
                }
                Err(Failure::Refused { error, .. } | Failure::Broken(error)) => return Err(error),
            }
        }
        Err(self.contended())
    }

    /// The elements of one set as the kernel has them now, sorted by key; [`NftError::NoSet`] without it.
    pub fn elements(&mut self, set: &str) -> Result<Vec<(Vec<Datum>, ElementData)>, NftError> {
        Ok(self.read(set)?.into_iter().collect())
    }

    fn read(&mut self, set: &str) -> Result<Elements, NftError> {
        let declaration = self.declaration(set)?;
        let table = self.name;
        let raw = raw_elements(self.socket()?, table, set).map_err(|errno| match errno {
            Errno::ENOENT => NftError::NoSet { table: table.to_owned(), set: set.to_owned() },
            errno => exchange(table, "read the elements of a set", errno),
        })?;
        element::read_elements(&declaration, raw)
            .ok_or_else(|| NftError::Unreadable { table: table.to_owned(), set: set.to_owned() })
    }

    /// Deletes a whole table; an absent one is no error. True when it was there.
    pub fn delete(name: &str) -> Result<bool, NftError> {
        let mut socket = NetfilterSocket::open().map_err(NftError::Open)?;
        let turn = generation::turn(socket.netns_cookie());
        for _ in 0..ATTEMPTS {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let generation = read_generation(&mut socket, name)?;
            let mut batch = Batch::begin(name, generation, socket.sequences(1));
            batch.delete_table();
            match send(&mut socket, name, batch, &[], generation) {
                Ok(()) => return Ok(true),
                Err(Failure::Stale) => {}
                Err(Failure::Refused { errno: Errno::ENOENT, .. }) => return Ok(false),
                Err(Failure::Refused { error, .. } | Failure::Broken(error)) => return Err(error),
            }
        }
        Err(NftError::Contended { table: name.to_owned() })
    }

    fn socket(&mut self) -> Result<&mut NetfilterSocket, NftError> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(NetfilterSocket::open().map_err(NftError::Open)?)),
        }
    }

    fn turn(&mut self) -> Result<Arc<Mutex<()>>, NftError> {
        Ok(generation::turn(self.socket()?.netns_cookie()))
    }

    fn contended(&self) -> NftError {
        NftError::Contended { table: self.name.to_owned() }
    }

    fn generation(&mut self) -> Result<u32, NftError> {
        let name = self.name;
        read_generation(self.socket()?, name)
    }

    fn shadow_holds(&mut self, generation: u32) -> bool {
        let netns = self.socket.as_ref().map_or(0, NetfilterSocket::netns_cookie);
        self.shadow.as_ref().is_some_and(|shadow| generation::all_ours(netns, shadow.generation, generation))
    }

    /// Makes the difference to the shadow, or to the kernel's table where there is none, and commits it.
    fn apply_at(&mut self, desired: &Table, generation: u32) -> Result<Vec<String>, Failure> {
        let name = self.name;
        let mut dormant = false;
        if self.shadow.is_none() {
            let socket = self.socket().map_err(Failure::Broken)?;
            let observed = observe(socket, name, desired)
                .map_err(|errno| Failure::Broken(exchange(name, "read the table", errno)))?;
            if let Some(observed) = observed {
                dormant = observed.dormant;
                self.shadow = Some(Shadow { table: observed.table, generation });
            }
        }
        // Taken out, and put back only when it is known to be right.
        let shadow = self.shadow.take();
        let mut ops = diff(shadow.as_ref().map(|shadow| &shadow.table), desired);
        if dormant {
            ops.insert(0, Op::AddTable);
        }
        self.commit(&ops, generation)?;
        self.kernel_took = self.socket.as_ref().filter(|_| !ops.is_empty()).map(|socket| socket.took);
        let changed = ops.iter().map(ToString::to_string).collect();
        let mut table = shadow.map_or_else(Table::default, |shadow| shadow.table);
        table.catch_up(desired);
        let generation = self.last_generation(generation);
        self.shadow = Some(Shadow { table, generation });
        Ok(changed)
    }

    /// The generation that the last commit made out of `before`: nothing could have come between.
    fn last_generation(&self, before: u32) -> u32 {
        self.socket.as_ref().and_then(|socket| socket.committed).unwrap_or(before)
    }

    fn commit(&mut self, ops: &[Op<'_>], generation: u32) -> Result<(), Failure> {
        let name = self.name;
        let socket = self.socket().map_err(Failure::Broken)?;
        socket.committed = None;
        if ops.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::begin(name, generation, socket.sequences(1));
        for (index, op) in ops.iter().enumerate() {
            batch.push(index, op);
        }
        send(socket, name, batch, ops, generation)
    }

    /// The declaration of a set: the shadow's, or else the kernel's.
    fn declaration(&mut self, set: &str) -> Result<Set, NftError> {
        let table = self.name;
        let known = self.shadow.as_ref().and_then(|shadow| shadow.table.sets.get(set));
        if let Some(known) = known {
            return Ok(known.declaration());
        }
        let mut sets = match observe_declarations(self.socket()?, table) {
            Err(Errno::ENOENT) => BTreeMap::new(),
            other => other.map_err(|errno| exchange(table, "read the sets", errno))?,
        };
        sets.remove(set).ok_or_else(|| NftError::NoSet { table: table.to_owned(), set: set.to_owned() })
    }

    /// Changes the shadow as the kernel was just changed. Sets with a timeout have no shadow.
    fn remember(&mut self, set: &str, declaration: &Set, change: impl FnOnce(&mut Set)) {
        let Some(mut shadow) = self.shadow.take() else { return };
        let before = self.socket.as_ref().and_then(|socket| socket.committed);
        let netns = self.socket.as_ref().map_or(0, NetfilterSocket::netns_cookie);
        let Some(generation) = before else { return };
        if !generation::all_ours(netns, shadow.generation, generation) {
            return;
        }
        shadow.generation = generation;
        if declaration.timeout_millis.is_none()
            && let Some(set) = shadow.table.sets.get_mut(set)
        {
            change(set);
        }
        self.shadow = Some(shadow);
    }
}

fn exchange(table: &str, operation: &'static str, source: Errno) -> NftError {
    NftError::Exchange { table: table.to_owned(), operation, source }
}

fn read_generation(socket: &mut NetfilterSocket, table: &str) -> Result<u32, NftError> {
    socket.generation().map_err(|errno| exchange(table, "read the generation of the rule set", errno))
}

/// Sends a batch; `ops` are what it was made of, for the names of what is refused.
fn send(
    socket: &mut NetfilterSocket,
    table: &str,
    batch: Batch<'_>,
    ops: &[Op<'_>],
    generation: u32,
) -> Result<(), Failure> {
    let sealed = batch.seal();
    socket.sequences(sealed.sequences());
    let refusals = socket
        .transact(sealed.bytes(), sealed.last_sequence())
        .map_err(|errno| Failure::Broken(exchange(table, "send a transaction", errno)))?;
    if refusals.is_empty() {
        let now = read_generation(socket, table).map_err(Failure::Broken)?;
        // A transaction without effect does not count; more than one step means that others committed since.
        let made = match now.wrapping_sub(generation) {
            0 => generation,
            _ => {
                let made = generation.wrapping_add(1).max(1);
                generation::record(socket.netns_cookie(), made);
                made
            }
        };
        socket.committed = Some(made);
        return Ok(());
    }
    if refusals.iter().any(|refusal| matches!(refusal.errno, Errno::ERESTART | Errno::EINTR | Errno::EAGAIN))
    {
        return Err(Failure::Stale);
    }
    let named = refusals.iter().find_map(|refusal| Some((sealed.object(refusal, ops)?, refusal)));
    let (object, refusal) = named.unwrap_or_else(|| ("commit".to_owned(), &refusals[0]));
    let source =
        KernelRefusal { errno: refusal.errno, message: refusal.message.clone(), others: refusals.len() - 1 };
    let error = NftError::Refused { table: table.to_owned(), object, source };
    Err(Failure::Refused { errno: refusal.errno, error })
}

/// Where elements added at run time stand in the shadow; a plan's groups are named after objects.
const RUNTIME_GROUP: &str = "";

fn insert_elements(set: &mut Set, elements: &[(Vec<Datum>, ElementData)]) {
    for (key, data) in elements {
        let known =
            set.groups.iter().find(|(_, group)| group.contains_key(key)).map(|(name, _)| name.clone());
        let group = set.groups.get_or_default(known.unwrap_or_else(|| RUNTIME_GROUP.into()));
        if group.get(key).as_ref() != Some(data) {
            Arc::make_mut(group).insert(key, data);
        }
    }
}

fn remove_elements(set: &mut Set, keys: &Elements) {
    for group in set.groups.values_mut() {
        for key in keys.keys() {
            if group.contains_key(&key) {
                Arc::make_mut(group).remove(&key);
            }
        }
    }
}
