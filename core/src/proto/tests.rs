//! Each transition a line: after these events, the last one brings about these actions.

use std::sync::Arc;

use super::claim::Claim;
use super::queue::{Actions, LocalQueue};
use super::{Action, Event, Process, Release, Request, SessionId, TicketId, Waiter, WaiterId};
use crate::store::{Ahead, Change, Entered, Follow, Left, Look, Ticket, Trouble};

/// A waiter of session 1 or 2, by its id's first digit.
#[derive(Clone, Debug)]
struct Caller(WaiterId, bool);

impl Waiter for Caller {
    fn id(&self) -> WaiterId {
        self.0
    }

    fn session(&self) -> SessionId {
        (self.0 / 10) as SessionId
    }

    fn only_tries(&self) -> bool {
        self.1
    }
}

#[derive(Default)]
struct Sessions {
    lost: bool,
    number: u64,
}

impl Process<Caller> for Sessions {
    fn ticket_for(&mut self, waiter: &Caller, n: u64) -> Option<Ticket> {
        let lease = (!self.lost).then_some(waiter.session() as i64)?;
        Some(Ticket { name: Arc::from("x"), key: format!("{lease}-{}", self.number + n), lease, n, value: Arc::from("") })
    }

    fn is_alive(&self, _: &Ticket) -> bool {
        !self.lost
    }

    fn retire(&mut self, _: &Ticket) {
        self.number += 2;
    }

    fn lease_is_gone(&mut self, _: &Ticket) {
        self.lost = true;
    }
}

type Happening = Event<Caller>;

fn lock(id: WaiterId) -> Happening {
    Event::Lock(Caller(id, false))
}

fn try_lock(id: WaiterId) -> Happening {
    Event::Lock(Caller(id, true))
}

fn ahead(revision: i64, keys: &[&str]) -> Ahead {
    Ahead { revision, keys: Some(keys.iter().map(|key| (*key).to_owned()).collect()) }
}

/// Entered at this revision, behind these.
fn entered(revision: i64, keys: &[&str]) -> Happening {
    Event::Entered(0, Ok(Some(Entered { token: revision, ahead: ahead(revision, keys) })))
}

/// Found in the queue by a second copy of the request, which does not tell who is ahead.
fn found(token: i64, revision: i64) -> Happening {
    Event::Entered(0, Ok(Some(Entered { token, ahead: Ahead { revision, keys: None } })))
}

fn refused(trouble: Trouble) -> Happening {
    Event::Entered(0, Err(trouble))
}

fn looked(revision: i64, present: bool, keys: &[&str]) -> Happening {
    Event::Looked(0, Ok(Look { present, overwritten: false, ahead: ahead(revision, keys) }))
}

fn left() -> Happening {
    Event::Left(0, Ok(Left { was_present: true, next: None }))
}

fn handed_over(revision: i64, keys: &[&str]) -> Happening {
    let next = Some(Entered { token: revision, ahead: ahead(revision, keys) });
    Event::Left(0, Ok(Left { was_present: true, next }))
}

fn not_left(trouble: Trouble) -> Happening {
    Event::Left(0, Err(trouble))
}

fn gone(key: &str, revision: i64) -> Happening {
    Event::Heard(Change::Gone { key: key.to_owned(), revision })
}

fn live(revision: i64) -> Happening {
    Event::Heard(Change::Since(revision))
}

fn silent() -> Trouble {
    Trouble::Unavailable("no answer".into())
}

