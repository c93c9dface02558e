//! All watches of a target on one stream, rebuilt when it ends, is reset, or falls silent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::api::{WatchCreate, WatchOrder, WatchRequest, WatchResponse, end_of_prefix};
use super::members::{Members, Role};
use super::prefix;
use crate::place::Retry;
use crate::runtime::{Env, catching};
use crate::store::{Change, Changes, Follow, is_contender};

/// How often a quiet stream is asked for a sign of life. One question without an answer is too many.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
const OPEN_LIMIT: Duration = Duration::from_secs(2);
const AFTER_A_PANIC: Duration = Duration::from_millis(100);
/// After this long a stream was a good one, and the next is opened soon.
const LASTED: Duration = Duration::from_secs(5);

type WatchId = i64;

pub(super) struct Watches {
    commands: UnboundedSender<Command>,
    last_id: AtomicI64,
}

enum Command {
    Follow(WatchId, Follower),
    Stop(WatchId),
}

struct Follower {
    what: Follow,
    changes: UnboundedSender<Change>,
}

impl Watches {
    pub(super) fn new(members: Arc<Members>, env: Env) -> Self {
        let (commands, mut inbox) = mpsc::unbounded_channel();
        env.spawn(async move {
            let mut followers = BTreeMap::new();
            // Whatever went wrong, the followers are told to look for themselves, and are followed on a new stream.
            while catching(run(&members, &mut inbox, &mut followers)).await.is_err() {
                tracing::error!(target: "etcdlock::failover", "the task of the watches panicked, and starts again");
                tokio::time::sleep(AFTER_A_PANIC).await;
            }
        });
        Watches { commands, last_id: AtomicI64::new(0) }
    }

    pub(super) fn follow(&self, what: Follow) -> Changes {
        let (changes, rx) = mpsc::unbounded_channel();
        // Ids start at 1: etcd chooses one itself when it is given 0.
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let _ = self.commands.send(Command::Follow(id, Follower { what, changes }));
        let commands = self.commands.clone();
        Changes::new(rx, move || {
            let _ = commands.send(Command::Stop(id));
        })
    }
}

/// A watch without a start revision is live at once. With one that is not in the future it would
/// be served every 100 ms (etcd's `syncWatchersLoop`).
fn create(watch_id: WatchId, what: &Follow) -> WatchRequest {
    const NO_PUTS: i32 = 0;
    let (key, range_end) = match what {
        Follow::Queue(name) => {
            let prefix = prefix(name).into_bytes();
            let end = end_of_prefix(&prefix);
            (prefix, end)
        }
        Follow::Ticket(key) => (key.clone().into_bytes(), Vec::new()),
    };
    WatchRequest::create(WatchCreate { key, range_end, filters: vec![NO_PUTS], watch_id, start_revision: 0 })
}

