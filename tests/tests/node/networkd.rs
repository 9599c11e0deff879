//! systemd-networkd beside a node. When it configures a link anew it removes every rule and every route without a device that it
//! did not make, of whatever protocol (`ManageForeignRoutes=`, networkd.conf(5)).

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::unistd::{Uid, chown};
use weft_tests::node::{Node, Process, UPLINK_ADDRESSES, holds_within, inside, ip, run, until, write};

use crate::systemd::Systemd;

const USER: &str = "systemd-network";
/// Any that networkd manages.
const LINK: &str = "up1";
/// As docs/operations.md says.
const SOON: Duration = Duration::from_secs(1);

fn start(systemd: &Systemd, node: &Node) -> [Process; 2] {
    systemd.prepare(node, USER);
    for folder in ["links", "leases", "lldp"] {
        std::fs::create_dir_all(format!("/run/systemd/netif/{folder}")).unwrap();
        chown(&*format!("/run/systemd/netif/{folder}"), Some(Uid::from_raw(991)), None).unwrap();
    }
    chown("/run/systemd/netif", Some(Uid::from_raw(991)), None).unwrap();
    // Without udev, as in a container.
    run(Command::new("mount").args(["-o", "bind,ro", "/sys", "/sys"]));
    std::fs::create_dir_all("/etc/systemd/network").unwrap();
    write(
        Path::new("/etc/systemd/network/10-test.network"),
        format!("[Match]\nName={LINK}\n[Network]\nIPv6AcceptRA=no\nAddress=192.0.2.77/24\n"),
    );
    let bus = "<busconfig><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>\
               <policy context=\"default\"><allow send_destination=\"*\"/><allow receive_sender=\"*\"/><allow own=\"*\"/>\
               <allow user=\"*\"/></policy></busconfig>";
    write(&node.path("bus.conf"), bus);
    let mut command = systemd.command("usr/bin/dbus-daemon");
    command.arg("--nofork").arg(format!("--config-file={}", node.path("bus.conf").display()));
    let bus = Process::start("bus", &mut command, &node.path(""));
    until("the message bus", || Path::new("/run/dbus/system_bus_socket").exists());
    let mut command = systemd.command("lib/systemd/systemd-networkd");
    let networkd = Process::start("networkd", command.env("SYSTEMD_LOG_LEVEL", "debug"), &node.path(""));
    [bus, networkd]
}

/// Rules and routes of protocol 0x57, as text.
fn ours() -> Vec<String> {
    let lists = ["-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"];
    let lines = |list: &str| {
        let text = ip(list);
        text.lines().filter(|line| line.contains("proto 87")).map(str::to_owned).collect::<Vec<_>>()
    };
    lists.iter().flat_map(|list| lines(list)).collect()
}

#[test]
fn what_systemd_networkd_removes_is_back_within_a_second() {
    inside(|| {
        let Some(systemd) = Systemd::find() else { return };
        let node = Node::running();
        node.add_pod("pod1");
        let before = ours();
        assert!(before.iter().any(|line| line.starts_with("unreachable")), "{before:#?}");
        let _daemons = start(&systemd, &node);
        let networkctl = |args: &[&str]| run(systemd.command("bin/networkctl").args(args));
        until("networkd", || networkctl(&["list", LINK]).contains("configured"));
        let removed = || {
            let log = std::fs::read_to_string(node.path("networkd.log")).unwrap();
            ["foreign route (", "foreign routing policy rule"]
                .map(|what| log.lines().filter(|line| line.contains(&format!("Removing {what}"))).count())
        };
        for _ in 0..3 {
            let [routes, rules] = removed();
            networkctl(&["reconfigure", LINK]);
            until("its removals", || {
                let [routes_now, rules_now] = removed();
                routes_now > routes && rules_now > rules
            });
            holds_within(SOON, || ours() == before);
            assert_eq!(ours(), before);
            for address in UPLINK_ADDRESSES {
                ip(&format!("netns exec pod1 ping -c1 -W1 {address}"));
            }
        }
    });
}
