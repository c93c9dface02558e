//! The world outside the processes: etcd's members, what the network does to requests and answers,
//! and the log of it all.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::hash::Hasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use prost::bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};

use super::checker::{Cause, Checker};
use super::etcd::{Change, Etcd, is_in};
use super::wire::*;

pub(super) const MS: Duration = Duration::from_millis(1);

/// What can go wrong. The name is the one that is counted and printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    RequestDelayed,
    RequestLost,
    RequestReset,
    RequestHeldBack,
    RequestCopied,
    AnswerDelayed,
    AnswerLost,
    AnswerReset,
    StreamReset,
    StreamSilent,
    WatchCompacted,
    WatchUnsynced,
    MemberDown,
    MemberSilent,
    MemberLags,
    ClusterRestarted,
    DatabaseFull,
    KeyDeleted,
    LeaseRevoked,
    LeaseExpired,
    OtherTtl,
    ProcessPaused,
    ProcessKilled,
    /// As by a suspended machine: its timers have not seen that time.
    ClockJumped,
    SessionClosed,
}

/// Those of a single request.
pub(super) const OF_REQUESTS: [Fault; 8] = [
    Fault::RequestDelayed,
    Fault::RequestLost,
    Fault::RequestReset,
    Fault::RequestHeldBack,
    Fault::RequestCopied,
    Fault::AnswerDelayed,
    Fault::AnswerLost,
    Fault::AnswerReset,
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Member {
    Up,
    /// Connections are refused.
    Down,
    /// Nothing comes back.
    Silent,
}

/// What one member has applied, and its watchers have seen.
#[derive(Default)]
struct Copy {
    etcd: Etcd,
    lag: Duration,
    on_the_way: VecDeque<(Instant, Arc<Vec<Change>>)>,
}

#[derive(Default)]
pub(super) struct Log {
    hash: std::hash::DefaultHasher,
    pub(super) events: u64,
    line: String,
    /// The lines, if they are wanted.
    pub(super) lines: Option<Vec<String>>,
}

impl Log {
    pub(super) fn hash(&self) -> u64 {
        self.hash.finish()
    }
}

pub(super) struct World {
    pub(super) start: Instant,
    pub(super) etcd: Etcd,
    pub(super) checker: Checker,
    pub(super) log: Log,
    pub(super) rng: fastrand::Rng,
    pub(super) faults: BTreeMap<Fault, u64>,
    pub(super) requests: u64,
    /// Requests that may still change something.
    pub(super) in_flight: u32,
    members: Vec<Member>,
    copies: Vec<Copy>,
    /// Nothing more can be put.
    is_full: bool,
    me: Weak<Mutex<World>>,
    /// The chance of each fault of [`OF_REQUESTS`], for each request.
    pub(super) chances: BTreeMap<Fault, f64>,
    /// The least and most that a message takes one way.
    pub(super) latency: (Duration, Duration),
    /// Most that a lease outlives its TTL.
    pub(super) late_expiry: Duration,
    streams: Vec<OpenStream>,
    last_stream: u64,
}

struct OpenStream {
    id: u64,
    member: usize,
    stream: Stream,
    silent: bool,
    watchers: BTreeMap<i64, Watcher>,
}

struct Watcher {
    key: Vec<u8>,
    range_end: Vec<u8>,
    /// Of puts too.
    puts: bool,
    /// Its events arrive in their order.
    last_arrival: Instant,
    /// It is served in steps of 100 ms until then.
    unsynced_until: Instant,
}

pub(super) type Shared = Arc<Mutex<World>>;

pub(super) fn enter(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line to the log of a world.
macro_rules! say {
    ($world:expr, $($text:tt)*) => { $world.say(format_args!($($text)*)) };
}
pub(super) use say;

impl World {
    pub(super) fn start(seed: u64, keep_log: bool) -> Shared {
        let log = Log { lines: keep_log.then(Vec::new), ..Default::default() };
        Arc::new_cyclic(|me| {
            Mutex::new(World {
                me: me.clone(),
                start: Instant::now(),
                etcd: Etcd { revision: 1, ..Default::default() },
                checker: Checker::default(),
                log,
                rng: fastrand::Rng::with_seed(seed),
                faults: BTreeMap::new(),
                requests: 0,
                in_flight: 0,
                members: Vec::new(),
                copies: Vec::new(),
                is_full: false,
                chances: BTreeMap::new(),
                latency: (MS / 10, MS),
                late_expiry: Duration::ZERO,
                streams: Vec::new(),
                last_stream: 0,
            })
        })
    }

    pub(super) fn set_members(&mut self, members: usize) {
        self.members = vec![Member::Up; members];
        let copy = || Copy { etcd: Etcd { revision: 1, ..Default::default() }, ..Default::default() };
        self.copies = std::iter::repeat_with(copy).take(members).collect();
    }

    pub(super) fn members(&self) -> usize {
        self.members.len()
    }

    fn shared(&self) -> Shared {
        self.me.upgrade().expect("somebody has called this")
    }

    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn say(&mut self, text: std::fmt::Arguments<'_>) {
        let now = self.now();
        let log = &mut self.log;
        log.line.clear();
        let _ = write!(log.line, "{:10.4} {text}", now.as_secs_f64());
        log.events += 1;
        log.hash.write(log.line.as_bytes());
        if let Some(lines) = &mut log.lines {
            lines.push(log.line.clone());
        }
    }

    pub(super) fn violation(&mut self, text: String) {
        say!(self, "VIOLATION {text}");
        self.checker.violations.push(text);
    }

    pub(super) fn count(&mut self, fault: Fault) {
        *self.faults.entry(fault).or_default() += 1;
    }

    /// Whether a fault of a request happens now.
    fn happens(&mut self, fault: Fault) -> bool {
        let chance = self.chances.get(&fault).copied().unwrap_or(0.0);
        let happens = chance > 0.0 && self.rng.f64() < chance;
        if happens {
            self.count(fault);
        }
        happens
    }

    fn latency(&mut self) -> Duration {
        let (least, most) = self.latency;
        let spread = (most - least).as_micros() as u64;
        least + Duration::from_micros(self.rng.u64(0..=spread))
    }

    /// Up to this long, evenly.
    pub(super) fn up_to(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.rng.u64(0..=most.as_micros() as u64))
    }

    // ---- etcd's own doings -----------------------------------------------------------------

    /// Everything that changed goes to the checker and to the members.
    pub(super) fn changed(&mut self, changes: Vec<Change>, cause: Cause) {
        for change in &changes {
            let key = String::from_utf8_lossy(&change.kv.key);
            let what = if change.is_delete { "gone" } else { "put" };
            say!(self, "etcd: {} {what} {key} (created {}, {cause:?})", change.revision, change.kv.create_revision);
        }
        let found = self.checker.changed(&changes, cause);
        found.into_iter().for_each(|text| self.violation(text));
        if changes.is_empty() {
            return;
        }
        let (changes, now) = (Arc::new(changes), Instant::now());
        for member in 0..self.copies.len() {
            let copy = &mut self.copies[member];
            let after = copy.on_the_way.back().map_or(now, |(arrives, _)| *arrives);
            let arrives = after.max(now + copy.lag);
            copy.on_the_way.push_back((arrives, changes.clone()));
            if arrives <= now {
                self.apply(member);
                continue;
            }
            let world = self.shared();
            tokio::spawn(async move {
                sleep_until(arrives).await;
                enter(&world).apply(member);
            });
        }
    }

    /// A member applies what has come to it, and tells its watchers.
    fn apply(&mut self, member: usize) {
        let now = Instant::now();
        while let Some((_, changes)) = self.copies[member].on_the_way.pop_front_if(|(arrives, _)| *arrives <= now) {
            let etcd = &mut self.copies[member].etcd;
            changes.iter().for_each(|change| etcd.apply(change));
            let header = etcd.header();
            for at in 0..self.streams.len() {
                if self.streams[at].member == member && !self.streams[at].silent {
                    self.tell_watchers(at, header, &changes);
                }
            }
        }
    }

    fn tell_watchers(&mut self, stream: usize, header: Option<Header>, changes: &[Change]) {
        let now = Instant::now();
        for id in self.streams[stream].watchers.keys().copied().collect::<Vec<_>>() {
            let watcher = &self.streams[stream].watchers[&id];
            let events =
                changes.iter().filter(|c| (c.is_delete || watcher.puts) && is_in(&c.kv.key, &watcher.key, &watcher.range_end));
            let events: Vec<_> = events.map(Change::event).collect();
            if events.is_empty() {
                continue;
            }
            let arrives = now + self.latency();
            let open = &mut self.streams[stream];
            let watcher = open.watchers.get_mut(&id).expect("found above");
            watcher.last_arrival = watcher.last_arrival.max(arrives).max(watcher.unsynced_until);
            let response = WatchResponse { header, watch_id: id, events, ..Default::default() };
            open.stream.push(watcher.last_arrival, Ok(framed(&response)));
        }
    }

    /// Ends a lease, whoever wants it.
    pub(super) fn end_lease(&mut self, id: i64, cause: Cause) -> Result<(), Status> {
        let found = self.checker.lease_ends(id, cause, self.start.elapsed());
        found.into_iter().for_each(|text| self.violation(text));
        let changes = self.etcd.end_lease(id)?;
        say!(self, "etcd: lease {id:x} ends ({cause:?})");
        self.changed(changes, cause);
        Ok(())
    }

    pub(super) fn leases(&self) -> Vec<i64> {
        self.etcd.leases.keys().copied().collect()
    }

    fn no_space() -> Status {
        Status::new(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded")
    }

    fn serve(&mut self, process: usize, member: usize, method: &str, body: &Bytes) -> Result<Bytes, Status> {
        let now = self.now();
        let decoded = "core sends what etcd's protocol says";
        match method {
            "Txn" => {
                let request: TxnRequest = prost::Message::decode(&**body).expect(decoded);
                if request.is_serializable() {
                    // The member does not ask the others.
                    let (answer, _) = self.copies[member].etcd.txn(&request)?;
                    let revision = answer.header.map(|header| header.revision);
                    say!(self, "p{process} {request}, as member {member} has it: {revision:?}");
                    return Ok(framed(&answer));
                }
                let is_refused = self.is_full && request.puts();
                if is_refused && self.rng.bool() {
                    say!(self, "p{process} {request}: the database is full");
                    return Err(Self::no_space());
                }
                let (answer, changes) = self.etcd.txn(&request)?;
                say!(self, "p{process} {request}: {}", if answer.succeeded { "yes" } else { "no" });
                self.changed(changes, Cause::Request(process));
                if is_refused {
                    // Before the alarm is raised etcd applies it and refuses it all the same.
                    say!(self, "p{process}: applied, but the database is full");
                    return Err(Self::no_space());
                }
                Ok(framed(&answer))
            }
            "Range" => {
                let request: RangeRequest = prost::Message::decode(&**body).expect(decoded);
                Ok(framed(&self.etcd.range(&request)))
            }
            "LeaseGrant" => {
                let request: GrantRequest = prost::Message::decode(&**body).expect(decoded);
                if self.is_full {
                    return Err(Self::no_space());
                }
                let mut ttl = request.ttl;
                if self.happens(Fault::OtherTtl) {
                    ttl += self.rng.i64(1..=5);
                }
                let answer = self.etcd.grant(ttl, now);
                expire(&self.shared(), answer.id);
                Ok(framed(&answer))
            }
            "LeaseRevoke" => {
                let request: LeaseRequest = prost::Message::decode(&**body).expect(decoded);
                self.end_lease(request.id, Cause::Request(process))?;
                Ok(framed(&HeaderOnly { header: self.etcd.header() }))
            }
            "LeaseKeepAlive" => {
                let request: LeaseRequest = prost::Message::decode(&**body).expect(decoded);
                Ok(framed(&self.etcd.renew(request.id, now)))
            }
            "MemberList" => Ok(framed(&HeaderOnly { header: self.copies[member].etcd.header() })),
            other => panic!("{other} is not simulated"),
        }
    }

    // ---- members and streams ---------------------------------------------------------------

    pub(super) fn set_member(&mut self, member: usize, state: Member) {
        say!(self, "member {member}: {state:?}");
        self.members[member] = state;
        let mut streams = std::mem::take(&mut self.streams);
        streams.retain_mut(|open| {
            if open.member != member {
                return true;
            }
            match state {
                Member::Down => open.stream.break_off(),
                Member::Silent => {
                    open.stream.fall_silent();
                    open.silent = true;
                }
                // What was silent is found to be broken, or stays silent until the client sees to it.
                Member::Up if open.silent && self.rng.bool() => open.stream.break_off(),
                Member::Up => return true,
            }
            state == Member::Silent
        });
        self.streams = streams;
    }

    /// Nothing more can be put, or something can be put again.
    pub(super) fn fill(&mut self, is_full: bool) {
        say!(self, "etcd: the database is {}full", if is_full { "" } else { "no longer " });
        self.is_full = is_full;
        if is_full {
            self.count(Fault::DatabaseFull);
        }
    }

    /// A member has what it is told only that much later.
    pub(super) fn set_lag(&mut self, member: usize, lag: Duration) {
        say!(self, "member {member} lags by {lag:?}");
        self.copies[member].lag = lag;
    }

    /// All members are gone and come back. A new leader gives every lease its whole TTL again.
    pub(super) fn restarted(&mut self) {
        let now = self.now();
        for lease in self.etcd.leases.values_mut() {
            lease.expires = lease.expires.max(now + lease.ttl);
        }
        (0..self.members.len()).for_each(|member| self.set_member(member, Member::Up));
    }

    pub(super) fn is_down(&self) -> bool {
        self.members.iter().all(|member| *member == Member::Down)
    }

    /// Something happens to one stream, if there is one.
    pub(super) fn disturb_stream(&mut self, fault: Fault) {
        self.streams.retain(|open| !open.stream.is_unread());
        if self.streams.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.streams.len());
        let id = self.streams[at].id;
        self.count(fault);
        say!(self, "stream {id}: {fault:?}");
        match fault {
            Fault::StreamReset => self.streams.remove(at).stream.break_off(),
            Fault::StreamSilent => {
                self.streams[at].silent = true;
                self.streams[at].stream.fall_silent();
            }
            _ => {
                // The history that a watcher still needs is compacted away.
                let header = self.etcd.header();
                let compact_revision = self.etcd.revision;
                let open = &mut self.streams[at];
                for (id, watcher) in std::mem::take(&mut open.watchers) {
                    let gone = WatchResponse {
                        header,
                        watch_id: id,
                        canceled: true,
                        compact_revision,
                        cancel_reason: "etcdserver: mvcc: required revision has been compacted".into(),
                        ..Default::default()
                    };
                    if !open.silent {
                        open.stream.push(watcher.last_arrival.max(Instant::now()), Ok(framed(&gone)));
                    }
                }
            }
        }
    }

    /// From now on the weather is good.
    pub(super) fn calm_down(&mut self) {
        say!(self, "calm");
        self.chances.clear();
        self.latency = (MS / 10, MS);
        self.is_full = false;
        self.copies.iter_mut().for_each(|copy| copy.lag = Duration::ZERO);
        self.restarted();
    }

    fn order(&mut self, stream: u64, order: WatchOrder) -> bool {
        let Some(at) = self.streams.iter().position(|open| open.id == stream) else { return false };
        if self.streams[at].silent {
            return true;
        }
        let header = self.copies[self.streams[at].member].etcd.header();
        let now = Instant::now();
        let arrives = now + self.latency();
        let unsynced = matches!(order, WatchOrder::Create(_)) && self.happens(Fault::WatchUnsynced);
        let steps = self.up_to(100 * MS);
        let open = &mut self.streams[at];
        let answer = match order {
            WatchOrder::Create(create) => {
                assert!(create.start_revision == 0 && matches!(create.filters[..], [] | [0]), "core does not ask for that");
                let id = create.watch_id;
                let unsynced_until = if unsynced { now + steps } else { now };
                let (key, range_end, puts) = (create.key, create.range_end, create.filters.is_empty());
                let watcher = Watcher { key, range_end, puts, last_arrival: arrives, unsynced_until };
                open.watchers.insert(id, watcher);
                WatchResponse { header, watch_id: id, created: true, ..Default::default() }
            }
            WatchOrder::Cancel(cancel) => {
                if open.watchers.remove(&cancel.watch_id).is_none() {
                    return true;
                }
                WatchResponse { header, watch_id: cancel.watch_id, canceled: true, ..Default::default() }
            }
            WatchOrder::Progress(_) => WatchResponse { header, watch_id: -1, ..Default::default() },
        };
        open.stream.push(arrives, Ok(framed(&answer)));
        true
    }
}

/// Ends a lease when its time has come. While etcd is down nothing runs out.
pub(super) fn expire(world: &Shared, id: i64) {
    let world = world.clone();
    tokio::spawn(async move {
        let late = {
            let mut world = enter(&world);
            let most = world.late_expiry;
            world.up_to(most)
        };
        loop {
            let left = {
                let mut world = enter(&world);
                let now = world.now();
                let Some(lease) = world.etcd.leases.get(&id) else { return };
                let left = (lease.expires + late).saturating_sub(now);
                if left.is_zero() {
                    if !world.is_down() {
                        world.count(Fault::LeaseExpired);
                        let _ = world.end_lease(id, Cause::Expired);
                        return;
                    }
                    100 * MS
                } else {
                    left
                }
            };
            sleep(left).await;
        }
    });
}

fn reset(what: &str) -> Status {
    Status::from_error(std::io::Error::new(std::io::ErrorKind::ConnectionReset, what.to_owned()).into())
}

type Answer = Result<Response<Body>, Status>;

/// One process's connection to one member.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) world: Shared,
    pub(super) process: usize,
    pub(super) member: usize,
}

