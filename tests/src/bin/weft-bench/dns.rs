//! Names of Services asked over UDP and TCP, and names of an upstream that nobody asked for before, beside CoreDNS with its
//! `kubernetes` plugin and `cache 30`, both fed by the same API server. The server has one core, the clients and the upstream the
//! other.
//!
//! Closed loop: four clients, each with as many questions outstanding as the figure's window, or one, or a name's A and AAAA, as a C
//! library asks. Open loop, for the latency: a question at a time, at half of what CoreDNS answers at most, while something of the
//! lowest priority keeps the server's core awake. And beside `dnsperf`, which has no part of ours.
//!
//! Then the agent is killed under such load and comes back as systemd does it: after the pause of its unit, with the sockets that
//! were kept. Last, the memory of a large cluster's names.

mod names;

use std::io::{BufReader, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, SockaddrStorage, setsockopt,
    sockopt,
};
use nix::unistd::Pid;
use weft_netstack::kernel::datagram::Batch;
use weft_netstack::kernel::stop::Stop;

use super::proxy::{SERVICES, make_services};
use super::rig::{Peer, Rig, cpu_seconds_by_mode, resident_mib, until, until_within};
use super::row::{Better, Row, median, percentile};

pub(crate) const COREDNS: Peer = Peer { script: "build-coredns.sh", args: &[] };
const ROUNDS: usize = 3;
const SECONDS: u64 = 3;
const CLIENTS: usize = 4;
/// Questions that a client has outstanding: more than a batch of any server, fewer than its socket holds.
const WINDOW: usize = 64;
/// The same of names that nobody knows: the most that one client may have under way here.
const MISS_WINDOW: usize = 16;
const SERVER_CORE: usize = 0;
const CLIENT_CORE: usize = 1;
const OURS: &str = "10.96.0.10:53";
const THEIRS: &str = "127.0.0.1:1053";
/// Answers every name with one address at once.
const UPSTREAM: &str = "127.0.0.9";
/// `RestartSec=` of the agent's unit.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// Questions in a second while the agent is killed: some that come in the gap, none too many for a socket's buffer.
const PER_SECOND_AT_A_KILL: f64 = 1000.0;
/// What a resolver waits for an answer at least (`options timeout:1`).
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let peer = COREDNS.path()?;
    let mut rig = Rig::start(weft)?;
    rig.runtime.block_on(make_services(&rig.client))?;
    let resolv_conf = rig.folder.path().join("resolv.conf");
    std::fs::write(&resolv_conf, format!("nameserver {UPSTREAM}\n"))?;
    let resolv_conf = resolv_conf.to_string_lossy().into_owned();
    let flags = ["--dns-rate-limit", "0", "--resolv-conf", &resolv_conf];
    rig.keep(&sockets_of_service_manager()?)?;
    rig.start_agent_with(&flags)?;
    rig.await_ready()?;
    let _upstream = Upstream::start()?;
    let (ours_pid, mut coredns) = (rig.pid("agent")?, start_coredns(&peer, &rig)?);
    let measured = all(ours_pid, coredns.id(), rig.folder.path());
    let measured = measured.and_then(|mut rows| {
        rows.extend(killed(&mut rig, &flags)?);
        rows.push(grown(&rig, rig.pid("agent")?, coredns.id())?);
        Ok(rows)
    });
    coredns.kill()?;
    coredns.wait()?;
    measured
}

/// The agent's sockets, which outlive it.
fn sockets_of_service_manager() -> anyhow::Result<[OwnedFd; 2]> {
    // The address is none of this node's before the agent's route is there (IP_FREEBIND).
    let address = SockaddrStorage::from(OURS.parse::<SocketAddr>()?);
    let open = |kind| -> anyhow::Result<OwnedFd> {
        let socket = socket::socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::IpFreebind, &true)?;
        socket::bind(socket.as_raw_fd(), &address)?;
        Ok(socket)
    };
    let (udp, tcp) = (open(SockType::Datagram)?, open(SockType::Stream)?);
    socket::listen(&tcp, Backlog::new(1024)?)?;
    Ok([udp, tcp])
}

