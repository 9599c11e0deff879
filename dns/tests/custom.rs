//! What users add with the ConfigMap `coredns-custom`, on real sockets: applied live, named where it is not understood.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use place::*;
use weft_model::objects::{Bandwidth, Node, Pod};
use weft_model::{PodKey, Snapshot};

fn host(name: &str, last: u8) -> Record {
    Record::from_rdata(name.parse().unwrap(), 60, RData::A(A::new(192, 0, 2, last)))
}

const HOSTS: &str = "hosts {\n 192.0.2.7 printer.lan\n 2001:db8::7 printer.lan\n fallthrough\n}\n";

#[test]
fn a_config_map_comes_changes_and_goes_without_a_restart() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, vec![host("printer.lan.", 99)]);
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("printer.lan"), ["192.0.2.99"]);
        let applied = place.apply(&with_custom(&zoo(), &[("lan.override", HOSTS)]));
        assert_eq!(applied.changed, ["zones, hosts and rules of users"]);
        for transport in ["+notcp", "+tcp"] {
            assert_eq!(dig_short(&format!("{transport} Printer.LAN")), ["192.0.2.7"]);
            assert_eq!(dig_short(&format!("{transport} printer.lan AAAA")), ["2001:db8::7"]);
            assert_eq!(dig_short(&format!("{transport} -x 192.0.2.7")), ["printer.lan."]);
        }
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
        place.apply(&with_custom(&zoo(), &[("lan.override", &HOSTS.replace("192.0.2.7", "192.0.2.8"))]));
        assert_eq!(dig_short("printer.lan"), ["192.0.2.8"]);
        place.apply(&zoo());
        assert_eq!(dig_short("printer.lan"), ["192.0.2.99"]);
    });
}

#[test]
fn a_bad_config_map_keeps_the_last_good_one_and_is_named() {
    in_namespace(|place| {
        place.serve(&with_custom(&zoo(), &[("lan.override", HOSTS)]));
        assert_eq!(dig_short("printer.lan"), ["192.0.2.7"]);
        let bad = with_custom(&zoo(), &[("lan.override", "hosts {\n 192.0.2 printer.lan\n}\n")]);
        let problems: Vec<String> = plan(&bad).problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            [
                "ConfigMap kube-system/coredns-custom: InvalidField: data[lan.override] line 2: \"192.0.2\" is no IP address, and \
              no option of hosts; correct it; until it is corrected, what lan.override said before stays"
            ]
        );
        place.apply(&bad);
        assert_eq!(dig_short("printer.lan"), ["192.0.2.7"]);
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn a_domain_is_forwarded_to_its_own_servers_on_any_port() {
    in_namespace(|place| {
        let general = Upstream::start("127.0.0.2", Manner::Plain, vec![host("www.example.com.", 80)]);
        let corp = Upstream::start(
            "127.0.0.3",
            Manner::Plain,
            vec![host("git.corp.example.", 81), host("x.cluster.local.", 82)],
        );
        place.nameservers(&["127.0.0.2"]);
        place.serve(&with_custom(
            &zoo(),
            &[("corp.server", "corp.example:53 x.cluster.local {\n forward . 127.0.0.3\n cache 30\n}\nnobody.example {\n errors\n}\n")],
        ));
        assert_eq!(dig_short("git.corp.example"), ["192.0.2.81"]);
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        assert_eq!(dig_short("x.cluster.local"), ["192.0.2.82"], "taken from the cluster's own domain");
        assert_eq!((general.asked(), corp.asked()), (1, 2));
        assert!(dig("a.nobody.example").contains("status: SERVFAIL"));
        assert_eq!((general.asked(), corp.asked()), (1, 2), "nobody is asked");
    });
}

#[test]
fn a_rewritten_name_is_answered_under_the_name_that_was_asked_for() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, vec![host("www.example.com.", 80)]);
        place.nameservers(&["127.0.0.2"]);
        place.serve(&with_custom(
            &zoo(),
            &[(
                "a.override",
                "rewrite name suffix .apps.example .default.svc.cluster.local\nrewrite name mirror.example www.example.com\n",
            )],
        ));
        let text = dig("Web.apps.Example");
        assert!(text.contains("Web.apps.Example. 5 IN A 10.43.0.80"), "{text}");
        assert!(dig("mirror.example").contains("mirror.example. 60 IN A 192.0.2.80"));
        assert!(dig("absent.apps.example").contains("status: NXDOMAIN"));
    });
}

