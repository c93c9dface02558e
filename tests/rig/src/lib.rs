//! Throw-away etcd servers on free loopback ports.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One etcd server with an empty database. It ends when this is dropped, and also when this
/// process dies in any other way.
pub struct Etcd {
    keeper: Child,
    pid: u32,
    port: u16,
    peer_port: u16,
    args: Vec<String>,
    data: tempfile::TempDir,
}

/// Starts the server and ends it when the pipe to its standard input closes: when the rig says so,
/// or when the rig is gone.
const KEEPER: &str = r#""$@" & pid=$!; echo $pid; read -r _; kill -CONT $pid; kill -KILL $pid; wait $pid 2>/dev/null; exit 0"#;

impl Etcd {
    /// Starts a server and waits until it answers.
    pub fn start() -> Etcd {
        Self::start_with(&[])
    }

    /// Starts a server with more arguments.
    pub fn start_with(args: &[&str]) -> Etcd {
        let data = tempfile::Builder::new().prefix("etcdlock-etcd-").tempdir().expect("a folder for etcd's data");
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let (port, peer_port) = (free_port(), free_port());
        let (keeper, pid) = spawn(data.path(), port, peer_port, &args);
        let etcd = Etcd { keeper, pid, port, peer_port, args, data };
        etcd.wait_until_healthy();
        etcd
    }

    /// `127.0.0.1:PORT`, for clients.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills the server without a word; its data stays.
    pub fn kill(&mut self) {
        let _ = self.keeper.stdin.take().map(|mut pipe| pipe.write_all(b"\n"));
        let _ = self.keeper.wait();
    }

    /// Starts the server again on its port and data, after [`kill`](Self::kill).
    pub fn start_again(&mut self) {
        (self.keeper, self.pid) = spawn(self.data.path(), self.port, self.peer_port, &self.args);
        self.wait_until_healthy();
    }

    /// Runs `etcdctl` on this server and returns what it printed; `None` where there is no etcdctl.
    pub fn etcdctl(&self, args: &[&str]) -> Option<String> {
        let output = self.etcdctl_command()?.args(args).output().expect("etcdctl runs");
        assert!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command line that starts with `etcdctl --endpoints …`.
    pub fn etcdctl_command(&self) -> Option<Command> {
        let mut command = Command::new(find("etcdctl")?);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint()]);
        Some(command)
    }

    fn wait_until_healthy(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while !self.is_healthy() {
            assert!(Instant::now() < until, "etcd at {} does not answer", self.endpoint());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_healthy(&self) -> bool {
        let ask = || {
            let mut stream = TcpStream::connect(self.endpoint())?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            std::io::Result::Ok(answer.contains(r#""health":"true""#))
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(data: &Path, port: u16, peer_port: u16, args: &[String]) -> (Child, u32) {
    let etcd = find("etcd").expect("etcd is not installed: run `make setup`, or put etcd on the PATH");
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut keeper = Command::new("sh")
        .args(["-c", KEEPER, "etcd-keeper"])
        .arg(etcd)
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(data.with_extension("log")).map_or(Stdio::null(), Stdio::from))
        .spawn()
        .expect("sh starts etcd");
    let mut pid = String::new();
    BufReader::new(keeper.stdout.take().expect("a pipe")).read_line(&mut pid).expect("the process id");
    let _ = std::fs::remove_file(data.with_extension("log"));
    (keeper, pid.trim().parse().expect("a process id"))
}

/// A program from `$NAME_BIN` (such as `$ETCD_BIN`), the PATH, or the project's own `.venv`.
pub fn find(program: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(format!("{}_BIN", program.to_uppercase())) {
        return Some(path.into());
    }
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain([venv]).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A loopback port that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}
