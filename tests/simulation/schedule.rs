//! One schedule: who does what, what goes wrong when, and what must be true in the end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::checker::{Cause, Waits};
use super::network::{Fault, MS, Member, OF_REQUESTS, Shared, World, enter, expire, say};
use super::wire::{Op, PutRequest, RequestOp, TxnRequest};
use super::{PANICS, Process, note_panics};
use crate::error::ErrorKind;
use crate::hold::Hold;
use crate::options::Options;
use crate::runtime::Env;
use crate::session::Session;

/// After the faults have ended everybody has had a turn by then.
const EVERYBODY_SERVED: Duration = Duration::from_secs(120);
/// And then everything is tidy by then.
const TIDY: Duration = Duration::from_secs(30);
const SLACK: Duration = Duration::from_millis(100);
const REQUEST_TIMEOUT: Duration = crate::options::DEFAULT_REQUEST_TIMEOUT;

/// What one schedule came to.
pub(super) struct Outcome {
    pub(super) seed: u64,
    pub(super) violations: Vec<String>,
    /// Of the log.
    pub(super) hash: u64,
    pub(super) lines: Option<Vec<String>>,
    pub(super) events: u64,
    pub(super) requests: u64,
    pub(super) acquisitions: u64,
    pub(super) faults: BTreeMap<Fault, u64>,
}

