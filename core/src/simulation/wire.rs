//! The part of etcd's messages that core uses, as in etcd's `rpc.proto` and `kv.proto`, and gRPC's
//! framing of them.

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

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Header {
    #[prost(uint64, tag = "1")]
    pub(super) cluster_id: u64,
    #[prost(uint64, tag = "2")]
    pub(super) member_id: u64,
    #[prost(int64, tag = "3")]
    pub(super) revision: i64,
    #[prost(uint64, tag = "4")]
    pub(super) raft_term: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(int64, tag = "2")]
    pub(super) create_revision: i64,
    #[prost(int64, tag = "3")]
    pub(super) mod_revision: i64,
    #[prost(int64, tag = "4")]
    pub(super) version: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub(super) value: Vec<u8>,
    #[prost(int64, tag = "6")]
    pub(super) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) limit: i64,
    #[prost(int64, tag = "4")]
    pub(super) revision: i64,
    #[prost(int32, tag = "5")]
    pub(super) sort_order: i32,
    #[prost(int32, tag = "6")]
    pub(super) sort_target: i32,
    #[prost(bool, tag = "7")]
    pub(super) serializable: bool,
    #[prost(bool, tag = "8")]
    pub(super) keys_only: bool,
    #[prost(bool, tag = "9")]
    pub(super) count_only: bool,
    #[prost(int64, tag = "10")]
    pub(super) min_mod_revision: i64,
    #[prost(int64, tag = "11")]
    pub(super) max_mod_revision: i64,
    #[prost(int64, tag = "12")]
    pub(super) min_create_revision: i64,
    #[prost(int64, tag = "13")]
    pub(super) max_create_revision: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    #[prost(message, repeated, tag = "2")]
    pub(super) kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
    #[prost(int64, tag = "4")]
    pub(super) count: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PutResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DeleteRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) range_end: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DeleteResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(super) deleted: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RequestOp {
    #[prost(oneof = "Op", tags = "1, 2, 3, 4")]
    pub(super) op: Option<Op>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Op {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    Delete(DeleteRequest),
    #[prost(message, tag = "4")]
    Txn(TxnRequest),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ResponseOp {
    #[prost(oneof = "OpAnswer", tags = "1, 2, 3, 4")]
    pub(super) op: Option<OpAnswer>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum OpAnswer {
    #[prost(message, tag = "1")]
    Range(RangeResponse),
    #[prost(message, tag = "2")]
    Put(PutResponse),
    #[prost(message, tag = "3")]
    Delete(DeleteResponse),
    #[prost(message, tag = "4")]
    Txn(TxnResponse),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Compare {
    /// 0 equal, 1 greater, 2 less, 3 not equal.
    #[prost(int32, tag = "1")]
    pub(super) result: i32,
    /// 0 version, 1 create revision, 2 mod revision, 3 value, 4 lease.
    #[prost(int32, tag = "2")]
    pub(super) target: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) key: Vec<u8>,
    #[prost(int64, tag = "4")]
    pub(super) version: i64,
    #[prost(int64, tag = "5")]
    pub(super) create_revision: i64,
    #[prost(int64, tag = "6")]
    pub(super) mod_revision: i64,
    #[prost(bytes = "vec", tag = "64")]
    pub(super) range_end: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(super) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(super) failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    #[prost(bool, tag = "2")]
    pub(super) succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub(super) responses: Vec<ResponseOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GrantRequest {
    #[prost(int64, tag = "1")]
    pub(super) ttl: i64,
    #[prost(int64, tag = "2")]
    pub(super) id: i64,
}

/// The answer to a grant and to a renewal; a TTL of 0 says that the lease is not known.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LeaseResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(super) id: i64,
    #[prost(int64, tag = "3")]
    pub(super) ttl: i64,
}

/// To revoke or to renew it.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LeaseRequest {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct HeaderOnly {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchRequest {
    #[prost(oneof = "WatchOrder", tags = "1, 2, 3")]
    pub(super) order: Option<WatchOrder>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum WatchOrder {
    #[prost(message, tag = "1")]
    Create(WatchCreate),
    #[prost(message, tag = "2")]
    Cancel(WatchCancel),
    #[prost(message, tag = "3")]
    Progress(WatchProgress),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchCreate {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) start_revision: i64,
    /// 0 no puts, 1 no deletes.
    #[prost(int32, repeated, tag = "5")]
    pub(super) filters: Vec<i32>,
    #[prost(int64, tag = "7")]
    pub(super) watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchCancel {
    #[prost(int64, tag = "1")]
    pub(super) watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchProgress {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(super) watch_id: i64,
    #[prost(bool, tag = "3")]
    pub(super) created: bool,
    #[prost(bool, tag = "4")]
    pub(super) canceled: bool,
    #[prost(int64, tag = "5")]
    pub(super) compact_revision: i64,
    #[prost(string, tag = "6")]
    pub(super) cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub(super) events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// 0 put, 1 delete.
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) kv: Option<KeyValue>,
}

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
            let sign = ["=", ">", "<", "!="].get(compare.result as usize).unwrap_or(&"?");
            write!(f, " {}{sign}{}", text(&compare.key), compare.create_revision)?;
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
