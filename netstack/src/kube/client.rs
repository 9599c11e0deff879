//! The connection to the API server: from a kubeconfig, or from a server address with a token and CA file.
//!
//! The `kube` crate reads token and CA files anew about once a minute, which is enough while the old ones still hold. After a
//! refusal [`Access`] looks at the files itself and makes a new client when one was replaced, so that a mended file is
//! taken at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use kube::config::{AuthInfo, Config, KubeConfigOptions, Kubeconfig};
use tokio::sync::Mutex;

use super::failure::{Address, ApiFailure, one_line};
use crate::reconcile::chain;

/// A server that has moved or come back is tried anew, rather than waited for through TCP's growing retransmission gaps.
const CONNECT: Duration = Duration::from_secs(3);
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
    #[error("kubeconfig {path} cannot be used ({reason}); correct it or give --kubeconfig another file")]
    Kubeconfig { path: PathBuf, reason: String },
    #[error("--api-server {url:?} is not a URL such as https://192.0.2.1:6443")]
    Url { url: String },
    #[error("{flag} {path} cannot be read; put {content} there, or give {flag} another file")]
    File {
        flag: &'static str,
        path: PathBuf,
        content: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{flag} {path} holds no {content}; put it there, or give {flag} another file")]
    Content { flag: &'static str, path: PathBuf, content: &'static str },
    #[error("the API client cannot be made")]
    Client(#[source] kube::Error),
}

/// The way to the API server: always the client that fits the files of now. Shared by all that speak to the server.
pub struct Access {
    endpoint: Endpoint,
    current: ArcSwap<Made>,
    /// One look at the files at a time.
    renewing: Mutex<()>,
}

struct Made {
    client: kube::Client,
    address: Address,
    files: Files,
}

/// A client, and what tells it from a later one.
#[derive(Clone)]
pub struct Current {
    pub client: kube::Client,
    made: Arc<Made>,
}

/// Contents of every file that a client was made from; `None` for one that could not be read.
type Files = Vec<(PathBuf, Option<Vec<u8>>)>;

impl Access {
    /// Opens no connection yet: the first request does.
    ///
    /// # Errors
    /// A file that is missing or cannot be used; one line with the remedy.
    pub async fn open(endpoint: Endpoint) -> Result<Self, ClientError> {
        let made = Made::of(&endpoint).await?;
        Ok(Self { endpoint, current: ArcSwap::from_pointee(made), renewing: Mutex::default() })
    }

    pub fn current(&self) -> Current {
        let made = self.current.load_full();
        Current { client: made.client.clone(), made }
    }

    /// The server with its files, for sentences.
    pub fn address(&self) -> Address {
        self.current.load().address.clone()
    }

    /// What `ask` answers with the client of now. After a failure the next call has another client, when a file that may mend
    /// it was replaced.
    pub async fn ask<T, F>(&self, ask: impl FnOnce(kube::Client) -> F) -> Result<T, ApiFailure>
    where
        F: Future<Output = Result<T, kube::Error>>,
    {
        let used = self.current();
        match ask(used.client.clone()).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                let failure = ApiFailure::of(&error);
                self.is_renewed(&used, &failure).await;
                Err(failure)
            }
        }
    }

    /// Asked after a failure of `used`: true when there is another client by now, because a file that may mend it was
    /// replaced. Files that cannot be used (yet) change nothing. A silent server is waited for with the client at hand,
    /// whatever rotated meanwhile: watches resume on it, and need not list anew.
    pub(super) async fn is_renewed(&self, used: &Current, failure: &ApiFailure) -> bool {
        let of_kubeconfig = matches!(self.endpoint, Endpoint::Kubeconfig(_));
        if !of_kubeconfig && matches!(failure, ApiFailure::Unreachable(_) | ApiFailure::Refused(_)) {
            return false;
        }
        let _one_at_a_time = self.renewing.lock().await;
        let current = self.current.load_full();
        if files(&self.endpoint) != current.files {
            match Made::of(&self.endpoint).await {
                Ok(made) => {
                    tracing::info!(server = %made.address, "credentials were replaced: connecting anew");
                    self.current.store(Arc::new(made));
                }
                Err(error) => tracing::debug!(error = chain(&error), "replaced credentials cannot be used"),
            }
        }
        !Arc::ptr_eq(&used.made, &self.current.load_full())
    }
}

