//! etcd seen and changed from outside, for the tests of several files.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, DeleteOptions, EventType, GetOptions, WatchOptions};
use etcdlock::blocking::{Hold, Session};
use etcdlock::{Loss, Options};
use etcdlock_rig::Etcd;

/// Only a hang takes this long.
pub const LONG: Duration = Duration::from_secs(30);

pub fn connect(etcd: &Etcd, ttl: u64) -> Session {
    connect_at(&etcd.endpoint(), ttl)
}

/// A session that shares nothing with those of [`connect`], as if it were in another process.
pub fn connect_apart(etcd: &Etcd, ttl: u64) -> Session {
    connect_at(&etcd.endpoint().replace("127.0.0.1", "localhost"), ttl)
}

pub fn connect_at(target: &str, ttl: u64) -> Session {
    Session::connect(target, Options::default().ttl(Duration::from_secs(ttl))).expect("a session")
}

/// A session of its own connections, apart from those of all other numbers. Sessions share them only
/// if their options for it are the same, and a plain connection does not use this one.
pub fn connect_nth(target: &str, ttl: u64, n: usize) -> Session {
    let options = Options::default().ttl(Duration::from_secs(ttl)).server_name(format!("number-{n}"));
    Session::connect(target, options).expect("a session")
}

pub struct Outside {
    pub runtime: tokio::runtime::Runtime,
    pub client: Client,
}

impl Outside {
    pub fn of(etcd: &Etcd) -> Outside {
        Self::at(&etcd.endpoint(), None)
    }

    pub fn at(endpoint: &str, options: Option<ConnectOptions>) -> Outside {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(Client::connect([endpoint], options)).unwrap();
        Outside { runtime, client }
    }

    pub fn revision(&mut self) -> i64 {
        self.runtime.block_on(self.client.get("x", None)).unwrap().header().unwrap().revision()
    }

    /// Keys under a prefix, with their leases, oldest first.
    pub fn keys(&mut self, prefix: &str) -> Vec<(String, i64)> {
        self.keys_with_tokens(prefix).into_iter().map(|(key, lease, _)| (key, lease)).collect()
    }

    pub fn keys_with_tokens(&mut self, prefix: &str) -> Vec<(String, i64, i64)> {
        let answer = self.runtime.block_on(self.client.get(prefix, Some(GetOptions::new().with_prefix()))).unwrap();
        let mut kvs = answer.kvs().to_vec();
        kvs.sort_by_key(|kv| kv.create_revision());
        kvs.iter().map(|kv| (kv.key_str().unwrap().to_owned(), kv.lease(), kv.create_revision())).collect()
    }

    pub fn value(&mut self, key: &str) -> Option<String> {
        let answer = self.runtime.block_on(self.client.get(key, None)).unwrap();
        answer.kvs().first().map(|kv| kv.value_str().unwrap().to_owned())
    }

    pub fn delete_all(&mut self, prefix: &str) {
        self.runtime.block_on(self.client.delete(prefix, Some(DeleteOptions::new().with_prefix()))).unwrap();
    }

    pub fn revoke(&mut self, lease: i64) {
        self.runtime.block_on(self.client.lease_revoke(lease)).unwrap();
    }
}

/// The moments at which keys under a prefix are deleted, as an observer with a connection of its own
/// sees them.
pub fn deletions(endpoint: &str, prefix: &str) -> mpsc::Receiver<(String, Instant)> {
    let (tx, rx) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let (endpoint, prefix) = (endpoint.to_owned(), prefix.to_owned());
    std::thread::spawn(move || {
        let mut outside = Outside::at(&endpoint, None);
        outside.runtime.block_on(async {
            let mut stream = outside.client.watch(prefix, Some(WatchOptions::new().with_prefix())).await.unwrap();
            ready.send(()).unwrap();
            while let Ok(Some(answer)) = stream.message().await {
                for event in answer.events().iter().filter(|event| event.event_type() == EventType::Delete) {
                    let key = event.kv().unwrap().key_str().unwrap().to_owned();
                    if tx.send((key, Instant::now())).is_err() {
                        return;
                    }
                }
            }
        });
    });
    is_ready.recv_timeout(LONG).expect("the observer watches");
    rx
}

/// Says that something is not tried here. Not with `println`, which the test harness keeps to itself.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// `target/release`, where cargo has put the examples that the tests run.
pub fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("examples").join(name)
}

pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn losses(hold: &Hold) -> mpsc::Receiver<Loss> {
    let (tx, rx) = mpsc::channel();
    hold.on_lost(move |loss| tx.send(loss).unwrap());
    rx
}
