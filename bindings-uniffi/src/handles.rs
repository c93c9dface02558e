//! Sessions, mutexes and holds, as the layers over this see them. Times are in seconds.

use std::sync::Arc;

use etcdlock::{Hold, Mutex, Options, Session, Target};

use crate::call::{Call, Outcome};
use crate::events::report_loss;
use crate::{Failure, seconds};

type Result<T> = std::result::Result<T, Failure>;

#[derive(uniffi::Enum)]
pub enum Language {
    Jvm,
    Ruby,
}

#[derive(uniffi::Record)]
pub struct ConnectOptions {
    pub language: Language,
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

impl ConnectOptions {
    fn into_options(self) -> Result<Options> {
        let language = match self.language {
            Language::Jvm => "jvm",
            Language::Ruby => "ruby",
        };
        let mut options = Options::default().language(language);
        macro_rules! set {
            ($($name:ident),*) => { $(if let Some(value) = self.$name { options = options.$name(value); })* };
        }
        set!(namespace, user, password, ca, cert, key, server_name, owner);
        if let Some(ttl) = self.ttl {
            options = options.ttl(seconds("ttl", ttl)?);
        }
        if let Some(limit) = self.connect_timeout {
            options = options.connect_timeout(seconds("connect_timeout", limit)?);
        }
        if let Some(limit) = self.max_hold {
            options = options.max_hold(seconds("max_hold", limit)?);
        }
        Ok(options)
    }
}

/// Starts to connect. No target: the one of the environment.
#[uniffi::export]
fn connect(target: Option<Vec<String>>, options: ConnectOptions) -> Result<Arc<Call>> {
    let target = target.map_or_else(Target::from_env, Target::from);
    Ok(Call::start(Session::connect(target, options.into_options()?), |session| Outcome::Session {
        session: Arc::new(NativeSession { session }),
    }))
}

#[derive(uniffi::Record)]
pub struct Contender {
    pub is_holder: bool,
    pub owner: String,
    pub host: String,
    pub pid: u32,
    pub language: String,
    pub token: i64,
    pub age: Option<f64>,
    pub key: String,
}

impl From<etcdlock::Contender> for Contender {
    fn from(c: etcdlock::Contender) -> Self {
        Contender {
            is_holder: c.is_holder,
            owner: c.owner,
            host: c.host,
            pid: c.pid,
            language: c.language,
            token: c.token,
            age: c.age.map(|age| age.as_secs_f64()),
            key: c.key,
        }
    }
}

#[derive(uniffi::Record)]
pub struct Stats {
    pub locks: i64,
    pub waits: i64,
    pub hand_overs: i64,
    pub live_tickets: i64,
    pub holds_lost: i64,
    pub lost_deadline: i64,
    pub lost_lease_gone: i64,
    pub lost_key_deleted: i64,
    pub lost_refused: i64,
    pub lost_max_hold: i64,
    pub lost_closed: i64,
    pub leases_lost: i64,
    pub renewals: i64,
    pub requests: i64,
    pub watch_events: i64,
    pub reconnections: i64,
}

#[derive(uniffi::Object)]
pub struct NativeSession {
    session: Session,
}

#[uniffi::export]
impl NativeSession {
    fn mutex(&self, name: &str) -> Result<Arc<NativeMutex>> {
        Ok(Arc::new(NativeMutex { mutex: self.session.mutex(name)? }))
    }

    fn contenders(&self, name: &str) -> Arc<Call> {
        Call::start(self.session.inspect(name), |all| Outcome::Contenders {
            contenders: all.into_iter().map(Contender::from).collect(),
        })
    }

    fn ttl(&self) -> f64 {
        self.session.ttl().as_secs_f64()
    }

    fn lease_id(&self) -> Option<i64> {
        self.session.lease_id()
    }

