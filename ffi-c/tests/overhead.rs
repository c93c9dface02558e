//! What the C ABI adds to the Rust API: overhead TARGET. Both in one process and in turns, so that both see
//! the same machine.

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use etcdlock_c::*;

const ROUNDS: usize = 3000;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() {
    let target = std::env::args().nth(1).unwrap_or_default();
    let session = etcdlock::blocking::Session::connect(target.as_str(), etcdlock::Options::default()).expect("a session");
    let in_rust = session.mutex("/overhead/rust").expect("a mutex");

    let text = CString::new(target.as_str()).expect("no NUL");
    let (mut c_session, mut in_c) = (null_mut(), null_mut());
    // SAFETY: texts, and places for pointers.
    unsafe {
        assert_eq!(etcdlock_session_open(text.as_ptr(), null(), &mut c_session), ETCDLOCK_OK);
        assert_eq!(etcdlock_mutex_new(c_session, c"/overhead/c".as_ptr(), &mut in_c), ETCDLOCK_OK);
    }
    let (mut rust, mut c) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        in_rust.lock().expect("the lock").unlock().expect("released");
        rust.push(start.elapsed());
        let start = Instant::now();
        assert_eq!(etcdlock_mutex_lock(in_c, -1), ETCDLOCK_OK);
        assert_eq!(etcdlock_mutex_unlock(in_c), ETCDLOCK_OK);
        c.push(start.elapsed());
    }
    let (rust, c) = (median(rust), median(c));
    let added = c.as_secs_f64() - rust.as_secs_f64();
    println!("lock+unlock, median of {ROUNDS}: rust {rust:.1?}, c {c:.1?}; the C ABI adds {:.1} us", added * 1e6);
    assert_eq!(etcdlock_mutex_free(in_c), ETCDLOCK_OK);
    assert_eq!(etcdlock_session_close(c_session, 20_000), ETCDLOCK_OK);
}
