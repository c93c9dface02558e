//! A lock service as this process uses it: one store, and the process's places in its queues.
//! Sessions of the same target and credentials share it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::driver::{Command, Driver};
use crate::options::{Address, Connection};
use crate::proto::WaiterId;
use crate::runtime::Env;
use crate::store::Store;
use crate::store::etcd::EtcdStore;
use crate::store::memory::MemoryStore;

pub(crate) struct Service {
    pub(crate) env: Env,
    pub(crate) store: Arc<dyn Store>,
    /// The target, for messages.
    pub(crate) address: String,
    places: Mutex<HashMap<Arc<str>, Door>>,
    last_waiter: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// The way to a place.
struct Door {
    commands: UnboundedSender<Command>,
    state: Arc<DoorState>,
}

/// What may be known of a place without asking it.
#[derive(Default)]
pub(crate) struct DoorState {
    /// Somebody here holds the lock or waits for it.
    pub(crate) busy: AtomicBool,
    /// The store has answered that the lock is taken, or it is held here.
    pub(crate) taken: AtomicBool,
}

/// The services in use by this process.
pub(crate) type Services = Mutex<HashMap<(Address, Connection), Weak<Service>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// The service of a target, shared with the sessions that use it already.
    pub(crate) fn of(env: &Env, address: Address, connection: Connection) -> Arc<Service> {
        let mut services = lock(&env.services);
        services.retain(|_, service| service.strong_count() > 0);
        // Memory has no credentials, and the same name is the same place.
        let connection = if matches!(address, Address::Memory(_)) { Connection::default() } else { connection };
        let key = (address, connection);
        if let Some(service) = services.get(&key).and_then(Weak::upgrade) {
            return service;
        }
        let store: Arc<dyn Store> = match &key.0 {
            Address::Memory(_) => Arc::new(MemoryStore::new(env.clone())),
            Address::Etcd(urls) => Arc::new(EtcdStore::new(urls, &key.1, env.clone())),
        };
        let service = Arc::new(Service {
            env: env.clone(),
            store,
            address: key.0.to_string(),
            places: Mutex::default(),
            last_waiter: AtomicU64::new(0),
            trouble: Mutex::default(),
        });
        services.insert(key, Arc::downgrade(&service));
        service
    }

    /// By which a waiter gives up.
    pub(crate) fn waiter_id(&self) -> WaiterId {
        self.last_waiter.fetch_add(1, Ordering::Relaxed)
    }

    /// Passes a command to the place of a name. A waiter makes the place if there is none; to
    /// anything else an absent place has nothing to say.
    pub(crate) fn submit(self: &Arc<Self>, name: &Arc<str>, command: Command) {
        let mut places = lock(&self.places);
        if let Some(door) = places.get(name) {
            // The place takes itself off the list before it stops listening.
            let _ = door.commands.send(command);
        } else if matches!(command, Command::Lock(_)) {
            let (commands, inbox) = unbounded_channel();
            let state = Arc::new(DoorState { busy: AtomicBool::new(true), ..DoorState::default() });
            let _ = commands.send(command);
            places.insert(name.clone(), Door { commands, state: state.clone() });
            self.env.spawn(Driver::new(self.clone(), name.clone(), inbox, state).run());
        }
    }

    /// Whether this process holds the name or waits for it: then a try need not ask the store.
    pub(crate) fn is_busy(&self, name: &str) -> bool {
        lock(&self.places).get(name).is_some_and(|door| door.state.busy.load(Ordering::Acquire))
    }

    /// Whether somebody is known to have the lock.
    pub(crate) fn is_taken(&self, name: &str) -> bool {
        lock(&self.places).get(name).is_some_and(|door| door.state.taken.load(Ordering::Acquire))
    }

    /// Takes a place with nothing to do off the list; false if a command has just come in.
    pub(crate) fn retire(&self, name: &str, inbox: &UnboundedReceiver<Command>) -> bool {
        let mut places = lock(&self.places);
        if !inbox.is_empty() {
            return false;
        }
        places.remove(name);
        true
    }

    pub(crate) fn forget(&self, name: &str) {
        lock(&self.places).remove(name);
    }

    /// Remembers what went wrong last, for the message of a call that runs out of time.
    pub(crate) fn note_trouble(&self, trouble: Option<String>) {
        *lock(&self.trouble) = trouble;
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }
}
