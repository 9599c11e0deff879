//! Bodies as they pass through: streamed, counted against a limit, and cut when the other side says nothing for too long.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the body is longer than its limit")]
    TooLong,
    #[error("nothing came for {0:?}")]
    Timeout(Duration),
    #[error(transparent)]
    Broken(#[from] hyper::Error),
}

/// A body on its way to a backend or to a client.
pub(super) enum Body {
    Empty,
    Text(Option<Bytes>),
    Request(Limited),
    Answer(Box<Timed>),
}

/// A request's body: at most `left` bytes of it pass.
pub(super) struct Limited {
    inner: Incoming,
    left: u64,
    upload: Arc<Upload>,
}

/// What became of a request's body so far.
#[derive(Default)]
pub(super) struct Upload {
    /// The limit was exceeded.
    pub(super) exceeded: AtomicBool,
    /// Pieces that were read; while it grows, nobody waits for the backend.
    pub(super) pieces: AtomicU64,
}

/// An answer's body: no longer than `patience` between two reads. What `held` keeps lives as long as the body is read.
pub(super) struct Timed {
    inner: Incoming,
    patience: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    held: Box<dyn Held>,
}

/// Whoever wants to know that an answer was read to its end.
pub(super) trait Held: Send {
    fn complete(&mut self);
}

impl Body {
    pub(super) fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()))
    }

    /// A limit of `None` is unlimited.
    pub(super) fn request(inner: Incoming, limit_bytes: Option<u64>, upload: Arc<Upload>) -> Self {
        if inner.is_end_stream() {
            return Self::Empty;
        }
        Self::Request(Limited { inner, left: limit_bytes.unwrap_or(u64::MAX), upload })
    }

    pub(super) fn answer(inner: Incoming, patience: Duration, mut held: Box<dyn Held>) -> Self {
        if inner.is_end_stream() {
            held.complete();
            return Self::Empty;
        }
        Self::Answer(Box::new(Timed { inner, patience, timer: None, held }))
    }

    /// Nothing of it can be lost by sending it a second time.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

impl Limited {
    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        let frame = match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            None => return Poll::Ready(None),
        };
        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
        match self.left.checked_sub(length) {
            Some(left) => {
                self.left = left;
                self.upload.pieces.fetch_add(1, Ordering::Relaxed);
                Poll::Ready(Some(Ok(frame)))
            }
            None => {
                self.upload.exceeded.store(true, Ordering::Relaxed);
                Poll::Ready(Some(Err(BodyError::TooLong)))
            }
        }
    }
}

impl Timed {
    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                self.timer = None;
                if self.inner.is_end_stream() {
                    self.held.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => {
                self.held.complete();
                Poll::Ready(None)
            }
            Poll::Pending => {
                let patience = self.patience;
                let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                ready!(timer.as_mut().poll(context));
                Poll::Ready(Some(Err(BodyError::Timeout(patience))))
            }
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Polled {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Request(limited) => limited.poll(context),
            Self::Answer(timed) => timed.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Text(text) => text.is_none(),
            Self::Request(limited) => limited.inner.is_end_stream(),
            Self::Answer(timed) => timed.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Self::Request(limited) => limited.inner.size_hint(),
            Self::Answer(timed) => timed.inner.size_hint(),
        }
    }
}
