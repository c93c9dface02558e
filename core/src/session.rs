//! A session: a service and one lease, renewed until the session is closed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::announced::Announced;
use crate::backoff::Backoff;
use crate::driver::Command;
use crate::error::{Error, ErrorKind, Loss, Result};
use crate::inspect::Card;
use crate::lease::Lease;
use crate::mutex::Mutex;
use crate::options::{Connection, Options, Target, check_name};
use crate::pending::Pending;
use crate::proto::WaiterId;
use crate::runtime::{AFTER_A_PANIC, Env, catching};
use crate::sabotage::{Sabotage, is_on};
use crate::service::Service;
use crate::stats::{Counters, Stats};
use crate::store::{LeaseId, Ticket, Trouble};

/// The open sessions of this process, so that its end can close them.
pub(crate) type Sessions = StdMutex<Vec<Weak<SessionCore>>>;

pub(crate) struct SessionCore {
    pub(crate) service: Arc<Service>,
    pub(crate) options: Options,
    pub(crate) stats: Counters,
    owner: String,
    host: String,
    leases: Announced<LeaseState>,
    closing: Announced<bool>,
    /// Grows by two whenever a request about a ticket went unanswered: its key is not used again.
    ticket_numbers: AtomicU64,
}

#[derive(Clone)]
enum LeaseState {
    Alive(Arc<Lease>),
    /// On the way to a new lease; with the reason if it was refused.
    Seeking(Option<Error>),
    /// With `gone`, the lease is known to have ended in the store.
    Closed {
        gone: bool,
    },
}

impl SessionCore {
    /// The lease, waiting for a new one after a loss.
    pub(crate) async fn lease(&self) -> Result<Arc<Lease>> {
        self.leases
            .find(|state| match state {
                LeaseState::Alive(lease) if lease.is_alive(self.service.env.now()) => Some(Ok(lease.clone())),
                LeaseState::Seeking(Some(refusal)) => Some(Err(refusal.clone())),
                LeaseState::Closed { .. } => Some(Err(self.closed())),
                LeaseState::Alive(_) | LeaseState::Seeking(None) => None,
            })
            .await
    }

    pub(crate) fn lease_now(&self) -> Option<Arc<Lease>> {
        match &*self.leases.now() {
            LeaseState::Alive(lease) if lease.is_alive(self.service.env.now()) => Some(lease.clone()),
            _ => None,
        }
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        self.service.env.check_fork()?;
        if *self.closing.now() { Err(self.closed()) } else { Ok(()) }
    }

    /// Waits until the session begins to close.
    pub(crate) async fn closing(&self) {
        self.closing.find(|closing| closing.then_some(())).await
    }

