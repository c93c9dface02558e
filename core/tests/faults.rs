//! The faults of docs/safety.md's table, against real etcd servers behind proxies that delay, hold,
//! lose and reset. The row that a test shows is in its name.

#![allow(clippy::unwrap_used)]

mod outside;

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use etcdlock::blocking::{Hold, Session};
use etcdlock::{ErrorKind, Loss, Options};
#[cfg(target_os = "linux")]
use etcdlock_rig::Network;
use etcdlock_rig::{Cluster, Direction, Etcd, Fault, Proxy};
use outside::{
    Failed, Gaps, LONG, Outside, connect, connect_apart, connect_at, connect_nth, deletions, example, losses, skipped,
    unless_the_cluster_fails, until,
};

/// One etcd that its clients reach through a proxy.
struct Behind {
    etcd: Etcd,
    proxy: Proxy,
}

impl Behind {
    fn start() -> Behind {
        let etcd = Etcd::start();
        Behind { proxy: etcd.proxy(), etcd }
    }

    fn connect(&self, ttl: u64) -> Session {
        connect_at(&self.proxy.endpoint(), ttl)
    }
}

/// Keys of the queue of `name`, seen from outside.
fn queue(outside: &mut Outside, name: &str) -> Vec<(String, i64, i64)> {
    outside.keys_with_tokens(&format!("{name}/"))
}

// ---- answers that come late, or never ------------------------------------------------------

#[test]
fn row_3_with_answers_delayed_by_most_of_the_ttl_the_holder_knows_before_etcd_deletes_the_key() {
    let behind = Behind::start();
    let session = behind.connect(2);
    let hold = session.mutex("row3").unwrap().lock().unwrap();
    let deleted = deletions(&behind.etcd.endpoint(), "row3/");
    let lost = losses(&hold);
    behind.proxy.set(Direction::ToClient, Fault::Delay(Duration::from_millis(1600)));
    deleted.recv_timeout(LONG).expect("the key goes");
    assert!(!hold.is_held(), "etcd has deleted the key of a hold that believes in itself");
    assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::Deadline);
}

#[test]
fn row_3_cut_off_holders_know_before_etcd_deletes_their_keys() {
    // By how much, and that they have been told before, is in the figures of docs/safety.md: here a
    // busy machine may keep the thread that tells waiting.
    let behind = Behind::start();
    let sessions: Vec<_> = (0..20).map(|n| connect_nth(&behind.proxy.endpoint(), 2 + n as u64 % 2, n)).collect();
    let hold = |(n, session): (usize, &Session)| session.mutex(&format!("cut/{n:02}")).unwrap().lock().unwrap();
    let holds: Vec<Hold> = sessions.iter().enumerate().map(hold).collect();
    let lost: Vec<_> = holds.iter().map(losses).collect();
    let deleted = deletions(&behind.etcd.endpoint(), "cut/");
    behind.proxy.set_both(Fault::Cut);
    for _ in &holds {
        let (key, _) = deleted.recv_timeout(LONG).expect("each key goes");
        let n: usize = key[4..6].parse().unwrap();
        assert!(!holds[n].is_held(), "holder {n} did not know");
    }
    for lost in lost {
        assert_eq!(lost.recv_timeout(LONG).expect("each is told"), Loss::Deadline);
    }
}

#[test]
fn row_3_a_lease_whose_grant_was_answered_late_is_counted_from_the_request() {
    let behind = Behind::start();
    behind.proxy.set(Direction::ToClient, Fault::Delay(Duration::from_millis(1500)));
    let session = behind.connect(5);
    behind.proxy.heal();
    let hold = session.mutex("row3").unwrap().lock().unwrap();
    let deleted = deletions(&behind.etcd.endpoint(), "row3/");
    // Before the first renewal. Counted from the answer, the hold would end a second after its key.
    behind.proxy.set_both(Fault::Cut);
    assert!(hold.is_held(), "this machine is too busy to lock in 3 s");
    deleted.recv_timeout(LONG).expect("the key goes");
    assert!(!hold.is_held(), "etcd has deleted the key of a hold that believes in itself");
}

#[test]
fn row_4_a_renewal_that_is_answered_after_the_deadline_revives_nothing() {
    let behind = Behind::start();
    let session = behind.connect(3);
    let hold = session.mutex("row4").unwrap().lock().unwrap();
    let lost = losses(&hold);
    // Renewals reach etcd, and their answers are held until long after the deadline.
    behind.proxy.set(Direction::ToClient, Fault::Hold);
    assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::Deadline);
    behind.proxy.heal();
    let again = session.mutex("row4").unwrap().lock_timeout(LONG).expect("the session goes on with a new lease");
    assert!(!hold.is_held() && hold.loss() == Some(Loss::Deadline), "late answers change nothing");
    assert!(again.token() > hold.token());
    assert_eq!(hold.unlock().unwrap_err().kind(), ErrorKind::Lost);
    again.unlock().unwrap();
}

/// Locks, hands over between two local waiters and unlocks, while one connection is reset after so
/// many bytes; then looks at what etcd has.
fn lock_through_a_reset(behind: &Behind, session: &Session, outside: &mut Outside, name: &str, direction: Direction, bytes: u64) {
    let mutex = session.mutex(name).unwrap();
    behind.proxy.reset_after(direction, bytes);
    let first = mutex.lock_timeout(LONG).unwrap_or_else(|error| panic!("{direction:?} {bytes}: {error}"));
    let tokens: Vec<_> = queue(outside, name).into_iter().map(|(.., token)| token).collect();
    assert_eq!(tokens, [first.token()], "{direction:?} {bytes}: one ticket, with the token that the holder has");
    let next = mutex.as_async().lock();
    until("the next one waits here", || mutex.try_lock().is_ok_and(|hold| hold.is_none()));
    first.unlock().unwrap_or_else(|error| panic!("{direction:?} {bytes}: {error}"));
    let second = next.wait_for(LONG).expect("in time").unwrap();
    let tokens: Vec<_> = queue(outside, name).into_iter().map(|(.., token)| token).collect();
    assert_eq!(tokens, [second.token()], "{direction:?} {bytes}: after the hand-over");
    second.unlock().wait().unwrap();
    until("nothing is left", || queue(outside, name).is_empty());
}

