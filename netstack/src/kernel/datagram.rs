//! Questions and replies in batches: one system call takes many datagrams, one sends the replies.
//!
//! Replies to one socket travel as a train (`train`): one packet as far as the socket, which the kernel cuts there into the
//! datagrams that they are. Where a path takes no train its replies go singly.
//!
//! Source: recvmmsg(2), sendmmsg(2), udp(7). The socket is bound to one address by whoever opens it, so replies leave from the
//! address that was asked. What a datagram says is no business of this file.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::stop::Stop;
use super::train::{Waiting, couple};
use super::udp::{Refused, STORAGE_LEN, SegmentControl, from_storage, has_segmentation};

/// Datagrams that one call takes or sends.
pub const BATCH: usize = 64;
/// Longest datagram taken; a longer one is told as cut.
pub const RECEIVE_BYTES: usize = 2048;

/// Room for [`BATCH`] datagrams and their replies.
pub struct Batch {
    buffers: Vec<[u8; RECEIVE_BYTES]>,
    addresses: Vec<libc::sockaddr_storage>,
    received: Vec<Received>,
    replies: Vec<Vec<u8>>,
    /// Asked when the first replies are sent.
    has_segmentation: Option<bool>,
    /// The last that took no train.
    narrow: Option<Narrow>,
}

/// A path that takes no trains of such segments.
#[derive(Clone, Copy)]
struct Narrow {
    to: IpAddr,
    /// And longer ones.
    segment: usize,
}

#[derive(Clone, Copy)]
struct Received {
    len: usize,
    address_len: libc::socklen_t,
    cut: bool,
}

/// One datagram of the last receive.
pub struct Datagram<'a> {
    /// Who sent it; `None` when it is of no family of ours.
    pub from: Option<SocketAddr>,
    /// At most [`RECEIVE_BYTES`].
    pub bytes: &'a [u8],
    /// There was more of it.
    pub cut: bool,
    /// Empty; what is written goes back to the sender with [`Batch::send_replies`].
    pub reply: &'a mut Vec<u8>,
}

impl Default for Batch {
    fn default() -> Self {
        // SAFETY: `sockaddr_storage` is plain data for which zeroes are a valid value.
        let zero: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Self {
            buffers: vec![[0; RECEIVE_BYTES]; BATCH],
            addresses: vec![zero; BATCH],
            received: Vec::with_capacity(BATCH),
            replies: vec![Vec::new(); BATCH],
            has_segmentation: None,
            narrow: None,
        }
    }
}

