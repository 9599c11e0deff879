//! TLS on both sides: the certificate by SNI from the table of the moment, client certificates of hosts that ask for them,
//! and how backends are verified.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use weft_model::NamespacedName;

use super::tickets::Tickets;
use crate::certificate::{self, Pair};
use crate::plan::table::{Certificate, RouteTable};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("certificate or key of {0} cannot be used")]
    Certificate(String),
    #[error("no authority can be read")]
    Authorities,
    #[error("the system gives no random bytes for keys")]
    Random,
    #[error("TLS configuration")]
    Rustls(#[from] rustls::Error),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Certificates by the name that clients ask for.
#[derive(Default, Debug)]
pub(super) struct Certificates {
    by_name: HashMap<String, Arc<CertifiedKey>>,
    default: Option<Arc<CertifiedKey>>,
    /// By Secret, with what each was read from.
    keys: HashMap<NamespacedName, (Arc<Certificate>, Arc<CertifiedKey>)>,
    /// Hosts that ask for a certificate of the client.
    pub(super) mutual: BTreeSet<String>,
}

impl Certificates {
    /// What cannot be used is left out: the planner has told it. Keys of `before` are not read again.
    pub(super) fn new(table: &RouteTable, before: &Self, mutual: BTreeSet<String>) -> Self {
        let mut keys: HashMap<_, (Arc<Certificate>, Arc<CertifiedKey>)> = HashMap::new();
        let mut key = |one: &Arc<Certificate>| {
            if let Some((_, known)) = keys.get(&one.secret) {
                return Some(known.clone());
            }
            let known = before.keys.get(&one.secret).filter(|(read_from, _)| read_from == one);
            let key = match known {
                Some((_, known)) => known.clone(),
                None => Arc::new(certified(one).ok()?),
            };
            keys.insert(one.secret.clone(), (one.clone(), key.clone()));
            Some(key)
        };
        let default = table.default_certificate.as_ref().and_then(&mut key);
        let by_name =
            table.certificates.iter().filter_map(|(name, one)| Some((name.clone(), key(one)?))).collect();
        Self { by_name, default, keys, mutual }
    }

    fn of(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let found = name.and_then(|name| {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            let wildcard = || {
                let (_, rest) = name.split_once('.')?;
                self.by_name.get(&format!("*.{rest}"))
            };
            self.by_name.get(&name).or_else(wildcard)
        });
        found.or(self.default.as_ref()).cloned()
    }

    /// Whether a client that asks for this name is to show a certificate.
    pub(super) fn is_mutual(&self, name: Option<&str>) -> bool {
        name.is_some_and(|name| {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            let wildcard = name.split_once('.').map(|(_, rest)| format!("*.{rest}"));
            self.mutual.contains(&name) || wildcard.is_some_and(|name| self.mutual.contains(&name))
        })
    }
}

fn certified(certificate: &Certificate) -> Result<CertifiedKey, TlsError> {
    let (chain, key) = pair(certificate)?;
    Ok(CertifiedKey::from_der(chain, key, &provider())?)
}

fn pair(certificate: &Certificate) -> Result<Pair, TlsError> {
    let pair = certificate::pair(&certificate.chain_pem.0, &certificate.key_pem.0);
    pair.map_err(|_| TlsError::Certificate(certificate.secret.to_string()))
}

/// Looks in the table of the moment, so that a renewed certificate is shown to the next client.
#[derive(Debug)]
struct Resolver(Arc<ArcSwap<Certificates>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().of(hello.server_name())
    }
}

/// Both configurations of the listeners: without and with a question for the client's certificate.
pub(super) struct ServerConfigs {
    pub(super) plain: Arc<ServerConfig>,
    pub(super) mutual: Arc<ServerConfig>,
}

impl ServerConfigs {
    /// TLS 1.2 and 1.3 with rustls's suites. Hosts that ask for the client's certificate give no tickets.
    ///
    /// # Errors
    /// The provider lacks what is asked of it.
    pub(super) fn new(
        certificates: &Arc<ArcSwap<Certificates>>,
        tickets: &Arc<Tickets>,
    ) -> Result<Self, TlsError> {
        let make = |asks: bool| -> Result<Arc<ServerConfig>, TlsError> {
            let builder =
                ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
            let builder = if asks {
                builder.with_client_cert_verifier(Arc::new(Whoever(provider())))
            } else {
                builder.with_no_client_auth()
            };
            let mut config = builder.with_cert_resolver(Arc::new(Resolver(certificates.clone())));
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
            if !asks {
                config.ticketer = tickets.clone();
            }
            Ok(Arc::new(config))
        };
        Ok(Self { plain: make(false)?, mutual: make(true)? })
    }
}

/// Verifies clients of one route against its authorities.
///
/// # Errors
/// There is no authority in the PEM.
pub(super) fn client_verifier(authorities_pem: &[u8]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let roots = roots(authorities_pem)?;
    let built = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    built.map_err(|_| TlsError::Authorities)
}

fn roots(pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificate::chain(pem).ok_or(TlsError::Authorities)? {
        store.add(certificate)?;
    }
    Ok(store)
}

/// How a backend is spoken to over TLS: verified against `authorities_pem`, or whoever it is (nginx's default).
///
/// # Errors
/// Certificates that cannot be used.
pub(super) fn client_config(
    authorities_pem: Option<&[u8]>,
    identity: Option<&Certificate>,
    http2: bool,
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match authorities_pem {
        Some(pem) => builder.with_root_certificates(roots(pem)?),
        None => builder.dangerous().with_custom_certificate_verifier(Arc::new(Whoever(provider()))),
    };
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (chain, key) = pair(identity)?;
            builder.with_client_auth_cert(chain, key)?
        }
    };
    config.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    Ok(Arc::new(config))
}

/// Proves that the other side has the key of its certificate, whoever it is: of clients each route decides whom it trusts, as nginx
/// does, and of backends nobody asks (`proxy-ssl-verify: off`).
#[derive(Debug)]
struct Whoever(Arc<CryptoProvider>);

impl ClientCertVerifier for Whoever {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

impl ServerCertVerifier for Whoever {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
