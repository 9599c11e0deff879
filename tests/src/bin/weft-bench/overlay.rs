//! TCP through the userspace tunnel beside wireguard-go: two namespaces, one veth pair (MTU 1500), tunnel MTU 1420.
//!
//! Both run at their documented best setting: offloads on, which both turn on by themselves. Rounds are interleaved.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use serde_json::json;
use x25519_dalek::{PublicKey, StaticSecret};

use super::rig::{cpu_seconds, ip, private_names, until};
use super::row::{Better, Row, median};

const ROUNDS: usize = 3;
const SECONDS: &str = "4";

pub(crate) fn measure(weft: &Path) -> anyhow::Result<Vec<Row>> {
    let peer = peer_binary()?;
    underlay()?;
    let ends = [End::new(0), End::new(1)];
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(round(&ends, |end, other| start_weft(weft, end, other))?);
        theirs.push(round(&ends, |end, other| start_wireguard_go(&peer, end, other))?);
    }
    let of = |rounds: &[Round], pick: fn(&Round) -> f64| median(rounds.iter().map(pick).collect());
    let beside = |name, unit, pick: fn(&Round) -> f64, better, target| {
        Row::beside(name, unit, of(&ours, pick), ("wireguard-go", of(&theirs, pick)), better, target)
    };
    Ok(vec![
        beside("TCP, one stream", "Gbit/s", |r| r.gigabits, Better::Higher, 1.5),
        beside("CPU of both tunnels per GiB", "s", |r| r.cpu_seconds_per_gib, Better::Lower, 0.5),
        beside("resident memory per end", "MiB", |r| r.resident_mib, Better::Lower, 0.1),
    ])
}

struct End {
    n: usize,
    netns: String,
    secret: StaticSecret,
    folder: tempfile::TempDir,
}

struct Round {
    gigabits: f64,
    cpu_seconds_per_gib: f64,
    resident_mib: f64,
}

impl End {
    fn new(n: usize) -> Self {
        let mut seed = [n as u8 + 1; 32];
        seed[31] = 0x5a;
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        Self { n, netns: format!("end{n}"), secret: StaticSecret::from(seed), folder }
    }

    fn underlay(&self) -> String {
        format!("192.0.2.{}", self.n + 1)
    }

    fn inner(&self) -> String {
        format!("10.9.9.{}", self.n + 1)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(program);
        command
    }
}

/// `go install` by the project's script, kept outside the work tree.
fn peer_binary() -> anyhow::Result<PathBuf> {
    let output = Command::new("tests/tools/build-wireguard-go.sh").stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "wireguard-go could not be built");
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

fn underlay() -> anyhow::Result<()> {
    private_names()?;
    ip("netns add end0")?;
    ip("netns add end1")?;
    ip("-n end0 link add lan type veth peer name lan netns end1")?;
    for n in 0..2 {
        ip(&format!("-n end{n} addr add 192.0.2.{}/24 dev lan", n + 1))?;
        ip(&format!("-n end{n} link set lan up"))?;
        ip(&format!("-n end{n} link set lo up"))?;
    }
    Ok(())
}

fn round(ends: &[End; 2], start: impl Fn(&End, &End) -> anyhow::Result<Child>) -> anyhow::Result<Round> {
    let mut tunnels = [start(&ends[0], &ends[1])?, start(&ends[1], &ends[0])?];
    let measured = traffic(ends, &tunnels);
    for tunnel in &mut tunnels {
        tunnel.kill()?;
        tunnel.wait()?;
    }
    for end in ends {
        // A persistent TUN outlives its process.
        let _ = ip(&format!("-n {} link del weft0", end.netns));
    }
    measured
}

