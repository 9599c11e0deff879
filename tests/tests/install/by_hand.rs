//! A person installs, installs again, changes a flag, upgrades, and takes it all off.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use weft_tests::node::{NODE, Process, binary, inside, until, write};

use crate::host::{
    Host, agent_pid, await_end, calls, differences, install, lines, said, stand_in, tree, weft,
};

const ASKED: [&str; 4] = [
    "daemon-reload",
    "enable weft-agent.service weft-tunnel.service",
    "is-active --quiet weft-agent.service",
    "is-active --quiet weft-tunnel.service",
];

fn restarts() -> Vec<String> {
    calls().into_iter().filter(|call| call.starts_with("restart")).collect()
}

#[test]
fn an_installation_brings_the_network_up_and_an_uninstallation_leaves_no_trace() {
    inside(|| {
        let host = Host::with_systemd();
        let before = tree();
        let first = lines(&mut install(&host.flags()));
        assert_eq!(
            first[..first.len() - 1],
            [
                "wrote /etc/weft/created-folders",
                "wrote /usr/local/bin/weft",
                "wrote /etc/weft/agent.env",
                "wrote /etc/systemd/system/weft-agent.service",
                "wrote /etc/systemd/system/weft-tunnel.service",
                "ran systemctl daemon-reload",
                "ran systemctl enable weft-agent.service weft-tunnel.service",
                "restarted weft-agent: what it runs has changed",
                "restarted weft-tunnel: what it runs has changed",
            ]
        );
        let last = first.last().unwrap();
        assert!(
            last.starts_with("ready pods can come: /etc/cni/net.d/05-weft.conflist is in place"),
            "{last}"
        );
        assert!(host.is_ready() && Path::new("/opt/cni/bin/weft").exists());
        let mode = Path::new("/etc/weft/agent.env").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let removed = lines(&mut weft(&["uninstall"]));
        assert_eq!(removed.last().unwrap(), "nothing of Weft is left on this node");
        assert_eq!(removed[0], "removed CNI configuration", "no pod may be sent our way: {removed:#?}");
        assert_eq!(differences(&before, &tree()), [""; 0], "{removed:#?}");
        assert_eq!(lines(&mut weft(&["uninstall"])), ["nothing of Weft is left on this node"]);
        assert_eq!(differences(&before, &tree()), [""; 0]);
    });
}

#[test]
fn a_second_installation_changes_and_restarts_nothing() {
    inside(|| {
        let host = Host::with_systemd();
        lines(&mut install(&host.flags()));
        let (after_first, pid) = (tree(), agent_pid());
        calls();
        for flags in [host.flags(), Vec::new()] {
            let said = lines(&mut install(&flags));
            let changes: Vec<_> = said
                .iter()
                .filter(|line| line.starts_with("wrote") || line.starts_with("restarted"))
                .collect();
            assert_eq!(changes, [""; 0], "{said:#?}");
            assert_eq!(calls(), ASKED);
        }
        // The agent may save its snapshot meanwhile.
        let changed = differences(&after_first, &tree());
        assert!(changed.iter().all(|path| path.starts_with("/var/lib/weft/store")), "{changed:?}");
        assert_eq!(agent_pid(), pid);
    });
}

#[test]
fn a_changed_flag_restarts_the_agent_and_nothing_else() {
    inside(|| {
        let host = Host::with_systemd();
        lines(&mut install(&host.flags()));
        calls();
        let mut flags = host.flags();
        flags.extend(["--log-level".to_owned(), "debug".to_owned()]);
        let said = lines(&mut install(&flags));
        assert!(said.contains(&"wrote /etc/weft/agent.env".to_owned()), "{said:#?}");
        assert!(said.contains(&"unchanged weft-tunnel runs".to_owned()), "{said:#?}");
        assert_eq!(restarts(), ["restart weft-agent.service"]);
        let command_line = std::fs::read_to_string(format!("/proc/{}/cmdline", agent_pid())).unwrap();
        assert!(command_line.contains("--log-level\0debug"), "{command_line:?}");
    });
}

