//! etcd seen and changed from outside, for the tests of several files.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

#[path = "../../src/store/etcd/api.rs"]
mod api;

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use api::{Client, Event, HeaderOnly, RangeRequest, RequestOp, TxnRequest, WatchCreate, WatchRequest, end_of_prefix};
use etcdlock::blocking::{Hold, Session};
use etcdlock::{Loss, Options};
use etcdlock_rig::{Cluster, Etcd};
use prost::Message;
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tower::ServiceExt;

/// Only a hang takes this long.
pub const LONG: Duration = Duration::from_secs(60);

pub fn connect(etcd: &Etcd, ttl: u64) -> Session {
    connect_at(&etcd.endpoint(), ttl)
}

/// A session that shares nothing with those of [`connect`], as if it were in another process.
pub fn connect_apart(etcd: &Etcd, ttl: u64) -> Session {
    connect_at(&etcd.endpoint().replace("127.0.0.1", "localhost"), ttl)
}

pub fn connect_at(target: &str, ttl: u64) -> Session {
    let options = Options::default().ttl(Duration::from_secs(ttl)).connect_timeout(LONG);
    Session::connect(target, options).expect("a session")
}

/// A session of its own connections, apart from those of all other numbers. Sessions share them only
/// if their options for it are the same, and a plain connection does not use this one.
pub fn connect_nth(target: &str, ttl: u64, n: usize) -> Session {
    let options = Options::default().ttl(Duration::from_secs(ttl)).connect_timeout(LONG).server_name(format!("number-{n}"));
    Session::connect(target, options).expect("a session")
}

pub struct Outside {
    pub runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Outside {
    pub fn of(etcd: &Etcd) -> Outside {
        Self::at(&etcd.endpoint(), None)
    }

    pub fn at(endpoint: &str, user: Option<(&str, &str)>) -> Outside {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(client(endpoint, user)).unwrap();
        Outside { runtime, client }
    }

    fn read(&self, range: RangeRequest) -> api::RangeResponse {
        let end = Instant::now() + LONG;
        loop {
            match self.runtime.block_on(self.client.range(range.clone())) {
                // A cluster may elect a leader at any moment, on a busy machine too.
                Err(status) if status.code() == Code::Unavailable && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                read => return read.unwrap(),
            }
        }
    }

    /// A request of which only matters whether it was granted, by its path in etcd's protocol.
    pub fn tell(&self, path: &'static str, request: impl Message + Clone + 'static) -> Result<(), Status> {
        self.runtime.block_on(self.client.ask::<_, HeaderOnly>(path, request)).map(drop)
    }

    pub fn revision(&self) -> i64 {
        self.read(RangeRequest::key("x")).header.unwrap().revision
    }

    /// Keys under a prefix, with their leases, oldest first.
    pub fn keys(&self, prefix: &str) -> Vec<(String, i64)> {
        self.keys_with_tokens(prefix).into_iter().map(|(key, lease, _)| (key, lease)).collect()
    }

    pub fn keys_with_tokens(&self, prefix: &str) -> Vec<(String, i64, i64)> {
        let mut read = self.read(RangeRequest::prefix(prefix));
        read.kvs.sort_by_key(|kv| kv.create_revision);
        read.kvs.into_iter().map(|kv| (String::from_utf8(kv.key).unwrap(), kv.lease, kv.create_revision)).collect()
    }

    pub fn value(&self, key: &str) -> Option<String> {
        self.read(RangeRequest::key(key)).kvs.pop().map(|kv| String::from_utf8(kv.value).unwrap())
    }

    pub fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<(), Status> {
        self.runtime.block_on(put(&self.client, key, value))
    }

    /// Many keys with one value.
    pub fn put_all(&self, keys: Vec<String>, value: &[u8]) {
        // etcd takes 128 operations and 1.5 MB at once.
        let at_once = (1_000_000 / (value.len() + 100)).clamp(1, 100);
        for some in keys.chunks(at_once) {
            let puts: Vec<_> = some.iter().map(|key| RequestOp::put(key.as_str(), value, 0)).collect();
            self.runtime.block_on(self.client.txn(TxnRequest::default().and_then(puts))).unwrap();
        }
    }

    pub fn delete_all(&self, prefix: &str) {
        let range = api::DeleteRequest { key: prefix.into(), range_end: end_of_prefix(prefix.as_bytes()) };
        self.tell("/etcdserverpb.KV/DeleteRange", range).unwrap();
    }

    pub fn revoke(&self, lease: i64) {
        self.runtime.block_on(self.client.revoke(lease)).unwrap();
    }

    pub fn leases(&self) -> usize {
        let answer = self.client.ask::<_, Leases>("/etcdserverpb.Lease/LeaseLeases", HeaderOnly::default());
        self.runtime.block_on(answer).unwrap().leases.len()
    }

    /// Forgets all history before a revision.
    pub fn compact(&self, revision: i64) {
        self.tell("/etcdserverpb.KV/Compact", Compaction { revision }).unwrap();
    }

    /// Keys with a prefix that have been changed since a revision, one for each of `count` changes.
    pub fn changed_since(&self, prefix: &str, start_revision: i64, count: usize) -> Vec<Vec<u8>> {
        let create = WatchCreate { start_revision, ..below(prefix) };
        self.runtime.block_on(async {
            let mut keys = Vec::new();
            let mut events = self.client.watch(orders(create)).await.unwrap();
            while keys.len() < count {
                let answer = events.message().await.unwrap().unwrap();
                keys.extend(answer.events.into_iter().map(|event| event.kv.unwrap().key));
            }
            keys
        })
    }
}

/// Users and roles.
impl Outside {
    pub fn try_to_add_user(&self, name: &str, password: &str) -> Result<(), Status> {
        self.tell("/etcdserverpb.Auth/UserAdd", Two::new(name, password))
    }

