//! A second process that ends the command when we cannot: when we were killed, and when we do not run any more at the moment at
//! which the lock runs out (stopped, or starved of processor).
//!
//! It is a fork from before there was anything: it needs no shell and nothing of the PATH, and holds no connection. It is
//! called off only by us, when all is well; the end of the pipe is our end.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, kill, killpg, signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setpgid};

use crate::run::PASSED_ON;

/// A word and two numbers: small enough to go in one piece.
type Message = [u8; 17];

#[derive(Clone, Copy)]
#[repr(u8)]
enum Word {
    /// The group to end.
    Group = b'g',
    /// In so many milliseconds the lock runs out; in so many more another may have it.
    Until = b'u',
    /// The group is stopped, with us: it must not go on when the time is up.
    Stopped = b's',
}

fn message(word: Word, a: i64, b: i64) -> Message {
    let mut message = [word as u8; 17];
    message[1..9].copy_from_slice(&a.to_ne_bytes());
    message[9..].copy_from_slice(&b.to_ne_bytes());
    message
}

pub(crate) struct Guard {
    pipe: UnixStream,
    pid: Pid,
    is_off: AtomicBool,
}

impl Guard {
    pub(crate) fn start(kill_after: Duration) -> std::io::Result<Guard> {
        let (ours, its) = UnixStream::pair()?;
        // SAFETY: the child calls nothing but what is safe after a fork of a process with threads: system calls, on the stack.
        match unsafe { fork() }? {
            ForkResult::Child => {
                drop(ours);
                watch(&its, kill_after)
            }
            ForkResult::Parent { child } => {
                // It may not have come to that yet, and Ctrl-C is not meant for it.
                let _ = setpgid(child, child);
                // A guard that does not read must not hold us up.
                ours.set_nonblocking(true)?;
                Ok(Guard { pipe: ours, pid: child, is_off: AtomicBool::new(false) })
            }
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// For the command's process to say itself whom to end, before it becomes the command.
    pub(crate) fn announcer(&self) -> std::io::Result<impl Fn() + Send + Sync + 'static> {
        let pipe = self.pipe.try_clone()?;
        Ok(move || drop((&pipe).write(&message(Word::Group, i64::from(Pid::this().as_raw()), 0))))
    }

    /// The lock runs out after `left`, and another may have it after `margin` more.
    pub(crate) fn until(&self, left: Duration, margin: Duration) {
        let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let _ = (&self.pipe).write(&message(Word::Until, millis(left), millis(margin)));
    }

    pub(crate) fn stopped(&self) {
        let _ = (&self.pipe).write(&message(Word::Stopped, 0, 0));
    }

    /// The command has ended, or never began. Without this call the guard ends whatever there is. No word is said to it: one that
    /// somebody has stopped would have to be waited for.
    pub(crate) fn all_is_well(&self) {
        // Its number may be another's once it has been waited for.
        if !self.is_off.swap(true, Ordering::Relaxed) {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// The guard's whole life. Nothing here allocates.
fn watch(pipe: &UnixStream, kill_after: Duration) -> ! {
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    // What is meant for etcdlock may be sent to all processes of that name.
    for ignored in PASSED_ON.into_iter().chain([Signal::SIGTSTP, Signal::SIGTTOU, Signal::SIGALRM]) {
        // SAFETY: to ignore a signal runs no handler.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let mut group = None;
    let mut until: Option<(Instant, Duration)> = None;
    let mut stopped = false;
    loop {
        // A read limit of zero would be none.
        let left = until.map(|(at, _)| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        let _ = pipe.set_read_timeout(left);
        let mut message = [0; 17];
        let is_over = match (&*pipe).read(&mut message) {
            Ok(17) => {
                let number = |at: usize| i64::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| message[at + byte]));
                let millis = |at| Duration::from_millis(number(at).max(0).unsigned_abs());
                match message[0] {
                    b'g' => group = i32::try_from(number(1)).ok().filter(|group| *group > 1).map(Pid::from_raw),
                    b'u' => {
                        until = Instant::now().checked_add(millis(1)).map(|at| (at, millis(9)));
                        stopped = false;
                    }
                    b's' => stopped = true,
                    _ => {}
                }
                false
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut) => false,
            _ => true,
        };
        let is_late = until.is_some_and(|(at, _)| Instant::now() >= at);
        if !is_over && (!is_late || group.is_none()) {
            continue;
        }
        let Some(group) = group else { exit() };
        let (at, margin) = until.unwrap_or((Instant::now(), Duration::ZERO));
        // Its last moments must be over before another may have the lock.
        let grace =
            if stopped { Duration::ZERO } else { kill_after.min(at.saturating_duration_since(Instant::now()) / 2 + margin) };
        end(group, grace);
        exit();
    }
}

fn end(group: Pid, grace: Duration) {
    if !grace.is_zero() {
        let _ = killpg(group, Signal::SIGTERM);
        // A stopped process takes its signal only when it goes on.
        let _ = killpg(group, Signal::SIGCONT);
        let begun = Instant::now();
        while begun.elapsed() < grace {
            if killpg(group, None) == Err(Errno::ESRCH) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let _ = killpg(group, Signal::SIGKILL);
}

fn exit() -> ! {
    // SAFETY: it ends the process at once, without running what the fork has inherited.
    unsafe { nix::libc::_exit(0) }
}
