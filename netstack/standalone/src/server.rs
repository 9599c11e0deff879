//! Putting it together: store, controllers, TLS and listeners of one server. In: a [`Config`]. Out: a running [`Server`].

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::admission::Policy;
use crate::api::{self, Api};
use crate::auth::{Identity, Verifier};
use crate::controllers::{self, Settings};
use crate::status::ApiError;
use crate::store::{HISTORY_CAPACITY, Store, StoreError};
use crate::tls::{self, TlsError};

/// A client that has not finished its TLS handshake or its request head by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything a server is told.
#[derive(Debug)]
pub struct Config {
    /// Holds `store/`, `ca.crt`, `ca.key`, `admin.token`.
    pub data_dir: PathBuf,
    /// Bound or inherited sockets, at least one.
    pub listeners: Vec<TcpListener>,
    /// Addresses of the `kubernetes` Service's endpoints, at most one a family.
    pub advertise_addresses: Vec<IpAddr>,
    /// Port of those endpoints; `None` for the first listener's.
    pub advertise_port: Option<u16>,
    /// Ranges that nodes get pod ranges from, at most one a family; none for no allocation.
    pub cluster_cidrs: Vec<IpNet>,
    /// Prefix length of a node's pod range (`--node-cidr-mask-size-ipv4`, `-ipv6`).
    pub node_prefix_v4: u8,
    pub node_prefix_v6: u8,
    /// Ranges of ClusterIPs, at most one a family; the first is the default family.
    pub service_cidrs: Vec<IpNet>,
    /// More names and addresses for the server certificate.
    pub tls_names: Vec<String>,
    /// Tokens beside the admin's.
    pub tokens: Vec<(String, Identity)>,
    /// Changes a watch can fall behind.
    pub history_capacity: usize,
}

impl Config {
    /// The defaults, with a data directory and sockets.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>, listeners: Vec<TcpListener>) -> Self {
        Self {
            data_dir: data_dir.into(),
            listeners,
            advertise_addresses: Vec::new(),
            advertise_port: None,
            cluster_cidrs: Vec::new(),
            node_prefix_v4: 24,
            node_prefix_v6: 64,
            service_cidrs: Vec::new(),
            tls_names: Vec::new(),
            tokens: Vec::new(),
            history_capacity: HISTORY_CAPACITY,
        }
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("data directory {path}")]
    DataDirectory {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("a listening socket")]
    Listener(#[source] io::Error),
    #[error("no address to listen on")]
    NoListener,
    #[error("range {range}: at most one a family")]
    SecondRange { range: IpNet },
    #[error("preparing the first objects")]
    Foundations(#[source] ApiError),
}

/// A running server; ends when dropped (uncleanly: see [`Server::shutdown`]).
#[derive(Debug)]
pub struct Server {
    store: Arc<Store>,
    addresses: Vec<SocketAddr>,
    ca_pem: String,
    admin_token: String,
    tasks: JoinSet<()>,
}

impl Server {
    /// Opens the store, makes what every cluster has, and begins to answer.
    ///
    /// # Errors
    /// See [`Error`]; nothing listens then.
    pub fn start(config: Config) -> Result<Self, Error> {
        check_families(&config.cluster_cidrs)?;
        check_families(&config.service_cidrs)?;
        make_directory(&config.data_dir)?;
        let addresses: Vec<SocketAddr> = config
            .listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()
            .map_err(Error::Listener)?;
        let settings = settings(&config, &addresses)?;
        let tls = tls::prepare(&config.data_dir, &certificate_names(&config, &addresses, &settings))?;
        let admin_token = admin_token(&config.data_dir)?;
        let mut verifier = Verifier::default();
        verifier.insert(&admin_token, Identity::admin("system:admin"));
        for (token, identity) in config.tokens {
            verifier.insert(&token, identity);
        }
        let store = Arc::new(Store::open(&config.data_dir.join("store"), config.history_capacity)?);
        controllers::ensure_foundations(&store, &settings).map_err(Error::Foundations)?;
        let policy = settings.policy.clone();
        let router = api::router(Arc::new(Api { store: store.clone(), policy, verifier }));
        let mut tasks = JoinSet::new();
        tasks.spawn(controllers::run(store.clone(), settings));
        for listener in config.listeners {
            listener.set_nonblocking(true).map_err(Error::Listener)?;
            let listener = tokio::net::TcpListener::from_std(listener).map_err(Error::Listener)?;
            tasks.spawn(accept(listener, TlsAcceptor::from(tls.config.clone()), router.clone()));
        }
        Ok(Self { store, addresses, ca_pem: tls.ca_pem, admin_token, tasks })
    }

    /// The addresses it listens on, in the order of the listeners.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The CA certificate, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The bearer token of `system:masters`.
    #[must_use]
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// A kubeconfig (YAML) for a token, with the CA inside.
    #[must_use]
    pub fn kubeconfig(&self, server: SocketAddr, token: &str) -> String {
        kubeconfig(server, &self.ca_pem, token)
    }

    /// Writes [`Server::kubeconfig`] to a file that only its owner reads, atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_kubeconfig(&self, path: &Path, server: SocketAddr, token: &str) -> Result<(), TlsError> {
        tls::write_private(path, &self.kubeconfig(server, token))
    }

    /// Waits until a part of the server ends, which none does by itself.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }

    /// Ends cleanly: connections are cut, everything is on disk, watches can resume after the next start.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn shutdown(mut self) -> Result<(), StoreError> {
        self.tasks.shutdown().await;
        let store = self.store;
        tokio::task::spawn_blocking(move || store.close()).await.unwrap_or(Ok(()))
    }
}

