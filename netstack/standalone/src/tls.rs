//! The server's certificates. In: the data directory and the names to serve. Out: a CA that stays the same across
//! restarts (`ca.crt`, `ca.key`, written once), and a fresh server certificate signed by it at every start, so that
//! its names always fit and it never expires on disk.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}")]
    File {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("making a certificate")]
    Certificate(#[from] rcgen::Error),
    #[error("TLS configuration")]
    Config(#[from] rustls::Error),
}

/// What a listener and a kubeconfig need.
pub(crate) struct Tls {
    pub(crate) ca_pem: String,
    pub(crate) config: Arc<rustls::ServerConfig>,
}

/// Reads or makes the CA in `directory`, and signs a server certificate for these names and addresses.
///
/// # Errors
/// Files that cannot be read or written, a damaged CA, a name that no certificate can hold.
pub(crate) fn prepare(directory: &Path, names: &[String]) -> Result<Tls, TlsError> {
    let params = ca_params();
    let (ca_pem, ca_key) = ca(directory, &params)?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let key = KeyPair::generate()?;
    let mut server = CertificateParams::new(names.to_vec())?;
    server.distinguished_name.push(DnType::CommonName, "weft-server");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.use_authority_key_identifier_extension = true;
    let certificate = server.signed_by(&key, &issuer)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Tls { ca_pem, config: Arc::new(config) })
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "weft-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn ca(directory: &Path, params: &CertificateParams) -> Result<(String, KeyPair), TlsError> {
    let (certificate_path, key_path) = (directory.join("ca.crt"), directory.join("ca.key"));
    // The certificate is written last: when it is there, so is its key.
    if certificate_path.exists() {
        let key = KeyPair::from_pem(&read(&key_path)?)?;
        return Ok((read(&certificate_path)?, key));
    }
    let key = KeyPair::generate()?;
    let pem = params.clone().self_signed(&key)?.pem();
    write_private(&key_path, &key.serialize_pem())?;
    write_private(&certificate_path, &pem)?;
    Ok((pem, key))
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> TlsError + '_ {
    move |source| TlsError::File { path: path.display().to_string(), source }
}

fn read(path: &Path) -> Result<String, TlsError> {
    fs::read_to_string(path).map_err(file_error(path))
}

/// Writes a file that only its owner reads: temporary, flushed, renamed, so that it is whole or not there.
///
/// # Errors
/// The path and what the system said.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), TlsError> {
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let write = || {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let parent = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(parent)?.sync_all()
    };
    write().map_err(file_error(path))
}

/// Names every server certificate has: how pods and people call the API.
pub(crate) fn default_names(addresses: &[IpAddr]) -> Vec<String> {
    let mut names: Vec<String> = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    .map(str::to_owned)
    .to_vec();
    names.extend(addresses.iter().filter(|it| !it.is_unspecified()).map(IpAddr::to_string));
    names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let names = default_names(&["10.96.0.1".parse().unwrap()]);
        let first = prepare(directory.path(), &names).unwrap();
        let second = prepare(directory.path(), &names).unwrap();
        assert_eq!(first.ca_pem, second.ca_pem);
        let mode = fs::metadata(directory.path().join("ca.key"))
            .map(|it| std::os::unix::fs::PermissionsExt::mode(&it.permissions()));
        assert_eq!(mode.unwrap() & 0o777, 0o600);
    }
}
