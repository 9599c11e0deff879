//! What must hold before the agent touches anything; each failure is one line with the remedy.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use weft_netstack::kernel::nft::NftTable;

pub(crate) fn require_root() -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the agent programs the kernel and needs root; run it as root or with sudo"
    );
    Ok(())
}

/// Deleting a table that was never there asks the kernel for nf_tables and for the right to use it, and changes nothing.
pub(crate) fn require_nftables() -> anyhow::Result<()> {
    NftTable::delete("weft-probe").map(|_| ()).context(
        "the kernel does not let this process use nf_tables; it needs CAP_NET_ADMIN and a kernel with CONFIG_NF_TABLES_INET \
         (modprobe nf_tables)",
    )
}

/// Held as long as the process lives; a second agent is refused by name of the first one's pid.
pub(crate) fn lock(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    hold(&run_dir.join("agent.lock"), |pid| {
        format!("an agent runs on this node already (pid {pid}); stop it first, or give another --run-dir")
    })
}

/// Locks the file at `path` for this process and writes its pid into it; `refusal` says what the holder's pid means.
pub(crate) fn hold(path: &Path, refusal: impl FnOnce(&str) -> String) -> anyhow::Result<Flock<File>> {
    let run_dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(run_dir)
        .with_context(|| format!("{} cannot be made; give a writable --run-dir", run_dir.display()))?;
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("{} cannot be written; give a writable --run-dir", path.display()))?;
    let mut holder = String::new();
    let _ = file.read_to_string(&mut holder);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            std::io::Seek::rewind(&mut *lock)?;
            write!(lock, "{}", std::process::id())?;
            Ok(lock)
        }
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(refusal(holder.trim())),
        Err((_, errno)) => Err(errno).with_context(|| format!("lock {}", path.display())),
    }
}
