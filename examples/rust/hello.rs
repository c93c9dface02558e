//! The first steps: `hello [TARGET]`. Without a target everything happens in this process.

use etcdlock::{Options, blocking::Session};

fn main() -> Result<(), etcdlock::Error> {
    let target = std::env::args().nth(1).unwrap_or_else(|| "memory:".to_owned());
    let session = Session::connect(target, Options::default())?;
    let mutex = session.mutex("/orders/42")?;

    let hold = mutex.lock()?; // waits its turn
    println!("held, fencing token {}", hold.token());
    hold.put("/orders/42/state", "paid")?; // written only while the lock is ours
    hold.unlock()?;

    if let Some(hold) = mutex.try_lock()? {
        println!("free, so taken: token {}", hold.token());
    } // dropped: released
    session.close(std::time::Duration::from_secs(5))
}
