//! LoadBalancer Services on a node with a neighbour on its LAN: addresses, who answers for them, and for how long.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, socket,
};
use serde_json::{Value, json};
use weft_netstack::kernel::lan::{Arp, Icmp6};
use weft_tests::node::{NODE, Node, UPLINK_ADDRESSES, holds_within, inside, ip, run, until};

use crate::objects::SERVICES;

const POOLS: &str = "/apis/metallb.io/v1beta1/namespaces/default/ipaddresspools";
const EVENTS: &str = "/api/v1/namespaces/default/events";
pub(crate) const FIRST: [&str; 2] = ["172.31.0.100", "fd00:31::100"];

/// A machine on the other end of the uplink.
fn neighbour() {
    ip("netns add lan");
    ip("link set up1 netns lan");
    set_up_neighbour();
}

fn set_up_neighbour() {
    run(Command::new("ip").args(["-n", "lan", "addr", "add", "172.31.0.50/24", "dev", "up1"]));
    run(Command::new("ip").args(["-n", "lan", "addr", "add", "fd00:31::50/64", "dev", "up1", "nodad"]));
    run(Command::new("ip").args(["-n", "lan", "link", "set", "up1", "up"]));
}

fn from_lan(command: &[&str]) -> bool {
    let output = Command::new("ip").args(["netns", "exec", "lan"]).args(command).output();
    output.is_ok_and(|output| output.status.success())
}

/// By a fresh question of who has it.
fn answers(address: &str) -> bool {
    from_lan(&["ip", "neigh", "flush", "dev", "up1"]);
    from_lan(&["ping", "-c1", "-W1", address])
}

pub(crate) fn make_pool(node: &Node) {
    let addresses = json!(["172.31.0.100-172.31.0.110", "fd00:31::100-fd00:31::110"]);
    node.api().create(POOLS, &json!({"metadata": {"name": "lan"}, "spec": {"addresses": addresses}}));
}

pub(crate) fn make_service(node: &Node, name: &str, annotations: &Value, class: Option<&str>) {
    let mut spec = json!({"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack",
        "selector": {"app": "x"}, "ports": [{"port": 80}]});
    if let Some(class) = class {
        spec["loadBalancerClass"] = class.into();
    }
    let metadata = json!({"name": name, "annotations": annotations});
    node.api().create(SERVICES, &json!({"metadata": metadata, "spec": spec}));
}

/// The neighbour says that it has both of the first addresses, and has them not: only who is asked then shows who answers.
fn claim_from_lan() {
    let claiming = std::thread::spawn(|| {
        let netns = std::fs::File::open("/run/netns/lan").unwrap();
        setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
        let shown = Command::new("ip").args(["-j", "link", "show", "up1"]).output().unwrap();
        let link: Value = serde_json::from_slice(&shown.stdout).unwrap();
        let index = u32::try_from(link[0]["ifindex"].as_u64().unwrap()).unwrap();
        let bytes = link[0]["address"].as_str().unwrap().split(':');
        let mac: Vec<u8> = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let mac: [u8; 6] = mac.try_into().unwrap();
        Arp::open(index, mac).unwrap().tell(FIRST[0].parse::<Ipv4Addr>().unwrap()).unwrap();
        Icmp6::open().unwrap().tell(index, FIRST[1].parse::<Ipv6Addr>().unwrap(), mac).unwrap();
    });
    claiming.join().unwrap();
}

/// A neighbour advertisement for a group, with no link-layer address (RFC 4861 7.1.2 and 4.4).
fn send_malformed_advertisement() {
    let sending = std::thread::spawn(|| {
        let netns = std::fs::File::open("/run/netns/lan").unwrap();
        setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
        let raw =
            socket(AddressFamily::Inet6, SockType::Raw, SockFlag::empty(), SockProtocol::IcmpV6).unwrap();
        let index = nix::net::if_::if_nametoindex("up1").unwrap();
        let all_nodes = SocketAddrV6::new("ff02::1".parse().unwrap(), 0, 0, index);
        let mut advertisement = [0; 24];
        (advertisement[0], advertisement[8], advertisement[9]) = (136, 0xff, 2);
        sendto(raw.as_raw_fd(), &advertisement, &SockaddrIn6::from(all_nodes), MsgFlags::empty()).unwrap();
    });
    sending.join().unwrap();
}