fn text(action: &Action<Caller>) -> String {
    match action {
        Action::AwaitLease => "await a lease".into(),
        Action::StopAwaitingLease => "await none".into(),
        Action::Send(_, Request::Enter) => "enter".into(),
        Action::Send(_, Request::EnterIfFree) => "enter if free".into(),
        Action::Send(_, Request::Look { since: None, .. }) => "look".into(),
        Action::Send(_, Request::Look { since: Some(since), .. }) => format!("look since {since}"),
        Action::Send(id, Request::Leave { token, void, next }) => {
            let token = token.map_or("?".into(), |token| token.to_string());
            let next = next.as_ref().map(|next| format!(" for {}", next.key)).unwrap_or_default();
            format!("leave {token}{}{}{next}", if *id == 0 { "" } else { " too" }, if *void { " for good" } else { "" })
        }
        Action::Check(_, false) => "check".into(),
        Action::Check(_, true) => "check later".into(),
        Action::Pause(_) => "pause".into(),
        Action::PauseFresh => "pause, then another".into(),
        Action::LookLater(..) => "look later".into(),
        Action::Follow(Follow::Queue(_)) => "follow all".into(),
        Action::Follow(Follow::Ticket(key)) => format!("follow {key}"),
        Action::Follow(Follow::Own { .. }) | Action::FollowOwn(_) => "follow own".into(),
        Action::Unfollow => "follow none".into(),
        Action::PutRight(_) => "put right".into(),
        Action::MarkLater(ticket) => format!("mark {} later", ticket.key),
        Action::Grant(waiter, _, granted) => {
            format!("{} has it by {}{}", waiter.0, granted.token, if granted.waited { " at last" } else { "" })
        }
        Action::GrantAgain(waiter, _) => format!("{} has it too", waiter.0),
        Action::Taken(waiter) => format!("{} is told it is taken", waiter.0),
        Action::Fail(waiter, _) => format!("{} fails", waiter.0),
        Action::Lose(_, loss) => format!("lost: {loss}"),
        Action::Released(token, release) => match release {
            Release::Done => format!("{token} is released"),
            other => format!("{token} is released: {other:?}"),
        },
        Action::HandedOver(_) => "handed over".into(),
        Action::End(id) => format!("end{}", if *id == 0 { "" } else { " too" }),
    }
}

/// What the last of these events brings about, for a claim.
fn after_with(claim: Claim, events: &[Happening]) -> String {
    let (mut queue, mut sessions, mut actions) = (LocalQueue::new(Arc::from("x"), claim), Sessions::default(), Actions::new());
    for event in events {
        actions.clear();
        if let Event::LeaseLost(_) = event {
            sessions.lost = true;
        }
        if let Event::LeaseReady = event {
            sessions.lost = false;
        }
        queue.handle([event.clone()], &mut sessions, &mut actions);
    }
    actions.iter().map(text).collect::<Vec<_>>().join(", ")
}

fn after(events: &[Happening]) -> String {
    after_with(Claim { slack: 0, near: 2 }, events)
}

const ID: TicketId = 0;

#[test]
fn entering() {
    assert_eq!(after(&[lock(11)]), "enter");
    assert_eq!(after(&[try_lock(11)]), "enter if free");
    assert_eq!(after(&[lock(11), lock(12)]), "", "one ticket for all");
    assert_eq!(after(&[lock(11), entered(5, &[])]), "11 has it by 5");
    assert_eq!(after(&[lock(11), entered(5, &["a"])]), "look later, follow all");
    assert_eq!(after(&[lock(11), entered(5, &["a", "b", "c"])]), "look later, follow a");
    assert_eq!(after(&[lock(11), found(5, 7)]), "look");
    assert_eq!(after(&[try_lock(11), Event::Entered(ID, Ok(None))]), "11 is told it is taken, end");
    assert_eq!(after(&[try_lock(11), entered(5, &["a"])]), "look later, 11 is told it is taken, leave 5");
    assert_eq!(after(&[lock(11), refused(silent())]), "pause");
    assert_eq!(after(&[lock(11), refused(silent()), Event::PauseIsOver(ID)]), "enter", "the same ticket until it is known");
    assert_eq!(after(&[lock(11), refused(silent()), Event::GaveUp(11)]), "leave ? for good");
    assert_eq!(after(&[lock(11), Event::GaveUp(11)]), "", "the answer is waited for");
    assert_eq!(after(&[lock(11), Event::GaveUp(11), entered(5, &[])]), "leave 5");
    assert_eq!(after(&[lock(11), refused(Trouble::Denied("no".into()))]), "11 fails, end");
    assert_eq!(after(&[lock(11), refused(Trouble::Refused("full".into()))]), "11 fails, leave ? for good");
    assert_eq!(after(&[lock(11), refused(Trouble::KeyTaken)]), "pause, then another, end");
    assert_eq!(after(&[lock(11), refused(Trouble::KeyTaken), Event::FreshPauseIsOver]), "enter");
    assert_eq!(after(&[lock(11), refused(Trouble::LeaseGone)]), "end, await a lease");
    assert_eq!(after(&[lock(11), Event::LeaseLost(ID)]), "end, await a lease");
    assert_eq!(after(&[lock(11), Event::LeaseLost(ID), Event::LeaseReady]), "enter");
    assert_eq!(after(&[lock(11), Event::LeaseLost(ID), Event::GaveUp(11)]), "await none");
}

