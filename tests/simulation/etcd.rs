//! etcd as its clients see it: keys with revisions, transactions, leases. One linearizable state;
//! the members are in network.rs.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::{Code, Status};

use super::wire::*;

pub(super) type Revision = i64;

#[derive(Default)]
pub(super) struct Etcd {
    pub(super) revision: Revision,
    pub(super) keys: BTreeMap<Vec<u8>, KeyValue>,
    pub(super) leases: BTreeMap<i64, Lease>,
    pub(super) last_lease: i64,
}

pub(super) struct Lease {
    pub(super) ttl: Duration,
    /// On the simulation's clock.
    pub(super) expires: Duration,
}

/// One event of the history.
pub(super) struct Change {
    pub(super) is_delete: bool,
    /// With a delete, the key as it was.
    pub(super) kv: KeyValue,
    pub(super) revision: Revision,
}

impl Change {
    pub(super) fn event(&self) -> Event {
        if !self.is_delete {
            return Event { kind: 0, kv: Some(self.kv.clone()) };
        }
        let gone = KeyValue { key: self.kv.key.clone(), mod_revision: self.revision, ..Default::default() };
        Event { kind: 1, kv: Some(gone) }
    }
}

/// Whether a key is in a range as etcd writes it: no end is one key, the end `\0` is none at all.
pub(super) fn is_in(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        end => key >= start && key < end,
    }
}

fn lease_not_found() -> Status {
    Status::new(Code::NotFound, "etcdserver: requested lease not found")
}

impl Etcd {
    pub(super) fn header(&self) -> Option<Header> {
        Some(Header { cluster_id: 1, member_id: 1, revision: self.revision, raft_term: 2 })
    }

    pub(super) fn grant(&mut self, ttl: i64, now: Duration) -> LeaseResponse {
        self.last_lease += 0x1001;
        let lasts = Duration::from_secs(ttl as u64);
        self.leases.insert(self.last_lease, Lease { ttl: lasts, expires: now + lasts });
        LeaseResponse { header: self.header(), id: self.last_lease, ttl }
    }

    pub(super) fn renew(&mut self, id: i64, now: Duration) -> LeaseResponse {
        let mut ttl = 0;
        // A lease that has run out and waits for its revocation is not renewed (`Renew`, lessor.go).
        if let Some(lease) = self.leases.get_mut(&id).filter(|lease| lease.expires > now) {
            lease.expires = now + lease.ttl;
            ttl = lease.ttl.as_secs() as i64;
        }
        LeaseResponse { header: self.header(), id, ttl }
    }

    /// Ends a lease and deletes its keys, at one revision.
    pub(super) fn end_lease(&mut self, id: i64) -> Result<Vec<Change>, Status> {
        self.leases.remove(&id).ok_or_else(lease_not_found)?;
        let keys: Vec<_> = self.keys.values().filter(|kv| kv.lease == id).map(|kv| kv.key.clone()).collect();
        Ok(self.delete_all(&keys))
    }

    pub(super) fn delete_all(&mut self, keys: &[Vec<u8>]) -> Vec<Change> {
        let revision = self.revision + 1;
        let gone: Vec<_> = keys.iter().filter_map(|key| self.keys.remove(key)).collect();
        if !gone.is_empty() {
            self.revision = revision;
        }
        gone.into_iter().map(|kv| Change { is_delete: true, kv, revision }).collect()
    }

    pub(super) fn range(&self, request: &RangeRequest) -> RangeResponse {
        assert!(request.revision == 0 && !request.count_only, "core does not ask for that, so it is not simulated");
        let mut kvs: Vec<KeyValue> = self
            .keys
            .values()
            .filter(|kv| is_in(&kv.key, &request.key, &request.range_end))
            .filter(|kv| request.max_create_revision == 0 || kv.create_revision <= request.max_create_revision)
            .filter(|kv| kv.create_revision >= request.min_create_revision)
            .cloned()
            .collect();
        match (request.sort_target, request.sort_order) {
            (_, 0) => {}
            (2, 1) => kvs.sort_by_key(|kv| kv.create_revision),
            (2, 2) => kvs.sort_by_key(|kv| std::cmp::Reverse(kv.create_revision)),
            other => panic!("the sorting {other:?} is not simulated"),
        }
        let count = kvs.len() as i64;
        let more = request.limit > 0 && count > request.limit;
        if more {
            kvs.truncate(request.limit as usize);
        }
        if request.keys_only {
            // etcd 3.7 leaves the lease out as well.
            kvs.iter_mut().for_each(|kv| (kv.value, kv.lease) = (Vec::new(), 0));
        }
        RangeResponse { header: self.header(), kvs, more, count }
    }

