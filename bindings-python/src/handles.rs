//! `Session`, `Mutex` and `Hold` as Python has them, and what they tell.

use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use etcdlock::{ErrorKind, Options, Pending, Target};
use pyo3::exceptions::{PyResourceWarning, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyAny, PyString};
use pyo3::{PyTraverseError, PyVisit, ffi};

use crate::asynchronous::Call;
use crate::errors::{exception_type, raise};
use crate::events::{self, Callback};
use crate::lifetime::{Shared, is_exiting, with_python};
use crate::waiting::{seconds, timeout as timeout_of, wait, wait_to_hold};

/// Short critical sections, never with the GIL released inside: nobody waits here for anybody.
fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cannot_pickle(what: &str) -> PyErr {
    PyTypeError::new_err(format!(
        "an etcdlock {what} cannot be pickled or copied: it belongs to this process; pass the lock's name on and connect anew there"
    ))
}

// ---- connecting ------------------------------------------------------------------------------

pub(crate) enum Place {
    One(String),
    Several(Vec<String>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Place {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyString>() {
            return object.extract().map(Place::One);
        }
        object.extract().map(Place::Several).map_err(|_| is_not(object, "target", "a str or a list of str"))
    }
}

fn is_not(object: Borrowed<'_, '_, PyAny>, what: &str, rule: &str) -> PyErr {
    let kind = object.get_type().name().map(|name| name.to_string()).unwrap_or_default();
    PyTypeError::new_err(format!("{what} must be {rule}, not {kind}"))
}

/// What no message shows, not even one about a letter that is none.
pub(crate) struct Secret(String);

impl<'a, 'py> FromPyObject<'a, 'py> for Secret {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if !object.is_instance_of::<PyString>() {
            return Err(is_not(object, "password", "a str"));
        }
        object.extract().map(Secret).map_err(|_| {
            crate::errors::invalid(
                object.py(),
                "password is not well-formed: it has half of a surrogate pair (its value is not shown)",
            )
        })
    }
}

/// PEM text, or the path of a PEM file.
type Pem = Option<PathBuf>;

fn pem(py: Python<'_>, what: &str, pem: Pem) -> PyResult<Option<String>> {
    pem.map(|pem| {
        pem.into_os_string().into_string().map_err(|_| crate::errors::invalid(py, format!("{what} is not valid UTF-8")))
    })
    .transpose()
}

/// The arguments of `connect`.
#[derive(FromPyObject)]
pub(crate) struct Arguments {
    #[pyo3(item)]
    target: Option<Place>,
    #[pyo3(item)]
    ttl: Option<f64>,
    #[pyo3(item)]
    namespace: Option<String>,
    #[pyo3(item)]
    user: Option<String>,
    #[pyo3(item)]
    password: Option<Secret>,
    #[pyo3(item)]
    ca: Pem,
    #[pyo3(item)]
    cert: Pem,
    #[pyo3(item)]
    key: Pem,
    #[pyo3(item)]
    server_name: Option<String>,
    #[pyo3(item)]
    owner: Option<String>,
    #[pyo3(item)]
    connect_timeout: Option<f64>,
    #[pyo3(item)]
    max_hold: Option<f64>,
}

impl Arguments {
    pub(crate) fn connect(self, py: Python<'_>) -> PyResult<Pending<etcdlock::Session>> {
        let mut options = Options::default().language("python");
        if let Some(ttl) = self.ttl {
            options = options.ttl(seconds(py, "ttl", ttl)?);
        }
        if let Some(namespace) = self.namespace {
            options = options.namespace(namespace);
        }
        if let Some(user) = self.user {
            options = options.user(user);
        }
        if let Some(password) = self.password {
            options = options.password(password.0);
        }
        if let Some(ca) = pem(py, "ca", self.ca)? {
            options = options.ca(ca);
        }
        if let Some(cert) = pem(py, "cert", self.cert)? {
            options = options.cert(cert);
        }
        if let Some(key) = pem(py, "key", self.key)? {
            options = options.key(key);
        }
        if let Some(name) = self.server_name {
            options = options.server_name(name);
        }
        if let Some(owner) = self.owner {
            options = options.owner(owner);
        }
        if let Some(limit) = self.connect_timeout {
            options = options.connect_timeout(seconds(py, "connect_timeout", limit)?);
        }
        if let Some(limit) = self.max_hold {
            options = options.max_hold(seconds(py, "max_hold", limit)?);
        }
        events::start_thread(py)?;
        events::ask_logging(py)?;
        let target = match self.target {
            None => Target::from_env(),
            Some(Place::One(target)) => Target::from(target),
            Some(Place::Several(targets)) => Target::from(targets),
        };
        Ok(etcdlock::Session::connect(target, options))
    }
}

