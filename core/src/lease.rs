//! A lease as its holder sees it: a deadline that only moves on, and a loss that is for good.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::error::Loss;
use crate::sabotage::{Sabotage, is_on};
use crate::store::LeaseId;

pub(crate) type Listener = Box<dyn FnOnce(Loss) + Send>;

/// Something that is lost once, with a reason, and never comes back.
#[derive(Default)]
pub(crate) struct LossSignal {
    loss: OnceLock<Loss>,
    changed: Notify,
    listeners: Mutex<Vec<Listener>>,
}

impl LossSignal {
    pub(crate) fn get(&self) -> Option<&Loss> {
        self.loss.get()
    }

    /// The first reason stays.
    pub(crate) fn lose(&self, loss: Loss) -> bool {
        let listeners = {
            let mut listeners = self.listeners();
            if self.loss.set(loss.clone()).is_err() {
                return false;
            }
            std::mem::take(&mut *listeners)
        };
        self.changed.notify_waiters();
        for listener in listeners {
            listener(loss.clone());
        }
        true
    }

    pub(crate) async fn lost(&self) -> Loss {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the check, so that no change falls between.
            changed.as_mut().enable();
            if let Some(loss) = self.loss.get() {
                return loss.clone();
            }
            changed.await;
        }
    }

    /// Calls the listener on loss, at once if it has happened; it must be quick.
    pub(crate) fn listen(&self, listener: impl FnOnce(Loss) + Send + 'static) {
        let mut listeners = self.listeners();
        match self.loss.get() {
            Some(loss) => {
                let loss = loss.clone();
                drop(listeners);
                listener(loss);
            }
            None => listeners.push(Box::new(listener)),
        }
    }

    /// The listeners that have heard nothing yet.
    pub(crate) fn take_listeners(&mut self) -> Vec<Listener> {
        std::mem::take(self.listeners.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, Vec<Listener>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One lease of a session, from grant to loss.
pub(crate) struct Lease {
    pub(crate) id: LeaseId,
    pub(crate) ttl: Duration,
    /// How often the store's history had changed before it was asked for.
    pub(crate) history: u64,
    /// Nanoseconds on the session's clock.
    deadline: AtomicU64,
    pub(crate) lost: LossSignal,
}

impl Lease {
    /// `asked` is the time before the request was sent: the server's own timer starts later, so
    /// the holder knows first.
    pub(crate) fn granted(id: LeaseId, ttl: Duration, asked: Duration, history: u64) -> Self {
        let deadline = AtomicU64::new(nanos(deadline(asked, ttl)));
        Lease { id, ttl, history, deadline, lost: LossSignal::default() }
    }

    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline.load(Ordering::Acquire))
    }

    pub(crate) fn is_alive(&self, now: Duration) -> bool {
        self.lost.get().is_none() && now < self.deadline()
    }

    /// A renewal that was asked for at `asked` has been confirmed, and it is `now`. Once the
    /// deadline has passed nothing revives the lease: somebody may have been told so already.
    pub(crate) fn renewed(&self, asked: Duration, now: Duration) {
        if now >= self.deadline() && !is_on(Sabotage::LateAnswerRevives) {
            self.lost.lose(Loss::Deadline);
            return;
        }
        self.deadline.fetch_max(nanos(deadline(asked, self.ttl)), Ordering::AcqRel);
    }

    /// Why it is lost, if it is; the deadline counts even before anybody noticed.
    pub(crate) fn loss(&self, now: Duration) -> Option<Loss> {
        match self.lost.get() {
            Some(loss) => Some(loss.clone()),
            None => (now >= self.deadline()).then_some(Loss::Deadline),
        }
    }
}

/// What is left of a TTL when clocks may run up to 5 % apart, less a margin to act in.
fn deadline(asked: Duration, ttl: Duration) -> Duration {
    let margin = (ttl / 20).max(Duration::from_millis(100));
    asked + ttl.mul_f64(0.95).saturating_sub(margin)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn the_deadline_is_counted_from_before_the_request_with_a_margin() {
        assert_eq!(Lease::granted(1, 10 * S, 100 * S, 0).deadline(), 109 * S);
        assert_eq!(Lease::granted(1, 2 * S, 100 * S, 0).deadline(), 101 * S + Duration::from_millis(800));
    }

    #[test]
    fn a_renewal_never_moves_the_deadline_back() {
        let lease = Lease::granted(1, 10 * S, 100 * S, 0);
        lease.renewed(103 * S, 104 * S);
        assert_eq!(lease.deadline(), 112 * S);
        lease.renewed(101 * S, 105 * S);
        assert_eq!(lease.deadline(), 112 * S);
    }

    #[test]
    fn an_answer_after_the_deadline_does_not_revive() {
        let lease = Lease::granted(1, 10 * S, 100 * S, 0);
        assert!(lease.is_alive(108 * S));
        assert!(!lease.is_alive(109 * S), "past the deadline, though nobody has noticed yet");
        lease.renewed(108 * S, 109 * S);
        assert!(!lease.is_alive(100 * S) && lease.loss(100 * S) == Some(Loss::Deadline));
    }

    #[test]
    fn the_first_reason_stays_and_every_listener_hears_it_once() {
        let signal = LossSignal::default();
        let (tx, rx) = std::sync::mpsc::channel();
        let early = tx.clone();
        signal.listen(move |loss| early.send(loss).unwrap());
        assert!(signal.lose(Loss::KeyDeleted));
        assert!(!signal.lose(Loss::Closed));
        signal.listen(move |loss| tx.send(loss).unwrap());
        assert_eq!(rx.iter().collect::<Vec<_>>(), [Loss::KeyDeleted, Loss::KeyDeleted]);
    }
}
