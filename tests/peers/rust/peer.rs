//! Locks with etcdlock from a process of its own, for tests and the benchmark; the same command line
//! as the Go peer in `tests/peers/go`.
//!
//! ```text
//! peer rounds ENDPOINT NAME ROUNDS    lock and unlock ROUNDS times
//! peer put    ENDPOINT KEY  ROUNDS    put ROUNDS times, through a hold on another name
//! peer hold   ENDPOINT NAME           lock, print "held TOKEN", unlock when standard input closes
//! ```
//!
//! Each starts with a line "ready" and waits for a line on standard input. "rounds" and "put" print,
//! for each round, "enter TOKEN NANOSECONDS" where the last is how long the call took.

use std::io::{BufRead, BufWriter, Read, Write};
use std::time::{Duration, Instant};

use etcdlock::{Options, blocking::Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, endpoint, name, rest @ ..] = args.as_slice() else {
        return Err("usage: peer rounds|put|hold ENDPOINT NAME [ROUNDS]".into());
    };
    let rounds: usize = rest.first().map_or(Ok(0), |rounds| rounds.parse())?;
    let session = Session::connect(endpoint, Options::default().ttl(Duration::from_secs(10)))?;
    let mutex = session.mutex(name)?;
    println!("ready");
    let mut stdin = std::io::stdin().lock();
    stdin.read_line(&mut String::new())?;

    let mut out = BufWriter::new(std::io::stdout());
    match what.as_str() {
        "rounds" => {
            for _ in 0..rounds {
                let start = Instant::now();
                let hold = mutex.lock()?;
                let token = hold.token();
                hold.unlock()?;
                writeln!(out, "enter {token} {}", start.elapsed().as_nanos())?;
            }
        }
        "put" => {
            let hold = session.mutex(&format!("{name}.guard"))?.lock()?;
            for _ in 0..rounds {
                let start = Instant::now();
                hold.put(name.as_str(), "x")?;
                writeln!(out, "enter 0 {}", start.elapsed().as_nanos())?;
            }
            hold.unlock()?;
        }
        "hold" => {
            let hold = mutex.lock()?;
            writeln!(out, "held {}", hold.token())?;
            out.flush()?;
            stdin.read_to_end(&mut Vec::new())?;
            hold.unlock()?;
        }
        other => return Err(format!("unknown: {other}").into()),
    }
    out.flush()?;
    if std::env::var_os("PEER_STATS").is_some() {
        eprintln!("{:?}", session.stats());
    }
    session.close(Duration::from_secs(5))?;
    Ok(())
}
