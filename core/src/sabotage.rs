//! Protections that a test can take out, to see its checkers fail. In a normal build each question
//! is a constant `false`, and nothing of this is left.

/// One protection taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(any(test, feature = "sabotage")), allow(dead_code))]
pub(crate) enum Sabotage {
    /// The deadline is counted from the receipt of an answer, as etcd's Go client does.
    DeadlineFromReceipt,
    /// A ticket is deleted by its key alone, and that is the same for every lock of a session.
    UnlockByName,
    /// Nobody hears that a ticket of ours is gone.
    NoOwnKeyWatch,
    /// A renewal that is confirmed after the deadline counts.
    LateAnswerRevives,
    /// While this process holds the lock, its other waiters get it too.
    NoInProcessQueue,
    /// The next ticket of a hand-over holds the lock, whoever is ahead of it.
    HandOverSkipsOrder,
}

#[cfg(not(any(test, feature = "sabotage")))]
pub(crate) const fn is_on(_: Sabotage) -> bool {
    false
}

#[cfg(any(test, feature = "sabotage"))]
mod chosen {
    use super::Sabotage;

    /// Each with its name in `ETCDLOCK_SABOTAGE`.
    pub(crate) const ALL: [(&str, Sabotage); 6] = [
        ("deadline-from-receipt", Sabotage::DeadlineFromReceipt),
        ("unlock-by-name", Sabotage::UnlockByName),
        ("no-own-key-watch", Sabotage::NoOwnKeyWatch),
        ("late-answer-revives", Sabotage::LateAnswerRevives),
        ("no-in-process-queue", Sabotage::NoInProcessQueue),
        ("hand-over-skips-order", Sabotage::HandOverSkipsOrder),
    ];

    thread_local! {
        /// Of this thread, on which a simulation runs whole processes.
        static OF_THREAD: std::cell::Cell<Option<Sabotage>> = const { std::cell::Cell::new(None) };
    }

    #[cfg(test)]
    pub(crate) fn choose(sabotage: Option<Sabotage>) {
        OF_THREAD.set(sabotage);
    }

    pub(crate) fn is_on(sabotage: Sabotage) -> bool {
        static OF_PROCESS: std::sync::OnceLock<Option<Sabotage>> = std::sync::OnceLock::new();
        let of_process = || {
            let name = std::env::var("ETCDLOCK_SABOTAGE").ok().filter(|name| !name.is_empty())?;
            let known = ALL.iter().find(|(known, _)| *known == name);
            // A name that does nothing would make a test pass that must fail.
            Some(known.unwrap_or_else(|| panic!("ETCDLOCK_SABOTAGE={name} is not one of {ALL:?}")).1)
        };
        let chosen = OF_THREAD.get().or_else(|| *OF_PROCESS.get_or_init(of_process));
        chosen == Some(sabotage)
    }
}

#[cfg(any(test, feature = "sabotage"))]
pub(crate) use chosen::*;
