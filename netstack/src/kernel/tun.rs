//! The persistent TUN device of the userspace tunnel, with virtio network headers and segmentation offload.
//!
//! Agent and tunnel both open it with the same flags, so whoever comes first creates it and it outlives both. Every
//! packet read or written begins with a [`VirtioNetHeader`] (virtio 1.2, section 5.1.6).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

nix::ioctl_write_int!(tun_set_interface, b'T', 202);
nix::ioctl_write_int!(tun_set_persist, b'T', 203);
nix::ioctl_write_int!(tun_set_offload, b'T', 208);

const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

pub const VIRTIO_NET_HEADER_LEN: usize = 10;

/// `struct virtio_net_hdr`, in the byte order of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioNetHeader {
    pub flags: u8,
    pub gso_type: u8,
    /// Length of all headers; the kernel treats it as a hint.
    pub header_len: u16,
    /// Payload of one segment.
    pub gso_size: u16,
    /// Where the sum starts and where, from there, it is stored.
    pub checksum_start: u16,
    pub checksum_offset: u16,
}

impl VirtioNetHeader {
    /// The checksum field holds the sum of the pseudo header; the rest is to be added.
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// The checksum is known to be right.
    pub const DATA_VALID: u8 = 2;
    pub const GSO_NONE: u8 = 0;
    pub const GSO_TCP4: u8 = 1;
    pub const GSO_TCP6: u8 = 4;
    pub const GSO_UDP_L4: u8 = 5;

    pub fn read(bytes: &[u8; VIRTIO_NET_HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: u16_at(2),
            gso_size: u16_at(4),
            checksum_start: u16_at(6),
            checksum_offset: u16_at(8),
        }
    }

    pub fn to_bytes(self) -> [u8; VIRTIO_NET_HEADER_LEN] {
        let [h0, h1] = self.header_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.checksum_start.to_ne_bytes();
        let [o0, o1] = self.checksum_offset.to_ne_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

/// One queue of the device.
pub struct Tun {
    file: File,
    /// The kernel takes and gives UDP trains (Linux 6.2).
    pub udp_segmentation: bool,
}

impl Tun {
    /// Attaches a queue to the device `name`, creating it when it is absent, and makes it persistent. Reads do not
    /// block: see [`Tun::wait_readable`].
    ///
    /// Errors: `EPERM` without CAP_NET_ADMIN, `EINVAL` when a device of that name has other flags, `EBUSY` when all
    /// queues are taken, `ENOENT` without /dev/net/tun.
    pub fn open(name: &str) -> io::Result<Self> {
        let file = attach(name)?;
        let basic = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        let with_udp = basic | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let udp_segmentation = set_offload(&file, with_udp).is_ok();
        if !udp_segmentation {
            set_offload(&file, basic).or_else(|_| set_offload(&file, libc::TUN_F_CSUM))?;
        }
        Ok(Self { file, udp_segmentation })
    }

    /// Reads one packet behind its header. `None` when there is none right now.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes one packet given in pieces, the header first.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(pieces).map(|_| ())
    }

    pub fn wait_readable(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Creates the persistent device when it is absent; true when it was.
pub fn ensure_persistent(name: &str) -> io::Result<bool> {
    if exists(name) {
        return Ok(false);
    }
    attach(name).map(|_| true)
}

/// Ends the persistence of the device, which removes it when nobody has it open. An absent one is no error: false.
pub fn remove_persistent(name: &str) -> io::Result<bool> {
    if !exists(name) {
        return Ok(false);
    }
    let file = attach(name)?;
    // SAFETY: the file is an open TUN queue; this ioctl takes its argument as a plain integer.
    unsafe { tun_set_persist(file.as_raw_fd(), 0) }?;
    Ok(true)
}

fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

fn attach(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "link name longer than 15 characters"));
    }
    // SAFETY: `ifreq` is plain data for which zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(FLAGS).map_err(io::Error::other)?;
    let argument = std::ptr::from_mut(&mut request).expose_provenance();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`; `request` is one and outlives the call.
    unsafe { tun_set_interface(file.as_raw_fd(), argument as libc::c_ulong) }?;
    // SAFETY: the file is an attached TUN queue; this ioctl takes its argument as a plain integer.
    unsafe { tun_set_persist(file.as_raw_fd(), 1) }?;
    Ok(file)
}

fn set_offload(file: &File, offload: libc::c_uint) -> io::Result<()> {
    // SAFETY: the file is an attached TUN queue; this ioctl takes its argument as a plain integer.
    unsafe { tun_set_offload(file.as_raw_fd(), libc::c_ulong::from(offload)) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtio_header_reads_back() {
        let header = VirtioNetHeader {
            flags: VirtioNetHeader::NEEDS_CHECKSUM,
            gso_type: VirtioNetHeader::GSO_TCP6,
            header_len: 72,
            gso_size: 1348,
            checksum_start: 40,
            checksum_offset: 16,
        };
        assert_eq!(VirtioNetHeader::read(&header.to_bytes()), header);
    }
}
