//! The end of an HTTP/2 connection: what the client sends meanwhile (acknowledgements, windows) is read and thrown away, because bytes
//! that arrive at a closed socket make the kernel send a reset, which may overtake the answers that were sent last (nginx's lingering_close).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio_rustls::server::TlsStream;

/// Without a word; a client that is still reading a large answer sends windows.
const SILENCE: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// Dropped, it waits for the client's end.
pub(super) struct Lingering {
    stream: Option<TlsStream<TcpStream>>,
    /// For who waits until the connection has ended.
    open: Option<Arc<()>>,
}

impl Lingering {
    pub(super) fn new(stream: TlsStream<TcpStream>, open: Option<Arc<()>>) -> Self {
        Self { stream: Some(stream), open }
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TlsStream<TcpStream>>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        // Without a runtime the process ends.
        let (Some(stream), Ok(runtime)) = (self.stream.take(), Handle::try_current()) else { return };
        let (mut stream, session) = stream.into_inner();
        drop(session);
        let open = self.open.take();
        runtime.spawn(async move {
            let mut piece = [0; 512];
            let ended = async {
                let mut heard = 1;
                while heard > 0 {
                    let read = tokio::time::timeout(SILENCE, stream.read(&mut piece)).await;
                    heard = read.map_or(0, |read| read.unwrap_or(0));
                }
            };
            let _ = tokio::time::timeout(LONGEST, ended).await;
            drop((stream, open));
        });
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(context, into)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(context)
    }
}
