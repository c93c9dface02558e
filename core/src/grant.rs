//! What goes between those who want a lock and the queue that serves them: commands, and the grant.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Loss, Result};
use crate::keeper::Keeper;
use crate::lease::{Lease, LossSignal};
use crate::proto::{self, SessionId, WaiterId};
use crate::store::{Revision, Ticket};

pub(crate) enum Command {
    Lock(Waiter),
    /// The hold with this token is to be released. The caller has marked it released before.
    Release {
        token: Revision,
        reply: Option<oneshot::Sender<Result<()>>>,
    },
    /// A waiter gave up. The sender is dropped once nothing is left of it.
    GaveUp(WaiterId, Option<oneshot::Sender<()>>),
}

/// Somebody who wants the lock.
pub(crate) struct Waiter {
    pub(crate) id: WaiterId,
    pub(crate) session: Arc<Keeper>,
    /// Do not wait for other holders: answer `None` instead.
    pub(crate) only_try: bool,
    pub(crate) reply: oneshot::Sender<Result<Option<Grant>>>,
}

impl Waiter {
    pub(crate) fn answer(self, answer: Result<Option<Grant>>) {
        // A hold that nobody takes is released by its drop.
        let _ = self.reply.send(answer);
    }
}

impl proto::Waiter for Waiter {
    fn id(&self) -> WaiterId {
        self.id
    }

    fn session(&self) -> SessionId {
        Arc::as_ptr(&self.session).addr()
    }

    fn only_tries(&self) -> bool {
        self.only_try
    }
}

pub(crate) struct HoldCore {
    pub(crate) session: Arc<Keeper>,
    pub(crate) ticket: Ticket,
    token: i64,
    lease: Arc<Lease>,
    pub(crate) released: AtomicBool,
    queue: UnboundedSender<Command>,
    /// Losses of this hold alone; those of the lease reach it through its queue.
    pub(crate) lost: LossSignal,
}

impl HoldCore {
    pub(crate) fn new(
        session: Arc<Keeper>,
        ticket: Ticket,
        token: i64,
        lease: Arc<Lease>,
        queue: UnboundedSender<Command>,
    ) -> Arc<Self> {
        let (released, lost) = Default::default();
        Arc::new(HoldCore { session, ticket, token, lease, released, queue, lost })
    }

    /// A second hold on the same ticket, which only a sabotage hands out.
    pub(crate) fn same_again(&self) -> Arc<Self> {
        HoldCore::new(self.session.clone(), self.ticket.clone(), self.token, self.lease.clone(), self.queue.clone())
    }

    /// A hold that was released can no longer be lost.
    pub(crate) fn lose(&self, loss: Loss) {
        if !self.is_released() && self.lost.lose(loss.clone()) {
            self.session.stats.hold_lost(&loss);
            tracing::warn!(target: "etcdlock::loss", name = &**self.name(), token = self.token, reason = %loss, "hold lost");
        }
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    pub(crate) fn loss(&self) -> Option<Loss> {
        let env = &self.session.cluster.env;
        if env.is_forked() {
            return Some(Loss::Forked);
        }
        self.lost.get().cloned().or_else(|| self.lease.loss(env.now()))
    }

    pub(crate) fn is_held(&self) -> bool {
        let env = &self.session.cluster.env;
        !self.is_released() && self.lost.get().is_none() && self.lease.is_alive(env.now()) && !env.is_forked()
    }

    pub(crate) fn remaining(&self) -> Duration {
        if self.is_held() { self.lease.deadline().saturating_sub(self.session.cluster.env.now()) } else { Duration::ZERO }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.ticket.name
    }

    pub(crate) fn token(&self) -> i64 {
        self.token
    }

    #[cfg(test)]
    pub(crate) fn lease_id(&self) -> i64 {
        self.lease.id
    }

    pub(crate) fn lost_error(&self, loss: &Loss) -> Error {
        Error::lost(self.name(), self.token, loss)
    }

    /// Ok while the hold owns the lock as far as is known here.
    pub(crate) fn check(&self) -> Result<()> {
        let env = &self.session.cluster.env;
        env.check_fork()?;
        if self.is_released() {
            return Err(self.not_held());
        }
        match self.loss() {
            None => Ok(()),
            Some(loss) => Err(self.lost_error(&loss)),
        }
    }

    pub(crate) fn not_held(&self) -> Error {
        Error::new(ErrorKind::NotHeld, format!("the hold on {:?} (token {}) was released before", self.name(), self.token))
    }

    /// Has the key deleted. Of a queue that is gone the hold was lost long ago.
    pub(crate) fn release(&self, reply: Option<oneshot::Sender<Result<()>>>) {
        let _ = self.queue.send(Command::Release { token: self.token, reply });
    }

    /// Released without waiting, unless that was done already.
    fn release_in_background(&self) {
        if !self.session.cluster.env.is_forked() && !self.released.swap(true, Ordering::AcqRel) {
            self.release(None);
        }
    }
}

impl Drop for HoldCore {
    fn drop(&mut self) {
        // Callers' listeners may hold anything, so they are not dropped on the io thread either.
        let listeners = self.lost.take_listeners();
        let env = &self.session.cluster.env;
        if env.is_forked() {
            std::mem::forget(listeners);
        } else if !listeners.is_empty() {
            env.call_back(move || drop(listeners));
        }
    }
}

/// A lock that was given. If nobody takes it, or when its holder drops it, it is released in the background.
pub(crate) struct Grant {
    core: Arc<HoldCore>,
    is_forgotten: bool,
}

impl Grant {
    pub(crate) fn new(core: Arc<HoldCore>) -> Self {
        Grant { core, is_forgotten: false }
    }

    pub(crate) fn core(&self) -> &Arc<HoldCore> {
        &self.core
    }

    /// Drops a grant that its waiter never saw, without releasing it.
    pub(crate) fn forget(mut self) {
        self.is_forgotten = true;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.is_forgotten {
            self.core.release_in_background();
        }
    }
}
