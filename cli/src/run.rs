//! `etcdlock run`: waits for the lock, runs the command in a process group of its own, and lets go
//! when the whole group is gone.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use etcdlock::{Contender, Error, Hold, Loss, Session};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, killpg, raise, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::arguments::Run;
use crate::ending::{Ender, Limits, Others, Why, is_alive, left_the_group, reap_orphans, signal_all};
use crate::guard::Guard;
use crate::show::{age, label};
use crate::speak::{Speaker, complain, short};
use crate::{exit, fail};

const TICK: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Signals that are meant for the command.
pub(crate) const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// Those of them that ask it to end.
const ENDING: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

enum Event {
    Connected(Result<Session, Error>),
    /// `None`: it is taken.
    Locked(Result<Option<Hold>, Error>),
    Queue(Vec<Contender>),
    Signal(Signal),
    /// The command's first process stopped, or ended with this exit code.
    Stopped(Signal),
    Ended(i32),
}

pub(crate) fn run(run: &Run) -> i32 {
    let (events, inbox) = channel();
    // All that can fail for want of a process or a thread comes before the lock.
    let prepare = || -> std::io::Result<_> {
        let ignored = set_signals_right()?;
        let guard = Guard::start(run.kill_after)?;
        listen_for_signals(ignored, &events)?;
        Ok((guard, Speaker::start()?))
    };
    let (guard, speaker) = match prepare() {
        Ok(prepared) => prepared,
        Err(error) => {
            complain(&format!("what watches over the command cannot be started: {error}; nothing was locked"));
            return exit::INTERNAL;
        }
    };
    let say = Say { speaker, start: Instant::now(), verbose: run.verbose, quiet: run.quiet };
    let guard = Arc::new(guard);
    let mut runner = Runner { run, say, events, inbox, guard: guard.clone(), line_shown: false };
    let done = runner.go();
    // Whichever way it came to nothing, or to its end.
    guard.all_is_well();
    match done {
        Ok(code) | Err(Stop::Code(code)) => code,
        Err(Stop::Error(error)) => {
            drop(runner);
            fail(&error)
        }
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
    speaker: Speaker,
    start: Instant,
    verbose: bool,
    quiet: bool,
}

impl Say {
    fn step(&self, text: &str) {
        if self.verbose {
            self.speaker.line(&format!("{:8.3}s {text}", self.start.elapsed().as_secs_f64()));
        }
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            self.speaker.line(text);
        }
    }

    fn error(&self, text: &str) {
        self.speaker.line(text);
    }
}