#[test]
fn row_8_a_connection_reset_at_any_byte_makes_no_second_ticket_and_leaves_nothing() {
    // A lock, a hand-over and an unlock are about 700 bytes there and 500 back.
    std::thread::scope(|scope| {
        for part in 0..8 {
            scope.spawn(move || {
                let behind = Behind::start();
                let session = behind.connect(60);
                let mut outside = Outside::of(&behind.etcd);
                let direction = if part % 2 == 0 { Direction::ToServer } else { Direction::ToClient };
                for bytes in (part / 2 * 6..800).step_by(24) {
                    lock_through_a_reset(&behind, &session, &mut outside, &format!("row8-{bytes}"), direction, bytes);
                }
                assert_eq!(session.stats().leases_lost, 0);
            });
        }
    });
}

#[test]
fn row_8_answers_that_are_dropped_make_no_second_ticket() {
    let behind = Behind::start();
    let session = behind.connect(60);
    let mut outside = Outside::of(&behind.etcd);
    for round in 0..3 {
        let name = format!("dropped-{round}");
        let mutex = session.mutex(&name).unwrap();
        // Entered, without an answer.
        behind.proxy.set(Direction::ToClient, Fault::Cut);
        let locking = mutex.as_async().lock();
        until("the ticket is in", || queue(&mut outside, &name).len() == 1);
        behind.proxy.heal();
        let hold = locking.wait_for(LONG).expect("in time").unwrap();
        assert_eq!(queue(&mut outside, &name)[0].2, hold.token());
        // Handed over, without an answer.
        let next = mutex.as_async().lock();
        until("the next one waits here", || mutex.try_lock().is_ok_and(|hold| hold.is_none()));
        behind.proxy.set(Direction::ToClient, Fault::Cut);
        let token = hold.token();
        let unlocking = hold.unlock_in_place();
        until("the next ticket is in", || queue(&mut outside, &name).iter().any(|(.., other)| *other > token));
        let next = if round == 2 {
            // Nobody wants it any more.
            drop(next);
            None
        } else {
            Some(next)
        };
        behind.proxy.heal();
        unlocking.wait_for(LONG).expect("in time").expect("the hand-over is found out");
        if let Some(next) = next {
            let hold = next.wait_for(LONG).expect("in time").unwrap();
            assert_eq!(queue(&mut outside, &name).iter().map(|(.., token)| *token).collect::<Vec<_>>(), [hold.token()]);
            hold.unlock().wait().unwrap();
        }
        until("nothing is left", || queue(&mut outside, &name).is_empty());
    }
}

#[test]
fn row_9_a_request_that_arrives_after_the_give_up_leaves_no_key() {
    let behind = Behind::start();
    let session = behind.connect(60);
    let mut outside = Outside::of(&behind.etcd);
    for (round, is_try) in [(0, false), (1, true), (2, false)] {
        let name = format!("row9-{round}");
        let mutex = session.mutex(&name).unwrap();
        // A first request makes sure that there is an open connection.
        session.inspect(&name).unwrap();
        behind.proxy.hold_open_connections();
        if is_try {
            let tried = mutex.as_async().try_lock();
            std::thread::sleep(Duration::from_millis(50));
            drop(tried);
        } else {
            let error = mutex.lock_timeout(Duration::from_millis(200)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout);
        }
        // It is given up over a new connection; only then does the first request arrive.
        until("its marker is there", || outside.keys(&name).iter().any(|(key, _)| key.contains(".void-")));
        let revision = outside.revision();
        behind.proxy.deliver_held();
        std::thread::sleep(Duration::from_millis(300));
        assert!(queue(&mut outside, &name).is_empty(), "round {round}");
        assert_eq!(outside.revision(), revision, "the late request has written nothing");
        // And the name is free for this very session.
        mutex.lock_timeout(LONG).unwrap().unlock().unwrap();
    }
}

#[test]
fn row_9_an_unlock_that_arrives_late_deletes_nobody_elses_key() {
    let behind = Behind::start();
    let session = behind.connect(60);
    let mut outside = Outside::of(&behind.etcd);
    let mutex = session.mutex("late-unlock").unwrap();
    let first = mutex.lock().unwrap();
    behind.proxy.hold_open_connections();
    // Sent again over a new connection, so it is confirmed.
    first.unlock().unwrap();
    let second = mutex.lock_timeout(LONG).unwrap();
    behind.proxy.deliver_held();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(queue(&mut outside, "late-unlock")[0].2, second.token());
    second.put("late-unlock.state", "mine").expect("still the owner");
    second.unlock().unwrap();
}

