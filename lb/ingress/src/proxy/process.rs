//! The process `weft ingress serve`: threads, listeners on the addresses of the table, and a word of the agent on a socket.
//!
//! In: `ingress/routes.json` in the run directory, at the start and after each `POST /apply` on `ingress/ingress.sock`. A file
//! that cannot be read changes nothing. Out: answers; `GET /metrics` on the socket. SIGTERM: connections that are open end when they are idle, then the process;
//! its sockets go to the next one, where the service manager keeps them ([`Handover`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use weft_netstack::control::{self, Response};

use super::listen::{Life, Patience, Phase};
use super::tickets::TICKETS_FILE;
use super::{Handover, Proxy, TlsError, Worker, listen, tickets};
use crate::apply::{FOLDER, ROUTES_FILE, SOCKET_FILE, folder};
use crate::plan::table::RouteTable;

/// For how long connections from before SIGTERM may go on. New ones are served meanwhile.
const DRAIN: Duration = Duration::from_secs(10);
/// And those that came since, once no further one is taken. What comes then waits in the socket for the next process.
const SETTLE: Duration = Duration::from_secs(3);
/// Between two tries to listen on an address that is not there yet.
const RETRY: Duration = Duration::from_secs(1);
/// Between two looks at what is open still.
const GONE_POLL: Duration = Duration::from_millis(10);
const TIDY: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("listen on {path}; is another `weft ingress serve` running?")]
    Socket { path: PathBuf, source: std::io::Error },
    #[error("start a thread")]
    Thread(#[source] std::io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is no table of routes; is the agent of the same version?")]
    Parse { path: PathBuf, source: serde_json::Error },
}

/// Where the process listens and looks.
pub struct Config {
    pub run_dir: PathBuf,
    pub http_port: u16,
    pub https_port: u16,
    /// `None` is one for each core.
    pub threads: Option<usize>,
    pub handover: Handover,
}

#[derive(Clone)]
struct Wanted {
    addresses: watch::Receiver<BTreeSet<IpAddr>>,
    /// Of the whole process: a thread that stopped alone would leave connections waiting in its sockets.
    phase: watch::Receiver<Phase>,
    early: Weak<()>,
    late: Weak<()>,
    ports: Ports,
    threads: usize,
    handover: Arc<Handover>,
}

impl Wanted {
    /// Where to listen, and whether TLS is spoken there.
    fn all(&mut self) -> BTreeMap<SocketAddr, bool> {
        self.ports.on(&self.addresses.borrow_and_update())
    }
}

#[derive(Clone, Copy)]
struct Ports {
    http: u16,
    https: u16,
}

impl Ports {
    fn on(self, addresses: &BTreeSet<IpAddr>) -> BTreeMap<SocketAddr, bool> {
        let ports = [(self.http, false), (self.https, true)];
        let both = |address: &IpAddr| ports.map(|(port, https)| (SocketAddr::new(*address, port), https));
        addresses.iter().flat_map(both).collect()
    }
}

