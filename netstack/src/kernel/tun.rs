//! The persistent TUN device of the userspace tunnel, with virtio network headers and segmentation offload.
//!
//! Agent and tunnel both open it with the same flags, so whoever comes first creates it and it outlives both. Every
//! packet read or written begins with a [`VirtioNetHeader`] (virtio 1.2, section 5.1.6).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

nix::ioctl_write_int!(tun_set_interface, b'T', 202);
nix::ioctl_write_int!(tun_set_persist, b'T', 203);
nix::ioctl_write_int!(tun_set_offload, b'T', 208);
nix::ioctl_read_bad!(
    tun_get_interface,
    nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>()),
    libc::ifreq
);
nix::ioctl_read!(tun_get_header_len, b'T', 215, libc::c_int);

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
        Self::with_offload(attach(name)?)
    }

    /// Goes on with a queue that another process attached as [`Tun::open`] does; what waits in it stays.
    ///
    /// Errors: `EBADFD` when its device is gone, `EINVAL` when it is a queue of another device or with other flags, `ENOTTY` when
    /// it is no TUN at all.
    pub fn adopt(descriptor: OwnedFd, name: &str) -> io::Result<Self> {
        let file = File::from(descriptor);
        // SAFETY: `ifreq` is plain data for which zeroes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one `ifreq`; `request` is one and outlives the call.
        unsafe { tun_get_interface(file.as_raw_fd(), &raw mut request) }?;
        let mut header_len = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one int; `header_len` is one and outlives the call.
        unsafe { tun_get_header_len(file.as_raw_fd(), &raw mut header_len) }?;
        // SAFETY: TUNGETIFF fills this member of the union.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let owner = request.ifr_name.iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|byte| *byte != 0);
        let is_ours = owner.eq(name.bytes()) && flags & 0xffff & !libc::IFF_PERSIST == FLAGS;
        if !is_ours || usize::try_from(header_len).ok() != Some(VIRTIO_NET_HEADER_LEN) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Self::with_offload(file)
    }

    fn with_offload(file: File) -> io::Result<Self> {
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

    /// Until there is a packet, or `other` is ready.
    pub fn wait_readable(&self, other: impl AsFd) -> io::Result<()> {
        let ready = |descriptor| PollFd::new(descriptor, PollFlags::POLLIN);
        match poll(&mut [ready(self.file.as_fd()), ready(other.as_fd())], PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
    attach_with(name, FLAGS)
}

fn attach_with(name: &str, flags: libc::c_int) -> io::Result<File> {
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
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
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
    use crate::kernel::netns::Netns;
    use crate::kernel::testing::{NamedNetns, needs_root};

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

    #[test]
    fn a_queue_is_adopted_with_what_waits_in_it_and_one_that_is_not_ours_is_refused() {
        if !needs_root() {
            return;
        }
        let netns = NamedNetns::new("tun");
        let inside = Netns::open(netns.path()).unwrap();
        let first = inside.run(|| Tun::open("weft0").unwrap()).unwrap();
        let copy = || first.file.try_clone().unwrap().into();
        netns.must(&["ip", "address", "add", "10.9.0.1/24", "dev", "weft0"]);
        netns.must(&["ip", "link", "set", "weft0", "up"]);
        netns.exec(&["ping", "-c", "1", "-W", "0.1", "10.9.0.2"]);
        let second = Tun::adopt(copy(), "weft0").unwrap();
        assert_eq!(second.udp_segmentation, first.udp_segmentation);
        let kept: std::os::fd::OwnedFd = copy();
        drop(first);
        let (mut buffer, mut protocols) = (vec![0; 2000], Vec::new());
        while let Some(len) = second.read(&mut buffer).unwrap() {
            protocols.push(buffer[VIRTIO_NET_HEADER_LEN..len][9]);
        }
        assert!(protocols.contains(&1), "the ping waits still: {protocols:?}");
        let refused = |descriptor: std::os::fd::OwnedFd, name: &str| {
            Tun::adopt(descriptor, name).err().and_then(|error| error.raw_os_error())
        };
        assert_eq!(refused(kept.try_clone().unwrap(), "weft1"), Some(libc::EINVAL));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(refused(socket.into(), "weft0"), Some(libc::ENOTTY));
        netns.must(&["ip", "link", "del", "weft0"]);
        assert_eq!(refused(kept, "weft0"), Some(libc::EBADFD));
        let fresh = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        assert_eq!(refused(fresh.into(), "weft0"), Some(libc::EBADFD));
    }

    #[test]
    fn a_queue_with_other_flags_is_refused() {
        if !needs_root() {
            return;
        }
        let netns = NamedNetns::new("tun");
        let inside = Netns::open(netns.path()).unwrap();
        let other = inside.run(|| attach_with("weft0", libc::IFF_TUN | libc::IFF_NO_PI).unwrap()).unwrap();
        let refused = Tun::adopt(other.into(), "weft0").err().and_then(|error| error.raw_os_error());
        assert_eq!(refused, Some(libc::EINVAL));
    }
}
