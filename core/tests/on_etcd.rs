//! What only a real etcd can show: requests and revisions, several processes, faults from outside,
//! and other clients in the same queue.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use etcdlock::blocking::{Hold, Session};
use etcdlock::{ErrorKind, Loss, Options};
use etcdlock_rig::Etcd;

mod outside;
use outside::{LONG, Outside, connect, connect_apart, connect_at, connect_nth, example, losses, skipped, until};

// ---- what it costs -------------------------------------------------------------------------

#[test]
fn each_call_costs_exactly_its_requests() {
    let etcd = Etcd::start();
    // A long TTL, so that no renewal falls between; and holds too short for a watch.
    let (session, apart) = (connect(&etcd, 600), connect_apart(&etcd, 600));
    let outside = Outside::of(&etcd);
    let mutex = session.mutex("cost").unwrap();
    fn cost<T>(session: &Session, call: impl FnOnce() -> T) -> (u64, T) {
        let before = session.stats().requests;
        let result = call();
        (session.stats().requests - before, result)
    }

    let (requests, hold) = cost(&session, || mutex.lock().unwrap());
    assert_eq!(requests, 1, "an uncontended lock");
    assert_eq!(cost(&session, || hold.unlock().unwrap()).0, 1, "an unlock");
    let (requests, hold) = cost(&session, || mutex.try_lock().unwrap());
    assert_eq!(requests, 1, "a try of a free lock");

    let revision = outside.revision();
    let (requests, tried) = cost(&session, || mutex.try_lock().unwrap());
    assert!(tried.is_none() && requests == 0, "a try of what this process holds: {requests}");
    let there = apart.mutex("cost").unwrap();
    let (requests, tried) = cost(&apart, || there.try_lock().unwrap());
    assert!(tried.is_none() && requests == 1, "a try of what another process holds: {requests}");
    assert_eq!(outside.revision(), revision, "a failed try writes nothing");
    drop(hold);

    // Ten waiters of one process: one entry, ten hand-overs, the last of which is a plain leave.
    let first = mutex.lock().unwrap();
    let waiting: Vec<_> = (0..10).map(|_| mutex.as_async().lock()).collect();
    let (requests, ()) = cost(&session, || {
        first.unlock().unwrap();
        for hold in &waiting {
            hold.wait_for(LONG).expect("in time").unwrap().unlock().wait().unwrap();
        }
    });
    assert_eq!(requests, 11, "one request for each hand-over, and one for the last unlock");
    assert!(outside.keys("cost").is_empty());
}

/// Sessions that to etcd are clients of their own: without authentication the user does not matter.
fn clients(etcd: &Etcd, count: usize) -> Vec<Session> {
    let options = |n| Options::default().ttl(Duration::from_secs(600)).user(format!("client-{n}")).password("any");
    (0..count).map(|n| Session::connect(etcd.endpoint(), options(n)).unwrap()).collect()
}

/// What releases cost all contenders together when each comes again at once.
struct Cost {
    turns: u64,
    requests: u64,
    events: u64,
    /// Holds that may have lasted 50 ms, as all do on a machine that is busy enough: they follow their own key, look once, and may
    /// hear of their own release.
    lasting: u64,
    /// Looks of those who have heard nothing for 3 s.
    re_reads: u64,
}

fn cost_of_turns(contenders: usize) -> Cost {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let clients = clients(&etcd, contenders);
    let mutexes: Vec<_> = clients.iter().map(|client| client.mutex("turns").unwrap()).collect();
    let traffic = || {
        let sum = |count: fn(&etcdlock::Stats) -> u64| clients.iter().map(|client| count(&client.stats())).sum::<u64>();
        (sum(|stats| stats.requests), sum(|stats| stats.watch_events))
    };
    let mut waiting = std::collections::VecDeque::new();
    for (n, mutex) in mutexes.iter().enumerate() {
        waiting.push_back((n, mutex.as_async().lock()));
        until("it is in the queue", || outside.keys("turns").len() == n + 1);
    }
    let mut before = (0, 0);
    let (mut lasting, mut start, mut unlocked) = (0, Instant::now(), Instant::now());
    const CYCLES: usize = 5;
    for cycle in 0..CYCLES {
        if cycle == CYCLES - 1 {
            // By now each watch is old enough to be trusted.
            std::thread::sleep(Duration::from_millis(300));
            (before, lasting, start) = (traffic(), 0, Instant::now());
        }
        for _ in 0..contenders {
            let (n, lock) = waiting.pop_front().unwrap();
            let hold = lock.wait_for(LONG).expect("in time").unwrap();
            let released = Instant::now();
            hold.unlock().wait().unwrap();
            lasting += u64::from(unlocked.elapsed() > Duration::from_millis(40));
            unlocked = released;
            waiting.push_back((n, mutexes[n].as_async().lock()));
            until("it is in the queue again", || outside.keys("turns").len() == contenders);
        }
    }
    // The last release may still be on its way to those who watch.
    std::thread::sleep(Duration::from_millis(200));
    let after = traffic();
    let re_reads = contenders as u64 * (start.elapsed().as_secs() / 3);
    Cost { turns: contenders as u64, requests: after.0 - before.0, events: after.1 - before.1, lasting, re_reads }
}

