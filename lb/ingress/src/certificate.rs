//! Certificates as Secrets hold them: whether chain and key can be used together, and when. Pure.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

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

/// When a host's own certificate holds; `None` when that is written so that it cannot be read (RFC 5280 4.1.2.5).
pub fn validity(chain_pem: &[u8]) -> Option<Validity> {
    validity_of(chain(chain_pem)?.first()?)
}

/// From one instant until another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub from: Timestamp,
    pub until: Timestamp,
}

impl Validity {
    /// Why clients will refuse it at this moment, with the remedy.
    pub fn objection(self, now: Timestamp) -> Option<String> {
        let Self { from, until } = self;
        if until < now {
            return Some(format!("its certificate expired at {until}; renew it, clients refuse it"));
        }
        (now < from)
            .then(|| format!("its certificate is not valid before {from}; clients refuse it until then"))
    }
}

/// Who a certificate is for and who made it, as RFC 2253 writes it, the most specific part first (nginx's `$ssl_client_s_dn` and
/// `$ssl_client_i_dn`); `None` when it cannot be read.
pub(crate) fn names(der: &[u8]) -> Option<(String, String)> {
    let Parts { issuer, subject, .. } = parts(der)?;
    Some((distinguished_name(subject)?, distinguished_name(issuer)?))
}

/// What is looked at of a certificate (RFC 5280 4.1).
struct Parts<'a> {
    issuer: &'a [u8],
    validity: &'a [u8],
    subject: &'a [u8],
}

/// version, serialNumber and signature stand before issuer.
fn parts(der: &[u8]) -> Option<Parts<'_>> {
    let (_, certificate, _) = element(der)?;
    let (_, mut rest, _) = element(certificate)?;
    if let (VERSION, _, after) = element(rest)? {
        rest = after;
    }
    for _ in 0..2 {
        (_, _, rest) = element(rest)?;
    }
    let (_, issuer, rest) = element(rest)?;
    let (_, validity, rest) = element(rest)?;
    let (_, subject, _) = element(rest)?;
    Some(Parts { issuer, validity, subject })
}

/// The elements one after another; `None` when one is damaged.
fn elements(mut der: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut found = Vec::new();
    while !der.is_empty() {
        let (tag, content, rest) = element(der)?;
        found.push((tag, content));
        der = rest;
    }
    Some(found)
}

/// A sequence of sets of type and value.
fn distinguished_name(der: &[u8]) -> Option<String> {
    let mut sets = Vec::new();
    for (_, set) in elements(der)?.into_iter().rev() {
        let mut pairs = Vec::new();
        for (_, pair) in elements(set)? {
            let (_, kind, rest) = element(pair)?;
            let (tag, value, _) = element(rest)?;
            pairs.push(attribute(kind, tag, value));
        }
        sets.push(pairs.join("+"));
    }
    Some(sets.join(","))
}

