//! The suite's driver for Rust; see ../README.md.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcdlock::{Canceller, Error, Hold, Options, Session};
use serde_json::{Value, json};

#[derive(Default)]
struct World {
    sessions: HashMap<String, Session>,
    mutexes: HashMap<String, etcdlock::Mutex>,
    holds: HashMap<String, Arc<Hold>>,
    locks: HashMap<i64, Canceller>,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

fn world() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u128 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map(Duration::from).unwrap_or_default().as_nanos()
}

fn say(line: Value) {
    // The runner has gone: nobody is there to tell.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

fn answer(id: i64, from: u128, result: Result<Value, Error>) {
    let mut line = result.unwrap_or_else(|error| json!({ "kind": error.kind().name(), "message": error.message() }));
    (line["id"], line["from"], line["at"]) = (json!(id), json!(from as u64), json!(now() as u64));
    say(line);
}

fn state(mutex: &etcdlock::Mutex) -> Value {
    let seen = now() as u64;
    let (held, remaining) = (mutex.is_held(), mutex.remaining().as_millis() as u64);
    json!({ "held": held, "remaining": remaining, "token": mutex.token().unwrap_or(0), "seen": seen })
}

fn granted(name: &str, mutex: &etcdlock::Mutex, hold: Option<Hold>) -> Value {
    let Some(hold) = hold else { return json!({ "kind": "BUSY", "message": "" }) };
    let (lost, token) = (name.to_owned(), hold.token());
    hold.on_lost(move |loss| {
        say(json!({ "event": "lost", "mutex": lost, "token": token, "reason": loss.to_string(), "at": now() as u64 }))
    });
    let previous = world().holds.insert(name.to_owned(), Arc::new(hold));
    drop(previous);
    state(mutex)
}

/// What takes time runs on a thread of its own; a lock is called back.
fn handle(id: i64, from: u128, request: &Value) -> Result<Option<Value>, Error> {
    let text = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
    let millis = |key: &str| request[key].as_u64().map(Duration::from_millis);
    let session = || world().sessions.get(&text("session")).cloned().expect("a known session");
    let mutex = || world().mutexes.get(&text("mutex")).cloned().expect("a known mutex");
    let hold = || world().holds.get(&text("mutex")).cloned().expect("a hold");
    let later = |call: Box<dyn FnOnce() -> Result<Value, Error> + Send>| {
        std::thread::spawn(move || answer(id, from, call()));
        Ok(None)
    };
    match request["do"].as_str().unwrap_or_default() {
        "connect" => {
            let mut options = Options::default().namespace(text("namespace"));
            options = millis("ttl").into_iter().fold(options, Options::ttl);
            options = millis("connect_timeout").into_iter().fold(options, Options::connect_timeout);
            options = millis("max_hold").into_iter().fold(options, Options::max_hold);
            options = request["owner"].as_str().into_iter().fold(options, Options::owner);
            options = request["user"].as_str().into_iter().fold(options, Options::user);
            options = request["password"].as_str().into_iter().fold(options, Options::password);
            let (name, target) = (text("session"), text("target"));
            later(Box::new(move || {
                let session = Session::connect(target, options).wait()?;
                let (ttl, lease) = (session.ttl().as_millis() as u64, session.lease_id().unwrap_or(0).to_string());
                world().sessions.insert(name, session);
                Ok(json!({ "ttl": ttl, "lease": lease }))
            }))
        }
        "mutex" => {
            let mutex = session().mutex(&text("name"))?;
            world().mutexes.insert(text("mutex"), mutex);
            Ok(Some(json!({})))
        }
        what @ ("lock" | "try_lock") => {
            let (name, mutex) = (text("mutex"), mutex());
            let canceller = match (what, millis("timeout")) {
                ("try_lock", _) => {
                    let granted_to = mutex.clone();
                    mutex.try_lock().on_done(move |hold| answer(id, from, hold.map(|hold| granted(&name, &granted_to, hold))))
                }
                (_, limit) => {
                    let granted_to = mutex.clone();
                    let pending = limit.map_or_else(|| mutex.lock(), |limit| mutex.lock_timeout(limit));
                    pending.on_done(move |hold| answer(id, from, hold.map(|hold| granted(&name, &granted_to, Some(hold)))))
                }
            };
            world().locks.insert(id, canceller);
            Ok(None)
        }
        "cancel" => {
            let canceller = world().locks.get(&request["op"].as_i64().unwrap_or(0)).cloned();
            canceller.iter().for_each(Canceller::cancel);
            Ok(Some(json!({})))
        }
        "unlock" => {
            let mutex = mutex();
            later(Box::new(move || mutex.unlock().wait().map(|()| json!({}))))
        }
        "state" => Ok(Some(state(&mutex()))),
        "check" => hold().check().map(|()| Some(json!({}))),
        "put" => {
            let (hold, key, value) = (hold(), text("key"), text("value"));
            later(Box::new(move || hold.put(key, value).wait().map(|()| json!({}))))
        }
        "get" => {
            let (hold, key) = (hold(), text("key"));
            later(Box::new(move || {
                let value = hold.get(key).wait()?;
                Ok(json!({ "value": value.map(|value| String::from_utf8_lossy(&value).into_owned()) }))
            }))
        }
        "delete" => {
            let (hold, key) = (hold(), text("key"));
            later(Box::new(move || hold.delete(key).wait().map(|()| json!({}))))
        }
        "inspect" => {
            let (session, name) = (session(), text("name"));
            later(Box::new(move || {
                let queue = session.inspect(&name).wait()?;
                let shown = queue.into_iter().map(|c| {
                    json!({ "holder": c.is_holder, "owner": c.owner, "host": c.host, "pid": c.pid, "language": c.language,
                            "token": c.token, "age": c.age.map_or(-1, |age| age.as_millis() as i64), "key": c.key })
                });
                Ok(json!({ "contenders": shown.collect::<Vec<_>>() }))
            }))
        }
        "stats" => {
            let stats = session().stats();
            Ok(Some(json!({ "locks": stats.locks, "holds_lost": stats.holds_lost, "leases_lost": stats.leases_lost,
                            "renewals": stats.renewals, "requests": stats.requests })))
        }
        "close" => {
            let (session, limit) = (session(), millis("timeout").unwrap_or(Duration::from_secs(5)));
            later(Box::new(move || session.close(limit).wait().map(|()| json!({}))))
        }
        other => panic!("unknown request {other:?}"),
    }
}

fn main() {
    say(json!({ "driver": "rust", "version": etcdlock::VERSION, "lacks": "" }));
    for line in std::io::stdin().lock().lines() {
        let from = now();
        let request: Value = serde_json::from_str(&line.expect("a line")).expect("a JSON object");
        let id = request["id"].as_i64().expect("an id");
        match handle(id, from, &request) {
            Ok(None) => {}
            Ok(Some(result)) => answer(id, from, Ok(result)),
            Err(error) => answer(id, from, Err(error)),
        }
    }
}
