//! The same API for plain threads: every call waits.
//!
//! ```
//! use etcdlock::{Options, blocking::Session};
//! let session = Session::connect("memory:", Options::default())?;
//! let hold = session.mutex("/orders/42")?.lock()?;
//! println!("token {}", hold.token());
//! hold.unlock()?;
//! # Ok::<(), etcdlock::Error>(())
//! ```
//!
//! Inside one of this library's callbacks every call here returns
//! [`Deadlock`](crate::ErrorKind::Deadlock) instead of blocking the thread that callbacks run on.

use std::ops::Deref;
use std::time::Duration;

use crate::error::Result;
use crate::inspect::{Contender, Queue};
use crate::options::{Options, Target};
use crate::stats::Stats;

/// See [`crate::Session`].
#[derive(Clone, Debug)]
pub struct Session(crate::Session);

/// See [`crate::Mutex`]; it derefs to it for all that does not wait.
#[derive(Clone, Debug)]
pub struct Mutex(crate::Mutex);

/// See [`crate::Hold`]; it derefs to it for all that does not wait.
#[derive(Debug)]
#[must_use = "the lock is released when the hold is dropped"]
pub struct Hold(crate::Hold);

impl Session {
    /// See [`crate::Session::connect`].
    pub fn connect(target: impl Into<Target>, options: Options) -> Result<Session> {
        crate::Session::connect(target, options).wait().map(Session)
    }

    /// See [`crate::Session::mutex`].
    pub fn mutex(&self, name: &str) -> Result<Mutex> {
        self.0.mutex(name).map(Mutex)
    }

    /// See [`crate::Session::inspect`].
    pub fn inspect(&self, name: &str) -> Result<Vec<Contender>> {
        self.0.inspect(name).wait()
    }

    /// See [`crate::Session::list`].
    pub fn list(&self, prefix: &str) -> Result<Vec<Queue>> {
        self.0.list(prefix).wait()
    }

    /// See [`crate::Session::stats`].
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// See [`crate::Session::close`].
    pub fn close(&self, limit: Duration) -> Result<()> {
        self.0.close(limit).wait()
    }

    /// The same session, for `await`.
    pub fn as_async(&self) -> &crate::Session {
        &self.0
    }
}

impl Mutex {
    /// See [`crate::Mutex::lock`].
    pub fn lock(&self) -> Result<Hold> {
        self.0.lock().wait().map(Hold)
    }

    /// See [`crate::Mutex::lock_timeout`].
    pub fn lock_timeout(&self, limit: Duration) -> Result<Hold> {
        self.0.lock_timeout(limit).wait().map(Hold)
    }

    /// See [`crate::Mutex::try_lock`].
    pub fn try_lock(&self) -> Result<Option<Hold>> {
        Ok(self.0.try_lock().wait()?.map(Hold))
    }

    /// See [`crate::Mutex::unlock`].
    pub fn unlock(&self) -> Result<()> {
        self.0.unlock().wait()
    }

    /// The same mutex, for `await`.
    pub fn as_async(&self) -> &crate::Mutex {
        &self.0
    }
}

impl Hold {
    /// See [`crate::Hold::unlock`].
    pub fn unlock(self) -> Result<()> {
        self.0.unlock().wait()
    }

    /// See [`crate::Hold::put`].
    pub fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<()> {
        self.0.put(key, value).wait()
    }

    /// See [`crate::Hold::get`].
    pub fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>> {
        self.0.get(key).wait()
    }

    /// See [`crate::Hold::delete`].
    pub fn delete(&self, key: impl AsRef<[u8]>) -> Result<()> {
        self.0.delete(key).wait()
    }
}

impl Deref for Mutex {
    type Target = crate::Mutex;

    fn deref(&self) -> &crate::Mutex {
        &self.0
    }
}

impl Deref for Hold {
    type Target = crate::Hold;

    fn deref(&self) -> &crate::Hold {
        &self.0
    }
}
