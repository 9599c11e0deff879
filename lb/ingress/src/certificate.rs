//! Certificates as Secrets hold them: whether chain and key can be used together. Pure.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// Why a chain and its key, both PEM, cannot be used, with the remedy; `None` when they can.
pub fn objection(chain_pem: &[u8], key_pem: &[u8]) -> Option<String> {
    let chain: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(chain_pem).collect();
    let chain = match chain {
        Ok(chain) if !chain.is_empty() => chain,
        _ => {
            return Some(
                "tls.crt holds no certificate in PEM; put the chain there, the host's own first".to_owned(),
            );
        }
    };
    let Ok(key) = PrivateKeyDer::from_pem_slice(key_pem) else {
        return Some("tls.key holds no private key in PEM; put it there".to_owned());
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
