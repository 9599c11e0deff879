//! Real errors of the client against real listeners: each is told from the others.

use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;

use super::super::client::Access;
use super::*;

struct Ca {
    params: CertificateParams,
    key: KeyPair,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { params, key: KeyPair::generate().unwrap() }
    }

    fn pem(&self) -> String {
        self.params.clone().self_signed(&self.key).unwrap().pem()
    }

    /// A server that finishes handshakes and says nothing else.
    async fn serve(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> String {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap();
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certificate.der().clone()], private)
                .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        url
    }
}

fn endpoint(url: &str, ca_file: Option<PathBuf>) -> Endpoint {
    Endpoint::Server { url: url.to_owned(), token_file: None, ca_file }
}

async fn failure(endpoint: Endpoint) -> (ApiFailure, String) {
    let access = Access::open(endpoint).await.unwrap();
    let error = access.current().client.apiserver_version().await.unwrap_err();
    let failure = ApiFailure::of(&error);
    let sentence = failure.sentence(&access.address());
    assert!(!sentence.contains('\n'), "{sentence}");
    (failure, sentence)
}

fn why(failure: &ApiFailure) -> Option<Distrust> {
    match failure {
        ApiFailure::Untrusted { why, .. } => Some(*why),
        _ => None,
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_accepted_is_told_by_issuer_name_and_time() {
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.crt");
    let (ours, theirs) = (Ca::new(), Ca::new());
    std::fs::write(&ca_file, ours.pem()).unwrap();
    let given = |url: &str| endpoint(url, Some(ca_file.clone()));

    let url = theirs.serve("127.0.0.1", |_| ()).await;
    let (found, said) = failure(given(&url)).await;
    assert_eq!(why(&found), Some(Distrust::Issuer), "{found:?}");
    let expected = format!(
        "API server {url}: its certificate is not accepted with --ca-file {} (invalid peer certificate: ",
        ca_file.display()
    );
    assert!(said.starts_with(&expected), "{said}");
    assert!(said.ends_with("; put the CA that signed the server's certificate there"), "{said}");

    let url = ours.serve("api.example", |_| ()).await;
    let (found, said) = failure(given(&url)).await;
    assert_eq!(why(&found), Some(Distrust::Name), "{found:?}");
    assert!(said.contains("api.example") && said.contains("give --api-server an address"), "{said}");

    let url = ours.serve("127.0.0.1", |params| params.not_after = rcgen::date_time_ymd(2001, 1, 1)).await;
    let (found, said) = failure(given(&url)).await;
    assert_eq!(why(&found), Some(Distrust::Time), "{found:?}");
    assert!(said.ends_with("renew the server's certificate, or set this machine's clock"), "{said}");

    let url = ours.serve("127.0.0.1", |_| ()).await;
    let (found, _) = failure(given(&url)).await;
    assert!(found.is_silence(), "the certificate is accepted, then the server hangs up: {found:?}");
}

#[tokio::test]
async fn a_port_without_a_server_or_without_tls_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (found, said) = failure(endpoint(&format!("http://{address}"), None)).await;
    assert!(found.is_silence());
    let expected = format!(
        "API server http://{address} cannot be reached (Connection refused (os error 111)); check that it runs, its address \
         and the network between"
    );
    assert_eq!(said, expected);

    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.crt");
    std::fs::write(&ca_file, Ca::new().pem()).unwrap();
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", plain.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = plain.accept().await {
            let _ =
                tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let (found, said) = failure(endpoint(&url, Some(ca_file))).await;
    assert_eq!(found, ApiFailure::Refused("it does not speak TLS on that port".to_owned()), "{said}");
}

#[test]
fn refusals_are_told_by_their_code() {
    let of = |code: u16, reason: &str, message: &str| {
        let status =
            Status { code, reason: reason.to_owned(), message: message.to_owned(), ..Status::default() };
        ApiFailure::of(&kube::Error::Api(status.boxed()))
    };
    assert_eq!(of(401, "Unauthorized", ""), ApiFailure::Unauthenticated("Unauthorized".to_owned()));
    assert_eq!(of(403, "Forbidden", "no\nway"), ApiFailure::Forbidden("no way".to_owned()));
    assert_eq!(of(503, "", "etcd is slow"), ApiFailure::Refused("it answers 503: etcd is slow".to_owned()));
    assert_eq!(of(404, "", ""), ApiFailure::Refused("it answers 404: HTTP 404".to_owned()));
}

#[test]
fn a_kubeconfig_is_named_instead_of_flags() {
    let server = Address {
        url: "https://192.0.2.1:6443".to_owned(),
        endpoint: Endpoint::Kubeconfig("/etc/weft/kubeconfig".into()),
    };
    let said = ApiFailure::Unauthenticated("Unauthorized".to_owned()).sentence(&server);
    let expected = "API server https://192.0.2.1:6443: it does not accept the credentials of kubeconfig /etc/weft/kubeconfig \
                    (Unauthorized); they expired or are of another cluster: put valid ones there, they are taken at once";
    assert_eq!(said, expected);
}