#[test]
fn a_turn_in_a_short_queue_costs_two_requests_and_an_event_for_each_contender() {
    for contenders in [2, 6] {
        let Cost { turns, requests, events, lasting, re_reads } = cost_of_turns(contenders);
        // Enter and leave, and all hear of the release.
        let (enter_and_leave, all) = (2 * turns, contenders as u64 * turns);
        let told =
            format!("{requests} requests and {events} events for {turns} turns, {lasting} holds lasted, {re_reads} re-reads");
        assert!((enter_and_leave..=enter_and_leave + 2 * lasting + re_reads).contains(&requests), "{told}");
        assert!((all..=all + lasting).contains(&events), "{told}");
    }
}

#[test]
fn a_turn_in_a_long_queue_wakes_one_waiter() {
    let Cost { turns, requests, events, lasting, re_reads } = cost_of_turns(24);
    let told = format!("{requests} requests and {events} events for {turns} turns, {lasting} holds lasted, {re_reads} re-reads");
    // Enter, leave, and a look of the next one.
    assert!((3 * turns..=3 * turns + 2 * lasting + re_reads).contains(&requests), "{told}");
    // Only the next one hears of the release.
    assert!((turns..=turns + lasting).contains(&events), "{told}");
}

#[test]
fn row_17_of_64_threads_that_try_one_wins_and_the_others_write_nothing() {
    let etcd = Etcd::start();
    let sessions = [connect(&etcd, 60), connect_apart(&etcd, 60)];
    let outside = Outside::of(&etcd);
    let revision = outside.revision();
    let start = std::sync::Barrier::new(64);
    let holds: Vec<Hold> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..64)
            .map(|n| {
                let (session, start) = (&sessions[n % 2], &start);
                scope.spawn(move || {
                    let mutex = session.mutex("row17").unwrap();
                    start.wait();
                    mutex.try_lock().unwrap()
                })
            })
            .collect();
        tries.into_iter().filter_map(|tried| tried.join().unwrap()).collect()
    });
    assert_eq!(holds.len(), 1);
    assert_eq!(outside.revision(), revision + 1, "the winner's key, and nothing else");
}

#[test]
fn many_rounds_leave_etcds_index_small() {
    // A key that was deleted stays in etcd's index until a compaction, and slows every look at the
    // queue. So the same few keys are used again and again.
    let etcd = Etcd::start();
    let session = connect(&etcd, 60);
    let outside = Outside::of(&etcd);
    let first = outside.revision();
    let mutex = session.mutex("index").unwrap();
    for _ in 0..200 {
        mutex.lock().unwrap().unlock().unwrap();
    }
    let keys: std::collections::BTreeSet<_> = outside.changed_since("index", first + 1, 400).into_iter().collect();
    assert!(keys.len() <= 2, "{} keys for 200 rounds", keys.len());
}

#[test]
fn row_46_other_data_below_and_beside_a_name_is_not_in_the_way() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    // More than 4 MB of keys below the name, with hex digits where a lease would stand; and of values beside it.
    for thousand in 0..60 {
        let keys = (0..1000).map(|n| format!("big/{:07}/{}", thousand * 1000 + n, "x".repeat(60)));
        outside.put_all(keys.collect(), b"paid");
    }
    outside.put_all((0..40).map(|n| format!("beside/{n:x}")).collect(), &[b'v'; 200_000]);
    let (one, other) = (connect(&etcd, 60), connect_apart(&etcd, 60));
    let hold = one.mutex("big").unwrap().lock_timeout(LONG).unwrap();
    let waiting = other.as_async().mutex("big").unwrap().lock();
    until("it waits", || one.inspect("big").unwrap().len() == 2);
    let listed = one.list("").unwrap();
    assert_eq!(listed.len(), 1);
    let owners: Vec<_> = listed[0].contenders.iter().map(|contender| contender.pid).collect();
    assert_eq!(owners, [std::process::id(); 2]);
    hold.put("beside/0", vec![b'v'; 1_000_000]).unwrap();
    assert_eq!(hold.get("beside/0").unwrap().unwrap().len(), 1_000_000);
    hold.unlock().unwrap();
    waiting.wait_for(LONG).expect("in time").unwrap().unlock().wait().unwrap();
    assert!(one.inspect("big").unwrap().is_empty() && one.list("").unwrap().is_empty());
}

