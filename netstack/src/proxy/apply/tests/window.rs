//! Segments outside their connection's window: conntrack calls them invalid and translates nothing of them.

use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};

use super::*;
use crate::kernel::lan::checksum;

/// A TCP segment with an ACK (RFC 9293, section 3.1).
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(1u32.to_be_bytes());
    tcp.extend([5 << 4, 0x10, 0x20, 0, 0, 0, 0, 0]);
    let octets = |address: IpAddr| match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let pseudo = [octets(from.ip()), octets(to.ip()), vec![0, 6, 0, 20], tcp.clone()].concat();
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    tcp
}

/// Sends such past the sockets of the calling thread's namespace.
fn inject(from: SocketAddr, to: SocketAddr) {
    let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Tcp).unwrap();
    // A raw socket has no port: the kernel refuses another one in an IPv6 address.
    let to_host = SocketAddr::new(to.ip(), 0);
    // Of two sequences that are half of all apart, one at least is ahead of the window.
    for sequence in [0, 0x8000_0000] {
        let segment = segment(from, to, sequence);
        let sent = match to_host {
            SocketAddr::V4(to) => {
                sendto(socket.as_raw_fd(), &segment, &SockaddrIn::from(to), MsgFlags::empty())
            }
            SocketAddr::V6(to) => {
                sendto(socket.as_raw_fd(), &segment, &SockaddrIn6::from(to), MsgFlags::empty())
            }
        };
        assert_eq!(sent.unwrap(), 20);
    }
}

/// Counts, in the calling thread's namespace, what comes with the pod's own address.
fn watch(pod: &str) {
    let ip = if pod.contains(':') { "ip6" } else { "ip" };
    run(&format!(
        "nft 'table inet seen {{ chain in {{ type filter hook prerouting priority raw; {ip} saddr {pod} counter; }}; }}'"
    ));
}

fn seen() -> u64 {
    let output = Command::new("nft").args(["list", "table", "inet", "seen"]).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let count = listed.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.unwrap_or_else(|| panic!("{listed}")).parse().unwrap()
}

#[test]
fn a_segment_outside_the_window_reaches_no_client_with_the_pods_address_and_the_connection_goes_on() {
    in_node(|rig| {
        for family in &FAMILIES {
            let (v4, v6) = ([(FAMILIES[0].pod_b, "node-a")], [(FAMILIES[1].pod_b, "node-a")]);
            rig.apply(cluster(&v4, &v6, "Cluster"));
            let pod = at(family.pod_b, 8080);
            let listener = rig.within(POD_B, move || TcpListener::bind(pod).unwrap());
            let mut client = rig.within(POD_A, || {
                watch(family.pod_b);
                TcpStream::connect_timeout(&at(family.vip, 80), WAIT).unwrap()
            });
            client.set_read_timeout(Some(WAIT)).unwrap();
            let (mut server, from) = listener.accept().unwrap();
            let mut echo = || {
                client.write_all(b"still?").unwrap();
                server.read_exact(&mut [0; 6]).unwrap();
                server.write_all(b"yes").unwrap();
                client.read_exact(&mut [0; 3]).unwrap();
            };
            echo();
            rig.within(POD_B, move || inject(pod, from));
            echo();
            assert_eq!(rig.within(POD_A, seen), 0, "{}", family.pod_b);
            // Without the rule it would have come.
            run("nft flush chain inet weft-proxy filter-prerouting");
            rig.within(POD_B, move || inject(pod, from));
            std::thread::sleep(Duration::from_millis(100));
            assert!(rig.within(POD_A, seen) > 0, "{}", family.pod_b);
            rig.within(POD_A, || run("nft delete table inet seen"));
            rig.applier = ProxyApplier::new();
        }
    });
}
