//! Drives the protocol for one name: turns what happens into its events, and its actions into requests, timers and answers.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

use crate::backoff::{self, Backoff};
use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Loss, Result};
use crate::grant::{Command, Grant, HoldCore, Waiter};
use crate::keeper::Keeper;
use crate::lease::Lease;
use crate::proto::claim::Claim;
use crate::proto::queue::{Actions, LocalQueue};
use crate::proto::ticket::Phase;
use crate::proto::{self, Action, Event, Failure, Granted, Pace, Process as _, Release, Request, TicketId};
use crate::runtime::Env;
use crate::stats::LiveTicket;
use crate::store::{Entered, Follow, Leaving, Left, Look, Revision, Ticket, Trouble};
use crate::watching::{Following, RE_READ};

/// How long an idle queue keeps its watch: the next contended lock then needs no read.
const LINGER: Duration = Duration::from_secs(2);
/// A hold that lasts gets a watch on its own key.
const LASTS: Duration = Duration::from_millis(50);

/// What may be known of a queue without asking it.
#[derive(Default)]
pub(crate) struct Hints {
    /// Somebody here holds the lock or waits for it.
    pub(crate) busy: AtomicBool,
    /// The store has answered that the lock is taken, or it is held here.
    pub(crate) taken: AtomicBool,
}

impl Hints {
    pub(crate) fn busy() -> Hints {
        Hints { busy: AtomicBool::new(true), ..Hints::default() }
    }
}

/// The list that a queue is on.
pub(crate) trait Queues: Send + Sync {
    /// Takes one with nothing to do off it; false if a command has just come in.
    fn retire(&self, name: &str, inbox: &UnboundedReceiver<Command>) -> bool;
    fn forget(&self, name: &str);
}

type Soon<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The tickets that were made, with what is behind them.
struct Tickets {
    env: Env,
    name: Arc<str>,
    made: Vec<Made>,
}

struct Made {
    key: String,
    lease: Arc<Lease>,
    session: Arc<Keeper>,
    lost: Soon<Loss>,
}

impl Tickets {
    fn of(&self, ticket: &Ticket) -> Option<&Made> {
        self.made.iter().find(|made| made.key == ticket.key)
    }
}

impl proto::Process<Waiter> for Tickets {
    fn ticket_for(&mut self, waiter: &Waiter, n: u64) -> Option<Ticket> {
        let lease = waiter.session.lease_now()?;
        let ticket = waiter.session.ticket(&lease, &self.name, n);
        if self.of(&ticket).is_none() {
            let signal = lease.clone();
            let lost = Box::pin(async move { signal.lost.lost().await });
            self.made.reserve_exact(1);
            self.made.push(Made { key: ticket.key.clone(), lease, session: waiter.session.clone(), lost });
        }
        Some(ticket)
    }

    fn is_alive(&self, ticket: &Ticket) -> bool {
        self.of(ticket).is_some_and(|made| made.lease.is_alive(self.env.now()))
    }

    fn retire(&mut self, ticket: &Ticket) {
        if let Some(made) = self.of(ticket) {
            made.session.retire_keys();
        }
    }

    fn lease_is_gone(&mut self, ticket: &Ticket) {
        if let Some(made) = self.of(ticket) {
            made.lease.lost.lose(Loss::LeaseGone);
        }
    }
}

/// What is going on about one ticket.
#[derive(Default)]
struct Desk {
    request: Option<Soon<Answer>>,
    check: Option<Soon<Result<Look, Trouble>>>,
    /// When to tell that a look is due, or that a pause is over.
    wake: Option<(Instant, Wake)>,
    retry: Option<Backoff>,
    hold: Option<Holding>,
    _live: Option<LiveTicket>,
}

#[derive(Clone, Copy)]
enum Wake {
    Look,
    Pause,
}

struct Holding {
    core: Arc<HoldCore>,
    lost: Soon<Loss>,
    own: Option<Following>,
    lasts: Option<Instant>,
    is_old: Option<Instant>,
}

