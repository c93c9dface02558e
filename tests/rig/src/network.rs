//! Machines of their own, as far as the network goes: each node is a network namespace with a cable to a switch. Three of
//! them run etcd. Real partitions are made by plugging cables into another switch, or out.
//!
//! The namespaces have no names: each lives as long as the processes in it, and the one that keeps it ends when the rig does
//! in any way.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use crate::{PATIENCE, Server, find, http, is_healthy};

const MEMBERS: usize = 3;
const SWITCHES: usize = 3;
/// The same on each node: they do not meet.
const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;
const METRICS: u16 = 2381;

/// A cluster of three etcd members (nodes 0 to 2) and nodes for clients, all on one switch at first.
pub struct Network {
    // The servers end before their namespaces.
    servers: Vec<Server>,
    nodes: Vec<Namespace>,
    switches: Namespace,
}

impl Network {
    /// Starts it with so many nodes for clients (3 and up); an error says what this machine does not allow.
    pub fn start(clients: usize) -> Result<Network, String> {
        let size = MEMBERS + clients;
        let network = Network {
            servers: Vec::new(),
            nodes: (0..size).map(|_| Namespace::new()).collect::<Result<_, _>>()?,
            switches: Namespace::new()?,
        };
        let mut plug = String::new();
        for switch in 0..SWITCHES {
            let _ = writeln!(plug, "link add switch{switch} type bridge\nlink set switch{switch} up");
        }
        for (n, node) in network.nodes.iter().enumerate() {
            let _ = writeln!(plug, "link add cable{n} type veth peer name net netns {}", node.pid());
            let _ = writeln!(plug, "link set cable{n} master switch0\nlink set cable{n} up");
        }
        network.switches.ip(&plug)?;
        for (n, node) in network.nodes.iter().enumerate() {
            node.ip(&format!("link set lo up\naddr add {}/24 dev net\nlink set net up", address(n)))?;
        }
        Ok(network.with_etcd())
    }

    fn with_etcd(mut self) -> Network {
        let url = |n, port| format!("http://{}:{port}", address(n));
        let all: Vec<_> = (0..MEMBERS).map(|n| format!("m{n}={}", url(n, PEERS))).collect();
        for n in 0..MEMBERS {
            let args = [
                ("--name", format!("m{n}")),
                ("--initial-cluster", all.join(",")),
                ("--listen-client-urls", url(n, CLIENTS)),
                ("--advertise-client-urls", url(n, CLIENTS)),
                ("--listen-peer-urls", url(n, PEERS)),
                ("--initial-advertise-peer-urls", url(n, PEERS)),
                ("--listen-metrics-urls", format!("http://127.0.0.1:{METRICS}")),
            ];
            let args = args.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
            self.servers.push(Server::start_by(self.nodes[n].enter(), args));
        }
        for (n, server) in self.servers.iter().enumerate() {
            server.wait_until(&address(n), || self.on(n, || is_healthy(METRICS)));
        }
        self
    }

    /// Endpoints of all members, with commas between.
    pub fn endpoints(&self) -> String {
        (0..MEMBERS).map(|n| self.endpoint(n)).collect::<Vec<_>>().join(",")
    }

    /// Endpoint of a member, for those who are on the network.
    pub fn endpoint(&self, member: usize) -> String {
        format!("{}:{CLIENTS}", address(member))
    }

    /// The member that leads, by its own word.
    pub fn wait_for_leader(&self) -> usize {
        let leads = |answer: String| answer.lines().any(|line| line == "etcd_server_is_leader 1");
        let until = Instant::now() + PATIENCE;
        loop {
            let leader = (0..MEMBERS).find(|&n| self.on(n, || http(METRICS, "GET /metrics", "").is_some_and(leads)));
            if let Some(leader) = leader {
                return leader;
            }
            assert!(Instant::now() < until, "none of the members leads");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A program that runs on a node.
    pub fn command(&self, node: usize, program: impl AsRef<OsStr>) -> Command {
        let [enter, args @ ..] = &self.nodes[node].enter()[..] else { unreachable!() };
        let mut command = Command::new(enter);
        command.args(args).arg(program);
        command
    }

    /// Runs this on a node: what it connects to is on the network.
    pub fn on<T: Send>(&self, node: usize, what: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(self.nodes[node].path()).expect("the namespace of a node");
        let there = move || {
            // It changes this thread alone.
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("a node that can be entered");
            what()
        };
        std::thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Plugs the cables of nodes into a switch (0 to 2). Those on other switches are out of reach, and nobody tells.
    pub fn plug_into(&self, switch: usize, nodes: &[usize]) {
        let moves: Vec<_> = nodes.iter().map(|n| format!("link set cable{n} master switch{switch}")).collect();
        self.switches.ip(&moves.join("\n")).expect("a cable");
    }

    /// Takes a node's network down: whatever it sends is refused at once.
    pub fn unplug(&self, node: usize) {
        self.nodes[node].ip("link set net down").expect("a cable");
    }

    /// Everybody is on the first switch again.
    pub fn heal(&self) {
        for node in &self.nodes {
            node.ip("link set net up").expect("a cable");
        }
        self.plug_into(0, &(0..self.nodes.len()).collect::<Vec<_>>());
    }
}

fn address(node: usize) -> String {
    format!("10.0.0.{}", node + 1)
}

/// A network namespace, and the process that keeps it.
struct Namespace {
    keeper: Child,
}

impl Namespace {
    fn new() -> Result<Namespace, String> {
        if find("ip").is_none() {
            return Err("there is no `ip` (iproute2)".into());
        }
        let mut keeper = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo made; read -r _"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let mut line = String::new();
        let _ = BufReader::new(keeper.stdout.take().expect("a pipe")).read_line(&mut line);
        if line.trim() == "made" {
            return Ok(Namespace { keeper });
        }
        let output = keeper.wait_with_output().map_err(|error| error.to_string())?;
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    fn pid(&self) -> u32 {
        self.keeper.id()
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.pid())
    }

    /// What is put before a command to have it run here.
    fn enter(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.path()), "--".into()]
    }

    /// Has `ip` do what these lines say.
    fn ip(&self, lines: &str) -> Result<(), String> {
        let [enter, args @ ..] = &self.enter()[..] else { unreachable!() };
        let mut ip = Command::new(enter);
        ip.args(args).args(["ip", "-batch", "-"]);
        let mut ip = ip.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|error| format!("nsenter: {error}"))?;
        let _ = ip.stdin.take().expect("a pipe").write_all(format!("{lines}\n").as_bytes());
        let output = ip.wait_with_output().map_err(|error| error.to_string())?;
        let why = || format!("`ip` is refused: {}", String::from_utf8_lossy(&output.stderr).trim());
        output.status.success().then_some(()).ok_or_else(why)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}
