//! The part of etcd's gRPC interface that we use: its messages, and a client for one member.
//!
//! Written by hand after etcd's `rpc.proto` and `kv.proto`, so that nobody who builds needs protoc.
//! The tags are the protocol's, which never change; what we do not use is left out, as protobuf
//! skips fields that it does not know.
//!
//! Nothing of core is used here: the tests look at etcd from outside with this file.

#![allow(missing_docs)] // of the messages: etcd's own documentation has them

use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::http;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;

/// Whatever carries requests to a member.
pub(crate) type Channel = tower::util::BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>;
type Token = MetadataValue<Ascii>;

/// etcd sends answers of any size, as of all keys below a name; tonic would take 4 MB.
const LARGEST_ANSWER: usize = 256 * 1024 * 1024;

/// One member of etcd. It logs in when it has to, and else does what it is told, once.
pub(crate) struct Client {
    channel: Channel,
    /// User and password.
    login: Option<(String, String)>,
    token: Mutex<Option<Token>>,
    logging_in: tokio::sync::Mutex<()>,
}

impl Client {
    /// A client that has logged in, if it has a user and etcd asks for one.
    pub(crate) async fn connect(channel: Channel, login: Option<(String, String)>) -> Result<Client, Status> {
        let client = Client { channel, login, token: Mutex::default(), logging_in: Default::default() };
        client.log_in(None).await?;
        Ok(client)
    }

    pub(crate) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
        self.ask("/etcdserverpb.KV/Range", request).await
    }

    pub(crate) async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        self.ask("/etcdserverpb.KV/Txn", request).await
    }

    pub(crate) async fn grant(&self, ttl: i64) -> Result<LeaseResponse, Status> {
        self.ask("/etcdserverpb.Lease/LeaseGrant", GrantRequest { ttl, id: 0 }).await
    }

    pub(crate) async fn revoke(&self, id: i64) -> Result<HeaderOnly, Status> {
        self.ask("/etcdserverpb.Lease/LeaseRevoke", LeaseRequest { id }).await
    }

    /// Of which only matters whose answer it is. It needs no permission, and no leader.
    pub(crate) async fn cluster(&self) -> Result<HeaderOnly, Status> {
        self.ask("/etcdserverpb.Cluster/MemberList", HeaderOnly::default()).await
    }

    /// One renewal on a stream of its own: nothing to rebuild when it breaks, and each may go to
    /// another member. A TTL of 0 in the answer says that the lease is gone.
    pub(crate) async fn renew(&self, id: i64) -> Result<LeaseResponse, Status> {
        // The stream of requests stays open until the answer is there: etcd's proxy takes its end for ours.
        let one = tokio_stream::once(LeaseRequest { id }).chain(tokio_stream::pending());
        let mut answers: Streaming<LeaseResponse> = self.stream("/etcdserverpb.Lease/LeaseKeepAlive", one).await?;
        answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended without an answer"))
    }

    /// Opens a stream for any number of watches.
    pub(crate) async fn watch(
        &self,
        requests: impl Stream<Item = WatchRequest> + Send + 'static,
    ) -> Result<Streaming<WatchResponse>, Status> {
        self.stream("/etcdserverpb.Watch/Watch", requests).await
    }

    /// Any request with one answer, by its path.
    pub(crate) async fn ask<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let token = self.token().clone();
        let again = self.login.is_some().then(|| request.clone());
        match (self.ask_once(path, request, token.clone()).await, again) {
            (Err(status), Some(again)) if wants_login(&status) => {
                self.log_in(token).await?;
                let token = self.token().clone();
                self.ask_once(path, again, token).await
            }
            (answer, _) => answer,
        }
    }

    /// Gets a new token, unless another request has done so meanwhile.
    pub(crate) async fn log_in(&self, stale: Option<Token>) -> Result<(), Status> {
        let Some((name, password)) = self.login.clone() else { return Ok(()) };
        let _one_at_a_time = self.logging_in.lock().await;
        if *self.token() != stale {
            return Ok(());
        }
        let request = AuthenticateRequest { name, password };
        let answer: Result<AuthenticateResponse, _> = self.ask_once("/etcdserverpb.Auth/Authenticate", request, None).await;
        let token = match answer {
            Ok(answer) => Some(answer.token.parse().map_err(|_| Status::internal("etcd's token is not ASCII"))?),
            // Then a user does no harm.
            Err(status) if status.message().contains("authentication is not enabled") => None,
            Err(status) => return Err(status),
        };
        *self.token() = token;
        Ok(())
    }

    /// The token of the latest login.
    pub(crate) fn token(&self) -> MutexGuard<'_, Option<Token>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask_once<Q, A>(&self, path: &'static str, request: Q, token: Option<Token>) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = http::uri::PathAndQuery::from_static(path);
        let answer = self.grpc().await?.unary(with_metadata(request, token), path, ProstCodec::default()).await?;
        Ok(answer.into_inner())
    }

    async fn stream<Q, A>(
        &self,
        path: &'static str,
        requests: impl Stream<Item = Q> + Send + 'static,
    ) -> Result<Streaming<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = http::uri::PathAndQuery::from_static(path);
        let token = self.token().clone();
        let answer = self.grpc().await?.streaming(with_metadata(requests, token.clone()), path, ProstCodec::default()).await;
        if let Err(status) = &answer
            && wants_login(status)
        {
            // For the next one: the requests are with the stream.
            self.log_in(token).await?;
        }
        Ok(answer?.into_inner())
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        grpc.ready().await?;
        Ok(grpc)
    }
}

