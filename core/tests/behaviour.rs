//! What a lock does, over both stores. Each test runs once in memory and once on a real etcd.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex as StdMutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use etcdlock::blocking::{Mutex, Session};
use etcdlock::{ErrorKind, Loss, Options};
use etcdlock_rig::Etcd;

const SOON: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(60);

fn etcd() -> &'static Etcd {
    static ETCD: OnceLock<Etcd> = OnceLock::new();
    ETCD.get_or_init(Etcd::start)
}

/// Makes two tests of each function, which is given a target and a lock name of its own.
macro_rules! on_both_stores {
    ($(fn $test:ident($target:ident: &str, $name:ident: &str) $body:block)*) => {
        $(fn $test($target: &str, $name: &str) $body)*
        mod memory {
            $(#[test] fn $test() { super::$test(concat!("memory:", stringify!($test)), concat!("/t/", stringify!($test))); })*
        }
        mod on_etcd {
            $(#[test] fn $test() { super::$test(&super::etcd().endpoint(), concat!("/t/", stringify!($test))); })*
        }
    };
}

fn connect(target: &str) -> Session {
    connect_with(target, Options::default())
}

fn connect_with(target: &str, options: Options) -> Session {
    Session::connect(target, options).expect("a session")
}

fn kind<T>(result: etcdlock::Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("this should have failed"),
        Err(error) => error.kind(),
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn queue_length(session: &Session, name: &str) -> usize {
    session.inspect(name).expect("inspect").len()
}

/// A resource that notices when two are inside, and when a token does not rise.
#[derive(Default)]
struct Resource {
    inside: AtomicI64,
    last_token: AtomicI64,
    count: AtomicU64,
}

impl Resource {
    fn visit(&self, token: i64) {
        assert_eq!(self.inside.fetch_add(1, Ordering::SeqCst), 0, "two are inside");
        let before = self.last_token.swap(token, Ordering::SeqCst);
        assert!(before < token, "token {token} came after {before}");
        // Not atomic on purpose: without exclusion, counts get lost.
        let count = self.count.load(Ordering::Relaxed);
        std::thread::yield_now();
        self.count.store(count + 1, Ordering::Relaxed);
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    fn visit_often(&self, mutex: &Mutex, rounds: usize) {
        for _ in 0..rounds {
            let hold = mutex.lock().expect("the lock");
            self.visit(hold.token());
            hold.unlock().expect("the unlock");
        }
    }
}

on_both_stores! {
    fn tokens_rise_and_a_hold_knows_its_state(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.mutex(name).unwrap();
        let first = mutex.lock().unwrap();
        assert!(first.is_held() && mutex.is_held() && first.check().is_ok());
        assert_eq!(mutex.token(), Some(first.token()));
        assert!(first.remaining() > Duration::from_secs(10) && first.remaining() < session.as_async().ttl());
        let token = first.token();
        first.unlock().unwrap();
        assert!(!mutex.is_held() && mutex.token().is_none() && mutex.remaining().is_zero());
        let second = mutex.lock().unwrap();
        assert!(second.token() > token);
        second.unlock().unwrap();
        assert_eq!(queue_length(&session, name), 0);
    }

    fn a_try_gets_a_free_lock_and_never_waits(target: &str, name: &str) {
        let (here, there) = (connect(target), connect(target));
        let mutex = here.mutex(name).unwrap();
        let hold = mutex.try_lock().unwrap().expect("it is free");
        assert!(mutex.try_lock().unwrap().is_none(), "a mutex is not re-entrant");
        assert!(there.mutex(name).unwrap().try_lock().unwrap().is_none());
        assert_eq!(kind(there.mutex(name).unwrap().lock_timeout(Duration::ZERO)), ErrorKind::Timeout);
        hold.unlock().unwrap();
        there.mutex(name).unwrap().try_lock().unwrap().expect("it is free again").unlock().unwrap();
        here.mutex(name).unwrap().lock_timeout(Duration::ZERO).unwrap().unlock().unwrap();
    }

    fn two_mutexes_of_one_name_in_one_session_exclude_each_other(target: &str, name: &str) {
        let session = connect(target);
        let (a, b) = (session.mutex(name).unwrap(), session.mutex(name).unwrap());
        let hold = a.lock().unwrap();
        assert_eq!(kind(b.lock_timeout(SOON)), ErrorKind::Timeout);
        assert_eq!(kind(b.unlock()), ErrorKind::NotHeld, "it is a's hold, not b's");
        hold.unlock().unwrap();
        b.lock_timeout(LONG).unwrap().unlock().unwrap();
    }

    fn unlocking_what_is_not_held_says_so(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.mutex(name).unwrap();
        assert_eq!(kind(mutex.unlock()), ErrorKind::NotHeld);
        let hold = mutex.lock().unwrap();
        mutex.unlock().unwrap();
        assert!(!hold.is_held());
        assert_eq!(kind(hold.check()), ErrorKind::NotHeld);
        assert_eq!(kind(hold.put("/k", "v")), ErrorKind::NotHeld);
        assert_eq!(kind(hold.unlock()), ErrorKind::NotHeld);
    }

    fn a_lock_that_times_out_leaves_nothing(target: &str, name: &str) {
        let (here, there) = (connect(target), connect(target));
        let hold = here.mutex(name).unwrap().lock().unwrap();
        for session in [&here, &there] {
            let error = session.mutex(name).unwrap().lock_timeout(SOON).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout);
            assert!(error.message().contains(name), "{error}");
        }
        assert_eq!(queue_length(&here, name), 1, "only the holder is in the queue");
        hold.unlock().unwrap();
        assert_eq!(queue_length(&here, name), 0);
        here.mutex(name).unwrap().lock_timeout(Duration::MAX).unwrap().unlock().unwrap();
    }

    fn a_dropped_hold_is_released(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.mutex(name).unwrap();
        drop(mutex.lock().unwrap());
        mutex.lock_timeout(LONG).unwrap().unlock().unwrap();
    }

    fn a_lock_cancelled_at_any_moment_leaves_nothing(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.mutex(name).unwrap();
        for round in 0..300 {
            let blocker = (round % 3 == 0).then(|| mutex.lock().unwrap());
            let waiting = session.as_async().mutex(name).unwrap().lock();
            std::thread::sleep(Duration::from_micros(round * 3));
            drop(waiting);
            drop(blocker);
        }
        let last = mutex.lock_timeout(LONG).expect("no cancelled lock is still held");
        until("only the last holder is left", || queue_length(&session, name) == 1);
        last.unlock().unwrap();
        until("nobody is left", || queue_length(&session, name) == 0);
    }

    fn waiters_of_one_process_are_served_in_their_order(target: &str, name: &str) {
        let sessions = [connect(target), connect(target)];
        let first = sessions[0].mutex(name).unwrap().lock().unwrap();
        let (tx, rx) = mpsc::channel();
        let cancellers: Vec<_> = (0..20).map(|i| {
            let tx = tx.clone();
            // Taken one after the other by the io thread, so their order is that of the calls.
            sessions[i % 2].as_async().mutex(name).unwrap().lock().on_done(move |hold| tx.send((i, hold.unwrap())).unwrap())
        }).collect();
        first.unlock().unwrap();
        for i in 0..20 {
            let (got, hold) = rx.recv_timeout(LONG).unwrap();
            assert_eq!(got, i);
            drop(hold);
        }
        assert_eq!(cancellers.len(), 20);
    }

    fn a_waiter_that_gives_up_leaves_its_place_to_the_next(target: &str, name: &str) {
        let sessions = [connect(target), connect(target), connect(target)];
        let first = sessions[0].mutex(name).unwrap().lock().unwrap();
        let gives_up = sessions[1].as_async().mutex(name).unwrap().lock();
        let stays = sessions[2].as_async().mutex(name).unwrap().lock();
        drop(gives_up);
        first.unlock().unwrap();
        drop(stays.wait_for(LONG).expect("in time").unwrap());
    }

    fn nested_names_are_independent(target: &str, name: &str) {
        let (a, b) = (connect(target), connect(target));
        let nested = format!("{name}/b");
        let outer = a.mutex(name).unwrap().lock().unwrap();
        let inner = b.mutex(&nested).unwrap().lock_timeout(LONG).unwrap();
        outer.unlock().unwrap();
        // The key of the inner lock is under the prefix of the outer one.
        let outer = a.mutex(name).unwrap().try_lock().unwrap().expect("free");
        outer.unlock().unwrap();
        let outer = b.mutex(name).unwrap().lock_timeout(LONG).unwrap();
        assert_eq!(queue_length(&a, name), 1);
        inner.unlock().unwrap();
        outer.unlock().unwrap();
    }

    fn guarded_requests_apply_while_held(target: &str, name: &str) {
        let session = connect(target);
        let hold = session.mutex(name).unwrap().lock().unwrap();
        let key = format!("{name}.state");
        assert_eq!(hold.get(key.as_str()).unwrap(), None);
        hold.put(key.as_str(), "paid").unwrap();
        assert_eq!(hold.get(key.as_str()).unwrap().as_deref(), Some(&b"paid"[..]));
        hold.delete(key.as_str()).unwrap();
        hold.delete(key.as_str()).unwrap();
        assert_eq!(hold.get(key.as_str()).unwrap(), None);
        assert_eq!(kind(hold.put("", "x")), ErrorKind::Invalid);
        let own_key = session.inspect(name).unwrap()[0].key.clone();
        assert_eq!(kind(hold.put(own_key, "x")), ErrorKind::Invalid);
        // It is not even copied: there may be no memory for that.
        let too_large = vec![0; 32 * 1024 * 1024 + 1];
        let error = hold.put(key.as_str(), &too_large).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.message().contains("33554433 bytes"), "{error}");
        assert_eq!(kind(hold.get(&too_large)), ErrorKind::Invalid);
        assert_eq!(kind(hold.delete(&too_large)), ErrorKind::Invalid);
        hold.unlock().unwrap();
    }

    fn a_ticket_that_another_hold_writes_over_is_put_right(target: &str, name: &str) {
        let (session, other) = (connect(target), connect(target));
        let hold = session.mutex(name).unwrap().lock().unwrap();
        let writer = other.mutex(&format!("{name}-writer")).unwrap().lock().unwrap();
        let key = session.inspect(name).unwrap()[0].key.clone();
        let whose = || session.inspect(name).unwrap()[0].pid;
        // Whoever reads a lasting hold's key finds its owner again.
        std::thread::sleep(Duration::from_millis(200));
        writer.put(&key, "not a card").unwrap();
        until("it tells whose it is again", || whose() == std::process::id());
        assert!(hold.is_held());
        // Under its lease again: it goes with it.
        session.close(LONG).unwrap();
        assert!(other.inspect(name).unwrap().is_empty());
        writer.unlock().unwrap();
    }

    fn closing_releases_everything_and_ends_every_wait(target: &str, name: &str) {
        let (closing, other) = (connect(target), connect(target));
        let hold = closing.mutex(name).unwrap().lock().unwrap();
        let (tx, lost) = mpsc::channel();
        hold.on_lost(move |loss| tx.send(loss).unwrap());
        let mutex = closing.mutex(name).unwrap();
        let waiting = mutex.as_async().lock();
        let next = other.as_async().mutex(name).unwrap().lock();
        closing.close(LONG).unwrap();
        assert_eq!(lost.recv_timeout(LONG).unwrap(), Loss::Closed);
        assert_eq!(kind(waiting.wait()), ErrorKind::Closed);
        assert!(!hold.is_held());
        assert_eq!(kind(hold.unlock()), ErrorKind::Lost);
        assert_eq!(kind(mutex.lock()), ErrorKind::Closed);
        assert_eq!(kind(mutex.try_lock()), ErrorKind::Closed);
        assert_eq!(kind(closing.mutex("x")), ErrorKind::Closed);
        assert_eq!(kind(closing.inspect("x")), ErrorKind::Closed);
        closing.close(LONG).unwrap();
        drop(next.wait_for(LONG).expect("the other session gets the lock").unwrap());
    }

    fn closing_ends_a_wait_for_a_lock_that_another_session_holds(target: &str, name: &str) {
        let (closing, other) = (connect(target), connect(target));
        let hold = other.mutex(name).unwrap().lock().unwrap();
        let mutex = closing.mutex(name).unwrap();
        let waiting = [mutex.as_async().lock(), mutex.as_async().lock_timeout(LONG * 10)];
        closing.close(LONG).unwrap();
        for waiting in waiting {
            assert_eq!(kind(waiting.wait_for(LONG).expect("it ends")), ErrorKind::Closed);
        }
        assert!(hold.is_held());
        hold.unlock().unwrap();
        assert_eq!(queue_length(&other, name), 0);
    }

    fn threads_that_share_a_mutex_which_keeps_its_hold_never_release_each_other(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.mutex(name).unwrap().as_async().clone();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let token = mutex.lock_and_keep(None).wait().unwrap();
                        assert!(mutex.is_held() && mutex.token() == Some(token), "released by the thread before");
                        mutex.unlock().wait().unwrap();
                    }
                });
            }
        });
        assert_eq!(queue_length(&session, name), 0);
    }

    fn a_session_is_closed_by_its_last_drop(target: &str, name: &str) {
        let other = connect(target);
        let session = connect(target);
        let hold = session.mutex(name).unwrap().lock().unwrap();
        std::mem::forget(hold);
        drop(session);
        other.mutex(name).unwrap().lock_timeout(LONG).unwrap().unlock().unwrap();
    }

    fn a_hold_kept_longer_than_max_hold_is_released(target: &str, name: &str) {
        let session = connect_with(target, Options::default().max_hold(SOON));
        let hold = session.mutex(name).unwrap().lock().unwrap();
        let (tx, lost) = mpsc::channel();
        hold.on_lost(move |loss| tx.send(loss).unwrap());
        assert_eq!(lost.recv_timeout(LONG).unwrap(), Loss::MaxHold);
        until("it is counted", || session.stats().lost_max_hold == 1);
        assert_eq!(kind(hold.unlock()), ErrorKind::Lost);
        until("the key is deleted", || queue_length(&session, name) == 0);
    }

    fn the_counters_tell_what_happened(target: &str, name: &str) {
        let session = connect_with(target, Options::default().max_hold(LONG));
        let mutex = session.mutex(name).unwrap();
        let hold = mutex.lock().unwrap();
        let stats = session.stats();
        assert_eq!((stats.locks, stats.waits, stats.hand_overs, stats.live_tickets), (1, 0, 0, 1));
        let waiting = mutex.as_async().lock();
        hold.unlock().unwrap();
        let hold = waiting.wait_for(LONG).expect("in time").unwrap();
        let stats = session.stats();
        assert_eq!((stats.locks, stats.waits, stats.hand_overs, stats.live_tickets), (2, 1, 1, 1));
        hold.unlock().wait().unwrap();
        until("no ticket is left", || session.stats().live_tickets == 0);
        let hold = mutex.lock().unwrap();
        session.as_async().close(LONG).wait().unwrap();
        assert_eq!(hold.loss(), Some(Loss::Closed));
        until("the loss is counted", || (session.stats().holds_lost, session.stats().lost_closed) == (1, 1));
        assert_eq!(session.stats().lost_deadline, 0);
    }

    fn a_namespace_goes_before_every_name(target: &str, name: &str) {
        let inside = connect_with(target, Options::default().namespace(format!("{name}/ns/")));
        let outside = connect(target);
        let mutex = inside.mutex("a").unwrap();
        assert_eq!(mutex.name(), format!("{name}/ns/a"));
        let hold = mutex.lock().unwrap();
        assert!(outside.mutex(&format!("{name}/ns/a")).unwrap().try_lock().unwrap().is_none());
        outside.mutex("a").unwrap().lock_timeout(LONG).unwrap().unlock().unwrap();
        assert_eq!(queue_length(&inside, "a"), 1);
        hold.unlock().unwrap();
    }

    fn inspect_shows_who_holds(target: &str, name: &str) {
        let holder = connect_with(target, Options::default().owner("billing"));
        let hold = holder.mutex(name).unwrap().lock().unwrap();
        let shown = holder.inspect(name).unwrap();
        assert_eq!(shown.len(), 1);
        assert!(shown[0].is_holder && shown[0].owner == "billing" && shown[0].language == "rust");
        assert_eq!((shown[0].pid, shown[0].token), (std::process::id(), hold.token()));
        assert!(!shown[0].host.is_empty() && shown[0].age.is_some_and(|age| age < LONG));
        hold.unlock().unwrap();
    }

    fn list_shows_the_names_that_are_held(target: &str, name: &str) {
        let session = connect_with(target, Options::default().namespace(format!("{name}/")));
        assert!(session.list("").unwrap().is_empty());
        let holds = ["b", "a", "a/x"].map(|name| session.mutex(name).unwrap().lock().unwrap());
        holds[0].put(format!("{name}/b/12345"), "data, not a contender").unwrap();
        let names = |prefix: &str| session.list(prefix).unwrap().into_iter().map(|queue| queue.name).collect::<Vec<_>>();
        assert_eq!(names(""), ["a", "a/x", "b"]);
        assert_eq!(names("a"), ["a", "a/x"]);
        let queue = &session.list("b").unwrap()[0];
        assert!(queue.contenders.len() == 1 && queue.contenders[0].is_holder && queue.contenders[0].token == holds[0].token());
        assert!(connect(target).list(&format!("{name}/")).unwrap().iter().any(|queue| queue.name == format!("{name}/a/x")));
    }

    fn a_kept_hold_belongs_to_its_mutex(target: &str, name: &str) {
        let session = connect(target);
        let mutex = session.as_async().mutex(name).unwrap();
        let token = mutex.lock_and_keep(None).wait().unwrap();
        assert_eq!(mutex.token(), Some(token));
        assert!(mutex.is_held());
        assert_eq!(mutex.with_kept(|hold| hold.token()), Some(token));
        assert_eq!(mutex.try_lock_and_keep().wait().unwrap(), None);
        mutex.unlock().wait().unwrap();
        assert_eq!(mutex.with_kept(|hold| hold.token()), None);
        assert!(mutex.try_lock_and_keep().wait().unwrap().is_some_and(|next| next > token));
        // Dropped while it keeps a hold: released.
        drop(mutex);
        session.mutex(name).unwrap().lock_timeout(LONG).unwrap().unlock().unwrap();
    }

    fn a_bad_name_is_refused_at_once(target: &str, _name: &str) {
        let session = connect(target);
        for name in ["", "a\0b", &"x".repeat(1025)] {
            assert_eq!(kind(session.mutex(name)), ErrorKind::Invalid);
            assert_eq!(kind(session.inspect(name)), ErrorKind::Invalid);
        }
    }

    fn threads_of_one_session_are_never_inside_together(target: &str, name: &str) {
        let (session, resource) = (connect(target), Resource::default());
        std::thread::scope(|scope| for _ in 0..8 {
            scope.spawn(|| resource.visit_often(&session.mutex(name).unwrap(), 1250));
        });
        assert_eq!(resource.count.load(Ordering::Relaxed), 10_000);
        assert_eq!(queue_length(&session, name), 0);
    }

    fn threads_sharing_one_mutex_are_never_inside_together(target: &str, name: &str) {
        let (session, resource) = (connect(target), Resource::default());
        let mutex = session.mutex(name).unwrap();
        std::thread::scope(|scope| for _ in 0..8 {
            scope.spawn(|| resource.visit_often(&mutex, 1250));
        });
        assert_eq!(resource.count.load(Ordering::Relaxed), 10_000);
    }

    fn sessions_of_one_process_are_never_inside_together(target: &str, name: &str) {
        let resource = Resource::default();
        std::thread::scope(|scope| for _ in 0..8 {
            scope.spawn(|| {
                let session = connect(target);
                resource.visit_often(&session.mutex(name).unwrap(), 1000);
                session.close(LONG).unwrap();
            });
        });
        assert_eq!(resource.count.load(Ordering::Relaxed), 8000);
        assert_eq!(queue_length(&connect(target), name), 0);
    }

    fn of_64_threads_that_try_exactly_one_wins(target: &str, name: &str) {
        let session = connect(target);
        let winners = StdMutex::new(Vec::new());
        let start = std::sync::Barrier::new(64);
        std::thread::scope(|scope| for _ in 0..64 {
            scope.spawn(|| {
                let mutex = session.mutex(name).unwrap();
                start.wait();
                if let Some(hold) = mutex.try_lock().unwrap() {
                    winners.lock().unwrap().push(hold);
                }
            });
        });
        assert_eq!(winners.lock().unwrap().len(), 1);
    }

    fn a_result_can_be_awaited_on_any_executor(target: &str, name: &str) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let session = etcdlock::Session::connect(target, Options::default()).await.unwrap();
            let mutex = session.mutex(name).unwrap();
            let hold = mutex.lock().await.unwrap();
            assert!(mutex.try_lock().await.unwrap().is_none());
            assert_eq!(kind(mutex.lock_timeout(SOON).await), ErrorKind::Timeout);
            hold.unlock().await.unwrap();
            session.close(LONG).await.unwrap();
        });
    }
}

#[test]
fn bad_targets_and_options_fail_at_once() {
    for target in ["redis://x:1", "http://", "a:0", "memory:a,memory:b"] {
        assert_eq!(kind(Session::connect(target, Options::default())), ErrorKind::Invalid, "{target}");
    }
    assert_eq!(kind(Session::connect(Vec::<String>::new(), Options::default())), ErrorKind::Invalid);
    assert_eq!(kind(Session::connect("memory:", Options::default().ttl(Duration::from_secs(1)))), ErrorKind::Invalid);
    let missing = Options::default().ca("/no/such/file.pem");
    assert_eq!(kind(Session::connect("https://127.0.0.1:1", missing)), ErrorKind::Invalid);
}

#[test]
fn memory_targets_of_one_name_are_one_place_and_of_two_names_are_two() {
    let (a, same, other) = (connect("memory:place-a"), connect("memory:place-a"), connect("memory:place-b"));
    let hold = a.mutex("x").unwrap().lock().unwrap();
    assert!(same.mutex("x").unwrap().try_lock().unwrap().is_none());
    other.mutex("x").unwrap().try_lock().unwrap().expect("another place").unlock().unwrap();
    hold.unlock().unwrap();
}
