//! The store of `memory:` targets: in this process, for tests and for use on one machine.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{
    Ahead, Change, Changes, Entered, Entry, Follow, Guarded, GuardedAnswer, LeaseId, Leaving, Left, Look, NEAR, Reply, Revision,
    Store, Ticket, Trouble, is_contender, name_of_contender,
};
use crate::runtime::Env;
use crate::stats::Traffic;

pub(crate) struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
    requests: AtomicU64,
    env: Env,
}

#[derive(Default)]
struct Inner {
    revision: Revision,
    last_lease: LeaseId,
    leases: HashMap<LeaseId, Lease>,
    /// Tickets and guarded values alike, as in etcd.
    keys: BTreeMap<Vec<u8>, Value>,
    followers: Vec<(Follow, mpsc::UnboundedSender<Change>)>,
}

struct Lease {
    ttl: Duration,
    expires: Duration,
    timer: AbortHandle,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

struct Value {
    created: Revision,
    lease: Option<LeaseId>,
    bytes: Vec<u8>,
}

impl Inner {
    fn delete(&mut self, key: &[u8]) {
        self.revision += 1;
        self.keys.remove(key);
        let Ok(key) = std::str::from_utf8(key) else { return };
        let revision = self.revision;
        self.followers.retain(|(what, follower)| {
            let hears = match what {
                Follow::Queue(name) => is_contender(name, key.as_bytes()),
                Follow::Ticket(ticket) | Follow::Own { key: ticket, .. } => ticket == key,
            };
            if hears { follower.send(Change::Gone { key: key.to_owned(), revision }).is_ok() } else { !follower.is_closed() }
        });
    }

    /// Without a lease, whatever was there before.
    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.revision += 1;
        let created = self.keys.get(key).map_or(self.revision, |old| old.created);
        self.keys.insert(key.to_vec(), Value { created, lease: None, bytes: value.to_vec() });
        for (what, follower) in &self.followers {
            if let Follow::Own { key: own, .. } = what
                && own.as_bytes() == key
            {
                let _ = follower.send(Change::Overwritten);
            }
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let keys: Vec<_> = self.keys.iter().filter(|(_, v)| v.lease == Some(lease)).map(|(k, _)| k.clone()).collect();
        keys.iter().for_each(|key| self.delete(key));
    }

    fn token(&self, key: &str) -> Option<Revision> {
        self.keys.get(key.as_bytes()).map(|value| value.created)
    }

    fn queue(&self, name: &str) -> Vec<(&[u8], &Value)> {
        let prefix = format!("{name}/").into_bytes();
        let mut queue: Vec<_> = self
            .keys
            .range(prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&prefix))
            .filter(|(key, _)| is_contender(name, key))
            .map(|(key, value)| (key.as_slice(), value))
            .collect();
        queue.sort_by_key(|(_, value)| value.created);
        queue
    }

    fn ahead(&self, name: &str, token: Revision) -> Ahead {
        let keys = self.queue(name).into_iter().rev().filter(|(_, value)| value.created < token);
        let keys = keys.take(NEAR + 1).map(|(key, _)| String::from_utf8_lossy(key).into_owned()).collect();
        Ahead { revision: self.revision, keys: Some(keys) }
    }

    fn enter(&mut self, ticket: &Ticket) -> Result<Entered, Trouble> {
        if !self.leases.contains_key(&ticket.lease) {
            return Err(Trouble::LeaseGone);
        }
        let token = self.token(&ticket.key).unwrap_or_else(|| {
            self.revision += 1;
            let value = Value { created: self.revision, lease: Some(ticket.lease), bytes: ticket.value.as_bytes().to_vec() };
            self.keys.insert(ticket.key.clone().into_bytes(), value);
            self.revision
        });
        Ok(Entered { token, ahead: self.ahead(&ticket.name, token) })
    }
}

