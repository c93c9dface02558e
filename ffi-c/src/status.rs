//! Statuses, the last error of each thread, and the wall that no panic passes.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use etcdlock::{Error, ErrorKind, Loss};

/// Success. Every other status is one of the numbers below; they never change.
pub const ETCDLOCK_OK: i32 = 0;
/// The time given to the call ran out before the lock was free.
pub const ETCDLOCK_TIMEOUT: i32 = 1;
/// Somebody else holds the lock (only from a call that does not wait).
pub const ETCDLOCK_BUSY: i32 = 2;
/// The hold was lost before the call.
pub const ETCDLOCK_LOST: i32 = 3;
/// This mutex holds nothing.
pub const ETCDLOCK_NOT_HELD: i32 = 4;
/// The call was cancelled.
pub const ETCDLOCK_CANCELLED: i32 = 5;
/// etcd could not be reached in time.
pub const ETCDLOCK_UNAVAILABLE: i32 = 6;
/// etcd refused the credentials or the permission.
pub const ETCDLOCK_DENIED: i32 = 7;
/// An argument breaks a rule, or a handle is NULL, freed, or of another kind.
pub const ETCDLOCK_INVALID: i32 = 8;
/// The session has been closed.
pub const ETCDLOCK_CLOSED: i32 = 9;
/// The handle was made before fork() and belongs to the parent process.
pub const ETCDLOCK_FORKED: i32 = 10;
/// A blocking call inside a callback could never return, so it is refused.
pub const ETCDLOCK_DEADLOCK: i32 = 11;
/// A defect in the library. Please report it.
pub const ETCDLOCK_INTERNAL: i32 = 12;

/// Why a hold was lost: nothing is lost.
pub const ETCDLOCK_LOSS_NONE: i32 = 0;
/// The lease was not renewed before its deadline: etcd was out of reach, or this process was stopped.
pub const ETCDLOCK_LOSS_DEADLINE: i32 = 1;
/// The lease has expired or was revoked in etcd.
pub const ETCDLOCK_LOSS_LEASE_GONE: i32 = 2;
/// The key of the hold was deleted by somebody else.
pub const ETCDLOCK_LOSS_KEY_DELETED: i32 = 3;
/// A guarded write found that the hold no longer owns the lock.
pub const ETCDLOCK_LOSS_REFUSED: i32 = 4;
/// The hold was kept longer than the session's max_hold.
pub const ETCDLOCK_LOSS_MAX_HOLD: i32 = 5;
/// The session was closed.
pub const ETCDLOCK_LOSS_CLOSED: i32 = 6;
/// The process was forked and this is the child.
pub const ETCDLOCK_LOSS_FORKED: i32 = 7;
/// A defect in the library ended the session's work.
pub const ETCDLOCK_LOSS_INTERNAL: i32 = 8;
/// What etcd answers is of another history: it was restored from a backup, came back empty, or is another cluster now.
pub const ETCDLOCK_LOSS_HISTORY_CHANGED: i32 = 9;

pub(crate) fn status_name(status: i32) -> &'static CStr {
    match status {
        ETCDLOCK_OK => c"OK",
        ETCDLOCK_TIMEOUT => c"TIMEOUT",
        ETCDLOCK_BUSY => c"BUSY",
        ETCDLOCK_LOST => c"LOST",
        ETCDLOCK_NOT_HELD => c"NOT_HELD",
        ETCDLOCK_CANCELLED => c"CANCELLED",
        ETCDLOCK_UNAVAILABLE => c"UNAVAILABLE",
        ETCDLOCK_DENIED => c"DENIED",
        ETCDLOCK_INVALID => c"INVALID",
        ETCDLOCK_CLOSED => c"CLOSED",
        ETCDLOCK_FORKED => c"FORKED",
        ETCDLOCK_DEADLOCK => c"DEADLOCK",
        ETCDLOCK_INTERNAL => c"INTERNAL",
        _ => c"UNKNOWN",
    }
}

pub(crate) fn loss_code(loss: &Loss) -> i32 {
    match loss {
        Loss::Deadline => ETCDLOCK_LOSS_DEADLINE,
        Loss::LeaseGone => ETCDLOCK_LOSS_LEASE_GONE,
        Loss::KeyDeleted => ETCDLOCK_LOSS_KEY_DELETED,
        Loss::Refused => ETCDLOCK_LOSS_REFUSED,
        Loss::MaxHold => ETCDLOCK_LOSS_MAX_HOLD,
        Loss::Closed => ETCDLOCK_LOSS_CLOSED,
        Loss::Forked => ETCDLOCK_LOSS_FORKED,
        Loss::HistoryChanged => ETCDLOCK_LOSS_HISTORY_CHANGED,
        _ => ETCDLOCK_LOSS_INTERNAL,
    }
}

/// What a function of the ABI fails with.
pub(crate) struct Failure {
    pub(crate) status: i32,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Failure { status: kind.code(), message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.message())
    }
}

pub(crate) type Outcome<T> = Result<T, Failure>;

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
}

pub(crate) fn remember(message: &str) {
    // A thread that is ending has no place for it any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(Some(c_string(message))));
}

/// Valid until the next failure on this thread.
pub(crate) fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ref().map_or(c"".as_ptr(), |message| message.as_ptr())).unwrap_or(c"".as_ptr())
}

/// Text for C, which ends at a NUL.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

/// Runs the body of a function that returns a status.
pub(crate) fn status(call: impl FnOnce() -> Outcome<()>) -> i32 {
    match run(call) {
        Ok(()) => ETCDLOCK_OK,
        Err(status) => status,
    }
}

/// Runs the body of a function that returns a value, with one that stands for failure.
pub(crate) fn value<T>(on_failure: T, call: impl FnOnce() -> Outcome<T>) -> T {
    run(call).unwrap_or(on_failure)
}

fn run<T>(call: impl FnOnce() -> Outcome<T>) -> Result<T, i32> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(failure)) => {
            remember(&failure.message);
            Err(failure.status)
        }
        Err(panic) => {
            remember(&format!("a panic inside etcdlock: {} (a defect; please report it)", text_of(&*panic)));
            // Dropping what somebody panicked with could panic again.
            std::mem::forget(panic);
            Err(ETCDLOCK_INTERNAL)
        }
    }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_and_names_are_those_of_every_language() {
        let ours = [
            ETCDLOCK_TIMEOUT,
            ETCDLOCK_BUSY,
            ETCDLOCK_LOST,
            ETCDLOCK_NOT_HELD,
            ETCDLOCK_CANCELLED,
            ETCDLOCK_UNAVAILABLE,
            ETCDLOCK_DENIED,
            ETCDLOCK_INVALID,
            ETCDLOCK_CLOSED,
            ETCDLOCK_FORKED,
            ETCDLOCK_DEADLOCK,
            ETCDLOCK_INTERNAL,
        ];
        assert_eq!(ErrorKind::ALL.map(ErrorKind::code), ours);
        for kind in ErrorKind::ALL {
            assert_eq!(status_name(kind.code()).to_str(), Ok(kind.name()));
        }
        assert_eq!(status_name(99), c"UNKNOWN");
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_text() {
        assert_eq!(status(|| panic!("on purpose")), ETCDLOCK_INTERNAL);
        // SAFETY: the pointer is valid until the next failure on this thread.
        let message = unsafe { CStr::from_ptr(last_error()) }.to_str().expect("UTF-8");
        assert!(message.contains("on purpose"), "{message}");
        assert_eq!(value(7, || panic!("{} on purpose", "again")), 7);
    }
}