/// Runs the schedule of a seed on this thread.
pub(super) fn run(seed: u64, keep_log: bool) -> Outcome {
    note_panics();
    PANICS.set(Some(Vec::new()));
    // Core's own random numbers.
    fastrand::seed(seed ^ 0x5eed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O");
    let world = runtime.block_on(async {
        let world = World::start(seed, keep_log);
        Schedule::new(world.clone()).run().await;
        world
    });
    drop(runtime);
    let mut world = enter(&world);
    for panic in PANICS.take().unwrap_or_default() {
        world.violation(format!("a task panicked: {panic}"));
    }
    Outcome {
        seed,
        violations: std::mem::take(&mut world.checker.violations),
        hash: world.log.hash(),
        lines: world.log.lines.take(),
        events: world.log.events,
        requests: world.requests,
        acquisitions: world.checker.acquisitions,
        faults: std::mem::take(&mut world.faults),
    }
}

/// Whether a hold with a TTL of 5 s survives when, after it was granted, nobody answers but `member` of three, and that only
/// for a moment when half of the TTL is gone.
pub(super) fn survives_on_one_moment(seed: u64, member: usize) -> bool {
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(async {
        let world = World::start(seed, false);
        enter(&world).set_members(3);
        let process = Process::new(0, world.clone(), 1.0);
        let env = Env::simulated(process.clone());
        let options = Options::default().ttl(Duration::from_secs(5));
        let target = "http://member0:2379,http://member1:2379,http://member2:2379";
        let session = Session::connect_in(|| Ok(env), target.into(), options).await.expect("all members are up");
        let hold = session.mutex("x").expect("a name").lock().await.expect("nobody else is there");
        (0..3).for_each(|member| enter(&world).set_member(member, Member::Silent));
        sleep(3000 * MS).await;
        enter(&world).set_member(member, Member::Up);
        sleep(300 * MS).await;
        enter(&world).set_member(member, Member::Silent);
        sleep(2000 * MS).await;
        hold.is_held()
    })
}

struct Schedule {
    world: Shared,
    processes: Vec<Arc<Process>>,
    waits: Arc<Mutex<Waits>>,
    /// Callers that have not finished.
    busy: Arc<Mutex<BTreeMap<usize, Arc<Process>>>>,
    sessions: Arc<Mutex<Vec<Open>>>,
    /// Faults other than those of requests that this schedule has.
    kinds: Vec<Fault>,
    one_bad_member: bool,
    /// Clients of another kind that have not finished.
    peers: Arc<AtomicUsize>,
}

#[derive(Clone)]
struct Open {
    process: Arc<Process>,
    session: Session,
    /// Its user has closed it.
    closed: Arc<AtomicBool>,
}

/// Somebody who locks and unlocks.
struct Caller {
    number: usize,
    world: Shared,
    process: Arc<Process>,
    open: Open,
    /// Refusals are to be expected.
    may_be_full: bool,
    waits: Arc<Mutex<Waits>>,
    rng: fastrand::Rng,
    names: Vec<String>,
}

impl Schedule {
    fn new(world: Shared) -> Schedule {
        let (processes, waits, busy, sessions, kinds) = Default::default();
        Schedule { world, processes, waits, busy, sessions, kinds, one_bad_member: false, peers: Arc::default() }
    }

    async fn run(mut self) {
        let disturbed_for = self.draw();
        let (processes, sessions, callers, rounds, names, peers) = {
            let mut world = enter(&self.world);
            let rng = &mut world.rng;
            let names = match rng.u8(..4) {
                0 => vec!["x".to_owned(), "x/y".to_owned()],
                1 => vec!["x".to_owned(), "y".to_owned()],
                _ => vec!["x".to_owned()],
            };
            let (sessions, callers, rounds) = (rng.usize(1..=2), rng.usize(1..=3), rng.u32(1..=5));
            match rng.u8(..12) {
                // A long queue.
                0 => (rng.usize(6..=14), 1, 1, rng.u32(1..=3), vec!["x".to_owned()], rng.usize(..7)),
                _ => (rng.usize(1..=3), sessions, callers, rounds, names, rng.usize(..4).saturating_sub(2)),
            }
        };
        for number in 0..processes {
            let rate = 1.0 + (enter(&self.world).rng.f64() - 0.5) * 0.04;
            let process = Process::new(number, self.world.clone(), rate);
            self.processes.push(process.clone());
            let env = Env::simulated(process.clone());
            for _ in 0..sessions {
                self.start_session(&process, &env, callers, rounds, &names);
            }
        }
        for number in 0..peers {
            let (seed, name) = {
                let mut world = enter(&self.world);
                (world.rng.u64(..), names[number % names.len()].clone())
            };
            let (peers, world) = (self.peers.clone(), self.world.clone());
            peers.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                peer(world, name, fastrand::Rng::with_seed(seed), rounds).await;
                peers.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let looking = tokio::spawn(look_now_and_then(self.world.clone()));
        timeout(disturbed_for, self.disturb()).await.ok();
        self.calm_down();
        self.wait_for_everybody().await;
        self.must_be_tidy().await;
        looking.abort();
        let (world, processes) = (self.world.clone(), self.processes.clone());
        self.close().await;
        // Long enough for idle places to go.
        sleep(5000 * MS).await;
        let tasks: usize = processes.iter().map(|process| process.tasks()).sum();
        if tasks > 0 {
            enter(&world).violation(format!("{tasks} tasks are left"));
        }
    }

    /// Chooses what can go wrong in this schedule, and for how long.
    fn draw(&mut self) -> Duration {
        let mut world = enter(&self.world);
        let world = &mut *world;
        // In some only one member at a time fails, and nothing else: that must cost no session.
        self.one_bad_member = world.rng.u8(..12) == 0;
        let members = if self.one_bad_member || world.rng.u8(..3) == 0 { 3 } else { 1 };
        world.set_members(members);
        world.latency = match world.rng.u8(..4) {
            0 => (MS, 30 * MS),
            1 => (MS / 10, 300 * MS),
            _ => (MS / 10, MS),
        };
        if self.one_bad_member {
            world.latency = (MS / 10, 5 * MS);
        }
        world.late_expiry = if world.rng.bool() { Duration::ZERO } else { 1000 * MS };
        // Some schedules have few kinds of faults, and those often; a mixture of all hides much.
        // In some nothing happens but that keys and leases are taken away: that must be heard soon.
        let only_admins = !self.one_bad_member && world.rng.u8(..12) == 0;
        if !self.one_bad_member && !only_admins && world.rng.u8(..8) > 0 {
            for fault in OF_REQUESTS {
                if world.rng.u8(..3) == 0 {
                    let chance = [0.01, 0.03, 0.1, 0.3][world.rng.usize(..4)];
                    world.chances.insert(fault, chance);
                }
            }
        }
        world.chances.insert(Fault::WatchUnsynced, 0.1);
        if world.rng.u8(..4) == 0 {
            world.chances.insert(Fault::OtherTtl, 0.5);
        }
        for fault in [
            Fault::StreamReset,
            Fault::StreamSilent,
            Fault::WatchCompacted,
            Fault::MemberDown,
            Fault::MemberSilent,
            Fault::MemberLags,
            Fault::ClusterRestarted,
            Fault::DatabaseFull,
            Fault::KeyDeleted,
            Fault::LeaseRevoked,
            Fault::ProcessPaused,
            Fault::ProcessKilled,
            Fault::ClockJumped,
            Fault::SessionClosed,
        ] {
            if world.rng.u8(..4) == 0 {
                self.kinds.push(fault);
            }
        }
        if only_admins {
            self.kinds = vec![Fault::KeyDeleted, Fault::LeaseRevoked];
        }
        if self.one_bad_member {
            self.kinds = vec![Fault::MemberDown, Fault::MemberSilent, Fault::MemberLags, Fault::StreamReset];
        }
        let disturbed_for = 1000 * MS + world.up_to(9000 * MS);
        let chances = format!("{:?}", world.chances);
        say!(world, "{members} members, {chances}, {:?}, for {disturbed_for:?}", self.kinds);
        disturbed_for
    }

    fn start_session(&self, process: &Arc<Process>, env: &Env, callers: usize, rounds: u32, names: &[String]) {
        let (target, ttl, seed, first) = {
            let mut world = enter(&self.world);
            let urls: Vec<_> = (0..world.members()).map(|member| format!("http://member{member}:2379")).collect();
            let first = self.busy.lock().unwrap().len();
            let ttl = if self.one_bad_member { 5 } else { [2, 2, 3, 5][world.rng.usize(..4)] };
            (urls.join(","), Duration::from_secs(ttl), world.rng.u64(..), first)
        };
        let may_be_full = self.kinds.contains(&Fault::DatabaseFull);
        for number in first..first + callers {
            self.busy.lock().unwrap().insert(number, process.clone());
        }
        let (world, process, waits) = (self.world.clone(), process.clone(), self.waits.clone());
        let (busy, sessions, names, env) = (self.busy.clone(), self.sessions.clone(), names.to_vec(), env.clone());
        let starter = process.clone();
        starter.spawn(async move {
            // Long enough for the worst of weathers.
            let mut options = Options::default().ttl(ttl).connect_timeout(Duration::from_secs(60));
            let mut rng = fastrand::Rng::with_seed(seed);
            if rng.u8(..8) == 0 {
                options = options.max_hold(Duration::from_millis(rng.u64(20..500)));
            }
            let session = loop {
                let on = env.clone();
                match Session::connect_in(|| Ok(on), target.as_str().into(), options.clone()).await {
                    Ok(session) => break session,
                    Err(error) if may_be_full && error.kind() == ErrorKind::Unavailable => sleep(300 * MS).await,
                    Err(error) => return enter(&world).violation(format!("connect: {error}")),
                }
            };
            let open = Open { process: process.clone(), session, closed: Arc::default() };
            sessions.lock().unwrap().push(open.clone());
            for number in first..first + callers {
                let mut caller = Caller {
                    number,
                    world: world.clone(),
                    process: process.clone(),
                    open: open.clone(),
                    may_be_full,
                    waits: waits.clone(),
                    rng: fastrand::Rng::with_seed(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                    names: names.clone(),
                };
                let busy = busy.clone();
                process.spawn(async move {
                    for _ in 0..rounds {
                        if !caller.open.closed.load(Ordering::Relaxed) {
                            caller.round().await;
                        }
                    }
                    busy.lock().unwrap().remove(&caller.number);
                });
            }
        });
    }

    // ---- what goes wrong ---------------------------------------------------------------------

    async fn disturb(&self) {
        if self.kinds.is_empty() {
            return std::future::pending().await;
        }
        loop {
            let (fault, pause) = {
                let mut world = enter(&self.world);
                let at = world.rng.usize(..self.kinds.len());
                (self.kinds[at], 20 * MS + world.up_to(800 * MS))
            };
            sleep(pause).await;
            self.happens(fault).await;
        }
    }

    async fn happens(&self, fault: Fault) {
        let lasts = {
            let mut world = enter(&self.world);
            let most = [100 * MS, 1000 * MS, 4000 * MS][world.rng.usize(..3)];
            world.up_to(most)
        };
        match fault {
            Fault::StreamReset | Fault::StreamSilent | Fault::WatchCompacted => enter(&self.world).disturb_stream(fault),
            Fault::MemberDown | Fault::MemberSilent => {
                let (member, is_alone) = {
                    let mut world = enter(&self.world);
                    world.count(fault);
                    let members = world.members();
                    let member = world.rng.usize(..members);
                    world.set_member(member, if fault == Fault::MemberDown { Member::Down } else { Member::Silent });
                    (member, members == 1)
                };
                sleep(lasts).await;
                let mut world = enter(&self.world);
                if is_alone && fault == Fault::MemberDown { world.restarted() } else { world.set_member(member, Member::Up) }
            }
            Fault::ClusterRestarted => {
                {
                    let mut world = enter(&self.world);
                    world.count(fault);
                    (0..world.members()).for_each(|member| world.set_member(member, Member::Down));
                }
                sleep(lasts).await;
                enter(&self.world).restarted();
            }
            Fault::KeyDeleted => {
                let mut world = enter(&self.world);
                let contenders = world.etcd.keys.keys().filter(|key| crate::store::name_of_contender(&text(key)).is_some());
                let contenders: Vec<_> = contenders.cloned().collect();
                if let Some(key) = world.rng.choice(contenders) {
                    world.count(fault);
                    let gone = world.etcd.delete_all(&[key]);
                    world.changed(gone, Cause::Admin);
                    self.must_be_heard(&world);
                }
            }
            Fault::LeaseRevoked => {
                let mut world = enter(&self.world);
                let leases = world.leases();
                if let Some(lease) = world.rng.choice(leases) {
                    world.count(fault);
                    let _ = world.end_lease(lease, Cause::Admin);
                    self.must_be_heard(&world);
                }
            }
            Fault::MemberLags => {
                let mut world = enter(&self.world);
                world.count(fault);
                let members = world.members();
                let member = world.rng.usize(..members);
                world.set_lag(member, lasts);
            }
            Fault::DatabaseFull => {
                enter(&self.world).fill(true);
                sleep(lasts).await;
                enter(&self.world).fill(false);
            }
            Fault::SessionClosed => {
                let sessions = self.sessions.lock().unwrap().clone();
                let mut world = enter(&self.world);
                let Some(open) = world.rng.choice(sessions) else { return };
                if open.process.is_killed() || open.closed.swap(true, Ordering::Relaxed) {
                    return;
                }
                world.count(fault);
                say!(world, "p{}: closes a session", open.process.number);
                drop(world);
                let world = self.world.clone();
                open.process.clone().spawn(async move {
                    let since = enter(&world).now();
                    let closed = open.session.close(lasts).await;
                    let mut world = enter(&world);
                    let took = world.now() - since;
                    say!(world, "p{}: closed, {:?}", open.process.number, closed.map_err(|error| error.kind()));
                    if took > lasts + SLACK && open.process.ran_since(since) {
                        world.violation(format!("close({lasts:?}) took {took:?}"));
                    }
                });
            }
            Fault::ProcessPaused => {
                let process = {
                    let mut world = enter(&self.world);
                    world.count(fault);
                    let at = world.rng.usize(..self.processes.len());
                    say!(world, "p{at}: {fault:?}");
                    self.processes[at].clone()
                };
                process.pause();
                sleep(lasts).await;
                let mut world = enter(&self.world);
                say!(world, "p{}: goes on", process.number);
                let now = world.now();
                drop(world);
                process.resume(now);
            }
            Fault::ProcessKilled => {
                let mut world = enter(&self.world);
                let at = world.rng.usize(..self.processes.len());
                // Not the last one, and not too often: the dead lock nothing.
                let alive = self.processes.iter().filter(|process| !process.is_killed()).count();
                if alive > 1 && !self.processes[at].is_killed() {
                    world.count(fault);
                    say!(world, "p{at}: killed");
                    drop(world);
                    self.processes[at].kill();
                }
            }
            Fault::ClockJumped => {
                let mut world = enter(&self.world);
                world.count(fault);
                let at = world.rng.usize(..self.processes.len());
                let by = world.up_to(6000 * MS);
                say!(world, "p{at}: its clock jumps ahead by {by:?}");
                drop(world);
                self.processes[at].jump(by);
            }
            other => unreachable!("{other:?} is no fault of its own"),
        }
    }

    /// In good weather a holder hears within 250 ms, and some for the network, that its key is gone.
    fn must_be_heard(&self, world: &World) {
        let is_good = OF_REQUESTS.iter().all(|fault| !world.chances.contains_key(fault));
        let only_admins = self.kinds.iter().all(|kind| matches!(kind, Fault::KeyDeleted | Fault::LeaseRevoked));
        if is_good && only_admins {
            let (shared, limit) = (self.world.clone(), 250 * MS + 4 * world.latency.1);
            let gone: Vec<_> = world.checker.without_key();
            tokio::spawn(async move {
                sleep(limit).await;
                let mut world = enter(&shared);
                for text in world.checker.still_held(&gone) {
                    world.violation(text);
                }
            });
        }
    }

    fn calm_down(&self) {
        let mut world = enter(&self.world);
        world.calm_down();
        let now = world.now();
        drop(world);
        for process in &self.processes {
            process.resume(now);
        }
    }

    // ---- the end -----------------------------------------------------------------------------

    fn alive_and_busy(&self) -> Vec<usize> {
        let busy = self.busy.lock().unwrap();
        busy.iter().filter(|(_, process)| !process.is_killed()).map(|(number, _)| *number).collect()
    }

    async fn wait_for_everybody(&self) {
        let until = Instant::now() + EVERYBODY_SERVED;
        while !self.alive_and_busy().is_empty() || self.peers.load(Ordering::Relaxed) > 0 {
            if Instant::now() > until {
                let callers = self.alive_and_busy();
                return enter(&self.world).violation(format!("{EVERYBODY_SERVED:?} after the last fault {callers:?} still wait"));
            }
            sleep(100 * MS).await;
        }
    }

    /// Waits until this holds, and says if it never does.
    async fn comes_true(&self, what: &str, is_so: impl Fn(&World) -> bool) {
        let until = Instant::now() + TIDY;
        while !is_so(&enter(&self.world)) {
            if Instant::now() > until {
                let mut world = enter(&self.world);
                let keys: Vec<_> = world.etcd.keys.keys().map(|key| String::from_utf8_lossy(key).into_owned()).collect();
                let leases: Vec<_> = world.etcd.leases.keys().map(|lease| format!("{lease:x}")).collect();
                return world.violation(format!("never came: {what}; keys {keys:?}, leases {leases:?}"));
            }
            sleep(50 * MS).await;
        }
    }

    /// Nobody holds or waits: no ticket is left, and markers only under living leases.
    async fn must_be_tidy(&self) {
        let no_ticket = |world: &World| !world.etcd.keys.keys().any(|key| crate::store::name_of_contender(&text(key)).is_some());
        // What was held back may still arrive.
        self.comes_true("no ticket is left", |world| world.in_flight == 0 && no_ticket(world)).await;
        // Long enough for idle places to go.
        sleep(3000 * MS).await;
        let mut world = enter(&self.world);
        if !no_ticket(&world) {
            world.violation("a ticket came back after all was over".into());
        }
        let strange = world.etcd.keys.values().find(|kv| kv.lease == 0 && !kv.key.starts_with(b"data/"));
        if let Some(key) = strange.map(|kv| text(&kv.key)) {
            world.violation(format!("{key} has no lease"));
        }
    }

    async fn close(self) {
        let sessions = std::mem::take(&mut *self.sessions.lock().unwrap());
        for Open { process, session, .. } in sessions {
            if process.is_killed() {
                continue;
            }
            let lost = session.stats().leases_lost;
            if self.one_bad_member && lost > 0 {
                enter(&self.world).violation(format!("one bad member at a time cost a session {lost} leases"));
            }
            if let Err(error) = session.close(5000 * MS).await {
                enter(&self.world).violation(format!("close in good weather: {error}"));
            }
        }
        self.comes_true("nothing is left at all", |world| {
            world.etcd.leases.is_empty() && world.etcd.keys.keys().all(|key| key.starts_with(b"data/"))
        })
        .await;
    }
}

fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

async fn look_now_and_then(world: Shared) {
    loop {
        sleep(20 * MS).await;
        let mut world = enter(&world);
        let found = world.checker.look();
        found.into_iter().for_each(|text| world.violation(text));
    }
}

impl Caller {
    fn say(&self, what: std::fmt::Arguments<'_>) {
        let mut world = enter(&self.world);
        say!(world, "p{} c{}: {what}", self.process.number, self.number);
    }

    fn up_to(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.rng.u64(0..=most.as_micros() as u64))
    }

    fn now(&self) -> Duration {
        enter(&self.world).now()
    }

    /// A call must be back by then, if the process was not stopped meanwhile.
    fn must_be_back(&self, what: &str, since: Duration, limit: Duration) {
        let took = self.now() - since;
        if took > limit + SLACK && self.process.ran_since(since) {
            enter(&self.world).violation(format!("{what}({limit:?}) of c{} took {took:?}", self.number));
        }
    }

    async fn round(&mut self) {
        let name = self.names[self.rng.usize(..self.names.len())].clone();
        let mutex = self.open.session.mutex(&name).expect("a good name, and the session is open");
        let since = self.now();
        let what = self.rng.u8(..12);
        let limit = match what {
            0..=4 => None,
            5..=8 => Some(MS + self.up_to([50 * MS, 1000 * MS, 5000 * MS][usize::from(what % 3)])),
            _ => Some(Duration::ZERO),
        };
        let hold = match what {
            9 => {
                self.say(format_args!("try_lock {name}"));
                let tried = mutex.try_lock().await;
                self.must_be_back("try_lock", since, REQUEST_TIMEOUT);
                match tried {
                    Ok(hold) => hold,
                    Err(error) if error.kind() == ErrorKind::Unavailable => None,
                    Err(error) => return self.unexpected("try_lock", &error),
                }
            }
            10 | 11 => {
                let patience = self.up_to([20 * MS, 1500 * MS][usize::from(what % 2)]);
                self.say(format_args!("lock {name}, cancelled after {patience:?}"));
                let pending = mutex.lock();
                // Not a caller's timeout: the pending result is dropped.
                match timeout(patience, pending).await {
                    Ok(Ok(hold)) => Some(hold),
                    Ok(Err(error)) => return self.unexpected("lock", &error),
                    Err(_) => None,
                }
            }
            _ => {
                self.say(format_args!("lock {name} for {limit:?}"));
                let wait = {
                    let checker = &mut enter(&self.world).checker;
                    let until = limit.map(|limit| since + limit);
                    self.waits.lock().unwrap().begin(checker, &name, self.process.number, until)
                };
                let locked = match limit {
                    None => mutex.lock().await,
                    Some(limit) => mutex.lock_timeout(limit).await,
                };
                if let Some(limit) = limit {
                    self.must_be_back("lock", since, limit);
                }
                match locked {
                    Ok(hold) => {
                        let late = self.waits.lock().unwrap().granted(wait, self.now());
                        if let Some(late) = late {
                            enter(&self.world).violation(late);
                        }
                        Some(hold)
                    }
                    Err(error) => {
                        self.waits.lock().unwrap().end(wait);
                        if error.kind() != ErrorKind::Timeout || limit.is_none() {
                            return self.unexpected("lock", &error);
                        }
                        None
                    }
                }
            }
        };
        match hold {
            Some(hold) => self.hold(&name, hold).await,
            None => {
                self.say(format_args!("no lock"));
                let pause = self.up_to(50 * MS);
                sleep(pause).await;
            }
        }
    }

    fn unexpected(&self, what: &str, error: &crate::Error) {
        let is_expected = match error.kind() {
            ErrorKind::Unavailable => self.may_be_full,
            ErrorKind::Closed => self.open.closed.load(Ordering::Relaxed),
            _ => false,
        };
        if !is_expected {
            enter(&self.world).violation(format!("{what} of c{}: {error}", self.number));
        }
    }

    async fn hold(&mut self, name: &str, hold: Hold) {
        let token = hold.token();
        let id = {
            let mut world = enter(&self.world);
            say!(world, "p{} c{}: holds {name}, token {token}", self.process.number, self.number);
            let (id, found) = world.checker.granted_to(&self.process, name, token, hold.core().lease_id(), hold.core());
            found.into_iter().for_each(|text| world.violation(text));
            id
        };
        let (world, number) = (self.world.clone(), self.number);
        hold.on_lost(move |loss| {
            let mut world = enter(&world);
            say!(world, "c{number}: {token} is lost, {loss}");
            world.checker.lost(id);
        });
        if self.rng.u8(..4) == 0 {
            let written = hold.put(format!("data/{name}"), token.to_string()).await;
            self.say(format_args!("writes with {token}: {:?}", written.map_err(|error| error.kind())));
        }
        let most = [MS, 20 * MS, 300 * MS, 300 * MS, 4000 * MS][self.rng.usize(..5)];
        let pause = self.up_to(most);
        let lost = timeout(pause, hold.lost()).await;
        if lost.is_ok() && self.rng.bool() {
            // Some go on as if nothing had happened.
            let pause = self.up_to(1000 * MS);
            sleep(pause).await;
        }
        let since = self.now();
        if self.rng.u8(..5) == 0 {
            self.say(format_args!("drops {token}"));
            drop(hold);
            enter(&self.world).checker.over(id);
        } else {
            self.say(format_args!("unlocks {token}"));
            let unlocking = hold.unlock();
            enter(&self.world).checker.over(id);
            let unlocked = unlocking.await;
            self.must_be_back("unlock", since, REQUEST_TIMEOUT);
            self.say(format_args!("unlocked {token}: {:?}", unlocked.as_ref().map_err(|error| error.kind())));
            match unlocked {
                Ok(()) if enter(&self.world).checker.is_there(name, token) => {
                    enter(&self.world).violation(format!("{name}: the unlock of {token} is confirmed, and its key is there"));
                }
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Lost | ErrorKind::Unavailable) => {}
                Err(error) => self.unexpected("unlock", &error),
            }
        }
    }
}

/// Somebody with etcd's Go client, without a network between: a key per session, and the oldest has
/// the lock.
async fn peer(world: Shared, name: String, mut rng: fastrand::Rng, rounds: u32) {
    for _ in 0..rounds {
        sleep(Duration::from_millis(rng.u64(..300))).await;
        let (lease, token) = {
            let mut world = enter(&world);
            let now = world.now();
            // One whose lease is short may lose it: it is not renewed.
            let lease = world.etcd.grant(if rng.u8(..4) == 0 { 3 } else { 60 }, now).id;
            let put = PutRequest { key: format!("{name}/{lease:x}").into_bytes(), value: Vec::new(), lease };
            let txn = TxnRequest { success: vec![RequestOp { op: Some(Op::Put(put)) }], ..Default::default() };
            let (_, changes) = world.etcd.txn(&txn).expect("the lease is new");
            world.changed(changes, Cause::Peer);
            (lease, world.etcd.revision)
        };
        expire(&world, lease);
        let key = format!("{name}/{lease:x}").into_bytes();
        let is_first = |world: &World| {
            let contenders = world.etcd.keys.values().filter(|kv| crate::store::is_contender(&name, &kv.key));
            contenders.map(|kv| kv.create_revision).min() == Some(token)
        };
        let is_there = |world: &World| world.etcd.keys.contains_key(&key);
        let waits = |world: &World| is_there(world) && !is_first(world);
        while waits(&enter(&world)) {
            sleep(Duration::from_millis(rng.u64(1..=10))).await;
        }
        {
            let mut world = enter(&world);
            if is_there(&world) {
                say!(world, "peer: holds {name}, token {token}");
                let found = world.checker.granted_to_peer(&name, token);
                found.into_iter().for_each(|text| world.violation(text));
            }
        }
        sleep(Duration::from_millis(rng.u64(..400))).await;
        let crashed = enter(&world).now();
        if rng.u8(..8) > 0 {
            let _ = enter(&world).end_lease(lease, Cause::Peer);
        } else if let Some(known) = enter(&world).etcd.leases.get_mut(&lease) {
            // It has crashed.
            known.ttl = Duration::from_secs(2);
            known.expires = known.expires.min(crashed + known.ttl);
            expire(&world, lease);
        }
    }
}
