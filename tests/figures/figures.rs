//! The figures of docs/safety.md: `figures [PART…]`, all parts without arguments. `make safety-figures`.
//!
//! Parts: margin, outside, takeover, members, cancels, cycles, go.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../core/tests/outside/mod.rs"]
mod outside;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use etcdlock::ErrorKind;
use etcdlock::blocking::{Hold, Session};
use etcdlock_rig::{Cluster, Direction, Etcd, Fault};
use outside::{Gaps, LONG, Outside, connect, connect_nth, deletions, until};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [what, endpoint, name, ttl] = &args[..]
        && what == "hold"
    {
        let session = connect_nth(endpoint, ttl.parse().unwrap(), 0);
        let _hold = session.mutex(name).unwrap().lock().unwrap();
        println!("held");
        loop {
            std::thread::park();
        }
    }
    let etcd = Command::new(etcdlock_rig::find("etcd").expect("etcd")).arg("--version").output().unwrap();
    println!("{}, etcdlock {}", String::from_utf8_lossy(&etcd.stdout).lines().next().unwrap_or_default(), etcdlock::VERSION);
    for (part, run) in [
        ("margin", margin as fn()),
        ("outside", outside_deletion),
        ("takeover", take_over),
        ("cancels", cancels),
        ("cycles", cycles),
        ("members", members),
        ("go", beside_go),
    ] {
        if args.is_empty() || args.iter().any(|arg| arg == part) {
            let start = Instant::now();
            run();
            println!("  ({part}: {:.0} s)", start.elapsed().as_secs_f64());
        }
    }
}

fn spread(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize].as_secs_f64() * 1000.0;
    println!(
        "{what}: n {}, min {:.1} ms, p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        times.len(),
        at(0.0),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// Holders that are cut off at any moment: how long before etcd's delete of the key each has known.
fn margin() {
    for ttl in [2, 5, 10] {
        const HOLDERS: usize = 50;
        let etcd = Etcd::start();
        let proxy = etcd.proxy();
        let (tx, lost) = mpsc::channel();
        let sessions: Vec<_> = (0..HOLDERS)
            .map(|n| {
                // At different moments of their renewals.
                std::thread::sleep(Duration::from_millis(ttl * 1000 / 3 / HOLDERS as u64));
                connect_nth(&proxy.endpoint(), ttl, n)
            })
            .collect();
        let holds: Vec<Hold> = sessions
            .iter()
            .enumerate()
            .map(|(n, session)| {
                let hold = session.mutex(&format!("cut/{n:03}")).unwrap().lock().unwrap();
                let tx = tx.clone();
                hold.on_lost(move |_| tx.send((n, Instant::now())).unwrap());
                hold
            })
            .collect();
        let deleted = deletions(&etcd.endpoint(), "cut/");
        proxy.set_both(Fault::Cut);
        let mut lost_at = [None; HOLDERS];
        for _ in &holds {
            let (n, at) = lost.recv_timeout(LONG).expect("each is lost");
            lost_at[n] = Some(at);
        }
        let mut late = 0;
        let margins = holds.iter().map(|_| {
            let (key, deleted_at) = deleted.recv_timeout(LONG).expect("each key goes");
            let lost_at: Instant = lost_at[key[4..7].parse::<usize>().unwrap()].unwrap();
            late += usize::from(lost_at >= deleted_at);
            deleted_at.saturating_duration_since(lost_at)
        });
        spread(&format!("lost before delete, TTL {ttl} s"), margins.collect());
        println!("  too late: {late}");
    }
}

/// A key that is deleted from outside: how long after the request was sent its holder knows.
fn outside_deletion() {
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let session = connect(&etcd, 60);
    let mut times = Vec::new();
    for round in 0..500 {
        let name = format!("outside-{}", round % 10);
        let hold = session.mutex(&name).unwrap().lock().unwrap();
        let (tx, lost) = mpsc::channel();
        hold.on_lost(move |_| tx.send(Instant::now()).unwrap());
        // From no time at all, before the hold has a watch, to long after.
        std::thread::sleep(Duration::from_millis(round % 5 * 40));
        let start = Instant::now();
        outside.delete_all(&format!("{name}/"));
        times.push(lost.recv_timeout(LONG).expect("a loss") - start);
    }
    spread("detection of an outside deletion", times);
}

fn child(args: &[&str]) -> (Child, mpsc::Receiver<(String, Instant)>) {
    started(Command::new(std::env::current_exe().unwrap()).args(args))
}

/// A program, and the lines it prints with the moments at which they came.
fn started(command: &mut Command) -> (Child, mpsc::Receiver<(String, Instant)>) {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let (tx, lines) = mpsc::channel();
    let stdout = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| drop(tx.send((line, Instant::now()))));
    });
    (child, lines)
}