#[test]
fn row_47_of_many_endpoints_the_one_that_lives_is_found_when_connecting() {
    let etcd = Etcd::start();
    for dead in [1, 4, 12] {
        let mut endpoints: Vec<_> = (0..dead).map(|_| format!("127.0.0.1:{}", etcdlock_rig::free_port())).collect();
        endpoints.insert(dead / 2, etcd.endpoint());
        for attempt in 0..3 {
            // Options of its own, so that it finds its way anew. Each pause that was made for a dead one would add up to this.
            let options = Options::default().server_name(format!("dead-{dead}-{attempt}")).connect_timeout(LONG);
            let session = etcdlock::Session::connect(endpoints.join(","), options);
            let session = session.wait_for(LONG).expect("in time").unwrap();
            // One for a lease, and one for the name of its cluster.
            assert!(session.stats().requests <= 2 * (1 + dead as u64), "{} requests, {dead} dead", session.stats().requests);
        }
    }
}

// ---- several processes ---------------------------------------------------------------------

#[test]
fn processes_are_never_inside_together() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("counter");
    std::fs::write(&file, "0000000000").unwrap();
    let children: Vec<_> = (0..4)
        .map(|_| {
            Command::new(example("counter"))
                .args([etcd.endpoint().as_str(), file.to_str().unwrap(), "1000", "lock"])
                .stdout(Stdio::piped())
                .spawn()
                .expect("the example is built with the tests")
        })
        .collect();
    let mut visits = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            let field = |name: &str| -> u64 {
                line.split(' ').find_map(|part| part.strip_prefix(name)).expect("a field").parse().expect("a number")
            };
            visits.push((field("token="), field("value=")));
        }
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "0000004000");
    visits.sort_unstable();
    let values: Vec<u64> = visits.iter().map(|(_, value)| *value).collect();
    assert_eq!(values, (1..=4000).collect::<Vec<_>>(), "in the order of the tokens the counter rises by one");
    assert!(Outside::of(&etcd).keys("/demo").is_empty(), "no key is left");
}

// ---- faults from outside -------------------------------------------------------------------

#[test]
fn a_hold_outlives_its_ttl_many_times() {
    let etcd = Etcd::start();
    let session = connect(&etcd, 2);
    let hold = session.mutex("renewed").unwrap().lock().unwrap();
    let lost = losses(&hold);
    assert_eq!(lost.recv_timeout(Duration::from_secs(7)), Err(mpsc::RecvTimeoutError::Timeout));
    assert!(hold.is_held() && session.stats().renewals >= 8);
    hold.unlock().unwrap();
}

#[test]
fn row_2_a_waiter_whose_lease_was_revoked_gets_the_lock_on_a_new_one() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let (holder, waiter) = (connect(&etcd, 10), connect_apart(&etcd, 10));
    let hold = holder.mutex("row2").unwrap().lock().unwrap();
    let waiting = waiter.as_async().mutex("row2").unwrap().lock();
    until("the waiter is in the queue", || outside.keys("row2").len() == 2);
    let dead = waiter.as_async().lease_id().unwrap();
    outside.revoke(dead);
    until("its key is gone or new", || outside.keys("row2").iter().all(|(_, lease)| *lease != dead));
    hold.unlock().unwrap();
    let hold = waiting.wait_for(LONG).expect("in time").unwrap();
    let keys = outside.keys("row2");
    assert_eq!(keys.len(), 1, "{keys:?}");
    assert_ne!(keys[0].1, dead, "not on the dead lease");
    assert_eq!(Some(keys[0].1), waiter.as_async().lease_id());
    assert!(hold.is_held());
}

