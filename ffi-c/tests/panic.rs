//! A panic inside the core, on its own thread, while C callers wait. A subscriber to the log makes it,
//! so the library that ships has no door for it.

use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use etcdlock_c::*;

static PANICS: AtomicBool = AtomicBool::new(false);
static RENEWAL_PANICS: AtomicBool = AtomicBool::new(false);

/// Panics where the core tells of a grant.
struct Panics;

impl tracing::Subscriber for Panics {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        ["etcdlock::grant", "etcdlock::renewal"].contains(&metadata.target())
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let panics = if event.metadata().target() == "etcdlock::grant" { &PANICS } else { &RENEWAL_PANICS };
        if panics.swap(false, Ordering::SeqCst) {
            panic!("a panic on purpose, inside the core");
        }
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

fn last_error() -> String {
    // SAFETY: the library gives a text that is valid until the next failure on this thread.
    unsafe { CStr::from_ptr(etcdlock_last_error()) }.to_string_lossy().into_owned()
}

fn open(target: &CStr) -> *mut etcdlock_session {
    let mut session = null_mut();
    // SAFETY: a text, and a place for a pointer.
    assert_eq!(unsafe { etcdlock_session_open(target.as_ptr(), null(), &mut session) }, ETCDLOCK_OK, "{}", last_error());
    session
}

fn mutex(session: *mut etcdlock_session, name: &CStr) -> *mut etcdlock_mutex {
    let mut mutex = null_mut();
    // SAFETY: a handle, a text, and a place for a pointer.
    assert_eq!(unsafe { etcdlock_mutex_new(session, name.as_ptr(), &mut mutex) }, ETCDLOCK_OK, "{}", last_error());
    mutex
}

unsafe extern "C" fn done(status: i32, _token: i64, tell: *mut c_void) {
    // SAFETY: it was made by Box::into_raw below, and this is called once.
    let tell = unsafe { Box::from_raw(tell.cast::<mpsc::Sender<i32>>()) };
    let _ = tell.send(status);
}

fn start_lock(mutex: *mut etcdlock_mutex) -> mpsc::Receiver<i32> {
    let (tell, told) = mpsc::channel::<i32>();
    let tell = Box::into_raw(Box::new(tell)).cast();
    // SAFETY: the function takes what it is given, once.
    assert_eq!(unsafe { etcdlock_mutex_lock_start(mutex, -1, Some(done), tell, null_mut()) }, ETCDLOCK_OK);
    told
}

#[test]
fn a_panic_inside_the_core_is_internal_to_every_caller_and_the_process_goes_on() {
    let _ = tracing::subscriber::set_global_default(Panics);
    let etcd = etcdlock_rig::Etcd::start();
    for target in ["memory:panic".to_owned(), etcd.endpoint()] {
        let target = CString::new(target).expect("no NUL");
        let session = open(&target);
        let (first, second, other) = (mutex(session, c"/panic"), mutex(session, c"/panic"), mutex(session, c"/other"));
        assert_eq!(etcdlock_mutex_lock(other, 20_000), ETCDLOCK_OK, "{}", last_error());
        assert_eq!(etcdlock_mutex_lock(first, 20_000), ETCDLOCK_OK, "{}", last_error());

        // Two wait; the grant to the next one panics, in the task that both depend on.
        let told = [start_lock(second), start_lock(second)];
        PANICS.store(true, Ordering::SeqCst);
        etcdlock_mutex_unlock(first);
        let mut statuses = told.map(|told| told.recv_timeout(Duration::from_secs(60)).expect("every caller is told"));
        statuses.sort_unstable();
        assert!(!PANICS.load(Ordering::SeqCst), "it was not reached");
        // The panic came after the first of them was given its hold.
        assert_eq!(statuses[1], ETCDLOCK_INTERNAL, "{statuses:?}");

        // What was under the lease of the panic is lost, with that reason ...
        assert_eq!(etcdlock_mutex_is_held(second), 0);
        assert_eq!(etcdlock_mutex_is_held(other), 0);
        assert_eq!(etcdlock_mutex_check(other), ETCDLOCK_LOST);
        assert_eq!(etcdlock_mutex_loss(other), ETCDLOCK_LOSS_INTERNAL);
        assert_eq!(etcdlock_mutex_unlock(other), ETCDLOCK_LOST);

        // ... and the process lives: the same session and a new one work.
        etcdlock_mutex_unlock(second);
        assert_eq!(etcdlock_mutex_lock(first, 60_000), ETCDLOCK_OK, "{}", last_error());
        assert_eq!(etcdlock_mutex_unlock(first), ETCDLOCK_OK, "{}", last_error());
        let anew = open(&target);
        let again = mutex(anew, c"/panic");
        assert_eq!(etcdlock_mutex_lock(again, 60_000), ETCDLOCK_OK, "{}", last_error());
        assert_eq!(etcdlock_mutex_unlock(again), ETCDLOCK_OK, "{}", last_error());

        // The keeper of a lease too starts again, and with it the session goes on: a renewal comes after a third of 10 s, and
        // that of either session panics.
        for mutex in [other, again] {
            assert_eq!(etcdlock_mutex_lock(mutex, 60_000), ETCDLOCK_OK, "{}", last_error());
        }
        RENEWAL_PANICS.store(true, Ordering::SeqCst);
        let until = Instant::now() + Duration::from_secs(60);
        let lost = loop {
            match [other, again].into_iter().find(|mutex| etcdlock_mutex_is_held(*mutex) == 0) {
                Some(lost) => break lost,
                None => assert!(Instant::now() < until, "nothing was lost"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(!RENEWAL_PANICS.load(Ordering::SeqCst), "it was not reached");
        assert_eq!(etcdlock_mutex_loss(lost), ETCDLOCK_LOSS_INTERNAL);
        assert_eq!(etcdlock_mutex_unlock(lost), ETCDLOCK_LOST);
        assert_eq!(etcdlock_mutex_lock(lost, 60_000), ETCDLOCK_OK, "{}", last_error());
        for mutex in [other, again] {
            assert_eq!(etcdlock_mutex_unlock(mutex), ETCDLOCK_OK, "{}", last_error());
        }

        for mutex in [first, second, other, again] {
            assert_eq!(etcdlock_mutex_free(mutex), ETCDLOCK_OK);
        }
        for session in [session, anew] {
            assert_eq!(etcdlock_session_close(session, 20_000), ETCDLOCK_OK, "{}", last_error());
        }
    }
}
