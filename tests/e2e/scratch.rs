//! Judges inside one another on one CPU. A server that holds its sockets' locks makes the kernel judge packets in the server's own context,
//! where interrupts judge other sockets' packets in the middle. If two judges used the same memory, one would find the other's verdict.

#[allow(dead_code, unused_imports, reason = "each test program uses its part")]
mod torture;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, run};
use enforcer_tests::raw::Connection;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use torture::sockets::{ListenerKind, listener_in};
use torture::{PATIENCE, bad_token, enforce, get, good_token};

const LIMIT: Duration = Duration::from_secs(180);
/// Connections with allowed heads, each with a client that sends the next request when it sees the first of an answer.
const ALLOWED: usize = 2;
/// Connections with refused heads, whose clients ask as fast as they can.
const REFUSED: usize = 6;
/// Where the clients run; the server, and whatever the namespace's packets need to be done, are on the other.
const CLIENT_CPU: usize = 0;
const SERVER_CPU: usize = 1;
/// All heads are of one length, so that one in the place of another would fit; and they take the kernel long.
const HEAD_BYTES: usize = 3900;
const LINES: usize = 48;
/// Heads of a connection, each of another layout: more than the kernel remembers, so that it scans them each time.
const VARIANTS: usize = 8;
/// While the server writes such an answer it holds the socket's lock, and the next request has to wait for it.
const ANSWER_BYTES: usize = 256 << 10;

/// A head of a connection.
fn head(token: &str, number: usize, variant: usize) -> Vec<u8> {
    let mut lines = get(token);
    for line in 0..LINES {
        let pad = "p".repeat(30 + (line * 7 + variant * 5) % 20);
        lines = lines.header(&format!("X-Line-{line}"), &pad);
    }
    let with =
        |pad: usize| lines.clone().header("X-Number", &format!("{number:04}{}", "p".repeat(pad))).build();
    with(HEAD_BYTES - with(0).len())
}

/// The heads of all connections.
type Heads = Vec<Vec<Vec<u8>>>;

#[test]
fn judges_inside_one_another_keep_their_heads_apart() -> Result<()> {
    let _deadline = Deadline::new("scratch", LIMIT);
    let quick = std::env::var_os("ENFORCER_TEST_QUICK").is_some();
    let netns = NetNs::new("scratch")?;
    steer(&netns)?;
    let cgroup = Cgroup::new("scratch")?;
    let listener = listener_in(&cgroup, Some(&netns), "127.0.0.1:0".parse()?, ListenerKind::default())?;
    let addr = listener.local_addr()?;
    let (enforcement, issuer) = enforce(cgroup, &[addr])?;
    let heads: Heads = (0..ALLOWED + REFUSED)
        .map(|number| {
            let token = if number < ALLOWED { good_token(&issuer)? } else { bad_token(&issuer)? };
            Ok((0..VARIANTS).map(|variant| head(&token, number, variant)).collect())
        })
        .collect::<Result<_>>()?;
    let (connections, accepted) = connect(&netns, &listener, addr)?;

    let until = Instant::now() + Duration::from_secs(if quick { 3 } else { 8 });
    let stop = AtomicBool::new(false);
    let asking = AtomicU64::new(connections.len() as u64);
    let answers = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        let (heads, stop, asking, answers) = (&heads, &stop, &asking, &answers);
        let server = scope.spawn(move || serve(accepted, heads, stop));
        let clients: Vec<_> = connections
            .into_iter()
            .zip(heads)
            .enumerate()
            .map(|(number, (connection, heads))| {
                scope.spawn(move || {
                    pin(CLIENT_CPU);
                    let going = || Instant::now() < until && !stop.load(Ordering::Relaxed);
                    let outcome = if number < ALLOWED {
                        overlap(connection, heads, going, answers)
                    } else {
                        be_refused(connection, heads, going, answers)
                    };
                    // The server goes on until the last client has its answers.
                    if asking.fetch_sub(1, Ordering::Relaxed) == 1 || outcome.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    outcome.with_context(|| format!("connection {number}"))
                })
            })
            .collect();
        let outcomes: Vec<Result<()>> = clients
            .into_iter()
            .chain([server])
            .map(|thread| thread.join().map_err(|_| anyhow!("panicked"))?)
            .collect();
        outcomes.into_iter().collect()
    })?;

    let counters = enforcement.counters()?;
    let nested = counters.kernel("scratch-nested");
    println!("{} answers, {nested} judges inside another", answers.load(Ordering::Relaxed));
    if nested == 0 {
        // Not a failure: with one CPU, or another way of preemption, there may be none.
        println!("none was inside another, so nothing is shown");
    }
    ensure!(counters.kernel("dead-scratch") == 0, "more judges inside one another than there is memory for");
    ensure!(counters.kernel("allowed") > 200 && counters.kernel("refused") > 200, "the kernel knew too few");
    Ok(())
}

