//! The kinds of trouble, with the same numbers and names in every language.

use std::fmt;

/// What went wrong, as a small fixed set. The numbers are part of the C ABI and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The time given to the call ran out before the lock was free.
    Timeout = 1,
    /// Somebody else holds the lock (only from a call that does not wait).
    Busy = 2,
    /// The hold was lost before the call: see [`Loss`] for the reasons.
    Lost = 3,
    /// There is nothing to release: this mutex holds nothing.
    NotHeld = 4,
    /// The caller cancelled the call.
    Cancelled = 5,
    /// The target could not be reached in time.
    Unavailable = 6,
    /// The target refused the credentials or the permission.
    Denied = 7,
    /// An argument breaks a rule; the message names the value and the rule.
    Invalid = 8,
    /// The session has been closed.
    Closed = 9,
    /// The handle was made before `fork()` and belongs to the parent process.
    Forked = 10,
    /// A blocking call inside a callback could never return, so it is refused.
    Deadlock = 11,
    /// A defect in this library. Please report it.
    Internal = 12,
}

impl ErrorKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [ErrorKind; 12] = [
        ErrorKind::Timeout,
        ErrorKind::Busy,
        ErrorKind::Lost,
        ErrorKind::NotHeld,
        ErrorKind::Cancelled,
        ErrorKind::Unavailable,
        ErrorKind::Denied,
        ErrorKind::Invalid,
        ErrorKind::Closed,
        ErrorKind::Forked,
        ErrorKind::Deadlock,
        ErrorKind::Internal,
    ];

    /// The fixed number of the kind (0 is success in the C ABI and never a kind).
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// The fixed name in capitals, as the bindings use it: `TIMEOUT`, `BUSY`, …
    pub const fn name(self) -> &'static str {
        match self {
            ErrorKind::Timeout => "TIMEOUT",
            ErrorKind::Busy => "BUSY",
            ErrorKind::Lost => "LOST",
            ErrorKind::NotHeld => "NOT_HELD",
            ErrorKind::Cancelled => "CANCELLED",
            ErrorKind::Unavailable => "UNAVAILABLE",
            ErrorKind::Denied => "DENIED",
            ErrorKind::Invalid => "INVALID",
            ErrorKind::Closed => "CLOSED",
            ErrorKind::Forked => "FORKED",
            ErrorKind::Deadlock => "DEADLOCK",
            ErrorKind::Internal => "INTERNAL",
        }
    }
}

/// An error with its [`ErrorKind`] and a message that says what happened, to which name and
/// target, and what to do.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// What a `main` prints that returns it.
impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, format!("{} (a defect in etcdlock; please report it)", message.into()))
    }

    pub(crate) fn lost(name: &str, token: i64, loss: &Loss) -> Self {
        Self::new(
            ErrorKind::Lost,
            format!("the hold on {name:?} (token {token}) was lost: {loss}; another holder may be at work, so stop"),
        )
    }

    pub(crate) fn forked() -> Self {
        Self::new(
            ErrorKind::Forked,
            "this handle was made before fork() and belongs to the parent process; connect anew in the child",
        )
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "the call was cancelled; nothing is left behind")
    }

    pub(crate) fn deadlock() -> Self {
        Self::new(
            ErrorKind::Deadlock,
            "a blocking call inside a callback would wait for the thread it runs on; start it without waiting, or call from another thread",
        )
    }

    /// The kind, for `match`.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The whole message, for people.
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// Why a hold, or the lease beneath it, was lost. Once lost, always lost.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// No renewal was confirmed before the local deadline: the target was out of reach, or this
    /// process was stopped or suspended.
    Deadline,
    /// The target says that the lease is gone (expired or revoked).
    LeaseGone,
    /// The key of the hold was deleted by somebody else.
    KeyDeleted,
    /// A guarded write was refused because the hold no longer owns the lock.
    Refused,
    /// The hold was kept longer than the session's `max_hold`.
    MaxHold,
    /// The session was closed.
    Closed,
    /// The process was forked and this is the child.
    Forked,
    /// A defect in this library ended the session's work.
    Internal,
    /// What etcd answers is of another history: it was restored from a backup, came back empty, or is another cluster now.
    HistoryChanged,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Loss::Deadline => "the lease was not renewed before its deadline",
            Loss::LeaseGone => "the lease has expired or was revoked",
            Loss::KeyDeleted => "its key was deleted from outside",
            Loss::Refused => "a guarded write found that it no longer owns the lock",
            Loss::MaxHold => "it was kept longer than max_hold",
            Loss::Closed => "the session was closed",
            Loss::Forked => "the process was forked",
            Loss::Internal => "an internal error",
            Loss::HistoryChanged => "etcd's history is another now, as after a restore",
        })
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
