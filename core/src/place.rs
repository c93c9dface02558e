//! This process's place in the queue of one name: at most one ticket in the store, and the local
//! waiters behind it, first come first served. All of the lock's algorithm is here.
//!
//! ```text
//!            enter              everyone ahead is gone            released
//!   idle ───────────▶ waiting ─────────────────────────▶ held ───────────────┐
//!    ▲                   │ nobody waits here any more     │ lost             │
//!    └───── leave ───────┴────────────────────────────────┴── leave ◀────────┤
//!                        ▲                                                   │
//!                        └─── hand-over: leave and enter in one step ◀───────┘
//! ```

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::error::{Error, ErrorKind, Loss, Result};
use crate::hold::{Hold, HoldCore};
use crate::lease::Lease;
use crate::sabotage::{Sabotage, is_on};
use crate::service::{DoorState, Service};
use crate::session::SessionCore;
use crate::stats::LiveTicket;
use crate::store::{Ahead, Change, Changes, Entered, Follow, Leaving, Look, NEAR, Revision, Ticket, Trouble};

/// How long an idle place keeps its watch: the next contended lock then needs no read.
const LINGER: Duration = Duration::from_secs(2);
/// After this many locks without a contender the watch is not worth its events.
const QUIET_ROUNDS: u32 = 16;
/// A waiter looks at the queue this often even if it hears nothing.
const RE_READ: Duration = Duration::from_secs(3);
/// etcd serves a new watch late, every 100 ms, if a write fell into the moment of its creation (it
/// is "unsynced"; nothing tells). Until it has proved to be live, or is older than this, the waiter
/// also looks itself, at growing intervals.
const PROOF: Duration = Duration::from_millis(150);
const FIRST_PROBE: Duration = Duration::from_millis(2);
const FIRST_PROBE_FAR_BACK: Duration = Duration::from_millis(10);
/// A hold that lasts gets a watch on its own key.
const LASTS: Duration = Duration::from_millis(50);
const RETRY_AT_FIRST: Duration = Duration::from_millis(50);
const RETRY_AT_MOST: Duration = Duration::from_secs(1);

/// The token of a ticket whose entry was never answered.
const UNKNOWN: Revision = 0;

pub(crate) enum Command {
    Lock(Waiter),
    /// The hold with this token is to be released. The caller has marked it released before.
    Release {
        token: Revision,
        reply: Option<oneshot::Sender<Result<()>>>,
    },
    /// A waiter gave up. The sender is dropped once nothing is left of it.
    GaveUp(Option<oneshot::Sender<()>>),
}

/// Somebody who wants the lock.
pub(crate) struct Waiter {
    pub(crate) session: Arc<SessionCore>,
    /// Do not wait for other holders: answer `None` instead.
    pub(crate) only_try: bool,
    pub(crate) reply: oneshot::Sender<Result<Option<Hold>>>,
}

impl Waiter {
    fn is_gone(&self) -> bool {
        self.reply.is_closed()
    }

    fn answer(self, answer: Result<Option<Hold>>) {
        // A hold that nobody takes is released by its drop.
        let _ = self.reply.send(answer);
    }
}

/// Our ticket in the queue.
struct Standing {
    ticket: Ticket,
    lease: Arc<Lease>,
    session: Arc<SessionCore>,
    token: Revision,
    ahead: Ahead,
    /// A copy of the entry may still be on its way.
    doubtful: bool,
    /// Somebody else had the lock when it entered.
    waited: bool,
    _live: LiveTicket,
}

struct Following {
    what: Follow,
    changes: Changes,
    /// Live since this revision; `None` until the store says so.
    since: Option<Revision>,
    /// It has delivered something, or is old enough.
    proven: bool,
    started: Instant,
    /// When to look next while it is not proven.
    probe: Duration,
}

impl Following {
    fn of(what: Follow, changes: Changes) -> Self {
        let probe = first_probe(&what);
        Following { what, changes, since: None, proven: false, started: Instant::now(), probe }
    }

