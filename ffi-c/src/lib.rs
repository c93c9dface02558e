//! libetcdlock: the C ABI. What users read is the header that is made from the comments here; the
//! conventions are in README.md. Every function converts its arguments, has the core do the work,
//! and converts what comes back.

#![allow(non_camel_case_types)]
// The comments are those of the header; what pointers must be is in its first lines.
#![allow(clippy::missing_safety_doc)]

mod handles;
mod status;

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use etcdlock::{Canceller, ErrorKind, Hold, Mutex, Options, Pending, Session};

use handles::Object;
pub use status::{
    ETCDLOCK_BUSY, ETCDLOCK_CANCELLED, ETCDLOCK_CLOSED, ETCDLOCK_DEADLOCK, ETCDLOCK_DENIED, ETCDLOCK_FORKED, ETCDLOCK_INTERNAL,
    ETCDLOCK_INVALID, ETCDLOCK_LOSS_CLOSED, ETCDLOCK_LOSS_DEADLINE, ETCDLOCK_LOSS_FORKED, ETCDLOCK_LOSS_HISTORY_CHANGED,
    ETCDLOCK_LOSS_INTERNAL, ETCDLOCK_LOSS_KEY_DELETED, ETCDLOCK_LOSS_LEASE_GONE, ETCDLOCK_LOSS_MAX_HOLD, ETCDLOCK_LOSS_NONE,
    ETCDLOCK_LOSS_REFUSED, ETCDLOCK_LOST, ETCDLOCK_NOT_HELD, ETCDLOCK_OK, ETCDLOCK_TIMEOUT, ETCDLOCK_UNAVAILABLE,
};
use status::{Failure, Outcome, c_string, loss_code, remember, status, value};

/// For etcdlock_set_log: nothing.
pub const ETCDLOCK_LOG_OFF: i32 = 0;
/// For etcdlock_set_log: errors.
pub const ETCDLOCK_LOG_ERROR: i32 = 1;
/// For etcdlock_set_log: warnings, such as the loss of a hold, and errors.
pub const ETCDLOCK_LOG_WARN: i32 = 2;
/// For etcdlock_set_log: what is worth knowing, such as a failed renewal, and the above.
pub const ETCDLOCK_LOG_INFO: i32 = 3;
/// For etcdlock_set_log: every grant and failover, and the above.
pub const ETCDLOCK_LOG_DEBUG: i32 = 4;
/// For etcdlock_set_log: everything.
pub const ETCDLOCK_LOG_TRACE: i32 = 5;

/// Options of a session. Made by etcdlock_options_new, freed by etcdlock_options_free.
pub struct etcdlock_options {
    _nothing_to_see: [u8; 0],
}

/// A connection to where locks live, with one lease that is renewed until the session is closed.
/// Any number of threads may use it.
pub struct etcdlock_session {
    _nothing_to_see: [u8; 0],
}

/// A distributed mutex of one name, seen by one session. Not re-entrant, not bound to a thread: any
/// number of threads may use it, and each lock waits its turn.
pub struct etcdlock_mutex {
    _nothing_to_see: [u8; 0],
}

/// A call that was started and reports to a callback.
pub struct etcdlock_op {
    _nothing_to_see: [u8; 0],
}

/// Called once, on the library's notify thread, when a started call has ended.
///
/// status: ETCDLOCK_OK or what went wrong; then etcdlock_last_error() has the message, inside the
/// callback. token: the fencing token after a lock, else 0. It must not throw, longjmp or block for
/// long: other callbacks wait for it, leases do not. Blocking calls of this library inside it return
/// ETCDLOCK_DEADLOCK.
pub type etcdlock_done_fn = Option<unsafe extern "C" fn(status: i32, token: i64, user_data: *mut c_void)>;

/// Called once, on the notify thread, when a hold is lost. reason: one of ETCDLOCK_LOSS_…; inside the
/// callback etcdlock_last_error() says it in words. The rules are those of etcdlock_done_fn.
pub type etcdlock_lost_fn = Option<unsafe extern "C" fn(reason: i32, user_data: *mut c_void)>;

/// Gets one log line on the notify thread. level: ETCDLOCK_LOG_ERROR to ETCDLOCK_LOG_TRACE. target:
/// such as "etcdlock::loss". Both texts are valid during the call only. The rules are those of
/// etcdlock_done_fn.
pub type etcdlock_log_fn =
    Option<unsafe extern "C" fn(level: i32, target: *const c_char, message: *const c_char, user_data: *mut c_void)>;

