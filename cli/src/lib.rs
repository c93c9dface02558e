//! The command `etcdlock` as a library, so that `python -m etcdlock` and `npx etcdlock` are the same
//! program.

mod arguments;
mod ending;
mod guard;
mod run;
mod show;
mod speak;

use std::ffi::OsString;
use std::time::Duration;

use arguments::{Arguments, Command};
use clap::Parser;
use etcdlock::blocking::Session;
use etcdlock::{Error, ErrorKind};

/// Exit codes, from `sysexits.h` where it has a fitting one.
mod exit {
    pub(crate) const OK: i32 = 0;
    pub(crate) const USAGE: i32 = 64;
    pub(crate) const UNAVAILABLE: i32 = 69;
    pub(crate) const INTERNAL: i32 = 70;
    /// The lock was lost while the command ran.
    pub(crate) const LOST: i32 = 74;
    /// What was asked for cannot be written to standard output (`EX_IOERR`; the same number).
    pub(crate) const OUTPUT: i32 = 74;
    /// The lock was not acquired.
    pub(crate) const NOT_ACQUIRED: i32 = 75;
    pub(crate) const DENIED: i32 = 77;
    pub(crate) const NOT_EXECUTABLE: i32 = 126;
    pub(crate) const NOT_FOUND: i32 = 127;
    /// Plus the number of the signal.
    pub(crate) const SIGNALLED: i32 = 128;
}

/// Runs the command line `args`, the program's name first, and returns its exit code. It reads
/// standard input, writes to standard output and error, and takes over the process's signals while
/// it runs a command.
pub fn run(args: impl IntoIterator<Item = OsString>) -> i32 {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, and are no error.
            if !error.use_stderr() {
                show::print(&error.render().to_string());
                return exit::OK;
            }
            let _ = error.print();
            return exit::USAGE;
        }
    };
    let result = match &arguments.command {
        Command::Run(run) => return run::run(run),
        Command::Status { name, json, connection } => connect(connection).and_then(|session| show::status(&session, name, *json)),
        Command::List { prefix, json, connection } => connect(connection).and_then(|session| show::list(&session, prefix, *json)),
        Command::Watch { name, prefix, connection } => {
            connect(connection).and_then(|session| show::watch(&session, name, *prefix))
        }
        Command::Generate { what } => return arguments::generate(*what),
    };
    match result {
        Ok(()) => exit::OK,
        Err(error) => fail(&error),
    }
}

fn connect(connection: &arguments::Connection) -> Result<Session, Error> {
    // Nothing is held by those who only look, so the least lease will do.
    Session::connect(connection.target(), connection.options().ttl(Duration::from_secs(5)))
}

/// Says what is wrong and returns the exit code for it.
fn fail(error: &Error) -> i32 {
    speak::complain(&error.to_string());
    match error.kind() {
        ErrorKind::Timeout | ErrorKind::Busy => exit::NOT_ACQUIRED,
        ErrorKind::Lost => exit::LOST,
        ErrorKind::Unavailable | ErrorKind::Closed => exit::UNAVAILABLE,
        ErrorKind::Denied => exit::DENIED,
        ErrorKind::Invalid => exit::USAGE,
        _ => exit::INTERNAL,
    }
}
