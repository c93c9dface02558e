//! `etcdlock-rig`: throw-away etcd servers for programs in other languages. They end when standard
//! input closes.
//!
//! * Without arguments it starts one etcd and prints its endpoint.
//! * With a command it starts one, runs the command with `ETCDLOCK_ENDPOINTS` set to it (and its
//!   process id in `ETCDLOCK_ETCD_PID`), and ends with the command's exit code.
//! * `etcdlock-rig cluster` starts three members with proxies and prints one line of JSON:
//!
//! ```json
//! {"ok": true, "endpoints": ["127.0.0.1:1", …], "direct": ["127.0.0.1:2", …], "pids": [3, …], "leader": 0}
//! ```
//!
//!   `endpoints` go through the proxies, `direct` do not (for observers). Then it reads one command
//!   per line from standard input and answers each, when it is done, with one line: `{"ok": true, …}`
//!   or `{"ok": false, "error": "…"}`. A command is an object; `member` is 0 to 2.
//!
//! ```text
//! {"do": "status"}                          as the first line; "leader" is null while there is none
//! {"do": "kill", "member": 0}               SIGKILL; the data stays
//! {"do": "start", "member": 0}              after a kill; with "wait": true it answers when the member is healthy
//! {"do": "stop", "member": 0}               SIGSTOP: connections stay, nothing answers
//! {"do": "cont", "member": 0}               SIGCONT
//! {"do": "replace", "member": 0}            removed from the cluster and added again, with an empty database
//! {"do": "move_leader", "member": 0}        it becomes the leader; without "member": the next one after the present leader
//! {"do": "compact"}                         history is forgotten up to now; answers "revision"
//! {"do": "isolate", "member": 0}            no bytes between it and the other members; clients still reach it
//! {"do": "fault", "member": 0, "on": "clients", "direction": "both", "kind": "cut"}
//!     on         clients (default) or peers: in front of its client port, or of its peer port
//!     direction  to_server (requests), to_client (answers) or both (default)
//!     kind       none    bytes go through again; what was held goes now
//!                cut     bytes are lost: in both directions the member accepts and stays silent. Connections that
//!                        lost bytes are reset when this ends. "to_client": requests take effect, answers are dropped
//!                hold    bytes are kept, and go through when this ends
//!                delay   each goes "ms" milliseconds later
//! {"do": "drop_answers", "member": 0}       the same as fault with direction to_client, kind cut
//! {"do": "reset", "member": 0}              its clients' connections are reset now ("on": "peers": those of members)
//! {"do": "reset_after", "member": 0, "direction": "to_client", "bytes": 100}   one reset, after so many more bytes
//! {"do": "refuse", "member": 0}             connections of clients are reset at once, from now on
//! {"do": "heal"}                            ends all faults of all proxies (not stop and kill); "member": of this one
//! {"do": "quit"}                            ends the servers and this program; so does the end of standard input
//! ```

use std::io::{BufRead as _, Read as _, Write as _};
use std::process::{Command, exit};
use std::time::Duration;

use etcdlock_rig::{Cluster, Direction, Etcd, Fault, Proxy};
use serde_json::{Value, json};

fn main() {
    let command: Vec<_> = std::env::args_os().skip(1).collect();
    if command == ["cluster"] {
        return serve_cluster();
    }
    let etcd = Etcd::start();
    let Some((program, args)) = command.split_first() else {
        println!("{}", etcd.endpoint());
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        return;
    };
    let status = Command::new(program)
        .args(args)
        .env("ETCDLOCK_ENDPOINTS", etcd.endpoint())
        .env("ETCDLOCK_ETCD_PID", etcd.pid().to_string())
        .status();
    drop(etcd);
    match status {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("etcdlock-rig: {} cannot be started: {error}", program.to_string_lossy());
            exit(127);
        }
    }
}

fn serve_cluster() {
    let mut cluster = Cluster::start();
    say(&status(&cluster));
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { return };
        if line.trim().is_empty() {
            continue;
        }
        let answer = match serde_json::from_str::<Value>(&line) {
            Ok(command) if command["do"] == "quit" => {
                drop(cluster);
                return say(&json!({ "ok": true }));
            }
            Ok(command) => obey(&mut cluster, &command).unwrap_or_else(|error| json!({ "ok": false, "error": error })),
            Err(error) => json!({ "ok": false, "error": format!("this is no JSON: {error}") }),
        };
        say(&answer);
    }
}