/// Memory that the names of a large cluster take, in the whole agent: the objects, the plans and rules of Services, and the names.
/// `dns/tests/memory.rs` holds the names' own part.
fn grown(rig: &Rig, ours: u32, theirs: u32) -> anyhow::Result<Row> {
    let before = (resident_mib(ours)?, resident_mib(theirs)?);
    rig.runtime.block_on(names::make(&rig.client))?;
    let last = [vec![question(&names::LAST_SERVICE)], vec![question(&names::LAST_SET)]];
    for server in [OURS, THEIRS] {
        for questions in &last {
            until_within(Duration::from_secs(60), server, || Asker::new(server).ask(questions, 0, 1) == 1)?;
        }
    }
    std::thread::sleep(Duration::from_secs(2));
    let (weft, peer) = (resident_mib(ours)? - before.0, resident_mib(theirs)? - before.1);
    let name = "memory for 154,000 names more, the whole agent's";
    Ok(Row::bounded(name, "MiB", weft, ("CoreDNS", peer), Better::Lower, None))
}

/// The longest that a question waited that was answered in time, and how many were not.
fn killed(rig: &mut Rig, flags: &[&str]) -> anyhow::Result<Vec<Row>> {
    let mut took = Vec::new();
    for _ in 0..ROUNDS {
        let client = std::thread::spawn(|| latencies(OURS, PER_SECOND_AT_A_KILL, PATIENCE));
        std::thread::sleep(Duration::from_secs(1));
        rig.kill_agent()?;
        std::thread::sleep(RESTART_PAUSE);
        rig.start_agent_alone(flags)?;
        took.extend(client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??);
    }
    let patience_micros = PATIENCE.as_secs_f64() * 1e6;
    let (answered, unanswered): (Vec<f64>, Vec<f64>) =
        took.into_iter().partition(|micros| *micros < patience_micros);
    let longest = answered.into_iter().fold(0.0, f64::max) / 1000.0;
    let of = "kill -9 under load, restarted by a service manager that keeps the sockets";
    Ok(vec![
        Row::alone(&format!("{of}: longest wait for an answer"), "ms", longest, Better::Lower, 500.0),
        Row::alone(
            &format!("{of}: no answer within 1 s"),
            "questions",
            unanswered.len() as f64,
            Better::Lower,
            0.0,
        ),
    ])
}

fn all(ours: u32, theirs: u32, folder: &Path) -> anyhow::Result<Vec<Row>> {
    for pid in [ours, theirs] {
        pin_all(pid)?;
    }
    for server in [OURS, THEIRS] {
        let (mut asker, questions) = (Asker::new(server), questions());
        until(server, || asker.ask(&questions, 0, 1) == 1)?;
    }
    let of = |rounds: &[Round], pick: fn(&Round) -> f64| median(rounds.iter().map(pick).collect());
    let mut rows = Vec::new();
    let mut most_of_theirs = 0.0;
    for (what, client, target) in [
        ("A of a Service by UDP", udp_client as Client, 8.0),
        ("A of a Service by TCP", tcp_client, 2.0),
        ("A of a new name of an upstream by UDP", miss_client, 2.0),
    ] {
        let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
        for number in 0..ROUNDS {
            of_ours.push(round(OURS, ours, client, number)?);
            of_theirs.push(round(THEIRS, theirs, client, number)?);
        }
        if rows.is_empty() {
            most_of_theirs = of(&of_theirs, |round| round.per_second);
        }
        let mut beside = |name: &str, unit, pick: fn(&Round) -> f64, better, target| {
            let (weft, peer) = (of(&of_ours, pick), of(&of_theirs, pick));
            rows.push(Row::beside(&format!("{what}, {name}"), unit, weft, ("CoreDNS", peer), better, target));
        };
        beside("answers on one core", "1/s", |round| round.per_second, Better::Higher, target);
        beside("CPU per answer", "us", |round| round.cpu_micros, Better::Lower, 1.0 / target);
        let (weft, peer) =
            (of(&of_ours, |round| round.kernel_micros), of(&of_theirs, |round| round.kernel_micros));
        let name = format!("{what}, CPU per answer in the kernel");
        rows.push(Row::bounded(&name, "us", weft, ("CoreDNS", peer), Better::Lower, None));
    }
    rows.extend(unaided(ours, theirs, "A and AAAA of a Service by UDP from a new socket", pair_client)?);
    rows.extend(unaided(ours, theirs, "A of a Service by TCP, one by one", tcp_single_client)?);
    rows.push(beside_dnsperf(folder)?);
    let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
    let _awake = Awake::keep();
    for _ in 0..ROUNDS {
        of_ours.push(percentile(latencies(OURS, most_of_theirs / 2.0, LOST)?, 99.0));
        of_theirs.push(percentile(latencies(THEIRS, most_of_theirs / 2.0, LOST)?, 99.0));
    }
    let name = "A of a Service at half of CoreDNS's most, p99";
    let theirs = ("CoreDNS", median(of_theirs));
    rows.push(Row::beside(name, "us", median(of_ours), theirs, Better::Lower, 0.2));
    Ok(rows)
}

