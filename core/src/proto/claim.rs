//! Whose turn it is, and whom to follow until then: all that tells one kind of lock from another.

use crate::store::{Ahead, Follow, NEAR};

/// What a ticket wants. It owns once at most `slack` of those that it conflicts with stand ahead of it. Who is ahead only ever
/// becomes fewer, so what is true once stays true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Claim {
    pub(crate) slack: usize,
    /// A waiter this near the head follows the whole queue; farther back it follows one ticket only.
    pub(crate) near: usize,
}

impl Claim {
    /// A mutex: nobody is ahead.
    pub(crate) const EXCLUSIVE: Claim = Claim { slack: 0, near: NEAR };

    /// Whether it is the turn of one with these ahead; not so where the answer does not tell.
    pub(crate) fn is_met(self, ahead: &Ahead) -> bool {
        ahead.keys.as_ref().is_some_and(|keys| keys.len() <= self.slack)
    }

    /// Whether a ticket may enter beside so many of this process that are there already: else it waits until one of them leaves,
    /// and enters by the same step.
    pub(crate) fn fits_beside(self, own: usize) -> bool {
        own <= self.slack
    }

    /// Whom to follow until it is the turn. In a long queue the one just ahead is followed to its end, and then a look tells the
    /// rest. When the same processes come again and again, that is the same key each time, and the watch is there already.
    pub(crate) fn to_follow(self, queue: Follow, keys: &[String], was_far: bool, now: Option<&Follow>) -> (Follow, bool) {
        let nearest = keys.first().map(|key| Follow::Ticket(key.clone()));
        match nearest {
            Some(nearest) if keys.len() > self.near || was_far && now == Some(&nearest) => (nearest, true),
            _ => (queue, false),
        }
    }
}
