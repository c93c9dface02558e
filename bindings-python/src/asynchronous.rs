//! Calls that are started without waiting, for `etcdlock.aio`.

use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use etcdlock::{Canceller, Pending, Result};
use pyo3::prelude::*;

use crate::errors::raise;
use crate::handles::{Arguments, Session};
use crate::lifetime::{Shared, forks, with_python};

type Ready = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

enum State {
    Running,
    Ready(Ready),
    /// Taken, or given up: a result that comes now is dropped, which releases a lock.
    Over,
}

/// A call that has been started. Its result is here, and nowhere else, until it is taken: so a lock
/// that is granted while its task is being cancelled is dropped with the call, and released.
#[pyclass(frozen, module = "etcdlock._native")]
pub(crate) struct Call {
    state: Arc<StdMutex<State>>,
    canceller: Canceller,
    /// In a forked child the state may be locked by a thread that is not there.
    forks: u32,
}

fn lock(state: &StdMutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(state: &StdMutex<State>) -> State {
    std::mem::replace(&mut *lock(state), State::Over)
}

impl Call {
    /// Has `wake` called, with no argument and on the notify thread, once the result is there.
    pub(crate) fn start<T: Send + 'static>(
        pending: Pending<T>,
        wake: Shared,
        convert: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Call {
        let state = Arc::new(StdMutex::new(State::Running));
        let theirs = state.clone();
        let canceller = pending.on_done(move |result: Result<T>| {
            {
                let mut state = lock(&theirs);
                if !matches!(*state, State::Running) {
                    return;
                }
                *state = State::Ready(Box::new(move |py| {
                    result.map_err(|error| raise(py, &error)).and_then(|value| convert(py, value))
                }));
            }
            // It fails when the event loop is closed.
            let woken = with_python(|py| wake.call0(py).is_ok());
            if woken != Some(true) {
                drop(end(&theirs));
            }
        });
        Call { state, canceller, forks: forks() }
    }
}

#[pymethods]
impl Call {
    /// Takes the result, or raises its exception. Once.
    fn result(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match end(&self.state) {
            State::Ready(ready) => ready(py),
            State::Running | State::Over => Err(pyo3::exceptions::PyRuntimeError::new_err("there is no result to take")),
        }
    }

    /// Gives the call up. What it has done, or still does, is undone in the background.
    fn cancel(&self) {
        if self.forks == forks() {
            drop(end(&self.state));
            self.canceller.cancel();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Starts to connect; arguments as for etcdlock.connect.
#[pyfunction]
pub(crate) fn _connect(py: Python<'_>, wake: Py<PyAny>, arguments: Arguments) -> PyResult<Call> {
    let pending = arguments.connect(py)?;
    Ok(Call::start(pending, wake.into(), |py, session| Ok(Py::new(py, Session::new(session))?.into_any())))
}
