//! The host's resolvers: the `nameserver` lines of a resolv.conf(5), read again when the file changes.
//!
//! `search` and `options` are for stub resolvers; a server that forwards whole names has no use for them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A file that is looked at again whenever somebody asks.
#[derive(Debug)]
pub(crate) struct ResolvConf {
    path: PathBuf,
    seen: Option<Stamp>,
    pub(crate) nameservers: Vec<SocketAddr>,
}

/// What changes when a file is replaced or written: device, inode, length, modification time.
type Stamp = (u64, u64, u64, i64, i64);

impl ResolvConf {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, seen: None, nameservers: Vec::new() }
    }

    /// Reads the file if it is not the one that was read last. A file that is gone has no nameservers.
    /// True when the nameservers are others than before.
    pub(crate) fn refresh(&mut self) -> bool {
        let stamp = stamp(&self.path);
        if stamp.is_some() && stamp == self.seen {
            return false;
        }
        let nameservers = match std::fs::read_to_string(&self.path) {
            Ok(text) => parse(&text),
            Err(error) => {
                if self.seen.is_some() {
                    tracing::warn!(path = %self.path.display(), %error, "cannot read the host's resolvers");
                }
                Vec::new()
            }
        };
        self.seen = stamp;
        let changed = nameservers != self.nameservers;
        self.nameservers = nameservers;
        changed
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

/// The nameservers of resolv.conf text in order, port 53, without duplicates; lines that are none are skipped, as
/// the C library does.
pub(crate) fn parse(text: &str) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()).flatten()
        })
        .filter_map(nameserver)
        .filter(|address| seen.insert(*address))
        .collect()
}

/// An address, an IPv6 one with an optional zone: the link's name or number (RFC 4007 section 11).
fn nameserver(word: &str) -> Option<SocketAddr> {
    let Some((address, zone)) = word.split_once('%') else {
        return word.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, 53));
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let index = zone.parse().ok().or_else(|| nix::net::if_::if_nametoindex(zone).ok())?;
    Some(SocketAddr::V6(SocketAddrV6::new(address, 53, 0, index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_are_read_in_order_without_duplicates() {
        let text = "# by hand\nsearch lan\nnameserver 127.0.0.53\n nameserver\t2001:db8::1 # v6\nnameserver nonsense\n\
                    nameserver 127.0.0.53\nnameserverx 192.0.2.1\nnameserver fe80::1%1\nnameserver\noptions edns0\n";
        let expected: Vec<SocketAddr> =
            ["127.0.0.53:53", "[2001:db8::1]:53", "[fe80::1%1]:53"].map(|a| a.parse().unwrap()).into();
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_missing_one_is_empty() {
        let path = std::env::temp_dir().join(format!("weft-resolv-{}", std::process::id()));
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let mut conf = ResolvConf::new(path.clone());
        assert!(conf.refresh());
        assert!(!conf.refresh());
        std::fs::write(&path, "nameserver 192.0.2.200\n").unwrap();
        assert!(conf.refresh());
        assert_eq!(conf.nameservers, ["192.0.2.200:53".parse().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        assert!(conf.refresh());
        assert_eq!(conf.nameservers, []);
    }
}
