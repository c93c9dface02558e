//! `etcdlock run`: waits for the lock, runs the command in a process group of its own, and lets go
//! when the whole group is gone.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use etcdlock::{Contender, Error, Hold, Loss, Session};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, killpg, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::arguments::Run;
use crate::show::{age, label};
use crate::{exit, fail};

const TICK: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Signals that are meant for the command.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

enum Event {
    Connected(Result<Session, Error>),
    /// `None`: it is taken.
    Locked(Result<Option<Hold>, Error>),
    Queue(Vec<Contender>),
    Lost(Loss),
    Signal(Signal),
    /// The command's first process stopped, or ended with this exit code.
    Stopped(Signal),
    Ended(i32),
}

pub(crate) fn run(run: &Run) -> i32 {
    let (events, inbox) = channel();
    if let Err(error) = listen_for_signals(&events) {
        eprintln!("etcdlock: signals cannot be received: {error}");
        return exit::INTERNAL;
    }
    let say = Say { start: Instant::now(), verbose: run.verbose, quiet: run.quiet };
    let mut runner = Runner { run, say, events, inbox, line_shown: false };
    match runner.go() {
        Ok(code) | Err(Stop::Code(code)) => code,
        Err(Stop::Error(error)) => fail(&error),
    }
}

enum Stop {
    Code(i32),
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Error(error)
    }
}

struct Say {
    start: Instant,
    verbose: bool,
    quiet: bool,
}

impl Say {
    fn step(&self, text: &str) {
        if self.verbose {
            eprintln!("etcdlock: {:8.3}s {text}", self.start.elapsed().as_secs_f64());
        }
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            eprintln!("etcdlock: {text}");
        }
    }
}

