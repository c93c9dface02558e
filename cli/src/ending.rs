//! Ends the command: a thread that does nothing else and is there before the command is. When the lock is lost nothing stands
//! between that and the signal: no message, no wait, no other work.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use etcdlock::{Hold, Loss};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::guard::Guard;

/// Why the command is ended.
#[derive(Clone, Debug)]
pub(crate) enum Why {
    Lost(Loss),
    MaxHold,
}

enum Order {
    Began(Pid),
    End(Why),
    Stopped(bool),
    Done,
}

pub(crate) struct Ender {
    orders: Sender<Order>,
    why: Arc<OnceLock<Why>>,
}

/// How long it may take.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) kill_after: Duration,
    pub(crate) max_hold: Option<Duration>,
}

impl Ender {
    pub(crate) fn start(
        hold: Arc<Hold>,
        ttl: Duration,
        limits: Limits,
        guard: Arc<Guard>,
        others: Arc<Others>,
    ) -> std::io::Result<Ender> {
        let (orders, inbox) = channel();
        let why = Arc::new(OnceLock::new());
        let to_lose = orders.clone();
        let watched = hold.clone();
        std::thread::Builder::new().name("etcdlock-end".into()).spawn({
            let why = why.clone();
            move || Ending { hold, ttl, limits, guard, others, group: None, stopped: false, why, kill_at: None }.go(&inbox)
        })?;
        watched.on_lost(move |loss| drop(to_lose.send(Order::End(Why::Lost(loss)))));
        Ok(Ender { orders, why })
    }

    /// Why the command is being ended, if it is; known before it gets its signal.
    pub(crate) fn why(&self) -> Option<&Why> {
        self.why.get()
    }

    /// The command runs, as the first of this group.
    pub(crate) fn began(&self, group: Pid) {
        self.order(group, Order::Began(group));
    }

    pub(crate) fn end(&self, group: Pid, why: Why) {
        self.order(group, Order::End(why));
    }

    /// The command is stopped, or goes on.
    pub(crate) fn stopped(&self, group: Pid, is_stopped: bool) {
        self.order(group, Order::Stopped(is_stopped));
    }

    pub(crate) fn done(&self) {
        let _ = self.orders.send(Order::Done);
    }

