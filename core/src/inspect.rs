//! Who holds a lock and who waits for it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, Result};
use crate::keeper::Keeper;
use crate::options::DEFAULT_REQUEST_TIMEOUT;
use crate::owner::OwnerInfo;
use crate::pending::Pending;
use crate::session::Session;
use crate::store::{Entry, Reply, Trouble, name_of_contender};

/// One who holds a lock or waits for it, as [`Session::inspect`] shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Contender {
    /// Whether this one is first in the queue, and so holds the lock.
    pub is_holder: bool,
    /// The owner's label; empty for entries of other clients.
    pub owner: String,
    /// The host it runs on; empty if unknown.
    pub host: String,
    /// Its process id; 0 if unknown.
    pub pid: u32,
    /// The language it is written in; empty if unknown.
    pub language: String,
    /// The fencing token it has, or will have when it holds the lock.
    pub token: i64,
    /// How long ago it entered the queue, by the clocks of the two machines; `None` if unknown.
    pub age: Option<Duration>,
    /// Its key in the store.
    pub key: String,
    /// The lease that its key goes with; 0 if it has none, because somebody else wrote it: then it stays until it is deleted.
    pub lease_id: i64,
}

/// One name with its contenders, as [`Session::list`] shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Queue {
    /// The name of the lock, without the session's namespace.
    pub name: String,
    /// The holder, then the waiters in their order.
    pub contenders: Vec<Contender>,
}

impl Contender {
    fn new(is_holder: bool, entry: Entry) -> Self {
        let owner: OwnerInfo<'_> = serde_json::from_slice(&entry.value).unwrap_or_default();
        let age = (owner.since > 0).then(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            now.saturating_sub(Duration::from_millis(owner.since))
        });
        Contender {
            is_holder,
            owner: owner.owner.into_owned(),
            host: owner.host.into_owned(),
            pid: owner.pid,
            language: owner.language.into_owned(),
            token: entry.revision,
            age,
            key: entry.key,
            lease_id: entry.lease,
        }
    }

    /// The queue of one name, oldest first.
    fn queue(entries: Vec<Entry>) -> Vec<Contender> {
        entries.into_iter().enumerate().map(|(place, entry)| Contender::new(place == 0, entry)).collect()
    }
}

impl Keeper {
    /// Asks until there is an answer, for a few seconds.
    async fn look<'a, T>(&'a self, prefix: &str, ask: impl Fn() -> Reply<'a, T>) -> Result<T> {
        let mut retry = Backoff::new();
        let looking = timeout(DEFAULT_REQUEST_TIMEOUT, async {
            loop {
                match ask().await {
                    Ok(answer) => return Ok(answer),
                    Err(trouble @ Trouble::Unavailable(_)) => self.cluster.note_trouble(Some(trouble.to_string())),
                    Err(Trouble::Denied(why)) => {
                        let address = &self.cluster.address;
                        let text = format!(
                            "{address} refuses to show {prefix:?}: {why}; the user needs the right to read all that begins so"
                        );
                        return Err(Error::new(ErrorKind::Denied, text));
                    }
                    Err(trouble) => return Err(self.connect_error(&trouble)),
                }
                retry.pause().await;
            }
        });
        looking.await.unwrap_or_else(|_| {
            let (address, because) = (&self.cluster.address, self.cluster.because_of_trouble());
            Err(Error::new(
                ErrorKind::Unavailable,
                format!("no answer from {address} within {DEFAULT_REQUEST_TIMEOUT:?}{because}"),
            ))
        })
    }
}

impl Session {
    /// Who holds the lock of this name and who waits for it, in the order of the queue. Entries of
    /// etcd's own clients show too, without the details that only ours give.
    pub fn inspect(&self, name: &str) -> Pending<Vec<Contender>> {
        let full_name = match self.core().check_open().and_then(|()| self.full_name(name)) {
            Ok(full_name) => full_name,
            Err(error) => return Pending::ready(Err(error)),
        };
        let core = self.core().clone();
        Pending::start(&self.core().cluster.env, async move {
            core.look(&full_name, || core.cluster.store.contenders(&full_name)).await.map(Contender::queue)
        })
    }

    /// All names that start with `prefix` and have a holder now, in the order of their names, with
    /// their contenders. The empty prefix is every name. What counts as a lock's key is told by its
    /// form and by its lease.
    pub fn list(&self, prefix: &str) -> Pending<Vec<Queue>> {
        if let Err(error) = self.core().check_open() {
            return Pending::ready(Err(error));
        }
        let core = self.core().clone();
        let prefix = format!("{}{prefix}", core.options.namespace);
        Pending::start(&self.core().cluster.env, async move {
            let entries = core.look(&prefix, || core.cluster.store.all_contenders(&prefix)).await?;
            let mut queues = std::collections::BTreeMap::<String, Vec<Entry>>::new();
            for entry in entries {
                if let Some(name) = name_of_contender(&entry.key).and_then(|name| name.strip_prefix(&core.options.namespace)) {
                    queues.entry(name.to_owned()).or_default().push(entry);
                }
            }
            Ok(queues.into_iter().map(|(name, entries)| Queue { name, contenders: Contender::queue(entries) }).collect())
        })
    }
}
