//! Questions to a DNS server, asked by dig; whether one answers at all.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

/// Whether anything comes back within a tenth of a second for a query of `cluster.local` (RFC 1035, section 4.1).
pub fn dns_answers(server: &str) -> bool {
    const QUERY: &[u8] = b"\0\x07\0\0\0\x01\0\0\0\0\0\0\x07cluster\x05local\0\0\x06\0\x01";
    let local = if server.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(local).expect("make a UDP socket");
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("set a time limit");
    socket.connect((server, 53)).and_then(|()| socket.send(QUERY)).is_ok()
        && socket.recv(&mut [0; 512]).is_ok()
}

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
