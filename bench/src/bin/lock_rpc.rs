//! etcd's own Lock RPC, as jetcd uses it, as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS.

use std::io::{BufRead, Write};
use std::time::Instant;

use etcd_client::{Client, LockOptions};

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

async fn run() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, endpoint, name, rounds] = args.as_slice() else { return Err("usage: WHAT ENDPOINT NAME ROUNDS".into()) };
    let mut client = Client::connect([endpoint], None).await?;
    let lease = client.lease_grant(60, None).await?.id();
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new())?;
    let mut took = Vec::new();
    for _ in 0..rounds.parse()? {
        let start = Instant::now();
        if what == "put" {
            client.put(name.as_str(), "x", None).await?;
        } else {
            let lock = client.lock(name.as_str(), Some(LockOptions::new().with_lease(lease))).await?;
            client.unlock(lock.key()).await?;
        }
        took.push(start.elapsed().as_nanos());
    }
    let mut out = std::io::stdout().lock();
    took.iter().try_for_each(|ns| writeln!(out, "enter 0 {ns}"))?;
    Ok(())
}
