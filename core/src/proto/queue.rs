//! This process's part in the queue of one name: all of the lock's algorithm.

use std::collections::VecDeque;
use std::sync::Arc;

use super::claim::Claim;
use super::ticket::{Asking, Held, Leaving, Next, Phase, Sending, Standing, Waiting};
use super::{Action, Event, Failure, Granted, Pace, Process, Release, Request, SessionId, TicketId, Waiter};
use crate::error::{Error, Loss};
use crate::sabotage::{Sabotage, is_on};
use crate::store::{Ahead, Change, Entered, Follow, Left, Look, Revision, Ticket, Trouble};

/// After this many locks without a contender what follows the queue is not worth its events.
const QUIET_ROUNDS: u32 = 16;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LocalQueue<W> {
    claim: Claim,
    name: Arc<str>,
    line: VecDeque<W>,
    /// Some of them may only try.
    tries: bool,
    /// The store has answered that the lock is taken, or it is held here.
    is_taken: bool,
    opening: Opening,
    tickets: Vec<Option<Standing>>,
    watch: Option<Watch>,
    quiet_rounds: u32,
    /// Our last ticket had many ahead of it.
    is_crowded: bool,
    was_busy: bool,
}

/// What comes before the next ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Opening {
    Nothing,
    /// A lease of this session.
    Lease(SessionId),
    Pause,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Watch {
    what: Follow,
    /// Live since this revision; `None` until the store says so.
    since: Option<Revision>,
}

/// What is to be done, in this order.
pub(crate) type Actions<W> = VecDeque<Action<W>>;

/// An event being handled.
struct Turn<'a, W, P> {
    queue: &'a mut LocalQueue<W>,
    process: &'a mut P,
    actions: &'a mut Actions<W>,
}

impl<W: Waiter> LocalQueue<W> {
    pub(crate) fn new(name: Arc<str>, claim: Claim) -> Self {
        LocalQueue {
            claim,
            name,
            line: VecDeque::new(),
            tries: false,
            is_taken: false,
            opening: Opening::Nothing,
            tickets: Vec::new(),
            watch: None,
            quiet_rounds: 0,
            is_crowded: false,
            was_busy: false,
        }
    }

    /// Handles what has happened by now, in its order; what it brings about is added to `actions`. So one who wants the lock as
    /// another releases it gets it by the same request.
    pub(crate) fn handle(
        &mut self,
        events: impl IntoIterator<Item = Event<W>>,
        process: &mut impl Process<W>,
        actions: &mut Actions<W>,
    ) {
        let mut turn = Turn { queue: self, process, actions };
        for event in events {
            turn.take(event);
        }
        turn.settle();
    }

    /// Somebody here holds the lock or waits for it, or something of them is still to be taken out.
    pub(crate) fn is_busy(&self) -> bool {
        !self.line.is_empty() || self.tickets.iter().any(Option::is_some)
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.is_taken
    }

    /// What is in the store is there for nobody any more, and on its way out.
    pub(crate) fn is_cleaning_up(&self) -> bool {
        self.line.is_empty()
            && self
                .tickets()
                .any(|(_, ticket)| matches!(ticket.phase, Phase::Entering { .. } | Phase::Waiting(_) | Phase::Leaving(_)))
    }

    /// Whether the next change of the queue may be told. What is heard while a look is under way has to wait for its answer.
    pub(crate) fn listens(&self) -> bool {
        let is_looking = |phase: &Phase| matches!(phase, Phase::Waiting(waiting) if waiting.look == Asking::InFlight);
        let hears = |phase: &Phase| match phase {
            Phase::Waiting(_) => true,
            Phase::Held(held) => held.hears_queue,
            Phase::Entering { .. } | Phase::Leaving(_) => false,
        };
        !self.tickets().any(|(_, ticket)| is_looking(&ticket.phase)) && self.tickets().any(|(_, ticket)| hears(&ticket.phase))
    }

    pub(crate) fn first_in_line(&self) -> Option<&W> {
        self.line.front()
    }

