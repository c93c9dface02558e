//! The library's two threads, and what a fork does to them.
//!
//! `etcdlock-io` runs every lease, queue and timer. No foreign code ever runs on it, so a caller
//! that blocks cannot cost a lease. `etcdlock-notify` runs callbacks; it may be slow.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow};
use tokio::sync::Notify;

use crate::clock::{BootClock, Clock};
use crate::error::{Error, Result};

/// How long the io thread looks for the next call before it sleeps. A caller that was just answered
/// often calls again at once, as from lock to unlock, and waking a thread costs as much as this.
const STAY_AWAKE: Duration = Duration::from_micros(40);

const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

type Callback = Box<dyn FnOnce() + Send>;

/// What core needs from around it: where tasks run, where callbacks run, and the time. One pointer,
/// because every waiting call keeps it.
#[derive(Clone)]
pub(crate) struct Env(Arc<Surroundings>);

pub(crate) struct Surroundings {
    io: tokio::runtime::Handle,
    notify: mpsc::Sender<Callback>,
    clock: Arc<dyn Clock>,
    pid: u32,
    answered: Arc<Notify>,
    /// What the floors above keep of this process.
    above: OnceLock<Box<dyn Any + Send + Sync>>,
    /// The process of a simulation that this is the surroundings of.
    #[cfg(test)]
    pub(crate) simulated: Option<Arc<crate::simulation::Process>>,
}

impl std::ops::Deref for Env {
    type Target = Surroundings;

    fn deref(&self) -> &Surroundings {
        &self.0
    }
}

impl Env {
    /// The threads of this process, started on first use. After a fork the child gets its own.
    pub(crate) fn of_process() -> Result<Env> {
        // A chain instead of a lock: a lock could be held by another thread at the moment of a fork.
        let mut link = CHAIN.get_or_init(Link::new);
        let mut tried = false;
        loop {
            let is_last = link.next.get().is_none();
            if link.pid == std::process::id() && (link.env.is_ok() || tried && is_last) {
                return link.env.clone();
            }
            // A parent's, or one for which there were no threads to be had when it was tried: that may have passed.
            tried |= is_last;
            link = link.next.get_or_init(|| Box::new(Link::new()));
        }
    }

    /// The surroundings of one process of a simulation, on the runtime of that.
    #[cfg(test)]
    pub(crate) fn simulated(process: Arc<crate::simulation::Process>) -> Env {
        Env(Arc::new(Surroundings {
            io: tokio::runtime::Handle::current(),
            notify: mpsc::channel().0,
            clock: process.clone(),
            pid: std::process::id(),
            answered: Arc::default(),
            above: OnceLock::new(),
            simulated: Some(process),
        }))
    }

    /// What they keep, of one type. It goes with the process.
    pub(crate) fn of_those_above<T: Default + Send + Sync + 'static>(&self) -> &T {
        let above = self.above.get_or_init(|| Box::new(T::default()));
        above.downcast_ref().expect("one type of one process")
    }

    pub(crate) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Runs a task on the io thread.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> tokio::task::AbortHandle {
        #[cfg(test)]
        if let Some(process) = &self.simulated {
            return process.spawn(task);
        }
        self.io.spawn(task).abort_handle()
    }

    /// A call was answered.
    pub(crate) fn answered(&self) {
        self.answered.notify_one();
    }

    /// Runs foreign code on the notify thread.
    pub(crate) fn call_back(&self, callback: impl FnOnce() + Send + 'static) {
        #[cfg(test)]
        if self.simulated.is_some() {
            return callback();
        }
        // It fails only once the thread is gone, at the end of the process.
        let _ = self.notify.send(Box::new(callback));
    }

    /// Whether this is the process that made the threads.
    pub(crate) fn is_forked(&self) -> bool {
        if FORKS_ARE_COUNTED.load(Ordering::Relaxed) {
            return self.pid != CURRENT_PID.load(Ordering::Relaxed);
        }
        self.pid != std::process::id()
    }

    pub(crate) fn check_fork(&self) -> Result<()> {
        if self.is_forked() { Err(Error::forked()) } else { Ok(()) }
    }
}

/// For bindings, which may use `unsafe` to call `pthread_atfork`: call once at load time, and then
/// in the child after every fork. It spares a system call in every `is_held()`.
#[doc(hidden)]
pub fn note_process_id() {
    CURRENT_PID.store(std::process::id(), Ordering::Relaxed);
    FORKS_ARE_COUNTED.store(true, Ordering::Relaxed);
}

/// For bindings: whether a blocking call on this thread could return. They ask before they start
/// what they would wait for.
#[doc(hidden)]
pub fn check_may_block() -> Result<()> {
    if must_not_block() { Err(Error::deadlock()) } else { Ok(()) }
}

/// For bindings: runs foreign code on the notify thread, after what was sent there before. By way of
/// the io thread, so that what that is sending just now comes first too.
#[doc(hidden)]
pub fn on_notify_thread(callback: impl FnOnce() + Send + 'static) -> Result<()> {
    let env = Env::of_process()?;
    let io = env.clone();
    env.spawn(async move { io.call_back(callback) });
    Ok(())
}