/// Connects to where locks live and opens a session: one lease, renewed in the background until the session
/// is closed.
///
/// target: "127.0.0.1:2379", "http://a:2379,http://b:2379", "https://…", a list of those, or
///   "memory:NAME" (in this process). None: $ETCDLOCK_ENDPOINTS, else 127.0.0.1:2379.
/// ttl: seconds that the lease lives without a renewal, at least 2 (default 15). A crashed holder's lock is
/// free after about this time.
/// namespace: a prefix for every lock name of the session.
/// user, password: etcd's own authentication.
/// ca, cert, key: PEM, as text or as a path.
/// server_name: the name in the server's certificate, where it differs from the endpoint's host.
/// owner: a label that others see in inspect() (default host:pid).
/// connect_timeout: seconds to try to reach the target (default 5). It does not bound the session's life.
/// max_hold: release a hold that is kept longer than this many seconds (default: never).
///
/// Blocks, with the GIL released, until connected. Raises Invalid for a bad argument and Denied for
/// wrong credentials, both at once, and Unavailable when the target cannot be reached in time.
#[pyfunction]
#[pyo3(signature = (target=None, *, ttl=None, namespace=None, user=None, password=None, ca=None, cert=None, key=None, server_name=None, owner=None, connect_timeout=None, max_hold=None))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments in Python")]
pub(crate) fn connect(
    py: Python<'_>,
    target: Option<Place>,
    ttl: Option<f64>,
    namespace: Option<String>,
    user: Option<String>,
    password: Option<Secret>,
    ca: Pem,
    cert: Pem,
    key: Pem,
    server_name: Option<String>,
    owner: Option<String>,
    connect_timeout: Option<f64>,
    max_hold: Option<f64>,
) -> PyResult<Session> {
    let arguments =
        Arguments { target, ttl, namespace, user, password, ca, cert, key, server_name, owner, connect_timeout, max_hold };
    wait(py, arguments.connect(py)?).map(Session::new)
}

// ---- session ---------------------------------------------------------------------------------

/// A connection to where locks live, with one lease that is renewed in the background until the session is
/// closed.
///
/// Made by etcdlock.connect(). Use it as a context manager, or close() it. Any number of threads and
/// mutexes may share it. If its lease is lost, its holds are lost, and it gets itself a new lease:
/// waiters go on waiting, and new locks work.
#[pyclass(frozen, weakref, module = "etcdlock")]
pub(crate) struct Session {
    session: etcdlock::Session,
}

impl Session {
    pub(crate) fn new(session: etcdlock::Session) -> Self {
        Session { session }
    }
}

#[pymethods]
impl Session {
    /// A mutex of this name. Local: nothing is sent. Mutexes of one name exclude each other, in this
    /// process and everywhere else. Raises Invalid for a name that is empty, over 1,024 bytes or has a NUL,
    /// and Closed.
    #[pyo3(signature = (name, /))]
    fn mutex(&self, py: Python<'_>, name: &str) -> PyResult<Mutex> {
        let mutex = self.session.mutex(name).map_err(|error| raise(py, &error))?;
        Ok(Mutex { mutex, entered: StdMutex::default() })
    }

    /// Who holds the lock of this name and who waits for it, in the order of the queue. Entries of etcd's
    /// own clients show too. Blocks for one request, at most 5 s; raises Unavailable or Denied.
    #[pyo3(signature = (name, /))]
    fn inspect(&self, py: Python<'_>, name: &str) -> PyResult<Vec<Contender>> {
        Ok(wait(py, self.session.inspect(name))?.into_iter().map(Contender::from).collect())
    }

