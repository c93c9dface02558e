//! Tries the protocol that ships (core/src/proto) exhaustively: a few processes, every order of events, within a budget of faults.
//!
//! A state is the store, each process with its queue, and all that is under way between them; a step is one event. What is fair
//! happens in the end: a request is answered, a watch becomes live, a pause ends, a lost lease ends in the store too. Faults need
//! not happen: an answer is lost and its request arrives late, or twice, a lease is lost, a watch starts over, a caller gives up, a
//! waiter's key is deleted from outside. The look that a waiter takes every few seconds is left out, so that what only that would
//! save is found. docs/simulation.md tells what was tried.

mod process;
mod store;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use self::process::{Caller, Proc, Step};
use self::store::Store;
use crate::proto::claim::Claim;

/// How often each fault may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Faults {
    lost_answers: u8,
    copies: u8,
    lost_leases: u8,
    restarts: u8,
    gives_up: u8,
    deleted: u8,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    store: Store,
    processes: Vec<Proc>,
    left: Faults,
    /// The largest token that was given out.
    last_token: i64,
}

/// What is tried: the callers of each process, whether they only try, and what may go wrong.
struct Plan {
    claim: Claim,
    callers: &'static [&'static [bool]],
    faults: Faults,
}

struct Found {
    violation: String,
    steps: Vec<String>,
}

struct Search {
    seen: HashSet<(u64, u64)>,
    path: Vec<(usize, Step)>,
    most: usize,
    found: Option<Found>,
    ends: usize,
}

impl World {
    fn new(plan: &Plan) -> World {
        let new = |(nth, callers): (usize, &&[bool])| {
            let callers = callers.iter().enumerate();
            let callers =
                callers.map(|(n, only_tries)| Caller { id: (nth * 10 + n) as u64, session: nth, only_tries: *only_tries });
            Proc::new(nth, plan.claim, callers.collect())
        };
        let processes = plan.callers.iter().enumerate().map(new).collect();
        World { store: Store::new(plan.claim.near), processes, left: plan.faults, last_token: 0 }
    }

    fn key(&self) -> (u64, u64) {
        let (mut one, mut two) = (DefaultHasher::new(), DefaultHasher::new());
        self.hash(&mut one);
        two.write_u8(1);
        self.hash(&mut two);
        (one.finish(), two.finish())
    }

    /// What must never be.
    fn violation(&self, claim: Claim) -> Option<String> {
        let believers = self.processes.iter().flat_map(|process| process.believed());
        let tokens: Vec<_> = believers.collect();
        if tokens.len() > claim.slack + 1 {
            return Some(format!("{} hold it: tokens {tokens:?}", tokens.len()));
        }
        // Nobody deletes the key of a holder, and a lease is lost here before it ends there.
        let gone = tokens.iter().find(|token| !self.store.keys.iter().any(|key| key.created == **token))?;
        Some(format!("token {gone} is believed in, and its key is gone"))
    }

    /// What must be when nothing more happens by itself.
    fn unfinished(&self) -> Option<String> {
        if let Some(waits) = self.processes.iter().find_map(|process| process.unserved()) {
            return Some(format!("caller {waits} is never served"));
        }
        if let Some(key) = self.store.keys.first() {
            return Some(format!("{} is left behind", key.text));
        }
        None
    }
}

impl Search {
    fn tell(&mut self, violation: String) {
        let steps = self.path.iter().map(|(process, step)| format!("{process}: {step:?}")).collect();
        self.found = Some(Found { violation, steps });
    }

    fn explore(&mut self, world: &World, claim: Claim) {
        if self.found.is_some() || self.seen.len() >= self.most {
            return;
        }
        let mut is_end = true;
        for nth in 0..world.processes.len() {
            for step in world.processes[nth].steps(&world.store, &world.left) {
                is_end &= step.is_fault();
                let mut next = world.clone();
                self.path.push((nth, step.clone()));
                let taken = process::take(&mut next, nth, step, claim);
                if let Some(violation) = taken.err().or_else(|| next.violation(claim)) {
                    return self.tell(violation);
                }
                if self.seen.insert(next.key()) {
                    self.explore(&next, claim);
                }
                if self.found.is_some() {
                    return;
                }
                self.path.pop();
            }
        }
        if is_end {
            self.ends += 1;
            if let Some(violation) = world.unfinished() {
                self.tell(violation);
            }
        }
    }
}

