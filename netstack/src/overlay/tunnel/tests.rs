//! Tunnels as processes in namespaces on one switch, with real packets.
//!
//! A tunnel process is this test binary again, told by the environment to run [`run`]; so it can be killed.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use weft_model::wireguard::{PeerStatus, WireguardPeer};

use super::*;
use crate::kernel::netns::Netns;
use crate::kernel::service_manager::ServiceManager;
use crate::kernel::testing::{NamedNetns, needs_root, run as run_command};

mod handover;
mod interop;
mod nat;

const LINK: &str = "weft0";
const PORT: u16 = 51820;
const MTU: u32 = 1420;
const RUN_DIR: &str = "WEFT_TEST_TUNNEL_DIR";

/// Not a test of its own: the body of a tunnel process.
#[test]
fn tunnel_process() {
    let Ok(dir) = std::env::var(RUN_DIR) else { return };
    let config = TunnelConfig { run_dir: dir.clone().into(), state_dir: dir.into(), link: LINK.to_owned() };
    if let Err(error) = run(config, Kept::from_environment()) {
        panic!("{}", crate::reconcile::chain(&error));
    }
}

/// A node: a namespace, its files and its tunnel process.
struct Host {
    number: u8,
    netns: NamedNetns,
    dir: tempfile::TempDir,
    key: WgPublicKey,
    next_key: Option<WgPublicKey>,
    /// Keeps the descriptors; without one nobody does.
    manager: Option<ServiceManager>,
    process: Option<Child>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Host {
    fn new(number: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let private = [number; 32];
        let text = base64::engine::general_purpose::STANDARD.encode(private) + "\n";
        std::fs::write(dir.path().join(KEY_FILE), text).unwrap();
        let key = public_key(private);
        Self {
            number,
            netns: NamedNetns::new(&format!("h{number}")),
            dir,
            key,
            next_key: None,
            manager: None,
            process: None,
        }
    }

    fn underlay(&self, ipv6: bool) -> IpAddr {
        let text =
            if ipv6 { format!("2001:db8::{}", self.number) } else { format!("192.0.2.{}", self.number) };
        text.parse().unwrap()
    }

    fn inner(&self, ipv6: bool) -> IpAddr {
        let text = if ipv6 { format!("fd42::{}:1", self.number) } else { format!("10.42.{}.1", self.number) };
        text.parse().unwrap()
    }

    fn ranges(&self) -> [String; 2] {
        [format!("10.42.{}.0/24", self.number), format!("fd42::{}:0/112", self.number)]
    }

    /// Attaches to the switch and creates the device with addresses and routes, as the agent does.
    fn prepare(&self, switch: &NamedNetns, others: &[u8]) {
        let port = format!("p{}", self.number);
        let name = &self.netns.name;
        run_command(&[
            "ip",
            "-n",
            &switch.name,
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            name,
        ]);
        switch.must(&["ip", "link", "set", &port, "master", "br0", "up"]);
        self.netns.must(&["ip", "link", "set", "lo", "up"]);
        for ipv6 in [false, true] {
            let address = format!("{}/{}", self.underlay(ipv6), if ipv6 { 64 } else { 24 });
            let mut command = vec!["ip", "address", "add", &address, "dev", "eth0"];
            command.extend(ipv6.then_some("nodad"));
            self.netns.must(&command);
        }
        self.netns.must(&["ip", "link", "set", "eth0", "up"]);
        self.make_device(others);
    }

    fn make_device(&self, others: &[u8]) {
        Netns::open(self.netns.path())
            .unwrap()
            .run(|| crate::kernel::tun::ensure_persistent(LINK).unwrap())
            .unwrap();
        self.netns.must(&["ip", "link", "set", LINK, "mtu", &MTU.to_string(), "up"]);
        for ipv6 in [false, true] {
            let address = format!("{}/{}", self.inner(ipv6), if ipv6 { 128 } else { 32 });
            let mut command = vec!["ip", "address", "add", &address, "dev", LINK];
            command.extend(ipv6.then_some("nodad"));
            self.netns.must(&command);
        }
        for other in others {
            self.netns.must(&["ip", "route", "add", &format!("10.42.{other}.0/24"), "dev", LINK]);
            self.netns.must(&["ip", "-6", "route", "add", &format!("fd42::{other}:0/112"), "dev", LINK]);
        }
    }

    fn write_state(&self, peers: &[(&Host, bool)]) {
        self.write_state_with_port(PORT, peers);
    }

    fn write_state_with_port(&self, listen_port: u16, peers: &[(&Host, bool)]) {
        self.write_peers(listen_port, peers.iter().map(|(host, ipv6)| host.as_peer(*ipv6)).collect());
    }

    /// As others know it, called over IPv4 or IPv6.
    fn as_peer(&self, ipv6: bool) -> (WgPublicKey, WireguardPeer) {
        let peer = WireguardPeer {
            node: format!("node-{}", self.number),
            next_key: self.next_key,
            endpoint: Some(SocketAddr::new(self.underlay(ipv6), PORT)),
            other_endpoints: Vec::new(),
            allowed_ips: self.ranges().iter().map(|range| range.parse().unwrap()).collect(),
            keepalive_seconds: None,
        };
        (self.key, peer)
    }

    fn write_peers(&self, listen_port: u16, peers: BTreeMap<WgPublicKey, WireguardPeer>) {
        let own_keys = std::iter::once(self.key).chain(self.next_key).collect();
        let wireguard = WireguardPlan { listen_port, own_keys, own_addresses: Vec::new(), peers };
        let state = TunnelState { wireguard, mtu_bytes: MTU };
        std::fs::write(self.dir.path().join(STATE_FILE), serde_json::to_vec(&state).unwrap()).unwrap();
    }

    fn start(&mut self) {
        let spawn = |command: &mut Command| {
            command.args(["ip", "netns", "exec", &self.netns.name]).arg(std::env::current_exe().unwrap());
            command.args(["--exact", "overlay::tunnel::tests::tunnel_process", "--nocapture"]);
            command.env(RUN_DIR, self.dir.path()).stdout(Stdio::null()).spawn().unwrap()
        };
        self.process = Some(match &mut self.manager {
            Some(manager) => manager.start(spawn).unwrap(),
            None => spawn(&mut Command::new("env")),
        });
    }

    /// SIGTERM; it must end with success.
    fn end(&mut self) {
        let mut process = self.process.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(process.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = process.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Names of what the manager keeps, in order.
    fn kept(&mut self) -> Vec<String> {
        let manager = self.manager.as_mut().unwrap();
        manager.hear().unwrap();
        let mut names: Vec<String> = manager.kept.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // SIGKILL; it may be gone already.
            let _ = process.kill();
            process.wait().unwrap();
        }
    }

    fn ask(&self, method: &str, path: &str) -> String {
        control::request(&self.dir.path().join(SOCKET_FILE), method, path).unwrap()
    }

    fn status(&self, of: &Host) -> PeerStatus {
        let peers: Vec<PeerStatus> = serde_json::from_str(&self.ask("GET", "/peers")).unwrap();
        peers.into_iter().find(|peer| peer.public_key == of.key).unwrap()
    }

    /// How long until a ping is answered; panics after `limit`.
    fn reaches(&self, to: IpAddr, limit: Duration) -> Duration {
        let (start, to) = (Instant::now(), to.to_string());
        while start.elapsed() < limit {
            if self.netns.exec(&["ping", "-c", "1", "-W", "0.3", &to]).0 {
                return start.elapsed();
            }
        }
        panic!("{to} does not answer within {limit:?}");
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        Netns::open(self.netns.path()).unwrap().run(work).unwrap()
    }
}

fn switch() -> NamedNetns {
    let switch = NamedNetns::new("sw");
    switch.must(&["ip", "link", "add", "br0", "type", "bridge"]);
    switch.must(&["ip", "link", "set", "br0", "up"]);
    switch
}

/// Hosts 1, 2 and 3, each a peer of the others; the underlay is IPv6 between 1 and 3.
fn three() -> (NamedNetns, [Host; 3]) {
    three_of([1, 2, 3].map(Host::new))
}

/// The same under a service manager that keeps descriptors.
fn three_kept() -> (NamedNetns, [Host; 3]) {
    three_of([1, 2, 3].map(|number| {
        let mut host = Host::new(number);
        host.manager = Some(ServiceManager::bind(&host.dir.path().join("notify")).unwrap());
        host
    }))
}

fn three_of(mut hosts: [Host; 3]) -> (NamedNetns, [Host; 3]) {
    let switch = switch();
    hosts[0].write_state(&[(&hosts[1], false), (&hosts[2], true)]);
    hosts[1].write_state(&[(&hosts[0], false), (&hosts[2], false)]);
    hosts[2].write_state(&[(&hosts[0], true), (&hosts[1], false)]);
    for host in &mut hosts {
        let others: Vec<u8> = [1, 2, 3].into_iter().filter(|other| *other != host.number).collect();
        host.prepare(&switch, &others);
        host.start();
    }
    (switch, hosts)
}

const PATIENCE: Duration = Duration::from_secs(15);

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

/// Sends `bytes` over TCP and returns what arrived.
fn over_tcp(from: &Host, to: &Host, ipv6: bool, bytes: &[u8]) -> Vec<u8> {
    let listener = to.inside(|| TcpListener::bind((to.inner(ipv6), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        let mut stream = from.inside(|| TcpStream::connect_timeout(&address, PATIENCE).unwrap());
        stream.set_nodelay(true).unwrap();
        let mut rest = bytes;
        while let [low, high, ..] = rest {
            // Noise says how much goes at once.
            let size = usize::from(u16::from_be_bytes([*high, *low]) % 9000) + 1;
            let (piece, more) = rest.split_at(size.min(rest.len()));
            stream.write_all(piece).unwrap();
            rest = more;
        }
        stream.write_all(rest).unwrap();
        drop(stream);
        receiver.join().unwrap()
    })
}

#[test]
fn three_peers_exchange_tcp_and_udp_of_both_families_unharmed() {
    if !needs_root() {
        return;
    }
    let (_switch, hosts) = three();
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        for ipv6 in [false, true] {
            hosts[from].reaches(hosts[to].inner(ipv6), PATIENCE);
            let bytes = noise(6_000_000, u64::from(ipv6) + 7);
            assert!(over_tcp(&hosts[from], &hosts[to], ipv6, &bytes) == bytes, "{from} to {to}, ipv6 {ipv6}");
            assert!(over_tcp(&hosts[to], &hosts[from], ipv6, &bytes) == bytes, "{to} to {from}, ipv6 {ipv6}");
            udp_arrives(&hosts[from], &hosts[to], ipv6);
        }
    }
    assert!(hosts[0].status(&hosts[2]).endpoint.unwrap().is_ipv6());
    assert!(hosts[0].status(&hosts[1]).endpoint.unwrap().is_ipv4());
}

/// Datagrams of mixed sizes, in bursts of equal ones, so that trains form and break.
fn udp_arrives(from: &Host, to: &Host, ipv6: bool) {
    let receiver = to.inside(|| UdpSocket::bind((to.inner(ipv6), 0)).unwrap());
    receiver.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let address = receiver.local_addr().unwrap();
    let sender = from.inside(|| UdpSocket::bind((from.inner(ipv6), 0)).unwrap());
    sender.connect(address).unwrap();
    let mut buffer = vec![0; 70_000];
    for (round, size) in [1usize, 33, 1000, 1372, 1373, 4000, 64, 20_000].into_iter().enumerate() {
        let burst: Vec<Vec<u8>> =
            (0..if size > 2000 { 3 } else { 10 }).map(|i| noise(size, (round * 100 + i) as u64)).collect();
        for datagram in &burst {
            sender.send(datagram).unwrap();
        }
        for expected in &burst {
            let len = receiver
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("{size} bytes, ipv6 {ipv6}: {error}"));
            assert!(buffer[..len] == expected[..], "{size} bytes, ipv6 {ipv6}");
        }
    }
}

#[test]
fn an_underlay_that_is_narrower_than_thought_costs_fragments_but_no_packets() {
    if !needs_root() {
        return;
    }
    let (_switch, hosts) = three();
    for host in &hosts {
        host.netns.must(&["ip", "link", "set", "eth0", "mtu", "1300"]);
    }
    // Host 3 talks to host 1 over IPv6 and to host 2 over IPv4.
    for to in [0, 1] {
        hosts[2].reaches(hosts[to].inner(true), PATIENCE);
        let bytes = noise(500_000, 11);
        assert!(over_tcp(&hosts[2], &hosts[to], true, &bytes) == bytes);
        assert!(over_tcp(&hosts[to], &hosts[2], false, &bytes) == bytes);
    }
}

#[test]
fn a_tunnel_that_was_killed_is_back_within_two_seconds_on_the_same_device() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three();
    hosts[0].reaches(hosts[1].inner(false), PATIENCE);
    let routes = hosts[1].netns.must(&["ip", "route", "show", "dev", LINK]);
    hosts[1].kill();
    assert!(!hosts[0].netns.exec(&["ping", "-c", "1", "-W", "0.3", &hosts[1].inner(false).to_string()]).0);
    hosts[1].start();
    let (to, back) = (hosts[1].inner(true), hosts[0].inner(false));
    let took = hosts[0].reaches(to, PATIENCE);
    assert!(took < Duration::from_secs(2), "{took:?}");
    hosts[1].reaches(back, Duration::from_secs(1));
    let after = hosts[1].netns.must(&["ip", "route", "show", "dev", LINK]);
    assert_eq!(routes.replace(" linkdown", ""), after);
}

