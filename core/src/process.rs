//! What one process has: its services by target and credentials, and its open sessions. After a fork the child has its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::timeout;

use crate::cluster::Cluster;
use crate::error::Error;
use crate::keeper::Keeper;
use crate::options::{Address, Connection};
use crate::pending::Pending;
use crate::runtime::Env;
use crate::service::Service;

#[derive(Default)]
struct Process {
    services: Mutex<HashMap<(Address, Connection), Weak<Service>>>,
    /// So that the end of the process can close them.
    sessions: Mutex<Vec<Weak<Keeper>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service of a target, shared with the sessions that use it already.
pub(crate) fn service_of(env: &Env, address: Address, connection: Connection) -> Arc<Service> {
    let mut services = lock(&env.of_those_above::<Process>().services);
    services.retain(|_, service| service.strong_count() > 0);
    // Memory has no credentials, and the same name is the same place.
    let connection = if matches!(address, Address::Memory(_)) { Connection::default() } else { connection };
    let key = (address, connection);
    if let Some(service) = services.get(&key).and_then(Weak::upgrade) {
        return service;
    }
    let service = Arc::new(Service::new(Cluster::open(env, &key.0, &key.1)));
    services.insert(key, Arc::downgrade(&service));
    service
}

pub(crate) fn note_session(keeper: &Arc<Keeper>) {
    let mut sessions = lock(&keeper.cluster.env.of_those_above::<Process>().sessions);
    sessions.retain(|session| session.strong_count() > 0);
    sessions.push(Arc::downgrade(keeper));
}

/// Closes every session of this process, for its end: at most `limit` in all. Returns whether all
/// of them confirmed it. In a forked child it does nothing.
pub fn shutdown(limit: Duration) -> bool {
    let Ok(env) = Env::of_process() else { return true };
    let sessions: Vec<_> = {
        let sessions = lock(&env.of_those_above::<Process>().sessions);
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
