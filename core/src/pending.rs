//! A result on its way: await it, wait for it, be called back, or cancel it.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use crate::error::{Error, Result};
use crate::runtime::{Env, must_not_block};

/// A call that has been started and runs on the library's own thread.
///
/// It is started when it is made, not when it is first polled. Await it, or [`wait`](Self::wait)
/// for it on a plain thread, or have a callback run with [`on_done`](Self::on_done).
///
/// # Cancel safety
///
/// Dropping or cancelling it ends the call and cleans up in the background, always to the end: an
/// unfinished `lock()` leaves no key, and one that was granted at the same moment is released.
#[must_use = "dropping it cancels the call"]
pub struct Pending<T: Send + 'static> {
    slot: Arc<Slot<T>>,
    task: Option<AbortHandle>,
    env: Option<Env>,
}

struct Slot<T> {
    state: Mutex<State<T>>,
    done: Condvar,
}

enum State<T> {
    Running(Option<Waker>),
    CallBack(Box<dyn FnOnce(Result<T>) + Send>),
    Done(Result<T>),
    Taken,
}

impl<T: Send + 'static> Slot<T> {
    fn lock(&self) -> std::sync::MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, result: Result<T>, env: &Env) {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Running(waker) => {
                *state = State::Done(result);
                drop(state);
                self.done.notify_all();
                env.answered();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::CallBack(callback) => {
                drop(state);
                env.call_back(move || callback(result));
                env.answered();
            }
            // Already answered: a second answer cannot be.
            other => *state = other,
        }
    }
}

/// Finishes the slot even if the task is aborted or panics.
struct Finisher<T: Send + 'static> {
    slot: Arc<Slot<T>>,
    env: Env,
    answered: bool,
}

impl<T: Send + 'static> Drop for Finisher<T> {
    fn drop(&mut self) {
        if !self.answered {
            let error = if std::thread::panicking() { Error::internal("a call panicked") } else { Error::cancelled() };
            self.slot.finish(Err(error), &self.env);
        }
    }
}