fn search(plan: &Plan, most: usize) -> Search {
    let world = World::new(plan);
    let mut search = Search { seen: HashSet::new(), path: Vec::new(), most, found: None, ends: 0 };
    search.explore(&world, plan.claim);
    search
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::sabotage::{self, Sabotage};

    const EXCLUSIVE: Claim = Claim { slack: 0, near: 1 };
    const TWO_OF_THEM: Claim = Claim { slack: 1, near: 3 };
    const LOCK: bool = false;
    const TRY: bool = true;
    const NONE: Faults = Faults { lost_answers: 0, copies: 0, lost_leases: 0, restarts: 0, gives_up: 0, deleted: 0 };
    const LOST: Faults = Faults { lost_answers: 1, ..NONE };

    fn plan(claim: Claim, callers: &'static [&'static [bool]], faults: Faults) -> Plan {
        Plan { claim, callers, faults }
    }

    /// Of `make test`.
    fn small() -> Vec<(&'static str, Plan)> {
        vec![
            ("2 x 2, nothing goes wrong", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK, LOCK]], NONE)),
            ("2 x 2 with tries", plan(EXCLUSIVE, &[&[LOCK, TRY], &[TRY, LOCK]], NONE)),
            ("3 x 1, nothing goes wrong", plan(EXCLUSIVE, &[&[LOCK], &[LOCK], &[LOCK]], NONE)),
            ("2 and 1, an answer is lost", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], LOST)),
            ("2 x 1, two answers are lost", plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { lost_answers: 2, ..NONE })),
            ("2 and 1, a request arrives twice", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], Faults { copies: 1, ..NONE })),
            ("2 and 1, a watch starts over", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], Faults { restarts: 1, ..NONE })),
            ("2 x 1, a lease is lost", plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { lost_leases: 1, ..NONE })),
            ("2 and 1, a lease is lost", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], Faults { lost_leases: 1, ..NONE })),
            ("2 x 1, a lease and an answer", plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { lost_leases: 1, ..LOST })),
            ("2 and 1, one gives up", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], Faults { gives_up: 1, ..NONE })),
            ("2 x 1, one gives up, an answer is lost", plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { gives_up: 1, ..LOST })),
            ("2 x 1 and a try, an answer is lost", plan(EXCLUSIVE, &[&[TRY], &[LOCK, TRY]], LOST)),
            ("2 x 1, a waiter's key is deleted", plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { deleted: 1, ..NONE })),
            ("two may have it, 2 and 1", plan(TWO_OF_THEM, &[&[LOCK, LOCK], &[LOCK]], NONE)),
            ("two may have it, 2 and 1, an answer is lost", plan(TWO_OF_THEM, &[&[LOCK, LOCK], &[LOCK]], LOST)),
        ]
    }

    /// Of `ETCDLOCK_MODEL=large`, which takes minutes and some gigabytes.
    fn large() -> Vec<(&'static str, Plan)> {
        let two = Faults { lost_answers: 2, gives_up: 1, ..NONE };
        vec![
            ("2 and 1 and 1, nothing goes wrong", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK], &[LOCK]], NONE)),
            ("3 x 1, an answer is lost", plan(EXCLUSIVE, &[&[LOCK], &[LOCK], &[LOCK]], LOST)),
            ("2 x 2, a watch starts over", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK, LOCK]], Faults { restarts: 1, ..NONE })),
            ("2 and 1, two answers are lost, one gives up", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], two)),
            ("2 and 1, a lease and an answer", plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], Faults { lost_leases: 1, ..LOST })),
            ("3 x 1, a waiter's key is deleted", plan(EXCLUSIVE, &[&[LOCK], &[LOCK], &[LOCK]], Faults { deleted: 1, ..NONE })),
            ("3 and 2, nothing goes wrong", plan(EXCLUSIVE, &[&[LOCK, LOCK, LOCK], &[LOCK, LOCK]], NONE)),
            ("two may have it, 2 x 2", plan(TWO_OF_THEM, &[&[LOCK, LOCK], &[LOCK, LOCK]], NONE)),
        ]
    }

    /// More than any of these has.
    const MOST: usize = 20_000_000;

    fn nothing_is_violated(plans: Vec<(&'static str, Plan)>) {
        let (mut states, start) = (0, Instant::now());
        for (name, plan) in plans {
            let start = Instant::now();
            let search = search(&plan, MOST);
            println!("model: {name}: {} states, {} ends, {:.1} s", search.seen.len(), search.ends, start.elapsed().as_secs_f64());
            if let Some(found) = search.found {
                panic!("{name}: {}\n  {}", found.violation, found.steps.join("\n  "));
            }
            assert!(search.seen.len() < MOST && search.ends > 0, "{name}: not all states were seen");
            states += search.seen.len();
        }
        println!("model: {states} states, nothing is violated, {:.1} s", start.elapsed().as_secs_f64());
    }

    #[test]
    fn nothing_is_violated_in_any_order_of_events() {
        // A path is as deep as a history is long.
        let size = std::env::var("ETCDLOCK_MODEL").unwrap_or_default();
        let plans = if size == "large" { [small(), large()].into_iter().flatten().collect() } else { small() };
        let search = std::thread::Builder::new().stack_size(1 << 30).spawn(move || nothing_is_violated(plans));
        search.expect("a thread").join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    /// Without one protection an order of events is found in which something is violated.
    #[test]
    fn each_protection_of_the_protocol_that_is_taken_out_is_missed() {
        let tried = [
            (Sabotage::HandOverSkipsOrder, plan(EXCLUSIVE, &[&[LOCK, LOCK], &[LOCK]], NONE)),
            (Sabotage::NoInProcessQueue, plan(EXCLUSIVE, &[&[LOCK, LOCK]], NONE)),
            (Sabotage::NoOwnKeyWatch, plan(EXCLUSIVE, &[&[LOCK], &[LOCK], &[LOCK]], Faults { deleted: 1, ..NONE })),
            (Sabotage::UnlockByName, plan(EXCLUSIVE, &[&[LOCK], &[LOCK]], Faults { gives_up: 1, ..LOST })),
        ];
        for (sabotage, plan) in tried {
            let search = std::thread::Builder::new().stack_size(1 << 30).spawn(move || {
                sabotage::choose(Some(sabotage));
                search(&plan, MOST)
            });
            let search = search.expect("a thread").join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let found = search.found.unwrap_or_else(|| panic!("{sabotage:?} is not caught in {} states", search.seen.len()));
            println!(
                "model: {sabotage:?} is caught after {} states and {} steps: {}",
                search.seen.len(),
                found.steps.len(),
                found.violation
            );
        }
    }
}
