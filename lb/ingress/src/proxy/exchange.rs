//! One request to a backend over HTTP/1.1 and its answer, within the request's own task: the head and what is ready of the body go out
//! in one piece, and the answer is listened for meanwhile. A connection takes another request when its answer was read to an end that
//! [`codec`] is sure of, the request went out whole, and not a byte followed.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd as _;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use http::header;
use http::request::Parts;
use http::{Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_rustls::client::TlsStream;

use super::body::{Body, BodyError};
use super::codec::{self, Frames, Framing, Malformed, Piece};
use super::hygiene::Told;
use super::splice::{self, Moved, Outlet, Pipe};
use super::upload::Deadline;

/// Of one read: the first, and the longest for bodies that fill it.
const READ_BYTES: usize = 8 * 1024;
const MAX_READ_BYTES: usize = 128 * 1024;
/// Of the room for heads that a connection keeps.
const KEPT_BYTES: usize = 2 * 1024;
/// A piece of a body that is sent from where it is; smaller ones are gathered.
const LARGE_PIECE: usize = 8 * 1024;
/// Of a body that is taken before it goes out in one write, and the pieces of one write.
const MAX_WAITING: usize = 256 * 1024;
const MAX_SLICES: usize = 16;
/// Interim answers (1xx) before the one that counts.
const MAX_INTERIM: usize = 16;

/// Why there is no answer, or no whole one.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error("the connection")]
    Io(#[from] io::Error),
    #[error("the backend closed its connection before its answer was whole")]
    Cut,
    #[error("the backend closed its connection without an answer")]
    Silent,
    #[error("the backend's answer")]
    Malformed(#[from] Malformed),
    #[error("more than {MAX_INTERIM} interim answers")]
    Interim,
    #[error("the backend changes to a protocol that nobody asked for")]
    Upgrade,
    #[error("a body does not have its length")]
    Length,
    #[error("a body")]
    Body(#[source] Box<BodyError>),
    #[error("the backend said nothing for too long")]
    Timeout,
}

pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    /// Somebody else sends the rest of a request.
    Half(ReadHalf<Stream>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, into),
            Self::Half(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Half(_) => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Half(_) => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
            Self::Half(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Half(_) => Poll::Ready(Ok(())),
        }
    }
}

impl Outlet for Stream {
    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(stream) => Some(stream),
            Self::Tls(_) | Self::Half(_) => None,
        }
    }
}

impl Outlet for WriteHalf<Stream> {}

/// A connection to a backend that speaks HTTP/1.1.
pub(super) struct Http1 {
    stream: Stream,
    /// Read and not taken yet.
    read: BytesMut,
    read_bytes: usize,
    /// The room in which heads are written.
    write: Vec<u8>,
    clock: Clock,
}

/// A timer that outlives what it is set for: it is only touched where it would ring too late, and asked again when it rang too early.
#[derive(Default)]
pub(super) struct Clock(Option<Pin<Box<Sleep>>>);

impl Clock {
    pub(super) fn poll(&mut self, context: &mut Context<'_>, due: Instant) -> Poll<()> {
        let due = due.into();
        let timer = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        }
        while timer.as_mut().poll(context).is_ready() {
            if timer.deadline() >= due {
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

impl Http1 {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            read_bytes: READ_BYTES,
            write: Vec::new(),
            clock: Clock::default(),
        }
    }

    /// Whether a kept connection can take a request: the other side has neither closed it nor said anything since.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut byte = [0; 1];
        let mut context = Context::from_waker(Waker::noop());
        Pin::new(&mut self.stream).poll_read(&mut context, &mut ReadBuf::new(&mut byte)).is_pending()
    }

    /// The same, asked of the kernel: what it knows comes to the runtime a moment later.
    pub(super) fn is_open(&self) -> bool {
        let (stream, is_plain) = match &self.stream {
            Stream::Plain(stream) => (stream, true),
            Stream::Tls(stream) => (stream.get_ref().0, false),
            Stream::Half(_) => return false,
        };
        match recv(stream.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            // Tickets of a TLS session come late.
            Ok(length) => length > 0 && !is_plain,
            Err(error) => error == Errno::EAGAIN,
        }
    }

