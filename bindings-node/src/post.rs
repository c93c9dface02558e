//! How results get from the library's notify thread to the event loop of one JavaScript environment
//! (the main thread, or one worker).
//!
//! Results lie in a box of our own, and the threadsafe function only says that there are some. So
//! when an environment ends, whatever it has not taken yet is dropped, and that releases it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use etcdlock::{Canceller, Contender, Error, Hold, Pending, Session};
use napi::bindgen_prelude::Function;
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi::{Env, Result, Status, sys};

/// What a call came to.
pub(crate) enum Outcome {
    Error(Error),
    Nothing,
    Session(Session),
    Hold(Hold),
    Bytes(Vec<u8>),
    Contenders(Vec<Contender>),
}

/// Says that there is post. Weak: by itself it does not keep the event loop alive.
type Bell = ThreadsafeFunction<(), (), (), Status, false, true, 0>;

pub(crate) struct Post {
    bell: Bell,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    closed: bool,
    outcomes: Vec<(u32, Outcome)>,
    running: HashMap<u32, Canceller>,
}

impl Post {
    pub(crate) fn open(env: Env, ring: &Function<(), ()>) -> Result<Arc<Post>> {
        count_forks();
        let bell = ring.build_threadsafe_function::<()>().weak::<true>().build()?;
        let post = Arc::new(Post { bell, state: Mutex::default() });
        // The end of a worker, or of the process: nothing may be left running for it.
        env.add_env_cleanup_hook(post.clone(), |post| post.close())?;
        Ok(post)
    }

    /// Has the result of `call` put into the post as number `id`.
    pub(crate) fn expect<T: Send + 'static>(
        self: &Arc<Self>,
        id: u32,
        call: Pending<T>,
        outcome: impl FnOnce(T) -> Outcome + Send + 'static,
    ) {
        let post = self.clone();
        let canceller = call.on_done(move |result| post.put(id, result.map_or_else(Outcome::Error, outcome)));
        // Taking a result out happens on this same thread, so it cannot have overtaken this.
        self.state().running.insert(id, canceller);
    }

    /// Called on the notify thread.
    pub(crate) fn put(&self, id: u32, outcome: Outcome) {
        let mut state = self.state();
        if state.closed {
            // Dropped outside the lock: it may be a hold, which is released by that.
            drop(state);
            drop(outcome);
            return;
        }
        let is_first = state.outcomes.is_empty();
        state.outcomes.push((id, outcome));
        drop(state);
        if is_first {
            self.bell.call((), ThreadsafeFunctionCallMode::NonBlocking);
        }
    }

    /// All that has come since.
    pub(crate) fn take(&self) -> Vec<(u32, Outcome)> {
        let mut state = self.state();
        let outcomes = std::mem::take(&mut state.outcomes);
        for (id, _) in &outcomes {
            state.running.remove(id);
        }
        outcomes
    }

    pub(crate) fn cancel(&self, id: u32) {
        let canceller = self.state().running.get(&id).cloned();
        if let Some(canceller) = canceller {
            canceller.cancel();
        }
    }

    /// Cancels what is running and drops what has come, now and later.
    pub(crate) fn close(&self) {
        let (outcomes, running) = {
            let mut state = self.state();
            state.closed = true;
            (std::mem::take(&mut state.outcomes), std::mem::take(&mut state.running))
        };
        running.values().for_each(Canceller::cancel);
        drop(outcomes);
    }

    /// Whether the event loop is to stay alive for what is still to come.
    pub(crate) fn keep_alive(&self, env: Env, yes: bool) {
        // SAFETY: on the thread of the environment that made the function, as a method of a class
        // of it, and so before the environment ends.
        let _ = unsafe {
            if yes {
                sys::napi_ref_threadsafe_function(env.raw(), self.bell.raw())
            } else {
                sys::napi_unref_threadsafe_function(env.raw(), self.bell.raw())
            }
        };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Spares a system call in every `isHeld()`.
fn count_forks() {
    extern "C" fn in_child() {
        etcdlock::note_process_id();
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only stores two atomics, and this library is never unloaded (it is
        // linked with nodelete).
        if unsafe { libc::pthread_atfork(None, None, Some(in_child)) } == 0 {
            etcdlock::note_process_id();
        }
    });
}
