//! A real kube-proxy is found, refused while it runs, and what it leaves goes on request, in every mode that this kernel can run, while
//! the Service goes on answering. `WEFT_KUBE_PROXY` names the binary (tests/tools/build-kubernetes.sh builds it).

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::node::{NODE, Node, Process, UPLINK_ADDRESSES, inside, ip, refusal, run, until, write};

const VIPS: [&str; 2] = ["10.96.0.80:80", "[fd00:10:96::80]:80"];
const NODE_PORTS: [&str; 2] = ["172.31.0.1:30080", "[fd00:31::1]:30080"];
/// Chains of a kubelet in both iptables, and a rule of the administrator's.
const NOT_KUBE_PROXYS: &str = "*nat\n:KUBE-KUBELET-CANARY - [0:0]\n:MINE - [0:0]\n-A MINE -j RETURN\n-A PREROUTING -j MINE\nCOMMIT\n\
                               *filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n";

fn kube_proxy_binary() -> Option<PathBuf> {
    let binary = std::env::var_os("WEFT_KUBE_PROXY").map(PathBuf::from);
    if binary.is_none() {
        eprintln!("SKIPPED: WEFT_KUBE_PROXY does not name a kube-proxy binary");
    }
    binary
}

/// Which kube-proxy, and whose iptables it finds.
struct Kind {
    mode: &'static str,
    /// The prefix of the programs that kube-proxy finds as `iptables`.
    iptables: &'static str,
    /// How `weft status` words what is left.
    named: &'static [&'static str],
}

fn write_config(node: &Node, mode: &str) -> PathBuf {
    let path = node.path("kube-proxy.yaml");
    let text = format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {mode}\nhostnameOverride: {NODE}\n\
         clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n\
         clientConnection: {{kubeconfig: {}, contentType: application/json, acceptContentTypes: application/json}}\n\
         healthzBindAddress: 127.0.0.1:10300\nmetricsBindAddress: 127.0.0.1:10249\n\
         conntrack: {{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n",
        node.path("kubeconfig").display()
    );
    write(&path, &text);
    path
}

/// A folder whose `iptables` are those of `kind`.
fn programs(node: &Node, kind: &Kind) -> PathBuf {
    let folder = node.path("programs");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let target = format!("/usr/sbin/{}-{}{verb}", name, kind.iptables);
            std::os::unix::fs::symlink(target, folder.join(format!("{name}{verb}"))).unwrap();
        }
    }
    folder
}

/// A Service with node port in both families; who answers is this test, on the node.
fn make_service(node: &Node) {
    let api = node.api();
    let spec = json!({
        "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "clusterIPs": ["10.96.0.80", "fd00:10:96::80"],
        "clusterIP": "10.96.0.80", "ports": [{"port": 80, "nodePort": 30080}],
    });
    api.create("/api/v1/namespaces/default/services", &json!({"metadata": {"name": "web"}, "spec": spec}));
    for (family, address) in ["IPv4", "IPv6"].iter().zip(UPLINK_ADDRESSES) {
        let slice = json!({
            "metadata": {"name": format!("web-{}", family.to_lowercase()), "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family,
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "nodeName": NODE}],
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        });
        api.create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice);
    }
    for address in UPLINK_ADDRESSES {
        let ip: std::net::IpAddr = address.parse().unwrap();
        let listener = TcpListener::bind(SocketAddr::new(ip, 8080)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(b"web");
            }
        });
    }
}

fn answers(address: &str) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_millis(500))?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer == "web")
}

fn all_answer() -> bool {
    VIPS.iter().chain(&NODE_PORTS).all(|address| answers(address))
}

/// Everything in both iptables and of kube-proxy's own tables.
fn rules() -> String {
    let shown = |program: &str, arguments: &[&str]| run(Command::new(program).args(arguments));
    let own = shown("nft", &["list", "tables"]);
    let both = ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"];
    both.iter().map(|program| shown(program, &[])).collect::<String>() + &own
}

fn restore(program: &str) {
    let script = format!("printf '{}' | {program} --noflush", NOT_KUBE_PROXYS.replace('\n', "\\n"));
    run(Command::new("sh").args(["-c", &script]));
}

