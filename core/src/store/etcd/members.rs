//! One client per etcd member, and which of them to ask.
//!
//! A balancer has no idea of a silent member, so every request here goes to one member within a time
//! limit, and a member that fails is set aside for a while.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use tower::ServiceExt;

use super::api::{Channel, Client, Header};
use super::history::{Headed, History, Known, Odd};
use super::transport;
use crate::announced::Announced;
use crate::options::{Connection, Pems};
use crate::runtime::Env;
use crate::stats::{Counter, Traffic};
use crate::store::{Reply, Trouble};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const LIMIT_WITH_OTHERS_TO_ASK: Duration = Duration::from_millis(800);
const LIMIT_ALONE: Duration = Duration::from_secs(2);
const ASIDE_AT_FIRST: Duration = Duration::from_millis(250);
/// For a member that says nothing, which costs a whole time limit to find out again. One that
/// refuses at once, as all do while they elect a leader, may be asked again soon.
const ASIDE_AT_MOST: Duration = Duration::from_secs(5);
/// How many times a renewal is sent, to one member after the other, in the time limit of one.
const ASKED_IN_A_LIMIT: u32 = 4;
/// How long the first lease waits for the word of the other members, to which cluster they belong.
const COMPARE_LIMIT: Duration = Duration::from_millis(200);
/// etcd closes connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);

/// What a request is for. Watches go to another member than the queue and the renewals: a leader
/// that was cut off may go on answering renewals (before etcd 3.4.31 and 3.5.13).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Queue,
    Watch,
}

pub(super) struct Members {
    members: Vec<Member>,
    /// The member that the queue's requests go to while it answers.
    preferred: AtomicUsize,
    history: History,
    /// How many have not named their cluster yet; `None` until they are asked.
    to_name_their_cluster: Announced<Option<usize>>,
    connection: Connection,
    requests: Counter,
    watch_events: Counter,
    reconnections: Arc<Counter>,
    env: Env,
}

struct Member {
    url: String,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
    was_connected: Arc<AtomicBool>,
    /// It is etcd's gRPC proxy, which numbers watches itself.
    is_proxy: AtomicBool,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// Requests without an answer since the last one with an answer.
    silences: u32,
    /// TLS failed over its certificate or ours.
    refuses_certificate: bool,
    aside_until: Duration,
}

