//! Names of Services asked over UDP, beside CoreDNS with its `kubernetes` plugin and `cache 30`, both fed by the same API
//! server. Closed loop: four clients, each with 64 questions outstanding. The server has one core, the clients the other.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::proxy::{SERVICES, make_services};
use super::rig::{Rig, cpu_seconds, until};
use super::row::{Better, Row, median};

const ROUNDS: usize = 3;
const SECONDS: u64 = 3;
const CLIENTS: usize = 4;
/// Questions that a client has outstanding: more than a batch of any server, fewer than its socket holds.
const WINDOW: usize = 64;
const SERVER_CORE: usize = 0;
const CLIENT_CORE: usize = 1;
const OURS: &str = "10.96.0.10:53";
const THEIRS: &str = "127.0.0.1:1053";

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let peer = peer_binary()?;
    let mut rig = Rig::start(weft)?;
    rig.runtime.block_on(make_services(&rig.client))?;
    rig.start_agent()?;
    rig.await_ready()?;
    let (ours_pid, mut coredns) = (rig.pid("agent")?, start_coredns(&peer, &rig)?);
    let measured = rounds(ours_pid, coredns.id());
    coredns.kill()?;
    coredns.wait()?;
    let (ours, theirs) = measured?;
    let of = |rounds: &[Round], pick: fn(&Round) -> f64| median(rounds.iter().map(pick).collect());
    let beside = |name, unit, pick: fn(&Round) -> f64, better, target| {
        Row::beside(name, unit, of(&ours, pick), ("CoreDNS", of(&theirs, pick)), better, target)
    };
    Ok(vec![
        beside("A of a Service, answers on one core", "1/s", |r| r.per_second, Better::Higher, 8.0),
        beside("CPU per answer", "us", |r| r.cpu_micros, Better::Lower, 0.125),
    ])
}

struct Round {
    per_second: f64,
    cpu_micros: f64,
}

fn rounds(ours: u32, theirs: u32) -> anyhow::Result<(Vec<Round>, Vec<Round>)> {
    for pid in [ours, theirs] {
        pin_all(pid)?;
    }
    for server in [OURS, THEIRS] {
        let (socket, questions) = (socket(server), questions());
        until(server, || ask(&socket, &questions, 0, 1) == 1)?;
    }
    let (mut of_ours, mut of_theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_ours.push(round(OURS, ours)?);
        of_theirs.push(round(THEIRS, theirs)?);
    }
    Ok((of_ours, of_theirs))
}

fn round(server: &'static str, pid: u32) -> anyhow::Result<Round> {
    let cpu_before = cpu_seconds(pid);
    let started_at = Instant::now();
    let clients: Vec<_> = (0..CLIENTS).map(|n| std::thread::spawn(move || client(server, n))).collect();
    let mut answers = 0;
    for client in clients {
        answers += client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
    }
    ensure!(answers > 0, "{server} answered nothing");
    let cpu = cpu_seconds(pid) - cpu_before;
    let answers = answers as f64;
    Ok(Round { per_second: answers / started_at.elapsed().as_secs_f64(), cpu_micros: cpu * 1e6 / answers })
}

/// Answers that one client got in a round.
fn client(server: &str, n: usize) -> u64 {
    let mut core = CpuSet::new();
    if core.set(CLIENT_CORE).and_then(|()| sched_setaffinity(Pid::from_raw(0), &core)).is_err() {
        return 0;
    }
    let (socket, questions) = (socket(server), questions());
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let mut answers = 0;
    let mut service = n;
    while Instant::now() < deadline {
        service = (service + 61) % SERVICES;
        answers += ask(&socket, &questions, service, WINDOW);
    }
    answers
}

fn socket(server: &str) -> UdpSocket {
    let server: SocketAddr = server.parse().expect("the constants are socket addresses");
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket can be bound");
    socket.connect(server).expect("a UDP socket can be connected");
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("200 ms is a valid timeout");
    socket
}

/// The question for the A record of every Service, under id 0.
fn questions() -> Vec<Vec<u8>> {
    let question = |service: usize| {
        let mut question = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in [format!("s{service}").as_str(), "default", "svc", "cluster", "local"] {
            question.push(u8::try_from(label.len()).expect("labels are short"));
            question.extend_from_slice(label.as_bytes());
        }
        question.extend_from_slice(&[0, 0, 1, 0, 1]);
        question
    };
    (0..SERVICES).map(question).collect()
}

/// Asks for `window` Services from `first` on at once, and returns how many were answered before one was missing: an answer
/// has the id of a question that has none yet, response code 0 and at least one address (RFC 1035 section 4.1.1).
fn ask(socket: &UdpSocket, questions: &[Vec<u8>], first: usize, window: usize) -> u64 {
    let mut outstanding = vec![false; window];
    let mut message = Vec::with_capacity(64);
    for (id, waits) in outstanding.iter_mut().enumerate() {
        message.clear();
        message.extend_from_slice(&questions[(first + id) % questions.len()]);
        message[..2].copy_from_slice(&u16::try_from(id).unwrap_or(u16::MAX).to_be_bytes());
        *waits = socket.send(&message).is_ok();
    }
    let mut answers = 0;
    let mut answer = [0; 512];
    while outstanding.contains(&true) {
        let Ok(length) = socket.recv(&mut answer) else { break };
        let id = usize::from(u16::from_be_bytes([answer[0], answer[1]]));
        let good = length > 12 && answer[3] & 0xf == 0 && answer[7] > 0;
        if good && outstanding.get_mut(id).is_some_and(std::mem::take) {
            answers += 1;
        }
    }
    answers
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

fn peer_binary() -> anyhow::Result<PathBuf> {
    let output = Command::new("tests/tools/build-coredns.sh").stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "CoreDNS could not be built");
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

/// Its default Corefile of a cluster, less what does not answer questions; one core, as it is told to have.
fn start_coredns(program: &Path, rig: &Rig) -> anyhow::Result<Child> {
    let folder = rig.folder.path();
    let corefile = folder.join("Corefile");
    let text = format!(
        ".:1053 {{\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    kubeconfig {}\n    pods insecure\n    ttl 30\n  }}\n  \
         cache 30\n}}\n",
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
