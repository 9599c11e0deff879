//! The proxies under one roof: each is started with the same routes, one thread on one core, no access log, connections kept on both
//! sides, the same fields about the client written, and what its documentation says beyond that to make it fast.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_ingress::apply::RoutesApplier;
use weft_netstack::reconcile::{Applier as _, Trust};

use super::super::rig::{Peer, cpu_seconds, until_within};
use super::backend::{self, nginx};
use super::table::{self, BACKEND, PROXY, SIX, Shape};
use super::{PROXY_CORE, load};

pub(crate) const TRAEFIK: Peer = Peer { script: "build-traefik.sh", args: &[] };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Weft,
    Nginx,
    Haproxy,
    Traefik,
}

pub(super) const PEERS: [Kind; 3] = [Kind::Nginx, Kind::Haproxy, Kind::Traefik];

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Weft => "weft",
            Self::Nginx => "nginx",
            Self::Haproxy => "HAProxy",
            Self::Traefik => "Traefik",
        }
    }

    /// For HTTP and HTTPS.
    fn ports(self) -> [u16; 2] {
        match self {
            Self::Weft => [8080, 8443],
            Self::Nginx => [8081, 8444],
            Self::Haproxy => [8082, 8445],
            Self::Traefik => [8083, 8446],
        }
    }
}

/// Where programs and files are.
pub(super) struct Ground {
    pub(super) weft: PathBuf,
    pub(super) traefik: PathBuf,
    pub(super) folder: PathBuf,
}

impl Ground {
    fn certificate(&self) -> [PathBuf; 2] {
        [self.folder.join("cert.pem"), self.folder.join("key.pem")]
    }

    /// A key of P-256 and its certificate, in one file too.
    pub(super) fn make_certificate(&self) -> anyhow::Result<()> {
        let [certificate, key] = self.certificate();
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
        command.args(["-days", "2", "-subj", "/CN=bench", "-addext", "subjectAltName=DNS:*.bench"]);
        let output = command.arg("-keyout").arg(&key).arg("-out").arg(&certificate).output()?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        let both = std::fs::read_to_string(&certificate)? + &std::fs::read_to_string(&key)?;
        Ok(std::fs::write(self.folder.join("both.pem"), both)?)
    }
}

/// A proxy that runs.
pub(super) struct Proxy {
    pub(super) kind: Kind,
    child: Child,
    /// From its start until the last of the routes was answered.
    pub(super) ready_after: Duration,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        match self.kind {
            Kind::Nginx => terminate(&mut self.child),
            _ => {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// nginx takes its workers along when it is asked to end.
pub(super) fn terminate(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    let _ = child.wait();
}

impl Proxy {
    pub(super) fn start(ground: &Ground, kind: Kind, shape: Shape) -> anyhow::Result<Self> {
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", PROXY_CORE]);
        match kind {
            Kind::Weft => weft(ground, shape, &mut command)?,
            Kind::Nginx => command.arg(nginx()).arg("-c").arg(nginx_config(ground, shape)?),
            Kind::Haproxy => command.args(["haproxy", "-db", "-f"]).arg(haproxy_config(ground, shape)?),
            Kind::Traefik => traefik(ground, shape, &mut command)?,
        };
        let log = ground.folder.join(format!("{}.log", kind.name()));
        let started_at = Instant::now();
        let child = command
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .context(kind.name())?;
        let mut proxy = Self { kind, child, ready_after: Duration::ZERO };
        let (host, path) = shape.last();
        let all = [(host.as_str(), path.as_str()), (SIX, "/p0")];
        until_within(Duration::from_secs(60), "the last route", || {
            all.iter().all(|(host, path)| proxy.answers(host, path))
        })
        .with_context(|| format!("{}: {}", kind.name(), std::fs::read_to_string(&log).unwrap_or_default()))?;
        proxy.ready_after = started_at.elapsed();
        Ok(proxy)
    }

    /// Whether a first request gets 200.
    fn answers(&self, host: &str, path: &str) -> bool {
        TcpStream::connect(self.address(0, false)).is_ok_and(|stream| load::ask(&stream, host, path).is_ok())
    }

    /// Of a family, IPv4 is 0, and with TLS or not.
    pub(super) fn address(&self, family: usize, tls: bool) -> SocketAddr {
        let ip = PROXY[family].parse().expect("the constants are addresses");
        SocketAddr::new(ip, self.kind.ports()[usize::from(tls)])
    }

    /// The process and those that it started.
    fn processes(&self) -> Vec<u32> {
        let own = self.child.id();
        let children =
            std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).chain([own]).collect()
    }

    pub(super) fn cpu_seconds(&self) -> f64 {
        self.processes().into_iter().map(cpu_seconds).sum()
    }

    /// Memory of all of it in kB, what is shared counted by halves and thirds (proc_pid_smaps(5), Pss).
    pub(super) fn memory_kb(&self) -> anyhow::Result<f64> {
        self.processes().into_iter().map(pss_kb).sum()
    }
}

pub(super) fn pss_kb(pid: u32) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn weft<'a>(ground: &Ground, shape: Shape, command: &'a mut Command) -> anyhow::Result<&'a mut Command> {
    let run = ground.folder.join("run");
    let [certificate, key] = ground.certificate();
    let table = table::routes(shape, &certificate, &key)?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    // Nobody is there to be told yet.
    runtime.block_on(RoutesApplier::new(&run).apply(&table, Trust::Nothing));
    let [http, https] = Kind::Weft.ports().map(|port| port.to_string());
    command.arg(&ground.weft).args(["ingress", "serve", "--threads", "1", "--http-port", &http]);
    Ok(command.args(["--https-port", &https, "--run-dir"]).arg(run))
}

