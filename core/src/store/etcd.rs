//! The protocol on etcd: every step of the lock is one transaction. docs/protocol.md says the same
//! in words.

pub(crate) mod api;
mod batch;
mod history;
mod keys;
mod members;
mod transport;
mod watch;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use self::api::{
    Client, Compare, KeyValue, LeaseResponse, RangeRequest, RangeResponse, RequestOp, Sign, TxnRequest, TxnResponse,
};
use self::batch::{Answer, Batches, odd, revision_of};
use self::keys::{prefix, void_key};
use self::members::{Members, Role};
use self::watch::Watches;
use super::{
    Ahead, Changes, Entered, Entry, Follow, Guarded, GuardedAnswer, LeaseId, Leaving, Left, Look, NEAR, Reply, Revision, Store,
    Ticket, Trouble, is_contender, name_of_contender,
};
use crate::error::Result;
use crate::options::Connection;
use crate::runtime::Env;
use crate::sabotage::{Sabotage, is_on};
use crate::stats::Traffic;

/// Of some 100 bytes each.
const KEYS_IN_A_PAGE: i64 = 5000;
/// etcd allows 128 operations in a transaction.
const VALUES_AT_ONCE: usize = 100;

pub(crate) struct EtcdStore {
    members: Arc<Members>,
    batches: Arc<Batches>,
    watches: Watches,
}

impl EtcdStore {
    pub(crate) fn new(urls: &[String], connection: &Connection, env: Env) -> Self {
        let members = Arc::new(Members::new(urls, connection, env.clone()));
        let batches = Batches::new(members.clone(), env.clone());
        EtcdStore { watches: Watches::new(members.clone(), env), batches, members }
    }

    async fn txn_at(&self, role: Role, txn: TxnRequest) -> Result<TxnResponse, Trouble> {
        let limit = self.members.request_limit();
        self.members.call(role, limit, |client| async move { client.txn(txn).await }).await
    }

    async fn range(&self, range: RangeRequest) -> Result<RangeResponse, Trouble> {
        let limit = self.members.request_limit();
        self.members.call(Role::Queue, limit, |client| async move { client.range(range).await }).await
    }

    /// The contenders in a range, the oldest first. Beside and below a name there may be other data, of any size: so the keys are
    /// read alone, page by page, and then the values of those that are contenders.
    async fn entries(
        &self,
        range: RangeRequest,
        with_lease: bool,
        is_contender: impl Fn(&KeyValue) -> bool,
    ) -> Result<Vec<Entry>, Trouble> {
        let mut page = range.keys_only().limit(KEYS_IN_A_PAGE);
        let mut found = Vec::new();
        loop {
            let read = self.range(page.clone()).await?;
            found.extend(read.kvs.iter().filter(|kv| is_contender(kv)).cloned());
            let Some(last) = read.kvs.last().filter(|_| read.more) else { break };
            page.key = [&last.key[..], &[0]].concat();
            // The rest as it was then.
            page.revision = read.header.map_or(0, |header| header.revision);
        }
        // etcd 3.7 leaves the lease out where keys alone are asked for; others tell here already what need not be read.
        if with_lease && found.iter().any(|kv| kv.lease != 0) {
            found.retain(|kv| kv.lease != 0);
        }
        found.sort_by_key(|kv| kv.create_revision);
        let mut entries = Vec::with_capacity(found.len());
        for some in found.chunks(VALUES_AT_ONCE) {
            let gets: Vec<RequestOp> = some.iter().map(|kv| RangeRequest::key(&*kv.key).into()).collect();
            let answer = self.txn_at(Role::Queue, TxnRequest::default().and_then(gets)).await?;
            for (kv, read) in some.iter().zip(answer.reads()) {
                // Who has left meanwhile is not shown; nor is another of the same key.
                let still = read.kvs.first().filter(|now| now.create_revision == kv.create_revision);
                entries.extend(still.filter(|now| now.lease != 0 || !with_lease).map(entry_of));
            }
        }
        Ok(entries)
    }

    async fn granted(&self, lease: LeaseResponse, is_comparing: bool) -> Result<(LeaseId, Duration), Trouble> {
        let granted = granted(&lease)?;
        if is_comparing && let Err(trouble) = self.members.compare().await {
            let _ = self.close_lease(lease.id).await;
            return Err(trouble);
        }
        Ok(granted)
    }