    /// Gives away what the next request has to make anew.
    pub(super) fn rest(&mut self) {
        self.read = BytesMut::new();
        self.write = Vec::new();
    }

    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let wanted = self.read_bytes;
        if self.read.capacity() - self.read.len() < wanted / 4 {
            self.read.reserve(wanted);
        }
        let room = self.read.capacity() - self.read.len();
        let length = ready!(pin!(self.stream.read_buf(&mut self.read)).poll(context))?;
        if length == room {
            self.read_bytes = (wanted * 2).min(MAX_READ_BYTES);
        }
        Poll::Ready(Ok(length))
    }

    /// The answer to this request, which has begun when this returns.
    ///
    /// # Errors
    /// There is none, with the body where nothing was sent.
    pub(super) async fn ask(
        mut self: Box<Self>,
        head: &Parts,
        told: Option<Told<'_>>,
        body: Body,
        deadline: &Deadline,
    ) -> Result<Response<Answer>, (ExchangeError, Option<Body>)> {
        let mut write = std::mem::take(&mut self.write);
        let known = if body.is_empty() { None } else { Some(body.size_hint().exact()) };
        let frames =
            codec::write_head(&mut write, head, told, known).map_err(|error| (error.into(), None))?;
        let mut sending = Sending::new(body, frames, write);
        let mut interim = 0;
        let answered = std::future::poll_fn(|context| {
            if let Poll::Ready(Err(error)) = sending.poll(context, &mut self.stream) {
                // A backend that closed early may have said why.
                if !sending.begun || !matches!(error, ExchangeError::Io(_)) {
                    return Poll::Ready(Err(error));
                }
            }
            loop {
                match self.poll_fill(context) {
                    Poll::Ready(Ok(1..)) => {}
                    Poll::Ready(Ok(0) | Err(_)) if interim == 0 && self.read.is_empty() => {
                        return Poll::Ready(Err(ExchangeError::Silent));
                    }
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(ExchangeError::Cut)),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                    Poll::Pending => {
                        ready!(self.clock.poll(context, deadline.at()));
                        if deadline.at() <= Instant::now() {
                            return Poll::Ready(Err(ExchangeError::Timeout));
                        }
                        continue;
                    }
                }
                while let Some(head) = codec::head(&mut self.read, &head.method)? {
                    if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
                        return Poll::Ready(Ok(head));
                    }
                    interim += 1;
                    if interim > MAX_INTERIM {
                        return Poll::Ready(Err(ExchangeError::Interim));
                    }
                }
            }
        });
        let mut answer = match answered.await {
            Ok(answer) => answer,
            Err(error) => return Err((error, sending.unsent())),
        };
        let upgraded = answer.status == StatusCode::SWITCHING_PROTOCOLS;
        if upgraded && (!head.headers.contains_key(header::UPGRADE) || !sending.is_done()) {
            return Err((ExchangeError::Upgrade, None));
        }
        answer.lasts &= sending.is_done() && !upgraded;
        if sending.is_done() {
            self.write = sending.into_room();
        } else if !sending.broken {
            let (reading, writing) = tokio::io::split(self.stream);
            tokio::spawn(sending.finish(writing, deadline.clone()));
            self.stream = Stream::Half(reading);
        }
        let mut response = Response::new(Answer::One(Reading {
            connection: Some(self),
            framing: answer.framing,
            lasts: answer.lasts,
            waiting_since: None,
            was_spliced: false,
        }));
        (*response.status_mut(), *response.headers_mut()) = (answer.status, answer.fields);
        Ok(response)
    }
}

/// What is still to be sent of a request, or of an answer.
pub(super) struct Sending {
    body: Body,
    frames: Frames,
    /// To be sent: these bytes from `sent` on, then the pieces.
    bytes: Vec<u8>,
    sent: usize,
    pieces: VecDeque<Bytes>,
    /// Bytes of all pieces.
    waiting: usize,
    begun: bool,
    /// The end of the body is among what is to be sent.
    ended: bool,
    broken: bool,
    way: Way,
}

/// How the rest of a body goes.
enum Way {
    /// Read and written, until it is seen that all that is left is to come on a socket.
    Open,
    /// Read and written.
    Copied,
    Spliced(Pipe),
}

