//! The host's resolvers: the `nameserver` lines of a resolv.conf(5), read again when the file changes.
//!
//! `search` is what the kubelet gives to pods too; `options` are for stub resolvers only. Where the file
//! names only the stub of systemd-resolved, the resolvers behind it are asked, as the kubelet's own default does: the stub would
//! answer single-label names by other means, and could lead back to us.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::name::Name;

/// A file that is looked at again whenever somebody asks.
#[derive(Debug)]
pub(crate) struct ResolvConf {
    path: PathBuf,
    /// Where systemd-resolved writes the resolvers behind its stub.
    behind_stub: PathBuf,
    seen: Option<(Option<Stamp>, Option<Stamp>)>,
    pub(crate) nameservers: Vec<SocketAddr>,
    /// Domains that the host's search path has, which the kubelet gives to pods too.
    pub(crate) search: Vec<Name>,
}

/// What changes when a file is replaced or written: device, inode, length, modification time.
type Stamp = (u64, u64, u64, i64, i64);

/// systemd-resolved.service(8).
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";
/// Its stub listeners.
const STUBS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];

impl ResolvConf {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self::with_stub(path, PathBuf::from(BEHIND_STUB))
    }

    fn with_stub(path: PathBuf, behind_stub: PathBuf) -> Self {
        Self { path, behind_stub, seen: None, nameservers: Vec::new(), search: Vec::new() }
    }

    /// Reads the files if they are not the ones that were read last. A file that is gone has no nameservers.
    /// True when the nameservers are others than before.
    pub(crate) fn refresh(&mut self) -> bool {
        let stamps = (stamp(&self.path), stamp(&self.behind_stub));
        if stamps.0.is_some() && self.seen == Some(stamps) {
            return false;
        }
        let mut nameservers = match std::fs::read_to_string(&self.path) {
            Ok(text) => {
                self.search = search(&text);
                parse(&text)
            }
            Err(error) => {
                if self.seen.is_some_and(|(own, _)| own.is_some()) {
                    tracing::warn!(path = %self.path.display(), %error, "cannot read the host's resolvers");
                }
                Vec::new()
            }
        };
        if !nameservers.is_empty() && nameservers.iter().all(|server| STUBS.contains(&server.ip())) {
            let behind =
                std::fs::read_to_string(&self.behind_stub).map(|text| parse(&text)).unwrap_or_default();
            // Without the file, the stub is better than nobody.
            if !behind.is_empty() {
                nameservers = behind;
            }
        }
        self.seen = Some(stamps);
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

/// Of several `search` lines the last holds; what is no name is left out.
fn search(text: &str) -> Vec<Name> {
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let last = lines.rfind(|words| words.first() == Some(&"search")).unwrap_or_default();
    let named = last.into_iter().skip(1).filter_map(|word| Name::parse(word).ok());
    named.filter(|name| *name != Name::root()).collect()
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
    fn the_last_search_line_holds() {
        let found = search("search a.example\nnameserver 192.0.2.1\nsearch lan . b.example\n");
        assert_eq!(found, ["lan", "b.example"].map(|name| Name::parse(name).unwrap()));
        assert_eq!(search("nameserver 192.0.2.1\n"), []);
    }

    #[test]
    fn the_resolvers_behind_the_stub_of_systemd_resolved_are_asked() {
        let folder = tempfile::tempdir().unwrap();
        let (path, behind) = (folder.path().join("resolv.conf"), folder.path().join("behind.conf"));
        std::fs::write(&path, "nameserver 127.0.0.53\noptions edns0 trust-ad\n").unwrap();
        let mut conf = ResolvConf::with_stub(path.clone(), behind.clone());
        conf.refresh();
        assert_eq!(conf.nameservers, ["127.0.0.53:53".parse().unwrap()], "the stub is better than nobody");
        std::fs::write(&behind, "nameserver 192.0.2.1\nnameserver 2001:db8::1\n").unwrap();
        assert!(conf.refresh());
        let expected: Vec<SocketAddr> =
            ["192.0.2.1:53", "[2001:db8::1]:53"].map(|a| a.parse().unwrap()).into();
        assert_eq!(conf.nameservers, expected);
        std::fs::write(&path, "nameserver 192.0.2.9\n").unwrap();
        assert!(conf.refresh());
        assert_eq!(conf.nameservers, ["192.0.2.9:53".parse().unwrap()], "a host that does not use the stub");
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
