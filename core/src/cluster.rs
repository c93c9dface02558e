//! A lock service as this process reaches it: its store, and what went wrong with it last.

use std::sync::{Arc, Mutex, PoisonError};

use crate::options::{Address, Connection};
use crate::runtime::Env;
use crate::store::Store;
use crate::store::etcd::EtcdStore;
use crate::store::memory::MemoryStore;

pub(crate) struct Cluster {
    pub(crate) env: Env,
    pub(crate) store: Arc<dyn Store>,
    /// The target, for messages.
    pub(crate) address: String,
    trouble: Mutex<Option<String>>,
}

impl Cluster {
    pub(crate) fn open(env: &Env, address: &Address, connection: &Connection) -> Arc<Cluster> {
        let store: Arc<dyn Store> = match address {
            Address::Memory(_) => Arc::new(MemoryStore::new(env.clone())),
            Address::Etcd(urls) => Arc::new(EtcdStore::new(urls, connection, env.clone())),
        };
        Arc::new(Cluster { env: env.clone(), store, address: address.to_string(), trouble: Mutex::default() })
    }

    /// Remembers what went wrong last, for the message of a call that runs out of time.
    pub(crate) fn note_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// `: what went wrong last`, or nothing.
    pub(crate) fn because_of_trouble(&self) -> String {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().map(|why| format!(" (last trouble: {why})")).unwrap_or_default()
    }
}
