//! Links that came up, as the kernel tells it: a cable that was plugged in, a switch that was started, a link that was set up.
//!
//! In: rtnetlink's messages about links. Out: the index of each link whose carrier came back.

use std::collections::BTreeSet;
use std::io;

use futures::StreamExt as _;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkFlags;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::monitor;

/// Links that wait for their reader; more at once are not told.
const WAITING: usize = 64;

/// Follows links from now on; ends with this value.
pub struct Carriers {
    came_up: mpsc::Receiver<u32>,
    task: JoinHandle<()>,
}

impl Drop for Carriers {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Carriers {
    /// In the namespace of the calling thread. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        let (sender, came_up) = mpsc::channel(WAITING);
        let mut messages = monitor::open(&[MulticastGroup::Link])?;
        let task = tokio::spawn(async move {
            let mut up = BTreeSet::new();
            while let Some(message) = messages.next().await {
                if let Some(index) = came_up_by(&mut up, &message) {
                    let _ = sender.try_send(index);
                }
            }
        });
        Ok(Self { came_up, task })
    }

    /// A link that came up since the last question. Never waits.
    pub fn came_up(&mut self) -> Option<u32> {
        self.came_up.try_recv().ok()
    }
}

/// `up` are the links that are known to have a carrier. One of which nothing is known yet counts as come up.
fn came_up_by(up: &mut BTreeSet<u32>, message: &RouteNetlinkMessage) -> Option<u32> {
    match message {
        RouteNetlinkMessage::NewLink(link) if link.header.flags.contains(LinkFlags::LowerUp) => {
            up.insert(link.header.index).then_some(link.header.index)
        }
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            up.remove(&link.header.index);
            None
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn a_link_whose_other_end_comes_back_is_told_once() {
        if !needs_root() {
            return;
        }
        let node = NamedNetns::new("node");
        node.must(&["ip", "link", "add", "up0", "type", "veth", "peer", "name", "far"]);
        node.must(&["ip", "link", "set", "up0", "up"]);
        node.must(&["ip", "link", "set", "far", "up"]);
        let shown = node.must(&["ip", "-o", "link", "show", "up0"]);
        let index: u32 = shown.split(':').next().unwrap().trim().parse().unwrap();
        node.block_on(async {
            let mut carriers = Carriers::open().unwrap();
            for _ in 0..2 {
                node.must(&["ip", "link", "set", "far", "down"]);
                tokio::time::sleep(Duration::from_millis(300)).await;
                while carriers.came_up().is_some() {}
                node.must(&["ip", "link", "set", "far", "up"]);
                tokio::time::sleep(Duration::from_millis(1500)).await;
                let told: Vec<u32> = std::iter::from_fn(|| carriers.came_up()).collect();
                assert_eq!(told.iter().filter(|told| **told == index).count(), 1, "{told:?}");
            }
        });
    }
}
