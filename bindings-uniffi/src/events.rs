//! What the library has to say without being asked: log lines, and the loss of holds. They lie in an
//! inbox with a bell, and one thread of the language takes them out, so that code of the user's may be
//! as slow as it likes.

use std::collections::VecDeque;
use std::io::Read as _;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};

use etcdlock::{Error, Hold};

use crate::Failure;
use crate::call::Bell;

/// Log lines that wait to be taken; later ones are dropped.
const MOST_LINES: usize = 1024;

#[derive(uniffi::Enum)]
pub enum Event {
    /// The hold that was given this number is lost.
    Lost { id: u64, kind: String, text: String },
    /// 1 error, 2 warning, 3 information, 4 debug, 5 trace.
    Line { level: u8, target: String, text: String },
}

struct Inbox {
    bell: Arc<Bell>,
    events: Mutex<VecDeque<Event>>,
}

/// Never freed, and another one in a forked child: its parent's may have been locked at that moment.
static INBOX: AtomicPtr<Inbox> = AtomicPtr::new(null_mut());

extern "C" fn in_child() {
    etcdlock::note_process_id();
    INBOX.store(null_mut(), Ordering::Release);
}

fn inbox() -> Option<&'static Inbox> {
    // SAFETY: null, or from a box that is never freed.
    unsafe { INBOX.load(Ordering::Acquire).as_ref() }
}

impl Inbox {
    fn push(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(event, Event::Line { .. }) && events.len() >= MOST_LINES {
            return;
        }
        events.push_back(event);
        if events.len() == 1 {
            self.bell.ring();
        }
    }

    fn take(&self) -> Vec<Event> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if !events.is_empty() {
            // There is a byte for a box that is not empty, so this does not block.
            let _ = self.bell.reader().read(&mut [0]);
        }
        events.drain(..).collect()
    }
}

/// Opens the inbox of this process and returns its bell. Once in a process, and once in a forked child.
#[uniffi::export]
fn open_inbox() -> Result<Arc<Bell>, Failure> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler stores three atomics and asks for the process id, which is allowed after a
        // fork, and this library is never unloaded.
        if unsafe { libc::pthread_atfork(None, None, Some(in_child)) } == 0 {
            etcdlock::note_process_id();
        }
    });
    let bell = Arc::new(Bell::new()?);
    let new = Box::new(Inbox { bell: bell.clone(), events: Mutex::default() });
    INBOX.store(Box::into_raw(new), Ordering::Release);
    Ok(bell)
}

/// Takes what is in the inbox.
#[uniffi::export]
fn take_events() -> Vec<Event> {
    inbox().map_or_else(Vec::new, Inbox::take)
}

/// Waits natively until there is something in the inbox, and takes it.
#[uniffi::export]
fn wait_for_events() -> Vec<Event> {
    let Some(inbox) = inbox() else { return Vec::new() };
    let mut ready = libc::pollfd { fd: inbox.bell.descriptor(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one descriptor, of a pipe that is never closed. A signal ends it early, which does no harm.
    unsafe { libc::poll(&mut ready, 1, -1) };
    inbox.take()
}

/// Has log lines of at most this level put into the inbox; 0: none.
#[uniffi::export]
fn set_log_level(level: u8) -> Result<(), Failure> {
    // Only where lines are wanted, and only when the level changes: a forked child keeps its parent's.
    static LEVEL: OnceLock<Mutex<u8>> = OnceLock::new();
    let mut known = LEVEL.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if *known != level {
        etcdlock::log_to(level, |level, target, text| {
            if let Some(inbox) = inbox() {
                inbox.push(Event::Line { level, target: target.to_owned(), text: text.to_owned() });
            }
        })?;
        *known = level;
    }
    Ok(())
}

/// Has the loss of a hold put into the inbox under this number.
pub(crate) fn report_loss(hold: &Hold, id: u64) {
    hold.on_lost_error(move |error: Error| {
        if let Some(inbox) = inbox() {
            inbox.push(Event::Lost { id, kind: error.kind().name().into(), text: error.message().into() });
        }
    });
}