impl Batch {
    /// Waits for a datagram at most as long as `patience`, and not beyond the word to end, and takes those that are there. Returns
    /// how many.
    ///
    /// Waits before it takes: a receive that waits itself and whose process is killed takes what comes until its thread runs for
    /// the last time, and who reads the socket next never sees that.
    ///
    /// Errors: what the socket is told about earlier replies (`ECONNREFUSED` and the like) too; the next call goes on.
    pub fn receive(&mut self, socket: &UdpSocket, patience: Duration, stop: &Stop) -> io::Result<usize> {
        self.received.clear();
        let limit = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut waits =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::empty())];
        match poll(&mut waits, limit) {
            Ok(_) if waits[0].any() == Some(true) => {}
            Ok(_) | Err(Errno::EINTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        }
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        let mut headers = empty_headers();
        let parts = headers.iter_mut().zip(&mut pieces).zip(&mut self.buffers).zip(&mut self.addresses);
        for (((header, piece), buffer), address) in parts {
            piece.iov_base = buffer.as_mut_ptr().cast();
            piece.iov_len = RECEIVE_BYTES;
            header.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = STORAGE_LEN;
            header.msg_hdr.msg_iov = std::ptr::from_mut(piece);
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: each of the BATCH headers points to an address and a piece, each piece to a buffer, all of the true
        // lengths and borrowed mutably for the whole call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            let quiet = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if quiet { Ok(0) } else { Err(error) };
        };
        let taken = headers.iter().take(count).map(|header| Received {
            len: usize::try_from(header.msg_len).unwrap_or(0).min(RECEIVE_BYTES),
            address_len: header.msg_hdr.msg_namelen.min(STORAGE_LEN),
            cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        });
        self.received.extend(taken);
        self.replies.iter_mut().for_each(Vec::clear);
        Ok(self.received.len())
    }

    /// What the last receive brought.
    pub fn datagrams(&mut self) -> impl Iterator<Item = Datagram<'_>> {
        let parts = self.received.iter().zip(&self.buffers).zip(&self.addresses).zip(&mut self.replies);
        parts.map(|(((received, buffer), address), reply)| Datagram {
            from: from_storage(address),
            bytes: buffer.get(..received.len).unwrap_or_default(),
            cut: received.cut,
            reply,
        })
    }

    /// Sends every reply that is not empty to the sender of its datagram, without waiting for room. Returns how many
    /// could not be sent: one that fails keeps none of the others. The order is that of the datagrams only among replies of
    /// one length to one sender.
    pub fn send_replies(&mut self, socket: &UdpSocket) -> usize {
        let answered = self.received.iter().zip(&self.addresses).zip(&self.replies).enumerate();
        let waiting = answered.filter(|(_, (_, reply))| !reply.is_empty());
        let mut waiting: Vec<Waiting> = waiting
            .filter_map(|(at, ((_, address), reply))| {
                Some(Waiting { to: from_storage(address)?, len: reply.len(), at })
            })
            .collect();
        let segmentation = *self.has_segmentation.get_or_insert_with(|| has_segmentation(socket));
        let narrow = self.narrow;
        let trains = couple(&mut waiting, |to, segment| {
            segmentation && narrow.is_none_or(|narrow| narrow.to != to.ip() || segment < narrow.segment)
        });
        let mut failed = 0;
        for (train, error) in self.send(socket, &waiting, &trains) {
            let members = &waiting[train];
            let [first, _, ..] = members else {
                failed += 1;
                continue;
            };
            if Refused::read(&error).is_some() {
                self.narrow = Some(Narrow { to: first.to.ip(), segment: first.len });
            }
            let singles: Vec<_> = (0..members.len()).map(|at| at..at + 1).collect();
            failed += self.send(socket, members, &singles).len();
        }
        failed
    }

    /// Sends each train as one message. Returns those that could not be sent, and why.
    fn send(
        &self,
        socket: &UdpSocket,
        waiting: &[Waiting],
        trains: &[Range<usize>],
    ) -> Vec<(Range<usize>, io::Error)> {
        let mut outgoing = self.outgoing(waiting, trains);
        let (mut at, mut refused) = (0, Vec::new());
        while let Some(rest) = outgoing.headers.get_mut(at..).filter(|rest| !rest.is_empty()) {
            // SAFETY: each header of `rest` points to an address, to pieces and, for a train, to a control buffer, each piece
            // to a reply, all of the true lengths. `outgoing` holds pieces and controls, `self` addresses and replies; the
            // kernel only reads them.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    rest.as_mut_ptr(),
                    libc::c_uint::try_from(rest.len()).unwrap_or(0),
                    libc::MSG_DONTWAIT,
                )
            };
            let error = match usize::try_from(sent) {
                Ok(sent) if sent > 0 => {
                    at += sent;
                    continue;
                }
                _ => io::Error::last_os_error(),
            };
            if error.kind() != io::ErrorKind::Interrupted {
                refused.push((trains[at].clone(), error));
                at += 1;
            }
        }
        refused
    }

    /// One message for each of `trains`.
    fn outgoing(&self, waiting: &[Waiting], trains: &[Range<usize>]) -> Outgoing {
        let mut pieces: Vec<libc::iovec> = waiting
            .iter()
            .map(|one| &self.replies[one.at])
            .map(|reply| libc::iovec { iov_base: reply.as_ptr().cast_mut().cast(), iov_len: reply.len() })
            .collect();
        let mut controls = vec![SegmentControl::default(); trains.len()];
        let messages = trains.iter().zip(&mut controls).map(|(train, control)| {
            let (first, pieces) = (waiting[train.start], &mut pieces[train.clone()]);
            // SAFETY: `mmsghdr` is plain data for which zeroes are a valid value.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_name = std::ptr::from_ref(&self.addresses[first.at]).cast_mut().cast();
            header.msg_hdr.msg_namelen = self.received[first.at].address_len;
            header.msg_hdr.msg_iov = pieces.as_mut_ptr();
            header.msg_hdr.msg_iovlen = pieces.len();
            if pieces.len() > 1 {
                // A train's first is shorter than the whole, MAX_TRAIN_BYTES.
                control.ask(&mut header.msg_hdr, u16::try_from(first.len).unwrap_or(u16::MAX));
            }
            header
        });
        let headers = messages.collect();
        Outgoing { headers, _pieces: pieces, _controls: controls }
    }
}

