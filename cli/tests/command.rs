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

/// A CI or a shell that runs tests in the background may have them ignore SIGINT, or Ctrl-Z's SIGTSTP, and what they start
/// would ignore it too.
fn take_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let kept = [Signal::SIGKILL, Signal::SIGSTOP, Signal::SIGPIPE, Signal::SIGSEGV, Signal::SIGBUS];
        for signal in Signal::iterator().filter(|signal| !kept.contains(signal)) {
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
    let end = Instant::now() + Duration::from_secs(60);
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

/// A command under the lock on a terminal of its own; `None` where no terminal can be had.
struct OnTerminal {
    script: Child,
    keys: std::process::ChildStdin,
    _folder: tempfile::TempDir,
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

impl OnTerminal {
    fn start(options: &str, command: &str) -> Option<OnTerminal> {
        Self::start_and_then(options, command, None)
    }

    /// With its exit code in a file: when its child stops and ends at nearly the same time, `script` may hear of the first alone,
    /// and wait for ever.
    fn start_and_then(options: &str, command: &str, code: Option<&Path>) -> Option<OnTerminal> {
        if Command::new("script").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("SKIPPED: util-linux's script is not installed, so there is no terminal");
            return None;
        }
        take_signals();
        let folder = tempfile::tempdir().unwrap();
        let runner = folder.path().join("run.sh");
        let etcdlock = env!("CARGO_BIN_EXE_etcdlock");
        let quoted = command.replace('\'', "'\\''");
        let run = format!("{etcdlock} run {options} -- sh -c '{quoted}'");
        let line = code.map_or(format!("exec {run}\n"), |code| format!("{run}\necho $? > {}\n", code.display()));
        std::fs::write(&runner, line).unwrap();
        let mut script = Command::new("script")
            .args(["-qefc", &format!("exec sh {}", runner.display()), "/dev/null"])
            .env("ETCDLOCK_ENDPOINTS", etcd().endpoint())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let keys = script.stdin.take().unwrap();
        let mut seen = String::new();
        while !seen.contains("ready") {
            let mut bytes = [0; 64];
            let n = script.stdout.as_mut().unwrap().read(&mut bytes).unwrap();
            assert!(n > 0, "it ended early: {seen}");
            seen.push_str(&text(&bytes[..n]));
        }
        Some(OnTerminal { script, keys, _folder: folder })
    }

    fn press(&mut self, key: u8) {
        self.keys.write_all(&[key]).unwrap();
    }
}

#[test]
fn ctrl_c_on_a_terminal_reaches_the_command_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("signals");
    let Some(mut terminal) = OnTerminal::start("terminal", &noting_script(&file)) else { return };
    terminal.press(3);
    assert_eq!(terminal.script.wait().unwrap().code(), Some(7));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "int\n");
}

#[test]
fn row_50_after_ctrl_z_past_the_ttl_the_command_does_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let (file, seen) = (folder.path().join("work"), folder.path().join("seen"));
    // Of builtins alone. A shell that starts a program waits in the kernel until that has begun (`vfork`), and Ctrl-Z at that
    // moment stops the program and not the shell: nobody hears of it, a shell above no more than we.
    let counts = "i=0; while [ $i -lt 9999 ]; do i=$((i + 1)); done";
    let working = format!("echo ready; while :; do echo at work >> {}; {counts}; done", file.display());
    let code_file = folder.path().join("code");
    let Some(mut terminal) = OnTerminal::start_and_then("--ttl 2s suspended", &working, Some(&code_file)) else { return };
    until("it works", || length(&file) > 0);
    let status = etcdlock(&["status", "suspended", "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let stopped = Pid::from_raw(status["contenders"][0]["pid"].as_i64().unwrap() as i32);
    terminal.press(26);
    let script = format!("wc -c < {} > {}", file.display(), seen.display());
    let next = etcdlock(&["run", "--timeout", "60s", "suspended", "--", "sh", "-c", &script]).output().unwrap();
    assert_eq!(code(&next), 0, "{}", text(&next.stderr));
    let then: u64 = std::fs::read_to_string(&seen).unwrap().trim().parse().unwrap();
    // As `fg` does.
    until("it has ended", || {
        let _ = kill(stopped, Signal::SIGCONT);
        length(&code_file) > 0
    });
    assert_eq!(std::fs::read_to_string(&code_file).unwrap().trim(), "74");
    // `script` is of no more use.
    terminal.script.kill().unwrap();
    terminal.script.wait().unwrap();
    assert_eq!(then, length(&file), "it went on beside the next holder");
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
fn row_45_a_key_without_a_lease_is_named_where_it_is_in_the_way() {
    let session = etcdlock::blocking::Session::connect(etcd().endpoint(), etcdlock::Options::default()).unwrap();
    let hold = session.mutex("row45/other").unwrap().lock().unwrap();
    // What is written without a lease, as by a restore from a dump of keys.
    hold.put("row45/left/7", "").unwrap();
    let expected = "row45/left/7 has no lease: it stays until somebody deletes it";
    let status = text(&etcdlock(&["status", "row45/left"]).output().unwrap().stdout);
    assert!(status.contains("holds") && status.contains(expected), "{status}");
    let mut run = etcdlock(&["run", "row45/left", "--", "true"]).spawn().unwrap();
    until("it waits", || queue_length("row45/left") == 2);
    let json = text(&etcdlock(&["status", "row45/left", "--json"]).output().unwrap().stdout);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["contenders"][0]["lease"].is_null() && json["contenders"][1]["lease"].is_string(), "{json}");
    let tried = etcdlock(&["run", "--try", "row45/left", "--", "true"]).output().unwrap();
    assert!(text(&tried.stderr).contains("its key has no lease: it stays until somebody deletes it"), "{tried:?}");
    hold.delete("row45/left/7").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
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

// ---- between the loss and the end of the command ---------------------------------------------

/// A command that works on until it is ended, and says in a file when it still does.
fn working(file: &Path) -> String {
    format!("echo ready; while :; do echo at work >> {}; sleep 0.05; done", file.display())
}

fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |data| data.len())
}

