//! Whether the process that asked for something still waits for it.
//!
//! A runtime goes on when its plugin has ended, also when that was killed: it detaches what it was attaching. What the plugin
//! asked for may not have begun by then, and must not begin any more, or it would come after what the runtime asks next.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::UnixListener;
use weft_plugin::wire::{CniError, Code};

/// The other end of a connection to the agent's socket.
#[derive(Clone, Debug)]
pub struct Caller(Option<Arc<OwnedFd>>);

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().as_fd().try_clone_to_owned().ok().map(Arc::new))
    }
}

impl Caller {
    /// To be asked under the lock of what is to be changed: then all that the runtime asks later comes later.
    pub(super) fn must_wait(&self) -> Result<(), CniError> {
        let refused = |why| Err(CniError::new(Code::TryAgainLater, why));
        let Some(connection) = &self.0 else {
            return refused("the agent has too many files open");
        };
        // POLLHUP is told unasked: of a Unix socket when its other end is closed, which comes before a process is seen to end.
        let mut polled = [PollFd::new(connection.as_fd(), PollFlags::empty())];
        match poll(&mut polled, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            _ => refused("the plugin was ended before its call began"),
        }
    }
}
