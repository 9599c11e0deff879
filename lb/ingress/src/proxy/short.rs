//! The short path of a client's HTTP/1.1: requests without a body that [`codec::request`] understands in one way only are answered here,
//! in one read and one write each. Anything else, malformed heads too, goes to hyper with the bytes that were read, and the rest of its
//! connection. What is decided about a request is [`answer`]'s, on either path.

use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf as _, BytesMut};
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use super::Worker;
use super::answer::{Peer, answer};
use super::arriving::Arriving;
use super::body::Body;
use super::codec::{self, Asked};
use super::exchange::{Clock, Sending};
use super::listen::Until;
use super::splice::Outlet;
use super::stats::Refused;

/// Of one read, in which most heads come whole.
const READ_BYTES: usize = 4 * 1024;
/// What is read of further requests while one is answered.
const MAX_AHEAD: usize = 16 * 1024;

/// A connection whose first bytes were read.
pub(super) struct Rest<S> {
    read: BytesMut,
    stream: S,
}

/// What a client did.
enum Heard {
    Plain(Box<Parts>, bool),
    Other,
    Slow,
    Gone,
}

/// Serves until the connection ends, or returns it with what hyper is to read.
pub(super) async fn serve<S>(worker: &Worker, stream: S, peer: &Peer, until: &Until) -> Option<Rest<S>>
where
    S: AsyncRead + Outlet,
{
    let mut quiet = pin!(until.clone().quiet());
    // Kept from request to request.
    let mut answering = Box::pin(None);
    let (mut rest, mut room, mut clock) =
        (Rest { read: BytesMut::new(), stream }, Vec::new(), Clock::default());
    loop {
        let since = Instant::now();
        let heard = std::future::poll_fn(|context| {
            loop {
                match codec::request(&mut rest.read) {
                    Asked::Plain(head, lasts) => return Poll::Ready(Heard::Plain(head, lasts)),
                    Asked::Other => return Poll::Ready(Heard::Other),
                    Asked::More => {}
                }
                match rest.poll_fill(context) {
                    Poll::Ready(Ok(1..)) => {}
                    Poll::Ready(_) => return Poll::Ready(Heard::Gone),
                    Poll::Pending if rest.read.is_empty() && quiet.as_mut().poll(context).is_ready() => {
                        return Poll::Ready(Heard::Gone);
                    }
                    Poll::Pending => {
                        return clock.poll(context, since + peer.patience.head).map(|()| Heard::Slow);
                    }
                }
            }
        });
        let (head, lasts) = match heard.await {
            Heard::Plain(head, lasts) => (head, lasts),
            Heard::Other => return Some(rest),
            Heard::Slow => {
                worker.proxy.standing.stats.refuse(Refused::Slow);
                return None;
            }
            Heard::Gone => break,
        };
        let is_head = head.method == Method::HEAD;
        let request = Request::from_parts(*head, Arriving::none());
        answering.set(Some(answer(worker, peer, request)));
        let answered = std::future::poll_fn(|context| {
            if let Some(answering) = answering.as_mut().as_pin_mut()
                && let Poll::Ready(response) = answering.poll(context)
            {
                return Poll::Ready(Some(response));
            }
            rest.poll_gone(context).map(|()| None)
        });
        let response = answered.await?;
        answering.set(None);
        let lasts = lasts && !until.has_come() && !closes(&response);
        let mut sending = sending(response, is_head, lasts, room);
        let sent = std::future::poll_fn(|context| {
            if let Poll::Ready(sent) = sending.poll(context, &mut rest.stream) {
                return Poll::Ready(sent.map(Some));
            }
            rest.poll_gone(context).map(|()| Ok(None))
        });
        match sent.await {
            Ok(Some(())) if lasts => room = sending.into_room(),
            Ok(Some(())) => break,
            Ok(None) => return None,
            Err(error) => {
                // What is cut short must not end like something whole.
                tracing::debug!(error = weft_netstack::reconcile::chain(&error), "connection");
                return None;
            }
        }
    }
    let _ = rest.stream.shutdown().await;
    None
}

fn closes(response: &Response<Body>) -> bool {
    response.headers().get(header::CONNECTION) == Some(&HeaderValue::from_static("close"))
}

fn sending(response: Response<Body>, is_head: bool, lasts: bool, mut room: Vec<u8>) -> Sending {
    let (head, body) = response.into_parts();
    let bodiless = is_head || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    // An empty body may be one that is not told, as in an answer to HEAD.
    let length = body.size_hint().exact().filter(|length| !bodiless || *length > 0);
    let frames = codec::write_answer(&mut room, &head, (!bodiless, length), lasts);
    Sending::new(if bodiless { Body::Empty } else { body }, frames, room)
}

impl<S: AsyncRead + Unpin> Rest<S> {
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut room = [const { MaybeUninit::uninit() }; READ_BYTES];
        let mut room = ReadBuf::uninit(&mut room);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut room))?;
        self.read.extend_from_slice(room.filled());
        Poll::Ready(Ok(room.filled().len()))
    }

    /// Whether the client closes its connection; what it sends is kept for later.
    fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.read.len() < MAX_AHEAD {
            if !matches!(ready!(self.poll_fill(context)), Ok(1..)) {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rest<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, into);
        }
        let length = self.read.len().min(into.remaining());
        into.put_slice(self.read.get(..length).unwrap_or_default());
        self.read.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rest<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
