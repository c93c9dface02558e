//! What the library tells `tracing`, by the names that logs and alarms rely on. A process of its own,
//! because a process has one subscriber.

#![allow(clippy::unwrap_used)]

mod outside;

use std::fmt::Write;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use etcdlock::blocking::Session;
use etcdlock::{Loss, Options};
use etcdlock_rig::Etcd;
use outside::{LONG, Outside, losses};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Listener;

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }
}

fn tell(metadata: &Metadata<'_>, text: Text) {
    let kind = if metadata.is_span() { "span" } else { "event" };
    let line = format!("{kind} {} {}{}", metadata.level(), metadata.target(), text.0);
    TOLD.lock().unwrap_or_else(PoisonError::into_inner).push(line);
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("etcdlock::")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut text = Text::default();
        span.record(&mut text);
        tell(span.metadata(), text);
        Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        tell(event.metadata(), text);
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Listener).unwrap());
}

fn until_told(parts: &[&str]) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let told = TOLD.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if told.iter().any(|line| parts.iter().all(|part| line.contains(part))) {
            return;
        }
        assert!(Instant::now() < end, "never told: {parts:?}; told: {told:#?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn acquire_grant_loss_and_renewal_are_told_by_name() {
    listen();
    let options = Options::default().ttl(Duration::from_secs(2)).max_hold(Duration::from_secs(1));
    let session = Session::connect("memory:events", options).unwrap();
    let hold = session.mutex("told").unwrap().lock().unwrap();
    until_told(&["span DEBUG etcdlock::acquire", "name=\"told\"", "only_try=false"]);
    until_told(&["event DEBUG etcdlock::grant", "name=\"told\"", &format!("token={}", hold.token())]);
    until_told(&["event DEBUG etcdlock::renewal", "renewed", "late_ms=", "took_ms="]);
    until_told(&["event WARN etcdlock::loss", "name=\"told\"", "reason="]);
}

/// While etcd stands still behind its proxy a watch is wished for, and others could come to stand behind that wish.
#[test]
fn row_43_a_wish_that_the_proxy_does_not_answer_is_made_again_on_another_stream() {
    listen();
    let etcd = Etcd::start();
    let outside = Outside::of(&etcd);
    let proxy = etcd.grpc_proxy();
    let session = Session::connect(proxy.endpoint(), Options::default().ttl(Duration::from_secs(600))).unwrap();
    let mutex = session.mutex("row43").unwrap();
    // From now on it is known for a proxy.
    let first = mutex.lock().unwrap();
    let lost = losses(&first);
    std::thread::sleep(Duration::from_millis(500));
    outside.delete_all("row43/");
    assert_eq!(lost.recv_timeout(LONG), Ok(Loss::KeyDeleted));
    drop(first);
    let second = mutex.lock().unwrap();
    let lost = losses(&second);
    etcd.stop();
    until_told(&["event DEBUG etcdlock::failover", "the proxy does not answer the wish for a watch"]);
    etcd.cont();
    std::thread::sleep(Duration::from_secs(1));
    outside.delete_all("row43/");
    assert_eq!(lost.recv_timeout(LONG), Ok(Loss::KeyDeleted));
}