/// The messages of a send, and what they point to: vectors that move but never grow.
struct Outgoing {
    headers: Vec<libc::mmsghdr>,
    _pieces: Vec<libc::iovec>,
    _controls: Vec<SegmentControl>,
}

fn empty_headers() -> [libc::mmsghdr; BATCH] {
    // SAFETY: `mmsghdr` is plain data for which zeroes are a valid value.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::sys::socket::{setsockopt, sockopt};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::netns::Netns;
    use crate::kernel::testing::{NamedNetns, needs_root, run};

    const PATIENCE: Duration = Duration::from_millis(500);

    fn pair(address: &str) -> (UdpSocket, UdpSocket) {
        let server = UdpSocket::bind((address, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let client = UdpSocket::bind((address, 0)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        (server, client)
    }

    /// A server, and `count` clients of it that ask for nothing but its replies.
    fn star(address: &str, count: usize) -> (UdpSocket, Vec<UdpSocket>) {
        let server = UdpSocket::bind((address, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let clients = (0..count).map(|_| {
            let client = UdpSocket::bind((address, 0)).unwrap();
            client.connect(server.local_addr().unwrap()).unwrap();
            client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            setsockopt(&client, sockopt::RcvBuf, &212_992).unwrap();
            client
        });
        let clients = clients.collect();
        (server, clients)
    }

    /// Has each client ask as often as it stands in `wanted` and answers with that many bytes, all in one batch. Returns how
    /// many replies were not sent, and what each client heard.
    fn exchange(
        batch: &mut Batch,
        server: &UdpSocket,
        clients: &[UdpSocket],
        wanted: &[(usize, usize)],
    ) -> (usize, Vec<Vec<Vec<u8>>>) {
        for (number, (client, len)) in wanted.iter().enumerate() {
            let question = [number.to_be_bytes(), len.to_be_bytes()].concat();
            clients[*client].send(&question).unwrap();
        }
        // The kernel may deliver the last ones a moment later.
        std::thread::sleep(Duration::from_millis(5));
        let mut unsent = 0;
        let mut came = 0;
        while came < wanted.len() {
            came += batch.receive(server, PATIENCE, &Stop::new().unwrap()).unwrap();
            for datagram in batch.datagrams() {
                let (number, len) = datagram.bytes.split_at(8);
                let len = usize::from_be_bytes(len.try_into().unwrap());
                *datagram.reply = reply(usize::from_be_bytes(number.try_into().unwrap()), len);
            }
            unsent += batch.send_replies(server);
        }
        let heard = clients.iter().enumerate().map(|(at, client)| {
            let due = wanted.iter().filter(|(client, len)| *client == at && *len > 0).count();
            let mut buffer = vec![0; 70_000];
            let mut hear = || client.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec());
            let mut heard: Vec<_> = std::iter::from_fn(&mut hear).take(due).collect();
            client.set_nonblocking(true).unwrap();
            heard.extend(std::iter::from_fn(&mut hear));
            client.set_nonblocking(false).unwrap();
            heard
        });
        (unsent, heard.collect())
    }

    fn reply(number: usize, len: usize) -> Vec<u8> {
        (0..len).map(|at| (number * 31 + at).to_le_bytes()[0]).collect()
    }

    /// What each client must hear, in any order.
    fn due(clients: usize, wanted: &[(usize, usize)]) -> Vec<Vec<Vec<u8>>> {
        let mut due = vec![Vec::new(); clients];
        for (number, (client, len)) in wanted.iter().enumerate().filter(|(_, (_, len))| *len > 0) {
            due[*client].push(reply(number, *len));
        }
        due.iter_mut().for_each(|replies| replies.sort());
        due
    }

    fn sorted(mut heard: Vec<Vec<Vec<u8>>>) -> Vec<Vec<Vec<u8>>> {
        heard.iter_mut().for_each(|replies| replies.sort());
        heard
    }

    fn lengths(heard: &[Vec<u8>]) -> Vec<usize> {
        heard.iter().map(Vec::len).collect()
    }

    /// A namespace with nothing but its loopback link; `None` without root.
    fn with_loopback(name: &str, mtu: &str) -> Option<(NamedNetns, Netns)> {
        needs_root().then(|| {
            let netns = NamedNetns::new(name);
            netns.must(&["ip", "link", "set", "lo", "up", "mtu", mtu]);
            let inside = Netns::open(netns.path()).unwrap();
            (netns, inside)
        })
    }

    /// Packets that a link of this namespace has sent.
    fn packets_sent(link: &str) -> u64 {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table.lines().find_map(|line| line.trim().strip_prefix(link)?.strip_prefix(':')).unwrap();
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    }

    #[test]
    fn replies_to_one_socket_are_one_packet_and_arrive_as_they_are_in_both_families() {
        let Some((_netns, inside)) = with_loopback("trains", "65536") else { return };
        let packets = |address: &str, clients: usize, wanted: &[(usize, usize)]| {
            let (server, clients) = star(address, clients);
            let before = packets_sent("lo");
            let (unsent, heard) = exchange(&mut Batch::default(), &server, &clients, wanted);
            assert_eq!((unsent, sorted(heard)), (0, due(clients.len(), wanted)), "{address} {wanted:?}");
            // The questions go singly.
            packets_sent("lo") - before - wanted.len() as u64
        };
        let trains = inside.run(|| {
            ["127.0.0.1", "::1"].map(|address| {
                [
                    packets(address, 1, &[(0, 90), (0, 90), (0, 90)]),
                    packets(address, 1, &[(0, 90), (0, 102), (0, 102)]),
                    // A and AAAA of one name.
                    packets(address, 1, &[(0, 90), (0, 102)]),
                    // Of two clients that ask by turns; one reply is empty.
                    packets(address, 2, &[(0, 90), (1, 80), (0, 90), (1, 80), (0, 0), (1, 70), (0, 90)]),
                    // Twice 300 and 200, and twice 100 and 50, 20.
                    packets(
                        address,
                        1,
                        &[(0, 20), (0, 100), (0, 300), (0, 50), (0, 200), (0, 100), (0, 300)],
                    ),
                    // A batch.
                    packets(address, 1, &[(0, 1232); BATCH - 12]),
                    packets(address, 1, &[(0, 60); BATCH]),
                    // 65,000 bytes hold 52 of these.
                    packets(address, 1, &[(0, 1232); BATCH]),
                ]
            })
        });
        assert_eq!(trains.unwrap(), [[1, 1, 2, 2, 3, 1, 1, 2]; 2]);
    }

    #[test]
    fn the_word_to_end_ends_a_wait() {
        let (server, _client) = pair("127.0.0.1");
        let stop = Stop::new().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| Batch::default().receive(&server, Duration::from_secs(60), &stop));
            std::thread::sleep(Duration::from_millis(20));
            stop.ask();
            assert_eq!(waits.join().unwrap().unwrap(), 0);
        });
    }

    /// The other process of the test below: reads its standard input.
    #[test]
    fn a_reader_that_is_killed() {
        if std::env::var_os("WEFT_TEST_READER").is_some() {
            let socket = UdpSocket::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
            println!("reading");
            let never = Stop::new().unwrap();
            while Batch::default()
                .receive(&socket, Duration::from_secs(60), &never)
                .is_ok_and(|count| count == 0)
            {}
        }
    }

    #[test]
    fn what_comes_while_its_reader_is_killed_is_left_for_the_next() {
        use std::io::{BufRead as _, BufReader};
        use std::process::{Command, Stdio};

        use nix::sched::{CpuSet, sched_setaffinity};
        use nix::unistd::Pid;
        // The instant that matters is not met each time.
        for address in ["127.0.0.1", "::1"].repeat(4) {
            let (server, client) = pair(address);
            let name = "kernel::datagram::tests::a_reader_that_is_killed";
            let mut reader = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env("WEFT_TEST_READER", "1")
                .stdin(Stdio::from(std::os::fd::OwnedFd::from(server.try_clone().unwrap())))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = BufReader::new(reader.stdout.take().unwrap()).lines();
            assert!(said.any(|line| line.unwrap().contains("reading")));
            // From now on its threads run only when nothing else wants their core: they are not over at once.
            let id = reader.id().to_string();
            run(&["taskset", "--all-tasks", "--cpu-list", "--pid", "0", &id]);
            run(&["chrt", "--all-tasks", "--idle", "--pid", "0", &id]);
            std::thread::sleep(Duration::from_millis(100));
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut core = CpuSet::new();
                    core.set(0).unwrap();
                    sched_setaffinity(Pid::from_raw(0), &core).unwrap();
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
                std::thread::sleep(Duration::from_millis(20));
                reader.kill().unwrap();
                (0..3).for_each(|_| assert_eq!(client.send(b"question").unwrap(), 8));
                over.store(true, Ordering::Relaxed);
            });
            reader.wait().unwrap();
            assert_eq!(
                Batch::default().receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(),
                3,
                "{address}"
            );
        }
    }

    #[test]
    fn equal_replies_to_one_socket_come_in_the_order_of_the_questions() {
        for address in ["127.0.0.1", "::1"] {
            let (server, clients) = star(address, 1);
            let (_, heard) = exchange(&mut Batch::default(), &server, &clients, &[(0, 40); 10]);
            assert_eq!(heard[0], (0..10).map(|number| reply(number, 40)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_kernel_without_trains_sends_every_reply_singly() {
        for address in ["127.0.0.1", "::1"] {
            let (server, clients) = star(address, 1);
            let mut batch = Batch { has_segmentation: Some(false), ..Batch::default() };
            let wanted = [(0, 10), (0, 30), (0, 30)];
            let (unsent, heard) = exchange(&mut batch, &server, &clients, &wanted);
            assert_eq!((unsent, lengths(&heard[0])), (0, vec![30, 30, 10]));
        }
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(has_segmentation(&server), "the kernel of the tests knows trains");
        assert!(!has_segmentation(&std::net::TcpListener::bind("127.0.0.1:0").unwrap()));
    }

    #[test]
    fn a_train_too_long_for_its_path_arrives_singly_and_is_not_tried_again() {
        let Some((_netns, inside)) = with_loopback("narrow", "1280") else { return };
        let run = inside.run(|| {
            for (address, headers) in [("127.0.0.1", 28), ("::1", 48)] {
                let (server, clients) = star(address, 1);
                let mut batch = Batch::default();
                let fits = 1280 - headers;
                for (wanted, narrow) in [
                    (vec![(0, fits), (0, fits), (0, 7)], None),
                    (vec![(0, fits + 1), (0, fits + 1), (0, 7), (0, 7)], Some(fits + 1)),
                    // Those that are short enough still travel together.
                    (vec![(0, 2000), (0, 2000), (0, fits), (0, fits), (0, fits)], Some(fits + 1)),
                ] {
                    let (unsent, heard) = exchange(&mut batch, &server, &clients, &wanted);
                    assert_eq!((unsent, sorted(heard)), (0, due(1, &wanted)), "{address} {wanted:?}");
                    assert_eq!(batch.narrow.map(|narrow| narrow.segment), narrow, "{address} {wanted:?}");
                }
            }
        });
        run.unwrap();
    }

    #[test]
    fn the_replies_of_a_refused_train_are_counted_one_by_one() {
        let Some((netns, inside)) = with_loopback("refuse", "65536") else { return };
        netns
            .must(&["nft", "add table inet t; add chain inet t out { type filter hook output priority 0; }"]);
        let run = inside.run(|| {
            for address in ["127.0.0.1", "::1"] {
                let (server, clients) = star(address, 2);
                let port = clients[0].local_addr().unwrap().port();
                run(&["nft", &format!("add rule inet t out udp dport {port} drop")]);
                let wanted = [(0, 50), (1, 50), (0, 50), (1, 50), (0, 20)];
                let (unsent, heard) = exchange(&mut Batch::default(), &server, &clients, &wanted);
                assert_eq!((unsent, lengths(&heard[0]), lengths(&heard[1])), (3, vec![], vec![50, 50]));
            }
        });
        run.unwrap();
    }

    #[test]
    fn a_pod_behind_a_veth_hears_every_reply_of_a_train() {
        if !needs_root() {
            return;
        }
        let (host, pod) = (NamedNetns::new("host"), NamedNetns::new("pod"));
        host.must(&["ip", "link", "add", "veth0", "type", "veth", "peer", "eth0", "netns", &pod.name]);
        for (netns, link, last) in [(&host, "veth0", "1"), (&pod, "eth0", "2")] {
            netns.must(&["ip", "address", "add", &format!("192.0.2.{last}/24"), "dev", link]);
            netns.must(&["ip", "address", "add", &format!("2001:db8::{last}/64"), "dev", link, "nodad"]);
            netns.must(&["ip", "link", "set", link, "up"]);
        }
        // Reassembled fragments count once, and so does a train.
        pod.must(&["nft", "add table inet t; add counter inet t answers"]);
        pod.must(&["nft", "add chain inet t in { type filter hook input priority 0; }"]);
        pod.must(&["nft", "add rule inet t in udp sport 53 counter name answers"]);
        let (inside_host, inside_pod) = (Netns::open(host.path()).unwrap(), Netns::open(pod.path()).unwrap());
        for (server, client) in [("192.0.2.1:53", "192.0.2.2:0"), ("[2001:db8::1]:53", "[2001:db8::2]:0")] {
            let server = inside_host.run(|| UdpSocket::bind(server).unwrap()).unwrap();
            server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let socket = || {
                let client = UdpSocket::bind(client).unwrap();
                client.connect(server.local_addr().unwrap()).unwrap();
                client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                client
            };
            let clients = inside_pod.run(|| [socket(), socket()]).unwrap();
            // Then both know the other's link address.
            exchange(&mut Batch::default(), &server, &clients, &[(0, 1)]);
            let wanted = [(0, 1232), (1, 99), (0, 1232), (1, 99), (0, 600), (1, 1600), (1, 1600)];
            pod.must(&["nft", "reset counters"]);
            let (unsent, heard) = exchange(&mut Batch::default(), &server, &clients, &wanted);
            assert_eq!((unsent, sorted(heard)), (0, due(2, &wanted)));
            // A train of three, and one that is refused for its first two, so that its third goes singly too, as the one left.
            let counted = pod.must(&["nft", "list counters"]);
            assert!(counted.contains("packets 5 "), "{counted}");
        }
    }

    #[test]
    fn a_socket_with_little_room_and_one_that_is_not_connected_hear_what_fits() {
        for address in ["127.0.0.1", "::1"] {
            let server = UdpSocket::bind((address, 0)).unwrap();
            server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let client = UdpSocket::bind((address, 0)).unwrap();
            // The least that the kernel allows, which holds one or two of these replies.
            setsockopt(&client, sockopt::RcvBuf, &1).unwrap();
            for _ in 0..20 {
                client.send_to(b"?", server.local_addr().unwrap()).unwrap();
            }
            let mut batch = Batch::default();
            assert_eq!(batch.receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(), 20);
            for (number, datagram) in batch.datagrams().enumerate() {
                *datagram.reply = reply(number, 400);
            }
            assert_eq!(batch.send_replies(&server), 0);
            client.set_nonblocking(true).unwrap();
            let mut buffer = [0; 2000];
            let mut heard = 0;
            while let Ok((len, from)) = client.recv_from(&mut buffer) {
                assert_eq!((&buffer[..len], from), (&reply(heard, 400)[..], server.local_addr().unwrap()));
                heard += 1;
            }
            assert!((1..20).contains(&heard), "{heard}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_reply_arrives_once_with_its_bytes(
            ipv6 in any::<bool>(),
            wanted in vec((0usize..3, prop_oneof![0usize..4, 60usize..64, 0usize..3000]), 0..=BATCH),
        ) {
            let (server, clients) = star(if ipv6 { "::1" } else { "127.0.0.1" }, 3);
            let (unsent, heard) = exchange(&mut Batch::default(), &server, &clients, &wanted);
            prop_assert_eq!(unsent, 0);
            prop_assert_eq!(sorted(heard), due(3, &wanted));
        }
    }

    #[test]
    fn what_came_in_one_batch_is_answered_to_its_sender_in_both_families() {
        for address in ["127.0.0.1", "::1"] {
            let (server, client) = pair(address);
            let (_, other) = (&server, UdpSocket::bind((address, 0)).unwrap());
            other.connect(server.local_addr().unwrap()).unwrap();
            other.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            client.send(b"one").unwrap();
            other.send(b"two").unwrap();
            client.send(b"mute").unwrap();
            let mut batch = Batch::default();
            assert_eq!(batch.receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(), 3);
            for datagram in batch.datagrams().filter(|datagram| datagram.bytes != b"mute") {
                let port = datagram.from.unwrap().port();
                datagram.reply.extend_from_slice(format!("{port} {:?}", datagram.bytes).as_bytes());
            }
            assert_eq!(batch.send_replies(&server), 0);
            for (socket, said) in [(&client, b"one"), (&other, b"two")] {
                let mut buffer = [0; 64];
                let length = socket.recv(&mut buffer).unwrap();
                let expected = format!("{} {said:?}", socket.local_addr().unwrap().port());
                assert_eq!(&buffer[..length], expected.as_bytes());
            }
        }
    }

    #[test]
    fn a_reply_that_cannot_be_sent_keeps_none_of_the_others() {
        let (server, client) = pair("127.0.0.1");
        client.send(b"large").unwrap();
        client.send(b"small").unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(), 2);
        for datagram in batch.datagrams() {
            // Longer than any datagram may be.
            let length = if datagram.bytes == b"large" { 70_000 } else { 1 };
            datagram.reply.resize(length, b'x');
        }
        assert_eq!(batch.send_replies(&server), 1);
        let mut buffer = [0; 64];
        assert_eq!(client.recv(&mut buffer).unwrap(), 1);
    }

    #[test]
    fn a_longer_datagram_is_told_as_cut_and_silence_ends_with_the_timeout() {
        let (server, client) = pair("127.0.0.1");
        server.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(), 0);
        client.send(&[1; RECEIVE_BYTES + 1]).unwrap();
        client.send(&[2; RECEIVE_BYTES]).unwrap();
        assert_eq!(batch.receive(&server, PATIENCE, &Stop::new().unwrap()).unwrap(), 2);
        let seen: Vec<_> = batch.datagrams().map(|datagram| (datagram.bytes.len(), datagram.cut)).collect();
        assert_eq!(seen, [(RECEIVE_BYTES, true), (RECEIVE_BYTES, false)]);
    }
}