    /// It was made anew, so it has to prove itself again.
    fn start_again(&mut self) {
        (self.proven, self.started, self.probe) = (false, Instant::now(), first_probe(&self.what));
    }

    /// When to look at the queue after having looked just now.
    fn next_look(&mut self) -> Duration {
        self.proven |= self.started.elapsed() > PROOF;
        if self.proven {
            return RE_READ;
        }
        let probe = self.probe;
        // In a long queue looks are dearer, and the own turn is farther off.
        self.probe *= if matches!(self.what, Follow::Queue(_)) { 2 } else { 4 };
        probe
    }
}

fn first_probe(what: &Follow) -> Duration {
    if matches!(what, Follow::Queue(_)) { FIRST_PROBE } else { FIRST_PROBE_FAR_BACK }
}

pub(crate) struct Place {
    service: Arc<Service>,
    name: Arc<str>,
    inbox: UnboundedReceiver<Command>,
    state: Arc<DoorState>,
    waiters: VecDeque<Waiter>,
    /// Some of them may only try.
    tries: bool,
    /// Given-up waiters that want to know when nothing is left of them.
    gave_up: Vec<oneshot::Sender<()>>,
    following: Option<Following>,
    quiet_rounds: u32,
    /// Our last ticket had many ahead of it.
    crowded: bool,
    /// The lease beneath our ticket and the hold on it, for the case that this task panics.
    lease: Option<Arc<Lease>>,
    holder: Weak<HoldCore>,
}

enum Turn {
    Ours(Standing),
    /// The ticket is gone, or its lease.
    Lost(Standing),
    NobodyWaits(Standing),
}

impl Place {
    pub(crate) fn new(service: Arc<Service>, name: Arc<str>, inbox: UnboundedReceiver<Command>, state: Arc<DoorState>) -> Self {
        Place {
            service,
            name,
            inbox,
            state,
            waiters: VecDeque::new(),
            tries: false,
            gave_up: Vec::new(),
            following: None,
            quiet_rounds: 0,
            crowded: false,
            lease: None,
            holder: Weak::new(),
        }
    }

    pub(crate) async fn run(mut self) {
        loop {
            self.set_idle();
            match timeout(LINGER, self.inbox.recv()).await {
                Ok(Some(command)) => self.take(command, false),
                Ok(None) => return,
                Err(_) => {
                    self.following = None;
                    if self.service.retire(&self.name, &self.inbox) {
                        return;
                    }
                }
            }
            self.serve().await;
            if self.crowded && self.follows_queue() {
                // Where many take turns, each that has had its own and still listened would cost
                // one more event at every release.
                self.following = None;
            }
        }
    }

    /// Serves waiters until none is left.
    async fn serve(&mut self) {
        let mut handed_over = None;
        loop {
            let standing = match handed_over.take() {
                Some(standing) => standing,
                None => match self.enter().await {
                    Some(standing) => standing,
                    // Somebody may have come while an entry was taken back.
                    None if self.anybody_waits() => continue,
                    None => return,
                },
            };
            handed_over = match self.wait_for_turn(standing).await {
                Turn::Ours(standing) => self.grant(standing).await,
                Turn::Lost(standing) => self.abandon(standing).await,
                Turn::NobodyWaits(standing) => self.leave(standing, None).await,
            };
        }
    }

    // ---- the inbox -------------------------------------------------------------------------

    /// Keeps a command. With `occupied`, we hold the lock or stand in its queue.
    fn take(&mut self, command: Command, occupied: bool) {
        match command {
            Command::Lock(waiter) if waiter.only_try && occupied => waiter.answer(Ok(None)),
            Command::Lock(waiter) => {
                self.state.busy.store(true, Ordering::Release);
                self.tries |= waiter.only_try;
                self.waiters.push_back(waiter);
            }
            // Not the hold of now: it was lost, and its reply says so by being dropped.
            Command::Release { .. } => {}
            Command::GaveUp(tell) => {
                self.waiters.retain(|waiter| !waiter.is_gone());
                self.gave_up.extend(tell);
            }
        }
    }