fn with_metadata<T>(request: T, token: Option<Token>) -> tonic::Request<T> {
    let mut request = tonic::Request::new(request);
    // A member without a leader refuses instead of waiting for one.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    request
}

/// The token has run out, or authentication was switched on after the login.
fn wants_login(status: &Status) -> bool {
    status.code() == Code::Unauthenticated || status.message().contains("user name is empty")
}

/// The end of the range of all keys with a prefix, as etcd counts it: `\0` is the end of all keys.
pub(crate) fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    match prefix.iter().rposition(|&byte| byte < 0xff) {
        Some(last) => [&prefix[..last], &[prefix[last] + 1]].concat(),
        None => vec![0],
    }
}

impl RangeRequest {
    pub(crate) fn key(key: impl Into<Vec<u8>>) -> Self {
        RangeRequest { key: key.into(), ..Default::default() }
    }

    /// All keys with a prefix; all keys there are if it is empty.
    pub(crate) fn prefix(prefix: &str) -> Self {
        let key = if prefix.is_empty() { vec![0] } else { prefix.into() };
        RangeRequest { key, range_end: end_of_prefix(prefix.as_bytes()), ..Default::default() }
    }

    pub(crate) fn keys_only(mut self) -> Self {
        self.keys_only = true;
        self
    }

    pub(crate) fn limit(mut self, limit: i64) -> Self {
        self.limit = limit;
        self
    }

    /// By create revision.
    pub(crate) fn newest_first(mut self) -> Self {
        (self.sort_order, self.sort_target) = (2, 2);
        self
    }
}

impl Compare {
    pub(crate) fn create_revision(key: impl Into<Vec<u8>>, sign: Sign, revision: i64) -> Self {
        let with = Some(With::CreateRevision(revision));
        Compare { sign: sign as i32, target: 1, key: key.into(), with, range_end: Vec::new() }
    }

    /// For every key with the prefix; where there is none, it compares as zero.
    pub(crate) fn of_all_below(mut self) -> Self {
        self.range_end = end_of_prefix(&self.key);
        self
    }
}

impl From<RangeRequest> for RequestOp {
    fn from(range: RangeRequest) -> Self {
        RequestOp { op: Some(Op::Range(range)) }
    }
}

impl RequestOp {
    pub(crate) fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>, lease: i64) -> Self {
        RequestOp { op: Some(Op::Put(PutRequest { key: key.into(), value: value.into(), lease })) }
    }

    pub(crate) fn delete(key: impl Into<Vec<u8>>) -> Self {
        RequestOp { op: Some(Op::Delete(DeleteRequest { key: key.into(), range_end: Vec::new() })) }
    }

    pub(crate) fn txn(txn: TxnRequest) -> Self {
        RequestOp { op: Some(Op::Txn(txn)) }
    }
}

impl TxnRequest {
    pub(crate) fn when(conditions: impl Into<Vec<Compare>>) -> Self {
        TxnRequest { compare: conditions.into(), ..Default::default() }
    }

    pub(crate) fn and_then(mut self, ops: impl Into<Vec<RequestOp>>) -> Self {
        self.success = ops.into();
        self
    }

    pub(crate) fn or_else(mut self, ops: impl Into<Vec<RequestOp>>) -> Self {
        self.failure = ops.into();
        self
    }
}

impl TxnResponse {
    /// The reads in it, in their order.
    pub(crate) fn reads(&self) -> impl Iterator<Item = &RangeResponse> {
        self.responses.iter().filter_map(|one| match &one.op {
            Some(OpAnswer::Range(read)) => Some(read),
            _ => None,
        })
    }
}

impl Event {
    /// Anything else but a put and a delete is from a future etcd.
    pub(crate) fn is_delete(&self) -> bool {
        self.kind == 1
    }

    pub(crate) fn is_put(&self) -> bool {
        self.kind == 0
    }
}

impl WatchRequest {
    /// From now on if it has no start revision.
    pub(crate) fn create(create: WatchCreate) -> Self {
        WatchRequest { order: Some(WatchOrder::Create(create)) }
    }

    pub(crate) fn cancel(watch_id: i64) -> Self {
        WatchRequest { order: Some(WatchOrder::Cancel(WatchCancel { watch_id })) }
    }

    pub(crate) fn progress() -> Self {
        WatchRequest { order: Some(WatchOrder::Progress(WatchProgress {})) }
    }
}