    /// Releases all holds, revokes the lease and ends the session. Blocks until etcd has confirmed it, at
    /// most timeout seconds; then raises Unavailable, and the lease ends by itself within its TTL. Closing
    /// twice is fine.
    #[pyo3(signature = (timeout=5.0))]
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        wait(py, self.session.close(seconds(py, "timeout", timeout)?))
    }

    /// The TTL that etcd granted, in seconds; it may be longer than what was asked for.
    #[getter]
    fn ttl(&self) -> f64 {
        self.session.ttl().as_secs_f64()
    }

    /// The id of the lease, which changes when the session had to get a new one; None while it has none.
    #[getter]
    fn lease_id(&self) -> Option<i64> {
        self.session.lease_id()
    }

    /// What the session has done so far.
    fn stats(&self) -> Stats {
        let stats = self.session.stats();
        Stats {
            locks: stats.locks,
            waits: stats.waits,
            hand_overs: stats.hand_overs,
            live_tickets: stats.live_tickets,
            holds_lost: stats.holds_lost,
            lost_deadline: stats.lost_deadline,
            lost_lease_gone: stats.lost_lease_gone,
            lost_key_deleted: stats.lost_key_deleted,
            lost_refused: stats.lost_refused,
            lost_max_hold: stats.lost_max_hold,
            lost_closed: stats.lost_closed,
            leases_lost: stats.leases_lost,
            renewals: stats.renewals,
            requests: stats.requests,
            watch_events: stats.watch_events,
            reconnections: stats.reconnections,
            counters: stats.counters(),
        }
    }

    fn __enter__(this: Bound<'_, Self>) -> Bound<'_, Self> {
        this
    }

    #[pyo3(signature = (exc_type, exc, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let _ = (exc, traceback);
        at_exit_of_body(py, exc_type, self.close(py, 5.0))
    }

    fn __reduce_ex__(&self, protocol: &Bound<'_, PyAny>) -> PyResult<()> {
        let _ = protocol;
        Err(cannot_pickle("session"))
    }

    fn __repr__(&self) -> String {
        format!("<etcdlock.{:?}>", self.session)
    }

    #[pyo3(signature = (wake, name, /))]
    fn _start_inspect(&self, wake: Py<PyAny>, name: &str) -> Call {
        Call::start(self.session.inspect(name), wake.into(), |py, contenders| {
            let contenders: Vec<Contender> = contenders.into_iter().map(Contender::from).collect();
            Ok(contenders.into_pyobject(py)?.unbind())
        })
    }

    #[pyo3(signature = (wake, timeout, /))]
    fn _start_close(&self, py: Python<'_>, wake: Py<PyAny>, timeout: f64) -> PyResult<Call> {
        let pending = self.session.close(seconds(py, "timeout", timeout)?);
        Ok(Call::start(pending, wake.into(), |py, ()| Ok(py.None())))
    }
}

/// The body's own exception wins over one from the end of the block.
fn at_exit_of_body(py: Python<'_>, exc_type: &Bound<'_, PyAny>, result: PyResult<()>) -> PyResult<bool> {
    match result {
        Err(error)
            if exc_type.is_none() || !error.get_type(py).is_subclass(&py.import("etcdlock._errors")?.getattr("Error")?)? =>
        {
            Err(error)
        }
        _ => Ok(false),
    }
}

// ---- mutex -----------------------------------------------------------------------------------

/// One lock name, seen by one session. Not re-entrant.
///
/// Made by Session.mutex(). Share it between threads or not: each lock() waits its turn. "with mutex:"
/// locks and unlocks, and gives the hold. It can stand in for a threading.Lock: acquire(), release(),
/// locked().
#[pyclass(frozen, weakref, module = "etcdlock")]
pub(crate) struct Mutex {
    mutex: etcdlock::Mutex,
    /// What was acquired without a hold to show for it (acquire(), "with mutex:"), and by which thread.
    entered: StdMutex<Vec<(ThreadId, Py<Hold>)>>,
}

