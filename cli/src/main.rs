//! The command `etcdlock`.

fn main() -> ! {
    std::process::exit(etcdlock_cli::run(std::env::args_os()))
}
