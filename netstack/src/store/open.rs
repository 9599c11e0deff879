//! Opening a store so that damage can never become a crash loop.
//!
//! sled reports some damage as an error and panics on other (release builds abort on panic). So a file beside the
//! store counts openings that never ended: the second one in a row is taken for damage. One is not: it may have been
//! a power cut.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{CACHE_BYTES, Store, StoreError};

/// A store and, when the one before was damaged, where that is now.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) set_aside: Option<PathBuf>,
}

/// What is read at once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Damage shows now.
    AtEveryRecord,
    /// It did a while ago, in this process.
    AtNothing,
}

/// As long is waited for a store that is being closed.
const CLOSING: Duration = Duration::from_secs(2);
/// Openings that did not end before the store is given up.
const STRIKES: u32 = 2;

enum Failure {
    Damaged,
    Refused(io::Error),
}

pub(super) fn open(path: &Path, look: Look) -> Result<Opened, StoreError> {
    if let Some(parent) = path.parent() {
        let made = fs::create_dir_all(parent);
        made.map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
    }
    let marker = sibling(path, "opening");
    let strikes = fs::read_to_string(&marker).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut set_aside = None;
    if strikes >= STRIKES {
        set_aside = Some(move_aside(path)?);
    }
    // A marker that cannot be written is a full disk, about to be reported by sled itself.
    let _ = fs::write(&marker, (strikes + 1).to_string());
    let opened = match attempt_when_free(path, look) {
        Err(Failure::Damaged) => {
            set_aside = Some(move_aside(path)?);
            attempt_when_free(path, look)
        }
        other => other,
    };
    let _ = fs::remove_file(&marker);
    let store = opened.map_err(|failure| StoreError::Open {
        path: path.to_owned(),
        source: match failure {
            Failure::Damaged => io::Error::other("a new store is damaged too"),
            Failure::Refused(source) => source,
        },
    })?;
    Ok(Opened { store, set_aside })
}

/// For root only: the last good Snapshot holds what Ingresses refer to, private keys among it. Where that cannot be had, opening
/// says why itself.
pub(super) fn keep_private(path: &Path) {
    let _ = fs::DirBuilder::new().mode(0o700).create(path);
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
}

/// sled lets go of its lock a moment after the last handle is gone; a dead process has none.
fn attempt_when_free(path: &Path, look: Look) -> Result<Store, Failure> {
    let deadline = Instant::now() + CLOSING;
    loop {
        match attempt(path, look) {
            Err(Failure::Refused(error)) if is_locked(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

fn attempt(path: &Path, look: Look) -> Result<Store, Failure> {
    keep_private(path);
    let opening = AssertUnwindSafe(|| -> Result<Store, sled::Error> {
        let db = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::LowSpace)
            .flush_every_ms(None)
            .open()?;
        let snapshot = db.open_tree("snapshot")?;
        if look == Look::AtEveryRecord {
            for record in snapshot.iter() {
                record?;
            }
        }
        Ok(Store { path: path.to_owned(), db, snapshot })
    });
    match catch_unwind(opening) {
        Ok(Ok(store)) => Ok(store),
        Ok(Err(sled::Error::Io(source))) if !is_damage(&source) => Err(Failure::Refused(source)),
        Ok(Err(_)) | Err(_) => Err(Failure::Damaged),
    }
}

/// sled makes an error of its own of what flock(2) says.
fn is_locked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Other && error.to_string().contains("could not acquire lock")
}

/// sled wraps what it could not make sense of into I/O errors without an error number, and the refusal of its lock too.
fn is_damage(error: &io::Error) -> bool {
    let parsing = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
    );
    parsing && error.raw_os_error().is_none()
        || matches!(error.raw_os_error(), Some(libc::EISDIR | libc::ENOTDIR))
}

pub(super) fn move_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let aside = (1..)
        .map(|number| sibling(path, &format!("damaged-{number}")))
        .find(|candidate| !candidate.exists())
        .expect("the natural numbers do not end");
    let moved = fs::rename(path, &aside);
    moved.map_err(|source| StoreError::SetAside { path: path.to_owned(), source })?;
    Ok(aside)
}

/// `/run/weft/store` and `opening` give `/run/weft/store.opening`.
fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}
