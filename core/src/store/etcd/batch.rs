//! Requests about different names, sent as one transaction when they queue up.
//!
//! etcd spends most of its time per request, not per operation: a hundred transactions inside one
//! cost little more than one alone. A request is held back only while others are on their way.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::api::{OpAnswer, RequestOp, TxnRequest, TxnResponse};
use super::members::{Members, Role};
use crate::runtime::Env;
use crate::store::{Revision, Trouble};

/// So many requests go out one by one; etcd itself commits together what comes at the same time.
const AT_ONCE: usize = 4;
/// etcd allows 128 operations in a transaction, nested ones counting as one each.
const TOGETHER: usize = 100;

type Answered = Result<Answer, Trouble>;

/// The answer to one transaction, alone or among others.
pub(super) struct Answer {
    pub(super) revision: Revision,
    pub(super) response: TxnResponse,
}

pub(super) struct Batches {
    members: Arc<Members>,
    env: Env,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    under_way: usize,
    waiting: VecDeque<Request>,
}

struct Request {
    name: Arc<str>,
    txn: TxnRequest,
    reply: oneshot::Sender<Answered>,
}

/// One of the `AT_ONCE`. When it ends, what has queued up meanwhile goes out.
struct Slot(Arc<Batches>);

impl Drop for Slot {
    fn drop(&mut self) {
        let batch = self.0.next_batch();
        if !batch.is_empty() {
            let slot = Slot(self.0.clone());
            self.0.env.spawn(async move { slot.0.send_together(batch).await });
        }
    }
}

impl Batches {
    pub(super) fn new(members: Arc<Members>, env: Env) -> Arc<Self> {
        Arc::new(Batches { members, env, state: Mutex::default() })
    }

    /// Sends a transaction about the queue of a name, alone or with those of other names.
    pub(super) async fn send(self: &Arc<Self>, name: &Arc<str>, txn: TxnRequest) -> Answered {
        enum Way {
            Alone(Slot, TxnRequest),
            Together(oneshot::Receiver<Answered>),
        }
        let way = {
            let mut state = self.state();
            if state.under_way < AT_ONCE {
                state.under_way += 1;
                Way::Alone(Slot(self.clone()), txn)
            } else {
                let (reply, answer) = oneshot::channel();
                state.waiting.push_back(Request { name: name.clone(), txn, reply });
                Way::Together(answer)
            }
        };
        match way {
            Way::Alone(_slot, txn) => self.send_alone(txn).await,
            Way::Together(answer) => answer.await.unwrap_or_else(|_| Err(Trouble::Unavailable("the request was dropped".into()))),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What goes out next; if nothing does, the slot is free.
    fn next_batch(&self) -> Vec<Request> {
        let mut state = self.state();
        // Tickets that are put in one transaction have one revision, which is no order in a queue.
        let mut names = HashSet::new();
        let (mut batch, mut rest) = (Vec::new(), VecDeque::new());
        for request in state.waiting.drain(..) {
            if request.reply.is_closed() {
                continue;
            }
            if batch.len() < TOGETHER && names.insert(request.name.clone()) {
                batch.push(request);
            } else {
                rest.push_back(request);
            }
        }
        state.waiting = rest;
        if batch.is_empty() {
            state.under_way -= 1;
        }
        batch
    }

    pub(super) async fn send_alone(&self, txn: TxnRequest) -> Answered {
        let limit = self.members.request_limit();
        let response = self.members.call(Role::Queue, limit, |client| async move { client.txn(txn).await }).await?;
        Ok(Answer { revision: revision_of(&response)?, response })
    }

    async fn send_together(&self, batch: Vec<Request>) {
        let together = match &batch[..] {
            [_] => None,
            several => {
                let all: Vec<_> = several.iter().map(|request| RequestOp::txn(request.txn.clone())).collect();
                Some(self.send_alone(TxnRequest::default().and_then(all)).await)
            }
        };
        match together {
            Some(Ok(Answer { revision, response })) => {
                let mut answers = response.responses.into_iter().map(|one| one.op);
                for request in batch {
                    let _ = request.reply.send(match answers.next() {
                        Some(Some(OpAnswer::Txn(response))) => Ok(Answer { revision, response }),
                        _ => Err(odd("an answer is missing")),
                    });
                }
            }
            Some(Err(trouble @ Trouble::Unavailable(_))) => {
                for request in batch {
                    let _ = request.reply.send(Err(trouble.clone()));
                }
            }
            // Refused because of one of them, and etcd does not say which: each on its own.
            Some(Err(_)) | None => {
                for request in batch {
                    let answer = self.send_alone(request.txn).await;
                    let _ = request.reply.send(answer);
                }
            }
        }
    }
}

pub(super) fn revision_of(answer: &TxnResponse) -> Result<Revision, Trouble> {
    answer.header.map(|header| header.revision).ok_or_else(|| odd("no header"))
}

pub(super) fn odd(what: &str) -> Trouble {
    Trouble::Unavailable(format!("etcd's answer makes no sense: {what}"))
}
