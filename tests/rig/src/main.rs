//! `etcdlock-rig`: starts an etcd, prints its endpoint, and ends it when standard input closes. With
//! a command, runs that with `ETCDLOCK_ENDPOINTS` set, and ends with its exit code. This is how the
//! suites in other languages get their etcd.

use std::io::Read;
use std::process::{Command, exit};

fn main() {
    let etcd = etcdlock_rig::Etcd::start();
    let command: Vec<_> = std::env::args_os().skip(1).collect();
    let Some((program, args)) = command.split_first() else {
        println!("{}", etcd.endpoint());
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        return;
    };
    let status = Command::new(program)
        .args(args)
        .env("ETCDLOCK_ENDPOINTS", etcd.endpoint())
        .env("ETCDLOCK_ETCD_PID", etcd.pid().to_string())
        .status();
    drop(etcd);
    match status {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("etcdlock-rig: {} cannot be started: {error}", program.to_string_lossy());
            exit(127);
        }
    }
}
