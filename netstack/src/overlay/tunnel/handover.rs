//! What a tunnel process leaves to its successor, so that no packet is lost between the two.
//!
//! ```text
//!  TUN queue, UDP sockets --(kept by the service manager all the while)--> packets wait in them --> the successor
//!  orderly end: threads have ended --> Device::leave --> sealed memory --> taken once --> Device::resume
//! ```
//!
//! A counter that was sealed with must never be used again with the same key. That nobody can is in how the pieces fit:
//! 1. [`Device::leave`](super::device::Device::leave) consumes the device, so it can be called only when no thread has it any
//!    more, and the only way to seal is through it: what it writes down is the last word on every counter.
//! 2. The memory is given to the first who takes it and is empty from then on (`kernel::sealed`), before a packet is sealed
//!    from it. A process that dies at any point leaves either all of it or none, and two never have it.
//!
//! A process that was killed leaves no sessions: its successor greets the peers. Keys go through memory only, never a file.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::device::DeviceState;

/// Of what [`encode`] writes; another one is not read. Raise it with every change of a type that goes in.
const VERSION: u32 = 1;

/// Why the sessions of the process before are not taken over.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("they are of version {0} and this is version {VERSION}")]
    Version(u32),
    #[error("they cannot be read")]
    Syntax(#[from] serde_json::Error),
    #[error("a moment in them is no moment of this boot")]
    Moment,
    #[error("a session in them has no such slot or window")]
    Session,
    #[error("they name a key that they do not hold")]
    Key,
    #[error("two peers in them have one slot, or one has none")]
    Slot,
    #[error("the memory cannot be read")]
    Memory(#[from] std::io::Error),
    #[error("another process took them")]
    Taken,
}

/// Nanoseconds from the moment of leaving; negative before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offset(i64);

/// Translates moments, which mean nothing in another process.
pub(super) struct Clock {
    /// When the sessions were left, by this process's clock.
    left: Instant,
    now: Instant,
}

impl Clock {
    /// For who leaves.
    pub(super) fn leaving(now: Instant) -> Self {
        Self { left: now, now }
    }

    /// For who comes `after`.
    pub(super) fn arriving(now: Instant, after: Duration) -> Result<Self, Unusable> {
        let left = now.checked_sub(after).ok_or(Unusable::Moment)?;
        Ok(Self { left, now })
    }

    pub(super) fn now(&self) -> Instant {
        self.now
    }

    pub(super) fn offset(&self, at: Instant) -> Offset {
        let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
        Offset(match at.checked_duration_since(self.left) {
            Some(after) => nanos(after),
            None => -nanos(self.left.saturating_duration_since(at)),
        })
    }

    pub(super) fn instant(&self, Offset(nanos): Offset) -> Result<Instant, Unusable> {
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        let at = if nanos < 0 { self.left.checked_sub(distance) } else { self.left.checked_add(distance) };
        at.ok_or(Unusable::Moment)
    }
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    /// Since the boot, suspension included.
    left: Duration,
    device: DeviceState,
}

pub(super) fn encode(device: DeviceState) -> Result<Vec<u8>, Unusable> {
    Ok(serde_json::to_vec(&Document { version: VERSION, left: since_boot()?, device })?)
}

/// The state, and how long ago it was left.
pub(super) fn decode(bytes: &[u8]) -> Result<(DeviceState, Duration), Unusable> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let Head { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        return Err(Unusable::Version(version));
    }
    let document: Document = serde_json::from_slice(bytes)?;
    let ago = since_boot()?.checked_sub(document.left).ok_or(Unusable::Moment)?;
    Ok((document.device, ago))
}

fn since_boot() -> Result<Duration, Unusable> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(std::io::Error::from)?;
    Ok(time.into())
}

/// Bytes as text in JSON.
pub(super) mod in_base64 {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(in super::super) fn serialize<T: AsRef<[u8]>, S: Serializer>(
        bytes: &T,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(in super::super) fn deserialize<'a, T: TryFrom<Vec<u8>>, D: Deserializer<'a>>(
        from: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(from)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        let length = bytes.len();
        bytes.try_into().map_err(|_| D::Error::custom(format_args!("{length} bytes are another number")))
    }
}

#[cfg(test)]
mod tests;