#[test]
fn row_42_leases_that_are_gone_as_soon_as_they_began_are_no_storm() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let (holder, waiter) = (connect(&etcd, 60), connect_apart(&etcd, 60));
    let hold = holder.mutex("row42").unwrap().lock().unwrap();
    let ours = holder.as_async().lease_id().unwrap();
    let waiting = waiter.as_async().mutex("row42").unwrap().lock();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        let theirs = outside.keys("row42/").into_iter().find(|(_, lease)| *lease != ours);
        theirs.into_iter().for_each(|(_, lease)| outside.revoke(lease));
    }
    // Without a pause it was hundreds a second.
    let (lost, seconds) = (waiter.stats().leases_lost, start.elapsed().as_secs());
    assert!((2..=10 + 2 * seconds).contains(&lost), "{lost} leases in {seconds} s");
    hold.unlock().unwrap();
    waiting.wait_for(LONG).expect("in time").unwrap().unlock().wait().unwrap();
}

/// The Rust peer, holding `name`, with a clock that jumps when the file is made; `None` where there
/// is no C compiler.
fn holder_with_a_jump(etcd: &Etcd, name: &str, jump: &str, folder: &Path) -> Option<OtherClient> {
    let library = folder.join("jump.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/outside/jump.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    if !built.is_ok_and(|status| status.success()) {
        skipped("there is no C compiler to make a clock that jumps");
        return None;
    }
    let mut command = Command::new(example("peer"));
    command.args(["hold", &etcd.endpoint(), name]);
    command.env("LD_PRELOAD", library).env("CLOCK_JUMP", jump).env("CLOCK_JUMP_FILE", folder.join("now"));
    let mut client = OtherClient::start(command);
    assert_eq!(client.line(), "ready");
    client.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    assert!(client.line().starts_with("held"));
    Some(client)
}

#[test]
fn row_5_a_wall_clock_that_jumps_changes_nothing() {
    let etcd = Etcd::start();
    for jump in ["wall 3600", "wall -3600"] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut holder) = holder_with_a_jump(&etcd, "row5", jump, folder.path()) else { return };
        std::fs::write(folder.path().join("now"), "").unwrap();
        // Longer than its TTL of 10 s less what is left of it: it has to renew.
        std::thread::sleep(Duration::from_secs(11));
        holder.release();
    }
}

#[test]
fn row_6_a_machine_that_was_suspended_has_lost_its_holds_on_wake_up() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().unwrap();
    let Some(mut holder) = holder_with_a_jump(&etcd, "row6", "boot 3600", folder.path()) else { return };
    // For etcd no time has passed, so only the holder's own clock can tell it.
    std::fs::write(folder.path().join("now"), "").unwrap();
    holder.stdin = None;
    assert!(!holder.child.wait().unwrap().success(), "its unlock says that the hold was lost");
}

#[test]
fn row_7_the_ttl_that_the_server_grants_is_used() {
    let etcd = Etcd::start_with(&["--heartbeat-interval", "300", "--election-timeout", "3000"]);
    let session = connect(&etcd, 2);
    assert!(session.as_async().ttl() >= Duration::from_secs(4), "etcd raises the TTL to 1.5 election timeouts");
    let hold = session.mutex("row7").unwrap().lock().unwrap();
    assert!(hold.remaining() > Duration::from_secs(2) && hold.remaining() < session.as_async().ttl());
}

#[test]
fn row_13_a_key_deleted_from_outside_is_a_loss() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let (session, apart) = (connect(&etcd, 60), connect_apart(&etcd, 60));
    let mutex = session.mutex("row13").unwrap();
    // At once, before any watch; later, with a watch of its own; and with a waiter and its watch.
    for pause in [0, 100, 200] {
        let hold = mutex.lock().unwrap();
        let lost = losses(&hold);
        let waiting = (pause == 200).then(|| apart.as_async().mutex("row13").unwrap().lock());
        std::thread::sleep(Duration::from_millis(pause));
        let own = outside.keys("row13")[0].0.clone();
        outside.delete_all(&own);
        assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::KeyDeleted);
        assert!(!hold.is_held());
        assert_eq!(hold.loss(), Some(Loss::KeyDeleted));
        let error = hold.unlock().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Lost);
        assert!(error.message().contains("deleted"), "{error}");
        if let Some(waiting) = waiting {
            drop(waiting.wait_for(LONG).expect("the waiter gets it").unwrap());
        }
    }
    until("all are counted", || (session.stats().holds_lost, session.stats().lost_key_deleted) == (3, 3));
}

#[test]
fn row_13_a_revoked_lease_is_a_loss_and_the_session_goes_on() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let session = connect(&etcd, 60);
    let hold = session.mutex("revoked").unwrap().lock().unwrap();
    let lost = losses(&hold);
    outside.revoke(session.as_async().lease_id().unwrap());
    // Its key went with it, and that is what is seen first: the next renewal is 20 s away.
    assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::KeyDeleted);
    let again = session.mutex("revoked").unwrap().lock_timeout(LONG).expect("the session gets itself a new lease");
    assert!(again.is_held());
    again.unlock().unwrap();
}

