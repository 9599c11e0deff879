//! What users write into the ConfigMap `coredns-custom`, from the API server to a resolver, and over a restart.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weft_tests::node::{DNS, NODE, Node, UPLINK_ADDRESSES, dig, inside, run, until};

use crate::faults::ask;

const CONFIG_MAPS: &str = "/api/v1/namespaces/kube-system/configmaps";
const NAME: &str = "coredns-custom";
const KUBERNETES: &str = "kubernetes.default.svc.cluster.local";

fn config_map(text: &str) -> Value {
    json!({"metadata": {"name": NAME}, "data": {"lan.override": text}})
}

fn hosts(address: &str) -> String {
    format!("hosts {{\n  {address} printer.lan\n  fallthrough\n}}\n")
}

fn answered(address: &str) -> bool {
    DNS.iter().all(|server| dig(server, "printer.lan", "A") == [address])
}

#[test]
fn the_config_map_is_followed_and_outlives_the_api_server_and_the_agent() {
    inside(|| {
        let mut node = Node::running();
        node.api().create(CONFIG_MAPS, &config_map(&hosts("192.0.2.7")));
        until("the first hosts", || answered("192.0.2.7"));
        node.api().merge(CONFIG_MAPS, NAME, &config_map(&hosts("192.0.2.8")));
        until("the changed hosts", || answered("192.0.2.8"));
        node.api().merge(CONFIG_MAPS, NAME, &config_map(&hosts("192.0.2")));
        until("the problem", || {
            node.problems().iter().any(|problem| problem.contains("data[lan.override] line 2: "))
        });
        assert!(answered("192.0.2.8"), "what was good stays");
        node.api().merge(CONFIG_MAPS, NAME, &config_map(&hosts("192.0.2.9")));
        until("the corrected hosts", || answered("192.0.2.9"));
        assert_eq!(node.problems(), Vec::<String>::new());
        // SIGTERM saves the last good Snapshot.
        node.stop_server();
        node.end_agent(Signal::SIGTERM);
        node.start_agent();
        until("the hosts without the API server", || answered("192.0.2.9"));
    });
}

#[test]
fn metrics_have_the_names_and_the_port_of_coredns() {
    inside(|| {
        let _node = Node::running();
        until("an answer", || {
            DNS.iter().all(|server| !dig(server, "dns-version.cluster.local", "TXT").is_empty())
        });
        let page = ask("127.0.0.1:9153", "/metrics");
        for line in ["coredns_dns_responses_total{", "weft_dns_responses_total{", "coredns_panics_total 0"] {
            assert!(page.lines().any(|said| said.starts_with(line)), "{line}: {page}");
        }
        assert!(ask("127.0.0.1:9153", "/healthz").starts_with("HTTP/1.0 404"), "only metrics stand there");
    });
}

#[test]
fn a_node_is_found_by_its_name_and_an_explanation_needs_a_pod_of_the_node() {
    inside(|| {
        let node = Node::running();
        until("the Node's name", || {
            DNS.iter().all(|server| {
                let [v4, v6] = UPLINK_ADDRESSES;
                dig(server, NODE, "A") == [v4] && dig(server, NODE, "AAAA") == [v6]
            })
        });
        let mut explain = node.weft("dns");
        explain.args(["explain", "absent", "kubernetes", "--run-dir"]).arg(node.path("run"));
        let said = String::from_utf8_lossy(&explain.output().expect("run weft").stderr).into_owned();
        assert!(said.contains("pod default/absent has no address on this node"), "{said}");
        let mut log = node.weft("dns");
        log.args(["log", "absent", "--run-dir"]).arg(node.path("run"));
        let said = String::from_utf8_lossy(&log.output().expect("run weft").stderr).into_owned();
        assert!(said.contains("pod default/absent has no address on this node"), "{said}");
        let help = run(node.weft("dns").args(["explain", "--help"]));
        assert!(help.contains("A pod on this node"), "{help}");
    });
}

/// What kubelets named while there was a NodeLocal DNSCache, pods may ask for as long as they live.
#[test]
fn a_pod_is_answered_at_the_address_that_a_node_local_cache_had() {
    inside(|| {
        let mut node = Node::running();
        node.end_agent(Signal::SIGTERM);
        node.start_agent_with(node.agent_command().args(["--node-local-dns", "169.254.20.10,fd00:53::10"]));
        node.await_ready();
        let vip =
            run(std::process::Command::new("dig").args(["+short", &format!("@{}", DNS[0]), KUBERNETES]));
        node.add_pod("pod1");
        for address in ["169.254.20.10", "fd00:53::10", DNS[0], DNS[1]] {
            for transport in ["+notcp", "+tcp"] {
                let mut dig = std::process::Command::new("ip");
                dig.args(["netns", "exec", "pod1", "dig", "+short", "+time=2", "+tries=1", transport]);
                assert_eq!(run(dig.args([&format!("@{address}"), KUBERNETES])), vip, "{address} {transport}");
            }
        }
        let mut tracked = weft_netstack::kernel::conntrack::udp_flows().unwrap();
        tracked.retain(|flow| flow.original.destination.port() == 53);
        assert!(tracked.is_empty(), "{tracked:?}");
    });
}
