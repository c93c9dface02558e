//! Throw-away etcd servers on free loopback ports: one ([`Etcd`]), three that are a [`Cluster`], and
//! a [`Proxy`] that does to their connections what bad networks do. Where root allows it, three of them on a [`Network`] of
//! its own, whose partitions are real.

mod cluster;
#[cfg(target_os = "linux")]
mod network;
mod proxy;

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub use cluster::Cluster;
#[cfg(target_os = "linux")]
pub use network::Network;
pub use proxy::{Direction, Fault, Proxy};

const PATIENCE: Duration = Duration::from_secs(60);

/// One etcd server with an empty database. It ends when this is dropped, and also when this
/// process dies in any other way.
pub struct Etcd {
    server: Server,
    ports: Ports,
}

impl Etcd {
    /// Starts a server and waits until it answers.
    pub fn start() -> Etcd {
        Self::start_with(&[])
    }

    /// Starts a server with more arguments. With `--cert-file` it serves clients by TLS.
    pub fn start_with(args: &[&str]) -> Etcd {
        let ports = Ports::free();
        let peer = format!("http://127.0.0.1:{}", ports.peer);
        let mut all = ports.args(&peer, &ports.client_url(args));
        all.extend(["--initial-cluster".to_owned(), format!("default={peer}")]);
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let etcd = Etcd { server: Server::start(all), ports };
        etcd.wait_until_healthy();
        etcd
    }

    /// `127.0.0.1:PORT`, for clients.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.ports.client)
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.server.pid
    }

    /// A proxy in front of the server's client port.
    pub fn proxy(&self) -> Proxy {
        Proxy::to(self.ports.client)
    }

    /// Kills the server without a word; its data stays.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Starts the server again on its port and data, after [`kill`](Self::kill).
    pub fn start_again(&mut self) {
        self.server.start_again();
        self.wait_until_healthy();
    }

    /// A copy of the data of a server that was killed.
    pub fn back_up(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().expect("a folder for a copy");
        copy_all(&self.server.data.path().join("etcd"), copy.path());
        copy
    }

    /// Puts a copy in the place of the data of a server that was killed; without one it will be empty.
    pub fn restore(&self, copy: Option<&Path>) {
        let data = self.server.data.path().join("etcd");
        std::fs::remove_dir_all(&data).expect("the data of a server that was killed");
        if let Some(copy) = copy {
            copy_all(copy, &data);
        }
    }

    /// etcd's own gRPC proxy in front of the server.
    pub fn grpc_proxy(&self) -> GrpcProxy {
        let port = free_port();
        let listen = format!("--listen-addr=127.0.0.1:{port}");
        let proxy = Server::start(vec!["grpc-proxy".into(), "start".into(), format!("--endpoints={}", self.endpoint()), listen]);
        proxy.wait_until("a gRPC proxy", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        GrpcProxy { _proxy: proxy, port }
    }

    /// Stops the server's process (SIGSTOP): connections stay, nothing answers.
    pub fn stop(&self) {
        self.server.signal(Signal::SIGSTOP);
    }

    /// Lets it go on (SIGCONT).
    pub fn cont(&self) {
        self.server.signal(Signal::SIGCONT);
    }

    /// The value of one of the server's metrics; the sum of them if it has labels.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let metrics = http(self.ports.metrics, "GET /metrics", "")?;
        let of_name = metrics.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        let values: Vec<f64> = of_name.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Runs `etcdctl` on this server and returns what it printed; `None` where there is no etcdctl.
    pub fn etcdctl(&self, args: &[&str]) -> Option<String> {
        run(self.etcdctl_command()?.args(args))
    }

    /// A command line that starts with `etcdctl --endpoints …`.
    pub fn etcdctl_command(&self) -> Option<Command> {
        etcdctl(&self.endpoint())
    }

    fn wait_until_healthy(&self) {
        self.server.wait_until(&self.endpoint(), || is_healthy(self.ports.metrics));
    }
}

/// A running `etcd grpc-proxy`.
pub struct GrpcProxy {
    _proxy: Server,
    port: u16,
}

impl GrpcProxy {
    /// `127.0.0.1:PORT`, for clients.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

fn copy_all(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-R").arg(from.join(".")).arg(to).status();
    assert!(copied.is_ok_and(|status| status.success()), "{} cannot be copied", from.display());
}

fn run(command: &mut Command) -> Option<String> {
    let output = command.output().expect("etcdctl runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn etcdctl(endpoints: &str) -> Option<Command> {
    let mut command = Command::new(find("etcdctl")?);
    command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints]);
    Some(command)
}

/// An etcd process with its data.
struct Server {
    keeper: Child,
    pid: u32,
    /// The command that starts it, if it is not to be started here.
    by: Vec<String>,
    args: Vec<String>,
    data: tempfile::TempDir,
}

/// Starts the server and ends it when the pipe to its standard input closes: when the rig says so,
/// or when the rig is gone.
const KEEPER: &str = r#""$@" & pid=$!; echo $pid; read -r _; kill -CONT $pid; kill -KILL $pid; wait $pid 2>/dev/null; exit 0"#;

