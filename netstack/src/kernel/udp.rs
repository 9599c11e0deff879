//! UDP sockets with segmentation offload: one send for a train of equal datagrams, one receive for many.
//!
//! Source: udp(7), UDP_SEGMENT and UDP_GRO. A train that is refused goes out as single datagrams.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{SockType, getsockopt, sockopt};

/// Most segments in one train (UDP_MAX_SEGMENTS of Linux before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// Most bytes in one train: what fits an IPv6 datagram, with room to spare for extension headers.
pub const MAX_TRAIN_BYTES: usize = 65_000;
/// Datagrams, or trains of them, that one receive takes.
const RECEIVE_BATCH: usize = 8;
const RECEIVE_BUFFER_LEN: usize = 65_536;
/// Asked for with the FORCE option: a burst of trains must fit while the receiver is away from the CPU.
const SOCKET_BUFFER_BYTES: libc::c_int = 4 << 20;

/// A socket of one family on all addresses of the host.
pub struct UdpSocket {
    fd: OwnedFd,
    segmentation: AtomicBool,
}

impl UdpSocket {
    /// Binds `port` for one family; IPv6 sockets take IPv6 only. Receives end after `timeout` with no datagram.
    ///
    /// Errors: `EADDRINUSE` when the port is taken, `EAFNOSUPPORT` when the host has no such family.
    pub fn bind(ipv6: bool, port: u16, timeout: Duration) -> io::Result<Self> {
        let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
        // SAFETY: no pointers are passed.
        let raw = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just opened and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        if ipv6 {
            set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &1)?;
        }
        let socket = Self::with_options(fd, ipv6, timeout)?;
        let (storage, len) = to_storage(SocketAddr::new(any(ipv6), port));
        // SAFETY: `storage` holds an address of `len` valid bytes.
        if unsafe { libc::bind(socket.fd.as_raw_fd(), std::ptr::from_ref(&storage).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    /// Goes on with a socket that another process bound as [`UdpSocket::bind`] does, and its port; what waits in it stays.
    ///
    /// Errors: `EINVAL` when it is bound otherwise, `ENOTSOCK` when it is no socket at all.
    pub fn adopt(fd: OwnedFd, ipv6: bool, timeout: Duration) -> io::Result<(Self, u16)> {
        let view = std::net::UdpSocket::from(fd);
        let address = view.local_addr()?;
        let is_datagram = getsockopt(&view, sockopt::SockType)? == SockType::Datagram;
        if !is_datagram || address.ip() != any(ipv6) || address.port() == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok((Self::with_options(view.into(), ipv6, timeout)?, address.port()))
    }

    fn with_options(fd: OwnedFd, ipv6: bool, timeout: Duration) -> io::Result<Self> {
        // Fragments rather than a black hole when the path is narrower than the tunnel believes.
        let (level, option) = if ipv6 {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
        };
        set_option(&fd, level, option, &libc::IP_PMTUDISC_DONT)?;
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            // Only a help: without the privilege the host's limit stays.
            let _ = set_option(&fd, libc::SOL_SOCKET, option, &SOCKET_BUFFER_BYTES);
        }
        // Without it (Linux before 5.0) datagrams come one by one.
        let _ = set_option(&fd, libc::SOL_UDP, libc::UDP_GRO, &1);
        let timeout = libc::timeval {
            tv_sec: timeout.as_secs().try_into().map_err(io::Error::other)?,
            tv_usec: timeout.subsec_micros().into(),
        };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
        let segmentation = AtomicBool::new(has_segmentation(&fd));
        Ok(Self { fd, segmentation })
    }

    /// Sends `bytes` as datagrams of `segment` bytes, the last may be shorter; at most [`MAX_SEGMENTS`] and
    /// [`MAX_TRAIN_BYTES`].
    pub fn send_train(&self, to: SocketAddr, bytes: &[u8], segment: usize) -> io::Result<()> {
        if bytes.len() > segment && self.segmentation.load(Ordering::Relaxed) {
            let outcome = self.send(to, bytes, u16::try_from(segment).ok());
            match outcome.as_ref().err().and_then(Refused::read) {
                Some(Refused::ByDevice) => self.segmentation.store(false, Ordering::Relaxed),
                Some(Refused::ByPath) => {}
                None => return outcome,
            }
        }
        bytes.chunks(segment).try_for_each(|datagram| self.send(to, datagram, None))
    }

    fn send(&self, to: SocketAddr, bytes: &[u8], segment: Option<u16>) -> io::Result<()> {
        let (mut storage, len) = to_storage(to);
        let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut control = SegmentControl::default();
        // SAFETY: `msghdr` is plain data for which zeroes are a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_name = std::ptr::from_mut(&mut storage).cast();
        message.msg_namelen = len;
        message.msg_iov = &raw mut piece;
        message.msg_iovlen = 1;
        if let Some(segment) = segment {
            control.ask(&mut message, segment);
        }
        loop {
            // SAFETY: name, piece and control of `message` point to locals that outlive the call; the kernel only
            // reads what `iov_base` points to.
            if unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, 0) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Waits for datagrams and takes those that are there; fewer than one after the timeout.
    pub fn receive(&self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        batch.filled = 0;
        let mut headers = batch.headers();
        let flags = libc::MSG_WAITFORONE;
        // SAFETY: each header points to an address, a piece and a control buffer owned by `batch`, which is borrowed
        // for the whole call; their lengths are the true ones.
        let count = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                headers.as_mut_ptr(),
                libc::c_uint::try_from(headers.len()).unwrap_or(0),
                flags,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            let quiet = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if quiet { Ok(0) } else { Err(error) };
        };
        for (index, header) in headers.iter().take(count).enumerate() {
            let len = usize::try_from(header.msg_len).unwrap_or(0).min(RECEIVE_BUFFER_LEN);
            batch.meta[index] = Received {
                len,
                segment: gro_segment(&header.msg_hdr).filter(|segment| *segment > 0).unwrap_or(len),
                from: from_storage(&batch.addresses[index]),
            };
        }
        batch.filled = count;
        Ok(count)
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn any(ipv6: bool) -> IpAddr {
    if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

#[derive(Clone, Copy)]
struct Received {
    len: usize,
    segment: usize,
    from: Option<SocketAddr>,
}

const CONTROL_LEN: usize = 64;

/// Room for control messages, aligned as `cmsghdr` demands.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_LEN]);

/// Room for the control message that has the kernel cut a message into datagrams.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub(super) struct SegmentControl([u8; SEGMENT_CONTROL_LEN]);

// SAFETY: CMSG_SPACE only computes.
const SEGMENT_CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE(2) } as usize;

impl SegmentControl {
    /// Asks for datagrams of `segment` bytes, the last may be shorter. `message` points to `self` from then on.
    ///
    /// A kernel without [`has_segmentation`] overlooks it and sends the whole as one datagram.
    pub(super) fn ask(&mut self, message: &mut libc::msghdr, segment: u16) {
        message.msg_control = self.0.as_mut_ptr().cast();
        message.msg_controllen = SEGMENT_CONTROL_LEN;
        // SAFETY: the control buffer is aligned and long enough for one header and a u16.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = libc::UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(2) as usize;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment);
        }
    }
}

/// The kernel knows UDP_SEGMENT (Linux 4.18).
pub(super) fn has_segmentation(socket: &impl AsRawFd) -> bool {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has room for the `len` bytes, and both outlive the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    outcome == 0
}

/// What an error says about trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The device cannot do it, now or later.
    ByDevice,
    /// The path to this destination is too narrow for the segment; single datagrams may be fragmented.
    ByPath,
}

impl Refused {
    pub(super) fn read(error: &io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            libc::EIO => Some(Self::ByDevice),
            libc::EINVAL | libc::EMSGSIZE => Some(Self::ByPath),
            _ => None,
        }
    }
}

