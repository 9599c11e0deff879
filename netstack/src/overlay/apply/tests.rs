//! The applier against the kernel, and two nodes with pods whose underlay is watched.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use weft_model::{NodeFacts, NodeName};

use super::super::plan::OverlayPlanner;
use super::super::plan::tests::{dual, snapshot};
use super::super::tunnel::public_key;
use super::*;
use crate::kernel::netns::Rtnetlink;
use crate::kernel::testing::{NamedNetns, needs_root, run};
use crate::reconcile::Planner as _;

/// A node on the switch with one pod: 192.0.2.N, 2001:db8::N, pod 10.42.N.2 and fd42:0:0:N::2.
struct Host {
    number: u8,
    netns: NamedNetns,
    pod: NamedNetns,
    dir: tempfile::TempDir,
    tunnel: Option<Child>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_tunnel();
    }
}

impl Host {
    fn new(number: u8, switch: &NamedNetns) -> Self {
        let (netns, pod) = (NamedNetns::new("node"), NamedNetns::new("pod"));
        let dir = tempfile::tempdir().unwrap();
        let key = base64::engine::general_purpose::STANDARD.encode([number; 32]);
        std::fs::write(dir.path().join(KEY_FILE), key + "\n").unwrap();
        let port = format!("p{number}");
        run(&[
            "ip",
            "-n",
            &switch.name,
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &netns.name,
        ]);
        switch.must(&["ip", "link", "set", &port, "master", "br0", "up"]);
        netns.must(&["ip", "link", "set", "lo", "up"]);
        netns.must(&["ip", "address", "add", &format!("192.0.2.{number}/24"), "dev", "eth0"]);
        netns.must(&["ip", "address", "add", &format!("2001:db8::{number}/64"), "dev", "eth0", "nodad"]);
        netns.must(&["ip", "link", "set", "eth0", "up"]);
        // A way out of the LAN, so that a leak would have somewhere to go.
        netns.must(&["ip", "route", "add", "default", "via", "192.0.2.254"]);
        netns.must(&["ip", "route", "add", "default", "via", "2001:db8::254"]);
        Self { number, netns, pod, dir, tunnel: None }
    }

    fn attach_pod(&self) {
        let n = self.number;
        run(&[
            "ip",
            "-n",
            &self.netns.name,
            "link",
            "add",
            "weftp1",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &self.pod.name,
        ]);
        self.netns.must(&["ip", "address", "add", "169.254.1.1/32", "dev", "weftp1"]);
        self.netns.must(&["ip", "address", "add", "fe80::1/64", "dev", "weftp1", "nodad"]);
        self.netns.must(&["ip", "link", "set", "weftp1", "up"]);
        self.pod.must(&["ip", "address", "add", &format!("10.42.{n}.2/32"), "dev", "eth0"]);
        self.pod.must(&["ip", "address", "add", &format!("fd42:0:0:{n}::2/128"), "dev", "eth0", "nodad"]);
        self.pod.must(&["ip", "link", "set", "eth0", "up"]);
        self.pod.must(&["ip", "route", "add", "169.254.1.1", "dev", "eth0"]);
        self.pod.must(&["ip", "route", "add", "default", "via", "169.254.1.1"]);
        self.pod.must(&["ip", "route", "add", "default", "via", "fe80::1", "dev", "eth0"]);
        self.netns.must(&["ip", "route", "add", &format!("10.42.{n}.2/32"), "dev", "weftp1"]);
        self.netns.must(&["ip", "route", "add", &format!("fd42:0:0:{n}::2/128"), "dev", "weftp1"]);
    }

    fn plan(&self, numbers: &[u8]) -> OverlayPlan {
        let node = |number: &u8| {
            let mut node = dual(*number);
            node.public_key = Some(public_key([*number; 32]));
            node
        };
        let mut snapshot = snapshot(numbers.iter().map(node).collect());
        let facts =
            NodeFacts { name: NodeName(format!("node-{}", self.number).into()), ..(*snapshot.facts).clone() };
        snapshot.facts = Arc::new(facts);
        OverlayPlanner { open_firewalls: true }.plan(&snapshot).plan
    }

