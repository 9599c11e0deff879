//! Bytes that one process leaves to the next through a descriptor: in memory only, unchangeable, and read once.
//!
//! Source: memfd_create(2), fcntl(2) "File Sealing".

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Nothing can be written to it any more; it can only be emptied.
pub fn seal(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"weft", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW))?;
    Ok(file.into())
}

/// The bytes, for the first who asks, whatever copies of the descriptor there are and in whatever processes; `None` for everybody
/// after. The kernel decides who is first, since the last seal can be set only once; and the bytes are gone before this returns.
///
/// Errors: not from [`seal`].
pub fn take(descriptor: OwnedFd) -> io::Result<Option<Vec<u8>>> {
    let file = File::from(descriptor);
    match fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SEAL)) {
        Err(Errno::EPERM) => return Ok(None),
        outcome => outcome?,
    };
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    // Not `read`: the position belongs to all copies.
    file.read_exact_at(&mut bytes, 0)?;
    file.set_len(0)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_cannot_be_changed_and_is_taken_once() {
        let sealed = seal(b"keys").unwrap();
        let [copy, view] = [(); 2].map(|()| sealed.try_clone().unwrap());
        let view = File::from(view);
        assert_eq!(view.write_at(b"other", 0).map_err(|error| error.raw_os_error()), Err(Some(libc::EPERM)));
        assert!(view.set_len(100).is_err(), "it does not grow");
        assert_eq!(take(sealed).unwrap(), Some(b"keys".to_vec()));
        assert_eq!(view.metadata().unwrap().len(), 0, "the bytes are gone for every holder");
        assert_eq!(take(copy).unwrap(), None);
    }

    #[test]
    fn what_is_no_such_memory_is_an_error() {
        assert!(take(std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into()).is_err());
        assert!(take(tempfile::tempfile().unwrap().into()).is_err());
    }
}