    /// A look as the queue stands now, or, at the member of the watches, as that member has it.
    async fn look_at(&self, ticket: &Ticket, token: Revision, role: Role) -> Result<Look, Trouble> {
        let serializable = role == Role::Watch;
        // A limit of 0 is none: for a queue in which keys of nested locks take the places.
        for limit in [NEAR as i64 + 1, 0] {
            let mine = RangeRequest { serializable, ..RangeRequest::key(&*ticket.key) };
            let older = RangeRequest::prefix(&prefix(&ticket.name)).keys_only().limit(limit).newest_first();
            let older = RangeRequest { serializable, max_create_revision: token - 1, ..older };
            let answer = self.txn_at(role, TxnRequest::default().and_then([mine.into(), older.into()])).await?;
            let mut reads = answer.reads();
            let mine = next_read(&mut reads)?.kvs.first().filter(|kv| kv.create_revision == token);
            if let Some(keys) = nearest(next_read(&mut reads)?, &ticket.name) {
                let overwritten = mine.is_some_and(|kv| kv.lease != ticket.lease);
                let ahead = Ahead { revision: revision_of(&answer)?, keys: Some(keys) };
                return Ok(Look { present: mine.is_some(), overwritten, ahead });
            }
        }
        Err(odd("more keys than there are"))
    }
}

/// With its value, because etcd 3.7 leaves the lease out where keys alone are asked for.
fn get_key(key: &str) -> RequestOp {
    RangeRequest::key(key).into()
}

/// The end of the queue: the nearest ahead of a ticket that is put next in the same transaction.
fn get_tail(name: &str) -> RequestOp {
    RangeRequest::prefix(&prefix(name)).keys_only().limit(NEAR as i64 + 1).newest_first().into()
}

/// Some keys of the queue, in no order that matters: the cheapest way to see that it is not empty.
fn get_some(name: &str) -> RequestOp {
    RangeRequest::prefix(&prefix(name)).keys_only().limit(NEAR as i64 + 1).into()
}

fn put(ticket: &Ticket) -> RequestOp {
    RequestOp::put(&*ticket.key, &*ticket.value, ticket.lease)
}

/// A lease that is over when it begins is none, and asking for the next at once would be a storm. One without a number is worse:
/// keys would be put under no lease at all, and stay. etcd numbers leases from 1 on (`lessor.go`, `server.go`'s `reqIDGen`).
fn granted(lease: &LeaseResponse) -> Result<(LeaseId, Duration), Trouble> {
    match (lease.id, u64::try_from(lease.ttl)) {
        (id @ 1.., Ok(seconds @ 1..)) => Ok((id, Duration::from_secs(seconds))),
        (id, _) => Err(odd(&format!("lease {id} for {} s", lease.ttl))),
    }
}

fn next_read<'a>(reads: &mut impl Iterator<Item = &'a RangeResponse>) -> Result<&'a RangeResponse, Trouble> {
    reads.next().ok_or_else(|| odd("a read is missing"))
}

fn key_of(kv: &KeyValue) -> String {
    String::from_utf8_lossy(&kv.key).into_owned()
}

fn entry_of(kv: &KeyValue) -> Entry {
    Entry { key: key_of(kv), revision: kv.create_revision, lease: kv.lease, value: kv.value.clone() }
}

/// The contenders in a read of at most `NEAR + 1` keys, the newest first; `None` if keys that are
/// none took their places.
fn nearest(read: &RangeResponse, name: &str) -> Option<Vec<String>> {
    let keys: Vec<_> = read.kvs.iter().filter(|kv| is_contender(name, &kv.key)).take(NEAR + 1).map(key_of).collect();
    (keys.len() > NEAR || !read.more).then_some(keys)
}

/// Our own entry from an earlier copy of a request, if it is there. A key under another lease, or under none, is somebody else's.
fn entry_before<'a>(read: &'a RangeResponse, ticket: &Ticket) -> Result<Option<&'a KeyValue>, Trouble> {
    match read.kvs.first() {
        Some(kv) if kv.lease != ticket.lease => Err(Trouble::KeyTaken),
        mine => Ok(mine),
    }
}

