//! How far a request's body is on its way: whose turn it is, since when, and what the client did wrong with it. Told by the body as it
//! passes, asked by whoever waits for the answer.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;

/// Who is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The backend is to take what has come.
    Backend,
    /// The client is to send more.
    Client,
    /// The whole body went out, or there is none: the backend is to answer.
    Over,
}

/// Why a body did not come whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is longer than its limit.
    TooLong,
    /// Nothing came of it for too long.
    Silent,
    /// The client broke it off.
    Broken,
}

impl Fault {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Silent => StatusCode::REQUEST_TIMEOUT,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }
}

/// The default is that of a request without a body.
pub(super) struct Upload(Mutex<Progress>);

struct Progress {
    turn: Turn,
    since: Instant,
    fault: Option<Fault>,
    answered: bool,
}

impl Default for Upload {
    fn default() -> Self {
        Self(Mutex::new(Progress { turn: Turn::Over, since: Instant::now(), fault: None, answered: false }))
    }
}

impl Upload {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn turn(&self, turn: Turn) {
        let mut progress = self.lock();
        (progress.turn, progress.since) = (turn, Instant::now());
    }

    pub(super) fn fail(&self, fault: Fault) {
        self.lock().fault = Some(fault);
    }

    /// The answer has begun: both sides may go on talking as slowly as they like (streams of gRPC).
    pub(super) fn answered(&self) {
        self.lock().answered = true;
    }

    pub(super) fn is_answered(&self) -> bool {
        self.lock().answered
    }

    pub(super) fn fault(&self) -> Option<Fault> {
        self.lock().fault
    }

    /// Until when a backend that was asked at `begun` has time: `send` to take the next piece, `read` to answer. For the client
    /// somebody else waits, so that is only when to look again.
    pub(super) fn due(&self, begun: Instant, send: Duration, read: Duration) -> Instant {
        let progress = self.lock();
        let since = progress.since.max(begun);
        match progress.turn {
            Turn::Backend => since + send,
            Turn::Over => since + read,
            Turn::Client => Instant::now() + send.min(read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_has_time_to_take_a_piece_and_to_answer_and_none_while_the_client_is_awaited() {
        let (send, read) = (Duration::from_secs(3), Duration::from_secs(60));
        let upload = Upload::default();
        let later = Instant::now() + Duration::from_secs(5);
        assert_eq!(upload.due(later, send, read), later + read);
        upload.turn(Turn::Backend);
        assert_eq!(upload.due(later, send, read), later + send);
        assert!(upload.due(Instant::now(), send, read) > Instant::now() + Duration::from_secs(2));
        upload.turn(Turn::Client);
        std::thread::sleep(Duration::from_millis(20));
        assert!(upload.due(Instant::now(), Duration::from_millis(10), read) > Instant::now());
    }
}
