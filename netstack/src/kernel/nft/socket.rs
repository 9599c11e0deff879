//! One netlink socket to netfilter: requests, dumps and batches. The kernel works a batch off inside `send`, so all
//! answers are queued when it returns.
#![allow(unsafe_code)] // socket options that no library names

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::uapi::{
    GETGEN, NFTA_GEN_ID, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NLMSGERR_ATTR_MSG, NLMSGERR_ATTR_OFFS, nft,
};
use super::wire::{Attributes, HEADER_BYTES, Message, Writer, messages, ne32};

/// Answers of a batch that the kernel refuses wholesale: room for some thousand errors.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// The kernel fills datagrams of a dump up to 32 KiB, or the size of our buffer.
const DATAGRAM_BYTES: usize = 64 << 10;
/// Dumps are answered at once; a socket that stays silent this long never answers.
const SILENCE_SECONDS: i64 = 10;
/// A dump that others' changes interrupt is begun again this many times.
const DUMP_ATTEMPTS: usize = 16;

thread_local! {
    /// One for all sockets of a thread: there are many more of those.
    static DATAGRAM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub(crate) struct NetfilterSocket {
    fd: OwnedFd,
    sequence: u32,
    send_buffer_bytes: usize,
    netns_cookie: u64,
    /// The generation that the last successful transaction made, or left as it was.
    pub(crate) committed: Option<u32>,
    /// Processor time that the kernel took for the last transaction. The clock on the wall would also tell of others that had the
    /// processor meanwhile: the kernel wakes a worker for what is deleted, which often runs before `send` returns.
    pub(crate) took: Duration,
}

/// Refusal of one message, as the kernel words it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) sequence: u32,
    pub(crate) errno: Errno,
    /// The kernel's own sentence (NLMSGERR_ATTR_MSG), where it has one.
    pub(crate) message: Option<String>,
    /// Offset of the refused attribute in the message, header included.
    pub(crate) offset: Option<usize>,
}