impl Store for EtcdStore {
    fn open_lease(&self, ttl_seconds: i64) -> Reply<'_, (LeaseId, Duration)> {
        Box::pin(async move {
            let limit = self.members.request_limit();
            let grant = |client: Arc<Client>| async move { client.grant(ttl_seconds).await };
            let is_comparing = self.members.begin_to_compare();
            // Each member once before a pause: of many endpoints most may be dead when a program starts.
            for _ in 1..self.members.count() {
                match self.members.call(Role::Queue, limit, grant).await {
                    Err(Trouble::Unavailable(_)) => {}
                    granted => return self.granted(granted?, is_comparing).await,
                }
            }
            self.granted(self.members.call(Role::Queue, limit, grant).await?, is_comparing).await
        })
    }

    fn renew_lease(&self, lease: LeaseId, limit: Duration, hurry_from: Duration) -> Reply<'_, ()> {
        Box::pin(async move {
            // The TTL in the answer is always the granted one (`Renew` in etcd's lessor.go), or 0.
            let renew = |client: Arc<Client>| async move { client.renew(lease).await };
            match self.members.call_any(limit, hurry_from, renew).await? {
                renewed if renewed.ttl > 0 => Ok(()),
                _ => Err(Trouble::LeaseGone),
            }
        })
    }

    fn close_lease(&self, lease: LeaseId) -> Reply<'_, ()> {
        Box::pin(async move {
            let limit = self.members.request_limit();
            let revoke = |client: Arc<Client>| async move { client.revoke(lease).await };
            match self.members.call(Role::Queue, limit, revoke).await {
                Ok(_) | Err(Trouble::LeaseGone) => Ok(()),
                Err(trouble) => Err(trouble),
            }
        })
    }

    fn enter<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Entered> {
        Box::pin(async move {
            let unused = Compare::create_revision(&*ticket.key, Sign::Equal, 0);
            let not_void = Compare::create_revision(void_key(ticket), Sign::Equal, 0);
            let Answer { revision, response: answer } = self
                .batches
                .send(
                    &ticket.name,
                    TxnRequest::when([unused, not_void])
                        .and_then([get_tail(&ticket.name), put(ticket)])
                        .or_else([get_key(&ticket.key)]),
                )
                .await?;
            let read = next_read(&mut answer.reads())?;
            if answer.succeeded {
                return Ok(Entered { token: revision, ahead: Ahead { revision, keys: nearest(read, &ticket.name) } });
            }
            // An earlier copy of this request was applied.
            let mine = entry_before(read, ticket)?.ok_or(Trouble::Refused("this entry was given up".into()))?;
            Ok(Entered { token: mine.create_revision, ahead: Ahead { revision, keys: None } })
        })
    }

    fn enter_if_free<'a>(&'a self, ticket: &'a Ticket) -> Reply<'a, Option<Entered>> {
        Box::pin(async move {
            // A comparison over a range holds if it holds for every key, and an empty range compares
            // as zero.
            let nobody = Compare::create_revision(prefix(&ticket.name), Sign::Equal, 0).of_all_below();
            let not_void = Compare::create_revision(void_key(ticket), Sign::Equal, 0);
            let Answer { revision, response: answer } = self
                .batches
                .send(
                    &ticket.name,
                    TxnRequest::when([nobody, not_void])
                        .and_then([put(ticket)])
                        .or_else([get_some(&ticket.name), get_key(&ticket.key)]),
                )
                .await?;
            if answer.succeeded {
                return Ok(Some(Entered { token: revision, ahead: Ahead { revision, keys: Some(Vec::new()) } }));
            }
            let mut reads = answer.reads();
            let some = next_read(&mut reads)?;
            if let Some(mine) = entry_before(next_read(&mut reads)?, ticket)? {
                // An earlier copy of this request was applied.
                return Ok(Some(Entered { token: mine.create_revision, ahead: Ahead { revision, keys: None } }));
            }
            if some.kvs.iter().any(|kv| is_contender(&ticket.name, &kv.key)) {
                return Ok(None);
            }
            // Only keys of nested locks: the comparison cannot tell, so take a place to find out.
            let mut entered = self.enter(ticket).await?;
            if entered.ahead.keys.is_none() {
                entered.ahead = self.look(ticket, entered.token, None).await?.ahead;
            }
            if entered.ahead.is_nobody() {
                return Ok(Some(entered));
            }
            self.leave(Leaving { ticket, token: Some(entered.token), void: false, next: None }).await?;
            Ok(None)
        })
    }

    fn leave<'a>(&'a self, leaving: Leaving<'a>) -> Reply<'a, Left> {
        Box::pin(async move {
            let Leaving { ticket, token, void, next } = leaving;
            let mine = match token {
                Some(token) if !is_on(Sabotage::UnlockByName) => Compare::create_revision(&*ticket.key, Sign::Equal, token),
                _ => Compare::create_revision(&*ticket.key, Sign::Greater, 0),
            };
            let mut conditions = vec![mine];
            let mut present = vec![RequestOp::delete(&*ticket.key)];
            let mut absent = Vec::new();
            if let Some(next) = next {
                // Put over another's key it would have that key's revision.
                conditions.push(Compare::create_revision(&*next.key, Sign::Equal, 0));
                conditions.push(Compare::create_revision(void_key(next), Sign::Equal, 0));
                present.extend([get_tail(&ticket.name), put(next)]);
                absent.push(get_key(&next.key));
            }
            if void {
                // It goes with the lease, like the entry that it keeps out.
                let marker = RequestOp::put(void_key(ticket), "", ticket.lease);
                present.push(marker.clone());
                absent.push(marker);
                // Whatever is there now, a late copy of the entry has made it.
                absent.push(RequestOp::delete(&*ticket.key));
            }
            let txn = TxnRequest::when(conditions).and_then(present).or_else(absent);
            let Answer { revision, response: answer } = self.batches.send(&ticket.name, txn).await?;
            let Some(next) = next else { return Ok(Left { was_present: answer.succeeded, next: None }) };

            let read = next_read(&mut answer.reads())?;
            let (token, keys) = if answer.succeeded {
                (revision, nearest(read, &next.name))
            } else {
                match entry_before(read, next)? {
                    // An earlier copy of this request was applied.
                    Some(kv) => (kv.create_revision, None),
                    None => return Ok(Left { was_present: false, next: None }),
                }
            };
            let ahead = Ahead { revision, keys };
            Ok(Left { was_present: true, next: Some(Entered { token, ahead }) })
        })
    }

    fn look<'a>(&'a self, ticket: &'a Ticket, token: Revision, since: Option<Revision>) -> Reply<'a, Look> {
        Box::pin(async move {
            if let Some(since) = since {
                // The member that told of the change has it, and so need not ask the others.
                let look = self.look_at(ticket, token, Role::Watch).await?;
                if look.ahead.revision >= since {
                    return Ok(look);
                }
            }
            self.look_at(ticket, token, Role::Queue).await
        })
    }

    fn follow(&self, what: Follow) -> Changes {
        self.watches.follow(what)
    }

    fn put_right<'a>(&'a self, ticket: &'a Ticket, token: Revision) -> Reply<'a, ()> {
        Box::pin(async move {
            let mine = Compare::create_revision(&*ticket.key, Sign::Equal, token);
            self.txn_at(Role::Queue, TxnRequest::when([mine]).and_then([put(ticket)])).await.map(drop)
        })
    }

    fn history(&self) -> u64 {
        self.members.history().changes()
    }

    fn history_changed(&self, since: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.members.history().changed_since(since))
    }

    fn guarded<'a>(&'a self, ticket: &'a Ticket, token: Revision, what: &'a Guarded) -> Reply<'a, GuardedAnswer> {
        Box::pin(async move {
            let owner = Compare::create_revision(&*ticket.key, Sign::Equal, token);
            let op = match what {
                Guarded::Put { key, value } => RequestOp::put(&**key, &**value, 0),
                Guarded::Get { key } => RangeRequest::key(&**key).into(),
                Guarded::Delete { key } => RequestOp::delete(&**key),
            };
            let answer = self.txn_at(Role::Queue, TxnRequest::when([owner]).and_then([op])).await?;
            if !answer.succeeded {
                return Ok(GuardedAnswer::NotOwner);
            }
            let value = answer.reads().next().and_then(|read| read.kvs.first().map(|kv| kv.value.clone()));
            Ok(GuardedAnswer::Applied(value))
        })
    }

    fn contenders<'a>(&'a self, name: &'a str) -> Reply<'a, Vec<Entry>> {
        Box::pin(async move { self.entries(RangeRequest::prefix(&prefix(name)), false, |kv| is_contender(name, &kv.key)).await })
    }

    fn all_contenders<'a>(&'a self, prefix: &'a str) -> Reply<'a, Vec<Entry>> {
        Box::pin(async move {
            let is_lock = |kv: &KeyValue| name_of_contender(&key_of(kv)).is_some();
            self.entries(RangeRequest::prefix(prefix), true, is_lock).await
        })
    }

    fn traffic(&self) -> Traffic {
        self.members.traffic()
    }
}

