//! Children of the first process of a pid namespace: it collects every dead process, its own and the orphans, and
//! tells whoever started one how it ended.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};

/// How a process ended, as a shell says it: the exit code, or 128 and the signal.
pub(super) type ExitCode = i32;

#[derive(Clone, Default)]
pub(super) struct Reaper(Arc<Mutex<HashMap<i32, Sender<ExitCode>>>>);

/// A running child; its end arrives on `ended`.
pub(super) struct Running {
    pub(super) pid: i32,
    pub(super) child: Child,
    pub(super) ended: Receiver<ExitCode>,
}

impl Reaper {
    /// Starts a child. Never wait for it through `Child`: the reaper does.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<Running> {
        // Held over the start, so that the end of a short-lived child finds its entry.
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (sender, ended) = channel();
        waiting.insert(pid, sender);
        Ok(Running { pid, child, ended })
    }

    /// Collects the dead for ever.
    pub(super) fn reap(&self) -> ! {
        loop {
            let (pid, code) = match wait() {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Err(Errno::ECHILD) => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                _ => continue,
            };
            let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid.as_raw());
            if let Some(sender) = sender {
                // Whoever started it may have lost interest.
                let _ = sender.send(code);
            }
        }
    }
}