#[test]
fn waiting() {
    let behind = |more: &[Happening]| after(&[&[lock(11), entered(5, &["b", "a"])], more].concat());
    assert_eq!(behind(&[gone("a", 6)]), "");
    assert_eq!(behind(&[gone("a", 6), gone("b", 7)]), "11 has it by 5 at last");
    assert_eq!(behind(&[gone("a", 4), gone("b", 5)]), "", "known by the entry already");
    assert_eq!(behind(&[gone("1-0", 6)]), "leave 5 for 1-1", "our own: to make sure, and anew");
    assert_eq!(behind(&[live(5)]), "look later");
    assert_eq!(behind(&[live(6)]), "look since 6", "what was up to then was not heard");
    assert_eq!(behind(&[live(6), looked(8, true, &["b"])]), "look later");
    assert_eq!(behind(&[live(6), looked(8, true, &[])]), "look later, 11 has it by 5 at last");
    assert_eq!(behind(&[live(6), looked(8, false, &[])]), "leave 5 for 1-1");
    assert_eq!(behind(&[live(6), looked(8, true, &["b"]), gone("b", 9)]), "11 has it by 5 at last");
    assert_eq!(behind(&[live(6), Event::Looked(ID, Err(silent()))]), "pause");
    assert_eq!(behind(&[live(6), Event::Looked(ID, Err(silent())), gone("b", 7), Event::PauseIsOver(ID)]), "look since 7");
    assert_eq!(behind(&[live(9), looked(6, true, &["b"])]), "follow none, look later, follow all", "another history");
    assert_eq!(behind(&[Event::LookIsDue(ID)]), "look");
    assert_eq!(behind(&[Event::GaveUp(11)]), "leave 5");
    assert_eq!(behind(&[try_lock(12)]), "12 is told it is taken");
    assert_eq!(behind(&[Event::LeaseLost(ID)]), "follow none, end, await a lease");
    let far = |more: &[Happening]| after(&[&[lock(11), entered(5, &["c", "b", "a"])], more].concat());
    assert_eq!(far(&[live(7)]), "look later", "the one ahead may have gone before");
    assert_eq!(far(&[live(5), gone("c", 7)]), "look since 7");
    assert_eq!(far(&[live(5), gone("c", 7), looked(7, true, &["b", "a"])]), "look later, follow all");
}

#[test]
fn holding() {
    let held = |more: &[Happening]| after(&[&[lock(11), entered(5, &[])], more].concat());
    assert_eq!(held(&[Event::Release(5)]), "leave 5");
    assert_eq!(held(&[Event::Release(4)]), "4 is released: LeaseLost", "another hold, lost before");
    assert_eq!(held(&[lock(12), Event::Release(5)]), "leave 5 for 1-1");
    assert_eq!(held(&[lock(21), Event::Release(5)]), "leave 5 for 2-1", "a session of the same process");
    assert_eq!(held(&[try_lock(12)]), "12 is told it is taken");
    assert_eq!(held(&[Event::NotTaken(ID)]), "leave 5", "the waiter had gone");
    assert_eq!(held(&[lock(12), Event::NotTaken(ID)]), "12 has it by 5");
    assert_eq!(held(&[Event::HoldLost(ID)]), "leave 5");
    assert_eq!(held(&[Event::HoldIsOld(ID)]), "lost: it was kept longer than max_hold, leave 5");
    assert_eq!(held(&[Event::LeaseLost(ID)]), "end");
    assert_eq!(held(&[Event::HoldLasts(ID)]), "follow own");
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Since(5))]), "");
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Since(6))]), "check");
    assert_eq!(
        held(&[Event::HeardOwn(ID, Change::Since(5)), Event::HeardOwn(ID, Change::Since(5))]),
        "check",
        "it was made anew"
    );
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Overwritten)]), "put right");
    let gone = Change::Gone { key: "1-0".into(), revision: 6 };
    assert_eq!(held(&[Event::HeardOwn(ID, gone)]), "lost: its key was deleted from outside, leave 5");
    let checked = |present| Event::Checked(ID, Ok(Look { present, overwritten: false, ahead: ahead(6, &[]) }));
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Since(6)), checked(true)]), "");
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Since(6)), checked(false)]), "lost: its key was deleted from outside, leave 5");
    assert_eq!(held(&[Event::HeardOwn(ID, Change::Since(6)), Event::Checked(ID, Err(silent()))]), "check later");
}