/// What an answer costs where nothing else waits in its socket.
fn unaided(ours: u32, theirs: u32, what: &str, client: Client) -> anyhow::Result<[Row; 2]> {
    let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        of_ours.push(round(OURS, ours, client, number)?);
        of_theirs.push(round(THEIRS, theirs, client, number)?);
    }
    let row = |name: &str, unit, pick: fn(&Round) -> f64, better| {
        let of = |rounds: &[Round]| median(rounds.iter().map(pick).collect());
        Row::bounded(
            &format!("{what}, {name}"),
            unit,
            of(&of_ours),
            ("CoreDNS", of(&of_theirs)),
            better,
            None,
        )
    };
    Ok([
        row("answers on one core", "1/s", |round| round.per_second, Better::Higher),
        row("CPU per answer", "us", |round| round.cpu_micros, Better::Lower),
    ])
}

/// What Debian's `dnsperf` says; where it has no more to give itself (some 90,000/s on one core) the ratio is too small.
fn beside_dnsperf(folder: &Path) -> anyhow::Result<Row> {
    let questions = folder.join("questions");
    let lines = (0..SERVICES).map(|n| format!("s{n}.default.svc.cluster.local A\n"));
    std::fs::write(&questions, lines.collect::<String>())?;
    let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_ours.push(dnsperf(OURS, &questions)?);
        of_theirs.push(dnsperf(THEIRS, &questions)?);
    }
    let theirs = ("CoreDNS", median(of_theirs));
    let name = "A of a Service by dnsperf, answers on one core";
    Ok(Row::bounded(name, "1/s", median(of_ours), theirs, Better::Higher, None))
}