/// Buffers of one receiving thread. Pages that no datagram ever reached cost no memory.
pub struct ReceiveBatch {
    buffers: Vec<Box<[u8]>>,
    addresses: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    pieces: Vec<libc::iovec>,
    meta: Vec<Received>,
    filled: usize,
}

// SAFETY: `pieces` holds raw pointers only for the duration of a receive; between calls nothing reads them.
unsafe impl Send for ReceiveBatch {}

/// What one source sent: datagrams of `segment` bytes one after another, the last may be shorter.
pub struct ReceivedTrain<'a> {
    /// Position in the batch, for [`ReceiveBatch::bytes`].
    pub index: usize,
    pub from: SocketAddr,
    pub bytes: &'a mut [u8],
    pub segment: usize,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        // SAFETY: `sockaddr_storage` is plain data for which zeroes are a valid value.
        let address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Self {
            buffers: (0..RECEIVE_BATCH).map(|_| vec![0; RECEIVE_BUFFER_LEN].into_boxed_slice()).collect(),
            addresses: vec![address; RECEIVE_BATCH],
            controls: vec![Control([0; CONTROL_LEN]); RECEIVE_BATCH],
            pieces: Vec::with_capacity(RECEIVE_BATCH),
            meta: vec![Received { len: 0, segment: 0, from: None }; RECEIVE_BATCH],
            filled: 0,
        }
    }
}

impl ReceiveBatch {
    /// What the last receive brought.
    pub fn trains(&mut self) -> impl Iterator<Item = ReceivedTrain<'_>> {
        let filled = self.buffers.iter_mut().zip(&self.meta).take(self.filled).enumerate();
        filled.filter_map(|(index, (buffer, meta))| {
            let bytes = buffer.get_mut(..meta.len)?;
            (meta.len > 0).then_some(ReceivedTrain { index, from: meta.from?, bytes, segment: meta.segment })
        })
    }

    /// The bytes of one train of the last receive, by its position.
    pub fn bytes(&self, train: usize) -> &[u8] {
        self.buffers.get(train).map_or(&[], |buffer| buffer)
    }

    fn headers(&mut self) -> Vec<libc::mmsghdr> {
        self.pieces.clear();
        for buffer in &mut self.buffers {
            self.pieces.push(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        }
        let parts = self.pieces.iter_mut().zip(&mut self.addresses).zip(&mut self.controls);
        parts
            .map(|((piece, address), control)| {
                // SAFETY: `mmsghdr` is plain data for which zeroes are a valid value.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
                header.msg_hdr.msg_namelen = STORAGE_LEN;
                header.msg_hdr.msg_iov = std::ptr::from_mut(piece);
                header.msg_hdr.msg_iovlen = 1;
                header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
                header.msg_hdr.msg_controllen = CONTROL_LEN;
                header
            })
            .collect()
    }
}

