//! The DaemonSet's container: a process with mounts of its own that installs on the host and keeps the token current.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use weft_tests::node::{NODE, Node, Process, binary, inside, until, write};

use crate::host::{Host, calls, differences, lines, said, tree, weft};

const TOKEN: &str = "/var/lib/weft/api/token";
const USER: &str = "system:serviceaccount:weft-system:weft-agent,weft.network:node:n1";

/// A projected volume as the kubelet makes it: every version a folder, `..data` the current one.
struct Volume(PathBuf);

impl Volume {
    fn new(node: &Node) -> Self {
        let volume = Self(node.path("volume"));
        std::fs::create_dir(&volume.0).unwrap();
        for name in ["token", "ca.crt"] {
            symlink(format!("..data/{name}"), volume.0.join(name)).unwrap();
        }
        volume
    }

    /// Swaps the content in one step.
    fn hold(&self, node: &Node, version: &str, token: &str) {
        let folder = self.0.join(version);
        std::fs::create_dir(&folder).unwrap();
        write(&folder.join("token"), token);
        std::fs::copy(node.path("server/ca.crt"), folder.join("ca.crt")).unwrap();
        symlink(version, self.0.join("..data_tmp")).unwrap();
        std::fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
    }
}

/// The container: its own /run, /etc and /usr/local, the binary at a path that the host has not.
fn container(host: &Host, volume: &Volume) -> Command {
    let script = "
        mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io/serviceaccount /run/image &&
        mount --bind \"$1\" /run/secrets/kubernetes.io/serviceaccount && cp \"$2\" /run/image/weft &&
        mount -t tmpfs none /etc && mount -t tmpfs none /usr/local && mount -t tmpfs none /var/lib &&
        shift 2 && exec /run/image/weft install --in-pod \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&volume.0).arg(binary());
    command.args(host.cluster_flags()).env("NODE_NAME", NODE).env_remove("PATH");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

#[test]
fn the_container_installs_hands_its_token_over_and_leaves_the_services_running() {
    inside(|| {
        let mut host = Host::with_systemd();
        host.node.stop_server();
        write(&host.node.path("tokens"), format!("first,{USER}\nsecond,{USER}\n"));
        host.node.start_server();
        let volume = Volume::new(&host.node);
        volume.hold(&host.node, "..1", "first");
        let before = tree();

        let pod = Process::start("pod", &mut container(&host, &volume), &host.node.path(""));
        until("the network", || host.is_ready());
        assert_eq!(std::fs::read_to_string(TOKEN).unwrap(), "first");
        let environment = std::fs::read_to_string("/etc/weft/agent.env").unwrap();
        assert!(environment.contains(&format!("--node-name {NODE} --token-file {TOKEN}")), "{environment}");
        assert_eq!(std::fs::read("/usr/local/bin/weft").unwrap(), std::fs::read(binary()).unwrap());

        volume.hold(&host.node, "..2", "second");
        until("the renewed token", || std::fs::read_to_string(TOKEN).is_ok_and(|token| token == "second"));

        let refused = weft(&["uninstall"]).output().unwrap();
        let text = said(&refused);
        assert_eq!((refused.status.code(), text.lines().count()), (Some(1), 1), "{text}");
        let pid = format!("pid {}", pod.pid());
        for part in [pid.as_str(), "kubectl -n weft-system delete daemonset weft"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(host.is_ready(), "nothing was touched");

        calls();
        assert_eq!(pod.end(Signal::SIGTERM).code(), Some(0));
        assert!(host.is_ready());
        assert_eq!(calls(), [""; 0]);

        let removed = lines(&mut weft(&["uninstall"]));
        assert!(removed[0].contains("kubectl -n weft-system delete daemonset weft"), "{removed:#?}");
        assert_eq!(differences(&before, &tree()), [""; 0], "{removed:#?}");
    });
}

#[test]
fn a_killed_container_that_comes_again_restarts_nothing() {
    inside(|| {
        let host = Host::with_systemd();
        let volume = Volume::new(&host.node);
        volume.hold(&host.node, "..1", "an-agent-bound-to-n1");
        let pod = Process::start("pod", &mut container(&host, &volume), &host.node.path(""));
        until("the network", || host.is_ready());
        pod.end(Signal::SIGKILL);
        calls();
        let log = host.node.path("pod.log");
        std::fs::remove_file(&log).unwrap();
        let _pod = Process::start("pod", &mut container(&host, &volume), &host.node.path(""));
        let says = |part: &str| std::fs::read_to_string(&log).is_ok_and(|text| text.contains(part));
        until("the second installation", || says("weft-tunnel runs"));
        assert!(!says("restarted") && !says("wrote"), "{}", std::fs::read_to_string(&log).unwrap());
        assert!(!calls().iter().any(|call| call.starts_with("restart")));
    });
}

#[test]
fn a_container_that_lacks_something_says_what() {
    inside(|| {
        let host = Host::with_systemd();
        let volume = Volume::new(&host.node);
        volume.hold(&host.node, "..1", "token");
        let before = tree();
        let refused = |command: &mut Command, parts: &[&str]| {
            let output = command.output().unwrap();
            let text = said(&output);
            assert!(!output.status.success() && text.lines().count() == 1, "{text}");
            for part in parts {
                assert!(text.contains(part), "{text:?} lacks {part:?}");
            }
            assert_eq!(differences(&before, &tree()), [""; 0]);
        };
        refused(container(&host, &volume).env_remove("NODE_NAME"), &["NODE_NAME", "spec.nodeName"]);
        refused(container(&host, &volume).args(["--token-file", "/t"]), &["--token-file", "--in-pod"]);
        refused(container(&host, &volume).args(["--wireguard-port", "0x"]), &["--wireguard-port"]);
        // In the host's own mounts there is no container to come from.
        let mut without_volume = weft(&["install", "--in-pod"]);
        refused(&mut without_volume, &["/var/run/secrets/kubernetes.io/serviceaccount"]);
        std::fs::create_dir_all("/run/secrets/kubernetes.io/serviceaccount").unwrap();
        refused(&mut without_volume, &["hostPID"]);
        assert!(!Path::new(TOKEN).exists());
    });
}
