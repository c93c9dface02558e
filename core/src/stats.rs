//! What a session counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Loss;

/// Counters of a session, from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Locks acquired.
    pub locks: u64,
    /// Of those, the ones that had to wait for another holder, here or elsewhere.
    pub waits: u64,
    /// Of those, the ones that were passed on inside this process, in one request.
    pub hand_overs: u64,
    /// Places that the session has in queues now, as holder or as waiter.
    pub live_tickets: u64,
    /// Holds lost, for whatever reason.
    pub holds_lost: u64,
    /// Of those: no renewal was confirmed before the deadline.
    pub lost_deadline: u64,
    /// Of those: the lease had expired or was revoked.
    pub lost_lease_gone: u64,
    /// Of those: the key was deleted from outside.
    pub lost_key_deleted: u64,
    /// Of those: a guarded write was refused.
    pub lost_refused: u64,
    /// Of those: kept longer than max_hold.
    pub lost_max_hold: u64,
    /// Of those: the session was closed.
    pub lost_closed: u64,
    /// Leases lost; the session got itself a new one after each.
    pub leases_lost: u64,
    /// Renewals sent.
    pub renewals: u64,
    /// Requests sent to the store by all sessions that share its connection.
    pub requests: u64,
    /// Events heard by all sessions that share the connection.
    pub watch_events: u64,
    /// Connections and watch streams that had to be opened anew, by all sessions that share them.
    pub reconnections: u64,
}

impl Stats {
    /// For bindings: all of them, with their names, in the order above.
    #[doc(hidden)]
    pub fn counters(&self) -> [(&'static str, u64); 16] {
        [
            ("locks", self.locks),
            ("waits", self.waits),
            ("hand_overs", self.hand_overs),
            ("live_tickets", self.live_tickets),
            ("holds_lost", self.holds_lost),
            ("lost_deadline", self.lost_deadline),
            ("lost_lease_gone", self.lost_lease_gone),
            ("lost_key_deleted", self.lost_key_deleted),
            ("lost_refused", self.lost_refused),
            ("lost_max_hold", self.lost_max_hold),
            ("lost_closed", self.lost_closed),
            ("leases_lost", self.leases_lost),
            ("renewals", self.renewals),
            ("requests", self.requests),
            ("watch_events", self.watch_events),
            ("reconnections", self.reconnections),
        ]
    }
}

/// What has gone to and fro.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    /// A follower counts as one when it starts.
    pub(crate) requests: u64,
    pub(crate) watch_events: u64,
    pub(crate) reconnections: u64,
}

/// One number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) locks: Counter,
    pub(crate) waits: Counter,
    pub(crate) hand_overs: Counter,
    live_tickets: AtomicU64,
    holds_lost: Counter,
    lost_deadline: Counter,
    lost_lease_gone: Counter,
    lost_key_deleted: Counter,
    lost_refused: Counter,
    lost_max_hold: Counter,
    lost_closed: Counter,
    pub(crate) leases_lost: Counter,
    pub(crate) renewals: Counter,
}

impl Counters {
    pub(crate) fn hold_lost(&self, loss: &Loss) {
        self.holds_lost.add();
        match loss {
            Loss::Deadline => self.lost_deadline.add(),
            Loss::LeaseGone => self.lost_lease_gone.add(),
            Loss::KeyDeleted => self.lost_key_deleted.add(),
            Loss::Refused => self.lost_refused.add(),
            Loss::MaxHold => self.lost_max_hold.add(),
            Loss::Closed => self.lost_closed.add(),
            Loss::Forked | Loss::Internal | Loss::HistoryChanged => {}
        }
    }

    pub(crate) fn read(&self, traffic: Traffic) -> Stats {
        Stats {
            locks: self.locks.get(),
            waits: self.waits.get(),
            hand_overs: self.hand_overs.get(),
            live_tickets: self.live_tickets.load(Ordering::Relaxed),
            holds_lost: self.holds_lost.get(),
            lost_deadline: self.lost_deadline.get(),
            lost_lease_gone: self.lost_lease_gone.get(),
            lost_key_deleted: self.lost_key_deleted.get(),
            lost_refused: self.lost_refused.get(),
            lost_max_hold: self.lost_max_hold.get(),
            lost_closed: self.lost_closed.get(),
            leases_lost: self.leases_lost.get(),
            renewals: self.renewals.get(),
            requests: traffic.requests,
            watch_events: traffic.watch_events,
            reconnections: traffic.reconnections,
        }
    }
}

/// A ticket that is, or may be, in a queue.
pub(crate) struct LiveTicket(Arc<Counters>);

impl LiveTicket {
    pub(crate) fn of(counters: &Arc<Counters>) -> Self {
        counters.live_tickets.fetch_add(1, Ordering::Relaxed);
        LiveTicket(counters.clone())
    }
}

impl Drop for LiveTicket {
    fn drop(&mut self) {
        self.0.live_tickets.fetch_sub(1, Ordering::Relaxed);
    }
}
