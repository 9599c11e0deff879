//! systemd-resolved in front of the cluster's DNS. WEFT_SYSTEMD_RESOLVED names the folder that `tests/tools/unpack-systemd-resolved.sh`
//! prints.

use std::path::{Path, PathBuf};
use std::process::Command;

use weft_tests::node::{DNS, Node, Process, dig, inside, run, until, write};

use crate::objects;

/// What a host needs that is to know the cluster's names: without the domain, names below `.local` are multicast DNS's, and refused.
const CLUSTER: &str = "Domains=~cluster.local\nLLMNR=no\nMulticastDNS=no";
/// Where it answers its host (systemd-resolved.service(8)).
const STUB: &str = "127.0.0.53";
const USER: &str = "systemd-resolve";

/// Stands in place of `target` in this test's mount namespace.
fn in_place_of(target: &str, source: &Path) {
    run(Command::new("mount").arg("--bind").arg(source).arg(target));
}

/// Its user, its folders, and no name service of this machine.
fn prepare(node: &Node) {
    for (file, line) in [
        ("passwd", format!("{USER}:x:991:991::/:/usr/sbin/nologin\n")),
        ("group", format!("{USER}:x:991:\n")),
    ] {
        let path = format!("/etc/{file}");
        let known = std::fs::read_to_string(&path).unwrap();
        let known: String = known
            .lines()
            .filter(|known| !known.starts_with(USER))
            .map(|known| format!("{known}\n"))
            .collect();
        write(&node.path(file), known + &line);
        in_place_of(&path, &node.path(file));
    }
    std::fs::create_dir_all("/run/systemd").unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none", "/run/systemd"]));
    // Its configuration is a file of /etc/systemd, which machines without systemd lack.
    std::fs::create_dir_all("/etc/systemd").unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none", "/etc/systemd"]));
}

fn start(node: &Node, unpacked: &Path, server: &str, settings: &str) -> Process {
    write(
        Path::new("/etc/systemd/resolved.conf"),
        format!("[Resolve]\nDNS={server}\n{CLUSTER}\n{settings}\n"),
    );
    let mut command = Command::new(unpacked.join("lib/systemd/systemd-resolved"));
    let libraries = format!("usr/lib/{}-linux-gnu/systemd", std::env::consts::ARCH);
    command.env("LD_LIBRARY_PATH", unpacked.join(libraries));
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
        let Some(unpacked) = std::env::var_os("WEFT_SYSTEMD_RESOLVED").map(PathBuf::from) else {
            eprintln!("SKIPPED: WEFT_SYSTEMD_RESOLVED does not name a folder");
            return;
        };
        let node = Node::running();
        let ips = objects::make_service(node.api(), "web", &["10.244.9.1", "fd00:10:244:9::1"]);
        let web = "web.default.svc.cluster.local";
        until("the Service's name", || {
            DNS.iter()
                .all(|server| dig(server, web, "A") == [&*ips[0]] && dig(server, web, "AAAA") == [&*ips[1]])
        });
        let reverse =
            |ip: &str| ip.rsplit('.').map(|part| format!("{part}.")).collect::<String>() + "in-addr.arpa";
        prepare(&node);
        for (server, settings) in [
            (DNS[0], "DNSSEC=no"),
            (DNS[1], "DNSSEC=allow-downgrade"),
            (DNS[0], "DNSSEC=yes"),
            (DNS[1], "DNSOverTLS=opportunistic"),
        ] {
            let resolved = start(&node, &unpacked, server, settings);
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
