//! Processes by recorded pid and start time: a pid alone may have been given to a stranger since.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A process of the lab: `/run/weft-lab/NAME.process.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recorded {
    pub(super) pid: i32,
    /// Clock ticks after boot (proc(5), field 22 of stat).
    start_time: u64,
}

impl Recorded {
    /// The record of a running process.
    pub(super) fn observe(pid: i32) -> anyhow::Result<Self> {
        let (_, start_time) = stat(pid).with_context(|| format!("process {pid} ended at once"))?;
        Ok(Self { pid, start_time })
    }

    pub(super) fn read(path: &Path) -> Option<Self> {
        read_json(path).ok()
    }

    /// Whether it still runs; a zombie does not.
    pub(super) fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start_time && state != 'Z' && state != 'X')
    }

    pub(super) fn signal(self, signal: Signal) -> anyhow::Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno).with_context(|| format!("signal process {}", self.pid)),
        }
    }

    /// Ends it with SIGKILL and waits until it is gone. For the first process of a pid namespace that ends them all.
    pub(super) fn kill_and_wait(self) -> anyhow::Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_gone(Duration::from_secs(10))
    }

    pub(super) fn wait_gone(self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!("process {} is still there after {} s", self.pid, limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// State letter and start time of a process, when there is one.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold blanks and brackets; what follows the last bracket is regular.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The pid here of the process that is `inner` in the pid namespace whose first process is `first`.
pub(super) fn outer_pid(first: i32, inner: i32) -> Option<i32> {
    let namespace = fs::read_link(format!("/proc/{first}/ns/pid")).ok()?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        if fs::read_link(entry.path().join("ns/pid")).ok()? != namespace {
            return None;
        }
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let chain = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        (chain.split_ascii_whitespace().last()?.parse::<i32>().ok()? == inner).then_some(pid)
    })
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

/// Replaces the file atomically: a reader sees the old or the new content.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    write_private(path, serde_json::to_vec_pretty(value)?)
}

/// Replaces the file atomically, readable by its owner only.
pub(super) fn write_private(path: &Path, content: impl AsRef<[u8]>) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let parent = path.parent().context("a file has a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("write {}", temporary.display()))?;
    std::io::Write::write_all(&mut file, content.as_ref())
        .with_context(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("replace {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_pid_is_not_taken_for_the_recorded_process() {
        let own = i32::try_from(std::process::id()).unwrap();
        let recorded = Recorded::observe(own).unwrap();
        assert!(recorded.is_alive());
        let stranger = Recorded { start_time: recorded.start_time + 1, ..recorded };
        assert!(!stranger.is_alive());
        stranger.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn an_ended_process_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let recorded = Recorded::observe(i32::try_from(child.id()).unwrap()).unwrap();
        recorded.kill_and_wait().unwrap();
        assert!(!recorded.is_alive());
        child.wait().unwrap();
    }
}
