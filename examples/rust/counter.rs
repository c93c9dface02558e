//! Increments the number in a file, as many processes may do at once: `counter TARGET FILE ROUNDS lock|nolock`.
//!
//! Reading, adding one and writing are three steps. Without the lock, increments get lost.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use etcdlock::{Options, blocking::Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, target, file, rounds, how] = args.as_slice() else {
        return Err("usage: counter TARGET FILE ROUNDS lock|nolock".into());
    };
    let session = Session::connect(target, Options::default().ttl(Duration::from_secs(10)))?;
    let mutex = session.mutex("/demo/counter")?;

    for _ in 0..rounds.parse::<u32>()? {
        let start = Instant::now();
        let hold = if how == "lock" { Some(mutex.lock()?) } else { None };
        let waited = start.elapsed().as_micros();

        let value = fs::read_to_string(file)?.trim().parse::<u64>().unwrap_or(0) + 1;
        std::thread::sleep(Duration::from_micros(200));
        fs::File::options().write(true).open(file)?.write_all(format!("{value:010}").as_bytes())?;

        let token = hold.as_ref().map_or("-".to_owned(), |hold| hold.token().to_string());
        writeln!(std::io::stdout(), "token={token} value={value} waited_us={waited}")?;
        if let Some(hold) = hold {
            hold.unlock()?;
        }
    }
    session.close(Duration::from_secs(5))?;
    Ok(())
}
