//! The faults are real: what the tests of the lock rest on.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use etcdlock_rig::{Cluster, Direction, Fault, Proxy};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(100);

/// A server that says everything twice.
fn doubler() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0];
                while let Ok(1) = (&stream).read(&mut byte) {
                    let _ = (&stream).write_all(&[byte[0], byte[0]]);
                }
            });
        }
    });
    port
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.endpoint()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

fn hears_nothing(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let silent = stream.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(LONG)).unwrap();
    silent
}

fn read(stream: &mut TcpStream, length: usize) -> String {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn bytes_are_held_delayed_lost_or_reset() {
    let proxy = Proxy::to(doubler());
    let mut stream = connect(&proxy);
    stream.write_all(b"a").unwrap();
    assert_eq!(read(&mut stream, 2), "aa");

    proxy.set(Direction::ToServer, Fault::Hold);
    stream.write_all(b"b").unwrap();
    assert!(hears_nothing(&mut stream));
    proxy.set(Direction::ToServer, Fault::None);
    assert_eq!(read(&mut stream, 2), "bb");

    proxy.set(Direction::ToClient, Fault::Delay(SOON));
    let start = Instant::now();
    stream.write_all(b"c").unwrap();
    assert_eq!(read(&mut stream, 2), "cc");
    assert!(start.elapsed() >= SOON);
    proxy.heal();

    proxy.reset_after(Direction::ToClient, 3);
    stream.write_all(b"de").unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest, b"dde", "three bytes and the end");
    assert!(!proxy.is_reset_due());

    let mut stream = connect(&proxy);
    proxy.set(Direction::ToClient, Fault::Cut);
    stream.write_all(b"f").unwrap();
    assert!(hears_nothing(&mut stream));
    let mut silent = connect(&proxy);
    assert!(hears_nothing(&mut silent), "a new connection is accepted");
    silent.write_all(b"g").unwrap();
    std::thread::sleep(SOON);
    proxy.heal();
    assert!(stream.read(&mut [0]).is_err(), "what has lost bytes is reset");
    assert!(silent.read(&mut [0]).is_err());

    let mut stream = connect(&proxy);
    proxy.refuse();
    assert!(stream.read(&mut [0]).is_err());
    assert!(TcpStream::connect(proxy.endpoint()).and_then(|mut stream| stream.read(&mut [0])).is_err());
    proxy.heal();
    let mut stream = connect(&proxy);
    stream.write_all(b"h").unwrap();
    assert_eq!(read(&mut stream, 2), "hh");
}

#[test]
fn a_request_that_was_held_arrives_after_its_client_has_gone() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::to(listener.local_addr().unwrap().port());
    let mut stream = connect(&proxy);
    let (mut server, _) = listener.accept().unwrap();
    stream.write_all(b"a").unwrap();
    assert_eq!(read(&mut server, 1), "a");
    proxy.hold_open_connections();
    stream.write_all(b"late").unwrap();
    assert!(hears_nothing(&mut server));
    drop(stream);
    let mut other = connect(&proxy);
    let (mut new, _) = listener.accept().unwrap();
    other.write_all(b"new").unwrap();
    assert_eq!(read(&mut new, 3), "new", "new connections work");
    proxy.deliver_held();
    server.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(read(&mut server, 4), "late");
    assert_eq!(server.read(&mut [0]).unwrap(), 0, "and then its end");
}

fn commits(cluster: &Cluster, member: usize) -> bool {
    cluster.ask(member, "kv/put", &json!({ "key": "eA==", "value": "eA==" })).is_some()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_isolated_member_commits_nothing_and_the_others_go_on() {
    let mut cluster = Cluster::start();
    let leader = cluster.wait_for_leader();
    cluster.isolate(leader);
    let others: Vec<_> = (0..3).filter(|&n| n != leader).collect();
    let new = cluster.wait_for_leader_among(&others);
    until("the others commit", || commits(&cluster, new));
    assert!(!commits(&cluster, leader), "the old leader is alone");
    cluster.heal();
    until("all commit again", || (0..3).all(|n| commits(&cluster, n)));

    let next = (cluster.wait_for_leader() + 1) % 3;
    until("the leader moves", || cluster.move_leader(next));
    assert_eq!(cluster.leader(), Some(next));
    cluster.kill(next);
    let others: Vec<_> = (0..3).filter(|&n| n != next).collect();
    cluster.wait_for_leader_among(&others);
    cluster.start_again(next);
    cluster.wait_until_healthy(next);
    cluster.replace(next);
    until("the replaced member commits", || commits(&cluster, next));
    assert!(cluster.compact().unwrap() > 1);
}

#[test]
fn the_command_obeys_line_by_line() {
    let mut rig = Command::new(env!("CARGO_BIN_EXE_etcdlock-rig"))
        .arg("cluster")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = rig.stdin.take().unwrap();
    let mut lines = BufReader::new(rig.stdout.take().unwrap()).lines();
    let mut next = move || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let mut tell = |command: &str| writeln!(stdin, "{command}").unwrap();

    let first = next();
    assert_eq!(first["ok"], true);
    assert_eq!(first["endpoints"].as_array().unwrap().len(), 3);
    for (command, ok) in [
        (r#"{"do":"status"}"#, true),
        (r#"{"do":"stop","member":0}"#, true),
        (r#"{"do":"cont","member":0}"#, true),
        (r#"{"do":"fault","member":1,"direction":"to_client","kind":"delay","ms":50}"#, true),
        (r#"{"do":"fault","member":1,"on":"peers","kind":"cut"}"#, true),
        (r#"{"do":"drop_answers","member":2}"#, true),
        (r#"{"do":"reset_after","member":2,"bytes":100}"#, true),
        (r#"{"do":"refuse","member":2}"#, true),
        (r#"{"do":"heal","member":2}"#, true),
        (r#"{"do":"heal"}"#, true),
        (r#"{"do":"kill","member":2}"#, true),
        (r#"{"do":"start","member":2,"wait":true}"#, true),
        (r#"{"do":"kill"}"#, false),
        (r#"{"do":"kill","member":3}"#, false),
        (r#"{"do":"fault","member":1,"kind":"odd"}"#, false),
        (r#"{"do":"dance"}"#, false),
        ("not json", false),
    ] {
        tell(command);
        let answer = next();
        assert_eq!(answer["ok"], ok, "{command}: {answer}");
        assert_eq!(answer["error"].is_string(), !ok, "{command}: {answer}");
    }
    tell(r#"{"do":"quit"}"#);
    assert_eq!(next()["ok"], true);
    assert!(rig.wait().unwrap().success());
}