/// Runs a server until the future is dropped or a part of it fails.
///
/// # Errors
/// When it cannot start.
pub async fn serve(config: Config) -> Result<(), Error> {
    Server::start(config)?.ended().await;
    Ok(())
}

fn check_families(ranges: &[IpNet]) -> Result<(), Error> {
    for (index, range) in ranges.iter().enumerate() {
        if ranges[..index].iter().any(|it| it.addr().is_ipv4() == range.addr().is_ipv4()) {
            return Err(Error::SecondRange { range: *range });
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path)
        .map_err(|source| Error::DataDirectory { path: path.display().to_string(), source })
}

fn settings(config: &Config, addresses: &[SocketAddr]) -> Result<Settings, Error> {
    let first = addresses.first().ok_or(Error::NoListener)?;
    let node_ranges = config
        .cluster_cidrs
        .iter()
        .map(|it| (it.trunc(), controllers::node_prefix(it, config.node_prefix_v4, config.node_prefix_v6)))
        .collect();
    let mut advertise = config.advertise_addresses.clone();
    if advertise.is_empty() {
        let reachable = |it: &&SocketAddr| !it.ip().is_unspecified() && !it.ip().is_loopback();
        advertise.extend(addresses.iter().filter(reachable).map(SocketAddr::ip).take(1));
    }
    Ok(Settings {
        policy: Policy { service_cidrs: config.service_cidrs.iter().map(IpNet::trunc).collect() },
        node_ranges,
        advertise,
        advertise_port: config.advertise_port.unwrap_or(first.port()),
    })
}

fn certificate_names(config: &Config, addresses: &[SocketAddr], settings: &Settings) -> Vec<String> {
    let mut all: Vec<IpAddr> = addresses.iter().map(SocketAddr::ip).collect();
    all.extend(&settings.advertise);
    all.extend(settings.policy.service_cidrs.iter().filter_map(controllers::first_address));
    let mut names = tls::default_names(&all);
    names.extend(config.tls_names.iter().cloned());
    names
}

/// The token is made once and kept, so that a kubeconfig outlives a restart.
fn admin_token(directory: &Path) -> Result<String, Error> {
    let path = directory.join("admin.token");
    if let Ok(token) = std::fs::read_to_string(&path)
        && !token.trim().is_empty()
    {
        return Ok(token.trim().to_owned());
    }
    let token = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
    tls::write_private(&path, &token)?;
    Ok(token)
}

fn kubeconfig(server: SocketAddr, ca_pem: &str, token: &str) -> String {
    let ca = base64::engine::general_purpose::STANDARD.encode(ca_pem);
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: weft\n  cluster:\n    server: https://{server}\n    \
         certificate-authority-data: {ca}\nusers:\n- name: weft\n  user:\n    token: {token}\ncontexts:\n- name: weft\n  \
         context:\n    cluster: weft\n    user: weft\ncurrent-context: weft\n"
    )
}

/// Accepts connections for ever; they end with this task.
async fn accept(listener: tokio::net::TcpListener, acceptor: TlsAcceptor, router: axum::Router) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, acceptor.clone(), router.clone()));
                }
                Err(error) => {
                    // Out of descriptors, most likely: closing connections will mend it.
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: tokio::net::TcpStream, acceptor: TlsAcceptor, router: axum::Router) {
    // Watch events are small and wanted at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "setting TCP_NODELAY");
    }
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake"),
        Err(_) => return tracing::debug!("TLS handshake timed out"),
    };
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HANDSHAKE_TIMEOUT);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection");
    }
}