impl Sending {
    /// `bytes` is the head.
    pub(super) fn new(body: Body, frames: Frames, bytes: Vec<u8>) -> Self {
        let ended = body.is_empty() && frames == Frames::Length(0);
        let pieces = VecDeque::new();
        let way = Way::Open;
        Self { body, frames, bytes, sent: 0, pieces, waiting: 0, begun: false, ended, broken: false, way }
    }

    fn is_done(&self) -> bool {
        self.ended && self.is_out()
    }

    fn is_out(&self) -> bool {
        self.sent == self.bytes.len() && self.pieces.is_empty()
    }

    /// The body, when it and the head are whole still.
    fn unsent(self) -> Option<Body> {
        (!self.begun && self.body.is_empty()).then_some(self.body)
    }

    /// The room that heads are written in, for the next.
    pub(super) fn into_room(mut self) -> Vec<u8> {
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES);
        self.bytes
    }

    /// Sends until all is out.
    pub(super) fn poll<S: Outlet>(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<Result<(), ExchangeError>> {
        if self.broken {
            return Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe).into()));
        }
        let polled = self.poll_out(context, stream);
        self.broken = matches!(polled, Poll::Ready(Err(_)));
        polled
    }

    fn poll_out<S: Outlet>(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<Result<(), ExchangeError>> {
        loop {
            self.gather(context, stream.socket().is_some())?;
            if self.is_out()
                && let (Way::Spliced(pipe), Some(socket)) = (&mut self.way, stream.socket())
            {
                let moved = ready!(pipe.poll_move(context, &mut self.body, socket))?;
                self.moved(moved)?;
                continue;
            }
            if self.is_out() {
                let flushed = Pin::new(&mut *stream).poll_flush(context)?;
                return if self.ended { flushed.map(Ok) } else { Poll::Pending };
            }
            let left = self.bytes.get(self.sent..).unwrap_or_default();
            let length = if self.pieces.is_empty() {
                ready!(Pin::new(&mut *stream).poll_write(context, left))?
            } else {
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                let parts = std::iter::once(left).chain(self.pieces.iter().map(|piece| &**piece));
                let mut count = 0;
                for (slice, part) in slices.iter_mut().zip(parts) {
                    (*slice, count) = (IoSlice::new(part), count + 1);
                }
                let slices = slices.get(..count).unwrap_or_default();
                ready!(Pin::new(&mut *stream).poll_write_vectored(context, slices))?
            };
            if length == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
            self.begun = true;
            self.advance(length);
        }
    }

    fn advance(&mut self, length: usize) {
        let head = length.min(self.bytes.len() - self.sent);
        self.sent += head;
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        }
        let mut left = length - head;
        self.waiting -= left;
        while let Some(piece) = self.pieces.front_mut().filter(|_| left > 0) {
            let taken = left.min(piece.len());
            piece.advance(taken);
            left -= taken;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// Whether the rest of the body is left to a pipe, where it goes out on a socket.
    fn splices(&mut self, to_socket: bool) -> bool {
        if let (true, Way::Open, Frames::Length(left)) = (to_socket, &self.way, &self.frames)
            && self.body.on_socket().is_some_and(|rest| rest == *left && rest >= splice::MIN_BYTES)
        {
            self.way = Pipe::open().map_or(Way::Copied, Way::Spliced);
        }
        matches!(self.way, Way::Spliced(_))
    }

    /// Takes up where a pipe ended: all that left the body is out, or returned.
    fn moved(&mut self, moved: Moved) -> Result<(), ExchangeError> {
        let left = self.body.size_hint().exact().ok_or(ExchangeError::Length)?;
        self.frames = Frames::Length(left);
        match (std::mem::replace(&mut self.way, Way::Copied), moved) {
            (Way::Spliced(pipe), Moved::Whole) => pipe.keep(),
            (_, Moved::Refused(bytes)) => self.add(bytes.into()),
            (_, Moved::Whole) => {}
        }
        if left == 0 { self.end(&header::HeaderMap::new()) } else { Ok(()) }
    }

    /// Takes from the body what is ready, until it is enough for a write.
    fn gather(&mut self, context: &mut Context<'_>, to_socket: bool) -> Result<(), ExchangeError> {
        let is_enough =
            |it: &Self| it.pieces.len() >= MAX_SLICES || it.bytes.len() + it.waiting >= MAX_WAITING;
        while !self.ended && !is_enough(self) && !self.splices(to_socket) {
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => return self.end(&header::HeaderMap::new()),
                Poll::Ready(Some(frame)) => frame.map_err(|error| ExchangeError::Body(Box::new(error)))?,
            };
            match frame.into_data() {
                Ok(data) => self.put(data)?,
                Err(frame) => {
                    let trailer = frame.into_trailers().unwrap_or_default();
                    return self.end(&trailer);
                }
            }
            if self.body.is_end_stream() {
                return self.end(&header::HeaderMap::new());
            }
        }
        Ok(())
    }

    fn put(&mut self, data: Bytes) -> Result<(), ExchangeError> {
        // A chunk without bytes would be the last.
        if data.is_empty() {
            return Ok(());
        }
        match &mut self.frames {
            Frames::Length(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(ExchangeError::Length)?;
            }
            Frames::Chunked(_) => {
                let mut size = Vec::with_capacity(20);
                codec::write_size(&mut size, data.len());
                self.add(size.into());
                self.add(data);
                self.add(Bytes::from_static(b"\r\n"));
                return Ok(());
            }
        }
        self.add(data);
        Ok(())
    }

    fn add(&mut self, data: Bytes) {
        if self.pieces.is_empty() && data.len() < LARGE_PIECE {
            self.bytes.extend_from_slice(&data);
        } else {
            self.waiting += data.len();
            self.pieces.push_back(data);
        }
    }

    fn end(&mut self, trailer: &header::HeaderMap) -> Result<(), ExchangeError> {
        self.ended = true;
        match std::mem::replace(&mut self.frames, Frames::Length(0)) {
            Frames::Length(0) => Ok(()),
            Frames::Length(_) => Err(ExchangeError::Length),
            Frames::Chunked(announced) => {
                let mut end = Vec::new();
                codec::write_end(&mut end, &announced, trailer);
                self.add(end.into());
                Ok(())
            }
        }
    }

    /// Sends the rest beside an answer that has begun.
    async fn finish(mut self, mut stream: WriteHalf<Stream>, deadline: Deadline) {
        let mut clock = Clock::default();
        let sent = std::future::poll_fn(|context| {
            if let Poll::Ready(sent) = self.poll(context, &mut stream) {
                return Poll::Ready(sent);
            }
            while clock.poll(context, deadline.at()).is_ready() {
                if deadline.at() <= Instant::now() {
                    return Poll::Ready(Err(ExchangeError::Timeout));
                }
            }
            Poll::Pending
        });
        if let Err(error) = sent.await {
            tracing::debug!(error = weft_netstack::reconcile::chain(&error), "the rest of a request");
            // A request that ends too early must not look like one that is on its way.
            let _ = stream.shutdown().await;
        }
    }
}