/// Makes the neighbour's memory of both of the first addresses wrong.
fn mislead(mac: &str) {
    for address in FIRST {
        run(Command::new("ip")
            .args(["-n", "lan", "neigh", "replace", address, "dev", "up1"])
            .args(["lladdr", mac, "nud", "stale"]));
    }
}

/// The neighbour was told better.
fn learned_better_than(mac: &str) -> bool {
    let cached = run(Command::new("ip").args(["-n", "lan", "neigh", "show", "dev", "up1"]));
    FIRST.iter().all(|address| {
        let line = cached.lines().find(|line| line.starts_with(&format!("{address} ")));
        line.is_some_and(|line| !line.contains(mac))
    })
}

/// What the node tells the others that it answers for.
fn told(node: &Node) -> Vec<IpAddr> {
    let said =
        node.api().read("/api/v1/nodes", NODE)["metadata"]["annotations"]["weft.network/answers-for"].clone();
    let words = said.as_str().unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    words.iter().filter_map(|word| word.parse().ok()).collect()
}

/// Reason and message of the condition of a Service.
fn condition(node: &Node, name: &str) -> String {
    let service = node.api().read(SERVICES, name);
    let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ours = conditions.iter().find(|one| one["type"] == "weft.network/LoadBalancer");
    ours.map(|one| format!("{}: {}", one["reason"], one["message"])).unwrap_or_default()
}

fn addresses(node: &Node, name: &str) -> Vec<String> {
    let service = node.api().read(SERVICES, name);
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
    ingress.iter().filter_map(|one| one["ip"].as_str().map(str::to_owned)).collect()
}

fn events_of(node: &Node, name: &str, reason: &str) -> Vec<Value> {
    let mut events = node.api().list(EVENTS);
    events.retain(|event| event["involvedObject"]["name"] == name && event["reason"] == reason);
    events
}

#[test]
fn without_pools_a_service_has_the_nodes_addresses() {
    inside(|| {
        let node = Node::running();
        make_service(&node, "web", &json!({}), None);
        until("the addresses", || addresses(&node, "web") == UPLINK_ADDRESSES);
        until("the Event", || !events_of(&node, "web", "IPAllocated").is_empty());
        make_service(&node, "other", &json!({}), Some("example.com/other"));
        make_service(&node, "same-port", &json!({}), None);
        until("the sentence", || {
            node.problems()
                .iter()
                .any(|it| it.contains("same-port") && it.contains("default/web has the same port"))
        });
        assert_eq!(addresses(&node, "other"), [""; 0]);
        assert_eq!(addresses(&node, "same-port"), [""; 0]);
    });
}

#[test]
fn an_address_of_a_pool_answers_the_lan_while_it_is_a_services_and_also_without_an_agent() {
    inside(|| {
        let mut node = Node::running();
        neighbour();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        until("the addresses", || addresses(&node, "web") == FIRST);
        for address in FIRST {
            until("an answer", || answers(address));
            assert!(
                !answers(if address.contains(':') { "fd00:31::101" } else { "172.31.0.101" }),
                "not ours"
            );
        }
        let pool = node.api().read(POOLS, "lan");
        until("the pool's status", || node.api().read(POOLS, "lan")["status"]["assignedIPv4"] == 1);
        assert_eq!(pool["spec"]["autoAssign"], true);
        until("the Event", || !events_of(&node, "web", "nodeAssigned").is_empty());
        until("the others are told", || told(&node).len() == 2);
        let trace = run(node.weft("lb").args(["trace", FIRST[0], "--run-dir"]).arg(node.path("run")));
        assert!(trace.contains("Node n1 (this node) answers") && trace.contains("from MAC"), "{trace}");

        node.end_agent(Signal::SIGKILL);
        for address in FIRST {
            assert!(answers(address), "{address}: the kernel answers");
        }
        node.start_agent();
        node.await_ready();
        let lease_runs_on = Duration::from_secs(3);
        std::thread::sleep(lease_runs_on);
        assert_eq!(addresses(&node, "web"), FIRST, "a restart moves nothing");
        assert!(FIRST.into_iter().all(answers));

        node.api().delete(SERVICES, "web");
        for address in FIRST {
            until("silence", || !answers(address));
        }
        until("the others are told", || told(&node).is_empty());
    });
}

