//! What the library has to say, for bindings whose languages have loggers of their own. In Rust it
//! is all in `tracing`, and none of this is used.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tracing::field::{Field, Visit};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber, span};

use crate::error::{Error, Result};
use crate::runtime::Env;

/// Lines on their way to a slow listener; more are dropped and counted.
const MOST_WAITING: usize = 1024;

type Listener = dyn Fn(u8, &str, &str) + Send + Sync;

static LEVEL: AtomicU8 = AtomicU8::new(0);
static SINK: RwLock<Option<Arc<Sink>>> = RwLock::new(None);

struct Sink {
    listener: Box<Listener>,
    waiting: AtomicUsize,
    dropped: AtomicUsize,
}

/// For bindings: gives every log line of at most this level (1 error, 2 warning, 3 information,
/// 4 debug, 5 trace) to the listener as level, target and text, on the notify thread. Level 0 ends
/// it. The last call counts. It works only where this library is the one to use `tracing`.
#[doc(hidden)]
pub fn log_to(level: u8, listener: impl Fn(u8, &str, &str) + Send + Sync + 'static) -> Result<()> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    if level > 5 {
        return Err(Error::invalid(format!("log level {level} is not 0 (off) to 5 (trace)")));
    }
    if !*INSTALLED.get_or_init(|| tracing::subscriber::set_global_default(Forwarder).is_ok()) {
        return Err(Error::invalid("this program has a tracing subscriber already, which gets the log lines"));
    }
    let sink = Sink { listener: Box::new(listener), waiting: AtomicUsize::new(0), dropped: AtomicUsize::new(0) };
    let replaced = SINK.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(sink));
    drop(replaced);
    set_log_level(level);
    Ok(())
}

/// For bindings: another level for the listener that is there.
#[doc(hidden)]
pub fn set_log_level(level: u8) {
    LEVEL.store(level, Ordering::Relaxed);
}

struct Forwarder;

impl Subscriber for Forwarder {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // The level can change at any time, so it is asked for each line of ours.
        if is_ours(metadata) { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_ours(metadata) && number(metadata.level()) <= LEVEL.load(Ordering::Relaxed)
    }

    fn event(&self, event: &Event<'_>) {
        // Never waits: this is the io thread, and a fork may have come while the lock was taken.
        let sink = match SINK.try_read() {
            Ok(sink) => sink.clone(),
            Err(_) => None,
        };
        let (Some(sink), Ok(env)) = (sink, Env::of_process()) else { return };
        if sink.waiting.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            sink.waiting.fetch_sub(1, Ordering::Relaxed);
            sink.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let (level, target) = (number(event.metadata().level()), event.metadata().target().to_owned());
        env.call_back(move || {
            sink.waiting.fetch_sub(1, Ordering::Relaxed);
            let dropped = sink.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                (sink.listener)(2, "etcdlock", &format!("{dropped} log lines were dropped: the listener is too slow"));
            }
            if level <= LEVEL.load(Ordering::Relaxed) {
                (sink.listener)(level, &target, &text.0);
            }
        });
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && (metadata.target() == "etcdlock" || metadata.target().starts_with("etcdlock::"))
}

fn number(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        _ => 5,
    }
}

/// `message, field=value, field=value`.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let rest = std::mem::take(&mut self.0);
            let _ = write!(self.0, "{value:?}");
            self.0.push_str(if rest.is_empty() { "" } else { ", " });
            self.0.push_str(&rest);
        } else {
            let comma = if self.0.is_empty() { "" } else { ", " };
            let _ = write!(self.0, "{comma}{}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    // One test, because the process has one place for lines to go.
    #[test]
    fn lines_of_the_level_reach_the_listener_and_a_slow_one_is_told_what_it_missed() {
        let (tx, rx) = mpsc::channel();
        log_to(3, move |level, target, text| tx.send((level, target.to_owned(), text.to_owned())).unwrap()).unwrap();
        tracing::debug!(target: "etcdlock::test", "too fine");
        tracing::warn!(target: "somebody::else", "not ours");
        tracing::warn!(target: "etcdlock::test", name = "a", token = 7, "hold lost");
        assert_eq!(rx.recv().unwrap(), (2, "etcdlock::test".into(), "hold lost, name=\"a\", token=7".into()));

        let (open, gate) = mpsc::channel::<()>();
        let (tx, rx) = mpsc::channel();
        let gate = std::sync::Mutex::new(gate);
        log_to(5, move |_, _, text| {
            let _ = gate.lock().unwrap().recv();
            let _ = tx.send(text.to_owned());
        })
        .unwrap();
        // More than can wait while the listener is busy with the first, which may be out already.
        for n in 0..MOST_WAITING + 100 {
            tracing::error!(target: "etcdlock::test", n);
        }
        drop(open);
        let lines: Vec<String> = std::iter::from_fn(|| rx.recv().ok()).take(MOST_WAITING).collect();
        assert!(lines.iter().any(|line| line.contains("lines were dropped")), "{lines:?}");
        log_to(0, |_, _, _| {}).unwrap();
        assert!(log_to(6, |_, _, _| {}).is_err());
    }
}
