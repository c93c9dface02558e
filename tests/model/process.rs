//! One process of the model: its queue, as shipped, and all that is under way between it and the store.

use std::collections::VecDeque;
use std::sync::Arc;

use super::store::{Answer, Store};
use super::{Faults, World};
use crate::proto::claim::Claim;
use crate::proto::queue::{Actions, LocalQueue};
use crate::proto::ticket::{Asking, Phase};
use crate::proto::{self, Action, Event, Request, SessionId, TicketId, Waiter, WaiterId};
use crate::store::{Change, Follow, Ticket, Trouble};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    pub(super) id: WaiterId,
    pub(super) session: SessionId,
    pub(super) only_tries: bool,
}

impl Waiter for Caller {
    fn id(&self) -> WaiterId {
        self.id
    }

    fn session(&self) -> SessionId {
        self.session
    }

    fn only_tries(&self) -> bool {
        self.only_tries
    }
}

/// The session's lease and its ticket numbers.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Session {
    nth: usize,
    lease: Option<i64>,
    leases: i64,
    number: u64,
    /// Lost here, and still to end in the store.
    lost: Vec<i64>,
}

impl proto::Process<Caller> for Session {
    fn ticket_for(&mut self, _: &Caller, n: u64) -> Option<Ticket> {
        let lease = self.lease?;
        let key = format!("{lease}-{}", self.number + n);
        Some(Ticket { name: Arc::from("x"), key, lease, n, value: Arc::from("") })
    }

    fn is_alive(&self, ticket: &Ticket) -> bool {
        self.lease == Some(ticket.lease)
    }

    fn retire(&mut self, _: &Ticket) {
        // More than a process has at once.
        self.number += 4;
    }

    fn lease_is_gone(&mut self, ticket: &Ticket) {
        self.lose(ticket.lease);
    }
}

