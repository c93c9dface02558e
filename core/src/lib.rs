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

// The floors of this house: each uses those below it, and none above (tests/floors.rs).

// What users see.
pub mod blocking;

mod inspect;
mod mutex;

mod hold;
mod session;

// One process: its sessions, its services, their queues.
mod process;

mod service;

// A queue at work.
mod driver;

mod grant;

// A lease kept, and what is made under it.
mod keeper;

mod cluster;
mod watching;

// The protocol, without clocks and I/O.
mod proto;

mod lease;
mod owner;

// Stores.
mod store;

// The ground.
mod announced;
mod backoff;
mod log;
mod pending;

mod runtime;

mod options;
mod stats;

mod clock;
mod error;
mod sabotage;

#[cfg(test)]
#[path = "../../tests/model/mod.rs"]
mod model;
#[cfg(test)]
#[path = "../../tests/simulation/mod.rs"]
mod simulation;

pub use error::{Error, ErrorKind, Loss, Result};
pub use hold::Hold;
pub use inspect::{Contender, Queue};
#[doc(hidden)]
pub use log::{log_to, set_log_level};
pub use mutex::Mutex;
pub use options::{DEFAULT_CONNECT_TIMEOUT, DEFAULT_REQUEST_TIMEOUT, DEFAULT_TARGET, DEFAULT_TTL, Options, Target};
pub use pending::{Canceller, Pending};
pub use process::shutdown;
#[doc(hidden)]
pub use runtime::{check_may_block, note_process_id, on_notify_thread};
pub use session::Session;
pub use stats::Stats;

/// The version of this library.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
