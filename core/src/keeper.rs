//! A lease kept: renewed, opened anew after each loss, and ended with the session; and the tickets that are made under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::announced::Announced;
use crate::backoff::Backoff;
use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Loss, Result};
use crate::lease::Lease;
use crate::options::Options;
use crate::owner::OwnerInfo;
use crate::runtime::{AFTER_A_PANIC, catching};
use crate::sabotage::{Sabotage, is_on};
use crate::stats::Counters;
use crate::store::{LeaseId, Ticket, Trouble};

pub(crate) struct Keeper {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) options: Options,
    pub(crate) stats: Arc<Counters>,
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

impl Keeper {
    pub(crate) fn new(cluster: Arc<Cluster>, options: Options, lease: Arc<Lease>) -> Keeper {
        let host = nix::unistd::gethostname().ok().and_then(|host| host.into_string().ok()).unwrap_or_else(|| "localhost".into());
        Keeper {
            owner: options.owner.clone().unwrap_or_else(|| format!("{host}:{}", std::process::id())),
            host,
            leases: Announced::new(LeaseState::Alive(lease)),
            closing: Announced::new(false),
            ticket_numbers: AtomicU64::new(0),
            stats: Arc::default(),
            cluster,
            options,
        }
    }

    /// The lease, waiting for a new one after a loss.
    pub(crate) async fn lease(&self) -> Result<Arc<Lease>> {
        self.leases
            .find(|state| match state {
                LeaseState::Alive(lease) if lease.is_alive(self.cluster.env.now()) => Some(Ok(lease.clone())),
                LeaseState::Seeking(Some(refusal)) => Some(Err(refusal.clone())),
                LeaseState::Closed { .. } => Some(Err(self.closed())),
                LeaseState::Alive(_) | LeaseState::Seeking(None) => None,
            })
            .await
    }

    pub(crate) fn lease_now(&self) -> Option<Arc<Lease>> {
        match &*self.leases.now() {
            LeaseState::Alive(lease) if lease.is_alive(self.cluster.env.now()) => Some(lease.clone()),
            _ => None,
        }
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        self.cluster.env.check_fork()?;
        if *self.closing.now() { Err(self.closed()) } else { Ok(()) }
    }

    /// Waits until the session begins to close.
    pub(crate) async fn closing(&self) {
        self.closing.find(|closing| closing.then_some(())).await
    }

    pub(crate) fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, format!("the session at {} has been closed; connect anew", self.cluster.address))
    }

    /// A ticket under this lease. `n` tells it from others that we have in the queue: a mutex uses 0 and 1 in turn, because a
    /// hand-over takes out one and puts in the other, and uses them again and again: a key that was deleted stays in etcd's
    /// index until the next compaction and makes every later look at the queue slower.
    pub(crate) fn ticket(&self, lease: &Lease, name: &Arc<str>, n: u64) -> Ticket {
        let number = self.ticket_numbers.load(Ordering::Relaxed) + n;
        // The wall clock is for people only.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let owner = OwnerInfo {
            owner: self.owner.as_str().into(),
            host: self.host.as_str().into(),
            pid: std::process::id(),
            language: self.options.language.into(),
            since,
        };
        let value = serde_json::to_string(&owner).unwrap_or_default().into();
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
    pub(crate) async fn keep(self: Arc<Self>, first: Arc<Lease>) {
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
            let began = self.cluster.env.now();
            let loss = tokio::select! {
                biased;
                () = self.closing() => Loss::Closed,
                loss = lease.lost.lost() => loss,
                () = self.cluster.store.history_changed(lease.history) => Loss::HistoryChanged,
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
            self.cluster.env.spawn(async move { core.end(&old).await });
            let next = tokio::select! {
                biased;
                () = self.closing() => None,
                next = async {
                    // One that is over as soon as it began may never have been known, and the next would be no better.
                    if self.cluster.env.now().saturating_sub(began) < lease.ttl / 3 {
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
        let env = &self.cluster.env;
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
            match timeout(left, self.cluster.store.renew_lease(lease.id, limit, hurry_from)).await {
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
                    self.cluster.note_trouble(Some(trouble.to_string()));
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
            match open_lease(&self.cluster, &self.options).await {
                Ok(lease) => return Arc::new(lease),
                Err(trouble) => {
                    self.cluster.note_trouble(Some(trouble.to_string()));
                    if let Trouble::Denied(_) | Trouble::Refused(_) | Trouble::Invalid(_) = trouble {
                        self.leases.set(LeaseState::Seeking(Some(self.connect_error(&trouble))));
                    }
                }
            }
            retry.pause().await;
        }
    }

    pub(crate) fn connect_error(&self, trouble: &Trouble) -> Error {
        connect_error(&self.cluster.address, trouble)
    }

    async fn end(&self, lease: &Lease) {
        let until = lease.deadline().max(self.cluster.env.now()) + lease.ttl;
        end_lease(&self.cluster, lease.id, until).await;
    }

    pub(crate) fn start_closing(&self) {
        self.closing.set(true);
    }

    pub(crate) async fn closed_within(&self, limit: Duration) -> Result<()> {
        let gone = self.leases.find(|state| matches!(state, LeaseState::Closed { gone: true }).then_some(()));
        match timeout(limit, gone).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                format!(
                    "the session is closed here, but {} has not confirmed it within {limit:?}{}; its lease ends by itself within {:?}",
                    self.cluster.address,
                    self.cluster.because_of_trouble(),
                    self.options.ttl
                ),
            )),
        }
    }
}