/// Whoever starts us may have blocked signals, and ignored the end of children, for reasons of its own. What it ignores of
/// the signals that are passed on, as `nohup` does, stays ignored: the answer has them.
fn set_signals_right() -> std::io::Result<u64> {
    let mut stops = SigSet::empty();
    // Else taking the terminal back from the command would stop us.
    stops.add(Signal::SIGTTOU);
    stops.thread_set_mask()?;
    let ignored = ignored_signals();
    if ignored & (1 << (Signal::SIGCHLD as i32 - 1)) != 0 {
        // SAFETY: the default action runs no handler.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    }
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_child_subreaper(true)?;
    Ok(ignored)
}

/// Signals are caught, not blocked: in an interpreter there are other threads that would take them.
fn listen_for_signals(ignored: u64, events: &Sender<Event>) -> std::io::Result<()> {
    let caught = PASSED_ON.iter().map(|signal| *signal as i32).filter(|number| ignored & (1 << (number - 1)) == 0);
    let mut signals = signal_hook::iterator::Signals::new(caught)?;
    let events = events.clone();
    std::thread::Builder::new().name("etcdlock-signals".into()).spawn(move || {
        for number in signals.forever() {
            let Ok(signal) = Signal::try_from(number) else { continue };
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

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
    guard: Arc<Guard>,
    line_shown: bool,
}

impl Runner<'_> {
    fn go(&mut self) -> Result<i32, Stop> {
        let session = self.connect()?;
        let locked = self.lock(&session);
        self.clear_line();
        let hold = match locked {
            Ok(hold) => Arc::new(hold),
            Err(stop) => {
                let _ = session.close(RELEASE_LIMIT).wait();
                return Err(stop);
            }
        };
        self.say.step(&format!("the lock {:?} is held, token {}", self.run.name, hold.token()));
        let code = self.execute(&hold, session.ttl());
        self.guard.all_is_well();
        let released = hold.unlock_in_place().wait();
        let _ = session.close(RELEASE_LIMIT).wait();
        match released {
            Ok(()) => self.say.step("released"),
            Err(error) if error.kind() == etcdlock::ErrorKind::Lost && code != exit::LOST => {
                self.say.error(&error.to_string());
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
                // What the connection took counts.
                let left = limit.map(|limit| limit.saturating_sub(self.say.start.elapsed()));
                let lock = left.map_or_else(|| mutex.lock(), |left| mutex.lock_timeout(left));
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
        let name = short(&self.run.name);
        self.say.speaker.say(format!("\r\x1b[2K{spinner} waiting for {name} for {}s{by}{ahead}", waited.as_secs()));
        self.line_shown = true;
    }

    fn clear_line(&mut self) {
        if std::mem::take(&mut self.line_shown) {
            self.say.speaker.say("\r\x1b[2K");
        }
    }

    /// Runs the command and returns when its whole process group is gone.
    fn execute(&mut self, hold: &Arc<Hold>, ttl: Duration) -> i32 {
        let terminal = Terminal::ours();
        let others = Arc::new(Others::now(self.guard.pid()));
        let prepared = match self.prepare(hold, ttl, &terminal, &others) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.say.error(&format!("what watches over the command cannot be started: {error}"));
                return exit::INTERNAL;
            }
        };
        let (ender, first, mut command) = prepared;
        if !hold.is_held() {
            self.say.error(&format!("the lock {:?} was lost before the command began", self.run.name));
            return exit::LOST;
        }
        let spawned = command.spawn().map(|child| {
            let group = Pid::from_raw(child.id() as i32);
            // First of all: from here on there is something to end.
            ender.began(group);
            let _ = first.send(group);
            group
        });
        let program = self.run.command[0].to_string_lossy();
        let group = match spawned {
            Ok(group) => group,
            Err(error) => {
                self.say.error(&format!("{program}: {error}"));
                let is_missing = error.kind() == std::io::ErrorKind::NotFound;
                return if is_missing { exit::NOT_FOUND } else { exit::NOT_EXECUTABLE };
            }
        };
        terminal.give_to(group);
        self.say.step(&format!("started {program} as process {group}"));
        let followed =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.follow(group, hold, &ender, &terminal, &others)));
        let code = followed.unwrap_or_else(|_| {
            // Whatever went wrong here, the command does not outlive the lock.
            while is_alive(group) {
                signal_all(group, &others, Signal::SIGKILL);
                reap_orphans(group, self.guard.pid());
                std::thread::sleep(TICK);
            }
            exit::INTERNAL
        });
        ender.done();
        terminal.take_back(group);
        code
    }

    /// What watches over the command, and the command itself, which has not been started yet.
    fn prepare(
        &self,
        hold: &Arc<Hold>,
        ttl: Duration,
        terminal: &Terminal,
        others: &Arc<Others>,
    ) -> std::io::Result<(Ender, Sender<Pid>, Command)> {
        let limits = Limits { kill_after: self.run.kill_after, max_hold: self.run.max_hold };
        let ender = Ender::start(hold.clone(), ttl, limits, self.guard.clone(), others.clone())?;
        let (first, waited_for) = channel();
        let events = self.events.clone();
        std::thread::Builder::new().name("etcdlock-wait".into()).spawn(move || {
            let _ = waited_for.recv().map(|pid| wait_for(pid, &events));
        })?;
        let (program, args) = (&self.run.command[0], &self.run.command[1..]);
        let mut command = Command::new(program);
        command.args(args).process_group(0);
        command.env("ETCDLOCK_NAME", &self.run.name).env("ETCDLOCK_TOKEN", hold.token().to_string());
        command.env_remove("ETCDLOCK_PASSWORD");
        command.stdin(ours(std::io::stdin())).stdout(ours(std::io::stdout())).stderr(ours(std::io::stderr()));
        let announce = self.guard.announcer()?;
        let has_terminal = terminal.ours.is_some();
        // SAFETY: between fork and exec it only makes system calls.
        unsafe {
            command.pre_exec(move || {
                announce();
                if has_terminal {
                    let _ = tcsetpgrp(std::io::stdin(), Pid::this());
                }
                // What we have blocked is our own affair, SIGTTOU until now.
                SigSet::empty().thread_set_mask()?;
                Ok(())
            });
        }
        Ok((ender, first, command))
    }

    fn follow(&mut self, group: Pid, hold: &Hold, ender: &Ender, terminal: &Terminal, others: &Others) -> i32 {
        let guard = self.guard.pid();
        let mut code = None;
        let mut lost = false;
        // Asked to end from outside: so must everything be that it has started.
        let mut asked = false;
        let mut kill_left_at = None;
        let mut told = HashSet::new();
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(Event::Signal(signal)) => {
                    self.say.step(&format!("passing on {signal}"));
                    signal_all(group, others, signal);
                    if ENDING.contains(&signal) {
                        asked = true;
                        // A stopped process takes its signal only when it goes on.
                        signal_all(group, others, Signal::SIGCONT);
                    }
                }
                Ok(Event::Stopped(signal)) => follow_stop(group, signal, hold, ender, terminal),
                Ok(Event::Ended(ended)) => {
                    self.say.step(&format!("the command ended with {ended}"));
                    code = Some(ended);
                }
                _ => {}
            }
            if let Some(why) = ender.why().filter(|_| !lost) {
                lost = true;
                self.say.error(&match why {
                    Why::Lost(loss) => format!("the lock {:?} is lost: {loss}; ending the command", self.run.name),
                    Why::MaxHold => "the command ran longer than --max-hold; ending it".to_owned(),
                });
            }
            reap_orphans(group, guard);
            let Some(code) = code.filter(|_| !is_alive(group)) else { continue };
            let left = if lost || asked { left_the_group(group, others) } else { Vec::new() };
            if left.is_empty() {
                return if lost { exit::LOST } else { code };
            }
            // Some may have begun after the signal was sent.
            let kill_at = *kill_left_at.get_or_insert_with(|| Instant::now().checked_add(self.run.kill_after));
            let is_late = kill_at.is_some_and(|at| Instant::now() >= at);
            for pid in left {
                if is_late || told.insert(pid) {
                    let _ = kill(pid, if is_late { Signal::SIGKILL } else { Signal::SIGTERM });
                }
            }
        }
    }
}