#[cfg(test)]
mod tests {
    //! Each step sent twice, late, or after its end, as a network may do it.

    use super::*;
    use crate::pending::Pending;
    use etcdlock_rig::Etcd;

    struct Rig {
        _etcd: Etcd,
        store: Arc<EtcdStore>,
        env: Env,
        lease: LeaseId,
    }

    impl Rig {
        fn start() -> Rig {
            let etcd = Etcd::start();
            let env = Env::of_process().unwrap();
            let urls = [format!("http://{}", etcd.endpoint())];
            let connection = crate::Options::default().connection();
            // Its watch task is spawned from here, so the store is made on the io thread.
            let io = env.clone();
            let made = Pending::start(&env, async move { Ok(EtcdStore::new(&urls, &connection, io)) });
            let mut rig = Rig { _etcd: etcd, store: Arc::new(made.wait().unwrap()), env, lease: 0 };
            rig.lease = rig.ask(|store| async move { store.open_lease(60).await }).unwrap().0;
            rig
        }

        fn ask<T: Send + 'static, F>(&self, question: impl FnOnce(Arc<EtcdStore>) -> F) -> Result<T, Trouble>
        where
            F: Future<Output = Result<T, Trouble>> + Send + 'static,
        {
            let answer = question(self.store.clone());
            Pending::start(&self.env, async move { Ok(answer.await) }).wait().unwrap()
        }