/// Who waits for the end of a release.
struct Releasing {
    token: Revision,
    reply: oneshot::Sender<Result<()>>,
    lease: Option<Arc<Lease>>,
}

enum Answer {
    Entered(Result<Option<Entered>, Trouble>),
    Looked(Result<Look, Trouble>),
    Left(Result<Left, Trouble>),
}

pub(crate) struct Driver {
    cluster: Arc<Cluster>,
    queues: Arc<dyn Queues>,
    commands: UnboundedSender<Command>,
    inbox: UnboundedReceiver<Command>,
    hints: Arc<Hints>,
    queue: LocalQueue<Waiter>,
    actions: Actions<Waiter>,
    tickets: Tickets,
    desks: Vec<Desk>,
    seeking: Option<Soon<Result<Arc<Lease>>>>,
    fresh_pause: Option<Instant>,
    fresh_retry: Backoff,
    following: Option<Following>,
    releases: Vec<Releasing>,
    /// Given-up waiters that want to know when nothing is left of them.
    gave_up: Vec<oneshot::Sender<()>>,
    idle_until: Instant,
    timer: Pin<Box<Sleep>>,
    /// For the case that this task panics.
    holder: Weak<HoldCore>,
}

/// What has happened next.
enum Next {
    Command(Command),
    Event(Event<Waiter>),
    LeaseLost(TicketId),
    Closed,
}

