//! Whether etcd's answers tell of one history: of one cluster, whose revision only rises.
//!
//! An etcd that was restored from a backup, or came back empty, knows nothing of what was locked since; and two endpoints may
//! belong to two clusters by mistake. Nothing in an answer says so but its header.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::api::{Header, HeaderOnly, LeaseResponse, RangeResponse, TxnResponse};
use crate::announced::Announced;
use crate::store::Revision;

/// An answer with a header.
pub(super) trait Headed {
    /// Of a key-value request that is not serializable: its revision is not below that of any answer that was there when it was sent.
    const IS_LINEARIZABLE: bool;
    fn header(&self) -> Option<&Header>;
}

macro_rules! headed {
    ($($answer:ty: $linearizable:literal),*) => {
        $(impl Headed for $answer {
            const IS_LINEARIZABLE: bool = $linearizable;
            fn header(&self) -> Option<&Header> {
                self.header.as_ref()
            }
        })*
    };
}
headed!(TxnResponse: true, RangeResponse: true, LeaseResponse: false, HeaderOnly: false);

pub(super) struct History {
    state: Mutex<State>,
    /// How often it has changed.
    changes: Announced<u64>,
}

struct State {
    cluster: Option<u64>,
    /// What each member has said last.
    of_members: Vec<Option<u64>>,
    revision: Revision,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Odd {
    /// The member belongs to another cluster than the others: which, and theirs.
    Stranger(u64, u64),
    /// The history is another from here on, and the answer may be of either.
    Changed(String),
}

impl History {
    pub(super) fn new(members: usize) -> History {
        let state = State { cluster: None, of_members: vec![None; members], revision: 0 };
        History { state: Mutex::new(state), changes: Announced::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The highest revision that is known: to be asked before a request is sent.
    pub(super) fn revision(&self) -> Revision {
        self.state().revision
    }

    /// Whether a member has to name its cluster before it is asked for anything: what a stranger refuses is no word about our lease.
    pub(super) fn is_unknown(&self, member: usize) -> bool {
        let state = self.state();
        state.of_members.len() > 1 && state.cluster.is_some() && state.of_members[member] != state.cluster
    }

    /// Looks at an answer's header. With `known`, that was the highest revision when the request was sent, and the answer is linearizable.
    pub(super) fn check(&self, member: usize, header: &Header, known: Option<Revision>) -> Result<(), Odd> {
        let why = {
            let mut state = self.state();
            let id = header.cluster_id;
            // A proxy may not say.
            if id != 0 {
                state.of_members[member] = Some(id);
            }
            match state.cluster {
                _ if id == 0 => {}
                None => state.cluster = Some(id),
                Some(cluster) if cluster == id => {}
                // All that have ever answered: it was made anew. One that has not is not asked for its word for ever.
                Some(cluster) if state.of_members.iter().flatten().all(|of_member| *of_member == id) => {
                    (state.cluster, state.revision) = (Some(id), header.revision);
                    return self.changed(state, format!("it is cluster {id:x} now, and was {cluster:x}"));
                }
                Some(cluster) => return Err(Odd::Stranger(id, cluster)),
            }
            match known {
                None => return Ok(()),
                Some(known) if header.revision >= known => {
                    state.revision = state.revision.max(header.revision);
                    return Ok(());
                }
                Some(known) => {
                    state.revision = header.revision;
                    (state, format!("its revision is {}, and was {known}", header.revision))
                }
            }
        };
        self.changed(why.0, why.1)
    }

    fn changed(&self, state: MutexGuard<'_, State>, why: String) -> Result<(), Odd> {
        drop(state);
        let changes = *self.changes.now() + 1;
        self.changes.set(changes);
        Err(Odd::Changed(why))
    }

    pub(super) fn changes(&self) -> u64 {
        *self.changes.now()
    }

    /// Waits until it has changed more often than that.
    pub(super) async fn changed_since(&self, changes: u64) {
        self.changes.find(|now| (*now > changes).then_some(())).await
    }

    /// The clusters that members have named, if they are several.
    pub(super) fn clusters(&self) -> Option<Vec<(usize, u64)>> {
        let state = self.state();
        let named: Vec<_> = state.of_members.iter().enumerate().filter_map(|(member, id)| Some((member, (*id)?))).collect();
        let first = named.first()?.1;
        named.iter().any(|(_, id)| *id != first).then_some(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(cluster_id: u64, revision: Revision) -> Header {
        Header { cluster_id, member_id: 1, revision, raft_term: 1 }
    }

    #[test]
    fn row_39_a_linearizable_answer_below_what_was_known_when_it_was_asked_is_another_history() {
        let history = History::new(1);
        history.check(0, &header(7, 10), Some(0)).unwrap();
        // Two that were under way together may be answered in any order.
        history.check(0, &header(7, 12), Some(10)).unwrap();
        history.check(0, &header(7, 11), Some(10)).unwrap();
        assert_eq!(history.revision(), 12);
        // A member that answers for itself may lag.
        history.check(0, &header(7, 3), None).unwrap();
        assert_eq!(history.changes(), 0);
        assert!(matches!(history.check(0, &header(7, 5), Some(12)), Err(Odd::Changed(_))));
        assert_eq!((history.changes(), history.revision()), (1, 5));
        history.check(0, &header(7, 5), Some(5)).unwrap();
        // One wild answer is forgotten with the next.
        history.check(0, &header(7, i64::MAX), Some(5)).unwrap();
        assert!(history.check(0, &header(7, 6), Some(i64::MAX)).is_err());
        history.check(0, &header(7, 7), Some(history.revision())).unwrap();
        assert_eq!(history.changes(), 2);
    }

    #[test]
    fn row_40_the_first_cluster_counts_until_all_members_are_of_another() {
        let history = History::new(3);
        history.check(1, &header(7, 10), Some(0)).unwrap();
        assert_eq!(history.check(0, &header(8, 90), Some(10)), Err(Odd::Stranger(8, 7)));
        assert_eq!((history.changes(), history.revision()), (0, 10), "what a stranger says is not heard");
        assert_eq!(history.clusters(), Some(vec![(0, 8), (1, 7)]));
        // The second has been made anew too; the third never answered.
        assert!(matches!(history.check(1, &header(8, 2), None), Err(Odd::Changed(_))));
        assert_eq!((history.clusters(), history.revision()), (None, 2));
        history.check(0, &header(8, 3), Some(2)).unwrap();
        assert_eq!(history.check(2, &header(7, 99), None), Err(Odd::Stranger(7, 8)));
        history.check(2, &header(0, 99), None).unwrap();
    }
}
