//! A sample of the random worlds in the real kernel: the planned tables of policies and proxy are applied in a node of namespaces,
//! every packet of TCP and UDP is sent for real, to addresses of Services too, and what arrives is what the evaluator expects.
//! SCTP is left to the tracer.
//!
//! Packets are made by hand and bear their number (also as source port, which a masquerade changes), so that one look at the
//! receivers tells about all of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind, recv, sendto,
    socket,
};
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, TestRunner};
use weft_netstack::policy::PolicyApplier;
use weft_netstack::proxy::ProxyApplier;
use weft_netstack::reconcile::{Applier, Trust};

use super::*;

/// Where packets come from and go to: the node is the calling thread's namespace.
const SPACES: [&str; 5] = ["own1", "own2", "late", "far", "outside"];
const NODE: usize = 5;
const FIRST_PORT: u16 = 20_000;

fn run(command: &str) {
    let output = Command::new("sh").arg("-ec").arg(command).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Names of namespaces, deleted on drop.
struct Spaces(Vec<String>);

impl Drop for Spaces {
    fn drop(&mut self) {
        for space in &self.0 {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
        }
    }
}

impl Spaces {
    fn make() -> Self {
        let names: Vec<String> =
            SPACES.iter().map(|name| format!("weft-meaning-{}-{name}", std::process::id())).collect();
        let spaces = Self(names);
        run("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
             net.ipv6.conf.default.accept_dad=0 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0");
        for (i, space) in spaces.0.iter().enumerate() {
            let link = match i {
                0..=2 => format!("weftp{i:010x}"),
                3 => "weft0".to_owned(),
                _ => "eth0".to_owned(),
            };
            run(&format!(
                "ip netns add {space}
                 ip netns exec {space} sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv4.conf.all.rp_filter=0
                 ip link add {link} type veth peer name eth0 netns {space}; ip link set {link} up
                 ip addr add 169.254.1.1/32 dev {link} scope link; ip addr add fe80::1/64 dev {link} nodad
                 ip -n {space} link set lo up; ip -n {space} link set eth0 up
                 ip -n {space} route add 169.254.1.1 dev eth0; ip -n {space} route add default via 169.254.1.1
                 ip -n {space} route add default via fe80::1 dev eth0"
            ));
            for (v4, v6) in addresses_of(i) {
                run(&format!(
                    "ip -n {space} addr add {v4}/32 dev eth0; ip -n {space} addr add {v6}/128 dev eth0 nodad
                     ip route add {v4} dev {link}; ip route add {v6} dev {link}"
                ));
            }
        }
        for own in OWN_NODE.iter().chain(&DNS).chain(&OWN_INGRESS) {
            let bits = if own.contains(':') { 128 } else { 32 };
            run(&format!("ip addr add {own}/{bits} dev lo"));
        }
        // The way to a Service's address is decided before it is translated; any will do.
        for range in
            ["10.96.0.0/16", "198.51.100.0/24", "fd00:96::/112", "2001:db8:b::/64", "2001:db8:e::/64"]
        {
            run(&format!("ip route add {range} dev eth0"));
        }
        spaces
    }

    fn within<T: Send + 'static>(&self, space: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = self.0.get(space).map(|name| format!("/run/netns/{name}"));
        std::thread::spawn(move || {
            if let Some(path) = path {
                setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            }
            work()
        })
        .join()
        .unwrap()
    }
}

fn addresses_of(space: usize) -> BTreeSet<(&'static str, &'static str)> {
    let pair = |pair: Pair| (pair[0], pair[1]);
    match space {
        0..=2 => [pair(PLACES[space].1)].into(),
        3 => PLACES[4..9]
            .iter()
            .map(|place| pair(place.1))
            .chain([pair(OTHER_HOST), pair(OTHER_INGRESS)])
            .collect(),
        4 => OUTSIDE.iter().copied().map(pair).chain([pair(OTHER_NODE)]).collect(),
        _ => BTreeSet::new(),
    }
}

fn space_of(address: IpAddr) -> usize {
    let has =
        |space: &usize| addresses_of(*space).iter().any(|(v4, v6)| ip(v4) == address || ip(v6) == address);
    (0..SPACES.len()).find(has).unwrap_or(NODE)
}

fn raw(ipv6: bool, protocol: Protocol) -> OwnedFd {
    let family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let protocol = if protocol == Protocol::Tcp { SockProtocol::Tcp } else { SockProtocol::Udp };
    socket(family, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol).unwrap()
}

/// Transport header and checksum (RFC 9293, RFC 768) of a first packet; its number is the sequence number, or the content.
fn segment(packet: &Packet) -> Vec<u8> {
    let ports = [packet.source.port(), packet.destination.port()].map(u16::to_be_bytes).concat();
    let [high, low] = packet.source.port().to_be_bytes();
    let (rest, at): (Vec<u8>, usize) = match packet.protocol {
        Protocol::Tcp => (vec![0, 0, high, low, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0], 16),
        _ => (vec![0, 10, 0, 0, high, low], 6),
    };
    let mut bytes = [ports, rest].concat();
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let pseudo = [
        octets(packet.source.ip()),
        octets(packet.destination.ip()),
        vec![0, packet.protocol.number(), 0, u8::try_from(bytes.len()).unwrap()],
    ];
    let sum: u32 = [pseudo.concat(), bytes.clone()]
        .concat()
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn send(packet: &Packet) {
    let socket = raw(packet.source.is_ipv6(), packet.protocol);
    let bytes = segment(packet);
    let sent = match (packet.source.ip(), packet.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            bind(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(source, 0))).unwrap();
            let to = SockaddrIn::from(std::net::SocketAddrV4::new(destination, 0));
            sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            bind(socket.as_raw_fd(), &SockaddrIn6::from(std::net::SocketAddrV6::new(source, 0, 0, 0)))
                .unwrap();
            let to = SockaddrIn6::from(std::net::SocketAddrV6::new(destination, 0, 0, 0));
            sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())
        }
        _ => panic!("one family"),
    };
    // The output hook may refuse what it drops.
    let _ = sent;
}