#[pymethods]
impl Mutex {
    /// Waits its turn, through outages and re-elections, until the lock is held; returns the hold, which is
    /// a context manager.
    ///
    /// timeout: seconds; None: for ever; 0: one try. Raises LockTimeout after it, with nothing left behind.
    /// Blocks with the GIL released; Ctrl-C interrupts it and the attempt is cleaned up. Raises also
    /// Denied, Closed, Forked, and Unavailable if etcd refuses for a reason that waiting does not mend.
    #[pyo3(signature = (timeout=None))]
    fn lock(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Hold> {
        let hold = wait_to_hold(py, self.start_lock(py, timeout)?)?;
        Ok(Hold::new(hold, self.mutex.clone(), Site::here(py)))
    }

    /// Takes the lock if it is free; None if somebody holds it. Never waits for other holders; a failed try
    /// writes nothing. Blocks for one request at most; raises Unavailable without an answer within 5 s.
    fn try_lock(&self, py: Python<'_>) -> PyResult<Option<Hold>> {
        let hold = wait_to_hold(py, self.start_try(py)?)?;
        Ok(hold.map(|hold| Hold::new(hold, self.mutex.clone(), Site::here(py))))
    }

    /// Releases the hold that was acquired through this mutex. Blocks until etcd has confirmed it, at most
    /// 5 s. Raises NotHeld, LockLost if the hold was lost before, or Unavailable: released here, and the
    /// key goes on being deleted in the background.
    fn unlock(&self, py: Python<'_>) -> PyResult<()> {
        // Its own hold, not the mutex's latest: after a loss another thread may have that.
        match self.left() {
            Some(hold) => hold.get().unlock(py),
            None => wait(py, self.mutex.unlock()),
        }
    }

    /// As threading.Lock.acquire: True when the lock is held now, False when it is not, after timeout
    /// seconds (-1: no limit) or at once if not blocking. Release it with release().
    #[pyo3(signature = (blocking=true, timeout=-1.0), text_signature = "($self, blocking=True, timeout=-1.0)")]
    fn acquire(&self, py: Python<'_>, blocking: bool, timeout: f64) -> PyResult<bool> {
        if !blocking {
            if timeout != -1.0 {
                return Err(PyValueError::new_err("can't specify a timeout for a non-blocking call"));
            }
            return Ok(match self.try_lock(py)? {
                Some(hold) => self.enter(py, hold).map(|_| true)?,
                None => false,
            });
        }
        let limit = if timeout == -1.0 { None } else { Some(timeout) };
        match self.lock(py, limit) {
            Ok(hold) => self.enter(py, hold).map(|_| true),
            Err(error) if error.get_type(py).is(exception_type(py, ErrorKind::Timeout)?) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// As threading.Lock.release: releases what acquire() got; see unlock().
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.unlock(py)
    }

    /// As threading.Lock.locked: whether the lock is held through this mutex; see is_held().
    fn locked(&self) -> bool {
        self.mutex.is_held()
    }

    /// Whether this mutex holds the lock, as far as can be known here. Local and quick; False from the
    /// deadline on.
    fn is_held(&self) -> bool {
        self.mutex.is_held()
    }

    /// Seconds for which the hold of this mutex is good without another renewal; 0.0 if it holds nothing.
    /// Local.
    fn remaining(&self) -> f64 {
        self.mutex.remaining().as_secs_f64()
    }

    /// The fencing token of the hold of this mutex, even after its loss until it is unlocked; None if there
    /// is none.
    #[getter]
    fn token(&self) -> Option<i64> {
        self.mutex.token()
    }

    /// The name, with the session's namespace.
    #[getter]
    fn name(&self) -> &str {
        self.mutex.name()
    }

    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<Hold>> {
        let hold = self.lock(py, None)?;
        self.enter(py, hold)
    }

    #[pyo3(signature = (exc_type, exc, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        match self.left() {
            Some(hold) => hold.get().__exit__(py, exc_type, exc, traceback),
            // Unlocked in the body.
            None => Ok(false),
        }
    }

    fn __reduce_ex__(&self, protocol: &Bound<'_, PyAny>) -> PyResult<()> {
        let _ = protocol;
        Err(cannot_pickle("mutex"))
    }