#[test]
fn row_10_and_11_of_2000_locks_cancelled_at_random_moments_no_key_is_left() {
    let behind = Behind::start();
    let mut outside = Outside::of(&behind.etcd);
    let lost_track = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|n| {
                let target = behind.proxy.endpoint();
                scope.spawn(move || {
                    let session = connect_nth(&target, 60, n);
                    let mut granted = 0;
                    for round in 0..250 {
                        // Few names, so that most locks wait for others, or are granted while they are cancelled.
                        let mutex = session.mutex(&format!("cancel-{}", round % 4)).unwrap();
                        let locking = mutex.as_async().lock();
                        std::thread::sleep(Duration::from_micros(fastrand::u64(0..3000)));
                        locking.cancel();
                        match locking.wait_for(LONG).expect("it ends") {
                            Ok(hold) => {
                                assert!(hold.is_held());
                                granted += 1;
                            }
                            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled),
                        }
                    }
                    // The session lives on: no key may go with its lease.
                    (session, granted)
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    if lost_track.iter().all(|(_, granted)| *granted == 0) {
        skipped("on this busy machine no lock was granted at the very moment of its cancel");
    }
    until("no key is left", || (0..4).all(|n| queue(&mut outside, &format!("cancel-{n}")).is_empty()));
}

#[test]
fn a_cancelled_connect_leaves_no_lease() {
    let behind = Behind::start();
    let outside = Outside::of(&behind.etcd);
    behind.proxy.set(Direction::ToClient, Fault::Delay(Duration::from_millis(200)));
    let connecting = etcdlock::Session::connect(behind.proxy.endpoint(), Options::default().ttl(Duration::from_secs(600)));
    until("etcd has granted it", || outside.leases() == 1);
    drop(connecting);
    until("it is ended", || outside.leases() == 0);
}

#[test]
fn row_12_an_unlock_into_a_silent_network_returns_in_time_and_the_key_goes_when_it_is_back() {
    let behind = Behind::start();
    let session = behind.connect(60);
    let mut outside = Outside::of(&behind.etcd);
    let hold = session.mutex("silent").unwrap().lock().unwrap();
    behind.proxy.set_both(Fault::Cut);
    let error = hold.unlock_in_place().wait_for(LONG).expect("in time").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("no answer"), "{error}");
    assert!(!hold.is_held());
    assert_eq!(queue(&mut outside, "silent").len(), 1, "etcd has heard nothing");
    behind.proxy.heal();
    until("the key is deleted in the background", || queue(&mut outside, "silent").is_empty());
    assert_eq!(session.stats().leases_lost, 0, "by the unlock, not with the lease");
}

#[test]
fn row_14_history_compacted_and_streams_reset_while_waiting_changes_nothing() {
    let behind = Behind::start();
    let mut outside = Outside::of(&behind.etcd);
    let holder = connect(&behind.etcd, 60);
    let first = holder.mutex("row14").unwrap().lock().unwrap();
    let waiters: Vec<_> = (0..12).map(|n| connect_nth(&behind.proxy.endpoint(), 60, n)).collect();
    let waiting: Vec<_> = waiters
        .iter()
        .enumerate()
        .map(|(n, session)| {
            let waiting = session.as_async().mutex("row14").unwrap().lock();
            until("it is in the queue", || queue(&mut outside, "row14").len() == n + 2);
            waiting
        })
        .collect();
    // The holder goes while nobody hears it, and all history up to there is forgotten.
    behind.proxy.set_both(Fault::Cut);
    first.unlock().unwrap();
    let revision = outside.revision();
    outside.compact(revision);
    behind.proxy.heal();
    let mut last = 0;
    for waiting in waiting {
        let hold = waiting.wait_for(LONG).expect("in time").unwrap();
        assert!(hold.token() > last, "in order");
        last = hold.token();
        behind.proxy.reset();
        hold.unlock().wait().unwrap();
    }
    until("nothing is left", || queue(&mut outside, "row14").is_empty());
}

#[test]
fn a_guarded_write_whose_answer_is_lost_is_sent_again_and_applied() {
    let behind = Behind::start();
    let session = behind.connect(60);
    let outside = Outside::of(&behind.etcd);
    let hold = session.mutex("guard").unwrap().lock().unwrap();
    behind.proxy.set(Direction::ToClient, Fault::Cut);
    let putting = (*hold).put("guard.state", "paid");
    until("it is written", || outside.value("guard.state").as_deref() == Some("paid"));
    behind.proxy.heal();
    putting.wait_for(LONG).expect("in time").unwrap();
    hold.unlock().unwrap();
}

// ---- many waiters --------------------------------------------------------------------------

#[test]
fn row_21_of_200_waiters_a_release_wakes_a_few_and_the_order_is_kept() {
    let etcd = Etcd::start();
    let mut outside = Outside::of(&etcd);
    let sessions: Vec<_> = (0..200).map(|n| connect_nth(&etcd.endpoint(), 60, n)).collect();
    let holder = connect(&etcd, 60);
    let first = holder.mutex("row21").unwrap().lock().unwrap();
    let waiting: Vec<_> = sessions
        .iter()
        .enumerate()
        .map(|(n, session)| {
            let waiting = session.as_async().mutex("row21").unwrap().lock();
            until("it is in the queue", || queue(&mut outside, "row21").len() == n + 2);
            waiting
        })
        .collect();
    let events = |etcd: &Etcd| etcd.metric("etcd_debugging_mvcc_events_total").expect("etcd counts events");
    let before = events(&etcd);
    let mut last = first.token();
    first.unlock().unwrap();
    for waiting in waiting {
        let hold = waiting.wait_for(LONG).expect("in time").unwrap();
        assert!(hold.token() > last, "in order");
        last = hold.token();
        hold.unlock().wait().unwrap();
    }
    let each = (events(&etcd) - before) / 201.0;
    // Eight near the head, those who follow one ticket, and the holder.
    assert!(each < 20.0, "{each} events for each release");
    assert!(each > 1.0, "the metric counts something else: {each}");
}

// ---- members that fail ---------------------------------------------------------------------

/// Sessions that prefer each of the members in turn, with a hold each.
struct Fleet {
    sessions: Vec<Session>,
    holds: Vec<Hold>,
    lost: mpsc::Receiver<(usize, Loss)>,
}

impl Fleet {
    fn start(cluster: &Cluster, name: &str, ttl: u64) -> Fleet {
        let (tx, lost) = mpsc::channel();
        let sessions: Vec<_> = (0..9).map(|n| connect_nth(&cluster.endpoints(), ttl, n)).collect();
        let holds = sessions.iter().enumerate().map(|(n, session)| {
            let hold = session.mutex(&format!("{name}-{n}")).unwrap().lock().unwrap();
            let tx = tx.clone();
            hold.on_lost(move |loss| tx.send((n, loss)).unwrap());
            hold
        });
        let holds = holds.collect();
        Fleet { sessions, holds, lost }
    }

    /// Lives with a fault for longer than a TTL of 5 s.
    fn survive(&self) -> Result<(), String> {
        match self.lost.recv_timeout(Duration::from_secs(6)) {
            Ok((n, loss)) => Err(format!("the hold of session {n} was lost: {loss:?}")),
            Err(_) => Ok(()),
        }
    }

    /// Everything is still as it was, and ends well.
    fn end(self) -> Result<(), String> {
        for hold in self.holds {
            hold.unlock().map_err(|error| error.to_string())?;
        }
        let lost: u64 = self.sessions.iter().map(|session| session.stats().leases_lost).sum();
        if lost == 0 { Ok(()) } else { Err(format!("{lost} leases were lost")) }
    }
}

/// An election takes two seconds, a TTL of 5 s allows for 2.8 s after the last renewal, and a machine may be too busy for either.
const EXCUSED: Duration = Duration::from_millis(2500);

/// A fleet on a cluster of three, under a fault. `run` says what went wrong.
fn no_session_is_lost(name: &str, run: impl Fn(&mut Cluster, &Fleet) -> Result<(), String>) {
    no_session_is_lost_after(name, |_| {}, run);
}

/// The same, where something is wrong before the fleet connects.
fn no_session_is_lost_after(name: &str, before: impl Fn(&mut Cluster), run: impl Fn(&mut Cluster, &Fleet) -> Result<(), String>) {
    unless_the_cluster_fails(name, || {
        let mut cluster = Cluster::start();
        let gaps = Gaps::of(&cluster);
        before(&mut cluster);
        let fleet = Fleet::start(&cluster, name, 5);
        let survived = run(&mut cluster, &fleet);
        gaps.judge(survived.and_then(|()| fleet.end()), EXCUSED)
    });
}

#[test]
fn row_23_no_fault_of_one_member_costs_a_session_with_a_ttl_of_5_s() {
    no_session_is_lost("killed", |cluster, fleet| {
        let leader = cluster.wait_for_leader();
        cluster.kill(leader);
        fleet.survive()?;
        cluster.start_again(leader);
        cluster.wait_until_healthy(leader);
        Ok(())
    });
    no_session_is_lost("stopped", |cluster, fleet| {
        let leader = cluster.wait_for_leader();
        cluster.stop(leader);
        // It is not resumed here: before 3.4.31 and 3.5.13 a leader that wakes up revokes the leases
        // that have not been renewed with it meanwhile.
        fleet.survive()
    });
    no_session_is_lost("cut from the others, not from its clients", |cluster, fleet| {
        cluster.isolate(cluster.wait_for_leader());
        fleet.survive()?;
        cluster.heal();
        Ok(())
    });
    no_session_is_lost("cut from its clients", |cluster, fleet| {
        cluster.clients(cluster.wait_for_leader()).set_both(Fault::Cut);
        fleet.survive()?;
        cluster.heal();
        Ok(())
    });
}

#[test]
fn row_23_a_rolling_restart_and_a_new_member_cost_no_session() {
    no_session_is_lost("rolling", |cluster, fleet| {
        for member in 0..3 {
            cluster.kill(member);
            // Long enough for some to want to renew with it.
            std::thread::sleep(Duration::from_secs(1));
            cluster.start_again(member);
            cluster.wait_until_healthy(member);
        }
        cluster.replace(1);
        fleet.survive()
    });
}

#[test]
fn row_16_a_waiter_whose_member_is_cut_from_its_peers_moves_to_another() {
    let cluster = Cluster::start();
    let holder = connect_nth(&cluster.endpoints(), 30, 0);
    for member in 0..3 {
        let name = format!("row16-{member}");
        let hold = holder.mutex(&name).unwrap().lock().unwrap();
        // Waiters that are served by each of the members.
        let sessions: Vec<_> = (1..7).map(|n| connect_nth(&cluster.endpoints(), 30, n)).collect();
        let waiting: Vec<_> = sessions.iter().map(|session| session.as_async().mutex(&name).unwrap().lock()).collect();
        until("all wait", || holder.inspect(&name).is_ok_and(|queue| queue.len() == 7));
        // By now they trust their watches and no longer look themselves.
        std::thread::sleep(Duration::from_millis(300));
        cluster.isolate(member);
        // Released in the background, like the others: an unlock may fall into an election that takes longer than it waits.
        drop(hold);
        // In an order that the entries have chosen.
        let (tx, granted) = mpsc::channel();
        let cancellers: Vec<_> = waiting
            .into_iter()
            .map(|waiting| {
                let tx = tx.clone();
                waiting.on_done(move |hold| tx.send(hold).unwrap())
            })
            .collect();
        for _ in &cancellers {
            drop(granted.recv_timeout(LONG).expect("in time").unwrap());
        }
        cluster.heal();
        cluster.wait_until_healthy(member);
        assert!(sessions.iter().all(|session| session.stats().leases_lost == 0));
    }
}

#[test]
fn row_22_a_member_that_accepts_and_stays_silent_costs_nothing() {
    // Found when connecting, and while holding.
    for member in 0..3 {
        let name = format!("row22-{member}");
        let silent_at_first = |cluster: &mut Cluster| cluster.clients(member).set_both(Fault::Cut);
        no_session_is_lost_after(&name, silent_at_first, |cluster, fleet| {
            cluster.heal();
            for next in [0, 1, 2] {
                cluster.clients(next).set_both(Fault::Cut);
                for session in &fleet.sessions {
                    let taken = session.mutex(&format!("{name}-0")).unwrap();
                    match taken.lock_timeout(Duration::from_millis(100)) {
                        Err(error) if error.kind() == ErrorKind::Timeout => {}
                        Err(error) => return Err(error.to_string()),
                        Ok(_) => return Err("a lock that the fleet should hold was free".into()),
                    }
                }
                cluster.heal();
            }
            Ok(())
        });
    }
    let cluster = Cluster::start();
    // All of them: every call still ends on time.
    let session = connect_nth(&cluster.endpoints(), 60, 99);
    let hold = session.mutex("row22").unwrap().lock().unwrap();
    (0..3).for_each(|member| cluster.clients(member).set_both(Fault::Cut));
    let error = session.mutex("row22-other").unwrap().lock_timeout(Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(hold.unlock().unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(session.close(Duration::from_millis(300)).unwrap_err().kind(), ErrorKind::Unavailable);
    let options = Options::default().connect_timeout(Duration::from_secs(1));
    let error = Session::connect(cluster.endpoints(), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("no answer"), "{error}");
}

#[test]
fn row_15_what_a_silent_watch_does_not_tell_is_found_out() {
    let cluster = Cluster::start();
    let holder = connect_nth(&cluster.endpoints(), 30, 0);
    for member in 0..3 {
        // Several, since each hears through a member by chance, and has to be found hearing through this one.
        let rounds: Vec<_> = (0..4)
            .map(|n| {
                let name = format!("row15-{member}-{n}");
                let hold = holder.mutex(&name).unwrap().lock().unwrap();
                let waiter = connect_nth(&cluster.endpoints(), 30, 1 + 4 * member + n);
                let waiting = waiter.as_async().mutex(&name).unwrap().lock();
                until("it waits", || holder.inspect(&name).is_ok_and(|queue| queue.len() == 2));
                (hold, waiter, waiting)
            })
            .collect();
        // By now they trust their watches and no longer look themselves.
        std::thread::sleep(Duration::from_millis(300));
        // Whichever member tells a waiter of changes, its words are held for ever.
        cluster.clients(member).set(Direction::ToClient, Fault::Hold);
        for (hold, _waiter, waiting) in rounds {
            hold.unlock().unwrap();
            waiting.wait_for(LONG).expect("in time").unwrap().unlock().wait().unwrap();
        }
        cluster.heal();
    }
}

#[test]
fn endpoints_may_be_names_with_several_addresses() {
    let etcd = Etcd::start();
    // `localhost` is ::1 as well on many machines, where nobody listens.
    let session = connect_apart(&etcd, 10);
    session.mutex("by-name").unwrap().lock().unwrap().unlock().unwrap();
}

// ---- partitions of a real network ----------------------------------------------------------

/// A process on a node that keeps a lock, gets it again after each loss, and tells of it.
#[cfg(target_os = "linux")]
struct Keeper {
    process: std::process::Child,
    lines: mpsc::Receiver<String>,
}

#[cfg(target_os = "linux")]
impl Keeper {
    fn start(network: &Network, node: usize, name: &str, ttl: u64) -> Keeper {
        let mut command = network.command(node, example("peer"));
        command.args(["keep", &network.endpoints(), name, &ttl.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("the example is built with the tests");
        let (tx, lines) = mpsc::channel();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(|line| drop(tx.send(line))));
        let keeper = Keeper { process, lines };
        assert_eq!(keeper.next("the keeper"), "ready");
        keeper.process.stdin.as_ref().unwrap().write_all(b"go\n").unwrap();
        keeper
    }

    fn next(&self, what: &str) -> String {
        self.lines.recv_timeout(LONG).unwrap_or_else(|_| panic!("never: {what}"))
    }

    /// Waits until it has the lock: the token, and when that was, in nanoseconds.
    fn held(&self, what: &str) -> (i64, u128) {
        let line = self.next(what);
        let fields: Vec<_> = line.split(' ').collect();
        let ["held", token, at] = fields[..] else { panic!("{what}: {line}") };
        (token.parse().unwrap(), at.parse().unwrap())
    }

    /// Waits until it has lost the lock: when it still believed to have it.
    fn lost(&self, what: &str) -> u128 {
        let line = self.next(what);
        let at = line.strip_prefix("lost ").and_then(|rest| rest.strip_suffix(" Deadline"));
        at.unwrap_or_else(|| panic!("{what}: {line}")).parse().unwrap()
    }

    /// Waits until it has had the lock for longer than an election takes, whatever it lost before: its token.
    fn settled(&self, what: &str) -> i64 {
        let (mut token, _) = self.held(what);
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(3)) {
            assert!(line.starts_with("lost "), "{what}: {line}");
            token = self.held(what).0;
        }
        token
    }

    fn let_go(mut self, what: &str) -> Result<(), String> {
        drop(self.process.stdin.take());
        let line = self.next(what);
        if line != "released" {
            return Err(format!("{what} was {line}"));
        }
        assert!(self.process.wait().unwrap().success(), "{what}");
        Ok(())
    }
}

#[cfg(target_os = "linux")]
impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn row_3_and_23_whoever_a_real_partition_cuts_off_knows_before_another_gets_the_lock_and_the_majority_keeps_its_own() {
    let mut first = match Network::start(4) {
        Ok(network) => Some(network),
        Err(why) => return skipped(&format!("no network of its own, so its partitions are not tried: {why}")),
    };
    unless_the_cluster_fails("a partition", || {
        a_partition(&first.take().map_or_else(|| Network::start(4), Ok).expect("another network"))
    });
}

#[cfg(target_os = "linux")]
fn a_partition(network: &Network) -> Result<(), Failed> {
    let [with_leader, alone, unplugged, there] = [3, 4, 5, 6];
    // They know their end after 3.6 s, and etcd deletes their keys after 4 s or, with a new leader, later.
    let names = [with_leader, alone, unplugged].map(|node| format!("lock-{node}"));
    let cut_off = [0, 1, 2].map(|n| Keeper::start(network, 3 + n, &names[n], 4));
    let first = [0, 1, 2].map(|n| cut_off[n].held(&names[n]).0);
    // Several, since each prefers a member by chance: the leader is cut off from some that renew or hear through it.
    let kept: Vec<_> = (0..4).map(|n| Keeper::start(network, there, &format!("kept-{n}"), 10)).collect();
    for keeper in &kept {
        keeper.held("the other side's lock");
    }
    let others = names.each_ref().map(|name| Keeper::start(network, there, name, 10));
    network.on(0, || {
        let mut outside = Outside::at(&network.endpoint(0), None);
        until("the others wait", || names.iter().all(|name| queue(&mut outside, name).len() == 2));
    });

    let endpoints = || (0..3).map(|member| network.endpoint(member)).collect();
    let gaps = network.on(there, || Gaps::watch(endpoints()));
    let start = Instant::now();
    let leader = network.wait_for_leader();
    network.plug_into(1, &[leader, with_leader]);
    network.plug_into(2, &[alone]);
    network.unplug(unplugged);
    let taken = [0, 1, 2].map(|n| {
        let (token, at) = others[n].held(&names[n]);
        let last = cut_off[n].lost(&names[n]);
        assert!(last < at, "{}: another had the lock while its holder believed to have it", names[n]);
        assert!(token > first[n], "{}", names[n]);
        token
    });
    // Longer than those on the side of the majority could live without renewals.
    std::thread::sleep(Duration::from_secs(11).saturating_sub(start.elapsed()));
    let has_lost = kept.iter().find_map(|keeper| keeper.lines.try_recv().ok());
    network.heal();
    let let_go = |keepers: Vec<Keeper>| keepers.into_iter().try_for_each(|keeper| keeper.let_go("a lock of the majority's side"));
    let kept_all = has_lost.map_or(Ok(()), |line| Err(format!("the majority's side: {line}")));
    let kept_all = kept_all.and_then(|()| let_go(kept)).and_then(|()| let_go(others.into()));
    // With a TTL of 10 s a hold lives for 5.6 s after a renewal that was due and got no answer.
    gaps.judge(kept_all, Duration::from_secs(5))?;
    // The sessions that were cut off go on, with new leases.
    // Members that were cut off bring about an election, which a TTL of 4 s may not outlive.
    for (keeper, (name, taken)) in cut_off.iter().zip(names.iter().zip(taken)) {
        assert!(keeper.settled(name) > taken, "{name}");
    }
    let after = network.on(there, || Gaps::watch(endpoints()));
    let go_on = cut_off.into_iter().zip(&names).try_for_each(|(keeper, name)| keeper.let_go(name));
    after.judge(go_on, Duration::from_secs(2))?;
    network.on(0, || {
        let outside = Outside::at(&network.endpoint(0), None);
        until("nothing is left", || ["lock-", "kept-"].iter().all(|prefix| outside.keys(prefix).is_empty()));
    });
    Ok(())
}

// ---- credentials ---------------------------------------------------------------------------

const ROOT: (&str, &str) = ("root", "secret");
const USER: (&str, &str) = ("worker", "hunter2");

/// Switches authentication on, with a user who may use the locks under `auth/`.
fn switch_auth_on(etcd: &Etcd) -> Outside {
    let outside = Outside::of(etcd);
    outside.add_user(ROOT.0, ROOT.1, "root");
    outside.add_role("locks", "auth/");
    outside.add_user(USER.0, USER.1, "locks");
    outside.enable_auth();
    Outside::at(&etcd.endpoint(), Some(ROOT))
}

fn as_user(ttl: u64) -> Options {
    Options::default().ttl(Duration::from_secs(ttl)).user(USER.0).password(USER.1)
}

/// Holds, waits, takes turns and stays idle for longer than a token lives, while users are added.
fn go_on_through_expired_tokens(etcd: &Etcd, seconds: u64) {
    let root = switch_auth_on(etcd);
    let session = Session::connect(etcd.endpoint(), as_user(4)).unwrap();
    let apart = Session::connect(etcd.endpoint().replace("127.0.0.1", "localhost"), as_user(4)).unwrap();
    let held = session.mutex("auth/held").unwrap().lock().unwrap();
    let mut waiting = apart.as_async().mutex("auth/held").unwrap().lock();
    let mut hold = held;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut users = 0;
    let mut turn = 0;
    while Instant::now() < end {
        // Longer than a token lives, every other time.
        std::thread::sleep(Duration::from_secs(if turn % 2 == 0 { 4 } else { 1 }));
        users += 1;
        if let Err(error) = root.try_to_add_user(&format!("user-{users}"), "x") {
            // The observer's own token is as short-lived.
            assert!(error.to_string().contains("token") || error.to_string().contains("auth store"), "{error}");
        }
        assert!(hold.is_held(), "after {users} users");
        hold.put("auth/state", format!("{users}")).unwrap();
        hold.unlock().unwrap();
        let next = waiting.wait_for(LONG).expect("in time").expect("the waiter goes on");
        next.unlock().wait().unwrap();
        hold = session.mutex("auth/held").unwrap().lock_timeout(LONG).unwrap();
        waiting = apart.as_async().mutex("auth/held").unwrap().lock();
        turn += 1;
    }
    drop(waiting);
    hold.unlock().unwrap();
    assert_eq!((session.stats().leases_lost, apart.stats().leases_lost), (0, 0));
}

#[test]
fn row_24_with_tokens_that_live_3_s_holders_and_waiters_go_on() {
    go_on_through_expired_tokens(&Etcd::start_with(&["--auth-token-ttl", "3", "--bcrypt-cost", "4"]), 12);
}

#[test]
fn row_24_with_jwt_and_users_added_meanwhile_holders_and_waiters_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, [7; 64]).unwrap();
    let token = format!("jwt,priv-key={},sign-method=HS256,ttl=3s", key.display());
    go_on_through_expired_tokens(&Etcd::start_with(&["--auth-token", &token, "--bcrypt-cost", "4"]), 12);
}

/// Since 3.5.28 and 3.6.9 etcd tells the members to administrators alone; what they say there is how endpoints are compared.
#[test]
fn row_40_who_may_not_ask_for_the_members_locks_all_the_same() {
    let etcd = Etcd::start();
    drop(switch_auth_on(&etcd));
    let both = [etcd.endpoint(), etcd.endpoint().replace("127.0.0.1", "localhost")].join(",");
    for nth in 0..3 {
        let session = Session::connect(&both, as_user(4)).unwrap();
        let hold = session.mutex("auth/members").unwrap().lock_timeout(LONG).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        assert!(hold.is_held(), "session {nth}");
        hold.unlock().unwrap();
        assert_eq!(session.stats().leases_lost, 0);
    }
}

#[test]
fn row_24_a_wrong_password_is_denied_at_once() {
    let etcd = Etcd::start();
    drop(switch_auth_on(&etcd));
    for options in [
        Options::default().user("worker").password("wrong"),
        Options::default().user("nobody").password("x"),
        // None at all.
        Options::default(),
    ] {
        let connecting = etcdlock::Session::connect(etcd.endpoint(), options.connect_timeout(LONG * 2));
        let error = connecting.wait_for(LONG).expect("at once").and_then(|session| {
            // Without a user a session can be opened, and nothing more.
            session.mutex("auth/none").unwrap().lock().wait_for(LONG).expect("at once").map(drop)
        });
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    // Credentials that etcd does not ask for do no harm.
    let open = Etcd::start();
    Session::connect(open.endpoint(), as_user(10)).unwrap().mutex("auth/x").unwrap().lock().unwrap().unlock().unwrap();
}

#[test]
fn row_44_authentication_switched_on_and_off_and_a_changed_password_under_a_session() {
    let etcd = Etcd::start_with(&["--bcrypt-cost", "4"]);
    let outside = Outside::of(&etcd);
    outside.add_user(ROOT.0, ROOT.1, "root");
    outside.add_role("locks", "auth/");
    outside.add_user(USER.0, USER.1, "locks");
    // Programs get a user first, and then it is asked for.
    let session = Session::connect(etcd.endpoint(), as_user(4)).unwrap();
    let hold = session.mutex("auth/held").unwrap().lock().unwrap();
    let works = |when: &str| {
        let mutex = session.mutex(&format!("auth/{when}")).unwrap();
        mutex.lock_timeout(LONG).unwrap_or_else(|error| panic!("{when}: {error}")).unlock().unwrap();
        let new = Session::connect(etcd.endpoint(), as_user(4)).unwrap_or_else(|error| panic!("{when}, a new session: {error}"));
        new.mutex("auth/new").unwrap().lock_timeout(LONG).unwrap().unlock().unwrap();
        hold.put("auth/state", when).unwrap();
    };
    works("off");
    outside.enable_auth();
    works("on");
    let root = Outside::at(&etcd.endpoint(), Some(ROOT));
    // What is open goes on with its token, or with the next one when the password is right again.
    root.change_password(USER.0, "another");
    root.change_password(USER.0, USER.1);
    works("on, with the password changed");
    root.disable_auth();
    works("off again");
    outside.enable_auth();
    works("on again");
    // Through all of it the lease was renewed.
    std::thread::sleep(Duration::from_secs(5));
    assert!(hold.is_held() && session.stats().leases_lost == 0);
    hold.unlock().unwrap();
}

#[test]
fn row_25_permission_taken_away_while_holding_is_denied_and_lost_at_the_latest_at_the_deadline() {
    let etcd = Etcd::start_with(&["--auth-token-ttl", "3", "--bcrypt-cost", "4"]);
    let root = switch_auth_on(&etcd);
    let session = Session::connect(etcd.endpoint(), as_user(4)).unwrap();
    let hold = session.mutex("auth/held").unwrap().lock().unwrap();
    let waiting = session.as_async().mutex("auth/held").unwrap().lock();
    let lost = losses(&hold);
    root.revoke_from_role("locks", "auth/");
    let error = hold.put("auth/state", "x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    let error = session.mutex("auth/other").unwrap().lock_timeout(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    // And now the user is gone altogether.
    root.delete_user(USER.0);
    lost.recv_timeout(LONG).expect("lost by the deadline");
    assert!(!hold.is_held());
    assert_eq!(waiting.wait_for(LONG).expect("it ends").unwrap_err().kind(), ErrorKind::Denied);
    // A user of that name again, with the permission: the session goes on.
    root.grant_to_role("locks", "auth/");
    root.add_user(USER.0, USER.1, "locks");
    let mutex = session.mutex("auth/held").unwrap();
    until("the session works again", || mutex.lock_timeout(Duration::from_secs(5)).is_ok());
}

// ---- TLS -----------------------------------------------------------------------------------

/// A certificate authority, and files in a folder.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: rcgen::Issuer::new(params, key), pem }
    }

    /// Certificate and key.
    fn sign(&self, host: &str, expired: bool) -> (String, String) {
        let mut params = rcgen::CertificateParams::new([host.to_owned()]).unwrap();
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

struct Secured {
    etcd: Etcd,
    folder: tempfile::TempDir,
}

impl Secured {
    fn start(authority: &Authority, (cert, key): (String, String)) -> Secured {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(file("server.pem"), cert).unwrap();
        std::fs::write(file("server.key"), key).unwrap();
        std::fs::write(file("ca.pem"), &authority.pem).unwrap();
        let etcd = Etcd::start_with(&[
            "--cert-file",
            &file("server.pem"),
            "--key-file",
            &file("server.key"),
            "--trusted-ca-file",
            &file("ca.pem"),
            "--client-cert-auth",
        ]);
        Secured { etcd, folder }
    }

    fn url(&self) -> String {
        format!("https://{}", self.etcd.endpoint())
    }
}

#[test]
fn row_26_a_tls_failure_says_why_at_once_and_good_certificates_work() {
    let (ours, other) = (Authority::new(), Authority::new());
    let good = Secured::start(&ours, ours.sign("127.0.0.1", false));
    let expired = Secured::start(&ours, ours.sign("127.0.0.1", true));
    let elsewhere = Secured::start(&ours, ours.sign("etcd.example", false));
    let (cert, key) = ours.sign("client", false);
    let (bad_cert, bad_key) = other.sign("client", false);
    // So long that only an answer at once can be in time.
    let trusting = |ca: &Authority| Options::default().ca(ca.pem.as_str()).connect_timeout(LONG * 2);
    for (what, server, options, reason) in [
        ("another CA", &good, trusting(&other).cert(cert.as_str()).key(key.as_str()), "certificate"),
        ("an expired certificate", &expired, trusting(&ours).cert(cert.as_str()).key(key.as_str()), "expired"),
        ("another host's certificate", &elsewhere, trusting(&ours).cert(cert.as_str()).key(key.as_str()), "name"),
        ("no client certificate", &good, trusting(&ours), "certificate"),
        ("another CA's client certificate", &good, trusting(&ours).cert(bad_cert.as_str()).key(bad_key.as_str()), ""),
    ] {
        let connecting = etcdlock::Session::connect(server.url(), options);
        let error = connecting.wait_for(LONG).unwrap_or_else(|| panic!("{what}: not at once")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{what}: {error}");
        assert!(error.message().to_lowercase().contains(reason), "{what}: {error}");
    }
    let options = trusting(&ours).cert(cert.as_str()).key(key.as_str());
    let session = Session::connect(good.url(), options.clone()).unwrap();
    session.mutex("tls").unwrap().lock().unwrap().unlock().unwrap();
    let session = Session::connect(elsewhere.url(), options.clone().server_name("etcd.example")).unwrap();
    session.mutex("tls").unwrap().lock().unwrap().unlock().unwrap();
    // A member with a bad certificate is one bad member; only if all have one, it is an error.
    for _ in 0..4 {
        let target = format!("{},{}", good.url(), expired.url());
        let session = Session::connect(target.as_str(), options.clone().owner("x")).unwrap();
        session.mutex("tls").unwrap().lock().unwrap().unlock().unwrap();
    }
    let connecting = etcdlock::Session::connect(format!("{},{}", expired.url(), elsewhere.url()), options);
    assert_eq!(connecting.wait_for(LONG).expect("at once").unwrap_err().kind(), ErrorKind::Denied);
}

#[test]
fn certificates_are_read_again_when_the_connection_is_made_again() {
    let (old, new) = (Authority::new(), Authority::new());
    let mut secured = Secured::start(&old, old.sign("127.0.0.1", false));
    let file = |name: &str| secured.folder.path().join(name).to_str().unwrap().to_owned();
    let (cert, key) = old.sign("client", false);
    std::fs::write(file("client.pem"), cert).unwrap();
    std::fs::write(file("client.key"), key).unwrap();
    let options = Options::default().ttl(Duration::from_secs(60));
    let options = options.ca(file("ca.pem")).cert(file("client.pem")).key(file("client.key"));
    let session = Session::connect(secured.url(), options).unwrap();
    let hold = session.mutex("renewed").unwrap().lock().unwrap();

    let (server_cert, server_key) = new.sign("127.0.0.1", false);
    let (cert, key) = new.sign("client", false);
    for (name, pem) in [
        ("ca.pem", &new.pem),
        ("server.pem", &server_cert),
        ("server.key", &server_key),
        ("client.pem", &cert),
        ("client.key", &key),
    ] {
        std::fs::write(file(name), pem).unwrap();
    }
    secured.etcd.kill();
    secured.etcd.start_again();
    hold.unlock().expect("over a connection with the new certificates");
    session.mutex("renewed").unwrap().lock().unwrap().unlock().unwrap();
}

#[test]
fn row_22_a_server_that_is_silent_in_the_tls_handshake_is_given_up_in_time() {
    let authority = Authority::new();
    let secured = Secured::start(&authority, authority.sign("127.0.0.1", false));
    let proxy = secured.etcd.proxy();
    let (cert, key) = authority.sign("client", false);
    let options = Options::default().ca(authority.pem.as_str()).cert(cert).key(key).connect_timeout(Duration::from_secs(1));
    proxy.set_both(Fault::Cut);
    let url = format!("https://{}", proxy.endpoint());
    let connecting = etcdlock::Session::connect(url.as_str(), options.clone());
    assert_eq!(connecting.wait_for(LONG).expect("in time").unwrap_err().kind(), ErrorKind::Unavailable);
    let both = format!("{url},{}", secured.url());
    for _ in 0..4 {
        let session = Session::connect(both.as_str(), options.clone().connect_timeout(LONG)).expect("by the other one");
        session.mutex("tls").unwrap().lock().unwrap().unlock().unwrap();
    }
}