/// An answer's body as it comes from a backend.
pub(super) enum Answer {
    One(Reading),
    /// Over HTTP/2.
    Shared(Incoming),
}

/// An answer that is being read.
pub(super) struct Reading {
    /// `None` once it was read.
    connection: Option<Box<Http1>>,
    framing: Framing,
    lasts: bool,
    waiting_since: Option<Instant>,
    was_spliced: bool,
}

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

impl Reading {
    fn poll(&mut self, context: &mut Context<'_>, patience: Duration) -> Polled {
        loop {
            let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
            let piece = self.framing.next(&mut connection.read).map_err(ExchangeError::from);
            match piece {
                Ok(Piece::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Piece::Trailer(fields)) => return Poll::Ready(Some(Ok(Frame::trailers(fields)))),
                Ok(Piece::End) => return Poll::Ready(None),
                Ok(Piece::More) => {}
                Err(error) => return self.broken(error),
            }
            match connection.poll_fill(context) {
                Poll::Ready(Ok(1..)) => self.waiting_since = None,
                Poll::Ready(Ok(0)) if self.framing == Framing::Close => {
                    self.connection = None;
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(0)) => return self.broken(ExchangeError::Cut),
                Poll::Ready(Err(error)) => return self.broken(error.into()),
                Poll::Pending => return self.poll_silence(context, patience).map(|error| Some(Err(error))),
            }
        }
    }

