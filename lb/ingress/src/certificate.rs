//! Certificates as Secrets hold them: whether chain and key can be used together. Pure.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// What a Secret's PEM holds.
pub(crate) type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Certificates in PEM, the host's own first; `None` when there is none or one is damaged.
pub(crate) fn chain(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    chain.ok().filter(|chain| !chain.is_empty())
}

/// Chain and key, both PEM.
///
/// # Errors
/// What is missing, with the remedy.
pub(crate) fn pair(chain_pem: &[u8], key_pem: &[u8]) -> Result<Pair, &'static str> {
    let chain = chain(chain_pem)
        .ok_or("tls.crt holds no certificate in PEM; put the chain there, the host's own first")?;
    let key = PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|_| "tls.key holds no private key in PEM; put it there")?;
    Ok((chain, key))
}

/// Why a chain and its key, both PEM, cannot be used, with the remedy; `None` when they can.
pub fn objection(chain_pem: &[u8], key_pem: &[u8]) -> Option<String> {
    let (chain, key) = match pair(chain_pem, key_pem) {
        Ok(pair) => pair,
        Err(lack) => return Some(lack.to_owned()),
    };
    match CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider()) {
        Ok(_) => None,
        Err(rustls::Error::InconsistentKeys(_)) => Some(
            "tls.key is not the key of the first certificate of tls.crt; replace one of the two".to_owned(),
        ),
        Err(error) => Some(format!("certificate and key cannot be used ({error}); replace them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["shop.example.com".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn a_chain_goes_with_its_own_key_only() {
        let ((chain, key), (_, other)) = (pair(), pair());
        assert_eq!(objection(chain.as_bytes(), key.as_bytes()), None);
        let mismatch = objection(chain.as_bytes(), other.as_bytes()).unwrap();
        assert!(mismatch.starts_with("tls.key is not the key of"), "{mismatch}");
        assert!(objection(b"", key.as_bytes()).unwrap().contains("tls.crt holds no certificate"));
        assert!(objection(chain.as_bytes(), b"x").unwrap().contains("tls.key holds no private key"));
    }
}