    /// One pass for each trust, with one applier.
    fn apply(&self, plan: &OverlayPlan, trusts: &[Trust]) -> Vec<Applied> {
        let dir = self.dir.path().to_owned();
        self.netns.block_on(async {
            let netlink = Rtnetlink::connect().unwrap();
            let mut applier = OverlayApplier::new(netlink.handle.clone(), dir.clone(), dir);
            let mut passes = Vec::new();
            for trust in trusts {
                passes.push(applier.apply(plan, *trust).await);
            }
            passes
        })
    }

    fn start_tunnel(&mut self) {
        let child = Command::new("ip")
            .args(["netns", "exec", &self.netns.name])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "overlay::tunnel::tests::tunnel_process", "--nocapture"])
            .env("WEFT_TEST_TUNNEL_DIR", self.dir.path())
            .stdout(Stdio::null())
            .spawn();
        self.tunnel = Some(child.unwrap());
        let (start, socket) = (Instant::now(), self.dir.path().join(SOCKET_FILE));
        while control::request(&socket, "GET", "/peers").is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "the tunnel does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill_tunnel(&mut self) {
        if let Some(mut child) = self.tunnel.take() {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }
}

fn pings(from: &NamedNetns, to: &str) -> bool {
    from.exec(&["ping", "-c", "1", "-W", "0.5", to]).0
}

fn reaches(from: &NamedNetns, to: &str) {
    let start = Instant::now();
    while !pings(from, to) {
        assert!(start.elapsed() < Duration::from_secs(10), "{to} does not answer {}", from.name);
    }
}

fn switch() -> NamedNetns {
    let switch = NamedNetns::new("sw");
    switch.must(&["ip", "link", "add", "br0", "type", "bridge"]);
    switch.must(&["ip", "link", "set", "br0", "up"]);
    switch
}

/// What the host shows of routes, rules, links and tables.
fn picture(netns: &NamedNetns) -> String {
    [
        netns.must(&["ip", "-br", "link"]),
        netns.must(&["ip", "route", "show", "table", "all"]),
        netns.must(&["ip", "-6", "route", "show", "table", "all"]),
        netns.must(&["ip", "rule"]),
        netns.must(&["ip", "-6", "rule"]),
        netns.must(&["nft", "list", "ruleset"]),
        netns.must(&["sysctl", "-a", "-r", "forward|accept_ra$|rp_filter"]),
    ]
    .join("\n")
}