#[test]
fn row_47_a_certificate_file_that_does_not_answer_does_not_keep_connect_for_longer_than_it_was_given() {
    let folder = tempfile::tempdir().unwrap();
    // A pipe that nobody writes to.
    let pipe = folder.path().join("ca.pem");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let options = Options::default().ca(pipe.display().to_string()).connect_timeout(Duration::from_millis(500));
    let connecting = etcdlock::Session::connect("https://127.0.0.1:1", options);
    let error = connecting.wait_for(LONG).expect("in time").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("ca.pem"), "{error}");
    // Let the reader go, so that the process can end.
    drop(std::fs::OpenOptions::new().write(true).open(&pipe).unwrap());
}

// ---- a history that changed, clusters, proxies ----------------------------------------------

#[test]
fn row_39_a_history_that_went_back_is_a_loss_at_once_and_waiters_start_over() {
    for is_empty in [false, true] {
        let mut etcd = Etcd::start();
        // Renewals are 200 s apart: they do not tell.
        let (session, apart) = (connect(&etcd, 600), connect_apart(&etcd, 600));
        etcd.kill();
        let backup = etcd.back_up();
        etcd.start_again();
        Outside::of(&etcd).put_all((0..20).map(|n| format!("other/{n}")).collect(), b"x");
        let hold = session.mutex("row39").unwrap().lock().unwrap();
        let (first, lost) = (hold.token(), losses(&hold));
        let waiting = apart.as_async().mutex("row39").unwrap().lock();
        until("it waits", || session.inspect("row39").is_ok_and(|queue| queue.len() == 2));

        etcd.kill();
        etcd.restore((!is_empty).then(|| backup.path()));
        etcd.start_again();
        assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::HistoryChanged, "empty: {is_empty}");
        assert!(hold.unlock().unwrap_err().message().contains("history"));
        let next = waiting.wait_for(LONG).expect("it is served").unwrap();
        assert!(next.token() < first, "the test is one of revisions that went back");
        let again = session.as_async().mutex("row39").unwrap().lock();
        until("it queues", || session.inspect("row39").is_ok_and(|queue| queue.len() == 2));
        next.unlock().wait().unwrap();
        again.wait_for(LONG).expect("in turn").unwrap().unlock().wait().unwrap();
        // What the backup has of leases is ended too, where it may be known.
        session.close(LONG).unwrap();
        apart.close(LONG).unwrap();
        let outside = Outside::of(&etcd);
        until("nothing is left", || outside.keys("row39").is_empty() && outside.leases() == 0);
    }
}