async fn run(members: &Members, inbox: &mut UnboundedReceiver<Command>, followers: &mut BTreeMap<WatchId, Follower>) {
    let mut retry = Retry::new();
    let mut was_open = false;
    loop {
        loop {
            match inbox.try_recv() {
                Ok(command) => drop(apply(command, followers)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        while followers.is_empty() {
            match inbox.recv().await {
                Some(command) => drop(apply(command, followers)),
                None => return,
            }
        }
        let member = members.pick(Role::Watch);
        let start = Instant::now();
        if let Ok((sender, answers)) = open(members, member, followers).await {
            if was_open {
                members.count_reconnection();
            }
            was_open = true;
            match serve(members, sender, answers, inbox, followers).await {
                Ended::NobodyLeft => return,
                Ended::Broken(why) => members.set_aside(member, false, &why),
                Ended::Silent => members.set_aside(member, true, "the watch stream is silent"),
                Ended::Refused(why) => {
                    members.reconnect(member);
                    members.set_aside(member, false, &why);
                }
            }
        }
        if start.elapsed() > LASTED {
            retry = Retry::new();
        }
        retry.pause().await;
    }
}

/// Keeps the list of followers, and says what has to go out because of it.
fn apply(command: Command, followers: &mut BTreeMap<WatchId, Follower>) -> Option<WatchRequest> {
    match command {
        Command::Follow(id, follower) => {
            let request = create(id, &follower.what);
            followers.insert(id, follower);
            Some(request)
        }
        Command::Stop(id) => followers.remove(&id).map(|_| WatchRequest::cancel(id)),
    }
}

/// Opens a stream with the watches of all followers.
async fn open(
    members: &Members,
    member: usize,
    followers: &BTreeMap<WatchId, Follower>,
) -> Result<(UnboundedSender<WatchRequest>, Streaming<WatchResponse>), super::Trouble> {
    // Without a bound: a stream that is full must not keep us from reading it.
    let (outgoing, requests) = mpsc::unbounded_channel();
    for (nth, (id, follower)) in followers.iter().enumerate() {
        if nth > 0 {
            members.count_request();
        }
        let _ = outgoing.send(create(*id, &follower.what));
    }
    let requests = UnboundedReceiverStream::new(requests);
    let answers = members.call_one(member, OPEN_LIMIT, |client| async move { client.watch(requests).await }).await?;
    Ok((outgoing, answers))
}

enum Ended {
    NobodyLeft,
    Broken(String),
    Silent,
    /// A watch was refused: its stream's token has run out, or the permission is missing.
    Refused(String),
}

async fn serve(
    members: &Members,
    outgoing: UnboundedSender<WatchRequest>,
    mut answers: Streaming<WatchResponse>,
    inbox: &mut UnboundedReceiver<Command>,
    followers: &mut BTreeMap<WatchId, Follower>,
) -> Ended {
    let mut sign_of_life = tokio::time::interval(SIGN_OF_LIFE);
    sign_of_life.set_missed_tick_behavior(MissedTickBehavior::Delay);
    sign_of_life.reset();
    let mut heard = true;
    loop {
        tokio::select! {
            biased;
            answer = answers.message() => match answer {
                Ok(Some(answer)) => {
                    heard = true;
                    // etcd checks each new watch by the token that the stream was opened with, and
                    // newer releases answer a refusal without the watch's id.
                    let is_ours = answer.watch_id < 0 || followers.contains_key(&answer.watch_id);
                    if answer.canceled && is_ours && answer.compact_revision == 0 {
                        return Ended::Refused(format!("a watch was refused: {}", answer.cancel_reason));
                    }
                    if let Some(again) = hear(members, &answer, followers) {
                        let _ = outgoing.send(again);
                    }
                }
                Ok(None) => return Ended::Broken("the watch stream ended".into()),
                Err(error) => return Ended::Broken(error.to_string()),
            },
            command = inbox.recv() => {
                let Some(command) = command else { return Ended::NobodyLeft };
                if let Some(request) = apply(command, followers) {
                    if let Some(WatchOrder::Create(_)) = request.order {
                        members.count_request();
                    }
                    let _ = outgoing.send(request);
                }
            }
            _ = sign_of_life.tick() => {
                if !heard && !followers.is_empty() {
                    return Ended::Silent;
                }
                heard = false;
                let _ = outgoing.send(WatchRequest::progress());
            }
        }
    }
}

/// Passes an answer on. A watch that a compaction ended is asked for again, from then on.
fn hear(members: &Members, answer: &WatchResponse, followers: &BTreeMap<WatchId, Follower>) -> Option<WatchRequest> {
    let id = answer.watch_id;
    let follower = followers.get(&id)?;
    if answer.canceled {
        return Some(create(id, &follower.what));
    }
    if answer.created {
        let revision = answer.header.map_or(0, |header| header.revision);
        let _ = follower.changes.send(Change::Since(revision));
    }
    for event in &answer.events {
        members.count_event();
        let Some(kv) = event.kv.as_ref().filter(|_| event.is_delete()) else { continue };
        let hears = match &follower.what {
            Follow::Queue(name) => is_contender(name, &kv.key),
            Follow::Ticket(_) => true,
        };
        if hears {
            let key = String::from_utf8_lossy(&kv.key).into_owned();
            let _ = follower.changes.send(Change::Gone { key, revision: kv.mod_revision });
        }
    }
    None
}
