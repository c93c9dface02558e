//! The TCP connection, with small writes put together.
//!
//! The HTTP/2 layer writes the headers of a request and its body one after the other, which wakes
//! the server twice. Here a flush waits for one turn of the scheduler: what other tasks write in
//! that turn goes out with it, in one system call.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

/// More than this is written without waiting for more.
const ENOUGH: usize = 16 * 1024;

/// Connects, with the endpoint's TLS and time limit. A connection that breaks is made again by
/// itself; each is told to `connected`.
pub(super) async fn connect(
    endpoint: &Endpoint,
    connected: impl Fn() + Clone + Send + 'static,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |uri: Uri| {
        let connected = connected.clone();
        async move {
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            // A name with several addresses: each is tried.
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(2379))).await?;
            stream.set_nodelay(true)?;
            connected();
            io::Result::Ok(TokioIo::new(Gathering { stream, waiting: Vec::new(), turn: Turn::Idle }))
        }
    });
    endpoint.connect_with_connector(connector).await
}

struct Gathering {
    stream: TcpStream,
    waiting: Vec<u8>,
    turn: Turn,
}

#[derive(PartialEq)]
enum Turn {
    Idle,
    /// A flush was asked for and waits for the next turn.
    Waiting,
    /// The turn has come.
    Writing,
}

impl Gathering {
    fn write_all(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut written = 0;
        let result = loop {
            if written == self.waiting.len() {
                break Poll::Ready(Ok(()));
            }
            match Pin::new(&mut self.stream).poll_write(cx, &self.waiting[written..]) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => written += n,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.waiting.drain(..written);
        result
    }
}

impl AsyncWrite for Gathering {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.waiting.len() >= ENOUGH {
            ready!(self.write_all(cx))?;
        }
        self.waiting.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if self.turn == Turn::Idle {
            self.turn = Turn::Waiting;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.turn = Turn::Writing;
        ready!(self.write_all(cx))?;
        self.turn = Turn::Idle;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_all(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for Gathering {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}
