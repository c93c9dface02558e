//! The command line, and help that teaches by example.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use etcdlock::{Options, Target};

use crate::exit;

const EXAMPLES: &str = "\
Examples:
  etcdlock run nightly-report -- make report            run it, one at a time in the whole cluster
  etcdlock run --try nightly-report -- make report      only if nobody runs it now (exit 75 if somebody does)
  etcdlock run --timeout 30s deploy -- ./deploy.sh      wait for at most 30 seconds (exit 75 after that)
  etcdlock status deploy                                who holds it, who waits
  etcdlock list /jobs/                                  what is held under a prefix

The target is --endpoints, else $ETCDLOCK_ENDPOINTS, else 127.0.0.1:2379.

Exit codes of run: the command's own; 75 the lock was not acquired; 74 it was lost; 69 etcd cannot be reached;
77 etcd refuses the user; 64 usage; 126 and 127 the command cannot be run or found; 128+N ended by signal N.";

/// Run a command while holding a distributed lock on etcd: flock for a cluster.
#[derive(Parser)]
#[command(name = "etcdlock", version, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run a command while holding the lock
    Run(Run),
    /// Show who holds a lock and who waits for it
    Status {
        /// Name of the lock
        name: String,
        /// Machine-readable output
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Show which locks are held, with holder and length of the queue
    List {
        /// Only names that start with this
        #[arg(default_value = "")]
        prefix: String,
        /// Machine-readable output
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Follow a lock: a live view on a terminal, elsewhere a line when a look, each 0.5 s, finds a change
    Watch {
        /// Name of the lock
        name: String,
        /// Follow all names that start with NAME
        #[arg(long)]
        prefix: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Print the man page or a shell's completions
    Generate {
        /// What to print
        what: Generated,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Generated {
    Man,
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
#[command(
    override_usage = "etcdlock run [OPTIONS] <NAME> -- <COMMAND>...",
    after_help = "Example:\n  etcdlock run --timeout 30s nightly-report -- make report\n\n\
The command finds the name and the fencing token in ETCDLOCK_NAME and ETCDLOCK_TOKEN."
)]
pub(crate) struct Run {
    /// Name of the lock
    pub(crate) name: String,
    /// Do not wait: exit 75 if somebody holds the lock
    #[arg(long = "try", conflicts_with = "timeout")]
    pub(crate) only_try: bool,
    /// Wait for at most this long, such as 30s, 5m or 500ms; then exit 75
    #[arg(long, value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// How long the lock stays taken if this machine dies
    #[arg(long, value_parser = duration, default_value = "15s")]
    pub(crate) ttl: Duration,
    /// End the command and release the lock after this long
    #[arg(long, value_parser = duration)]
    pub(crate) max_hold: Option<Duration>,
    /// When the lock is lost, the command gets TERM, and KILL after this long
    #[arg(long, value_parser = duration, default_value = "5s")]
    pub(crate) kill_after: Duration,
    /// Say nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Say each step, with times
    #[arg(short, long, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Connection {
    /// etcd's endpoints, separated by commas
    #[arg(long, env = "ETCDLOCK_ENDPOINTS", default_value = etcdlock::DEFAULT_TARGET, hide_env_values = true)]
    endpoints: String,
    /// User name; the password comes from $ETCDLOCK_PASSWORD or --password-file
    #[arg(long, env = "ETCDLOCK_USER")]
    user: Option<String>,
    /// File with the password; without it, $ETCDLOCK_PASSWORD
    #[arg(long, env = "ETCDLOCK_PASSWORD_FILE", value_parser = first_line)]
    password_file: Option<String>,
    /// Certificates that may sign the server's (PEM file)
    #[arg(long, env = "ETCDLOCK_CACERT")]
    cacert: Option<String>,
    /// Client certificate (PEM file)
    #[arg(long, env = "ETCDLOCK_CERT")]
    cert: Option<String>,
    /// Key of the client certificate (PEM file)
    #[arg(long, env = "ETCDLOCK_KEY")]
    key: Option<String>,
    /// Prefix for all names
    #[arg(long, env = "ETCDLOCK_NAMESPACE", default_value = "", hide_default_value = true)]
    namespace: String,
    /// Label that others see (default: host:pid)
    #[arg(long, env = "ETCDLOCK_OWNER")]
    owner: Option<String>,
    /// How long to try to reach etcd at first; with --timeout at most that long
    #[arg(long, value_parser = duration, default_value = "5s")]
    pub(crate) connect_timeout: Duration,
}

impl Connection {
    pub(crate) fn target(&self) -> Target {
        self.endpoints.as_str().into()
    }

    pub(crate) fn options(&self) -> Options {
        let mut options = Options::default().namespace(&self.namespace).connect_timeout(self.connect_timeout).language("cli");
        // Never an argument: other users of the machine can read those.
        let password = self.password_file.clone().or_else(|| std::env::var("ETCDLOCK_PASSWORD").ok());
        if let Some(user) = &self.user {
            options = options.user(user);
            if let Some(password) = password {
                options = options.password(password);
            }
        }
        if let Some(ca) = &self.cacert {
            options = options.ca(ca);
        }
        if let Some(cert) = &self.cert {
            options = options.cert(cert);
        }
        if let Some(key) = &self.key {
            options = options.key(key);
        }
        if let Some(owner) = &self.owner {
            options = options.owner(owner);
        }
        options
    }
}

fn first_line(path: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Ten years: a clock that counts from now can count so far.
const LONGEST: f64 = 10.0 * 365.0 * 24.0 * 3600.0;

/// `30s`, `5m`, `2h`, `500ms`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let rule = "write a number and a unit: 500ms, 30s, 5m or 2h (without a unit it is seconds)";
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| rule.to_owned())?;
    let seconds = match &text[digits.len()..] {
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(rule.to_owned()),
    };
    if seconds > LONGEST {
        return Err("at most ten years".to_owned());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| rule.to_owned())
}

pub(crate) fn generate(what: Generated) -> i32 {
    let mut command = Arguments::command();
    let mut out = Vec::new();
    let shell = match what {
        Generated::Man => None,
        Generated::Bash => Some(clap_complete::Shell::Bash),
        Generated::Zsh => Some(clap_complete::Shell::Zsh),
        Generated::Fish => Some(clap_complete::Shell::Fish),
    };
    match shell {
        Some(shell) => clap_complete::generate(shell, &mut command, "etcdlock", &mut out),
        None => {
            command.build();
            let pages =
                std::iter::once(command.clone()).chain(command.get_subcommands().filter(|c| c.get_name() != "help").cloned());
            for page in pages {
                if let Err(error) = clap_mangen::Man::new(page).render(&mut out) {
                    crate::speak::complain(&error.to_string());
                    return exit::INTERNAL;
                }
            }
        }
    }
    crate::show::print(&String::from_utf8_lossy(&out));
    exit::OK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000), ("7", 7_000), ("0.5s", 500)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "5 m", "-1s", "5d", "1e999s", "NaN"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
