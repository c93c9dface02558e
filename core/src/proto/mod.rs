//! The lock's protocol: events in, actions out. Nothing in here asks a clock, waits, sends, or locks anything, so a model can drive
//! it through every order of events (tests/model), and does.
//!
//! ```text
//!            Enter              the claim is met              Release
//!   line ───────────▶ Waiting ─────────────────────▶ Held ───────────────┐
//!    ▲                   │ nobody waits here any more │ LeaseLost, Gone    │
//!    │                   ▼                            ▼                    ▼
//!    └──────────────── Leaving ◀──────────────────────┴────────────────────┘
//!                        │  hand-over: one leaves and the next enters in one step
//!                        └──────────────▶ Waiting
//! ```
//!
//! A [`LocalQueue`](queue::LocalQueue) is this process's part in the queue of one name: the line of those here who want the lock, one
//! ticket at most that is on its way in, and any number that hold or leave. Which ticket owns is the [`Claim`](claim::Claim)'s.

pub(crate) mod claim;
pub(crate) mod queue;
#[cfg(test)]
mod tests;
pub(crate) mod ticket;

use crate::error::{Error, Loss};
use crate::store::{Change, Entered, Follow, Left, Look, Revision, Ticket, Trouble};

/// A ticket of ours, while it is there.
pub(crate) type TicketId = usize;
/// A session of this process.
pub(crate) type SessionId = usize;
pub(crate) type WaiterId = u64;

/// Somebody here who wants the lock.
pub(crate) trait Waiter {
    fn id(&self) -> WaiterId;
    fn session(&self) -> SessionId;
    /// Does not wait for other holders: it is told that the lock is taken.
    fn only_tries(&self) -> bool;
}

/// What the protocol needs to know or to have done at the very moment of an event.
pub(crate) trait Process<W> {
    /// A ticket under the lease that the waiter's session has now, if it has one; `n` tells it from others of ours.
    fn ticket_for(&mut self, waiter: &W, n: u64) -> Option<Ticket>;
    /// Whether the ticket's lease is not lost, as far as is known here.
    fn is_alive(&self, ticket: &Ticket) -> bool;
    /// A request about the ticket went unanswered, and a copy may arrive at any later time: its key is not used again.
    fn retire(&mut self, ticket: &Ticket);
    /// The store does not know the ticket's lease.
    fn lease_is_gone(&mut self, ticket: &Ticket);
}

#[derive(Clone, Debug)]
pub(crate) enum Event<W> {
    Lock(W),
    GaveUp(WaiterId),
    Release(Revision),
    /// The lease that was waited for is there.
    LeaseReady,
    LeaseRefused(Error),
    LeaseLost(TicketId),
    Entered(TicketId, Result<Option<Entered>, Trouble>),
    Looked(TicketId, Result<Look, Trouble>),
    Checked(TicketId, Result<Look, Trouble>),
    Left(TicketId, Result<Left, Trouble>),
    /// From what follows the queue.
    Heard(Change),
    /// From what follows the ticket of a hold that lasts.
    HeardOwn(TicketId, Change),
    /// The waiter had gone when the lock was to be given to it.
    NotTaken(TicketId),
    /// The hold was lost by itself, as by a guarded write that was refused.
    HoldLost(TicketId),
    HoldLasts(TicketId),
    HoldIsOld(TicketId),
    LookIsDue(TicketId),
    PauseIsOver(TicketId),
    /// Of a pause before a new ticket.
    FreshPauseIsOver,
    IdleForLong,
}

#[derive(Clone, Debug)]
pub(crate) enum Action<W> {
    /// Wait for a lease of the session of the first in line; or no more.
    AwaitLease,
    StopAwaitingLease,
    Send(TicketId, Request),
    /// Look whether the ticket of a hold is still there, beside everything else; after a pause.
    Check(TicketId, bool),
    /// Tell `PauseIsOver` after a pause that grows.
    Pause(TicketId),
    PauseFresh,
    /// Tell `LookIsDue` when it is time for one who hears nothing.
    LookLater(TicketId, Pace),
    Follow(Follow),
    Unfollow,
    FollowOwn(TicketId),
    /// Somebody has written over the ticket: put it back under its lease.
    PutRight(TicketId),
    /// Put the marker of a ticket that may still arrive, once there is room for it.
    MarkLater(Ticket),
    Grant(W, TicketId, Granted),
    /// A second hold on one ticket, which only a sabotage gives.
    GrantAgain(W, TicketId),
    Taken(W),
    Fail(W, Failure),
    Lose(TicketId, Loss),
    Released(Revision, Release),
    HandedOver(TicketId),
    /// Nothing of the ticket is left here.
    End(TicketId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Slow,
    /// Soon, until what follows the queue has proved to be live.
    AsTheWatchProves,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Enter,
    EnterIfFree,
    Look { token: Revision, since: Option<Revision> },
    Leave { token: Option<Revision>, void: bool, next: Option<Ticket> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) token: Revision,
    /// Somebody else had the lock when the ticket entered.
    pub(crate) waited: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// Of the lease.
    Lease(Error),
    Store(Trouble),
}

/// What became of a release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    Done,
    /// The ticket was gone before.
    WasGone,
    LeaseLost,
    /// It goes on, and will be gone with the lease at the latest.
    Refused(Trouble),
}