    /// What another member has done.
    pub(super) fn apply(&mut self, change: &Change) {
        self.revision = change.revision;
        if change.is_delete {
            self.keys.remove(&change.kv.key);
        } else {
            self.keys.insert(change.kv.key.clone(), change.kv.clone());
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let of = |kv: Option<&KeyValue>| match (compare.target, compare.with) {
            (0, Some(With::Version(wanted))) => (kv.map_or(0, |kv| kv.version), wanted),
            (1, Some(With::CreateRevision(wanted))) => (kv.map_or(0, |kv| kv.create_revision), wanted),
            (2, Some(With::ModRevision(wanted))) => (kv.map_or(0, |kv| kv.mod_revision), wanted),
            (4, Some(With::Lease(wanted))) => (kv.map_or(0, |kv| kv.lease), wanted),
            other => panic!("comparing {other:?} is not simulated"),
        };
        let holds = |(is, wanted): (i64, i64)| match compare.sign {
            0 => is == wanted,
            1 => is > wanted,
            2 => is < wanted,
            _ => is != wanted,
        };
        let mut in_range = self.keys.values().filter(|kv| is_in(&kv.key, &compare.key, &compare.range_end)).peekable();
        if in_range.peek().is_none() {
            return holds(of(None));
        }
        in_range.all(|kv| holds(of(Some(kv))))
    }

    /// One transaction, with nested ones. All it writes has one revision; it sees its own writes.
    pub(super) fn txn(&mut self, request: &TxnRequest) -> Result<(TxnResponse, Vec<Change>), Status> {
        self.check_leases(request)?;
        let revision = self.revision + 1;
        let mut changes = Vec::new();
        let mut answer = self.run(request, revision, &mut changes);
        if !changes.is_empty() {
            self.revision = revision;
        }
        answer.header = self.header();
        Ok((answer, changes))
    }

    fn branch<'a>(&self, request: &'a TxnRequest) -> (bool, &'a [RequestOp]) {
        let succeeded = request.compare.iter().all(|compare| self.holds(compare));
        (succeeded, if succeeded { &request.success } else { &request.failure })
    }

    /// A put under an unknown lease fails the whole transaction, before it has changed anything.
    fn check_leases(&self, request: &TxnRequest) -> Result<(), Status> {
        for op in self.branch(request).1 {
            match &op.op {
                Some(Op::Put(put)) if put.lease != 0 && !self.leases.contains_key(&put.lease) => return Err(lease_not_found()),
                Some(Op::Txn(nested)) => self.check_leases(nested)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn run(&mut self, request: &TxnRequest, revision: Revision, changes: &mut Vec<Change>) -> TxnResponse {
        let (succeeded, ops) = self.branch(request);
        let responses = ops.iter().map(|op| {
            let answer = match op.op.as_ref().expect("an operation") {
                Op::Range(range) => OpAnswer::Range(self.range(range)),
                Op::Put(put) => {
                    let old = self.keys.get(&put.key);
                    let kv = KeyValue {
                        key: put.key.clone(),
                        create_revision: old.map_or(revision, |old| old.create_revision),
                        mod_revision: revision,
                        version: old.map_or(1, |old| old.version + 1),
                        value: put.value.clone(),
                        lease: put.lease,
                    };
                    self.keys.insert(put.key.clone(), kv.clone());
                    changes.push(Change { is_delete: false, kv, revision });
                    OpAnswer::Put(PutResponse { header: None })
                }
                Op::Delete(delete) => {
                    let gone: Vec<_> =
                        self.keys.keys().filter(|key| is_in(key, &delete.key, &delete.range_end)).cloned().collect();
                    for key in &gone {
                        let kv = self.keys.remove(key).expect("just found");
                        changes.push(Change { is_delete: true, kv, revision });
                    }
                    OpAnswer::Delete(DeleteResponse { header: None, deleted: gone.len() as i64 })
                }
                Op::Txn(nested) => OpAnswer::Txn(self.run(nested, revision, changes)),
            };
            ResponseOp { op: Some(answer) }
        });
        let responses = responses.collect();
        TxnResponse { header: None, succeeded, responses }
    }
}
