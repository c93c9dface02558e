//! All watches of a target on one stream, rebuilt when it ends, is reset, or falls silent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::api::{WatchCreate, WatchRequest, WatchResponse, end_of_prefix};
use super::keys::prefix;
use super::members::{Members, Role};
use crate::backoff::Backoff;
use crate::runtime::{AFTER_A_PANIC, Env, catching};
use crate::store::{Change, Changes, Follow, Trouble, is_contender};

/// How often a quiet stream is asked for a sign of life. One question without an answer is too many.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
const OPEN_LIMIT: Duration = Duration::from_secs(2);
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

/// A key's own holder hears of puts too.
fn filters(what: &Follow) -> Vec<i32> {
    const NO_PUTS: i32 = 0;
    if matches!(what, Follow::Own { .. }) { Vec::new() } else { vec![NO_PUTS] }
}

/// A watch without a start revision is live at once. With one that is not in the future it would
/// be served every 100 ms (etcd's `syncWatchersLoop`).
fn create(watch_id: WatchId, what: &Follow) -> WatchRequest {
    let (key, range_end) = match what {
        Follow::Queue(name) => {
            let prefix = prefix(name).into_bytes();
            let end = end_of_prefix(&prefix);
            (prefix, end)
        }
        Follow::Ticket(key) | Follow::Own { key, .. } => (key.clone().into_bytes(), Vec::new()),
    };
    WatchRequest::create(WatchCreate { key, range_end, filters: filters(what), watch_id, start_revision: 0 })
}

