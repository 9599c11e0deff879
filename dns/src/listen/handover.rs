//! Sockets from the agent before this one, and the store that keeps ours for the next: what is asked while no agent runs
//! waits in them instead of being lost.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;

use weft_netstack::kernel::descriptor_store::DescriptorStore;

use super::Transport;

/// What the service manager gave to this process. The default is nothing: sockets then end with the process.
#[derive(Debug, Default)]
pub struct Handover {
    /// Bound, by the agent before.
    pub udp: Vec<UdpSocket>,
    /// Listening, by the agent before.
    pub tcp: Vec<TcpListener>,
    /// Keeps what is opened here.
    pub store: Option<DescriptorStore>,
}

impl Handover {
    /// The kept UDP socket of an address, once.
    pub(super) fn take_udp(&mut self, address: SocketAddr) -> Option<UdpSocket> {
        let at = self.udp.iter().position(|socket| socket.local_addr().is_ok_and(|own| own == address))?;
        Some(self.udp.swap_remove(at))
    }

    /// The kept TCP socket of an address, once.
    pub(super) fn take_tcp(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = self.tcp.iter().position(|socket| socket.local_addr().is_ok_and(|own| own == address))?;
        Some(self.tcp.swap_remove(at))
    }

    /// Closes what the agent before listened on and this one does not.
    pub(super) fn drop_rest(&mut self) {
        let udp = self.udp.drain(..).filter_map(|socket| Some((socket.local_addr().ok()?, Transport::Udp)));
        let tcp = self.tcp.drain(..).filter_map(|socket| Some((socket.local_addr().ok()?, Transport::Tcp)));
        let rest: Vec<_> = udp.chain(tcp).collect();
        rest.into_iter().for_each(|(address, transport)| self.forget(address, transport));
    }

    /// Has the socket kept for the next agent.
    pub(super) fn keep(&self, address: SocketAddr, transport: Transport, socket: impl AsFd) {
        if let Some(store) = &self.store {
            store.keep_or_warn(&kept_name(address, transport), socket);
        }
    }

    /// The socket is closed for good.
    pub(super) fn forget(&self, address: SocketAddr, transport: Transport) {
        if let Some(store) = &self.store {
            store.forget_or_warn(&kept_name(address, transport));
        }
    }
}

/// For people: sockets are recognised by their addresses. Colons are not allowed.
fn kept_name(address: SocketAddr, transport: Transport) -> String {
    format!("dns-{}-{}", transport.name(), address.ip()).replace(':', "_")
}
