//! The command, with real processes on a real etcd.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant};

use etcdlock_rig::Etcd;
use nix::sys::signal::{SigHandler, Signal, kill};
use nix::unistd::Pid;

fn etcd() -> &'static Etcd {
    static ETCD: OnceLock<Etcd> = OnceLock::new();
    ETCD.get_or_init(Etcd::start)
}

fn etcdlock_at(endpoint: &str, args: &[&str]) -> Command {
    take_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_etcdlock"));
    command.args(args).env("ETCDLOCK_ENDPOINTS", endpoint).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A CI or a shell that runs tests in the background may have them ignore SIGINT, and what they start
/// would ignore it too.
fn take_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGTERM] {
            // SAFETY: no handler runs; the default action of a process is safe to set at any time.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.unwrap();
        }
    });
}

fn etcdlock(args: &[&str]) -> Command {
    etcdlock_at(&etcd().endpoint(), args)
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Holds a lock with a command that says so and runs until its input closes.
struct Holder(Child);

impl Holder {
    fn of(name: &str) -> Holder {
        let mut child = etcdlock(&["run", name, "--", "sh", "-c", "echo held; cat"]).stdin(Stdio::piped()).spawn().unwrap();
        assert_eq!(first_line(&mut child), "held");
        Holder(child)
    }

    fn release(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Byte by byte: the rest stays in the pipe, and the pipe open.
fn first_line(child: &mut Child) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while child.stdout.as_mut().unwrap().read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    text(&line)
}

fn queue_length(name: &str) -> usize {
    let output = etcdlock(&["status", name, "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    status["contenders"].as_array().unwrap().len()
}

#[test]
fn the_command_gets_name_and_token_and_its_exit_code_is_ours() {
    let script = "echo $ETCDLOCK_NAME $ETCDLOCK_TOKEN; exit 3";
    let output = etcdlock(&["run", "env", "--", "sh", "-c", script]).output().unwrap();
    assert_eq!(code(&output), 3);
    let line = text(&output.stdout);
    let (name, token) = line.trim().split_once(' ').unwrap();
    assert_eq!(name, "env");
    assert!(token.parse::<i64>().unwrap() > 0);
    assert_eq!(text(&output.stderr), "", "nothing is said when all is well");
    assert_eq!(queue_length("env"), 0);
}

#[test]
fn of_two_crons_at_once_one_runs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ran");
    let script = format!("echo ran >> {}; sleep 1", file.display());
    let crons: Vec<_> = (0..2).map(|_| etcdlock(&["run", "--try", "cron", "--", "sh", "-c", &script]).spawn().unwrap()).collect();
    let mut codes: Vec<_> = crons.into_iter().map(|cron| code(&cron.wait_with_output().unwrap())).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 75]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ran\n");
}

#[test]
fn a_lock_not_acquired_is_75_and_says_who_holds_it() {
    let holder = Holder::of("taken");
    for args in [&["--try"][..], &["--timeout", "200ms"][..], &["--timeout", "0"][..]] {
        let args = [&["run"][..], args, &["--owner", "me", "taken", "--", "echo", "no"][..]].concat();
        let output = etcdlock(&args).output().unwrap();
        assert_eq!(code(&output), 75);
        assert!(output.stdout.is_empty(), "the command must not run");
        let said = text(&output.stderr);
        assert!(said.contains("held by") && said.contains(&holder.0.id().to_string()), "{said}");
        let quiet = etcdlock(&[&["run", "-q"][..], &args[1..]].concat()).output().unwrap();
        assert!(code(&quiet) == 75 && quiet.stderr.is_empty());
    }
    assert_eq!(queue_length("taken"), 1);
    holder.release();
}

#[test]
fn a_waiting_run_gets_the_lock_when_it_is_free() {
    let holder = Holder::of("wait");
    let waiting = etcdlock(&["run", "wait", "--", "echo", "mine"]).spawn().unwrap();
    until("it waits", || queue_length("wait") == 2);
    holder.release();
    assert_eq!(text(&waiting.wait_with_output().unwrap().stdout), "mine\n");
}

#[test]
fn a_signal_while_waiting_ends_the_wait_and_leaves_nothing() {
    let holder = Holder::of("interrupted");
    for (sent, expected) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let waiting = etcdlock(&["run", "interrupted", "--", "echo", "no"]).spawn().unwrap();
        until("it waits", || queue_length("interrupted") == 2);
        signal(&waiting, sent);
        assert_eq!(code(&waiting.wait_with_output().unwrap()), expected);
        until("nothing is left of it", || queue_length("interrupted") == 1);
    }
    holder.release();
}

#[test]
fn without_etcd_it_is_69_and_usage_is_64() {
    let output = etcdlock_at("127.0.0.1:1", &["run", "--connect-timeout", "300ms", "x", "--", "true"]).output().unwrap();
    assert_eq!(code(&output), 69);
    assert!(text(&output.stderr).contains("127.0.0.1:1") && text(&output.stderr).contains("refused"));
    for args in [
        &["run", "x"][..],
        &["run", "--ttl", "1s", "x", "--", "true"],
        &["run", "--timeout", "soon", "x", "--", "true"],
        &["run", "--try", "--timeout", "1s", "x", "--", "true"],
        &["run", "", "--", "true"],
        &["--no-such-option"],
    ] {
        let output = etcdlock(args).output().unwrap();
        assert_eq!(code(&output), 64, "{args:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_wrong_password_is_77() {
    let etcd = Etcd::start();
    if etcd.etcdctl_command().is_none() {
        println!("SKIPPED: etcdctl is not installed, so authentication cannot be switched on");
        return;
    }
    for args in [&["user", "add", "root:right"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        etcd.etcdctl(args);
    }
    let run = |password: &str| {
        let args = ["run", "--user", "root", "x", "--", "echo", "in"];
        etcdlock_at(&etcd.endpoint(), &args).env("ETCDLOCK_PASSWORD", password).output().unwrap()
    };
    assert_eq!(code(&run("wrong")), 77);
    assert_eq!(text(&run("right").stdout), "in\n");
    let no_user = etcdlock_at(&etcd.endpoint(), &["run", "x", "--", "true"]).output().unwrap();
    assert_eq!(code(&no_user), 77);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "right\n").unwrap();
    let args = ["run", "--user", "root", "--password-file", file.to_str().unwrap(), "x", "--", "true"];
    assert_eq!(code(&etcdlock_at(&etcd.endpoint(), &args).output().unwrap()), 0);
}

#[test]
fn when_the_lock_is_lost_the_command_gets_term_and_it_is_74() {
    let etcd = Etcd::start();
    if etcd.etcdctl_command().is_none() {
        println!("SKIPPED: etcdctl is not installed, so no lease can be revoked");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("signals");
    let script = format!("trap 'echo term >> {}; exit 0' TERM; echo ready; while :; do sleep 0.05; done", file.display());
    let mut child = etcdlock_at(&etcd.endpoint(), &["run", "lost", "--", "sh", "-c", &script]).spawn().unwrap();
    assert_eq!(first_line(&mut child), "ready");
    for lease in etcd.etcdctl(&["lease", "list"]).unwrap().lines().skip(1) {
        etcd.etcdctl(&["lease", "revoke", lease.trim()]);
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 74);
    assert!(text(&output.stderr).contains("is lost"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "term\n");
}

#[test]
fn a_command_that_ignores_term_is_killed_and_the_lock_is_free_after_it() {
    let args = ["run", "--max-hold", "300ms", "--kill-after", "300ms", "stubborn", "--", "sh", "-c"];
    let script = "trap '' TERM; while :; do sleep 0.05; done";
    let output = etcdlock(&[&args[..], &[script]].concat()).output().unwrap();
    assert_eq!(code(&output), 74);
    assert!(text(&output.stderr).contains("--max-hold"));
    assert_eq!(queue_length("stubborn"), 0);
}

/// A command that notes each signal it gets and ends at the first with code 7.
fn noting_script(file: &Path) -> String {
    let f = file.display();
    format!(
        "trap 'echo int >> {f}; sleep 0.3; exit 7' INT; trap 'echo term >> {f}; sleep 0.3; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    )
}

#[test]
fn a_signal_reaches_the_command_once() {
    for (sent, noted) in [(Signal::SIGTERM, "term\n"), (Signal::SIGINT, "int\n")] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("signals");
        let mut child = etcdlock(&["run", "signals", "--", "sh", "-c", &noting_script(&file)]).spawn().unwrap();
        assert_eq!(first_line(&mut child), "ready");
        signal(&child, sent);
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), noted);
        assert_eq!(queue_length("signals"), 0);
    }
}

#[test]
fn when_etcdlock_itself_is_killed_the_command_ends_before_the_lock_is_free() {
    let script = "trap '' TERM; sleep 100 & echo $! $$; wait; wait; sleep 100";
    let mut child = etcdlock(&["run", "--ttl", "6s", "killed", "--", "sh", "-c", script]).spawn().unwrap();
    let pids = first_line(&mut child);
    let mut pids = pids.split(' ').map(|pid| pid.parse::<i32>().unwrap());
    let (sleeper, shell) = (pids.next().unwrap(), pids.next().unwrap());
    // Nobody may be there to collect it, so a zombie is gone too.
    let is_gone = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with(['Z', 'X']))
    };
    assert!(!is_gone(sleeper) && !is_gone(shell));
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    until("the whole group is gone", || is_gone(sleeper) && is_gone(shell));
    assert_eq!(queue_length("killed"), 1, "and the lock is still taken");
}

#[test]
fn a_timeout_counts_for_the_connection_too() {
    let args = ["run", "--timeout", "300ms", "--connect-timeout", "100s", "x", "--", "true"];
    let output = etcdlock_at("127.0.0.1:1", &args).output().unwrap();
    assert!(code(&output) == 69 && text(&output.stderr).contains("300ms"), "{}", text(&output.stderr));
}

#[test]
fn what_nohup_ignores_is_ignored_by_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let script = format!("echo ready; while [ ! -e {} ]; do sleep 0.02; done; exit 4", go.display());
    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_etcdlock")).args(["run", "nohup", "--", "sh", "-c", &script]);
    nohup.env("ETCDLOCK_ENDPOINTS", etcd().endpoint()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = nohup.spawn().unwrap();
    assert_eq!(first_line(&mut child), "ready");
    signal(&child, Signal::SIGHUP);
    std::fs::write(&go, "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn ctrl_c_on_a_terminal_reaches_the_command_once() {
    if Command::new("script").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: util-linux's script is not installed, so there is no terminal");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (file, runner) = (folder.path().join("signals"), folder.path().join("run.sh"));
    let etcdlock = env!("CARGO_BIN_EXE_etcdlock");
    let script = noting_script(&file).replace('\'', "'\\''");
    std::fs::write(&runner, format!("exec {etcdlock} run terminal -- sh -c '{script}'\n")).unwrap();
    let mut child = Command::new("script")
        .args(["-qefc", &format!("sh {}", runner.display()), "/dev/null"])
        .env("ETCDLOCK_ENDPOINTS", etcd().endpoint())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut seen = String::new();
    while !seen.contains("ready") {
        let mut bytes = [0; 64];
        let n = stdout.read(&mut bytes).unwrap();
        assert!(n > 0, "it ended early: {seen}");
        seen.push_str(&text(&bytes[..n]));
    }
    stdin.write_all(&[3]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "int\n");
}

#[test]
fn the_lock_is_kept_until_the_whole_group_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("daemon");
    // The shell ends at once; what it has started goes on.
    let script = format!("(sleep 1; echo done > {}) > /dev/null 2>&1 & exit 5", file.display());
    let output = etcdlock(&["run", "daemon", "--", "sh", "-c", &script]).output().unwrap();
    assert_eq!(code(&output), 5);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "done\n", "released only after the daemon");
}

