//! DNS over TLS (RFC 7858) to upstreams, verified: a connection whose certificate is not good carries no question (RFC 8310, the
//! strict profile). Connections are kept for a while, because a handshake costs several times a question.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::custom::{Server, Tls};

/// A connection that carries nothing is kept this long; servers close theirs after ten seconds and more.
const IDLE: Duration = Duration::from_secs(8);
/// Idle connections to one server.
const MAX_IDLE: usize = 8;
/// What was read from disk holds for this long, so that renewed authorities are known without a restart.
const AUTHORITIES_AGE: Duration = Duration::from_secs(600);
/// Where distributions keep the authorities that the host trusts (Debian, Fedora and RHEL, openSUSE, Alpine and others).
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

pub(super) type Connection = TlsStream<TcpStream>;

/// Opens connections and keeps those that are idle.
#[derive(Default)]
pub(super) struct Dialer {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the authorities that are trusted, `None` being the host's.
    connectors: HashMap<Option<Arc<str>>, (TlsConnector, Instant)>,
    idle: HashMap<Server, Vec<(Connection, Instant)>>,
}

impl Dialer {
    /// One that was used before, if there is one.
    pub(super) fn idle(&self, server: &Server, now: Instant) -> Option<Connection> {
        let mut state = self.state();
        let kept = state.idle.get_mut(server)?;
        kept.retain(|(_, since)| now.saturating_duration_since(*since) < IDLE);
        kept.pop().map(|(connection, _)| connection)
    }

    /// A new one, whose certificate is good.
    pub(super) async fn connect(&self, server: &Server, tls: &Tls, now: Instant) -> io::Result<Connection> {
        let connector = self.connector(tls.authorities.as_ref(), now)?;
        let name = server_name(tls, server.address)?;
        let stream = TcpStream::connect(server.address).await?;
        stream.set_nodelay(true)?;
        connector.connect(name, stream).await
    }

    /// For the next question. Those of servers that nobody asks any more go with it.
    pub(super) fn keep(&self, server: &Server, connection: Connection, now: Instant) {
        let mut state = self.state();
        state.idle.retain(|_, kept| {
            kept.retain(|(_, since)| now.saturating_duration_since(*since) < IDLE);
            !kept.is_empty()
        });
        let kept = state.idle.entry(server.clone()).or_default();
        if kept.len() < MAX_IDLE {
            kept.push((connection, now));
        }
    }

    fn connector(&self, authorities: Option<&Arc<str>>, now: Instant) -> io::Result<TlsConnector> {
        let mut state = self.state();
        state.connectors.retain(|_, (_, since)| now.saturating_duration_since(*since) < AUTHORITIES_AGE);
        if let Some((connector, _)) = state.connectors.get(&authorities.cloned()) {
            return Ok(connector.clone());
        }
        let roots = match authorities {
            Some(pem) => trusted(pem.as_bytes()),
            None => of_host()?,
        };
        let connector = TlsConnector::from(Arc::new(config(roots)?));
        state.connectors.insert(authorities.cloned(), (connector.clone(), now));
        Ok(connector)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name that the certificate has to be for: the one that was given, else the address.
fn server_name(tls: &Tls, address: SocketAddr) -> io::Result<ServerName<'static>> {
    match &tls.name {
        Some(name) => ServerName::try_from(name.clone()).map_err(io::Error::other),
        None => Ok(ServerName::from(address.ip())),
    }
}

fn config(roots: RootCertStore) -> io::Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(io::Error::other)?.with_root_certificates(roots).with_no_client_auth())
}

fn of_host() -> io::Result<RootCertStore> {
    let read = BUNDLES.iter().find_map(|path| std::fs::read(path).ok());
    let roots = read.map(|pem| trusted(&pem)).filter(|roots| !roots.is_empty());
    roots.ok_or_else(|| {
        io::Error::other(format!(
            "no certificate authorities on this host ({}); install ca-certificates, or name some with 'tls KEY'",
            BUNDLES[0]
        ))
    })
}

/// The authorities of a PEM text; what is none is left out, as everybody does with bundles.
fn trusted(pem: &[u8]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).filter_map(Result::ok));
    roots
}

/// The PEM text holds an authority.
pub(crate) fn has_authority(pem: &str) -> bool {
    !trusted(pem.as_bytes()).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_one_given_or_the_address() {
        let of = |name: Option<&str>| {
            let tls = Tls { name: name.map(str::to_owned), authorities: None };
            server_name(&tls, "9.9.9.9:853".parse().unwrap()).map(|name| name.to_str().into_owned())
        };
        assert_eq!(of(Some("dns.quad9.net")).unwrap(), "dns.quad9.net");
        assert_eq!(of(None).unwrap(), "9.9.9.9");
        assert!(of(Some("no name")).is_err());
    }

    #[test]
    fn a_text_without_a_certificate_has_no_authority() {
        assert!(!has_authority("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"));
        assert!(!has_authority("dns.quad9.net"));
    }
}
