//! A state that many wait for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Those who wait are woken in the order in which they came, which tokio's `watch` does not do: a simulation has to replay
/// exactly.
pub(crate) struct Announced<T> {
    state: Mutex<T>,
    changed: Notify,
}

impl<T> Announced<T> {
    pub(crate) fn new(state: T) -> Self {
        Announced { state: Mutex::new(state), changed: Notify::new() }
    }

    pub(crate) fn now(&self) -> MutexGuard<'_, T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, state: T) {
        *self.now() = state;
        self.announce();
    }

    /// Of what was changed in place.
    pub(crate) fn announce(&self) {
        self.changed.notify_waiters();
    }

    /// Waits for a state in which there is something to find.
    pub(crate) async fn find<R>(&self, mut find: impl FnMut(&T) -> Option<R>) -> R {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look, so that no change falls between.
            changed.as_mut().enable();
            if let Some(found) = find(&self.now()) {
                return found;
            }
            changed.await;
        }
    }
}
