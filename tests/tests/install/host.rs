//! A host to install on: private folders, a service manager's stand-in, the API server of [`Node`].

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use weft_tests::node::{NODE, Node, binary, run, until, write};

/// Folders in which an installation may change something. `/run` is looked at apart: others work there too.
const FOLDERS: [&str; 5] = ["/etc", "/opt", "/usr/local/bin", "/var/lib", "/var/log"];
const SYSTEMCTL: &str = include_str!("systemctl");
const CALLS: &str = "/run/stand-in/calls";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) struct Host {
    pub(crate) node: Node,
}

/// By path: what it is, its permission bits, its content.
pub(crate) type Tree = BTreeMap<PathBuf, String>;

impl Host {
    /// Must be called in namespaces of the test's own.
    pub(crate) fn new() -> Self {
        let etc = tempfile::tempdir().unwrap().keep();
        run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&etc));
        run(Command::new("cp").args(["-a", "/etc/."]).arg(&etc));
        run(Command::new("mount").arg("--move").arg(&etc).arg("/etc"));
        std::fs::remove_dir(&etc).unwrap();
        for folder in ["/run", "/opt", "/usr/local/bin", "/usr/local/sbin", "/var/lib", "/var/log"] {
            run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "none", folder]));
        }
        let node = Node::new();
        Self { node }
    }

    /// A host that runs systemd, with an API server that knows the node.
    pub(crate) fn with_systemd() -> Self {
        let mut host = Self::new();
        std::fs::create_dir_all("/run/systemd/system").unwrap();
        std::fs::create_dir_all("/etc/systemd/system/multi-user.target.wants").unwrap();
        stand_in("systemctl", SYSTEMCTL);
        host.node.start_server();
        host.node.make_node_object();
        host
    }

    /// The agent's flags, without those that an installation does not take.
    pub(crate) fn flags(&self) -> Vec<String> {
        let agent = self.node.agent_command();
        let words: Vec<String> =
            agent.get_args().skip(1).map(|word| word.to_str().unwrap().to_owned()).collect();
        let not_taken = ["--run-dir", "--state-dir", "--cni-conf-dir", "--cni-bin-dir"];
        words.chunks(2).filter(|pair| !not_taken.contains(&pair[0].as_str())).flatten().cloned().collect()
    }

    /// Flags that every node of the cluster has.
    pub(crate) fn cluster_flags(&self) -> Vec<String> {
        let of_node = ["--node-name", "--token-file", "--ca-file"];
        let flags = self.flags();
        flags.chunks(2).filter(|pair| !of_node.contains(&pair[0].as_str())).flatten().cloned().collect()
    }

    /// `weft status -o json` of the installed agent.
    pub(crate) fn status(&self) -> serde_json::Value {
        let output = weft(&["status", "-o", "json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    pub(crate) fn is_ready(&self) -> bool {
        let status = self.status();
        status["ready"] == true && status["node"] == NODE
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for unit in ["weft-agent.service", "weft-tunnel.service"] {
                let log = std::fs::read_to_string(format!("/run/stand-in/{unit}.log")).unwrap_or_default();
                eprintln!("---- {unit}\n{log}");
            }
        }
    }
}

/// Puts a program on the path of the service manager's programs.
pub(crate) fn stand_in(name: &str, text: &str) {
    let path = Path::new("/usr/local/sbin").join(name);
    write(&path, text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The service manager's calls since the last look.
pub(crate) fn calls() -> Vec<String> {
    let calls = std::fs::read_to_string(CALLS).unwrap_or_default();
    let _ = std::fs::remove_file(CALLS);
    calls.lines().map(str::to_owned).collect()
}

pub(crate) fn weft(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env("PATH", PATH);
    command
}

pub(crate) fn install(flags: &[String]) -> Command {
    let mut command = weft(&["install"]);
    command.args(flags);
    command
}

/// Lines of a command that must succeed, blanks within a line made one.
pub(crate) fn lines(command: &mut Command) -> Vec<String> {
    run(command).lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Pid of the running agent, out of its lock.
pub(crate) fn agent_pid() -> String {
    std::fs::read_to_string("/run/weft/agent.lock").unwrap()
}

pub(crate) fn await_end(pid: &str) {
    let place = PathBuf::from(format!("/proc/{pid}/cmdline"));
    until("the end of a process", || std::fs::read(&place).map_or(true, |text| text.is_empty()));
}

/// Everything in the folders that an installation may change.
pub(crate) fn tree() -> Tree {
    let mut found = Tree::new();
    for folder in FOLDERS {
        walk(Path::new(folder), &mut found);
    }
    for ours in ["/run/weft", "/run/weft-agent.pid", "/run/weft-tunnel.pid"] {
        if Path::new(ours).exists() {
            found.insert(ours.into(), "there".to_owned());
        }
    }
    found
}

fn walk(path: &Path, found: &mut Tree) {
    let metadata = path.symlink_metadata().unwrap();
    let mode = metadata.permissions().mode();
    let content = if metadata.is_symlink() {
        std::fs::read_link(path).unwrap().display().to_string()
    } else if metadata.is_file() {
        let content = std::fs::read(path).unwrap();
        let mut hasher = DefaultHasher::new();
        hasher.write(&content);
        format!("{} bytes {:x}", content.len(), hasher.finish())
    } else {
        String::new()
    };
    found.insert(path.to_owned(), format!("{mode:o} {content}"));
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            walk(&entry.unwrap().path(), found);
        }
    }
}

/// Paths that stand in only one of the two trees, or differently.
pub(crate) fn differences(before: &Tree, after: &Tree) -> Vec<String> {
    let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let different = paths.filter(|path| before.get(*path) != after.get(*path));
    different.map(|path| path.display().to_string()).collect()
}