/// Whether nothing is written to it any more.
fn is_quiet(file: &Path) -> bool {
    let before = length(file);
    std::thread::sleep(Duration::from_millis(500));
    length(file) == before
}

fn take_away(etcd: &Etcd) -> bool {
    let Some(leases) = etcd.etcdctl(&["lease", "list"]) else {
        println!("SKIPPED: etcdctl is not installed, so no lease can be revoked");
        return false;
    };
    for lease in leases.lines().skip(1) {
        etcd.etcdctl(&["lease", "revoke", lease.trim()]);
    }
    true
}

#[test]
fn row_48_whatever_becomes_of_standard_error_the_command_ends_when_the_lock_is_lost() {
    type Broken = fn() -> Stdio;
    let full: Broken = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap().into();
    let gone: Broken = || std::io::pipe().unwrap().1.into();
    // Nobody reads, and there is no room for another byte.
    let unread: Broken = || {
        let (reader, writer) = std::io::pipe().unwrap();
        std::mem::forget(reader);
        let mut filled = writer.try_clone().unwrap();
        nix::fcntl::fcntl(&filled, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        while filled.write(&[b'x'; 512]).is_ok() {}
        nix::fcntl::fcntl(&filled, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
        writer.into()
    };
    for (name, stderr) in [("full", full), ("gone", gone), ("unread", unread)] {
        for max_hold in [false, true] {
            let etcd = Etcd::start();
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("work");
            let mut args = vec!["run", "--verbose", "--kill-after", "1s"];
            if max_hold {
                args.extend(["--max-hold", "500ms"]);
            }
            let script = format!("exec 2> /dev/null; {}", working(&file));
            args.extend(["silent", "--", "sh", "-c", &script]);
            let mut child = etcdlock_at(&etcd.endpoint(), &args).stderr(stderr()).spawn().unwrap();
            assert_eq!(first_line(&mut child), "ready");
            if !max_hold && !take_away(&etcd) {
                return;
            }
            assert_eq!(child.wait().unwrap().code(), Some(74), "{name}, max_hold {max_hold}");
            assert!(is_quiet(&file), "{name}: the command is still at work");
        }
    }
}

#[test]
fn row_48_a_command_that_ends_within_its_time_is_left_to_it() {
    for lost in [false, true] {
        let etcd = Etcd::start();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tidy");
        // Longer than the TTL.
        let script =
            format!("trap 'sleep 4; echo tidied up > {}; exit 0' TERM; echo ready; while :; do sleep 0.05; done", file.display());
        let mut args = vec!["run", "--ttl", "2s", "--kill-after", "60s"];
        if !lost {
            args.extend(["--max-hold", "300ms"]);
        }
        args.extend(["tidy", "--", "sh", "-c", &script]);
        let mut child = etcdlock_at(&etcd.endpoint(), &args).spawn().unwrap();
        assert_eq!(first_line(&mut child), "ready");
        if lost && !take_away(&etcd) {
            return;
        }
        assert_eq!(child.wait().unwrap().code(), Some(74), "lost {lost}");
        assert_eq!(std::fs::read_to_string(&file).unwrap_or_default(), "tidied up\n", "lost {lost}");
    }
}

#[test]
fn row_48_durations_that_no_clock_can_count_are_refused() {
    for option in ["--max-hold", "--kill-after", "--timeout", "--ttl"] {
        let output = etcdlock(&["run", option, "1e19s", "long", "--", "true"]).output().unwrap();
        assert_eq!(code(&output), 64, "{option}: {}", text(&output.stderr));
    }
}

#[test]
fn row_48_stopped_alone_etcdlock_does_not_keep_the_command_past_the_deadline() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("work");
    let args = ["run", "--ttl", "3s", "stopped", "--", "sh", "-c", &working(&file)];
    let mut child = etcdlock_at(&etcd.endpoint(), &args).spawn().unwrap();
    assert_eq!(first_line(&mut child), "ready");
    signal(&child, Signal::SIGSTOP);
    // Whoever is next writes the length of the file when it gets in.
    let seen = folder.path().join("seen");
    let script = format!("wc -c < {} > {}", file.display(), seen.display());
    let next = etcdlock_at(&etcd.endpoint(), &["run", "stopped", "--", "sh", "-c", &script]).output().unwrap();
    assert_eq!(code(&next), 0, "{}", text(&next.stderr));
    let then: u64 = std::fs::read_to_string(&seen).unwrap().trim().parse().unwrap();
    assert_eq!(then, length(&file), "the first was still at work when the second began");
    signal(&child, Signal::SIGCONT);
    assert_eq!(child.wait().unwrap().code(), Some(74));
    assert_eq!(then, length(&file));
}

#[test]
fn row_49_what_leaves_the_group_is_ended_too() {
    if Command::new("setsid").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED: util-linux's setsid is not installed");
        return;
    }
    for lost in [true, false] {
        let etcd = Etcd::start();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("work");
        // As under timeout(1) or a shell with job control: a group of its own, and an orphan in a session of its own.
        let inner = working(&file).replace("echo ready; ", "");
        let script = format!("setsid sh -c '{inner}' & setsid sh -c '(sh -c \"{inner}\" &)'; echo ready; wait");
        let args = ["run", "--kill-after", "1s", "left", "--", "sh", "-c", &script];
        let mut child = etcdlock_at(&etcd.endpoint(), &args).spawn().unwrap();
        assert_eq!(first_line(&mut child), "ready");
        until("it works", || length(&file) > 100);
        if lost && !take_away(&etcd) {
            return;
        } else if !lost {
            signal(&child, Signal::SIGTERM);
        }
        assert_eq!(child.wait().unwrap().code(), Some(if lost { 74 } else { 143 }), "lost {lost}");
        assert!(is_quiet(&file), "lost {lost}: something is still at work");
    }
}