/// Has the server's CPU process the namespace's packets: it is interrupted for what the clients' CPU sends.
fn steer(netns: &NetNs) -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec"]);
    command.arg("mount -t sysfs none /sys; echo 2 > /sys/class/net/lo/queues/rx-0/rps_cpus");
    netns.place(&mut command)?;
    let finished = run("unshare", command, &[], PATIENCE)?;
    ensure!(finished.status.success(), "cannot steer packets: {}", finished.stderr);
    Ok(())
}

/// Keeps this thread on a CPU, where there is one of that number.
fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    let _ = cpus.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus));
}

type Pairs = (Vec<Connection>, Vec<TcpStream>);

fn connect(netns: &NetNs, listener: &TcpListener, addr: SocketAddr) -> Result<Pairs> {
    let mut pairs = Pairs::default();
    for _ in 0..ALLOWED + REFUSED {
        pairs.0.push(netns.run(|| Connection::open(addr, PATIENCE))??);
        let (stream, _) = listener.accept()?;
        // The kernel refuses by itself only then.
        stream.set_nonblocking(true)?;
        pairs.1.push(stream);
    }
    Ok(pairs)
}

/// Answers each allowed head. Each connection may bring its own heads alone, in order, and the refused ones nothing.
fn serve(mut sockets: Vec<TcpStream>, heads: &Heads, stop: &AtomicBool) -> Result<()> {
    pin(SERVER_CPU);
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {ANSWER_BYTES:06}\r\n\r\n").into_bytes();
    answer.resize(ANSWER_BYTES, b'a');
    // What was read and not looked at, and how many heads were.
    let mut read = vec![(Vec::new(), 0); sockets.len()];
    let mut buffer = [0; 4 * HEAD_BYTES];
    while !stop.load(Ordering::Relaxed) {
        for (number, (stream, (read, count))) in sockets.iter_mut().zip(&mut read).enumerate() {
            match stream.read(&mut buffer) {
                Ok(0) => continue,
                Ok(length) => read.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).with_context(|| format!("reading connection {number}")),
            }
            ensure!(number < ALLOWED, "a refused head reached the server on connection {number}");
            while read.len() >= HEAD_BYTES {
                let right = read[..HEAD_BYTES] == heads[number][*count % VARIANTS];
                ensure!(right, "another head on connection {number}");
                read.drain(..HEAD_BYTES);
                *count += 1;
                write(stream, &answer, stop).with_context(|| format!("answering connection {number}"))?;
            }
        }
    }
    Ok(())
}

fn write(stream: &mut TcpStream, mut bytes: &[u8], stop: &AtomicBool) -> Result<()> {
    while !bytes.is_empty() && !stop.load(Ordering::Relaxed) {
        match stream.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends the next head while the answer to the one before is being written.
fn overlap(
    mut connection: Connection,
    heads: &[Vec<u8>],
    going: impl Fn() -> bool,
    answers: &AtomicU64,
) -> Result<()> {
    connection.send(&heads[0])?;
    for round in 1.. {
        let mut got = connection.read_some(16 << 10)?;
        ensure!(got.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&got));
        let more = going();
        if more {
            connection.send(&heads[round % VARIANTS])?;
        }
        while got.len() < ANSWER_BYTES {
            let some = connection.read_some(ANSWER_BYTES - got.len())?;
            ensure!(!some.is_empty(), "closed in an answer");
            got.extend_from_slice(&some);
        }
        answers.fetch_add(1, Ordering::Relaxed);
        if !more {
            break;
        }
    }
    Ok(())
}

fn be_refused(
    mut connection: Connection,
    heads: &[Vec<u8>],
    going: impl Fn() -> bool,
    answers: &AtomicU64,
) -> Result<()> {
    let mut round = 0;
    while going() {
        let response = connection.roundtrip(&heads[round % VARIANTS])?;
        ensure!(response.status == 401, "{}", response.status);
        answers.fetch_add(1, Ordering::Relaxed);
        round += 1;
        // The daemon gives so many answers on one connection. The others go on.
        if response.header("connection") == Some("close") {
            break;
        }
    }
    Ok(())
}
