//! Files put in place for good: whole or not at all, and untouched when they are right already.
//!
//! In: a path, a mode and the content. Out: whether anything changed. A power cut at any instant leaves the old or the new
//! file, and at most one temporary file, which the next call uses again.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The running binary, open: it can be copied when its path means something else by now.
pub(crate) fn own_binary() -> io::Result<File> {
    File::open("/proc/self/exe")
}

/// Whether `path` leads to the running binary.
pub(crate) fn is_own_binary(path: &Path) -> bool {
    let file = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let own = own_binary().and_then(|own| own.metadata()).map(file);
    own.is_ok_and(|own| fs::metadata(path).is_ok_and(|there| file(there) == own))
}

/// Makes `path` hold `content` with permission bits `mode`. True when it did not.
pub(crate) fn ensure(path: &Path, mode: u32, content: &mut (impl Read + Seek)) -> io::Result<bool> {
    if is_right(path, mode, content)? {
        return Ok(false);
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let temporary = temporary(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    content.seek(SeekFrom::Start(0))?;
    io::copy(content, &mut file)?;
    file.sync_all()?;
    // A program that is open for writing cannot be run (ETXTBSY), and it may be run as soon as it has its name.
    drop(file);
    fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()?;
    Ok(true)
}

/// Whether `path` is a file with this mode and content.
pub(crate) fn is_right(path: &Path, mode: u32, content: &mut (impl Read + Seek)) -> io::Result<bool> {
    let present = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let metadata = present.metadata()?;
    let length = content.seek(SeekFrom::End(0))?;
    if metadata.permissions().mode() & 0o7777 != mode || metadata.len() != length {
        return Ok(false);
    }
    content.seek(SeekFrom::Start(0))?;
    same(present, content, length)
}

fn same(mut a: impl Read, b: &mut impl Read, length: u64) -> io::Result<bool> {
    let (mut of_a, mut of_b) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut left = length;
    while left > 0 {
        let size = of_a.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        a.read_exact(&mut of_a[..size])?;
        b.read_exact(&mut of_b[..size])?;
        if of_a[..size] != of_b[..size] {
            return Ok(false);
        }
        left -= size as u64;
    }
    Ok(true)
}

/// Beside the file, hidden, with a suffix that no reader of such folders takes.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Removes the file, and a temporary one that a power cut may have left. True when either was there.
pub(crate) fn remove(path: &Path) -> io::Result<bool> {
    let left_over = remove_one(&temporary(path))?;
    Ok(remove_one(path)? || left_over)
}

fn remove_one(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the folder if it is there and empty. True when it was.
pub(crate) fn remove_empty_folder(path: &Path) -> io::Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The folders that have to be made so that `folder` exists, outermost first.
pub(crate) fn missing_folders(folder: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> =
        folder.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn text(text: &str) -> Cursor<Vec<u8>> {
        Cursor::new(text.as_bytes().to_vec())
    }

    #[test]
    fn a_file_is_written_when_content_or_mode_differ_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/file");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        assert!(ensure(&path, 0o600, &mut text("one")).unwrap());
        assert!(!ensure(&path, 0o600, &mut text("one")).unwrap());
        assert!(ensure(&path, 0o600, &mut text("two")).unwrap());
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode()), ("two", 0o600));
        assert!(ensure(&path, 0o755, &mut text("two")).unwrap());
        assert_eq!(mode(), 0o755);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn the_running_binary_is_known_under_every_name() {
        let folder = tempfile::tempdir().unwrap();
        let (own, link) = (std::env::current_exe().unwrap(), folder.path().join("weft"));
        assert!(is_own_binary(&own) && !is_own_binary(&link));
        std::os::unix::fs::symlink(&own, &link).unwrap();
        assert!(is_own_binary(&link));
        let copy = folder.path().join("copy");
        fs::copy(&own, &copy).unwrap();
        assert!(!is_own_binary(&copy));
    }

    #[test]
    fn long_contents_are_compared_to_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let long = "x".repeat(40_000);
        assert!(ensure(&path, 0o644, &mut text(&long)).unwrap());
        assert!(!ensure(&path, 0o644, &mut text(&long)).unwrap());
        assert!(ensure(&path, 0o644, &mut text(&format!("{}y", &long[1..]))).unwrap());
    }

    #[test]
    fn what_a_power_cut_left_is_used_again_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(folder.path().join(".file.new"), "half").unwrap();
        assert!(ensure(&path, 0o644, &mut text("whole")).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
        fs::write(folder.path().join(".file.new"), "half").unwrap();
        assert!(remove(&path).unwrap());
        assert!(!remove(&path).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn missing_folders_are_named_from_the_outside_in() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        assert_eq!(missing_folders(&inner), [folder.path().join("a"), inner.clone()]);
        fs::create_dir_all(&inner).unwrap();
        assert!(missing_folders(&inner).is_empty());
        assert!(!remove_empty_folder(folder.path()).unwrap());
        assert!(remove_empty_folder(&inner).unwrap());
        assert!(!remove_empty_folder(&inner).unwrap());
    }
}
