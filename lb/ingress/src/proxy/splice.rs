//! Large answers from socket to socket: their bytes stay in the kernel (splice(2)), where reading and writing would copy them twice.
//!
//! ```text
//!  backend's socket --fill--> pipe (references to the kernel's pages) --drain--> client's socket
//! ```
//!
//! An answer takes this way once its head and what was read with it are out, where its end is known by its length, both connections
//! are plain TCP, and of its bytes only their number matters; [`Sending`](super::exchange::Sending) sees to that. A pipe is filled only
//! when it is empty: so a socket that gives nothing has nothing, and a client that does not read holds no more than one pipe. Whatever
//! the kernel refuses goes on by reading and writing. A body that breaks off closes its pipe; only one that was seen to be empty is kept for another.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, read};
use tokio::io::{AsyncWrite, Interest};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::body::{Body, BodyError};
use super::exchange::ExchangeError;

/// Left of a body: less is read and written as fast.
pub(super) const MIN_BYTES: u64 = 32 * 1024;
/// Of a pipe. The kernel lets a user have 64 MiB of them (`pipe-user-pages-soft`), and gives less beyond that.
const ROOM_BYTES: usize = 256 * 1024;
/// A pipe with less is not worth its calls.
const MIN_ROOM_BYTES: usize = 64 * 1024;
/// Pipes of a thread, which are two descriptors each: bodies beyond that are read and written.
pub(super) const MAX_PIPES: usize = 64;
/// Kept for the next body.
const MAX_IDLE: usize = 16;
/// Of one body before others have their turn.
const TURN_BYTES: usize = 1024 * 1024;
const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

/// What bytes go out on.
pub(super) trait Outlet: AsyncWrite + Unpin {
    /// The socket, where they go out on it as they are.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl Outlet for TcpStream {
    fn socket(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl Outlet for TlsStream<TcpStream> {}

/// A pipe of one body.
pub(super) struct Pipe {
    ends: Ends,
    /// Bytes in it.
    held: usize,
    _used: Used,
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    room: usize,
}

thread_local! {
    static IDLE: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
    static USED: Cell<usize> = const { Cell::new(0) };
}

/// Counts a pipe among those of its thread.
struct Used;

impl Used {
    fn one() -> Option<Self> {
        let used = USED.get();
        (used < MAX_PIPES).then(|| {
            USED.set(used + 1);
            Self
        })
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        USED.set(USED.get().saturating_sub(1));
    }
}

impl Ends {
    fn open() -> Option<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // Refused beyond what a user may have: then it stays as it is.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(ROOM_BYTES as i32));
        let room = usize::try_from(fcntl(&write, FcntlArg::F_GETPIPE_SZ).ok()?).ok()?;
        (room >= MIN_ROOM_BYTES).then_some(Self { read, write, room })
    }

    /// Whether there is nothing in it, as the kernel says.
    fn is_empty(&self) -> bool {
        read(&self.read, &mut [0; 1]) == Err(Errno::EAGAIN)
    }
}

/// How moving a body ended.
pub(super) enum Moved {
    Whole,
    /// The kernel does not do it with these sockets; what the pipe holds is to be sent first.
    Refused(Vec<u8>),
}

impl Pipe {
    /// `None` where there are enough of them, or the kernel gives none that is worth it.
    pub(super) fn open() -> Option<Self> {
        let used = Used::one()?;
        let idle = IDLE.with_borrow_mut(Vec::pop);
        Some(Self { ends: idle.or_else(Ends::open)?, held: 0, _used: used })
    }

    /// For the next body. What is in it is for nobody else.
    pub(super) fn keep(self) {
        let is_empty = self.held == 0 && self.ends.is_empty();
        IDLE.with_borrow_mut(|idle| {
            if is_empty && idle.len() < MAX_IDLE {
                idle.push(self.ends);
            }
        });
    }

    /// Takes what a socket has, up to `most` bytes; the pipe must be empty. 0 is the end of what comes on it.
    pub(super) fn poll_fill(
        &mut self,
        context: &mut Context<'_>,
        from: &TcpStream,
        most: u64,
    ) -> Poll<io::Result<usize>> {
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(self.ends.room);
        loop {
            ready!(from.poll_read_ready(context))?;
            let into = &self.ends.write;
            match from.try_io(Interest::READABLE, || Ok(splice(from, None, into, None, most, FLAGS)?)) {
                Err(error) if is_passing(&error) => {}
                filled => {
                    self.held += filled.as_ref().copied().unwrap_or_default();
                    return Poll::Ready(filled);
                }
            }
        }
    }

    /// Gives to a socket as much as it takes.
    fn poll_drain(&mut self, context: &mut Context<'_>, to: &TcpStream) -> Poll<io::Result<usize>> {
        loop {
            ready!(to.poll_write_ready(context))?;
            let (from, held) = (&self.ends.read, self.held);
            match to.try_io(Interest::WRITABLE, || Ok(splice(from, None, to, None, held, FLAGS)?)) {
                Err(error) if is_passing(&error) => {}
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                drained => {
                    self.held -= drained.as_ref().copied().unwrap_or_default();
                    return Poll::Ready(drained);
                }
            }
        }
    }