#[test]
fn standard_input_is_passed_through() {
    let mut child = etcdlock(&["run", "stdin", "--", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through the lock").unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), "through the lock");
}

#[test]
fn a_command_that_cannot_run_is_127_or_126() {
    for (program, expected) in [("/no/such/program", 127), ("/etc/passwd", 126)] {
        let output = etcdlock(&["run", "missing", "--", program]).output().unwrap();
        assert_eq!(code(&output), expected);
        assert!(text(&output.stderr).contains(program));
    }
    assert_eq!(queue_length("missing"), 0);
}

#[test]
fn status_and_list_show_the_queue_for_people_and_programs() {
    let holder = Holder::of("shown/a");
    let status = text(&etcdlock(&["status", "shown/a"]).output().unwrap().stdout);
    assert!(status.contains("OWNER") && status.contains("holds") && status.contains("cli"), "{status}");
    let list = etcdlock(&["list", "shown/", "--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list[0]["name"], "shown/a");
    assert_eq!(list[0]["contenders"][0]["pid"], holder.0.id());
    assert!(list[0]["contenders"][0]["token"].as_i64().unwrap() > 0);
    assert!(text(&etcdlock(&["list", "shown/"]).output().unwrap().stdout).contains("shown/a"));

    let mut watch = etcdlock(&["watch", "shown/a"]).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("held by"));
    holder.release();
    assert!(lines.next().unwrap().unwrap().contains("free"));
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert_eq!(text(&etcdlock(&["status", "shown/a"]).output().unwrap().stdout), "shown/a is free\n");
}

#[test]
fn verbose_says_each_step() {
    let output = etcdlock(&["run", "--verbose", "steps", "--", "true"]).output().unwrap();
    let said = text(&output.stderr);
    for step in ["connected", "is held, token", "started true", "ended with 0", "released"] {
        assert!(said.contains(step), "{step}: {said}");
    }
}

#[test]
fn it_waits_behind_etcdctl_and_etcdctl_behind_it() {
    let Some(mut etcdctl) = etcd().etcdctl_command() else {
        println!("SKIPPED: etcdctl is not installed");
        return;
    };
    // It gives its command no standard input, so that runs while a file is there.
    let file = tempfile::NamedTempFile::new().unwrap();
    let script = format!("echo held; while [ -e {} ]; do sleep 0.02; done", file.path().display());
    etcdctl.args(["lock", "both", "--", "sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut theirs = etcdctl.spawn().unwrap();
    assert_eq!(first_line(&mut theirs), "held");
    assert_eq!(code(&etcdlock(&["run", "--try", "both", "--", "true"]).output().unwrap()), 75);
    let ours = etcdlock(&["run", "both", "--", "echo", "ours"]).spawn().unwrap();
    until("ours waits", || queue_length("both") == 2);
    drop(file);
    assert!(theirs.wait().unwrap().success());
    assert_eq!(text(&ours.wait_with_output().unwrap().stdout), "ours\n");

    let holder = Holder::of("both");
    let mut etcdctl = etcd().etcdctl_command().unwrap();
    let theirs = etcdctl.args(["lock", "both", "echo", "theirs"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    until("theirs waits", || queue_length("both") == 2);
    holder.release();
    assert_eq!(text(&theirs.wait_with_output().unwrap().stdout), "theirs\n");
}

#[test]
fn man_page_and_completions_are_generated() {
    for (what, part) in [("man", ".TH"), ("bash", "_etcdlock"), ("zsh", "#compdef etcdlock"), ("fish", "complete -c etcdlock")] {
        let output = etcdlock(&["generate", what]).output().unwrap();
        assert!(code(&output) == 0 && text(&output.stdout).contains(part), "{what}");
    }
}
