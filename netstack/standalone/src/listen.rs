//! Listening sockets: bound here, or inherited from whoever started the process (socket activation, sd_listen_fds(3)).
//! In: addresses, the environment. Out: sockets ready for the server.

use std::net::{SocketAddr, TcpListener};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("listening on {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("inherited descriptor {descriptor} is not a listening TCP socket")]
    Inherited {
        descriptor: usize,
        #[source]
        source: std::io::Error,
    },
}

/// Binds an address.
///
/// # Errors
/// When it is taken or not of this host.
pub fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).map_err(|source| ListenError::Bind { address, source })
}

/// Sockets passed by `LISTEN_FDS` (from descriptor 3 on); `LISTEN_PID` must be this process or unset.
///
/// # Errors
/// When a descriptor is something else than a TCP listener.
pub fn inherited() -> Result<Vec<TcpListener>, ListenError> {
    let mut descriptors = listenfd::ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..descriptors.len() {
        let listener = descriptors
            .take_tcp_listener(index)
            .map_err(|source| ListenError::Inherited { descriptor: index + 3, source })?;
        listeners.extend(listener);
    }
    Ok(listeners)
}