    fn order(&self, group: Pid, order: Order) {
        if self.orders.send(order).is_err() {
            // Whoever was to end it is gone, so nothing goes on.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

struct Ending {
    hold: Arc<Hold>,
    ttl: Duration,
    limits: Limits,
    guard: Arc<Guard>,
    others: Arc<Others>,
    group: Option<Pid>,
    stopped: bool,
    why: Arc<OnceLock<Why>>,
    kill_at: Option<Instant>,
}

impl Ending {
    fn go(mut self, inbox: &Receiver<Order>) {
        let beat = (self.ttl / 20).clamp(Duration::from_millis(20), Duration::from_millis(500));
        let mut max_at = None;
        loop {
            let now = Instant::now();
            let next = [self.kill_at, max_at].into_iter().flatten().min();
            // The end of the lock too: nobody has to tell of it.
            let left = if self.why.get().is_none() { self.hold.remaining().max(Duration::from_millis(1)) } else { beat };
            let wait = next.map_or(beat, |at| at.saturating_duration_since(now).min(beat)).min(left);
            match inbox.recv_timeout(wait) {
                Ok(Order::Began(group)) => {
                    self.group = Some(group);
                    max_at = self.limits.max_hold.and_then(|limit| Instant::now().checked_add(limit));
                    if self.why.get().is_some() {
                        self.end();
                    }
                }
                // The first reason counts.
                Ok(Order::End(why)) => {
                    if self.why.set(why).is_ok() {
                        self.end();
                    }
                }
                Ok(Order::Stopped(is_stopped)) => {
                    self.stopped = is_stopped;
                    if is_stopped {
                        self.guard.stopped();
                    }
                }
                Ok(Order::Done) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            if max_at.is_some_and(|at| now >= at) {
                max_at = None;
                if self.why.set(Why::MaxHold).is_ok() {
                    self.end();
                }
            }
            let loss = || self.hold.loss().unwrap_or(Loss::Deadline);
            if self.group.is_some() && !self.hold.is_held() && self.why.set(Why::Lost(loss())).is_ok() {
                self.end();
            }
            if self.kill_at.is_some_and(|at| now >= at) {
                self.kill_at = None;
                if let Some(group) = self.group {
                    signal_all(group, &self.others, Signal::SIGKILL);
                }
            }
            if self.group.is_some() && !self.stopped {
                // Once it is lost the end is our own business, for as long as we are there.
                let is_lost = matches!(self.why.get(), Some(Why::Lost(_)));
                let left = if is_lost { self.limits.kill_after.saturating_add(self.ttl) } else { self.hold.remaining() };
                // Renewals are confirmed by a tenth of the TTL before etcd gives the lock away; a quarter of that is ours, half of it
                // is for the end.
                self.guard.until(left + self.ttl / 40, self.ttl / 20);
            }
        }
    }

    fn end(&mut self) {
        let Some(group) = self.group else { return };
        if self.stopped && !matches!(self.why.get(), Some(Why::MaxHold)) {
            // It would go on to take a milder signal, and the lock may be another's by now.
            return signal_all(group, &self.others, Signal::SIGKILL);
        }
        signal_all(group, &self.others, Signal::SIGTERM);
        // A stopped process takes its signal only when it goes on.
        signal_all(group, &self.others, Signal::SIGCONT);
        self.kill_at = Instant::now().checked_add(self.limits.kill_after);
    }
}

/// Signals the group, and what the command has started that has left it.
pub(crate) fn signal_all(group: Pid, others: &Others, signal: Signal) {
    let _ = killpg(group, signal);
    for pid in left_the_group(group, others) {
        let _ = kill(pid, signal);
    }
}

/// Whether anything of the group still runs. What has ended and nobody has waited for is gone.
pub(crate) fn is_alive(group: Pid) -> bool {
    if killpg(group, None) == Err(Errno::ESRCH) {
        return false;
    }
    let processes = processes();
    processes.is_empty() || processes.iter().any(|process| process.group == group.as_raw() && !process.has_ended)
}

/// What the command has started and is in no group of ours any more: under `timeout`, `setsid`, a shell with job control. Orphans
/// are our children, because we are their subreaper.
pub(crate) fn left_the_group(group: Pid, others: &Others) -> Vec<Pid> {
    let processes = processes();
    let us = Pid::this().as_raw();
    let is_ours = |process: &Process| {
        let mut at = process.parent;
        // No line of parents is longer than there are processes.
        for _ in 0..processes.len() {
            if at == us {
                return true;
            }
            match processes.iter().find(|other| other.pid == at) {
                Some(parent) if !others.0.contains(&parent.pid) => at = parent.parent,
                _ => return false,
            }
        }
        false
    };
    let has_left = |process: &&Process| !process.has_ended && process.group != group.as_raw() && !others.0.contains(&process.pid);
    let left = processes.iter().filter(has_left).filter(|process| is_ours(process));
    left.map(|process| Pid::from_raw(process.pid)).collect()
}

/// Those below us that are not the command's: the guard, and what was there before, as from a script that became us by `exec`.
pub(crate) struct Others(HashSet<i32>);

impl Others {
    /// Before the command is started.
    pub(crate) fn now(guard: Pid) -> Others {
        let nobody = Others(HashSet::from([guard.as_raw()]));
        let below = left_the_group(Pid::from_raw(0), &nobody);
        Others(below.into_iter().map(Pid::as_raw).chain([guard.as_raw()]).collect())
    }
}

/// Takes leave of orphans that have ended and became our children, so that they are no zombies. The command's first process
/// and the guard have somebody who waits for them.
pub(crate) fn reap_orphans(first: Pid, guard: Pid) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, flags) {
        let Some(pid) = status.pid().filter(|pid| *pid != first && *pid != guard) else { return };
        if !matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {
            return;
        }
    }
}

struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    /// A zombie: nobody has waited for it.
    has_ended: bool,
}

/// All there are; none where there is no /proc.
fn processes() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let read = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // A name is cut anywhere, in a letter too.
        let stat = std::fs::read(entry.path().join("stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // After the name, which may have anything in it: state, parent, group.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let (parent, group) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        // One whose first thread has ended looks like a zombie, and others may be at work.
        let threads: u32 = fields.nth(14)?.parse().ok()?;
        Some(Process { pid, parent, group, has_ended: state.starts_with(['Z', 'X']) && threads < 2 })
    };
    let all: Vec<Process> = entries.flatten().filter_map(read).collect();
    // Of another process namespace, it tells of others.
    if all.iter().any(|process| process.pid == Pid::this().as_raw()) { all } else { Vec::new() }
}