#[test]
fn an_upgrade_without_flags_keeps_them_and_restarts_both_services() {
    inside(|| {
        let host = Host::with_systemd();
        lines(&mut install(&host.flags()));
        let environment = std::fs::read_to_string("/etc/weft/agent.env").unwrap();
        calls();
        // Another version: the same program with other bytes behind it.
        let mut other = std::fs::read("/usr/local/bin/weft").unwrap();
        other.extend_from_slice(b"another version");
        write(&host.node.path("weft-new"), other);
        std::fs::set_permissions(host.node.path("weft-new"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut upgrade = std::process::Command::new(host.node.path("weft-new"));
        let said = lines(upgrade.arg("install").env("PATH", "/usr/local/sbin:/usr/bin:/bin"));
        assert_eq!(restarts(), ["restart weft-agent.service", "restart weft-tunnel.service"], "{said:#?}");
        assert_eq!(std::fs::read_to_string("/etc/weft/agent.env").unwrap(), environment);
        let read = |path: &str| std::fs::read(path).unwrap();
        assert!(read("/usr/local/bin/weft").ends_with(b"another version"));
        assert!(read("/opt/cni/bin/weft").ends_with(b"another version"), "the agent renews the plugin");
    });
}

#[test]
fn an_installation_that_was_cut_short_is_completed_by_the_next_one() {
    inside(|| {
        let host = Host::with_systemd();
        std::fs::create_dir_all("/run/stand-in").unwrap();
        write(Path::new("/run/stand-in/broken"), "");
        let output = install(&host.flags()).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("systemctl restart weft-agent.service' failed"), "{text}");
        assert!(text.contains("Job for weft-agent.service failed."), "{text}");
        std::fs::remove_file("/run/stand-in/broken").unwrap();
        // Half a file, as a power cut leaves it.
        write(Path::new("/usr/local/bin/.weft.new"), "half");
        calls();
        let again = lines(&mut install(&host.flags()));
        assert_eq!(restarts(), ["restart weft-agent.service", "restart weft-tunnel.service"], "{again:#?}");
        assert!(!again.iter().any(|line| line.starts_with("wrote")), "{again:#?}");
        assert!(host.is_ready());
    });
}

#[test]
fn an_installation_killed_at_any_instant_leaves_whole_files_and_is_completed() {
    inside(|| {
        let host = Host::with_systemd();
        std::fs::create_dir_all("/run/stand-in").unwrap();
        write(Path::new("/run/stand-in/broken"), "");
        let whole = std::fs::read(binary()).unwrap();
        let (mut interrupted, mut absent) = (0, 0);
        for milliseconds in (0..300).step_by(15) {
            let install = Process::start("install", &mut install(&host.flags()), &host.node.path(""));
            std::thread::sleep(Duration::from_millis(milliseconds));
            interrupted += u32::from(install.end(Signal::SIGKILL).signal().is_some());
            match std::fs::read("/usr/local/bin/weft") {
                Ok(content) => assert!(content == whole, "{milliseconds} ms: {} bytes", content.len()),
                Err(_) => absent += 1,
            }
        }
        assert!(interrupted > 0 && absent > 0, "nothing was interrupted");
        std::fs::remove_file("/run/stand-in/broken").unwrap();
        calls();
        lines(&mut install(&host.flags()));
        assert_eq!(restarts(), ["restart weft-agent.service", "restart weft-tunnel.service"]);
        assert!(host.is_ready());
        let temporary: Vec<_> =
            tree().into_keys().filter(|path| path.to_string_lossy().ends_with(".new")).collect();
        assert!(temporary.is_empty(), "{temporary:?}");
    });
}

#[test]
fn a_node_that_does_not_become_ready_says_what_is_missing() {
    inside(|| {
        let mut host = Host::with_systemd();
        let flags = host.flags();
        host.node.stop_server();
        let mut flags: Vec<_> = flags;
        flags.extend(["--wait".to_owned(), "2s".to_owned()]);
        let output = install(&flags).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("API server  ") && text.contains("not ready after 2 s"), "{text}");
        assert!(!Path::new("/etc/cni/net.d/05-weft.conflist").exists());
        // It goes on by itself.
        host.node.start_server();
        until("the network", || host.is_ready());
    });
}

#[test]
fn the_kubelets_api_server_is_taken_where_none_is_named() {
    inside(|| {
        let host = Host::with_systemd();
        let flags = host.flags();
        let at = flags.iter().position(|flag| flag == "--api-server").unwrap();
        let kubeconfig = format!(
            "clusters: [{{name: k, cluster: {{server: '{}'}}}}]\ncontexts: [{{name: c, context: {{cluster: k}}}}]\n\
             current-context: c\n",
            flags[at + 1]
        );
        let without: Vec<String> = [&flags[..at], &flags[at + 2..]].concat();
        let output = install(&without).output().unwrap();
        let text = said(&output);
        assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
        assert!(text.contains("/etc/kubernetes/kubelet.conf") && text.contains("--api-server"), "{text}");
        std::fs::create_dir_all("/etc/kubernetes").unwrap();
        write(Path::new("/etc/kubernetes/kubelet.conf"), &kubeconfig);
        let said = lines(&mut install(&without));
        assert_eq!(said[0], format!("API server {}, from /etc/kubernetes/kubelet.conf", flags[at + 1]));
        assert!(host.is_ready());
    });
}

