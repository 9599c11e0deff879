//! The process `weft ingress serve`: threads, listeners on the addresses of the table, and a word of the agent on a socket.
//!
//! In: `ingress/routes.json` in the run directory, at the start and after each `POST /apply` on `ingress/ingress.sock`. A file
//! that cannot be read changes nothing. Out: answers. SIGTERM: no new connections, those that are open end when they are idle.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use weft_netstack::control::{self, Response};

use super::{Proxy, TlsError, Worker, listen};
use crate::apply::{FOLDER, ROUTES_FILE, SOCKET_FILE, folder};
use crate::plan::table::RouteTable;

/// For how long open connections may go on after SIGTERM. The next process listens only afterwards.
const DRAIN: Duration = Duration::from_secs(10);
/// Between two tries to listen on an address that is not there yet.
const RETRY: Duration = Duration::from_secs(1);
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
}

#[derive(Clone)]
struct Wanted {
    addresses: watch::Receiver<BTreeSet<IpAddr>>,
    stop: watch::Receiver<bool>,
    http_port: u16,
    https_port: u16,
}

/// The control socket, in a folder that root owns: bound before the rights of root are given up.
///
/// # Errors
/// The folder or the socket cannot be made.
pub fn bind(run_dir: &Path) -> Result<UnixListener, ProcessError> {
    let path = run_dir.join(FOLDER).join(SOCKET_FILE);
    folder(run_dir).and_then(|_| control::bind(&path)).map_err(|source| ProcessError::Socket { path, source })
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// TLS cannot be set up, or a thread cannot start.
pub fn run(config: &Config, control: UnixListener) -> Result<(), ProcessError> {
    let proxy = Proxy::new()?;
    let (addresses, wanted) = watch::channel(BTreeSet::new());
    let (stop, stopped) = watch::channel(false);
    let routes = config.run_dir.join(FOLDER).join(ROUTES_FILE);
    let read = move |proxy: &Proxy| -> Result<(), ReadError> {
        let table = read(&routes)?;
        proxy.apply(&table);
        addresses.send_replace(table.addresses.iter().copied().collect());
        Ok(())
    };
    if let Err(error) = read(&proxy) {
        tracing::info!(
            error = weft_netstack::reconcile::chain(&error),
            "no routes yet; the agent writes them"
        );
    }
    let wanted = Wanted {
        addresses: wanted,
        stop: stopped,
        http_port: config.http_port,
        https_port: config.https_port,
    };
    let threads = threads(config, &proxy, &wanted)?;
    let shared = proxy.clone();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            let ended = control::serve(&control, |method, path| respond(method, path, || read(&shared)));
            tracing::error!(?ended, "the control socket ended");
        })
        .map_err(ProcessError::Thread)?;
    await_signal().map_err(ProcessError::Thread)?;
    tracing::info!("draining");
    stop.send_replace(true);
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a thread panicked");
        }
    }
    Ok(())
}

fn respond(method: &str, path: &str, read: impl Fn() -> Result<(), ReadError>) -> Response {
    match (method, path) {
        ("POST", "/apply") => match read() {
            Ok(()) => Response { status: 204, body: String::new() },
            Err(error) => {
                let body = weft_netstack::reconcile::chain(&error);
                tracing::warn!(error = body, "these routes are not served; the ones before stay");
                Response { status: 500, body }
            }
        },
        _ => Response { status: 404, body: String::new() },
    }
}

fn read(path: &Path) -> Result<RouteTable, ReadError> {
    let text = std::fs::read(path).map_err(|source| ReadError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| ReadError::Parse { path: path.to_owned(), source })
}

fn threads(
    config: &Config,
    proxy: &Arc<Proxy>,
    wanted: &Wanted,
) -> Result<Vec<std::thread::JoinHandle<()>>, ProcessError> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let count = config.threads.unwrap_or_else(cores).max(1);
    let start = |number: usize| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (worker, wanted) = (proxy.worker(), wanted.clone());
        std::thread::Builder::new()
            .name(format!("proxy-{number}"))
            .spawn(move || runtime.block_on(work(worker, wanted)))
    };
    (0..count).map(start).collect::<std::io::Result<_>>().map_err(ProcessError::Thread)
}

/// Keeps a listener on each address that the table names; a thread's whole life.
async fn work(worker: Arc<Worker>, mut wanted: Wanted) {
    let mut listeners: BTreeMap<SocketAddr, Listening> = BTreeMap::new();
    let mut tidy = tokio::time::interval(TIDY);
    loop {
        let addresses = wanted.addresses.borrow_and_update().clone();
        let ports = [(wanted.http_port, false), (wanted.https_port, true)];
        let all: BTreeMap<SocketAddr, bool> = addresses
            .iter()
            .flat_map(|address| ports.map(|(port, https)| (SocketAddr::new(*address, port), https)))
            .collect();
        listeners.retain(|address, _| all.contains_key(address));
        for (address, https) in all {
            listeners.entry(address).or_insert_with(|| Listening::start(worker.clone(), address, https));
        }
        tokio::select! {
            changed = wanted.addresses.changed() => if changed.is_err() { break },
            _ = tidy.tick() => worker.tidy(),
            _ = wanted.stop.wait_for(|stop| *stop) => break,
        }
    }
    drop(listeners);
    drain(&worker).await;
}

/// Ends when only this reference is left: each connection holds one.
async fn drain(worker: &Arc<Worker>) {
    let idle = async {
        while Arc::strong_count(worker) > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(DRAIN, idle).await.is_err() {
        tracing::warn!("connections were open still after {DRAIN:?}");
    }
}

/// One listening socket; dropped, it accepts no more, and its connections end when they are idle.
struct Listening {
    stop: watch::Sender<bool>,
    _task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl Listening {
    fn start(worker: Arc<Worker>, address: SocketAddr, https: bool) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut told = false;
            let listener = loop {
                match listen::bind(address) {
                    Ok(listener) => break listener,
                    Err(error) if !told => {
                        tracing::warn!(%error, %address, "cannot listen yet");
                        told = true;
                    }
                    Err(_) => {}
                }
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
            };
            listen::serve(worker, listener, https, stopped).await;
        });
        Self { stop, _task: task }
    }
}

fn await_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        Ok(())
    })
}
