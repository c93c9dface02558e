//! What core has to say without being asked: log records, and the loss of holds. Both go through a
//! queue to a Python thread (`etcdlock/_events.py`): the io thread never waits for anybody, and code
//! of the user's may be as slow as it likes.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Level, Metadata, Subscriber};

use crate::lifetime::detached;

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

/// Takes core's log records from now on.
pub(crate) fn listen() {
    start_anew();
    // Ours is the only one in this library's copy of `tracing`; loaded twice, the first one stays.
    let _ = tracing::subscriber::set_global_default(Records);
}

struct Records;

impl Subscriber for Records {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("etcdlock")
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let level = match *event.metadata().level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            Level::DEBUG | Level::TRACE => 10,
        };
        let mut text = Text { message: String::new(), fields: String::new() };
        event.record(&mut text);
        let topic = event.metadata().target().rsplit("::").next().unwrap_or_default();
        let message = if text.message.is_empty() { topic } else { &text.message };
        queue().push(Event::Record(level, format!("{message}{}", text.fields)));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// `message key=value key=value`
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
