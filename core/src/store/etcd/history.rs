//! Whether etcd's answers tell of one history: of one cluster, whose revision only rises.
//!
//! An etcd that was restored from a backup, or came back empty, knows nothing of what was locked since; and two endpoints may
//! belong to two clusters by mistake. Nothing in an answer says so but its header.

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

pub(super) struct History(Announced<State>);

struct State {
    cluster: Option<u64>,
    /// What each member has said last.
    of_members: Vec<Option<u64>>,
    known: Known,
}

/// What is known when a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// The highest revision.
    revision: Revision,
    /// How often the history has changed.
    changes: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Odd {
    /// The member belongs to another cluster than the others: which, and theirs.
    Stranger(u64, u64),
    /// The history is another from here on, and the answer may be of either.
    Changed(String),
    /// It was asked for before the history changed.
    Late,
}

impl History {
    pub(super) fn new(members: usize) -> History {
        let known = Known { revision: 0, changes: 0 };
        History(Announced::new(State { cluster: None, of_members: vec![None; members], known }))
    }

    /// To be asked before a request is sent.
    pub(super) fn known(&self) -> Known {
        self.0.now().known
    }

    /// Whether a member has to name its cluster before it is asked for anything: what a stranger refuses is no word about our lease.
    pub(super) fn is_unknown(&self, member: usize) -> bool {
        let state = self.0.now();
        state.of_members.len() > 1 && state.cluster.is_some() && state.of_members[member] != state.cluster
    }

    /// Looks at an answer's header. `known`, if it is linearizable, is what was known when the request was sent.
    pub(super) fn check(&self, member: usize, header: &Header, known: Option<Known>) -> Result<(), Odd> {
        let checked = self.0.now().check(member, header, known);
        if matches!(checked, Err(Odd::Changed(_))) {
            self.0.announce();
        }
        checked
    }

    pub(super) fn changes(&self) -> u64 {
        self.known().changes
    }

    /// Waits until it has changed more often than that.
    pub(super) async fn changed_since(&self, changes: u64) {
        self.0.find(|state| (state.known.changes > changes).then_some(())).await
    }

    /// The clusters that members have named, if they are several.
    pub(super) fn clusters(&self) -> Option<Vec<(usize, u64)>> {
        let state = self.0.now();
        let named: Vec<_> = state.of_members.iter().enumerate().filter_map(|(member, id)| Some((member, (*id)?))).collect();
        let first = named.first()?.1;
        named.iter().any(|(_, id)| *id != first).then_some(named)
    }
}

impl State {
    fn check(&mut self, member: usize, header: &Header, known: Option<Known>) -> Result<(), Odd> {
        let (id, revision) = (header.cluster_id, header.revision);
        // A proxy may not say.
        if id != 0 {
            self.of_members[member] = Some(id);
            let cluster = *self.cluster.get_or_insert(id);
            match cluster {
                same if same == id => {}
                _ if self.is_anew(id) => {
                    self.cluster = Some(id);
                    // What others said was of the time before, and does not count again.
                    self.of_members.iter_mut().for_each(|of_member| *of_member = of_member.filter(|said| *said == id));
                    return self.change(revision, format!("it is cluster {id:x} now, and was {cluster:x}"));
                }
                _ => return Err(Odd::Stranger(id, cluster)),
            }
        }
        let Some(known) = known else { return Ok(()) };
        if known.changes != self.known.changes {
            return Err(Odd::Late);
        }
        if revision < known.revision {
            return self.change(revision, format!("its revision is {revision}, and was {}", known.revision));
        }
        self.known.revision = self.known.revision.max(revision);
        Ok(())
    }

    /// All that have ever answered name it, or more than half of all: one that is gone keeps nobody waiting for its word.
    fn is_anew(&self, id: u64) -> bool {
        let naming = self.of_members.iter().flatten().filter(|of_member| **of_member == id).count();
        naming == self.of_members.iter().flatten().count() || naming * 2 > self.of_members.len()
    }

    fn change(&mut self, revision: Revision, why: String) -> Result<(), Odd> {
        self.known = Known { revision, changes: self.known.changes + 1 };
        Err(Odd::Changed(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(cluster_id: u64, revision: Revision) -> Header {
        Header { cluster_id, member_id: 1, revision, raft_term: 1 }
    }

    fn at(history: &History, revision: Revision) -> Option<Known> {
        Some(Known { revision, ..history.known() })
    }

    #[test]
    fn row_39_a_linearizable_answer_below_what_was_known_when_it_was_asked_is_another_history() {
        let history = History::new(1);
        history.check(0, &header(7, 10), at(&history, 0)).unwrap();
        // Two that were under way together may be answered in any order.
        history.check(0, &header(7, 12), at(&history, 10)).unwrap();
        history.check(0, &header(7, 11), at(&history, 10)).unwrap();
        assert_eq!(history.known().revision, 12);
        // A member that answers for itself may lag.
        history.check(0, &header(7, 3), None).unwrap();
        assert_eq!(history.changes(), 0);
        let before = at(&history, 12);
        assert!(matches!(history.check(0, &header(7, 5), before), Err(Odd::Changed(_))));
        assert_eq!((history.changes(), history.known().revision), (1, 5));
        // What was under way with it is no second change, whatever it says.
        for revision in [4, 5, 99] {
            assert_eq!(history.check(0, &header(7, revision), before), Err(Odd::Late));
        }
        assert_eq!((history.changes(), history.known().revision), (1, 5));
        history.check(0, &header(7, 5), at(&history, 5)).unwrap();
        // One wild answer is forgotten with the next.
        history.check(0, &header(7, i64::MAX), at(&history, 5)).unwrap();
        assert!(history.check(0, &header(7, 6), at(&history, i64::MAX)).is_err());
        history.check(0, &header(7, 7), Some(history.known())).unwrap();
        assert_eq!(history.changes(), 2);
    }

    #[test]
    fn row_39_a_restored_cluster_is_known_by_its_majority_when_a_member_never_comes_back() {
        let history = History::new(3);
        for member in 0..3 {
            history.check(member, &header(7, 10), None).unwrap();
        }
        assert_eq!(history.check(0, &header(8, 2), None), Err(Odd::Stranger(8, 7)), "one of three may be a mistake");
        assert!(matches!(history.check(1, &header(8, 3), None), Err(Odd::Changed(_))));
        history.check(0, &header(8, 3), None).unwrap();
        // Late word of the old cluster does not bring it back.
        assert_eq!(history.check(1, &header(7, 10), None), Err(Odd::Stranger(7, 8)));
        assert_eq!(history.changes(), 1);
    }

    #[test]
    fn row_40_the_first_cluster_counts_until_most_members_are_of_another() {
        let history = History::new(3);
        history.check(1, &header(7, 10), at(&history, 0)).unwrap();
        assert_eq!(history.check(0, &header(8, 90), at(&history, 10)), Err(Odd::Stranger(8, 7)));
        assert_eq!((history.changes(), history.known().revision), (0, 10), "what a stranger says is not heard");
        assert_eq!(history.clusters(), Some(vec![(0, 8), (1, 7)]));
        // The second has been made anew too; the third never answered.
        assert!(matches!(history.check(1, &header(8, 2), None), Err(Odd::Changed(_))));
        assert_eq!((history.clusters(), history.known().revision), (None, 2));
        history.check(0, &header(8, 3), at(&history, 2)).unwrap();
        assert_eq!(history.check(2, &header(7, 99), None), Err(Odd::Stranger(7, 8)));
        history.check(2, &header(0, 99), None).unwrap();
    }
}
