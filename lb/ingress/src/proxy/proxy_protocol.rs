//! The header by which a load balancer says whose connection it passes on (PROXY protocol versions 1 and 2, HAProxy's
//! proxy-protocol.txt). Parsing is pure; a header is taken from the socket to its last byte and no further. [`header`] makes one for
//! backends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::annotations::ProxyVersion;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest line of version 1 with its end (2.1).
const MAX_LINE_BYTES: usize = 107;
/// Of version 2 with its extensions; the specification allows 64 kB, and load balancers send less than a tenth of this.
const MAX_BLOCK_BYTES: usize = 4096;

/// What a header says of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The connection is the sender's own (LOCAL: its health check), or of a kind without addresses (UNKNOWN).
    Own,
    Passed {
        client: SocketAddr,
        asked: SocketAddr,
    },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    #[error(
        "no PROXY protocol header comes first, and --ingress-proxy-protocol asks for one from this range"
    )]
    Missing,
    #[error("the PROXY protocol header is damaged")]
    Damaged,
    #[error("read the PROXY protocol header")]
    Read(#[from] io::Error),
}

/// Where parsing stands.
#[derive(Debug)]
enum Parsed {
    /// Every byte so far belongs to the header, and more do.
    Partial,
    /// The header and its length in bytes.
    Whole(Origin, usize),
}

/// Takes the header off the connection.
///
/// # Errors
/// There is none, or it cannot be read.
pub(super) async fn read(stream: &mut TcpStream) -> Result<Origin, HeaderError> {
    let mut header = Vec::new();
    let mut seen = [0; 256];
    loop {
        let length = stream.peek(&mut seen).await?;
        let before = header.len();
        header.extend_from_slice(seen.get(..length).unwrap_or_default());
        let (taken, origin) = match parse(&header)? {
            Parsed::Partial if length == 0 => {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            Parsed::Partial => (length, None),
            Parsed::Whole(origin, whole) => (whole.saturating_sub(before), Some(origin)),
        };
        stream.read_exact(seen.get_mut(..taken).unwrap_or_default()).await?;
        if let Some(origin) = origin {
            return Ok(origin);
        }
    }
}

/// The header for a connection of `client` to `asked`. Of two families IPv4 is mapped into IPv6.
pub(super) fn header(version: ProxyVersion, client: SocketAddr, asked: SocketAddr) -> Vec<u8> {
    let addresses = match (client.ip(), asked.ip()) {
        (IpAddr::V4(client), IpAddr::V4(asked)) => Ok((client, asked)),
        (client, asked) => Err((mapped(client), mapped(asked))),
    };
    let ports = (client.port(), asked.port());
    match version {
        ProxyVersion::V1 => {
            let (family, from, to) = match addresses {
                Ok((client, asked)) => ("TCP4", client.to_string(), asked.to_string()),
                Err((client, asked)) => ("TCP6", client.to_string(), asked.to_string()),
            };
            format!("PROXY {family} {from} {to} {} {}\r\n", ports.0, ports.1).into_bytes()
        }
        ProxyVersion::V2 => {
            let (family, body) = match addresses {
                Ok((client, asked)) => (0x11, [client.octets(), asked.octets()].concat()),
                Err((client, asked)) => (0x21, [client.octets(), asked.octets()].concat()),
            };
            // Both ports follow the addresses.
            let length: u16 = if family == 0x11 { 12 } else { 36 };
            let head = [0x21, family];
            let ports = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
            [&SIGNATURE[..], &head, &length.to_be_bytes(), &body, &ports].concat()
        }
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn parse(bytes: &[u8]) -> Result<Parsed, HeaderError> {
    let begins = |signature: &[u8]| {
        let length = bytes.len().min(signature.len());
        bytes.get(..length) == signature.get(..length)
    };
    match () {
        () if begins(SIGNATURE) => block(bytes),
        () if begins(b"PROXY ") => line(bytes),
        () => Err(HeaderError::Missing),
    }
}

fn line(bytes: &[u8]) -> Result<Parsed, HeaderError> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < MAX_LINE_BYTES { Ok(Parsed::Partial) } else { Err(HeaderError::Damaged) };
    };
    let whole = end + 2;
    let text =
        bytes.get(..end).and_then(|line| std::str::from_utf8(line).ok()).ok_or(HeaderError::Damaged)?;
    if whole > MAX_LINE_BYTES {
        return Err(HeaderError::Damaged);
    }
    let words: Vec<&str> = text.split(' ').collect();
    let origin = match words.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Origin::Own,
        ["PROXY", family, source, destination, from, to] => {
            let address = |text: &str, port: &str| {
                let address: IpAddr = text.parse().ok()?;
                let right = matches!((*family, address), ("TCP4", IpAddr::V4(_)) | ("TCP6", IpAddr::V6(_)));
                Some(SocketAddr::new(address.to_canonical(), port.parse().ok()?)).filter(|_| right)
            };
            match (address(source, from), address(destination, to)) {
                (Some(client), Some(asked)) => Origin::Passed { client, asked },
                _ => return Err(HeaderError::Damaged),
            }
        }
        _ => return Err(HeaderError::Damaged),
    };
    Ok(Parsed::Whole(origin, whole))
}

