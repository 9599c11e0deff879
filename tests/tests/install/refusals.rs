//! What keeps an installation from starting is one line, and nothing was touched.

use weft_tests::node::{binary, inside, refusal, write};

use crate::host::{Host, calls, differences, install, tree, weft};

/// One line with every one of `parts`, exit code `code`, and a host as before.
fn refused(command: &mut std::process::Command, code: i32, parts: &[&str]) {
    let before = tree();
    let (exit, said) = refusal(command);
    assert_eq!((exit, said.lines().count()), (code, 1), "{command:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{command:?}: {said:?} lacks {part:?}");
    }
    assert_eq!(differences(&before, &tree()), [""; 0], "{command:?}");
    assert_eq!(calls(), [""; 0], "{command:?}");
}

#[test]
fn a_wrong_flag_is_refused_before_anything_is_touched() {
    inside(|| {
        let host = Host::with_systemd();
        let with = |flag: &str, value: &str| {
            let mut flags = host.flags();
            match flags.iter().position(|given| given == flag) {
                Some(at) => flags[at + 1] = value.to_owned(),
                None => flags.extend([flag.to_owned(), value.to_owned()]),
            }
            install(&flags)
        };
        refused(&mut with("--colour", "red"), 2, &["--colour", "weft install --help"]);
        refused(&mut with("--wait", "soon"), 2, &["--wait", "60s"]);
        refused(&mut with("--service-manager", "upstart"), 2, &["--service-manager", "openrc"]);
        refused(&mut with("--cluster-dns", "10.99.0.10"), 2, &["--cluster-dns 10.99.0.10", "--service-cidr"]);
        refused(&mut with("--node-name", "A_B"), 2, &["--node-name", "A_B"]);
        refused(&mut with("--api-server", "172.31.0.1:6443"), 2, &["--api-server", "https://"]);
        refused(&mut with("--token-file", "/nowhere/token"), 2, &["/nowhere/token", "cannot be read"]);
        refused(&mut with("--token-file", "token"), 2, &["--token-file", "relative"]);
        refused(&mut with("--resolv-conf", "/etc/a b"), 2, &["/etc/a b", "letters"]);
        refused(&mut with("--run-dir", "/run/other"), 2, &["--run-dir /run/other", "/run/weft"]);
        refused(&mut with("--kubeconfig", "/nowhere/config"), 2, &["--kubeconfig", "--api-server"]);
    });
}

#[test]
fn an_edited_environment_file_that_is_wrong_is_named() {
    inside(|| {
        let _host = Host::with_systemd();
        std::fs::create_dir("/etc/weft").unwrap();
        let environment = std::path::Path::new("/etc/weft/agent.env");
        write(environment, "WEFT_AGENT_ARGS=\"--colour red\"\n");
        refused(&mut weft(&["install"]), 2, &["/etc/weft/agent.env", "--colour"]);
        write(environment, "WEFT_AGENT_ARGS=\"--node-name 'a'\"\n");
        refused(&mut weft(&["install"]), 2, &["/etc/weft/agent.env", "'a'"]);
    });
}

#[test]
fn without_root_one_line_says_so() {
    inside(|| {
        let host = Host::with_systemd();
        for verb in ["install", "uninstall"] {
            let mut command = std::process::Command::new("unshare");
            command.arg("--user").arg(binary()).arg(verb);
            if verb == "install" {
                command.args(host.flags());
            }
            refused(&mut command, 1, &["needs root", "sudo"]);
        }
    });
}

#[test]
fn a_host_without_a_service_manager_is_told_what_to_do() {
    inside(|| {
        let mut host = Host::new();
        host.node.start_server();
        refused(&mut install(&host.flags()), 1, &["/run/systemd/system", "/run/openrc", "--service-manager"]);
    });
}
