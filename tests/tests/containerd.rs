//! The CNI plugin driven by a real runtime: containerd and runc from Debian, containers of busybox.
#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::node::{DNS, Node, Process, UPLINK_ADDRESSES, holds_within, inside, ip, run, until, write};

const NAME: &str = "kubernetes.default.svc.cluster.local";
const APPLETS: [&str; 7] = ["sh", "sleep", "ping", "nslookup", "ip", "wget", "httpd"];

/// A containerd of its own, with the node's CNI folders where it looks for them.
struct Runtime {
    folder: PathBuf,
    /// Of containerd; its cgroups bear this name too, and those are the machine's.
    namespace: String,
    _daemon: Process,
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let tasks = || {
            self.ctr(&["task", "list", "--quiet"]).output().map(|output| output.stdout).unwrap_or_default()
        };
        for id in String::from_utf8_lossy(&tasks()).lines() {
            let _ = self.ctr(&["task", "kill", "--signal", "SIGKILL", id]).output();
        }
        holds_within(Duration::from_secs(5), || tasks().is_empty());
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            remove_cgroup(&hierarchy.path().join(&self.namespace));
        }
        remove_cgroup(&Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}

fn remove_cgroup(path: &Path) {
    for child in fs::read_dir(path).into_iter().flatten().flatten().filter(|child| child.path().is_dir()) {
        remove_cgroup(&child.path());
    }
    let _ = fs::remove_dir(path);
}

impl Runtime {
    fn start(node: &Node) -> Self {
        let folder = node.path("containerd");
        fs::create_dir(&folder).unwrap();
        mount(&["-t", "tmpfs", "none"], &folder);
        // The machine's own configuration is neither read nor written: the folders are seen through an overlay.
        for (place, target, ours) in [("/etc", "/etc/cni/net.d", "cni"), ("/opt", "/opt/cni/bin", "bin")] {
            let [upper, work] = ["upper", "work"].map(|name| folder.join(format!("{name}-{ours}")));
            fs::create_dir(&upper).unwrap();
            fs::create_dir(&work).unwrap();
            let options = format!("lowerdir={place},upperdir={},workdir={}", upper.display(), work.display());
            mount(&["-t", "overlay", "overlay", "-o", &options], Path::new(place));
            fs::create_dir_all(target).unwrap();
            mount(&["--bind", node.path(ours).to_str().unwrap()], Path::new(target));
        }
        fs::create_dir_all("/run/containerd").unwrap();
        mount(&["-t", "tmpfs", "none"], Path::new("/run/containerd"));
        make_rootfs(&folder.join("rootfs"));
        let config = folder.join("config.toml");
        write(&config, configuration(&folder));
        let mut command = Command::new("containerd");
        command.arg("--config").arg(config);
        let daemon = Process::start("containerd", &mut command, &folder);
        let namespace = format!("weft-test-{}", nanoseconds());
        let runtime = Self { folder, namespace, _daemon: daemon };
        until("containerd", || {
            runtime.ctr(&["version"]).output().is_ok_and(|output| output.status.success())
        });
        runtime
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.folder.join("containerd.sock"));
        command.args(["--namespace", &self.namespace]).args(args);
        command
    }

    /// A container on the node's network. `ctr` attaches it, waits for its end and detaches it.
    fn start_container(&self, id: &str, command: &[&str]) -> Process {
        let rootfs = self.folder.join("rootfs");
        let mut ctr = self.ctr(&["run", "--rm", "--cni", "--rootfs", rootfs.to_str().unwrap(), id]);
        ctr.args(command);
        let process = Process::start(id, &mut ctr, &self.folder);
        until(id, || self.addresses(id).len() == 2);
        process
    }

    fn inside(&self, id: &str, command: &[&str]) -> Command {
        let exec_id = format!("x{}", nanoseconds());
        let mut ctr = self.ctr(&["task", "exec", "--exec-id", &exec_id, id]);
        ctr.args(command);
        ctr
    }

    /// The container's global addresses, IPv4 first; fewer than two until it is attached.
    fn addresses(&self, id: &str) -> Vec<String> {
        let output = self.inside(id, &["/bin/ip", "-o", "addr", "show", "dev", "eth0"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let global = text.lines().filter(|line| line.contains("scope global"));
        let mut found: Vec<String> = global
            .filter_map(|line| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned()))
            .collect();
        found.sort_by_key(|address| address.contains(':'));
        found
    }

    /// CHECK says error 3 (unknown container) when no address is leased, another one when more is wrong.
    fn has_lease(&self, node: &Node, id: &str) -> bool {
        let id = format!("{}-{id}", self.namespace);
        node.cni("CHECK", "1.0.0", &id, "/proc/self/ns/net", None).printed["code"] != 3
    }

    fn end_container(&self, id: &str, mut process: Process) {
        run(&mut self.ctr(&["task", "kill", "--signal", "SIGKILL", id]));
        until("the end of ctr", || process.has_ended());
    }
}