impl Driver {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        name: Arc<str>,
        (commands, inbox): (UnboundedSender<Command>, UnboundedReceiver<Command>),
        hints: Arc<Hints>,
        queues: Arc<dyn Queues>,
    ) -> Self {
        let env = cluster.env.clone();
        Driver {
            cluster,
            queues,
            commands,
            inbox,
            hints,
            queue: LocalQueue::new(name.clone(), Claim::EXCLUSIVE),
            actions: Actions::new(),
            tickets: Tickets { env, name, made: Vec::new() },
            desks: Vec::new(),
            seeking: None,
            fresh_pause: None,
            fresh_retry: Backoff::new(),
            following: None,
            releases: Vec::new(),
            gave_up: Vec::new(),
            idle_until: Instant::now() + LINGER,
            timer: Box::pin(sleep(LINGER)),
            holder: Weak::new(),
        }
    }

    pub(crate) async fn run(mut self) {
        loop {
            let next = std::future::poll_fn(|cx| self.poll_next(cx)).await;
            match next {
                Next::Command(first) => self.commands(first),
                Next::Event(Event::IdleForLong) => {
                    self.handle([Event::IdleForLong]);
                    if self.queues.retire(&self.tickets.name, &self.inbox) {
                        return;
                    }
                    self.idle_until = Instant::now() + LINGER;
                }
                Next::Event(event) => {
                    self.note(&event);
                    self.handle([event]);
                }
                Next::LeaseLost(id) => self.lease_lost(id),
                Next::Closed => return,
            }
        }
    }

    // ---- what happens ----------------------------------------------------------------------

    /// In a fixed order, so that a simulation can replay it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if let Some(id) = self.is_past_its_deadline() {
            return Poll::Ready(Next::LeaseLost(id));
        }
        for (id, standing) in self.queue.tickets() {
            let is_told = matches!(&standing.phase, Phase::Leaving(leaving) if leaving.lease_lost);
            let made = self.tickets.made.iter_mut().find(|made| made.key == standing.ticket.key);
            if let Some(made) = made.filter(|_| !is_told)
                && made.lost.as_mut().poll(cx).is_ready()
            {
                made.lost = Box::pin(std::future::pending());
                return Poll::Ready(Next::LeaseLost(id));
            }
        }
        for (id, desk) in self.desks.iter_mut().enumerate() {
            if let Poll::Ready(event) = desk.poll(id, cx) {
                return Poll::Ready(Next::Event(event));
            }
        }
        if let Some(following) = self.following.as_mut().filter(|_| self.queue.listens())
            && let Poll::Ready(change) = following.poll_next(cx)
        {
            return Poll::Ready(Next::Event(Event::Heard(change)));
        }
        match self.inbox.poll_recv(cx) {
            Poll::Ready(Some(command)) => return Poll::Ready(Next::Command(command)),
            Poll::Ready(None) => return Poll::Ready(Next::Closed),
            Poll::Pending => {}
        }
        if let Some(seeking) = &mut self.seeking
            && let Poll::Ready(lease) = seeking.as_mut().poll(cx)
        {
            self.seeking = None;
            return Poll::Ready(Next::Event(lease.map_or_else(Event::LeaseRefused, |_| Event::LeaseReady)));
        }
        self.poll_timers(cx)
    }

    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            let now = Instant::now();
            let mut earliest = None::<Instant>;
            let mut is_due = |at: Option<Instant>| {
                earliest = earliest.into_iter().chain(at).min();
                at.is_some_and(|at| at <= now)
            };
            for (id, desk) in self.desks.iter_mut().enumerate() {
                if let Some((at, wake)) = desk.wake
                    && is_due(Some(at))
                {
                    desk.wake = None;
                    return Poll::Ready(Next::Event(match wake {
                        Wake::Look => Event::LookIsDue(id),
                        Wake::Pause => Event::PauseIsOver(id),
                    }));
                }
                let Some(hold) = &mut desk.hold else { continue };
                if is_due(hold.lasts) {
                    hold.lasts = None;
                    return Poll::Ready(Next::Event(Event::HoldLasts(id)));
                }
                if is_due(hold.is_old) {
                    hold.is_old = None;
                    return Poll::Ready(Next::Event(Event::HoldIsOld(id)));
                }
            }
            if is_due(self.fresh_pause) {
                self.fresh_pause = None;
                return Poll::Ready(Next::Event(Event::FreshPauseIsOver));
            }
            if is_due((!self.queue.is_busy()).then_some(self.idle_until)) {
                return Poll::Ready(Next::Event(Event::IdleForLong));
            }
            let Some(earliest) = earliest else { return Poll::Pending };
            if self.timer.deadline() != earliest {
                self.timer.as_mut().reset(earliest);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// A deadline counts even before anybody has noticed.
    fn is_past_its_deadline(&self) -> Option<TicketId> {
        let mut tickets = self.queue.tickets().filter(|(_, standing)| !matches!(standing.phase, Phase::Leaving(_)));
        tickets.find(|(_, standing)| !self.tickets.is_alive(&standing.ticket)).map(|(id, _)| id)
    }

    fn lease_lost(&mut self, id: TicketId) {
        let loss = self
            .queue
            .ticket(id)
            .and_then(|standing| self.tickets.of(&standing.ticket))
            .and_then(|made| made.lease.loss(self.cluster.env.now()));
        if let (Some(loss), Some(hold)) = (loss, self.desks.get(id).and_then(|desk| desk.hold.as_ref())) {
            hold.core.lose(loss);
        }
        self.handle([Event::LeaseLost(id)]);
    }

    /// All that are there by now.
    fn commands(&mut self, first: Command) {
        let mut events = vec![self.event_of(first)];
        while let Ok(command) = self.inbox.try_recv() {
            events.push(self.event_of(command));
        }
        self.handle(events);
    }

    fn event_of(&mut self, command: Command) -> Event<Waiter> {
        match command {
            Command::Lock(waiter) => Event::Lock(waiter),
            Command::Release { token, reply } => {
                let held = self
                    .queue
                    .tickets()
                    .find(|(_, standing)| matches!(standing.phase, Phase::Held(_)) && standing.token() == Some(token));
                let lease = held.and_then(|(_, standing)| self.tickets.of(&standing.ticket)).map(|made| made.lease.clone());
                self.releases.extend(reply.map(|reply| Releasing { token, reply, lease }));
                Event::Release(token)
            }
            Command::GaveUp(id, tell) => {
                self.gave_up.extend(tell);
                Event::GaveUp(id)
            }
        }
    }

    fn handle(&mut self, events: impl IntoIterator<Item = Event<Waiter>>) {
        self.queue.handle(events, &mut self.tickets, &mut self.actions);
        let is_busy = self.queue.is_busy();
        if !is_busy {
            self.idle_until = Instant::now() + LINGER;
        }
        // Before anybody is answered.
        self.hints.busy.store(is_busy, Ordering::Release);
        self.hints.taken.store(self.queue.is_taken(), Ordering::Release);
        while let Some(action) = self.actions.pop_front() {
            self.act(action);
        }
        // There can be thousands of names, each with one ticket, and most of the time nothing is to be done.
        self.actions = Actions::new();
        self.tickets.made.retain(|made| self.queue.uses(&made.key));
        for (id, standing) in self.queue.tickets() {
            let desk = &mut self.desks[id];
            if desk._live.is_none() && !matches!(standing.phase, Phase::Entering { .. }) {
                desk._live = self.tickets.of(&standing.ticket).map(|made| LiveTicket::of(&made.session.stats));
            }
        }
        if !self.queue.is_cleaning_up() {
            self.gave_up.clear();
        }
    }

    /// What an answer tells about the store.
    fn note(&mut self, event: &Event<Waiter>) {
        let (id, trouble) = match event {
            Event::Entered(id, answer) => (*id, answer.as_ref().err()),
            Event::Looked(id, answer) => (*id, answer.as_ref().err()),
            Event::Left(id, answer) => (*id, answer.as_ref().err()),
            _ => return,
        };
        match trouble {
            None => {
                self.cluster.note_trouble(None);
                self.desks[id].retry = None;
                self.fresh_retry = Backoff::new();
            }
            Some(Trouble::LeaseGone | Trouble::KeyTaken) => {}
            Some(trouble) => self.cluster.note_trouble(Some(trouble.to_string())),
        }
    }

    // ---- what is to be done ----------------------------------------------------------------

    fn act(&mut self, action: Action<Waiter>) {
        match action {
            Action::AwaitLease => {
                let session = self.queue.first_in_line().map(|first| first.session.clone());
                self.seeking = session.map(|session| Box::pin(async move { session.lease().await }) as Soon<_>);
            }
            Action::StopAwaitingLease => self.seeking = None,
            Action::Send(id, request) => self.send(id, request),
            Action::Check(id, after_a_pause) => self.check(id, after_a_pause),
            Action::Pause(id) => {
                let desk = self.desk(id);
                let pause = desk.retry.get_or_insert_with(Backoff::new).next();
                desk.wake = Some((Instant::now() + pause, Wake::Pause));
            }
            Action::PauseFresh => self.fresh_pause = Some(Instant::now() + self.fresh_retry.next()),
            Action::LookLater(id, pace) => {
                let following = self.following.as_mut().filter(|_| pace == Pace::AsTheWatchProves);
                let pause = following.map_or(RE_READ, Following::next_look);
                self.desk(id).wake = Some((Instant::now() + pause, Wake::Look));
            }
            Action::Follow(what) => self.following = Some(self.follow(what)),
            Action::Unfollow => self.following = None,
            Action::FollowOwn(id) => {
                let Some(ticket) = self.ticket(id) else { return };
                let own = self.follow(Follow::Own { key: ticket.key, lease: ticket.lease });
                if let Some(hold) = &mut self.desk(id).hold {
                    hold.own = Some(own);
                }
            }
            Action::PutRight(id) => self.put_right(id),
            Action::MarkLater(ticket) => self.mark_later(ticket),
            Action::Grant(waiter, id, granted) => self.grant(waiter, id, granted),
            Action::GrantAgain(waiter, id) => {
                let hold = self.desk(id).hold.as_ref().map(|hold| Grant::new(hold.core.same_again()));
                waiter.answer(Ok(hold));
            }
            Action::Taken(waiter) => waiter.answer(Ok(None)),
            Action::Fail(waiter, failure) => {
                let error = match failure {
                    Failure::Lease(error) => error,
                    Failure::Store(trouble) => self.error_of(&trouble),
                };
                waiter.answer(Err(error));
            }
            Action::Lose(id, loss) => {
                if let Some(hold) = &self.desk(id).hold {
                    hold.core.lose(loss);
                }
            }
            Action::Released(token, release) => self.released(token, release),
            Action::HandedOver(id) => {
                if let Some(made) = self.ticket(id).and_then(|ticket| self.tickets.of(&ticket)) {
                    made.session.stats.hand_overs.add();
                }
            }
            Action::End(id) => *self.desk(id) = Desk::default(),
        }
    }

    fn desk(&mut self, id: TicketId) -> &mut Desk {
        if id >= self.desks.len() {
            self.desks.reserve_exact(id + 1 - self.desks.len());
            self.desks.resize_with(id + 1, Desk::default);
        }
        &mut self.desks[id]
    }

    fn ticket(&self, id: TicketId) -> Option<Ticket> {
        self.queue.ticket(id).map(|standing| standing.ticket.clone())
    }

    fn follow(&self, what: Follow) -> Following {
        Following::of(matches!(what, Follow::Queue(_)), self.cluster.store.follow(what))
    }

    fn send(&mut self, id: TicketId, request: Request) {
        let Some(ticket) = self.ticket(id) else { return };
        let store = self.cluster.store.clone();
        let request: Soon<Answer> = match request {
            Request::Enter => Box::pin(async move { Answer::Entered(store.enter(&ticket).await.map(Some)) }),
            Request::EnterIfFree => Box::pin(async move { Answer::Entered(store.enter_if_free(&ticket).await) }),
            Request::Look { token, since } => Box::pin(async move { Answer::Looked(store.look(&ticket, token, since).await) }),
            Request::Leave { token, void, next } => {
                Box::pin(
                    async move { Answer::Left(store.leave(Leaving { ticket: &ticket, token, void, next: next.as_ref() }).await) },
                )
            }
        };
        let desk = self.desk(id);
        // What was asked or set before is of no interest any more.
        (desk.request, desk.wake) = (Some(request), None);
    }

    /// Looks whether our ticket is still there, without keeping anything else waiting.
    fn check(&mut self, id: TicketId, after_a_pause: bool) {
        let Some((ticket, token)) = self.queue.ticket(id).and_then(|standing| Some((standing.ticket.clone(), standing.token()?)))
        else {
            return;
        };
        let store = self.cluster.store.clone();
        self.desk(id).check = Some(Box::pin(async move {
            if after_a_pause {
                sleep(backoff::AT_FIRST).await;
            }
            store.look(&ticket, token, None).await
        }));
    }

    /// Somebody has written over our ticket, and so taken it from under its lease: it would stay when we die.
    fn put_right(&self, id: TicketId) {
        let Some(standing) = self.queue.ticket(id) else { return };
        let (Some(token), Some(made)) = (standing.token(), self.tickets.of(&standing.ticket)) else { return };
        let (store, env, lease, ticket) =
            (self.cluster.store.clone(), self.cluster.env.clone(), made.lease.clone(), standing.ticket.clone());
        tracing::warn!(target: "etcdlock::grant", name = &*ticket.name, key = ticket.key, "somebody has written over our key; it is put right");
        self.cluster.env.spawn(async move {
            let mut retry = Backoff::new();
            while lease.is_alive(env.now()) && matches!(store.put_right(&ticket, token).await, Err(Trouble::Unavailable(_))) {
                retry.pause().await;
            }
        });
    }

    /// Puts the marker of a doubtful ticket once there is room for it, and takes out what a late
    /// copy of its entry has made until then.
    fn mark_later(&self, ticket: Ticket) {
        let Some(lease) = self.tickets.of(&ticket).map(|made| made.lease.clone()) else { return };
        let cluster = self.cluster.clone();
        self.cluster.env.spawn(async move {
            let mut retry = Backoff::new();
            while lease.is_alive(cluster.env.now()) {
                retry.pause().await;
                let leaving = Leaving { ticket: &ticket, token: None, void: true, next: None };
                if let Ok(_) | Err(Trouble::LeaseGone) = cluster.store.leave(leaving).await {
                    return;
                }
            }
        });
    }

    fn grant(&mut self, waiter: Waiter, id: TicketId, Granted { token, waited }: Granted) {
        let Some((ticket, lease)) =
            self.ticket(id).and_then(|ticket| self.tickets.of(&ticket).map(|made| (ticket.clone(), made.lease.clone())))
        else {
            return waiter.answer(Err(Error::internal("a ticket without a lease")));
        };
        let session = waiter.session.clone();
        let core = HoldCore::new(session.clone(), ticket, token, lease, self.commands.clone());
        if let Err(Ok(Some(untaken))) = waiter.reply.send(Ok(Some(Grant::new(core.clone())))) {
            untaken.forget();
            return self.queue.handle([Event::NotTaken(id)], &mut self.tickets, &mut self.actions);
        }
        if waited {
            session.stats.waits.add();
        }
        tracing::debug!(target: "etcdlock::grant", name = &*self.tickets.name, token);
        self.holder = Arc::downgrade(&core);
        let signal = core.clone();
        let lost = Box::pin(async move { signal.lost.lost().await });
        let start = Instant::now();
        let is_old = session.options.max_hold.map(|limit| start + limit);
        self.desk(id).hold = Some(Holding { core, lost, own: None, lasts: Some(start + LASTS), is_old });
    }

    fn released(&mut self, token: Revision, release: Release) {
        let Some(nth) = self.releases.iter().position(|releasing| releasing.token == token) else { return };
        let Releasing { reply, lease, .. } = self.releases.swap_remove(nth);
        let name = &self.tickets.name;
        let result = match release {
            Release::Done => Ok(()),
            Release::WasGone => Err(Error::lost(name, token, &Loss::KeyDeleted)),
            // Without a loss it is dropped, and the hold knows why it was lost.
            Release::LeaseLost => match lease.and_then(|lease| lease.loss(self.cluster.env.now())) {
                Some(loss) => Err(Error::lost(name, token, &loss)),
                None => return,
            },
            Release::Refused(refusal) => {
                let text = format!("the key of the lock {name:?} cannot be deleted: {refusal}; it goes with its lease");
                Err(Error::new(self.error_of(&refusal).kind(), text))
            }
        };
        let _ = reply.send(result);
    }

    fn error_of(&self, trouble: &Trouble) -> Error {
        let name = &self.tickets.name;
        let text = format!("the lock {name:?} cannot be taken: {trouble}");
        match trouble {
            Trouble::Denied(_) => {
                let rule = "the user needs the right to read and write all that begins with the lock's name";
                Error::new(ErrorKind::Denied, format!("{text}; {rule}"))
            }
            _ => Error::new(ErrorKind::Unavailable, text),
        }
    }
}