#[test]
fn a_peer_that_moves_is_followed_and_a_change_elsewhere_keeps_its_session() {
    if !needs_root() {
        return;
    }
    let (_switch, hosts) = three();
    hosts[0].reaches(hosts[1].inner(false), PATIENCE);
    hosts[1].netns.must(&["ip", "address", "del", "192.0.2.2/24", "dev", "eth0"]);
    hosts[1].netns.must(&["ip", "address", "add", "192.0.2.77/24", "dev", "eth0"]);
    hosts[1].reaches(hosts[0].inner(false), PATIENCE);
    assert_eq!(hosts[0].status(&hosts[1]).endpoint, Some("192.0.2.77:51820".parse().unwrap()));
    // Host 3 leaves; host 2 stays where it roamed to, with its session and counters.
    let before = hosts[0].status(&hosts[1]);
    hosts[0].write_state(&[(&hosts[1], false)]);
    hosts[0].ask("POST", "/apply");
    let after = hosts[0].status(&hosts[1]);
    assert_eq!(after.endpoint, before.endpoint);
    assert!(after.received_bytes >= before.received_bytes && before.received_bytes > 0);
    hosts[0].reaches(hosts[1].inner(true), Duration::from_secs(1));
    assert!(!hosts[2].netns.exec(&["ping", "-c", "1", "-W", "1", &hosts[0].inner(false).to_string()]).0);
}