fn say(answer: &Value) {
    let mut out = std::io::stdout().lock();
    // Nobody reads any more: the end of standard input comes next.
    let _ = writeln!(out, "{answer}").and_then(|()| out.flush());
}

fn status(cluster: &Cluster) -> Value {
    let members = 0..cluster.size();
    json!({
        "ok": true,
        "endpoints": members.clone().map(|n| cluster.endpoint(n)).collect::<Vec<_>>(),
        "direct": members.clone().map(|n| cluster.direct_endpoint(n)).collect::<Vec<_>>(),
        "pids": members.map(|n| cluster.pid(n)).collect::<Vec<_>>(),
        "leader": cluster.leader(),
    })
}

fn obey(cluster: &mut Cluster, command: &Value) -> Result<Value, String> {
    let member = || {
        let member = command["member"].as_u64().ok_or("\"member\" is missing")?;
        usize::try_from(member).ok().filter(|&n| n < cluster.size()).ok_or(format!("there is no member {member}"))
    };
    let text = |key: &str, default: &'static str| match &command[key] {
        Value::Null => Ok(default.to_owned()),
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("{key:?} is {other}, not a text")),
    };
    let number = |key: &str| command[key].as_u64().ok_or(format!("{key:?} is missing"));
    let proxy = || -> Result<&Proxy, String> {
        match text("on", "clients")?.as_str() {
            "clients" => Ok(cluster.clients(member()?)),
            "peers" => Ok(cluster.peers(member()?)),
            other => Err(format!("\"on\" is {other:?}, not clients or peers")),
        }
    };
    let directions = |default| match text("direction", default)?.as_str() {
        "to_server" => Ok(vec![Direction::ToServer]),
        "to_client" => Ok(vec![Direction::ToClient]),
        "both" => Ok(vec![Direction::ToServer, Direction::ToClient]),
        other => Err(format!("\"direction\" is {other:?}, not to_server, to_client or both")),
    };
    match text("do", "")?.as_str() {
        "status" => return Ok(status(cluster)),
        "kill" => {
            let member = member()?;
            cluster.kill(member);
        }
        "start" => {
            let member = member()?;
            cluster.start_again(member);
            if command["wait"] == true {
                cluster.wait_until_healthy(member);
            }
        }
        "stop" => cluster.stop(member()?),
        "cont" => cluster.cont(member()?),
        "replace" => {
            let member = member()?;
            cluster.replace(member);
        }
        "move_leader" => {
            let to = match command["member"] {
                Value::Null => (cluster.leader().ok_or("there is no leader")? + 1) % cluster.size(),
                _ => member()?,
            };
            if !cluster.move_leader(to) {
                return Err(format!("member {to} did not become the leader"));
            }
        }
        "compact" => {
            let revision = cluster.compact().ok_or("there is no leader, or it refuses")?;
            return Ok(json!({ "ok": true, "revision": revision }));
        }
        "isolate" => cluster.isolate(member()?),
        "fault" => {
            let fault = match text("kind", "")?.as_str() {
                "none" => Fault::None,
                "cut" => Fault::Cut,
                "hold" => Fault::Hold,
                "delay" => Fault::Delay(Duration::from_millis(number("ms")?)),
                other => return Err(format!("\"kind\" is {other:?}, not none, cut, hold or delay")),
            };
            for direction in directions("both")? {
                proxy()?.set(direction, fault);
            }
        }
        "drop_answers" => proxy()?.set(Direction::ToClient, Fault::Cut),
        "reset" => proxy()?.reset(),
        "reset_after" => {
            for direction in directions("to_client")? {
                proxy()?.reset_after(direction, number("bytes")?);
            }
        }
        "refuse" => proxy()?.refuse(),
        "heal" if command["member"].is_null() => cluster.heal(),
        "heal" => cluster.heal_member(member()?),
        other => return Err(format!("there is no command {other:?}")),
    }
    Ok(json!({ "ok": true }))
}