/// Holders that are killed (SIGKILL), TTL 5 s: how long until the next in the queue has the lock.
fn take_over() {
    let etcd = Etcd::start();
    let holders: Vec<_> = (0..60).map(|n| child(&["hold", &etcd.endpoint(), &format!("killed-{n}"), "5"])).collect();
    let mut waiting = Vec::new();
    for (n, (_, lines)) in holders.iter().enumerate() {
        assert_eq!(lines.recv_timeout(LONG).expect("a line").0, "held");
        let session = connect_nth(&etcd.endpoint(), 30, n);
        let (tx, granted) = mpsc::channel();
        let locking = session.as_async().mutex(&format!("killed-{n}")).unwrap().lock();
        let canceller = locking.on_done(move |hold| tx.send((hold.map(|hold| hold.token()), Instant::now())).unwrap());
        waiting.push((session, granted, canceller));
    }
    let killed: Vec<_> = holders
        .into_iter()
        .map(|(mut child, _)| {
            std::thread::sleep(Duration::from_millis(fastrand::u64(0..100)));
            child.kill().unwrap();
            let at = Instant::now();
            child.wait().unwrap();
            at
        })
        .collect();
    let times = killed.into_iter().zip(&waiting).map(|(killed, (_, granted, _))| {
        let (token, at) = granted.recv_timeout(LONG).expect("taken over");
        token.unwrap();
        at - killed
    });
    spread("take-over after SIGKILL, TTL 5 s", times.collect());
}

