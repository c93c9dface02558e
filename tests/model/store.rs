//! What the store's contract promises, as one step each: keys in the order of their revisions, under leases.

use crate::proto::Request;
use crate::store::{Ahead, Entered, Left, Look, Ticket, Trouble};

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Store {
    pub(super) revision: i64,
    pub(super) keys: Vec<Key>,
    /// Markers of entries that were given up, with their leases.
    voids: Vec<(String, i64)>,
    pub(super) leases: Vec<i64>,
    near: usize,
    /// Deleted by the last step.
    pub(super) gone: Vec<(String, i64)>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) text: String,
    lease: i64,
    pub(super) created: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    Entered(Result<Option<Entered>, Trouble>),
    Looked(Result<Look, Trouble>),
    Left(Result<Left, Trouble>),
}

impl Store {
    pub(super) fn new(near: usize) -> Store {
        Store { revision: 1, keys: Vec::new(), voids: Vec::new(), leases: Vec::new(), near, gone: Vec::new() }
    }

    fn find(&self, key: &str) -> Option<&Key> {
        self.keys.iter().find(|known| known.text == key)
    }

    fn is_void(&self, key: &str) -> bool {
        self.voids.iter().any(|(void, _)| void == key)
    }

    fn ahead(&self, created: i64) -> Ahead {
        let ahead = self.keys.iter().rev().filter(|key| key.created < created);
        Ahead { revision: self.revision, keys: Some(ahead.take(self.near + 1).map(|key| key.text.clone()).collect()) }
    }

    fn put(&mut self, ticket: &Ticket) -> Entered {
        let created = self.revision;
        self.keys.push(Key { text: ticket.key.clone(), lease: ticket.lease, created });
        Entered { token: created, ahead: self.ahead(created) }
    }

    pub(super) fn delete(&mut self, key: &str) {
        let before = self.keys.len();
        self.keys.retain(|known| known.text != key);
        if self.keys.len() < before {
            self.gone.push((key.to_owned(), self.revision));
        }
    }

    /// With it all its keys go.
    pub(super) fn end_lease(&mut self, lease: i64) {
        self.leases.retain(|known| *known != lease);
        self.voids.retain(|(_, of)| *of != lease);
        self.revision += 1;
        for key in self.keys.clone() {
            if key.lease == lease {
                self.delete(&key.text);
            }
        }
    }

    pub(super) fn answer(&mut self, ticket: &Ticket, request: &Request) -> Answer {
        match request {
            Request::Enter => Answer::Entered(self.enter(ticket).map(Some)),
            Request::EnterIfFree => Answer::Entered(self.enter_if_free(ticket)),
            Request::Look { token, .. } => {
                let present = self.find(&ticket.key).is_some_and(|key| key.created == *token);
                Answer::Looked(Ok(Look { present, overwritten: false, ahead: self.ahead(*token) }))
            }
            Request::Leave { token, void, next } => Answer::Left(self.leave(ticket, *token, *void, next.as_ref())),
        }
    }

    fn check_lease(&self, lease: i64) -> Result<(), Trouble> {
        if self.leases.contains(&lease) { Ok(()) } else { Err(Trouble::LeaseGone) }
    }

    fn enter(&mut self, ticket: &Ticket) -> Result<Entered, Trouble> {
        if let Some(key) = self.find(&ticket.key) {
            return Ok(Entered { token: key.created, ahead: Ahead { revision: self.revision, keys: None } });
        }
        if self.is_void(&ticket.key) {
            return Err(Trouble::Refused("given up".into()));
        }
        self.check_lease(ticket.lease)?;
        self.revision += 1;
        Ok(self.put(ticket))
    }

    fn enter_if_free(&mut self, ticket: &Ticket) -> Result<Option<Entered>, Trouble> {
        let is_there = self.find(&ticket.key).is_some();
        if !is_there && !self.keys.is_empty() {
            return Ok(None);
        }
        self.enter(ticket).map(Some)
    }

    fn leave(&mut self, ticket: &Ticket, token: Option<i64>, void: bool, next: Option<&Ticket>) -> Result<Left, Trouble> {
        let is_mine = self.find(&ticket.key).is_some_and(|key| token.is_none_or(|token| key.created == token));
        let may_put = next.is_none_or(|next| self.find(&next.key).is_none() && !self.is_void(&next.key));
        let applies = is_mine && may_put;
        if void {
            self.check_lease(ticket.lease)?;
        }
        if let Some(next) = next.filter(|_| applies) {
            self.check_lease(next.lease)?;
        }
        let writes = applies || void;
        self.revision += i64::from(writes);
        if applies || void {
            self.delete(&ticket.key);
        }
        if void && !self.is_void(&ticket.key) {
            self.voids.push((ticket.key.clone(), ticket.lease));
        }
        let Some(next) = next else { return Ok(Left { was_present: applies, next: None }) };
        if applies {
            return Ok(Left { was_present: true, next: Some(self.put(next)) });
        }
        // An earlier copy of the request has put it.
        let before =
            self.find(&next.key).map(|key| Entered { token: key.created, ahead: Ahead { revision: self.revision, keys: None } });
        Ok(Left { was_present: before.is_some(), next: before })
    }
}
