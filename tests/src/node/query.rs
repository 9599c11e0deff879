//! Questions to a DNS server, asked by dig.

use std::process::Command;

/// The answers to `name`/`kind` from `server`, sorted; empty when none came within a second.
pub fn dig(server: &str, name: &str, kind: &str) -> Vec<String> {
    let mut command = Command::new("dig");
    command.args(["+short", "+time=1", "+tries=1", &format!("@{server}"), name, kind]);
    let output = command.output().expect("run dig (Debian's dnsutils)");
    if !output.status.success() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut answers: Vec<String> =
        text.lines().filter(|line| !line.starts_with(';')).map(str::to_owned).collect();
    answers.sort();
    answers
}
