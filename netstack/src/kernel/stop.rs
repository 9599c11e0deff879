//! The word to end, for threads that wait for something else.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// As a descriptor it becomes ready (POLLHUP) when somebody asks, and stays so.
pub struct Stop {
    is_asked: AtomicBool,
    reader: PipeReader,
    writer: Mutex<Option<PipeWriter>>,
}

impl Stop {
    /// Errors: no descriptors left.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Self { is_asked: AtomicBool::new(false), reader, writer: Mutex::new(Some(writer)) })
    }

    pub fn ask(&self) {
        self.is_asked.store(true, Ordering::Release);
        // With its only writer the pipe hangs up.
        *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Acquire)
    }

    /// Sleeps, but not beyond [`Stop::ask`].
    pub fn sleep(&self, duration: Duration) {
        let limit = PollTimeout::try_from(duration).unwrap_or(PollTimeout::MAX);
        // An early end is no harm: who waits looks what there is to do.
        let _ = poll(&mut [PollFd::new(self.as_fd(), PollFlags::empty())], limit);
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}