impl Wire {
    pub(super) fn channel(self) -> Channel {
        Channel::new(tower::service_fn(move |request| {
            let (answer, answered) = oneshot::channel();
            // Not the process's task: what is on its way stays on its way.
            tokio::spawn(self.clone().carry(request, answer));
            async move {
                match answered.await {
                    Ok(answer) => answer,
                    // It was lost without a word.
                    Err(_) => std::future::pending().await,
                }
            }
        }))
    }

    async fn carry(self, request: Request<Body>, answer: oneshot::Sender<Answer>) {
        let path = request.uri().path().to_owned();
        let mut body = request.into_body();
        if path.ends_with("/Watch") {
            return self.watch(body, answer).await;
        }
        let Some(message) = next_frame(&mut body, &mut BytesMut::new()).await else { return };
        enter(&self.world).in_flight += 1;
        self.transport(&path, message, answer).await;
        enter(&self.world).in_flight -= 1;
    }

    async fn transport(&self, path: &str, message: Bytes, answer: oneshot::Sender<Answer>) {
        let method = path.rsplit('/').next().unwrap_or_default();
        let (before, lost, reset_before, held_back) = {
            let mut world = enter(&self.world);
            world.requests += 1;
            let mut before = world.latency();
            if world.happens(Fault::RequestDelayed) {
                before += world.up_to(1500 * MS);
            }
            let held_back = world.happens(Fault::RequestHeldBack);
            if held_back {
                before += 500 * MS + world.up_to(12_000 * MS);
            }
            (before, world.happens(Fault::RequestLost), world.happens(Fault::RequestReset), held_back)
        };
        sleep(before).await;
        {
            let mut world = enter(&self.world);
            let (process, member) = (self.process, self.member);
            let state = world.members[member];
            if reset_before || state == Member::Down {
                say!(world, "p{process} {method}: member {member} resets");
                let _ = answer.send(Err(reset("the connection was reset before the request")));
                return;
            }
            if lost || state == Member::Silent {
                say!(world, "p{process} {method}: lost");
                return hang(answer);
            }
        }
        let (served, after, answer_lost, reset_after, copied) = {
            let mut world = enter(&self.world);
            let (process, member) = (self.process, self.member);
            if method != "Txn" || held_back {
                say!(world, "p{process} {method}: arrives{}", if held_back { " late" } else { "" });
            }
            let served = world.serve(process, member, method, &message);
            if let Err(refusal) = &served {
                say!(world, "p{process} {method}: {}", refusal.message());
            }
            let mut after = world.latency();
            if world.happens(Fault::AnswerDelayed) {
                after += world.up_to(2500 * MS);
            }
            let (answer_lost, reset_after) = (world.happens(Fault::AnswerLost), world.happens(Fault::AnswerReset));
            // Only a request without an answer can be there twice: HTTP/2 does not copy any.
            let copied = (answer_lost || reset_after) && world.happens(Fault::RequestCopied);
            (served, after, answer_lost, reset_after, copied)
        };
        if !answer_lost && !reset_after {
            sleep(after).await;
            let is_up = enter(&self.world).members[self.member] == Member::Up;
            if is_up {
                let _ = answer.send(Ok(super::wire::answer(served)));
            } else {
                hang(answer);
            }
            return;
        }
        if reset_after {
            sleep(after).await;
            let mut world = enter(&self.world);
            say!(world, "p{} {method}: reset after it was applied", self.process);
            let _ = answer.send(Err(reset("the connection was reset before the answer")));
        } else {
            let mut world = enter(&self.world);
            say!(world, "p{} {method}: the answer is lost", self.process);
            hang(answer);
        }
        if copied {
            let pause = {
                let mut world = enter(&self.world);
                world.up_to(8000 * MS)
            };
            sleep(pause).await;
            let mut world = enter(&self.world);
            say!(world, "p{} {method}: a copy arrives", self.process);
            let _ = world.serve(self.process, self.member, method, &message);
        }
    }