        fn ticket(&self, n: u32) -> Ticket {
            let key = format!("q/{:x}-{n:x}", self.lease);
            Ticket { name: "q".into(), key, lease: self.lease, n: n.into(), value: "{}".into() }
        }

        fn enter(&self, ticket: &Ticket) -> Result<Entered, Trouble> {
            let ticket = ticket.clone();
            self.ask(|store| async move { store.enter(&ticket).await })
        }

        fn enter_if_free(&self, ticket: &Ticket) -> Result<Option<Entered>, Trouble> {
            let ticket = ticket.clone();
            self.ask(|store| async move { store.enter_if_free(&ticket).await })
        }

        fn leave(&self, ticket: &Ticket, token: Option<Revision>, void: bool, next: Option<&Ticket>) -> Result<Left, Trouble> {
            let (ticket, next) = (ticket.clone(), next.cloned());
            self.ask(|store| async move { store.leave(Leaving { ticket: &ticket, token, void, next: next.as_ref() }).await })
        }

        fn look(&self, ticket: &Ticket, token: Revision) -> Look {
            let ticket = ticket.clone();
            self.ask(|store| async move { store.look(&ticket, token, None).await }).unwrap()
        }

        fn queue(&self) -> Vec<String> {
            let entries = self.ask(|store| async move { store.contenders("q").await }).unwrap();
            entries.into_iter().map(|entry| entry.key).collect()
        }
    }

    #[test]
    fn row_42_a_lease_of_no_time_or_no_number_is_an_answer_that_makes_no_sense() {
        let lease = |id, ttl| granted(&LeaseResponse { header: None, id, ttl });
        assert_eq!(lease(5, 7), Ok((5, Duration::from_secs(7))));
        for (id, ttl) in [(5, 0), (5, -5), (5, i64::MIN), (0, 7), (-1, 7), (i64::MIN, 7)] {
            let text = format!("lease {id} for {ttl} s");
            assert!(matches!(lease(id, ttl), Err(Trouble::Unavailable(why)) if why.contains(&text)));
        }
    }

    #[test]
    fn an_entry_sent_twice_is_one_ticket_with_one_token() {
        let rig = Rig::start();
        let (first, second) = (rig.ticket(0), rig.ticket(1));
        let entered = rig.enter(&first).unwrap();
        assert!(entered.ahead.is_nobody());
        let behind = rig.enter(&second).unwrap();
        assert_eq!(behind.ahead.keys.as_deref(), Some(&[first.key.clone()][..]));
        assert_eq!(rig.enter(&first).unwrap().token, entered.token);
        let again = rig.enter(&second).unwrap();
        assert_eq!((again.token, again.ahead.keys), (behind.token, None), "who is ahead has to be looked up");
        assert_eq!(rig.enter_if_free(&first).unwrap().unwrap().token, entered.token);
        assert_eq!(rig.queue().len(), 2);
    }

