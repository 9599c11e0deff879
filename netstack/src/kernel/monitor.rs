//! What the kernel tells of links, addresses and routes while it happens (rtnetlink(7), multicast groups).

use std::io;

use futures::channel::mpsc::UnboundedReceiver;
use futures::future::{BoxFuture, FutureExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};

/// Under memory pressure the kernel drops some.
pub(super) type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Has the messages from the moment on in which it was opened.
pub(super) struct Monitor {
    messages: Messages,
    connection: BoxFuture<'static, ()>,
    handle: Handle,
}

impl Monitor {
    /// Of the calling thread's namespace. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub(super) fn open(groups: &[MulticastGroup]) -> io::Result<Self> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(groups)?;
        Ok(Self { messages, connection: connection.boxed(), handle })
    }

    /// Gives `follow` the messages, and ends when either does.
    ///
    /// # Errors
    /// Always: both last as long as what they are for.
    pub(super) async fn follow<F: Future<Output = ()>>(
        self,
        follow: impl FnOnce(Messages) -> F,
    ) -> Result<(), String> {
        let Self { messages, connection, handle } = self;
        let _alive = handle;
        tokio::select! {
            () = connection => {}
            () = follow(messages) => {}
        }
        Err("the rtnetlink monitor ended".to_owned())
    }
}