impl Desk {
    fn poll(&mut self, id: TicketId, cx: &mut Context<'_>) -> Poll<Event<Waiter>> {
        if let Some(hold) = &mut self.hold {
            if hold.lost.as_mut().poll(cx).is_ready() {
                hold.lost = Box::pin(std::future::pending());
                return Poll::Ready(Event::HoldLost(id));
            }
            if let Some(own) = &mut hold.own
                && let Poll::Ready(change) = own.poll_next(cx)
            {
                return Poll::Ready(Event::HeardOwn(id, change));
            }
        }
        if let Some(check) = &mut self.check
            && let Poll::Ready(look) = check.as_mut().poll(cx)
        {
            self.check = None;
            return Poll::Ready(Event::Checked(id, look));
        }
        if let Some(request) = &mut self.request
            && let Poll::Ready(answer) = request.as_mut().poll(cx)
        {
            self.request = None;
            return Poll::Ready(match answer {
                Answer::Entered(answer) => Event::Entered(id, answer),
                Answer::Looked(answer) => Event::Looked(id, answer),
                Answer::Left(answer) => Event::Left(id, answer),
            });
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queues.forget(&self.tickets.name);
            if let Some(hold) = self.holder.upgrade() {
                hold.lose(Loss::Internal);
            }
            for made in &self.tickets.made {
                made.lease.lost.lose(Loss::Internal);
            }
        }
    }
}