/// One who holds a lock or waits for it. New fields may be added at the end.
#[repr(C)]
pub struct etcdlock_contender {
    /// 1 for the first in the queue, who holds the lock; else 0.
    pub is_holder: i32,
    /// The owner's process id; 0 if unknown.
    pub pid: u32,
    /// The fencing token it has, or will have when it holds the lock.
    pub token: i64,
    /// Milliseconds since it entered the queue, by the clocks of the two machines; -1 if unknown.
    pub age_ms: i64,
    /// The owner's label; "" for entries of other clients, such as etcdctl's.
    pub owner: *const c_char,
    /// The host it runs on; "" if unknown.
    pub host: *const c_char,
    /// The language it is written in; "" if unknown.
    pub language: *const c_char,
    /// Its key in etcd.
    pub key: *const c_char,
}

/// Gets one contender, on the thread that called etcdlock_session_inspect. All is valid during the
/// call only. It must not throw or longjmp.
pub type etcdlock_contender_fn = Option<unsafe extern "C" fn(contender: *const etcdlock_contender, user_data: *mut c_void)>;

/// Counters of a session, from its start. New fields may be added at the end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct etcdlock_stats {
    /// Locks acquired.
    pub locks: u64,
    /// Of those, the ones that had to wait for another holder, here or elsewhere.
    pub waits: u64,
    /// Of those, the ones that were passed on inside this process, in one request.
    pub hand_overs: u64,
    /// Places that the session has in queues now, as holder or as waiter.
    pub live_tickets: u64,
    /// Holds lost, for whatever reason.
    pub holds_lost: u64,
    /// Of those: no renewal was confirmed before the deadline.
    pub lost_deadline: u64,
    /// Of those: the lease had expired or was revoked.
    pub lost_lease_gone: u64,
    /// Of those: the key was deleted from outside.
    pub lost_key_deleted: u64,
    /// Of those: a guarded write was refused.
    pub lost_refused: u64,
    /// Of those: kept longer than the max_hold option.
    pub lost_max_hold: u64,
    /// Of those: the session was closed.
    pub lost_closed: u64,
    /// Leases lost; the session got itself a new one after each.
    pub leases_lost: u64,
    /// Renewals sent.
    pub renewals: u64,
    /// Requests sent to the store by all sessions that share its connection.
    pub requests: u64,
    /// Events heard by all sessions that share the connection.
    pub watch_events: u64,
    /// Connections and watch streams that had to be opened anew, by all sessions that share them.
    pub reconnections: u64,
}

// ---------------------------------------------------------------- arguments

/// What C wants to have back in a callback. Its use from other threads is the caller's promise.
#[derive(Clone, Copy)]
struct UserData(*mut c_void);

// SAFETY: the library only hands it back. The header says that callbacks run on another thread.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

impl UserData {
    /// A method, so that closures capture the whole and not the pointer inside.
    fn get(self) -> *mut c_void {
        self.0
    }
}

/// # Safety
///
/// `text` is NULL or points to a text that ends with a NUL and stays during the call.
unsafe fn text<'a>(what: &str, text: *const c_char) -> Outcome<&'a str> {
    if text.is_null() {
        return Err(Failure::invalid(format!("the {what} is NULL")));
    }
    // SAFETY: not NULL, so it ends with a NUL, as the caller promises.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().map_err(|error| Failure::invalid(format!("the {what} is not UTF-8 from byte {} on", error.valid_up_to())))
}

/// # Safety
///
/// `start` is NULL or points to `length` bytes that stay during the call.
unsafe fn bytes<'a>(what: &str, start: *const c_void, length: usize) -> Outcome<&'a [u8]> {
    if length == 0 {
        return Ok(&[]);
    }
    if start.is_null() {
        return Err(Failure::invalid(format!("the {what} is NULL, but its length is {length}")));
    }
    if isize::try_from(length).is_err() {
        return Err(Failure::invalid(format!("the length of the {what}, {length}, is more than can be")));
    }
    // SAFETY: not NULL, and as long as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), length) })
}

fn out<T>(what: &str, place: *mut T) -> Outcome<*mut T> {
    if place.is_null() { Err(Failure::invalid(format!("the place for the {what} is NULL"))) } else { Ok(place) }
}

/// -1 is for ever.
fn limit(timeout_ms: i64) -> Outcome<Option<Duration>> {
    match u64::try_from(timeout_ms) {
        Ok(ms) => Ok(Some(Duration::from_millis(ms))),
        Err(_) if timeout_ms == -1 => Ok(None),
        Err(_) => Err(Failure::invalid(format!("timeout_ms {timeout_ms} is negative: give milliseconds, or -1 for no limit"))),
    }
}

fn length_of_time(what: &str, ms: i64) -> Outcome<Duration> {
    u64::try_from(ms)
        .map(Duration::from_millis)
        .map_err(|_| Failure::invalid(format!("{what} {ms} is negative: give milliseconds")))
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// The mutex of a handle, for a call that waits. Asked first, so that nothing is started in vain.
fn mutex_to_wait_with(mutex: *mut etcdlock_mutex) -> Outcome<Mutex> {
    let mutex = handles::get(mutex as usize)?;
    etcdlock::check_may_block()?;
    Ok(mutex)
}

fn not_held(mutex: &Mutex) -> Failure {
    Failure::new(ErrorKind::NotHeld, format!("the lock {:?} is not held through this mutex; lock it first", mutex.name()))
}

// ---------------------------------------------------------------- errors, version

/// The message of the last failure on this thread: what happened, to which name and target, and what
/// to do. "" if there was none.
///
/// It is changed by failures only, and valid until the next failure on this thread, or the thread's
/// end. It belongs to the library. Inside a callback it is the message of that callback's status.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_last_error() -> *const c_char {
    status::last_error()
}

