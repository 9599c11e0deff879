//! Files that are whole or as they were.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// What a new file outlives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outlives {
    /// The process that wrote it.
    Process,
    /// A power cut too; whether the name does is the folder's affair.
    PowerCut,
}

/// The old content or the new, never a part: written to `beside` with permission bits `mode` (less the umask), then renamed.
///
/// # Errors
/// What the file system says; `path` is as it was then, and nothing is left beside it.
pub(crate) fn replace(
    path: &Path,
    beside: &Path,
    mode: u32,
    content: &[u8],
    outlives: Outlives,
) -> io::Result<()> {
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(beside)?;
        file.write_all(content)?;
        if outlives == Outlives::PowerCut {
            file.sync_all()?;
        }
        fs::rename(beside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(beside);
    }
    written
}