    #[test]
    fn a_copy_of_an_entry_that_arrives_after_the_give_up_makes_no_key() {
        let rig = Rig::start();
        let ticket = rig.ticket(0);
        // It never arrived, as far as is known; so it is given up with a marker. Then it arrives.
        assert!(!rig.leave(&ticket, None, true, None).unwrap().was_present);
        assert!(matches!(rig.enter(&ticket), Err(Trouble::Refused(_))));
        assert!(matches!(rig.enter_if_free(&ticket), Err(Trouble::Refused(_))));
        assert!(rig.queue().is_empty());

        let ticket = rig.ticket(1);
        rig.enter(&ticket).unwrap();
        assert!(rig.leave(&ticket, None, true, None).unwrap().was_present, "it did arrive: taken out");
        assert!(rig.enter(&ticket).is_err(), "and a second copy is refused");
        assert!(rig.queue().is_empty());
    }

    #[test]
    fn a_copy_of_an_entry_that_arrives_after_its_key_was_deleted_from_outside_is_taken_out() {
        let rig = Rig::start();
        let ticket = rig.ticket(0);
        let token = rig.enter(&ticket).unwrap().token;
        rig.leave(&ticket, None, false, None).unwrap();
        let copy = rig.enter(&ticket).unwrap().token;
        assert!(copy > token);
        assert!(!rig.leave(&ticket, Some(token), true, None).unwrap().was_present, "the ticket with this token is lost");
        assert!(rig.queue().is_empty(), "and no other is left in its place");
    }

    #[test]
    fn leaving_never_deletes_another_ticket_of_the_same_key() {
        let rig = Rig::start();
        let ticket = rig.ticket(0);
        let first = rig.enter(&ticket).unwrap().token;
        rig.leave(&ticket, Some(first), false, None).unwrap();
        let second = rig.enter(&ticket).unwrap().token;
        assert!(second > first);
        assert!(!rig.leave(&ticket, Some(first), false, None).unwrap().was_present, "a late copy of the first leave");
        assert_eq!(rig.queue().len(), 1);
    }

    #[test]
    fn a_hand_over_sent_twice_hands_over_once() {
        let rig = Rig::start();
        let (first, next) = (rig.ticket(0), rig.ticket(1));
        let token = rig.enter(&first).unwrap().token;
        let left = rig.leave(&first, Some(token), false, Some(&next)).unwrap();
        let entered = left.next.unwrap();
        assert!(left.was_present && entered.ahead.is_nobody() && entered.token > token);
        let again = rig.leave(&first, Some(token), false, Some(&next)).unwrap();
        assert!(again.was_present);
        assert_eq!(again.next.unwrap().token, entered.token);
        // A next ticket that was given up is not put by a late copy.
        let (mine, given_up) = (rig.ticket(4), rig.ticket(5));
        let mine_token = rig.enter(&mine).unwrap().token;
        rig.leave(&given_up, None, true, None).unwrap();
        assert!(rig.leave(&mine, Some(mine_token), false, Some(&given_up)).unwrap().next.is_none());
        rig.leave(&mine, Some(mine_token), false, None).unwrap();
        // After the next one has left too, a third copy must not bring it back.
        rig.leave(&next, Some(entered.token), false, None).unwrap();
        assert!(rig.leave(&first, Some(token), false, Some(&next)).unwrap().next.is_none());
        assert!(rig.queue().is_empty());
    }

    #[test]
    fn a_hand_over_puts_the_next_behind_those_who_wait() {
        let rig = Rig::start();
        let (first, other, next) = (rig.ticket(0), rig.ticket(2), rig.ticket(1));
        let token = rig.enter(&first).unwrap().token;
        rig.enter(&other).unwrap();
        let entered = rig.leave(&first, Some(token), false, Some(&next)).unwrap().next.unwrap();
        assert_eq!(entered.ahead.keys.as_deref(), Some(&[other.key.clone()][..]));
    }

