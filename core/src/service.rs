//! This process's queues at one lock service, by name. Sessions of the same target and credentials share it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::cluster::Cluster;
use crate::driver::{Driver, Hints, Queues};
use crate::grant::Command;
use crate::proto::WaiterId;

pub(crate) struct Service {
    pub(crate) cluster: Arc<Cluster>,
    queues: Mutex<HashMap<Arc<str>, QueueHandle>>,
    last_waiter: AtomicU64,
}

/// The way to a queue.
struct QueueHandle {
    commands: UnboundedSender<Command>,
    hints: Arc<Hints>,
}

impl Service {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Service {
        Service { cluster, queues: Mutex::default(), last_waiter: AtomicU64::new(0) }
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<Arc<str>, QueueHandle>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By which a waiter gives up.
    pub(crate) fn waiter_id(&self) -> WaiterId {
        self.last_waiter.fetch_add(1, Ordering::Relaxed)
    }

    /// Passes a command to the queue of a name. A waiter makes the queue if there is none; to anything else an absent one has
    /// nothing to say.
    pub(crate) fn submit(self: &Arc<Self>, name: &Arc<str>, command: Command) {
        let mut queues = self.queues();
        if let Some(queue) = queues.get(name) {
            // It takes itself off the list before it stops listening.
            let _ = queue.commands.send(command);
        } else if matches!(command, Command::Lock(_)) {
            let (commands, inbox) = unbounded_channel();
            let hints = Arc::new(Hints::busy());
            let _ = commands.send(command);
            let driver = Driver::new(self.cluster.clone(), name.clone(), (commands.clone(), inbox), hints.clone(), self.clone());
            queues.insert(name.clone(), QueueHandle { commands, hints });
            self.cluster.env.spawn(driver.run());
        }
    }

    /// Whether this process holds the name or waits for it: then a try need not ask the store.
    pub(crate) fn is_busy(&self, name: &str) -> bool {
        self.queues().get(name).is_some_and(|queue| queue.hints.busy.load(Ordering::Acquire))
    }

    /// Whether somebody is known to have the lock.
    pub(crate) fn is_taken(&self, name: &str) -> bool {
        self.queues().get(name).is_some_and(|queue| queue.hints.taken.load(Ordering::Acquire))
    }
}

impl Queues for Service {
    fn retire(&self, name: &str, inbox: &UnboundedReceiver<Command>) -> bool {
        let mut queues = self.queues();
        if !inbox.is_empty() {
            return false;
        }
        queues.remove(name);
        true
    }

    fn forget(&self, name: &str) {
        self.queues().remove(name);
    }
}