#[test]
fn a_pods_search_path_is_walked_for_it_when_autopath_is_on() {
    in_namespace(|place| {
        let upstream = Upstream::start(
            "127.0.0.2",
            Manner::Plain,
            vec![host("www.example.com.", 80), host("intra.lan.", 81)],
        );
        std::fs::write(place.upstream_conf(), "search lan\nnameserver 127.0.0.2\n").unwrap();
        place.serve(&zoo());
        // The pod of 127.0.0.1 is in the Namespace default.
        let ask = |what: &str| dig(&format!("-b 127.0.0.1 {what}"));
        assert!(
            ask("www.example.com.default.svc.cluster.local").contains("status: NXDOMAIN"),
            "switched off"
        );
        place.apply(&with_custom(&zoo(), &[("a.override", "autopath @kubernetes\n")]));
        for _ in 0..2 {
            let text = ask("Www.example.com.default.svc.cluster.local");
            assert!(
                text.contains("Www.example.com.default.svc.cluster.local. 60 IN CNAME www.example.com.")
                    && text.contains("www.example.com. 60 IN A 192.0.2.80"),
                "{text}"
            );
        }
        let text = ask("www.example.com.default.svc.cluster.local AAAA");
        assert!(text.contains("status: NOERROR") && text.contains("CNAME www.example.com."), "{text}");
        assert!(
            ask("+short web.default.default.svc.cluster.local").ends_with("10.43.0.80"),
            "further down the path"
        );
        assert!(
            ask("+short intra.default.svc.cluster.local").ends_with("192.0.2.81"),
            "the host's search path"
        );
        let users = "autopath @kubernetes\nhosts {\n 192.0.2.8 www.outside.example\n fallthrough\n}\n";
        place.apply(&with_custom(&zoo(), &[("a.override", users)]));
        assert!(
            ask("+short www.outside.example.default.svc.cluster.local").ends_with("192.0.2.8"),
            "what users say"
        );
        let before = upstream.asked();
        assert!(ask("absent.example.com.default.svc.cluster.local").contains("status: NXDOMAIN"));
        assert_eq!(upstream.asked(), before + 2, "below the host's domain, and as it stands");
        assert!(
            ask("www.example.com.empty.svc.cluster.local").contains("status: NXDOMAIN"),
            "another's path"
        );
        assert!(
            dig("-b 127.0.0.1 www.example.com.default.svc.cluster.local MX").contains("status: NXDOMAIN")
        );
        // Who is no pod of this node.
        assert!(dig("www.example.com.default.svc.cluster.local").contains("status: NXDOMAIN"));
    });
}

#[test]
fn an_explanation_shows_the_search_path_each_answer_and_its_source() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, vec![host("www.example.com.", 80)]);
        place.nameservers(&["127.0.0.2"]);
        place.serve(&with_custom(
            &zoo(),
            &[("a.override", "rewrite name mine.example web.default.svc.cluster.local\n")],
        ));
        let explain = |place: &Place, name: &str| {
            let explainer = place.explainer.clone().unwrap();
            let text = place.runtime.block_on(explainer.explain(ip("127.0.0.1"), "default", name)).unwrap();
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            text.lines().map(words).collect::<Vec<_>>()
        };
        assert_eq!(
            explain(place, "web"),
            [
                "web.default.svc.cluster.local.",
                "A 10.43.0.80 (5 s) Service default/web",
                "AAAA fd00:43::80 (5 s) Service default/web",
                "the resolver stops here, 3 names before the end of its search path",
            ]
        );
        let text = explain(place, "www.example.com");
        assert_eq!(
            text[..2],
            ["www.example.com.default.svc.cluster.local.", "A no such name names of the cluster"]
        );
        assert_eq!(
            text[9..],
            [
                "www.example.com.",
                "A 192.0.2.80 (60 s) upstream 127.0.0.2:53",
                "AAAA no such record upstream 127.0.0.2:53"
            ]
        );
        place.apply(&with_custom(&zoo(), &[("a.override", "autopath @kubernetes\n")]));
        assert_eq!(
            explain(place, "www.example.com")[..2],
            [
                "www.example.com.default.svc.cluster.local.",
                "A www.example.com. 192.0.2.80 (60 s) autopath of coredns-custom"
            ]
        );
        place.apply(&with_custom(
            &zoo(),
            &[("a.override", "rewrite name mine.example web.default.svc.cluster.local\n")],
        ));
        let text = explain(place, "mine.example.");
        assert_eq!(
            text[1],
            "A 10.43.0.80 (5 s) rewritten to web.default.svc.cluster.local. by coredns-custom; Service default/web"
        );
    });
}

