//! How much of something bounded one client may hold, so that no pod takes all of it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts what each client holds. Clones share the counts.
#[derive(Clone, Debug)]
pub(crate) struct Quota {
    most: usize,
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One unit held by a client, given back on drop.
#[derive(Debug)]
pub(crate) struct Share {
    quota: Quota,
    client: IpAddr,
}

impl Quota {
    /// At most `most` units for each client.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, held: Arc::default() }
    }

    /// `None` when the client holds as many as it may.
    pub(crate) fn take(&self, client: IpAddr) -> Option<Share> {
        let client = client.to_canonical();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(client).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { quota: self.clone(), client })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.quota.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.get_mut(&self.client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(held.remove(&self.client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_its_share_and_gives_it_back() {
        let quota = Quota::new(2);
        let (a, b): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let first = quota.take(a).unwrap();
        let _second = quota.take(a).unwrap();
        assert!(quota.take(a).is_none());
        assert!(quota.take(b).is_some(), "another client has its own");
        drop(first);
        let _third = quota.take(a).unwrap();
        assert!(quota.take(a).is_none());
        assert_eq!(quota.held.lock().unwrap().len(), 1, "who holds nothing is not remembered");
    }
}