fn entry(key: &[u8], value: &Value) -> Entry {
    Entry {
        key: String::from_utf8_lossy(key).into_owned(),
        revision: value.created,
        lease: value.lease.unwrap_or(0),
        value: value.bytes.clone(),
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryStore {
    pub(crate) fn new(env: Env) -> Self {
        MemoryStore { inner: Arc::default(), requests: AtomicU64::new(0), env }
    }

    /// One request: counted, and with leases that have run out ended first.
    fn request<T: Send + 'static>(&self, answer: impl FnOnce(&mut Inner) -> Result<T, Trouble>) -> Reply<'_, T> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let answer = answer(&mut lock(&self.inner));
        Box::pin(std::future::ready(answer))
    }

    /// Ends the lease when its time has come, unless it was renewed.
    fn expire(&self, lease: LeaseId) -> AbortHandle {
        let (inner, env) = (Arc::downgrade(&self.inner), self.env.clone());
        self.env.spawn(async move {
            while let Some(inner) = inner.upgrade() {
                let left = {
                    let mut inner = lock(&inner);
                    let Some(known) = inner.leases.get(&lease) else { return };
                    let left = known.expires.saturating_sub(env.now());
                    if left.is_zero() {
                        inner.end_lease(lease);
                        return;
                    }
                    left
                };
                drop(inner);
                tokio::time::sleep(left).await;
            }
        })
    }
}

impl Store for MemoryStore {
    fn open_lease(&self, ttl_seconds: i64) -> Reply<'_, (LeaseId, Duration)> {
        let ttl = Duration::from_secs(ttl_seconds.unsigned_abs());
        let expires = self.env.now() + ttl;
        let id = {
            let mut inner = lock(&self.inner);
            inner.last_lease += 1;
            inner.last_lease
        };
        let timer = self.expire(id);
        self.request(|inner| {
            inner.leases.insert(id, Lease { ttl, expires, timer });
            Ok((id, ttl))
        })
    }

    fn renew_lease(&self, lease: LeaseId, _limit: Duration, _hurry_from: Duration) -> Reply<'_, ()> {
        let now = self.env.now();
        self.request(|inner| {
            let lease = inner.leases.get_mut(&lease).ok_or(Trouble::LeaseGone)?;
            lease.expires = now + lease.ttl;
            Ok(())
        })
    }

    fn close_lease(&self, lease: LeaseId) -> Reply<'_, ()> {
        self.request(|inner| {
            inner.end_lease(lease);
            Ok(())
        })
    }

    fn enter<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Entered> {
        self.request(|inner| inner.enter(ticket))
    }

    fn enter_if_free<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Option<Entered>> {
        self.request(|inner| {
            if inner.queue(&ticket.name).iter().any(|(key, _)| *key != ticket.key.as_bytes()) {
                return Ok(None);
            }
            inner.enter(ticket).map(Some)
        })
    }

    fn leave<'a>(&'a self, leaving: Leaving<'a>) -> Reply<'a, Left> {
        self.request(|inner| {
            let key = &leaving.ticket.key;
            let was_present = match leaving.token {
                Some(token) => inner.token(key) == Some(token),
                None => inner.token(key).is_some(),
            };
            if leaving.next.is_some_and(|next| !inner.leases.contains_key(&next.lease)) {
                return Err(Trouble::LeaseGone);
            }
            // Requests are never late here, so there is nothing to void.
            if was_present {
                inner.delete(key.as_bytes());
            }
            let next = match leaving.next {
                Some(next) if was_present => Some(inner.enter(next)?),
                _ => None,
            };
            Ok(Left { was_present, next })
        })
    }

    fn look<'a>(&'a self, ticket: &'a Ticket, token: Revision, _since: Option<Revision>) -> Reply<'a, Look> {
        self.request(|inner| {
            let mine = inner.keys.get(ticket.key.as_bytes()).filter(|value| value.created == token);
            let overwritten = mine.is_some_and(|value| value.lease != Some(ticket.lease));
            Ok(Look { present: mine.is_some(), overwritten, ahead: inner.ahead(&ticket.name, token) })
        })
    }

    fn put_right<'a>(&'a self, ticket: &'a Ticket, token: Revision) -> Reply<'a, ()> {
        self.request(|inner| {
            let mine = inner.keys.get_mut(ticket.key.as_bytes()).filter(|value| value.created == token);
            if let Some(mine) = mine {
                (mine.lease, mine.bytes) = (Some(ticket.lease), ticket.value.as_bytes().to_vec());
            }
            Ok(())
        })
    }

    fn follow(&self, what: Follow) -> Changes {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = mpsc::unbounded_channel();
        let mut inner = lock(&self.inner);
        let _ = tx.send(Change::Since(inner.revision));
        inner.followers.push((what, tx));
        Changes::new(rx, || ())
    }

    fn guarded<'a>(&'a self, ticket: &'a Ticket, token: Revision, what: &'a Guarded) -> Reply<'a, GuardedAnswer> {
        self.request(|inner| {
            if inner.token(&ticket.key) != Some(token) {
                return Ok(GuardedAnswer::NotOwner);
            }
            Ok(GuardedAnswer::Applied(match what {
                Guarded::Put { key, value } => {
                    inner.put(key, value);
                    None
                }
                Guarded::Get { key } => inner.keys.get(key).map(|value| value.bytes.clone()),
                Guarded::Delete { key } => {
                    inner.delete(key);
                    None
                }
            }))
        })
    }

    fn contenders<'a>(&'a self, name: &'a str) -> Reply<'a, Vec<Entry>> {
        self.request(|inner| Ok(inner.queue(name).into_iter().map(|(key, value)| entry(key, value)).collect()))
    }

    fn all_contenders<'a>(&'a self, prefix: &'a str) -> Reply<'a, Vec<Entry>> {
        self.request(|inner| {
            let keys = inner.keys.range(prefix.as_bytes().to_vec()..).take_while(|(key, _)| key.starts_with(prefix.as_bytes()));
            let mut entries: Vec<_> =
                keys.filter(|(_, value)| value.lease.is_some()).map(|(key, value)| entry(key, value)).collect();
            entries.retain(|entry| name_of_contender(&entry.key).is_some());
            entries.sort_by_key(|entry| entry.revision);
            Ok(entries)
        })
    }

    fn traffic(&self) -> Traffic {
        Traffic { requests: self.requests.load(Ordering::Relaxed), ..Traffic::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pending::Pending;

    #[test]
    fn a_closed_lease_leaves_no_timer() {
        let env = Env::of_process().unwrap();
        let store = MemoryStore::new(env.clone());
        let opened_and_closed = Pending::start(&env, async move {
            let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
            let before = tasks();
            for _ in 0..1000 {
                let (lease, _) = store.open_lease(3600).await.unwrap();
                store.close_lease(lease).await.unwrap();
            }
            tokio::task::yield_now().await;
            Ok((before, tasks()))
        });
        let (before, after) = opened_and_closed.wait().unwrap();
        // Other tests use the same thread.
        assert!(after < before + 500, "{before} tasks before, {after} after");
    }
}