    pub(crate) fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, format!("the session at {} has been closed; connect anew", self.service.address))
    }

    /// `: what went wrong last`, or nothing.
    pub(crate) fn because_of_trouble(&self) -> String {
        self.service.trouble().map(|why| format!(" (last trouble: {why})")).unwrap_or_default()
    }

    /// A ticket under this lease. `n` tells it from others that we have in the queue: a mutex uses 0 and 1 in turn, because a
    /// hand-over takes out one and puts in the other, and uses them again and again: a key that was deleted stays in etcd's
    /// index until the next compaction and makes every later look at the queue slower.
    pub(crate) fn ticket(&self, lease: &Lease, name: &Arc<str>, n: u64) -> Ticket {
        let number = self.ticket_numbers.load(Ordering::Relaxed) + n;
        // The wall clock is for people only.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let card = Card {
            owner: self.owner.as_str().into(),
            host: self.host.as_str().into(),
            pid: std::process::id(),
            language: self.options.language.into(),
            since,
        };
        let value = serde_json::to_string(&card).unwrap_or_default().into();
        Ticket { name: name.clone(), key: format!("{name}/{:x}-{number:x}", lease.id), lease: lease.id, n, value }
    }

    /// A request about a ticket went unanswered, and a copy may arrive at any later time. It must
    /// not find another ticket of the same key.
    pub(crate) fn retire_keys(&self) {
        if !is_on(Sabotage::UnlockByName) {
            self.ticket_numbers.fetch_add(2, Ordering::Relaxed);
        }
    }

    /// Keeps the session's lease, gets a new one after every loss, and ends with the session. Whatever goes wrong in it, nobody
    /// goes on believing in a lease that nobody renews, and the session goes on with another.
    async fn keep(self: Arc<Self>, first: Arc<Lease>) {
        let mut lease = first;
        while catching(self.keep_on(&mut lease)).await.is_err() {
            tracing::error!(target: "etcdlock::renewal", "the keeper of a lease panicked, and starts again with another lease");
            lease.lost.lose(Loss::Internal);
            sleep(AFTER_A_PANIC).await;
        }
    }

    async fn keep_on(self: &Arc<Self>, lease: &mut Arc<Lease>) {
        let mut retry = Backoff::new();
        loop {
            let began = self.service.env.now();
            let loss = tokio::select! {
                biased;
                () = self.closing() => Loss::Closed,
                loss = lease.lost.lost() => loss,
                () = self.service.store.history_changed(lease.history) => Loss::HistoryChanged,
                loss = self.renew(lease) => loss,
            };
            lease.lost.lose(loss);
            let closed = *self.closing.now();
            if closed {
                self.leases.set(LeaseState::Closed { gone: false });
                self.end(lease).await;
                self.leases.set(LeaseState::Closed { gone: true });
                break;
            }
            self.leases.set(LeaseState::Seeking(None));
            self.stats.leases_lost.add();
            let (core, old) = (self.clone(), lease.clone());
            self.service.env.spawn(async move { core.end(&old).await });
            let next = tokio::select! {
                biased;
                () = self.closing() => None,
                next = async {
                    // One that is over as soon as it began may never have been known, and the next would be no better.
                    if self.service.env.now().saturating_sub(began) < lease.ttl / 3 {
                        retry.pause().await;
                    } else {
                        retry = Backoff::new();
                    }
                    self.another_lease().await
                } => Some(next),
            };
            let Some(next) = next else {
                self.leases.set(LeaseState::Closed { gone: true });
                break;
            };
            *lease = next;
            self.leases.set(LeaseState::Alive(lease.clone()));
        }
    }

    /// Renews at every third of the TTL, at once again after a failure, until the lease is lost.
    async fn renew(&self, lease: &Lease) -> Loss {
        let env = &self.service.env;
        let third = lease.ttl / 3;
        let mut next = env.now() + third;
        let mut retry = Backoff::new();
        loop {
            let now = env.now();
            if now >= lease.deadline() {
                return Loss::Deadline;
            }
            if now < next {
                // In short steps: this sleep does not see the time of a suspended machine.
                sleep(next.min(lease.deadline()).saturating_sub(now).min(Duration::from_millis(500))).await;
                continue;
            }
            let left = lease.deadline().saturating_sub(now);
            let limit = (lease.ttl / 6).min(Duration::from_secs(2));
            let hurry_from = lease.deadline().saturating_sub(lease.ttl / 2);
            self.stats.renewals.add();
            match timeout(left, self.service.store.renew_lease(lease.id, limit, hurry_from)).await {
                Ok(Ok(())) => {
                    let asked = if is_on(Sabotage::DeadlineFromReceipt) { env.now() } else { now };
                    lease.renewed(asked, env.now());
                    let (late, took) = (now.saturating_sub(next).as_millis(), env.now().saturating_sub(now).as_millis());
                    tracing::debug!(target: "etcdlock::renewal", lease = lease.id, late_ms = late, took_ms = took, "renewed");
                    next = now + third;
                    retry = Backoff::new();
                }
                Ok(Err(Trouble::LeaseGone)) => return Loss::LeaseGone,
                Ok(Err(trouble)) => {
                    self.service.note_trouble(Some(trouble.to_string()));
                    tracing::info!(target: "etcdlock::renewal", lease = lease.id, %trouble, "renewal failed, trying again");
                    // An election takes seconds, and its end must not be slept through.
                    next = env.now() + retry.next().min(third / 8);
                }
                Err(_) => return Loss::Deadline,
            }
        }
    }

    async fn another_lease(&self) -> Arc<Lease> {
        let mut retry = Backoff::new();
        loop {
            match open_lease(&self.service, &self.options).await {
                Ok(lease) => return Arc::new(lease),
                Err(trouble) => {
                    self.service.note_trouble(Some(trouble.to_string()));
                    if let Trouble::Denied(_) | Trouble::Refused(_) | Trouble::Invalid(_) = trouble {
                        self.leases.set(LeaseState::Seeking(Some(self.connect_error(&trouble))));
                    }
                }
            }
            retry.pause().await;
        }
    }

    pub(crate) fn connect_error(&self, trouble: &Trouble) -> Error {
        connect_error(&self.service.address, trouble)
    }

    async fn end(&self, lease: &Lease) {
        let until = lease.deadline().max(self.service.env.now()) + lease.ttl;
        end_lease(&self.service, lease.id, until).await;
    }

    fn start_closing(&self) {
        self.closing.set(true);
    }

    async fn closed_within(&self, limit: Duration) -> Result<()> {
        let gone = self.leases.find(|state| matches!(state, LeaseState::Closed { gone: true }).then_some(()));
        match timeout(limit, gone).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                format!(
                    "the session is closed here, but {} has not confirmed it within {limit:?}{}; its lease ends by itself within {:?}",
                    self.service.address,
                    self.because_of_trouble(),
                    self.options.ttl
                ),
            )),
        }
    }
}