impl Made {
    /// The files are read before they are used: one that changes in between is seen at the next look.
    async fn of(endpoint: &Endpoint) -> Result<Self, ClientError> {
        let files = files(endpoint);
        let mut config = match endpoint {
            Endpoint::Kubeconfig(path) => kubeconfig(path).await?,
            Endpoint::Server { url, token_file, ca_file } => {
                server(url, token_file.as_deref(), ca_file.as_deref())?
            }
        };
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(SILENCE);
        config.reset_reader_on_write = true;
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let client = kube::Client::try_from(config).map_err(|error| refused(endpoint, error))?;
        Ok(Self { client, address: Address { url, endpoint: endpoint.clone() }, files })
    }
}

/// What the client refuses of a server's files is the CA; of a kubeconfig it may be anything.
fn refused(endpoint: &Endpoint, error: kube::Error) -> ClientError {
    match (endpoint, error) {
        (Endpoint::Kubeconfig(path), error) => {
            ClientError::Kubeconfig { path: path.clone(), reason: one_line(&error.to_string()) }
        }
        (Endpoint::Server { ca_file: Some(path), .. }, kube::Error::RustlsTls(_)) => {
            ClientError::Content { flag: "--ca-file", path: path.clone(), content: CA }
        }
        (_, error) => ClientError::Client(error),
    }
}

const TOKEN: &str = "bearer token";
const CA: &str = "CA certificate (PEM)";

async fn kubeconfig(path: &Path) -> Result<Config, ClientError> {
    let read = Kubeconfig::read_from(path);
    let loaded = match read {
        Ok(read) => Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await,
        Err(error) => Err(error),
    };
    // The library's texts hold their causes already, and a parser's go on with the lines around the place.
    let first_line = |error: kube::config::KubeconfigError| {
        one_line(error.to_string().lines().next().unwrap_or("unreadable"))
    };
    loaded.map_err(|error| ClientError::Kubeconfig { path: path.to_owned(), reason: first_line(error) })
}

fn server(url: &str, token_file: Option<&Path>, ca_file: Option<&Path>) -> Result<Config, ClientError> {
    let mut config = Config::new(url.parse().map_err(|_| ClientError::Url { url: url.to_owned() })?);
    if let Some(path) = ca_file {
        readable("--ca-file", path, CA)?;
    }
    config.root_cert_file = ca_file.map(Path::to_owned);
    if let Some(path) = token_file {
        config.auth_info = token(path)?;
    }
    Ok(config)
}

/// The library reads a token file anew as it rotates, but takes its content as it is; one that ends in a line break, as
/// hand-written ones do, is given as text instead and taken anew after a refusal only.
fn token(path: &Path) -> Result<AuthInfo, ClientError> {
    let text = readable("--token-file", path, TOKEN)?;
    match text.trim() {
        "" => Err(ClientError::Content { flag: "--token-file", path: path.to_owned(), content: TOKEN }),
        trimmed if trimmed == text => {
            Ok(AuthInfo { token_file: Some(path.display().to_string()), ..AuthInfo::default() })
        }
        trimmed => Ok(AuthInfo { token: Some(trimmed.to_owned().into()), ..AuthInfo::default() }),
    }
}

fn readable(flag: &'static str, path: &Path, content: &'static str) -> Result<String, ClientError> {
    std::fs::read_to_string(path).map_err(|source| ClientError::File {
        flag,
        path: path.to_owned(),
        content,
        source,
    })
}

fn files(endpoint: &Endpoint) -> Files {
    let paths: Vec<PathBuf> = match endpoint {
        Endpoint::Kubeconfig(path) => std::iter::once(path.clone()).chain(named_in(path)).collect(),
        Endpoint::Server { token_file, ca_file, .. } => token_file.iter().chain(ca_file).cloned().collect(),
    };
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).ok())).collect()
}

