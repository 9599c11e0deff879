//! Every statement, set and map, as `nft list ruleset` shows it.

use super::*;

fn matches(field: Field, value: Datum) -> Statement {
    Statement::Match { field, negated: false, value }
}

fn matches_not(field: Field, value: Datum) -> Statement {
    Statement::Match { field, negated: true, value }
}

fn net(text: &str) -> Datum {
    Datum::Net(text.parse().unwrap())
}

/// Statements of a rule and how nft prints them.
type Listed = (Vec<Statement>, &'static str);

#[allow(clippy::too_many_lines)] // a flat list of cases
fn filter_rules() -> Vec<Listed> {
    use Statement::{
        Counter, CtState, CtStatusDnat, DestinationIsLocal, MarkIs, SetMarkBits, SourceIsLocal, TcpBegins,
    };
    let accept = || Statement::Verdict(Verdict::Accept);
    let states = || vec![super::CtState::Established, super::CtState::Related];
    vec![
        (vec![matches(Field::Ip4Source, ip("10.0.0.1")), accept()], "ip saddr 10.0.0.1 accept"),
        (
            vec![matches_not(Field::Ip4Destination, net("10.1.0.0/16")), Counter],
            "ip daddr != 10.1.0.0/16 counter",
        ),
        (vec![matches(Field::Ip4Destination, net("10.1.2.0/23")), accept()], "ip daddr 10.1.2.0/23 accept"),
        (vec![matches(Field::Ip6Source, net("fd00::/8")), accept()], "ip6 saddr fd00::/8 accept"),
        (vec![matches(Field::Ip6Destination, ip("fd00::1")), accept()], "ip6 daddr fd00::1 accept"),
        (vec![matches(Field::Family, Datum::Ipv6(true)), accept()], "meta nfproto ipv6 accept"),
        (
            vec![matches(Field::L4Protocol, Datum::Protocol(Protocol::Udp)), accept()],
            "meta l4proto udp accept",
        ),
        (
            vec![
                matches(Field::L4Protocol, Datum::Protocol(Protocol::Udp)),
                matches(Field::DestinationPort, Datum::Port(53)),
                accept(),
            ],
            "udp dport 53 accept",
        ),
        (vec![matches(Field::SourcePort, Datum::Port(53)), accept()], "th sport 53 accept"),
        (vec![matches(Field::InputLink, Datum::Name("weft0".into())), accept()], "iifname \"weft0\" accept"),
        (
            vec![matches_not(Field::OutputLink, Datum::NamePrefix("weftp".into())), accept()],
            "oifname != \"weftp*\" accept",
        ),
        (
            vec![matches(Field::Icmp4Type, Datum::Icmp4Type(3)), accept()],
            "icmp type destination-unreachable accept",
        ),
        (
            vec![matches(Field::Icmp4ErrorDestination, ip("10.96.0.10")), accept()],
            "@th,192,32 0xa60000a accept",
        ),
        (
            vec![matches(Field::Icmp6ErrorDestination, ip("fd00::a")), accept()],
            "@th,256,128 0xfd00000000000000000000000000000a accept",
        ),
        (
            vec![matches(Field::Icmp6Type, Datum::Icmp6Type(135)), accept()],
            "icmpv6 type nd-neighbor-solicit accept",
        ),
        (
            vec![MarkIs { mask: 0x0800_0000, value: 0x0800_0000 }, accept()],
            "meta mark & 0x08000000 == 0x08000000 accept",
        ),
        (vec![CtState { states: states(), negated: false }, accept()], "ct state established,related accept"),
        (
            vec![CtState { states: vec![super::CtState::New], negated: true }, accept()],
            "ct state ! new accept",
        ),
        (vec![TcpBegins { negated: false }, accept()], "tcp flags syn / fin,syn,rst,ack accept"),
        (vec![TcpBegins { negated: true }, accept()], "tcp flags != syn / fin,syn,rst,ack accept"),
        (
            vec![
                matches(Field::L4Protocol, Datum::Protocol(Protocol::Tcp)),
                matches(Field::DestinationPort, Datum::PortRange(8000, 8080)),
                accept(),
            ],
            "tcp dport 8000-8080 accept",
        ),
        (
            vec![matches_not(Field::DestinationPort, Datum::PortRange(8000, 8080)), accept()],
            "th dport != 8000-8080 accept",
        ),
        (vec![CtStatusDnat, accept()], "ct status dnat accept"),
        (
            vec![Statement::CtOriginalDestination("10.96.0.10".parse().unwrap()), accept()],
            "ct original ip daddr 10.96.0.10 accept",
        ),
        (
            vec![Statement::CtOriginalDestination("fd00::a".parse().unwrap()), accept()],
            "ct original ip6 daddr fd00::a accept",
        ),
        (
            vec![Statement::Limit { per_second: 200, burst: 1000 }, accept()],
            "limit rate 200/second burst 1000 packets accept",
        ),
        (
            vec![Statement::Log { prefix: "weft direct".into(), group: 0x5745, bytes: 128 }],
            "log prefix \"weft direct\" group 22341 snaplen 128",
        ),
        (vec![DestinationIsLocal { negated: false }, accept()], "fib daddr type local accept"),
        (vec![SourceIsLocal { negated: true }, accept()], "fib saddr type != local accept"),
        (vec![SetMarkBits(0x0800_0000)], "meta mark set meta mark | 0x08000000"),
        (vec![Counter, Statement::Verdict(Verdict::Jump("side".into()))], "jump side"),
        (vec![Statement::Verdict(goto("side"))], "goto side"),
        (vec![Statement::Verdict(Verdict::Return)], "return"),
        (vec![Statement::Reject], "meta l4proto tcp reject with tcp reset"),
        (vec![Statement::Reject], "reject\n"),
        (
            vec![matches(Field::L4Protocol, Datum::Protocol(Protocol::Tcp)), Statement::Reject],
            "meta l4proto tcp reject with tcp reset",
        ),
        (
            vec![matches(Field::L4Protocol, Datum::Protocol(Protocol::Udp)), Statement::Reject],
            "meta l4proto udp reject",
        ),
        (
            vec![
                Statement::Lookup {
                    key: vec![Field::InputLink, Field::Ip4Source],
                    negated: true,
                    set: "pods4".into(),
                },
                Statement::Verdict(Verdict::Drop),
            ],
            "iifname . ip saddr != @pods4 drop",
        ),
        (
            vec![
                Statement::Lookup {
                    key: vec![Field::InputLink, Field::Ip6Source],
                    negated: false,
                    set: "pods6".into(),
                },
                accept(),
            ],
            "iifname . ip6 saddr @pods6 accept",
        ),
        (
            vec![
                Statement::Lookup { key: vec![Field::Ip4Source], negated: false, set: "nets4".into() },
                accept(),
            ],
            "ip saddr @nets4 accept",
        ),
        (
            vec![
                Statement::Lookup { key: vec![Field::Ip6Source], negated: true, set: "nets6".into() },
                accept(),
            ],
            "ip6 saddr != @nets6 accept",
        ),
        (
            vec![
                Statement::Lookup { key: vec![Field::Ip4Destination], negated: false, set: "alive".into() },
                accept(),
            ],
            "ip daddr @alive accept",
        ),
        (
            vec![Statement::VerdictMap {
                key: vec![Field::L4Protocol, Field::DestinationPort],
                map: "ports".into(),
            }],
            "meta l4proto . th dport vmap @ports",
        ),
    ]
}

fn nat_rules() -> Vec<Listed> {
    vec![
        (
            vec![
                matches(Field::L4Protocol, Datum::Protocol(Protocol::Tcp)),
                Statement::Dnat { address: "10.0.0.2".parse().unwrap(), port: Some(80) },
            ],
            "meta l4proto tcp dnat ip to 10.0.0.2:80",
        ),
        (
            vec![
                matches(Field::L4Protocol, Datum::Protocol(Protocol::Tcp)),
                Statement::Dnat { address: "fd00::2".parse().unwrap(), port: Some(80) },
            ],
            "meta l4proto tcp dnat ip6 to [fd00::2]:80",
        ),
        (vec![Statement::Dnat { address: "10.0.0.2".parse().unwrap(), port: None }], "dnat ip to 10.0.0.2"),
    ]
}

fn source_nat_rules() -> Vec<Listed> {
    vec![
        (vec![Statement::Snat { address: "10.0.0.1".parse().unwrap() }], "snat ip to 10.0.0.1"),
        (vec![Statement::Snat { address: "fd00::1".parse().unwrap() }], "snat ip6 to fd00::1"),
        (vec![Statement::Masquerade], "masquerade fully-random"),
    ]
}

fn chain(base: Option<Base>, rules: &[(Vec<Statement>, &str)]) -> Chain {
    let rules = rules.iter().enumerate();
    let rules =
        rules.map(|(index, (statements, _))| Rule::new(statements.clone()).comment(format!("rule {index}")));
    Chain { base, rules: rules.collect() }
}

fn everything() -> Table {
    use KeyType::{Ipv4Address, Ipv6Address, L4Protocol, LinkName, Port};
    let mut table = table("weft-all");
    let mut nets4 = Set::new(vec![Ipv4Address], SetData::None);
    nets4.interval = true;
    let prefixes = ["10.0.0.0/24", "10.0.1.0/24", "192.168.7.7/32", "224.0.0.0/3"];
    nets4.groups.insert("nets".into(), group(prefixes.map(|text| (vec![net(text)], ElementData::None))));
    let mut nets6 = Set::new(vec![Ipv6Address], SetData::None);
    nets6.interval = true;
    nets6.groups.insert(
        "nets".into(),
        group(["fd00::/8", "ff00::/8"].map(|text| (vec![net(text)], ElementData::None))),
    );
    let mut pods4 = Set::new(vec![LinkName, Ipv4Address], SetData::None);
    pods4.groups.insert(
        "pod".into(),
        group([(vec![Datum::Name("weftp1".into()), ip("10.0.0.9")], ElementData::None)]),
    );
    let pods6 = Set::new(vec![LinkName, Ipv6Address], SetData::None);
    let mut alive = Set::new(vec![Ipv4Address], SetData::None);
    alive.timeout_millis = Some(600);
    let mut ports = Set::new(vec![L4Protocol, Port], SetData::Verdict);
    ports.groups.insert(
        "all".into(),
        group([
            (vec![Datum::Protocol(Protocol::Tcp), Datum::Port(80)], ElementData::Verdict(goto("side"))),
            (vec![Datum::Protocol(Protocol::Sctp), Datum::Port(81)], ElementData::Verdict(Verdict::Drop)),
            (vec![Datum::ProtocolNumber(58), Datum::Port(82)], ElementData::Verdict(Verdict::Accept)),
        ]),
    );
    let sets = [
        ("nets4", nets4),
        ("nets6", nets6),
        ("pods4", pods4),
        ("pods6", pods6),
        ("alive", alive),
        ("ports", ports),
    ];
    table.sets = sets.map(|(name, set)| (name.to_owned(), set)).into();
    let chains = [
        ("input", chain(base(ChainKind::Filter, Hook::Input, -5), &filter_rules())),
        ("raw", chain(base(ChainKind::Filter, Hook::Prerouting, -300), &[(vec![Statement::Notrack], "")])),
        ("out", chain(base(ChainKind::Route, Hook::Output, -5), &[(vec![Statement::SetMarkBits(1)], "")])),
        ("dstnat", chain(base(ChainKind::Nat, Hook::Prerouting, -105), &nat_rules())),
        ("srcnat", chain(base(ChainKind::Nat, Hook::Postrouting, 95), &source_nat_rules())),
        ("side", Chain::default()),
    ];
    table.chains = chains.map(|(name, chain)| (name.to_owned(), chain)).into();
    table
}

#[test]
fn nft_lists_what_every_statement_means() {
    in_namespace(|| {
        let desired = everything();
        let mut owner = NftTable::new("weft-all");
        assert!(!owner.apply(&desired, Trust::Nothing).unwrap().is_empty());
        let listing = listing().replace(" packets 0 bytes 0", "");
        println!("{listing}\n{desired}");
        for rules in [filter_rules(), nat_rules(), source_nat_rules()] {
            for (index, (_, text)) in rules.iter().enumerate() {
                let expected = format!("{} comment \"rule {index}\"", text.trim());
                assert!(listing.contains(&expected), "missing: {expected}\n{listing}");
            }
        }
        for text in [
            "type filter hook input priority filter - 5; policy accept;",
            "type filter hook prerouting priority raw; policy accept;",
            "type route hook output priority filter - 5; policy accept;",
            "type nat hook prerouting priority dstnat - 5; policy accept;",
            "type nat hook postrouting priority srcnat - 5; policy accept;",
            "notrack",
            "10.0.0.0/24, 10.0.1.0/24",
            "192.168.7.7, 224.0.0.0/3",
            "elements = { fd00::/8,\nff00::/8 }",
            "\"weftp1\" . 10.0.0.9",
            "timeout 600ms",
            "tcp . 80 : goto side",
            "sctp . 81 : drop",
            "ipv6-icmp . 82 : accept",
        ] {
            assert!(listing.contains(text), "missing: {text}\n{listing}");
        }
        settles(&mut owner, &desired);
        settles(&mut NftTable::new("weft-all"), &desired);
    });
}

#[test]
fn nft_lists_the_proxy_s_maps_of_both_families() {
    in_namespace(|| {
        let desired = proxy(&[
            ("10.96.0.1", 80, &[("10.1.0.1", 8080), ("10.1.0.2", 8080)]),
            ("fd96::1", 80, &[("fd01::1", 8080), ("fd01::2", 8080)]),
        ]);
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        shows("ip daddr . meta l4proto . th dport vmap @service-ips comment \"to services\"");
        shows("dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints");
        shows("dnat ip6 to ip6 daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints6");
        shows("10.96.0.1 . tcp . 80 : goto lb-2");
        shows("fd96::1 . tcp . 80 . 0x00000001 : fd01::2 . 8080");
        settles(&mut owner, &desired);
    });
}

#[test]
fn what_we_print_nft_reads_and_lists_like_what_we_load() {
    in_namespace(|| {
        let mut desired = everything();
        // Two rules of the kernel for one of ours; nft would make one.
        for chain in desired.chains.values_mut() {
            chain.rules.retain(|rule| !rule.statements.contains(&Statement::Reject));
        }
        NftTable::new("weft-all").apply(&desired, Trust::Nothing).unwrap();
        let ours = sorted_listing();
        assert!(NftTable::delete("weft-all").unwrap());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), desired.to_string()).unwrap();
        run(&format!("nft -f {}", file.path().display()));
        let theirs = sorted_listing();
        assert_eq!(ours, theirs);
    });
}
