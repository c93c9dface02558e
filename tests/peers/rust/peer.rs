//! Locks with etcdlock from a process of its own, for tests and the benchmark; the same command line
//! as the Go peer in `tests/peers/go`.
//!
//! ```text
//! peer rounds   ENDPOINT NAME ROUNDS   lock and unlock ROUNDS times
//! peer put      ENDPOINT KEY  ROUNDS   put ROUNDS times, through a hold on another name
//! peer try      ENDPOINT NAME ROUNDS   try a lock that another client holds
//! peer try-here ENDPOINT NAME ROUNDS   try a lock that this process holds
//! peer many     ENDPOINT NAME ROUNDS   256 tasks, each with a name of its own
//! peer waiters  ENDPOINT NAME ROUNDS   ROUNDS tasks want one lock, in one session
//! peer classic  ENDPOINT NAME ROUNDS   the same, with a session each
//! peer memory   ENDPOINT NAME COUNT    what COUNT idle mutexes, waiters and holds take
//! peer hold     ENDPOINT NAME          lock, print "held TOKEN", unlock when standard input closes
//! peer keep     ENDPOINT NAME TTL      lock, again after each loss, and say until when it was held, until standard input closes
//! peer load     ENDPOINT KEY  RATE     put RATE times a second until standard input closes
//! ```
//!
//! Each starts with a line "ready" and waits for a line on standard input. "memory" prints lines "memory
//! WHAT BYTES" for one of each. All but that, "hold", "keep" and "load" print, for each round, "enter TOKEN NANOSECONDS" where the last is how long the call took. With
//! PEER_STATS set, the session's counters go to standard error at the end.

use std::future::Future;
use std::io::{BufRead, BufWriter, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcdlock::{Mutex, Options, Pending, Session};
use tokio::task::JoinSet;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const NAMES: usize = 256;
const WRITERS: usize = 8;

fn options() -> Options {
    Options::default().ttl(Duration::from_secs(10))
}

/// Waits the way a thread waits, as the blocking API does.
fn wait<T: Send + 'static>(pending: Pending<T>) -> etcdlock::Result<T> {
    pending.wait()
}

fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, endpoint, name, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: peer rounds|put|try|try-here|many|waiters|classic|memory|hold|keep|load ENDPOINT NAME [ROUNDS]".into()
        );
    };
    let rounds: usize = rest.first().map_or(Ok(0), |rounds| rounds.parse())?;
    let ttl = if what == "keep" { Duration::from_secs(rounds as u64) } else { Duration::from_secs(10) };
    let session = wait(Session::connect(endpoint, options().ttl(ttl)))?;
    let mutex = session.mutex(name)?;
    let (_other, held_before) = match what.as_str() {
        "try" => {
            // To etcd and to the library, another target is another client.
            let other = wait(Session::connect(endpoint.replace("127.0.0.1", "localhost"), options()))?;
            let hold = wait(other.mutex(name)?.lock())?;
            (Some(other), Some(hold))
        }
        "try-here" => (None, Some(wait(mutex.lock())?)),
        _ => (None, None),
    };
    println!("ready");
    let mut stdin = std::io::stdin().lock();
    stdin.read_line(&mut String::new())?;

    let mut out = BufWriter::new(std::io::stdout());
    let mut entered = |token: i64, took: Duration| writeln!(out, "enter {token} {}", took.as_nanos());
    match what.as_str() {
        "rounds" => {
            for _ in 0..rounds {
                let start = Instant::now();
                let hold = wait(mutex.lock())?;
                let token = hold.token();
                wait(hold.unlock())?;
                entered(token, start.elapsed())?;
            }
        }
        "put" => {
            let hold = wait(session.mutex(&format!("{name}.guard"))?.lock())?;
            for _ in 0..rounds {
                let start = Instant::now();
                wait(hold.put(name.as_str(), "x"))?;
                entered(0, start.elapsed())?;
            }
            wait(hold.unlock())?;
        }
        "try" | "try-here" => {
            for _ in 0..rounds {
                let start = Instant::now();
                let tried = wait(mutex.try_lock())?;
                entered(0, start.elapsed())?;
                if tried.is_some() {
                    return Err("a lock that is held was acquired".into());
                }
            }
        }
        "many" => {
            for (token, took) in tasks(NAMES, |i| {
                let mutex = session.mutex(&format!("{name}-{i}"));
                async move {
                    let mutex = mutex?;
                    let mut rounds_done = Vec::new();
                    for _ in 0..rounds / NAMES {
                        let start = Instant::now();
                        let hold = mutex.lock().await?;
                        let token = hold.token();
                        hold.unlock().await?;
                        rounds_done.push((token, start.elapsed()));
                    }
                    Ok(rounds_done)
                }
            })? {
                entered(token, took)?;
            }
        }
        "waiters" | "classic" => {
            for (token, took) in tasks(rounds, |_| {
                let (name, endpoint) = (name.clone(), endpoint.clone());
                let own = (what == "waiters").then(|| session.clone());
                async move {
                    let start = Instant::now();
                    let session = match own {
                        Some(session) => session,
                        None => Session::connect(endpoint, options()).await?,
                    };
                    let hold = session.mutex(&name)?.lock().await?;
                    let token = hold.token();
                    hold.unlock().await?;
                    Ok(vec![(token, start.elapsed())])
                }
            })? {
                entered(token, took)?;
            }
        }
        "memory" => {
            let mut before = resident()?;
            let mut taken = |what: &str| -> Result<(), AnyError> {
                let now = resident()?;
                println!("memory {what} {}", now.saturating_sub(before) / rounds);
                before = now;
                Ok(())
            };
            let idle: Vec<_> = (0..rounds).map(|i| session.mutex(&format!("{name}-{i}"))).collect::<etcdlock::Result<_>>()?;
            taken("idle-mutex")?;
            let first = wait(mutex.lock())?;
            let waiting: Vec<_> = (0..rounds).map(|_| mutex.lock()).collect();
            // An answer to a later call: by then all of them stand in line.
            drop(wait(session.mutex(&format!("{name}-later"))?.lock())?);
            taken("waiter")?;
            drop(waiting);
            drop(first);
            drop(wait(mutex.lock())?);
            before = resident()?;
            let mut holds = Vec::new();
            for some in idle.chunks(100) {
                let locks: Vec<_> = some.iter().map(|mutex| mutex.lock()).collect();
                for lock in locks {
                    holds.push(wait(lock)?);
                }
            }
            // Holds that last get a watch each.
            std::thread::sleep(Duration::from_secs(2));
            println!("memory hold {}", resident()?.saturating_sub(before) / rounds);
            let renewals = session.stats().renewals;
            std::thread::sleep(Duration::from_secs(8));
            println!("memory renewals-in-8-s {}", session.stats().renewals - renewals);
            drop(holds);
        }
        "hold" => {
            let hold = wait(mutex.lock())?;
            writeln!(out, "held {}", hold.token())?;
            out.flush()?;
            stdin.read_to_end(&mut Vec::new())?;
            wait(hold.unlock())?;
        }
        "keep" => {
            let let_go = Arc::new(AtomicBool::new(false));
            let told = let_go.clone();
            let (tx, kept) = std::sync::mpsc::channel();
            std::thread::spawn(move || tx.send(keep(&mutex, &told).map_err(|error| error.to_string())));
            stdin.read_to_end(&mut Vec::new())?;
            let_go.store(true, Ordering::Relaxed);
            // It may wait for a lock from a cluster that is gone.
            kept.recv_timeout(Duration::from_secs(20))??;
        }
        "load" => {
            let hold = wait(session.mutex(&format!("{name}.guard"))?.lock())?;
            let runtime = runtime()?;
            let hold = Arc::new(hold);
            for writer in 0..WRITERS {
                let (hold, key) = (hold.clone(), format!("{name}-{writer}"));
                let mut tick =
                    runtime.block_on(async { tokio::time::interval(Duration::from_secs_f64(WRITERS as f64 / rounds as f64)) });
                runtime.spawn(async move {
                    loop {
                        tick.tick().await;
                        let _ = hold.put(key.as_str(), "x").await;
                    }
                });
            }
            std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
            stdin.read_to_end(&mut Vec::new())?;
        }
        other => return Err(format!("unknown: {other}").into()),
    }
    out.flush()?;
    drop(held_before);
    if std::env::var_os("PEER_STATS").is_some() {
        eprintln!("{:?}", session.stats());
    }
    wait(session.close(Duration::from_secs(5)))?;
    Ok(())
}

/// Holds the lock until it is told to let go. Prints "held TOKEN NANOSECONDS" after each grant, and "lost NANOSECONDS REASON"
/// with the last time at which the hold was asked and still held; the clock is that of the machine.
fn keep(mutex: &Mutex, let_go: &AtomicBool) -> Result<(), AnyError> {
    loop {
        let hold = wait(mutex.lock())?;
        let mut last = nanoseconds()?;
        println!("held {} {last}", hold.token());
        while !let_go.load(Ordering::Relaxed) {
            let asked = nanoseconds()?;
            if !hold.is_held() {
                break;
            }
            last = asked;
            std::thread::sleep(Duration::from_millis(1));
        }
        match hold.loss() {
            Some(loss) => println!("lost {last} {loss:?}"),
            None => {
                wait(hold.unlock())?;
                println!("released");
                return Ok(());
            }
        }
    }
}

fn nanoseconds() -> Result<u128, AnyError> {
    Ok(Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?).as_nanos())
}

/// Bytes of memory in use by this process.
fn resident() -> Result<usize, AnyError> {
    let pages: usize = std::fs::read_to_string("/proc/self/statm")?.split(' ').nth(1).ok_or("no field")?.parse()?;
    Ok(pages * 4096)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_time().build()
}

/// Runs tasks side by side on one thread and gives what they gave.
fn tasks<F>(count: usize, mut task: impl FnMut(usize) -> F) -> Result<Vec<(i64, Duration)>, AnyError>
where
    F: Future<Output = etcdlock::Result<Vec<(i64, Duration)>>> + Send + 'static,
{
    runtime()?.block_on(async {
        let mut running: JoinSet<_> = (0..count).map(&mut task).collect();
        let mut all = Vec::new();
        while let Some(done) = running.join_next().await {
            all.extend(done??);
        }
        Ok(all)
    })
}
