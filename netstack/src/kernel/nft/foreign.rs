//! One transaction in tables that are not ours: changes of rules and chains of others, all or none.

use nix::errno::Errno;

use super::socket::{NetfilterSocket, Refusal};
use super::uapi::*;
use super::wire::Writer;
use super::{NftError, exchange, generation};

/// For errors: whose tables they are, and what is being done to them.
#[derive(Clone, Copy)]
pub(super) struct About {
    pub(super) owner: &'static str,
    pub(super) doing: &'static str,
}

/// Sends one message for each of `changes`, which `write` makes with the sequence number and flags given. False when others
/// committed since `generation`, or took away what a change is about: then all is as it was, and worth a new look.
pub(super) fn commit<T>(
    socket: &mut NetfilterSocket,
    about: About,
    generation: u32,
    changes: &[T],
    write: impl Fn(&mut Writer, u32, u16, &T),
) -> Result<bool, NftError> {
    if changes.is_empty() {
        return Ok(true);
    }
    let count = u32::try_from(changes.len()).unwrap_or(u32::MAX);
    let first = socket.sequences(count + 2);
    let mut writer = Writer::default();
    let begin = writer.open_message(BATCH_BEGIN, NLM_F_REQUEST, first, 0, SUBSYS_NFTABLES);
    writer.be32(NFNL_BATCH_GENID, generation);
    writer.close_message(begin);
    for (sequence, change) in (first + 1..).zip(changes) {
        let acknowledged = if sequence == first + count { NLM_F_ACK } else { 0 };
        write(&mut writer, sequence, NLM_F_REQUEST | acknowledged, change);
    }
    let end = writer.open_message(BATCH_END, NLM_F_REQUEST, first + count + 1, 0, SUBSYS_NFTABLES);
    writer.close_message(end);
    let refusals = socket
        .transact(writer.bytes(), first + count)
        .map_err(|errno| exchange(about.owner, "send a transaction", errno))?;
    match refusals.first() {
        None => {
            generation::record(socket.netns_cookie(), generation.wrapping_add(1).max(1));
            Ok(true)
        }
        Some(Refusal { errno: Errno::ERESTART | Errno::EINTR | Errno::EAGAIN | Errno::ENOENT, .. }) => {
            Ok(false)
        }
        Some(refusal) => Err(exchange(about.owner, about.doing, refusal.errno)),
    }
}
