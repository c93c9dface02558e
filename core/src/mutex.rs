//! One name, seen by one session.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::error::{Error, ErrorKind, Result};
use crate::grant::{Command, HoldCore, Waiter};
use crate::hold::Hold;
use crate::keeper::Keeper;
use crate::options::DEFAULT_REQUEST_TIMEOUT;
use crate::pending::Pending;
use crate::proto::WaiterId;
use crate::service::Service;
use crate::session::{Handle, Session};

/// A distributed mutex of one name. Not re-entrant. Clones are the same mutex; any number of
/// threads and tasks may use it, and each `lock()` waits its turn.
#[derive(Clone)]
pub struct Mutex {
    inner: Arc<Inner>,
}

struct Inner {
    handle: Arc<Handle>,
    name: Arc<str>,
    holds: std::sync::Mutex<Holds>,
}

#[derive(Default)]
struct Holds {
    /// The latest hold that came through this mutex.
    latest: Weak<HoldCore>,
    /// A hold that the mutex keeps for callers without a place of their own for it.
    kept: Option<Hold>,
}

impl Inner {
    fn holds(&self) -> std::sync::MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn core(&self) -> &Arc<Keeper> {
        &self.handle.core
    }

    fn service(&self) -> &Arc<Service> {
        &self.handle.service
    }

    fn held(&self) -> Option<Arc<HoldCore>> {
        // In a forked child nothing is held, and the lock may be another thread's for ever.
        if self.core().cluster.env.is_forked() {
            return None;
        }
        self.holds().latest.upgrade().filter(|hold| !hold.is_released())
    }

    /// Waits for the lock at most `limit`. `None` if it is taken and `only_try`.
    async fn acquire(&self, only_try: bool, limit: Option<Duration>) -> Result<Option<Hold>> {
        // Boxed, and only if somebody listens, because there can be thousands of waiters.
        let _span = tracing::span_enabled!(target: "etcdlock::acquire", tracing::Level::DEBUG)
            .then(|| Box::new(tracing::debug_span!(target: "etcdlock::acquire", "acquire", name = &*self.name, only_try)));
        let core = self.core();
        core.check_open()?;
        let (reply, mut answer) = oneshot::channel();
        let service = self.service();
        let id = service.waiter_id();
        service.submit(&self.name, Command::Lock(Waiter { id, session: core.clone(), only_try, reply }));
        let mut gives_up = GivesUp { service, name: &self.name, waiter: id, answered: false };
        // Boxed, because most wait without a limit, and there can be thousands.
        let mut limit_is_up = limit.map(|limit| Box::pin(sleep(limit)));
        let answered = tokio::select! {
            biased;
            answered = &mut answer => Some(answered),
            // Another session of this process may have the lock, and its queue goes on.
            () = core.closing() => return Err(core.closed()),
            () = async { match &mut limit_is_up { Some(limit) => limit.await, None => std::future::pending().await } } => {
                // Either it is granted by now, or it never will be.
                answer.close();
                answer.try_recv().ok().map(Ok)
            }
        };
        let Some(answered) = answered else {
            let error = self.out_of_time(only_try, limit.unwrap_or_default());
            gives_up.now().await;
            return Err(error);
        };
        gives_up.answered = true;
        let granted = answered.map_err(|_| Error::internal(format!("the queue of {:?} is gone", self.name)))??;
        let hold = granted.map(Hold::new);
        if let Some(hold) = &hold {
            core.stats.locks.add();
            self.holds().latest = Arc::downgrade(hold.core());
        }
        Ok(hold)
    }