#[test]
fn row_40_endpoints_of_two_clusters_are_refused_and_the_first_counts() {
    let (one, two) = (Etcd::start(), Etcd::start());
    // Several at once: none may be inside while another is refused.
    let both = format!("{},{}", one.endpoint(), two.endpoint());
    let connecting = [0; 3].map(|_| etcdlock::Session::connect(both.as_str(), Options::default()));
    for session in connecting {
        let error = session.wait_for(LONG).expect("in time").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("different clusters") && error.message().contains(&two.endpoint()), "{error}");
    }
    until("nothing is left", || Outside::of(&one).leases() == 0 && Outside::of(&two).leases() == 0);

    // The other is not there when we connect, and answers when the first does not.
    let (first, second) = (one.proxy(), two.proxy());
    second.refuse();
    let target = format!("{},{}", first.endpoint(), second.endpoint());
    let session = connect_at(&target, 60);
    let hold = session.mutex("row40").unwrap().lock().unwrap();
    second.heal();
    first.refuse();
    let error = session.mutex("row40-other").unwrap().lock_timeout(Duration::from_secs(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(hold.put("row40.state", "x").unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(hold.is_held(), "what another cluster does not know is no loss");
    assert!(Outside::of(&two).keys("row40").is_empty(), "nothing was done in the other cluster");
    first.heal();
    hold.put("row40.state", "x").unwrap();
    hold.unlock().unwrap();
}

#[test]
fn row_43_through_etcds_grpc_proxy_hand_overs_and_deletions_are_heard() {
    let etcd = Etcd::start();
    let proxy = etcd.grpc_proxy();
    let outside = Outside::of(&etcd);
    let sessions: Vec<_> = (0..3).map(|n| connect_nth(&proxy.endpoint(), 600, n)).collect();
    let mutexes: Vec<_> = sessions.iter().map(|session| session.mutex("row43").unwrap()).collect();
    for round in 0..5 {
        let hold = mutexes[round % 3].lock_timeout(LONG).unwrap();
        let waiting = sessions[(round + 1) % 3].as_async().mutex("row43").unwrap().lock();
        until("it waits", || outside.keys("row43/").len() == 2);
        hold.unlock().unwrap();
        waiting.wait_for(LONG).expect("in time").unwrap().unlock().wait().unwrap();
    }
    // Several at once: the proxy tells in no order which of them an answer is about. Renewals are 200 s apart.
    let holds: Vec<_> = (0..12).map(|n| sessions[0].mutex(&format!("row43-{n}")).unwrap().lock().unwrap()).collect();
    std::thread::sleep(Duration::from_millis(500));
    for (n, hold) in holds.iter().enumerate() {
        let lost = losses(hold);
        outside.delete_all(&format!("row43-{n}/"));
        assert_eq!(lost.recv_timeout(LONG).expect("a loss"), Loss::KeyDeleted);
        assert!(holds[n + 1..].iter().all(|hold| hold.is_held()));
    }
    assert!(sessions.iter().all(|session| session.stats().reconnections <= 1), "streams are not made anew again and again");
}

#[test]
fn row_45_a_key_that_others_write_over_is_put_right_and_goes_with_its_lease() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let (session, apart) = (connect(&etcd, 60), connect_apart(&etcd, 60));
    let hold = session.mutex("row45").unwrap().lock().unwrap();
    let waiting = apart.as_async().mutex("row45").unwrap().lock();
    until("both stand there", || outside.keys("row45/").len() == 2);
    let ours = outside.keys("row45/");
    // The holder's, then the waiter's.
    std::thread::sleep(Duration::from_millis(300));
    for (key, lease) in &ours {
        outside.put(key, "somebody else's").unwrap();
        assert!(outside.keys("row45/").contains(&(key.clone(), 0)) || outside.keys("row45/").contains(&(key.clone(), *lease)));
        until("it is under its lease again", || outside.keys("row45/").contains(&(key.clone(), *lease)));
        until("it tells whose it is again", || session.inspect("row45").is_ok_and(|queue| queue.iter().all(|one| one.pid > 0)));
        assert!(hold.is_held());
    }
    hold.unlock().unwrap();
    waiting.wait_for(LONG).expect("in turn").unwrap().unlock().wait().unwrap();
    until("nothing is left", || outside.keys("row45/").is_empty());
}

#[test]
fn row_45_a_key_of_somebody_else_where_ours_was_to_be_is_not_taken_for_ours() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let session = connect(&etcd, 60);
    let lease = session.as_async().lease_id().unwrap();
    // All that its first tickets could have, those of hand-overs too.
    let foreign: Vec<_> = (0..4).map(|n| format!("row45/{lease:x}-{n:x}")).collect();
    foreign.iter().for_each(|key| outside.put(key, "somebody else's").unwrap());
    let waiting = session.as_async().mutex("row45").unwrap().lock();
    until("it waits behind them", || outside.keys("row45/").len() == 5);
    assert!(waiting.wait_for(Duration::from_millis(300)).is_none(), "the foreign keys are first");
    foreign.iter().for_each(|key| outside.delete_all(key));
    let hold = waiting.wait_for(LONG).expect("in turn").unwrap();
    // And where the next ticket of a hand-over was to be.
    let next = outside.keys("row45/")[0].0.rsplit_once('-').map(|(start, n)| {
        let n = i64::from_str_radix(n, 16).unwrap();
        format!("{start}-{:x}", n ^ 1)
    });
    let next = next.unwrap();
    outside.put(&next, "somebody else's").unwrap();
    let second = session.as_async().mutex("row45").unwrap().lock();
    std::thread::sleep(Duration::from_millis(100));
    hold.unlock().wait().unwrap();
    assert!(second.wait_for(Duration::from_millis(500)).is_none(), "the foreign key is before it");
    outside.delete_all(&next);
    second.wait_for(LONG).expect("in turn").unwrap().unlock().wait().unwrap();
    until("nothing is left", || outside.keys("row45/").is_empty());

    // A ticket of Go's under a lease with a negative id.
    outside.put("row45/-5", "").unwrap();
    assert!(session.mutex("row45").unwrap().try_lock().unwrap().is_none());
}

