//! What core has to say without being asked: log records, and the loss of holds. Both go through a
//! queue to a Python thread (`etcdlock/_events.py`): the io thread never waits for anybody, and code
//! of the user's may be as slow as it likes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::lifetime::detached;

/// Core's numbers of levels.
const WARNINGS: u8 = 2;
const INFORMATION: u8 = 3;
const DEBUG: u8 = 4;
/// Records that wait to be logged; older ones give way.
const MOST_RECORDS: usize = 1000;

/// A callback that is called at most once. Shared with the hold, so that the garbage collector sees
/// it there.
pub(crate) type Callback = Arc<Mutex<Option<Py<PyAny>>>>;

enum Event {
    Record(i32, String),
    Lost(Callback, String),
}

#[derive(Default)]
struct Queue {
    events: Mutex<VecDeque<Event>>,
    some: Condvar,
    has_thread: AtomicBool,
}

/// The queue of this process. A pointer, because a forked child gets another one: its parent's may
/// have been locked at that moment.
static QUEUE: AtomicPtr<Queue> = AtomicPtr::new(std::ptr::null_mut());

/// For a forked child: forgets the events and the thread of the parent.
pub(crate) fn start_anew() {
    QUEUE.store(Box::into_raw(Box::default()), Ordering::Release);
}

fn queue() -> &'static Queue {
    // SAFETY: set before anything else runs, to boxes that are never freed.
    unsafe { &*QUEUE.load(Ordering::Acquire) }
}

impl Queue {
    fn push(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(event, Event::Record(..)) && events.len() >= MOST_RECORDS {
            let oldest = events.iter().position(|event| matches!(event, Event::Record(..)));
            oldest.and_then(|at| events.remove(at));
        }
        events.push_back(event);
        drop(events);
        self.some.notify_one();
    }

    fn pop(&self) -> Option<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn wait(&self) -> Event {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match events.pop_front() {
                Some(event) => return event,
                None => events = self.some.wait(events).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Has `callback` called with the reason, on the thread of events, once the hold is lost.
pub(crate) fn lost(callback: Callback, reason: String) {
    queue().push(Event::Lost(callback, reason));
}

/// Starts the Python thread that hands the events on, if this process does not have it yet.
pub(crate) fn start_thread(py: Python<'_>) -> PyResult<()> {
    if !queue().has_thread.swap(true, Ordering::AcqRel) {
        let started = py.import("etcdlock._events").and_then(|events| events.call_method0("start"));
        // The next session tries again.
        started.inspect_err(|_| queue().has_thread.store(false, Ordering::Release))?;
    }
    Ok(())
}

fn into_python(py: Python<'_>, event: Event) -> PyResult<(Option<i32>, Py<PyAny>, String)> {
    Ok(match event {
        Event::Record(level, text) => (Some(level), py.None(), text),
        Event::Lost(callback, reason) => {
            let callback = callback.lock().unwrap_or_else(PoisonError::into_inner).take();
            (None, callback.unwrap_or_else(|| py.None()), reason)
        }
    })
}

/// Waits for the next event: (level, None, text) to log, or (None, callback, reason) to call.
#[pyfunction]
pub(crate) fn _next_event(py: Python<'_>) -> PyResult<(Option<i32>, Py<PyAny>, String)> {
    let event = detached(py, || queue().wait());
    into_python(py, event)
}

/// Logs the records that are still there, at the end of the interpreter.
pub(crate) fn flush(py: Python<'_>) {
    while let Some(event) = queue().pop() {
        if let Event::Record(level, text) = event {
            let logged = py.import("etcdlock._events").and_then(|events| events.call_method1("log", (level, text)));
            if logged.is_err() {
                return;
            }
        }
    }
}

/// Takes core's log records from now on. Warnings always come, and `logging` may drop them; what is finer
/// comes once [`ask_logging`] has found that somebody wants it.
pub(crate) fn listen() {
    start_anew();
    // Ours is the only copy of core in this library; loaded twice, the first one stays.
    let _ = etcdlock::log_to(WARNINGS, |level, target, text| {
        let topic = target.rsplit("::").next().unwrap_or_default();
        queue().push(Event::Record(10 * (5 - i32::from(level)).max(1), format!("{topic}: {text}")));
    });
}

/// Has core tell what `logging` would keep now: each record that nobody wants would wake a thread that
/// needs the GIL, at every lock.
pub(crate) fn ask_logging(py: Python<'_>) -> PyResult<()> {
    static IS_ENABLED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let is_enabled = match IS_ENABLED.get(py) {
        Some(is_enabled) => is_enabled,
        // A program that never imported it does not want it.
        None if !py.import("sys")?.getattr("modules")?.contains("logging")? => return Ok(()),
        None => IS_ENABLED.get_or_try_init(py, || {
            let logger = py.import("logging")?.call_method1("getLogger", ("etcdlock",))?;
            PyResult::Ok(logger.getattr("isEnabledFor")?.unbind())
        })?,
    };
    for (level, theirs) in [(DEBUG, 10), (INFORMATION, 20)] {
        if is_enabled.bind(py).call1((theirs,))?.is_truthy()? {
            etcdlock::set_log_level(level);
            return Ok(());
        }
    }
    etcdlock::set_log_level(WARNINGS);
    Ok(())
}