#[test]
fn a_source_that_the_peer_does_not_own_is_dropped() {
    if !needs_root() {
        return;
    }
    let (_switch, hosts) = three();
    let target = hosts[0].inner(false).to_string();
    hosts[1].reaches(hosts[0].inner(false), PATIENCE);
    hosts[1].netns.must(&["ip", "address", "add", "10.42.3.9/32", "dev", "lo"]);
    let delivered =
        |host: &Host| -> String { host.netns.must(&["cat", "/sys/class/net/weft0/statistics/rx_packets"]) };
    let before = delivered(&hosts[0]);
    hosts[1].netns.exec(&["ping", "-c", "3", "-i", "0.1", "-W", "0.3", "-I", "10.42.3.9", &target]);
    assert_eq!(delivered(&hosts[0]), before);
}

#[test]
fn sigterm_ends_the_tunnel_and_leaves_the_device() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three();
    hosts[0].reaches(hosts[1].inner(false), PATIENCE);
    hosts[0].end();
    assert!(!hosts[0].dir.path().join(SOCKET_FILE).exists());
    assert!(hosts[0].netns.must(&["ip", "link", "show", LINK]).contains("weft0"));
}

#[test]
fn a_key_is_replaced_without_a_lost_packet() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three();
    hosts[0].reaches(hosts[1].inner(false), PATIENCE);
    hosts[0].reaches(hosts[2].inner(true), PATIENCE);
    hosts[1].reaches(hosts[2].inner(false), PATIENCE);
    let flood = |from: &Host, to: IpAddr| {
        Command::new("ip")
            .args(["netns", "exec", &from.netns.name])
            .args(["ping", "-q", "-i", "0.002", "-c", "3000", "-W", "1", &to.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let (first, second, third) = (hosts[0].inner(false), hosts[1].inner(true), hosts[2].inner(true));
    let floods = [flood(&hosts[1], first), flood(&hosts[0], second), flood(&hosts[0], third)];
    let old = hosts[0].key;
    let next = [0x41; 32];
    std::fs::write(hosts[0].dir.path().join(NEXT_KEY_FILE), next).unwrap();
    hosts[0].next_key = Some(public_key(next));
    let tell = |hosts: &[Host; 3], order: [usize; 3]| {
        for number in order {
            let others: Vec<(&Host, bool)> = hosts
                .iter()
                .filter(|other| other.number != hosts[number].number)
                .map(|other| (other, other.number + hosts[number].number == 4))
                .collect();
            hosts[number].write_state(&others);
            hosts[number].ask("POST", "/apply");
        }
    };
    // The owner offers the key before its peers have heard of it.
    tell(&hosts, [0, 1, 2]);
    let start = Instant::now();
    let accepted = |host: &Host, by: &Host| host.status(by).own_key == Some(public_key(next));
    while !(accepted(&hosts[0], &hosts[1]) && accepted(&hosts[0], &hosts[2])) {
        assert!(start.elapsed() < PATIENCE, "the peers do not answer to the next key");
        std::thread::sleep(Duration::from_millis(20));
    }
    // And its peers hear last that it has taken over.
    std::fs::rename(hosts[0].dir.path().join(NEXT_KEY_FILE), hosts[0].dir.path().join(KEY_FILE)).unwrap();
    (hosts[0].key, hosts[0].next_key) = (public_key(next), None);
    tell(&hosts, [0, 2, 1]);
    for flood in floods {
        let said = String::from_utf8(flood.wait_with_output().unwrap().stdout).unwrap();
        assert!(said.contains("3000 packets transmitted, 3000 received, 0% packet loss"), "{said}");
    }
    assert!(hosts[1].status(&hosts[0]).received_bytes > 1000 * 100, "the counters go on under the new key");
    // The new key carries handshakes by itself, and the old one opens nothing any more.
    hosts[1].kill();
    hosts[1].start();
    hosts[1].reaches(hosts[0].inner(false), PATIENCE);
    let keys = |host: &Host| -> Vec<WgPublicKey> {
        let peers: Vec<PeerStatus> = serde_json::from_str(&host.ask("GET", "/peers")).unwrap();
        peers.iter().map(|peer| peer.public_key).collect()
    };
    assert!(keys(&hosts[1]).contains(&public_key(next)) && !keys(&hosts[1]).contains(&old));
}