async fn run(members: &Members, inbox: &mut UnboundedReceiver<Command>, followers: &mut BTreeMap<WatchId, Follower>) {
    let mut retry = Backoff::new();
    let mut was_open = false;
    loop {
        loop {
            match inbox.try_recv() {
                Ok(command) => keep(command, followers),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        while followers.is_empty() {
            match inbox.recv().await {
                Some(command) => keep(command, followers),
                None => return,
            }
        }
        let member = members.pick(Role::Watch);
        let start = Instant::now();
        if let Ok((mut stream, answers)) = Stream::open(members, member, followers).await {
            if was_open {
                members.count_reconnection();
            }
            was_open = true;
            match stream.serve(answers, inbox, followers).await {
                Ended::NobodyLeft => return,
                Ended::Numbered => {
                    members.note_proxy(member);
                    continue;
                }
                Ended::Broken(why) => members.set_aside(member, false, &why),
                Ended::Silent(why) => members.set_aside(member, true, why),
                Ended::Refused(why) => {
                    members.reconnect(member);
                    members.set_aside(member, false, &why);
                }
            }
        }
        if start.elapsed() > LASTED {
            retry = Backoff::new();
        }
        retry.pause().await;
    }
}

/// Keeps the list of followers.
fn keep(command: Command, followers: &mut BTreeMap<WatchId, Follower>) {
    match command {
        Command::Follow(id, follower) => drop(followers.insert(id, follower)),
        Command::Stop(id) => drop(followers.remove(&id)),
    }
}

enum Ended {
    NobodyLeft,
    Broken(String),
    Silent(&'static str),
    /// A watch was refused: its stream's token has run out, or the permission is missing.
    Refused(String),
    /// It turned out that a proxy numbers the watches itself.
    Numbered,
}

/// How watches are told apart on a stream.
enum Numbers {
    /// etcd takes ours. Those that are asked for.
    Ours(BTreeSet<WatchId>),
    /// Its gRPC proxy gives its own, in an order that does not tell which is which. So one is asked for after the other.
    Theirs { ours: BTreeMap<WatchId, WatchId>, asked: Option<WatchId>, waiting: VecDeque<WatchId> },
}

/// One stream with the watches of all followers.
struct Stream<'a> {
    members: &'a Members,
    member: usize,
    outgoing: UnboundedSender<WatchRequest>,
    numbers: Numbers,
}

impl<'a> Stream<'a> {
    async fn open(
        members: &'a Members,
        member: usize,
        followers: &BTreeMap<WatchId, Follower>,
    ) -> Result<(Stream<'a>, Streaming<WatchResponse>), Trouble> {
        // Without a bound: a stream that is full must not keep us from reading it.
        let (outgoing, requests) = mpsc::unbounded_channel();
        let numbers = match members.is_proxy(member) {
            true => Numbers::Theirs { ours: BTreeMap::new(), asked: None, waiting: VecDeque::new() },
            false => Numbers::Ours(BTreeSet::new()),
        };
        let mut stream = Stream { members, member, outgoing, numbers };
        for (nth, id) in followers.keys().enumerate() {
            if nth > 0 {
                members.count_request();
            }
            stream.ask(*id, followers);
        }
        let requests = UnboundedReceiverStream::new(requests);
        let answers = members.call_one(member, OPEN_LIMIT, |client| async move { client.watch(requests).await }).await?;
        Ok((stream, answers))
    }

    fn send(&self, request: WatchRequest) {
        // A stream that has ended is noticed where it is read.
        let _ = self.outgoing.send(request);
    }

    /// Asks for a watch, or remembers to.
    fn ask(&mut self, id: WatchId, followers: &BTreeMap<WatchId, Follower>) {
        let Some(follower) = followers.get(&id) else { return };
        match &mut self.numbers {
            Numbers::Ours(asked) => drop(asked.insert(id)),
            Numbers::Theirs { asked: Some(_), waiting, .. } => return waiting.push_back(id),
            Numbers::Theirs { asked, .. } => *asked = Some(id),
        }
        self.send(create(id, &follower.what));
    }

    fn stop(&mut self, id: WatchId) {
        let theirs = match &mut self.numbers {
            Numbers::Ours(_) => Some(id),
            Numbers::Theirs { ours, waiting, .. } => {
                waiting.retain(|waiting| *waiting != id);
                let theirs = ours.iter().find_map(|(theirs, ours)| (*ours == id).then_some(*theirs));
                if let Some(theirs) = theirs {
                    ours.remove(&theirs);
                }
                theirs
            }
        };
        if let Some(theirs) = theirs {
            self.send(WatchRequest::cancel(theirs));
        }
    }

    /// Which of ours an answer is about. With the answer to a wish it is known from then on.
    fn ours(&mut self, answer: &WatchResponse, followers: &BTreeMap<WatchId, Follower>) -> Result<Option<WatchId>, Ended> {
        let number = answer.watch_id;
        let (stopped, next) = match &mut self.numbers {
            Numbers::Ours(asked) => {
                let is_odd = answer.created && !asked.remove(&number);
                return if is_odd { Err(Ended::Numbered) } else { Ok(Some(number)) };
            }
            Numbers::Theirs { ours, .. } if !answer.created => return Ok(ours.get(&number).copied()),
            Numbers::Theirs { ours, asked, waiting } => {
                let id = asked.take();
                let known = id.filter(|id| followers.contains_key(id));
                if let Some(id) = known {
                    ours.insert(number, id);
                }
                (known.is_none(), waiting.pop_front())
            }
        };
        if stopped {
            self.send(WatchRequest::cancel(number));
        }
        if let Some(next) = next {
            self.ask(next, followers);
        }
        let Numbers::Theirs { ours, .. } = &self.numbers else { return Ok(None) };
        Ok(ours.get(&number).copied())
    }

    async fn serve(
        &mut self,
        mut answers: Streaming<WatchResponse>,
        inbox: &mut UnboundedReceiver<Command>,
        followers: &mut BTreeMap<WatchId, Follower>,
    ) -> Ended {
        let mut sign_of_life = tokio::time::interval(SIGN_OF_LIFE);
        sign_of_life.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sign_of_life.reset();
        let mut heard = true;
        let mut asked_before = None;
        loop {
            tokio::select! {
                biased;
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        heard = true;
                        if let Err(ended) = self.hear(&answer, followers) {
                            return ended;
                        }
                    }
                    Ok(None) => return Ended::Broken("the watch stream ended".into()),
                    Err(error) => return Ended::Broken(error.to_string()),
                },
                command = inbox.recv() => {
                    let Some(command) = command else { return Ended::NobodyLeft };
                    let (id, is_new) = match &command {
                        Command::Follow(id, _) => (*id, true),
                        Command::Stop(id) => (*id, false),
                    };
                    keep(command, followers);
                    if is_new {
                        self.members.count_request();
                        self.ask(id, followers);
                    } else {
                        self.stop(id);
                    }
                }
                _ = sign_of_life.tick() => match &self.numbers {
                    Numbers::Ours(_) => {
                        if !heard && !followers.is_empty() {
                            return Ended::Silent("the watch stream is silent");
                        }
                        heard = false;
                        self.send(WatchRequest::progress());
                    }
                    // The proxy leaves that question unanswered, but not a wish, and others wait behind it.
                    Numbers::Theirs { asked, .. } => {
                        if asked.is_some() && *asked == asked_before {
                            return Ended::Silent("the proxy does not answer the wish for a watch");
                        }
                        asked_before = *asked;
                    }
                },
            }
        }
    }

    /// Passes an answer on.
    fn hear(&mut self, answer: &WatchResponse, followers: &BTreeMap<WatchId, Follower>) -> Result<(), Ended> {
        if answer.canceled && answer.watch_id < 0 && answer.compact_revision == 0 {
            // etcd checks each new watch by the token that the stream was opened with, and newer releases answer a refusal
            // without the watch's id.
            return Err(Ended::Refused(format!("a watch was refused: {}", answer.cancel_reason)));
        }
        if answer.watch_id < 0 {
            return Ok(());
        }
        let Some(id) = self.ours(answer, followers)? else { return Ok(()) };
        let Some(follower) = followers.get(&id) else { return Ok(()) };
        if answer.canceled {
            // etcd keeps the number of a watch that a compaction has ended, so it is asked for on another stream.
            return Err(match answer.compact_revision {
                0 => Ended::Refused(format!("a watch was refused: {}", answer.cancel_reason)),
                _ => Ended::Broken("a compaction has ended a watch".into()),
            });
        }
        if answer.created {
            self.members
                .check(self.member, answer.header.as_ref(), None)
                .map_err(|stranger| Ended::Broken(stranger.to_string()))?;
            let revision = answer.header.map_or(0, |header| header.revision);
            let _ = follower.changes.send(Change::Since(revision));
        }
        for event in &answer.events {
            self.members.count_event();
            let Some(kv) = &event.kv else { continue };
            let change = match &follower.what {
                Follow::Own { lease, .. } if event.is_put() && kv.lease != *lease => Change::Overwritten,
                Follow::Queue(name) if !is_contender(name, &kv.key) => continue,
                _ if event.is_delete() => {
                    Change::Gone { key: String::from_utf8_lossy(&kv.key).into_owned(), revision: kv.mod_revision }
                }
                _ => continue,
            };
            let _ = follower.changes.send(change);
        }
        Ok(())
    }
}