    pub fn add_user(&self, name: &str, password: &str, role: &str) {
        self.try_to_add_user(name, password).unwrap();
        self.tell("/etcdserverpb.Auth/UserGrantRole", Two::new(name, role)).unwrap();
    }

    pub fn delete_user(&self, name: &str) {
        self.tell("/etcdserverpb.Auth/UserDelete", Two::new(name, "")).unwrap();
    }

    pub fn change_password(&self, name: &str, password: &str) {
        self.tell("/etcdserverpb.Auth/UserChangePassword", Two::new(name, password)).unwrap();
    }

    /// A role that may read and write everything with a prefix.
    pub fn add_role(&self, role: &str, prefix: &str) {
        self.tell("/etcdserverpb.Auth/RoleAdd", Two::new(role, "")).unwrap();
        self.grant_to_role(role, prefix);
    }

    pub fn grant_to_role(&self, role: &str, prefix: &str) {
        const READ_AND_WRITE: i32 = 2;
        let permission = Permission { kind: READ_AND_WRITE, key: prefix.into(), range_end: end_of_prefix(prefix.as_bytes()) };
        let grant = Grant { role: role.to_owned(), permission: Some(permission) };
        self.tell("/etcdserverpb.Auth/RoleGrantPermission", grant).unwrap();
    }

    pub fn revoke_from_role(&self, role: &str, prefix: &str) {
        let range_end = end_of_prefix(prefix.as_bytes());
        let revoke = Revoke { role: role.to_owned(), key: prefix.into(), range_end };
        self.tell("/etcdserverpb.Auth/RoleRevokePermission", revoke).unwrap();
    }

    /// The user `root` with the role `root` is there already.
    pub fn enable_auth(&self) {
        self.tell("/etcdserverpb.Auth/AuthEnable", HeaderOnly::default()).unwrap();
    }

    pub fn disable_auth(&self) {
        self.tell("/etcdserverpb.Auth/AuthDisable", HeaderOnly::default()).unwrap();
    }
}

/// Whatever is told with two words: a user and its password, or its role.
#[derive(Clone, PartialEq, Message)]
struct Two {
    #[prost(string, tag = "1")]
    first: String,
    #[prost(string, tag = "2")]
    second: String,
}

impl Two {
    fn new(first: &str, second: &str) -> Two {
        Two { first: first.to_owned(), second: second.to_owned() }
    }
}

#[derive(Clone, PartialEq, Message)]
struct Grant {
    #[prost(string, tag = "1")]
    role: String,
    #[prost(message, optional, tag = "2")]
    permission: Option<Permission>,
}

#[derive(Clone, PartialEq, Message)]
struct Permission {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    range_end: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Revoke {
    #[prost(string, tag = "1")]
    role: String,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    range_end: Vec<u8>,
}

/// A client of the tests' own, which asks one member.
async fn client(endpoint: &str, user: Option<(&str, &str)>) -> Result<Client, Status> {
    let channel = Endpoint::from_shared(format!("http://{endpoint}")).unwrap().connect_lazy();
    let channel = api::Channel::new(channel.map_err(|error| Status::from_error(error.into())));
    Client::connect(channel, user.map(|(name, password)| (name.to_owned(), password.to_owned()))).await
}

async fn put(client: &Client, key: &str, value: impl Into<Vec<u8>>) -> Result<(), Status> {
    client.txn(TxnRequest::default().and_then([RequestOp::put(key, value, 0)])).await.map(drop)
}

fn below(prefix: &str) -> WatchCreate {
    WatchCreate { key: prefix.into(), range_end: end_of_prefix(prefix.as_bytes()), watch_id: 1, ..Default::default() }
}

/// One watch, for as long as its stream.
fn orders(create: WatchCreate) -> impl tokio_stream::Stream<Item = WatchRequest> + Send + 'static {
    tokio_stream::once(WatchRequest::create(create)).chain(tokio_stream::pending())
}

#[derive(Clone, PartialEq, Message)]
struct Leases {
    #[prost(message, repeated, tag = "2")]
    leases: Vec<api::LeaseRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct Compaction {
    #[prost(int64, tag = "1")]
    revision: i64,
}

/// The longest time in which a cluster was of no use, as somebody sees who tries all the time on the same machine.
pub struct Gaps {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
}

struct Seen {
    longest: Duration,
    /// When it was last of use, when it last committed, and since when it has done so all the time.
    of_use: Instant,
    last: Instant,
    since: Instant,
}

impl Seen {
    fn committed(&mut self) {
        let now = Instant::now();
        self.since = if now - self.last > Gaps::PAUSE { now } else { self.since };
        self.last = now;
        if now - self.since >= Gaps::OF_USE {
            self.look(now);
            self.of_use = now;
        }
    }

