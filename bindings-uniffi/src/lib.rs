//! One interface over the core for the languages that UniFFI generates: the JVM's and Ruby. What locks
//! mean is in the crate `etcdlock`; what users see is in `jvm/` and `ruby/`.
//!
//! Nothing here waits. A call that takes time is a [`Call`](call::Call): it has been started, tells when
//! its result is there, and can be cancelled. Each language waits in its own way, which can be
//! interrupted: the JVM parks the thread until a listener is called, Ruby waits for a descriptor.

#![allow(missing_docs, reason = "the interface is for the two layers over it, which document theirs")]
#![allow(unreachable_pub, reason = "UniFFI exports it")]

mod call;
mod events;
mod handles;
mod quick;

use std::time::Duration;

use etcdlock::{Error, ErrorKind};

uniffi::setup_scaffolding!("etcdlock_native");

/// An error of the core: the name of its kind, the same in every language, and its message.
#[derive(Debug, thiserror::Error, uniffi::Error)]
pub enum Failure {
    #[error("{kind}: {text}")]
    Failed { kind: String, text: String },
}

impl Failure {
    fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Failure::Failed { kind: kind.name().into(), text: text.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(error.kind(), error.message())
    }
}

/// A century counts as for ever, and every clock can add it.
const FOR_EVER: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);

/// Seconds as a duration.
fn seconds(what: &str, seconds: f64) -> Result<Duration, Failure> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(Failure::new(ErrorKind::Invalid, format!("{what} {seconds} s is not a time: give 0 or more")));
    }
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(FOR_EVER).min(FOR_EVER))
}

/// The kinds of errors, in the order of their numbers, which begin with 1.
#[uniffi::export]
fn error_kinds() -> Vec<String> {
    ErrorKind::ALL.iter().map(|kind| kind.name().into()).collect()
}

#[uniffi::export]
fn version() -> String {
    etcdlock::VERSION.into()
}

/// The error for a thread of the library's own that would wait for itself.
#[uniffi::export]
fn check_may_block() -> Result<(), Failure> {
    Ok(etcdlock::check_may_block()?)
}

/// Closes every session of the process, for its end.
#[uniffi::export]
fn shutdown(limit: f64) -> Result<bool, Failure> {
    Ok(etcdlock::shutdown(seconds("the limit", limit)?))
}
