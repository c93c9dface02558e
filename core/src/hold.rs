//! One successful acquisition, from lock to unlock or loss.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, Loss, Result};
use crate::grant::{Grant, HoldCore};
use crate::options::DEFAULT_REQUEST_TIMEOUT;
use crate::pending::Pending;
use crate::store::{Guarded, GuardedAnswer, Trouble};

/// Of a key or a value that is written. etcd itself takes 1.5 MB in a request unless told otherwise.
const LARGEST_WRITE: usize = 32 * 1024 * 1024;

impl HoldCore {
    /// Marks the hold released and has its key deleted.
    pub(crate) fn unlock(self: &Arc<Self>) -> Pending<()> {
        let env = &self.session.cluster.env;
        if let Err(error) = env.check_fork() {
            return Pending::ready(Err(error));
        }
        let loss = self.loss();
        if let Some(loss) = &loss {
            // Maybe nobody has noticed yet; it is told like any other.
            self.lose(loss.clone());
        }
        if self.released.swap(true, Ordering::AcqRel) {
            return Pending::ready(Err(self.not_held()));
        }
        let (reply, confirmed) = oneshot::channel();
        // Sent here and now: cancelling the wait must not keep the lock.
        self.release(Some(reply));
        if let Some(loss) = loss {
            return Pending::ready(Err(self.lost_error(&loss)));
        }
        let hold = self.clone();
        Pending::start(env, async move {
            match tokio::time::timeout(DEFAULT_REQUEST_TIMEOUT, confirmed).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => match hold.loss() {
                    Some(loss) => Err(hold.lost_error(&loss)),
                    None => Err(hold.lost_error(&Loss::Internal)),
                },
                Err(_) => Err(Error::new(
                    ErrorKind::Unavailable,
                    format!(
                        "the lock {:?} is released here, but {} has not confirmed it within {DEFAULT_REQUEST_TIMEOUT:?}{}; \
                         its key is being deleted in the background and goes with the lease at the latest",
                        hold.name(),
                        hold.session.cluster.address,
                        hold.session.cluster.because_of_trouble()
                    ),
                )),
            }
        })
    }

    fn guarded<T: Send + 'static>(self: &Arc<Self>, what: Guarded, answer: fn(Option<Vec<u8>>) -> T) -> Pending<T> {
        if let Err(error) = self.check().and_then(|()| self.check_key(&what)) {
            return Pending::ready(Err(error));
        }
        let hold = self.clone();
        Pending::start(&self.session.cluster.env, async move {
            match tokio::time::timeout(DEFAULT_REQUEST_TIMEOUT, hold.send_guarded(&what)).await {
                Ok(result) => result.map(answer),
                Err(_) => Err(Error::new(
                    ErrorKind::Unavailable,
                    format!(
                        "the guarded request of {:?} has no answer from {} within {DEFAULT_REQUEST_TIMEOUT:?}{}; it may or may not \
                         have been applied",
                        hold.name(),
                        hold.session.cluster.address,
                        hold.session.cluster.because_of_trouble()
                    ),
                )),
            }
        })
    }

    async fn send_guarded(&self, what: &Guarded) -> Result<Option<Vec<u8>>> {
        let cluster = &self.session.cluster;
        let mut retry = Backoff::new();
        let mut unanswered = false;
        loop {
            match cluster.store.guarded(&self.ticket, self.token(), what).await {
                Ok(GuardedAnswer::Applied(value)) => return Ok(value),
                Ok(GuardedAnswer::NotOwner) => {
                    self.lose(Loss::Refused);
                    let error = self.lost_error(&Loss::Refused);
                    let doubt = if unanswered {
                        " (an earlier copy of the request went unanswered and may have been applied)"
                    } else {
                        ""
                    };
                    return Err(Error::new(ErrorKind::Lost, format!("{error}{doubt}")));
                }
                Err(Trouble::Denied(why)) => {
                    let text = format!("the guarded request of {:?} is not allowed: {why}", self.name());
                    return Err(Error::new(ErrorKind::Denied, text));
                }
                Err(Trouble::Refused(why)) => {
                    let text = format!("the guarded request of {:?} was refused: {why}", self.name());
                    return Err(Error::new(ErrorKind::Unavailable, text));
                }
                Err(trouble) => {
                    unanswered = true;
                    cluster.note_trouble(Some(trouble.to_string()));
                    // Sending it again after the lock may have passed on is safe: it is guarded.
                    self.check()?;
                    retry.pause().await;
                }
            }
        }
    }

    fn check_key(&self, what: &Guarded) -> Result<()> {
        let (Guarded::Put { key, .. } | Guarded::Get { key } | Guarded::Delete { key }) = what;
        if key.is_empty() {
            return Err(Error::invalid("the key \"\" of a guarded request is empty: give it at least one byte"));
        }
        if key == self.ticket.key.as_bytes() && !matches!(what, Guarded::Get { .. }) {
            return Err(Error::invalid(format!("the key {:?} is the lock's own; choose another", self.ticket.key)));
        }
        Ok(())
    }
}

/// One successful acquisition of a [`Mutex`](crate::Mutex).
///
/// It ends with [`unlock`](Self::unlock), with its drop (released in the background), or with its
/// loss, which is for good. Losing it does not stop your code: look at [`is_held`](Self::is_held),
/// wait for [`lost`](Self::lost), and have the resource refuse old [`token`](Self::token)s.
#[must_use = "the lock is released when the hold is dropped"]
pub struct Hold {
    grant: Grant,
}

impl Hold {
    pub(crate) fn new(grant: Grant) -> Self {
        Hold { grant }
    }