    pub(crate) fn tickets(&self) -> impl Iterator<Item = (TicketId, &Standing)> {
        self.tickets.iter().enumerate().filter_map(|(id, ticket)| Some((id, ticket.as_ref()?)))
    }

    pub(crate) fn ticket(&self, id: TicketId) -> Option<&Standing> {
        self.tickets.get(id)?.as_ref()
    }

    /// Whether a ticket with this key is in use.
    pub(crate) fn uses(&self, key: &str) -> bool {
        self.in_use().any(|ticket| ticket.key == key)
    }

    /// Tickets of ours, with those that are to follow.
    fn in_use(&self) -> impl Iterator<Item = &Ticket> {
        self.tickets().flat_map(|(_, standing)| {
            let next = match &standing.phase {
                Phase::Leaving(leaving) => [leaving.next.as_ref(), leaving.orphan.as_ref()],
                _ => [None, None],
            };
            next.into_iter().flatten().map(|next| &next.ticket).chain([&standing.ticket])
        })
    }

    /// The lowest that no ticket of ours has, so that the same few keys are used again and again.
    fn free_number(&self) -> u64 {
        (0..).find(|n| self.in_use().all(|ticket| ticket.n != *n)).unwrap_or_default()
    }

    fn insert(&mut self, standing: Standing) -> TicketId {
        let free = self.tickets.iter().position(Option::is_none);
        let id = free.unwrap_or_else(|| {
            self.tickets.reserve_exact(1);
            self.tickets.push(None);
            self.tickets.len() - 1
        });
        self.tickets[id] = Some(standing);
        id
    }

    fn get(&mut self, id: TicketId) -> Option<&mut Standing> {
        self.tickets.get_mut(id)?.as_mut()
    }

    /// The one that is on its way in.
    fn incoming(&self) -> Option<TicketId> {
        self.tickets().find(|(_, ticket)| matches!(ticket.phase, Phase::Entering { .. } | Phase::Waiting(_))).map(|(id, _)| id)
    }

    fn waiting(&mut self, id: TicketId) -> Option<&mut Waiting> {
        match &mut self.get(id)?.phase {
            Phase::Waiting(waiting) => Some(waiting),
            _ => None,
        }
    }

    fn held(&mut self, id: TicketId) -> Option<&mut Held> {
        match &mut self.get(id)?.phase {
            Phase::Held(held) => Some(held),
            _ => None,
        }
    }

    fn leaving(&mut self, id: TicketId) -> Option<&mut Leaving> {
        match &mut self.get(id)?.phase {
            Phase::Leaving(leaving) => Some(leaving),
            _ => None,
        }
    }

    fn follows_queue(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| matches!(watch.what, Follow::Queue(_)))
    }
}