#[test]
fn what_others_keep_beside_our_files_stays() {
    inside(|| {
        let host = Host::with_systemd();
        lines(&mut install(&host.flags()));
        write(Path::new("/etc/weft/mine"), "mine");
        write(Path::new("/etc/cni/net.d/99-other.conflist"), "{}");
        let key = std::fs::read("/var/lib/weft/wireguard.key").unwrap();
        let removed = lines(&mut weft(&["uninstall", "--keep-state"]));
        assert!(removed.contains(&"left /etc/weft: it holds files of others".to_owned()), "{removed:#?}");
        assert_eq!(std::fs::read("/etc/weft/mine").unwrap(), b"mine");
        assert!(Path::new("/etc/cni/net.d/99-other.conflist").exists() && !Path::new("/opt/cni").exists());
        assert_eq!(std::fs::read("/var/lib/weft/wireguard.key").unwrap(), key);
    });
}

#[test]
fn an_agent_that_is_no_service_is_named_by_its_pid() {
    inside(|| {
        let mut host = Host::with_systemd();
        let mut agent = weft(&["agent"]);
        agent.args(host.flags());
        host.node.start_agent_with(&mut agent);
        until("the agent", || host.status()["node"] == NODE);
        let output = weft(&["uninstall"]).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&format!("an agent runs on this node already (pid {})", agent_pid())),
            "{text}"
        );
    });
}

/// Records calls; the services count as up once they were started.
const RECORDER: &str = "#!/bin/sh
mkdir -p /run/stand-in
echo \"${0##*/} $*\" >> /run/stand-in/calls
case \"${0##*/} $2\" in
  'rc-service restart') touch \"/run/stand-in/$1\" ;;
  'rc-service status') [ -e \"/run/stand-in/$1\" ] ;;
esac
";

#[test]
fn openrc_gets_its_scripts_and_its_commands() {
    inside(|| {
        let mut host = Host::new();
        host.node.start_server();
        std::fs::create_dir_all("/run/openrc").unwrap();
        std::fs::create_dir_all("/etc/init.d").unwrap();
        stand_in("rc-service", RECORDER);
        stand_in("rc-update", RECORDER);
        let before = tree();
        let mut flags = host.flags();
        flags.extend(["--wait".to_owned(), "0".to_owned()]);
        lines(&mut install(&flags));
        let added = ["rc-update add weft-agent default", "rc-update add weft-tunnel default"];
        let started = [
            "rc-service weft-agent status",
            "rc-service weft-agent restart",
            "rc-service weft-tunnel status",
            "rc-service weft-tunnel restart",
        ];
        assert_eq!(calls(), [&added[..], &started].concat());
        let mode = Path::new("/etc/init.d/weft-agent").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        lines(&mut install(&flags));
        assert_eq!(
            calls(),
            [&added[..], &["rc-service weft-agent status", "rc-service weft-tunnel status"]].concat()
        );
        write(Path::new("/var/log/weft-agent.log"), "said");
        lines(&mut weft(&["uninstall"]));
        let ended = [
            "rc-service weft-agent stop",
            "rc-update del weft-agent default",
            "rc-service weft-tunnel stop",
            "rc-update del weft-tunnel default",
        ];
        assert_eq!(calls(), ended);
        assert_eq!(differences(&before, &tree()), [""; 0]);
    });
}

#[test]
fn without_a_service_manager_the_commands_to_run_are_printed_and_work() {
    inside(|| {
        let mut host = Host::new();
        host.node.start_server();
        host.node.make_node_object();
        let mut flags = host.flags();
        flags.extend(["--service-manager".to_owned(), "none".to_owned()]);
        let said = lines(&mut install(&flags));
        let at = said.iter().position(|line| line.starts_with("run these as root")).expect("what to run");
        let mut words = said[at + 1].split(' ');
        assert_eq!(said[at + 2], "/usr/local/bin/weft tunnel --unless-kernel");
        let mut agent = std::process::Command::new(words.next().unwrap());
        agent.args(words);
        host.node.start_agent_with(&mut agent);
        until("the agent", || host.status()["node"] == NODE);
        let pid = agent_pid();
        host.node.end_agent(Signal::SIGTERM);
        await_end(&pid);
    });
}
