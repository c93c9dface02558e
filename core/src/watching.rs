//! How far what we hear of a queue can be trusted, and so how often to look besides.

use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Change, Changes};

/// A waiter looks at the queue this often even if it hears nothing.
pub(crate) const RE_READ: Duration = Duration::from_secs(3);
/// etcd serves a new watch late, every 100 ms, if a write fell into the moment of its creation (it
/// is "unsynced"; nothing tells). Until it has proved to be live, or is older than this, the waiter
/// also looks itself, at growing intervals.
const PROOF: Duration = Duration::from_millis(150);
const FIRST_PROBE: Duration = Duration::from_millis(2);
const FIRST_PROBE_FAR_BACK: Duration = Duration::from_millis(10);

pub(crate) struct Following {
    /// Else one ticket only.
    of_queue: bool,
    changes: Changes,
    /// The store has said since when.
    is_live: bool,
    /// It has delivered something, or is old enough.
    is_proven: bool,
    started: Instant,
    /// When to look next while it is not proven.
    probe: Duration,
}

impl Following {
    pub(crate) fn of(of_queue: bool, changes: Changes) -> Self {
        let probe = first_probe(of_queue);
        Following { of_queue, changes, is_live: false, is_proven: false, started: Instant::now(), probe }
    }

    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Change> {
        let change = std::task::ready!(self.changes.poll_next(cx));
        match change {
            Change::Since(_) => {
                if std::mem::replace(&mut self.is_live, true) {
                    // It was made anew, so it has to prove itself again.
                    (self.is_proven, self.started, self.probe) = (false, Instant::now(), first_probe(self.of_queue));
                }
            }
            Change::Gone { .. } | Change::Overwritten => self.is_proven = true,
        }
        Poll::Ready(change)
    }

    /// When to look at the queue after having looked just now.
    pub(crate) fn next_look(&mut self) -> Duration {
        self.is_proven |= self.started.elapsed() > PROOF;
        if self.is_proven {
            return RE_READ;
        }
        let probe = self.probe;
        // In a long queue looks are dearer, and the own turn is farther off.
        self.probe *= if self.of_queue { 2 } else { 4 };
        probe
    }
}

fn first_probe(of_queue: bool) -> Duration {
    if of_queue { FIRST_PROBE } else { FIRST_PROBE_FAR_BACK }
}