impl Members {
    pub(super) fn new(urls: &[String], connection: &Connection, env: Env) -> Self {
        let members = urls.iter().map(|url| Member {
            url: url.clone(),
            client: Default::default(),
            was_connected: Arc::default(),
            is_proxy: AtomicBool::default(),
            health: Default::default(),
        });
        let members: Vec<_> = members.collect();
        let preferred = AtomicUsize::new(fastrand::usize(..members.len()));
        Members {
            history: History::new(members.len()),
            to_name_their_cluster: Announced::new(None),
            members,
            preferred,
            connection: connection.clone(),
            requests: Counter::default(),
            watch_events: Counter::default(),
            reconnections: Arc::default(),
            env,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.members.len()
    }

    pub(super) fn request_limit(&self) -> Duration {
        if self.members.len() > 1 { LIMIT_WITH_OTHERS_TO_ASK } else { LIMIT_ALONE }
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic { requests: self.requests.get(), watch_events: self.watch_events.get(), reconnections: self.reconnections.get() }
    }

    pub(super) fn count_request(&self) {
        self.requests.add();
    }

    pub(super) fn count_event(&self) {
        self.watch_events.add();
    }

    pub(super) fn count_reconnection(&self) {
        self.reconnections.add();
    }

    pub(super) fn note_proxy(&self, member: usize) {
        self.members[member].is_proxy.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_proxy(&self, member: usize) -> bool {
        self.members[member].is_proxy.load(Ordering::Relaxed)
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// Looks whether an answer is of the cluster and the history that we know. `known` for a linearizable one.
    pub(super) fn check(&self, member: usize, header: Option<&Header>, known: Option<Known>) -> Result<(), Trouble> {
        let Some(header) = header else { return Ok(()) };
        let url = &self.members[member].url;
        self.history.check(member, header, known).map_err(|odd| match odd {
            Odd::Stranger(id, cluster) => {
                let why = format!("{url} belongs to cluster {id:x}, and the other endpoints to {cluster:x}");
                self.set_aside(member, true, &why);
                Trouble::Unavailable(why)
            }
            Odd::Changed(why) => {
                tracing::warn!(target: "etcdlock::failover", endpoint = url, why, "etcd's history is another now; all holds are lost");
                Trouble::Unavailable(format!("{url}: etcd's history is another now: {why}"))
            }
            Odd::Late => Trouble::Unavailable(format!("{url}: asked before etcd's history changed")),
        })
    }

    /// Asks each member to which cluster it belongs, once, beside whatever else is done. Whether answers are still to come.
    pub(super) fn begin_to_compare(self: &Arc<Self>) -> bool {
        let mut to_come = self.to_name_their_cluster.now();
        if self.members.len() == 1 || to_come.is_some() {
            return to_come.is_some_and(|to_come| to_come > 0);
        }
        *to_come = Some(self.members.len());
        for member in 0..self.members.len() {
            let members = self.clone();
            self.env.spawn(async move {
                let ask = |client: Arc<Client>| async move { client.cluster().await };
                // A stranger is set aside by it.
                let _ = members.call_checked(member, None, LIMIT_WITH_OTHERS_TO_ASK, ask).await;
                let to_come = members.to_name_their_cluster.now().map(|to_come| to_come.saturating_sub(1));
                members.to_name_their_cluster.set(to_come);
            });
        }
        true
    }

    /// Fails if the members that are there belong to several clusters: then a lock would be one in each. All who connect
    /// while the answers are to come wait for them.
    pub(super) async fn compare(&self) -> Result<(), Trouble> {
        let all_have_answered = self.to_name_their_cluster.find(|to_come| (*to_come == Some(0)).then_some(()));
        // One that is dead does not keep us.
        let _ = tokio::time::timeout(COMPARE_LIMIT, all_have_answered).await;
        let Some(clusters) = self.history.clusters() else { return Ok(()) };
        self.to_name_their_cluster.set(None);
        let each = clusters.iter().map(|(member, id)| format!("{} to {id:x}", self.members[*member].url)).collect::<Vec<_>>();
        Err(Trouble::Invalid(format!("its endpoints belong to different clusters: {}", each.join(", "))))
    }

    /// Sends one request to one member.
    pub(super) async fn call<T, F>(
        &self,
        role: Role,
        limit: Duration,
        request: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, Trouble>
    where
        T: Headed,
        F: Future<Output = Result<T, Status>>,
    {
        let known = (T::IS_LINEARIZABLE && role == Role::Queue).then(|| self.history.known());
        self.call_checked(self.pick(role), known, limit, request).await
    }

    /// Asks one member after the other, each a while after the one before and without giving up on
    /// that, and takes the first answer. For renewals, which may be sent any number of times: while
    /// the leader says nothing the other members say nothing either, each request that they pass on
    /// to it is lost, and one that is sent a moment after an election is answered at once. In a hurry
    /// all members are asked each time, whatever they did before: a cluster that elects one leader
    /// after another has only moments in which a renewal gets through, and only at some members.
    pub(super) async fn call_any<T, F>(
        &self,
        limit: Duration,
        hurry_from: Duration,
        request: impl Fn(Arc<Client>) -> F + Sync,
    ) -> Result<T, Trouble>
    where
        T: Headed + Send,
        F: Future<Output = Result<T, Status>> + Send,
    {
        let first = self.pick(Role::Queue);
        let count = self.members.len();
        let request = &request;
        if count == 1 {
            return self.call_checked(first, None, limit, request).await;
        }
        let mut under_way: Vec<(usize, Reply<'_, T>)> = Vec::new();
        let mut sent = 0;
        loop {
            // In the direction of `pick`: the member of the watches comes last.
            let in_turn: Vec<_> = (0..count).map(|step| (first + count - step) % count).collect();
            let now = self.env.now();
            let hurry = now >= hurry_from;
            let usable: Vec<_> = in_turn.iter().copied().filter(|&member| self.health(member).aside_until <= now).collect();
            let asked = if usable.is_empty() || hurry { in_turn } else { usable };
            let these = if hurry { &asked[..] } else { &asked[sent % asked.len()..][..1] };
            for &member in these {
                under_way.push((member, Box::pin(self.call_checked(member, None, limit, request))));
            }
            sent += 1;
            let next = tokio::time::sleep(limit / ASKED_IN_A_LIMIT);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    biased;
                    (member, answer) = first_answer(&mut under_way) => match answer {
                        Err(Trouble::Unavailable(why)) if sent >= 2 * ASKED_IN_A_LIMIT as usize && under_way.is_empty() => {
                            return Err(Trouble::Unavailable(why));
                        }
                        // The first may be a connection that has died of old age.
                        Err(Trouble::Unavailable(_)) if sent == 1 && under_way.is_empty() => break,
                        Err(Trouble::Unavailable(_)) => {}
                        answer => {
                            for (silent, _) in under_way.iter().filter(|(silent, _)| *silent != member) {
                                self.set_aside(*silent, true, "another member was faster");
                            }
                            if answer.is_ok() {
                                self.preferred.store(member, Ordering::Relaxed);
                            }
                            return answer;
                        }
                    },
                    () = &mut next, if sent < 2 * ASKED_IN_A_LIMIT as usize => break,
                }
            }
        }
    }

    /// Of an answer with a header, which has to be of our cluster and history.
    async fn call_checked<T: Headed, F: Future<Output = Result<T, Status>>>(
        &self,
        member: usize,
        known: Option<Known>,
        limit: Duration,
        request: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, Trouble> {
        let answer = self.call_one(member, limit, request).await?;
        self.check(member, answer.header(), known)?;
        Ok(answer)
    }

    pub(super) async fn call_one<T, F>(
        &self,
        member: usize,
        limit: Duration,
        request: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, Trouble>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.count_request();
        let is_unknown = self.history.is_unknown(member);
        let url = &self.members[member].url;
        let mut used = None;
        let answer = tokio::time::timeout(limit, async {
            let (client, is_new) = self.client(member).await?;
            used = Some((client.clone(), is_new));
            let token = client.token().clone();
            if is_unknown {
                self.ask_for_cluster(member, &client).await?;
            }
            match request(client.clone()).await {
                Err(status) if is_old_auth_revision(&status) => {
                    client.log_in(token).await?;
                    Err(status.into())
                }
                answer => answer.map_err(Failure::Status),
            }
        });
        let mut silent = false;
        let trouble = match answer.await {
            Ok(Ok(answer)) => {
                let mut health = self.health(member);
                health.silences = 0;
                health.refuses_certificate = false;
                return Ok(answer);
            }
            Ok(Err(failure)) => {
                // The next request makes a connection from the start, with the certificates of then.
                if let Some((used, _)) = used.as_ref().filter(|_| is_broken_connection(&failure)) {
                    self.drop_client(member, used);
                }
                // An old one connects again by itself, with the certificates of its time.
                let is_new = used.is_none_or(|(_, is_new)| is_new);
                match certificate_trouble(&failure).filter(|_| is_new) {
                    Some(why) => self.refused_certificate(member, format!("{url}: {why}")),
                    None => trouble_from(url, &failure),
                }
            }
            Err(_) => {
                silent = true;
                // The connection may be dead without a word: the next request makes a new one.
                if let Some((used, _)) = used {
                    self.drop_client(member, &used);
                }
                Trouble::Unavailable(format!("{url}: no answer within {limit:?}"))
            }
        };
        if let Trouble::Unavailable(why) = &trouble {
            self.set_aside(member, silent, why);
        }
        Err(trouble)
    }

    async fn ask_for_cluster(&self, member: usize, client: &Client) -> Result<(), Failure> {
        self.count_request();
        match client.cluster().await.map_err(Failure::Status) {
            Ok(answer) => self.check(member, answer.header(), None).map_err(|stranger| Failure::Stranger(stranger.to_string())),
            Err(broken) if is_broken_connection(&broken) => Err(broken),
            // Another release, or a proxy, may not tell that to everybody.
            Err(_) => Ok(()),
        }
    }

    /// The first member in turn that is not set aside, else the one whose time is up first.
    pub(super) fn pick(&self, role: Role) -> usize {
        let (now, count) = (self.env.now(), self.members.len());
        let first = self.preferred.load(Ordering::Relaxed) + usize::from(role == Role::Watch);
        // In opposite directions, so that the queue comes to the watches' member last.
        let in_turn = (0..count).map(|step| match role {
            Role::Queue => (first + count - step) % count,
            Role::Watch => (first + step) % count,
        });
        let usable = in_turn.clone().find(|&member| self.health(member).aside_until <= now);
        let picked = usable.or_else(|| in_turn.min_by_key(|&member| self.health(member).aside_until)).unwrap_or(0);
        if role == Role::Queue {
            self.preferred.store(picked, Ordering::Relaxed);
        }
        picked
    }

    /// One member with a wrong certificate is a bad member; if all have one, it is the credentials.
    fn refused_certificate(&self, member: usize, why: String) -> Trouble {
        self.health(member).refuses_certificate = true;
        if (0..self.members.len()).all(|member| self.health(member).refuses_certificate) {
            return Trouble::Denied(why);
        }
        Trouble::Unavailable(why)
    }

    /// The next request to the member makes a new connection, unless another has done so already.
    fn drop_client(&self, member: usize, used: &Arc<Client>) {
        // Locked means that somebody is connecting anew right now.
        if let Ok(mut slot) = self.members[member].client.try_lock()
            && slot.as_ref().is_some_and(|client| Arc::ptr_eq(client, used))
        {
            *slot = None;
        }
    }

    /// The next request to the member makes a new connection, and with it a new token.
    pub(super) fn reconnect(&self, member: usize) {
        if let Ok(mut slot) = self.members[member].client.try_lock() {
            *slot = None;
        }
    }

    pub(super) fn set_aside(&self, member: usize, silent: bool, why: &str) {
        let now = self.env.now();
        let mut health = self.health(member);
        let pause = ASIDE_AT_FIRST.saturating_mul(1 << health.silences.min(8)).min(ASIDE_AT_MOST);
        health.silences += u32::from(silent);
        health.aside_until = now + pause.mul_f64(0.75 + 0.5 * fastrand::f64());
        tracing::debug!(target: "etcdlock::failover", endpoint = self.members[member].url, why, "member set aside");
    }

    fn health(&self, member: usize) -> MutexGuard<'_, Health> {
        lock(&self.members[member].health)
    }

    /// The client of a member, and whether it has just been made.
    async fn client(&self, member: usize) -> Result<(Arc<Client>, bool), Failure> {
        let mut slot = self.members[member].client.lock().await;
        if let Some(client) = &*slot {
            return Ok((client.clone(), false));
        }
        let client = Arc::new(self.connect(&self.members[member]).await?);
        *slot = Some(client.clone());
        Ok((client, true))
    }

    async fn connect(&self, member: &Member) -> Result<Client, Failure> {
        Ok(Client::connect(self.channel(member).await?, self.connection.user.clone()).await?)
    }

    async fn channel(&self, member: &Member) -> Result<Channel, Failure> {
        let url = member.url.as_str();
        let mut endpoint = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(CONNECT_LIMIT);
        if url.starts_with("https://") {
            // Read again at every connection: certificates are renewed while programs run.
            let pems = self.connection.read_files().await.map_err(|error| Failure::Setup(error.to_string()))?;
            let tls = tls_options(pems, self.connection.server_name.as_deref());
            // The system's roots are files too.
            endpoint = off_the_io_thread(move || endpoint.tls_config(tls)).await??;
        }
        #[cfg(test)]
        if let Some(process) = &self.env.simulated {
            return Ok(process.channel(url));
        }
        let (was_connected, reconnections) = (member.was_connected.clone(), self.reconnections.clone());
        let count = move || {
            if was_connected.swap(true, Ordering::Relaxed) {
                reconnections.add();
            }
        };
        Ok(Channel::new(transport::connect(&endpoint, count).await?.map_err(|error| Status::from_error(error.into()))))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request has no answer.
#[derive(Debug)]
enum Failure {
    /// The server's answer, or what broke the connection.
    Status(Status),
    /// No connection could be made.
    Transport(tonic::transport::Error),
    /// What was given for it cannot be used.
    Setup(String),
    /// The member is of another cluster, or of another history.
    Stranger(String),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::Status(status)
    }
}

impl From<tonic::transport::Error> for Failure {
    fn from(error: tonic::transport::Error) -> Self {
        Failure::Transport(error)
    }
}

fn tls_options(pems: Pems, server_name: Option<&str>) -> ClientTlsConfig {
    let mut tls = ClientTlsConfig::new();
    tls = match pems.ca {
        Some(ca) => tls.ca_certificate(Certificate::from_pem(ca)),
        None => tls.with_native_roots(),
    };
    if let Some((cert, key)) = pems.identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    if let Some(name) = server_name {
        tls = tls.domain_name(name);
    }
    tls
}

async fn off_the_io_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::Setup(error.to_string()))
}

fn is_old_auth_revision(status: &Status) -> bool {
    status.message().contains("revision of auth store is old")
}

/// Waits for one of them, and takes it out.
async fn first_answer<T>(under_way: &mut Vec<(usize, Reply<'_, T>)>) -> (usize, Result<T, Trouble>) {
    std::future::poll_fn(|cx| {
        let ready = under_way.iter_mut().enumerate().find_map(|(at, (member, answer))| match answer.as_mut().poll(cx) {
            Poll::Ready(answer) => Some((at, *member, answer)),
            Poll::Pending => None,
        });
        match ready {
            Some((at, member, answer)) => {
                drop(under_way.swap_remove(at));
                Poll::Ready((member, answer))
            }
            None => Poll::Pending,
        }
    })
    .await
}

/// Whether the connection failed, and not the server's answer said so: that has no cause beneath it.
fn is_broken_connection(failure: &Failure) -> bool {
    use std::error::Error as _;
    matches!(failure, Failure::Status(status) if status.source().is_some())
}

/// Why TLS failed, if it was over a certificate: the server's, or ours as an alert of the server
/// says. With TLS 1.3 the alert comes after the connection is made, with the first request.
fn certificate_trouble(failure: &Failure) -> Option<String> {
    let why = match failure {
        Failure::Transport(error) => whole_message(error),
        Failure::Status(status) if is_broken_connection(failure) => whole_message(status),
        _ => return None,
    };
    let text = why.to_lowercase();
    ["certificate", "unknownca", "accessdenied"].iter().any(|part| text.contains(part)).then_some(why)
}

/// An error with everything beneath it, without saying the same twice.
fn whole_message(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    message
}

/// Sorts an error of the client by what can be done about it. The texts are etcd's, from
/// `api/v3rpc/rpctypes/error.go`; its codes alone do not tell them apart.
fn trouble_from(url: &str, failure: &Failure) -> Trouble {
    match failure {
        Failure::Status(status) => {
            let text = status.message();
            let why = format!("{url}: {}", if text.is_empty() { whole_message(status) } else { text.to_owned() });
            match status.code() {
                _ if text.contains("requested lease not found") => Trouble::LeaseGone,
                Code::PermissionDenied => Trouble::Denied(why),
                Code::InvalidArgument if text.contains("authentication failed") || text.contains("user name is empty") => {
                    Trouble::Denied(why)
                }
                Code::InvalidArgument if text.contains("revision of auth store is old") => Trouble::Unavailable(why),
                Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => Trouble::Refused(why),
                Code::ResourceExhausted if text.contains("too many requests") => Trouble::Unavailable(why),
                Code::ResourceExhausted => Trouble::Refused(why),
                _ => Trouble::Unavailable(format!("{url}: {}", whole_message(status))),
            }
        }
        Failure::Transport(error) => Trouble::Unavailable(format!("{url}: {}", whole_message(error))),
        Failure::Setup(why) => Trouble::Refused(why.clone()),
        Failure::Stranger(why) => Trouble::Unavailable(why.clone()),
    }
}
