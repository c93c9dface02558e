//! Three etcd servers that are one cluster, with a proxy in front of every port that matters.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{Fault, PATIENCE, Ports, Proxy, Server, etcdctl, gateway, http, run};

const SIZE: usize = 3;

/// Three etcd members. Clients reach each through a [`Proxy`], and so do the other members, so that
/// any of them can be cut off from clients, from the others, or both.
pub struct Cluster {
    members: Vec<Member>,
    pids: Arc<Vec<AtomicU32>>,
}

struct Member {
    server: Server,
    ports: Ports,
    clients: Proxy,
    peers: Proxy,
}

impl Cluster {
    /// Starts three members and waits until they have a leader and all answer.
    pub fn start() -> Cluster {
        Self::start_with(&[])
    }

    /// With more arguments for each.
    pub fn start_with(args: &[&str]) -> Cluster {
        let pids: Arc<Vec<AtomicU32>> = Arc::new((0..SIZE).map(|_| AtomicU32::new(0)).collect());
        let reached: Vec<_> = (0..SIZE)
            .map(|_| {
                let ports = Ports::free();
                let pids = pids.clone();
                let who_is = move |port| pids.iter().position(|pid| has_socket(pid.load(Ordering::Relaxed), port));
                (ports, Proxy::to(ports.client), Proxy::with_clients(ports.peer, Box::new(who_is)))
            })
            .collect();
        let peers = reached.iter().enumerate().map(|(n, (.., peers))| format!("m{n}=http://{}", peers.endpoint()));
        let peers = peers.collect::<Vec<_>>().join(",");
        let members = reached.into_iter().enumerate().map(|(n, (ports, clients, peer))| {
            let scheme = if args.contains(&"--cert-file") { "https" } else { "http" };
            let mut all = ports.args(&format!("http://{}", peer.endpoint()), &format!("{scheme}://{}", clients.endpoint()));
            all.extend(["--name", &format!("m{n}"), "--initial-cluster", &peers].map(str::to_owned));
            all.extend(args.iter().map(|arg| (*arg).to_owned()));
            let server = Server::start(all);
            pids[n].store(server.pid, Ordering::Relaxed);
            Member { server, ports, clients, peers: peer }
        });
        let cluster = Cluster { members: members.collect(), pids: pids.clone() };
        for n in 0..SIZE {
            cluster.wait_until_healthy(n);
        }
        cluster
    }

    /// How many members it was started with.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Endpoints of all members, through their proxies, with commas between.
    pub fn endpoints(&self) -> String {
        (0..self.size()).map(|n| self.endpoint(n)).collect::<Vec<_>>().join(",")
    }

    /// Endpoint of a member, through its proxy.
    pub fn endpoint(&self, member: usize) -> String {
        self.members[member].clients.endpoint()
    }

    /// Endpoint of a member without the proxy, for observers.
    pub fn direct_endpoint(&self, member: usize) -> String {
        format!("127.0.0.1:{}", self.members[member].ports.client)
    }

    /// The process id of a member.
    pub fn pid(&self, member: usize) -> u32 {
        self.members[member].server.pid
    }

    /// The proxy between clients and a member.
    pub fn clients(&self, member: usize) -> &Proxy {
        &self.members[member].clients
    }

    /// The proxy through which the other members reach a member.
    pub fn peers(&self, member: usize) -> &Proxy {
        &self.members[member].peers
    }

    /// Kills a member without a word; its data stays.
    pub fn kill(&mut self, member: usize) {
        self.members[member].server.kill();
    }

    /// Starts a member again, after [`kill`](Self::kill), without waiting for it.
    pub fn start_again(&mut self, member: usize) {
        let server = &mut self.members[member].server;
        if let Some(at) = server.args.iter().position(|arg| arg == "--initial-cluster-state") {
            server.args.drain(at..at + 2);
        }
        server.start_again();
        self.pids[member].store(server.pid, Ordering::Relaxed);
    }

    /// Stops a member's process (SIGSTOP): connections stay, nothing answers.
    pub fn stop(&self, member: usize) {
        self.members[member].server.signal(Signal::SIGSTOP);
    }

    /// Lets a stopped member go on (SIGCONT).
    pub fn cont(&self, member: usize) {
        self.members[member].server.signal(Signal::SIGCONT);
    }

    /// Cuts a member from the others, in both directions, while its clients still reach it.
    pub fn isolate(&self, member: usize) {
        for (n, other) in self.members.iter().enumerate() {
            if n == member {
                other.peers.set_both(Fault::Cut);
            } else {
                other.peers.cut_off(member);
            }
        }
    }

    /// Ends the network faults of all proxies.
    pub fn heal(&self) {
        (0..self.size()).for_each(|member| self.heal_member(member));
    }

    /// Ends the network faults of one member.
    pub fn heal_member(&self, member: usize) {
        self.members[member].clients.heal();
        self.members[member].peers.heal();
        self.members.iter().for_each(|other| other.peers.let_in(member));
    }

    /// Waits until a member answers, knows a leader and can commit.
    pub fn wait_until_healthy(&self, member: usize) {
        let Member { server, ports, .. } = &self.members[member];
        server.wait_until(&self.direct_endpoint(member), || crate::is_healthy(ports.metrics));
    }