    fn stats(&self) -> Stats {
        let stats = self.session.stats();
        Stats {
            locks: stats.locks as i64,
            waits: stats.waits as i64,
            hand_overs: stats.hand_overs as i64,
            live_tickets: stats.live_tickets as i64,
            holds_lost: stats.holds_lost as i64,
            lost_deadline: stats.lost_deadline as i64,
            lost_lease_gone: stats.lost_lease_gone as i64,
            lost_key_deleted: stats.lost_key_deleted as i64,
            lost_refused: stats.lost_refused as i64,
            lost_max_hold: stats.lost_max_hold as i64,
            lost_closed: stats.lost_closed as i64,
            leases_lost: stats.leases_lost as i64,
            renewals: stats.renewals as i64,
            requests: stats.requests as i64,
            watch_events: stats.watch_events as i64,
            reconnections: stats.reconnections as i64,
        }
    }

    fn close(&self, limit: f64) -> Result<Arc<Call>> {
        Ok(Call::start(self.session.close(seconds("timeout", limit)?), |()| Outcome::Nothing))
    }

    fn text(&self) -> String {
        format!("{:?}", self.session)
    }
}

#[derive(uniffi::Object)]
pub struct NativeMutex {
    mutex: Mutex,
}

fn hold(mutex: &Mutex, hold: Hold) -> Outcome {
    let (token, hold) = (hold.token(), Arc::new(NativeHold { hold, _mutex: mutex.clone() }));
    Outcome::Hold { token, address: hold.address(), hold }
}

#[uniffi::export]
impl NativeMutex {
    /// With the session's namespace.
    fn name(&self) -> String {
        self.mutex.name().into()
    }

    /// No limit: for ever.
    fn lock(&self, limit: Option<f64>) -> Result<Arc<Call>> {
        let pending = match limit {
            None => self.mutex.lock(),
            Some(limit) => self.mutex.lock_timeout(seconds("timeout", limit)?),
        };
        let mutex = self.mutex.clone();
        Ok(Call::start(pending, move |held| hold(&mutex, held)))
    }

    fn try_lock(&self) -> Arc<Call> {
        let mutex = self.mutex.clone();
        Call::start(self.mutex.try_lock(), move |held| held.map_or(Outcome::Nothing, |held| hold(&mutex, held)))
    }

    fn unlock(&self) -> Arc<Call> {
        Call::start(self.mutex.unlock(), |()| Outcome::Nothing)
    }
}

#[derive(uniffi::Object)]
pub struct NativeHold {
    hold: Hold,
    /// A hold keeps its session open, though nobody may hold on to the session or the mutex.
    _mutex: Mutex,
}

#[uniffi::export]
impl NativeHold {
    pub fn is_held(&self) -> bool {
        self.hold.is_held()
    }

    fn remaining(&self) -> f64 {
        self.hold.remaining().as_secs_f64()
    }

    fn check(&self) -> Result<()> {
        Ok(self.hold.check()?)
    }

    fn loss(&self) -> Option<String> {
        self.hold.loss().map(|loss| loss.to_string())
    }

    /// Puts the loss into the inbox under this number, if it ever comes.
    fn report_loss(&self, id: u64) {
        report_loss(&self.hold, id);
    }

    fn unlock(&self) -> Arc<Call> {
        Call::start(self.hold.unlock_in_place(), |()| Outcome::Nothing)
    }

    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> Arc<Call> {
        Call::start(self.hold.put(key, value), |()| Outcome::Nothing)
    }

    fn get(&self, key: Vec<u8>) -> Arc<Call> {
        Call::start(self.hold.get(key), |value| value.map_or(Outcome::Nothing, |bytes| Outcome::Bytes { bytes }))
    }

    fn delete(&self, key: Vec<u8>) -> Arc<Call> {
        Call::start(self.hold.delete(key), |()| Outcome::Nothing)
    }
}

impl NativeHold {
    /// For the quick way to ask whether it is held. Good as long as the object.
    fn address(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }
}

impl Drop for NativeHold {
    fn drop(&mut self) {
        if self.hold.is_held() {
            tracing::warn!(
                target: "etcdlock::forgotten",
                name = self.hold.name(),
                token = self.hold.token(),
                "a hold was garbage-collected without unlock() and is released now; keep it until you unlock it",
            );
        }
    }
}
