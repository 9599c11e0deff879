//! How far a request's body is on its way: whose turn it is, since when, and what the client did wrong with it. Told by the body as it
//! passes, asked by whoever waits for the answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
#[derive(Clone, Default)]
pub(super) struct Upload(Option<Arc<Mutex<Progress>>>);

struct Progress {
    turn: Turn,
    since: Instant,
    fault: Option<Fault>,
    answered: bool,
}

impl Upload {
    /// Of a body of which nothing was taken yet.
    pub(super) fn new() -> Self {
        let (turn, since) = (Turn::Backend, Instant::now());
        Self(Some(Arc::new(Mutex::new(Progress { turn, since, fault: None, answered: false }))))
    }

    fn lock(&self) -> Option<MutexGuard<'_, Progress>> {
        self.0.as_ref().map(|progress| progress.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn turn(&self, turn: Turn) {
        if let Some(mut progress) = self.lock() {
            (progress.turn, progress.since) = (turn, Instant::now());
        }
    }

    pub(super) fn fail(&self, fault: Fault) {
        if let Some(mut progress) = self.lock() {
            progress.fault = Some(fault);
        }
    }

    /// The answer has begun: both sides may go on talking as slowly as they like (streams of gRPC).
    pub(super) fn answered(&self) {
        if let Some(mut progress) = self.lock() {
            progress.answered = true;
        }
    }

    pub(super) fn is_answered(&self) -> bool {
        self.lock().is_some_and(|progress| progress.answered)
    }

    pub(super) fn fault(&self) -> Option<Fault> {
        self.lock()?.fault
    }
}

/// Until when a backend has time.
#[derive(Clone)]
pub(super) struct Deadline {
    pub(super) upload: Upload,
    /// When it was asked.
    pub(super) begun: Instant,
    /// To take the next piece, and to answer.
    pub(super) send: Duration,
    pub(super) read: Duration,
}

impl Deadline {
    /// For the client somebody else waits, so that is only when to look again.
    pub(super) fn at(&self) -> Instant {
        let Some(progress) = self.upload.lock() else { return self.begun + self.read };
        let since = progress.since.max(self.begun);
        match progress.turn {
            Turn::Backend => since + self.send,
            Turn::Over => since + self.read,
            Turn::Client => Instant::now() + self.send.min(self.read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_has_time_to_take_a_piece_and_to_answer_and_none_while_the_client_is_awaited() {
        let (send, read) = (Duration::from_secs(3), Duration::from_secs(60));
        let due = |upload: &Upload, begun, read| Deadline { upload: upload.clone(), begun, send, read }.at();
        let later = Instant::now() + Duration::from_secs(5);
        assert_eq!(due(&Upload::default(), later, read), later + read);
        let upload = Upload::new();
        assert_eq!(due(&upload, later, read), later + send);
        upload.turn(Turn::Over);
        assert_eq!(due(&upload, later, read), later + read);
        upload.turn(Turn::Backend);
        assert!(due(&upload, Instant::now(), read) > Instant::now() + Duration::from_secs(2));
        upload.turn(Turn::Client);
        std::thread::sleep(Duration::from_millis(20));
        assert!(due(&upload, Instant::now(), Duration::from_millis(10)) > Instant::now());
    }
}