/// Signals are caught, not blocked: in an interpreter there are other threads that would take them.
fn listen_for_signals(events: &Sender<Event>) -> std::io::Result<()> {
    // Else taking the terminal back from the command would stop us.
    let mut stops = SigSet::empty();
    stops.add(Signal::SIGTTOU);
    stops.thread_block()?;
    let ignored = ignored_signals();
    let caught = PASSED_ON.iter().map(|signal| *signal as i32).filter(|number| ignored & (1 << (number - 1)) == 0);
    let mut signals = signal_hook::iterator::Signals::new(caught)?;
    let events = events.clone();
    std::thread::spawn(move || {
        for number in signals.forever() {
            let Ok(signal) = Signal::try_from(number) else { continue };
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// What the caller told us to ignore, as `nohup` does, is ignored by the command too.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

struct Runner<'a> {
    run: &'a Run,
    say: Say,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    line_shown: bool,
}

impl Runner<'_> {
    fn go(&mut self) -> Result<i32, Stop> {
        let session = self.connect()?;
        let locked = self.lock(&session);
        self.clear_line();
        let hold = match locked {
            Ok(hold) => hold,
            Err(stop) => {
                let _ = session.close(RELEASE_LIMIT).wait();
                return Err(stop);
            }
        };
        self.say.step(&format!("the lock {:?} is held, token {}", self.run.name, hold.token()));
        let code = self.execute(&hold);
        let released = hold.unlock().wait();
        let _ = session.close(RELEASE_LIMIT).wait();
        match released {
            Ok(()) => self.say.step("released"),
            Err(error) if error.kind() == etcdlock::ErrorKind::Lost && code != exit::LOST => {
                eprintln!("etcdlock: {error}");
                return Ok(exit::LOST);
            }
            Err(error) if code != exit::LOST => self.say.note(&error.to_string()),
            Err(_) => {}
        }
        Ok(code)
    }

    fn connect(&mut self) -> Result<Session, Stop> {
        let connection = &self.run.connection;
        let events = self.events.clone();
        let mut options = connection.options().ttl(self.run.ttl);
        if let Some(limit) = self.run.timeout.filter(|limit| !limit.is_zero() && *limit < connection.connect_timeout) {
            options = options.connect_timeout(limit);
        }
        let connecting = Session::connect(connection.target(), options).on_done(move |session| {
            let _ = events.send(Event::Connected(session));
        });
        loop {
            match self.inbox.recv() {
                Ok(Event::Connected(session)) => {
                    let session = session?;
                    self.say.step(&format!("connected, TTL {:?}", session.ttl()));
                    return Ok(session);
                }
                Ok(Event::Signal(signal)) => {
                    connecting.cancel();
                    return Err(Stop::Code(exit::SIGNALLED + signal as i32));
                }
                _ => {}
            }
        }
    }

    fn lock(&mut self, session: &Session) -> Result<Hold, Stop> {
        let mutex = session.mutex(&self.run.name)?;
        let pending = match (self.run.only_try, self.run.timeout) {
            (true, _) => {
                let events = self.events.clone();
                mutex.try_lock().on_done(move |hold| drop(events.send(Event::Locked(hold))))
            }
            (false, limit) => {
                let events = self.events.clone();
                let lock = limit.map_or_else(|| mutex.lock(), |limit| mutex.lock_timeout(limit));
                lock.on_done(move |hold| drop(events.send(Event::Locked(hold.map(Some)))))
            }
        };
        let mut look_at = Instant::now() + TICK;
        let mut queue = Vec::new();
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(Event::Locked(Ok(Some(hold)))) => return Ok(hold),
                Ok(Event::Locked(result)) => {
                    self.clear_line();
                    match result {
                        Err(error) if error.kind() != etcdlock::ErrorKind::Timeout => return Err(error.into()),
                        _ => {}
                    }
                    let queue = session.inspect(&self.run.name).wait().unwrap_or_default();
                    let by = holder(&queue).map_or(String::new(), |holder| format!(" by {holder}"));
                    self.say.note(&format!("not acquired: {:?} is held{by}", self.run.name));
                    return Err(Stop::Code(exit::NOT_ACQUIRED));
                }
                Ok(Event::Queue(now)) => queue = now,
                Ok(Event::Signal(signal)) => {
                    pending.cancel();
                    return Err(Stop::Code(exit::SIGNALLED + signal as i32));
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => {}
                Err(RecvTimeoutError::Timeout) => {
                    if Instant::now() >= look_at {
                        look_at = Instant::now() + LOOK_EVERY;
                        let events = self.events.clone();
                        let _ = session.inspect(&self.run.name).on_done(move |queue| {
                            let _ = queue.map(|queue| events.send(Event::Queue(queue)));
                        });
                    }
                    self.show_waiting(&queue);
                }
            }
        }
    }

    /// One line on a terminal, nothing elsewhere.
    fn show_waiting(&mut self, queue: &[Contender]) {
        if self.say.quiet || !std::io::stderr().is_terminal() {
            return;
        }
        let waited = self.say.start.elapsed();
        let spinner = ["⠋", "⠙", "⠸", "⠴", "⠦", "⠇"][(waited.as_millis() / TICK.as_millis() % 6) as usize];
        let by = holder(queue).map_or(String::new(), |holder| format!(", held by {holder}"));
        let ahead = match queue.len() {
            0..=2 => String::new(),
            length => format!(", {} waiting", length - 1),
        };
        eprint!("\r\x1b[2K{spinner} waiting for {} for {}s{by}{ahead}", self.run.name, waited.as_secs());
        let _ = std::io::stderr().flush();
        self.line_shown = true;
    }

    fn clear_line(&mut self) {
        if std::mem::take(&mut self.line_shown) {
            eprint!("\r\x1b[2K");
        }
    }

    /// Runs the command and returns when its whole process group is gone.
    fn execute(&mut self, hold: &Hold) -> i32 {
        let events = self.events.clone();
        hold.on_lost(move |loss| drop(events.send(Event::Lost(loss))));
        let (program, args) = (&self.run.command[0], &self.run.command[1..]);
        let child = Command::new(program)
            .args(args)
            .env("ETCDLOCK_NAME", &self.run.name)
            .env("ETCDLOCK_TOKEN", hold.token().to_string())
            .stdin(ours(std::io::stdin()))
            .stdout(ours(std::io::stdout()))
            .stderr(ours(std::io::stderr()))
            .process_group(0)
            .spawn();
        let group = match child {
            Ok(child) => Pid::from_raw(child.id() as i32),
            Err(error) => {
                eprintln!("etcdlock: {}: {error}", program.to_string_lossy());
                let is_missing = error.kind() == std::io::ErrorKind::NotFound;
                return if is_missing { exit::NOT_FOUND } else { exit::NOT_EXECUTABLE };
            }
        };
        let terminal = Terminal::give_to(group);
        let _guard = Guard::start(group, self.run.kill_after.min(hold.remaining() / 3));
        self.say.step(&format!("started {} as process {group}", program.to_string_lossy()));
        let events = self.events.clone();
        std::thread::spawn(move || wait_for(group, &events));
        let code = self.follow(group, &terminal);
        terminal.take_back();
        code
    }

    fn follow(&mut self, group: Pid, terminal: &Terminal) -> i32 {
        let mut code = None;
        let mut lost = false;
        let mut kill_at = None;
        let end_at = self.run.max_hold.map(|limit| Instant::now() + limit);
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(Event::Signal(signal)) => {
                    self.say.step(&format!("passing on {signal}"));
                    let _ = killpg(group, signal);
                }
                Ok(Event::Lost(loss)) if !lost => {
                    lost = true;
                    eprintln!("etcdlock: the lock {:?} is lost: {loss}; ending the command", self.run.name);
                    kill_at = Some(self.end(group));
                }
                Ok(Event::Stopped(signal)) => terminal.follow_stop(group, signal),
                Ok(Event::Ended(ended)) => {
                    self.say.step(&format!("the command ended with {ended}"));
                    code = Some(ended);
                }
                _ => {}
            }
            if !lost && end_at.is_some_and(|at| Instant::now() >= at) {
                lost = true;
                eprintln!("etcdlock: the command ran longer than --max-hold; ending it");
                kill_at = Some(self.end(group));
            }
            if kill_at.is_some_and(|at| Instant::now() >= at) {
                kill_at = None;
                self.say.step("it goes on, so it gets KILL");
                let _ = killpg(group, Signal::SIGKILL);
            }
            if let Some(code) = code
                && killpg(group, None) == Err(Errno::ESRCH)
            {
                return if lost { exit::LOST } else { code };
            }
        }
    }

    /// Asks the command to end, and says when to stop asking.
    fn end(&self, group: Pid) -> Instant {
        let _ = killpg(group, Signal::SIGTERM);
        // A stopped process takes its signal only when it goes on.
        let _ = killpg(group, Signal::SIGCONT);
        Instant::now() + self.run.kill_after
    }
}