    pub(crate) fn core(&self) -> &Arc<HoldCore> {
        self.grant.core()
    }

    /// The fencing token: a number strictly larger than that of every earlier hold of this name.
    /// Give it to the resource with each write, and let the resource refuse smaller ones. On etcd
    /// it is the create revision of the held key. After a restore of etcd from a backup it can go
    /// back.
    pub fn token(&self) -> i64 {
        self.core().token()
    }

    /// The name of the lock, with the session's namespace.
    pub fn name(&self) -> &str {
        self.core().name()
    }

    /// Whether the hold still owns the lock, as far as can be known here. A local read of some tens
    /// of nanoseconds, without I/O. False from the deadline on, even if the process was stopped
    /// meanwhile and nothing has noticed yet.
    pub fn is_held(&self) -> bool {
        self.core().is_held()
    }

    /// How long the hold is good for without another renewal; zero if it is lost or released.
    /// Renewals go on by themselves, so this is a lower bound.
    pub fn remaining(&self) -> Duration {
        self.core().remaining()
    }

    /// Ok while [`is_held`](Self::is_held); else an error with the reason:
    /// [`Lost`](ErrorKind::Lost), [`NotHeld`](ErrorKind::NotHeld) or [`Forked`](ErrorKind::Forked).
    pub fn check(&self) -> Result<()> {
        self.core().check()
    }

    /// Why the hold was lost, if it was.
    pub fn loss(&self) -> Option<Loss> {
        if self.core().is_released() { self.core().lost.get().cloned() } else { self.core().loss() }
    }

    /// Waits until the hold is lost and says why. It never ends if the hold is released first.
    ///
    /// It ends before etcd could give the lock to another, unless this process or its machine was
    /// stopped at that time.
    ///
    /// # Cancel safety
    ///
    /// Cancelling it changes nothing.
    pub async fn lost(&self) -> Loss {
        self.core().lost.lost().await
    }

    /// Calls `listener` once, on the library's notify thread, when the hold is lost; at once if it
    /// is lost already, and never if it is released first.
    pub fn on_lost(&self, listener: impl FnOnce(Loss) + Send + 'static) {
        let env = self.core().session.cluster.env.clone();
        self.core().lost.listen(move |loss| env.clone().call_back(move || listener(loss)));
    }

    /// For bindings: [`on_lost`](Self::on_lost), with the error that the language raises for it.
    #[doc(hidden)]
    pub fn on_lost_error(&self, listener: impl FnOnce(Error) + Send + 'static) {
        let (name, token) = (self.core().name().clone(), self.token());
        self.on_lost(move |loss| listener(Error::lost(&name, token, &loss)));
    }

    /// For bindings, whose handles outlive the release: [`unlock`](Self::unlock).
    #[doc(hidden)]
    pub fn unlock_in_place(&self) -> Pending<()> {
        self.core().unlock()
    }

    /// Releases the lock. The result is there once the store has confirmed it.
    ///
    /// # Errors
    ///
    /// [`Lost`](ErrorKind::Lost) if the hold was lost before. [`Unavailable`](ErrorKind::Unavailable)
    /// if there is no confirmation within 5 s: locally it is released all the same, and the key goes
    /// on being deleted in the background.
    ///
    /// # Cancel safety
    ///
    /// The release is sent before this returns. Cancelling only ends the wait for the confirmation.
    pub fn unlock(self) -> Pending<()> {
        self.core().unlock()
    }

    /// Writes `key` only if this hold still owns the lock, atomically in the store. The key is used
    /// as given, without the namespace.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) for a key or value over 32 MiB; etcd's own limit is 1.5 MB unless it was told otherwise.
    /// [`Lost`](ErrorKind::Lost) if the hold no longer owns the lock; then nothing was written, but
    /// for a request whose first copy went unanswered, and then the message says so.
    /// [`Unavailable`](ErrorKind::Unavailable) if there is no answer within 5 s; then it may or may
    /// not have been written.
    pub fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Pending<()> {
        self.guarded(
            &[key.as_ref(), value.as_ref()],
            || Guarded::Put { key: key.as_ref().to_vec(), value: value.as_ref().to_vec() },
            drop,
        )
    }

    /// Reads `key` only if this hold still owns the lock; `None` if there is no such key. Errors as
    /// with [`put`](Self::put).
    pub fn get(&self, key: impl AsRef<[u8]>) -> Pending<Option<Vec<u8>>> {
        self.guarded(&[key.as_ref()], || Guarded::Get { key: key.as_ref().to_vec() }, |value| value)
    }

    /// Deletes `key` only if this hold still owns the lock; deleting what is not there is fine.
    /// Errors as with [`put`](Self::put).
    pub fn delete(&self, key: impl AsRef<[u8]>) -> Pending<()> {
        self.guarded(&[key.as_ref()], || Guarded::Delete { key: key.as_ref().to_vec() }, drop)
    }

    /// A copy that there is no memory for would end the process, so what etcd would not take in any case is not copied.
    fn guarded<T: Send + 'static>(
        &self,
        given: &[&[u8]],
        what: impl FnOnce() -> Guarded,
        answer: fn(Option<Vec<u8>>) -> T,
    ) -> Pending<T> {
        match given.iter().map(|bytes| bytes.len()).max() {
            Some(largest) if largest > LARGEST_WRITE => {
                Pending::ready(Err(Error::invalid(format!("a key or value of {largest} bytes is over {LARGEST_WRITE} bytes"))))
            }
            _ => self.core().guarded(what(), answer),
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold")
            .field("name", self.core().name())
            .field("token", &self.core().token())
            .field("held", &self.is_held())
            .finish()
    }
}
