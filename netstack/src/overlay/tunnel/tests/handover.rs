//! Tunnel processes that follow one another under a service manager that keeps their descriptors.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::socket::{setsockopt, sockopt};

use super::*;
use crate::kernel::sealed;

const KEPT: [&str; 3] = ["tunnel-tun", "tunnel-udp-v4", "tunnel-udp-v6"];
const SESSIONS: &str = "tunnel-sessions";

/// After the last number.
const LAST: u32 = u32::MAX;

/// Numbered datagrams from one host to another, some 300 a second, until it is finished.
struct Flow {
    what: String,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u32>,
    receiver: JoinHandle<Vec<u32>>,
}

impl Flow {
    fn start(from: &Host, to: &Host, ipv6: bool) -> Self {
        let receiver = to.inside(|| UdpSocket::bind((to.inner(ipv6), 0)).unwrap());
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        // What waited comes at once.
        setsockopt(&receiver, sockopt::RcvBufForce, &(8 << 20)).unwrap();
        let sender = from.inside(|| UdpSocket::bind((from.inner(ipv6), 0)).unwrap());
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let sender = std::thread::spawn(move || {
            let mut count = 0u32;
            while !until.load(Ordering::Relaxed) {
                sender.send(&count.to_le_bytes()).unwrap();
                count += 1;
                std::thread::sleep(Duration::from_millis(3));
            }
            sender.send(&LAST.to_le_bytes()).unwrap();
            count
        });
        let receiver = std::thread::spawn(move || {
            let (mut numbers, mut buffer) = (Vec::new(), [0; 4]);
            while receiver.recv(&mut buffer).is_ok() && u32::from_le_bytes(buffer) != LAST {
                numbers.push(u32::from_le_bytes(buffer));
            }
            numbers
        });
        Self { what: format!("{} to {}, ipv6 {ipv6}", from.number, to.number), stop, sender, receiver }
    }

    /// How many were sent; each must have arrived, once.
    fn finish(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, numbers) = (self.sender.join().unwrap(), self.receiver.join().unwrap());
        let arrived: BTreeSet<u32> = numbers.iter().copied().collect();
        let lost: Vec<u32> = (0..sent).filter(|number| !arrived.contains(number)).collect();
        assert!(lost.is_empty(), "{}: of {sent} are lost: {lost:?}", self.what);
        assert_eq!(numbers.len(), arrived.len(), "{}: some came twice", self.what);
        sent
    }
}

/// Bytes of a block.
const BLOCK: usize = 2000;

/// A TCP connection that carries some 400 kilobytes a second until it is finished.
struct Stream {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<(u64, Duration)>,
}

impl Stream {
    fn start(from: &Host, to: &Host, ipv6: bool) -> Self {
        let listener = to.inside(|| TcpListener::bind((to.inner(ipv6), 0)).unwrap());
        let address = listener.local_addr().unwrap();
        let mut sending = from.inside(|| TcpStream::connect_timeout(&address, PATIENCE).unwrap());
        let (mut receiving, _) = listener.accept().unwrap();
        receiving.set_read_timeout(Some(PATIENCE)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let sender = std::thread::spawn(move || {
            let mut round = 0;
            while !until.load(Ordering::Relaxed) {
                sending.write_all(&noise(BLOCK, round)).unwrap();
                round += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            round
        });
        let receiver = std::thread::spawn(move || {
            let (mut rounds, mut longest, mut block) = (0, Duration::ZERO, vec![0; BLOCK]);
            loop {
                let started_at = Instant::now();
                match receiving.read_exact(&mut block) {
                    Ok(()) => assert!(block == noise(BLOCK, rounds), "block {rounds} is another"),
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                        return (rounds, longest);
                    }
                }
                rounds += 1;
                longest = longest.max(started_at.elapsed());
            }
        });
        Self { stop, sender, receiver }
    }

    /// The longest pause; every byte must have arrived.
    fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, (received, longest)) = (self.sender.join().unwrap(), self.receiver.join().unwrap());
        assert!(sent == received && sent > 100, "{received} of {sent} blocks");
        longest
    }
}

fn handshake_age(host: &Host, of: &Host) -> u64 {
    host.status(of).last_handshake_seconds.unwrap()
}

