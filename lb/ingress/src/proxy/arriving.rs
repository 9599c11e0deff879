//! A request's body while the client sends it. What nobody wants of it is taken and thrown away for a moment longer, so that a client
//! that is still sending reads its answer before it meets a closed connection or stream (nginx's lingering_close).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::EXPECT;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::runtime::Handle;

const LINGER: Duration = Duration::from_secs(1);

pub(super) struct Arriving {
    /// `None` once it ended or broke.
    inner: Option<Incoming>,
    /// A client that waits for 100 (Continue) sends nothing, unless it is asked.
    lingers: bool,
}

impl Arriving {
    pub(super) fn of(request: Request<Incoming>) -> Request<Self> {
        let lingers = !request.headers().contains_key(EXPECT);
        request.map(|inner| Self { inner: Some(inner), lingers })
    }

    /// Of a request that has none.
    pub(super) fn none() -> Self {
        Self { inner: None, lingers: false }
    }

    /// Nothing more is expected of the client.
    pub(super) fn leave(&mut self) {
        self.lingers = false;
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let polled = Pin::new(inner).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.inner = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let unread = self.inner.take().filter(|inner| self.lingers && !inner.is_end_stream());
        // Without a runtime the process ends.
        if let (Some(mut unread), Ok(runtime)) = (unread, Handle::try_current()) {
            runtime.spawn(tokio::time::timeout(LINGER, async move {
                while let Some(Ok(_)) =
                    std::future::poll_fn(|context| Pin::new(&mut unread).poll_frame(context)).await
                {
                }
            }));
        }
    }
}