fn block(bytes: &[u8]) -> Result<Parsed, HeaderError> {
    let Some((head, rest)) = bytes.split_at_checked(16) else { return Ok(Parsed::Partial) };
    let [.., command, family, high, low] = head else { return Err(HeaderError::Damaged) };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if 16 + length > MAX_BLOCK_BYTES {
        return Err(HeaderError::Damaged);
    }
    let Some(body) = rest.get(..length) else { return Ok(Parsed::Partial) };
    let origin = match (command, family) {
        (0x20, _) => Origin::Own,
        (0x21, 0x11) => passed(body, |at| {
            let octets: [u8; 4] = at.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        })?,
        (0x21, 0x21) => passed(body, |at| {
            let octets: [u8; 16] = at.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        })?,
        // UNSPEC and Unix sockets: no address that could be used (2.2).
        (0x21, 0x00 | 0x31) => Origin::Own,
        _ => return Err(HeaderError::Damaged),
    };
    Ok(Parsed::Whole(origin, 16 + length))
}

/// Source address, destination address, source port, destination port; extensions follow.
fn passed(body: &[u8], address: impl Fn(&[u8]) -> Option<IpAddr>) -> Result<Origin, HeaderError> {
    let size = if address(&[0; 4]).is_some() { 4 } else { 16 };
    let port = |at: usize| {
        let octets: [u8; 2] = body.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_be_bytes(octets))
    };
    let end = |at: usize, port_at: usize| {
        let address = address(body.get(at..at + size)?)?;
        Some(SocketAddr::new(address.to_canonical(), port(port_at)?))
    };
    match (end(0, 2 * size), end(size, 2 * size + 2)) {
        (Some(client), Some(asked)) => Ok(Origin::Passed { client, asked }),
        _ => Err(HeaderError::Damaged),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(bytes: &[u8]) -> Option<(Origin, usize)> {
        match parse(bytes) {
            Ok(Parsed::Whole(origin, length)) => Some((origin, length)),
            _ => None,
        }
    }

    fn origin(client: &str, asked: &str) -> Origin {
        Origin::Passed { client: client.parse().unwrap(), asked: asked.parse().unwrap() }
    }

    fn version_2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([command, family]);
        bytes.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_line_of_version_1_names_both_ends() {
        let line = b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 443\r\nGET /";
        assert_eq!(whole(line), Some((origin("192.0.2.1:4711", "10.0.0.1:443"), line.len() - 5)));
        let line = b"PROXY TCP6 2001:db8::1 fd00::1 4711 80\r\n";
        assert_eq!(whole(line), Some((origin("[2001:db8::1]:4711", "[fd00::1]:80"), line.len())));
        assert_eq!(whole(b"PROXY UNKNOWN\r\n"), Some((Origin::Own, 15)));
        assert_eq!(whole(b"PROXY UNKNOWN ffff:f...f ffff 65535 65535\r\n").unwrap().0, Origin::Own);
    }

    #[test]
    fn a_block_of_version_2_names_both_ends_and_its_extensions_are_passed_over() {
        let v4 = [192, 0, 2, 1, 10, 0, 0, 1, 0x12, 0x67, 1, 187, 3, 0, 1, 9];
        let block = version_2(0x21, 0x11, &v4);
        assert_eq!(whole(&block), Some((origin("192.0.2.1:4711", "10.0.0.1:443"), block.len())));
        let mut v6 = "2001:db8::1".parse::<Ipv6Addr>().unwrap().octets().to_vec();
        v6.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend([0x12, 0x67, 0, 80]);
        assert_eq!(
            whole(&version_2(0x21, 0x21, &v6)).unwrap().0,
            origin("[2001:db8::1]:4711", "[fd00::1]:80")
        );
        assert_eq!(whole(&version_2(0x20, 0x00, &[])), Some((Origin::Own, 16)), "LOCAL: a health check");
        assert_eq!(whole(&version_2(0x21, 0x00, &[1, 2])), Some((Origin::Own, 18)));
    }

    #[test]
    fn what_is_no_header_is_refused_and_half_of_one_awaited() {
        assert!(matches!(parse(b"GET / HTTP/1.1\r\n"), Err(HeaderError::Missing)));
        for damaged in [
            &b"PROXY TCP4 192.0.2.1 10.0.0.1 4711\r\n"[..],
            b"PROXY TCP4 192.0.2.1  10.0.0.1 4711 443\r\n",
            b"PROXY TCP4 2001:db8::1 fd00::1 4711 443\r\n",
            b"PROXY TCP4 192.0.2.1 10.0.0.1 99999 443\r\n",
            b"PROXY UDP4 192.0.2.1 10.0.0.1 4711 443\r\n",
        ] {
            assert!(matches!(parse(damaged), Err(HeaderError::Damaged)), "{}", damaged.escape_ascii());
        }
        assert!(matches!(parse(&[b"PROXY ".as_slice(), &[b'x'; 200]].concat()), Err(HeaderError::Damaged)));
        assert!(matches!(parse(&version_2(0x31, 0x11, &[0; 12])), Err(HeaderError::Damaged)));
        assert!(matches!(parse(&version_2(0x21, 0x12, &[0; 12])), Err(HeaderError::Damaged)), "datagrams");
        assert!(matches!(parse(&version_2(0x21, 0x11, &[0; 11])), Err(HeaderError::Damaged)), "too short");
        assert!(matches!(parse(&version_2(0x21, 0x11, &[0; 5000])), Err(HeaderError::Damaged)), "too long");
        let line = b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 443\r\n";
        let block = version_2(0x21, 0x11, &[0; 12]);
        for header in [&line[..], &block] {
            assert!((0..header.len()).all(|end| matches!(parse(&header[..end]), Ok(Parsed::Partial))));
        }
    }

    proptest! {
        #[test]
        fn a_header_that_is_made_is_read_again(
            client: (IpAddr, u16), asked: (IpAddr, u16), new: bool, rest in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let [client, asked] = [client, asked].map(|(address, port)| SocketAddr::new(address.to_canonical(), port));
            let version = if new { ProxyVersion::V2 } else { ProxyVersion::V1 };
            let made = header(version, client, asked);
            let expected = Origin::Passed { client, asked };
            prop_assert_eq!(whole(&[&made[..], &rest].concat()), Some((expected, made.len())));
        }

        #[test]
        fn no_bytes_panic_and_a_header_never_reaches_behind_what_came(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..3) {
            let begin: &[u8] = match kind { 0 => SIGNATURE, 1 => b"PROXY ", _ => b"" };
            let bytes = [begin, &bytes].concat();
            if let Ok(Parsed::Whole(_, length)) = parse(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
