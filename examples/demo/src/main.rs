//! The demo: several programs increment one number in a file, first without the lock, then with it.
//!
//! `etcdlock-demo LABEL=COMMAND …` gives the counter program of each language; the target, the file,
//! the rounds and `lock` or `nolock` are added to each command.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use etcdlock_rig::Etcd;

const ROUNDS: u64 = 150;
/// Processes in all, whatever the number of languages.
const PROCESSES: usize = 6;
/// Holds that are shown one by one; the others move the bar.
const SHOWN: u64 = 14;

struct Worker {
    label: String,
    command: Vec<String>,
}

/// One increment, as a worker reports it.
struct Step {
    worker: usize,
    token: Option<u64>,
    value: u64,
    waited: Duration,
}

struct Outcome {
    found: u64,
    took: Duration,
    steps: Vec<Step>,
}

fn main() -> ExitCode {
    let languages: Vec<(String, Vec<String>)> = std::env::args()
        .skip(1)
        .filter_map(|arg| {
            let (label, command) = arg.split_once('=')?;
            Some((label.to_owned(), command.split(' ').map(str::to_owned).collect()))
        })
        .collect();
    if languages.is_empty() {
        eprintln!("usage: etcdlock-demo LABEL=COMMAND …");
        return ExitCode::from(64);
    }
    let count = PROCESSES.max(languages.len());
    let workers: Vec<_> = (0..count)
        .map(|i| {
            let (language, command) = &languages[i % languages.len()];
            Worker { label: format!("{language}-{}", i / languages.len() + 1), command: command.clone() }
        })
        .collect();
    match run(&workers) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the demo cannot go on: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(workers: &[Worker]) -> std::io::Result<bool> {
    let say = Style::of_terminal();
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("counter");
    let etcd = Etcd::start();
    println!("\n  A throw-away etcd runs at {}.", etcd.endpoint());
    let names: Vec<_> = workers.iter().map(|worker| worker.label.as_str()).collect();
    println!("  {} processes ({}) add 1 to the same number, {ROUNDS} times each.", workers.len(), names.join(", "));

    println!("\n  {}", say.bold("1. Without the lock"));
    let without = phase(&say, workers, &etcd.endpoint(), &file, "nolock")?;
    let expected = ROUNDS * workers.len() as u64;
    let lost = expected - without.found.min(expected);
    println!("     expected {expected}, found {}: {}", without.found, say.red(&format!("{lost} updates lost")));

    println!("\n  {}", say.bold("2. With the lock: each holder prints its fencing token"));
    let with = phase(&say, workers, &etcd.endpoint(), &file, "lock")?;
    let mut by_token: Vec<_> = with.steps.iter().filter_map(|step| Some((step.token?, step.value))).collect();
    by_token.sort_unstable();
    // Exclusive and in order: sorted by token, the values are 1, 2, 3 and so on.
    let in_order = by_token.iter().map(|(_, value)| *value).eq(1..=expected);
    let all = with.found == expected && in_order;
    let verdict = if all { say.green("no update lost, tokens in order") } else { say.red("UPDATES LOST") };
    println!("     expected {expected}, found {}: {verdict}", with.found);

    let longest = |outcome: &Outcome| outcome.steps.iter().map(|step| step.waited).max().unwrap_or_default();
    let rate = |outcome: &Outcome| outcome.steps.len() as f64 / outcome.took.as_secs_f64();
    println!("\n                        without lock      with lock");
    let row = |name: &str, a: String, b: String| println!("  {name:<20} {a:>13} {b:>14}");
    row("processes", workers.len().to_string(), workers.len().to_string());
    row("increments expected", expected.to_string(), expected.to_string());
    row("increments found", without.found.to_string(), with.found.to_string());
    row("hand-overs per second", "-".into(), format!("{:.0}", rate(&with)));
    row("longest wait", "-".into(), format!("{:.1} ms", longest(&with).as_secs_f64() * 1e3));
    println!();
    Ok(all)
}

fn phase(say: &Style, workers: &[Worker], endpoint: &str, file: &Path, how: &str) -> std::io::Result<Outcome> {
    // Always ten digits, so that writing it is one step, and what gets lost is lost by the race alone.
    std::fs::write(file, format!("{:010}", 0))?;
    let (tx, lines) = mpsc::channel();
    let mut children = Vec::new();
    for (worker, Worker { command, label }) in workers.iter().enumerate() {
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .args([endpoint, &file.to_string_lossy(), &ROUNDS.to_string(), how])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| std::io::Error::other(format!("{label} ({}): {error}", command.join(" "))))?;
        let stdout = child.stdout.take().ok_or_else(|| std::io::Error::other("no pipe"))?;
        let tx = tx.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tx.send((worker, line));
            }
        });
        children.push(child);
    }
    drop(tx);

    let expected = ROUNDS * workers.len() as u64;
    let mut steps: Vec<Step> = Vec::new();
    let (mut first, mut last) = (None, None);
    for (worker, line) in lines {
        let Some(step) = parse(worker, &line) else { continue };
        last = Some(Instant::now());
        first = first.or(last);
        show(say, workers, &step, steps.len() as u64, expected);
        steps.push(step);
    }
    say.clear_line();
    for (mut child, worker) in children.into_iter().zip(workers) {
        if !child.wait()?.success() {
            return Err(std::io::Error::other(format!("{} failed", worker.label)));
        }
    }
    let found = std::fs::read_to_string(file)?.trim().parse().unwrap_or(0);
    let took = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
    Ok(Outcome { found, took, steps })
}

/// `token=7 value=3 waited_us=412`
fn parse(worker: usize, line: &str) -> Option<Step> {
    let field = |name: &str| line.split_whitespace().find_map(|part| part.strip_prefix(name));
    Some(Step {
        worker,
        token: field("token=").and_then(|token| token.parse().ok()),
        value: field("value=")?.parse().ok()?,
        waited: Duration::from_micros(field("waited_us=")?.parse().ok()?),
    })
}

fn show(say: &Style, workers: &[Worker], step: &Step, done: u64, expected: u64) {
    let label = &workers[step.worker].label;
    match step.token {
        Some(token) if done < SHOWN => {
            let waited = step.waited.as_secs_f64() * 1e3;
            println!(
                "     token {token:>5}   {:<10} wrote {:>4}   after {waited:>7.2} ms",
                say.color(step.worker, label),
                step.value
            );
        }
        _ if say.colors => {
            let width = 30 * (done + 1) / expected;
            let bar = "█".repeat(width as usize);
            let token = step.token.map_or(String::new(), |token| format!("token {token}"));
            print!("\r     {bar:<30} {}/{expected}  {:<10} {token}   ", done + 1, say.color(step.worker, label));
            let _ = std::io::stdout().flush();
        }
        Some(_) if done == SHOWN => println!("     …"),
        _ => {}
    }
}

/// Colours and a moving bar on a terminal, plain lines elsewhere.
struct Style {
    colors: bool,
}

impl Style {
    fn of_terminal() -> Style {
        Style { colors: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colors { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn red(&self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn green(&self, text: &str) -> String {
        self.paint("1;32", text)
    }

    /// A colour of its own for each worker, padded before it is coloured.
    fn color(&self, worker: usize, label: &str) -> String {
        self.paint(&format!("{}", 31 + worker % 6), &format!("{label:<10}"))
    }

    fn clear_line(&self) {
        if self.colors {
            print!("\r\x1b[2K");
        }
    }
}