/// Files that a kubeconfig refers to.
fn named_in(path: &Path) -> Vec<PathBuf> {
    let Ok(read) = Kubeconfig::read_from(path) else { return Vec::new() };
    let clusters = read.clusters.into_iter().filter_map(|named| named.cluster?.certificate_authority);
    let users = read.auth_infos.into_iter().filter_map(|named| named.auth_info);
    let of_users = users.flat_map(|user| [user.client_certificate, user.client_key, user.token_file]);
    clusters.chain(of_users.flatten()).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Self-signed, of no use but to be parsed.
    const CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUDlVZfBSQn9r8tzlGDRFWb8S+g88wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjEwNDQ5MzNaGA8yMTI2MTAyODA0NDkz
M1owDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKFy
NXMxPldcaO7m3cJxhGEUmeGL/l52AGS1+6wapLpcx/aNv2q3r9ZhW6lYkOXiaw4I
+nEcUocDynmPrMvIpsGjUzBRMB0GA1UdDgQWBBTzJoME5L6WCb/lBNHI2/bNxuSi
vjAfBgNVHSMEGDAWgBTzJoME5L6WCb/lBNHI2/bNxuSivjAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQC7E8PYwaBjp7h8ocHvKhOqpgjCCG6J7u0i
di6I/YZ08QIgJcNuLuhplCTmvVc/yyZq1pqRW0CBr/hB22YLv0S51ck=
-----END CERTIFICATE-----
";

    #[tokio::test]
    async fn a_client_with_ca_and_token_files_speaks_tls() {
        let folder = tempfile::tempdir().unwrap();
        let (ca_file, token_file) = (folder.path().join("ca.crt"), folder.path().join("token"));
        std::fs::write(&ca_file, CA).unwrap();
        std::fs::write(&token_file, "secret").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let endpoint = Endpoint::Server { url, token_file: Some(token_file), ca_file: Some(ca_file) };
        let client = Access::open(endpoint).await.unwrap().current().client;
        let request = async { client.apiserver_version().await.map(|_| ()) };
        let first_byte = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut byte = [0];
            stream.readable().await.unwrap();
            stream.try_read(&mut byte).unwrap();
            byte[0]
        };
        let (refused, byte) = tokio::join!(request, first_byte);
        assert_eq!(byte, 22, "a TLS handshake record");
        assert!(refused.is_err(), "the server hung up");
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_named_on_one_line_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let server = |token_file: Option<PathBuf>, ca_file: Option<PathBuf>| Endpoint::Server {
            url: "https://192.0.2.1:6443".to_owned(),
            token_file,
            ca_file,
        };
        let (empty, garbage) = (file("empty", "\n"), file("garbage", "-----BEGIN\n: {"));
        let no_context = file("no-context", "apiVersion: v1\nkind: Config\nclusters: []\n");
        let url = Endpoint::Server { url: "not a url".to_owned(), token_file: None, ca_file: None };
        let cases = [
            (url, vec!["--api-server \"not a url\"", "https://192.0.2.1:6443"]),
            (
                server(None, Some("/nowhere/ca.crt".into())),
                vec![
                    "--ca-file /nowhere/ca.crt cannot be read",
                    "put CA certificate (PEM) there",
                    "No such file",
                ],
            ),
            (
                server(Some("/nowhere/token".into()), None),
                vec!["--token-file /nowhere/token cannot be read", "bearer token", "No such file"],
            ),
            (server(Some(empty.clone()), None), vec!["--token-file", "empty holds no bearer token"]),
            (server(None, Some(garbage.clone())), vec!["--ca-file", "garbage holds no CA certificate"]),
            (
                Endpoint::Kubeconfig("/nowhere/config".into()),
                vec!["kubeconfig /nowhere/config", "No such file"],
            ),
            (Endpoint::Kubeconfig(garbage), vec!["garbage cannot be used", "--kubeconfig"]),
            (Endpoint::Kubeconfig(no_context), vec!["no-context cannot be used", "context"]),
        ];
        for (endpoint, parts) in cases {
            let said = chain(&Access::open(endpoint).await.err().unwrap());
            assert!(
                !said.contains('\n') && parts.iter().all(|part| said.contains(part)),
                "{said} lacks one of {parts:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_client_is_made_anew_only_when_a_file_changed_and_can_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let token_file = folder.path().join("token");
        std::fs::write(&token_file, "one").unwrap();
        let url = "http://192.0.2.1:6443".to_owned();
        let access =
            Access::open(Endpoint::Server { url, token_file: Some(token_file.clone()), ca_file: None });
        let access = access.await.unwrap();
        let used = access.current();
        let refused = ApiFailure::Unauthenticated(String::new());
        assert!(!access.is_renewed(&used, &refused).await);
        std::fs::write(&token_file, "").unwrap();
        assert!(!access.is_renewed(&used, &refused).await);
        std::fs::write(&token_file, "two").unwrap();
        assert!(!access.is_renewed(&used, &ApiFailure::Unreachable(String::new())).await);
        assert!(access.is_renewed(&used, &refused).await);
        assert!(access.is_renewed(&used, &refused).await, "for every watch that used it");
        assert!(!access.is_renewed(&access.current(), &refused).await);
    }
}
