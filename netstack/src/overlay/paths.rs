//! How large a packet may be to reach each node through the tunnel, found out by asking.
//!
//! ```text
//!  question (a packet of that size) --tunnel--> the node --> answer (small): it came through
//!  small, whole, and where whole is lost: halves between them; small again, so that a node that left is not called narrow
//! ```
//!
//! A path that drops what is large drops it in silence, so senders have to be told by someone who knows: the plan gives the
//! routes to that node a smaller MTU, and its Node a Problem. Each node looks at its own way to the others. The tunnel's
//! device sends what it is given in fragments where a link is narrow; only what really gets lost counts here.

mod ask;

use std::time::{Duration, Instant};

pub(super) use ask::start;

/// Bytes of a packet that gets through where anything does.
const SMALL: u32 = 128;
/// Sizes nearer than this to each other are one: WireGuard pads to it.
const GRAIN: u32 = 16;
const TRIES: u8 = 3;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(500);
/// From one look at a path to the next.
const REST: Duration = Duration::from_secs(30);
/// The same where nobody answered.
const REST_AWAY: Duration = Duration::from_secs(10);

/// A question to send: bytes of the whole packet, and what its answer repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question {
    bytes: u32,
    nonce: u64,
}

#[derive(Clone, Copy, Debug)]
struct Asking {
    question: Question,
    /// Questions of this size so far.
    tries: u8,
}

/// The way to one node.
#[derive(Debug)]
struct Path {
    /// What the tunnel's device takes.
    whole: u32,
    /// The largest that came through, where the whole does not.
    narrow: Option<u32>,
    asking: Option<Asking>,
    /// Of this look: the largest answered and the smallest unanswered size.
    came: u32,
    lost: Option<u32>,
    due: Instant,
}

impl Path {
    /// `narrow` is what was known before.
    fn new(whole: u32, narrow: Option<u32>, due: Instant) -> Self {
        Self { whole, narrow, asking: None, came: 0, lost: None, due }
    }

    /// From the beginning, now: the device or the network is another.
    fn look_again(&mut self, whole: u32, now: Instant) {
        *self = Self::new(whole, self.narrow, now);
    }

    /// What to ask now, when anything is due.
    fn step(&mut self, now: Instant) -> Option<Question> {
        if now < self.due {
            return None;
        }
        match self.asking {
            None => self.ask(SMALL.min(self.whole)),
            Some(Asking { tries: TRIES, question }) => self.miss(question.bytes, now),
            Some(_) => {}
        }
        let asking = self.asking.as_mut()?;
        asking.tries += 1;
        self.due = now + PATIENCE;
        Some(asking.question)
    }

    /// An answer came; true when it was to the present question.
    fn hear(&mut self, nonce: u64, now: Instant) -> bool {
        let Some(asking) = self.asking.filter(|asking| asking.question.nonce == nonce) else { return false };
        let again = asking.question.bytes <= self.came;
        self.came = self.came.max(asking.question.bytes);
        self.due = now;
        match self.lost {
            _ if self.came == self.whole => self.conclude(None, now),
            // The path lives, and this is all of it.
            Some(_) if again => self.conclude(Some(self.came), now),
            _ => self.ask_next(),
        }
        true
    }

    fn miss(&mut self, bytes: u32, now: Instant) {
        // Not even what came through before: the node is away, which says nothing about its path.
        if bytes <= self.came || self.came == 0 {
            self.rest(now + REST_AWAY);
            return;
        }
        self.lost = Some(bytes);
        self.ask_next();
    }

    fn ask_next(&mut self) {
        let Some(lost) = self.lost else { return self.ask(self.whole) };
        let between = self.came.midpoint(lost);
        self.ask(if lost - self.came > GRAIN { between } else { self.came });
    }

    fn ask(&mut self, bytes: u32) {
        self.asking = Some(Asking { question: Question { bytes, nonce: rand::random() }, tries: 0 });
    }

    fn conclude(&mut self, narrow: Option<u32>, now: Instant) {
        self.narrow = narrow;
        self.rest(now + REST);
    }

    fn rest(&mut self, until: Instant) {
        (self.asking, self.came, self.lost, self.due) = (None, 0, None, until);
    }
}

#[cfg(test)]
mod tests;
