//! Listening sockets of the process before this one, and the store that keeps ours for the next: connections that come while
//! nobody runs wait in them instead of being refused.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Mutex, PoisonError};

use weft_netstack::kernel::descriptor_store::DescriptorStore;

/// What the service manager gave to this process. The default is nothing: sockets then end with the process.
#[derive(Default)]
pub struct Handover {
    /// By address, each until a thread took it; what is opened here has an entry too.
    kept: Mutex<BTreeMap<SocketAddr, Vec<Option<TcpListener>>>>,
    store: Option<DescriptorStore>,
}

impl Handover {
    /// `kept` listens already; `store` keeps what is opened here.
    pub fn new(kept: Vec<TcpListener>, store: Option<DescriptorStore>) -> Self {
        let mut by_address: BTreeMap<SocketAddr, Vec<Option<TcpListener>>> = BTreeMap::new();
        for listener in kept {
            if let Ok(address) = listener.local_addr() {
                by_address.entry(address).or_default().push(Some(listener));
            }
        }
        Self { kept: Mutex::new(by_address), store }
    }

    /// Thread `number` of `threads` takes its share of what listens on this address, once: a socket that nobody serves would
    /// swallow connections.
    pub(super) fn take(&self, address: SocketAddr, number: usize, threads: usize) -> Vec<TcpListener> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let all = kept.get_mut(&address).into_iter().flatten();
        all.skip(number).step_by(threads.max(1)).filter_map(Option::take).collect()
    }

    /// Closes what was left on addresses that the table no longer names, and has it kept no longer.
    pub(super) fn close_others(&self, is_wanted: impl Fn(&SocketAddr) -> bool) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let others: Vec<SocketAddr> = kept.keys().filter(|address| !is_wanted(address)).copied().collect();
        for address in others {
            kept.remove(&address);
            if let Some(store) = &self.store {
                store.forget_or_warn(&kept_name(address));
            }
        }
    }

    /// Has the socket kept for the next process.
    pub(super) fn keep(&self, address: SocketAddr, listener: impl std::os::fd::AsFd) {
        let Some(store) = &self.store else { return };
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).entry(address).or_default();
        store.keep_or_warn(&kept_name(address), listener);
    }
}

/// For people, and for letting go: sockets are recognised by their addresses. Colons are not allowed.
fn kept_name(address: SocketAddr) -> String {
    format!("ingress-{}-{}", address.ip(), address.port()).replace(':', "_")
}

#[cfg(test)]
mod tests {
    use super::super::listen;
    use super::*;

    /// Listening sockets of several threads on one address.
    async fn several(count: usize) -> (SocketAddr, Vec<TcpListener>) {
        let first = listen::bind("[::1]:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let mut all = vec![first.into_std().unwrap()];
        all.extend((1..count).map(|_| listen::bind(address).unwrap().into_std().unwrap()));
        (address, all)
    }

    #[tokio::test]
    async fn fewer_threads_take_every_socket_and_more_threads_take_one_each() {
        for (sockets, threads, shares) in
            [(4, 4, vec![1, 1, 1, 1]), (5, 2, vec![3, 2]), (1, 3, vec![1, 0, 0])]
        {
            let (address, kept) = several(sockets).await;
            let handover = Handover::new(kept, None);
            let mut taken: Vec<Vec<TcpListener>> =
                (0..threads).rev().map(|number| handover.take(address, number, threads)).collect();
            taken.reverse();
            assert_eq!(taken.iter().map(Vec::len).collect::<Vec<_>>(), shares);
        }
    }

    #[tokio::test]
    async fn what_nobody_wants_is_closed() {
        let (address, kept) = several(2).await;
        let handover = Handover::new(kept, None);
        handover.close_others(|_| true);
        assert!(std::net::TcpStream::connect(address).is_ok());
        handover.close_others(|_| false);
        assert!(std::net::TcpStream::connect(address).is_err());
        assert!(handover.take(address, 0, 1).is_empty());
    }

    #[test]
    fn names_have_no_colon() {
        assert_eq!(kept_name("[fd00::2]:8443".parse().unwrap()), "ingress-fd00__2-8443");
    }
}
