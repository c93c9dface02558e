//! A ticket of ours and how far it has come.

use super::SessionId;
use crate::store::{Ahead, Revision, Ticket};

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) ticket: Ticket,
    /// Whose lease it is under.
    pub(crate) session: SessionId,
    /// A copy of the entry may still be on its way.
    pub(crate) doubtful: bool,
    /// Somebody else had the lock when it entered.
    pub(crate) waited: bool,
    pub(crate) phase: Phase,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It may or may not be in. The same ticket until that is known.
    Entering {
        paused: bool,
    },
    Waiting(Waiting),
    Held(Held),
    Leaving(Box<Leaving>),
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) token: Revision,
    /// Proof of its turn is either our own transaction, or the ordered events that removed those ahead without removing it.
    pub(crate) ahead: Ahead,
    /// It follows only the one just ahead.
    pub(crate) is_far: bool,
    /// A change that we have heard and that the next look has to know.
    pub(crate) heard: Option<Revision>,
    pub(crate) look: Asking,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Asking {
    No,
    /// It cannot be known otherwise, at the pace of one who hears nothing yet.
    Later,
    InFlight,
    Paused,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Sending {
    Due,
    InFlight,
    Paused,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) token: Revision,
    /// What our own transaction, or an ordered event, has told about our key.
    pub(crate) seen: Revision,
    /// What follows the whole queue tells of its end too, and is read to its end.
    pub(crate) hears_queue: bool,
    pub(crate) own_since: Option<Revision>,
    pub(crate) follows_own: bool,
    pub(crate) is_checking: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Leaving {
    /// `None`: it may or may not have entered.
    pub(crate) token: Option<Revision>,
    /// Somebody waits for the end of its release.
    pub(crate) tells: bool,
    /// It was lost with its lease while a request was under way.
    pub(crate) lease_lost: bool,
    pub(crate) request: Sending,
    /// A copy of a request may be applied later.
    pub(crate) sent_before: bool,
    pub(crate) may_put: bool,
    pub(crate) may_hand_over: bool,
    /// The ticket to hand over to. Chosen once: a copy of the first request may be applied after the second was sent.
    pub(crate) next: Option<Next>,
    /// A next ticket of which it is not known whether it was put.
    pub(crate) orphan: Option<Next>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) ticket: Ticket,
    pub(crate) session: SessionId,
}

impl Standing {
    pub(crate) fn entering(Next { ticket, session }: Next) -> Standing {
        Standing { ticket, session, doubtful: false, waited: false, phase: Phase::Entering { paused: false } }
    }

    pub(crate) fn token(&self) -> Option<Revision> {
        match &self.phase {
            Phase::Entering { .. } => None,
            Phase::Waiting(waiting) => Some(waiting.token),
            Phase::Held(held) => Some(held.token),
            Phase::Leaving(leaving) => leaving.token,
        }
    }
}

impl Waiting {
    pub(crate) fn new(token: Revision, ahead: Ahead) -> Waiting {
        Waiting { token, ahead, is_far: false, heard: None, look: Asking::No }
    }

    /// Events cannot make it its turn any more, until a look has told who is ahead at `revision` or later.
    pub(crate) fn forget_ahead(&mut self, revision: Revision) {
        self.ahead.keys = None;
        self.heard = self.heard.max(Some(revision));
    }
}

impl Leaving {
    pub(crate) fn new(token: Option<Revision>, tells: bool) -> Leaving {
        Leaving {
            token,
            tells,
            lease_lost: false,
            request: Sending::Due,
            sent_before: false,
            may_put: true,
            may_hand_over: true,
            next: None,
            orphan: None,
        }
    }
}
