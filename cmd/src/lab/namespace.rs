//! Entering and making namespaces. Each happens on a thread of its own, so the calling thread stays where it is.
//! What such a thread starts is born in the thread's namespaces.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, anyhow};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// All that a machine or a pod has of its own, apart from the network.
pub(super) const OWN_VIEW: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWIPC);

const FILES: [(&str, CloneFlags); 5] = [
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Open handles on the namespaces of one process; they stay valid when it ends.
pub(super) struct Namespaces(Vec<(File, CloneFlags)>);

impl Namespaces {
    /// Opens the namespaces of a process as the calling thread's `/proc` numbers it.
    pub(super) fn of(pid: i32) -> anyhow::Result<Self> {
        let open = |(name, flag): &(&str, CloneFlags)| {
            let path = format!("/proc/{pid}/ns/{name}");
            File::open(&path).map(|file| (file, *flag)).with_context(|| format!("open {path}"))
        };
        Ok(Self(FILES.iter().map(open).collect::<anyhow::Result<_>>()?))
    }

    /// Moves the calling thread in; of the pid namespace only its children take notice (setns(2)).
    pub(super) fn enter(&self) -> anyhow::Result<()> {
        // A thread that shares its working directory with others cannot change its mount namespace.
        unshare(CloneFlags::CLONE_FS).context("unshare the working directory")?;
        for (file, flag) in &self.0 {
            setns(file, *flag).with_context(|| format!("enter namespace {flag:?}"))?;
        }
        Ok(())
    }
}

/// Runs `work` on a thread of its own and waits for it.
pub(super) fn on_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|_| Err(anyhow!("a thread of the lab panicked")))
    })
}

/// Runs `work` with the namespaces of process `pid`. It must not start threads: the kernel refuses a thread whose
/// children would belong to another pid namespace than it does itself (clone(2), EINVAL).
pub(super) fn inside<T: Send>(
    pid: i32,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    on_thread(move || {
        Namespaces::of(pid)?.enter()?;
        work()
    })
}

/// Runs `work` with only the network namespace of `path`; files stay those of the caller.
pub(super) fn inside_network<T: Send>(
    path: &Path,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let namespace = File::open(path).with_context(|| format!("open {}", path.display()))?;
    on_thread(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
        work()
    })
}

/// Runs a command of a person with its standard streams in the namespaces of pod process `inner` of machine `first`,
/// or of the machine itself, and where it can in the working directory of the person. Ctrl-C is the command's, not ours.
pub(super) fn run_inside(
    first: i32,
    inner: Option<i32>,
    command: &mut Command,
) -> anyhow::Result<ExitStatus> {
    let program = command.get_program().to_string_lossy().into_owned();
    let here = std::env::current_dir();
    inside(first, move || {
        if let Some(pid) = inner {
            Namespaces::of(pid)?.enter()?;
        }
        // A mount namespace is entered at its root.
        if let Ok(here) = here {
            let _ = std::env::set_current_dir(here);
        }
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        let mut keyboard = nix::sys::signal::SigSet::empty();
        keyboard.add(nix::sys::signal::Signal::SIGINT);
        keyboard.add(nix::sys::signal::Signal::SIGQUIT);
        keyboard.thread_block().context("block signals")?;
        child.wait().with_context(|| format!("wait for {program}"))
    })
}

/// Makes what this process mounts its own business.
pub(super) fn make_mounts_private() -> anyhow::Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make mounts private")
}

pub(super) fn mount_new(kind: &str, at: &str) -> anyhow::Result<()> {
    match mount(Some(kind), at, Some(kind), MsFlags::MS_NOSUID, None::<&str>) {
        // The very same file system is there already: a pod on its node's network sees the node's /sys.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("mount {kind} at {at}")),
    }
}

pub(super) fn bind(from: &Path, at: &Path) -> anyhow::Result<()> {
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} at {}", from.display(), at.display()))
}

/// Gives this mount namespace its own content of a file of the host; a symbolic link is followed, a link into the
/// namespace's own fresh `/run` gets the file there. Absent files stay absent unless `create_at` is under `/run`.
pub(super) fn cover_file(target: &Path, content: &str, store: &Path) -> anyhow::Result<()> {
    fs::write(store, content).with_context(|| format!("write {}", store.display()))?;
    let real = match fs::canonicalize(target) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => match dangling(target) {
            Some(real) if real.starts_with("/run") => {
                fs::create_dir_all(real.parent().unwrap_or(Path::new("/run")))?;
                File::create(&real)?;
                real
            }
            _ => return Ok(()),
        },
        Err(error) => return Err(error).with_context(|| format!("look at {}", target.display())),
    };
    bind(store, &real)
}

/// Where a symbolic link points that leads nowhere.
fn dangling(link: &Path) -> Option<std::path::PathBuf> {
    let target = fs::read_link(link).ok()?;
    let joined = link.parent()?.join(target);
    let mut real = std::path::PathBuf::new();
    for part in joined.components() {
        match part {
            std::path::Component::ParentDir => {
                real.pop();
            }
            other => real.push(other),
        }
    }
    Some(real)
}