    fn look(&mut self, now: Instant) {
        self.longest = self.longest.max(now - self.of_use);
    }
}

impl Gaps {
    /// A moment between two elections is none: only when it has committed for so long could a client that
    /// tries now and then have got through.
    const OF_USE: Duration = Duration::from_millis(500);
    const PAUSE: Duration = Duration::from_millis(300);

    pub fn of(cluster: &Cluster) -> Gaps {
        Self::watch((0..3).map(|member| cluster.direct_endpoint(member)).collect())
    }

    /// By each of the members, whichever of them are there.
    pub fn watch(endpoints: Vec<String>) -> Gaps {
        let now = Instant::now();
        let seen = Seen { longest: Duration::ZERO, of_use: now, last: now, since: now };
        let gaps = Gaps { seen: Arc::new(Mutex::new(seen)), stop: Arc::default() };
        let (seen, stop) = (gaps.seen.clone(), gaps.stop.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(tokio::task::LocalSet::new().run_until(async {
                for endpoint in endpoints {
                    let (seen, stop) = (seen.clone(), stop.clone());
                    tokio::task::spawn_local(async move {
                        let client = client(&endpoint, None).await.unwrap();
                        while !stop.load(Ordering::Relaxed) {
                            if let Ok(Ok(())) = tokio::time::timeout(Self::PAUSE, put(&client, "gap", "")).await {
                                seen.lock().unwrap().committed();
                            }
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    });
                }
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }));
        });
        gaps
    }

    pub fn longest(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap();
        seen.look(Instant::now());
        seen.longest
    }

    /// What failed shows nothing if the cluster itself was of no use for longer than `excused`.
    pub fn judge(self, done: Result<(), String>, excused: Duration) -> Result<(), Failed> {
        let longest = self.longest();
        done.map_err(|why| match longest > excused {
            true => Failed::ByCluster(format!("the cluster itself was of no use for {longest:?}, so this shows nothing: {why}")),
            false => Failed::ByUs(format!("the cluster was never of no use for more than {longest:?}, but {why}")),
        })
    }
}

pub enum Failed {
    ByUs(String),
    ByCluster(String),
}

/// Tries again what a cluster of three has not let show.
pub fn unless_the_cluster_fails(name: &str, mut attempt: impl FnMut() -> Result<(), Failed>) {
    for n in 0..5 {
        match attempt() {
            Ok(()) => return,
            Err(Failed::ByCluster(why)) => drop(writeln!(std::io::stderr(), "{name}, attempt {n}: {why}")),
            Err(Failed::ByUs(why)) => panic!("{name}: {why}"),
        }
    }
    skipped(&format!("{name}: this machine is too busy for a cluster of three to go on without a pause"));
}

/// The moments at which keys under a prefix are deleted, as an observer with a connection of its own
/// sees them.
pub fn deletions(endpoint: &str, prefix: &str) -> mpsc::Receiver<(String, Instant)> {
    let (tx, rx) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let (endpoint, prefix) = (endpoint.to_owned(), prefix.to_owned());
    std::thread::spawn(move || {
        let outside = Outside::at(&endpoint, None);
        outside.runtime.block_on(async {
            let mut answers = outside.client.watch(orders(below(&prefix))).await.unwrap();
            ready.send(()).unwrap();
            while let Ok(Some(answer)) = answers.message().await {
                for Event { kv, .. } in answer.events.into_iter().filter(Event::is_delete) {
                    if tx.send((String::from_utf8(kv.unwrap().key).unwrap(), Instant::now())).is_err() {
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