/// The control socket, in a folder that root owns, and the file for keys beside it: before the rights of root are given up.
///
/// # Errors
/// The folder or the socket cannot be made.
pub fn bind(run_dir: &Path) -> Result<UnixListener, ProcessError> {
    let path = run_dir.join(FOLDER).join(SOCKET_FILE);
    let bound = folder(run_dir).and_then(|folder| {
        tickets::prepare(&folder.join(TICKETS_FILE))?;
        control::bind(&path)
    });
    bound.map_err(|source| ProcessError::Socket { path, source })
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// TLS cannot be set up, or a thread cannot start.
pub fn run(config: Config, control: UnixListener) -> Result<(), ProcessError> {
    let proxy = Proxy::new(&config.run_dir.join(FOLDER).join(TICKETS_FILE))?;
    let (addresses, wanted) = watch::channel(BTreeSet::new());
    let (phase, phases) = watch::channel(Phase::Serving);
    let (early, late) = (Arc::new(()), Arc::new(()));
    let routes = config.run_dir.join(FOLDER).join(ROUTES_FILE);
    let (ports, handover) =
        (Ports { http: config.http_port, https: config.https_port }, Arc::new(config.handover));
    let shared = handover.clone();
    let file = Mutex::new(RoutesFile::new(routes));
    let read = move |proxy: &Proxy, cut: Cut| -> Result<(), ReadError> {
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        if !file.read(cut)? {
            return Ok(());
        }
        let table = &file.table;
        proxy.apply(table);
        let named = table.addresses.iter().copied().collect();
        let all = ports.on(&named);
        shared.close_others(|address| all.contains_key(address));
        addresses.send_replace(named);
        Ok(())
    };
    if let Err(error) = read(&proxy, Cut::Ignored) {
        tracing::info!(
            error = weft_netstack::reconcile::chain(&error),
            "no routes yet; the agent writes them"
        );
    }
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = config.threads.unwrap_or_else(cores).max(1);
    let wanted = Wanted {
        addresses: wanted,
        phase: phases,
        early: Arc::downgrade(&early),
        late: Arc::downgrade(&late),
        ports,
        threads,
        handover,
    };
    let threads = start(&proxy, &wanted)?;
    let shared = proxy.clone();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            let ended = control::serve(&control, |method, path| match (method, path) {
                ("GET", "/metrics") => Response { status: 200, body: shared.metrics() },
                ("POST", "/apply") => applied(read(&shared, Cut::Refused)),
                _ => Response { status: 404, body: String::new() },
            });
            tracing::error!(?ended, "the control socket ended");
        })
        .map_err(ProcessError::Thread)?;
    until_drained(&phase, early, late).map_err(ProcessError::Thread)?;
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a thread panicked");
        }
    }
    Ok(())
}

fn applied(outcome: Result<(), ReadError>) -> Response {
    match outcome {
        Ok(()) => Response { status: 204, body: String::new() },
        Err(error) => {
            let body = weft_netstack::reconcile::chain(&error);
            tracing::warn!(error = body, "these routes are not served; the ones before stay");
            Response { status: 500, body }
        }
    }
}

/// A last line of the file that is not whole: its writer died, or writes at this moment and says so when it is done.
#[derive(Clone, Copy)]
enum Cut {
    Ignored,
    Refused,
}

/// The file of the routes and what was read of it.
struct RoutesFile {
    path: PathBuf,
    /// Kept open, so that another file is not taken for this one.
    read: Option<(File, u64)>,
    table: RouteTable,
}

impl RoutesFile {
    fn new(path: PathBuf) -> Self {
        Self { path, read: None, table: RouteTable::default() }
    }

    /// Whether the table is another than before. Of a file that has only grown, what is new is read.
    fn read(&mut self, cut: Cut) -> Result<bool, ReadError> {
        let cannot = |source| ReadError::Read { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(cannot)?;
        let found = file.metadata().map_err(cannot)?;
        let is_that = |known: &(File, u64)| {
            known.0.metadata().is_ok_and(|known| (known.dev(), known.ino()) == (found.dev(), found.ino()))
        };
        let from = self.read.take().filter(is_that).map_or(0, |(_, end)| end);
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut text)).map_err(cannot)?;
        let parsed = match from {
            0 => self.decode(&mut text, cut),
            // Each begins with the end of the line before it.
            _ => text.split(|byte| *byte == b'\n').skip(1).try_for_each(|line| self.table.change(line)),
        };
        parsed.map_err(|source| ReadError::Parse { path: self.path.clone(), source })?;
        self.read = Some((file, from + text.len() as u64));
        Ok(from == 0 || !text.is_empty())
    }

    fn decode(&mut self, text: &mut Vec<u8>, cut: Cut) -> serde_json::Result<()> {
        let mut decoded = RouteTable::decode(text);
        let last_line = text.iter().rposition(|byte| *byte == b'\n');
        if let (Err(_), Cut::Ignored, Some(last_line)) = (&decoded, cut, last_line) {
            text.truncate(last_line);
            decoded = RouteTable::decode(text);
        }
        self.table = decoded?;
        Ok(())
    }
}