    /// Whether a member says that it leads.
    fn leads(&self, member: usize) -> bool {
        let metrics = http(self.members[member].ports.metrics, "GET /metrics", "").unwrap_or_default();
        metrics.lines().any(|line| line == "etcd_server_is_leader 1")
    }

    /// The member that leads, by its own word; a stopped one cannot say so and takes 2 s to ask.
    pub fn leader(&self) -> Option<usize> {
        (0..self.size()).find(|&member| self.leads(member))
    }

    /// Waits until one of these leads.
    pub fn wait_for_leader_among(&self, members: &[usize]) -> usize {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = members.iter().copied().find(|&member| self.leads(member)) {
                return leader;
            }
            assert!(Instant::now() < until, "none of the members {members:?} leads");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until there is a leader.
    pub fn wait_for_leader(&self) -> usize {
        self.wait_for_leader_among(&(0..self.size()).collect::<Vec<_>>())
    }

    /// Makes a member the leader; false if it did not come to that.
    pub fn move_leader(&self, to: usize) -> bool {
        let Some(leader) = self.leader() else { return false };
        if leader == to {
            return true;
        }
        let Some(id) = self.id_of(to) else { return false };
        self.ask(leader, "maintenance/transfer-leadership", &json!({ "targetID": id })).is_some()
            && (0..100).any(|_| {
                std::thread::sleep(Duration::from_millis(20));
                self.leads(to)
            })
    }

    /// One request to a member's JSON gateway, without its proxy, such as `kv/range`. `None` without
    /// an answer, and for an error.
    pub fn ask(&self, member: usize, path: &str, body: &Value) -> Option<Value> {
        // An error has the one before etcd 3.6, and the other from then on.
        let is_error = |answer: &Value| answer.get("error").is_some() || answer.get("code").is_some();
        gateway(self.members[member].ports.client, path, body).filter(|answer| !is_error(answer))
    }

    fn id_of(&self, member: usize) -> Option<Value> {
        let status = self.ask(member, "maintenance/status", &json!({}))?;
        status.pointer("/header/member_id").cloned()
    }

    /// Forgets all history up to now; the revision that it was compacted at.
    pub fn compact(&self) -> Option<i64> {
        let leader = self.leader()?;
        let status = self.ask(leader, "maintenance/status", &json!({}))?;
        let revision = status.pointer("/header/revision")?.clone();
        self.ask(leader, "kv/compaction", &json!({ "revision": revision, "physical": true }))?;
        revision.as_str()?.parse().ok()
    }

    /// Takes a member out of the cluster, then puts it back in as a new one with an empty database.
    pub fn replace(&mut self, member: usize) {
        let others: Vec<_> = (0..self.size()).filter(|&n| n != member).collect();
        while self.wait_for_leader() == member {
            self.move_leader(others[0]);
        }
        let leader = self.wait_for_leader_among(&others);
        let until = Instant::now() + PATIENCE;
        let id = loop {
            if let Some(id) = self.id_of(member) {
                break id;
            }
            assert!(Instant::now() < until, "member {member} does not answer");
            std::thread::sleep(Duration::from_millis(50));
        };
        // etcd refuses a change until all members have been connected for 5 s.
        let change = |cluster: &Cluster, path: &str, body: Value| {
            let until = Instant::now() + PATIENCE;
            while cluster.ask(leader, path, &body).is_none() {
                assert!(Instant::now() < until, "etcd does not accept {path}");
                std::thread::sleep(Duration::from_millis(200));
            }
        };
        change(self, "cluster/member/remove", json!({ "ID": id }));
        self.kill(member);
        let url = format!("http://{}", self.members[member].peers.endpoint());
        change(self, "cluster/member/add", json!({ "peerURLs": [url] }));
        let server = &mut self.members[member].server;
        server.data = tempfile::Builder::new().prefix("etcdlock-etcd-").tempdir().expect("a folder for etcd's data");
        server.args.extend(["--initial-cluster-state", "existing"].map(str::to_owned));
        server.start_again();
        self.pids[member].store(server.pid, Ordering::Relaxed);
        self.wait_until_healthy(member);
    }

    /// Runs `etcdctl` on all members, without proxies, and returns what it printed; `None` where
    /// there is no etcdctl.
    pub fn etcdctl(&self, args: &[&str]) -> Option<String> {
        let endpoints: Vec<_> = (0..self.size()).map(|n| self.direct_endpoint(n)).collect();
        run(etcdctl_command(&endpoints)?.args(args))
    }
}

fn etcdctl_command(endpoints: &[String]) -> Option<Command> {
    etcdctl(&endpoints.join(","))
}

/// Whether a process has a TCP socket with this local port.
fn has_socket(pid: u32, port: u16) -> bool {
    let find = || {
        let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
        let local = format!(":{port:04X}");
        let of_port = table.lines().skip(1).filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            (fields.get(1)?.ends_with(&local)).then(|| format!("socket:[{}]", fields.get(9).unwrap_or(&"")))
        });
        let sockets: Vec<_> = of_port.collect();
        let files = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).ok()?;
        let mut links = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
        Some(links.any(|link| sockets.iter().any(|socket| link.as_os_str() == socket.as_str())))
    };
    find().unwrap_or(false)
}