fn connect_error(address: &str, trouble: &Trouble) -> Error {
    match trouble {
        Trouble::Denied(why) => {
            Error::new(ErrorKind::Denied, format!("{address} refuses the session: {why}; check user, password and certificates"))
        }
        Trouble::Invalid(why) => Error::invalid(format!("the target {address} cannot be used: {why}")),
        other => Error::new(ErrorKind::Unavailable, format!("{address} cannot be used: {other}")),
    }
}

/// A pipe that nobody writes to, or a file on a server that is gone.
fn files_do_not_answer(connection: &Connection, limit: Duration) -> Error {
    let files = connection.files().join(", ");
    Error::new(ErrorKind::Unavailable, format!("the certificates could not be read within {limit:?}: {files}"))
}

/// Ends a lease, and with it every key that is still under it, as soon as the store can be reached.
/// Not longer than the lease can live.
async fn end_lease(service: &Service, lease: LeaseId, until: Duration) {
    let mut retry = Backoff::new();
    loop {
        match service.store.close_lease(lease).await {
            Ok(()) => return,
            Err(trouble) => service.note_trouble(Some(trouble.to_string())),
        }
        if service.env.now() >= until {
            return;
        }
        retry.pause().await;
    }
}

/// A lease that the store has granted. If nobody takes it, it is ended.
struct Granted {
    service: Arc<Service>,
    lease: Option<Lease>,
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            let service = self.service.clone();
            let until = lease.deadline().max(service.env.now()) + lease.ttl;
            self.service.env.spawn(async move { end_lease(&service, lease.id, until).await });
        }
    }
}

/// Opens a lease. A caller that goes meanwhile leaves none behind.
async fn open_lease(service: &Arc<Service>, options: &Options) -> Result<Lease, Trouble> {
    let (tx, granted) = oneshot::channel();
    let (opening, seconds) = (service.clone(), options.ttl_seconds());
    service.env.spawn(async move {
        let (asked, history) = (opening.env.now(), opening.store.history());
        let opened = opening.store.open_lease(seconds).await;
        let asked = if is_on(Sabotage::DeadlineFromReceipt) { opening.env.now() } else { asked };
        let granted =
            opened.map(|(id, ttl)| Granted { service: opening.clone(), lease: Some(Lease::granted(id, ttl, asked, history)) });
        let _ = tx.send(granted);
    });
    let gone = || Trouble::Unavailable("the request for a lease has ended without an answer".into());
    let mut granted = granted.await.unwrap_or_else(|_| Err(gone()))?;
    granted.lease.take().ok_or_else(gone)
}

