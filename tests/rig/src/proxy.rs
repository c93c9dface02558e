//! A TCP proxy that does to connections what bad networks do.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use socket2::SockRef;

/// From the last byte that was held to the end of its connection.
const AFTER_HELD: Duration = Duration::from_millis(500);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Requests.
    ToServer,
    /// Answers.
    ToClient,
}

/// What happens to bytes of one direction, on open and on new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// They go through.
    None,
    /// They go through, each that much later.
    Delay(Duration),
    /// They are kept, in their order, and go through when the fault ends.
    Hold,
    /// They are lost. A connection that has lost bytes is silent from then on, and is reset when the
    /// fault ends. Both directions: it accepts connections and says nothing. Only to the client:
    /// requests have their effect, answers are dropped.
    Cut,
}

/// A proxy on a port of its own in front of one server.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// Who opened a connection, by its local port. What the number means is the caller's.
pub(crate) type WhoIs = dyn Fn(u16) -> Option<usize> + Send + Sync;

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    who_is: Option<Box<WhoIs>>,
}

struct State {
    faults: [Fault; 2],
    /// Clients of whom all connections are cut.
    cut_off: Vec<usize>,
    /// New connections are reset at once.
    refusing: bool,
    /// After that many more bytes of a direction their connection is reset, once.
    reset_after: [Option<u64>; 2],
    connections: Vec<Weak<Connection>>,
    accepted: u64,
    closed: bool,
}

struct Connection {
    /// Towards the client, towards the server.
    streams: [TcpStream; 2],
    client: Option<usize>,
    queues: [Mutex<Queue>; 2],
    is_over: AtomicBool,
    /// Its bytes wait, whatever others may do.
    is_held: AtomicBool,
    /// When it was let go on; its end comes a moment later, so that what was held is heard first.
    held_until: Mutex<Option<Instant>>,
    /// Bytes of that direction were lost, so it must not carry any more.
    has_lost: [AtomicBool; 2],
}

#[derive(Default)]
struct Queue {
    chunks: VecDeque<(Instant, Vec<u8>)>,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// Starts a proxy on a free loopback port in front of a loopback port.
    pub fn to(port: u16) -> Proxy {
        Self::start(port, None)
    }

    /// One that knows its clients apart.
    pub(crate) fn with_clients(port: u16, who_is: Box<WhoIs>) -> Proxy {
        Self::start(port, Some(who_is))
    }

