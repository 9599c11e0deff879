//! `weft install --in-pod`: from the DaemonSet's container onto the host, and the rotating token handed over.
//!
//! ```text
//!  container: /proc/self/exe, the projected volume  --opened-->  descriptors  --setns(/proc/1/ns/mnt)-->  host's files
//!  volume's token, ca.crt  --every few seconds-->  /var/lib/weft/api/{token,ca.crt}  -->  agent
//! ```

use std::fs::File;
use std::io::{Cursor, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::fcntl::{OFlag, open, openat};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::GivenArgs;
use crate::files;

/// Where the DaemonSet mounts its projected volume.
const VOLUME: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const TOKEN: &str = "/var/lib/weft/api/token";
const CA: &str = "/var/lib/weft/api/ca.crt";
/// Name in the volume, file on the host. The CA first: it is of use to no one without the token.
const HANDED_OVER: [(&str, &str); 2] = [("ca.crt", CA), ("token", TOKEN)];
/// The kubelet renews a token hours before it ends.
const LOOK: Duration = Duration::from_secs(3);

/// The projected volume. The kubelet swaps the symlink `..data` in it, so files are opened through it each time.
pub(super) struct Volume(OwnedFd);

/// Opens the volume and makes the host's mounts those of this process, which must have one thread only. Before it nothing
/// was touched; after it every path is the host's.
pub(super) fn enter_host() -> anyhow::Result<Volume> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let volume = open(VOLUME, flags, Mode::empty())
        .with_context(|| format!("open {VOLUME}: the DaemonSet's projected volume has to be there"))?;
    let own = std::fs::metadata("/proc/self/ns/mnt").context("look at the own mount namespace")?;
    let host =
        File::open("/proc/1/ns/mnt").context("open the host's mount namespace: needs privileged: true")?;
    let same = host.metadata()?.ino() == own.ino();
    ensure!(!same, "process 1 has the mounts of this container: the pod needs hostPID: true");
    setns(host, CloneFlags::CLONE_NEWNS)
        .context("enter the host's mount namespace: needs privileged: true")?;
    Ok(Volume(volume))
}

/// The flags with which an agent uses what is handed over; `node` is the node's name from the pod's environment.
pub(super) fn complete(given: &mut GivenArgs, node: Option<String>) -> anyhow::Result<()> {
    let agent = &given.agent;
    let own = [
        ("--kubeconfig", agent.kubeconfig.is_some()),
        ("--token-file", agent.token_file.is_some()),
        ("--ca-file", agent.ca_file.is_some()),
        ("--node-name", agent.node_name.is_some()),
    ];
    if let Some((flag, _)) = own.into_iter().find(|(_, is_given)| *is_given) {
        anyhow::bail!("{flag} cannot be given with --in-pod: the pod's own token and node are used");
    }
    let node = node.filter(|name| !name.is_empty());
    let node = node.context("NODE_NAME is not set: the DaemonSet has to set it from spec.nodeName")?;
    for (flag, value) in [("--node-name", node.as_str()), ("--token-file", TOKEN), ("--ca-file", CA)] {
        given.push(flag, value);
    }
    given.agent.node_name = Some(node);
    given.agent.token_file = Some(TOKEN.into());
    given.agent.ca_file = Some(CA.into());
    Ok(())
}

impl Volume {
    /// Makes the host's files hold what the volume holds now; the paths that had to be written.
    pub(super) fn hand_over(&self) -> anyhow::Result<Vec<&'static str>> {
        let mut written = Vec::new();
        for (name, path) in HANDED_OVER {
            let content = self.read(name).with_context(|| format!("read {name} of the projected volume"))?;
            ensure!(!content.is_empty(), "{name} of the projected volume is empty");
            let changed = files::ensure(Path::new(path), 0o600, &mut Cursor::new(content));
            if changed.with_context(|| format!("write {path}"))? {
                written.push(path);
            }
        }
        Ok(written)
    }

    fn read(&self, name: &str) -> std::io::Result<Vec<u8>> {
        let file = openat(&self.0, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut content = Vec::new();
        File::from(file).read_to_end(&mut content)?;
        Ok(content)
    }

    /// Hands over what the kubelet renews, until SIGTERM or SIGINT. What was installed goes on.
    pub(super) fn stay(&self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (mut terminate, mut interrupt) =
                (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let mut said = String::new();
            loop {
                tokio::select! {
                    _ = terminate.recv() => return Ok(()),
                    _ = interrupt.recv() => return Ok(()),
                    () = tokio::time::sleep(LOOK) => {}
                }
                let outcome = match self.hand_over() {
                    Ok(written) => {
                        written.iter().for_each(|path| super::say("wrote", path));
                        String::new()
                    }
                    Err(error) => format!("{error:#}"),
                };
                if !outcome.is_empty() && outcome != said {
                    eprintln!("weft: {outcome}");
                }
                said = outcome;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_given_what_is_handed_over() {
        let mut given = GivenArgs::parse(["--api-server", "https://192.0.2.1:6443"]).unwrap();
        complete(&mut given, Some("n1".to_owned())).unwrap();
        let again = GivenArgs::parse(given.words.iter().map(String::as_str)).unwrap().agent;
        assert_eq!(again.node_name.as_deref(), Some("n1"));
        assert_eq!(again.token_file.as_deref(), Some(Path::new(TOKEN)));
        assert_eq!(again.ca_file.as_deref(), Some(Path::new(CA)));
        assert!(given.agent.validate().is_ok());
    }

    #[test]
    fn a_credential_of_another_kind_and_a_missing_node_name_are_refused() {
        let refused = |flags: &[&str], node: Option<&str>| {
            let mut given = GivenArgs::parse(flags.iter().copied()).unwrap();
            complete(&mut given, node.map(str::to_owned)).err().unwrap().to_string()
        };
        assert!(refused(&["--kubeconfig", "/k"], Some("n1")).contains("--kubeconfig"));
        assert!(refused(&["--node-name", "n2"], Some("n1")).contains("--node-name"));
        assert!(refused(&[], Some("")).contains("NODE_NAME"));
    }

    #[test]
    fn a_volume_follows_the_kubelets_swap() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (version, text) in [("..1", "first"), ("..2", "second")] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("token"), text).unwrap();
        }
        std::os::unix::fs::symlink("..1", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/token", at("token")).unwrap();
        let volume = Volume(open(folder.path(), OFlag::O_DIRECTORY, Mode::empty()).unwrap());
        assert_eq!(volume.read("token").unwrap(), b"first");
        std::os::unix::fs::symlink("..2", at("..new")).unwrap();
        std::fs::rename(at("..new"), at("..data")).unwrap();
        assert_eq!(volume.read("token").unwrap(), b"second");
    }
}