fn upstream(host: &str) -> &'static str {
    if host == SIX { "six" } else { "four" }
}

/// `worker_connections` for ten thousand clients; memory for it is taken at the start.
fn nginx_config(ground: &Ground, shape: Shape) -> anyhow::Result<PathBuf> {
    let ([http, https], [four, six], port) = (Kind::Nginx.ports(), BACKEND, backend::PORT);
    let [v4, v6] = PROXY;
    let [certificate, key] = ground.certificate();
    let mut text = format!(
        "worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log crit;
events {{ worker_connections 10000; multi_accept on; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; keepalive_timeout 600s;
  server_names_hash_max_size 4096; server_names_hash_bucket_size 128;
  ssl_certificate {certificate}; ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3;
  proxy_http_version 1.1; proxy_max_temp_file_size 0; proxy_buffer_size 16k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k;
  proxy_set_header Connection \"\"; proxy_set_header Host $host; proxy_set_header X-Real-IP $remote_addr;
  proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Host $host;
  proxy_set_header X-Forwarded-Proto $scheme;
  upstream four {{ server {four}:{port}; keepalive 320; keepalive_requests 1000000000; keepalive_timeout 600s; }}
  upstream six {{ server [{six}]:{port}; keepalive 320; keepalive_requests 1000000000; keepalive_timeout 600s; }}
",
        folder = ground.folder.display(),
        certificate = certificate.display(),
        key = key.display(),
    );
    let server = |text: &mut String, name: &str, options: &str| {
        write!(
            text,
            "  server {{\n    listen {v4}:{http}{options}; listen [{v6}]:{http}{options};
    listen {v4}:{https} ssl http2{options}; listen [{v6}]:{https} ssl http2{options};\n    server_name {name};\n",
        )
    };
    // Who asks for no host of ours; options of an address stand once.
    server(&mut text, "_", " default_server backlog=4096")?;
    text.push_str("    return 404;\n  }\n");
    for (host, paths) in shape.hosts() {
        server(&mut text, &host, "")?;
        let to = upstream(&host);
        for path in &paths {
            writeln!(text, "    location = {path} {{ proxy_pass http://{to}; }}")?;
            writeln!(text, "    location {path}/ {{ proxy_pass http://{to}; }}")?;
        }
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    written(ground, "nginx.conf", &text)
}

/// Routes by a map, as its documentation says of many; answers beyond a buffer by splice(2).
fn haproxy_config(ground: &Ground, shape: Shape) -> anyhow::Result<PathBuf> {
    let ([http, https], [four, six], port) = (Kind::Haproxy.ports(), BACKEND, backend::PORT);
    let [v4, v6] = PROXY;
    let mut map = String::new();
    for (host, paths) in shape.hosts() {
        for path in &paths {
            writeln!(map, "{host}{path} {}", upstream(&host))?;
        }
    }
    let map = written(ground, "haproxy.map", &map)?;
    let text = format!(
        "global\n  nbthread 1\n  maxconn 6000\n  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults\n  mode http\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n  timeout http-keep-alive 600s
  http-reuse always\n  option splice-auto\n  option forwardfor
frontend f\n  bind {v4}:{http}\n  bind [{v6}]:{http}
  bind {v4}:{https} ssl crt {both} alpn h2,http/1.1\n  bind [{v6}]:{https} ssl crt {both} alpn h2,http/1.1
  http-request set-header X-Real-IP %[src]\n  http-request set-header X-Forwarded-Host %[req.hdr(host)]
  http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}\n  http-request set-header X-Forwarded-Proto http if !{{ ssl_fc }}
  use_backend %[base,map_beg({map})]
backend four\n  server a {four}:{port}\nbackend six\n  server a [{six}]:{port}\n",
        both = ground.folder.join("both.pem").display(),
        map = map.display(),
    );
    written(ground, "haproxy.conf", &text)
}

/// One core, as it is told to have.
fn traefik<'a>(ground: &Ground, shape: Shape, command: &'a mut Command) -> anyhow::Result<&'a mut Command> {
    let ([http, https], [four, six], port) = (Kind::Traefik.ports(), BACKEND, backend::PORT);
    let [certificate, key] = ground.certificate();
    let mut text = format!(
        "tls:\n  stores: {{default: {{defaultCertificate: {{certFile: {}, keyFile: {}}}}}}}
http:\n  services:\n    four: {{loadBalancer: {{servers: [{{url: \"http://{four}:{port}\"}}]}}}}
    six: {{loadBalancer: {{servers: [{{url: \"http://[{six}]:{port}\"}}]}}}}\n  routers:\n",
        certificate.display(),
        key.display(),
    );
    for (at, (host, paths)) in shape.hosts().enumerate() {
        for (n, path) in paths.iter().enumerate() {
            let rule = format!("Host(`{host}`) && PathPrefix(`{path}`)");
            writeln!(text, "    r{at}-{n}: {{rule: \"{rule}\", service: {}}}", upstream(&host))?;
        }
    }
    let routes = written(ground, "traefik-routes.yaml", &text)?;
    let text = format!(
        "global: {{checkNewVersion: false, sendAnonymousUsage: false}}\nlog: {{level: ERROR}}
entryPoints:\n  web: {{address: \":{http}\"}}\n  secure: {{address: \":{https}\", http: {{tls: {{}}}}}}
serversTransport: {{maxIdleConnsPerHost: 320}}\nproviders: {{file: {{filename: {}, watch: false}}}}\n",
        routes.display(),
    );
    let config = written(ground, "traefik.yaml", &text)?;
    Ok(command.arg(&ground.traefik).arg("--configFile").arg(config).env("GOMAXPROCS", "1"))
}

fn written(ground: &Ground, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = ground.folder.join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}