#[test]
fn an_address_is_given_anew_when_it_is_withdrawn_and_not_while_the_node_says_that_it_answers() {
    inside(|| {
        let mut node = Node::running();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        until("the others are told", || told(&node).len() == 2);
        node.end_agent(Signal::SIGKILL);
        node.api().delete(SERVICES, "web");
        let asking = json!({"metallb.io/loadBalancerIPs": FIRST.join(",")});
        make_service(&node, "next", &asking, None);
        node.start_agent();
        until("the withdrawal and the address", || addresses(&node, "next") == FIRST);
        until("the claim after the withdrawal", || {
            let log = node.agent_log();
            let withdrawn = log.find("this node no longer answers for the address");
            withdrawn.is_some_and(|at| log[at..].contains("this node answers for the address"))
        });
    });
}

#[test]
fn when_a_link_comes_up_the_lan_is_told_at_once() {
    inside(|| {
        let node = Node::running();
        neighbour();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        let stale = "02:00:00:00:00:99";
        for address in FIRST {
            until("an answer", || answers(address));
        }
        // The last of what a claim tells; from now on the LAN is told every 30 seconds.
        let told_by_the_claim = Duration::from_secs(5);
        std::thread::sleep(told_by_the_claim);
        mislead(stale);
        let quiet = Duration::from_secs(2);
        assert!(!holds_within(quiet, || learned_better_than(stale)), "nobody tells without a reason");
        let flapped_at = Instant::now();
        run(Command::new("ip").args(["-n", "lan", "link", "set", "up1", "down"]));
        set_up_neighbour_again();
        mislead(stale);
        assert!(holds_within(Duration::from_secs(8), || learned_better_than(stale)));
        println!("told {:.2} s after the link came up", flapped_at.elapsed().as_secs_f64());
    });
}

/// A link that goes down loses its IPv6 addresses.
fn set_up_neighbour_again() {
    run(Command::new("ip").args(["-n", "lan", "link", "set", "up1", "up"]));
    run(Command::new("ip").args(["-n", "lan", "addr", "replace", "fd00:31::50/64", "dev", "up1", "nodad"]));
}

#[test]
fn a_kernel_without_an_agent_goes_silent_when_another_machine_claims_and_an_agent_takes_the_address_back() {
    inside(|| {
        let mut node = Node::running();
        neighbour();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        for address in FIRST {
            until("an answer", || answers(address));
        }
        node.end_agent(Signal::SIGKILL);
        let agent_is_silent = Duration::from_secs(6);
        std::thread::sleep(agent_is_silent);
        assert!(FIRST.into_iter().all(answers), "the kernel answers on");
        claim_from_lan();
        for address in FIRST {
            assert!(!answers(address), "{address} is another machine's now");
        }
        assert!(from_lan(&["ping", "-c1", "-W1", UPLINK_ADDRESSES[0]]), "the node's own address answers");
        node.start_agent();
        node.await_ready();
        for address in FIRST {
            until("an answer, for the claimant is gone", || answers(address));
        }
    });
}

#[test]
fn a_malformed_advertisement_is_dropped_and_counted() {
    inside(|| {
        let node = Node::running();
        neighbour();
        make_pool(&node);
        make_service(&node, "web", &json!({}), None);
        until("an answer", || answers(FIRST[1]));
        let counted = || {
            let page = run(Command::new("curl").args(["-sS", "http://127.0.0.1:9470/metrics"]));
            let named = "weft_lb_malformed_packets_total{protocol=\"neighbour discovery\"}";
            let line = page.lines().find(|line| line.starts_with(named)).map(str::to_owned);
            line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).expect("a counter")
        };
        let before = counted();
        send_malformed_advertisement();
        until("it to be counted", || counted() > before);
        assert!(answers(FIRST[1]));
    });
}

#[test]
fn a_claim_is_told_so_that_caches_learn_it() {
    inside(|| {
        let node = Node::running();
        neighbour();
        make_pool(&node);
        let stale = "02:00:00:00:00:99";
        for address in FIRST {
            run(Command::new("ip")
                .args(["-n", "lan", "neigh", "add", address, "dev", "up1"])
                .args(["lladdr", stale, "nud", "stale"]));
        }
        make_service(&node, "web", &json!({}), None);
        let cached = || run(Command::new("ip").args(["-n", "lan", "neigh", "show", "dev", "up1"]));
        until("both families to be learned", || {
            let cached = cached();
            FIRST.iter().all(|address| {
                let line = cached.lines().find(|line| line.starts_with(&format!("{address} ")));
                line.is_some_and(|line| !line.contains(stale))
            })
        });
    });
}