#[test]
fn a_guarded_write_is_refused_once_the_key_is_gone() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let session = connect(&etcd, 60);
    let hold = session.mutex("guard").unwrap().lock().unwrap();
    outside.delete_all("guard/");
    assert_eq!(hold.put("state", "late").unwrap_err().kind(), ErrorKind::Lost);
    assert!(!hold.is_held(), "a refused write is a loss");
    assert!(outside.keys("state").is_empty(), "nothing was written");
}

#[test]
fn row_27_without_etcd_connect_says_where_and_why_or_waits_for_it() {
    let mut etcd = Etcd::start();
    etcd.kill();
    let options = Options::default().connect_timeout(Duration::from_secs(1));
    let error = Session::connect(etcd.endpoint(), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains(&etcd.endpoint()) && error.message().contains("refused"), "{error}");

    let options = Options::default().connect_timeout(LONG);
    let connecting = etcdlock::Session::connect(etcd.endpoint(), options);
    etcd.start_again();
    let session = connecting.wait_for(LONG).expect("in time").expect("etcd is there now");
    drop(session.mutex("row27").unwrap().lock().wait().unwrap());
}

#[test]
fn a_restart_of_etcd_interrupts_nobody() {
    let mut etcd = Etcd::start();
    let (holder, waiter) = (connect(&etcd, 30), connect_apart(&etcd, 30));
    let hold = holder.mutex("restart").unwrap().lock().unwrap();
    let waiting = waiter.as_async().mutex("restart").unwrap().lock();
    let outside = Outside::of(&etcd);
    until("the waiter is in the queue", || outside.keys("restart").len() == 2);
    assert_eq!(holder.stats().reconnections, 0);
    etcd.kill();
    etcd.start_again();
    assert!(hold.is_held());
    hold.unlock().expect("through the restart");
    let hold = waiting.wait_for(LONG).expect("in time").unwrap();
    hold.unlock().wait().unwrap();
    // In the queue; a marker against a late copy of an unanswered request stands beside it until the lease ends.
    until("nothing is left", || Outside::of(&etcd).keys("restart/").is_empty());
    assert!(holder.stats().reconnections > 0 && waiter.stats().reconnections > 0);
}

#[test]
fn row_12_an_unlock_without_etcd_returns_in_time_and_the_key_goes_later() {
    let mut etcd = Etcd::start();
    let session = connect(&etcd, 60);
    let mutex = session.mutex("row12").unwrap();
    let hold = mutex.lock().unwrap();
    let waiting = session.mutex("row12-other").unwrap();
    etcd.kill();
    let error = hold.unlock().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("released here"), "{error}");
    assert!(!mutex.is_held());
    assert_eq!(waiting.lock_timeout(Duration::from_millis(300)).unwrap_err().kind(), ErrorKind::Timeout);
    etcd.start_again();
    // Only the keys of the queues: a marker against late copies of a request goes with the lease.
    until("both keys are gone", || ["row12/", "row12-other/"].iter().all(|queue| Outside::of(&etcd).keys(queue).is_empty()));
}

#[test]
fn a_timeout_says_whether_others_have_the_lock_or_etcd_is_silent() {
    let etcd = Etcd::start();
    let (session, apart) = (connect(&etcd, 60), connect_apart(&etcd, 60));
    let timed_out = |name: &str| session.mutex(name).unwrap().lock_timeout(Duration::from_millis(300)).unwrap_err();
    let _hold = apart.mutex("theirs").unwrap().lock().unwrap();
    let error = timed_out("theirs");
    assert!(error.kind() == ErrorKind::Timeout && error.message().contains("others hold it"), "{error}");
    etcd.stop();
    let error = timed_out("nobodys");
    assert!(error.kind() == ErrorKind::Timeout && error.message().contains("no answer"), "{error}");
    etcd.cont();
}

#[test]
fn row_20_a_full_database_is_a_clear_error_and_leaves_nothing() {
    let etcd = Etcd::start_with(&["--quota-backend-bytes", "1048576"]);
    let session = connect(&etcd, 60);
    let outside = Outside::of(&etcd);
    let hold = session.mutex("full").unwrap().lock().unwrap();
    let block = vec![b'x'; 200_000];
    for n in 0..200 {
        if outside.put(&format!("block/{n}"), block.clone()).is_err() {
            break;
        }
    }
    let error = session.mutex("full-other").unwrap().lock_timeout(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("space"), "{error}");
    // A waiter that would be handed over to is refused; the unlock works all the same.
    let waiting = session.as_async().mutex("full").unwrap().lock();
    hold.unlock().unwrap();
    assert_eq!(waiting.wait_for(LONG).expect("in time").unwrap_err().kind(), ErrorKind::Unavailable);
    until("nothing is left", || ["full/", "full-other/"].iter().all(|queue| outside.keys(queue).is_empty()));
}

