//! The connection to the API server: from a kubeconfig, or from a server address with a token and CA file. Token files are
//! read anew by the `kube` crate when they rotate.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{AuthInfo, Config, KubeConfigOptions, Kubeconfig};

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
    /// `kubectl create token` prints a line; the request's header must not hold its end.
    #[error("the token in {path} holds a blank or a line end; write it without: tr -d '\\n'")]
    Token { path: PathBuf },
    #[error("API client")]
    Client(#[source] kube::Error),
}

/// Opens no connection yet: the first request does.
pub async fn client(endpoint: &Endpoint) -> Result<kube::Client, ClientError> {
    let mut config = match endpoint {
        Endpoint::Kubeconfig(path) => kubeconfig(path.clone()).await?,
        Endpoint::Server { url, token_file, ca_file } => server(url, token_file.as_ref(), ca_file.clone())?,
    };
    config.connect_timeout = Some(CONNECT);
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
    if let Some(path) = token_file {
        let token = std::fs::read(path).map_err(|source| ClientError::File { path: path.clone(), source })?;
        if !token.iter().all(u8::is_ascii_graphic) {
            return Err(ClientError::Token { path: path.clone() });
        }
    }
    config.root_cert_file = ca_file;
    config.auth_info =
        AuthInfo { token_file: token_file.map(|path| path.display().to_string()), ..AuthInfo::default() };
    Ok(config)
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
        let client = client(&endpoint).await.unwrap();
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
    async fn what_cannot_be_used_is_named() {
        let server = |url: &str, ca_file: Option<&str>| Endpoint::Server {
            url: url.to_owned(),
            token_file: None,
            ca_file: ca_file.map(PathBuf::from),
        };
        let error = |endpoint: Endpoint| async move { client(&endpoint).await.err().unwrap().to_string() };
        assert!(error(server("not a url", None)).await.contains("is not a URL"));
        let missing = error(server("https://192.0.2.1:6443", Some("/nowhere/ca.crt"))).await;
        assert_eq!(missing, "file /nowhere/ca.crt cannot be read");
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), "secret\n").unwrap();
        let url = "https://192.0.2.1:6443".to_owned();
        let token_file = Some(token.path().to_owned());
        let line_end = error(Endpoint::Server { url, token_file, ca_file: None }).await;
        assert!(line_end.contains("line end") && line_end.contains("tr -d"), "{line_end}");
        let kubeconfig = error(Endpoint::Kubeconfig("/nowhere/config".into())).await;
        assert_eq!(kubeconfig, "kubeconfig /nowhere/config");
    }
}
