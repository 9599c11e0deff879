//! Sockets that the service manager kept while this process did not run, sorted by kind, and where it keeps ours.

use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use weft_netstack::kernel::descriptor_store::{self, DescriptorStore};

pub(crate) struct Kept {
    pub(crate) udp: Vec<UdpSocket>,
    pub(crate) tcp: Vec<TcpListener>,
    pub(crate) store: Option<DescriptorStore>,
}

impl Kept {
    /// What is neither UDP nor a TCP listener is closed.
    pub(crate) fn from_environment() -> Self {
        let kept = descriptor_store::Kept::from_environment();
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for (_, descriptor) in kept.descriptors {
            match kind(&descriptor) {
                Some(SockType::Datagram) => udp.push(descriptor.into()),
                Some(SockType::Stream) => tcp.push(descriptor.into()),
                _ => {}
            }
        }
        Self { udp, tcp, store: kept.store }
    }
}

/// The type of a socket of the internet families; a stream only when it listens.
fn kind(descriptor: &OwnedFd) -> Option<SockType> {
    let kind = getsockopt(descriptor, sockopt::SockType).ok()?;
    let listens = getsockopt(descriptor, sockopt::AcceptConn).unwrap_or(false);
    // A socket of another family has no such address.
    let view: std::net::TcpStream = descriptor.try_clone().ok()?.into();
    (view.local_addr().is_ok() && (kind != SockType::Stream || listens)).then_some(kind)
}