    /// Moves what is left of a body that is on a socket.
    pub(super) fn poll_move(
        &mut self,
        context: &mut Context<'_>,
        body: &mut Body,
        to: &TcpStream,
    ) -> Poll<Result<Moved, ExchangeError>> {
        let of_body = |error: BodyError| ExchangeError::Body(Box::new(error));
        let mut moved = 0;
        loop {
            if self.held == 0 && ready!(body.poll_into(context, self)).map_err(of_body)?.is_none() {
                return Poll::Ready(Ok(Moved::Refused(Vec::new())));
            }
            match ready!(self.poll_drain(context, to)) {
                Ok(length) => moved += length,
                Err(error) if is_refusal(&error) => return Poll::Ready(Ok(Moved::Refused(self.bytes()?))),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
            if self.held == 0 && body.on_socket().is_none() {
                return Poll::Ready(Ok(Moved::Whole));
            }
            if moved >= TURN_BYTES {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// What it holds, taken out of it.
    fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.held];
        let mut read_bytes = 0;
        while let Some(room) = bytes.get_mut(read_bytes..).filter(|room| !room.is_empty()) {
            match read(&self.ends.read, room)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => read_bytes += length,
            }
        }
        self.held = 0;
        Ok(bytes)
    }
}

/// It is to be tried again: at once, or when the socket is ready.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Not the socket is broken, but its kind, a filter of system calls or a lack of memory forbids this way.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let refusals = [Errno::EINVAL, Errno::ENOSYS, Errno::EPERM, Errno::EOPNOTSUPP, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|code| refusals.contains(&Errno::from_raw(code)))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
    use std::time::Duration;

    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair(address: SocketAddr) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).await.unwrap();
        let (one, other) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    fn idle() -> usize {
        IDLE.with_borrow(Vec::len)
    }

    /// A pipe that holds these bytes.
    async fn filled(bytes: &[u8]) -> Pipe {
        let (mut from, to) = pair(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).await;
        from.write_all(bytes).await.unwrap();
        let mut pipe = Pipe::open().unwrap();
        let most = bytes.len() as u64;
        let length = std::future::poll_fn(|context| pipe.poll_fill(context, &to, most)).await.unwrap();
        assert_eq!(length, bytes.len());
        pipe
    }

    #[tokio::test]
    async fn a_pipe_is_kept_for_another_body_only_when_it_is_empty() {
        let mut pipe = filled(b"of one").await;
        let (to, mut client) = pair(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        assert_eq!(std::future::poll_fn(|context| pipe.poll_drain(context, &to)).await.unwrap(), 6);
        let mut got = [0; 6];
        tokio::io::AsyncReadExt::read_exact(&mut client, &mut got).await.unwrap();
        pipe.keep();
        assert_eq!((&got, idle()), (b"of one", 1));
        // It takes the one that is kept.
        filled(b"rest").await.keep();
        assert_eq!(idle(), 0);
        let mut pipe = filled(b"rest").await;
        pipe.held = 0;
        pipe.keep();
        assert_eq!(idle(), 0, "the kernel knows better");
    }

    #[test]
    fn a_thread_has_so_many_pipes_and_keeps_fewer() {
        let pipes: Vec<Pipe> = std::iter::from_fn(Pipe::open).collect();
        assert_eq!(pipes.len(), MAX_PIPES);
        assert!(pipes.iter().all(|pipe| pipe.ends.room >= MIN_ROOM_BYTES));
        pipes.into_iter().for_each(Pipe::keep);
        assert_eq!((idle(), USED.get()), (MAX_IDLE, 0));
        drop(Pipe::open().unwrap());
        assert_eq!((idle(), USED.get()), (MAX_IDLE - 1, 0), "one that is dropped is closed");
    }

    #[tokio::test]
    async fn what_a_pipe_holds_is_not_lost_where_the_kernel_refuses() {
        let mut pipe = filled(b"not lost").await;
        let (to, _client) = pair(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        // Nothing is spliced to what is appended to (splice(2)).
        fcntl(&to, FcntlArg::F_SETFL(OFlag::O_APPEND | OFlag::O_NONBLOCK)).unwrap();
        let drained = std::future::poll_fn(|context| pipe.poll_drain(context, &to)).await;
        assert!(is_refusal(&drained.unwrap_err()));
        assert_eq!(pipe.bytes().unwrap(), b"not lost");
        assert!(pipe.ends.is_empty());
    }

    /// A write to a connection that is gone raises SIGPIPE, which Rust's programs ignore.
    #[tokio::test]
    async fn a_client_that_is_gone_is_an_error() {
        let (to, client) = pair(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        client.set_zero_linger().unwrap();
        drop(client);
        tokio::time::sleep(Duration::from_millis(50)).await;
        for _ in 0..2 {
            let mut pipe = filled(b"for nobody").await;
            assert!(std::future::poll_fn(|context| pipe.poll_drain(context, &to)).await.is_err());
        }
    }
}
