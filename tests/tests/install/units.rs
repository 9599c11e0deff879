//! The unit files as their readers see them.

use std::path::Path;
use std::process::Command;

use weft_manifests::units;
use weft_tests::node::{binary, inside, run, write};

fn available(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

#[test]
fn systemd_understands_every_line() {
    inside(|| {
        if !available("systemd-analyze") {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "none", "/usr/local/bin"]));
        std::fs::copy(binary(), "/usr/local/bin/weft").unwrap();
        let all = [
            ("weft-agent.service", units::SYSTEMD_AGENT),
            ("weft-tunnel.service", units::SYSTEMD_TUNNEL),
            ("weft-ingress.service", units::SYSTEMD_INGRESS),
        ];
        for (name, text) in all {
            let path = folder.path().join(name);
            write(&path, text);
            let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !said.contains(name), "{name}: {said}");
        }
    });
}

#[test]
fn every_posix_shell_reads_the_openrc_scripts() {
    let folder = tempfile::tempdir().unwrap();
    let all = [
        ("weft-agent", units::OPENRC_AGENT),
        ("weft-tunnel", units::OPENRC_TUNNEL),
        ("weft-ingress", units::OPENRC_INGRESS),
    ];
    for (name, text) in all {
        let path = folder.path().join(name);
        write(&path, text);
        run(Command::new("sh").arg("-n").arg(&path));
        run(Command::new("busybox").args(["sh", "-n"]).arg(&path));
        if available("shellcheck") {
            // OpenRC reads the variables; the environment file is not there.
            run(Command::new("shellcheck").args(["-s", "sh", "-e", "SC2034,SC1091"]).arg(&path));
        }
    }
}

/// Runs the script's `start` with OpenRC's functions stood in for, and a `weft` that answers `--check-kernel` with `code`.
fn started(code: i32) -> String {
    let folder = tempfile::tempdir().unwrap();
    let weft = folder.path().join("weft");
    write(&weft, format!("#!/bin/sh\n[ \"$*\" = 'tunnel --check-kernel' ] && exit {code}\nexit 64\n"));
    run(Command::new("chmod").arg("+x").arg(&weft));
    let script = units::OPENRC_TUNNEL.replace("/usr/local/bin/weft", weft.to_str().unwrap());
    let path: &Path = &folder.path().join("script");
    write(path, script);
    let shell = "einfo() { echo \"$*\"; }; default_start() { echo started; }; . \"$1\"; start";
    run(Command::new("sh").args(["-c", shell, "sh"]).arg(path))
}

#[test]
fn openrc_starts_the_tunnel_unless_the_kernel_is_known_to_have_wireguard() {
    assert_eq!(started(0), "the kernel has WireGuard: no tunnel is needed\n");
    assert_eq!(started(1), "started\n");
    assert_eq!(started(127), "started\n");
}