    fn out_of_time(&self, only_try: bool, limit: Duration) -> Error {
        let (name, address, because) = (&self.name, &self.core().cluster.address, self.core().cluster.because_of_trouble());
        if only_try {
            let text = format!("no answer from {address} within {limit:?} for a try of the lock {name:?}{because}");
            return Error::new(ErrorKind::Unavailable, text);
        }
        let text = if limit.is_zero() {
            format!("the lock {name:?} at {address} is not free: others hold it or are ahead; inspect() tells who")
        } else if self.service().is_taken(name) {
            let who = "others hold it or are ahead in the queue; inspect() tells who";
            format!("the lock {name:?} at {address} was not free within {limit:?}: {who}{because}")
        } else {
            format!("the lock {name:?} at {address} could not be taken within {limit:?}: no answer yet{because}")
        };
        Error::new(ErrorKind::Timeout, text)
    }

    async fn lock(&self, limit: Option<Duration>) -> Result<Hold> {
        if limit.is_some_and(|limit| limit.is_zero()) {
            return self.try_lock().await?.ok_or_else(|| self.out_of_time(false, Duration::ZERO));
        }
        self.acquire(false, limit).await?.ok_or_else(|| Error::internal("a lock without a hold"))
    }

    async fn try_lock(&self) -> Result<Option<Hold>> {
        self.acquire(true, Some(DEFAULT_REQUEST_TIMEOUT)).await
    }

    /// Whether a try is lost already, known without asking anybody.
    fn is_busy_here(&self) -> bool {
        self.service().is_busy(&self.name)
    }
}

/// Tells a queue that a waiter gave up, however that came about.
struct GivesUp<'a> {
    service: &'a Arc<Service>,
    name: &'a Arc<str>,
    waiter: WaiterId,
    answered: bool,
}

impl GivesUp<'_> {
    /// Tells it now and waits a moment until nothing is left of the waiter.
    async fn now(mut self) {
        self.answered = true;
        let (tell, done) = oneshot::channel();
        self.service.submit(self.name, Command::GaveUp(self.waiter, Some(tell)));
        let _ = timeout(Duration::from_millis(50), done).await;
    }
}

impl Drop for GivesUp<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.service.submit(self.name, Command::GaveUp(self.waiter, None));
        }
    }
}

impl Session {
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
}

impl Mutex {
    pub(crate) fn new(handle: Arc<Handle>, name: Arc<str>) -> Self {
        Mutex { inner: Arc::new(Inner { handle, name, holds: Default::default() }) }
    }

