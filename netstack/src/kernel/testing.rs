//! For tests with real namespaces: named ones that go when their value goes, even on panic.

#![allow(unsafe_code)]

use std::future::Future;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use super::netns::Netns;

/// False, loudly, when this process may not make namespaces.
pub(crate) fn needs_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED: needs root");
    false
}

/// A namespace under `/run/netns`, removed on drop.
pub(crate) struct NamedNetns {
    pub(crate) name: String,
}

impl NamedNetns {
    pub(crate) fn new(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-t{}-{role}{number}", std::process::id());
        run(&["ip", "netns", "add", &name]);
        Self { name }
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs a command inside; true and its output when it succeeded.
    pub(crate) fn exec(&self, command: &[&str]) -> (bool, String) {
        let mut all = vec!["ip", "netns", "exec", &self.name];
        all.extend_from_slice(command);
        try_run(&all)
    }

    /// Like [`Self::exec`], and the command must succeed.
    pub(crate) fn must(&self, command: &[&str]) -> String {
        let (ok, output) = self.exec(command);
        assert!(ok, "{command:?} in {}: {output}", self.name);
        output
    }

    /// Drives `work` on a runtime whose every thread lives inside.
    pub(crate) fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        let netns = Netns::open(self.path()).unwrap();
        netns
            .run(|| {
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
                runtime.unwrap().block_on(work)
            })
            .unwrap()
    }
}

impl Drop for NamedNetns {
    fn drop(&mut self) {
        try_run(&["ip", "netns", "del", &self.name]);
    }
}

pub(crate) fn run(command: &[&str]) -> String {
    let (ok, output) = try_run(command);
    assert!(ok, "{command:?}: {output}");
    output
}

fn try_run(command: &[&str]) -> (bool, String) {
    let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Stands in for the service manager of one unit: keeps descriptors as sd_notify(3) says and gives them to what it starts, as
/// sd_listen_fds(3) says.
pub(crate) struct ServiceManager {
    path: PathBuf,
    socket: UnixDatagram,
    pub(crate) kept: Vec<(String, OwnedFd)>,
    /// Every message so far.
    pub(crate) heard: Vec<String>,
}

impl ServiceManager {
    /// `path` is the notify socket.
    pub(crate) fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { path: path.to_owned(), socket, kept: Vec::new(), heard: Vec::new() }
    }

    /// Takes what has come.
    pub(crate) fn hear(&mut self) {
        let (mut buffer, mut space) = ([0; 256], cmsg_space!([RawFd; 4]));
        loop {
            let mut pieces = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let socket = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<UnixAddr>(socket, &mut pieces, Some(&mut space), flags) else {
                return;
            };
            let mut came = Vec::new();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(descriptors) = control {
                    // SAFETY: the kernel has just opened them for this process.
                    came.extend(descriptors.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
                }
            }
            let length = message.bytes;
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let name =
                text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
            if text.starts_with("FDSTOREREMOVE=1") {
                self.kept.retain(|(kept, _)| *kept != name);
            }
            self.kept.extend(came.into_iter().map(|descriptor| (name.clone(), descriptor)));
            self.heard.push(text);
        }
    }

    /// Gives `start` a command, to be completed by a program and its arguments, which gets everything that is kept.
    pub(crate) fn start<T>(&mut self, start: impl FnOnce(&mut Command) -> T) -> T {
        self.hear();
        // Out of the way of the numbers that they get in the new process.
        let high = |descriptor| fcntl(descriptor, FcntlArg::F_DUPFD(100)).unwrap();
        let copies: Vec<RawFd> = self.kept.iter().map(|(_, descriptor)| high(descriptor)).collect();
        let moves: String =
            (3..).zip(&copies).map(|(to, from)| format!("exec {to}<&{from} {from}<&-; ")).collect();
        let names: Vec<&str> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        let line = format!(
            "{moves} LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} exec \"$@\"",
            names.len(),
            names.join(":")
        );
        let mut command = Command::new("bash");
        command.args(["-c", &line, "bash"]).env("NOTIFY_SOCKET", &self.path);
        let outcome = start(&mut command);
        // SAFETY: they were opened here, and nobody else knows of them.
        copies.into_iter().for_each(|raw| drop(unsafe { OwnedFd::from_raw_fd(raw) }));
        outcome
    }
}