/// The name of a status without its prefix, such as "TIMEOUT"; "UNKNOWN" for any other number. The
/// text is constant and lives for ever. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_status_name(status: i32) -> *const c_char {
    status::status_name(status).as_ptr()
}

/// The version of the library, such as "0.1.0". The text is constant and lives for ever. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Has listener called for every log line of at most this level (ETCDLOCK_LOG_…); the last call counts, and
/// ETCDLOCK_LOG_OFF or a NULL listener ends it. Without it the library prints nothing.
///
/// Lines pass through a queue of 1,024; a slow listener costs lines, and is told how many, but never a lease.
/// user_data must stay valid until listener was replaced and etcdlock_flush_callbacks has returned
/// ETCDLOCK_OK. It does not block. Any thread.
///
/// Returns ETCDLOCK_OK or ETCDLOCK_INVALID (no such level).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_set_log(level: i32, listener: etcdlock_log_fn, user_data: *mut c_void) -> i32 {
    status(|| {
        let Some(checked) = u8::try_from(level).ok().filter(|level| *level <= 5) else {
            return Err(Failure::invalid(format!("log level {level} is not ETCDLOCK_LOG_OFF (0) to ETCDLOCK_LOG_TRACE (5)")));
        };
        let Some(listener) = listener else { return Ok(etcdlock::log_to(0, |_, _, _| {})?) };
        let user_data = UserData(user_data);
        etcdlock::log_to(checked, move |level, target, message| {
            let (target, message) = (c_string(target), c_string(message));
            // SAFETY: the texts end with a NUL and outlive the call; the rest is the caller's promise.
            unsafe { listener(i32::from(level), target.as_ptr(), message.as_ptr(), user_data.get()) };
        })?;
        Ok(())
    })
}

/// Waits until every callback that was due when it was called has returned, at most timeout_ms
/// (-1: no limit). After an etcdlock_mutex_unlock, or etcdlock_set_log(ETCDLOCK_LOG_OFF, …), and this,
/// no callback of theirs uses its user_data any more. It blocks. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_TIMEOUT, ETCDLOCK_INVALID, or ETCDLOCK_DEADLOCK inside a callback.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_flush_callbacks(timeout_ms: i64) -> i32 {
    status(|| {
        let limit = limit(timeout_ms)?;
        etcdlock::check_may_block()?;
        let (tell, told) = mpsc::channel();
        etcdlock::on_notify_thread(move || {
            let _ = tell.send(());
        })?;
        // Years are for ever, and can be added to a time.
        let limit = limit.unwrap_or(Duration::MAX).min(Duration::from_secs(1 << 31));
        told.recv_timeout(limit)
            .map_err(|_| Failure::new(ErrorKind::Timeout, format!("a callback is still running after {limit:?}")))
    })
}

// ---------------------------------------------------------------- options

/// Options with their default values: ttl 15 s, connect_timeout 5 s, no namespace, no credentials,
/// owner "host:pid", no max_hold.
///
/// The caller frees them with etcdlock_options_free, at any time after the sessions were opened. NULL
/// on failure (too many handles). It does not block. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_options_new() -> *mut etcdlock_options {
    value(std::ptr::null_mut(), || {
        Ok(handles::insert(Object::Options(Box::new(Options::default().language("c"))))? as *mut etcdlock_options)
    })
}

/// Frees options. Sessions that were opened with them are not affected. NULL is fine. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (freed before, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_options_free(options: *mut etcdlock_options) -> i32 {
    status(|| if options.is_null() { Ok(()) } else { handles::remove::<Options>(options as usize).map(drop) })
}

fn set(options: *mut etcdlock_options, change: impl FnOnce(Options) -> Options) -> Outcome<()> {
    handles::change::<Options>(options as usize, |options| *options = change(std::mem::take(options)))
}

/// How long the lease lives without a renewal, in milliseconds: at least 2,000, at most 24 h, rounded
/// up to whole seconds. A crashed holder's lock is free after about this time.
///
/// Values out of range are refused by etcdlock_session_open. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (negative, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_options_set_ttl_ms(options: *mut etcdlock_options, ttl_ms: i64) -> i32 {
    status(|| {
        let ttl = length_of_time("ttl_ms", ttl_ms)?;
        set(options, |options| options.ttl(ttl))
    })
}

