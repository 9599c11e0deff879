//! Connections through the rules, over loopback of the namespace and through two of them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;

/// Answers every connection with `name`, for as long as the process lives.
fn serve(address: &str, name: &'static str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let _ = connection.unwrap().write_all(name.as_bytes());
        }
    });
}

fn ask(address: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn connections_to_a_service_reach_its_endpoints_in_turn_over_both_families() {
    in_namespace(|| {
        run("ip link set lo up; ip addr add fd01::1/128 dev lo; ip addr add fd01::2/128 dev lo");
        run("ip route add local 10.96.0.0/16 dev lo; ip route add local fd96::/64 dev lo");
        serve("127.1.0.1:8080", "one");
        serve("127.1.0.2:8081", "two");
        serve("[fd01::1]:8080", "one");
        serve("[fd01::2]:8081", "two");
        let desired = proxy(&[
            ("10.96.0.1", 80, &[("127.1.0.1", 8080), ("127.1.0.2", 8081)]),
            ("fd96::1", 80, &[("fd01::1", 8080), ("fd01::2", 8081)]),
        ]);
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        for vip in ["10.96.0.1:80", "[fd96::1]:80"] {
            let answers: BTreeSet<String> = (0..40).map(|_| ask(vip).unwrap()).collect();
            assert_eq!(answers, BTreeSet::from(["one".to_owned(), "two".to_owned()]), "{vip}");
        }
        let desired =
            proxy(&[("10.96.0.1", 80, &[("127.1.0.1", 8080)]), ("fd96::1", 80, &[("fd01::2", 8081)])]);
        owner.apply(&desired, Trust::Shadow).unwrap();
        assert!((0..20).all(|_| ask("10.96.0.1:80").unwrap() == "one"));
        assert!((0..20).all(|_| ask("[fd96::1]:80").unwrap() == "two"));
    });
}

#[test]
fn reject_answers_tcp_with_a_reset_and_udp_with_port_unreachable() {
    in_namespace(|| {
        run("ip link set lo up; ip addr add fd01::1/128 dev lo");
        let mut desired = table("weft-host");
        let rule = Rule::new(vec![
            Statement::Match { field: Field::DestinationPort, negated: false, value: Datum::Port(4000) },
            Statement::Reject,
        ]);
        desired.chains.insert(
            "output".into(),
            Chain { base: base(ChainKind::Filter, Hook::Output, -5), rules: vec![rule] },
        );
        NftTable::new("weft-host").apply(&desired, Trust::Nothing).unwrap();
        for address in ["127.0.0.1:4000", "[fd01::1]:4000"] {
            serve(address, "served");
            assert_eq!(ask(address).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "{address}");
            let local = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(local).unwrap();
            let _receiver = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            socket.connect(address).unwrap();
            let refused = socket.send(b"x").and_then(|_| socket.recv(&mut [0; 8])).unwrap_err();
            assert!(
                matches!(
                    refused.kind(),
                    std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::PermissionDenied
                ),
                "{address}: {refused}",
            );
        }
    });
}

#[test]
fn a_family_s_rule_leaves_packets_of_the_other_family_alone() {
    in_namespace(|| {
        run("ip link set lo up; ip addr add fd01::1/128 dev lo");
        let mut desired = table("weft-host");
        let drop_all = |field, net: &str| {
            let value = Datum::Net(net.parse().unwrap());
            Rule::new(vec![
                Statement::Match { field, negated: false, value },
                Statement::Verdict(Verdict::Drop),
            ])
        };
        for (field, net, open, shut) in [
            (Field::Ip4Destination, "0.0.0.0/0", "[fd01::1]:5000", "127.0.0.1:5000"),
            (Field::Ip6Destination, "::/0", "127.0.0.1:5001", "[fd01::1]:5001"),
        ] {
            let base = base(ChainKind::Filter, Hook::Input, -5);
            desired.chains.insert("input".into(), Chain { base, rules: vec![drop_all(field, net)] });
            NftTable::new("weft-host").apply(&desired, Trust::Nothing).unwrap();
            serve(open, "open");
            serve(shut, "open");
            assert_eq!(ask(open).unwrap(), "open");
            assert_eq!(ask(shut).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        }
    });
}
