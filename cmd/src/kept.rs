//! Sockets that the service manager kept while this process did not run (sd_listen_fds(3)), and where it keeps ours.

use std::net::{TcpListener, UdpSocket};

use listenfd::ListenFd;
use weft_netstack::kernel::descriptor_store::DescriptorStore;

pub(crate) struct Kept {
    pub(crate) udp: Vec<UdpSocket>,
    pub(crate) tcp: Vec<TcpListener>,
    pub(crate) store: Option<DescriptorStore>,
}

impl Kept {
    /// From `LISTEN_FDS` and `NOTIFY_SOCKET`; what is neither UDP nor a TCP listener stays closed to us.
    pub(crate) fn from_environment() -> Self {
        let mut kept = ListenFd::from_env();
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for index in 0..kept.len() {
            // A descriptor of another kind is an error here and is put back.
            if let Ok(Some(socket)) = kept.take_udp_socket(index) {
                udp.push(socket);
            } else if let Ok(Some(listener)) = kept.take_tcp_listener(index) {
                tcp.push(listener);
            }
        }
        let store = std::env::var_os("NOTIFY_SOCKET").and_then(|address| {
            DescriptorStore::open(&address)
                .inspect_err(|error| tracing::warn!(?address, %error, "NOTIFY_SOCKET is no socket"))
                .ok()
        });
        Self { udp, tcp, store }
    }
}