/// Encoded object identifiers and what OpenSSL calls them.
const ATTRIBUTES: [(&[u8], &str); 13] = [
    (b"\x55\x04\x03", "CN"),
    (b"\x55\x04\x04", "SN"),
    (b"\x55\x04\x05", "serialNumber"),
    (b"\x55\x04\x06", "C"),
    (b"\x55\x04\x07", "L"),
    (b"\x55\x04\x08", "ST"),
    (b"\x55\x04\x0a", "O"),
    (b"\x55\x04\x0b", "OU"),
    (b"\x55\x04\x0c", "title"),
    (b"\x55\x04\x2a", "GN"),
    (b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x01", "UID"),
    (b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19", "DC"),
    (b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x01", "emailAddress"),
];

/// An attribute that has no name here, or a value that is no text, is written in hexadecimal digits.
fn attribute(kind: &[u8], tag: u8, value: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
    let name = ATTRIBUTES.iter().find(|(known, _)| *known == kind).map(|(_, name)| *name);
    match (name, tag) {
        // UTF8String, PrintableString, IA5String.
        (Some(name), 0x0c | 0x13 | 0x16) => format!("{name}={}", escaped(value)),
        (name, _) => {
            let name = name.map_or_else(|| format!("OID.{}", hex(kind)), str::to_owned);
            format!("{name}=#{}", hex(value))
        }
    }
}

/// RFC 2253 2.4; what is not ASCII goes byte by byte, as OpenSSL has it.
fn escaped(value: &[u8]) -> String {
    let mut text = String::new();
    for (at, byte) in value.iter().enumerate() {
        let end = at == 0 || at + 1 == value.len();
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => text.extend(['\\', char::from(*byte)]),
            b'#' if at == 0 => text.push_str("\\#"),
            b' ' if end => text.push_str("\\ "),
            b' '..=b'~' => text.push(char::from(*byte)),
            other => text.push_str(&format!("\\{other:02X}")),
        }
    }
    text
}

/// notBefore and notAfter.
fn validity_of(der: &[u8]) -> Option<Validity> {
    let (kind, from, rest) = element(parts(der)?.validity)?;
    let from = time(kind, from)?;
    let (kind, until, _) = element(rest)?;
    Some(Validity { from, until: time(kind, until)? })
}

/// `[0]`, explicit.
const VERSION: u8 = 0xa0;

/// Tag, content and what follows of a DER element (X.690 8.1).
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk()?;
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// UTCTime `YYMMDDHHMMSSZ`, or GeneralizedTime with a year of four digits; 99991231235959Z, which is beyond what a [`Timestamp`]
/// can hold, means never.
fn time(kind: u8, text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let whole = match kind {
        0x17 if text < "50" => format!("20{text}"),
        0x17 => format!("19{text}"),
        0x18 => text.to_owned(),
        _ => return None,
    };
    let digits = whole.len() == 14 && whole.bytes().all(|byte| byte.is_ascii_digit());
    let at = DateTime::strptime("%Y%m%d%H%M%S", whole).ok().filter(|_| digits)?;
    Some(TimeZone::UTC.to_timestamp(at).unwrap_or(Timestamp::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_certificate_is_of_use_between_its_two_dates() {
        let key = rcgen::KeyPair::generate().unwrap();
        let of = |from: (i32, u8, u8), until: (i32, u8, u8)| {
            let mut wanted = rcgen::CertificateParams::new(["a.example".to_owned()]).unwrap();
            wanted.not_before = rcgen::date_time_ymd(from.0, from.1, from.2);
            wanted.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
            wanted.self_signed(&key).unwrap().pem()
        };
        let now = "2026-11-27T00:00:00Z".parse().unwrap();
        let said = |from, until| validity(of(from, until).as_bytes()).unwrap().objection(now);
        assert_eq!(said((2020, 1, 1), (2049, 12, 31)), None);
        assert_eq!(said((2020, 1, 1), (2051, 1, 1)), None, "a year of four digits");
        let expired = "its certificate expired at 2026-11-26T00:00:00Z; renew it, clients refuse it";
        assert_eq!(said((2020, 1, 1), (2026, 11, 26)).as_deref(), Some(expired));
        let early = "its certificate is not valid before 2026-11-28T00:00:00Z; clients refuse it until then";
        assert_eq!(said((2026, 11, 28), (2030, 1, 1)).as_deref(), Some(early));
        assert_eq!(validity(b""), None);
    }

    #[test]
    fn a_subject_is_written_as_nginx_has_it() {
        let mut wanted = rcgen::CertificateParams::new([]).unwrap();
        let mut name = rcgen::DistinguishedName::new();
        name.push(rcgen::DnType::OrganizationName, "Weft, \u{e9}");
        name.push(rcgen::DnType::CommonName, "#ann+bob ");
        wanted.distinguished_name = name;
        let made = wanted.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let written = r"CN=\#ann\+bob\ ,O=Weft\, \C3\A9".to_owned();
        assert_eq!(names(made.der()), Some((written.clone(), written)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(der in proptest::collection::vec(any::<u8>(), 0..200)) {
            validity(&der);
            names(&der);
            distinguished_name(&der);
        }
    }

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