#[test]
fn row_49_who_was_there_before_the_command_is_left_alone_and_a_name_cut_in_a_letter_counts() {
    let folder = tempfile::tempdir().unwrap();
    // Fifteen bytes of a name are kept: they end within a letter.
    let (program, file, log) = (folder.path().join("aобработчик"), folder.path().join("work"), folder.path().join("log"));
    std::fs::copy("/bin/sh", &program).unwrap();
    // The one that is there before, as `exec > >(tee log)` leaves one, says at its end that it was not disturbed.
    let before = format!(
        "(trap 'echo disturbed >> {0}' USR1 TERM; for i in $(seq 40); do sleep 0.05; done; echo undisturbed >> {0}) &",
        log.display()
    );
    let worker = format!("trap : USR1; echo ready; sleep 1; sleep 1; echo done > {}", file.display());
    let etcdlock = env!("CARGO_BIN_EXE_etcdlock");
    let command = format!("trap : USR1; {} -c \"{worker}\" & exit 5", program.display());
    let script = format!("{before} exec {etcdlock} run before -- sh -c '{command}'");
    take_signals();
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .env("ETCDLOCK_ENDPOINTS", etcd().endpoint())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(first_line(&mut child), "ready");
    signal(&child, Signal::SIGUSR1);
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "done\n", "the lock was let go before the worker was done");
    until("the one before has ended", || length(&log) > 0);
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "undisturbed\n");
}

