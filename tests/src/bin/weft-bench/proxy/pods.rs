//! Pods of the node, attached by Weft's plugin: one that asks, two that answer. What runs in them is this very program.
//!
//! In: commands on the asker's standard input. Out: one line each on its standard output:
//! `rate ADDRESS MILLIS` -> connections a second, `first ADDRESS ADDRESS COUNT` -> microseconds to the answer of a first packet to each
//! (medians), `await ADDRESS NAME` -> when NAME first answered, in microseconds since the epoch.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use crate::cni::{Chain, Pod};
use crate::dns::to_client_core;
use crate::rig::Rig;
use crate::row::median;

/// Where the answering pods listen, TCP and UDP.
pub(super) const PORT: u16 = 8080;
/// Between two questions of `await`: a core is to be left for whoever programs the rules.
const PAUSE: Duration = Duration::from_micros(500);

/// A pod that answers with its name.
pub(super) struct Answerer {
    pub(super) name: &'static str,
    pub(super) ip: IpAddr,
    child: Child,
}

pub(super) struct Asker {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Answerer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answerer {
    pub(super) fn start(rig: &Rig, name: &'static str) -> anyhow::Result<Self> {
        let pod = attach(rig, name)?;
        let child = inside(&pod, &["answer", name])?.stdin(Stdio::null()).spawn()?;
        Ok(Self { name, ip: address_of(&pod)?, child })
    }
}

impl Asker {
    pub(super) fn start(rig: &Rig) -> anyhow::Result<Self> {
        let pod = attach(rig, "asker")?;
        let mut child = inside(&pod, &["ask"])?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = child.stdin.take().context("a pipe to the asker")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe from the asker")?);
        Ok(Self { child, commands, answers })
    }

    /// Connections a second, one after the other.
    pub(super) fn rate(&mut self, to: SocketAddr, millis: u32) -> anyhow::Result<f64> {
        self.begin(&format!("rate {to} {millis}"))?;
        self.end()
    }

    /// Microseconds until the first packet of a flow is answered, median of `count` flows to each of two addresses by turns.
    pub(super) fn first_packets(&mut self, to: [SocketAddr; 2], count: usize) -> anyhow::Result<[f64; 2]> {
        self.begin(&format!("first {} {} {count}", to[0], to[1]))?;
        self.numbers()
    }

    /// From now on asks `to` until `name` answers; `end` says when that was.
    pub(super) fn begin_await(&mut self, to: SocketAddr, name: &str) -> anyhow::Result<()> {
        self.begin(&format!("await {to} {name}"))
    }

    fn begin(&mut self, command: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.commands, "{command}")?)
    }

    pub(super) fn end(&mut self) -> anyhow::Result<f64> {
        self.numbers().map(|[number]| number)
    }

    fn numbers<const N: usize>(&mut self) -> anyhow::Result<[f64; N]> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let numbers: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
        let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
        numbers.with_context(|| format!("the asker said {line:?}"))
    }
}

fn attach(rig: &Rig, name: &str) -> anyhow::Result<Pod> {
    let pod = Pod::new(name, None)?;
    Chain::of_weft(rig)?.add(&pod)?;
    Ok(pod)
}

fn inside(pod: &Pod, words: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", pod.name()]).arg(std::env::current_exe()?).arg("--pod").args(words);
    Ok(command)
}

fn address_of(pod: &Pod) -> anyhow::Result<IpAddr> {
    let output = Command::new("ip").args(["-n", pod.name(), "-4", "-o", "addr", "show", "eth0"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let address = text.split_whitespace().skip_while(|word| *word != "inet").nth(1).context("no address")?;
    Ok(address.split('/').next().unwrap_or_default().parse()?)
}

/// Microseconds since the epoch.
pub(super) fn now_micros() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e6
}

/// What runs in a pod.
pub(crate) fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["answer", name] => answer(name),
        ["ask"] => ask(),
        _ => bail!("a pod answers or asks"),
    }
}

fn answer(name: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    std::thread::spawn(move || listener.incoming().flatten().for_each(drop));
    let socket = UdpSocket::bind(("0.0.0.0", PORT))?;
    let mut question = [0; 16];
    loop {
        let (_, client) = socket.recv_from(&mut question)?;
        let _ = socket.send_to(name.as_bytes(), client);
    }
}

fn ask() -> anyhow::Result<()> {
    for line in std::io::stdin().lines() {
        let line = line?;
        let answer = match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["rate", to, millis] => {
                let (to, time) = (to.parse()?, Duration::from_millis(millis.parse()?));
                on_a_core(move || rate(to, time))?.to_string()
            }
            ["first", one, other, count] => {
                let (to, count) = ([one.parse()?, other.parse()?], count.parse()?);
                let [one, other] = on_a_core(move || first_packets(to, count))?;
                format!("{one} {other}")
            }
            ["await", to, name] => await_name(to.parse()?, name)?.to_string(),
            other => bail!("unknown command {other:?}"),
        };
        println!("{answer}");
    }
    Ok(())
}

/// With a reset, so that neither end waits in TIME-WAIT, which would use the ports up.
fn abandon(stream: TcpStream) {
    let _ = setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 });
}

/// On one core: to change it costs as much as a connection.
fn on_a_core<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let thread = std::thread::spawn(|| {
        to_client_core();
        work()
    });
    thread.join().map_err(|_| anyhow::anyhow!("whoever asks panicked"))?
}

fn rate(to: SocketAddr, time: Duration) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut connections = 0u32;
    while began.elapsed() < time {
        abandon(TcpStream::connect_timeout(&to, Duration::from_secs(2)).context("connect")?);
        connections += 1;
    }
    Ok(f64::from(connections) / began.elapsed().as_secs_f64())
}

/// By turns, so that a machine that wakes slowly for a while does so for both.
fn first_packets(to: [SocketAddr; 2], count: usize) -> anyhow::Result<[f64; 2]> {
    let mut samples = [Vec::with_capacity(count), Vec::with_capacity(count)];
    for _ in 0..count {
        for (to, samples) in to.iter().zip(&mut samples) {
            // One lost in a thousand is no reason to begin again.
            samples.extend(first_packet(*to)?);
        }
    }
    for (to, samples) in to.iter().zip(&samples) {
        ensure!(samples.len() * 2 > count, "{to} answered {} of {count}", samples.len());
    }
    Ok(samples.map(median))
}

/// Microseconds until the answer; `None` when there is none.
fn first_packet(to: SocketAddr) -> anyhow::Result<Option<f64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.connect(to)?;
    let sent_at = Instant::now();
    socket.send(b"?")?;
    let answered = socket.recv(&mut [0; 16]).is_ok();
    Ok(answered.then(|| sent_at.elapsed().as_secs_f64() * 1e6))
}

fn await_name(to: SocketAddr, name: &str) -> anyhow::Result<f64> {
    let deadline = Instant::now() + Duration::from_secs(600);
    let mut answer = [0; 16];
    while Instant::now() < deadline {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        socket.connect(to)?;
        let _ = socket.send(b"?");
        if socket.recv(&mut answer).is_ok_and(|length| &answer[..length] == name.as_bytes()) {
            return Ok(now_micros());
        }
        std::thread::sleep(PAUSE);
    }
    bail!("{name} never answered at {to}")
}