    /// Whether there are any waiters still there; then the first is one of them. The others are not
    /// asked, there can be thousands: one that gives up says so.
    fn anybody_waits(&mut self) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command, false);
        }
        while self.waiters.front().is_some_and(Waiter::is_gone) {
            self.waiters.pop_front();
        }
        if !self.waiters.is_empty() {
            // What is in the store now belongs to those who still wait.
            self.gave_up.clear();
        }
        !self.waiters.is_empty()
    }

    fn set_idle(&mut self) {
        self.lease = None;
        if self.waiters.is_empty() {
            self.gave_up.clear();
            self.state.busy.store(false, Ordering::Release);
            self.state.taken.store(false, Ordering::Release);
        }
    }

    /// The lock is taken: those who only try need not wait.
    fn answer_tries(&mut self) {
        self.state.taken.store(true, Ordering::Release);
        if !std::mem::take(&mut self.tries) {
            return;
        }
        for waiter in std::mem::take(&mut self.waiters) {
            if waiter.only_try { waiter.answer(Ok(None)) } else { self.waiters.push_back(waiter) }
        }
    }

    fn fail_all(&mut self, error: &Error) {
        for waiter in self.waiters.drain(..) {
            waiter.answer(Err(error.clone()));
        }
    }

    // ---- enter -----------------------------------------------------------------------------

    /// Puts a ticket into the queue for the waiters; `None` when there are none left.
    async fn enter(&mut self) -> Option<Standing> {
        let mut retry = Retry::new();
        while self.anybody_waits() {
            let session = self.waiters.front()?.session.clone();
            let lease = match self.lease_of(&session).await {
                Some(Ok(lease)) => lease,
                Some(Err(error)) => {
                    // Only the waiters of this session.
                    for waiter in std::mem::take(&mut self.waiters) {
                        if Arc::ptr_eq(&waiter.session, &session) {
                            waiter.answer(Err(error.clone()));
                        } else {
                            self.waiters.push_back(waiter);
                        }
                    }
                    continue;
                }
                None => continue,
            };
            self.lease = Some(lease.clone());
            let ticket = session.ticket(&lease, &self.name, false);
            let mut doubtful = false;
            // The same ticket until it is known whether it is in.
            while lease.is_alive(self.service.env.now()) {
                if !self.anybody_waits() {
                    if doubtful {
                        return self.withdraw(ticket, lease, session).await;
                    }
                    return None;
                }
                let answer = if self.waiters.iter().all(|waiter| waiter.only_try) {
                    self.service.store.enter_if_free(&ticket).await
                } else {
                    self.service.store.enter(&ticket).await.map(Some)
                };
                match answer {
                    Ok(Some(entered)) => {
                        self.service.note_trouble(None);
                        return Some(Standing::new(ticket, lease, session, entered, doubtful));
                    }
                    Ok(None) => {
                        self.service.note_trouble(None);
                        self.answer_tries();
                        if doubtful {
                            return self.withdraw(ticket, lease, session).await;
                        }
                        break;
                    }
                    Err(Trouble::LeaseGone) => {
                        lease.lost.lose(Loss::LeaseGone);
                    }
                    Err(Trouble::KeyTaken) => {
                        session.retire_keys();
                        if doubtful {
                            return self.withdraw(ticket, lease, session).await;
                        }
                        retry.pause().await;
                        break;
                    }
                    Err(Trouble::Unavailable(why)) => {
                        doubtful = true;
                        session.retire_keys();
                        self.service.note_trouble(Some(why));
                        retry.pause().await;
                    }
                    Err(refusal) => {
                        // What a full database refuses may have been applied all the same: etcd
                        // checks the quota, applies, and then answers (`quotaApplierV3`).
                        if matches!(refusal, Trouble::Refused(_)) {
                            doubtful = true;
                            session.retire_keys();
                        }
                        let error = self.error_of(&refusal);
                        self.fail_all(&error);
                    }
                }
            }
        }
        None
    }

    /// Takes back a ticket of which it is not known whether it has entered, or ever will. It hands
    /// nothing over.
    async fn withdraw(&mut self, ticket: Ticket, lease: Arc<Lease>, session: Arc<SessionCore>) -> Option<Standing> {
        session.retire_keys();
        let entered = Entered { token: UNKNOWN, ahead: Ahead { revision: 0, keys: None } };
        self.leave(Standing::new(ticket, lease, session, entered, true), None).await
    }

    async fn withdraw_next(&mut self, (ticket, lease, session): Next) -> Option<Standing> {
        // Boxed, because leaving may lead here again.
        Box::pin(self.withdraw(ticket, lease, session)).await
    }

    /// The session's lease, or why there will be none; `None` if the first waiter left meanwhile.
    async fn lease_of(&mut self, session: &Arc<SessionCore>) -> Option<Result<Arc<Lease>>> {
        let lease = session.lease();
        tokio::pin!(lease);
        loop {
            tokio::select! {
                biased;
                lease = &mut lease => return Some(lease),
                Some(command) = self.inbox.recv() => {
                    self.take(command, false);
                    if !self.anybody_waits() || !Arc::ptr_eq(&self.waiters.front()?.session, session) {
                        return None;
                    }
                }
            }
        }
    }

    fn error_of(&self, trouble: &Trouble) -> Error {
        let kind = match trouble {
            Trouble::Denied(_) => ErrorKind::Denied,
            _ => ErrorKind::Unavailable,
        };
        Error::new(kind, format!("the lock {:?} cannot be taken: {trouble}", self.name))
    }

    // ---- wait ------------------------------------------------------------------------------

    /// Waits until everybody ahead is gone. Proof is either our own transaction, or the ordered
    /// events that removed everybody ahead without removing our own ticket.
    async fn wait_for_turn(&mut self, mut standing: Standing) -> Turn {
        if standing.ahead.is_nobody() {
            self.quiet_rounds += 1;
            if self.quiet_rounds > QUIET_ROUNDS {
                self.following = None;
            }
        } else {
            self.quiet_rounds = 0;
        }
        self.crowded = standing.ahead.keys.as_ref().is_none_or(|keys| keys.len() > NEAR);
        let mut retry = Retry::new();
        // It follows only the one just ahead.
        let mut is_far = false;
        // A change that we have heard and that a look has to know.
        let mut heard = None;
        let mut look_at = Instant::now() + if standing.ahead.keys.is_some() { RE_READ } else { Duration::ZERO };
        loop {
            if !standing.ahead.is_nobody() {
                self.answer_tries();
            }
            if !self.anybody_waits() {
                return Turn::NobodyWaits(standing);
            }
            if !standing.lease.is_alive(self.service.env.now()) {
                return Turn::Lost(standing);
            }
            let mut want = None;
            if let Some(keys) = &standing.ahead.keys {
                if keys.is_empty() {
                    return Turn::Ours(standing);
                }
                // In a long queue the one just ahead is followed to its end, and then a look tells the
                // rest. When the same processes come again and again, that is the same key each time,
                // and the watch is there already.
                let nearest = Follow::Ticket(keys[0].clone());
                is_far = keys.len() > NEAR || is_far && self.following.as_ref().is_some_and(|now| now.what == nearest);
                want = Some(if is_far { nearest } else { Follow::Queue(self.name.clone()) });
            }
            if let Some(want) = want {
                self.follow(want);
            }
            tokio::select! {
                biased;
                _ = standing.lease.lost.lost() => return Turn::Lost(standing),
                (change, _) = next_change(&mut self.following) => match change {
                    Change::Since(revision) => {
                        let is_listed = standing.ahead.keys.is_some();
                        if revision > standing.ahead.revision && !(is_far && is_listed) {
                            // What happened up to there was not heard, our own ticket's end
                            // included. Without a list no event can make the lock ours.
                            standing.ahead.keys = None;
                            heard = Some(revision);
                            look_at = Instant::now();
                        } else if is_listed {
                            look_at = Instant::now() + self.following.as_mut().map_or(RE_READ, Following::next_look);
                        }
                    }
                    Change::Overwritten => {}
                    Change::Gone { revision, .. } if revision <= standing.ahead.revision => {}
                    Change::Gone { key, .. } if key == standing.ticket.key && !is_on(Sabotage::NoOwnKeyWatch) => {
                        return Turn::Lost(standing);
                    }
                    Change::Gone { key, revision } => {
                        // Without the list a look is due, and it will know of this.
                        let Some(keys) = &mut standing.ahead.keys else { continue };
                        if is_far {
                            standing.ahead = Ahead { revision, keys: None };
                            heard = Some(revision);
                            look_at = Instant::now();
                        } else {
                            keys.retain(|ahead| *ahead != key);
                        }
                    }
                },
                Some(command) = self.inbox.recv() => self.take(command, true),
                () = until(look_at) => match self.service.store.look(&standing.ticket, standing.token, heard.take()).await {
                    Ok(Look { present, overwritten, ahead }) => {
                        self.service.note_trouble(None);
                        if overwritten {
                            self.put_right(&standing);
                        }
                        let live_since = self.following.as_ref().and_then(|following| following.since).unwrap_or(0);
                        if ahead.revision < standing.ahead.revision.max(live_since) {
                            // No member lags that answers this. So it was no history of this store that we have heard.
                            self.following = None;
                        }
                        if !present && !is_on(Sabotage::NoOwnKeyWatch) {
                            return Turn::Lost(standing);
                        }
                        standing.ahead = ahead;
                        retry = Retry::new();
                        look_at = Instant::now() + self.following.as_mut().map_or(RE_READ, Following::next_look);
                    }
                    Err(trouble) => {
                        if let Trouble::Denied(_) = trouble {
                            let error = self.error_of(&trouble);
                            self.fail_all(&error);
                        }
                        self.service.note_trouble(Some(trouble.to_string()));
                        look_at = Instant::now() + retry.next();
                    }
                },
            }
        }
    }

    /// Follows this, unless that is so already.
    fn follow(&mut self, what: Follow) {
        if self.following.as_ref().is_none_or(|following| following.what != what) {
            self.following = Some(self.start_following(what));
        }
    }

    fn follows_queue(&self) -> bool {
        self.following.as_ref().is_some_and(|following| matches!(following.what, Follow::Queue(_)))
    }

    fn start_following(&self, what: Follow) -> Following {
        Following::of(what.clone(), self.service.store.follow(what))
    }

    // ---- hold ------------------------------------------------------------------------------

    /// Gives the lock to the first waiter, and waits until the hold ends. Returns our next ticket
    /// if it was handed over.
    async fn grant(&mut self, standing: Standing) -> Option<Standing> {
        while self.anybody_waits() {
            let waiter = self.waiters.pop_front()?;
            if !Arc::ptr_eq(&waiter.session, &standing.session) {
                // The ticket is under the lease of a session whose waiter gave up.
                self.waiters.push_front(waiter);
                return self.leave(standing, None).await;
            }
            let core = HoldCore::new(
                standing.session.clone(),
                self.name.clone(),
                standing.ticket.clone(),
                standing.token,
                standing.lease.clone(),
            );
            let hold = Hold::new(core.clone());
            if let Err(Ok(Some(untaken))) = waiter.reply.send(Ok(Some(hold))) {
                untaken.forget();
                continue;
            }
            if standing.waited {
                standing.session.stats.waits.add();
            }
            tracing::debug!(target: "etcdlock::grant", name = &*self.name, token = standing.token);
            self.answer_tries();
            self.holder = Arc::downgrade(&core);
            return match self.held(&standing, &core).await {
                Ended::Released(reply) => self.leave(standing, reply).await,
                Ended::Lost => self.abandon(standing).await,
            };
        }
        self.leave(standing, None).await
    }

    /// Waits until the hold is released or lost.
    async fn held(&mut self, standing: &Standing, core: &Arc<HoldCore>) -> Ended {
        // A hold that lasts follows its own key. What follows the whole queue tells of its end too, and is read to its end.
        let mut own = None;
        let with_queue = self.follows_queue();
        let mut no_queue = None;
        let start = Instant::now();
        let max_hold = standing.session.options.max_hold;
        // What our own transaction, or an ordered event, has told us about our key.
        let mut seen = standing.ahead.revision;
        let mut checking: Option<oneshot::Receiver<Result<Look, Trouble>>> = None;
        loop {
            tokio::select! {
                biased;
                loss = standing.lease.lost.lost() => {
                    core.lose(loss);
                    return Ended::Lost;
                }
                // A guarded write was refused.
                _ = core.lost.lost() => return Ended::Lost,
                command = self.inbox.recv() => match command {
                    Some(Command::Release { token, reply }) if token == standing.token => return Ended::Released(reply),
                    Some(Command::Lock(waiter)) if is_on(Sabotage::NoInProcessQueue) => {
                        waiter.answer(Ok(Some(Hold::new(core.same_again()))));
                    }
                    Some(command) => {
                        self.take(command, true);
                        self.gave_up.clear();
                    }
                    None => return Ended::Released(None),
                },
                (change, again) = next_of_two(&mut own, if with_queue { &mut self.following } else { &mut no_queue }),
                    if !is_on(Sabotage::NoOwnKeyWatch) => match change {
                    // After a restart, of etcd too, nothing is as it was for sure; below what we know it may be restored.
                    Change::Since(revision) if again || revision != seen => checking = Some(self.check(standing, Duration::ZERO)),
                    Change::Overwritten => self.put_right(standing),
                    Change::Gone { key, revision } if key == standing.ticket.key && revision > standing.token => {
                        core.lose(Loss::KeyDeleted);
                        return Ended::Lost;
                    }
                    _ => {}
                },
                checked = async { match &mut checking { Some(checking) => checking.await, None => std::future::pending().await } } => {
                    checking = None;
                    match checked {
                        Ok(Ok(look)) if !look.present => {
                            core.lose(Loss::KeyDeleted);
                            return Ended::Lost;
                        }
                        Ok(Ok(look)) => {
                            seen = seen.max(look.ahead.revision);
                            if look.overwritten {
                                self.put_right(standing);
                            }
                        }
                        // No answer, or a task that is gone.
                        Ok(Err(_)) | Err(_) => checking = Some(self.check(standing, RETRY_AT_FIRST)),
                    }
                },
                _ = sleep_until(start + LASTS), if own.is_none() => {
                    let (key, lease) = (standing.ticket.key.clone(), standing.ticket.lease);
                    own = Some(self.start_following(Follow::Own { key, lease }));
                }
                _ = sleep_until(start + max_hold.unwrap_or_default()), if max_hold.is_some() => {
                    core.lose(Loss::MaxHold);
                    return Ended::Released(None);
                }
            }
        }
    }

    /// Looks whether our ticket is still there, without keeping the inbox waiting.
    fn check(&self, standing: &Standing, after: Duration) -> oneshot::Receiver<Result<Look, Trouble>> {
        let (tx, rx) = oneshot::channel();
        let (store, ticket, token) = (self.service.store.clone(), standing.ticket.clone(), standing.token);
        self.service.env.spawn(async move {
            until(Instant::now() + after).await;
            let _ = tx.send(store.look(&ticket, token, None).await);
        });
        rx
    }

    /// Somebody has written over our ticket, and so taken it from under its lease: it would stay when we die.
    fn put_right(&self, standing: &Standing) {
        tracing::warn!(target: "etcdlock::grant", name = &*self.name, key = standing.ticket.key, "somebody has written over our key; it is put right");
        let (store, ticket, token, lease) =
            (self.service.store.clone(), standing.ticket.clone(), standing.token, standing.lease.clone());
        let env = self.service.env.clone();
        self.service.env.spawn(async move {
            let mut retry = Retry::new();
            while lease.is_alive(env.now()) && matches!(store.put_right(&ticket, token).await, Err(Trouble::Unavailable(_))) {
                retry.pause().await;
            }
        });
    }

    // ---- leave -----------------------------------------------------------------------------

    /// A ticket is lost. With its lease its key is gone too; else it is made sure of.
    async fn abandon(&mut self, standing: Standing) -> Option<Standing> {
        if !standing.lease.is_alive(self.service.env.now()) {
            // What was heard may be of a history that is no more.
            self.following = None;
            return None;
        }
        self.leave(standing, None).await
    }

    /// Takes our ticket out of the queue and, if somebody here waits, puts the next one in by the
    /// same step. Goes on until the store has answered or the lease has ended, and the key with it.
    async fn leave(&mut self, standing: Standing, mut reply: Option<oneshot::Sender<Result<()>>>) -> Option<Standing> {
        let mut retry = Retry::new();
        let mut sent_before = false;
        let is_known = standing.token != UNKNOWN;
        let (mut may_put, mut may_hand_over) = (true, true);
        // Chosen once: a copy of the first request may be applied after the second was sent.
        let mut next: Option<Next> = None;
        // A next ticket of which it is not known whether it was put.
        let mut orphan: Option<Next> = None;
        loop {
            if next.is_none() && is_known && may_hand_over && !sent_before && self.anybody_waits() {
                next = self.waiters.front().and_then(|waiter| {
                    let lease = waiter.session.lease_now()?;
                    Some((waiter.session.ticket(&lease, &self.name, !standing.ticket.second), lease, waiter.session.clone()))
                });
            }
            let leaving = Leaving {
                ticket: &standing.ticket,
                token: is_known.then_some(standing.token),
                void: standing.doubtful && may_put && !is_on(Sabotage::UnlockByName),
                next: next.as_ref().map(|(ticket, ..)| ticket),
            };
            match self.service.store.leave(leaving).await {
                Ok(left) => {
                    self.service.note_trouble(None);
                    let handed_over = match (left.next, next) {
                        (Some(mut entered), Some((ticket, lease, session))) => {
                            if is_on(Sabotage::HandOverSkipsOrder) {
                                entered.ahead.keys = Some(Vec::new());
                            }
                            self.lease = Some(lease.clone());
                            let is_handed_over = entered.ahead.is_nobody();
                            if is_handed_over {
                                session.stats.hand_overs.add();
                            }
                            Some(Standing { waited: true, ..Standing::new(ticket, lease, session, entered, false) })
                        }
                        _ => None,
                    };
                    if handed_over.is_none() && !self.anybody_waits() {
                        self.set_idle();
                    }
                    // An absent ticket after a first request without an answer was most likely
                    // taken out by that request.
                    let gone = !left.was_present && !sent_before;
                    if let Some(reply) = reply {
                        let lost = || Error::lost(&self.name, standing.token, &Loss::KeyDeleted);
                        let _ = reply.send(if gone { Err(lost()) } else { Ok(()) });
                    }
                    if standing.doubtful && !may_put {
                        self.mark_later(standing);
                    }
                    return match orphan {
                        Some(orphan) => self.withdraw_next(orphan).await,
                        None => handed_over,
                    };
                }
                Err(Trouble::Unavailable(why)) => {
                    sent_before = true;
                    standing.session.retire_keys();
                    if let Some((.., session)) = &next {
                        session.retire_keys();
                    }
                    self.service.note_trouble(Some(why));
                }
                Err(Trouble::LeaseGone) if next.is_none() => {
                    standing.lease.lost.lose(Loss::LeaseGone);
                }
                // One of two leases is gone, or a full database refuses what is put. Deleting alone
                // still works.
                Err(trouble) if may_put && (next.is_some() || standing.doubtful) => {
                    may_hand_over = false;
                    // The marker is left out only if it is the trouble: the entry it keeps out may
                    // still be on its way.
                    may_put = trouble == Trouble::LeaseGone && standing.doubtful;
                    sent_before |= matches!(trouble, Trouble::Refused(_));
                    if let (Trouble::KeyTaken, Some((.., session))) = (&trouble, &next) {
                        session.retire_keys();
                    }
                    orphan = next.take().filter(|_| sent_before);
                    continue;
                }
                Err(refusal) => {
                    // It may last as long as the lease, so nobody is kept waiting for it.
                    self.anybody_waits();
                    let error = self.error_of(&refusal);
                    self.fail_all(&error);
                    if let Some(reply) = reply.take() {
                        let kind = error.kind();
                        let text =
                            format!("the key of the lock {:?} cannot be deleted: {refusal}; it goes with its lease", self.name);
                        let _ = reply.send(Err(Error::new(kind, text)));
                    }
                }
            }
            if let Some(loss) = standing.lease.loss(self.service.env.now()) {
                if let Some(reply) = reply {
                    let _ = reply.send(Err(Error::lost(&self.name, standing.token, &loss)));
                }
                return match orphan.or(next.filter(|_| sent_before)) {
                    Some(orphan) => self.withdraw_next(orphan).await,
                    None => None,
                };
            }
            retry.pause().await;
        }
    }

    /// Puts the marker of a doubtful ticket once there is room for it, and takes out what a late
    /// copy of its entry has made until then.
    fn mark_later(&self, Standing { ticket, lease, .. }: Standing) {
        let service = self.service.clone();
        self.service.env.spawn(async move {
            let mut retry = Retry::new();
            while lease.is_alive(service.env.now()) {
                retry.pause().await;
                let leaving = Leaving { ticket: &ticket, token: None, void: true, next: None };
                if let Ok(_) | Err(Trouble::LeaseGone) = service.store.leave(leaving).await {
                    return;
                }
            }
        });
    }
}