impl<T: Send + 'static> Pending<T> {
    /// Starts `call` on the io thread.
    pub(crate) fn start(env: &Env, call: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        let slot = Arc::new(Slot { state: Mutex::new(State::Running(None)), done: Condvar::new() });
        let mut finisher = Finisher { slot: slot.clone(), env: env.clone(), answered: false };
        // Boxed, because a future that awaits what it was given has room for it twice.
        let call = Box::pin(call);
        let task = env.spawn(async move {
            let result = call.await;
            finisher.answered = true;
            finisher.slot.finish(result, &finisher.env);
        });
        Pending { slot, task: Some(task), env: Some(env.clone()) }
    }

    /// A result that is there already.
    pub(crate) fn ready(result: Result<T>) -> Self {
        Pending { slot: Arc::new(Slot { state: Mutex::new(State::Done(result)), done: Condvar::new() }), task: None, env: None }
    }

    /// Waits for the result on this thread.
    ///
    /// Inside a callback of this library it returns [`Deadlock`](crate::ErrorKind::Deadlock) at once.
    pub fn wait(self) -> Result<T> {
        loop {
            if let Some(result) = self.wait_for(Duration::from_secs(3600)) {
                return result;
            }
        }
    }

    /// Waits for the result at most that long; `None` if it is not there yet. For callers that have
    /// to look up now and then, such as an interpreter that checks for signals. The result is given
    /// out once; after that every call says `Cancelled`.
    pub fn wait_for(&self, timeout: Duration) -> Option<Result<T>> {
        // Before the lock, which another thread of the parent may have held at the fork.
        if self.env.as_ref().is_some_and(Env::is_forked) {
            return Some(Err(Error::forked()));
        }
        let mut state = self.slot.lock();
        if matches!(*state, State::Running(_)) && must_not_block() {
            return Some(Err(Error::deadlock()));
        }
        // Longer than anybody waits, and short enough for the clock's arithmetic.
        let until = Instant::now() + timeout.min(Duration::from_secs(365 * 24 * 3600));
        loop {
            match &*state {
                State::Done(_) => return Some(take(&mut state)),
                State::Running(_) => {}
                State::CallBack(_) | State::Taken => return Some(Err(Error::cancelled())),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.slot.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has `callback` run exactly once, on the library's notify thread, with the result. The
    /// returned [`Canceller`] can still cancel the call: then the callback gets `Cancelled`, or the
    /// result if it was faster.
    pub fn on_done(mut self, callback: impl FnOnce(Result<T>) + Send + 'static) -> Canceller {
        let mut state = self.slot.lock();
        if !matches!(*state, State::Running(_)) {
            let result = take(&mut state);
            drop(state);
            match self.env.clone().map_or_else(Env::of_process, Ok) {
                Ok(env) => env.call_back(move || callback(result)),
                // No thread could be started, so nothing else can run either.
                Err(_) => callback(result),
            }
        } else {
            *state = State::CallBack(Box::new(callback));
            drop(state);
        }
        Canceller { task: self.task.take(), env: self.env.clone() }
    }

    /// Cancels the call; never blocks. A result that is there already stays.
    pub fn cancel(&self) {
        cancel(&self.task, &self.env);
    }
}

fn take<T>(state: &mut State<T>) -> Result<T> {
    match std::mem::replace(state, State::Taken) {
        State::Done(result) => result,
        // Given out before.
        other => {
            *state = other;
            Err(Error::cancelled())
        }
    }
}

fn cancel(task: &Option<AbortHandle>, env: &Option<Env>) {
    // In a forked child the task belongs to a thread that is not there.
    if let (Some(task), Some(env)) = (task, env)
        && !env.is_forked()
    {
        task.abort();
    }
}

impl<T: Send + 'static> Future for Pending<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut state = self.slot.lock();
        match &mut *state {
            State::Running(waker) => {
                match waker {
                    Some(known) if known.will_wake(cx.waker()) => {}
                    other => *other = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            State::Done(_) => Poll::Ready(take(&mut state)),
            State::CallBack(_) | State::Taken => Poll::Ready(Err(Error::cancelled())),
        }
    }
}

impl<T: Send + 'static> Drop for Pending<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Cancels a call whose result goes to a callback. Dropping it does nothing.
#[derive(Clone)]
pub struct Canceller {
    task: Option<AbortHandle>,
    env: Option<Env>,
}

impl Canceller {
    /// Cancels the call; never blocks. The callback still runs exactly once.
    pub fn cancel(&self) {
        cancel(&self.task, &self.env);
    }

    /// [`Forked`](crate::ErrorKind::Forked) in a child of the process that made the call: there the callback never comes.
    pub fn check_fork(&self) -> Result<()> {
        self.env.as_ref().map_or(Ok(()), Env::check_fork)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use std::sync::mpsc;

    fn env() -> Env {
        Env::of_process().unwrap()
    }

    #[test]
    fn a_result_is_waited_for() {
        assert_eq!(Pending::start(&env(), async { Ok(7) }).wait(), Ok(7));
        let never = Pending::<()>::start(&env(), std::future::pending());
        assert!(never.wait_for(Duration::from_millis(5)).is_none());
    }

    #[test]
    fn a_cancelled_call_says_so_once_in_every_form() {
        let never = Pending::<()>::start(&env(), std::future::pending());
        never.cancel();
        assert_eq!(never.wait().map_err(|e| e.kind()), Err(ErrorKind::Cancelled));

        let (tx, rx) = mpsc::channel();
        let canceller = Pending::<()>::start(&env(), std::future::pending()).on_done(move |r| tx.send(r).unwrap());
        canceller.cancel();
        canceller.cancel();
        assert_eq!(rx.recv().unwrap().map_err(|e| e.kind()), Err(ErrorKind::Cancelled));
        assert!(rx.recv().is_err(), "the callback ran twice");
    }

    #[test]
    fn a_panic_inside_a_call_is_an_internal_error() {
        let call = Pending::<()>::start(&env(), async { panic!("a panic on purpose, in a call") });
        assert_eq!(call.wait().map_err(|e| e.kind()), Err(ErrorKind::Internal));
        assert_eq!(Pending::start(&env(), async { Ok(1) }).wait(), Ok(1), "the io thread lives");
    }

    #[test]
    fn waiting_inside_a_callback_is_refused() {
        let (tx, rx) = mpsc::channel();
        let canceller = Pending::start(&env(), async { Ok(()) }).on_done(move |_| {
            let never = Pending::<()>::start(&Env::of_process().unwrap(), std::future::pending());
            tx.send(never.wait().map_err(|e| e.kind())).unwrap();
        });
        assert_eq!(rx.recv().unwrap(), Err(ErrorKind::Deadlock));
        drop(canceller);
    }
}