// ---- the messages ------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Header {
    #[prost(uint64, tag = "1")]
    pub(crate) cluster_id: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) member_id: u64,
    #[prost(int64, tag = "3")]
    pub(crate) revision: i64,
    #[prost(uint64, tag = "4")]
    pub(crate) raft_term: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(int64, tag = "2")]
    pub(crate) create_revision: i64,
    #[prost(int64, tag = "3")]
    pub(crate) mod_revision: i64,
    #[prost(int64, tag = "4")]
    pub(crate) version: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) value: Vec<u8>,
    #[prost(int64, tag = "6")]
    pub(crate) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(crate) limit: i64,
    #[prost(int64, tag = "4")]
    pub(crate) revision: i64,
    #[prost(int32, tag = "5")]
    pub(crate) sort_order: i32,
    #[prost(int32, tag = "6")]
    pub(crate) sort_target: i32,
    #[prost(bool, tag = "7")]
    pub(crate) serializable: bool,
    #[prost(bool, tag = "8")]
    pub(crate) keys_only: bool,
    #[prost(bool, tag = "9")]
    pub(crate) count_only: bool,
    #[prost(int64, tag = "10")]
    pub(crate) min_mod_revision: i64,
    #[prost(int64, tag = "11")]
    pub(crate) max_mod_revision: i64,
    #[prost(int64, tag = "12")]
    pub(crate) min_create_revision: i64,
    #[prost(int64, tag = "13")]
    pub(crate) max_create_revision: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub(crate) more: bool,
    #[prost(int64, tag = "4")]
    pub(crate) count: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(crate) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PutResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DeleteRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) range_end: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DeleteResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(crate) deleted: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RequestOp {
    #[prost(oneof = "Op", tags = "1, 2, 3, 4")]
    pub(crate) op: Option<Op>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Op {
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
pub(crate) struct ResponseOp {
    #[prost(oneof = "OpAnswer", tags = "1, 2, 3, 4")]
    pub(crate) op: Option<OpAnswer>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum OpAnswer {
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
pub(crate) struct Compare {
    /// A [`Sign`].
    #[prost(int32, tag = "1")]
    pub(crate) sign: i32,
    /// What is compared: 0 the version, 1 the create revision, 2 the mod revision, 3 the value, 4 the lease.
    #[prost(int32, tag = "2")]
    pub(crate) target: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) key: Vec<u8>,
    #[prost(oneof = "With", tags = "4, 5, 6, 8")]
    pub(crate) with: Option<With>,
    #[prost(bytes = "vec", tag = "64")]
    pub(crate) range_end: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, prost::Oneof)]
pub(crate) enum With {
    #[prost(int64, tag = "4")]
    Version(i64),
    #[prost(int64, tag = "5")]
    CreateRevision(i64),
    #[prost(int64, tag = "6")]
    ModRevision(i64),
    #[prost(int64, tag = "8")]
    Lease(i64),
}

#[derive(Clone, Copy)]
pub(crate) enum Sign {
    Equal = 0,
    Greater = 1,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(bool, tag = "2")]
    pub(crate) succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub(crate) responses: Vec<ResponseOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct GrantRequest {
    #[prost(int64, tag = "1")]
    pub(crate) ttl: i64,
    #[prost(int64, tag = "2")]
    pub(crate) id: i64,
}

/// The answer to a grant and to a renewal; a TTL of 0 says that the lease is not known.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeaseResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(crate) id: i64,
    #[prost(int64, tag = "3")]
    pub(crate) ttl: i64,
}

/// To revoke or to renew it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeaseRequest {
    #[prost(int64, tag = "1")]
    pub(crate) id: i64,
}

/// An answer of which nothing else matters.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct HeaderOnly {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, Message)]
struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    token: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WatchRequest {
    #[prost(oneof = "WatchOrder", tags = "1, 2, 3")]
    pub(crate) order: Option<WatchOrder>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum WatchOrder {
    #[prost(message, tag = "1")]
    Create(WatchCreate),
    #[prost(message, tag = "2")]
    Cancel(WatchCancel),
    #[prost(message, tag = "3")]
    Progress(WatchProgress),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WatchCreate {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(crate) start_revision: i64,
    /// 0 no puts, 1 no deletes.
    #[prost(int32, repeated, tag = "5")]
    pub(crate) filters: Vec<i32>,
    #[prost(int64, tag = "7")]
    pub(crate) watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WatchCancel {
    #[prost(int64, tag = "1")]
    pub(crate) watch_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WatchProgress {}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<Header>,
    #[prost(int64, tag = "2")]
    pub(crate) watch_id: i64,
    #[prost(bool, tag = "3")]
    pub(crate) created: bool,
    #[prost(bool, tag = "4")]
    pub(crate) canceled: bool,
    #[prost(int64, tag = "5")]
    pub(crate) compact_revision: i64,
    #[prost(string, tag = "6")]
    pub(crate) cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub(crate) events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Event {
    /// 0 put, 1 delete.
    #[prost(int32, tag = "1")]
    pub(crate) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(crate) kv: Option<KeyValue>,
}