    fn __repr__(&self) -> String {
        format!("<etcdlock.{:?}>", self.mutex)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(entered) = self.entered.try_lock() {
            for (_, hold) in entered.iter() {
                visit.call(hold)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let entered = std::mem::take(&mut *lock(&self.entered));
        drop(entered);
    }

    #[pyo3(signature = (wake, timeout, site, /))]
    fn _start_lock(&self, py: Python<'_>, wake: Py<PyAny>, timeout: Option<f64>, site: (Py<PyAny>, i32)) -> PyResult<Call> {
        let (pending, mutex) = (self.start_lock(py, timeout)?, self.mutex.clone());
        let site = Site(site.0.into(), site.1);
        Ok(Call::start(pending, wake.into(), move |py, hold| Ok(Py::new(py, Hold::new(hold, mutex, Some(site)))?.into_any())))
    }

    #[pyo3(signature = (wake, site, /))]
    fn _start_try_lock(&self, py: Python<'_>, wake: Py<PyAny>, site: (Py<PyAny>, i32)) -> PyResult<Call> {
        let (mutex, site) = (self.mutex.clone(), Site(site.0.into(), site.1));
        Ok(Call::start(self.start_try(py)?, wake.into(), move |py, hold| match hold {
            Some(hold) => Ok(Py::new(py, Hold::new(hold, mutex, Some(site)))?.into_any()),
            None => Ok(py.None()),
        }))
    }

    #[pyo3(signature = (wake, /))]
    fn _start_unlock(&self, wake: Py<PyAny>) -> Call {
        Call::start(self.mutex.unlock(), wake.into(), |py, ()| Ok(py.None()))
    }
}

impl Mutex {
    fn start_try(&self, py: Python<'_>) -> PyResult<Pending<Option<etcdlock::Hold>>> {
        events::ask_logging(py)?;
        Ok(self.mutex.try_lock())
    }

    fn start_lock(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Pending<etcdlock::Hold>> {
        events::ask_logging(py)?;
        Ok(match timeout_of(py, timeout)? {
            None => self.mutex.lock(),
            Some(limit) => self.mutex.lock_timeout(limit),
        })
    }

    /// Keeps a hold for this thread.
    fn enter(&self, py: Python<'_>, hold: Hold) -> PyResult<Py<Hold>> {
        let hold = Py::new(py, hold)?;
        lock(&self.entered).push((std::thread::current().id(), hold.clone_ref(py)));
        Ok(hold)
    }

    /// The hold that was kept last for this thread and not released since.
    fn left(&self) -> Option<Py<Hold>> {
        let thread = std::thread::current().id();
        let (gone, left) = {
            let mut entered = lock(&self.entered);
            let (gone, mut kept): (Vec<_>, Vec<_>) =
                std::mem::take(&mut *entered).into_iter().partition(|(_, hold)| hold.get().is_released());
            let at = kept.iter().rposition(|(by, _)| *by == thread);
            let left = at.map(|at| kept.remove(at).1);
            *entered = kept;
            (gone, left)
        };
        // Dropped outside the lock, because it may run Python code.
        drop(gone);
        left
    }
}

// ---- hold ------------------------------------------------------------------------------------

/// Where a hold was acquired: a code object and a line.
struct Site(Shared, i32);

impl Site {
    /// The innermost Python frame.
    fn here(py: Python<'_>) -> Option<Site> {
        // SAFETY: attached; the frame is borrowed from this thread, which runs it, and the code
        // object is a new reference.
        unsafe {
            let frame = ffi::PyEval_GetFrame();
            if frame.is_null() {
                return None;
            }
            let line = ffi::PyFrame_GetLineNumber(frame);
            let code = Bound::from_owned_ptr_or_opt(py, ffi::PyFrame_GetCode(frame).cast())?;
            Some(Site(code.unbind().into(), line))
        }
    }

    fn text(&self, py: Python<'_>) -> String {
        let file = self.0.bind(py).getattr("co_filename").map(|file| file.to_string()).unwrap_or_default();
        format!(", acquired at {file}:{}", self.1)
    }
}

/// One successful acquisition, from lock to unlock or loss. A context manager that unlocks.
///
/// Losing it does not stop your code: look at is_held(), hear of it with on_lost(), and let the
/// resource refuse old tokens, or write through put(). Leaving the with block of a hold that was
/// lost raises LockLost, unless the body is raising already.
#[pyclass(frozen, weakref, module = "etcdlock")]
pub(crate) struct Hold {
    hold: etcdlock::Hold,
    /// A hold keeps its session open, though nobody may hold on to the session or the mutex.
    _mutex: etcdlock::Mutex,
    site: Option<Site>,
    /// Callbacks of on_lost: here, not in core, for the garbage collector.
    callbacks: StdMutex<Vec<Callback>>,
}

impl Hold {
    fn new(hold: etcdlock::Hold, mutex: etcdlock::Mutex, site: Option<Site>) -> Self {
        Hold { hold, _mutex: mutex, site, callbacks: StdMutex::default() }
    }

    fn is_released(&self) -> bool {
        self.hold.check().is_err_and(|error| error.kind() == ErrorKind::NotHeld)
    }
}

/// A key or a value: bytes, or text in UTF-8.
enum Bytes {
    Bytes(PyBackedBytes),
    Text(PyBackedStr),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Bytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyString>() {
            return object.extract().map(Bytes::Text);
        }
        object.extract().map(Bytes::Bytes).map_err(|_| is_not(object, "keys and values", "bytes or str"))
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Bytes::Bytes(bytes) => bytes,
            Bytes::Text(text) => text.as_bytes(),
        }
    }
}

#[pymethods]
impl Hold {
    /// The fencing token: an int strictly larger than that of every earlier hold of this name. Give it to
    /// the resource with each write, and let the resource refuse smaller ones.
    #[getter]
    fn token(&self) -> i64 {
        self.hold.token()
    }