    /// As `poll`, for what is on a socket: takes what has come of it into a pipe, `None` where the kernel does not do that.
    fn poll_into(
        &mut self,
        context: &mut Context<'_>,
        patience: Duration,
        pipe: &mut Pipe,
    ) -> Poll<Result<Option<usize>, BodyError>> {
        let (Some(connection), Framing::Length(left)) = (&mut self.connection, &mut self.framing) else {
            return Poll::Ready(Ok(None));
        };
        let Stream::Plain(socket) = &connection.stream else { return Poll::Ready(Ok(None)) };
        let error = match pipe.poll_fill(context, socket, *left) {
            Poll::Ready(Ok(length @ 1..)) => {
                *left -= length as u64;
                (self.waiting_since, self.was_spliced) = (None, true);
                // The next answer's beginning is all that will be read of it.
                connection.read_bytes = READ_BYTES;
                return Poll::Ready(Ok(Some(length)));
            }
            Poll::Ready(Ok(0)) => ExchangeError::Cut,
            Poll::Ready(Err(error)) if splice::is_refusal(&error) => return Poll::Ready(Ok(None)),
            Poll::Ready(Err(error)) => error.into(),
            Poll::Pending => return self.poll_silence(context, patience).map(Err),
        };
        self.connection = None;
        Poll::Ready(Err(error.into()))
    }

    /// Nothing has come: until that has lasted for too long.
    fn poll_silence(&mut self, context: &mut Context<'_>, patience: Duration) -> Poll<BodyError> {
        let Some(connection) = &mut self.connection else { return Poll::Pending };
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        ready!(connection.clock.poll(context, since + patience));
        self.connection = None;
        Poll::Ready(BodyError::Timeout(patience))
    }

    /// What is left of it, where all that is to come on a socket, as it is.
    fn on_socket(&self) -> Option<u64> {
        let connection = self.connection.as_ref()?;
        let plain = connection.stream.socket().is_some() && connection.read.is_empty();
        self.framing.left().filter(|left| plain && *left > 0)
    }

    fn broken(&mut self, error: ExchangeError) -> Polled {
        self.connection = None;
        Poll::Ready(Some(Err(error.into())))
    }

    fn is_over(&mut self) -> bool {
        self.connection.as_mut().is_none_or(|connection| self.framing.is_over(&mut connection.read))
    }
}

impl Answer {
    /// The next of it; waits for no longer than `patience`.
    pub(super) fn poll(&mut self, context: &mut Context<'_>, patience: Duration) -> Polled {
        match self {
            Self::One(reading) => reading.poll(context, patience),
            Self::Shared(incoming) => {
                Pin::new(incoming).poll_frame(context).map(|frame| frame.map(|frame| Ok(frame?)))
            }
        }
    }

    /// What is left of it on a socket.
    pub(super) fn on_socket(&self) -> Option<u64> {
        match self {
            Self::One(reading) => reading.on_socket(),
            Self::Shared(_) => None,
        }
    }

    /// The next of what is on a socket, into a pipe; `None` where the kernel does not do that.
    pub(super) fn poll_into(
        &mut self,
        context: &mut Context<'_>,
        patience: Duration,
        pipe: &mut Pipe,
    ) -> Poll<Result<Option<usize>, BodyError>> {
        match self {
            Self::One(reading) => reading.poll_into(context, patience, pipe),
            Self::Shared(_) => Poll::Ready(Ok(None)),
        }
    }