    async fn watch(self, mut body: Body, answer: oneshot::Sender<Answer>) {
        let (before, lost) = {
            let mut world = enter(&self.world);
            (world.latency(), world.happens(Fault::RequestLost))
        };
        sleep(before).await;
        let stream = Stream::default();
        let id = {
            let mut world = enter(&self.world);
            match world.members[self.member] {
                Member::Down => {
                    let _ = answer.send(Err(reset("the connection was refused")));
                    return;
                }
                Member::Silent => return hang(answer),
                Member::Up if lost => return hang(answer),
                Member::Up => {}
            }
            world.last_stream += 1;
            let id = world.last_stream;
            say!(world, "p{}: stream {id} on member {}", self.process, self.member);
            let (member, stream) = (self.member, stream.clone());
            world.streams.push(OpenStream { id, member, stream, silent: false, watchers: BTreeMap::new() });
            id
        };
        let _ = answer.send(Ok(stream.response()));
        let mut rest = BytesMut::new();
        while let Some(request) = next_frame(&mut body, &mut rest).await {
            let request: WatchRequest = prost::Message::decode(request).expect("core sends what etcd's protocol says");
            let pause = {
                let mut world = enter(&self.world);
                world.latency()
            };
            sleep(pause).await;
            let Some(order) = request.order else { continue };
            if !enter(&self.world).order(id, order) {
                return;
            }
        }
        enter(&self.world).streams.retain(|open| open.id != id);
    }
}

/// The caller hears nothing, ever.
fn hang(answer: oneshot::Sender<Answer>) {
    drop(answer);
}