    /// The name of the lock, with the session's namespace.
    #[getter]
    fn name(&self) -> &str {
        self.hold.name()
    }

    /// Whether the hold still owns the lock, as far as can be known here. Local, some tens of nanoseconds.
    /// False from the deadline on, even if the process was stopped meanwhile.
    fn is_held(&self) -> bool {
        self.hold.is_held()
    }

    /// Seconds for which the hold is good without another renewal; 0.0 if it is lost or released. Local.
    /// Renewals go on by themselves, so this is a lower bound.
    fn remaining(&self) -> f64 {
        self.hold.remaining().as_secs_f64()
    }

    /// Returns if is_held(); else raises LockLost, NotHeld or Forked. Local.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.hold.check().map_err(|error| raise(py, &error))
    }

    /// Why the hold was lost, as text; None if it was not.
    #[getter]
    fn loss(&self) -> Option<String> {
        self.hold.loss().map(|loss| loss.to_string())
    }

    /// Has callback(reason) called once when the hold is lost: at once if it is lost already, never if it
    /// is released first. Callbacks of all holds run one after the other on one thread of this library; a
    /// slow one delays the others but no lease.
    #[pyo3(signature = (callback, /))]
    fn on_lost(&self, callback: Py<PyAny>) {
        let callback = Callback::new(StdMutex::new(Some(callback)));
        // Weak: whatever drops it has no GIL, and a hold that is gone has been released.
        let theirs = Arc::downgrade(&callback);
        let mut callbacks = lock(&self.callbacks);
        callbacks.retain(|callback| lock(callback).is_some());
        callbacks.push(callback);
        drop(callbacks);
        self.hold.on_lost(move |loss| {
            if let Some(callback) = theirs.upgrade() {
                events::lost(callback, loss.to_string());
            }
        });
    }