/// A ticket to hand over to.
type Next = (Ticket, Arc<Lease>, Arc<SessionCore>);

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.service.forget(&self.name);
            if let Some(hold) = self.holder.upgrade() {
                hold.lose(Loss::Internal);
            }
            if let Some(lease) = &self.lease {
                lease.lost.lose(Loss::Internal);
            }
        }
    }
}

enum Ended {
    Released(Option<oneshot::Sender<Result<()>>>),
    Lost,
}

impl Standing {
    fn new(ticket: Ticket, lease: Arc<Lease>, session: Arc<SessionCore>, entered: Entered, doubtful: bool) -> Self {
        let waited = !entered.ahead.is_nobody();
        let _live = LiveTicket::of(&session);
        Standing { ticket, lease, session, token: entered.token, ahead: entered.ahead, doubtful, waited, _live }
    }
}

/// The next change, and whether it tells that the store had to start over.
async fn next_change(following: &mut Option<Following>) -> (Change, bool) {
    let Some(following) = following else { return std::future::pending().await };
    let change = following.changes.next().await;
    let mut again = false;
    match change {
        Change::Since(revision) => {
            again = following.since.replace(revision).is_some();
            if again {
                following.start_again();
            }
        }
        Change::Gone { .. } | Change::Overwritten => following.proven = true,
    }
    (change, again)
}

async fn next_of_two(one: &mut Option<Following>, other: &mut Option<Following>) -> (Change, bool) {
    tokio::select! {
        biased;
        change = next_change(one) => change,
        change = next_change(other) => change,
    }
}

/// Like `sleep_until`, which rounds up to whole milliseconds even when the time has come.
async fn until(at: Instant) {
    if at > Instant::now() {
        sleep_until(at).await;
    }
}

/// Growing pauses between attempts, spread so that clients do not come in step.
pub(crate) struct Retry(Duration);

impl Retry {
    pub(crate) fn new() -> Self {
        Retry(RETRY_AT_FIRST)
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.0.mul_f64(0.75 + 0.5 * fastrand::f64());
        self.0 = (self.0 * 2).min(RETRY_AT_MOST);
        pause
    }

    pub(crate) async fn pause(&mut self) {
        sleep(self.next()).await;
    }
}
