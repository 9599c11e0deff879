//! The service manager's descriptor store: sockets that outlive this process and come back to its successor.
//!
//! Source: sd_notify(3) `FDSTORE=1`, systemd.service(5) `FileDescriptorStoreMax=`. How they come back (`LISTEN_FDS`) is the
//! business of who reads the environment.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

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

    /// Gives the manager a copy of `descriptor` under `name` (ASCII without `:`). One that it has already stays single.
    pub fn keep(&self, name: &str, descriptor: impl AsFd) -> io::Result<()> {
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        let descriptors = [descriptor.as_fd().as_raw_fd()];
        self.tell(&text, &[ControlMessage::ScmRights(&descriptors)])
    }

    /// The manager closes what it keeps under `name`.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn tell(&self, text: &str, control: &[ControlMessage<'_>]) -> io::Result<()> {
        let pieces = [IoSlice::new(text.as_bytes())];
        sendmsg(self.socket.as_raw_fd(), &pieces, control, MsgFlags::MSG_NOSIGNAL, Some(&self.manager))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::net::UdpSocket;

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    /// What the manager hears: the text, and which sockets came with it.
    fn heard(manager: &UnixDatagram) -> (String, Vec<String>) {
        let mut buffer = [0; 256];
        let mut space = cmsg_space!([std::os::fd::RawFd; 4]);
        let (length, sockets) = {
            let mut pieces = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<UnixAddr>(manager.as_raw_fd(), &mut pieces, Some(&mut space), flags).unwrap();
            let mut sockets = Vec::new();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(descriptors) = control {
                    sockets.extend(descriptors.iter().map(|descriptor| inode(*descriptor)));
                }
            }
            (message.bytes, sockets)
        };
        (String::from_utf8_lossy(&buffer[..length]).into_owned(), sockets)
    }

    fn inode(descriptor: i32) -> String {
        std::fs::read_link(format!("/proc/self/fd/{descriptor}")).unwrap().to_string_lossy().into_owned()
    }

    #[test]
    fn the_manager_gets_the_very_socket_with_its_name_and_is_told_to_forget_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let store = DescriptorStore::open(path.as_os_str()).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        store.keep("dns", &socket).unwrap();
        let (text, sockets) = heard(&manager);
        assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=dns");
        assert_eq!(sockets, [inode(socket.as_raw_fd())]);
        store.forget("dns").unwrap();
        assert_eq!(heard(&manager), ("FDSTOREREMOVE=1\nFDNAME=dns".to_owned(), Vec::new()));
    }

    #[test]
    fn an_address_that_is_no_socket_is_refused() {
        assert!(DescriptorStore::open(OsStr::new("")).is_err());
        assert!(DescriptorStore::open(OsStr::new("vsock:2:1")).is_err());
        assert!(DescriptorStore::open(OsStr::new("@abstract")).is_ok());
    }
}