/// How long etcdlock_session_open tries to reach etcd, in milliseconds. It does not bound the
/// session's life. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (negative, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_options_set_connect_timeout_ms(options: *mut etcdlock_options, timeout_ms: i64) -> i32 {
    status(|| {
        let timeout = length_of_time("timeout_ms", timeout_ms)?;
        set(options, |options| options.connect_timeout(timeout))
    })
}

/// Releases a hold that is kept longer than this, in milliseconds. Default: never. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (negative, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_options_set_max_hold_ms(options: *mut etcdlock_options, max_hold_ms: i64) -> i32 {
    status(|| {
        let max_hold = length_of_time("max_hold_ms", max_hold_ms)?;
        set(options, |options| options.max_hold(max_hold))
    })
}

/// A prefix for every lock name of the session, used as given. Default: none.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_namespace(options: *mut etcdlock_options, prefix: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let prefix = unsafe { text("namespace", prefix) }?;
        set(options, |options| options.namespace(prefix))
    })
}

/// User name for etcd's own authentication; needs a password too.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_user(options: *mut etcdlock_options, user: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let user = unsafe { text("user", user) }?;
        set(options, |options| options.user(user))
    })
}

/// Password for etcd's own authentication; needs a user too.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_password(options: *mut etcdlock_options, password: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let password = unsafe { text("password", password) }?;
        set(options, |options| options.password(password))
    })
}

/// Certificates that may sign the server's: PEM text, or the path of a PEM file. Default: the system's.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_ca(options: *mut etcdlock_options, pem_or_path: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let pem_or_path = unsafe { text("ca", pem_or_path) }?;
        set(options, |options| options.ca(pem_or_path))
    })
}

/// Client certificate: PEM text, or the path of a PEM file; needs a key too.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_cert(options: *mut etcdlock_options, pem_or_path: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let pem_or_path = unsafe { text("cert", pem_or_path) }?;
        set(options, |options| options.cert(pem_or_path))
    })
}

/// Private key of the client certificate: PEM text, or the path of a PEM file; needs a cert too.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_key(options: *mut etcdlock_options, pem_or_path: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let pem_or_path = unsafe { text("key", pem_or_path) }?;
        set(options, |options| options.key(pem_or_path))
    })
}

/// The name the server's certificate must carry, where it differs from the endpoint's host.
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_server_name(options: *mut etcdlock_options, name: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let name = unsafe { text("server_name", name) }?;
        set(options, |options| options.server_name(name))
    })
}

/// A label that others see in etcdlock_session_inspect. Default "host:pid".
/// The text is copied. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (NULL, not UTF-8, or no options) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_options_set_owner(options: *mut etcdlock_options, label: *const c_char) -> i32 {
    status(|| {
        // SAFETY: NULL or a text, as the caller promises.
        let label = unsafe { text("owner", label) }?;
        set(options, |options| options.owner(label))
    })
}

// ---------------------------------------------------------------- sessions

/// Connects to a target and opens a lease, which the library renews until the session is closed.
///
/// target: "127.0.0.1:2379", "http://a:2379,http://b:2379", "https://…", or "memory:NAME" (in this
/// process, for tests); NULL or "": $ETCDLOCK_ENDPOINTS, else 127.0.0.1:2379. options: NULL for the
/// default ones. Both are copied. *session is the caller's, who ends it with etcdlock_session_close or
/// etcdlock_session_free. It blocks, at most for connect_timeout. Any thread, but not in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (target or options), ETCDLOCK_UNAVAILABLE (nothing reached in
/// time), ETCDLOCK_DENIED (credentials), ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_session_open(
    target: *const c_char,
    options: *const etcdlock_options,
    session: *mut *mut etcdlock_session,
) -> i32 {
    status(|| {
        let place = out("session", session)?;
        // SAFETY: NULL or a text, as the caller promises.
        let target = if target.is_null() { "" } else { unsafe { text("target", target) }? };
        let options = match options.is_null() {
            true => Options::default().language("c"),
            false => handles::get::<Options>(options as usize)?,
        };
        etcdlock::check_may_block()?;
        let handle = handles::insert(Object::Session(Session::connect(target, options).wait()?))?;
        // SAFETY: not NULL, and a place for a pointer, as the caller promises.
        unsafe { place.write(handle as *mut etcdlock_session) };
        Ok(())
    })
}

/// Closes a session: releases its holds, ends its waiting calls with ETCDLOCK_CLOSED, revokes its lease,
/// and frees the handle. Waits for etcd's answer at most timeout_ms (-1: no limit of its own; the lease's
/// end is one). Mutexes of the session stay valid, say ETCDLOCK_CLOSED, and are freed by their owner.
///
/// NULL is fine. It blocks. Any thread, but not in a callback (there: etcdlock_session_free).
///
/// Returns ETCDLOCK_OK, or ETCDLOCK_UNAVAILABLE (no answer in time; closed all the same, and the lease
/// ends by itself). The handle stays on ETCDLOCK_INVALID, ETCDLOCK_FORKED and ETCDLOCK_DEADLOCK.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_session_close(session: *mut etcdlock_session, timeout_ms: i64) -> i32 {
    status(|| {
        if session.is_null() {
            return Ok(());
        }
        let limit = limit(timeout_ms)?;
        handles::with::<Session, _>(session as usize, |_| ())?;
        etcdlock::check_may_block()?;
        if let Object::Session(session) = handles::remove::<Session>(session as usize)? {
            session.close(limit.unwrap_or(Duration::MAX)).wait()?;
        }
        Ok(())
    })
}

