//! The time that deadlines are counted on.

use std::time::Duration;

/// A monotonic clock that goes on while the machine is suspended. Injected, so that tests can run
/// in virtual time.
pub(crate) trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary fixed point.
    fn now(&self) -> Duration;
}

/// `CLOCK_BOOTTIME`. `std::time::Instant` stops while a Linux machine is suspended; a lease on the
/// server does not.
pub(crate) struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Duration {
        #[cfg(target_os = "linux")]
        const ID: nix::time::ClockId = nix::time::ClockId::CLOCK_BOOTTIME;
        #[cfg(not(target_os = "linux"))]
        const ID: nix::time::ClockId = nix::time::ClockId::CLOCK_MONOTONIC;
        // The call fails only for a clock that the kernel does not have. "The end of time" then
        // makes every deadline pass: the safe side.
        nix::time::clock_gettime(ID).map(Duration::from).unwrap_or(Duration::from_secs(1 << 40))
    }
}
