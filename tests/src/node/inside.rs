//! Runs the body of a test in namespaces of its own, by running the test executable once more.

use std::process::{Command, Stdio};

const INSIDE: &str = "WEFT_TEST_INSIDE";

/// Runs `body` with its own network, mounts and pids; fails when it does. `body` must be a closure written in the test
/// itself: the test to be run again is found by the closure's name.
pub fn inside<F: FnOnce()>(body: F) {
    let test = test_name(std::any::type_name::<F>());
    if std::env::var(INSIDE).as_deref() == Ok(test) {
        body();
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: {test} needs root");
        return;
    }
    let own = std::env::current_exe().expect("the running executable");
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(own)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, test)
        .stdin(Stdio::null())
        .output()
        .expect("run unshare (Debian's util-linux)");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "in its namespaces {test} failed:\n{said}");
    // With `--nocapture`: figures, if it has any.
    print!("{said}");
}

/// `node::restart::a_restart_changes_nothing::{{closure}}` gives `restart::a_restart_changes_nothing`.
fn test_name(closure: &str) -> &str {
    let name = closure.strip_suffix("::{{closure}}").expect("the body is a closure in the test");
    name.split_once("::").map_or(name, |(_, rest)| rest)
}
