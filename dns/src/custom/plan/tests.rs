use hickory_proto::rr::RecordType;
use proptest::prelude::*;
use weft_model::NamespacedName;

use super::*;
use crate::custom::{Custom, Rewritten, Route, Tls, Verdict, may_verify_pods, over};
use crate::zone::Data;

fn config_map(data: &[(&str, &str)]) -> ConfigMap {
    ConfigMap {
        key: NamespacedName::new("kube-system", "coredns-custom"),
        data: data.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect(),
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// What is in force, when nothing is wrong.
fn custom(data: &[(&str, &str)]) -> Custom {
    let (parts, problems) = plan(&config_map(data));
    assert_eq!(problems, Vec::new());
    Custom::new(&parts, &BTreeMap::new(), vec![name("cluster.local")])
}

fn problems(data: &[(&str, &str)]) -> Vec<String> {
    plan(&config_map(data)).1.iter().map(ToString::to_string).collect()
}

/// The answer section as text, or the code of an answer without one, or that nothing is said.
fn said(custom: &Custom, text: &str, record_type: RecordType) -> String {
    match custom.answer(&name(text), record_type) {
        Verdict::Passed { cluster: true } => "cluster".to_owned(),
        Verdict::Passed { cluster: false } => "forwarded".to_owned(),
        Verdict::Hosts { data, ttl_seconds } => {
            let data: Vec<String> = data.iter().map(Data::to_string).collect();
            format!("{ttl_seconds} {}", data.join(" "))
        }
        Verdict::Records { code, answers, .. } if answers.is_empty() => format!("{code:?}"),
        Verdict::Records { answers, .. } => {
            answers.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        }
    }
}

/// Asked, and believed whatever they say.
fn servers(list: &[&str]) -> Route {
    let target = Target::Servers(list.iter().map(|server| Server::plain(server.parse().unwrap())).collect());
    Route { target, rebinding: None }
}

#[test]
fn hosts_answer_names_and_addresses_and_pass_the_rest_on() {
    let text =
        "hosts {\n 192.0.2.7 printer.lan printer\n 2001:db8::7 printer.lan\n ttl 60\n fallthrough\n}\n";
    let custom = custom(&[("lan.override", text)]);
    assert_eq!(said(&custom, "Printer.LAN", RecordType::A), "60 A 192.0.2.7");
    assert_eq!(said(&custom, "printer.lan", RecordType::AAAA), "60 AAAA 2001:db8::7");
    assert_eq!(said(&custom, "printer.lan", RecordType::MX), "60 ", "it exists without such a record");
    assert_eq!(said(&custom, "7.2.0.192.in-addr.arpa", RecordType::PTR), "60 PTR printer.lan. PTR printer.");
    assert_eq!(said(&custom, "scanner.lan", RecordType::A), "cluster");
    assert!(custom.concerns(name("printer").wire()) && !custom.concerns(name("scanner.lan").wire()));
}

#[test]
fn hosts_without_reverse_names_have_none_wherever_it_stands() {
    let custom = custom(&[("a.override", "hosts {\n no_reverse\n 192.0.2.7 a.lan\n fallthrough\n}\n")]);
    assert_eq!(said(&custom, "a.lan", RecordType::A), "3600 A 192.0.2.7");
    assert_eq!(said(&custom, "7.2.0.192.in-addr.arpa", RecordType::PTR), "cluster");
}

#[test]
fn hosts_without_fallthrough_end_the_look_up_in_their_own_block_only() {
    let block = "example.org {\n hosts {\n  192.0.2.7 www.example.org\n }\n}\n";
    let own = custom(&[("a.server", block)]);
    assert_eq!(said(&own, "www.example.org", RecordType::A), "3600 A 192.0.2.7");
    assert_eq!(said(&own, "absent.example.org", RecordType::A), "ServFail");
    assert!(own.concerns(name("absent.example.org").wire()));
    let everywhere = problems(&[("a.override", "hosts {\n 192.0.2.7 www.example.org\n}\n")]);
    assert_eq!(everywhere.len(), 1);
    assert!(everywhere[0].contains("data[a.override] line 1: hosts without fallthrough"), "{everywhere:?}");
}

#[test]
fn names_are_rewritten_by_every_kind_of_rule() {
    let custom = custom(&[(
        "a.override",
        "rewrite name git.example.com gitea.apps.svc.cluster.local\n\
         rewrite name prefix old- new-\n\
         rewrite name suffix .corp.example .default.svc.cluster.local answer auto\n\
         rewrite continue name substring staging production\n\
         rewrite stop {\n name regex (.*)-([a-z]+)\\.shop\\. {1}.{2}.svc.cluster.local\n answer name a b\n}\n",
    )]);
    let rewritten = |text: &str| custom.rewrite(&name(text)).map(|Rewritten(name)| name.to_string());
    assert_eq!(rewritten("GIT.example.com").as_deref(), Some("gitea.apps.svc.cluster.local."));
    assert_eq!(rewritten("old-web.lan").as_deref(), Some("new-web.lan."));
    assert_eq!(rewritten("db.corp.example").as_deref(), Some("db.default.svc.cluster.local."));
    assert_eq!(
        rewritten("web-staging.shop").as_deref(),
        Some("web.production.svc.cluster.local."),
        "both rules"
    );
    assert_eq!(rewritten("notcorp.example"), None);
    assert!(custom.concerns(name("git.example.com").wire()) && !custom.concerns(name("web.lan").wire()));
}

#[test]
fn templates_make_records_or_codes_of_names() {
    let custom = custom(&[(
        "a.server",
        "dev.example {\n template IN A {\n  match ^ip-(?P<a>[0-9]+)-([0-9]+)\\.dev\\.example\\.$\n  \
         answer \"{{ .Name }} 60 IN A 10.0.{{ .Group.a }}.{{ index .Match 2 }}\"\n  fallthrough\n }\n \
         template ANY AAAA {\n  rcode NXDOMAIN\n }\n template IN TXT {\n  answer \"{{ .Name }} IN {{ .Type }} zone-{{ .Zone }}\"\n }\n}\n",
    )]);
    assert_eq!(said(&custom, "ip-7-9.dev.example", RecordType::A), "ip-7-9.dev.example. 60 IN A 10.0.7.9");
    assert_eq!(said(&custom, "other.dev.example", RecordType::A), "forwarded");
    assert_eq!(said(&custom, "other.dev.example", RecordType::AAAA), "NXDomain");
    assert_eq!(
        said(&custom, "x.dev.example", RecordType::TXT),
        "x.dev.example. 3600 IN TXT zone-dev.example."
    );
    assert_eq!(said(&custom, "ip-7-999.dev.example", RecordType::A), "ServFail", "no address comes of it");
}

#[test]
fn forwards_are_by_zone_and_a_block_without_any_asks_nobody() {
    let custom = custom(&[
        (
            "a.server",
            "corp.example, corp.test:53 {\n errors\n forward . 192.0.2.1 [2001:db8::1]:5353 dns://192.0.2.2:54 {\n  max_fails 2\n  except public.corp.example\n }\n}\n",
        ),
        ("b.server", "10.1.0.0/16 {\n forward . /etc/resolv.conf\n}\nsilent.example {\n log\n}\n"),
        ("c.override", "forward . 192.0.2.9\ncache 60 {\n denial 100 10\n}\n"),
    ]);
    let corp = servers(&["192.0.2.1:53", "[2001:db8::1]:5353", "192.0.2.2:54"]);
    let expected = BTreeMap::from([
        (name("corp.example"), corp.clone()),
        (name("public.corp.example"), servers(&[])),
        (name("corp.test"), corp),
        (name("1.10.in-addr.arpa"), Route { target: Target::Host, rebinding: None }),
        (name("silent.example"), servers(&[])),
        (Name::root(), servers(&["192.0.2.9:53"])),
    ]);
    assert_eq!(custom.routes(), expected);
    assert_eq!(custom.cache_seconds(), (Some(60), Some(10)));
    assert!(custom.logs(&name("a.silent.example")) && !custom.logs(&name("corp.example")));
}

#[test]
fn an_exception_of_one_forward_is_left_to_another_in_either_order() {
    let general = "forward . 192.0.2.1 {\n except corp.example lost.example\n}\n";
    let corp = "forward corp.example 192.0.2.2\n";
    for text in [[general, corp].concat(), [corp, general].concat()] {
        let routes = custom(&[("a.override", &text)]).routes();
        assert_eq!(routes[&name("corp.example")], servers(&["192.0.2.2:53"]));
        assert_eq!(routes[&name("lost.example")], servers(&[]));
        assert_eq!(routes[&Name::root()], servers(&["192.0.2.1:53"]));
    }
}

#[test]
fn a_block_takes_its_names_from_the_cluster_unless_it_says_kubernetes() {
    let custom = custom(&[
        ("a.server", "stub.cluster.local {\n forward . 192.0.2.1\n}\n"),
        ("b.server", "more.cluster.local {\n kubernetes cluster.local {\n  pods insecure\n }\n}\n"),
    ]);
    assert_eq!(said(&custom, "a.stub.cluster.local", RecordType::A), "forwarded");
    assert!(custom.concerns(name("a.stub.cluster.local").wire()));
    assert_eq!(said(&custom, "a.more.cluster.local", RecordType::A), "cluster");
    assert!(!custom.concerns(name("a.more.cluster.local").wire()));
}

#[test]
fn rebinding_is_stopped_where_it_is_said_and_never_for_a_domain_with_resolvers_of_its_own() {
    let rule = Rebinding { except: vec![name("lan")], localhost_ok: true };
    let text =
        "stop-dns-rebind {\n rebind-domain-ok lan\n rebind-localhost-ok\n}\nforward corp.example 192.0.2.2\n";
    let blocks = "split.example {\n forward . 192.0.2.3\n}\nguarded.example {\n stop-dns-rebind\n forward . 192.0.2.4\n}\n";
    let routes = custom(&[("a.override", text), ("b.server", blocks)]).routes();
    let expected = BTreeMap::from([
        (Name::root(), Route { target: Target::Host, rebinding: Some(rule) }),
        (name("corp.example"), servers(&["192.0.2.2:53"])),
        (name("split.example"), servers(&["192.0.2.3:53"])),
        (
            name("guarded.example"),
            Route { rebinding: Some(Rebinding::default()), ..servers(&["192.0.2.4:53"]) },
        ),
    ]);
    assert_eq!(routes, expected);
}

#[test]
fn the_first_word_about_names_of_pods_holds_and_silence_is_insecure() {
    let of = |data: &[(&str, &str)]| custom(data).pod_mode();
    assert_eq!(of(&[]), PodMode::Insecure);
    assert_eq!(of(&[("a.override", "kubernetes cluster.local {\n fallthrough\n}\n")]), PodMode::Insecure);
    let verified = ("a.override", "kubernetes cluster.local {\n pods verified\n}\n");
    let disabled = ("Corefile", ".:53 {\n kubernetes {\n  pods disabled\n }\n}\n");
    assert_eq!(of(&[verified]), PodMode::Verified);
    assert_eq!(of(&[verified, disabled]), PodMode::Disabled, "keys in their order");
    let parts = |data: &[(&str, &str)]| plan(&config_map(data)).0;
    assert!(may_verify_pods(&parts(&[verified])) && !may_verify_pods(&parts(&[disabled])));
    assert!(may_verify_pods(&parts(&[("a.override", "hosts {\n")])), "what it said before is not known here");
}

#[test]
fn servers_over_tls_have_a_name_or_their_address_and_authorities_of_the_host_or_a_key() {
    let text = "forward . tls://9.9.9.9 tls://[2620:fe::fe]:8853 192.0.2.1 {\n tls_servername dns.quad9.net\n}\n\
        forward corp.example tls://192.0.2.2 {\n tls /etc/coredns/custom/ca.crt\n}\n";
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = rcgen::CertificateParams::new(["corp".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let routes = custom(&[("a.override", text), ("ca.crt", &pem)]).routes();
    let over_tls = |address: &str, name: Option<&str>, authorities: Option<&str>| Server {
        address: address.parse().unwrap(),
        tls: Some(Arc::new(Tls { name: name.map(str::to_owned), authorities: authorities.map(Arc::from) })),
    };
    let quad9 = |address| over_tls(address, Some("dns.quad9.net"), None);
    let plain = Server::plain("192.0.2.1:53".parse().unwrap());
    let expected = vec![quad9("9.9.9.9:853"), quad9("[2620:fe::fe]:8853"), plain];
    assert_eq!(routes[&Name::root()].target, Target::Servers(expected));
    let corp = over_tls("192.0.2.2:853", None, Some(&pem));
    assert_eq!(routes[&name("corp.example")].target, Target::Servers(vec![corp]));
    let faults = [
        ("forward . tls://1.1.1.1 {\n tls_servername 'x y'\n}\n", "data[a.override] line 2"),
        (
            "forward . tls://1.1.1.1 {\n tls_servername dns example\n}\n",
            "line 2: tls_servername takes one name",
        ),
        (
            "forward . tls://1.1.1.1 {\n tls_servername a_b!\n}\n",
            "line 2: tls_servername \"a_b!\" is no name of a host",
        ),
        (
            "forward . tls://1.1.1.1 {\n tls ca.crt\n}\n",
            "line 2: tls ca.crt: the ConfigMap has no key ca.crt",
        ),
        ("forward . tls://1.1.1.1 {\n tls b.txt\n}\n", "line 2: tls b.txt: key b.txt holds no certificate"),
        ("forward . tls://dns.example\n", "line 1: \"dns.example\" is no address of a server"),
    ];
    for (text, expected) in faults {
        let found = problems(&[("a.override", text), ("b.txt", "hello")]);
        assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
    }
}

#[test]
fn a_zone_file_stands_in_another_key() {
    let zone = "$TTL 300\n@ IN SOA ns admin 1 2 3 4 60\nwww IN A 192.0.2.80\n";
    let data =
        [("a.server", "example.org {\n file /etc/coredns/custom/example.db\n}\n"), ("example.db", zone)];
    let custom = custom(&data);
    assert_eq!(said(&custom, "www.example.org", RecordType::A), "www.example.org. 300 IN A 192.0.2.80");
    assert_eq!(said(&custom, "absent.example.org", RecordType::A), "NXDomain");
    let missing = problems(&data[..1]);
    assert!(missing[0].contains("has no key example.db"), "{missing:?}");
}

#[test]
fn what_is_not_there_is_named_by_its_line_and_the_rest_is_used() {
    let text = "errors\ndns64\nhosts {\n 192.0.2.7 a.lan\n fallthrough\n}\nrewrite ttl example.org 30\n\
        forward lan quic://192.0.2.1 192.0.2.2 {\n force_tcp\n}\n";
    let (parts, found) = plan(&config_map(&[("a.override", text), ("b.server", "tls://example.org {\n}\n")]));
    let lines: Vec<String> = found.iter().map(|problem| problem.message.clone()).collect();
    assert_eq!(
        lines,
        [
            "data[a.override] line 2: plugin dns64 is not there; this line is left out",
            "data[a.override] line 7: rewrite ttl: only names are rewritten; this line is left out",
            "data[a.override] line 9: forward: force_tcp is not there; this line is left out",
            "data[a.override] line 8: forward to quic://192.0.2.1: only plain DNS and tls:// are spoken; this server is left out",
            "data[b.server] line 1: tls://example.org: only DNS on port 53 is served; this block is left out",
        ]
    );
    assert!(found.iter().all(|problem| problem.reason == Reason::NotSupported));
    let custom = Custom::new(&parts, &BTreeMap::new(), Vec::new());
    assert_eq!(said(&custom, "a.lan", RecordType::A), "3600 A 192.0.2.7");
    assert_eq!(custom.routes()[&name("lan")], servers(&["192.0.2.2:53"]));
}

#[test]
fn what_is_wrong_is_named_by_its_line_and_what_was_before_stays() {
    let wrong = [
        ("forward . 192.0.2.999\n", "line 1: \"192.0.2.999\" is no address of a server"),
        ("errors\nhosts {\n nonsense a.lan\n}\n", "line 3: \"nonsense\" is no IP address"),
        ("hosts {\n", "line 1: the block that begins here does not end"),
        ("rewrite name regex ( b\n", "line 1: \"(\" is no regular expression"),
        ("template IN NONSENSE {\n}\n", "line 1: template: \"NONSENSE\" is no type"),
        ("forward . \n", "line 1: forward needs one to 15 servers"),
        (
            "kubernetes {\n pods trusted\n}\n",
            "line 2: pods \"trusted\" is none of disabled, insecure, verified",
        ),
        ("stop-dns-rebind {\n rebind-domain-ok a..b\n}\n", "line 2: \"a..b\" is no name"),
        ("cache {\n success 5 soon\n}\n", "line 2: \"soon\" is no number of seconds"),
    ];
    let good = plan(&config_map(&[("a.override", "hosts {\n 192.0.2.7 a.lan\n fallthrough\n}\n")])).0;
    for (text, expected) in wrong {
        let (parts, found) = plan(&config_map(&[("a.override", text)]));
        assert_eq!((found.len(), found[0].reason), (1, Reason::InvalidField), "{text}: {found:?}");
        assert!(found[0].message.contains(expected), "{text}: {}", found[0].message);
        assert_eq!(over(&parts, &good), good, "{text}");
    }
    assert_eq!(over(&Parts::new(), &good), Parts::new(), "a key that is gone says nothing more");
}

#[test]
fn names_of_nodes_are_known_and_users_go_before() {
    let nodes = BTreeMap::from([(
        name("node1"),
        ["192.0.2.11".parse().unwrap(), "2001:db8::11".parse().unwrap()].into(),
    )]);
    let none = Custom::new(&Parts::new(), &nodes, Vec::new());
    assert_eq!(said(&none, "node1", RecordType::A), "30 A 192.0.2.11");
    assert_eq!(said(&none, "node1", RecordType::AAAA), "30 AAAA 2001:db8::11");
    assert_eq!(said(&none, "node2", RecordType::A), "cluster");
    assert!(
        none.concerns(name("node1").wire())
            && none.concerns(Name::reverse("192.0.2.11".parse().unwrap()).wire())
    );
    assert!(!none.concerns(name("web.default.svc.cluster.local").wire()));
    let parts = plan(&config_map(&[("a.override", "hosts {\n 192.0.2.99 node1\n fallthrough\n}\n")])).0;
    assert_eq!(said(&Custom::new(&parts, &nodes, Vec::new()), "node1", RecordType::A), "3600 A 192.0.2.99");
}

proptest! {
    #[test]
    fn any_words_are_read_or_refused(
        lines in prop::collection::vec(
            prop::collection::vec(
                prop::sample::select(vec![
                    "hosts", "forward", "rewrite", "template", "cache", "file", "name", "regex", ".", "{", "}", "\n", "IN", "A",
                    "192.0.2.1", "a.b", "match", "answer", "{{ .Name }}", "\"", "30", "except", "(", "continue", "ANY", "a.db",
                ]),
                0..6,
            ),
            0..12,
        ),
        server: bool,
    ) {
        let text: Vec<String> = lines.iter().map(|words| words.join(" ")).collect();
        let text = text.join("\n");
        let text = if server { format!("example.org {{\n{text}\n}}\n") } else { text };
        let key = if server { "a.server" } else { "a.override" };
        let (parts, _) = plan(&config_map(&[(key, &text), ("a.db", "@ IN A 1.2.3.4")]));
        let custom = Custom::new(&parts, &BTreeMap::new(), vec![name("cluster.local")]);
        for asked in ["a.b", "www.example.org", "web.default.svc.cluster.local", "."] {
            let asked = name(asked);
            custom.concerns(asked.wire());
            custom.rewrite(&asked);
            custom.answer(&asked, RecordType::A);
        }
        custom.routes();
    }
}