#[test]
fn answers_that_lead_inside_are_emptied_where_it_is_said_and_split_horizon_stays() {
    in_namespace(|place| {
        let lies = |name: &str, address: A| Record::from_rdata(name.parse().unwrap(), 60, RData::A(address));
        let alias = |name: &str, target: &str| {
            let target = RData::CNAME(hickory_proto::rr::rdata::CNAME(target.parse().unwrap()));
            Record::from_rdata(name.parse().unwrap(), 60, target)
        };
        let general = Upstream::start(
            "127.0.0.2",
            Manner::Plain,
            vec![
                lies("evil.example.", A::new(192, 168, 1, 1)),
                lies("service.example.", A::new(10, 43, 0, 80)),
                lies("local.example.", A::new(127, 0, 0, 1)),
                alias("alias.example.", "evil.example."),
                lies("nas.lan.", A::new(192, 168, 1, 20)),
                host("www.example.", 80),
            ],
        );
        let _corp =
            Upstream::start("127.0.0.3", Manner::Plain, vec![lies("git.corp.example.", A::new(10, 1, 0, 5))]);
        place.nameservers(&["127.0.0.2"]);
        let corp = ("corp.server", "corp.example {\n forward . 127.0.0.3\n}\n");
        place.serve(&with_custom(&zoo(), &[corp]));
        assert_eq!(dig_short("evil.example"), ["192.168.1.1"], "nobody has asked for protection");
        let guard = "stop-dns-rebind {\n rebind-domain-ok lan\n}\n";
        place.apply(&with_custom(&zoo(), &[corp, ("a.override", guard)]));
        for name in ["evil.example", "service.example", "local.example"] {
            for transport in ["+notcp", "+tcp"] {
                let text = dig(&format!("{transport} {name}"));
                assert!(text.contains("status: NOERROR") && text.contains("ANSWER: 0"), "{name}: {text}");
            }
        }
        assert_eq!(dig_short("www.example"), ["192.0.2.80"]);
        assert_eq!(dig_short("nas.lan"), ["192.168.1.20"], "its domain is excepted");
        assert_eq!(dig_short("git.corp.example"), ["10.1.0.5"], "its domain has resolvers of its own");
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
        assert_eq!(place.stats.outside()[5], ("rebinding", 3), "an emptied answer is kept like any other");
        assert_eq!(general.asked(), 6);
        let text = place.runtime.block_on(place.explainer.as_ref().unwrap().explain(
            ip("127.0.0.1"),
            "default",
            "evil.example.",
        ));
        assert!(text.unwrap().contains("upstream 127.0.0.2:53, less what leads inside (stop-dns-rebind)"));
        place.apply(&with_custom(&zoo(), &[corp]));
        assert_eq!(dig_short("evil.example"), ["192.168.1.1"], "switched off again");
    });
}

/// An authority's certificate, and a certificate with its key that the authority signed for these names and addresses; in PEM.
fn signed_for(names: &[&str]) -> (String, (String, String)) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::default();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::from_params(&authority, &authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    (authority_pem, (certificate.pem(), key.serialize_pem()))
}

