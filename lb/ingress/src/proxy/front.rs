//! Who asks, and how: what proxies in front of this one say of the client, believed from trusted ranges only. Pure.
//!
//! In: the connection and its fields X-Forwarded-* or Forwarded (RFC 7239). Out: [`Client`]. Lists are read from the end, where the
//! neighbour wrote, as long as each one who is named is trusted itself: what a client writes into them is never reached.

use std::net::{IpAddr, SocketAddr};

use http::header::HeaderMap;
use weft_model::ingress::Front;

use super::answer::Peer;
use super::hygiene::bare_host;

/// The client as far as it can be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) address: IpAddr,
    pub(super) https: bool,
    /// The port that it asked.
    pub(super) port: u16,
    /// Host that a proxy in front was asked for, where it tells.
    pub(super) host: Option<String>,
    pub(super) chain: Chain,
}

/// What the proxies in front said of those before them, for the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chain {
    /// Nothing that can be believed.
    None,
    /// X-Forwarded-For as it came.
    ForwardedFor(String),
    /// Forwarded as it came, and who sent it.
    Forwarded(String, IpAddr),
}

/// The client of one request.
pub(super) fn client(front: &Front, peer: &Peer, headers: &HeaderMap) -> Client {
    let own = peer.address();
    let alone = Client { address: own, https: peer.https, port: peer.port, host: None, chain: Chain::None };
    if !front.trusts(own) {
        return alone;
    }
    let names = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port"];
    let said = match names.iter().any(|name| headers.contains_key(*name)) {
        true => by_x_forwarded(front, own, headers),
        // Beside the others it may have been written by anybody: a proxy that writes one kind passes the other on.
        false => by_forwarded(front, own, headers),
    };
    let https = said.https.unwrap_or(alone.https);
    let implied = said.https.map(|https| if https { 443 } else { 80 });
    Client {
        address: said.address,
        https,
        port: said.port.or(implied).unwrap_or(alone.port),
        host: said.host.filter(|host| bare_host(host).is_some()),
        chain: said.chain,
    }
}

struct Said {
    address: IpAddr,
    https: Option<bool>,
    port: Option<u16>,
    host: Option<String>,
    chain: Chain,
}

fn by_x_forwarded(front: &Front, own: IpAddr, headers: &HeaderMap) -> Said {
    let whole = joined(headers, "x-forwarded-for");
    let last = |name: &str| {
        let whole = joined(headers, name)?;
        whole.rsplit(',').next().map(|last| last.trim().to_owned())
    };
    Said {
        address: origin(front, own, whole.iter().flat_map(|whole| whole.rsplit(','))),
        https: last("x-forwarded-proto").as_deref().and_then(secure),
        port: last("x-forwarded-port").and_then(|port| port.parse().ok()),
        host: last("x-forwarded-host"),
        chain: whole.map_or(Chain::None, Chain::ForwardedFor),
    }
}

fn by_forwarded(front: &Front, own: IpAddr, headers: &HeaderMap) -> Said {
    let whole = joined(headers, "forwarded");
    let elements: Vec<&str> = whole.iter().flat_map(|whole| split(whole, ',')).collect();
    let of = |name: &str| elements.last().and_then(|element| parameter(element, name));
    let nodes: Vec<String> =
        elements.iter().rev().map(|element| parameter(element, "for").unwrap_or_default()).collect();
    Said {
        address: origin(front, own, nodes.iter().map(String::as_str)),
        https: of("proto").as_deref().and_then(secure),
        port: None,
        host: of("host"),
        chain: whole.clone().map_or(Chain::None, |whole| Chain::Forwarded(whole, own)),
    }
}

/// Every field of this name as one list; one that is no text stands for nobody.
fn joined(headers: &HeaderMap, name: &str) -> Option<String> {
    let fields: Vec<&str> = headers.get_all(name).iter().map(|value| value.to_str().unwrap_or("")).collect();
    (!fields.is_empty()).then(|| fields.join(", "))
}

/// The first of those before us, the nearest first, whom nobody trusts; else the last who is named.
fn origin<'a>(front: &Front, own: IpAddr, nearest_first: impl Iterator<Item = &'a str>) -> IpAddr {
    let mut known = own;
    for node in nearest_first {
        let Some(address) = address_of(node.trim()) else { break };
        known = address;
        if !front.trusts(address) {
            break;
        }
    }
    known
}

/// An address with or without port, IPv6 with or without brackets (RFC 7239 6); `unknown` and hidden names are none.
fn address_of(node: &str) -> Option<IpAddr> {
    let bare = node.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let alone = bare.unwrap_or(node).parse::<IpAddr>().ok();
    let with_port = || node.parse::<SocketAddr>().ok().map(|address| address.ip());
    alone.or_else(with_port).map(|address| address.to_canonical())
}

fn secure(scheme: &str) -> Option<bool> {
    match scheme.to_ascii_lowercase().as_str() {
        "https" | "wss" => Some(true),
        "http" | "ws" => Some(false),
        _ => None,
    }
}

