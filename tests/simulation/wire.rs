//! gRPC's framing of etcd's messages, and what the simulation says about them.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use http_body_util::BodyExt;
use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderValue, Response};
use tonic::{Code, Status};

pub(super) use crate::store::etcd::api::*;

impl TxnRequest {
    fn ops(&self) -> impl Iterator<Item = &Op> {
        self.success.iter().chain(&self.failure).filter_map(|op| op.op.as_ref())
    }

    /// Whether any member may answer it from what it has.
    pub(super) fn is_serializable(&self) -> bool {
        self.ops().all(|op| matches!(op, Op::Range(range) if range.serializable))
    }

    pub(super) fn puts(&self) -> bool {
        self.ops().any(|op| match op {
            Op::Txn(nested) => nested.puts(),
            other => matches!(other, Op::Put(_)),
        })
    }
}

impl std::fmt::Display for TxnRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |key| String::from_utf8_lossy(key).into_owned();
        f.write_str("if")?;
        for compare in &self.compare {
            let sign = ["=", ">", "<", "!="].get(compare.sign as usize).unwrap_or(&"?");
            let Some(With::Version(wanted) | With::CreateRevision(wanted) | With::ModRevision(wanted) | With::Lease(wanted)) =
                compare.with
            else {
                continue;
            };
            write!(f, " {}{sign}{wanted}", text(&compare.key))?;
        }
        for (branch, ops) in [("then", &self.success), ("else", &self.failure)] {
            write!(f, " {branch}")?;
            for op in ops {
                match &op.op {
                    Some(Op::Range(range)) => write!(f, " get {}", text(&range.key))?,
                    Some(Op::Put(put)) => write!(f, " put {}", text(&put.key))?,
                    Some(Op::Delete(delete)) => write!(f, " delete {}", text(&delete.key))?,
                    _ => f.write_str(" ...")?,
                }
            }
        }
        Ok(())
    }
}

/// The next message of a request, encoded; `None` at its end.
pub(super) async fn next_frame(body: &mut Body, rest: &mut BytesMut) -> Option<Bytes> {
    loop {
        if rest.len() >= 5 {
            let length = (&rest[1..5]).get_u32() as usize;
            if rest.len() >= 5 + length {
                return Some(rest.split_to(5 + length).freeze().slice(5..));
            }
        }
        match body.frame().await? {
            Ok(frame) => rest.extend_from_slice(frame.data_ref()?),
            Err(_) => return None,
        }
    }
}

pub(super) fn framed(message: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len() as u32);
    message.encode(&mut bytes).expect("the buffer grows");
    bytes.freeze()
}

/// An answer of one message, or a refusal.
pub(super) fn answer(result: Result<Bytes, Status>) -> Response<Body> {
    match result {
        Ok(bytes) => {
            let stream = Stream::default();
            stream.push(Instant::now(), Ok(bytes));
            stream.push(Instant::now(), Err(Status::ok("")));
            stream.response()
        }
        Err(status) => status.into_http(),
    }
}

/// A stream of answers, each with the time at which it arrives.
#[derive(Clone, Default)]
pub(super) struct Stream(Arc<Mutex<Queue>>);

#[derive(Default)]
struct Queue {
    /// In the order of arrival; those of one time in the order of sending.
    arriving: std::collections::BTreeMap<(Instant, u64), Result<Bytes, Status>>,
    sent: u64,
    waker: Option<Waker>,
    reader_is_gone: bool,
}

impl Stream {
    /// Sends a message, or the status that ends the stream.
    pub(super) fn push(&self, arrives: Instant, what: Result<Bytes, Status>) {
        let mut queue = self.queue();
        queue.sent += 1;
        let key = (arrives, queue.sent);
        queue.arriving.insert(key, what);
        if let Some(waker) = queue.waker.take() {
            drop(queue);
            waker.wake();
        }
    }

    /// What has not arrived by now never will, and then the stream breaks.
    pub(super) fn break_off(&self) {
        let now = Instant::now();
        self.queue().arriving.retain(|(arrives, _), _| *arrives <= now);
        self.push(now, Err(Status::new(Code::Unavailable, "the connection was reset")));
    }

    /// What has not arrived by now never will.
    pub(super) fn fall_silent(&self) {
        let now = Instant::now();
        self.queue().arriving.retain(|(arrives, _), _| *arrives <= now);
    }

    pub(super) fn is_unread(&self) -> bool {
        self.queue().reader_is_gone
    }

    pub(super) fn response(&self) -> Response<Body> {
        let body = Body::new(StreamBody { stream: self.clone(), sleep: None });
        let mut response = Response::new(body);
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct StreamBody {
    stream: Stream,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        let mut queue = self.stream.queue();
        queue.reader_is_gone = true;
        queue.arriving.clear();
    }
}

impl tonic::codegen::Body for StreamBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let mut queue = this.stream.queue();
        queue.waker = Some(cx.waker().clone());
        let Some((&(arrives, _), _)) = queue.arriving.first_key_value() else { return Poll::Pending };
        if arrives > Instant::now() {
            drop(queue);
            let mut sleep = Box::pin(tokio::time::sleep_until(arrives));
            if sleep.as_mut().poll(cx).is_pending() {
                this.sleep = Some(sleep);
                return Poll::Pending;
            }
            queue = this.stream.queue();
        }
        let Some((_, what)) = queue.arriving.pop_first() else { return Poll::Pending };
        Poll::Ready(Some(match what {
            Ok(bytes) => Ok(http_body::Frame::data(bytes)),
            Err(status) if status.code() == Code::Ok => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                Ok(http_body::Frame::trailers(trailers))
            }
            Err(status) => Err(status),
        }))
    }
}