fn cancels() {
    let etcd = Etcd::start();
    let proxy = etcd.proxy();
    // Most requests are under way for a while, so that most cancels meet one.
    proxy.set_both(Fault::Delay(Duration::from_millis(1)));
    let outside = Outside::of(&etcd);
    let endpoint = proxy.endpoint();
    let sessions: Vec<Session> = std::thread::scope(|scope| {
        let workers = (0..8).map(|n| {
            let endpoint = &endpoint;
            scope.spawn(move || {
                let session = connect_nth(endpoint, 600, n);
                for round in 0..250 {
                    let locking = session.as_async().mutex(&format!("cancel-{}", round % 4)).unwrap().lock();
                    std::thread::sleep(Duration::from_micros(fastrand::u64(0..8000)));
                    locking.cancel();
                    drop(locking.wait_for(LONG).expect("it ends"));
                }
                session
            })
        });
        workers.collect::<Vec<_>>().into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    // What is cancelled is cleaned up in the background; the sessions live on.
    let end = Instant::now() + LONG;
    let left = loop {
        let left = outside.keys("cancel-").iter().filter(|(key, _)| !key.contains(".void-")).count();
        if left == 0 || Instant::now() > end {
            break left;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    println!("keys left after 2000 cancels in {} sessions: {left}", sessions.len());
}

fn own(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn cycles() {
    let etcd = Etcd::start();
    let session = connect(&etcd, 60);
    let mutex = session.mutex("cycles").unwrap();
    let state = || (own("Threads:"), std::fs::read_dir("/proc/self/fd").unwrap().count(), own("VmRSS:"));
    (0..1000).for_each(|_| mutex.lock().unwrap().unlock().unwrap());
    let (threads, files, memory) = state();
    (0..100_000).for_each(|_| mutex.lock().unwrap().unlock().unwrap());
    let after = state();
    println!(
        "after 1,000 and after 101,000 cycles: threads {threads} and {}, descriptors {files} and {}, memory {memory} kB and {} kB",
        after.0, after.1, after.2
    );
    for n in 0..2000 {
        connect_nth(&etcd.endpoint(), 60, n).close(LONG).unwrap();
    }
    until("connections are closed", || std::fs::read_dir("/proc/self/fd").unwrap().count() <= files + 2);
    let after = state();
    println!("after 2,000 sessions more: threads {}, descriptors {}, memory {} kB", after.0, after.1, after.2);
}

/// Single faults of members, one after the other, in two clusters at once, with nine sessions in
/// each: what is lost. A resumed leader is left out before 3.5.13, where it revokes leases.
fn members() {
    const FAULTS: usize = 52;
    let sums: Vec<_> = std::thread::scope(|scope| {
        let clusters: Vec<_> = (0..2).map(|n| scope.spawn(move || members_of_one(n, FAULTS))).collect();
        clusters.into_iter().map(|cluster| cluster.join().unwrap()).collect()
    });
    let lost: usize = sums.iter().map(|sum| sum.0).sum();
    let excused: usize = sums.iter().map(|sum| sum.1).sum();
    println!(
        "sessions lost over {} single-member faults with 18 sessions, TTL 5 s: {lost} \
         (and {excused} while the cluster itself committed nothing for more than 2.5 s)",
        2 * FAULTS
    );
}

fn members_of_one(number: usize, faults: usize) -> (usize, usize) {
    let mut cluster = Cluster::start();
    let lost = Arc::new(AtomicI64::new(0));
    let sessions: Vec<_> = (0..9).map(|n| connect_nth(&cluster.endpoints(), 5, 100 * number + n)).collect();
    let mut holds: Vec<Option<Hold>> = sessions.iter().map(|_| None).collect();
    let (mut sum, mut excused) = (0, 0);
    for fault in 0..faults {
        for (n, session) in sessions.iter().enumerate() {
            if holds[n].as_ref().is_none_or(|hold| !hold.is_held()) {
                let hold = session.mutex(&format!("member-{n}")).unwrap().lock_timeout(LONG).unwrap();
                let lost = lost.clone();
                hold.on_lost(move |loss| {
                    println!("  a hold is lost: {loss}");
                    lost.fetch_add(1, Ordering::Relaxed);
                });
                holds[n] = Some(hold);
            }
        }
        let before = lost.load(Ordering::Relaxed);
        let gaps = Gaps::of(&cluster);
        {
            let leader = cluster.wait_for_leader();
            let member = if fault % 2 == 0 { leader } else { (leader + 1) % 3 };
            match fault / 2 % 5 {
                0 => {
                    cluster.kill(member);
                    std::thread::sleep(Duration::from_millis(3500));
                    cluster.start_again(member);
                }
                1 => {
                    cluster.isolate(member);
                    std::thread::sleep(Duration::from_millis(3500));
                }
                2 => {
                    cluster.clients(member).set_both(Fault::Cut);
                    std::thread::sleep(Duration::from_millis(3500));
                }
                3 => {
                    cluster.clients(member).set(Direction::ToClient, Fault::Delay(Duration::from_millis(900)));
                    std::thread::sleep(Duration::from_millis(3500));
                }
                _ => {
                    cluster.stop(member);
                    std::thread::sleep(Duration::from_millis(3500));
                    cluster.cont(member);
                }
            }
            cluster.heal();
            cluster.wait_until_healthy(member);
            std::thread::sleep(Duration::from_millis(1500));
        }
        let gap = gaps.longest();
        let now = (lost.load(Ordering::Relaxed) - before) as usize;
        if now > 0 && gap > Duration::from_millis(2500) {
            excused += now;
        } else {
            sum += now;
        }
        if now > 0 {
            println!("  fault {fault}: {now} lost; longest time without a commit {gap:.1?}");
        }
    }
    (sum, excused)
}

// ---- beside Go -----------------------------------------------------------------------------

fn go_peer() -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/go");
    let binary = std::env::current_exe().unwrap().with_file_name("go-peer");
    if Command::new("go").arg("version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: Go is not installed, so its client is not tried");
        return None;
    }
    let built = Command::new("go").args(["build", "-o"]).arg(&binary).arg(".").current_dir(source).status();
    assert!(built.expect("go runs").success(), "the Go peer does not build");
    Some(binary)
}

/// The same faults on etcd's own client and on ours: a line for each, as it goes into the table.
fn beside_go() {
    let Some(go) = go_peer() else { return };
    let go = |args: &[&str]| started(Command::new(&go).args(args));
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let line = |lines: &mpsc::Receiver<(String, Instant)>| lines.recv_timeout(LONG).expect("a line");

    // Row 2: a waiter's lease is revoked, then the holder unlocks.
    let holder = connect(&etcd, 60);
    let hold = holder.mutex("two").unwrap().lock().unwrap();
    let (mut theirs, lines) = go(&["lost", &etcd.endpoint(), "two", "60"]);
    until("Go waits", || outside.keys("two/").len() == 2);
    let lease = outside.keys("two/")[1].1;
    outside.revoke(lease);
    hold.unlock().unwrap();
    assert_eq!(line(&lines).0, "ready");
    let said = line(&lines).0;
    println!("row 2, Go: {said:?}; its key is {}", if outside.keys("two/").is_empty() { "not there" } else { "there" });
    theirs.kill().unwrap();
    theirs.wait().unwrap();

    let hold = holder.mutex("two-ours").unwrap().lock().unwrap();
    let waiter = connect_nth(&etcd.endpoint(), 60, 1);
    let waiting = waiter.as_async().mutex("two-ours").unwrap().lock();
    until("ours waits", || outside.keys("two-ours/").len() == 2);
    let lease = outside.keys("two-ours/")[1].1;
    outside.revoke(lease);
    hold.unlock().unwrap();
    let hold = waiting.wait_for(LONG).expect("in time").unwrap();
    let keys = outside.keys_with_tokens("two-ours/");
    println!(
        "row 2, ours: held with token {}, key {} on {} lease",
        hold.token(),
        if keys.iter().any(|(.., token)| *token == hold.token()) { "there" } else { "NOT there" },
        if keys.iter().any(|(_, on, _)| *on == lease) { "THE DEAD" } else { "a new" },
    );
    drop(hold);

    // Row 3: answers come 0.8 TTL late, and holders that are cut off altogether.
    for (what, fault, both) in
        [("answers 0.8 TTL late", Fault::Delay(Duration::from_millis(4000)), false), ("cut off", Fault::Cut, true)]
    {
        let proxy = etcd.proxy();
        let name = format!("three-{}", both as u8);
        let deleted = deletions(&etcd.endpoint(), &format!("{name}/"));
        let deleted_ours = deletions(&etcd.endpoint(), &format!("{name}-ours/"));
        let (mut theirs, lines) = go(&["lost", &proxy.endpoint(), &name, "5"]);
        assert_eq!(line(&lines).0, "ready");
        assert!(line(&lines).0.starts_with("held"));
        let session = connect_nth(&proxy.endpoint(), 5, 2);
        let hold = session.mutex(&format!("{name}-ours")).unwrap().lock().unwrap();
        let (tx, lost) = mpsc::channel();
        hold.on_lost(move |_| tx.send(Instant::now()).unwrap());
        std::thread::sleep(Duration::from_secs(2));
        let start = Instant::now();
        if both {
            proxy.set_both(fault);
        } else {
            proxy.set(Direction::ToClient, fault);
        }
        let ours = lost.recv_timeout(LONG).expect("ours knows") - start;
        let ours_gone = deleted_ours.recv_timeout(LONG).expect("our key goes").1 - start;
        println!("row 3, {what}, ours: lost after {ours:.2?}, key deleted after {ours_gone:.2?}");
        let known = lines.recv_timeout(Duration::from_secs(12)).ok().map(|(_, at)| at - start);
        let gone = deleted.recv_timeout(Duration::from_millis(100)).ok().map(|(_, at)| at - start);
        println!("row 3, {what}, Go: lost after {known:.2?}, key deleted after {gone:.2?} (None: not within 12 s)");
        theirs.kill().unwrap();
        theirs.wait().unwrap();
    }

    // Row 13: the key is deleted, or the lease revoked, from outside.
    for revoke in [false, true] {
        let what = if revoke { "lease revoked" } else { "key deleted" };
        let name = format!("thirteen-{}", revoke as u8);
        let (mut theirs, lines) = go(&["lost", &etcd.endpoint(), &name, "15"]);
        assert_eq!(line(&lines).0, "ready");
        assert!(line(&lines).0.starts_with("held"));
        let session = connect_nth(&etcd.endpoint(), 15, 3);
        let hold = session.mutex(&format!("{name}-ours")).unwrap().lock().unwrap();
        let (tx, lost) = mpsc::channel();
        hold.on_lost(move |_| tx.send(Instant::now()).unwrap());
        std::thread::sleep(Duration::from_secs(1));
        for (key, lease) in [outside.keys(&format!("{name}/")), outside.keys(&format!("{name}-ours/"))].concat() {
            if revoke { outside.revoke(lease) } else { outside.delete_all(&key) }
        }
        let start = Instant::now();
        let ours = lost.recv_timeout(LONG).expect("ours knows").saturating_duration_since(start);
        let known = lines.recv_timeout(Duration::from_secs(12)).ok().map(|(_, at)| at - start);
        println!("row 13, {what}: ours knows after {ours:.2?}, Go after {known:.2?} (None: not within 12 s)");
        theirs.kill().unwrap();
        theirs.wait().unwrap();
    }

    // Row 18: eight threads of one session.
    let (mut theirs, lines) = go(&["crowd", &etcd.endpoint(), "eighteen", "2000"]);
    let said = lines.recv_timeout(Duration::from_secs(300)).map(|(line, _)| line).unwrap_or_else(|_| "nothing for 300 s".into());
    println!("row 18, Go: of 2000 rounds {said} (a mutex each, one mutex for all)");
    let _ = theirs.kill();
    theirs.wait().unwrap();
    let session = connect(&etcd, 60);
    let one = session.mutex("eighteen-one").unwrap();
    let counts = [false, true].map(|shared| {
        let (inside, found) = (AtomicI64::new(0), AtomicI64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let own = session.mutex("eighteen-ours").unwrap();
                    let mutex = if shared { &one } else { &own };
                    for _ in 0..250 {
                        let hold = mutex.lock().unwrap();
                        if inside.fetch_add(1, Ordering::SeqCst) > 0 {
                            found.fetch_add(1, Ordering::SeqCst);
                        }
                        std::thread::sleep(Duration::from_micros(100));
                        inside.fetch_sub(1, Ordering::SeqCst);
                        hold.unlock().unwrap();
                    }
                });
            }
        });
        found.into_inner()
    });
    println!("row 18, ours: of 2000 rounds inside {} {}", counts[0], counts[1]);

    // Row 19: a nested name is held.
    let nested = session.mutex("nine/teen").unwrap().lock().unwrap();
    let (mut theirs, lines) = go(&["lost", &etcd.endpoint(), "nine", "15"]);
    assert_eq!(line(&lines).0, "ready");
    let got = lines.recv_timeout(Duration::from_secs(3)).is_ok();
    println!("row 19, Go: locks \"nine\" while \"nine/teen\" is held: {}", if got { "at once" } else { "waits" });
    theirs.kill().unwrap();
    theirs.wait().unwrap();
    outside.delete_all("nine/");
    drop(nested);
    let nested = session.mutex("ten/nested").unwrap().lock().unwrap();
    let ours = match session.mutex("ten").unwrap().lock_timeout(Duration::from_secs(3)) {
        Ok(_) => "at once",
        Err(error) if error.kind() == ErrorKind::Timeout => "waits",
        Err(error) => panic!("{error}"),
    };
    println!("row 19, ours: {ours}");
    drop(nested);
}