/// Ends the command should we be killed ourselves, while the lock is still ours: `kill -9`, or the
/// kernel out of memory. A shell, because it has to outlive us, and what runs us may be an interpreter.
struct Guard(Option<Child>);

impl Guard {
    /// It waits for a line. The end of the pipe without one is our end.
    const SCRIPT: &str = "trap '' INT TERM HUP QUIT TSTP; read -r _ && exit; \
        kill -s TERM -- -$0 && kill -s CONT -- -$0 && sleep $1 && kill -s KILL -- -$0";

    fn start(group: Pid, kill_after: Duration) -> Guard {
        let seconds = format!("{:.1}", kill_after.as_secs_f64());
        let shell = Command::new("/bin/sh")
            .args(["-c", Guard::SCRIPT, &group.to_string(), &seconds])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        // Without a shell there is no guard; the lock is safe all the same, for its TTL.
        Guard(shell.ok())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(shell) = &mut self.0 {
            let _ = shell.stdin.take().map(|mut pipe| pipe.write_all(b"\n"));
            let _ = shell.wait();
        }
    }
}

/// A copy of one of our own streams. Node marks those as not to be inherited; a copy is.
fn ours(stream: impl AsFd) -> Stdio {
    stream.as_fd().try_clone_to_owned().map_or_else(|_| Stdio::inherit(), Stdio::from)
}

fn holder(queue: &[Contender]) -> Option<String> {
    let holder = queue.first()?;
    Some(format!("{} for {}", label(holder), age(holder.age)))
}

/// Reports what becomes of the command's first process.
fn wait_for(pid: Pid, events: &Sender<Event>) {
    loop {
        let event = match waitpid(pid, Some(WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Exited(_, code)) => Event::Ended(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Event::Ended(exit::SIGNALLED + signal as i32),
            Ok(WaitStatus::Stopped(_, signal)) => Event::Stopped(signal),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => Event::Ended(exit::INTERNAL),
        };
        let is_end = matches!(event, Event::Ended(_));
        if events.send(event).is_err() || is_end {
            return;
        }
    }
}

/// The terminal, which the command's group gets while it runs: so Ctrl-C reaches it, once.
struct Terminal {
    /// Our own group, if the terminal was ours to give.
    ours: Option<Pid>,
}

impl Terminal {
    fn give_to(group: Pid) -> Terminal {
        let stdin = std::io::stdin();
        let ours = getpgrp();
        let is_ours = stdin.is_terminal() && tcgetpgrp(&stdin) == Ok(ours) && tcsetpgrp(&stdin, group).is_ok();
        Terminal { ours: is_ours.then_some(ours) }
    }

    fn take_back(&self) {
        if let Some(ours) = self.ours {
            let _ = tcsetpgrp(std::io::stdin(), ours);
        }
    }

    /// The command was stopped. By Ctrl-Z: stop as well, and go on together. Because it read from
    /// the terminal before it had it: go on.
    fn follow_stop(&self, group: Pid, signal: Signal) {
        if self.ours.is_none() {
            return;
        }
        if signal == Signal::SIGTSTP || signal == Signal::SIGSTOP {
            self.take_back();
            let _ = raise(Signal::SIGSTOP);
            let _ = tcsetpgrp(std::io::stdin(), group);
        }
        let _ = killpg(group, Signal::SIGCONT);
    }
}