    #[test]
    fn a_long_queue_is_looked_at_from_ones_own_place() {
        let rig = Rig::start();
        let tickets: Vec<_> = (0..20).map(|n| rig.ticket(n)).collect();
        let entered: Vec<_> = tickets.iter().map(|ticket| rig.enter(ticket).unwrap()).collect();
        let nearest: Vec<_> = tickets[..19].iter().rev().take(NEAR + 1).map(|ticket| ticket.key.clone()).collect();
        assert_eq!(entered[19].ahead.keys.as_ref(), Some(&nearest));
        let look = rig.look(&tickets[19], entered[19].token);
        assert!(look.present);
        assert_eq!(look.ahead.keys, Some(nearest));
        // Keys of nested locks are in the same range, but nobody's contenders.
        for n in 0..20 {
            let nested = Ticket { name: "q/n".into(), key: format!("q/n/{:x}-{n:x}", rig.lease), ..rig.ticket(n) };
            rig.enter(&nested).unwrap();
        }
        for ticket in &tickets[..19] {
            rig.leave(ticket, None, false, None).unwrap();
        }
        assert!(rig.look(&tickets[19], entered[19].token).ahead.is_nobody());
        rig.leave(&tickets[19], None, false, None).unwrap();
        assert!(rig.enter_if_free(&rig.ticket(40)).unwrap().is_some(), "a try is not misled by nested keys");
    }

    /// Enters all at the same time; the answers in the order of the tickets.
    fn enter_all(rig: &Rig, tickets: Vec<Ticket>) -> Vec<Result<Entered, Trouble>> {
        rig.ask(move |store| async move {
            let enter = |ticket: Ticket| {
                let store = store.clone();
                tokio::spawn(async move { store.enter(&ticket).await })
            };
            let all: Vec<_> = tickets.into_iter().map(enter).collect();
            let mut answers = Vec::new();
            for one in all {
                answers.push(one.await.unwrap());
            }
            Ok(answers)
        })
        .unwrap()
    }

    fn ticket_of_its_own_name(rig: &Rig, n: u32) -> Ticket {
        Ticket { name: format!("n{n}").into(), key: format!("n{n}/{:x}-0", rig.lease), ..rig.ticket(0) }
    }

    #[test]
    fn requests_that_queue_up_go_together() {
        let rig = Rig::start();
        let before = rig.store.traffic().requests;
        let entered = enter_all(&rig, (0..200).map(|n| ticket_of_its_own_name(&rig, n)).collect());
        assert!(entered.iter().all(|answer| answer.as_ref().unwrap().ahead.is_nobody()));
        assert_eq!(rig.store.traffic().requests - before, 6, "four alone, then what queued up: 100 and 96");
        // Who comes second is told who is first, in one transaction with others as well.
        let second = |n| Ticket { key: format!("n{n}/{:x}-1", rig.lease), ..ticket_of_its_own_name(&rig, n) };
        for (n, answer) in enter_all(&rig, (0..200).map(second).collect()).into_iter().enumerate() {
            let answer = answer.unwrap();
            assert_eq!(answer.ahead.keys, Some(vec![ticket_of_its_own_name(&rig, n as u32).key]));
            assert!(answer.token > entered[n].as_ref().unwrap().token);
        }
    }

    #[test]
    fn one_refused_request_does_not_fail_those_that_went_with_it() {
        let rig = Rig::start();
        let dead = rig.ask(|store| async move { store.open_lease(60).await }).unwrap().0;
        rig.ask(move |store| async move { store.close_lease(dead).await }).unwrap();
        let lease_of = |n| if n == 50 { dead } else { rig.lease };
        let tickets = (0..60).map(|n| Ticket { lease: lease_of(n), ..ticket_of_its_own_name(&rig, n) }).collect();
        for (n, answer) in enter_all(&rig, tickets).into_iter().enumerate() {
            match n {
                50 => assert_eq!(answer.unwrap_err(), Trouble::LeaseGone),
                _ => assert!(answer.unwrap().ahead.is_nobody()),
            }
        }
    }

    #[test]
    fn two_tickets_of_one_name_never_have_one_token() {
        let rig = Rig::start();
        let entered = enter_all(&rig, (0..40).map(|n| rig.ticket(n)).collect());
        let mut tokens: Vec<_> = entered.into_iter().map(|answer| answer.unwrap().token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 40);
    }

    #[test]
    fn nothing_enters_on_a_dead_lease() {
        let rig = Rig::start();
        let lease = rig.lease;
        rig.ask(move |store| async move { store.close_lease(lease).await }).unwrap();
        assert_eq!(rig.enter(&rig.ticket(0)).unwrap_err(), Trouble::LeaseGone);
        let limit = Duration::from_secs(5);
        let renewed = rig.ask(move |store| async move { store.renew_lease(lease, limit, Duration::MAX).await });
        assert_eq!(renewed, Err(Trouble::LeaseGone));
        assert_eq!(rig.ask(move |store| async move { store.close_lease(lease).await }), Ok(()));
    }
}