/// Frees the handle of a session without waiting. The session is closed in the background as soon as
/// its last mutex is freed too. NULL is fine. It does not block. Any thread, also in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_session_free(session: *mut etcdlock_session) -> i32 {
    status(|| if session.is_null() { Ok(()) } else { handles::remove::<Session>(session as usize).map(drop) })
}

/// The TTL that etcd granted, in milliseconds, which may be more than was asked for; 0 if the handle is
/// not good. Local, does not block. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_session_ttl_ms(session: *const etcdlock_session) -> i64 {
    value(0, || handles::with::<Session, _>(session as usize, |session| milliseconds(session.ttl())))
}

/// The id of the session's lease, which changes when the session had to get a new one; 0 while it has
/// none, or if the handle is not good. `etcdctl lease timetolive` takes it in hexadecimal. Local, does
/// not block. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_session_lease_id(session: *const etcdlock_session) -> i64 {
    value(0, || handles::with::<Session, _>(session as usize, |session| session.lease_id().unwrap_or(0)))
}

/// Calls each for every contender of a lock, in the order of the queue, on this thread and before it
/// returns. Entries of other etcd clients show too, with less known of them.
///
/// It blocks, at most 5 s. Any thread, but not in a callback of the notify thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID, ETCDLOCK_UNAVAILABLE, ETCDLOCK_DENIED, ETCDLOCK_CLOSED,
/// ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_session_inspect(
    session: *const etcdlock_session,
    name: *const c_char,
    each: etcdlock_contender_fn,
    user_data: *mut c_void,
) -> i32 {
    status(|| {
        let Some(each) = each else { return Err(Failure::invalid("the function each is NULL")) };
        // SAFETY: NULL or a text, as the caller promises.
        let name = unsafe { text("name", name) }?;
        let session = handles::get::<Session>(session as usize)?;
        etcdlock::check_may_block()?;
        for contender in session.inspect(name).wait()? {
            let texts = [&contender.owner, &contender.host, &contender.language, &contender.key].map(|text| c_string(text));
            let shown = etcdlock_contender {
                is_holder: i32::from(contender.is_holder),
                pid: contender.pid,
                token: contender.token,
                age_ms: contender.age.map_or(-1, milliseconds),
                owner: texts[0].as_ptr(),
                host: texts[1].as_ptr(),
                language: texts[2].as_ptr(),
                key: texts[3].as_ptr(),
            };
            // SAFETY: what is shown outlives the call; the rest is the caller's promise.
            unsafe { each(&shown, user_data) };
        }
        Ok(())
    })
}

/// Writes the session's counters to *stats. size: sizeof(etcdlock_stats), so that a program that was
/// compiled with fewer fields gets no more than those. Local, does not block. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_session_stats(
    session: *const etcdlock_session,
    stats: *mut etcdlock_stats,
    size: usize,
) -> i32 {
    status(|| {
        let place = out("stats", stats)?;
        if size == 0 || !size.is_multiple_of(size_of::<u64>()) {
            return Err(Failure::invalid(format!("size {size} is not that of an etcdlock_stats: give sizeof(etcdlock_stats)")));
        }
        let now = handles::with::<Session, _>(session as usize, Session::stats)?;
        let now = now.counters().map(|(_, count)| count);
        let fields = now.len().min(size / size_of::<u64>());
        // SAFETY: the place has `size` bytes, as the caller promises, and no more are written.
        unsafe { place.cast::<u64>().copy_from_nonoverlapping(now.as_ptr(), fields) };
        Ok(())
    })
}

/// Closes every session of this process, for its end: at most timeout_ms in all (-1: as long as the
/// leases live). Handles stay valid and are freed as ever. It blocks. Any thread, but not in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_UNAVAILABLE (not all was confirmed in time), ETCDLOCK_INVALID or
/// ETCDLOCK_DEADLOCK.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_shutdown(timeout_ms: i64) -> i32 {
    status(|| {
        let limit = limit(timeout_ms)?.unwrap_or(Duration::MAX).min(Duration::from_secs(1 << 31));
        etcdlock::check_may_block()?;
        if etcdlock::shutdown(limit) {
            return Ok(());
        }
        Err(Failure::new(
            ErrorKind::Unavailable,
            format!("not every session was confirmed closed within {limit:?}; leases end by themselves"),
        ))
    })
}

// ---------------------------------------------------------------- mutexes

