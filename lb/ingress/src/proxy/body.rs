//! Bodies as they pass through: streamed, counted against a limit, and cut when the other side says nothing for too long.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::arriving::Arriving;
use super::exchange::{Answer, ExchangeError};
use super::forward::Release;
use super::log::Record;
use super::splice::Pipe;
use super::upload::{Fault, Turn, Upload};
use crate::annotations::Pace;

#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the body is longer than its limit")]
    TooLong,
    #[error("nothing came for {0:?}")]
    Timeout(Duration),
    #[error("the copy could not keep up")]
    GivenUp,
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    #[error(transparent)]
    Backend(#[from] ExchangeError),
}

/// A body on its way to a backend or to a client.
pub(super) enum Body {
    Empty,
    Text(Option<Bytes>),
    Request(Box<Limited>),
    Answer(Box<Timed>),
    /// Of a mirrored request: the pieces of the request's body as they pass.
    Copy(mpsc::Receiver<Piece>),
}

/// Of a copied body; `None` is its end, without which it is not whole.
pub(super) type Piece = Option<Bytes>;

/// How long after its beginning an answer of which so much was sent may go on.
fn due(pace: Pace, sent_bytes: u64) -> Duration {
    let beyond = sent_bytes.saturating_sub(pace.after_bytes);
    Duration::from_millis(beyond.saturating_mul(1000) / pace.bytes_per_second.max(1))
}

/// A request's body: at most `left` bytes of it pass, with no longer than `patience` between two pieces until the answer begins.
pub(super) struct Limited {
    inner: Arriving,
    left: u64,
    patience: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    upload: Upload,
    copy: Option<mpsc::Sender<Piece>>,
}

/// An answer's body: no longer than `patience` between two reads. What `held` keeps lives as long as the body is read.
pub(super) struct Timed {
    inner: Answer,
    over: bool,
    patience: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    held: Release,
    record: Option<Record>,
    paced: Option<Paced>,
}

/// An answer that is held back.
struct Paced {
    pace: Pace,
    begun: Instant,
    sent_bytes: u64,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Paced {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let due = due(self.pace, self.sent_bytes);
        if self.timer.is_none() && self.begun.elapsed() < due {
            self.timer = Some(Box::pin(tokio::time::sleep_until((self.begun + due).into())));
        }
        if let Some(timer) = &mut self.timer {
            ready!(timer.as_mut().poll(context));
            self.timer = None;
        }
        Poll::Ready(())
    }
}

impl Body {
    pub(super) fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()))
    }

    /// A limit of `None` is unlimited.
    pub(super) fn request(
        inner: Arriving,
        limit_bytes: Option<u64>,
        patience: Duration,
        upload: Upload,
        copy: Option<mpsc::Sender<Piece>>,
    ) -> Self {
        if inner.is_end_stream() {
            return Self::Empty;
        }
        let left = limit_bytes.unwrap_or(u64::MAX);
        Self::Request(Box::new(Limited { inner, left, patience, timer: None, upload, copy }))
    }

    pub(super) fn answer(mut inner: Answer, patience: Duration, pace: Option<Pace>, held: Release) -> Self {
        if inner.is_over() {
            held.end(&mut inner);
            return Self::Empty;
        }
        if pace.is_none()
            && let Some(whole) = inner.whole()
        {
            held.end(&mut inner);
            return Self::Text(Some(whole));
        }
        let paced = pace.map(|pace| Paced { pace, begun: Instant::now(), sent_bytes: 0, timer: None });
        Self::Answer(Box::new(Timed { inner, over: false, patience, timer: None, held, record: None, paced }))
    }

    /// The record ends with the last byte of the answer.
    pub(super) fn follow(&mut self, mut record: Record) {
        match self {
            Self::Answer(timed) => timed.record = Some(record),
            Self::Text(Some(text)) => record.sent_bytes = text.len() as u64,
            Self::Text(None) | Self::Empty | Self::Request(_) | Self::Copy(_) => {}
        }
    }

    /// What is left of it, where all that is to come on a socket and only its number of bytes matters.
    pub(super) fn on_socket(&self) -> Option<u64> {
        match self {
            Self::Answer(timed) if timed.paced.is_none() => timed.inner.on_socket(),
            _ => None,
        }
    }

    /// As `poll_frame`, for what is on a socket: the next of it goes into a pipe. `None` where the kernel does not do that.
    pub(super) fn poll_into(
        &mut self,
        context: &mut Context<'_>,
        pipe: &mut Pipe,
    ) -> Poll<Result<Option<usize>, BodyError>> {
        match self {
            Self::Answer(timed) => timed.poll_into(context, pipe),
            _ => Poll::Ready(Ok(None)),
        }
    }

    /// Nothing of it can be lost by sending it a second time.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

