//! What a lock service must be able to do: keep a queue of tickets under leases.
//!
//! Each call here is one attempt. It either has its answer, or fails with [`Trouble`]; the lock
//! above decides whether to send it again, and everything may be sent again.

pub(crate) mod etcd;
pub(crate) mod memory;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::stats::Traffic;

/// A waiter this near the head follows the whole queue; farther back it follows one ticket only.
pub(crate) const NEAR: usize = 8;

pub(crate) type LeaseId = i64;
/// The order of events in the store. A ticket's revision is its place in the queue and its token.
pub(crate) type Revision = i64;
pub(crate) type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, Trouble>> + Send + 'a>>;

/// One entry in the queue of one name. Its key may have been used before, by a ticket that has left
/// with every request about it answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ticket {
    pub(crate) name: Arc<str>,
    pub(crate) key: String,
    pub(crate) lease: LeaseId,
    /// Which of those that this process has in the queue.
    pub(crate) n: u64,
    pub(crate) value: Arc<str>,
}

/// The answer to an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Entered {
    /// Our ticket's revision: its place in the queue, and the token once it is first.
    pub(crate) token: Revision,
    pub(crate) ahead: Ahead,
}

/// Who stood ahead of a ticket at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Ahead {
    pub(crate) revision: Revision,
    /// Keys, the nearest first and at most `NEAR + 1`; `None` if the answer does not tell.
    pub(crate) keys: Option<Vec<String>>,
}

impl Ahead {
    pub(crate) fn is_nobody(&self) -> bool {
        self.keys.as_ref().is_some_and(Vec::is_empty)
    }
}

/// The answer to a look at the queue from a ticket's place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Look {
    /// Whether our ticket is still there.
    pub(crate) present: bool,
    /// Whether it is not under its lease any more: somebody has written over it.
    pub(crate) overwritten: bool,
    pub(crate) ahead: Ahead,
}

/// How to leave the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving<'a> {
    pub(crate) ticket: &'a Ticket,
    /// `None`: the ticket may or may not have entered.
    pub(crate) token: Option<Revision>,
    /// A copy of the ticket's entry may still be on its way: it has to be refused when it arrives.
    pub(crate) void: bool,
    /// The ticket that takes over in the same step.
    pub(crate) next: Option<&'a Ticket>,
}

/// The answer to leaving the queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Left {
    /// False if the ticket was gone already.
    pub(crate) was_present: bool,
    /// The entry of the next ticket, if one was given and ours was still there to hand over.
    pub(crate) next: Option<Entered>,
}

/// What to follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Follow {
    /// All tickets of a name.
    Queue(Arc<str>),
    /// The end of one ticket, by its key.
    Ticket(String),
    /// Whatever others do to a ticket of ours.
    Own { key: String, lease: LeaseId },
}

/// What a follower hears, in the order of revisions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Change {
    /// From here on every later change will be heard. Comes first, and again whenever the store had
    /// to start over: what happened up to this revision has to be looked up.
    Since(Revision),
    /// A ticket is gone.
    Gone { key: String, revision: Revision },
    /// A ticket of ours was written over, and its lease with it.
    Overwritten,
}

/// Changes as they come. Dropping it ends the following.
pub(crate) struct Changes {
    changes: mpsc::UnboundedReceiver<Change>,
    stop: Option<Box<dyn FnOnce() + Send>>,
}

impl Changes {
    pub(crate) fn new(changes: mpsc::UnboundedReceiver<Change>, stop: impl FnOnce() + Send + 'static) -> Self {
        Changes { changes, stop: Some(Box::new(stop)) }
    }

    /// The next change. It never ends: a store that is gone stays silent.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Change> {
        match self.changes.poll_recv(cx) {
            Poll::Ready(Some(change)) => Poll::Ready(change),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop();
        }
    }
}

/// A write that is applied only if the ticket is still there with this token.
#[derive(Clone, Debug)]
pub(crate) enum Guarded {
    Put { key: Vec<u8>, value: Vec<u8> },
    Get { key: Vec<u8> },
    Delete { key: Vec<u8> },
}

/// The answer to a guarded write or read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum GuardedAnswer {
    /// Applied; for a read, the value if there is one.
    Applied(Option<Vec<u8>>),
    /// The ticket is not there any more, so nothing was applied.
    NotOwner,
}

/// One contender as it stands in the store.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) revision: Revision,
    /// 0 if it has none.
    pub(crate) lease: LeaseId,
    pub(crate) value: Vec<u8>,
}

