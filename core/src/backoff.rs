//! Growing pauses between attempts, spread so that clients do not come in step.

use std::time::Duration;

use tokio::time::sleep;

pub(crate) const AT_FIRST: Duration = Duration::from_millis(50);
const AT_MOST: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Self {
        Backoff(AT_FIRST)
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.0.mul_f64(0.75 + 0.5 * fastrand::f64());
        self.0 = (self.0 * 2).min(AT_MOST);
        pause
    }

    pub(crate) async fn pause(&mut self) {
        sleep(self.next()).await;
    }
}
