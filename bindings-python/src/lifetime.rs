//! Forks, and the end of the interpreter.
//!
//! Once the interpreter shuts down, a foreign thread that asks for the GIL is ended on the spot
//! (before CPython 3.14 by unwinding its stack, which Rust answers with an abort). So every thread
//! passes a gate before it asks, and the exit handler closes the gate and waits for those inside.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Once, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

/// How long the end of the process waits for the sessions to be closed in etcd.
const SHUTDOWN: Duration = Duration::from_secs(1);
/// How long it waits for threads that are inside. They only wait for the GIL, which is free then.
const DRAIN: Duration = Duration::from_millis(300);

static EXITING: AtomicBool = AtomicBool::new(false);
static EXIT_THREAD: OnceLock<ThreadId> = OnceLock::new();
static INSIDE: AtomicUsize = AtomicUsize::new(0);
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A thread that may ask for the GIL.
struct Inside;

impl Inside {
    fn enter() -> Option<Inside> {
        INSIDE.fetch_add(1, SeqCst);
        let inside = Inside;
        (!must_stay_out()).then_some(inside)
    }
}

/// Whether the interpreter is about to end, and this is not the thread that ends it.
fn must_stay_out() -> bool {
    EXITING.load(SeqCst) && EXIT_THREAD.get() != Some(&std::thread::current().id())
}

fn stay_out() -> ! {
    loop {
        std::thread::park();
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.fetch_sub(1, SeqCst);
    }
}

/// Whether the interpreter is about to end.
pub(crate) fn is_exiting() -> bool {
    EXITING.load(SeqCst)
}

/// How many forks lie between this process and the one that loaded the module.
pub(crate) fn forks() -> u32 {
    FORKS.load(SeqCst)
}

/// Runs `f` with the interpreter, for the library's own threads; `None` when it is about to end.
/// `f` must be short: the end of the interpreter waits for it.
pub(crate) fn with_python<T>(f: impl FnOnce(Python<'_>) -> T) -> Option<T> {
    let _inside = Inside::enter()?;
    Python::try_attach(f)
}

/// An object that any thread may drop. PyO3 keeps what is dropped without the GIL in a pool behind a
/// lock, and a forked child that finds it locked, by a thread that is not there, hangs for ever.
pub(crate) struct Shared(ManuallyDrop<Py<PyAny>>);

impl From<Py<PyAny>> for Shared {
    fn from(object: Py<PyAny>) -> Self {
        Shared(ManuallyDrop::new(object))
    }
}

impl Deref for Shared {
    type Target = Py<PyAny>;

    fn deref(&self) -> &Py<PyAny> {
        &self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // At the end of the interpreter it is left alone.
        with_python(|_| {
            // SAFETY: dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.0) }
        });
    }
}

/// Runs `f` with the GIL released. At the end of the interpreter a thread stays in here for ever, as
/// a daemon thread does that waits for a `threading.Lock`.
pub(crate) fn detached<T: Send>(py: Python<'_>, f: impl Send + FnOnce() -> T) -> T {
    let (result, _inside) = py.detach(|| {
        let result = f();
        match Inside::enter() {
            Some(inside) => (result, inside),
            None => stay_out(),
        }
    });
    result
}

/// At the end of the interpreter the sessions are closed beneath the daemon threads. They must not
/// print tracebacks about it.
pub(crate) fn before_an_error(py: Python<'_>) {
    if must_stay_out() {
        py.detach(|| stay_out());
    }
}

/// Closes every session of this process, for its end. Registered with atexit.
#[pyfunction]
pub(crate) fn _at_exit(py: Python<'_>) {
    let _ = EXIT_THREAD.set(std::thread::current().id());
    crate::events::flush(py);
    EXITING.store(true, SeqCst);
    py.detach(|| {
        let until = Instant::now() + DRAIN;
        while INSIDE.load(SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        etcdlock::shutdown(SHUTDOWN);
    });
}

/// One interpreter of a process owns the exceptions, the threads and the end of the process.
pub(crate) fn refuse_sub_interpreter() -> PyResult<()> {
    // SAFETY: attached, as every module is while it is initialised.
    let id = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    if id == 0 {
        return Ok(());
    }
    Err(PyImportError::new_err("etcdlock works in the main interpreter only, not in a sub-interpreter; use threads or processes"))
}

/// Has every forked child know that it is one, whoever forks: Python or C.
pub(crate) fn watch_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        etcdlock::note_process_id();
        // SAFETY: the handler is a plain function of this library, which CPython never unloads, and
        // does nothing but what is allowed after a fork: atomics, getpid and malloc.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

extern "C" fn in_child() {
    etcdlock::note_process_id();
    // Threads of the parent that were inside are not here.
    INSIDE.store(0, SeqCst);
    FORKS.fetch_add(1, SeqCst);
    crate::events::start_anew();
}