/// Receivers of every namespace: space, IPv6, protocol.
type Receivers = Vec<(usize, bool, Protocol, OwnedFd)>;

fn receivers(spaces: &Spaces) -> Receivers {
    let mut all = Vec::new();
    for space in 0..=NODE {
        for ipv6 in [false, true] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                all.push((space, ipv6, protocol, spaces.within(space, move || raw(ipv6, protocol))));
            }
        }
    }
    all
}

/// A packet, and where it has to arrive.
struct Sent {
    packet: Packet,
    behind: SocketAddr,
}

/// Numbers of the packets that have arrived where they were meant to.
fn arrived(receivers: &Receivers, packets: &BTreeMap<u16, Sent>) -> BTreeSet<u16> {
    let mut arrived = BTreeSet::new();
    for (space, ipv6, protocol, socket) in receivers {
        let mut buffer = [0; 256];
        while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            let header = if *ipv6 { 0 } else { usize::from(buffer[0] & 15) * 4 };
            let Some(bytes) = buffer[..length].get(header..) else { continue };
            let word =
                |at: usize| bytes.get(at..at + 2).map_or(0, |pair| u16::from_be_bytes([pair[0], pair[1]]));
            let destination = word(2);
            let number = word(if *protocol == Protocol::Tcp { 6 } else { 8 });
            let sent = packets.get(&number).filter(|Sent { packet, behind }| {
                behind.port() == destination
                    && packet.protocol == *protocol
                    && behind.is_ipv6() == *ipv6
                    && space_of(behind.ip()) == *space
            });
            arrived.extend(sent.map(|_| number));
        }
    }
    arrived
}

/// Everything that the tracer is asked about, but SCTP and what never leaves a pod.
fn packets() -> Vec<Packet> {
    let mut all = Vec::new();
    for family in 0..2 {
        for (_, source, destination) in ways(family) {
            for (protocol, port) in PORTS.iter().filter(|(protocol, _)| *protocol != Protocol::Sctp) {
                if source != destination {
                    let source = SocketAddr::new(source, 0);
                    all.push(Packet {
                        source,
                        destination: SocketAddr::new(destination, *port),
                        protocol: *protocol,
                    });
                }
            }
        }
    }
    all
}

type Appliers = (PolicyApplier, ProxyApplier);

/// One world: the verdict of the kernel on each packet is the expected one.
fn check_world(world: &World, spaces: &Spaces, receivers: &Receivers, appliers: &mut Appliers) {
    let snapshot = snapshot(world);
    let plan = PolicyPlanner::default().plan(&snapshot).plan;
    let proxy = ProxyPlanner::default().plan(&snapshot).plan;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let applied = runtime.block_on(async {
        let of_proxy = appliers.1.apply(&proxy, Trust::Shadow).await.failed;
        [appliers.0.apply(&plan, Trust::Shadow).await.failed, of_proxy].concat()
    });
    assert_eq!(applied, Vec::<String>::new());
    let direct = packets().into_iter().map(|packet| Sent { behind: packet.destination, packet });
    let called = calls(world).into_iter().map(|Call { packet, behind, .. }| Sent { packet, behind });
    let number = |(number, mut sent): (u16, Sent)| {
        sent.packet.source.set_port(number);
        (number, sent)
    };
    let numbered: BTreeMap<u16, Sent> = (FIRST_PORT..).zip(direct.chain(called)).map(number).collect();
    for space in 0..=NODE {
        let packets = numbered.values().map(|sent| &sent.packet);
        let from_here: Vec<Packet> =
            packets.filter(|packet| space_of(packet.source.ip()) == space).cloned().collect();
        spaces.within(space, move || from_here.iter().for_each(send));
    }
    let is_expected = |Sent { packet, behind }: &Sent| {
        super::expected(&Packet { destination: *behind, ..packet.clone() }, world)
    };
    let expected: BTreeSet<u16> =
        numbered.iter().filter(|(_, sent)| is_expected(sent)).map(|(number, _)| *number).collect();
    let mut got = BTreeSet::new();
    let deadline = Instant::now() + Duration::from_secs(3);
    while got != expected && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
        got.append(&mut arrived(receivers, &numbered));
    }
    // What is not to come has had as much time as what came.
    std::thread::sleep(Duration::from_millis(3));
    got.append(&mut arrived(receivers, &numbered));
    let wrong: Vec<String> = got
        .symmetric_difference(&expected)
        .map(|number| {
            let Sent { packet, behind } = &numbered[number];
            format!("{packet:?} to {behind} arrived: {}", got.contains(number))
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "{} wrong, such as {:?}\n{world:#?}\n{}",
        wrong.len(),
        &wrong[..wrong.len().min(8)],
        plan.table
    );
}

/// `WEFT_KERNEL_CASES=500` tries more worlds than the usual few.
#[test]
fn the_kernel_gives_the_verdict_of_the_kubernetes_text() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let cases = std::env::var("WEFT_KERNEL_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let spaces = Spaces::make();
        let receivers = receivers(&spaces);
        let mut appliers = (PolicyApplier::new(), ProxyApplier::new());
        let mut runner = TestRunner::new(Config::default());
        for _ in 0..cases {
            let world = world().new_tree(&mut runner).unwrap().current();
            check_world(&world, &spaces, &receivers, &mut appliers);
        }
        println!("{cases} worlds in the real kernel");
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
