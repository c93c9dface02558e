//! What must hold at every moment. It sees etcd's history as it is made, and asks each hold what it
//! says of itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Process;
use super::etcd::{Change, Revision};
use crate::grant::HoldCore;
use crate::store::name_of_contender;

/// Why something changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A request of this process.
    Request(usize),
    /// A client that is not ours.
    Peer,
    /// The TTL has run out.
    Expired,
    /// Somebody with etcdctl.
    Admin,
}

#[derive(Default)]
pub(super) struct Checker {
    names: BTreeMap<String, Name>,
    holds: Vec<Held>,
    last_hold: u64,
    last_wait: u64,
    pub(super) acquisitions: u64,
    pub(super) violations: Vec<String>,
}

#[derive(Default)]
struct Name {
    /// Every ticket that there ever was, by its create revision.
    tickets: BTreeMap<Revision, TicketSeen>,
    last_granted: Revision,
    last_written: Revision,
}

struct TicketSeen {
    gone: Option<(Revision, Cause)>,
}

struct Held {
    id: u64,
    name: String,
    token: Revision,
    lease: i64,
    process: Arc<Process>,
    core: Weak<HoldCore>,
    lost: bool,
    /// It has said once that it is not held.
    was_over: bool,
    /// Its key was taken away by an admin, which it can hear of only later.
    robbed: bool,
}

impl Held {
    /// Whether its holder believes that it owns the lock.
    fn is_held(&self) -> bool {
        !self.process.is_killed() && self.core.upgrade().is_some_and(|core| core.is_held())
    }

    fn is_released(&self) -> bool {
        self.core.upgrade().is_none_or(|core| core.is_released())
    }
}

/// One caller of `lock()`, for the order inside a process.
pub(super) struct Wait {
    pub(super) id: u64,
    name: String,
    process: usize,
    /// On the simulation's clock, with a limit.
    until: Option<Duration>,
}

/// The waits in the order in which they began.
#[derive(Default)]
pub(super) struct Waits(Vec<Wait>);

impl Waits {
    pub(super) fn begin(&mut self, checker: &mut Checker, name: &str, process: usize, until: Option<Duration>) -> u64 {
        checker.last_wait += 1;
        self.0.push(Wait { id: checker.last_wait, name: name.to_owned(), process, until });
        checker.last_wait
    }

    pub(super) fn end(&mut self, id: u64) {
        self.0.retain(|wait| wait.id != id);
    }

    /// A wait ends with the lock. Nobody who began earlier may still wait in the same process.
    pub(super) fn granted(&mut self, id: u64, now: Duration) -> Option<String> {
        let at = self.0.iter().position(|wait| wait.id == id)?;
        let wait = self.0.remove(at);
        let earlier = self.0[..at].iter().find(|earlier| {
            earlier.name == wait.name && earlier.process == wait.process && earlier.until.is_none_or(|until| until > now)
        });
        earlier.map(|earlier| {
            format!("{}: wait {} of process {} was served before wait {}", wait.name, wait.id, wait.process, earlier.id)
        })
    }
}

impl Checker {
    pub(super) fn changed(&mut self, changes: &[Change], cause: Cause) -> Vec<String> {
        let mut found = Vec::new();
        for change in changes {
            let key = String::from_utf8_lossy(&change.kv.key);
            let created = change.kv.create_revision;
            if let Some(name) = key.strip_prefix("data/") {
                if let Some(text) = self.written(name, &change.kv.value) {
                    found.push(text);
                }
                continue;
            }
            let Some(name) = name_of_contender(&key) else { continue };
            let tickets = &mut self.names.entry(name.to_owned()).or_default().tickets;
            if !change.is_delete {
                let is_new = tickets.insert(created, TicketSeen { gone: None }).is_none();
                if !is_new {
                    found.push(format!("{name}: the ticket {created} was put twice"));
                }
                continue;
            }
            if let Some(ticket) = tickets.get_mut(&created) {
                ticket.gone = Some((change.revision, cause));
            }
            for hold in self.holds.iter_mut().filter(|hold| hold.token == created && hold.name == name && !hold.robbed) {
                if cause == Cause::Admin {
                    hold.robbed = true;
                } else if hold.is_held() {
                    found.push(format!("{name}: the key of the hold {created} is gone ({cause:?}), and it says it is held"));
                }
            }
        }
        found
    }

    /// A guarded write has put this value, the token of its hold.
    fn written(&mut self, name: &str, value: &[u8]) -> Option<String> {
        let token: Revision = std::str::from_utf8(value).ok()?.parse().ok()?;
        let known = self.names.entry(name.to_owned()).or_default();
        let owner = known.tickets.iter().find(|(_, ticket)| ticket.gone.is_none()).map(|(created, _)| *created);
        if owner != Some(token) || token < known.last_written {
            let last = known.last_written;
            return Some(format!(
                "{name}: a write with token {token} was applied; the owner is {owner:?}, the last writer {last}"
            ));
        }
        known.last_written = token;
        None
    }

