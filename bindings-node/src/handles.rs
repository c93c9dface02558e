//! The classes that `index.js` wraps. A call that takes time gets a number, and its result comes
//! with that number by post.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use etcdlock::{Hold, Mutex, Options, Session};
use napi::bindgen_prelude::{BigInt, Buffer, Either, Either4, Function, Uint8Array};
use napi::{Env, Result};
use napi_derive::napi;

use crate::held::Place;
use crate::post::{Outcome, Post};

type Value = Either4<NativeSession, NativeHold, Buffer, Vec<Contender>>;

/// A result from the post.
#[napi(object, object_from_js = false)]
pub struct Arrival {
    pub id: u32,
    pub error: Option<Failure>,
    pub value: Option<Value>,
}

#[napi(object, object_from_js = false)]
pub struct Failure {
    pub code: String,
    pub message: String,
}

#[napi(object, object_from_js = false)]
pub struct Contender {
    pub is_holder: bool,
    pub owner: String,
    pub host: String,
    pub pid: u32,
    pub language: String,
    pub token: BigInt,
    /// Milliseconds.
    pub age: Option<f64>,
    pub key: String,
}

#[napi(object, object_from_js = false)]
pub struct Stats {
    pub locks: f64,
    pub waits: f64,
    pub hand_overs: f64,
    pub live_tickets: f64,
    pub holds_lost: f64,
    pub lost_deadline: f64,
    pub lost_lease_gone: f64,
    pub lost_key_deleted: f64,
    pub lost_refused: f64,
    pub lost_max_hold: f64,
    pub lost_closed: f64,
    pub leases_lost: f64,
    pub renewals: f64,
    pub requests: f64,
    pub watch_events: f64,
    pub reconnections: f64,
}

/// TTL in seconds, all else in milliseconds; `index.js` has checked the types.
#[napi(object, object_to_js = false)]
pub struct ConnectOptions {
    pub ttl: Option<f64>,
    pub namespace: Option<String>,
    pub user: Option<String>,
    pub password: Option<String>,
    pub ca: Option<String>,
    pub cert: Option<String>,
    pub key: Option<String>,
    pub server_name: Option<String>,
    pub owner: Option<String>,
    pub connect_timeout: Option<f64>,
    pub max_hold: Option<f64>,
}

fn failure(error: &etcdlock::Error) -> Failure {
    Failure { code: format!("ETCDLOCK_{}", error.kind().name()), message: error.message().to_owned() }
}

/// What lies beyond any clock's range counts as for ever.
fn milliseconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms.max(0.0) / 1000.0).unwrap_or(Duration::MAX).min(FOR_EVER)
}

/// A century.
const FOR_EVER: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);

impl ConnectOptions {
    fn into_options(self) -> Options {
        let mut options = Options::default().language("node");
        macro_rules! set {
            ($($name:ident),*) => { $(if let Some(value) = self.$name { options = options.$name(value); })* };
        }
        set!(namespace, user, password, ca, cert, key, server_name, owner);
        if let Some(seconds) = self.ttl {
            options = options.ttl(milliseconds(seconds * 1000.0));
        }
        if let Some(ms) = self.connect_timeout {
            options = options.connect_timeout(milliseconds(ms));
        }
        if let Some(ms) = self.max_hold {
            options = options.max_hold(milliseconds(ms));
        }
        options
    }
}

/// The post box of one environment.
#[napi]
pub struct PostBox {
    post: Arc<Post>,
}

#[napi]
impl PostBox {
    /// `ring` is called when there is something to take.
    #[napi(constructor)]
    pub fn new(env: Env, ring: Function<(), ()>) -> Result<Self> {
        Ok(PostBox { post: Post::open(env, &ring)? })
    }

    #[napi]
    pub fn take(&self) -> Vec<Arrival> {
        let arrivals = self.post.take().into_iter().map(|(id, outcome)| {
            let (mut error, mut value) = (None, None);
            match outcome {
                Outcome::Error(why) => error = Some(failure(&why)),
                Outcome::Nothing => {}
                Outcome::Session(session) => value = Some(Either4::A(NativeSession { post: self.post.clone(), session })),
                Outcome::Hold(hold) => value = Some(Either4::B(NativeHold::new(self.post.clone(), hold))),
                Outcome::Bytes(bytes) => value = Some(Either4::C(bytes.into())),
                Outcome::Contenders(all) => value = Some(Either4::D(all.into_iter().map(Contender::from).collect())),
            }
            Arrival { id, error, value }
        });
        arrivals.collect()
    }

    #[napi]
    pub fn keep_alive(&self, env: Env, yes: bool) {
        self.post.keep_alive(env, yes);
    }

    #[napi]
    pub fn cancel(&self, id: u32) {
        self.post.cancel(id);
    }

    /// Cancels everything, for the end of the process.
    #[napi]
    pub fn close(&self) {
        self.post.close();
    }

    #[napi]
    pub fn connect(&self, id: u32, target: Vec<String>, options: ConnectOptions) {
        self.post.expect(id, Session::connect(target, options.into_options()), Outcome::Session);
    }
}

impl From<etcdlock::Contender> for Contender {
    fn from(c: etcdlock::Contender) -> Self {
        Contender {
            is_holder: c.is_holder,
            owner: c.owner,
            host: c.host,
            pid: c.pid,
            language: c.language,
            token: BigInt::from(c.token),
            age: c.age.map(|age| age.as_secs_f64() * 1000.0),
            key: c.key,
        }
    }
}