fn traffic(ends: &[End; 2], tunnels: &[Child; 2]) -> anyhow::Result<Round> {
    for end in ends {
        ip(&format!("-n {} addr replace {}/24 dev weft0", end.netns, end.inner()))?;
        ip(&format!("-n {} link set weft0 mtu 1420 up", end.netns))?;
    }
    let mut server = ends[1].command("iperf3").args(["-s", "-1"]).stdout(Stdio::null()).spawn()?;
    until("the tunnel", || {
        let ping = ends[0].command("ping").args(["-c1", "-W1", &ends[1].inner()]).output();
        ping.is_ok_and(|output| output.status.success())
    })?;
    let before: f64 = tunnels.iter().map(|tunnel| cpu_seconds(tunnel.id())).sum();
    let output = ends[0].command("iperf3").args(["-c", &ends[1].inner(), "-t", SECONDS, "-J"]).output()?;
    let after: f64 = tunnels.iter().map(|tunnel| cpu_seconds(tunnel.id())).sum();
    server.wait()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
    let sum = &report["end"]["sum_received"];
    let bits = sum["bits_per_second"].as_f64().context("iperf3 measured nothing")?;
    let bytes = sum["bytes"].as_f64().context("iperf3 counted nothing")?;
    Ok(Round {
        gigabits: bits / 1e9,
        cpu_seconds_per_gib: (after - before) / (bytes / 1024f64.powi(3)),
        resident_mib: resident_mib(&tunnels[0]),
    })
}

fn resident_mib(child: &Child) -> f64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", child.id())).unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(f64::NAN) * 4096.0
        / 1048576.0
}

fn start_weft(weft: &Path, end: &End, other: &End) -> anyhow::Result<Child> {
    let folder = end.folder.path();
    let key = base64::engine::general_purpose::STANDARD.encode(end.secret.to_bytes());
    std::fs::write(folder.join("wireguard.key"), key + "\n")?;
    let public = base64::engine::general_purpose::STANDARD.encode(PublicKey::from(&other.secret).to_bytes());
    let peer = json!({
        "node": other.netns,
        "endpoint": format!("{}:51820", other.underlay()),
        "allowed_ips": [format!("{}/32", other.inner())],
        "keepalive_seconds": null,
    });
    let state = json!({"wireguard": {"listen_port": 51820, "peers": {public: peer}}, "mtu_bytes": 1420});
    std::fs::write(folder.join("tunnel.json"), state.to_string())?;
    let child = end
        .command(weft)
        .args(["tunnel", "--log-level", "warn", "--run-dir"])
        .arg(folder)
        .arg("--state-dir")
        .arg(folder)
        .spawn()?;
    until("weft0", || ip(&format!("-n {} link show weft0", end.netns)).is_ok())?;
    Ok(child)
}

fn start_wireguard_go(program: &Path, end: &End, other: &End) -> anyhow::Result<Child> {
    // The control sockets of both ends have the same name: a folder each.
    let control = end.folder.path().join("control");
    std::fs::create_dir_all(&control)?;
    let socket = control.join("weft0.sock");
    // Of the round before.
    let _ = std::fs::remove_file(&socket);
    let script = format!(
        "mkdir -p /var/run/wireguard && mount --bind {} /var/run/wireguard && exec {} -f weft0",
        control.display(),
        program.display()
    );
    let child = end
        .command("unshare")
        .args(["--mount", "sh", "-c", &script])
        .env("LOG_LEVEL", "error")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    until("wireguard-go's control socket", || socket.exists())?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let request = format!(
        "set=1\nprivate_key={}\nlisten_port=51820\npublic_key={}\nendpoint={}:51820\nallowed_ip={}/32\n\n",
        hex(&end.secret.to_bytes()),
        hex(PublicKey::from(&other.secret).as_bytes()),
        other.underlay(),
        other.inner()
    );
    let mut stream = UnixStream::connect(&socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = [0; 64];
    let read = stream.read(&mut answer)?;
    ensure!(answer[..read].starts_with(b"errno=0"), "wireguard-go refused its configuration");
    Ok(child)
}