/// RFC 7858: DNS over TLS; RFC 8310 section 5: with a strict profile, "the client [...] MUST NOT" go on when the server "cannot be
/// authenticated".
#[test]
fn over_tls_only_a_server_with_a_good_certificate_is_asked_and_its_connection_is_kept() {
    in_namespace(|place| {
        let records = || (1..=9).map(|n| host(&format!("h{n}.example."), n)).collect();
        let (authority, certificate) = signed_for(&["dns.example", "127.0.0.2"]);
        let upstream = Upstream::start_tls("127.0.0.2", (&certificate.0, &certificate.1), records());
        let over_tls = |options: &str| {
            let text = format!("forward . tls://127.0.0.2 {{\n{options}}}\n");
            with_custom(&zoo(), &[("a.override", &text), ("ca.crt", &authority)])
        };
        place.serve(&over_tls(" tls /etc/coredns/custom/ca.crt\n tls_servername dns.example\n"));
        for n in 1..=3 {
            assert_eq!(dig_short(&format!("h{n}.example")), [format!("192.0.2.{n}")]);
        }
        assert_eq!((upstream.of.asked(), upstream.connections()), (3, 1), "one connection for all");
        let question = upstream.of.last.lock().unwrap().take().unwrap();
        assert_eq!(question.to_vec().unwrap().len(), 128, "its length says nothing about the name");
        for (what, options) in [
            ("another name", " tls ca.crt\n tls_servername other.example\n"),
            ("an authority that the host does not know", " tls_servername dns.example\n"),
        ] {
            place.apply(&over_tls(options));
            assert!(dig("h4.example").contains("status: SERVFAIL"), "{what}");
            assert_eq!((upstream.of.asked(), upstream.connections()), (3, 1), "{what}: nothing was asked");
            let explained =
                place.explainer.as_ref().unwrap().explain(ip("127.0.0.1"), "default", "h5.example.");
            let text = place.runtime.block_on(explained).unwrap();
            assert!(text.contains("tls://127.0.0.2:853 (did not answer: "), "{what}: {text}");
        }
        place.apply(&over_tls(" tls ca.crt\n"));
        assert_eq!(dig_short("h6.example"), ["192.0.2.6"], "the address stands in the certificate");
        upstream.hang_up();
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(dig_short("h7.example"), ["192.0.2.7"], "a connection that was closed is opened again");
        assert_eq!(dig_short("h8.example"), ["192.0.2.8"]);
    });
}

fn pod(namespace: &str, name: &str, addresses: &[&str]) -> Pod {
    Pod {
        key: PodKey::new(namespace, name),
        uid: format!("uid-{name}"),
        labels: Default::default(),
        node: Some("n1".into()),
        host_network: false,
        ips: addresses.iter().map(|address| ip(address)).collect(),
        hostname: None,
        subdomain: None,
        terminated: false,
        named_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
    }
}

fn with_pods(cluster: &Snapshot, pods: impl IntoIterator<Item = Pod>) -> Snapshot {
    let pods = pods.into_iter().map(|pod| (pod.key.clone(), Arc::new(pod))).collect();
    Snapshot { pods: Arc::new(pods), ..cluster.clone() }
}

