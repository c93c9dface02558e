//! etcd's own Lock RPC, as jetcd uses it, as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS.

#[path = "../../../core/src/store/etcd/api.rs"]
#[allow(dead_code)]
mod api;

use std::io::{BufRead, Write};
use std::time::Instant;

use api::{Client, HeaderOnly, RequestOp, TxnRequest};
use prost::Message;
use tonic::Status;
use tonic::transport::Endpoint;
use tower::ServiceExt;

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

/// After etcd's `v3lock.proto`.
#[derive(Clone, PartialEq, Message)]
struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LockResponse {
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

async fn run() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, endpoint, name, rounds] = args.as_slice() else { return Err("usage: WHAT ENDPOINT NAME ROUNDS".into()) };
    let channel = Endpoint::from_shared(format!("http://{endpoint}"))?.connect().await?;
    let channel = api::Channel::new(channel.map_err(|error| Status::from_error(error.into())));
    let client = Client::connect(channel, None).await?;
    let lease = client.grant(60).await?.id;
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new())?;
    let mut took = Vec::new();
    for _ in 0..rounds.parse()? {
        let start = Instant::now();
        if what == "put" {
            client.txn(TxnRequest::default().and_then([RequestOp::put(name.as_str(), "x", 0)])).await?;
        } else {
            let request = LockRequest { name: name.as_str().into(), lease };
            let LockResponse { key } = client.ask("/v3lockpb.Lock/Lock", request).await?;
            let _: HeaderOnly = client.ask("/v3lockpb.Lock/Unlock", UnlockRequest { key }).await?;
        }
        took.push(start.elapsed().as_nanos());
    }
    let mut out = std::io::stdout().lock();
    took.iter().try_for_each(|ns| writeln!(out, "enter 0 {ns}"))?;
    Ok(())
}