    /// Called before the keys go.
    pub(super) fn lease_ends(&mut self, lease: i64, cause: Cause, now: Duration) -> Vec<String> {
        let mut found = Vec::new();
        for hold in self.holds.iter_mut().filter(|hold| hold.lease == lease && !hold.robbed) {
            if cause == Cause::Admin {
                hold.robbed = true;
                continue;
            }
            if hold.process.is_killed() {
                continue;
            }
            let (name, token) = (&hold.name, hold.token);
            if hold.is_held() {
                found.push(format!("{name}: the lease of the hold {token} ends ({cause:?}), and it says it is held"));
            } else if cause == Cause::Expired && !hold.lost && !hold.is_released() && hold.process.ran_lately(now) {
                found.push(format!("{name}: the lease of the hold {token} expires, and nobody was told that it is lost"));
            }
        }
        found
    }

    /// Somebody has the lock, as far as etcd's history goes.
    fn granted(&mut self, name: &str, token: Revision) -> Vec<String> {
        let mut found = Vec::new();
        let known = self.names.entry(name.to_owned()).or_default();
        self.acquisitions += 1;
        // While the answer was on its way an admin may have taken the key away.
        let robbed = known.tickets.get(&token).and_then(|ticket| ticket.gone).is_some_and(|(_, cause)| cause == Cause::Admin);
        if token <= known.last_granted && !robbed {
            found.push(format!("{name}: token {token} after token {}", known.last_granted));
        }
        known.last_granted = known.last_granted.max(token);
        match known.tickets.get(&token) {
            None => found.push(format!("{name}: token {token} is no ticket's create revision")),
            Some(ticket) => {
                let mut turn = 0;
                for (earlier, ticket) in known.tickets.range(..token) {
                    match ticket.gone {
                        None => found.push(format!("{name}: {token} was granted with {earlier} still in front")),
                        Some((gone, _)) => turn = turn.max(gone),
                    }
                }
                if ticket.gone.is_some_and(|(gone, _)| gone <= turn) {
                    found.push(format!("{name}: the ticket {token} was gone before its turn came at {turn}"));
                }
            }
        }
        for hold in self.holds.iter().filter(|hold| hold.name == name && !hold.robbed && !robbed) {
            if hold.is_held() {
                found.push(format!("{name}: {token} was granted while {} says it is held", hold.token));
            }
        }
        found
    }

    pub(super) fn granted_to_peer(&mut self, name: &str, token: Revision) -> Vec<String> {
        self.granted(name, token)
    }

    /// A lock() has returned this hold.
    pub(super) fn granted_to(
        &mut self,
        process: &Arc<Process>,
        name: &str,
        token: Revision,
        lease: i64,
        core: &Arc<HoldCore>,
    ) -> (u64, Vec<String>) {
        let mut found = self.granted(name, token);
        self.last_hold += 1;
        // It can have gone between etcd's answer and now.
        let gone = self.names.get(name).and_then(|known| known.tickets.get(&token)).and_then(|ticket| ticket.gone);
        let robbed = gone.is_some_and(|(_, cause)| cause == Cause::Admin);
        if let Some((_, cause)) = gone.filter(|_| !robbed && core.is_held()) {
            found.push(format!("{name}: {token} was granted after its key was gone ({cause:?}), and says it is held"));
        }
        self.holds.push(Held {
            id: self.last_hold,
            name: name.to_owned(),
            token,
            lease,
            process: process.clone(),
            core: Arc::downgrade(core),
            lost: false,
            was_over: false,
            robbed,
        });
        (self.last_hold, found)
    }

    pub(super) fn lost(&mut self, id: u64) {
        self.holds.iter_mut().filter(|hold| hold.id == id).for_each(|hold| hold.lost = true);
    }

    /// The holder has released it or given it up.
    pub(super) fn over(&mut self, id: u64) {
        self.holds.retain(|hold| hold.id != id);
    }

    /// Looked at now and then, because time passes too.
    pub(super) fn look(&mut self) -> Vec<String> {
        let mut found = Vec::new();
        let mut holders: BTreeMap<&str, Revision> = BTreeMap::new();
        for hold in &mut self.holds {
            if !hold.is_held() {
                hold.was_over = true;
                continue;
            }
            if hold.was_over {
                found.push(format!("{}: the hold {} was lost and says again that it is held", hold.name, hold.token));
            }
            if hold.lost {
                found.push(format!("{}: the hold {} said that it is lost, and now that it is held", hold.name, hold.token));
            }
            if hold.robbed {
                continue;
            }
            if let Some(other) = holders.insert(&hold.name, hold.token) {
                found.push(format!("{}: {other} and {} both say they are held", hold.name, hold.token));
            }
        }
        found
    }

    /// Whether the ticket is still in etcd.
    pub(super) fn is_there(&self, name: &str, token: Revision) -> bool {
        let known = self.names.get(name).and_then(|known| known.tickets.get(&token));
        known.is_some_and(|ticket| ticket.gone.is_none())
    }

    /// The holds whose keys an admin has taken away.
    pub(super) fn without_key(&self) -> Vec<u64> {
        self.holds.iter().filter(|hold| hold.robbed).map(|hold| hold.id).collect()
    }

    pub(super) fn still_held(&self, ids: &[u64]) -> Vec<String> {
        let deaf = self.holds.iter().filter(|hold| ids.contains(&hold.id) && hold.is_held());
        deaf.map(|hold| format!("{}: the hold {} has not heard that its key is gone", hold.name, hold.token)).collect()
    }
}