    /// Whether all of it was taken.
    pub(super) fn is_over(&mut self) -> bool {
        match self {
            Self::One(reading) => reading.is_over(),
            Self::Shared(incoming) => incoming.is_end_stream(),
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self {
            Self::One(Reading { connection: None, .. }) => SizeHint::with_exact(0),
            Self::One(reading) => reading.framing.left().map_or_else(SizeHint::new, SizeHint::with_exact),
            Self::Shared(incoming) => incoming.size_hint(),
        }
    }

    /// The whole body, where it has come with the head.
    pub(super) fn whole(&mut self) -> Option<Bytes> {
        let Self::One(Reading { connection: Some(connection), framing: Framing::Length(left), .. }) = self
        else {
            return None;
        };
        let length = usize::try_from(*left).ok().filter(|length| *length <= connection.read.len())?;
        *left = 0;
        Some(connection.read.split_to(length).freeze())
    }

    /// The connection of an answer that was read, when it can take another request.
    pub(super) fn release(&mut self) -> Option<Box<Http1>> {
        let over = self.is_over();
        let Self::One(reading) = self else { return None };
        let lasts = reading.lasts && over;
        let connection = reading.connection.take_if(|_| over)?;
        // What follows a body that was spliced stands in the socket still.
        let nothing_follows = connection.read.is_empty() && (!reading.was_spliced || connection.is_open());
        (lasts && nothing_follows).then_some(connection)
    }

    /// The stream of an answer that changes the protocol, and what was read of it.
    pub(super) fn upgraded(self) -> Option<(Stream, Bytes)> {
        match self {
            Self::One(reading) => {
                let connection = *reading.connection?;
                Some((connection.stream, connection.read.freeze()))
            }
            Self::Shared(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Outlet for tokio::io::DuplexStream {}

    #[tokio::test]
    async fn the_kernel_knows_of_a_closed_connection_before_the_runtime_does() {
        let listener = std::net::TcpListener::bind((std::net::Ipv6Addr::LOCALHOST, 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut connection = Http1::new(Stream::Plain(stream));
        assert!(connection.is_quiet() && connection.is_open());
        drop(listener.accept().unwrap());
        assert!(connection.is_quiet(), "nobody has asked the kernel yet");
        assert!(!connection.is_open());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!connection.is_quiet());
    }

    /// Small and large pieces, to somebody who takes little at a time.
    #[tokio::test]
    async fn a_body_goes_out_as_it_came_in_either_framing() {
        let lengths = [3, 9_000, 1, 8_191, 8_192, 70_000, 5, 300_000, 0, 2];
        let pieces: Vec<Bytes> =
            lengths.iter().map(|length| vec![b'a' + (length % 7) as u8; *length].into()).collect();
        let whole = pieces.concat();
        for frames in [Frames::Length(whole.len() as u64), Frames::Chunked(Vec::new())] {
            let mut framing = match &frames {
                Frames::Length(length) => Framing::Length(*length),
                Frames::Chunked(_) => Framing::Chunked(codec::Chunks::default()),
            };
            let (sender, receiver) = tokio::sync::mpsc::channel(64);
            for piece in pieces.iter().cloned().map(Some).chain([None]) {
                sender.send(piece).await.unwrap();
            }
            let mut sending = Sending::new(Body::Copy(receiver), frames, b"head".to_vec());
            let (mut to, mut from) = tokio::io::duplex(1_000);
            let sent = async {
                std::future::poll_fn(|context| sending.poll(context, &mut to)).await.unwrap();
                drop(to);
            };
            let mut got = Vec::new();
            let ((), read) = tokio::join!(sent, from.read_to_end(&mut got));
            read.unwrap();
            let (mut buffer, mut body) = (BytesMut::from(got.strip_prefix(b"head").unwrap()), Vec::new());
            while let Piece::Data(data) = framing.next(&mut buffer).unwrap() {
                body.extend_from_slice(&data);
            }
            assert!(framing.is_over(&mut buffer) && buffer.is_empty());
            assert!(body == whole);
        }
    }

    /// What was read shows what follows; what was spliced leaves it in the socket.
    #[tokio::test]
    async fn a_connection_whose_answer_was_spliced_is_kept_only_if_nothing_follows() {
        for (follows, is_kept) in [("", true), ("H", false)] {
            let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let mut backend = listener.accept().await.unwrap().0;
            backend.write_all(follows.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut answer = Answer::One(Reading {
                connection: Some(Box::new(Http1::new(Stream::Plain(stream)))),
                framing: Framing::Length(0),
                lasts: true,
                waiting_since: None,
                was_spliced: true,
            });
            assert_eq!(answer.release().is_some(), is_kept, "{follows:?}");
        }
    }

    /// The head is out, a piece of the body was in a pipe when the kernel refused, and the rest is to come.
    #[tokio::test]
    async fn a_body_goes_on_by_writing_where_a_pipe_is_refused() {
        let mut sending = Sending::new(Body::text("and the rest"), Frames::Length(17), b"head ".to_vec());
        sending.way = Way::Spliced(Pipe::open().unwrap());
        sending.moved(Moved::Refused(b"held ".to_vec())).unwrap();
        let (mut to, mut from) = tokio::io::duplex(100);
        std::future::poll_fn(|context| sending.poll(context, &mut to)).await.unwrap();
        drop(to);
        let mut got = String::new();
        from.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "head held and the rest");
    }
}
