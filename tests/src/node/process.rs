//! A process under test: its log on disk, its end on drop.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Standard output and error are appended to `folder/NAME.log`.
    pub fn start(name: &str, command: &mut Command, folder: &Path) -> Self {
        let log = OpenOptions::new().create(true).append(true).open(folder.join(format!("{name}.log")));
        let log = log.expect("a log file can be opened");
        let copy = log.try_clone().expect("a descriptor can be copied");
        let child = command.stdin(Stdio::null()).stdout(copy).stderr(log).spawn();
        Self { child: child.unwrap_or_else(|error| panic!("{command:?}: {error}")) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_some()
    }

    /// Sends the signal and waits for the end.
    pub fn end(mut self, signal: Signal) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).expect("a child that was not waited for can be signalled");
        self.child.wait().expect("a child can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end with `input` on standard input.
pub(super) fn with_input(command: &mut Command, input: &str) -> Output {
    with_input_for(None, command, input)
}

/// The same, ended by SIGKILL after this time, where one is given.
pub(super) fn with_input_for(time: Option<Duration>, command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // A command that fails early may not read it all.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    if let Some(time) = time {
        std::thread::sleep(time);
        child.kill().expect("a child that was not waited for can be signalled");
    }
    child.wait_with_output().expect("a child can be waited for")
}
