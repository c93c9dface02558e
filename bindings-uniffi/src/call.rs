//! A call on its way, and how one hears of its end.

use std::io::{PipeReader, PipeWriter, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use etcdlock::{Canceller, ErrorKind, Pending};

use crate::Failure;
use crate::handles::{Contender, NativeHold, NativeSession};

type Result<T> = std::result::Result<T, Failure>;

/// What a call came to.
#[derive(uniffi::Enum)]
pub enum Outcome {
    Nothing,
    Session { session: Arc<NativeSession> },
    Hold { hold: Arc<NativeHold>, token: i64, address: u64 },
    Bytes { bytes: Vec<u8> },
    Contenders { contenders: Vec<Contender> },
}

/// For languages that native code can call: called once, on the library's notify thread.
#[uniffi::export(callback_interface)]
pub trait DoneListener: Send + Sync {
    fn done(&self);
}

/// For languages that wait for descriptors: a pipe that has a byte in it once it was rung.
#[derive(uniffi::Object)]
pub struct Bell {
    reader: PipeReader,
    writer: PipeWriter,
}

#[uniffi::export]
impl Bell {
    #[uniffi::constructor]
    pub fn new() -> Result<Self> {
        let pipe = std::io::pipe();
        let (reader, writer) = pipe.map_err(|why| Failure::new(ErrorKind::Unavailable, format!("no pipe can be had: {why}")))?;
        Ok(Bell { reader, writer })
    }

    /// The descriptor to wait for and to read from. It is closed with the bell.
    pub fn descriptor(&self) -> i32 {
        self.reader.as_raw_fd()
    }
}

impl Bell {
    pub(crate) fn ring(&self) {
        // One byte fits always: nobody rings a bell that is ringing.
        let _ = (&self.writer).write(&[1]);
    }

    pub(crate) fn reader(&self) -> &PipeReader {
        &self.reader
    }
}

enum Teller {
    Listener(Box<dyn DoneListener>),
    Bell(Arc<Bell>),
}

enum State {
    Running(Option<Teller>),
    Done(Box<dyn FnOnce() -> Result<Outcome> + Send>),
    /// Taken, or given up: a result that comes now is dropped, which releases a lock.
    Over,
}

/// A call that has been started. Its result is here, and nowhere else, until it is taken: so a lock that
/// is granted while its waiter is being interrupted is dropped with the call, and released.
#[derive(uniffi::Object)]
pub struct Call {
    state: Arc<Mutex<State>>,
    canceller: Canceller,
    /// In a forked child the state may be locked by a thread that is not there.
    pid: u32,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Call {
    pub(crate) fn start<T: Send + 'static>(
        pending: Pending<T>,
        outcome: impl FnOnce(T) -> Outcome + Send + 'static,
    ) -> Arc<Self> {
        let state = Arc::new(Mutex::new(State::Running(None)));
        let theirs = state.clone();
        let canceller = pending.on_done(move |result| {
            let mut state = lock(&theirs);
            let State::Running(teller) = &mut *state else { return };
            let teller = teller.take();
            *state = State::Done(Box::new(move || Ok(outcome(result?))));
            match teller {
                // Inside the lock: whoever has it next knows whether the bell has been rung.
                Some(Teller::Bell(bell)) => bell.ring(),
                Some(Teller::Listener(listener)) => {
                    drop(state);
                    listener.done();
                }
                None => {}
            }
        });
        Arc::new(Call { state, canceller, pid: std::process::id() })
    }

    /// Whether the result is there; if not, `teller` tells when it is.
    fn tell(&self, teller: Teller) -> bool {
        match &mut *lock(&self.state) {
            State::Running(place) => {
                *place = Some(teller);
                false
            }
            State::Done(_) | State::Over => true,
        }
    }

    fn end(&self) -> State {
        std::mem::replace(&mut *lock(&self.state), State::Over)
    }
}

#[uniffi::export]
impl Call {
    /// Has the listener called when the result is there. True: it is, and nobody is called.
    pub fn on_done(&self, listener: Box<dyn DoneListener>) -> bool {
        self.tell(Teller::Listener(listener))
    }

    /// Has the bell rung when the result is there. True: it is, and the bell stays silent.
    pub fn ring(&self, bell: Arc<Bell>) -> bool {
        self.tell(Teller::Bell(bell))
    }

    /// Takes the result. Once, and only when it is there.
    pub fn result(&self) -> Result<Outcome> {
        match self.end() {
            State::Done(result) => result(),
            State::Running(_) | State::Over => Err(Failure::new(ErrorKind::Cancelled, "the call was cancelled")),
        }
    }

    /// Gives the call up. What it has done, or still does, is undone in the background. A bell that has
    /// not been rung by now never will be.
    pub fn cancel(&self) {
        if self.pid == std::process::id() {
            drop(self.end());
            self.canceller.cancel();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.cancel();
    }
}
