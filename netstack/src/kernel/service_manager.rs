//! Stands in for the service manager of one unit where none runs, in the lab and in tests: keeps descriptors as sd_notify(3) says and
//! gives them to what it starts, as sd_listen_fds(3) says. The other side is [`super::descriptor_store`].
#![allow(unsafe_code)]

use std::fs::Permissions;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

pub struct ServiceManager {
    path: PathBuf,
    socket: UnixDatagram,
    pub kept: Vec<(String, OwnedFd)>,
    /// Every message so far.
    pub heard: Vec<String>,
}

impl ServiceManager {
    /// `path` is the notify socket, which every user may write to.
    ///
    /// # Errors
    /// It is there already, or its folder is not.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o777))?;
        socket.set_nonblocking(true)?;
        Ok(Self { path: path.to_owned(), socket, kept: Vec::new(), heard: Vec::new() })
    }

    /// Takes what has come. Few messages wait in the socket (net.unix.max_dgram_qlen), and their senders for them.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn hear(&mut self) -> io::Result<()> {
        let (mut buffer, mut space) = ([0; 256], cmsg_space!([RawFd; 4]));
        loop {
            let mut pieces = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let socket = self.socket.as_raw_fd();
            let message = match recvmsg::<UnixAddr>(socket, &mut pieces, Some(&mut space), flags) {
                Err(Errno::EAGAIN) => return Ok(()),
                message => message?,
            };
            let mut came = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(descriptors) = control {
                    // SAFETY: the kernel has just opened them for this process.
                    came.extend(descriptors.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
                }
            }
            let length = message.bytes;
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            let name =
                text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
            if text.starts_with("FDSTOREREMOVE=1") {
                self.kept.retain(|(kept, _)| *kept != name);
            }
            self.kept.extend(came.into_iter().map(|descriptor| (name.clone(), descriptor)));
            self.heard.push(text);
        }
    }

    /// Gives `start` a command, to be completed by a program and its arguments, which gets everything that is kept. Nothing else may
    /// be started meanwhile: it would inherit that too.
    ///
    /// # Errors
    /// No descriptors are left, or the socket is broken.
    pub fn start<T>(&mut self, start: impl FnOnce(&mut Command) -> T) -> io::Result<T> {
        self.hear()?;
        // Out of the way of the numbers that they get in the new process.
        let copies: Vec<OwnedFd> = self.kept.iter().map(|(_, kept)| high(kept)).collect::<io::Result<_>>()?;
        let moves: String = (3..)
            .zip(&copies)
            .map(|(to, copy)| format!("exec {to}<&{from} {from}<&-; ", from = copy.as_raw_fd()))
            .collect();
        let names: Vec<&str> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        let line = format!(
            "{moves} LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} exec \"$@\"",
            names.len(),
            names.join(":")
        );
        let mut command = Command::new("bash");
        command.args(["-c", &line, "bash"]).env("NOTIFY_SOCKET", &self.path);
        Ok(start(&mut command))
    }
}

/// A copy that a child inherits.
fn high(descriptor: &OwnedFd) -> io::Result<OwnedFd> {
    let raw = fcntl(descriptor, FcntlArg::F_DUPFD(100))?;
    // SAFETY: it was opened here, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
