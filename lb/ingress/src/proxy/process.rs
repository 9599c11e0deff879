//! The process `weft ingress serve`: threads, listeners on the addresses of the table, and a word of the agent on a socket.
//!
//! In: `ingress/routes.json` in the run directory, at the start and after each `POST /apply` on `ingress/ingress.sock`. A file
//! that cannot be read changes nothing. Out: answers; `GET /metrics` on the socket. SIGTERM: connections that are open end when they are idle, then the process;
//! its sockets go to the next one, where the service manager keeps them ([`Handover`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
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
    let read = move |proxy: &Proxy| -> Result<(), ReadError> {
        let table = read(&routes)?;
        proxy.apply(&table);
        let named = table.addresses.iter().copied().collect();
        let all = ports.on(&named);
        shared.close_others(|address| all.contains_key(address));
        addresses.send_replace(named);
        Ok(())
    };
    if let Err(error) = read(&proxy) {
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
                ("POST", "/apply") => applied(read(&shared)),
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

fn read(path: &Path) -> Result<RouteTable, ReadError> {
    let text = std::fs::read(path).map_err(|source| ReadError::Read { path: path.to_owned(), source })?;
    RouteTable::decode(&text).map_err(|source| ReadError::Parse { path: path.to_owned(), source })
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