pub(super) const STORAGE_LEN: libc::socklen_t = size_of::<libc::sockaddr_storage>() as libc::socklen_t;

/// The segment size the kernel reports for a train.
fn gro_segment(message: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel filled `message`'s control buffer, which lives as long as the batch; the macros walk it within
    // `msg_controllen`, and UDP_GRO carries an int.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_UDP && (*header).cmsg_type == libc::UDP_GRO {
                let value = libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned();
                return usize::try_from(value).ok();
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

/// What is sent is as large as the link takes or not sent at all: no fragments, whatever is known of the path
/// (IP_PMTUDISC_PROBE, ip(7)).
pub fn send_unfragmented(socket: &impl AsRawFd, ipv6: bool) -> io::Result<()> {
    let (level, option, value) = if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    };
    set_option(socket, level, option, &value)
}

fn set_option<T>(fd: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `value` points to `len` readable bytes.
    let outcome =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), len) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn to_storage(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: `sockaddr_storage` is plain data for which zeroes are a valid value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let len = match address {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: `sockaddr_storage` is at least as large as any address and as strictly aligned.
            unsafe { std::ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { std::ptr::from_mut(&mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, libc::socklen_t::try_from(len).unwrap_or(STORAGE_LEN))
}

pub(super) fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which address the kernel wrote.
            let raw = unsafe { std::ptr::from_ref(storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let raw = unsafe { std::ptr::from_ref(storage).cast::<libc::sockaddr_in6>().read() };
            let (ip, port) = (Ipv6Addr::from(raw.sin6_addr.s6_addr), u16::from_be(raw.sin6_port));
            Some(SocketAddrV6::new(ip, port, 0, raw.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(ipv6: bool) -> (UdpSocket, SocketAddr) {
        // The kernel picks a free port for 0; ask for it through the standard library's view of the same socket.
        let socket = UdpSocket::bind(ipv6, 0, Duration::from_secs(2)).unwrap();
        let std_view = std::net::UdpSocket::from(socket.fd.try_clone().unwrap());
        let mut address = std_view.local_addr().unwrap();
        address.set_ip(if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() });
        (socket, address)
    }

    #[test]
    fn a_socket_is_adopted_with_its_port_and_what_waits_in_it() {
        for ipv6 in [false, true] {
            let (socket, address) = bound(ipv6);
            bound(ipv6).0.send_train(address, b"waits", 5).unwrap();
            let copy = || socket.fd.try_clone().unwrap();
            let refused = |outcome: io::Result<_>| outcome.err().and_then(|error| error.raw_os_error());
            assert_eq!(refused(UdpSocket::adopt(copy(), !ipv6, Duration::ZERO)), Some(libc::EINVAL));
            let elsewhere = std::net::UdpSocket::bind((address.ip(), 0)).unwrap();
            assert_eq!(refused(UdpSocket::adopt(elsewhere.into(), ipv6, Duration::ZERO)), Some(libc::EINVAL));
            let (adopted, port) = UdpSocket::adopt(copy(), ipv6, Duration::from_secs(2)).unwrap();
            assert_eq!(port, address.port());
            let mut batch = ReceiveBatch::default();
            assert_eq!(adopted.receive(&mut batch).unwrap(), 1);
            assert_eq!(batch.trains().next().unwrap().bytes, b"waits");
        }
        assert!(UdpSocket::adopt(tempfile::tempfile().unwrap().into(), false, Duration::ZERO).is_err());
    }

    #[test]
    fn a_train_arrives_as_the_datagrams_it_was_made_of() {
        for ipv6 in [false, true] {
            let (sender, from) = bound(ipv6);
            let (receiver, to) = bound(ipv6);
            let bytes: Vec<u8> = (0..2500u32).map(|i| i.to_le_bytes()[0]).collect();
            sender.send_train(to, &bytes, 1000).unwrap();
            let (mut batch, mut got, mut sizes) = (ReceiveBatch::default(), Vec::new(), Vec::new());
            while got.len() < bytes.len() {
                assert!(receiver.receive(&mut batch).unwrap() > 0, "datagrams lost on loopback");
                for train in batch.trains() {
                    assert_eq!(train.from, from);
                    sizes.extend(train.bytes.chunks(train.segment).map(<[u8]>::len));
                    got.extend_from_slice(train.bytes);
                }
            }
            assert_eq!((got, sizes), (bytes, vec![1000, 1000, 500]));
        }
    }
}