pub(crate) fn connect_error(address: &str, trouble: &Trouble) -> Error {
    match trouble {
        Trouble::Denied(why) => {
            Error::new(ErrorKind::Denied, format!("{address} refuses the session: {why}; check user, password and certificates"))
        }
        Trouble::Invalid(why) => Error::invalid(format!("the target {address} cannot be used: {why}")),
        other => Error::new(ErrorKind::Unavailable, format!("{address} cannot be used: {other}")),
    }
}

/// Ends a lease, and with it every key that is still under it, as soon as the store can be reached.
/// Not longer than the lease can live.
async fn end_lease(cluster: &Cluster, lease: LeaseId, until: Duration) {
    let mut retry = Backoff::new();
    loop {
        match cluster.store.close_lease(lease).await {
            Ok(()) => return,
            Err(trouble) => cluster.note_trouble(Some(trouble.to_string())),
        }
        if cluster.env.now() >= until {
            return;
        }
        retry.pause().await;
    }
}

/// A lease that the store has granted. If nobody takes it, it is ended.
struct Granted {
    cluster: Arc<Cluster>,
    lease: Option<Lease>,
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            let cluster = self.cluster.clone();
            let until = lease.deadline().max(cluster.env.now()) + lease.ttl;
            self.cluster.env.spawn(async move { end_lease(&cluster, lease.id, until).await });
        }
    }
}

/// Opens a lease. A caller that goes meanwhile leaves none behind.
pub(crate) async fn open_lease(cluster: &Arc<Cluster>, options: &Options) -> Result<Lease, Trouble> {
    let (tx, granted) = oneshot::channel();
    let (opening, seconds) = (cluster.clone(), options.ttl_seconds());
    cluster.env.spawn(async move {
        let (asked, history) = (opening.env.now(), opening.store.history());
        let opened = opening.store.open_lease(seconds).await;
        let asked = if is_on(Sabotage::DeadlineFromReceipt) { opening.env.now() } else { asked };
        let granted =
            opened.map(|(id, ttl)| Granted { cluster: opening.clone(), lease: Some(Lease::granted(id, ttl, asked, history)) });
        let _ = tx.send(granted);
    });
    let gone = || Trouble::Unavailable("the request for a lease has ended without an answer".into());
    let mut granted = granted.await.unwrap_or_else(|_| Err(gone()))?;
    granted.lease.take().ok_or_else(gone)
}