/// Questions answered in a second, as many outstanding as our own clients have.
fn dnsperf(server: &str, questions: &Path) -> anyhow::Result<f64> {
    let server: SocketAddr = server.parse()?;
    let output = Command::new("taskset")
        .args(["--cpu-list", &CLIENT_CORE.to_string(), "dnsperf", "-s", &server.ip().to_string()])
        .args(["-p", &server.port().to_string(), "-l", &SECONDS.to_string(), "-T", "1"])
        .args(["-c", &CLIENTS.to_string(), "-q", &(CLIENTS * WINDOW).to_string(), "-d"])
        .arg(questions)
        .output()
        .context("run dnsperf (Debian's dnsperf)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().find_map(|line| line.trim().strip_prefix("Queries per second:"));
    let said = said.with_context(|| format!("dnsperf: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(said.trim().parse()?)
}

/// Answers that a client with a number got from a server in a round with a number.
type Client = fn(&str, usize, usize) -> u64;

/// Of an answer: microseconds of CPU, and how many of them in the kernel.
struct Round {
    per_second: f64,
    cpu_micros: f64,
    kernel_micros: f64,
}

fn round(server: &'static str, pid: u32, client: Client, number: usize) -> anyhow::Result<Round> {
    let before = cpu_seconds_by_mode(pid);
    let started_at = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            std::thread::spawn(move || {
                to_client_core();
                client(server, n, number)
            })
        })
        .collect();
    let mut answers = 0;
    for client in clients {
        answers += client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
    }
    ensure!(answers > 0, "{server} answered nothing");
    let [user, kernel] = cpu_seconds_by_mode(pid);
    let answers = answers as f64;
    Ok(Round {
        per_second: answers / started_at.elapsed().as_secs_f64(),
        cpu_micros: (user + kernel - before[0] - before[1]) * 1e6 / answers,
        kernel_micros: (kernel - before[1]) * 1e6 / answers,
    })
}

pub(crate) fn to_client_core() {
    let mut core = CpuSet::new();
    core.set(CLIENT_CORE).expect("a machine for benchmarks has two cores");
    sched_setaffinity(Pid::from_raw(0), &core).expect("a thread may choose its core");
}

fn udp_client(server: &str, n: usize, _round: usize) -> u64 {
    let (mut asker, questions) = (Asker::new(server), questions());
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let mut answers = 0;
    let mut service = n;
    while Instant::now() < deadline {
        service = (service + 61) % SERVICES;
        answers += asker.ask(&questions, service, WINDOW);
    }
    answers
}

/// A socket for each name, with both questions in it.
fn pair_client(server: &str, n: usize, _round: usize) -> u64 {
    let questions = questions();
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let mut answers = 0;
    let mut service = n;
    let mut answer = [0; 512];
    while Instant::now() < deadline {
        service = (service + 61) % SERVICES;
        let socket = socket(server);
        let mut message = questions[service].clone();
        for (id, kind) in [(0, 1), (1, 28)] {
            message[1] = id;
            let kind_at = message.len() - 3;
            message[kind_at] = kind;
            let _ = socket.send(&message);
        }
        let mut waits = [true; 2];
        while waits.contains(&true) {
            let Ok(length) = socket.recv(&mut answer) else { break };
            let good = length > 12 && answer[3] & 0xf == 0;
            if good && waits.get_mut(usize::from(answer[1])).is_some_and(std::mem::take) {
                answers += 1;
            }
        }
    }
    answers
}

/// As many questions of a connection outstanding as by UDP, as dnsperf asks; opened anew before CoreDNS would end it, which takes 128.
fn tcp_client(server: &str, n: usize, _round: usize) -> u64 {
    on_connections(server, n, 128 / WINDOW, |stream, questions, service| {
        let asked = (service..service + WINDOW).flat_map(|at| framed(&questions[at % SERVICES]));
        stream.get_mut().write_all(&asked.collect::<Vec<_>>())?;
        (0..WINDOW).try_for_each(|_| hear(stream))?;
        Ok(WINDOW as u64)
    })
}

/// One question after the other, as a resolver does after a truncated answer.
fn tcp_single_client(server: &str, n: usize, _round: usize) -> u64 {
    on_connections(server, n, 100, |stream, questions, service| {
        stream.get_mut().write_all(&framed(&questions[service]))?;
        hear(stream)?;
        Ok(1)
    })
}

/// Answers by connections on which something is asked so many times.
fn on_connections(
    server: &str,
    n: usize,
    times: usize,
    ask: impl Fn(&mut BufReader<TcpStream>, &[Vec<u8>], usize) -> std::io::Result<u64>,
) -> u64 {
    let questions = questions();
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let mut answers = 0;
    let mut service = n;
    while Instant::now() < deadline {
        let Ok(stream) = TcpStream::connect(server) else { continue };
        let prepared =
            stream.set_nodelay(true).and(stream.set_read_timeout(Some(Duration::from_millis(500))));
        let mut stream = BufReader::with_capacity(32 * 1024, stream);
        for _ in 0..if prepared.is_ok() { times } else { 0 } {
            service = (service + 61) % SERVICES;
            match ask(&mut stream, &questions, service) {
                Ok(count) => answers += count,
                Err(_) => break,
            }
        }
    }
    answers
}

/// A message behind its length.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a question is short");
    [&length.to_be_bytes()[..], message].concat()
}

