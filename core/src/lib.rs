//! A distributed mutex on etcd: leases that renew themselves, fencing tokens, one round trip.
//!
//! ```
//! use etcdlock::{Options, Session};
//!
//! # async fn f() -> etcdlock::Result<()> {
//! let session = Session::connect("memory:", Options::default()).await?; // or "127.0.0.1:2379"
//! let mutex = session.mutex("/orders/42")?;
//! let hold = mutex.lock().await?;
//! println!("held, token {}", hold.token());
//! hold.put("/orders/42/state", "paid").await?; // applied only while the lock is ours
//! hold.unlock().await?;
//! # Ok(()) }
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(f()).unwrap();
//! ```
//!
//! * A [`Session`] is a target and one lease, renewed by a thread of this library until closed.
//! * A [`Mutex`] is one name. Two mutexes of one name exclude each other everywhere.
//! * A [`Hold`] is one acquisition. It has a fencing token, a local deadline, and it can be lost.
//! * A call returns a [`Pending`]: `.await` it, `.wait()` for it, be called back, or drop it to
//!   cancel. [`blocking`] has the twins that simply wait. It works with any executor or none.
//!
//! A lock cannot stop a paused process from writing when it wakes up. Let the resource refuse old
//! [`Hold::token`]s, or write through [`Hold::put`], which etcd applies only while the lock is ours.

mod announced;
mod backoff;
pub mod blocking;
mod clock;
mod driver;
mod error;
mod hold;
mod inspect;
mod lease;
mod log;
#[cfg(test)]
#[path = "../../tests/model/mod.rs"]
mod model;
mod mutex;
mod options;
mod pending;
mod proto;
mod runtime;
mod sabotage;
mod service;
mod session;
#[cfg(test)]
mod simulation;
mod stats;
mod store;
mod watching;

pub use error::{Error, ErrorKind, Loss, Result};
pub use hold::Hold;
pub use inspect::{Contender, Queue};
#[doc(hidden)]
pub use log::{log_to, set_log_level};
pub use mutex::Mutex;
pub use options::{DEFAULT_CONNECT_TIMEOUT, DEFAULT_REQUEST_TIMEOUT, DEFAULT_TARGET, DEFAULT_TTL, Options, Target};
pub use pending::{Canceller, Pending};
#[doc(hidden)]
pub use runtime::{check_may_block, note_process_id, on_notify_thread};
pub use session::{Session, shutdown};
pub use stats::Stats;

/// The version of this library.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
