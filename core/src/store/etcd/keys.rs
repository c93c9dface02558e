//! Where things lie in etcd.

use crate::store::Ticket;

pub(super) fn prefix(name: &str) -> String {
    format!("{name}/")
}

/// Beside the queue, not in it: every key under `<name>/` is a contender to etcd's Go clients.
pub(super) fn void_key(ticket: &Ticket) -> String {
    let entry = ticket.key.strip_prefix(&*ticket.name).unwrap_or(&ticket.key);
    format!("{}.void-{}", ticket.name, entry.trim_start_matches('/'))
}