    /// Releases the lock. Blocks until etcd has confirmed it, at most 5 s. Raises NotHeld if it was
    /// released before, LockLost if it was lost before, or Unavailable: released here, and the key goes on
    /// being deleted in the background.
    fn unlock(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.hold.unlock_in_place())
    }

    /// Writes key, only if this hold still owns the lock, atomically in etcd. Keys and values are bytes or
    /// str (UTF-8); the key is used as given, without the namespace. Blocks for one request, at most 5 s.
    /// Raises LockLost if nothing was written, and Unavailable if it may or may not have been.
    #[pyo3(signature = (key, value, /))]
    fn put(&self, py: Python<'_>, key: Bytes, value: Bytes) -> PyResult<()> {
        wait(py, self.hold.put(key, value))
    }

    /// Reads key, only if this hold still owns the lock: bytes, or None if there is no such key. Blocks and
    /// raises as put().
    #[pyo3(signature = (key, /))]
    fn get(&self, py: Python<'_>, key: Bytes) -> PyResult<Option<std::borrow::Cow<'static, [u8]>>> {
        Ok(wait(py, self.hold.get(key))?.map(Into::into))
    }

    /// Deletes key, only if this hold still owns the lock; deleting what is not there is fine. Blocks and
    /// raises as put().
    #[pyo3(signature = (key, /))]
    fn delete(&self, py: Python<'_>, key: Bytes) -> PyResult<()> {
        wait(py, self.hold.delete(key))
    }

    fn __enter__(this: Bound<'_, Self>) -> Bound<'_, Self> {
        this
    }

    #[pyo3(signature = (exc_type, exc, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let _ = (exc, traceback);
        // Unlocked in the body: that is where it was said whether it went well.
        if self.is_released() {
            return Ok(false);
        }
        at_exit_of_body(py, exc_type, self.unlock(py))
    }

    fn __reduce_ex__(&self, protocol: &Bound<'_, PyAny>) -> PyResult<()> {
        let _ = protocol;
        Err(cannot_pickle("hold"))
    }

    fn __repr__(&self) -> String {
        format!("<etcdlock.{:?}>", self.hold)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(Site(code, _)) = &self.site {
            visit.call(&**code)?;
        }
        if let Ok(callbacks) = self.callbacks.try_lock() {
            for callback in callbacks.iter() {
                if let Ok(callback) = callback.try_lock() {
                    visit.call(&*callback)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let callbacks = std::mem::take(&mut *lock(&self.callbacks));
        for callback in callbacks {
            let callback = lock(&callback).take();
            drop(callback);
        }
    }

    /// Has wake() called on the notify thread when the hold is lost; for aio, where it is quick.
    #[pyo3(signature = (wake, /))]
    fn _wake_when_lost(&self, wake: Py<PyAny>) {
        let wake = Shared::from(wake);
        self.hold.on_lost(move |_| {
            // It fails when the event loop is closed: then nobody is there to be told.
            let _ = with_python(|py| wake.call0(py).is_ok());
        });
    }

    #[pyo3(signature = (wake, /))]
    fn _start_unlock(&self, wake: Py<PyAny>) -> Call {
        Call::start(self.hold.unlock_in_place(), wake.into(), |py, ()| Ok(py.None()))
    }

    #[pyo3(signature = (wake, key, value, /))]
    fn _start_put(&self, wake: Py<PyAny>, key: Bytes, value: Bytes) -> Call {
        Call::start(self.hold.put(key, value), wake.into(), |py, ()| Ok(py.None()))
    }

    #[pyo3(signature = (wake, key, /))]
    fn _start_get(&self, wake: Py<PyAny>, key: Bytes) -> Call {
        Call::start(self.hold.get(key), wake.into(), |py, value| {
            Ok(value.map(std::borrow::Cow::<[u8]>::from).into_pyobject(py)?.unbind())
        })
    }

    #[pyo3(signature = (wake, key, /))]
    fn _start_delete(&self, wake: Py<PyAny>, key: Bytes) -> Call {
        Call::start(self.hold.delete(key), wake.into(), |py, ()| Ok(py.None()))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.hold.is_held() {
            self.warn_unreleased();
        }
        // Core's own drop releases it in the background.
    }
}

impl Hold {
    fn warn_unreleased(&self) {
        if is_exiting() {
            return;
        }
        with_python(|py| {
            // A deallocation may run while an exception is on its way.
            let raised = PyErr::take(py);
            let (name, token) = (self.hold.name(), self.hold.token());
            let site = self.site.as_ref().map(|site| site.text(py)).unwrap_or_default();
            let text = format!(
                "the lock {name:?} (token {token}{site}) was dropped while held; it is released in the background. Use `with`, or unlock()\0"
            );
            if let Ok(text) = std::ffi::CStr::from_bytes_until_nul(text.as_bytes())
                && let Err(error) = PyErr::warn(py, &py.get_type::<PyResourceWarning>(), text, 1)
            {
                error.write_unraisable(py, None);
            }
            if let Some(raised) = raised {
                raised.restore(py);
            }
        });
    }
}

// ---- what a session tells --------------------------------------------------------------------

/// One who holds a lock or waits for it, as Session.inspect() shows it.
#[pyclass(frozen, get_all, eq, module = "etcdlock")]
#[derive(PartialEq)]
pub(crate) struct Contender {
    /// Whether this one is first in the queue, and so holds the lock.
    is_holder: bool,
    /// The owner's label; empty for entries of other clients.
    owner: String,
    /// The host it runs on; empty if unknown.
    host: String,
    /// Its process id; 0 if unknown.
    pid: u32,
    /// The language it is written in; empty if unknown.
    language: String,
    /// The fencing token it has, or will have when it holds the lock.
    token: i64,
    /// Seconds since it entered the queue, by the clocks of the two machines; None if unknown.
    age: Option<f64>,
    /// Its key in etcd.
    key: String,
}

impl From<etcdlock::Contender> for Contender {
    fn from(contender: etcdlock::Contender) -> Self {
        let etcdlock::Contender { is_holder, owner, host, pid, language, token, age, key, .. } = contender;
        Contender { is_holder, owner, host, pid, language, token, age: age.as_ref().map(Duration::as_secs_f64), key }
    }
}

#[pymethods]
impl Contender {
    fn __repr__(&self) -> String {
        let Contender { is_holder, owner, host, pid, language, token, age, key } = self;
        let role = if *is_holder { "holder" } else { "waiter" };
        format!(
            "<etcdlock.Contender {role} owner={owner:?} host={host:?} pid={pid} language={language:?} token={token} age={} key={key:?}>",
            age.map_or_else(|| "None".into(), |age| format!("{age:.1}"))
        )
    }
}

/// Counters of a session, from its start.
#[pyclass(frozen, eq, module = "etcdlock")]
#[derive(PartialEq)]
pub(crate) struct Stats {
    /// Locks acquired.
    #[pyo3(get)]
    locks: u64,
    /// Of those, the ones that had to wait for another holder, here or elsewhere.
    #[pyo3(get)]
    waits: u64,
    /// Of those, the ones that were passed on inside this process, in one request.
    #[pyo3(get)]
    hand_overs: u64,
    /// Places that the session has in queues now, as holder or as waiter.
    #[pyo3(get)]
    live_tickets: u64,
    /// Holds lost, for whatever reason.
    #[pyo3(get)]
    holds_lost: u64,
    /// Of those: no renewal was confirmed before the deadline.
    #[pyo3(get)]
    lost_deadline: u64,
    /// Of those: the lease had expired or was revoked.
    #[pyo3(get)]
    lost_lease_gone: u64,
    /// Of those: the key was deleted from outside.
    #[pyo3(get)]
    lost_key_deleted: u64,
    /// Of those: a guarded write was refused.
    #[pyo3(get)]
    lost_refused: u64,
    /// Of those: kept longer than max_hold.
    #[pyo3(get)]
    lost_max_hold: u64,
    /// Of those: the session was closed.
    #[pyo3(get)]
    lost_closed: u64,
    /// Leases lost; the session got itself a new one after each.
    #[pyo3(get)]
    leases_lost: u64,
    /// Renewals sent.
    #[pyo3(get)]
    renewals: u64,
    /// Requests sent to the store by all sessions that share its connection.
    #[pyo3(get)]
    requests: u64,
    /// Events heard by all sessions that share the connection.
    #[pyo3(get)]
    watch_events: u64,
    /// Connections and watch streams that had to be opened anew, by all sessions that share them.
    #[pyo3(get)]
    reconnections: u64,
    counters: [(&'static str, u64); 16],
}

#[pymethods]
impl Stats {
    fn __repr__(&self) -> String {
        let counters: Vec<_> = self.counters.iter().map(|(name, count)| format!("{name}={count}")).collect();
        format!("<etcdlock.Stats {}>", counters.join(" "))
    }
}