#[test]
fn row_50_a_stopped_command_is_ended_by_a_signal() {
    let mut child =
        etcdlock(&["run", "stopped-command", "--", "sh", "-c", "echo ready $$; kill -STOP $$; sleep 100"]).spawn().unwrap();
    let pid: i32 = first_line(&mut child).rsplit(' ').next().unwrap().parse().unwrap();
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    until("it is stopped", || stat().contains(") T "));
    signal(&child, Signal::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

/// As PID 1 of a container has it, where that can be made.
#[test]
fn row_49_as_the_first_process_and_below_one_that_collects_nobody_it_returns_and_lets_go() {
    let can = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).stderr(Stdio::null()).status();
    if !can.is_ok_and(|status| status.success()) {
        println!("SKIPPED: no process namespace can be made here");
        return;
    }
    take_signals();
    let orphan = "(sleep 0.5 &) ; exit 6";
    let etcdlock = env!("CARGO_BIN_EXE_etcdlock");
    let careless = format!("trap '' CHLD; {etcdlock} run careless -- sh -c '{orphan}'; exit $?");
    for args in [&[etcdlock, "run", "first", "--", "sh", "-c", orphan][..], &["sh", "-c", &careless][..]] {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"]).args(args);
        let output = command.env("ETCDLOCK_ENDPOINTS", etcd().endpoint()).stdin(Stdio::null()).output().unwrap();
        assert_eq!(code(&output), 6, "{args:?}: {}", text(&output.stderr));
    }
    assert_eq!(queue_length("first") + queue_length("careless"), 0);
    // `docker stop`: TERM to the first process, whose command waits for a child.
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--", etcdlock, "run", "stop", "--", "sh", "-c"]);
    command.arg("echo ready; sleep 100; true").env("ETCDLOCK_ENDPOINTS", etcd().endpoint());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(first_line(&mut child), "ready");
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    kill(Pid::from_raw(children.trim().parse().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(queue_length("stop"), 0);
}

#[test]
fn row_50_signals_that_the_starter_has_blocked_or_ignored_are_set_right() {
    use std::os::unix::process::CommandExt;
    let start = |script: &str, prepare: fn()| {
        let mut command = etcdlock(&["run", "masks", "--", "sh", "-c", script]);
        // SAFETY: a system call alone.
        unsafe {
            command.pre_exec(move || {
                prepare();
                Ok(())
            })
        };
        command.spawn().unwrap()
    };
    let ignore_children: fn() = || {
        // SAFETY: to ignore a signal runs no handler.
        let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    };
    assert_eq!(start("exit 3", ignore_children).wait().unwrap().code(), Some(3));
    let block_all: fn() = || {
        let _ = nix::sys::signal::SigSet::all().thread_set_mask();
    };
    let mut blocked = start("echo $(grep SigBlk /proc/self/status); sleep 100", block_all);
    assert_eq!(first_line(&mut blocked), "SigBlk: 0000000000000000", "the command has nothing blocked");
    signal(&blocked, Signal::SIGTERM);
    assert_eq!(blocked.wait().unwrap().code(), Some(143));
}

#[test]
fn row_53_the_command_does_not_get_the_password() {
    let mut command = etcdlock(&["run", "secret", "--", "sh", "-c", "echo \"$ETCDLOCK_NAME ${ETCDLOCK_PASSWORD-none}\""]);
    let output = command.env("ETCDLOCK_USER", "somebody").env("ETCDLOCK_PASSWORD", "hunter2").output().unwrap();
    assert_eq!(text(&output.stdout), "secret none\n");
}

#[test]
fn row_52_hostile_texts_are_shown_harmlessly_and_a_full_disk_is_no_success() {
    let owner = "\x1b[2J\u{202e}\u{9b}31m\nholds  forged 😀";
    let mut child = etcdlock(&["run", "--owner", owner, "hostile\x1b[31m", "--", "sh", "-c", "echo held; cat"]);
    let mut child = child.stdin(Stdio::piped()).spawn().unwrap();
    assert_eq!(first_line(&mut child), "held");
    for args in [&["status", "hostile\x1b[31m"][..], &["list", "hostile"]] {
        let output = etcdlock(args).output().unwrap();
        let shown = text(&output.stdout);
        assert_eq!((code(&output), shown.lines().count()), (0, 2), "{shown:?}");
        assert!(!shown.contains(['\x1b', '\u{202e}']), "{shown:?}");
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(etcdlock(args).stdout(full()).output().unwrap().status.code(), Some(74));
    }
    for args in [&["status", "--json", "hostile\x1b[31m"][..], &["list", "--json", "hostile"]] {
        let shown = text(&etcdlock(args).output().unwrap().stdout);
        assert!(!shown.contains(['\x1b', '\u{202e}', '\u{9b}']), "{shown:?}");
        let json: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let first = json.get(0).unwrap_or(&json);
        assert_eq!(first["contenders"][0]["owner"], owner, "it is the same text all the same");
    }
    let output = etcdlock(&["run", "--try", "hostile\x1b[31m", "--", "true"]).output().unwrap();
    assert!(code(&output) == 75 && !output.stderr.contains(&b'\x1b'), "{}", text(&output.stderr));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let long = etcdlock(&["run", "--owner", &"x".repeat(70_000), "long-owner", "--", "true"]).output().unwrap();
    assert_eq!(code(&long), 64, "{}", text(&long.stderr));
}