fn configuration(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "version = 2\nroot = \"{folder}/root\"\nstate = \"{folder}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\n  address = \"{folder}/containerd.sock\"\n"
    )
}

fn make_rootfs(rootfs: &Path) {
    for folder in ["bin", "etc", "www"] {
        fs::create_dir_all(rootfs.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("Debian's busybox-static");
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    write(&rootfs.join("www/index.html"), "served by a container\n");
}

fn mount(args: &[&str], target: &Path) {
    run(Command::new("mount").args(args).arg(target));
}

fn nanoseconds() -> u128 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos())
}

/// A Service in front of one container.
fn make_service(node: &Node, endpoints: &[String]) -> Vec<String> {
    let spec = json!({"ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80, "targetPort": 8080}]});
    let services = "/api/v1/namespaces/default/services";
    let service = node.api().create(services, &json!({"metadata": {"name": "web"}, "spec": spec}));
    for (family, address) in ["IPv4", "IPv6"].into_iter().zip(endpoints) {
        let name = format!("web-{}", family.to_lowercase());
        let slice = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family,
            "endpoints": [{"addresses": [address]}],
            "ports": [{"port": 8080, "protocol": "TCP"}],
        });
        node.api().create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice);
    }
    serde_json::from_value(service["spec"]["clusterIPs"].clone()).unwrap()
}

fn in_brackets(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Everything of the kernel that names one of the addresses, and every pod link.
fn traces(addresses: &[String]) -> Vec<String> {
    let ruleset = run(Command::new("nft").args(["list", "ruleset"]));
    let texts = [ip("route show table all"), ip("-6 route show table all"), ruleset, ip("-o link")];
    let lines = texts.iter().flat_map(|text| text.lines());
    let ours = |line: &&str| line.contains("weftp") && !line.contains("weftp*");
    let named = |line: &&str| addresses.iter().any(|address| line.contains(address.as_str()));
    lines.filter(|line| ours(line) || named(line)).map(str::to_owned).collect()
}

#[test]
fn containers_of_containerd_have_addresses_names_services_and_leave_nothing() {
    inside(|| {
        let node = Node::running();
        let runtime = Runtime::start(&node);
        let [client, server] = ["client", "server"];
        let server_run = runtime.start_container(server, &["/bin/httpd", "-f", "-p", "8080", "-h", "/www"]);
        let client_run = runtime.start_container(client, &["/bin/sleep", "600"]);
        assert!(runtime.has_lease(&node, client));
        let of_server = runtime.addresses(server);
        let of_client = runtime.addresses(client);
        assert!(
            of_client[0].starts_with("10.244.0.") && of_client[1].starts_with("fd00:10:244::"),
            "{of_client:?}"
        );
        assert!(of_client.iter().all(|address| !of_server.contains(address)), "{of_client:?} {of_server:?}");

        for address in UPLINK_ADDRESSES.iter().copied().chain(of_server.iter().map(String::as_str)) {
            run(&mut runtime.inside(client, &["/bin/ping", "-c", "1", "-W", "3", address]));
        }
        for address in DNS {
            let said = run(&mut runtime.inside(client, &["/bin/nslookup", NAME, address]));
            assert!(said.contains("10.96.0.1") && said.contains("fd00:10:96::1"), "{said}");
        }
        let vips = make_service(&node, &of_server);
        for vip in &vips {
            let url = format!("http://{}/", in_brackets(vip));
            let fetch = || runtime.inside(client, &["/bin/wget", "-qO-", &url]).output();
            until(&url, || fetch().is_ok_and(|output| output.stdout == b"served by a container\n"));
        }

        runtime.end_container(client, client_run);
        runtime.end_container(server, server_run);
        assert_eq!(traces(&of_client), [""; 0]);
        // The Service still names the server's addresses; its link, routes and rights must be gone.
        let left = traces(&of_server);
        assert!(left.iter().all(|line| line.contains("8080") && !line.contains("weftp")), "{left:#?}");
        assert!(!runtime.has_lease(&node, client) && !runtime.has_lease(&node, server));
    });
}

#[test]
fn containers_outlive_the_agent_and_end_well_without_it() {
    inside(|| {
        let mut node = Node::running();
        let runtime = Runtime::start(&node);
        let id = "outlive";
        let running = runtime.start_container(id, &["/bin/sleep", "600"]);
        let addresses = runtime.addresses(id);
        node.end_agent(Signal::SIGKILL);
        for address in UPLINK_ADDRESSES {
            run(&mut runtime.inside(id, &["/bin/ping", "-c", "1", "-W", "3", address]));
        }
        // DEL cannot reach anybody: the link goes with the namespace, the lease when the next agent looks.
        runtime.end_container(id, running);
        node.start_agent();
        node.await_ready();
        until("the end of all traces", || traces(&addresses).is_empty());
        assert!(!runtime.has_lease(&node, id));
    });
}
