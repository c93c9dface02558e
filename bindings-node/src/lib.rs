//! The native part of the npm package: handles of the core's sessions, mutexes and holds, and a post
//! box through which their results reach the event loop. What users see is in `index.js`.

mod handles;
mod held;
mod post;

use napi_derive::napi;

/// The command `etcdlock`, for `npx etcdlock`: runs the arguments (without the program's name) and
/// returns the exit code.
#[napi]
pub fn command(args: Vec<String>) -> i32 {
    let program = std::iter::once("etcdlock".to_owned());
    etcdlock_cli::run(program.chain(args).map(Into::into))
}