#[test]
fn leaving() {
    let leaves = |more: &[Happening]| after(&[&[lock(11), entered(5, &[]), Event::Release(5)], more].concat());
    let hands_over = |more: &[Happening]| after(&[&[lock(11), entered(5, &[]), lock(12), Event::Release(5)], more].concat());
    let was_gone = Event::Left(ID, Ok(Left { was_present: false, next: None }));
    assert_eq!(leaves(&[left()]), "5 is released, end");
    assert_eq!(leaves(std::slice::from_ref(&was_gone)), "5 is released: WasGone, end");
    assert_eq!(leaves(&[not_left(silent())]), "pause");
    assert_eq!(leaves(&[not_left(silent()), Event::PauseIsOver(ID)]), "leave 5");
    assert_eq!(
        leaves(&[not_left(silent()), Event::PauseIsOver(ID), was_gone.clone()]),
        "5 is released, end",
        "most likely by the first"
    );
    assert_eq!(leaves(&[not_left(silent()), lock(12), Event::PauseIsOver(ID)]), "leave 5", "it is too late to hand over");
    assert_eq!(leaves(&[not_left(Trouble::LeaseGone)]), "5 is released: LeaseLost, end");
    assert_eq!(leaves(&[not_left(silent()), Event::LeaseLost(ID)]), "5 is released: LeaseLost, end");
    assert_eq!(leaves(&[Event::LeaseLost(ID)]), "", "the answer is waited for");
    let denied = || not_left(Trouble::Denied("no".into()));
    assert_eq!(leaves(&[denied()]), "5 is released: Refused(Denied(\"no\")), pause");
    assert_eq!(leaves(&[lock(12), denied()]), "12 fails, 5 is released: Refused(Denied(\"no\")), pause");
    assert_eq!(leaves(&[lock(12), left()]), "5 is released, end, enter", "who came later");
    assert_eq!(hands_over(&[handed_over(6, &[])]), "5 is released, end, handed over, 12 has it by 6 at last");
    assert_eq!(hands_over(&[handed_over(6, &["a"])]), "5 is released, end, look later, follow all");
    assert_eq!(hands_over(&[was_gone]), "5 is released: WasGone, end, enter");
    assert_eq!(hands_over(&[not_left(silent()), Event::PauseIsOver(ID)]), "leave 5 for 1-1", "the same next one");
    assert_eq!(hands_over(&[not_left(Trouble::LeaseGone)]), "leave 5", "one of two leases is gone");
    assert_eq!(hands_over(&[not_left(Trouble::Refused("full".into())), left()]), "5 is released, end, leave ? for good");
    assert_eq!(hands_over(&[not_left(silent()), Event::LeaseLost(ID)]), "5 is released: LeaseLost, end, leave ? for good");
    assert_eq!(hands_over(&[Event::LeaseLost(ID), handed_over(6, &[])]), "5 is released, end, await a lease");
    assert_eq!(hands_over(&[Event::GaveUp(12), handed_over(6, &[])]), "5 is released, end, handed over, leave 6");
    // In doubt whether a copy of its entry is still on its way.
    let doubtful = |more: &[Happening]| {
        after(&[&[lock(11), refused(silent()), Event::PauseIsOver(ID), entered(5, &[]), Event::Release(5)], more].concat())
    };
    assert_eq!(doubtful(&[]), "leave 5 for good");
    assert_eq!(doubtful(&[not_left(Trouble::Refused("full".into()))]), "leave 5", "without the marker there is room");
    assert_eq!(doubtful(&[not_left(Trouble::Refused("full".into())), left()]), "mark 1-0 later, 5 is released, end");
}

#[test]
fn two_may_have_it() {
    let two = |events: &[Happening]| after_with(Claim { slack: 1, near: 2 }, events);
    assert_eq!(two(&[lock(11), lock(12), entered(5, &[])]), "11 has it by 5, enter");
    let both =
        [lock(11), lock(12), entered(5, &[]), Event::Entered(1, Ok(Some(Entered { token: 6, ahead: ahead(6, &["1-0"]) })))];
    assert_eq!(two(&both), "12 has it by 6");
    assert_eq!(two(&[&both[..], &[lock(13)]].concat()), "", "three of ours would be too many");
    assert_eq!(two(&[&both[..], &[lock(13), Event::Release(5)]].concat()), "leave 5 for 1-2");
    assert_eq!(two(&[&both[..], &[Event::Release(6)]].concat()), "leave 6 too");
}