/// Waits until it serves its socket.
fn started(host: &Host) {
    let (start, socket) = (Instant::now(), host.dir.path().join(SOCKET_FILE));
    while control::request(&socket, "GET", "/peers").is_err() {
        assert!(start.elapsed() < PATIENCE, "the tunnel does not come up");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends the process in order and starts another; how long until that one serves.
fn restart(host: &mut Host) -> Duration {
    let start = Instant::now();
    host.end();
    host.start();
    started(host);
    start.elapsed()
}

#[test]
fn twenty_restarts_under_load_lose_no_packet_and_need_no_handshake() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    for host in &hosts {
        // A machine that is busy otherwise takes long to start a process: the queue is not what is tried here.
        host.netns.must(&["ip", "link", "set", LINK, "txqueuelen", "20000"]);
    }
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        hosts[from].reaches(hosts[to].inner(false), PATIENCE);
    }
    // A greeting to a peer that was not up yet is repeated after five seconds.
    std::thread::sleep(Duration::from_secs(6));
    let ages = [(0, 1), (0, 2), (1, 0), (2, 0)].map(|(a, b)| (a, b, handshake_age(&hosts[a], &hosts[b])));
    let (first, [h1, h2, h3]) = (Instant::now(), &hosts);
    let flows: Vec<Flow> = [(h1, h2), (h2, h1), (h3, h1), (h1, h3)]
        .into_iter()
        .flat_map(|(from, to)| [false, true].map(|ipv6| Flow::start(from, to, ipv6)))
        .collect();
    let streams = [Stream::start(h1, h2, true), Stream::start(h2, h1, false), Stream::start(h3, h1, false)];
    let mut longest = Duration::ZERO;
    for number in [0, 1].repeat(10) {
        std::thread::sleep(Duration::from_millis(200));
        longest = longest.max(restart(&mut hosts[number]));
        assert_eq!(hosts[number].kept(), KEPT, "the sessions were taken, and nothing is kept twice");
    }
    std::thread::sleep(Duration::from_millis(200));
    let pauses = streams.map(Stream::finish);
    let sent: u32 = flows.into_iter().map(Flow::finish).sum();
    println!("{sent} datagrams, none lost; restarts took {longest:?} at most, streams paused for {pauses:?}");
    assert!(sent > 8 * 500, "{sent}");
    for (a, b, before) in ages {
        let (after, passed) = (handshake_age(&hosts[a], &hosts[b]), first.elapsed().as_secs());
        assert!(
            after + 1 >= before + passed,
            "a new handshake: {before} s old {passed} s ago, now {after} s"
        );
    }
    assert!(hosts[0].status(&hosts[1]).received_bytes > 200_000, "the counters go on");
}

#[test]
fn a_killed_tunnel_leaves_its_queues_but_no_sessions_and_greets_its_peers() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    let (to, back) = (hosts[1].inner(true), hosts[0].inner(false));
    hosts[0].reaches(to, PATIENCE);
    std::thread::sleep(Duration::from_millis(2100));
    assert!(handshake_age(&hosts[0], &hosts[1]) >= 2);
    for _ in 0..3 {
        hosts[1].kill();
        assert_eq!(hosts[1].kept(), KEPT);
        // What is sent meanwhile waits in the queue for the handshake.
        let ping = Command::new("ip")
            .args(["netns", "exec", &hosts[1].netns.name, "ping", "-c", "1", "-W", "5", &back.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(200));
        hosts[1].start();
        let took = hosts[0].reaches(to, PATIENCE);
        assert!(took < Duration::from_secs(2), "{took:?}");
        let said = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
        assert!(said.contains("1 received"), "{said}");
        assert!(handshake_age(&hosts[0], &hosts[1]) < 2, "a new handshake");
    }
}

#[test]
fn sessions_that_were_taken_once_are_refused_whatever_the_manager_still_has() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    let to = hosts[1].inner(false);
    hosts[0].reaches(to, PATIENCE);
    hosts[1].end();
    let mut with_sessions = KEPT.map(str::to_owned).to_vec();
    with_sessions.insert(0, SESSIONS.to_owned());
    assert_eq!(hosts[1].kept(), with_sessions);
    let manager = hosts[1].manager.as_ref().unwrap();
    let (_, sessions) = manager.kept.iter().find(|(name, _)| name == SESSIONS).unwrap();
    let copy: OwnedFd = sessions.try_clone().unwrap();
    hosts[1].start();
    started(&hosts[1]);
    hosts[0].reaches(to, Duration::from_secs(1));
    // It dies, and the manager gives what it should have forgotten.
    hosts[1].kill();
    hosts[1].manager.as_mut().unwrap().kept.push((SESSIONS.to_owned(), copy));
    std::thread::sleep(Duration::from_millis(2100));
    hosts[1].start();
    started(&hosts[1]);
    hosts[0].reaches(to, PATIENCE);
    assert!(handshake_age(&hosts[1], &hosts[0]) < 2, "a new handshake");
    assert_eq!(hosts[1].kept(), KEPT);
}