/// Splits where no quotation is open (RFC 9110 5.6.4).
fn split(text: &str, at: char) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(|letter: char| {
        let plain = !std::mem::take(&mut escaped);
        match letter {
            '"' if plain => quoted = !quoted,
            '\\' if plain && quoted => escaped = true,
            _ => {}
        }
        letter == at && !quoted
    })
    .collect()
}

/// The value of one parameter of an element, without its quotation marks.
fn parameter(element: &str, name: &str) -> Option<String> {
    split(element, ';').into_iter().find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let value = value.trim();
        let value = match value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            Some(quoted) => quoted.replace('\\', ""),
            None => value.to_owned(),
        };
        key.trim().eq_ignore_ascii_case(name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn seen(peer: &str, fields: &[(&'static str, &'static str)]) -> Client {
        let front = Front {
            trusted: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            ..Front::default()
        };
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        let peer = Peer {
            client: SocketAddr::new(peer.parse().unwrap(), 9),
            port: 80,
            asked: None,
            https: false,
            certificates: vec![],
            names: None,
            patience: Default::default(),
            open: None,
        };
        client(&front, &peer, &headers)
    }

    fn address(peer: &str, fields: &[(&'static str, &'static str)]) -> String {
        seen(peer, fields).address.to_string()
    }

    #[test]
    fn nobody_is_believed_who_is_not_trusted() {
        let fields = [
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=192.0.2.2"),
        ];
        let client = seen("192.0.2.9", &fields);
        let expected = Client {
            address: "192.0.2.9".parse().unwrap(),
            https: false,
            port: 80,
            host: None,
            chain: Chain::None,
        };
        assert_eq!(client, expected);
    }

    #[test]
    fn the_list_is_read_from_its_end_until_somebody_is_not_trusted() {
        assert_eq!(address("10.0.0.1", &[("x-forwarded-for", "6.6.6.6, 192.0.2.1, 10.1.1.1")]), "192.0.2.1");
        assert_eq!(
            address("fd00::1", &[("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "2001:db8::1,fd00::7")]),
            "2001:db8::1",
            "several fields are one list"
        );
        assert_eq!(
            address("10.0.0.1", &[("x-forwarded-for", "10.3.3.3, 10.2.2.2")]),
            "10.3.3.3",
            "all trusted"
        );
        assert_eq!(address("10.0.0.1", &[("x-forwarded-for", "192.0.2.1, nonsense, 10.2.2.2")]), "10.2.2.2");
        assert_eq!(address("10.0.0.1", &[("x-forwarded-for", "")]), "10.0.0.1");
        assert_eq!(address("::ffff:10.0.0.1", &[("x-forwarded-for", "192.0.2.1:4711")]), "192.0.2.1");
        assert_eq!(address("10.0.0.1", &[("x-forwarded-for", "[2001:db8::1]:4711")]), "2001:db8::1");
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_has_it() {
        let fields = [(
            "forwarded",
            r#"for=6.6.6.6, For="[2001:db8::17]:4711";proto=https;host="shop.com:8443", for=10.1.1.1;proto=https;host=shop.com"#,
        )];
        let client = seen("10.0.0.1", &fields);
        assert_eq!(
            (client.address.to_string().as_str(), client.https, client.port),
            ("2001:db8::17", true, 443)
        );
        assert_eq!(client.host.as_deref(), Some("shop.com"));
        assert!(matches!(client.chain, Chain::Forwarded(_, own) if own.to_string() == "10.0.0.1"));
        assert_eq!(address("10.0.0.1", &[("forwarded", "for=192.0.2.1, for=unknown")]), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &[("forwarded", r#"for="192.0.2.1, for=6.6.6.6""#)]), "10.0.0.1");
    }

    #[test]
    fn beside_x_forwarded_for_the_field_forwarded_says_nothing() {
        let fields =
            [("x-forwarded-for", "192.0.2.1"), ("forwarded", "for=6.6.6.6;proto=https;host=evil.com")];
        let client = seen("10.0.0.1", &fields);
        assert_eq!(
            (client.address.to_string().as_str(), client.https, client.host),
            ("192.0.2.1", false, None)
        );
        assert_eq!(client.chain, Chain::ForwardedFor("192.0.2.1".into()));
    }

    #[test]
    fn scheme_host_and_port_are_the_neighbours() {
        let client = seen(
            "10.0.0.1",
            &[
                ("x-forwarded-proto", "http, https"),
                ("x-forwarded-host", "shop.com"),
                ("x-forwarded-port", "8443"),
            ],
        );
        assert_eq!((client.https, client.port, client.host.as_deref()), (true, 8443, Some("shop.com")));
        let client = seen("10.0.0.1", &[("x-forwarded-proto", "gopher"), ("x-forwarded-host", "a b")]);
        assert_eq!((client.https, client.port, client.host), (false, 80, None));
    }
}