/// A copy of one of our own streams. Node marks those as not to be inherited; a copy is.
fn ours(stream: impl AsFd) -> Stdio {
    stream.as_fd().try_clone_to_owned().map_or_else(|_| Stdio::inherit(), Stdio::from)
}

fn holder(queue: &[Contender]) -> Option<String> {
    let holder = queue.first()?;
    let for_ever = if holder.lease_id == 0 { " (its key has no lease: it stays until somebody deletes it)" } else { "" };
    Some(format!("{} for {}{for_ever}", label(holder), age(holder.age)))
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
    /// Our own group, if the terminal is ours to give.
    ours: Option<Pid>,
}

impl Terminal {
    fn ours() -> Terminal {
        let stdin = std::io::stdin();
        let ours = getpgrp();
        Terminal { ours: (stdin.is_terminal() && tcgetpgrp(&stdin) == Ok(ours)).then_some(ours) }
    }

    /// As shells do: the command takes it before it begins, and we give it, whoever is first.
    fn give_to(&self, group: Pid) {
        if self.ours.is_some() {
            let _ = tcsetpgrp(std::io::stdin(), group);
        }
    }

    /// Unless somebody else has it by now, as a shell has that was told to go on without us.
    fn take_back(&self, group: Pid) {
        if let Some(ours) = self.ours
            && tcgetpgrp(std::io::stdin()) == Ok(group)
        {
            let _ = tcsetpgrp(std::io::stdin(), ours);
        }
    }
}

/// The command was stopped. By Ctrl-Z: stop as well, and go on together, if the lock is still ours by then. Because it read from
/// the terminal before it had it: go on.
fn follow_stop(group: Pid, signal: Signal, hold: &Hold, ender: &Ender, terminal: &Terminal) {
    if terminal.ours.is_none() {
        return;
    }
    if signal == Signal::SIGTSTP || signal == Signal::SIGSTOP {
        ender.stopped(group, true);
        // The guard has to know before we stop.
        std::thread::sleep(Duration::from_millis(50));
        terminal.take_back(group);
        let _ = raise(Signal::SIGSTOP);
        if !hold.is_held() {
            return ender.end(group, Why::Lost(hold.loss().unwrap_or(Loss::Deadline)));
        }
        // In the background it is the shell's.
        if terminal.ours.is_some_and(|ours| tcgetpgrp(std::io::stdin()) == Ok(ours)) {
            terminal.give_to(group);
        }
        ender.stopped(group, false);
    }
    let _ = killpg(group, Signal::SIGCONT);
}