impl Server {
    fn start(args: Vec<String>) -> Server {
        Self::start_by(Vec::new(), args)
    }

    fn start_by(by: Vec<String>, args: Vec<String>) -> Server {
        let data = tempfile::Builder::new().prefix("etcdlock-etcd-").tempdir().expect("a folder for etcd's data");
        let (keeper, pid) = Self::spawn(&data, &by, &args);
        Server { keeper, pid, by, args, data }
    }

    fn spawn(data: &tempfile::TempDir, by: &[String], args: &[String]) -> (Child, u32) {
        let is_proxy = args.first().is_some_and(|first| first == "grpc-proxy");
        let etcd = find("etcd").expect("etcd is not installed: run `make setup`, or put etcd on the PATH");
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "etcd-keeper"])
            .args(by)
            .arg(etcd)
            .args(args)
            .args((!is_proxy).then(|| format!("--data-dir={}", data.path().join("etcd").display())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(data.path().join("log")).map_or(Stdio::null(), Stdio::from))
            .spawn()
            .expect("sh starts etcd");
        let mut pid = String::new();
        BufReader::new(keeper.stdout.take().expect("a pipe")).read_line(&mut pid).expect("the process id");
        (keeper, pid.trim().parse().expect("a process id"))
    }

    fn start_again(&mut self) {
        self.kill();
        (self.keeper, self.pid) = Self::spawn(&self.data, &self.by, &self.args);
    }

    fn kill(&mut self) {
        let _ = self.keeper.stdin.take().map(|mut pipe| pipe.write_all(b"\n"));
        let _ = self.keeper.wait();
    }

    fn signal(&self, signal: Signal) {
        // Never the pid of another process: only the keeper waits for it, and the keeper lives.
        if self.keeper.stdin.is_some() {
            let _ = kill(Pid::from_raw(self.pid.cast_signed()), signal);
        }
        // One thread takes the signal and stops the others, and if it is that one which waits for the disk, they work on until then.
        if signal == Signal::SIGSTOP && Path::new("/proc/self/task").exists() {
            self.wait_until("each thread has stopped", || threads(self.pid).iter().all(|state| state == "T"));
        }
    }

    fn wait_until(&self, what: &str, is_so: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so() {
            if Instant::now() > until {
                let log = std::fs::read_to_string(self.data.path().join("log")).unwrap_or_default();
                let last: Vec<_> = log.lines().rev().take(10).collect();
                panic!("etcd at {what} does not answer; its last words, newest first:\n{}", last.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The ports of one server.
#[derive(Clone, Copy)]
struct Ports {
    client: u16,
    peer: u16,
    /// Plain HTTP, whatever the others speak.
    metrics: u16,
}

impl Ports {
    fn free() -> Ports {
        Ports { client: free_port(), peer: free_port(), metrics: free_port() }
    }

    fn client_url(&self, args: &[&str]) -> String {
        let scheme = if args.contains(&"--cert-file") { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client)
    }

    /// Arguments that are the same for every server; `peer` and `client` are what others are told.
    fn args(&self, peer: &str, client: &str) -> Vec<String> {
        let own_client = client.split_once("://").map_or("http", |(scheme, _)| scheme);
        let pairs = [
            ("--listen-client-urls", format!("{own_client}://127.0.0.1:{}", self.client)),
            ("--advertise-client-urls", client.to_owned()),
            ("--listen-peer-urls", format!("http://127.0.0.1:{}", self.peer)),
            ("--initial-advertise-peer-urls", peer.to_owned()),
            ("--listen-metrics-urls", format!("http://127.0.0.1:{}", self.metrics)),
        ];
        pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }
}

fn is_healthy(metrics: u16) -> bool {
    http(metrics, "GET /health", "").is_some_and(|answer| answer.contains(r#""health":"true""#))
}

/// One HTTP request on the loopback; `None` without an answer within 2 s.
fn http(port: u16, what: &str, body: &str) -> Option<String> {
    let ask = || {
        let limit = Some(Duration::from_secs(2));
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(limit)?;
        let length = body.len();
        write!(stream, "{what} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    let answer = ask().ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// The state of each thread of a process, a letter as in `ps`.
fn threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    // Behind the name, which is in brackets and may have any letter.
    let state = |stat: String| Some(stat.rsplit_once(") ")?.1.split(' ').next()?.to_owned());
    tasks.filter_map(|task| state(std::fs::read_to_string(task.path().join("stat")).ok()?)).collect()
}

/// One request to etcd's JSON gateway.
fn gateway(client: u16, path: &str, body: &Value) -> Option<Value> {
    serde_json::from_str(&http(client, &format!("POST /v3/{path}"), &body.to_string())?).ok()
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

/// A loopback port that nobody listens on now. It is below those that the system gives to outgoing
/// connections, so that it stays free until it is used.
pub fn free_port() -> u16 {
    static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    // The system's own choice is as random as needed.
    let seed = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    loop {
        let port = 10_000 + seed().expect("a free port").port() % 22_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && given.insert(port) {
            return port;
        }
    }
}