#[test]
fn an_address_that_another_machine_has_is_not_claimed_and_the_machine_is_named() {
    inside(|| {
        let node = Node::running();
        neighbour();
        for address in ["172.31.0.105/24", "fd00:31::105/64"] {
            run(Command::new("ip").args(["-n", "lan", "addr", "add", address, "dev", "up1"]));
        }
        make_pool(&node);
        let taken = json!({"metallb.io/loadBalancerIPs": "172.31.0.105,fd00:31::105"});
        make_service(&node, "web", &taken, None);
        until("the Event", || events_of(&node, "web", "Conflict").len() >= 2);
        let message = events_of(&node, "web", "Conflict")[0]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("is answered for by the machine with MAC"), "{message}");
        assert!(!ip("route show table local").contains("172.31.0.105"));
        until("the condition", || {
            let said = condition(&node, "web");
            said.contains("Conflict") && said.contains("is answered for by the machine with MAC")
        });
        for address in ["172.31.0.105/24", "fd00:31::105/64"] {
            run(Command::new("ip").args(["-n", "lan", "addr", "del", address, "dev", "up1"]));
        }
        let learned = || ip("route show table local").contains("172.31.0.105");
        assert!(holds_within(Duration::from_secs(15), learned), "claimed when it is free");
        until("the condition", || condition(&node, "web").starts_with("\"Allocated\""));
    });
}

/// Moves the uplink's addresses to a link `top` that `kind` makes of it; `None`, loudly, when this kernel makes no such link.
fn over(kind: &str) -> Option<Node> {
    let mut node = Node::new();
    let words = match kind {
        "vlan" => "link add link up0 name top type vlan id 10",
        "bond" => "link add top type bond mode active-backup",
        _ => "link add top type bridge",
    };
    if !Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: this kernel has no link of type {kind}");
        return None;
    }
    ip("addr flush dev up0");
    if kind != "vlan" {
        ip("link set up0 down");
        ip("link set up0 master top");
        ip("link set up0 up");
    }
    std::fs::write("/proc/sys/net/ipv6/conf/top/accept_dad", "0").unwrap();
    ip(&format!("addr add {}/24 dev top", UPLINK_ADDRESSES[0]));
    ip(&format!("addr add {}/64 dev top nodad", UPLINK_ADDRESSES[1]));
    ip("link set top up");
    ip("netns add lan");
    ip("link set up1 netns lan");
    if kind == "vlan" {
        ip("-n lan link set up1 down");
        ip("-n lan link set up1 name cable");
        ip("-n lan link set cable up");
        ip("-n lan link add link cable name up1 type vlan id 10");
    }
    set_up_neighbour();
    node.start_server();
    node.make_node_object();
    node.start_agent();
    node.start_tunnel();
    node.await_ready();
    Some(node)
}

fn an_address_answers_over(kind: &str) {
    let Some(mut node) = over(kind) else { return };
    make_pool(&node);
    make_service(&node, "web", &json!({}), None);
    for address in FIRST {
        until("an answer", || answers(address));
        assert!(!answers(if address.contains(':') { "fd00:31::101" } else { "172.31.0.101" }), "not ours");
    }
    let promiscuous = ip("-d link show up0").contains("promiscuity 1");
    assert!(kind == "bridge" || !promiscuous, "only a bridge hears everything of its ports");
    node.end_agent(Signal::SIGKILL);
    assert!(FIRST.into_iter().all(answers), "the kernel answers");
    claim_from_lan();
    assert!(!FIRST.into_iter().any(answers), "and goes silent when another machine claims");
}

#[test]
fn an_address_answers_over_a_bridge() {
    inside(|| an_address_answers_over("bridge"));
}

#[test]
fn an_address_answers_over_a_vlan() {
    inside(|| an_address_answers_over("vlan"));
}

#[test]
fn an_address_answers_over_a_bond() {
    inside(|| an_address_answers_over("bond"));
}
