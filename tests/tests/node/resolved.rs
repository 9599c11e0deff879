//! systemd-resolved in front of the cluster's DNS.

use std::path::Path;
use std::process::Command;

use weft_tests::node::{DNS, Node, Process, dig, inside, run, until, write};

use crate::objects;
use crate::systemd::Systemd;

/// What a host needs that is to know the cluster's names: without the domain, names below `.local` are multicast DNS's, and refused.
const CLUSTER: &str = "Domains=~cluster.local\nLLMNR=no\nMulticastDNS=no";
/// Where it answers its host (systemd-resolved.service(8)).
const STUB: &str = "127.0.0.53";
const USER: &str = "systemd-resolve";

fn start(node: &Node, systemd: &Systemd, server: &str, settings: &str) -> Process {
    write(
        Path::new("/etc/systemd/resolved.conf"),
        format!("[Resolve]\nDNS={server}\n{CLUSTER}\n{settings}\n"),
    );
    let mut command = systemd.command("lib/systemd/systemd-resolved");
    Process::start("resolved", &mut command, &node.path(""))
}

fn code(server: &str, name: &str, kind: &str) -> String {
    let mut command = Command::new("dig");
    let said = run(command.args(["+time=2", "+tries=1", &format!("@{server}"), name, kind]));
    let status = said.split_once("status: ").and_then(|(_, rest)| rest.split_once(','));
    status.map(|(code, _)| code.to_owned()).unwrap_or_default()
}

#[test]
fn systemd_resolved_tells_its_clients_what_the_cluster_has() {
    inside(|| {
        let Some(systemd) = Systemd::find() else { return };
        let node = Node::running();
        let ips = objects::make_service(node.api(), "web", &["10.244.9.1", "fd00:10:244:9::1"]);
        let web = "web.default.svc.cluster.local";
        until("the Service's name", || {
            DNS.iter()
                .all(|server| dig(server, web, "A") == [&*ips[0]] && dig(server, web, "AAAA") == [&*ips[1]])
        });
        let reverse =
            |ip: &str| ip.rsplit('.').map(|part| format!("{part}.")).collect::<String>() + "in-addr.arpa";
        systemd.prepare(&node, USER);
        for (server, settings) in [
            (DNS[0], "DNSSEC=no"),
            (DNS[1], "DNSSEC=allow-downgrade"),
            (DNS[0], "DNSSEC=yes"),
            (DNS[1], "DNSOverTLS=opportunistic"),
        ] {
            let resolved = start(&node, &systemd, server, settings);
            until("systemd-resolved", || dig(STUB, "localhost", "A") == ["127.0.0.1"]);
            let told = |name: &str, kind: &str| dig(STUB, name, kind);
            assert_eq!(told(web, "A"), [&*ips[0]], "{settings}");
            assert_eq!(told(web, "AAAA"), [&*ips[1]], "{settings}");
            assert_eq!(told(&reverse(&ips[0]), "PTR"), [format!("{web}.")], "{settings}");
            let https = "_https._tcp.kubernetes.default.svc.cluster.local";
            assert_eq!(told(https, "SRV"), dig(server, https, "SRV"), "{settings}");
            assert!(!told(https, "SRV").is_empty(), "{settings}");
            assert_eq!(code(STUB, web, "MX"), "NOERROR", "{settings}");
            assert_eq!(told(web, "MX"), [""; 0], "{settings}");
            assert_eq!(code(STUB, "absent.default.svc.cluster.local", "A"), "NXDOMAIN", "{settings}");
            drop(resolved);
        }
    });
}
