//! The connection to the API server: from a kubeconfig, or from a server address with a token and CA file. Token files are
//! read anew by the `kube` crate when they rotate.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{AuthInfo, Config, KubeConfigOptions, Kubeconfig};

/// A list that stalls is given up after this long; longer than any watch is silent (`watch::WATCH_SECONDS`).
const SILENCE: Duration = Duration::from_secs(130);

/// How the API server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Kubeconfig(PathBuf),
    /// In-cluster style: `https://ADDRESS:PORT` with a bearer token file (rotated by the kubelet) and a CA bundle.
    Server {
        url: String,
        token_file: Option<PathBuf>,
        ca_file: Option<PathBuf>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("kubeconfig {path}")]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: kube::config::KubeconfigError,
    },
    #[error("API server address {url:?} is not a URL such as https://192.0.2.1:6443")]
    Url { url: String },
    #[error("file {path} cannot be read")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("API client")]
    Client(#[source] kube::Error),
}

/// Opens no connection yet: the first request does.
pub async fn client(endpoint: &Endpoint) -> Result<kube::Client, ClientError> {
    let mut config = match endpoint {
        Endpoint::Kubeconfig(path) => kubeconfig(path.clone()).await?,
        Endpoint::Server { url, token_file, ca_file } => server(url, token_file.as_ref(), ca_file.clone())?,
    };
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    kube::Client::try_from(config).map_err(ClientError::Client)
}

async fn kubeconfig(path: PathBuf) -> Result<Config, ClientError> {
    let read = Kubeconfig::read_from(&path);
    let loaded = match read {
        Ok(read) => Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await,
        Err(error) => Err(error),
    };
    loaded.map_err(|source| ClientError::Kubeconfig { path, source })
}

fn server(url: &str, token_file: Option<&PathBuf>, ca_file: Option<PathBuf>) -> Result<Config, ClientError> {
    let mut config = Config::new(url.parse().map_err(|_| ClientError::Url { url: url.to_owned() })?);
    for path in token_file.into_iter().chain(&ca_file) {
        std::fs::metadata(path).map_err(|source| ClientError::File { path: path.clone(), source })?;
    }
    config.root_cert_file = ca_file;
    config.auth_info =
        AuthInfo { token_file: token_file.map(|path| path.display().to_string()), ..AuthInfo::default() };
    Ok(config)
}