/// A connection to where locks live, with one lease that is renewed until the session is closed.
///
/// Any number of mutexes, threads and tasks may share a session. If its lease is lost, its holds
/// are lost, and the session gets itself a new lease: waiters go on waiting and new locks work.
/// Clones are the same session. It is closed in the background when the last clone and the last
/// mutex made from it are dropped; [`close`](Self::close) waits for that.
#[derive(Clone)]
pub struct Session {
    handle: Arc<Handle>,
}

/// The user's side of a session: when it goes, the session is closed.
pub(crate) struct Handle {
    pub(crate) core: Arc<SessionCore>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.core.service.env.is_forked() {
            self.core.start_closing();
        }
    }
}

impl Session {
    /// Connects and opens a lease.
    ///
    /// `target` is `"127.0.0.1:2379"`, `"http://a:2379,http://b:2379"`, `"https://…"`, a list of
    /// those, or `"memory:NAME"` (in this process; the same NAME is the same place while a session
    /// is open there). Empty: `$ETCDLOCK_ENDPOINTS`, else `127.0.0.1:2379`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) at once for a bad target or option.
    /// [`Denied`](ErrorKind::Denied) at once for wrong credentials.
    /// [`Unavailable`](ErrorKind::Unavailable) after the connect timeout, with endpoint and cause.
    pub fn connect(target: impl Into<Target>, options: Options) -> Pending<Session> {
        Self::connect_in(Env::of_process, target.into(), options)
    }

    pub(crate) fn connect_in(env: impl FnOnce() -> Result<Env>, target: Target, options: Options) -> Pending<Session> {
        let start = || {
            options.check()?;
            let env = env()?;
            let connection = options.connection();
            let address = target.parse(&connection)?;
            Ok((env, address, connection))
        };
        match start() {
            Ok((env, address, connection)) => {
                let io = env.clone();
                Pending::start(&env, async move {
                    // A certificate that cannot be read is an error at once, not at the first request.
                    if connection.has_files() {
                        let read = timeout(options.connect_timeout, connection.read_files()).await;
                        read.unwrap_or_else(|_| Err(files_do_not_answer(&connection, options.connect_timeout)))?;
                    }
                    let service = Service::of(&io, address, connection);
                    Session::open(service, options).await
                })
            }
            Err(error) => Pending::ready(Err(error)),
        }
    }

