//! Ends of tunnels, and how each program is started and told its peers.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::ensure;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::rig::{Peer, ip, until};

pub(crate) const WIREGUARD_GO: Peer = Peer { script: "build-wireguard-go.sh", args: &[] };
pub(crate) const BORINGTUN: Peer = Peer { script: "build-boringtun.sh", args: &[] };

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Weft,
    WireguardGo,
    Boringtun,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Weft, Self::WireguardGo, Self::Boringtun];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Weft => "weft",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun",
        }
    }
}

/// Number `n` of an underlay 192.0.2.0/24, in its namespace `endN`.
pub(super) struct End {
    pub(super) n: usize,
    pub(super) netns: String,
    secret: StaticSecret,
    folder: tempfile::TempDir,
}

impl End {
    pub(super) fn new(n: usize) -> Self {
        let mut seed = [n as u8 + 1; 32];
        seed[31] = 0x5a;
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        Self { n, netns: format!("end{n}"), secret: StaticSecret::from(seed), folder }
    }

    fn underlay(&self) -> String {
        format!("192.0.2.{}", self.n + 1)
    }

    pub(super) fn inner(&self) -> String {
        format!("10.9.9.{}", self.n + 1)
    }

    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(program);
        command
    }

    /// Addresses and MTU, once the tunnel has made its device.
    pub(super) fn bring_up(&self) -> anyhow::Result<()> {
        ip(&format!("-n {} addr replace {}/24 dev weft0", self.netns, self.inner()))?;
        ip(&format!("-n {} link set weft0 mtu 1420 up", self.netns))
    }

    /// The tunnel's control socket.
    pub(super) fn control(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Weft => self.folder.path().join("tunnel.sock"),
            _ => self.folder.path().join("control/weft0.sock"),
        }
    }

    /// What [`super::many`] adds to the peers: by key.
    pub(super) fn write_state(
        &self,
        others: &[&End],
        more: &serde_json::Map<String, Value>,
    ) -> anyhow::Result<()> {
        let peer = |other: &&End| {
            let peer = json!({
                "node": other.netns,
                "endpoint": format!("{}:51820", other.underlay()),
                "allowed_ips": [format!("{}/32", other.inner())],
                "keepalive_seconds": null,
            });
            (STANDARD.encode(PublicKey::from(&other.secret).to_bytes()), peer)
        };
        let mut peers: serde_json::Map<String, Value> = others.iter().map(peer).collect();
        peers.extend(more.clone());
        let state = json!({"wireguard": {"listen_port": 51820, "peers": peers}, "mtu_bytes": 1420});
        Ok(std::fs::write(self.folder.path().join("tunnel.json"), state.to_string())?)
    }
}

/// Ends the tunnel; a persistent TUN outlives its process.
pub(super) fn end(tunnel: &mut Child, end: &End) -> anyhow::Result<()> {
    tunnel.kill()?;
    tunnel.wait()?;
    let _ = ip(&format!("-n {} link del weft0", end.netns));
    Ok(())
}

/// What is measured.
pub(super) struct Programs {
    weft: PathBuf,
    wireguard_go: PathBuf,
    boringtun: PathBuf,
}

impl Programs {
    pub(super) fn new(weft: &Path) -> anyhow::Result<Self> {
        Ok(Self { weft: weft.to_owned(), wireguard_go: WIREGUARD_GO.path()?, boringtun: BORINGTUN.path()? })
    }

    pub(super) fn start(&self, kind: Kind, end: &End, others: &[&End]) -> anyhow::Result<Child> {
        match kind {
            Kind::Weft => self.start_weft(end, others),
            Kind::WireguardGo => start_common(kind, &self.wireguard_go, &["-f"], end, others),
            Kind::Boringtun => {
                let flags = ["--foreground", "--disable-drop-privileges"];
                start_common(kind, &self.boringtun, &flags, end, others)
            }
        }
    }

    fn start_weft(&self, end: &End, others: &[&End]) -> anyhow::Result<Child> {
        let folder = end.folder.path();
        std::fs::write(folder.join("wireguard.key"), STANDARD.encode(end.secret.to_bytes()) + "\n")?;
        end.write_state(others, &serde_json::Map::new())?;
        let mut command = end.command(&self.weft);
        command.args(["tunnel", "--log-level", "warn", "--run-dir"]).arg(folder);
        let child = command.arg("--state-dir").arg(folder).spawn()?;
        until("weft0", || ip(&format!("-n {} link show weft0", end.netns)).is_ok())?;
        Ok(child)
    }
}

/// With the control protocol that others share (wireguard.com/xplatform).
fn start_common(
    kind: Kind,
    program: &Path,
    flags: &[&str],
    end: &End,
    others: &[&End],
) -> anyhow::Result<Child> {
    // The control sockets of both ends have the same name: a folder each.
    let socket = end.control(kind);
    let control = socket.parent().expect("a socket in a folder");
    std::fs::create_dir_all(control)?;
    // Of the round before.
    let _ = std::fs::remove_file(&socket);
    let script = format!(
        "mkdir -p /var/run/wireguard && mount --bind {} /var/run/wireguard && exec {} {} weft0",
        control.display(),
        program.display(),
        flags.join(" "),
    );
    let mut command = end.command("unshare");
    command.args(["--mount", "sh", "-c", &script]).env("LOG_LEVEL", "error");
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    until(kind.name(), || UnixStream::connect(&socket).is_ok())?;
    let mut request = format!("private_key={}\nlisten_port=51820\n", hex(&end.secret.to_bytes()));
    for other in others {
        let (key, inner) = (hex(PublicKey::from(&other.secret).as_bytes()), other.inner());
        let endpoint = other.underlay();
        request += &format!("public_key={key}\nendpoint={endpoint}:51820\nallowed_ip={inner}/32\n");
    }
    set(&socket, &request)?;
    Ok(child)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A `set` request; `what` is lines of `key=value`.
pub(super) fn set(socket: &Path, what: &str) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("set=1\n{what}\n").as_bytes())?;
    let mut answer = [0; 64];
    let read = stream.read(&mut answer)?;
    ensure!(answer[..read].starts_with(b"errno=0"), "a tunnel refused its configuration");
    Ok(())
}