// ---- other clients in the same queue -------------------------------------------------------

/// A program that waits for the lock, says so when it has it, and lets go when its input closes and
/// its file is gone.
struct OtherClient {
    child: Child,
    stdin: Option<ChildStdin>,
    file: Option<tempfile::NamedTempFile>,
    lines: mpsc::Receiver<String>,
}

impl OtherClient {
    fn start(mut command: Command) -> OtherClient {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let (tx, lines) = mpsc::channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || BufReader::new(stdout).lines().for_each(|line| drop(tx.send(line.unwrap()))));
        OtherClient { stdin: child.stdin.take(), file: None, child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(LONG).expect("a line")
    }

    fn release(&mut self) {
        self.stdin = None;
        self.file = None;
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for OtherClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// etcd's own Go client, built from `tests/peers/go`; none where Go is not installed.
fn go_peer() -> Option<&'static Path> {
    static PEER: OnceLock<Option<PathBuf>> = OnceLock::new();
    PEER.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/go");
        let binary = example("go-peer");
        if Command::new("go").arg("version").stdout(Stdio::null()).status().is_err() {
            skipped("Go is not installed, so its client is not tried");
            return None;
        }
        let built = Command::new("go").args(["build", "-o"]).arg(&binary).arg(".").current_dir(source).status();
        assert!(built.expect("go runs").success(), "the Go peer does not build");
        Some(binary)
    })
    .as_deref()
}

/// Ours, theirs and ours again in one queue, then theirs and ours: each waits for those before.
fn share_one_queue(etcd: &Etcd, name: &str, start_theirs: impl Fn() -> OtherClient) {
    let outside = Outside::of(etcd);
    let prefix = format!("{name}/");
    let (first, last) = (connect(etcd, 30), connect_apart(etcd, 30));
    let ours = first.mutex(name).unwrap().lock().unwrap();
    let mut theirs = start_theirs();
    until("theirs waits", || outside.keys(&prefix).len() == 2);
    let waiting = last.as_async().mutex(name).unwrap().lock();
    until("ours waits behind", || outside.keys(&prefix).len() == 3);
    assert!(theirs.lines.try_recv().is_err(), "theirs must not have the lock yet");
    assert!(first.inspect(name).unwrap().iter().map(|contender| contender.is_holder).eq([true, false, false]));

    let token = ours.token();
    ours.unlock().unwrap();
    let got = theirs.line();
    assert!(got.contains("held") || got.contains(name), "{got}");
    assert!(waiting.wait_for(Duration::ZERO).is_none(), "theirs is first");
    let third = connect_at(&etcd.endpoint().replace("127.0.0.1", "[::ffff:127.0.0.1]"), 30);
    assert!(third.mutex(name).unwrap().try_lock().unwrap().is_none(), "a try by somebody else sees theirs");
    theirs.release();
    let ours = waiting.wait_for(LONG).expect("in time").unwrap();
    assert!(ours.token() > token);

    let mut theirs = start_theirs();
    until("theirs waits again", || outside.keys(&prefix).len() == 2);
    ours.unlock().wait().unwrap();
    theirs.line();
    theirs.release();
    assert!(outside.keys(&prefix).is_empty());
}

#[test]
fn row_37_gos_mutex_and_ours_share_one_queue() {
    let Some(peer) = go_peer() else { return };
    let etcd = Etcd::start();
    share_one_queue(&etcd, "with-go", || {
        let mut command = Command::new(peer);
        command.args(["hold", &etcd.endpoint(), "with-go"]);
        let mut client = OtherClient::start(command);
        assert_eq!(client.line(), "ready");
        client.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        client
    });
}

#[test]
fn row_37_etcdctl_lock_and_ours_share_one_queue() {
    let etcd = Etcd::start();
    if etcd.etcdctl_command().is_none() {
        skipped("etcdctl is not installed, so it is not tried");
        return;
    }
    share_one_queue(&etcd, "with-etcdctl", || {
        let mut command = etcd.etcdctl_command().unwrap();
        // It runs a command while it holds the lock, and gives that no standard input.
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = format!("echo held; while [ -e {} ]; do sleep 0.02; done", file.path().display());
        command.args(["lock", "with-etcdctl", "--", "sh", "-c", &script]);
        let mut client = OtherClient::start(command);
        client.file = Some(file);
        client
    });
}
