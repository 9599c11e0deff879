//! Independent implementations as peers: WEFT_WIREGUARD_GO and WEFT_BORINGTUN name their binaries.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;

use super::*;

/// Longer than sessions are used (120 s), shorter than they may be (180 s).
const RENEWAL: Duration = Duration::from_secs(160);

/// A peer over one family of the underlay. Over IPv4 our side calls it, over IPv6 it calls us: who began a session renews it.
struct Foreign {
    name: String,
    host: Host,
    ipv6: bool,
    process: Child,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SIGKILL; it may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Foreign {
    /// `command`: in the foreground, with a control socket of the common kind (wireguard.com/xplatform).
    fn start(
        name: &str,
        command: &[OsString],
        number: u8,
        ipv6: bool,
        switch: &NamedNetns,
        ours: &Host,
    ) -> Self {
        let host = Host::new(number);
        host.prepare(switch, &[]);
        host.netns.must(&["ip", "link", "del", LINK]);
        let link = format!("wg{}x{number}", std::process::id());
        let mut process = Command::new("ip");
        process.args(["netns", "exec", &host.netns.name]).args(command).arg(&link);
        let foreign = Self { name: name.to_owned(), host, ipv6, process: process.spawn().unwrap() };
        let socket = PathBuf::from(format!("/var/run/wireguard/{link}.sock"));
        let start = Instant::now();
        let mut control = loop {
            match UnixStream::connect(&socket) {
                Ok(control) => break control,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{name}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let endpoint = SocketAddr::new(ours.underlay(ipv6), PORT);
        let endpoint = if ipv6 { format!("endpoint={endpoint}\n") } else { String::new() };
        let [v4, v6] = ours.ranges();
        let (private, public) = (hex(&[number; 32]), hex(&ours.key.0));
        let request = format!(
            "set=1\nprivate_key={private}\nlisten_port={PORT}\npublic_key={public}\n{endpoint}\
             allowed_ip={v4}\nallowed_ip={v6}\n\n"
        );
        control.write_all(request.as_bytes()).unwrap();
        let netns = &foreign.host.netns;
        netns.must(&["ip", "link", "set", &link, "mtu", &MTU.to_string(), "up"]);
        for ipv6 in [false, true] {
            netns.must(&["ip", "address", "add", &foreign.host.inner(ipv6).to_string(), "dev", &link]);
        }
        netns.must(&["ip", "route", "add", &v4, "dev", &link]);
        netns.must(&["ip", "-6", "route", "add", &v6, "dev", &link]);
        foreign
    }

    fn greets(&self, ours: &Host) {
        let (from, to) = if self.ipv6 { (&self.host, ours) } else { (ours, &self.host) };
        from.reaches(to.inner(false), PATIENCE);
        let endpoint = ours.status(&self.host).endpoint.unwrap();
        assert_eq!(endpoint.is_ipv6(), self.ipv6, "{}", self.name);
    }

    fn exchanges(&self, ours: &Host) {
        for ipv6 in [false, true] {
            for (from, to) in [(ours, &self.host), (&self.host, ours)] {
                let bytes = noise(3_000_000, u64::from(from.number));
                assert!(over_tcp(from, to, ipv6, &bytes) == bytes, "{} ipv6 {ipv6}", self.name);
                udp_arrives(from, to, ipv6);
            }
        }
    }
}

#[test]
fn others_are_understood_and_understand_over_renewed_sessions() {
    if !needs_root() {
        return;
    }
    let known = [
        ("WEFT_WIREGUARD_GO", &["-f"][..]),
        ("WEFT_BORINGTUN", &["--foreground", "--disable-drop-privileges"]),
    ];
    let (switch, mut ours) = (switch(), Host::new(1));
    ours.prepare(&switch, &[2, 3, 4, 5]);
    let mut others = Vec::new();
    for (variable, flags) in known {
        let Some(binary) = std::env::var_os(variable) else {
            eprintln!("SKIPPED: {variable} names no binary");
            continue;
        };
        let command: Vec<OsString> =
            std::iter::once(binary).chain(flags.iter().map(OsString::from)).collect();
        for ipv6 in [false, true] {
            let number = u8::try_from(others.len()).unwrap() + 2;
            others.push(Foreign::start(variable, &command, number, ipv6, &switch, &ours));
        }
    }
    let peers = others.iter().map(|other| {
        let (key, peer) = other.host.as_peer(other.ipv6);
        (key, WireguardPeer { endpoint: peer.endpoint.filter(|_| !other.ipv6), ..peer })
    });
    ours.write_peers(PORT, peers.collect());
    ours.start();
    others.iter().for_each(|other| other.greets(&ours));
    let start = Instant::now();
    others.iter().for_each(|other| other.exchanges(&ours));
    let renewed = |other: &Foreign| {
        let age = ours.status(&other.host).last_handshake_seconds.unwrap();
        Duration::from_secs(age + 2) < start.elapsed()
    };
    while !others.iter().all(renewed) {
        assert!(start.elapsed() < RENEWAL, "a session is not renewed");
        for other in &others {
            // What is sent renews a session, on the side that began it.
            ours.reaches(other.host.inner(true), Duration::from_secs(10));
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    others.iter().for_each(|other| other.exchanges(&ours));
}