    fn start<T: Send + 'static, F>(&self, call: impl FnOnce(Arc<Inner>) -> F) -> Pending<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        if let Err(error) = self.inner.core().check_open() {
            return Pending::ready(Err(error));
        }
        Pending::start(&self.inner.core().cluster.env, call(self.inner.clone()))
    }

    /// The name, with the session's namespace.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Waits its turn, through outages and re-elections, until the lock is held.
    ///
    /// # Errors
    ///
    /// [`Denied`](ErrorKind::Denied), [`Closed`](ErrorKind::Closed), [`Forked`](ErrorKind::Forked),
    /// or [`Unavailable`](ErrorKind::Unavailable) if etcd refuses for a reason that waiting does not
    /// mend, such as a full database.
    ///
    /// # Cancel safety
    ///
    /// Dropping the result gives the place in the queue up and leaves nothing behind.
    pub fn lock(&self) -> Pending<Hold> {
        self.start(|inner| async move { inner.lock(None).await })
    }

    /// Like [`lock`](Self::lock), for at most `limit`; zero is one try, which takes
    /// one request if nobody here holds the lock (at most 5 s when nothing answers).
    ///
    /// # Errors
    ///
    /// [`Timeout`](ErrorKind::Timeout) after `limit`, with nothing left behind. Else as with
    /// [`lock`](Self::lock).
    pub fn lock_timeout(&self, limit: Duration) -> Pending<Hold> {
        if limit.is_zero() && self.inner.core().check_open().is_ok() && self.inner.is_busy_here() {
            return Pending::ready(Err(self.inner.out_of_time(false, limit)));
        }
        self.start(move |inner| async move { inner.lock(Some(limit)).await })
    }

    /// Takes the lock if it is free; `None` if somebody holds it. Never waits for other holders: it
    /// is one request, or none if this process has the lock itself. A failed try writes nothing.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) without an answer within 5 s. Else as with
    /// [`lock`](Self::lock).
    pub fn try_lock(&self) -> Pending<Option<Hold>> {
        if self.inner.core().check_open().is_ok() && self.inner.is_busy_here() {
            return Pending::ready(Ok(None));
        }
        self.start(|inner| async move { inner.try_lock().await })
    }

    /// For callers that have no place to keep a [`Hold`], such as C or a `threading.Lock`: locks for
    /// at most `limit` (`None`: for ever) and lets the mutex keep the hold until
    /// [`unlock`](Self::unlock). The result is the token.
    pub fn lock_and_keep(&self, limit: Option<Duration>) -> Pending<i64> {
        self.start(move |inner| async move {
            let hold = inner.lock(limit).await?;
            Ok(keep(&inner, hold))
        })
    }

    /// [`try_lock`](Self::try_lock), with the hold kept as by [`lock_and_keep`](Self::lock_and_keep).
    pub fn try_lock_and_keep(&self) -> Pending<Option<i64>> {
        if self.inner.core().check_open().is_ok() && self.inner.is_busy_here() {
            return Pending::ready(Ok(None));
        }
        self.start(|inner| async move { Ok(inner.try_lock().await?.map(|hold| keep(&inner, hold))) })
    }

    /// Releases the hold that was acquired through this mutex.
    ///
    /// # Errors
    ///
    /// [`NotHeld`](ErrorKind::NotHeld) if there is none. Else as with [`Hold::unlock`].
    pub fn unlock(&self) -> Pending<()> {
        if let Err(error) = self.inner.core().cluster.env.check_fork() {
            return Pending::ready(Err(error));
        }
        let (hold, kept) = {
            let mut holds = self.inner.holds();
            let hold = holds.latest.upgrade().filter(|hold| !hold.is_released());
            // Taken before the release: after it, the one that is kept can be the next waiter's.
            let kept = holds.kept.take_if(|kept| hold.as_ref().is_some_and(|hold| Arc::ptr_eq(hold, kept.core())));
            (hold, kept)
        };
        match hold {
            Some(hold) => {
                let done = hold.unlock();
                // Only now, so that its drop finds it released.
                drop(kept);
                done
            }
            None => Pending::ready(Err(Error::new(
                ErrorKind::NotHeld,
                format!("the lock {:?} is not held through this mutex, so there is nothing to release", self.inner.name),
            ))),
        }
    }

    /// Whether this mutex holds the lock; see [`Hold::is_held`].
    pub fn is_held(&self) -> bool {
        self.inner.held().is_some_and(|hold| hold.is_held())
    }

    /// See [`Hold::remaining`]; zero if this mutex holds nothing.
    pub fn remaining(&self) -> Duration {
        self.inner.held().map_or(Duration::ZERO, |hold| hold.remaining())
    }

    /// The fencing token of the hold of this mutex, even after its loss until it is unlocked; `None`
    /// if there is none.
    pub fn token(&self) -> Option<i64> {
        self.inner.held().map(|hold| hold.token())
    }

    /// Runs `with` on the hold that the mutex keeps, if there is one.
    pub fn with_kept<T>(&self, with: impl FnOnce(&Hold) -> T) -> Option<T> {
        let holds = self.inner.holds();
        holds.kept.as_ref().filter(|hold| !hold.core().is_released()).map(with)
    }
}

fn keep(inner: &Inner, hold: Hold) -> i64 {
    let token = hold.token();
    // A hold that was lost before and is replaced now is dropped outside the lock.
    let replaced = inner.holds().kept.replace(hold);
    drop(replaced);
    token
}

impl std::fmt::Debug for Mutex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mutex").field("name", &self.inner.name).field("held", &self.is_held()).finish()
    }
}