fn kube_proxy_is_taken_over_from(binary: &Path, kind: &Kind) {
    let mut node = Node::new();
    // Before any rule the host must have a way to a ClusterIP.
    ip("route add default via 172.31.0.254");
    ip("-6 route add default via fd00:31::fe");
    node.start_server();
    node.make_node_object();
    make_service(&node);
    for program in [
        "iptables-legacy-restore",
        "ip6tables-legacy-restore",
        "iptables-nft-restore",
        "ip6tables-nft-restore",
    ] {
        restore(program);
    }
    let untouched = rules();
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs(&node, kind).display());
    let mut command = Command::new(binary);
    command.arg("--config").arg(write_config(&node, kind.mode)).env("PATH", path);
    let theirs = Process::start("kube-proxy", &mut command, &node.path(""));
    until("kube-proxy's Service", all_answer);

    let (code, said) = refusal(node.cleanup_command().arg("--kube-proxy"));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&format!("kube-proxy runs (pid {})", theirs.pid())), "{said}");
    node.start_agent();
    node.start_tunnel();
    node.await_ready();
    let status = node.status().to_string();
    assert!(status.contains(&format!("runs beside Weft (pid {})", theirs.pid())), "{status}");
    assert!(all_answer(), "beside a running kube-proxy");

    theirs.end(Signal::SIGKILL);
    let said = run(node.cleanup_command().args(["--kube-proxy", "--dry-run"]));
    assert!(said.lines().count() > 1 && said.lines().all(|line| line.starts_with("would remove ")), "{said}");
    let status = node.status().to_string();
    for named in kind.named {
        assert!(status.contains(named), "{named}: {status}");
    }
    assert!(all_answer(), "beside what kube-proxy left");
    let planned = said.replace("would remove ", "removing ");
    let said = run(node.cleanup_command().arg("--kube-proxy"));
    assert_eq!(said, format!("{planned}no rule of kube-proxy is left in nf_tables and x_tables\n"));
    assert_eq!(
        without_hosts_own(&rules()),
        without_hosts_own(&untouched),
        "all else stays, and nothing of kube-proxy"
    );
    assert!(rules().contains("-A INPUT -j KUBE-FIREWALL"), "a kubelet's chain stays");
    assert!(all_answer(), "Weft alone");
    assert_eq!(
        run(node.cleanup_command().args(["--kube-proxy", "--dry-run"])),
        "no rule of kube-proxy is left in nf_tables and x_tables\n"
    );
    node.end_agent(Signal::SIGTERM);
    node.start_agent();
    node.await_ready();
    let status = node.status().to_string();
    assert!(!status.contains("weft cleanup --kube-proxy"), "{status}");
    assert!(all_answer(), "after a restart");
}

/// Rules without counters, and without what the kernel makes by itself (built-in chains of tables that were used), Weft's tables, and
/// KUBE-FIREWALL: kubelet and kube-proxy both see to that one, so that it stays.
fn without_hosts_own(rules: &str) -> Vec<String> {
    let kept = rules
        .lines()
        .filter(|line| line.contains("KUBE-") || line.contains("MINE") || line.contains("kube-proxy"))
        .filter(|line| !line.contains("KUBE-FIREWALL"));
    let mut kept: Vec<String> =
        kept.map(|line| line.split(" [").next().unwrap_or_default().to_owned()).collect();
    kept.sort();
    kept
}

#[test]
fn kube_proxy_in_nftables_mode_is_taken_over_from() {
    inside(|| {
        let Some(binary) = kube_proxy_binary() else { return };
        let named = &["nft table ip kube-proxy", "nft table ip6 kube-proxy"];
        kube_proxy_is_taken_over_from(&binary, &Kind { mode: "nftables", iptables: "nft", named });
    });
}

#[test]
fn kube_proxy_in_iptables_mode_is_taken_over_from() {
    inside(|| {
        let Some(binary) = kube_proxy_binary() else { return };
        let named = &["chains KUBE-* of iptables,", "rules that jump to them"];
        kube_proxy_is_taken_over_from(&binary, &Kind { mode: "iptables", iptables: "nft", named });
    });
}

#[test]
fn kube_proxy_in_iptables_mode_over_the_older_iptables_is_taken_over_from() {
    inside(|| {
        let Some(binary) = kube_proxy_binary() else { return };
        let named = &["chains KUBE-* of iptables-legacy", "rules that jump to them"];
        kube_proxy_is_taken_over_from(&binary, &Kind { mode: "iptables", iptables: "legacy", named });
    });
}
