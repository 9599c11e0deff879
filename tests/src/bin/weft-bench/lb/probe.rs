//! Asks an HTTP server all the time, on a new connection each time, and says what came of it: a line a request.
//!
//! In: addresses, how long an answer may take, how many ask at once. Out, on standard output:
//! `ADDRESS BEGIN END ok|WHY`, times in microseconds since the epoch. It ends with its reader.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;

pub(super) const PORT: u16 = 80;
/// Between the end of a request and the next.
const PAUSE: Duration = Duration::from_millis(5);

pub(super) struct Asked {
    pub(super) address: IpAddr,
    pub(super) began_micros: u64,
    pub(super) ended_micros: u64,
    /// `Err` says what failed.
    pub(super) outcome: Result<(), String>,
}

/// On the lab's client, from now until it is dropped.
pub(super) struct Probe {
    child: Child,
    pub(super) asked: Receiver<Asked>,
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Probe {
    pub(super) fn start(
        weft: &std::path::Path,
        addresses: &[IpAddr],
        patience: Duration,
        each: usize,
    ) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let mut child = Command::new(weft)
            .args(["lab", "exec", "client", "--"])
            .arg(own)
            .args(["--probe", &patience.as_millis().to_string(), &each.to_string()])
            .args(addresses.iter().map(IpAddr::to_string))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("a pipe from the probe")?;
        Ok(Self { child, asked: follow(output) })
    }
}

fn follow(output: ChildStdout) -> Receiver<Asked> {
    let (sender, asked) = mpsc::channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        for one in lines.filter_map(|line| read(&line)) {
            if sender.send(one).is_err() {
                return;
            }
        }
    });
    asked
}

fn read(line: &str) -> Option<Asked> {
    let mut words = line.splitn(4, ' ');
    let address = words.next()?.parse().ok()?;
    let (began_micros, ended_micros) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let outcome = match words.next()? {
        "ok" => Ok(()),
        why => Err(why.to_owned()),
    };
    Some(Asked { address, began_micros, ended_micros, outcome })
}

/// Microseconds since the epoch.
pub(super) fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// `PATIENCE-MILLIS EACH ADDRESS...`, until nobody reads.
pub(super) fn run(words: &[&str]) -> anyhow::Result<()> {
    let [patience, each, addresses @ ..] = words else { anyhow::bail!("a probe needs addresses") };
    let patience = Duration::from_millis(patience.parse()?);
    let each: usize = each.parse()?;
    let addresses = addresses.iter().map(|text| text.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    std::thread::scope(|scope| {
        for address in addresses.into_iter().flat_map(|address| std::iter::repeat_n(address, each)) {
            scope.spawn(move || {
                loop {
                    let began = now_micros();
                    let outcome = ask(SocketAddr::new(address, PORT), patience);
                    let text = outcome.map_or_else(|why| why, |()| "ok".to_owned());
                    let line = format!("{address} {began} {} {text}\n", now_micros());
                    if std::io::stdout().write_all(line.as_bytes()).is_err() {
                        return;
                    }
                    std::thread::sleep(PAUSE);
                }
            });
        }
    });
    Ok(())
}

fn ask(to: SocketAddr, patience: Duration) -> Result<(), String> {
    let mut stream =
        TcpStream::connect_timeout(&to, patience).map_err(|error| format!("connect: {error}"))?;
    let mut talk = || {
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"GET /hostname HTTP/1.0\r\nHost: probe\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer: String = talk().map_err(|error: std::io::Error| format!("read: {error}"))?;
    if answer.starts_with("HTTP/1.") && answer.contains(" 200 ") { Ok(()) } else { Err("no answer".into()) }
}