#[test]
fn a_second_pass_changes_nothing_and_cleanup_restores_the_picture() {
    if !needs_root() {
        return;
    }
    let switch = switch();
    let mut host = Host::new(1, &switch);
    let plan = host.plan(&[1, 2]);
    let before = picture(&host.netns);
    let without = host.apply(&plan, &[Trust::Nothing]);
    assert_eq!(without[0].failed.len(), 1, "{:?}", without[0].failed);
    assert!(without[0].failed[0].contains("is `weft tunnel` running?"), "{:?}", without[0].failed);
    host.start_tunnel();
    let passes = host.apply(&plan, &[Trust::Nothing, Trust::Shadow, Trust::Nothing]);
    for pass in &passes {
        assert_eq!((&pass.changed, &pass.failed), (&vec![], &vec![]));
    }
    let details = [("backend", "userspace"), ("peers", "1"), ("mtu", "1420"), ("DNS in need", "node-2")];
    assert_eq!(passes[0].details, details.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let dir = host.dir.path().to_owned();
    assert_eq!(peers(&dir, WireguardBackend::Userspace).unwrap().len(), 1);
    host.kill_tunnel();
    let cleaned = host.netns.block_on(async {
        let netlink = Rtnetlink::connect().unwrap();
        [cleanup(netlink.handle.clone(), &dir).await, cleanup(netlink.handle.clone(), &dir).await]
    });
    assert_eq!((&cleaned[0].failed, &cleaned[1].failed), (&vec![], &vec![]));
    assert!(cleaned[0].changed.contains(&"no link weft0".to_owned()), "{:?}", cleaned[0].changed);
    assert_eq!(cleaned[1].changed, [""; 0], "the second clean-up finds nothing");
    assert_eq!(picture(&host.netns), before);
}

/// Packets with a pod's address on the switch, until it is stopped.
struct Watch {
    tcpdump: Child,
    file: tempfile::NamedTempFile,
}

impl Watch {
    fn start(switch: &NamedNetns) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tcpdump = Command::new("ip")
            .args(["netns", "exec", &switch.name, "tcpdump", "-i", "br0", "-nU", "--immediate-mode", "-w"])
            .arg(file.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while file.as_file().metadata().unwrap().len() == 0 {
            assert!(start.elapsed() < Duration::from_secs(5), "tcpdump does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { tcpdump, file }
    }

    /// Lines that match `filter`, once everything sent before has been recorded: the capture is in order, so a marker
    /// of `host` on the LAN (an oversized ping to nobody's harm) is waited for.
    fn settled(&self, host: &NamedNetns, filter: &str) -> Vec<String> {
        let start = Instant::now();
        host.exec(&["ping", "-c", "1", "-W", "0.3", "-s", "777", "-b", "192.0.2.255"]);
        while self.seen("icmp and dst host 192.0.2.255").is_empty() {
            assert!(start.elapsed() < Duration::from_secs(5), "the capture does not see the marker");
            std::thread::sleep(Duration::from_millis(50));
        }
        self.seen(filter)
    }

    fn seen(&self, filter: &str) -> Vec<String> {
        let path = self.file.path().to_str().unwrap();
        let text = Command::new("tcpdump").args(["-nr", path, filter]).output().unwrap();
        String::from_utf8_lossy(&text.stdout).lines().map(str::to_owned).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

const IN_CLEAR: &str = "net 10.42.0.0/16 or net fd42::/48";

#[test]
fn pods_reach_pods_and_nodes_and_nothing_of_theirs_is_in_clear() {
    if !needs_root() {
        return;
    }
    let switch = switch();
    let mut hosts = [1, 2].map(|number| Host::new(number, &switch));
    let watch = Watch::start(&switch);
    for host in &hosts {
        host.attach_pod();
        let strict = host.apply(&host.plan(&[]), &[Trust::Nothing]);
        assert_eq!(strict[0].failed.len(), 1, "only the tunnel is missing: {:?}", strict[0].failed);
    }
    // Before any peer: nothing gets through, nothing leaks.
    for target in ["10.42.2.2", "fd42:0:0:2::2", "192.0.2.2", "2001:db8::2"] {
        assert!(!pings(&hosts[0].pod, target), "{target}");
    }
    assert!(!pings(&hosts[0].netns, "10.42.2.2"));
    for host in &mut hosts {
        host.start_tunnel();
        let applied = host.apply(&host.plan(&[1, 2]), &[Trust::Nothing]);
        assert_eq!(applied[0].failed, [""; 0]);
    }
    // Strict source checks everywhere else must not hurt what comes through the tunnel.
    hosts[0].netns.must(&["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"]);
    for target in ["10.42.2.2", "fd42:0:0:2::2", "192.0.2.2", "2001:db8::2", "10.42.2.1", "fd42:0:0:2::1"] {
        reaches(&hosts[0].pod, target);
    }
    for target in ["10.42.1.2", "fd42:0:0:1::2"] {
        reaches(&hosts[1].netns, target);
    }
    // What a host sends to a node stays outside the tunnel.
    let wireguard = "udp port 51820";
    reaches(&hosts[0].netns, "192.0.2.2");
    let icmp = "icmp and host 192.0.2.1 and host 192.0.2.2";
    // A tunnel that is dead leaks nothing, nor does a device that is gone.
    hosts[0].kill_tunnel();
    let down = ["10.42.2.2", "fd42:0:0:2::2", "192.0.2.2", "2001:db8::2"];
    assert!(down.iter().all(|target| !pings(&hosts[0].pod, target)));
    hosts[0].netns.must(&["ip", "link", "del", TUNNEL_LINK]);
    assert!(down.iter().all(|target| !pings(&hosts[0].pod, target)));
    assert_eq!(watch.settled(&hosts[0].netns, IN_CLEAR), [""; 0]);
    assert!(!watch.seen(icmp).is_empty() && !watch.seen(wireguard).is_empty(), "the capture sees the rest");
}

#[test]
fn pods_pass_a_firewall_that_drops_what_it_forwards() {
    if !needs_root() {
        return;
    }
    let switch = switch();
    let mut hosts = [1, 2].map(|number| Host::new(number, &switch));
    for host in &mut hosts {
        host.attach_pod();
        host.apply(&host.plan(&[1, 2]), &[Trust::Nothing]);
        host.start_tunnel();
    }
    let targets = ["10.42.2.2", "fd42:0:0:2::2", "192.0.2.2", "2001:db8::2"];
    targets.iter().for_each(|target| reaches(&hosts[0].pod, target));
    let firewall =
        "table inet firewalld { chain forward { type filter hook forward priority 10; policy drop; }; }";
    hosts[0].netns.must(&["nft", firewall]);
    for command in ["iptables-nft", "ip6tables-nft"] {
        hosts[0].netns.must(&[command, "-P", "FORWARD", "DROP"]);
    }
    assert!(targets.iter().all(|target| !pings(&hosts[0].pod, target)), "the firewall lets pods through");
    let passed = hosts[0].apply(&hosts[0].plan(&[1, 2]), &[Trust::Nothing]);
    assert_eq!(passed[0].failed, [""; 0]);
    let said = ("passes the firewalls", "inet firewalld forward, ip filter FORWARD, ip6 filter FORWARD");
    assert!(passed[0].details.contains(&(said.0.to_owned(), said.1.to_owned())), "{:?}", passed[0].details);
    targets.iter().for_each(|target| reaches(&hosts[0].pod, target));
    // Switched off, or cleaned up, it is as the firewall's owner left it.
    let plan = OverlayPlan { passages: Vec::new(), ..hosts[0].plan(&[1, 2]) };
    hosts[0].apply(&plan, &[Trust::Nothing]);
    assert!(!hosts[0].netns.must(&["nft", "list", "table", "inet", "firewalld"]).contains("weft"));
    assert!(targets.iter().all(|target| !pings(&hosts[0].pod, target)));
}

#[test]
fn pods_leave_the_cluster_with_the_address_of_their_node() {
    if !needs_root() {
        return;
    }
    let switch = switch();
    let host = Host::new(1, &switch);
    let outside = NamedNetns::new("out");
    run(&[
        "ip",
        "-n",
        &switch.name,
        "link",
        "add",
        "p9",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        &outside.name,
    ]);
    switch.must(&["ip", "link", "set", "p9", "master", "br0", "up"]);
    outside.must(&["ip", "address", "add", "192.0.2.254/24", "dev", "eth0"]);
    outside.must(&["ip", "address", "add", "2001:db8::254/64", "dev", "eth0", "nodad"]);
    outside.must(&["ip", "link", "set", "eth0", "up"]);
    host.attach_pod();
    host.apply(&host.plan(&[1, 2]), &[Trust::Nothing]);
    let watch = Watch::start(&switch);
    reaches(&host.pod, "192.0.2.254");
    reaches(&host.pod, "2001:db8::254");
    for forged in ["10.42.7.7", "fd42:0:0:7::7"] {
        let address: IpAddr = forged.parse().unwrap();
        let prefix = if address.is_ipv6() { 128 } else { 32 };
        outside.must(&["ip", "address", "add", &format!("{forged}/{prefix}"), "dev", "lo"]);
    }
    let counters = || host.netns.must(&["nft", "list", "chain", "inet", TABLE_HOST, "from-underlay"]);
    let before = counters();
    assert!(!outside.exec(&["ping", "-c", "1", "-W", "0.3", "-I", "10.42.7.7", "192.0.2.1"]).0);
    assert_ne!(counters(), before, "the forged packet was counted");
    let leaks = watch.settled(&host.netns, &format!("({IN_CLEAR}) and not src host 10.42.7.7"));
    assert_eq!(leaks, [""; 0]);
    assert!(!watch.seen("icmp and src host 192.0.2.1 and dst host 192.0.2.254").is_empty(), "masqueraded");
}
