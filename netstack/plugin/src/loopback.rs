//! The plugin `loopback`: containerd up to 1.7 attaches every sandbox to a network of its own making, `cni-loopback`, before it
//! attaches it to the cluster's, and finds no pod startable without a plugin of that name. It brings `lo` up and says so.
//!
//! In: a network configuration of `type` `loopback`. Out: a result in the version asked for. Needs no agent.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use libc::{IFF_UP, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, RTM_NEWLINK};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use serde_json::{Value, json};

use crate::wire::{CniError, Code};

/// `type` in the configuration, and the plugin's file name.
pub const PLUGIN: &str = "loopback";
/// containerd asks in 0.3.1.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const LINK: &str = "lo";
/// In every namespace.
const LINK_INDEX: u32 = 1;

/// Does `verb` in the namespace at `netns`; the text is for standard output.
pub(super) fn execute(verb: &str, netns: &str, config: &Value) -> Result<String, CniError> {
    let asked = config.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    let Some(version) = VERSIONS.into_iter().find(|version| *version == asked) else {
        return Err(CniError::new(
            Code::IncompatibleVersion,
            format!("cniVersion {asked:?} is not supported"),
        )
        .details(format!("supported: {}", VERSIONS.join(", "))));
    };
    match verb {
        "ADD" => {
            in_namespace(netns, bring_up)?;
            Ok(format!("{:#}\n", result(netns, version)))
        }
        "CHECK" => match in_namespace(netns, is_up)? {
            true => Ok(String::new()),
            false => Err(CniError::new(Code::Mismatch, format!("{LINK} in {netns} is down"))),
        },
        // It ends with the namespace.
        _ => Ok(String::new()),
    }
}

fn bring_up() -> io::Result<()> {
    ask(&set_up(LINK_INDEX))
}

/// One request and its acknowledgement (rtnetlink(7)). By hand: the libraries for it are a third of the plugin.
fn ask(request: &[u8]) -> io::Result<()> {
    let kernel =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(kernel.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = [0; 512];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    refusal(&answer[..length])
}

/// `struct nlmsghdr` and `struct ifinfomsg`, in the machine's byte order.
fn set_up(index: u32) -> [u8; 32] {
    let up = IFF_UP.cast_unsigned();
    let flags = (NLM_F_REQUEST | NLM_F_ACK).cast_unsigned();
    let kind_and_flags = u32::from_ne_bytes(pair(RTM_NEWLINK, flags as u16));
    let words = [32, kind_and_flags, 0, 0, 0, index, up, up];
    let mut message = [0; 32];
    for (bytes, word) in message.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    message
}

fn pair(first: u16, second: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
}

/// `struct nlmsghdr` and `struct nlmsgerr`, which begins with a negative errno or 0.
fn refusal(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(<[u8]>::first_chunk).map(|bytes| u16::from_ne_bytes(*bytes));
    let errno = answer.get(16..).and_then(<[u8]>::first_chunk).map(|bytes| i32::from_ne_bytes(*bytes));
    match (kind.map(i32::from), errno) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn is_up() -> io::Result<bool> {
    let mut links = getifaddrs()?;
    Ok(links.any(|link| link.interface_name == LINK && link.flags.contains(InterfaceFlags::IFF_UP)))
}

/// On a thread of its own, which stays in the namespace.
fn in_namespace<T: Send>(netns: &str, work: fn() -> io::Result<T>) -> Result<T, CniError> {
    let unusable = |error: io::Error| {
        CniError::new(Code::UnknownContainer, format!("enter network namespace {netns}: {error}"))
    };
    let failed = |error: io::Error| CniError::new(Code::Kernel, format!("{LINK} in {netns}: {error}"));
    let namespace = File::open(netns).map_err(unusable)?;
    std::thread::scope(|scope| {
        let inside = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| unusable(errno.into()))?;
            work().map_err(failed)
        };
        let ended = scope.spawn(inside).join();
        ended.unwrap_or_else(|_| Err(failed(io::Error::other("the thread inside panicked"))))
    })
}

/// Until 0.4.0 an address says its family.
fn result(netns: &str, version: &str) -> Value {
    let ips = [("4", "127.0.0.1/8"), ("6", "::1/128")].map(|(family, address)| {
        let mut entry = json!({ "address": address, "interface": 0 });
        if version.starts_with("0.") {
            entry["version"] = json!(family);
        }
        entry
    });
    let interface = json!({ "name": LINK, "mac": "00:00:00:00:00:00", "sandbox": netns });
    json!({ "cniVersion": version, "interfaces": [interface], "ips": ips, "dns": {} })
}

#[cfg(test)]
mod tests {
    use nix::sched::unshare;

    use super::*;

    /// What containerd 1.6 hands over.
    fn config() -> Value {
        json!({ "cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback" })
    }

    #[test]
    fn add_brings_lo_up_and_check_sees_it() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let netns = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let netns = netns.join().unwrap();
        let path = format!("/proc/self/fd/{}", netns.as_raw_fd());
        assert_eq!(execute("CHECK", &path, &config()).unwrap_err().code, Code::Mismatch as u32);
        let printed = execute("ADD", &path, &config()).unwrap();
        let result: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&result["cniVersion"], &result["ips"][1]["version"]), (&json!("0.3.1"), &json!("6")));
        assert_eq!(execute("CHECK", &path, &config()), Ok(String::new()));
        let answered = in_namespace(&path, || Ok(std::net::UdpSocket::bind("127.0.0.1:0").is_ok()));
        assert_eq!(answered, Ok(true), "127.0.0.1 is an address there");
        assert_eq!(execute("DEL", &path, &config()), Ok(String::new()));
    }

    #[test]
    fn what_the_kernel_refuses_is_said() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        assert_eq!(ask(&set_up(u32::MAX >> 1)).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        let mut cut_off = [0; 10];
        cut_off[4..6].copy_from_slice(&(NLMSG_ERROR as u16).to_ne_bytes());
        assert_eq!(refusal(&cut_off).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_namespace_that_is_gone_is_error_3_and_no_failure_of_del() {
        assert_eq!(execute("ADD", "/nowhere", &config()).unwrap_err().code, Code::UnknownContainer as u32);
        assert_eq!(execute("DEL", "/nowhere", &config()), Ok(String::new()));
    }

    #[test]
    fn an_unknown_version_is_error_1() {
        let config = json!({ "cniVersion": "9.9.9", "type": "loopback" });
        assert_eq!(execute("ADD", "", &config).unwrap_err().code, Code::IncompatibleVersion as u32);
    }
}
