//! Daemons of systemd beside a node, without systemd. WEFT_SYSTEMD names the folder that `tests/tools/unpack-systemd.sh` prints.

use std::path::{Path, PathBuf};
use std::process::Command;

use weft_tests::node::{Node, run, write};

/// What was unpacked.
pub(crate) struct Systemd(PathBuf);

impl Systemd {
    /// `None`, loudly, without it.
    pub(crate) fn find() -> Option<Self> {
        let folder = std::env::var_os("WEFT_SYSTEMD");
        if folder.is_none() {
            eprintln!("SKIPPED: WEFT_SYSTEMD does not name a folder");
        }
        folder.map(|folder| Self(folder.into()))
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.0.join(program));
        let libraries = self.0.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
        let path = format!("{}:{}", libraries.join("systemd").display(), libraries.display());
        command.env("LD_LIBRARY_PATH", path);
        command
    }

    /// A daemon's user, its folders, and no daemon of this machine.
    pub(crate) fn prepare(&self, node: &Node, user: &str) {
        for (file, line) in [
            ("passwd", format!("{user}:x:991:991::/:/usr/sbin/nologin\n")),
            ("group", format!("{user}:x:991:\n")),
        ] {
            let path = format!("/etc/{file}");
            let known = std::fs::read_to_string(&path).unwrap();
            let known: String = known
                .lines()
                .filter(|known| !known.starts_with(user))
                .map(|known| format!("{known}\n"))
                .collect();
            write(&node.path(file), known + &line);
            run(Command::new("mount").arg("--bind").arg(node.path(file)).arg(path));
        }
        // Its configuration is in /etc/systemd, which machines without systemd lack.
        for folder in ["/run/systemd", "/run/dbus", "/etc/systemd"] {
            std::fs::create_dir_all(folder).unwrap();
            run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(Path::new(folder)));
        }
    }
}