#[napi]
pub struct NativeSession {
    post: Arc<Post>,
    session: Session,
}

#[napi]
impl NativeSession {
    /// The mutex, or why there is none.
    #[napi]
    pub fn mutex(&self, name: String) -> Either<NativeMutex, Failure> {
        match self.session.mutex(&name) {
            Ok(mutex) => Either::A(NativeMutex { post: self.post.clone(), mutex }),
            Err(error) => Either::B(failure(&error)),
        }
    }

    #[napi]
    pub fn inspect(&self, id: u32, name: String) {
        self.post.expect(id, self.session.inspect(&name), Outcome::Contenders);
    }

    /// Seconds.
    #[napi]
    pub fn ttl(&self) -> f64 {
        self.session.ttl().as_secs_f64()
    }

    #[napi]
    pub fn lease_id(&self) -> Option<BigInt> {
        self.session.lease_id().map(BigInt::from)
    }

    #[napi]
    pub fn stats(&self) -> Stats {
        let stats = self.session.stats();
        Stats {
            locks: stats.locks as f64,
            waits: stats.waits as f64,
            hand_overs: stats.hand_overs as f64,
            live_tickets: stats.live_tickets as f64,
            holds_lost: stats.holds_lost as f64,
            lost_deadline: stats.lost_deadline as f64,
            lost_lease_gone: stats.lost_lease_gone as f64,
            lost_key_deleted: stats.lost_key_deleted as f64,
            lost_refused: stats.lost_refused as f64,
            lost_max_hold: stats.lost_max_hold as f64,
            lost_closed: stats.lost_closed as f64,
            leases_lost: stats.leases_lost as f64,
            renewals: stats.renewals as f64,
            requests: stats.requests as f64,
            watch_events: stats.watch_events as f64,
            reconnections: stats.reconnections as f64,
        }
    }

    #[napi]
    pub fn close(&self, id: u32, limit_ms: f64) {
        self.post.expect(id, self.session.close(milliseconds(limit_ms)), |()| Outcome::Nothing);
    }
}

#[napi]
pub struct NativeMutex {
    post: Arc<Post>,
    mutex: Mutex,
}

#[napi]
impl NativeMutex {
    /// With the session's namespace.
    #[napi]
    pub fn name(&self) -> String {
        self.mutex.name().to_owned()
    }

    #[napi]
    pub fn lock(&self, id: u32, timeout_ms: Option<f64>) {
        let call = match timeout_ms {
            Some(ms) => self.mutex.lock_timeout(milliseconds(ms)),
            None => self.mutex.lock(),
        };
        self.post.expect(id, call, Outcome::Hold);
    }

    #[napi]
    pub fn try_lock(&self, id: u32) {
        self.post.expect(id, self.mutex.try_lock(), |hold| hold.map_or(Outcome::Nothing, Outcome::Hold));
    }

    #[napi]
    pub fn unlock(&self, id: u32) {
        self.post.expect(id, self.mutex.unlock(), |()| Outcome::Nothing);
    }
}

#[napi]
pub struct NativeHold {
    post: Arc<Post>,
    hold: Rc<Hold>,
    place: Place,
}

impl NativeHold {
    fn new(post: Arc<Post>, hold: Hold) -> Self {
        let hold = Rc::new(hold);
        NativeHold { post, place: Place::of(hold.clone()), hold }
    }
}

#[napi]
impl NativeHold {
    #[napi]
    pub fn token(&self) -> BigInt {
        self.hold.token().into()
    }

    /// For `isHeld(place)`.
    #[napi]
    pub fn place(&self) -> u32 {
        self.place.0
    }

    /// Milliseconds.
    #[napi]
    pub fn remaining(&self) -> f64 {
        self.hold.remaining().as_secs_f64() * 1000.0
    }

    /// What is wrong with the hold, if anything.
    #[napi]
    pub fn check(&self) -> Option<Failure> {
        self.hold.check().err().as_ref().map(failure)
    }

    /// Puts the loss into the post as an error, if it ever comes.
    #[napi]
    pub fn on_lost(&self, id: u32) {
        let post = self.post.clone();
        self.hold.on_lost_error(move |error| post.put(id, Outcome::Error(error)));
    }

    #[napi]
    pub fn unlock(&self, id: u32) {
        self.post.expect(id, self.hold.unlock_in_place(), |()| Outcome::Nothing);
    }

    #[napi]
    pub fn put(&self, id: u32, key: Uint8Array, value: Uint8Array) {
        self.post.expect(id, self.hold.put(&*key, &*value), |()| Outcome::Nothing);
    }

    #[napi]
    pub fn get(&self, id: u32, key: Uint8Array) {
        self.post.expect(id, self.hold.get(&*key), |value| value.map_or(Outcome::Nothing, Outcome::Bytes));
    }

    #[napi]
    pub fn delete(&self, id: u32, key: Uint8Array) {
        self.post.expect(id, self.hold.delete(&*key), |()| Outcome::Nothing);
    }
}

/// Closes every session of the process, for its end. Returns whether all confirmed it.
#[napi]
pub(crate) fn shutdown(limit_ms: f64) -> bool {
    etcdlock::shutdown(milliseconds(limit_ms))
}
