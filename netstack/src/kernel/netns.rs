//! Network namespaces: opened by path, entered by threads of their own or for a short visit, and spoken to over rtnetlink.
//!
//! In: a path such as `/run/netns/blue`. Out: a descriptor that keeps the namespace alive, results of a closure that
//! ran inside it, or an rtnetlink connection whose socket lives inside it and which any tokio task may use.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use tokio::task::JoinHandle;

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The file is not there, or is there and no longer a namespace: whoever made it has removed it.
    #[error("no network namespace at {path}")]
    Gone { path: PathBuf },
    #[error("open network namespace {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("enter network namespace {path}")]
    Enter { path: PathBuf, source: io::Error },
    #[error("make a network namespace")]
    Create(#[source] io::Error),
    #[error("start a thread for network namespace {path}")]
    Thread { path: PathBuf, source: io::Error },
    #[error("the thread inside network namespace {path} panicked")]
    Panicked { path: PathBuf },
    #[error("open an rtnetlink socket in network namespace {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("open the sysctls of network namespace {path}")]
    Sysctls { path: PathBuf, source: io::Error },
}

/// A network namespace, alive as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace at `path`; a path that is not (or no longer) a namespace is [`NetnsError::Gone`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NetnsError::Gone { path: path.clone() },
            _ => NetnsError::Open { path: path.clone(), source },
        })?;
        match fstatfs(&file) {
            Ok(stat) if stat.filesystem_type() == NSFS_MAGIC => Ok(Self { file, path }),
            Ok(_) => Err(NetnsError::Gone { path }),
            Err(errno) => Err(NetnsError::Open { path, source: errno.into() }),
        }
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// A new, unnamed namespace that ends with this value and the sockets made in it.
    pub fn throwaway() -> Result<Self, NetnsError> {
        let path = PathBuf::from("(unnamed)");
        let made = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            })
            .map_err(|source| NetnsError::Thread { path: path.clone(), source })?
            .join()
            .map_err(|_| NetnsError::Panicked { path: path.clone() })?;
        made.map(|file| Self { file, path }).map_err(NetnsError::Create)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For `IFLA_NET_NS_FD`.
    pub fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it. Threads that `work` starts are in the
    /// namespace too.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let path = || self.path.clone();
        std::thread::scope(|scope| {
            let inside = || {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| NetnsError::Enter { path: path(), source: errno.into() })?;
                Ok(work())
            };
            std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, inside)
                .map_err(|source| NetnsError::Thread { path: path(), source })?
                .join()
                .map_err(|_| NetnsError::Panicked { path: path() })?
        })
    }

    /// Runs `work` on the calling thread, which is in the namespace meanwhile: cheaper than [`Netns::run`], for what is short, starts
    /// no thread and waits for nobody. A thread that could not come back would act on the wrong network; the process ends then.
    pub fn visit<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let enter = |errno: nix::Error| NetnsError::Enter { path: self.path.clone(), source: errno.into() };
        let _home = Home(Self::current()?);
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(enter)?;
        Ok(work())
    }

    /// An rtnetlink connection inside the namespace. Must be called within a tokio runtime, which then drives it.
    pub fn connect(&self) -> Result<Rtnetlink, NetnsError> {
        let runtime = tokio::runtime::Handle::current();
        let connection = self.run(|| {
            let _inside = runtime.enter();
            Rtnetlink::connect()
        })?;
        connection.map_err(|source| NetnsError::Socket { path: self.path.clone(), source })
    }
}

/// Where the thread goes when this value ends.
struct Home(Netns);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "leave a pod's network namespace");
            std::process::abort();
        }
    }
}

/// An rtnetlink connection and the task that drives it; the task ends with this value.
#[derive(Debug)]
pub struct Rtnetlink {
    pub handle: rtnetlink::Handle,
    task: JoinHandle<()>,
}

impl Rtnetlink {
    /// A connection in the namespace of the calling thread. Must be called within a tokio runtime.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }
}

impl Drop for Rtnetlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::link::Links;
    use crate::kernel::testing::needs_root;

    #[test]
    fn a_path_that_is_no_namespace_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Netns::open(file.path()), Err(NetnsError::Gone { .. })));
        assert!(matches!(Netns::open("/nowhere/at/all"), Err(NetnsError::Gone { .. })));
    }

    #[test]
    fn a_visitor_comes_home_even_when_it_panics() {
        if !needs_root() {
            return;
        }
        let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (home, netns) = (here(), Netns::throwaway().unwrap());
        let inside = netns.visit(here).unwrap();
        assert_ne!(inside, home);
        assert_eq!(inside, netns.run(here).unwrap());
        assert_eq!(here(), home);
        let visit = std::panic::AssertUnwindSafe(|| netns.visit(|| panic!("in the middle")));
        assert!(std::panic::catch_unwind(visit).is_err());
        assert_eq!(here(), home);
    }

    #[tokio::test]
    async fn a_connection_into_another_namespace_sees_that_namespace_only() {
        if !needs_root() {
            return;
        }
        let netns = Netns::throwaway().unwrap();
        let connection = netns.connect().unwrap();
        let names: Vec<_> = Links::new(connection.handle.clone())
            .list()
            .await
            .unwrap()
            .into_iter()
            .map(|link| link.name)
            .collect();
        assert!(names.contains(&"lo".to_owned()));
        let inside = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
        assert_eq!(inside.lines().count() - 2, names.len());
        assert!(!inside.contains("eth0"));
    }
}
