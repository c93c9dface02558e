//! etcdlock in each of its languages beside other ways to lock with etcd: the same work, in turns, on
//! the same etcd.
//!
//! Each worker is a process: a program of `tests/peers` or `bench/peers`. A round is one lock and one
//! unlock; a hand-over is the time per round when several want the same lock all the time.

mod chart;

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use etcdlock_rig::Etcd;

type AnyError = Box<dyn std::error::Error>;

const GO: &str = "Go concurrency.Mutex";
const RUST: &str = "etcdlock, Rust";

#[derive(PartialEq)]
enum Does {
    /// Puts, and locks without contention.
    Plain,
    /// Hand-overs between processes as well.
    HandOvers,
    All,
}

struct Client {
    name: &'static str,
    /// The program and its first arguments.
    command: &'static [&'static str],
    /// Without this file it is missing on this machine.
    needs: &'static str,
    does: Does,
    /// How much fewer rounds it gets, because it is that much slower.
    slower: usize,
}

const fn client(name: &'static str, command: &'static [&'static str], needs: &'static str) -> Client {
    Client { name, command, needs, does: Does::Plain, slower: 1 }
}

const PYTHON: &str = "target/bench/python/bin/python";
const CLIENTS: [Client; 10] = [
    Client { does: Does::All, ..client(RUST, &["target/release/examples/peer"], "target/release/examples/peer") },
    client("etcdlock, C", &["target/bench/etcdlock-c"], "target/bench/etcdlock-c"),
    client("etcdlock, Python", &[".venv/bin/python", "bench/peers/etcdlock_python.py"], "target/bench/has-python"),
    client("etcdlock, Node", &["node", "bench/peers/etcdlock.mjs"], "target/bench/has-node"),
    Client { does: Does::All, ..client(GO, &["target/release/examples/go-peer"], "target/release/examples/go-peer") },
    Client {
        does: Does::HandOvers,
        ..client("Go concurrency.Mutex of Debian", &["target/bench/go-debian"], "target/bench/go-debian")
    },
    client("etcd's Lock RPC", &["target/release/lock_rpc"], "target/release/lock_rpc"),
    client("python-etcd3", &[PYTHON, "bench/peers/python_etcd3.py"], "target/bench/python/has-etcd3"),
    client(
        "etcd3 for Node",
        &["node", "bench/peers/node_etcd3.cjs", "../../target/bench/node"],
        "target/bench/node/node_modules/etcd3",
    ),
    Client { slower: 20, ..client("etcdctl lock", &["bench/peers/etcdctl.sh"], "target/bench/has-etcdctl") },
];

struct Work {
    name: &'static str,
    what: &'static str,
    processes: usize,
    rounds: usize,
    /// For Go, which is a hundred times slower at some.
    rounds_go: usize,
    /// Another client writes so many keys a second meanwhile.
    load: usize,
    /// Counted is the time of the whole by the number of rounds, not the time of a call.
    by_wall: bool,
    /// Go has nothing of the kind.
    ours_alone: bool,
}

const fn work(name: &'static str, what: &'static str, processes: usize, rounds: usize, rounds_go: usize) -> Work {
    Work { name, what, processes, rounds, rounds_go, load: 0, by_wall: processes > 1, ours_alone: false }
}

const WORK: [Work; 15] = [
    work("one put", "put", 1, 1000, 1000),
    work("lock + unlock, uncontended", "rounds", 1, 1000, 1000),
    work("failed try_lock, held elsewhere", "try", 1, 1000, 1000),
    Work { ours_alone: true, ..work("failed try_lock, held in this process", "try-here", 1, 20_000, 0) },
    work("hand-over, 2 processes", "rounds", 2, 2000, 200),
    work("hand-over, 4 processes", "rounds", 4, 2000, 200),
    work("hand-over, 8 processes", "rounds", 8, 2400, 400),
    work("hand-over, 16 processes", "rounds", 16, 1920, 480),
    work("hand-over, 32 processes", "rounds", 32, 1920, 640),
    work("hand-over, 64 processes", "rounds", 64, 2560, 1280),
    Work { load: 2000, ..work("hand-over, 2 processes, beside 2,000 writes/s", "rounds", 2, 1000, 100) },
    Work { by_wall: true, ours_alone: true, ..work("hand-over, 1,000 waiters in one process", "waiters", 1, 1000, 0) },
    Work { by_wall: true, ..work("1,000 waiters with a session each", "classic", 1, 1000, 1000) },
    Work { by_wall: true, ..work("256 names at once in one process", "many", 1, 12_800, 5120) },
    Work { ours_alone: true, ..work("memory", "memory", 1, 10_000, 0) },
];

/// Microseconds.
struct Figures {
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

fn run() -> Result<(), AnyError> {
    let quick = std::env::var_os("QUICK").is_some();
    let only = std::env::var("ONLY").unwrap_or_default();
    let turns = if quick { 3 } else { 5 };
    let (there, missing): (Vec<&Client>, Vec<_>) = CLIENTS.iter().partition(|client| Path::new(client.needs).exists());
    let etcd = Etcd::start();
    let version = Command::new(etcdlock_rig::find("etcd").ok_or("no etcd")?).arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    println!("{version}, {} processors, {turns} turns each", std::thread::available_parallelism()?);
    missing.iter().for_each(|client| println!("missing on this machine: {}", client.name));

    let mut results = Vec::new();
    let mut failures = 0;
    let mut growth = chart::Growth::default();
    let mut puts: Vec<(&str, f64)> = Vec::new();
    for work in WORK.iter().filter(|work| work.what == "put" || work.name.contains(&only)) {
        if work.what == "memory" {
            if let Err(why) = remember(&etcd, work, &mut results) {
                println!("  failed: {why}");
                failures += 1;
            }
            save(&results, &growth, &version)?;
            continue;
        }
        let plain = work.processes == 1 && matches!(work.what, "put" | "rounds");
        let takes_part = |client: &Client| match client.does {
            Does::Plain => plain,
            Does::HandOvers => work.what == "rounds" || plain,
            Does::All => !(work.ours_alone && client.name == GO),
        };
        let clients: Vec<_> = there.iter().filter(|client| takes_part(client)).collect();
        let mut figures: Vec<Vec<Figures>> = clients.iter().map(|_| Vec::new()).collect();
        // A client that fails once, as when its session expires, is marked, and the others go on.
        let mut failed: Vec<Vec<String>> = clients.iter().map(|_| Vec::new()).collect();
        let load = (work.load > 0).then(|| Load::start(&etcd, work.load)).transpose()?;
        for turn in 0..turns {
            for ((client, figures), failed) in clients.iter().zip(&mut figures).zip(&mut failed) {
                if work.what == "put" && client.name == "etcdctl lock" {
                    continue;
                }
                if std::io::stderr().is_terminal() {
                    eprint!("\r{:<46} turn {}/{turns} {:<24}", work.name, turn + 1, client.name);
                }
                let rounds = if client.name.starts_with(GO) { work.rounds_go } else { work.rounds };
                let rounds = rounds / client.slower / if quick { 2 } else { 1 };
                match measure(client, &etcd.endpoint(), work, rounds) {
                    Ok(figure) => figures.push(figure),
                    Err(why) => failed.push(why.to_string()),
                }
            }
        }
        drop(load);
        if std::io::stderr().is_terminal() {
            eprint!("\r{:80}\r", "");
        }
        println!("\n{:<46} {:>12} {:>12} {:>8} {:>8}", work.name, "median", "p99", "x put", "x Go");
        let medians: Vec<f64> = figures.iter().map(|turns| middle(turns.iter().map(|turn| turn.median))).collect();
        let go = clients.iter().position(|client| client.name == GO).map_or(f64::NAN, |at| medians[at]);
        for (((client, figures), failed), median) in clients.iter().zip(&figures).zip(&failed).zip(medians) {
            failures += failed.len();
            let times = failed.len();
            if figures.is_empty() {
                if let Some(why) = failed.first() {
                    println!("  {:<44} failed in all of {times} turns: {why}", client.name);
                    results.push(serde_json::json!({ "name": work.name, "client": client.name, "failed": times }));
                }
                continue;
            }
            if work.what == "put" {
                puts.push((client.name, median));
            }
            let p99 = middle(figures.iter().map(|turn| turn.p99));
            let put_by = |name| puts.iter().find(|(by, _)| *by == name).map(|(_, put)| *put);
            let to_put = median / put_by(client.name).or(put_by(RUST)).unwrap_or(f64::NAN);
            let to_go = median / go;
            println!("  {:<44} {:>9.1} us {:>9.1} us {} {}", client.name, median, p99, ratio(to_put), ratio(to_go));
            if let Some(why) = failed.first() {
                println!("  {:<44} failed in {times} of {turns} turns, which are not counted: {why}", "");
            }
            if work.load == 0 && work.what == "rounds" && work.processes > 1 && client.does == Does::All {
                growth.add(client.name == GO, work.processes, median);
            }
            results.push(serde_json::json!({
                "name": work.name, "client": client.name, "unit": "us",
                "median": median, "p99": p99, "ratio_to_put": number(to_put), "ratio_to_go": number(to_go),
                "failed": times,
            }));
        }
        save(&results, &growth, &version)?;
    }
    println!(
        "\nmedians over turns; \"x put\": beside one put by the same client. Under target/bench: results.json, hand-over.svg"
    );
    if failures > 0 {
        println!("{failures} turns failed; they are marked");
    }
    Ok(())
}

/// After each work, so that what is there is kept.
fn save(results: &[serde_json::Value], growth: &chart::Growth, version: &str) -> Result<(), AnyError> {
    std::fs::create_dir_all("target/bench")?;
    std::fs::write("target/bench/results.json", serde_json::to_string_pretty(results)?)?;
    std::fs::write("target/bench/hand-over.svg", growth.svg(version))?;
    Ok(())
}

fn number(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn ratio(value: f64) -> String {
    number(value).map_or(format!("{:>8}", "-"), |value| format!("{value:>8.3}"))
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Process {
    name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(client: &Client, what: &str, endpoint: &str, name: &str, rounds: usize) -> Result<Process, AnyError> {
        let mut child = Command::new(client.command[0])
            .args(&client.command[1..])
            .args([what, endpoint, name, &rounds.to_string()])
            .env("PEER_NO_TOKEN", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().ok_or("no pipe")?);
        Ok(Process { name: client.name, child, stdin, stdout: BufReader::new(stdout) })
    }

    fn ready(&mut self) -> Result<(), AnyError> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.trim() == "ready" { Ok(()) } else { Err(format!("{} did not start: {line:?}", self.name).into()) }
    }

    fn go(&mut self) -> Result<(), AnyError> {
        Ok(self.stdin.as_mut().ok_or("no pipe")?.write_all(b"go\n")?)
    }

    fn rest(&mut self) -> Result<String, AnyError> {
        let mut output = String::new();
        self.stdout.read_to_string(&mut output)?;
        if self.child.wait()?.success() { Ok(output) } else { Err(format!("{} failed", self.name).into()) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // "load" and "hold" end with their standard input, and so does everybody who still waits to begin.
        self.stdin = None;
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another client that writes all the time.
struct Load {
    _process: Process,
}

impl Load {
    fn start(etcd: &Etcd, rate: usize) -> Result<Load, AnyError> {
        let mut process = Process::start(&CLIENTS[0], "load", &etcd.endpoint(), "bench-load", rate)?;
        process.ready()?;
        process.go()?;
        Ok(Load { _process: process })
    }
}

fn measure(client: &Client, endpoint: &str, work: &Work, rounds: usize) -> Result<Figures, AnyError> {
    let each = (rounds / work.processes).max(1);
    let name = format!("bench-{}-{}", work.what, work.processes);
    let start = || Process::start(client, work.what, endpoint, &name, each);
    let mut processes = (0..work.processes).map(|_| start()).collect::<Result<Vec<_>, _>>()?;
    processes.iter_mut().try_for_each(Process::ready)?;
    let start = Instant::now();
    processes.iter_mut().try_for_each(Process::go)?;
    let mut calls = Vec::new();
    for process in &mut processes {
        calls.extend(process.rest()?.lines().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()));
    }
    let took = start.elapsed().as_secs_f64() * 1e6;
    calls.sort_by(f64::total_cmp);
    if calls.len() * 2 < each * work.processes {
        return Err(format!("{}: {} calls instead of {}", client.name, calls.len(), each * work.processes).into());
    }
    let call = |part: f64| calls[((calls.len() - 1) as f64 * part) as usize] / 1e3;
    if work.by_wall {
        return Ok(Figures { median: took / calls.len() as f64, p99: call(0.99) / work.processes as f64 });
    }
    Ok(Figures { median: call(0.5), p99: call(0.99) })
}

fn remember(etcd: &Etcd, work: &Work, results: &mut Vec<serde_json::Value>) -> Result<(), AnyError> {
    let mut process = Process::start(&CLIENTS[0], work.what, &etcd.endpoint(), "bench-memory", work.rounds)?;
    process.ready()?;
    process.go()?;
    println!("\nmemory of one, of {} in one session", work.rounds);
    for line in process.rest()?.lines() {
        let Some((what, bytes)) = line.strip_prefix("memory ").and_then(|line| line.split_once(' ')) else { continue };
        let unit = if what.starts_with("renewals") { "" } else { "bytes" };
        println!("  {what:<44} {bytes:>9} {unit}");
        results.push(serde_json::json!({ "name": what, "client": RUST, "unit": unit, "median": bytes.parse::<f64>()? }));
    }
    Ok(())
}