    fn start(port: u16, who_is: Option<Box<WhoIs>>) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, crate::free_port())).expect("a free port stays free");
        let address = listener.local_addr().expect("its address");
        let state = State {
            faults: [Fault::None; 2],
            cut_off: Vec::new(),
            refusing: false,
            reset_after: [None; 2],
            connections: Vec::new(),
            accepted: 0,
            closed: false,
        };
        let target = (Ipv4Addr::LOCALHOST, port).into();
        let shared = Arc::new(Shared { target, state: Mutex::new(state), changed: Condvar::new(), who_is });
        let accepting = shared.clone();
        std::thread::spawn(move || accept(&listener, &accepting));
        Proxy { address, shared }
    }

    /// `127.0.0.1:PORT`, for clients.
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Sets what happens to one direction. What was held goes through when that is over.
    pub fn set(&self, direction: Direction, fault: Fault) {
        self.change(|state| state.faults[direction as usize] = fault);
    }

    /// Sets both directions.
    pub fn set_both(&self, fault: Fault) {
        self.change(|state| state.faults = [fault; 2]);
    }

    /// Resets open connections, and new ones at once, until [`heal`](Self::heal).
    pub fn refuse(&self) {
        self.change(|state| state.refusing = true);
        self.reset();
    }

    /// Resets the open connections.
    pub fn reset(&self) {
        self.change(|state| {
            for connection in state.connections.drain(..).filter_map(|connection| connection.upgrade()) {
                connection.reset();
            }
        });
    }

    /// Holds the connections that are open now, in both directions; new ones work. A client that gives
    /// up on its connection and makes another leaves its last requests here, to arrive late.
    pub fn hold_open_connections(&self) {
        self.change(|state| {
            for connection in state.connections.iter().filter_map(Weak::upgrade) {
                connection.is_held.store(true, Ordering::Release);
            }
        });
    }

    /// Delivers what those connections held, at the pace at which it came: a client that gave up took its request back then,
    /// and a server that hears both at once does not begin with it.
    pub fn deliver_held(&self) {
        self.change(|state| {
            for connection in state.connections.iter().filter_map(Weak::upgrade) {
                if connection.is_held.swap(false, Ordering::AcqRel) {
                    let now = Instant::now();
                    *lock(&connection.held_until) = Some(now);
                    for queue in &connection.queues {
                        let chunks = &mut lock(queue).chunks;
                        let late = chunks.front().map_or(Duration::ZERO, |(arrived, _)| now - *arrived);
                        chunks.iter_mut().for_each(|(arrived, _)| *arrived += late);
                    }
                }
            }
        });
    }

    /// Lets that many more bytes of a direction through, in the sum of all connections, and then
    /// resets the connection on which they went.
    pub fn reset_after(&self, direction: Direction, bytes: u64) {
        self.change(|state| state.reset_after[direction as usize] = Some(bytes));
    }

    /// Whether a reset that was asked for with [`reset_after`](Self::reset_after) is still to come.
    pub fn is_reset_due(&self) -> bool {
        self.shared.lock().reset_after.iter().any(Option::is_some)
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.change(|state| {
            state.faults = [Fault::None; 2];
            state.refusing = false;
            state.reset_after = [None; 2];
        });
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.lock().accepted
    }

    pub(crate) fn cut_off(&self, client: usize) {
        self.change(|state| state.cut_off.push(client));
    }

    pub(crate) fn let_in(&self, client: usize) {
        self.change(|state| state.cut_off.retain(|&other| other != client));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        self.reset();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn reset(&self, connection: &Connection) {
        // Under the state's lock, or a thread that is just going to wait could miss it.
        let state = self.lock();
        connection.reset();
        drop(state);
        self.changed.notify_all();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let client = match client {
            Ok(client) => client,
            Err(_) => continue,
        };
        let refusing = {
            let mut state = shared.lock();
            if state.closed {
                return;
            }
            state.accepted += 1;
            state.refusing
        };
        if refusing {
            let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
            continue;
        }
        let shared = shared.clone();
        std::thread::spawn(move || connect(client, &shared));
    }
}

fn connect(client: TcpStream, shared: &Arc<Shared>) {
    let who = client.peer_addr().ok().zip(shared.who_is.as_ref()).and_then(|(from, who_is)| who_is(from.port()));
    let Ok(server) = TcpStream::connect_timeout(&shared.target, Duration::from_secs(5)) else {
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let connection = Arc::new(Connection {
        streams: [client, server],
        client: who,
        queues: Default::default(),
        is_over: AtomicBool::new(false),
        is_held: AtomicBool::new(false),
        held_until: Mutex::default(),
        has_lost: Default::default(),
    });
    {
        let mut state = shared.lock();
        if state.closed || state.refusing {
            connection.reset();
            return;
        }
        state.connections.retain(|connection| connection.strong_count() > 0);
        state.connections.push(Arc::downgrade(&connection));
    }
    for direction in [Direction::ToServer, Direction::ToClient] {
        let (reading, writing) = (connection.clone(), connection.clone());
        let (reader, writer) = (shared.clone(), shared.clone());
        std::thread::spawn(move || read(&reading, direction, &reader));
        std::thread::spawn(move || write(&writing, direction, &writer));
    }
}

impl Connection {
    fn from(&self, direction: Direction) -> &TcpStream {
        &self.streams[direction as usize]
    }

    fn to(&self, direction: Direction) -> &TcpStream {
        &self.streams[1 - direction as usize]
    }

    /// Both ends hear a reset: the streams are closed with nothing lingering when the threads have
    /// let go of them.
    fn reset(&self) {
        self.is_over.store(true, Ordering::Release);
        for stream in &self.streams {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            // Says nothing to the other end, but wakes the thread that reads.
            let _ = stream.shutdown(Shutdown::Read);
        }
    }
}

/// Keeps what arrives until it is its turn.
fn read(connection: &Connection, direction: Direction, shared: &Shared) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let got = match (&mut connection.from(direction)).read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            got => got,
        };
        // Under the state's lock, or the writer could miss it.
        let state = shared.lock();
        let mut queue = lock(&connection.queues[direction as usize]);
        match got {
            Ok(0) => queue.ended = true,
            Ok(length) => queue.chunks.push_back((Instant::now(), buffer[..length].to_vec())),
            // What it sent before is still delivered late.
            Err(_) if connection.is_held.load(Ordering::Acquire) => queue.ended = true,
            Err(_) => {
                connection.reset();
                queue.ended = true;
            }
        }
        let ended = queue.ended;
        drop((queue, state));
        shared.changed.notify_all();
        if ended {
            return;
        }
    }
}

