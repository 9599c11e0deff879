//! What answers: an nginx that has all of it in memory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::Context as _;

use super::super::rig::until;
use super::OTHER_CORE;

pub(super) const PORT: u16 = 9000;
/// Of the body of every path that does not end in `/big`.
const SMALL_BYTES: usize = 1024;
pub(super) const BIG_BYTES: usize = 1 << 20;

/// Ends with its owner.
pub(super) struct Backend(Child);

impl Backend {
    /// On every address of this namespace.
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let big = folder.join("big");
        std::fs::write(&big, vec![b'x'; BIG_BYTES])?;
        let (pid, log) = (folder.join("backend.pid"), folder.join("backend.log"));
        let config = folder.join("backend.conf");
        let small = "x".repeat(SMALL_BYTES);
        let text = format!(
            "worker_processes 1; daemon off; pid {pid}; error_log {log} crit;
events {{ worker_connections 10000; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000000; keepalive_timeout 600s; open_file_cache max=10;
  server {{
    listen {PORT} backlog=4096; listen [::]:{PORT} backlog=4096;
    location / {{ return 200 \"{small}\"; }}
    location ~ /big$ {{ alias {big}; }}
  }}
}}
",
            pid = pid.display(),
            log = log.display(),
            big = big.display(),
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", OTHER_CORE]).arg(nginx()).arg("-c").arg(&config);
        let backend = Self(command.spawn().context("start the backend")?);
        until("the backend", || std::net::TcpStream::connect(("127.0.0.1", PORT)).is_ok())?;
        Ok(backend)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        super::peers::terminate(&mut self.0);
    }
}

/// Debian's, which is not on everybody's path.
pub(super) fn nginx() -> PathBuf {
    "/usr/sbin/nginx".into()
}