impl Limited {
    /// A copy that cannot keep up is given up.
    fn copied(&mut self, piece: Piece) {
        let is_end = piece.is_none();
        if self.copy.as_ref().is_some_and(|copy| copy.try_send(piece).is_err()) || is_end {
            self.copy = None;
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        let frame = match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(Some(Err(error))) => {
                self.upload.fail(Fault::Broken);
                return Poll::Ready(Some(Err(error.into())));
            }
            Poll::Ready(None) => {
                self.upload.turn(Turn::Over);
                self.copied(None);
                return Poll::Ready(None);
            }
            Poll::Pending => {
                self.upload.turn(Turn::Client);
                // Whoever waits for the rest of the answer waits for this too.
                if self.upload.is_answered() {
                    return Poll::Pending;
                }
                let patience = self.patience;
                let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                ready!(timer.as_mut().poll(context));
                self.upload.fail(Fault::Silent);
                self.inner.leave();
                return Poll::Ready(Some(Err(BodyError::Timeout(patience))));
            }
        };
        self.timer = None;
        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
        match self.left.checked_sub(length) {
            Some(left) => {
                self.left = left;
                let ended = self.inner.is_end_stream();
                self.upload.turn(if ended { Turn::Over } else { Turn::Backend });
                if let Some(data) = frame.data_ref() {
                    self.copied(Some(data.clone()));
                }
                if ended {
                    self.copied(None);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            None => {
                self.upload.fail(Fault::TooLong);
                Poll::Ready(Some(Err(BodyError::TooLong)))
            }
        }
    }
}

impl Timed {
    fn poll(&mut self, context: &mut Context<'_>) -> Polled {
        if let Some(paced) = &mut self.paced {
            ready!(paced.poll(context));
        }
        let polled = self.inner.poll(context, self.patience);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.timer = None;
            let length = frame.data_ref().map_or(0, |data| data.len() as u64);
            if let Some(paced) = &mut self.paced {
                paced.sent_bytes += length;
            }
            if let Some(record) = &mut self.record {
                record.sent_bytes += length;
            }
        }
        match &polled {
            Poll::Ready(Some(Ok(_))) if !self.inner.is_over() => polled,
            Poll::Ready(Some(Ok(_)) | None) => {
                self.end();
                polled
            }
            Poll::Ready(Some(Err(_))) => polled,
            // Over HTTP/1.1 the connection itself keeps the time.
            Poll::Pending if matches!(self.inner, Answer::One(_)) => polled,
            Poll::Pending => {
                let patience = self.patience;
                let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                ready!(timer.as_mut().poll(context));
                Poll::Ready(Some(Err(BodyError::Timeout(patience))))
            }
        }
    }

    fn poll_into(
        &mut self,
        context: &mut Context<'_>,
        pipe: &mut Pipe,
    ) -> Poll<Result<Option<usize>, BodyError>> {
        let taken = ready!(self.inner.poll_into(context, self.patience, pipe))?;
        if let (Some(record), Some(length)) = (&mut self.record, taken) {
            record.sent_bytes += length as u64;
            record.stats.spliced_bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
        if taken.is_some() && self.inner.is_over() {
            self.end();
        }
        Poll::Ready(Ok(taken))
    }

    fn end(&mut self) {
        self.over = true;
        self.held.end(&mut self.inner);
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
            Self::Copy(pieces) => Poll::Ready(match ready!(pieces.poll_recv(context)) {
                Some(Some(data)) => Some(Ok(Frame::data(data))),
                Some(None) => None,
                None => Some(Err(BodyError::GivenUp)),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Text(text) => text.is_none(),
            Self::Request(limited) => limited.inner.is_end_stream(),
            Self::Answer(timed) => timed.over,
            Self::Copy(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Self::Request(limited) => limited.inner.size_hint(),
            Self::Answer(timed) => timed.inner.size_hint(),
            Self::Copy(_) => SizeHint::default(),
        }
    }
}
