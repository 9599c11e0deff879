//! For tests with real namespaces: named ones that go when their value goes, even on panic.

use std::future::Future;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::netns::Netns;

/// False, loudly, when this process may not make namespaces.
pub(crate) fn needs_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED: needs root");
    false
}

/// A namespace under `/run/netns`, removed on drop.
pub(crate) struct NamedNetns {
    pub(crate) name: String,
}

impl NamedNetns {
    pub(crate) fn new(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-t{}-{role}{number}", std::process::id());
        run(&["ip", "netns", "add", &name]);
        Self { name }
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs a command inside; true and its output when it succeeded.
    pub(crate) fn exec(&self, command: &[&str]) -> (bool, String) {
        let mut all = vec!["ip", "netns", "exec", &self.name];
        all.extend_from_slice(command);
        try_run(&all)
    }

    /// Like [`Self::exec`], and the command must succeed.
    pub(crate) fn must(&self, command: &[&str]) -> String {
        let (ok, output) = self.exec(command);
        assert!(ok, "{command:?} in {}: {output}", self.name);
        output
    }

    /// Drives `work` on a runtime whose every thread lives inside.
    pub(crate) fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        let netns = Netns::open(self.path()).unwrap();
        netns
            .run(|| {
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
                runtime.unwrap().block_on(work)
            })
            .unwrap()
    }
}

impl Drop for NamedNetns {
    fn drop(&mut self) {
        try_run(&["ip", "netns", "del", &self.name]);
    }
}

pub(crate) fn run(command: &[&str]) -> String {
    let (ok, output) = try_run(command);
    assert!(ok, "{command:?}: {output}");
    output
}

fn try_run(command: &[&str]) -> (bool, String) {
    let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}
