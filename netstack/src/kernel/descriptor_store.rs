//! The service manager's descriptor store: descriptors that outlive this process and come back to its successor.
//!
//! Source: sd_notify(3) `FDSTORE=1`, sd_listen_fds(3), systemd.service(5) `FileDescriptorStoreMax=`.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// The first descriptor that is handed over (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// What the process before this one left with the service manager, and where this one leaves its own. The default is
/// nothing, as under a service manager without such a store.
#[derive(Debug, Default)]
pub struct Kept {
    /// By the names they were kept under; one name may come more than once.
    pub descriptors: Vec<(String, OwnedFd)>,
    pub store: Option<DescriptorStore>,
}

impl Kept {
    /// From `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` and `NOTIFY_SOCKET`. Descriptors come once: a second call finds none.
    pub fn from_environment() -> Self {
        let store = std::env::var_os("NOTIFY_SOCKET").and_then(|address| {
            DescriptorStore::open(&address)
                .inspect_err(|error| tracing::warn!(?address, %error, "NOTIFY_SOCKET is no socket"))
                .ok()
        });
        Self { descriptors: inherited(), store }
    }

    /// Every descriptor that was kept under `name`, once.
    pub fn take(&mut self, name: &str) -> Vec<OwnedFd> {
        let taken = self.descriptors.extract_if(.., |(kept, _)| kept == name);
        taken.map(|(_, descriptor)| descriptor).collect()
    }
}

fn inherited() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).unwrap_or_default();
    let is_meant = variable("LISTEN_PID") == std::process::id().to_string();
    if !is_meant || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let count: RawFd = variable("LISTEN_FDS").parse().unwrap_or(0);
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.split(':');
    let descriptors = (FIRST..FIRST.saturating_add(count)).map_while(|raw| {
        // SAFETY: fcntl(2) takes numbers only; that the descriptor is open is what is asked.
        let is_open = unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
        // SAFETY: it is open, and LISTEN_PID says that the service manager opened it for this process and nobody else; `TAKEN`
        // sees to it that it gets one owner.
        is_open.then(|| unsafe { OwnedFd::from_raw_fd(raw) })
    });
    descriptors.map(|descriptor| (names.next().unwrap_or_default().to_owned(), descriptor)).collect()
}

/// Where the service manager of this process listens.
#[derive(Debug)]
pub struct DescriptorStore {
    socket: UnixDatagram,
    manager: UnixAddr,
}

impl DescriptorStore {
    /// `notify_socket` is the value of `NOTIFY_SOCKET`: a path, or an abstract name behind `@`.
    ///
    /// Errors: a value that is neither, or no descriptors left.
    pub fn open(notify_socket: &OsStr) -> io::Result<Self> {
        let manager = match notify_socket.as_bytes() {
            [b'@', name @ ..] => UnixAddr::new_abstract(name),
            [b'/', ..] => UnixAddr::new(notify_socket),
            _ => Err(nix::errno::Errno::EAFNOSUPPORT),
        }?;
        Ok(Self { socket: UnixDatagram::unbound()?, manager })
    }

    /// Gives the manager a copy of `descriptor` under `name` (ASCII without `:`). One that it has already stays single; under
    /// one name it keeps any number.
    pub fn keep(&self, name: &str, descriptor: impl AsFd) -> io::Result<()> {
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        let descriptors = [descriptor.as_fd().as_raw_fd()];
        self.tell(&text, &[ControlMessage::ScmRights(&descriptors)])
    }

    /// The manager closes what it keeps under `name`.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// [`DescriptorStore::keep`] for who can go on without.
    pub fn keep_or_warn(&self, name: &str, descriptor: impl AsFd) {
        if let Err(error) = self.keep(name, descriptor) {
            tracing::warn!(name, %error, "the service manager does not keep the descriptor");
        }
    }

    /// [`DescriptorStore::forget`] for who can go on without.
    pub fn forget_or_warn(&self, name: &str) {
        if let Err(error) = self.forget(name) {
            tracing::warn!(name, %error, "the service manager does not let go of the descriptor");
        }
    }

    fn tell(&self, text: &str, control: &[ControlMessage<'_>]) -> io::Result<()> {
        let pieces = [IoSlice::new(text.as_bytes())];
        sendmsg(self.socket.as_raw_fd(), &pieces, control, MsgFlags::MSG_NOSIGNAL, Some(&self.manager))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::kernel::service_manager::ServiceManager;

    fn inode(descriptor: impl AsFd) -> String {
        let number = descriptor.as_fd().as_raw_fd();
        std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap().to_string_lossy().into_owned()
    }

    #[test]
    fn the_manager_gets_the_very_socket_with_its_name_and_is_told_to_forget_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let mut manager = ServiceManager::bind(&path).unwrap();
        let store = DescriptorStore::open(path.as_os_str()).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        store.keep("dns", &socket).unwrap();
        manager.hear().unwrap();
        let kept: Vec<_> = manager.kept.iter().map(|(name, kept)| (name.as_str(), inode(kept))).collect();
        assert_eq!(kept, [("dns", inode(&socket))]);
        assert_eq!(manager.heard, ["FDSTORE=1\nFDPOLL=0\nFDNAME=dns"]);
        store.forget("dns").unwrap();
        manager.hear().unwrap();
        assert_eq!(manager.heard[1..], ["FDSTOREREMOVE=1\nFDNAME=dns"]);
        assert!(manager.kept.is_empty());
    }

    #[test]
    fn an_address_that_is_no_socket_is_refused() {
        assert!(DescriptorStore::open(OsStr::new("")).is_err());
        assert!(DescriptorStore::open(OsStr::new("vsock:2:1")).is_err());
        assert!(DescriptorStore::open(OsStr::new("@abstract")).is_ok());
    }

    /// Not a test of its own: what a process says that was started with descriptors.
    #[test]
    fn inherited_process() {
        if std::env::var_os("WEFT_TEST_INHERITED").is_none() {
            return;
        }
        let mut kept = Kept::from_environment();
        assert!(kept.store.is_some());
        for (name, descriptor) in &kept.descriptors {
            println!("{name} is {}", inode(descriptor));
        }
        assert_eq!(kept.take("b").len(), 2);
        assert_eq!(kept.descriptors.len(), 1);
        assert!(Kept::from_environment().descriptors.is_empty(), "they come once");
    }

    #[test]
    fn descriptors_come_back_with_their_names_to_the_process_they_are_meant_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut manager = ServiceManager::bind(&folder.path().join("notify")).unwrap();
        let sockets = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let names = ["b", "a", "b"];
        for (name, socket) in names.iter().zip(&sockets) {
            manager.kept.push(((*name).to_owned(), socket.try_clone().unwrap().into()));
        }
        let own = std::env::current_exe().unwrap();
        let run = |command: &mut std::process::Command| {
            let test = "kernel::descriptor_store::tests::inherited_process";
            let output =
                command.args(["--exact", test, "--nocapture"]).env("WEFT_TEST_INHERITED", "1").output();
            let output = output.unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let (ok, said) = manager.start(|command| run(command.arg(&own))).unwrap();
        assert!(ok, "{said}");
        for (name, socket) in names.iter().zip(&sockets) {
            assert!(said.contains(&format!("{name} is {}", inode(socket))), "{said}");
        }
        // A child of it is not who they are meant for.
        let (ok, said) = manager
            .start(|command| run(command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]).arg(&own)))
            .unwrap();
        assert!(!ok && !said.contains(" is socket"), "{said}");
    }
}