enum Turn {
    Send(Vec<u8>),
    /// Nothing more will come.
    End,
    Reset,
}

fn write(connection: &Connection, direction: Direction, shared: &Shared) {
    let to = connection.to(direction);
    loop {
        match next(connection, direction, shared) {
            Turn::Send(bytes) => {
                let last = shared.lock().count_down(direction, bytes.len());
                let sent = (&mut &*to).write_all(&bytes[..last.unwrap_or(bytes.len())]);
                if last.is_some() {
                    // An orderly end first: a reset would overtake these bytes.
                    let _ = to.shutdown(Shutdown::Write);
                }
                if last.is_some() || sent.is_err() {
                    return shared.reset(connection);
                }
            }
            Turn::End => {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Turn::Reset => return shared.reset(connection),
        }
    }
}

impl State {
    /// How many of these bytes still go, if the connection is to be reset on them.
    fn count_down(&mut self, direction: Direction, bytes: usize) -> Option<usize> {
        let left = self.reset_after[direction as usize]?;
        if left <= bytes as u64 {
            self.reset_after[direction as usize] = None;
            return Some(left as usize);
        }
        self.reset_after[direction as usize] = Some(left - bytes as u64);
        None
    }
}

/// Waits for the next bytes that may go.
fn next(connection: &Connection, direction: Direction, shared: &Shared) -> Turn {
    let mut state = shared.lock();
    loop {
        if connection.is_over.load(Ordering::Acquire) {
            return Turn::Reset;
        }
        let is_cut_off = connection.client.is_some_and(|client| state.cut_off.contains(&client));
        let fault = match state.faults[direction as usize] {
            _ if is_cut_off => Fault::Cut,
            _ if connection.is_held.load(Ordering::Acquire) => Fault::Hold,
            fault => fault,
        };
        let mut queue = lock(&connection.queues[direction as usize]);
        let mut wait = None;
        match fault {
            // Even its end is not heard.
            Fault::Cut => {
                if !queue.chunks.is_empty() {
                    connection.has_lost[direction as usize].store(true, Ordering::Release);
                    queue.chunks.clear();
                }
            }
            Fault::Hold => {}
            _ if connection.has_lost.iter().any(|lost| lost.load(Ordering::Acquire)) && !state.faults.contains(&Fault::Cut) => {
                return Turn::Reset;
            }
            _ if connection.has_lost[direction as usize].load(Ordering::Acquire) => queue.chunks.clear(),
            Fault::None | Fault::Delay(_) => {
                let delay = if let Fault::Delay(delay) = fault { delay } else { Duration::ZERO };
                match queue.chunks.front().map(|(arrived, _)| *arrived + delay) {
                    Some(due) if due <= Instant::now() => {
                        let bytes = queue.chunks.pop_front().map(|(_, bytes)| bytes).unwrap_or_default();
                        return Turn::Send(bytes);
                    }
                    Some(due) => wait = Some(due.saturating_duration_since(Instant::now())),
                    None if queue.ended => {
                        let due = lock(&connection.held_until).map_or_else(Instant::now, |until| until + AFTER_HELD);
                        match due.saturating_duration_since(Instant::now()) {
                            Duration::ZERO => return Turn::End,
                            left => wait = Some(left),
                        }
                    }
                    None => {}
                }
            }
        }
        drop(queue);
        state = match wait {
            Some(wait) => shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}