impl AsRawFd for NetfilterSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for NetfilterSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl NetfilterSocket {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        set_option(&fd, libc::NETLINK_EXT_ACK, 1)?;
        set_option(&fd, libc::NETLINK_CAP_ACK, 1)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(SILENCE_SECONDS, 0))?;
        // Without the privilege the default size has to do.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES);
        let netns_cookie = netns_cookie(&fd)?;
        Ok(Self {
            fd,
            sequence: 0,
            send_buffer_bytes: 0,
            netns_cookie,
            committed: None,
            took: Duration::ZERO,
        })
    }

    /// Names the network namespace of the socket, never reused before the next boot.
    pub(crate) fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    /// Reserves `count` sequence numbers and returns the first; never 0, which the kernel uses itself.
    pub(crate) fn sequences(&mut self, count: u32) -> u32 {
        if self.sequence.checked_add(count).is_none_or(|end| end == u32::MAX) {
            self.sequence = 0;
        }
        let first = self.sequence + 1;
        self.sequence += count;
        first
    }

    /// Sends one request and passes every message of the answer to `each`. `kind` and `family` go into the headers,
    /// `write` adds attributes.
    pub(crate) fn request(
        &mut self,
        kind: u16,
        family: u8,
        write: impl FnOnce(&mut Writer),
        each: impl FnMut(Message<'_>),
    ) -> Result<(), Errno> {
        self.request_of(kind, family, 0, write, each)
    }

    /// The same about a numbered resource, such as a group of nflog.
    pub(crate) fn request_of(
        &mut self,
        kind: u16,
        family: u8,
        resource: u16,
        write: impl FnOnce(&mut Writer),
        each: impl FnMut(Message<'_>),
    ) -> Result<(), Errno> {
        let sequence = self.send_request(kind, NLM_F_REQUEST | NLM_F_ACK, (family, resource), write)?;
        self.answers(sequence, each).map(drop)
    }

    /// Joins these multicast groups of nfnetlink (one bit each). It binds the socket: one without a port number, 0 being the
    /// kernel's own, would hear nothing.
    pub(crate) fn join(&self, groups: u32) -> io::Result<()> {
        Ok(bind(self.fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?)
    }

    /// Registered with the tokio runtime, for [`Self::receive`].
    pub(crate) fn listen(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is owned by the value that is registered, never replaced, and closed with it.
        let registered = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        registered.map_err(io::Error::from)
    }

    /// Passes the messages of one datagram that has come by itself to `each`; never waits.
    ///
    /// # Errors
    /// `EAGAIN` when there is none, `ENOBUFS` when some were lost.
    pub(crate) fn receive(&mut self, each: impl FnMut(Message<'_>)) -> Result<(), Errno> {
        with_buffer(|datagram| {
            let length = retried(|| recv(self.fd.as_raw_fd(), datagram, MsgFlags::MSG_DONTWAIT))?;
            messages(&datagram[..length]).for_each(each);
            Ok(())
        })
    }

    /// Number of commits of the namespace so far (NFT_MSG_GETGEN).
    pub(crate) fn generation(&mut self) -> Result<u32, Errno> {
        let mut generation = None;
        self.request(
            nft(GETGEN),
            0,
            |_| (),
            |message| generation = message.attributes().find(NFTA_GEN_ID).and_then(|id| id.be32()),
        )?;
        generation.ok_or(Errno::EPROTO)
    }

    /// Dumps objects: `each` sees every message; when the kernel says that the picture changed meanwhile, `restart` is
    /// called and the dump begins again.
    pub(crate) fn dump<T: Default>(
        &mut self,
        kind: u16,
        family: u8,
        write: impl Fn(&mut Writer),
        each: impl Fn(&mut T, Message<'_>),
    ) -> Result<T, Errno> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut seen = T::default();
            let sequence = self.send_request(kind, NLM_F_REQUEST | NLM_F_DUMP, (family, 0), &write)?;
            if self.answers(sequence, |message| each(&mut seen, message))? == Picture::Whole {
                return Ok(seen);
            }
        }
        Err(Errno::EINTR)
    }

    fn send_request(
        &mut self,
        kind: u16,
        flags: u16,
        (family, resource): (u8, u16),
        write: impl FnOnce(&mut Writer),
    ) -> Result<u32, Errno> {
        let sequence = self.sequences(1);
        let mut writer = Writer::default();
        let message = writer.open_message(kind, flags, sequence, family, resource);
        write(&mut writer);
        writer.close_message(message);
        retried(|| send(self.fd.as_raw_fd(), writer.bytes(), MsgFlags::empty()))?;
        Ok(sequence)
    }

    /// Reads until the end of a dump or the acknowledgement.
    fn answers(&mut self, sequence: u32, mut each: impl FnMut(Message<'_>)) -> Result<Picture, Errno> {
        let mut picture = Picture::Whole;
        with_buffer(|datagram| {
            loop {
                let length = retried(|| recv(self.fd.as_raw_fd(), datagram, MsgFlags::empty()))?;
                for message in messages(&datagram[..length]).filter(|m| m.sequence == sequence) {
                    if message.flags & NLM_F_DUMP_INTR != 0 && message.kind != NLMSG_ERROR {
                        picture = Picture::Torn;
                    }
                    match message.kind {
                        NLMSG_DONE => return errno(&message).map(|()| picture),
                        NLMSG_ERROR => return errno(&message).map(|()| picture),
                        _ => each(message),
                    }
                }
            }
        })
    }

    /// Sends a whole batch and returns the refusals; none means that it was carried out. `last` is the sequence number
    /// of the message that asked for an acknowledgement.
    pub(crate) fn transact(&mut self, batch: &[u8], last: u32) -> Result<Vec<Refusal>, Errno> {
        if batch.len() > self.send_buffer_bytes {
            // The kernel doubles it for its own overhead.
            let _ = setsockopt(&self.fd, sockopt::SndBufForce, &batch.len());
            self.send_buffer_bytes = batch.len();
        }
        let before = thread_time()?;
        retried(|| send(self.fd.as_raw_fd(), batch, MsgFlags::empty()))?;
        self.took = thread_time()?.saturating_sub(before);
        let mut refusals = Vec::new();
        let mut acknowledged = false;
        with_buffer(|datagram| {
            loop {
                match recv(self.fd.as_raw_fd(), datagram, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => {
                        for message in messages(&datagram[..length]) {
                            match refusal(&message) {
                                Some(refusal) => refusals.push(refusal),
                                None => acknowledged |= message.sequence == last,
                            }
                        }
                    }
                    Err(Errno::EAGAIN) => return Ok(()),
                    // More refusals than the buffer holds: those before are still there to be read.
                    Err(Errno::EINTR | Errno::ENOBUFS) => {}
                    Err(error) => return Err(error),
                }
            }
        })?;
        if refusals.is_empty() && !acknowledged {
            return Err(Errno::EPROTO);
        }
        Ok(refusals)
    }
}

/// Processor time of the calling thread.
fn thread_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

/// What looks at datagrams may itself wait for others: those come into a buffer of their own.
fn with_buffer<T>(receive: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut datagram = DATAGRAM.take();
    datagram.resize(DATAGRAM_BYTES, 0);
    let received = receive(&mut datagram);
    DATAGRAM.set(datagram);
    received
}

/// Whether a dump shows one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Picture {
    Whole,
    Torn,
}

fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

fn errno(message: &Message<'_>) -> Result<(), Errno> {
    match ne32(message.payload).map_or(0, u32::cast_signed) {
        0 => Ok(()),
        code => Err(Errno::from_raw(-code)),
    }
}

/// `None` for an acknowledgement (error 0) and for anything that is no error message.
fn refusal(message: &Message<'_>) -> Option<Refusal> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    let errno = errno(message).err()?;
    let mut refusal = Refusal { sequence: message.sequence, errno, message: None, offset: None };
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return Some(refusal);
    }
    // struct nlmsgerr: the error, then the header of our message, then all of it unless it is capped.
    let echoed = message.payload.get(4..).and_then(ne32).unwrap_or(0) as usize;
    let skipped = if message.flags & NLM_F_CAPPED == 0 { echoed.max(HEADER_BYTES) } else { HEADER_BYTES };
    let attributes = message.payload.get(4 + skipped.next_multiple_of(4)..).unwrap_or(&[]);
    for attribute in Attributes::of(attributes) {
        match attribute.kind {
            NLMSGERR_ATTR_MSG => refusal.message = Some(attribute.string()),
            NLMSGERR_ATTR_OFFS => refusal.offset = ne32(attribute.value).map(|offset| offset as usize),
            _ => {}
        }
    }
    Some(refusal)
}

fn set_option(fd: &OwnedFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer is to a live c_int of the length given; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// SO_NETNS_COOKIE of asm-generic/socket.h, since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

fn netns_cookie(fd: &OwnedFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to live values; the kernel writes at most `length` bytes, the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