/// A mutex of this name. Local: nothing is sent. Mutexes of one name exclude each other, in one session
/// or across the world.
///
/// name: 1 to 1,024 bytes of UTF-8, copied. *mutex is the caller's, who frees it with
/// etcdlock_mutex_free, before or after the session. It does not block. Any thread.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID, ETCDLOCK_CLOSED or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_new(
    session: *const etcdlock_session,
    name: *const c_char,
    mutex: *mut *mut etcdlock_mutex,
) -> i32 {
    status(|| {
        let place = out("mutex", mutex)?;
        // SAFETY: NULL or a text, as the caller promises.
        let name = unsafe { text("name", name) }?;
        let new = handles::with::<Session, _>(session as usize, |session| session.mutex(name))??;
        let handle = handles::insert(Object::Mutex(new))?;
        // SAFETY: not NULL, and a place for a pointer, as the caller promises.
        unsafe { place.write(handle as *mut etcdlock_mutex) };
        Ok(())
    })
}

/// Frees a mutex. If it holds the lock, that is released in the background. NULL is fine. It does not
/// block. Any thread, also in a callback; a call that another thread has going on it goes on.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (freed before, or no mutex) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_free(mutex: *mut etcdlock_mutex) -> i32 {
    status(|| if mutex.is_null() { Ok(()) } else { handles::remove::<Mutex>(mutex as usize).map(drop) })
}

/// Waits its turn, through outages and re-elections, until the lock is held, at most timeout_ms: -1 for
/// ever, 0 for one try. After anything but ETCDLOCK_OK nothing is left behind.
///
/// It blocks. Any thread, but not in a callback. A thread that locks again what it holds waits for
/// itself.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_TIMEOUT, ETCDLOCK_UNAVAILABLE (etcd refuses, and waiting does not mend
/// it), ETCDLOCK_DENIED, ETCDLOCK_INVALID, ETCDLOCK_CLOSED, ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or
/// ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_lock(mutex: *mut etcdlock_mutex, timeout_ms: i64) -> i32 {
    status(|| {
        let limit = limit(timeout_ms)?;
        mutex_to_wait_with(mutex)?.lock_and_keep(limit).wait()?;
        Ok(())
    })
}

/// Takes the lock if it is free, and never waits for another holder. A failed try writes nothing.
///
/// It blocks for one answer of etcd, at most 5 s. Any thread, but not in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_BUSY, ETCDLOCK_UNAVAILABLE, ETCDLOCK_DENIED, ETCDLOCK_INVALID,
/// ETCDLOCK_CLOSED, ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_try_lock(mutex: *mut etcdlock_mutex) -> i32 {
    status(|| {
        let mutex = mutex_to_wait_with(mutex)?;
        match mutex.try_lock_and_keep().wait()? {
            Some(_) => Ok(()),
            None => Err(Failure::new(
                ErrorKind::Busy,
                format!("the lock {:?} is taken; etcdlock_session_inspect tells by whom", mutex.name()),
            )),
        }
    })
}

/// Releases the hold that was acquired through this mutex, by any thread, and waits until etcd has
/// confirmed it, at most 5 s.
///
/// It blocks. Any thread, but not in a callback (there: etcdlock_mutex_unlock_start).
///
/// Returns ETCDLOCK_OK, ETCDLOCK_NOT_HELD, ETCDLOCK_LOST (it was lost before), ETCDLOCK_UNAVAILABLE (no
/// answer; released here all the same, and in etcd as soon as it can be reached), ETCDLOCK_INVALID,
/// ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_unlock(mutex: *mut etcdlock_mutex) -> i32 {
    status(|| {
        mutex_to_wait_with(mutex)?.unlock().wait()?;
        Ok(())
    })
}

/// 1 if this mutex holds the lock, as far as can be known here; else 0, also for a handle that is not
/// good. 0 from the deadline on, even if the process was stopped meanwhile. Local, some tens of
/// nanoseconds, does not block. Any thread, also in a callback.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_is_held(mutex: *const etcdlock_mutex) -> i32 {
    value(0, || handles::with::<Mutex, _>(mutex as usize, |mutex| mutex.with_kept(Hold::is_held).map_or(0, i32::from)))
}

/// How many milliseconds the hold is good for without another renewal, rounded down; 0 if there is none,
/// it is lost, or the handle is not good. Renewals go on by themselves. Local, does not block. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_remaining_ms(mutex: *const etcdlock_mutex) -> i64 {
    value(0, || handles::with::<Mutex, _>(mutex as usize, |mutex| milliseconds(mutex.remaining())))
}

/// The fencing token of the hold: larger than that of every earlier hold of this name. It stays after a
/// loss, until unlock. 0 if nothing is held or the handle is not good. Local, does not block. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_token(mutex: *const etcdlock_mutex) -> i64 {
    value(0, || handles::with::<Mutex, _>(mutex as usize, |mutex| mutex.token().unwrap_or(0)))
}