impl Session {
    fn lose(&mut self, lease: i64) {
        if self.lease == Some(lease) {
            self.lease = None;
            self.lost.push(lease);
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct UnderWay {
    id: TicketId,
    ticket: Ticket,
    request: Question,
    answer: Option<Answer>,
}

/// A request without what only the store's own reads care for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Question {
    Enter,
    EnterIfFree,
    Look(i64),
    Leave(Option<i64>, bool, Option<Ticket>),
}

impl From<Request> for Question {
    fn from(request: Request) -> Question {
        match request {
            Request::Enter => Question::Enter,
            Request::EnterIfFree => Question::EnterIfFree,
            Request::Look { token, .. } => Question::Look(token),
            Request::Leave { token, void, next } => Question::Leave(token, void, next),
        }
    }
}

impl From<&Question> for Request {
    fn from(question: &Question) -> Request {
        match question {
            Question::Enter => Request::Enter,
            Question::EnterIfFree => Request::EnterIfFree,
            Question::Look(token) => Request::Look { token: *token, since: None },
            Question::Leave(token, void, next) => Request::Leave { token: *token, void: *void, next: next.clone() },
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Watch {
    what: Follow,
    is_live: bool,
    to_tell: VecDeque<Change>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Holding {
    id: TicketId,
    token: i64,
    lease: i64,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Proc {
    queue: LocalQueue<Caller>,
    session: Session,
    to_come: Vec<Caller>,
    /// They have called, and wait.
    waiting: Vec<WaiterId>,
    /// They have given up, and the queue does not know yet.
    gave_up: Vec<WaiterId>,
    requests: Vec<UnderWay>,
    /// Copies that may still arrive, and of which nobody waits for an answer.
    strays: Vec<(Ticket, Question)>,
    watch: Option<Watch>,
    awaits_lease: bool,
    pauses: Vec<TicketId>,
    fresh_pause: bool,
    holds: Vec<Holding>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Call,
    /// One releases, and another wants it before anything is sent.
    ReleaseAndCall(i64),
    Release(i64),
    Apply(usize),
    Hear(usize),
    OpenLease,
    EndLease(i64),
    PauseIsOver(TicketId),
    FreshPauseIsOver,
    LookIsDue(TicketId),
    WatchIsLive,
    WatchTells,
    GaveUp(WaiterId),
    // Faults.
    LoseAnswer(usize),
    ArrivesLate(usize),
    ArrivesTwice(usize),
    LoseLease,
    WatchStartsOver,
    GiveUp(WaiterId),
    DeleteKey(TicketId),
}

impl Step {
    pub(super) fn is_fault(&self) -> bool {
        matches!(
            self,
            Step::LoseAnswer(_)
                | Step::ArrivesLate(_)
                | Step::ArrivesTwice(_)
                | Step::LoseLease
                | Step::WatchStartsOver
                | Step::GiveUp(_)
                | Step::DeleteKey(_)
        )
    }
}

impl Proc {
    pub(super) fn new(nth: usize, claim: Claim, callers: Vec<Caller>) -> Proc {
        Proc {
            queue: LocalQueue::new(Arc::from("x"), claim),
            session: Session { nth, lease: None, leases: 0, number: 0, lost: Vec::new() },
            to_come: callers,
            waiting: Vec::new(),
            gave_up: Vec::new(),
            requests: Vec::new(),
            strays: Vec::new(),
            watch: None,
            awaits_lease: false,
            pauses: Vec::new(),
            fresh_pause: false,
            holds: Vec::new(),
        }
    }

    pub(super) fn believed(&self) -> impl Iterator<Item = i64> {
        self.holds.iter().filter(|hold| self.session.lease == Some(hold.lease)).map(|hold| hold.token)
    }

    /// A caller that nothing will serve any more.
    pub(super) fn unserved(&self) -> Option<WaiterId> {
        self.waiting.first().copied()
    }

    pub(super) fn steps(&self, store: &Store, left: &Faults) -> Vec<Step> {
        let mut steps = Vec::new();
        if !self.to_come.is_empty() {
            steps.push(Step::Call);
        }
        for hold in &self.holds {
            steps.push(Step::Release(hold.token));
            if !self.to_come.is_empty() {
                steps.push(Step::ReleaseAndCall(hold.token));
            }
        }
        for (nth, under_way) in self.requests.iter().enumerate() {
            match under_way.answer {
                None => steps.push(Step::Apply(nth)),
                Some(_) => {
                    steps.push(Step::Hear(nth));
                    // By somebody between who sends it again. What was answered is not sent any more.
                    if left.copies > 0 {
                        steps.push(Step::ArrivesTwice(nth));
                    }
                }
            }
            if left.lost_answers > 0 {
                steps.push(Step::LoseAnswer(nth));
            }
        }
        steps.extend((0..self.strays.len()).map(Step::ArrivesLate));
        if self.session.lease.is_none() && self.awaits_lease {
            steps.push(Step::OpenLease);
        }
        if self.session.lease.is_some() && left.lost_leases > 0 {
            steps.push(Step::LoseLease);
        }
        steps.extend(self.session.lost.iter().map(|lease| Step::EndLease(*lease)));
        steps.extend(self.pauses.iter().map(|id| Step::PauseIsOver(*id)));
        if self.fresh_pause {
            steps.push(Step::FreshPauseIsOver);
        }
        for (id, standing) in self.queue.tickets() {
            if let Phase::Waiting(waiting) = &standing.phase {
                if waiting.look == Asking::Later {
                    steps.push(Step::LookIsDue(id));
                }
                // Not of one whose turn it is by now: it owns, and hears of that as a holder does.
                if left.deleted > 0 && store.keys.iter().any(|key| key.created < waiting.token) {
                    steps.push(Step::DeleteKey(id));
                }
            }
        }
        if let Some(watch) = &self.watch {
            if !watch.is_live {
                steps.push(Step::WatchIsLive);
            } else if left.restarts > 0 {
                steps.push(Step::WatchStartsOver);
            }
            if !watch.to_tell.is_empty() && self.queue.listens() {
                steps.push(Step::WatchTells);
            }
        }
        steps.extend(self.gave_up.iter().map(|id| Step::GaveUp(*id)));
        if left.gives_up > 0 {
            steps.extend(self.waiting.iter().map(|id| Step::GiveUp(*id)));
        }
        steps
    }

    fn hears_of(&mut self, gone: &[(String, i64)]) {
        let Some(watch) = self.watch.as_mut().filter(|watch| watch.is_live) else { return };
        for (key, revision) in gone {
            let hears = match &watch.what {
                Follow::Ticket(ticket) => ticket == key,
                _ => true,
            };
            if hears {
                watch.to_tell.push_back(Change::Gone { key: key.clone(), revision: *revision });
            }
        }
    }
}

/// Takes a step of the process.
pub(super) fn take(world: &mut World, nth: usize, step: Step, claim: Claim) -> Result<(), String> {
    let process = &mut world.processes[nth];
    let mut events = Vec::new();
    match step {
        Step::Call => events.push(process.call()),
        Step::Release(token) => events.push(process.release(token)),
        Step::ReleaseAndCall(token) => events.extend([process.release(token), process.call()]),
        Step::Apply(nth) | Step::ArrivesTwice(nth) => {
            let under_way = &mut process.requests[nth];
            let (ticket, question) = (under_way.ticket.clone(), under_way.request.clone());
            under_way.answer = Some(world.store.answer(&ticket, &(&question).into()));
            world.left.copies -= u8::from(matches!(step, Step::ArrivesTwice(_)));
        }
        Step::ArrivesLate(nth) => {
            let (ticket, question) = process.strays.remove(nth);
            world.store.answer(&ticket, &(&question).into());
        }
        Step::Hear(nth) => {
            let UnderWay { id, answer, .. } = process.requests.remove(nth);
            events.extend(answer.map(|answer| event_of(id, answer)));
        }
        Step::LoseAnswer(nth) => {
            world.left.lost_answers -= 1;
            let UnderWay { id, ticket, request, answer } = process.requests.remove(nth);
            let lost = || Trouble::Unavailable("lost".into());
            events.push(match &request {
                Question::Enter | Question::EnterIfFree => Event::Entered(id, Err(lost())),
                Question::Look(_) => Event::Looked(id, Err(lost())),
                Question::Leave(..) => Event::Left(id, Err(lost())),
            });
            if answer.is_none() {
                process.strays.push((ticket, request));
            }
        }
        Step::OpenLease => {
            process.session.leases += 1;
            let lease = process.session.nth as i64 * 10 + process.session.leases;
            world.store.leases.push(lease);
            process.session.lease = Some(lease);
            process.awaits_lease = false;
            events.push(Event::LeaseReady);
        }
        Step::LoseLease => {
            world.left.lost_leases -= 1;
            let lease = process.session.lease.unwrap_or_default();
            process.session.lose(lease);
        }
        Step::EndLease(lease) => {
            process.session.lost.retain(|lost| *lost != lease);
            world.store.end_lease(lease);
        }
        Step::PauseIsOver(id) => {
            process.pauses.retain(|pause| *pause != id);
            events.push(Event::PauseIsOver(id));
        }
        Step::FreshPauseIsOver => {
            process.fresh_pause = false;
            events.push(Event::FreshPauseIsOver);
        }
        Step::LookIsDue(id) => events.push(Event::LookIsDue(id)),
        Step::WatchIsLive => {
            if let Some(watch) = &mut process.watch {
                watch.is_live = true;
                watch.to_tell.push_back(Change::Since(world.store.revision));
            }
        }
        Step::WatchTells => events.extend(process.watch.as_mut().and_then(|watch| watch.to_tell.pop_front()).map(Event::Heard)),
        Step::WatchStartsOver => {
            world.left.restarts -= 1;
            if let Some(watch) = &mut process.watch {
                watch.is_live = false;
                watch.to_tell.clear();
            }
        }
        Step::GiveUp(id) => {
            world.left.gives_up -= 1;
            process.waiting.retain(|waiter| *waiter != id);
            process.gave_up.push(id);
        }
        Step::GaveUp(id) => {
            process.gave_up.retain(|waiter| *waiter != id);
            events.push(Event::GaveUp(id));
        }
        Step::DeleteKey(id) => {
            world.left.deleted -= 1;
            if let Some(standing) = process.queue.ticket(id) {
                world.store.revision += 1;
                world.store.delete(&standing.ticket.key.clone());
            }
        }
    }
    let gone = std::mem::take(&mut world.store.gone);
    world.processes.iter_mut().for_each(|process| process.hears_of(&gone));
    // Where several own at once, their tokens come in any order.
    let mut last_token = if claim == (Claim { slack: 0, ..claim }) { world.last_token } else { 0 };
    let handled = world.processes[nth].handle(events, &mut last_token);
    world.last_token = world.last_token.max(last_token);
    handled
}

fn event_of(id: TicketId, answer: Answer) -> Event<Caller> {
    match answer {
        Answer::Entered(answer) => Event::Entered(id, answer),
        Answer::Looked(answer) => Event::Looked(id, answer),
        Answer::Left(answer) => Event::Left(id, answer),
    }
}

impl Proc {
    fn call(&mut self) -> Event<Caller> {
        let caller = self.to_come.remove(0);
        self.waiting.push(caller.id);
        Event::Lock(caller)
    }

    fn release(&mut self, token: i64) -> Event<Caller> {
        self.holds.retain(|hold| hold.token != token);
        Event::Release(token)
    }

    /// Hands events over, and does what is to be done.
    fn handle(&mut self, mut events: Vec<Event<Caller>>, last_token: &mut i64) -> Result<(), String> {
        loop {
            let mut actions = Actions::new();
            self.queue.handle(events, &mut self.session, &mut actions);
            while let Some(action) = actions.pop_front() {
                self.act(action, &mut actions, last_token)?;
            }
            // What a lease takes with it.
            let lease = self.session.lease;
            let is_told = |phase: &Phase| matches!(phase, Phase::Leaving(leaving) if leaving.lease_lost);
            let lost =
                self.queue.tickets().filter(|(_, standing)| Some(standing.ticket.lease) != lease && !is_told(&standing.phase));
            events = lost.map(|(id, _)| Event::LeaseLost(id)).take(1).collect();
            if events.is_empty() {
                return Ok(());
            }
        }
    }

    fn act(&mut self, action: Action<Caller>, actions: &mut Actions<Caller>, last_token: &mut i64) -> Result<(), String> {
        match action {
            Action::AwaitLease => self.awaits_lease = true,
            Action::StopAwaitingLease => self.awaits_lease = false,
            Action::Send(id, request) => {
                self.drop_requests(id);
                if let Some(standing) = self.queue.ticket(id) {
                    let ticket = standing.ticket.clone();
                    self.requests.push(UnderWay { id, ticket, request: request.into(), answer: None });
                }
            }
            Action::Pause(id) => self.pauses.push(id),
            Action::PauseFresh => self.fresh_pause = true,
            Action::Follow(what) => self.watch = Some(Watch { what, is_live: false, to_tell: VecDeque::new() }),
            Action::Unfollow => self.watch = None,
            Action::Grant(caller, id, granted) => {
                let Some(lease) = self.queue.ticket(id).map(|standing| standing.ticket.lease) else {
                    return Err("a grant without a ticket".into());
                };
                if !self.waiting.contains(&caller.id) {
                    self.queue.handle([Event::NotTaken(id)], &mut self.session, actions);
                    return Ok(());
                }
                self.waiting.retain(|waiter| *waiter != caller.id);
                if granted.token <= *last_token {
                    return Err(format!("token {} after token {last_token}", granted.token));
                }
                *last_token = granted.token;
                self.holds.push(Holding { id, token: granted.token, lease });
            }
            Action::GrantAgain(caller, id) => {
                self.waiting.retain(|waiter| *waiter != caller.id);
                let again = self.holds.iter().find(|hold| hold.id == id).cloned();
                self.holds.extend(again);
            }
            Action::Taken(caller) | Action::Fail(caller, _) => self.waiting.retain(|waiter| *waiter != caller.id),
            Action::Lose(id, _) => self.holds.retain(|hold| hold.id != id),
            Action::End(id) => {
                self.drop_requests(id);
                let is_lost = |hold: &Holding| hold.id == id && self.session.lease != Some(hold.lease);
                self.holds.retain(|hold| !is_lost(hold));
            }
            Action::Check(..)
            | Action::LookLater(..)
            | Action::FollowOwn(_)
            | Action::PutRight(_)
            | Action::MarkLater(_)
            | Action::Released(..)
            | Action::HandedOver(_) => {}
        }
        Ok(())
    }

    /// Nobody waits for the answer any more, and the request may still arrive.
    fn drop_requests(&mut self, id: TicketId) {
        self.pauses.retain(|pause| *pause != id);
        for under_way in self.requests.extract_if(.., |under_way| under_way.id == id) {
            if under_way.answer.is_none() {
                self.strays.push((under_way.ticket, under_way.request));
            }
        }
    }
}
