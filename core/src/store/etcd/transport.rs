//! The TCP connection, with small writes put together.
//!
//! The HTTP/2 layer writes the headers of a request and its body one after the other, which wakes
//! the server twice. Here a flush waits for one turn of the scheduler: what other tasks write in
//! that turn goes out with it, in one system call.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

/// More than this is written without waiting for more.
const ENOUGH: usize = 16 * 1024;
/// RFC 8305 gives each address a quarter of a second.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

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
            let addresses = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(2379))).await?;
            let stream = connect_to_any(addresses.collect()).await?;
            stream.set_nodelay(true)?;
            connected();
            io::Result::Ok(TokioIo::new(Gathering { stream, waiting: Vec::new(), turn: Turn::Idle }))
        }
    });
    endpoint.connect_with_connector(connector).await
}

/// Each address of a name gets its turn, soon after the one before and without giving up on that: one that swallows packets must
/// not keep us from the next.
async fn connect_to_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut waiting = addresses.into_iter();
    let mut attempts = JoinSet::new();
    let mut trouble = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        match waiting.next() {
            Some(address) => drop(attempts.spawn(TcpStream::connect(address))),
            None if attempts.is_empty() => return Err(trouble),
            None => {}
        }
        tokio::select! {
            biased;
            Some(done) = attempts.join_next() => match done {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => trouble = error,
                Err(_) => {}
            },
            () = tokio::time::sleep(NEXT_ADDRESS), if waiting.len() > 0 => {}
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn row_47_an_address_that_swallows_packets_or_refuses_does_not_keep_us_from_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        // Its queue is full, so the system drops what comes; and one where nobody listens.
        let swallows = full_listener();
        let refuses = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for addresses in [
            vec![swallows.address, good],
            vec![refuses, good],
            vec![good, swallows.address],
            vec![refuses, swallows.address, good],
        ] {
            let stream = runtime.block_on(connect_to_any(addresses)).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), good);
        }
        let error = runtime.block_on(connect_to_any(vec![refuses])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(runtime.block_on(connect_to_any(Vec::new())).is_err());
    }

    struct Full {
        address: SocketAddr,
        _listener: TcpListener,
        _clients: Vec<std::net::TcpStream>,
    }

    fn full_listener() -> Full {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients = Vec::new();
        // Nobody accepts: at some time the next connection gets no answer.
        while let Ok(client) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
            clients.push(client);
            assert!(clients.len() < 10_000, "the queue of the listener has no end");
        }
        Full { address, _listener: listener, _clients: clients }
    }
}