/// Whether the hold still owns the lock, as a status with a message that says why not. Local, does not
/// block. Any thread, also in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_LOST, ETCDLOCK_NOT_HELD, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_check(mutex: *const etcdlock_mutex) -> i32 {
    status(|| {
        let mutex = handles::get::<Mutex>(mutex as usize)?;
        Ok(mutex.with_kept(|hold| hold.check()).ok_or_else(|| not_held(&mutex))??)
    })
}

/// Why the hold was lost: ETCDLOCK_LOSS_NONE while it is not, if there is none, or if the handle is not
/// good; else one of ETCDLOCK_LOSS_…. Local, does not block. Any thread, also in a callback.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_mutex_loss(mutex: *const etcdlock_mutex) -> i32 {
    value(ETCDLOCK_LOSS_NONE, || {
        handles::with::<Mutex, _>(mutex as usize, |mutex| {
            mutex.with_kept(|hold| hold.loss()).flatten().map_or(ETCDLOCK_LOSS_NONE, |loss| loss_code(&loss))
        })
    })
}

/// Has listener called once when the present hold is lost: before etcd could give the lock to another, at
/// once if it is lost already, and never if it is released first. Each hold needs its own call; several
/// listeners are fine.
///
/// user_data must stay valid until listener was called, or the hold was released and
/// etcdlock_flush_callbacks has returned ETCDLOCK_OK. It does not block. Any thread, also in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_NOT_HELD, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_on_lost(
    mutex: *mut etcdlock_mutex,
    listener: etcdlock_lost_fn,
    user_data: *mut c_void,
) -> i32 {
    status(|| {
        let Some(listener) = listener else { return Err(Failure::invalid("the function listener is NULL")) };
        let mutex = handles::get::<Mutex>(mutex as usize)?;
        let (user_data, name) = (UserData(user_data), mutex.name().to_owned());
        let call = move |loss: etcdlock::Loss| {
            remember(&format!("the hold on {name:?} was lost: {loss}; another holder may be at work, so stop"));
            // SAFETY: the caller promised a function that can be called so.
            unsafe { listener(loss_code(&loss), user_data.get()) };
        };
        mutex.with_kept(|hold| hold.on_lost(call)).ok_or_else(|| not_held(&mutex))
    })
}

// ---------------------------------------------------------------- guarded requests

fn guarded<T: Send + 'static>(mutex: *mut etcdlock_mutex, start: impl FnOnce(&Hold) -> Pending<T>) -> Outcome<T> {
    let mutex = mutex_to_wait_with(mutex)?;
    let pending = mutex.with_kept(start).ok_or_else(|| not_held(&mutex))?;
    Ok(pending.wait()?)
}

/// Writes a key in etcd only if this mutex still holds the lock, atomically there. The key is used as
/// given, without the session's namespace. Both are copied; a value may be empty, a key not.
///
/// It blocks, at most 5 s. Any thread, but not in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_LOST (nothing was written, unless the message says that an earlier copy
/// of the request may have been), ETCDLOCK_NOT_HELD, ETCDLOCK_UNAVAILABLE (it may or may not have been
/// written), ETCDLOCK_DENIED, ETCDLOCK_INVALID, ETCDLOCK_FORKED, ETCDLOCK_DEADLOCK or ETCDLOCK_INTERNAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_put(
    mutex: *mut etcdlock_mutex,
    key: *const c_void,
    key_len: usize,
    value: *const c_void,
    value_len: usize,
) -> i32 {
    status(|| {
        // SAFETY: as long as the caller says.
        let (key, value) = unsafe { (bytes("key", key, key_len)?, bytes("value", value, value_len)?) };
        guarded(mutex, |hold| hold.put(key, value))
    })
}

/// Reads a key only if this mutex still holds the lock. *length becomes the length of the value, or -1 if
/// there is no such key. The value is copied to buffer if it fits in capacity bytes; else buffer is left
/// alone, and a second call with length bytes gets it. buffer may be NULL if capacity is 0.
///
/// It blocks, at most 5 s. Any thread, but not in a callback.
///
/// Returns as etcdlock_mutex_put.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_get(
    mutex: *mut etcdlock_mutex,
    key: *const c_void,
    key_len: usize,
    buffer: *mut c_void,
    capacity: usize,
    length: *mut i64,
) -> i32 {
    status(|| {
        let place = out("length", length)?;
        if buffer.is_null() && capacity > 0 {
            return Err(Failure::invalid(format!("the buffer is NULL, but its capacity is {capacity}")));
        }
        // SAFETY: as long as the caller says.
        let key = unsafe { bytes("key", key, key_len) }?;
        let value = guarded(mutex, |hold| hold.get(key))?;
        let length = value.as_ref().map_or(-1, |value| i64::try_from(value.len()).unwrap_or(i64::MAX));
        if let Some(value) = value.filter(|value| !value.is_empty() && value.len() <= capacity) {
            // SAFETY: the buffer has room for `capacity` bytes, as the caller promises.
            unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(value.as_ptr(), value.len()) };
        }
        // SAFETY: not NULL, and a place for a number, as the caller promises.
        unsafe { place.write(length) };
        Ok(())
    })
}

