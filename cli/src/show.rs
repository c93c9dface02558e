//! What is held and who waits: as a table, as JSON, and live.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use etcdlock::blocking::Session;
use etcdlock::{Contender, Error, Queue};
use serde_json::{Value, json};

use crate::speak::{complain, short};

const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) fn status(session: &Session, name: &str, as_json: bool) -> Result<(), Error> {
    let contenders = session.inspect(name)?;
    if as_json {
        print(&format!("{}\n", plain_json(&queue_json(name, &contenders))));
    } else if contenders.is_empty() {
        print(&format!("{} is free\n", short(name)));
    } else {
        print(&(table(&contenders) + &without_lease(&contenders)));
    }
    Ok(())
}

pub(crate) fn list(session: &Session, prefix: &str, as_json: bool) -> Result<(), Error> {
    let queues = session.list(prefix)?;
    if as_json {
        let all: Vec<Value> = queues.iter().map(|queue| queue_json(&queue.name, &queue.contenders)).collect();
        print(&format!("{}\n", plain_json(&Value::from(all))));
    } else if queues.is_empty() {
        print("nothing is held\n");
    } else {
        let notes: String = queues.iter().map(|queue| without_lease(&queue.contenders)).collect();
        print(&(names(&queues) + &notes));
    }
    Ok(())
}

/// Shows the state after each change, until it is interrupted.
pub(crate) fn watch(session: &Session, name: &str, prefix: bool) -> Result<(), Error> {
    let is_terminal = std::io::stdout().is_terminal();
    let start = Instant::now();
    let mut shown = None;
    loop {
        let queues: Vec<(String, Vec<Contender>)> = if prefix {
            session.list(name)?.into_iter().map(|queue| (queue.name, queue.contenders)).collect()
        } else {
            vec![(name.to_owned(), session.inspect(name)?)]
        };
        let state: Vec<Vec<String>> = queues
            .iter()
            .map(|(_, contenders)| contenders.iter().map(|c| c.key.clone() + &c.token.to_string()).collect())
            .collect();
        if is_terminal {
            // Ages go on, so it is drawn anew each time.
            print("\x1b[H\x1b[2J");
            for (name, contenders) in &queues {
                let table = if contenders.is_empty() { "  free\n".to_owned() } else { table(contenders) };
                print(&format!("\x1b[1m{}\x1b[0m\n{table}\n", short(name)));
            }
            print("Ctrl-C ends this.\n");
        } else if shown.as_ref() != Some(&state) {
            for (name, contenders) in &queues {
                let holder = contenders.first().map_or("free".to_owned(), |holder| format!("held by {}", label(holder)));
                let waiting = contenders.len().saturating_sub(1);
                let (seconds, name) = (start.elapsed().as_secs_f64(), short(name));
                print(&format!("{seconds:.1}s {name} {holder}, {waiting} waiting\n"));
            }
        }
        shown = Some(state);
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The label of a contender, or its key for clients that leave none.
pub(crate) fn label(contender: &Contender) -> String {
    short(if contender.owner.is_empty() { &contender.key } else { &contender.owner })
}

pub(crate) fn age(age: Option<Duration>) -> String {
    match age.map(|age| age.as_secs()) {
        None => "-".into(),
        Some(s) if s < 120 => format!("{s}s"),
        Some(s) if s < 7200 => format!("{}m{:02}s", s / 60, s % 60),
        Some(s) => format!("{}h{:02}m", s / 3600, s / 60 % 60),
    }
}

fn table(contenders: &[Contender]) -> String {
    let mut rows = vec![["", "OWNER", "HOST", "PID", "LANGUAGE", "TOKEN", "SINCE"].map(str::to_owned)];
    for contender in contenders {
        let text = |text: &str| if text.is_empty() { "-".to_owned() } else { short(text) };
        let pid = if contender.pid == 0 { "-".into() } else { contender.pid.to_string() };
        rows.push([
            if contender.is_holder { "holds" } else { "waits" }.to_owned(),
            label(contender),
            text(&contender.host),
            pid,
            text(&contender.language),
            contender.token.to_string(),
            age(contender.age),
        ]);
    }
    columns(&rows)
}

/// Of keys that stay whoever dies, and hold up all others.
fn without_lease(contenders: &[Contender]) -> String {
    let keys = contenders.iter().filter(|contender| contender.lease_id == 0);
    keys.map(|contender| format!("{} has no lease: it stays until somebody deletes it\n", short(&contender.key))).collect()
}

fn names(queues: &[Queue]) -> String {
    let mut rows = vec![["NAME", "HOLDER", "TOKEN", "SINCE", "WAITING"].map(str::to_owned)];
    for queue in queues {
        let Some(holder) = queue.contenders.first() else { continue };
        let waiting = (queue.contenders.len() - 1).to_string();
        rows.push([short(&queue.name), label(holder), holder.token.to_string(), age(holder.age), waiting]);
    }
    columns(&rows)
}

fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: Vec<usize> = (0..N).map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn queue_json(name: &str, contenders: &[Contender]) -> Value {
    let contenders: Vec<Value> = contenders
        .iter()
        .map(|c| {
            json!({
                "holds": c.is_holder, "owner": c.owner, "host": c.host, "pid": c.pid, "language": c.language,
                "token": c.token, "seconds": c.age.map(|age| age.as_secs_f64()), "key": c.key,
                "lease": (c.lease_id != 0).then(|| format!("{:x}", c.lease_id)),
            })
        })
        .collect();
    json!({ "name": name, "contenders": contenders })
}

/// What others have written may move the cursor of a terminal or turn its writing round, in JSON too, which leaves most of that as it is.
fn plain_json(value: &Value) -> String {
    let mut text = String::new();
    for c in value.to_string().chars() {
        if c.is_ascii() || c.escape_debug().count() == 1 {
            text.push(c);
        } else {
            text.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    text
}

/// Prints or ends the program: a reader that went away, such as `head`, is no reason to complain; a full disk is.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(crate::exit::OK),
        Err(error) => {
            complain(&format!("standard output cannot be written: {error}"));
            std::process::exit(crate::exit::OUTPUT);
        }
    }
}
