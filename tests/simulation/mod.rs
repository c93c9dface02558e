//! The core that ships, in virtual time, against a simulated etcd.
//!
//! One schedule is one seed: some processes with sessions and callers, and a sequence of faults. It
//! runs on one thread with tokio's paused clock. Everything from `lock()` down to the
//! encoding of requests is the real thing; only the connection ([`network`]), the server ([`etcd`]), the clock
//! and the random numbers are not. So a seed replays exactly. CONTRIBUTING.md says how.

mod checker;
mod etcd;
mod network;
mod schedule;
mod wire;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::network::{Shared, Wire};
use crate::clock::Clock;

/// A process of the simulation: a clock of its own, and tasks that can be stopped together.
pub(crate) struct Process {
    number: usize,
    world: Shared,
    start: Instant,
    /// Its clock's seconds in one of etcd's.
    rate: f64,
    /// How far its clock has jumped ahead, in nanoseconds.
    jumped: AtomicU64,
    killed: AtomicBool,
    doings: Mutex<Doings>,
}

#[derive(Default)]
struct Doings {
    paused: bool,
    /// On the simulation's clock.
    last_resumed: Option<Duration>,
    /// The tasks that have something to do, by the order in which they were made. What one event
    /// wakes at once is run in that order: tokio's `watch` wakes its receivers in a random one.
    ready: BTreeMap<u64, Waker>,
    dispatcher: Option<Waker>,
    last_task: u64,
    tasks: Vec<AbortHandle>,
}

impl Process {
    fn new(number: usize, world: Shared, rate: f64) -> Arc<Process> {
        let start = Instant::now();
        let (jumped, killed, doings) = Default::default();
        let process = Arc::new(Process { number, world, start, rate, jumped, killed, doings });
        let dispatching = process.clone();
        tokio::spawn(std::future::poll_fn(move |cx| dispatching.dispatch(cx)));
        process
    }

    /// Lets those tasks run that have something to do.
    fn dispatch(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut doings = self.doings();
        doings.dispatcher = Some(cx.waker().clone());
        let ready = if doings.paused { BTreeMap::new() } else { std::mem::take(&mut doings.ready) };
        drop(doings);
        ready.into_values().for_each(Waker::wake);
        Poll::Pending
    }

    fn has_work(&self, task: u64, waker: Waker) {
        let mut doings = self.doings();
        doings.ready.insert(task, waker);
        let dispatcher = doings.dispatcher.take();
        drop(doings);
        if let Some(dispatcher) = dispatcher {
            dispatcher.wake();
        }
    }

    fn doings(&self) -> MutexGuard<'_, Doings> {
        self.doings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let id = {
            let mut doings = self.doings();
            doings.last_task += 1;
            doings.last_task
        };
        let wakes = Arc::new(Wakes { process: self.clone(), id, task: Mutex::default() });
        let handle = tokio::spawn(Stoppable { wakes, task: Box::pin(task) }).abort_handle();
        if self.is_killed() {
            handle.abort();
        }
        let mut doings = self.doings();
        doings.tasks.retain(|task| !task.is_finished());
        doings.tasks.push(handle.clone());
        handle
    }

    /// The connection to the member of this URL, `http://member<n>`.
    pub(crate) fn channel(&self, url: &str) -> crate::store::etcd::api::Channel {
        let member = url.trim_start_matches("http://member").trim_end_matches(":2379").parse().expect("a simulated URL");
        Wire { world: self.world.clone(), process: self.number, member }.channel()
    }

    /// Tasks that have not ended.
    fn tasks(&self) -> usize {
        self.doings().tasks.iter().filter(|task| !task.is_finished()).count()
    }

    fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// As by SIGKILL: nothing of it runs again.
    fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        let tasks = std::mem::take(&mut self.doings().tasks);
        tasks.iter().for_each(AbortHandle::abort);
    }

    /// As by SIGSTOP: its clock goes on, it does not.
    fn pause(&self) {
        self.doings().paused = true;
    }

    fn resume(&self, now: Duration) {
        let mut doings = self.doings();
        doings.paused = false;
        doings.last_resumed = Some(now);
        let dispatcher = doings.dispatcher.take();
        drop(doings);
        if let Some(dispatcher) = dispatcher {
            dispatcher.wake();
        }
    }

    /// Whether it has had the time to do what was due.
    fn ran_lately(&self, now: Duration) -> bool {
        let doings = self.doings();
        !doings.paused && doings.last_resumed.is_none_or(|resumed| now > resumed + Duration::from_millis(5))
    }

    /// Whether it ran all the time since then.
    fn ran_since(&self, then: Duration) -> bool {
        let doings = self.doings();
        !doings.paused && doings.last_resumed.is_none_or(|resumed| resumed < then)
    }

    fn jump(&self, by: Duration) {
        self.jumped.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Clock for Process {
    fn now(&self) -> Duration {
        let jumped = Duration::from_nanos(self.jumped.load(Ordering::Relaxed));
        Duration::from_secs(1000) + self.start.elapsed().mul_f64(self.rate) + jumped
    }
}

/// A task of a process, which does nothing while that is paused.
struct Stoppable<F> {
    wakes: Arc<Wakes>,
    task: Pin<Box<F>>,
}

/// What wakes a task: by way of its process.
struct Wakes {
    process: Arc<Process>,
    id: u64,
    task: Mutex<Option<Waker>>,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        let waker = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            self.process.has_work(self.id, waker);
        }
    }
}