fn start(proxy: &Arc<Proxy>, wanted: &Wanted) -> Result<Vec<std::thread::JoinHandle<()>>, ProcessError> {
    let start = |number: usize| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (worker, wanted) = (proxy.worker(), wanted.clone());
        std::thread::Builder::new()
            .name(format!("proxy-{number}"))
            .spawn(move || runtime.block_on(work(worker, wanted, number)))
    };
    (0..wanted.threads).map(start).collect::<std::io::Result<_>>().map_err(ProcessError::Thread)
}

/// Keeps a listener on each address that the table names; a thread's whole life.
async fn work(worker: Arc<Worker>, mut wanted: Wanted, number: usize) {
    let late = wanted.late.upgrade();
    let mut listeners: BTreeMap<SocketAddr, Listening> = BTreeMap::new();
    let mut tidy = tokio::time::interval(TIDY);
    loop {
        let all = wanted.all();
        listeners.retain(|address, _| all.contains_key(address));
        for (address, https) in all {
            listeners.entry(address).or_insert_with(|| {
                let (phase, phases) = watch::channel(Phase::Serving);
                let (early, late) = (wanted.early.clone(), wanted.late.clone());
                let life = Life { phase: phases, early, late, patience: Patience::default() };
                tokio::spawn(listen_on(worker.clone(), address, https, (wanted.clone(), number), life));
                Listening(phase)
            });
        }
        tokio::select! {
            changed = wanted.addresses.changed() => if changed.is_err() { break },
            _ = tidy.tick() => worker.tidy(),
            _ = wanted.phase.wait_for(|phase| *phase > Phase::Serving) => break,
        }
    }
    listeners.values().for_each(|listening| listening.0.send_modify(|phase| *phase = Phase::Draining));
    let _ = wanted.phase.wait_for(|phase| *phase == Phase::Ending).await;
    drop(listeners);
    // Who was accepted in the same moment is counted still.
    tokio::time::sleep(GONE_POLL).await;
    drop(late);
    tokio::join!(gone(&wanted.early, SETTLE), gone(&wanted.late, SETTLE));
}

/// Until nobody holds it, but not for longer than `patience`.
async fn gone(open: &Weak<()>, patience: Duration) {
    let idle = async {
        while open.strong_count() > 0 {
            tokio::time::sleep(GONE_POLL).await;
        }
    };
    if tokio::time::timeout(patience, idle).await.is_err() {
        tracing::warn!("{} connections were open still after {patience:?}", open.strong_count());
    }
}

/// A listener's phase; dropped, it accepts no more, and its connections end when they are idle.
struct Listening(watch::Sender<Phase>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.send_replace(Phase::Ending);
    }
}

/// Serves what was handed over for this address, or else a socket of its own.
async fn listen_on(
    worker: Arc<Worker>,
    address: SocketAddr,
    https: bool,
    (wanted, number): (Wanted, usize),
    mut life: Life,
) {
    let kept = wanted.handover.take(address, number, wanted.threads).into_iter().filter_map(|listener| {
        let ready = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
        ready
            .inspect_err(|error| tracing::warn!(%error, %address, "a socket that was kept cannot be used"))
            .ok()
    });
    let mut listeners: Vec<TcpListener> = kept.collect();
    let mut told = false;
    while listeners.is_empty() {
        match listen::bind(address) {
            Ok(listener) => {
                wanted.handover.keep(address, &listener);
                listeners.push(listener);
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, %address, "cannot listen yet");
                }
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    _ = life.phase.wait_for(|phase| *phase == Phase::Ending) => return,
                }
            }
        }
    }
    for listener in listeners {
        tokio::spawn(listen::serve(worker.clone(), listener, https, life.clone()));
    }
}

