//! Blocking calls, and the times they take as arguments.

use std::io::{PipeWriter, Write as _, pipe};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcdlock::Pending;
use pyo3::prelude::*;

use crate::errors::{invalid, raise};
use crate::lifetime::detached;

/// How often the main thread looks up for signals while it waits.
const SLICE: Duration = Duration::from_millis(50);
/// How often a greenlet looks whether it is a copy of one, in a forked child.
const GREENLET_SLICE: f64 = 1.0;
/// Other threads never run signal handlers.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Waits with the GIL released. If a signal handler raises, the call is cancelled and cleaned up.
pub(crate) fn wait<T: Send + 'static>(py: Python<'_>, pending: Pending<T>) -> PyResult<T> {
    if let Some(select) = select_of_greenlets(py)? {
        return wait_among_greenlets(py, pending, &select);
    }
    let mut slice = SLICE;
    loop {
        if let Some(result) = detached(py, || pending.wait_for(slice)) {
            return result.map_err(|error| raise(py, &error));
        }
        py.check_signals()?;
        slice = if is_main_thread(py)? { SLICE } else { FOREVER };
    }
}

/// [`wait`] for what is worse to get than to miss: a signal that came at the last moment wins, while
/// the result can still be dropped.
pub(crate) fn wait_to_hold<T: Send + 'static>(py: Python<'_>, pending: Pending<T>) -> PyResult<T> {
    let result = wait(py, pending)?;
    py.check_signals()?;
    Ok(result)
}

/// The `select` of gevent or eventlet, where one of them has patched it: it gives way to the other greenlets of the thread. One of
/// them may be who holds the lock.
fn select_of_greenlets(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    let modules = py.import("sys")?.getattr("modules")?;
    for (patcher, asks) in [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")] {
        if let Ok(patcher) = modules.get_item(patcher)
            && patcher.call_method1(asks, ("select",))?.is_truthy()?
        {
            return py.import("select")?.getattr("select").map(Some);
        }
    }
    Ok(None)
}

/// Waits for a pipe, as greenlets can. Where it is interrupted, as by a timeout of theirs, the call is cancelled.
fn wait_among_greenlets<T: Send + 'static>(py: Python<'_>, pending: Pending<T>, select: &Bound<'_, PyAny>) -> PyResult<T> {
    let (done, mut tell) = pipe()?;
    let slot = Arc::new(Mutex::new(None));
    let result = slot.clone();
    let canceller = pending.on_done(move |answer| {
        *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        let _ = PipeWriter::write(&mut tell, &[0]);
    });
    loop {
        let nothing = || pyo3::types::PyTuple::empty(py);
        if let Err(interrupted) = select.call1(((done.as_raw_fd(),), nothing(), nothing(), GREENLET_SLICE)) {
            canceller.cancel();
            return Err(interrupted);
        }
        // Before the slot, which another thread of the parent may have held at the fork.
        canceller.check_fork().map_err(|error| raise(py, &error))?;
        if let Some(answer) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return answer.map_err(|error| raise(py, &error));
        }
    }
}

fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    threading.call_method0("get_ident")?.eq(main)
}

/// Seconds as a duration.
pub(crate) fn seconds(py: Python<'_>, what: &str, seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| invalid(py, format!("{what} {seconds:?} is not a time: give seconds from 0 up to some billions")))
}

/// A timeout in seconds; `None` and infinity mean for ever.
pub(crate) fn timeout(py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Duration>> {
    match timeout {
        None | Some(f64::INFINITY) => Ok(None),
        Some(given) => seconds(py, "timeout", given).map(Some),
    }
}