impl<F: Future<Output = ()>> Future for Stoppable<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        *self.wakes.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        if self.wakes.process.doings().paused {
            self.wakes.clone().wake();
            return Poll::Pending;
        }
        let waker = Waker::from(self.wakes.clone());
        self.task.as_mut().poll(&mut Context::from_waker(&waker))
    }
}

thread_local! {
    /// Panics of tasks, which tokio would keep to itself.
    static PANICS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Keeps the panics of simulations, to be violations; those of other tests are printed as ever.
fn note_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let noted = PANICS.with_borrow_mut(|panics| match panics {
                Some(panics) => {
                    panics.push(panic.to_string());
                    true
                }
                None => false,
            });
            if !noted {
                before(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::num::NonZero;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use super::network::Fault;
    use super::schedule::{Outcome, run};
    use crate::sabotage::{self, Sabotage};

    fn from_env(name: &str) -> Option<u64> {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
    }

    #[derive(Default)]
    struct Sum {
        schedules: u64,
        events: u64,
        requests: u64,
        acquisitions: u64,
        faults: BTreeMap<Fault, u64>,
        failed: Vec<Outcome>,
    }

    impl Sum {
        fn add(&mut self, outcome: Outcome) {
            self.schedules += 1;
            self.events += outcome.events;
            self.requests += outcome.requests;
            self.acquisitions += outcome.acquisitions;
            for (fault, times) in &outcome.faults {
                *self.faults.entry(*fault).or_default() += times;
            }
            if !outcome.violations.is_empty() {
                self.failed.push(outcome);
            }
        }
    }

    /// Runs seeds from `first` on, on all processors, until there were `most`, the time is up, or
    /// too many have failed.
    fn run_many(first: u64, most: u64, limit: Option<Duration>) -> Sum {
        let (start, next, sum) = (Instant::now(), AtomicU64::new(first), Mutex::new(Sum::default()));
        std::thread::scope(|threads| {
            for _ in 0..std::thread::available_parallelism().map_or(2, NonZero::get) {
                threads.spawn(|| {
                    while limit.is_none_or(|limit| start.elapsed() < limit) {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= first.saturating_add(most) {
                            return;
                        }
                        let outcome = run(seed, false);
                        let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                        sum.add(outcome);
                        if sum.failed.len() >= 3 {
                            return;
                        }
                    }
                });
            }
        });
        sum.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replays a seed that failed, and prints what happened.
    fn tell(failed: &Outcome) -> String {
        let replay = run(failed.seed, true);
        let lines = replay.lines.unwrap_or_default();
        let path = std::env::temp_dir().join(format!("etcdlock-seed-{}.log", failed.seed));
        let whole = match std::fs::write(&path, lines.join("\n")) {
            Ok(()) => format!("the whole log is in {}", path.display()),
            Err(error) => format!("the whole log could not be kept: {error}"),
        };
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        let exact = if replay.hash == failed.hash { "replays exactly" } else { "DOES NOT REPLAY EXACTLY" };
        format!(
            "seed {} ({exact}): {}\n{tail}\n{whole}\nagain: ETCDLOCK_SEED={} cargo test --release -p etcdlock --lib simulation",
            failed.seed,
            failed.violations.join("; "),
            failed.seed
        )
    }

    /// `ETCDLOCK_SCHEDULES` (1,000; 5,000 in `make test`), or as many as `ETCDLOCK_SIMULATE_SECONDS` gives time for, from
    /// `ETCDLOCK_FIRST_SEED` on. With `ETCDLOCK_SEED` that one alone, with its log.
    #[test]
    fn nothing_is_violated_in_thousands_of_schedules() {
        if let Some(seed) = from_env("ETCDLOCK_SEED") {
            let outcome = run(seed, true);
            println!("{}", outcome.lines.unwrap_or_default().join("\n"));
            assert!(outcome.violations.is_empty(), "seed {seed}: {:#?}", outcome.violations);
            return;
        }
        let limit = from_env("ETCDLOCK_SIMULATE_SECONDS").map(Duration::from_secs);
        let most = from_env("ETCDLOCK_SCHEDULES").unwrap_or(if limit.is_some() { u64::MAX } else { 1_000 });
        let start = Instant::now();
        let sum = run_many(from_env("ETCDLOCK_FIRST_SEED").unwrap_or(1), most, limit);
        let faults: Vec<_> = sum.faults.iter().map(|(fault, times)| format!("{fault:?} {times}")).collect();
        println!(
            "\nsimulation: {} schedules, {} events, {} requests, {} acquisitions, {} faults ({}), {} schedules with violations, {:.1} s",
            sum.schedules,
            sum.events,
            sum.requests,
            sum.acquisitions,
            sum.faults.values().sum::<u64>(),
            faults.join(", "),
            sum.failed.len(),
            start.elapsed().as_secs_f64()
        );
        assert!(sum.failed.is_empty(), "{}", sum.failed.iter().map(tell).collect::<Vec<_>>().join("\n\n"));
        assert!(sum.acquisitions > sum.schedules, "hardly anybody got a lock");
    }

    #[test]
    fn a_renewal_in_a_hurry_finds_the_one_member_that_answers_for_a_moment() {
        for seed in 1..=30 {
            for member in 0..3 {
                assert!(super::schedule::survives_on_one_moment(seed, member), "seed {seed}, member {member}");
            }
        }
    }

    #[test]
    fn a_seed_replays_exactly() {
        for seed in 1..=50 {
            // Nor does it depend on the log's being kept.
            let (one, two, three) = (run(seed, true), run(seed, true), run(seed, false));
            let (lines, again) = (one.lines.unwrap_or_default(), two.lines.unwrap_or_default());
            if let Some(at) = (0..lines.len().max(again.len())).find(|at| lines.get(*at) != again.get(*at)) {
                panic!("seed {seed}, line {at}:\n{:?}\nthen\n{:?}", lines.get(at), again.get(at));
            }
            assert_eq!((one.hash, one.hash), (two.hash, three.hash), "seed {seed}");
        }
        assert_ne!(run(1, false).hash, run(2, false).hash);
    }

    /// Without one protection the checker finds a violation within this many seeds.
    #[test]
    fn each_protection_that_is_taken_out_is_missed() {
        const ENOUGH: u64 = 30_000;
        let start = Instant::now();
        for (name, sabotage) in sabotage::ALL {
            // What goes wrong for the user, not just anything.
            let symptom = match sabotage {
                Sabotage::DeadlineFromReceipt => "and it says it is held",
                Sabotage::UnlockByName => "is gone (Request",
                Sabotage::NoOwnKeyWatch => "has not heard that its key is gone",
                Sabotage::LateAnswerRevives => "was lost and says again that it is held",
                Sabotage::NoInProcessQueue => "both say they are held",
                Sabotage::HandOverSkipsOrder => "was granted while",
            };
            let caught = std::thread::spawn(move || {
                sabotage::choose(Some(sabotage));
                (1..=ENOUGH).find_map(|seed| {
                    let found = run(seed, false).violations.into_iter().find(|violation| violation.contains(symptom));
                    found.map(|violation| (seed, violation))
                })
            });
            let caught = caught.join().unwrap_or_else(|_| panic!("{name}: the simulation panicked"));
            let (seed, violation) = caught.unwrap_or_else(|| panic!("{name}: not caught in {ENOUGH} schedules"));
            println!("\nsabotage {name}: caught with seed {seed}: {violation}");
        }
        println!("sabotage: all caught, {:.1} s", start.elapsed().as_secs_f64());
    }
}
