//! A session as its user sees it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, Result};
use crate::keeper::{Keeper, connect_error, open_lease};
use crate::options::{Connection, Options, Target, check_name};
use crate::pending::Pending;
use crate::process;
use crate::runtime::Env;
use crate::service::Service;
use crate::stats::Stats;
use crate::store::Trouble;

/// A connection to where locks live, with one lease that is renewed until the session is closed.
///
/// Any number of mutexes, threads and tasks may share a session. If its lease is lost, its holds
/// are lost, and the session gets itself a new lease: waiters go on waiting and new locks work.
/// Clones are the same session. It is closed in the background when the last clone and the last
/// mutex made from it are dropped; [`close`](Self::close) waits for that.
#[derive(Clone)]
pub struct Session {
    pub(crate) handle: Arc<Handle>,
}

/// The user's side of a session: when it goes, the session is closed.
pub(crate) struct Handle {
    pub(crate) core: Arc<Keeper>,
    pub(crate) service: Arc<Service>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.core.cluster.env.is_forked() {
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
                    let service = process::service_of(&io, address, connection);
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
                match open_lease(&service.cluster, &options).await {
                    Ok(lease) => return Ok(lease),
                    Err(trouble @ (Trouble::Denied(_) | Trouble::Refused(_) | Trouble::Invalid(_))) => {
                        return Err(connect_error(&service.cluster.address, &trouble));
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
                        service.cluster.address,
                        options.connect_timeout,
                        last_trouble.as_deref().unwrap_or("no answer")
                    ),
                ));
            }
        };
        let core = Arc::new(Keeper::new(service.cluster.clone(), options, lease.clone()));
        process::note_session(&core);
        core.cluster.env.spawn(core.clone().keep(lease));
        Ok(Session { handle: Arc::new(Handle { core, service }) })
    }

    pub(crate) fn core(&self) -> &Arc<Keeper> {
        &self.handle.core
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
        self.core().stats.read(self.core().cluster.store.traffic())
    }

    /// Releases all holds, revokes the lease and ends the session for all its clones. The result is
    /// there when the store has confirmed it, at the latest after `limit`.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) without a confirmation in time: closed here, and the
    /// lease ends by itself within its TTL.
    pub fn close(&self, limit: Duration) -> Pending<()> {
        let env = &self.core().cluster.env;
        if let Err(error) = env.check_fork() {
            return Pending::ready(Err(error));
        }
        self.core().start_closing();
        let core = self.core().clone();
        Pending::start(env, async move { core.closed_within(limit).await })
    }
}

/// A pipe that nobody writes to, or a file on a server that is gone.
fn files_do_not_answer(connection: &Connection, limit: Duration) -> Error {
    let files = connection.files().join(", ");
    Error::new(ErrorKind::Unavailable, format!("the certificates could not be read within {limit:?}: {files}"))
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lease = self.lease_id().map_or("none".to_owned(), |lease| format!("{lease:x}"));
        f.debug_struct("Session").field("target", &self.core().cluster.address).field("lease", &format_args!("{lease}")).finish()
    }
}
