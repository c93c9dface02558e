//! What is left of a process after things went wrong often. One test alone: it counts what belongs to its process.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod outside;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcdlock::{ErrorKind, Options, Session};
use etcdlock_rig::{Etcd, free_port};
use outside::{LONG, Outside, until};

/// At a time, and never more: what so many need for a moment is what the allocator keeps, and hides what is left of them.
const TOGETHER: usize = 50;

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Threads, and descriptors.
fn taken() -> (usize, usize) {
    (entries("/proc/self/task"), entries("/proc/self/fd"))
}

/// KiB of memory in use.
fn resident() -> usize {
    let pages: usize = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4
}

fn fail(count: usize, target: &str, options: &Options, kind: ErrorKind) {
    for _ in 0..count / TOGETHER {
        let (_, descriptors) = taken();
        // Each with connections of its own: those of one target share them only if their options are the same.
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let options = || options.clone().server_name(format!("number-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let connecting: Vec<_> = (0..TOGETHER).map(|_| Session::connect(target, options())).collect();
        for failed in connecting {
            assert_eq!(failed.wait_for(LONG).expect("in time").unwrap_err().kind(), kind);
        }
        // A request that nobody wants any more is given up after 2 s.
        until("their connections are closed", || taken().1 <= descriptors);
    }
}

#[test]
fn row_36_of_2000_failed_connects_no_thread_descriptor_memory_or_lease_is_left() {
    let (etcd, guarded) = (Etcd::start(), Etcd::start_with(&["--bcrypt-cost", "4"]));
    let outside = Outside::of(&guarded);
    outside.add_user("root", "secret", "root");
    outside.enable_auth();
    drop(outside);
    let refused = format!("127.0.0.1:{}", free_port());
    let soon = Options::default().ttl(Duration::from_secs(2)).connect_timeout(Duration::from_millis(20));
    let wrong = Options::default().connect_timeout(LONG).user("root").password("wrong");
    // Nobody there; there and silent, and the requests arrive when nobody wants them any more; there and refusing.
    let fail_in_each_way = |count: usize| {
        fail(count * 7 / 10, &refused, &soon, ErrorKind::Unavailable);
        etcd.stop();
        fail(count / 10, &etcd.endpoint(), &soon, ErrorKind::Unavailable);
        etcd.cont();
        fail(count / 5, &guarded.endpoint(), &wrong, ErrorKind::Denied);
        let outside = Outside::of(&etcd);
        until("no lease is left", || outside.leases() == 0);
    };
    // The first bring the library's threads and the allocator's memory.
    Session::connect("memory:first", Options::default()).wait().unwrap();
    fail_in_each_way(500);
    let before = taken();
    let memory = resident();
    fail_in_each_way(2000);
    until("threads and descriptors are as before", || taken().0 <= before.0 && taken().1 <= before.1);
    let more = resident().saturating_sub(memory);
    println!("threads and descriptors {before:?}, then {:?}; {memory} KiB of memory, then {more} KiB more", taken());
    // 1 KiB for each would be that.
    assert!(more < 2000, "{more} KiB of memory are left");
}