/// Waits for SIGTERM or SIGINT, then until the connections from before have ended: new ones are served meanwhile, so that nobody
/// waits for those that last. Then it is for each thread to end.
fn until_drained(phase: &watch::Sender<Phase>, early: Arc<()>, late: Arc<()>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("draining");
        phase.send_replace(Phase::Draining);
        let open = Arc::downgrade(&early);
        drop(early);
        gone(&open, DRAIN).await;
        drop(late);
        phase.send_replace(Phase::Ending);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use weft_model::NamespacedName;
    use weft_model::ingress::Bytes;
    use weft_netstack::reconcile::{Applier as _, Trust};

    use super::*;
    use crate::apply::RoutesApplier;
    use crate::plan::table::{Certificate, Host, Server};

    /// With one host, whose other name is that long.
    fn table(letter: char, bytes: usize) -> RouteTable {
        let server = Server { redirect_to: Some(letter.to_string().repeat(bytes)), ..Server::default() };
        let hosts = [(Host::Exact(format!("{letter}.example")), Arc::new(server))].into();
        RouteTable { hosts, ..RouteTable::default() }
    }

    fn read(path: &Path, cut: Cut) -> Result<RouteTable, ReadError> {
        let mut file = RoutesFile::new(path.to_owned());
        file.read(cut).map(|_| file.table)
    }

    #[tokio::test]
    async fn changes_are_lines_of_the_file_until_they_are_many_and_a_cut_one_is_none() {
        let run_dir = tempfile::tempdir().unwrap();
        let listener = bind(run_dir.path()).unwrap();
        let path = run_dir.path().join(FOLDER).join(ROUTES_FILE);
        let served = Arc::new(Mutex::new(RoutesFile::new(path.clone())));
        let file = served.clone();
        std::thread::spawn(move || {
            control::serve(&listener, |_, _| applied(file.lock().unwrap().read(Cut::Refused).map(|_| ())))
        });
        let mut applier = RoutesApplier::new(run_dir.path());
        let file = || path.metadata().map(|file| (file.ino(), file.len())).unwrap();

        assert_eq!(applier.apply(&table('a', 1), Trust::Nothing).await.failed, [""; 0]);
        let first = file();
        let applied = applier.apply(&table('b', 1), Trust::Shadow).await;
        assert!(applied.failed.is_empty() && applied.changed[0].ends_with(" bytes more"), "{applied:?}");
        assert!(file().0 == first.0 && file().1 > first.1, "the file has grown");
        assert_eq!(served.lock().unwrap().table, table('b', 1));
        assert_eq!(read(&path, Cut::Refused).unwrap(), table('b', 1));
        assert_eq!(applier.apply(&table('b', 1), Trust::Nothing).await.changed, [""; 0], "it holds that");

        let mut other = File::options().append(true).open(&path).unwrap();
        other.write_all(b"\n{\"table\":{\"addr").unwrap();
        assert_eq!(read(&path, Cut::Ignored).unwrap(), table('b', 1), "whoever wrote it died");
        assert!(matches!(read(&path, Cut::Refused), Err(ReadError::Parse { .. })));
        let before = file();
        assert_eq!(applier.apply(&table('c', 1), Trust::Shadow).await.failed, [""; 0]);
        assert!(
            file().0 != before.0 && file().1 < before.1,
            "written whole, since somebody else wrote to it"
        );
        assert_eq!(served.lock().unwrap().table, table('c', 1));

        let (before, mut lengths) = (file(), Vec::new());
        while file().0 == before.0 {
            let letter = ['d', 'e'][lengths.len() % 2];
            assert_eq!(applier.apply(&table(letter, 100_000), Trust::Shadow).await.failed, [""; 0]);
            assert_eq!(served.lock().unwrap().table, table(letter, 100_000));
            lengths.push(file().1);
        }
        assert_eq!(lengths.len(), 11, "ten lines of a tenth of a mebibyte, then the whole: {lengths:?}");
    }

    #[tokio::test]
    async fn a_process_that_takes_no_lines_gets_the_whole_table() {
        let run_dir = tempfile::tempdir().unwrap();
        let listener = bind(run_dir.path()).unwrap();
        let path = run_dir.path().join(FOLDER).join(ROUTES_FILE);
        let read = path.clone();
        std::thread::spawn(move || {
            control::serve(&listener, |_, _| {
                let text = std::fs::read(&read).unwrap();
                Response { status: if text.contains(&b'\n') { 500 } else { 204 }, body: String::new() }
            })
        });
        let mut applier = RoutesApplier::new(run_dir.path());
        let mut apply = async |letter, trust| applier.apply(&table(letter, 1), trust).await.failed.len();
        assert_eq!(apply('a', Trust::Nothing).await, 0);
        assert_eq!((apply('b', Trust::Shadow).await, apply('b', Trust::Nothing).await), (1, 0));
        assert_eq!(RouteTable::decode(&std::fs::read(&path).unwrap()).unwrap(), table('b', 1));
    }

    #[tokio::test]
    async fn a_key_that_is_withdrawn_does_not_stay_in_the_file() {
        let run_dir = tempfile::tempdir().unwrap();
        let listener = bind(run_dir.path()).unwrap();
        std::thread::spawn(move || control::serve(&listener, |_, _| applied(Ok(()))));
        let mut applier = RoutesApplier::new(run_dir.path());
        let path = run_dir.path().join(FOLDER).join(ROUTES_FILE);
        let mut holds = async |table: &RouteTable| {
            assert_eq!(applier.apply(table, Trust::Shadow).await.failed, [""; 0]);
            let text = std::fs::read_to_string(&path).unwrap();
            // "first" and "second" in Base64.
            ["Zmlyc3Q", "c2Vjb25k"].map(|key| text.contains(key))
        };
        let mut table = table('a', 1);
        let certificate = |key: &str| Certificate {
            secret: NamespacedName::new("d", "tls"),
            chain_pem: Bytes(b"chain".to_vec()),
            key_pem: Bytes(key.as_bytes().to_vec()),
        };
        assert_eq!(holds(&table).await, [false, false]);
        table.certificates.insert("a.example".to_owned(), certificate("first").into());
        assert_eq!(holds(&table).await, [true, false]);
        table.certificates.insert("a.example".to_owned(), certificate("second").into());
        assert_eq!(holds(&table).await, [false, true]);
        table.default_certificate = table.certificates.remove("a.example");
        assert_eq!(holds(&table).await, [false, true]);
        table.default_certificate = None;
        assert_eq!(holds(&table).await, [false, false]);
    }

    #[test]
    fn a_file_that_cannot_be_read_changes_nothing_and_the_next_is_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ROUTES_FILE);
        let mut file = RoutesFile::new(path.clone());
        assert!(matches!(file.read(Cut::Refused), Err(ReadError::Read { .. })));
        std::fs::write(&path, table('a', 1).encode().unwrap()).unwrap();
        assert!(file.read(Cut::Refused).unwrap() && !file.read(Cut::Refused).unwrap());
        let line = table('b', 1).encode_change(&table('a', 1)).unwrap().unwrap();
        let append = |text: &[u8]| File::options().append(true).open(&path).unwrap().write_all(text).unwrap();
        append(b"\n{}");
        assert!(file.read(Cut::Refused).is_err());
        assert_eq!(file.table, table('a', 1));
        std::fs::write(&path, [table('c', 1).encode().unwrap(), line].concat()).unwrap();
        assert!(file.read(Cut::Refused).unwrap());
        assert_eq!(file.table.hosts.len(), 2, "the line takes a.example away, which is not there");
    }
}