/// CoreDNS, plugin kubernetes: "verified: Return an A record if there exists a pod in same namespace with matching IP"; "disabled:
/// Do not process pod requests, always returning NXDOMAIN"; "insecure: Always return an A record with IP from request
/// (without checking k8s)".
#[test]
fn names_of_pods_are_insecure_verified_or_disabled_as_the_corefile_says() {
    in_namespace(|place| {
        let mode = |cluster: &Snapshot, mode: &str| {
            let text = format!(".:53 {{\n kubernetes cluster.local {{\n  pods {mode}\n }}\n}}\n");
            with_custom(cluster, &[("Corefile", &text)])
        };
        let mut gone = pod("default", "gone", &["10.42.1.9"]);
        gone.terminated = true;
        let cluster = with_pods(&zoo(), [pod("default", "a", &["10.42.1.7", "fd00:42::7"]), gone]);
        let status = |name: &str| {
            let text = dig(&format!("{name}.pod.cluster.local"));
            let found =
                ["NOERROR", "NXDOMAIN"].into_iter().find(|code| text.contains(&format!("status: {code}")));
            found.unwrap_or_else(|| panic!("{text}"))
        };
        place.serve(&cluster);
        assert_eq!(
            dig_short("10-42-1-9.default.pod.cluster.local"),
            ["10.42.1.9"],
            "insecure unless it is said"
        );
        place.apply(&mode(&cluster, "verified"));
        for transport in ["+notcp", "+tcp"] {
            assert_eq!(dig_short(&format!("{transport} 10-42-1-7.default.pod.cluster.local")), ["10.42.1.7"]);
            let v6 = dig_short(&format!("{transport} fd00-42--7.default.pod.cluster.local AAAA"));
            assert_eq!(v6, ["fd00:42::7"]);
        }
        assert_eq!(status("10-42-1-7.kube-system"), "NXDOMAIN", "a pod of another namespace");
        assert_eq!(status("10-42-1-8.default"), "NXDOMAIN", "nobody's address");
        assert_eq!(status("10-42-1-9.default"), "NXDOMAIN", "its pod has ended");
        let moved = with_pods(&zoo(), [pod("kube-system", "b", &["10.42.1.7"])]);
        place.apply(&mode(&moved, "verified"));
        assert_eq!((status("10-42-1-7.kube-system"), status("10-42-1-7.default")), ("NOERROR", "NXDOMAIN"));
        place.apply(&mode(&moved, "sometimes"));
        assert_eq!(status("10-42-1-8.kube-system"), "NXDOMAIN", "what cannot be read leaves it verified");
        place.apply(&mode(&moved, "disabled"));
        assert_eq!(status("10-42-1-7.kube-system"), "NXDOMAIN");
        place.apply(&mode(&moved, "insecure"));
        assert_eq!(status("1-2-3-4.kube-system"), "NOERROR");
        assert_eq!(status("1-2-3-4.nowhere"), "NXDOMAIN");
    });
}

#[test]
fn templates_and_zone_files_answer() {
    in_namespace(|place| {
        let zone = "$TTL 300\n@ IN SOA ns admin 1 2 3 4 60\n@ IN NS ns\nns IN A 192.0.2.1\nwww IN A 192.0.2.80\n\
                    in IN CNAME web.default.svc.cluster.local.\n";
        place.serve(&with_custom(
            &zoo(),
            &[
                ("a.server", "example.org {\n file example.db\n}\n"),
                ("example.db", zone),
                ("b.override", "template IN A dev.example {\n answer \"{{ .Name }} 60 IN A 192.0.2.9\"\n}\n"),
            ],
        ));
        let text = dig("WWW.example.org");
        assert!(
            text.contains("WWW.example.org. 300 IN A 192.0.2.80") && text.contains("flags: qr aa rd ra;"),
            "{text}"
        );
        assert_eq!(dig_short("in.example.org"), ["web.default.svc.cluster.local.", "10.43.0.80"]);
        let absent = dig("absent.example.org");
        assert!(
            absent.contains("status: NXDOMAIN") && absent.contains("example.org. 300 IN SOA"),
            "{absent}"
        );
        assert_eq!(dig_short("any.dev.example"), ["192.0.2.9"]);
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn nodes_are_found_by_their_names_until_they_leave() {
    in_namespace(|place| {
        let mut cluster = zoo();
        let node = Node {
            name: "node1".into(),
            uid: "u".to_owned(),
            created: 0,
            labels: Default::default(),
            pod_cidrs: Vec::new(),
            internal_ips: vec![ip("192.0.2.11"), ip("2001:db8::11")],
            public_key: None,
            next_public_key: None,
            answers_for: Default::default(),
            unready: false,
            reach: Default::default(),
            wireguard_port: None,
            leaving: false,
            cordoned: false,
            links: None,
        };
        cluster.nodes = Arc::new([(node.name.clone(), Arc::new(node))].into());
        let silent = UdpSocket::bind("127.0.0.3:53").unwrap();
        silent.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        place.nameservers(&["127.0.0.3"]);
        place.serve(&cluster);
        assert_eq!(dig_short("node1"), ["192.0.2.11"]);
        assert_eq!(dig_short("node1 AAAA"), ["2001:db8::11"]);
        assert_eq!(dig_short("-x 2001:db8::11"), ["node1."]);
        place.apply(&zoo());
        // Now it is a name like any other: asked of the host's resolver.
        std::thread::spawn(|| attempt("dig @10.43.0.10 +tries=1 +time=1 node1"));
        eventually("the host's resolver is asked", || silent.recv(&mut [0; 512]).is_ok());
    });
}