/// An answer, which has an address.
fn hear(stream: &mut BufReader<TcpStream>) -> std::io::Result<()> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    let good = answer.len() > 12 && answer[3] & 0xf == 0 && answer[7] > 0;
    if good { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

/// Every name once.
fn miss_client(server: &str, n: usize, round: usize) -> u64 {
    let mut asker = Asker::new(server);
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let mut answers = 0;
    let mut batch = 0;
    while Instant::now() < deadline {
        let names = (0..MISS_WINDOW).map(|at| format!("m{round}-{n}-{batch}-{at}"));
        let questions: Vec<Vec<u8>> = names.map(|name| question(&[&name, "bench", "example"])).collect();
        answers += asker.ask(&questions, 0, MISS_WINDOW);
        batch += 1;
    }
    answers
}

/// What a question counts as that got no answer.
const LOST: Duration = Duration::from_millis(200);

/// Room for a second's answers.
const CLIENT_BUFFER_BYTES: usize = 4 << 20;

/// Microseconds that each of three seconds' questions took, at `per_second`; one that got no answer in time counts as `lost`.
fn latencies(server: &str, per_second: f64, lost: Duration) -> anyhow::Result<Vec<f64>> {
    to_client_core();
    let (socket, questions) = (socket(server), questions());
    // What waited for the next agent is answered all at once.
    setsockopt(&socket, sockopt::RcvBufForce, &CLIENT_BUFFER_BYTES)?;
    let pause = Duration::from_secs_f64(1.0 / per_second);
    socket.set_nonblocking(true)?;
    let started_at = Instant::now();
    let count = (per_second * SECONDS as f64) as usize;
    let mut sent: Vec<Instant> = Vec::with_capacity(count);
    let mut took = vec![lost.as_secs_f64() * 1e6; count];
    let mut answer = [0; 512];
    let end = started_at + Duration::from_secs(SECONDS) + lost;
    while Instant::now() < end {
        while sent.len() < count && Instant::now() >= started_at + pause * u32::try_from(sent.len())? {
            let mut message = questions[sent.len() * 61 % questions.len()].clone();
            message[..2].copy_from_slice(&((sent.len() & 0xffff) as u16).to_be_bytes());
            sent.push(Instant::now());
            let _ = socket.send(&message);
        }
        while let Ok(length) = socket.recv(&mut answer) {
            let now = Instant::now();
            let id = usize::from(u16::from_be_bytes([answer[0], answer[1]]));
            // Of the questions with this id the last that was sent: 65,536 are never under way.
            let last = (sent.len().saturating_sub(1)) & !0xffff | id;
            let at = if last < sent.len() { last } else { last.wrapping_sub(0x1_0000) };
            if length > 12
                && answer[7] > 0
                && let Some(sent_at) = sent.get(at)
            {
                took[at] = took[at].min(now.duration_since(*sent_at).as_secs_f64() * 1e6);
            }
        }
    }
    Ok(took)
}

/// Something that runs on the server's core only when nothing else does, so that the core does not sleep.
pub(crate) struct Awake(Arc<AtomicBool>);

impl Awake {
    pub(crate) fn keep() -> Self {
        let over = Arc::<AtomicBool>::default();
        let told = over.clone();
        std::thread::spawn(move || {
            let mut core = CpuSet::new();
            core.set(SERVER_CORE).expect("there is a first core");
            sched_setaffinity(Pid::from_raw(0), &core).expect("a thread may choose its core");
            // Of itself: the thread's own number.
            let thread = nix::unistd::gettid().to_string();
            let idle = Command::new("chrt").args(["--idle", "--pid", "0", &thread]).status();
            while idle.as_ref().is_ok_and(|status| status.success()) && !told.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Self(over)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A resolver that has one address for every name.
struct Upstream(Arc<AtomicBool>);

impl Upstream {
    fn start() -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((UPSTREAM, 53))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let over = Arc::<AtomicBool>::default();
        let told = over.clone();
        std::thread::spawn(move || {
            to_client_core();
            let mut message = [0; 1500];
            while !told.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut message) else { continue };
                let _ = socket.send_to(&answered(&message[..length]), from);
            }
        });
        Ok(Self(over))
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The question with one A record behind it, without its OPT record.
fn answered(question: &[u8]) -> Vec<u8> {
    let name_end = question.iter().skip(12).position(|octet| *octet == 0).map_or(12, |at| 12 + at + 1);
    let mut answer = question.get(..name_end + 4).unwrap_or_default().to_vec();
    if let Some(header) = answer.get_mut(2..12) {
        header.copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    }
    answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 80]);
    answer
}

fn socket(server: &str) -> UdpSocket {
    let server: SocketAddr = server.parse().expect("the constants are socket addresses");
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket can be bound");
    socket.connect(server).expect("a UDP socket can be connected");
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("200 ms is a valid timeout");
    socket
}

/// The question for the A record of every Service.
fn questions() -> Vec<Vec<u8>> {
    (0..SERVICES).map(|n| question(&[&format!("s{n}"), "default", "svc", "cluster", "local"])).collect()
}

/// For the A record of the name with these labels, under id 0.
fn question(labels: &[&str]) -> Vec<u8> {
    let mut question = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in labels {
        question.push(u8::try_from(label.len()).expect("labels are short"));
        question.extend_from_slice(label.as_bytes());
    }
    question.extend_from_slice(&[0, 0, 1, 0, 1]);
    question
}

/// Questions that leave together, in trains of equal length (udp(7), UDP_SEGMENT), which the kernel cuts at the server's socket, and
/// answers that are taken in batches: what a client costs is less than what a server does, so that it is the server that says how many
/// there are.
struct Asker {
    socket: UdpSocket,
    batch: Batch,
    never: Stop,
    train: Vec<u8>,
}

impl Asker {
    fn new(server: &str) -> Self {
        let never = Stop::new().expect("a pipe can be opened");
        Self { socket: socket(server), batch: Batch::default(), never, train: Vec::new() }
    }

    /// Asks `window` of the questions from `first` on at once, and returns how many were answered before one was missing: an
    /// answer has the id of a question that has none yet, response code 0 and at least one address (RFC 1035 section 4.1.1).
    fn ask(&mut self, questions: &[Vec<u8>], first: usize, window: usize) -> u64 {
        let asked: Vec<&[u8]> =
            (first..first + window).map(|at| &questions[at % questions.len()][..]).collect();
        let mut id = 0_u16;
        for equals in asked.chunk_by(|one, other| one.len() == other.len()) {
            self.train.clear();
            for question in equals {
                self.train.extend_from_slice(&id.to_be_bytes());
                self.train.extend_from_slice(&question[2..]);
                id += 1;
            }
            if self.send(equals[0].len()).is_err() {
                return 0;
            }
        }
        let mut outstanding = vec![true; window];
        let mut answers = 0;
        while outstanding.contains(&true) {
            if !matches!(self.batch.receive(&self.socket, LOST, &self.never), Ok(1..)) {
                break;
            }
            for datagram in self.batch.datagrams() {
                let answer = datagram.bytes;
                let [id0, id1, _, code, _, _, _, addresses, _, _, _, _, _, ..] = *answer else { continue };
                let good = code & 0xf == 0 && addresses > 0;
                let id = usize::from(u16::from_be_bytes([id0, id1]));
                if good && outstanding.get_mut(id).is_some_and(std::mem::take) {
                    answers += 1;
                }
            }
        }
        answers
    }

    /// The train as datagrams of `segment` octets.
    fn send(&self, segment: usize) -> nix::Result<usize> {
        let segment = u16::try_from(segment).expect("a question is short");
        let control = [ControlMessage::UdpGsoSegments(&segment)];
        let control = if self.train.len() > usize::from(segment) { &control[..] } else { &[] };
        let pieces = [IoSlice::new(&self.train)];
        socket::sendmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &pieces, control, MsgFlags::empty(), None)
    }
}

/// Every thread of a process to the server's core.
fn pin_all(pid: u32) -> anyhow::Result<()> {
    let mut core = CpuSet::new();
    core.set(SERVER_CORE)?;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread: i32 = task?.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(thread), &core)?;
    }
    Ok(())
}

/// Its default Corefile of a cluster, less what does not answer questions; one core, as it is told to have.
fn start_coredns(program: &Path, rig: &Rig) -> anyhow::Result<Child> {
    let folder = rig.folder.path();
    let corefile = folder.join("Corefile");
    let text = format!(
        ".:1053 {{\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    kubeconfig {}\n    pods insecure\n    ttl 30\n  }}\n  \
         cache 30\n  forward . {UPSTREAM}\n}}\n",
        folder.join("kubeconfig").display()
    );
    std::fs::write(&corefile, text)?;
    Command::new(program)
        .arg("-conf")
        .arg(&corefile)
        .env("GOMAXPROCS", "1")
        .stdout(std::fs::File::create(folder.join("coredns.log"))?)
        .stderr(Stdio::null())
        .spawn()
        .context("start CoreDNS")
}
