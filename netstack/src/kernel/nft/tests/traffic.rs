//! Connections through the rules, over loopback of the namespace and through two of them.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace beside the test's, joined to it by a veth with the given name here and `eth0` there. It ends
/// with the value.
struct Neighbour {
    jobs: std::sync::mpsc::Sender<Job>,
}

impl Neighbour {
    fn join(link: &str) -> Self {
        let (jobs, queue) = std::sync::mpsc::channel::<Job>();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            sender.send(nix::unistd::gettid()).unwrap();
            queue.into_iter().for_each(|job| job());
        });
        let thread = receiver.recv().unwrap();
        run(&format!("ip link add {link} type veth peer name eth0 netns {thread}; ip link set {link} up"));
        Self { jobs }
    }

    /// Runs a job in the namespace and waits for its result; a panic there is a panic here.
    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.jobs.send(Box::new(move || drop(sender.send(job())))).unwrap();
        receiver.recv().expect("the job panicked")
    }
}

#[test]
fn a_client_reaches_a_service_s_endpoint_through_the_node_over_both_families() {
    in_namespace(|| {
        let (client, server) = (Neighbour::join("client"), Neighbour::join("server"));
        run("ip addr add 10.0.1.1/24 dev client; ip addr add fd01::1/64 dev client nodad
            ip addr add 10.0.2.1/24 dev server; ip addr add fd02::1/64 dev server nodad
            echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        for (host, net) in [(&client, 1), (&server, 2)] {
            host.run(move || {
                run(&format!(
                    "ip link set lo up; ip link set eth0 up
                    ip addr add 10.0.{net}.2/24 dev eth0; ip addr add fd0{net}::2/64 dev eth0 nodad
                    ip route add default via 10.0.{net}.1; ip route add default via fd0{net}::1"
                ));
                await_addresses();
            });
        }
        await_addresses();
        server.run(|| {
            serve("10.0.2.2:8080", "over IPv4");
            serve("[fd02::2]:8080", "over IPv6");
        });
        let desired =
            proxy(&[("10.96.0.1", 80, &[("10.0.2.2", 8080)]), ("fd96::1", 80, &[("fd02::2", 8080)])]);
        NftTable::new("weft-proxy").apply(&desired, Trust::Nothing).unwrap();
        assert_eq!(client.run(|| ask("10.96.0.1:80").unwrap()), "over IPv4");
        assert_eq!(client.run(|| ask("[fd96::1]:80").unwrap()), "over IPv6");
        let refused = client.run(|| ask("10.0.2.2:80").unwrap_err());
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "nobody listens there itself");
    });
}

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
        run("ip link set lo up; ip addr add fd01::1/128 dev lo nodad; ip addr add fd01::2/128 dev lo nodad");
        run("ip route add local 10.96.0.0/16 dev lo; ip route add local fd96::/64 dev lo");
        await_addresses();
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
        run("ip link set lo up; ip addr add fd01::1/128 dev lo nodad");
        await_addresses();
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
        run("ip link set lo up; ip addr add fd01::1/128 dev lo nodad");
        await_addresses();
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

/// A table whose rules remember the endpoint of a client and Service, and of two endpoints offer only the one in `offered`.
fn remembering(offered: &[&str], timeout_millis: u64) -> Table {
    use KeyType::{Ipv4Address, Ipv6Address, L4Protocol, Port};
    let mut table = table("weft-proxy");
    let mut rules = Vec::new();
    for (ipv6, address, data, from, to) in [
        (false, Ipv4Address, SetData::Ipv4AddressAndPort, Field::Ip4Source, Field::Ip4Destination),
        (true, Ipv6Address, SetData::Ipv6AddressAndPort, Field::Ip6Source, Field::Ip6Destination),
    ] {
        let map = if ipv6 { "affinity6" } else { "affinity4" };
        let mut set = Set::new(vec![address, address, L4Protocol, Port], data);
        set.timeout_millis = Some(10_800_000);
        set.dynamic_size = Some(1000);
        table.sets.insert(map.into(), set);
        let key = vec![from, to, Field::L4Protocol, Field::DestinationPort];
        for endpoint in offered.iter().map(|text| text.parse::<SocketAddr>().unwrap()) {
            if endpoint.is_ipv6() == ipv6 {
                let (address, port) = (endpoint.ip(), endpoint.port());
                rules.push(Rule::new(vec![
                    Statement::Match {
                        field: Field::DestinationPort,
                        negated: false,
                        value: Datum::Port(80),
                    },
                    Statement::Update { map: map.into(), key: key.clone(), timeout_millis, address, port },
                ]));
            }
        }
        rules.push(Rule::new(vec![Statement::DnatMap { ipv6, key, map: map.into() }]));
    }
    table.chains.insert("output".into(), Chain { base: base(ChainKind::Nat, Hook::Output, -105), rules });
    table
}

#[test]
fn an_element_that_a_rule_made_keeps_its_data_until_its_time_is_over_and_nft_lists_it() {
    in_namespace(|| {
        run("ip link set lo up; ip addr add fd01::1/128 dev lo nodad; ip addr add fd01::2/128 dev lo nodad");
        run("ip route add local 10.96.0.0/16 dev lo; ip route add local fd96::/64 dev lo");
        await_addresses();
        serve("127.1.0.1:8080", "one");
        serve("127.1.0.2:8081", "two");
        serve("[fd01::1]:8080", "one");
        serve("[fd01::2]:8081", "two");
        let mut owner = NftTable::new("weft-proxy");
        let ask_both = || ["10.96.0.1:80", "[fd96::1]:80"].map(|vip| ask(vip).unwrap());
        let first = remembering(&["127.1.0.1:8080", "[fd01::1]:8080"], 1500);
        owner.apply(&first, Trust::Nothing).unwrap();
        assert_eq!(ask_both(), ["one", "one"]);
        settles(&mut owner, &first);
        let second = remembering(&["127.1.0.2:8081", "[fd01::2]:8081"], 1500);
        owner.apply(&second, Trust::Shadow).unwrap();
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(500));
            assert_eq!(ask_both(), ["one", "one"], "each connection begins the time anew");
        }
        shows("timeout 1s500ms : 127.1.0.2 . 8081 }");
        shows("10.96.0.1 . tcp . 80 timeout 1s500ms expires");
        shows("fd96::1 . tcp . 80 timeout 1s500ms expires");
        settles(&mut NftTable::new("weft-proxy"), &second);
        let elements = owner.elements("affinity6").unwrap();
        let to = ElementData::AddressAndPort("fd01::1".parse().unwrap(), 8080);
        assert!(matches!(&elements[..], [(key, data)] if key.len() == 4 && *data == to), "{elements:?}");
        std::thread::sleep(Duration::from_millis(1700));
        assert_eq!(ask_both(), ["two", "two"]);
        let keys: Vec<_> = owner.elements("affinity6").unwrap().into_iter().map(|(key, _)| key).collect();
        owner.remove("affinity6", &keys).unwrap();
        assert_eq!(owner.elements("affinity6").unwrap(), []);
    });
}