#[test]
fn what_is_no_state_of_this_version_is_ignored() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    let to = hosts[1].inner(false);
    hosts[0].reaches(to, PATIENCE);
    for left in [&b"garbage"[..], b"", br#"{"version":4711,"news":[]}"#] {
        hosts[1].kill();
        let memory = sealed::seal(left).unwrap();
        let kept = &mut hosts[1].manager.as_mut().unwrap().kept;
        kept.push((SESSIONS.to_owned(), memory));
        kept.push((SESSIONS.to_owned(), tempfile::tempfile().unwrap().into()));
        kept.push(("of-a-later-version".to_owned(), tempfile::tempfile().unwrap().into()));
        hosts[1].start();
        started(&hosts[1]);
        hosts[0].reaches(to, PATIENCE);
        assert_eq!(hosts[1].kept(), KEPT);
    }
}

#[test]
fn a_device_that_is_another_one_is_opened_anew() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    let to = hosts[1].inner(false);
    hosts[0].reaches(to, PATIENCE);
    hosts[1].end();
    hosts[1].netns.must(&["ip", "link", "del", LINK]);
    hosts[1].make_device(&[1, 3]);
    hosts[1].start();
    hosts[0].reaches(to, PATIENCE);
    assert_eq!(hosts[1].kept(), KEPT);
    let _ = restart(&mut hosts[1]);
    hosts[0].reaches(to, Duration::from_secs(1));
}

#[test]
fn what_changed_while_no_process_ran_is_taken_from_the_document() {
    if !needs_root() {
        return;
    }
    let (_switch, mut hosts) = three_kept();
    for (from, to) in [(0, 1), (1, 2)] {
        hosts[from].reaches(hosts[to].inner(false), PATIENCE);
    }
    let age = handshake_age(&hosts[1], &hosts[0]);
    std::thread::sleep(Duration::from_millis(2100));
    // A peer is gone and the port is another: the rest of the sessions goes on, and the other side follows.
    hosts[1].end();
    hosts[1].write_state_with_port(PORT + 1, &[(&hosts[0], false)]);
    hosts[1].start();
    started(&hosts[1]);
    hosts[1].reaches(hosts[0].inner(false), Duration::from_secs(1));
    assert_eq!(hosts[0].status(&hosts[1]).endpoint.map(|endpoint| endpoint.port()), Some(PORT + 1));
    assert!(handshake_age(&hosts[1], &hosts[0]) >= age + 2);
    let peers: Vec<PeerStatus> = serde_json::from_str(&hosts[1].ask("GET", "/peers")).unwrap();
    assert_eq!(peers.iter().map(|peer| peer.public_key).collect::<Vec<_>>(), [hosts[0].key]);
    assert!(!hosts[2].netns.exec(&["ping", "-c", "1", "-W", "1", &hosts[1].inner(false).to_string()]).0);
    assert_eq!(hosts[1].kept(), KEPT, "the old sockets are not kept");
    // And back, where the descriptors are those of the other port.
    hosts[1].end();
    hosts[1].write_state(&[(&hosts[0], false), (&hosts[2], false)]);
    hosts[1].start();
    started(&hosts[1]);
    hosts[1].reaches(hosts[0].inner(true), Duration::from_secs(1));
    hosts[1].reaches(hosts[2].inner(false), PATIENCE);
    assert_eq!(hosts[0].status(&hosts[1]).endpoint.map(|endpoint| endpoint.port()), Some(PORT));
    // The key is replaced: the session outlives it, and who still calls the old key is answered.
    let next = [0x42; 32];
    hosts[1].end();
    std::fs::write(hosts[1].dir.path().join(KEY_FILE), next).unwrap();
    hosts[1].key = public_key(next);
    hosts[1].write_state(&[(&hosts[0], false), (&hosts[2], false)]);
    hosts[1].start();
    started(&hosts[1]);
    hosts[0].reaches(hosts[1].inner(false), Duration::from_secs(1));
    hosts[0].kill();
    hosts[0].start();
    hosts[0].reaches(hosts[1].inner(false), PATIENCE);
}