/// Deletes a key only if this mutex still holds the lock. A key that is not there is fine.
///
/// It blocks, at most 5 s. Any thread, but not in a callback.
///
/// Returns as etcdlock_mutex_put.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_delete(mutex: *mut etcdlock_mutex, key: *const c_void, key_len: usize) -> i32 {
    status(|| {
        // SAFETY: as long as the caller says.
        let key = unsafe { bytes("key", key, key_len) }?;
        guarded(mutex, |hold| hold.delete(key))
    })
}

// ---------------------------------------------------------------- calls that report to a callback

/// Starts a call that reports to `done`. `op` is written before the callback can run, so that the
/// callback may use it.
unsafe fn start<T: Send + 'static>(
    mutex: *mut etcdlock_mutex,
    done: etcdlock_done_fn,
    user_data: *mut c_void,
    op: *mut *mut etcdlock_op,
    call: impl FnOnce(&Mutex) -> Pending<T>,
    token: impl FnOnce(T) -> i64 + Send + 'static,
) -> Outcome<()> {
    let Some(done) = done else { return Err(Failure::invalid("the function done is NULL")) };
    let mutex = handles::get::<Mutex>(mutex as usize)?;
    let canceller = Arc::new(OnceLock::<Canceller>::new());
    if !op.is_null() {
        let handle = handles::insert(Object::Op(canceller.clone()))?;
        // SAFETY: not NULL, and a place for a pointer, as the caller promises.
        unsafe { op.write(handle as *mut etcdlock_op) };
    }
    let user_data = UserData(user_data);
    let can_cancel = call(&mutex).on_done(move |result| {
        let (status, token) = match result {
            Ok(it) => (ETCDLOCK_OK, token(it)),
            Err(error) => {
                remember(error.message());
                (error.kind().code(), 0)
            }
        };
        // SAFETY: the caller promised a function that can be called so.
        unsafe { done(status, token, user_data.get()) };
    });
    let _ = canceller.set(can_cancel);
    Ok(())
}

/// Starts an etcdlock_mutex_lock and returns. done is called exactly once, on the notify thread and maybe
/// before this returns, with the status that etcdlock_mutex_lock would return, or ETCDLOCK_CANCELLED. If
/// this returns anything but ETCDLOCK_OK, done is never called.
///
/// op: NULL, or where to put a handle for etcdlock_op_cancel; the caller frees it with etcdlock_op_free,
/// at any time. user_data must stay valid until done was called. It does not block. Any thread, also in
/// a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_lock_start(
    mutex: *mut etcdlock_mutex,
    timeout_ms: i64,
    done: etcdlock_done_fn,
    user_data: *mut c_void,
    op: *mut *mut etcdlock_op,
) -> i32 {
    status(|| {
        let limit = limit(timeout_ms)?;
        // SAFETY: as the caller promises.
        unsafe { start(mutex, done, user_data, op, |mutex| mutex.lock_and_keep(limit), |token| token) }
    })
}

/// Starts an etcdlock_mutex_unlock and returns. The release is on its way when this returns; cancelling it
/// only ends the wait for the confirmation. All else as with etcdlock_mutex_lock_start.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID or ETCDLOCK_FORKED; whether anything was held is told to done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn etcdlock_mutex_unlock_start(
    mutex: *mut etcdlock_mutex,
    done: etcdlock_done_fn,
    user_data: *mut c_void,
    op: *mut *mut etcdlock_op,
) -> i32 {
    // SAFETY: as the caller promises.
    status(|| unsafe { start(mutex, done, user_data, op, Mutex::unlock, |()| 0) })
}

/// Cancels a started call. done is still called exactly once: with ETCDLOCK_CANCELLED and nothing left
/// behind, or with the result if that was faster. Cancelling again, or too late, is fine. It never blocks.
/// Any thread, also in a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_op_cancel(op: *mut etcdlock_op) -> i32 {
    status(|| {
        let canceller = handles::get::<Arc<OnceLock<Canceller>>>(op as usize)?;
        if let Some(canceller) = canceller.get() {
            canceller.cancel();
        }
        Ok(())
    })
}

/// Frees the handle of a started call, which goes on. NULL is fine. It never blocks. Any thread, also in
/// a callback.
///
/// Returns ETCDLOCK_OK, ETCDLOCK_INVALID (freed before, or no op) or ETCDLOCK_FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn etcdlock_op_free(op: *mut etcdlock_op) -> i32 {
    status(|| if op.is_null() { Ok(()) } else { handles::remove::<Arc<OnceLock<Canceller>>>(op as usize).map(drop) })
}