/// How long a task that has panicked waits before it starts again: what is wrong may last.
pub(crate) const AFTER_A_PANIC: Duration = Duration::from_millis(100);

/// What a future comes to; an error if it panics.
pub(crate) async fn catching<T>(future: impl Future<Output = T>) -> std::result::Result<T, Panicked> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(_) => Poll::Ready(Err(Panicked)),
    })
    .await
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Panicked;

static CURRENT_PID: AtomicU32 = AtomicU32::new(0);
static FORKS_ARE_COUNTED: AtomicBool = AtomicBool::new(false);
static CHAIN: OnceLock<Link> = OnceLock::new();

/// The threads of one process, and the way to those of its children.
struct Link {
    pid: u32,
    env: Result<Env>,
    next: OnceLock<Box<Link>>,
}

impl Link {
    fn new() -> Link {
        let pid = std::process::id();
        let env = start_threads(pid).map_err(|error| {
            Error::new(crate::ErrorKind::Unavailable, format!("the threads of etcdlock cannot be started: {error}"))
        });
        Link { pid, env, next: OnceLock::new() }
    }
}

thread_local! {
    static MUST_NOT_BLOCK: Cell<bool> = const { Cell::new(false) };
}

/// Whether a blocking call on this thread could never return.
pub(crate) fn must_not_block() -> bool {
    MUST_NOT_BLOCK.get()
}

fn start_threads(pid: u32) -> std::io::Result<Env> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // Of names that are looked up and files that are read. The first is there from the start and stays: one that cannot be
        // started when it is needed would be a panic.
        .thread_name("etcdlock-files")
        .thread_keep_alive(FOR_EVER)
        .build()?;
    let io = runtime.handle().clone();
    let answered = Arc::new(Notify::new());
    let stay_awake = answered.clone();
    let (notify, callbacks) = mpsc::channel::<Callback>();

    // The new threads inherit the mask: the program's signals go to the program's threads.
    let mut before = SigSet::empty();
    let masked = nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before)).is_ok();
    let first_for_files = catch_unwind(|| drop(io.spawn_blocking(|| {})));
    let started = std::thread::Builder::new()
        .name("etcdlock-io".into())
        .spawn(move || {
            MUST_NOT_BLOCK.set(true);
            runtime.block_on(async {
                loop {
                    stay_awake.notified().await;
                    let until = Instant::now() + STAY_AWAKE;
                    while Instant::now() < until {
                        std::thread::yield_now();
                        tokio::task::yield_now().await;
                    }
                }
            });
        })
        .and_then(|_| {
            std::thread::Builder::new().name("etcdlock-notify".into()).spawn(move || {
                MUST_NOT_BLOCK.set(true);
                for callback in callbacks {
                    // The panic belongs to the caller's code; the next callback must still run.
                    let _ = catch_unwind(AssertUnwindSafe(callback));
                }
            })
        });
    if masked {
        let _ = before.thread_set_mask();
    }
    started?;
    first_for_files.map_err(|_| std::io::Error::other("no thread can be started"))?;
    Ok(Env(Arc::new(Surroundings {
        io,
        notify,
        clock: Arc::new(BootClock),
        pid,
        answered,
        above: OnceLock::new(),
        #[cfg(test)]
        simulated: None,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_threads_take_no_signals() {
        let env = Env::of_process().unwrap();
        let (tx, rx) = mpsc::channel();
        let from_io = tx.clone();
        env.spawn(async move { from_io.send(SigSet::thread_get_mask().unwrap()).unwrap() });
        env.call_back(move || tx.send(SigSet::thread_get_mask().unwrap()).unwrap());
        for _ in 0..2 {
            let mask = rx.recv().unwrap();
            assert!(mask.contains(nix::sys::signal::Signal::SIGINT) && mask.contains(nix::sys::signal::Signal::SIGTERM));
        }
        assert!(!SigSet::thread_get_mask().unwrap().contains(nix::sys::signal::Signal::SIGINT));
    }

    #[test]
    fn row_41_a_future_that_panics_is_caught_at_any_poll() {
        let env = Env::of_process().unwrap();
        let (tx, rx) = mpsc::channel();
        env.spawn(async move {
            tx.send(catching(async { 7 }).await).unwrap();
            let later = async {
                tokio::task::yield_now().await;
                panic!("a panic on purpose, from a task");
            };
            tx.send(catching(later).await).unwrap();
        });
        assert_eq!((rx.recv().unwrap(), rx.recv().unwrap()), (Ok(7), Err(Panicked)));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn row_41_the_thread_for_names_and_files_is_there_before_it_is_needed_and_stays() {
        Env::of_process().unwrap();
        // Idle threads of tokio end after ten seconds, if nothing is said.
        std::thread::sleep(Duration::from_secs(11));
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
        assert!(names.into_iter().any(|name| name.trim() == "etcdlock-files"));
    }

    #[test]
    fn a_callback_that_panics_does_not_stop_the_next() {
        let env = Env::of_process().unwrap();
        let (tx, rx) = mpsc::channel();
        env.call_back(|| panic!("a panic on purpose, from a callback"));
        env.call_back(move || tx.send(must_not_block()).unwrap());
        assert!(rx.recv().unwrap());
    }
}