/// Why an attempt has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Trouble {
    /// No answer; the request may or may not have been applied. Worth another try.
    Unavailable(String),
    /// The lease is not known: expired or revoked.
    LeaseGone,
    /// There is a key of somebody else where a ticket of ours was to be.
    KeyTaken,
    /// Refused for good with these credentials.
    Denied(String),
    /// Refused, and nothing was applied; trying again will not help soon.
    Refused(String),
    /// What was given cannot be used: endpoints of several clusters.
    Invalid(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Unavailable(why) | Trouble::Denied(why) | Trouble::Refused(why) | Trouble::Invalid(why) => f.write_str(why),
            Trouble::KeyTaken => f.write_str("there is a key of somebody else where ours was to be"),
            Trouble::LeaseGone => f.write_str("the lease has expired or was revoked"),
        }
    }
}

/// A lock service.
pub(crate) trait Store: Send + Sync + 'static {
    /// Opens a lease; the answer is its id and the TTL that the store chose.
    fn open_lease(&self, ttl_seconds: i64) -> Reply<'_, (LeaseId, Duration)>;
    /// Renews a lease for another TTL; each attempt has `limit`. From `hurry_from` on it asks wherever it can.
    fn renew_lease(&self, lease: LeaseId, limit: Duration, hurry_from: Duration) -> Reply<'_, ()>;
    /// Ends a lease, and with it all its tickets.
    fn close_lease(&self, lease: LeaseId) -> Reply<'_, ()>;

    /// Puts a ticket at the end of its queue. Sent twice it still makes one ticket.
    fn enter<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Entered>;
    /// Puts a ticket into its queue only if nobody is there; `None` if somebody is. Then it has
    /// written nothing.
    fn enter_if_free<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Option<Entered>>;
    /// Takes a ticket out of its queue and, in the same step, puts the next one in. Without a token
    /// it is not known whether the ticket ever entered.
    fn leave<'a>(&'a self, leaving: Leaving<'a>) -> Reply<'a, Left>;
    /// Looks at the queue ahead of a ticket. After a change that a follower has heard, a cheaper
    /// answer from that revision or later will do.
    fn look<'a>(&'a self, ticket: &'a Ticket, token: Revision, since: Option<Revision>) -> Reply<'a, Look>;
    /// Puts a ticket right that somebody has written over, if it is still there.
    fn put_right<'a>(&'a self, ticket: &'a Ticket, token: Revision) -> Reply<'a, ()>;
    /// Follows changes, from now on and through any reconnection.
    fn follow(&self, what: Follow) -> Changes;

    /// A write or read that is applied only if the ticket is still there.
    fn guarded<'a>(&'a self, ticket: &'a Ticket, token: Revision, what: &'a Guarded) -> Reply<'a, GuardedAnswer>;
    /// All contenders of a name in the order of the queue.
    fn contenders<'a>(&'a self, name: &'a str) -> Reply<'a, Vec<Entry>>;
    /// All contenders of all names that start with a prefix, the oldest first.
    fn all_contenders<'a>(&'a self, prefix: &'a str) -> Reply<'a, Vec<Entry>>;

    /// How often what the store tells has turned out to be of another history, as after a restore.
    fn history(&self) -> u64 {
        0
    }
    /// Waits until that is more often.
    fn history_changed(&self, _since: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::pending())
    }

    /// What has gone to and fro so far.
    fn traffic(&self) -> Traffic;
}

/// The key of a contender of `name`: `<name>/<lease, hex>` as etcd's own clients write it, with a minus if it is negative, or
/// `<name>/<lease, hex>-<n, hex>` as we do. Keys of a lock that is merely nested are none.
pub(crate) fn is_contender(name: &str, key: &[u8]) -> bool {
    let entry = key.strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
    entry.is_some_and(is_entry)
}

/// The name of the lock that a key belongs to, if it has the form of a contender's key.
pub(crate) fn name_of_contender(key: &str) -> Option<&str> {
    let (name, entry) = key.rsplit_once('/')?;
    (!name.is_empty() && is_entry(entry.as_bytes())).then_some(name)
}

/// `<lease, hex>` or `<lease, hex>-<n, hex>`.
fn is_entry(entry: &[u8]) -> bool {
    let hex = |part: &[u8]| !part.is_empty() && part.len() <= 16 && part.iter().all(u8::is_ascii_hexdigit);
    let entry = entry.strip_prefix(b"-").unwrap_or(entry);
    match entry.iter().position(|&byte| byte == b'-') {
        None => hex(entry),
        Some(dash) => hex(&entry[..dash]) && hex(&entry[dash + 1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::is_contender;

    #[test]
    fn only_keys_of_the_very_name_are_contenders() {
        for key in ["a/694d7abc", "a/694d7abc-1f", "a/0-0", "a/-5", "a/-7fffffffffffffff"] {
            assert!(is_contender("a", key.as_bytes()), "{key}");
        }
        for key in [
            "a",
            "a/",
            "a/b/694d",
            "a/xyz",
            "a/1-",
            "a/-",
            "a/--1",
            "a/1-2-3",
            "ab/694d",
            "b/694d",
            "a//1",
            "a/11112222333344445",
        ] {
            assert!(!is_contender("a", key.as_bytes()), "{key}");
        }
    }
}
