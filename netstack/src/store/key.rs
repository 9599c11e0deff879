//! The WireGuard private key: a file of its own, 0600, written so that a power cut leaves the old or the new one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::files::{self, Outlives};

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("read the key {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("write the key {path}")]
    Write { path: PathBuf, source: io::Error },
    /// Never replaced silently: peers know the node by it.
    #[error("{path} does not hold 32 bytes in base64; move it away to have a new key made")]
    Invalid { path: PathBuf },
}

/// The private key at `path` as `wg genkey` writes it (base64 and a newline), made if there is none.
pub fn load_or_create_key(path: &Path) -> Result<[u8; 32], KeyError> {
    match fs::read_to_string(path) {
        Ok(text) => parse(text.trim()).ok_or_else(|| KeyError::Invalid { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(KeyError::Invalid { path: path.to_owned() })
        }
        Err(source) => Err(KeyError::Read { path: path.to_owned(), source }),
    }
}

/// The key at `from` takes the place of the one at `to`, at once and for good.
pub fn replace(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    File::open(to.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn parse(text: &str) -> Option<[u8; 32]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

fn create(path: &Path) -> Result<[u8; 32], KeyError> {
    let key = clamped(rand::random());
    write_atomically(path, &key).map_err(|source| KeyError::Write { path: path.to_owned(), source })?;
    Ok(key)
}

/// RFC 7748 section 5. Every user clamps again; `wg genkey` writes the clamped form, and so do we.
fn clamped(mut bytes: [u8; 32]) -> [u8; 32] {
    bytes[0] &= 248;
    bytes[31] &= 127;
    bytes[31] |= 64;
    bytes
}

fn write_atomically(path: &Path, key: &[u8; 32]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let text = format!("{}\n", STANDARD.encode(key));
    files::replace(path, &temporary, 0o600, text.as_bytes(), Outlives::PowerCut)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/wireguard.key");
        let made = load_or_create_key(&path).unwrap();
        assert_eq!(load_or_create_key(&path).unwrap(), made);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path().join("state")).unwrap().count(), 1);
        assert_ne!(load_or_create_key(&folder.path().join("other.key")).unwrap(), made);
        assert_eq!((made[0] & 7, made[31] & 192), (0, 64));
    }

    #[test]
    fn the_next_key_takes_the_place_of_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let (path, next) = (folder.path().join("wireguard.key"), folder.path().join("wireguard.key.next"));
        load_or_create_key(&path).unwrap();
        let made = load_or_create_key(&next).unwrap();
        replace(&next, &path).unwrap();
        assert_eq!((load_or_create_key(&path).unwrap(), next.exists()), (made, false));
    }

    #[test]
    fn a_broken_key_file_is_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wireguard.key");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(load_or_create_key(&path), Err(KeyError::Invalid { .. })));
        assert_eq!(fs::read(&path).unwrap(), [0xff, 0xfe]);
    }
}