    async fn open(service: Arc<Service>, options: Options) -> Result<Session> {
        let mut last_trouble = None;
        let first = timeout(options.connect_timeout, async {
            let mut retry = Backoff::new();
            loop {
                match open_lease(&service, &options).await {
                    Ok(lease) => return Ok(lease),
                    Err(trouble @ (Trouble::Denied(_) | Trouble::Refused(_) | Trouble::Invalid(_))) => {
                        return Err(connect_error(&service.address, &trouble));
                    }
                    Err(trouble) => last_trouble = Some(trouble.to_string()),
                }
                retry.pause().await;
            }
        });
        let lease = match first.await {
            Ok(lease) => Arc::new(lease?),
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    format!(
                        "no etcd could be reached at {} within {:?}: {}; check that it runs there, or give another target",
                        service.address,
                        options.connect_timeout,
                        last_trouble.as_deref().unwrap_or("no answer")
                    ),
                ));
            }
        };
        let host = nix::unistd::gethostname().ok().and_then(|host| host.into_string().ok()).unwrap_or_else(|| "localhost".into());
        let core = Arc::new(SessionCore {
            owner: options.owner.clone().unwrap_or_else(|| format!("{host}:{}", std::process::id())),
            host,
            leases: Announced::new(LeaseState::Alive(lease.clone())),
            closing: Announced::new(false),
            ticket_numbers: AtomicU64::new(0),
            stats: Counters::default(),
            service,
            options,
        });
        {
            let mut sessions = core.service.env.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            sessions.retain(|session| session.strong_count() > 0);
            sessions.push(Arc::downgrade(&core));
        }
        core.service.env.spawn(core.clone().keep(lease));
        Ok(Session { handle: Arc::new(Handle { core }) })
    }

    pub(crate) fn core(&self) -> &Arc<SessionCore> {
        &self.handle.core
    }

    /// A mutex of this name. Cheap and local: nothing is sent. Mutexes of one name exclude each
    /// other, in one session or across the world.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) for a name that is empty, over 1,024 bytes, or has a NUL.
    pub fn mutex(&self, name: &str) -> Result<Mutex> {
        self.core().check_open()?;
        Ok(Mutex::new(self.handle.clone(), self.full_name(name)?))
    }

    pub(crate) fn full_name(&self, name: &str) -> Result<Arc<str>> {
        check_name(name)?;
        let full = format!("{}{name}", self.core().options.namespace);
        check_name(&full)?;
        Ok(full.into())
    }

    /// The TTL that the store granted, which may be longer than what was asked for.
    pub fn ttl(&self) -> Duration {
        self.core().lease_now().map_or(self.core().options.ttl, |lease| lease.ttl)
    }

    /// The id of the lease, which changes when the session had to get a new one; `None` while it
    /// has none. `etcdctl lease timetolive` takes it in hexadecimal.
    pub fn lease_id(&self) -> Option<i64> {
        self.core().lease_now().map(|lease| lease.id)
    }

    /// What the session has done so far.
    pub fn stats(&self) -> Stats {
        self.core().stats.read(self.core().service.store.traffic())
    }

    /// Releases all holds, revokes the lease and ends the session for all its clones. The result is
    /// there when the store has confirmed it, at the latest after `limit`.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) without a confirmation in time: closed here, and the
    /// lease ends by itself within its TTL.
    pub fn close(&self, limit: Duration) -> Pending<()> {
        let env = &self.core().service.env;
        if let Err(error) = env.check_fork() {
            return Pending::ready(Err(error));
        }
        self.core().start_closing();
        let core = self.core().clone();
        Pending::start(env, async move { core.closed_within(limit).await })
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lease = self.lease_id().map_or("none".to_owned(), |lease| format!("{lease:x}"));
        f.debug_struct("Session").field("target", &self.core().service.address).field("lease", &format_args!("{lease}")).finish()
    }
}

/// Closes every session of this process, for its end: at most `limit` in all. Returns whether all
/// of them confirmed it. In a forked child it does nothing.
pub fn shutdown(limit: Duration) -> bool {
    let Ok(env) = Env::of_process() else { return true };
    let sessions: Vec<_> = {
        let sessions = env.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().filter_map(Weak::upgrade).collect()
    };
    if sessions.is_empty() {
        return true;
    }
    sessions.iter().for_each(|session| session.start_closing());
    let all = Pending::start(&env, async move {
        let closed = async {
            for session in sessions {
                session.closed_within(Duration::MAX).await?;
            }
            Ok(())
        };
        timeout(limit, closed).await.unwrap_or_else(|_| Err(Error::cancelled()))
    });
    // The io thread keeps to the limit; the second one is for the case that it is gone.
    matches!(all.wait_for(limit.saturating_add(Duration::from_millis(200))), Some(Ok(())))
}

/// Tells a place that a waiter gave up, however that came about.
pub(crate) struct GivesUp<'a> {
    pub(crate) core: &'a SessionCore,
    pub(crate) name: &'a Arc<str>,
    pub(crate) waiter: WaiterId,
    pub(crate) answered: bool,
}

impl GivesUp<'_> {
    /// Tells it now and waits a moment until nothing is left of the waiter.
    pub(crate) async fn now(mut self) {
        self.answered = true;
        let (tell, done) = oneshot::channel();
        self.core.service.submit(self.name, Command::GaveUp(self.waiter, Some(tell)));
        let _ = timeout(Duration::from_millis(50), done).await;
    }
}

impl Drop for GivesUp<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.core.service.submit(self.name, Command::GaveUp(self.waiter, None));
        }
    }
}
