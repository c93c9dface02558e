//! etcdlock beside etcd's own Go client: the same work, in turns, on the same etcd.
//!
//! Each worker is a process of `tests/peers/*`. A round is one lock and one unlock; a hand-over is
//! the time per round when several processes want the same lock all the time.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Instant;

use etcdlock_rig::Etcd;

struct Client {
    name: &'static str,
    binary: &'static str,
}

const CLIENTS: [Client; 2] = [
    Client { name: "etcdlock (Rust)", binary: "target/release/examples/peer" },
    Client { name: "Go concurrency.Mutex", binary: "target/release/examples/go-peer" },
];

struct Work {
    name: &'static str,
    what: &'static str,
    processes: usize,
    /// Rounds in all, for etcdlock and for Go, which is a hundred times slower at some.
    rounds: [usize; 2],
}

const WORK: [Work; 5] = [
    Work { name: "one put", what: "put", processes: 1, rounds: [2000, 2000] },
    Work { name: "lock + unlock, uncontended", what: "rounds", processes: 1, rounds: [2000, 2000] },
    Work { name: "hand-over, 2 processes", what: "rounds", processes: 2, rounds: [2000, 200] },
    Work { name: "hand-over, 8 processes", what: "rounds", processes: 8, rounds: [2400, 400] },
    Work { name: "hand-over, 64 processes", what: "rounds", processes: 64, rounds: [1920, 640] },
];

struct Figures {
    /// Microseconds: of a call where there is one process, else per hand-over.
    median: f64,
    p99: f64,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark cannot go on: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let quick = std::env::var_os("QUICK").is_some();
    let turns = if quick { 3 } else { 7 };
    let clients: Vec<&Client> = CLIENTS.iter().filter(|client| std::path::Path::new(client.binary).is_file()).collect();
    for missing in CLIENTS.iter().filter(|client| !clients.iter().any(|there| there.name == client.name)) {
        println!("missing on this machine: {}", missing.name);
    }
    let etcd = Etcd::start();
    let version = Command::new(etcdlock_rig::find("etcd").ok_or("no etcd")?).arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    println!("{version}, {} processors, {turns} turns each\n", std::thread::available_parallelism()?);
    println!("{:<28} {:<22} {:>10} {:>10} {:>8} {:>8}", "work", "client", "median", "p99", "x put", "x Go");

    let mut results = Vec::new();
    let mut put_medians = [f64::NAN; 2];
    let only = std::env::var("ONLY").unwrap_or_default();
    for work in WORK.iter().filter(|work| work.what == "put" || work.name.contains(&only)) {
        let mut figures: Vec<Vec<Figures>> = clients.iter().map(|_| Vec::new()).collect();
        for turn in 0..turns {
            for (i, client) in clients.iter().enumerate() {
                let rounds = work.rounds[usize::from(client.name.starts_with("Go"))] / if quick { 2 } else { 1 };
                let name = format!("bench-{}-{}", work.processes, if work.what == "put" { "put" } else { "lock" });
                if std::io::stderr().is_terminal() {
                    eprint!("\r{:<28} turn {}/{turns} {:<22}", work.name, turn + 1, client.name);
                }
                figures[i].push(measure(client, &etcd.endpoint(), work, &name, rounds)?);
            }
        }
        if std::io::stderr().is_terminal() {
            eprint!("\r{:60}\r", "");
        }
        let medians: Vec<f64> = figures.iter().map(|turns| middle(turns.iter().map(|f| f.median))).collect();
        if work.what == "put" {
            medians.iter().enumerate().for_each(|(i, median)| put_medians[i] = *median);
        }
        for (i, client) in clients.iter().enumerate() {
            let p99 = middle(figures[i].iter().map(|f| f.p99));
            let to_put = medians[i] / put_medians[i];
            let to_go = medians[i] / medians.last().copied().unwrap_or(f64::NAN);
            println!("{:<28} {:<22} {:>7.0} us {:>7.0} us {to_put:>8.2} {to_go:>8.3}", work.name, client.name, medians[i], p99);
            results.push(serde_json::json!({
                "name": work.name, "client": client.name, "unit": "us",
                "median": medians[i], "p99": p99, "ratio_to_put": to_put, "ratio_to_go": to_go,
            }));
        }
    }
    std::fs::create_dir_all("target/bench")?;
    std::fs::write("target/bench/results.json", serde_json::to_string_pretty(&results)?)?;
    println!("\nmedians over turns; \"x put\": beside one put by the same client. Written to target/bench/results.json");
    Ok(())
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

fn measure(
    client: &Client,
    endpoint: &str,
    work: &Work,
    name: &str,
    rounds: usize,
) -> Result<Figures, Box<dyn std::error::Error>> {
    let each = (rounds / work.processes).max(1);
    let mut processes = Vec::new();
    for _ in 0..work.processes {
        let mut child = Command::new(client.binary)
            .args([work.what, endpoint, name, &each.to_string()])
            .env("PEER_NO_TOKEN", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take().ok_or("no pipe")?, child.stdout.take().ok_or("no pipe")?);
        processes.push(Process { child, stdin, stdout: BufReader::new(stdout) });
    }
    for process in &mut processes {
        let mut line = String::new();
        process.stdout.read_line(&mut line)?;
        if line.trim() != "ready" {
            return Err(format!("{} did not start: {line:?}", client.name).into());
        }
    }
    let start = Instant::now();
    for process in &mut processes {
        process.stdin.write_all(b"go\n")?;
    }
    let mut calls = Vec::new();
    for process in &mut processes {
        let mut output = String::new();
        process.stdout.read_to_string(&mut output)?;
        calls.extend(output.lines().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()));
        if !process.child.wait()?.success() {
            return Err(format!("{} failed", client.name).into());
        }
    }
    let took = start.elapsed().as_secs_f64() * 1e6;
    calls.sort_by(f64::total_cmp);
    if calls.len() != each * work.processes {
        return Err(format!("{}: {} calls instead of {}", client.name, calls.len(), each * work.processes).into());
    }
    let call = |part: f64| calls[((calls.len() - 1) as f64 * part) as usize] / 1e3;
    if work.processes == 1 {
        return Ok(Figures { median: call(0.5), p99: call(0.99) });
    }
    Ok(Figures { median: took / calls.len() as f64, p99: call(0.99) / work.processes as f64 })
}