impl<W: Waiter, P: Process<W>> Turn<'_, W, P> {
    fn take(&mut self, event: Event<W>) {
        match event {
            Event::Lock(waiter) => self.lock(waiter),
            Event::GaveUp(id) => self.queue.line.retain(|waiter| waiter.id() != id),
            Event::Release(token) => self.release(token),
            Event::LeaseReady => self.open(|opening| matches!(opening, Opening::Lease(_))),
            Event::LeaseRefused(error) => self.lease_refused(&error),
            Event::LeaseLost(id) => self.lease_lost(id),
            Event::Entered(id, answer) => self.entered(id, answer),
            Event::Looked(id, answer) => self.looked(id, answer),
            Event::Checked(id, answer) => self.checked(id, answer),
            Event::Left(id, answer) => self.left(id, answer),
            Event::Heard(change) => self.heard(change),
            Event::HeardOwn(id, change) => self.heard_own(id, change),
            Event::NotTaken(id) => self.grant(id),
            Event::HoldLost(id) => self.hold_ends(id, None),
            Event::HoldLasts(id) => self.hold_lasts(id),
            Event::HoldIsOld(id) => self.hold_ends(id, Some(Loss::MaxHold)),
            Event::LookIsDue(id) => self.look(id),
            Event::PauseIsOver(id) => self.pause_is_over(id),
            Event::FreshPauseIsOver => self.open(|opening| opening == Opening::Pause),
            Event::IdleForLong => self.unfollow(),
        }
    }

    fn open(&mut self, was_waited_for: impl Fn(Opening) -> bool) {
        if was_waited_for(self.queue.opening) {
            self.queue.opening = Opening::Nothing;
        }
    }

    /// Does what the state calls for, whatever has led to it.
    fn settle(&mut self) {
        if let Some(id) = self.queue.incoming() {
            self.consider(id);
        }
        let session = self.queue.line.front().map(Waiter::session);
        match self.queue.opening {
            Opening::Lease(awaited) if session != Some(awaited) => {
                self.queue.opening = Opening::Nothing;
                self.actions.push_back(Action::StopAwaitingLease);
            }
            Opening::Pause if session.is_none() => self.queue.opening = Opening::Nothing,
            _ => {}
        }
        if self.queue.opening == Opening::Nothing && self.queue.incoming().is_none() {
            self.enter();
        }
        let is_due = |standing: &Standing| matches!(&standing.phase, Phase::Leaving(leaving) if leaving.request == Sending::Due);
        let due: Vec<_> = self.queue.tickets().filter(|(_, standing)| is_due(standing)).map(|(id, _)| id).collect();
        for id in due {
            self.send_leave(id);
        }
        let is_busy = self.queue.is_busy();
        if !is_busy {
            self.queue.is_taken = false;
            // Where many take turns, each that has had its own and still listened would cost one more event at every release.
            if self.queue.was_busy && self.queue.is_crowded && self.queue.follows_queue() {
                self.unfollow();
            }
        }
        self.queue.was_busy = is_busy;
    }

    // ---- the line --------------------------------------------------------------------------

    fn lock(&mut self, waiter: W) {
        let held = self.queue.tickets().find(|(_, ticket)| matches!(ticket.phase, Phase::Held(_))).map(|(id, _)| id);
        if let Some(id) = held.filter(|_| is_on(Sabotage::NoInProcessQueue)) {
            return self.actions.push_back(Action::GrantAgain(waiter, id));
        }
        let waits = |ticket: &Standing| matches!(ticket.phase, Phase::Waiting(_) | Phase::Held(_));
        if waiter.only_tries() && !self.queue.claim.fits_beside(self.queue.tickets().filter(|(_, ticket)| waits(ticket)).count())
        {
            return self.actions.push_back(Action::Taken(waiter));
        }
        self.queue.tries |= waiter.only_tries();
        self.queue.line.push_back(waiter);
    }

    /// The lock is taken: those who only try need not wait.
    fn answer_tries(&mut self) {
        self.queue.is_taken = true;
        if std::mem::take(&mut self.queue.tries) {
            let (tries, line) = std::mem::take(&mut self.queue.line).into_iter().partition(Waiter::only_tries);
            self.queue.line = line;
            self.actions.extend(VecDeque::into_iter(tries).map(Action::Taken));
        }
    }

    fn fail_all(&mut self, trouble: &Trouble) {
        let failed = self.queue.line.drain(..);
        self.actions.extend(failed.map(|waiter| Action::Fail(waiter, Failure::Store(trouble.clone()))));
    }

    /// Only the waiters of this session have no lease to expect.
    fn lease_refused(&mut self, error: &Error) {
        let Opening::Lease(session) = self.queue.opening else { return };
        self.queue.opening = Opening::Nothing;
        let (failed, line) = std::mem::take(&mut self.queue.line).into_iter().partition(|waiter| waiter.session() == session);
        self.queue.line = line;
        self.actions.extend(VecDeque::into_iter(failed).map(|waiter| Action::Fail(waiter, Failure::Lease(error.clone()))));
    }

    // ---- enter -----------------------------------------------------------------------------

    /// Puts a ticket into the queue for the first in line, if there is room for one more of ours.
    fn enter(&mut self) {
        let Some(first) = self.queue.line.front() else { return };
        if !self.queue.claim.fits_beside(self.queue.tickets().count()) {
            return;
        }
        let (session, n) = (first.session(), self.queue.free_number());
        match self.process.ticket_for(first, n) {
            Some(ticket) => {
                let id = self.queue.insert(Standing::entering(Next { ticket, session }));
                self.send_entry(id);
            }
            None => {
                self.queue.opening = Opening::Lease(session);
                self.actions.push_back(Action::AwaitLease);
            }
        }
    }

    fn send_entry(&mut self, id: TicketId) {
        let all_try = self.queue.line.iter().all(Waiter::only_tries);
        let request = if all_try { Request::EnterIfFree } else { Request::Enter };
        self.actions.push_back(Action::Send(id, request));
    }

    fn entered(&mut self, id: TicketId, answer: Result<Option<Entered>, Trouble>) {
        if !matches!(self.phase(id), Some(Phase::Entering { .. })) {
            return;
        }
        match answer {
            Ok(Some(Entered { token, ahead })) => self.wait(id, token, ahead, false),
            Ok(None) => {
                self.answer_tries();
                self.take_back(id);
            }
            Err(Trouble::LeaseGone) => {
                self.tell_lease_gone(id);
                self.end(id);
            }
            Err(Trouble::KeyTaken) => {
                self.retire(id);
                self.queue.opening = Opening::Pause;
                self.actions.push_back(Action::PauseFresh);
                self.take_back(id);
            }
            Err(Trouble::Unavailable(_)) => {
                self.doubt(id);
                self.set_phase(id, Phase::Entering { paused: true });
                self.actions.push_back(Action::Pause(id));
            }
            Err(refusal) => {
                // What a full database refuses may have been applied all the same.
                if matches!(refusal, Trouble::Refused(_)) {
                    self.doubt(id);
                }
                self.fail_all(&refusal);
                self.take_back(id);
            }
        }
    }

    /// A copy of the entry may arrive at any later time.
    fn doubt(&mut self, id: TicketId) {
        if let Some(standing) = self.queue.get(id) {
            standing.doubtful = true;
        }
        self.retire(id);
    }

    /// Nobody wants a ticket that has not entered, as far as is known. It hands nothing over.
    fn take_back(&mut self, id: TicketId) {
        if self.queue.ticket(id).is_some_and(|standing| standing.doubtful) { self.withdraw(id) } else { self.end(id) }
    }

    /// Takes out a ticket of which it is not known whether it has entered, or ever will.
    fn withdraw(&mut self, id: TicketId) {
        self.doubt(id);
        self.leave(id, Leaving::new(None, false));
    }

    fn pause_is_over(&mut self, id: TicketId) {
        match self.queue.get(id).map(|standing| &mut standing.phase) {
            Some(Phase::Entering { paused }) if *paused => {
                *paused = false;
                self.send_entry(id);
            }
            Some(Phase::Waiting(waiting)) if waiting.look == Asking::Paused => self.look(id),
            Some(Phase::Leaving(leaving)) if leaving.request == Sending::Paused => leaving.request = Sending::Due,
            _ => {}
        }
    }

    // ---- wait ------------------------------------------------------------------------------

    fn wait(&mut self, id: TicketId, token: Revision, ahead: Ahead, was_behind: bool) {
        let (is_listed, is_met) = (ahead.keys.is_some(), self.queue.claim.is_met(&ahead));
        if is_met {
            self.queue.quiet_rounds += 1;
            if self.queue.quiet_rounds > QUIET_ROUNDS {
                self.unfollow();
            }
        } else {
            self.queue.quiet_rounds = 0;
        }
        self.queue.is_crowded = ahead.keys.as_ref().is_none_or(|keys| keys.len() > self.queue.claim.near);
        if let Some(standing) = self.queue.get(id) {
            standing.waited = was_behind || !is_met;
        }
        self.set_phase(id, Phase::Waiting(Waiting::new(token, ahead)));
        if !is_listed {
            self.look(id);
        } else if !is_met {
            self.actions.push_back(Action::LookLater(id, Pace::Slow));
        }
    }

    /// Whether the one on its way in may stop, own, or has to follow somebody.
    fn consider(&mut self, id: TicketId) {
        let nobody_waits = self.queue.line.is_empty();
        match self.phase(id) {
            Some(Phase::Entering { paused: true }) if nobody_waits => return self.take_back(id),
            Some(Phase::Waiting(_)) => {}
            _ => return,
        }
        let (claim, name) = (self.queue.claim, self.queue.name.clone());
        let now = self.queue.watch.as_ref().map(|watch| watch.what.clone());
        let Some(waiting) = self.queue.waiting(id) else { return };
        let (is_met, token) = (claim.is_met(&waiting.ahead), waiting.token);
        let want = waiting.ahead.keys.as_ref().filter(|_| !is_met).map(|keys| {
            let (want, is_far) = claim.to_follow(Follow::Queue(name), keys, waiting.is_far, now.as_ref());
            waiting.is_far = is_far;
            want
        });
        if !is_met {
            self.answer_tries();
        }
        if self.queue.line.is_empty() {
            self.leave(id, Leaving::new(Some(token), false));
        } else if is_met {
            self.grant(id);
        } else if let Some(want) = want.filter(|want| now.as_ref() != Some(want)) {
            self.queue.watch = Some(Watch { what: want.clone(), since: None });
            self.actions.push_back(Action::Follow(want));
        }
    }

    fn unfollow(&mut self) {
        if self.queue.watch.take().is_some() {
            self.actions.push_back(Action::Unfollow);
        }
    }

    /// What follows the queue tells the one that waits, and the holds that rely on it.
    fn heard(&mut self, change: Change) {
        let again = match (&change, &mut self.queue.watch) {
            (Change::Since(revision), Some(watch)) => watch.since.replace(*revision).is_some(),
            _ => false,
        };
        let ids: Vec<_> = self.queue.tickets().map(|(id, _)| id).collect();
        for id in ids {
            match self.phase(id) {
                Some(Phase::Waiting(_)) => self.waiter_hears(id, &change),
                Some(Phase::Held(held)) if held.hears_queue => self.holder_hears(id, &change, again),
                _ => {}
            }
        }
    }

    fn waiter_hears(&mut self, id: TicketId, change: &Change) {
        let own = self.queue.ticket(id).map(|standing| standing.ticket.key.clone()).unwrap_or_default();
        let Some(waiting) = self.queue.waiting(id) else { return };
        let is_listed = waiting.ahead.keys.is_some();
        match change {
            Change::Since(revision) if *revision > waiting.ahead.revision && !(waiting.is_far && is_listed) => {
                // What happened up to there was not heard, our own ticket's end included. Without a list no event can make
                // the lock ours.
                waiting.forget_ahead(*revision);
                self.look(id);
            }
            Change::Since(_) if is_listed => {
                waiting.look = Asking::Later;
                self.actions.push_back(Action::LookLater(id, Pace::AsTheWatchProves));
            }
            Change::Since(_) | Change::Overwritten => {}
            Change::Gone { revision, .. } if *revision <= waiting.ahead.revision => {}
            Change::Gone { key, .. } if *key == own && !is_on(Sabotage::NoOwnKeyWatch) => self.abandon(id),
            // A look is due, and has to know of this.
            Change::Gone { revision, .. } if !is_listed => waiting.forget_ahead(*revision),
            Change::Gone { revision, .. } if waiting.is_far => {
                waiting.forget_ahead(*revision);
                self.look(id);
            }
            Change::Gone { key, .. } => {
                if let Some(keys) = &mut waiting.ahead.keys {
                    keys.retain(|ahead| ahead != key);
                }
            }
        }
    }

    fn look(&mut self, id: TicketId) {
        let Some(waiting) = self.queue.waiting(id).filter(|waiting| waiting.look != Asking::InFlight) else { return };
        waiting.look = Asking::InFlight;
        let request = Request::Look { token: waiting.token, since: waiting.heard.take() };
        self.actions.push_back(Action::Send(id, request));
    }

    fn looked(&mut self, id: TicketId, answer: Result<Look, Trouble>) {
        let live_since = self.queue.watch.as_ref().and_then(|watch| watch.since);
        let Some(waiting) = self.queue.waiting(id) else { return };
        match answer {
            Ok(Look { present, overwritten, ahead }) => {
                // No member lags that answers this. So it was no history of this store that we have heard.
                let is_odd = Some(ahead.revision) < live_since.max(Some(waiting.ahead.revision));
                (waiting.ahead, waiting.look) = (ahead, Asking::No);
                if overwritten {
                    self.actions.push_back(Action::PutRight(id));
                }
                if is_odd {
                    self.unfollow();
                }
                if present || is_on(Sabotage::NoOwnKeyWatch) {
                    self.actions.push_back(Action::LookLater(id, Pace::AsTheWatchProves))
                } else {
                    self.abandon(id)
                }
            }
            Err(trouble) => {
                waiting.look = Asking::Paused;
                self.actions.push_back(Action::Pause(id));
                if matches!(trouble, Trouble::Denied(_)) {
                    self.fail_all(&trouble);
                }
            }
        }
    }

    // ---- hold ------------------------------------------------------------------------------

    /// Gives the lock to the first in line, which may prove to have gone.
    fn grant(&mut self, id: TicketId) {
        let hears_queue = self.queue.follows_queue();
        let Some(standing) = self.queue.get(id) else { return };
        let (session, waited) = (standing.session, standing.waited);
        let (token, seen) = match &standing.phase {
            Phase::Waiting(waiting) => (waiting.token, waiting.ahead.revision),
            Phase::Held(held) => (held.token, held.seen),
            _ => return,
        };
        // It may be under the lease of a session whose waiter gave up.
        if self.queue.line.front().is_none_or(|first| first.session() != session) {
            return self.leave(id, Leaving::new(Some(token), false));
        }
        let held = Held { token, seen, hears_queue, own_since: None, follows_own: false, is_checking: false };
        self.set_phase(id, Phase::Held(held));
        if let Some(first) = self.queue.line.pop_front() {
            self.actions.push_back(Action::Grant(first, id, Granted { token, waited }));
        }
        self.answer_tries();
    }

    fn hold_lasts(&mut self, id: TicketId) {
        if let Some(held) = self.queue.held(id).filter(|held| !held.follows_own) {
            held.follows_own = true;
            self.actions.push_back(Action::FollowOwn(id));
        }
    }

    fn heard_own(&mut self, id: TicketId, change: Change) {
        let Some(held) = self.queue.held(id) else { return };
        let again = match change {
            Change::Since(revision) => held.own_since.replace(revision).is_some(),
            _ => false,
        };
        self.holder_hears(id, &change, again);
    }

    fn holder_hears(&mut self, id: TicketId, change: &Change, again: bool) {
        if is_on(Sabotage::NoOwnKeyWatch) {
            return;
        }
        let own = self.queue.ticket(id).map(|standing| standing.ticket.key.clone()).unwrap_or_default();
        let Some(held) = self.queue.held(id) else { return };
        match change {
            // After a restart, of etcd too, nothing is as it was for sure; below what we know it may be restored.
            Change::Since(revision) if again || *revision != held.seen => {
                held.is_checking = true;
                self.actions.push_back(Action::Check(id, false));
            }
            Change::Overwritten => self.actions.push_back(Action::PutRight(id)),
            Change::Gone { key, revision } if *key == own && *revision > held.token => self.hold_ends(id, Some(Loss::KeyDeleted)),
            _ => {}
        }
    }

    fn checked(&mut self, id: TicketId, answer: Result<Look, Trouble>) {
        let Some(held) = self.queue.held(id).filter(|held| held.is_checking) else { return };
        match answer {
            Ok(look) if !look.present => self.hold_ends(id, Some(Loss::KeyDeleted)),
            Ok(look) => {
                held.is_checking = false;
                held.seen = held.seen.max(look.ahead.revision);
                if look.overwritten {
                    self.actions.push_back(Action::PutRight(id));
                }
            }
            Err(_) => self.actions.push_back(Action::Check(id, true)),
        }
    }

    fn hold_ends(&mut self, id: TicketId, loss: Option<Loss>) {
        let Some(held) = self.queue.held(id) else { return };
        let token = held.token;
        if let Some(loss) = loss {
            self.actions.push_back(Action::Lose(id, loss));
        }
        self.leave(id, Leaving::new(Some(token), false));
    }

    fn release(&mut self, token: Revision) {
        let is_it = |standing: &Standing| matches!(&standing.phase, Phase::Held(held) if held.token == token);
        let held = self.queue.tickets().find(|(_, standing)| is_it(standing)).map(|(id, _)| id);
        match held {
            Some(id) => self.leave(id, Leaving::new(Some(token), true)),
            // It was lost, and is gone or on its way out.
            None => self.actions.push_back(Action::Released(token, Release::LeaseLost)),
        }
    }

    // ---- leave -----------------------------------------------------------------------------

    /// A ticket that waits is lost. With its lease its key is gone too; else it is made sure of.
    fn abandon(&mut self, id: TicketId) {
        if let Some(token) = self.queue.waiting(id).map(|waiting| waiting.token) {
            self.leave(id, Leaving::new(Some(token), false));
        }
    }

    fn lease_lost(&mut self, id: TicketId) {
        if let Some(leaving) = self.queue.leaving(id) {
            leaving.lease_lost = true;
            // A request under way may still put the next ticket, so its answer is waited for.
            if leaving.request != Sending::InFlight {
                self.lease_of_leaving_lost(id);
            }
            return;
        }
        // What was heard may be of a history that is no more.
        if !matches!(self.phase(id), Some(Phase::Entering { .. })) {
            self.unfollow();
        }
        self.end(id);
    }

    fn lease_of_leaving_lost(&mut self, id: TicketId) {
        let Some(leaving) = self.queue.leaving(id) else { return };
        let next = leaving.next.take().filter(|_| leaving.sent_before);
        let orphan = leaving.orphan.take().or(next);
        if let (Some(token), true) = (leaving.token, leaving.tells) {
            self.actions.push_back(Action::Released(token, Release::LeaseLost));
        }
        self.end(id);
        self.withdraw_orphan(orphan);
    }

    fn withdraw_orphan(&mut self, orphan: Option<Next>) {
        if let Some(orphan) = orphan {
            let id = self.queue.insert(Standing::entering(orphan));
            self.withdraw(id);
        }
    }

    /// Takes our ticket out of the queue and, if somebody here waits, puts the next one in by the same step. Goes on until the
    /// store has answered or the lease has ended, and the key with it.
    fn leave(&mut self, id: TicketId, leaving: Leaving) {
        self.set_phase(id, Phase::Leaving(Box::new(Leaving { request: Sending::Due, ..leaving })));
    }

    fn send_leave(&mut self, id: TicketId) {
        self.choose_next(id);
        let Some(standing) = self.queue.get(id) else { return };
        let Phase::Leaving(leaving) = &mut standing.phase else { return };
        leaving.request = Sending::InFlight;
        let request = Request::Leave {
            token: leaving.token,
            void: standing.doubtful && leaving.may_put && !is_on(Sabotage::UnlockByName),
            next: leaving.next.as_ref().map(|next| next.ticket.clone()),
        };
        self.actions.push_back(Action::Send(id, request));
    }

    fn choose_next(&mut self, id: TicketId) {
        if self.queue.incoming().is_some() {
            return;
        }
        let Some(standing) = self.queue.ticket(id) else { return };
        let may = matches!(&standing.phase, Phase::Leaving(leaving)
            if leaving.next.is_none() && leaving.token.is_some() && leaving.may_hand_over && !leaving.sent_before);
        let n = self.queue.free_number();
        let Some(first) = self.queue.line.front().filter(|_| may) else { return };
        let next = self.process.ticket_for(first, n).map(|ticket| Next { ticket, session: first.session() });
        if let Some(leaving) = self.queue.leaving(id) {
            leaving.next = next;
        }
    }

    fn left(&mut self, id: TicketId, answer: Result<Left, Trouble>) {
        let Some(standing) = self.queue.ticket(id) else { return };
        let Phase::Leaving(leaving) = &standing.phase else { return };
        let (ticket, doubtful, mut leaving) = (standing.ticket.clone(), standing.doubtful, Leaving::clone(leaving));
        match answer {
            Ok(left) => return self.has_left(id, &ticket, doubtful, leaving, left),
            Err(Trouble::Unavailable(_)) => {
                leaving.sent_before = true;
                self.process.retire(&ticket);
                if let Some(next) = &leaving.next {
                    self.process.retire(&next.ticket);
                }
            }
            Err(Trouble::LeaseGone) if leaving.next.is_none() => {
                self.process.lease_is_gone(&ticket);
                leaving.lease_lost = true;
            }
            // One of two leases is gone, or a full database refuses what is put. Deleting alone still works.
            Err(trouble) if leaving.may_put && (leaving.next.is_some() || doubtful) => {
                leaving.may_hand_over = false;
                // The marker is left out only if it is the trouble: the entry it keeps out may still be on its way.
                leaving.may_put = trouble == Trouble::LeaseGone && doubtful;
                leaving.sent_before |= matches!(trouble, Trouble::Refused(_));
                if let (Trouble::KeyTaken, Some(next)) = (&trouble, &leaving.next) {
                    self.process.retire(&next.ticket);
                }
                leaving.orphan = leaving.next.take().filter(|_| leaving.sent_before);
                return self.leave(id, leaving);
            }
            Err(refusal) => {
                // It may last as long as the lease, so nobody is kept waiting for it.
                self.fail_all(&refusal);
                if let (Some(token), true) = (leaving.token, std::mem::take(&mut leaving.tells)) {
                    self.actions.push_back(Action::Released(token, Release::Refused(refusal)));
                }
            }
        }
        leaving.request = Sending::Paused;
        let is_lost = leaving.lease_lost;
        self.set_phase(id, Phase::Leaving(Box::new(leaving)));
        if is_lost { self.lease_of_leaving_lost(id) } else { self.actions.push_back(Action::Pause(id)) }
    }

    fn has_left(&mut self, id: TicketId, ticket: &Ticket, doubtful: bool, leaving: Leaving, left: Left) {
        if doubtful && !leaving.may_put {
            self.actions.push_back(Action::MarkLater(ticket.clone()));
        }
        if let (Some(token), true) = (leaving.token, leaving.tells) {
            // An absent ticket after a first request without an answer was most likely taken out by that request.
            let gone = !left.was_present && !leaving.sent_before;
            self.actions.push_back(Action::Released(token, if gone { Release::WasGone } else { Release::Done }));
        }
        self.end(id);
        // With its lease the next one is gone too.
        let next = leaving.next.filter(|next| self.process.is_alive(&next.ticket));
        if let (Some(Entered { token, mut ahead }), Some(next)) = (left.next, next) {
            if is_on(Sabotage::HandOverSkipsOrder) {
                ahead.keys = Some(Vec::new());
            }
            let id = self.queue.insert(Standing::entering(next));
            if self.queue.claim.is_met(&ahead) {
                self.actions.push_back(Action::HandedOver(id));
            }
            self.wait(id, token, ahead, true);
        }
        self.withdraw_orphan(leaving.orphan);
    }

    // ---- tickets ---------------------------------------------------------------------------

    fn phase(&self, id: TicketId) -> Option<&Phase> {
        self.queue.ticket(id).map(|standing| &standing.phase)
    }

    fn set_phase(&mut self, id: TicketId, phase: Phase) {
        if let Some(standing) = self.queue.get(id) {
            standing.phase = phase;
        }
    }

    fn retire(&mut self, id: TicketId) {
        if let Some(standing) = self.queue.ticket(id) {
            self.process.retire(&standing.ticket);
        }
    }

    fn tell_lease_gone(&mut self, id: TicketId) {
        if let Some(standing) = self.queue.ticket(id) {
            self.process.lease_is_gone(&standing.ticket);
        }
    }

    fn end(&mut self, id: TicketId) {
        if self.queue.tickets.get_mut(id).and_then(Option::take).is_some() {
            while self.queue.tickets.last().is_some_and(Option::is_none) {
                self.queue.tickets.pop();
            }
            self.actions.push_back(Action::End(id));
        }
    }
}
